"""The benchmarks' arithmetic and their table. What needs servers to be measured is no test."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from benchmarks import decisions, drills, stores
from benchmarks.measure import Comparison, Goal, Spread, document, interleaved, merged, report, verdict
from benchmarks.remediation import FROM_TICK, PARTS, REACTION, Moments, memory_sides
from ops_platform.clients.alertmanager import merge, read_alerts
from ops_platform.clients.http import Answer
from ops_platform.drills.model import Sample, StepRecord, StepState
from ops_platform.inventory.model import Inventory
from ops_platform.remediation.intake import decide


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


def named(name: str, seconds: float) -> Comparison:
    found = Comparison(
        name, "a title: with a colon", "seconds", "How.\n\nAnd how else.", [Goal("≤ 1 s", "ours", most=1.0)]
    )
    found.add("ours", seconds)
    return found


def test_a_document_with_no_new_results_stays_as_it_is() -> None:
    written = document(
        [named("a", 1.0), named("b", 2.0)], {"cores": "2", "measured": "then"}, "# Benchmarks\n\nText.\n"
    )
    assert merged(written, [], {}, []) == written


def test_new_results_stand_in_place_of_their_older_ones_and_beside_the_others() -> None:
    order = ["first", "a", "b", "c"]
    before = document([named("a", 1.0), named("c", 3.0)], {"cores": "2", "measured": "then"}, "# Benchmarks\n")
    facts = {"cores": "4", "measured": "now", "load average at the end": "0.1"}
    written = merged(before, [named("c", 0.5), named("b", 2.0), named("first", 9.0)], facts, order)
    lines = written.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("## ")] == [
        "## Machine", "## Goals", "## first", "## a", "## b", "## c",
    ]  # fmt: skip
    assert [line for line in lines if "≤ 1 s" in line] == [
        "| first | ≤ 1 s | 9.00 | **missed** |",
        "| a | ≤ 1 s | 1.00 | reached |",
        "| b | ≤ 1 s | 2.00 | **missed** |",
        "| c | ≤ 1 s | 0.50 | reached |",
    ]
    assert "| cores | 4 |" in lines
    assert "| measured | then |" in lines, "what was not measured now is of that time"
    assert written.count("Measured now.") == 3
    assert "load average at the end" not in written
    again = merged(written, [named("c", 0.5), named("b", 2.0), named("first", 9.0)], facts, order)
    assert again == written


def test_what_is_no_document_is_not_written_over() -> None:
    with pytest.raises(ValueError, match="no document"):
        merged("# Something else\n\n## Machine\n", [named("a", 1.0)], {}, [])


def test_the_parts_of_a_reaction_add_up() -> None:
    at = [datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=second) for second in (0, 20, 21, 23, 26, 30)]
    parts = Moments(*at).parts()
    assert [parts[name] for name in PARTS] == [20, 1, 2, 3, 4]
    assert parts[FROM_TICK] == 10
    assert parts[REACTION] == 30 == sum(parts[name] for name in PARTS)


def test_the_sides_of_memory_are_the_end_the_half_and_the_first_tenth() -> None:
    assert memory_sides(10_000) == ("ours, after 10,000 ticks", "after 5,000 ticks", "after 1,000 ticks")


def test_each_alert_of_the_benchmark_meets_one_rule_and_every_guard() -> None:
    inventory, now = Inventory.model_validate(decisions.fleet()), datetime(2026, 12, 1, tzinfo=UTC)
    signals = merge([read_alerts(Answer(200, {}, decisions.alerts(100), "here"), now)], "here")
    decided, unmatched = decide(inventory, signals, now)
    assert (len(decided), unmatched) == (100, 0)
    assert decisions.rule_all_on(inventory, decided, now) == (20, 80), "the budget of all rules"
    frozen = datetime(2026, 12, 24, tzinfo=UTC)
    assert decisions.rule_all_on(inventory, decided, frozen) == (0, 100), "a freeze of changes refuses them all"


# Stores and drills

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def test_the_commands_for_a_redis_make_keys_of_every_type_and_the_same_each_time() -> None:
    commands = list(stores.redis_commands(100_000))
    assert {command.split(b"\r\n")[2] for command in commands} == {b"SET", b"HSET", b"RPUSH", b"SADD", b"ZADD", b"XADD"}
    assert commands == list(stores.redis_commands(100_000))
    assert 100_000 <= sum(map(len, commands)) < 200_000
    for command in commands:
        words = command.split(b"\r\n")
        assert words[0] == b"*%d" % command.count(b"\r\n$"), "as many words as are announced"


def test_twenty_objects_in_turn_are_of_seven_kinds_and_no_two_of_a_kind_have_one_name() -> None:
    made = [stores.objects_of(number) for number in range(200)]
    assert len({plural for _, plural, _ in made}) == 7
    assert len({(plural, body["metadata"]["name"]) for _, plural, body in made}) == 200


def record(step: str, begin: float, end: float) -> StepRecord:
    return StepRecord(step, StepState.DONE, 1, NOW + timedelta(seconds=begin), NOW + timedelta(seconds=end))


def test_a_drills_own_time_is_all_that_lies_outside_of_its_waits() -> None:
    steps = {"before": (2, 4), "promoted": (4.5, 7), "outage": (7, 8), "rejoined": (8.25, 9), "whole": (9.5, 10)}
    records = {name: record(name, *times) for name, times in steps.items()}
    found = drills.own_seconds(NOW, NOW + timedelta(seconds=11.5), records)
    assert found == {
        "until the probes run": 2, "between waits": 0.5 + 0.25 + 0.5, "the end": 1.5, drills.OVERHEAD: 4.75, drills.WHOLE: 11.5,
    }  # fmt: skip


def sample(ms: float, ok: bool, took: float = 1.0) -> Sample:
    return Sample(NOW + timedelta(milliseconds=ms), ok, took, None, None if ok else "late")


def test_the_spacing_of_attempts_is_that_of_their_beginnings() -> None:
    middle, late = drills.spacing([sample(at, True) for at in [*range(0, 5000, 50), 5100]])
    assert middle == 50
    assert 50 <= late <= 150


def test_an_outage_is_compared_with_the_hang_that_it_met_and_others_are_counted() -> None:
    hang = drills.Hang(NOW + timedelta(milliseconds=120), NOW + timedelta(milliseconds=320))
    samples = [sample(at, not (150 <= at <= 250 or at == 600)) for at in range(0, 1000, 50)]
    error, others = drills.largest_error(samples, [hang])
    assert error == pytest.approx(200 - (301 - 150))
    assert others == 1
    with pytest.raises(RuntimeError, match="nobody saw"):
        drills.largest_error([sample(at, True) for at in range(0, 1000, 50)], [hang])
