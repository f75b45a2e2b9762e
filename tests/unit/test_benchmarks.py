"""The benchmarks' arithmetic and their table. What they measure needs servers and is no test."""

from __future__ import annotations

import pytest

from benchmarks.measure import Comparison, Goal, Spread, document, interleaved, report, verdict


def compared(*goals: Goal) -> Comparison:
    found = Comparison("full", "full backup", "seconds", "How it was done.", goals)
    for mine, theirs in ((2.0, 10.0), (6.0, 12.0), (4.0, 5.0)):
        found.add("ours", mine)
        found.add("peer", theirs)
    return found


def test_a_spread_is_least_median_and_most() -> None:
    assert Spread.of([3.0, 9.0, 1.0, 4.0]) == Spread(1.0, 3.5, 9.0)


def test_no_rounds_are_no_spread() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        Spread.of([])


def test_the_ratio_is_of_medians_and_its_spread_is_by_round() -> None:
    ratio, spread = compared().ratio("ours", "peer")
    assert ratio == 4.0 / 10.0
    assert spread == Spread(0.2, 0.5, 0.8)


def test_a_ratio_needs_the_same_rounds_on_both_sides() -> None:
    found = compared()
    found.add("ours", 1.0)
    with pytest.raises(ValueError, match="zip"):
        found.ratio("ours", "peer")


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal("at most 0.4 ×", "ours", "peer", most=0.4), "at most 0.4 ×: 0.40, reached"),
        (Goal("at most 0.39 ×", "ours", "peer", most=0.39, if_missed="slow"), "at most 0.39 ×: 0.40, missed; slow"),
        (Goal("at least 0.41 ×", "ours", "peer", least=0.41), "at least 0.41 ×: 0.40, missed"),
        (Goal("at most 4", "ours", most=4.0), "at most 4: 4.00, reached"),
        (Goal("another", "ours", "nobody", most=1.0), "another: not measured"),
    ],
)
def test_a_goal_is_judged_by_its_figure(goal: Goal, said: str) -> None:
    assert verdict(compared(goal), goal) == said


def test_sides_take_turns_and_the_first_one_changes() -> None:
    order: list[str] = []
    interleaved(3, {side: lambda side=side: order.append(side) for side in "abc"})
    assert "".join(order) == "abcbcacab"


def test_the_terminal_shows_both_sides_and_their_ratio() -> None:
    text = report(compared(Goal("at most half", "ours", "peer", most=0.5)))
    assert "4.00 [2.00–6.00]" in text
    assert "ours / peer: 0.40, by round 0.20–0.80" in text
    assert "goal at most half: 0.40, reached" in text


def test_the_document_says_what_was_missed_and_why() -> None:
    found = compared(
        Goal("≤ 0.5 | half", "ours", "peer", most=0.5),
        Goal("≤ 1 s", "ours", most=1.0, if_missed="the store is slow"),
    )
    found.load += [1.25, 6.0, 3.0]
    found.notes.append("A note.")
    lines = document([found], {"cores": "2"}, "# Benchmarks\n").splitlines()
    assert lines[0] == "# Benchmarks"
    assert "| cores | 2 |" in lines
    assert "| full | ≤ 0.5 \\| half | 0.40 | reached |" in lines
    assert "| full | ≤ 1 s | 4.00 | **missed**: the store is slow |" in lines
    assert "| peer | 5.00 | 10.0 | 12.0 | 3 |" in lines
    assert "| ours / peer | 0.40 | 0.20–0.80 |" in lines
    assert "Load average as the 3 rounds began: 1.2 to 6.0." in lines
    assert lines[-1] == "A note."
