"""What of drills is pure: runbooks as they are read, availability, the forecast, what is overdue, the pages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_platform import drilling
from ops_platform.drills.availability import gaps, probe_card, resolution_ms, unavailable_seconds
from ops_platform.drills.forecast import Throughput, growth, missed_at, predict
from ops_platform.drills.loader import read, shipped
from ops_platform.drills.model import (
    ENDED_IN_IT,
    AnswerCard,
    CheckCard,
    Drill,
    DrillCard,
    DrillState,
    Finding,
    FindingState,
    Measured,
    ObjectiveCard,
    Outage,
    ProbeCard,
    ResourceCard,
    Sample,
    StackPart,
    StepCard,
)
from ops_platform.drills.overdue import NEVER, Standing, most_overdue, standings
from ops_platform.drills.probing import Probing
from ops_platform.drills.registry import doings
from ops_platform.drills.runbook import Probe, Runbook
from ops_platform.drills.steps import redis
from ops_platform.drills.steps.patroni import Words
from ops_platform.drills.steps.writes import Attempted, Lost, lost_of
from ops_platform.drills.steps.wrong_side import not_known
from ops_platform.errors import AccessDeniedError, InventoryError
from ops_platform.inventory.base import Classification
from ops_platform.inventory.drills import Drills
from ops_platform.reports.drills import Outlook, drill_report, drills_report, timeline_of
from ops_platform.reports.pictures import drill_picture

NOW = datetime(2026, 11, 25, 20, 0, tzinfo=UTC)

GOOD = """\
version: 1
id: mine
title: Mine
scenario: loss
kinds: [postgresql]
parameters:
  to: { default: latest, description: When. }
steps:
  - id: look
    kind: check
    does: restore.possible
    with: { to: { parameter: to } }
  - id: lost
    kind: inject
    does: drill.suppose
    needs: [look]
  - id: clean
    kind: teardown
"""


# Runbooks


def test_a_runbook_is_read() -> None:
    assert [step.id for step in read(GOOD.encode(), "mine.yaml").steps] == ["look", "lost", "clean"]


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("kind: check", "kind: chek", "mine.yaml:10: steps[0].kind: there is no such kind of step; did you mean 'check'?"),
        ("does: restore.possible", "does: restore.posible", "mine.yaml:11: steps[0].does: nothing is registered under 'restore.posible'; did you mean"),
        ("does: drill.suppose", "does: restore.possible", "mine.yaml:15: steps[1].does: restore.possible is for steps of kind check, and this is"),
        ("needs: [look]", "needs: [loook]", "mine.yaml:16: steps[1].needs[0]: there is no step 'loook'; did you mean 'look'?"),
        ("with: { to: { parameter: to } }", "with: { too: latest }", "mine.yaml:12: steps[0].with.too: there is no key 'too' here; did you mean 'to'?"),
        ("{ parameter: to }", "{ parameter: two }", "mine.yaml:12: steps[0].with: there is no parameter 'two'; did you mean 'to'?"),
        ("{ to: { parameter: to } }", "{ to: 7 }", "mine.yaml:12: steps[0].with.to: this should be a text, not 7"),
        ("    needs: [look]", "    needd: [look]", "mine.yaml:16: steps[1].needd: there is no key 'needd' here; did you mean 'needs'?"),
        ("    needs: [look]", "    within: 5", "mine.yaml:16: steps[1].within: 5 is not a duration"),
        ("  - id: lost", "  - id: look", "mine.yaml:13: steps[1].id: the id 'look' belongs to another step already"),
        ("    kind: teardown", "    kind: human\n    asks: x", "mine.yaml:8: steps: it changes something, and no step of kind teardown puts it back"),
        ("scenario: loss\n", "", "mine.yaml:1: scenario: the key 'scenario' is missing"),
        ("does: restore.possible", "does: restore.possible\n    needs: [lost]", "mine.yaml:8: steps: these steps wait for one another: look, lost"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_file_line_and_key(was: str, becomes: str, said: str) -> None:
    text = GOOD.replace(was, becomes, 1)
    assert text != GOOD
    with pytest.raises(InventoryError) as raised:
        read(text.encode(), "mine.yaml")
    assert said in str(raised.value)


def test_all_mistakes_are_said_at_once() -> None:
    text = GOOD.replace("kind: check", "kind: chek").replace("[look]", "[loook]").replace("scenario: loss\n", "")
    with pytest.raises(InventoryError, match="3 mistakes"):
        read(text.encode(), "mine.yaml")


def test_an_abort_condition_names_a_probe() -> None:
    text = GOOD.replace("steps:", "abort_when:\n  - { probe: look, unavailable_for: 1m }\nsteps:")
    with pytest.raises(InventoryError, match="there is no probe 'look'"):
        read(text.encode(), "mine.yaml")


def test_what_is_shipped_can_be_read_and_every_step_says_what_it_does() -> None:
    assert set(shipped()) == {
        "restore-drill", "site-drill", "failover-drill", "freeze-drill", "cut-drill", "switchover-drill", "table-top",
        "redis-failover-drill", "kafka-broker-loss-drill", "full-stack-drill", "vault-drill",
    }  # fmt: skip
    assert all(found.what for found in doings().values())


def test_in_earnest_the_same_runbook_breaks_nothing() -> None:
    book = shipped()["restore-drill"]
    real = [step.id for step in book.steps_for("real")]
    assert real == ["repository", "files", "server", "serves", "rto", "rpo", "data", "clean"]
    assert book.needs_of(book.step("files"), "real") == {"repository"}


@pytest.mark.parametrize(
    ("runbook", "back"),
    [
        ("failover-drill", "rejoined"), ("freeze-drill", "rejoined"), ("cut-drill", "rejoined"),
        ("redis-failover-drill", "rejoined"), ("kafka-broker-loss-drill", "replicated"),
    ],
)  # fmt: skip
def test_writes_are_counted_once_what_was_broken_is_back(runbook: str, back: str) -> None:
    """One that hung, or that nobody reached, may take the lead again when it wakes, and throw its successor's writes away."""
    book = shipped()[runbook]
    assert back in book.needs_of(book.step("lost"), "drill")


def test_what_was_acknowledged_beside_the_old_primary_is_counted_once_it_follows() -> None:
    book = shipped()["cut-drill"]
    assert "rejoined" in book.needs_of(book.step("wrong-side-lost"), "drill")
    assert "wrong-side" in book.needs_of(book.step("before"), "drill")


def test_a_runbook_reads_as_it_was_written_down() -> None:
    for book in shipped().values():
        assert Runbook.model_validate(book.model_dump(mode="json", by_alias=True)) == book


# Availability


def sample(ms: int, ok: bool = True, took: float = 5.0) -> Sample:
    return Sample(NOW + timedelta(milliseconds=ms), ok, took, error=None if ok else "refused")


def test_an_outage_lasts_from_the_first_failure_to_the_next_answer() -> None:
    (gap,) = gaps([sample(0), sample(50, False), sample(100, False, 1000), sample(150), sample(200)])
    assert ((gap.began - NOW) / timedelta(milliseconds=1), gap.seconds, gap.failed) == (50, 0.105, 2)


def test_an_outage_that_does_not_end_lasts_to_the_last_attempt() -> None:
    (gap,) = gaps([sample(0), sample(50, False), sample(100, False, 1000)])
    assert (gap.ended, gap.seconds) == (None, 1.05)


@given(st.lists(st.booleans(), max_size=60))
def test_outages_do_not_overlap_and_hold_every_failure(ok: list[bool]) -> None:
    samples = [sample(50 * number, good) for number, good in enumerate(ok)]
    found = gaps(samples)
    assert sum(gap.failed for gap in found) == sum(not good for good in ok)
    assert all(a.ended is not None and a.ended <= b.began for a, b in pairwise(found))
    assert unavailable_seconds(samples) <= len(ok) * 0.05 + 0.01


def test_a_probes_card_counts_from_the_drills_beginning() -> None:
    step = Probe.model_validate({"id": "w", "kind": "probe", "does": "postgres.write"})
    card = probe_card(step, [sample(1000), sample(1050, False), sample(1100)], NOW)
    assert card.outages == [Outage(began=1.05, ended=1.105)]
    assert (card.attempts, card.failed, card.errors) == (3, 1, {"refused": 1})
    assert (card.began, card.ended) == (1.0, 1.105)
    assert resolution_ms([sample(0)]) is None


def test_what_failed_while_the_probe_was_starting_is_no_outage_of_the_target() -> None:
    step = Probe.model_validate({"id": "w", "kind": "probe", "does": "postgres.write"})
    starting, seen = [sample(0, False, 900), sample(50, False)], [sample(1000), sample(1050, False), sample(1100)]
    card = probe_card(step, [*starting, *seen], NOW)
    assert card == probe_card(step, seen, NOW)
    assert card.unavailable_seconds == 0.055
    nobody_saw_it_well = probe_card(step, starting, NOW)
    assert (nobody_saw_it_well.failed, nobody_saw_it_well.unavailable_seconds) == (2, 0.9)


# Beside a primary that is cut off


CUT, LATER = NOW + timedelta(seconds=1), NOW + timedelta(seconds=9)
WENT_ON = [sample(0), sample(900), sample(960, True, 3000), sample(4000, False), sample(9010, False)]


@pytest.mark.parametrize(
    ("facts", "samples", "why"),
    [
        ({"member": "n1"}, WENT_ON, None),
        ({"why": "its network may not be joined"}, WENT_ON, "its network may not be joined"),
        ({}, WENT_ON, "it was beside nobody"),
        ({"member": "n2"}, WENT_ON, "it was beside n2"),
        ({"member": "n1"}, WENT_ON[:-1], "tells nothing any more"),
        ({"member": "n1"}, [], "tells nothing any more"),
        ({"member": "n1"}, [sample(0), sample(900, False), *WENT_ON[2:]], "when it was cut off: refused"),
        ({"member": "n1"}, WENT_ON[2:], "it had not begun"),
    ],
)
def test_nothing_lost_beside_the_old_primary_says_nothing_where_nobody_was_there(
    facts: dict[str, str], samples: list[Sample], why: str | None
) -> None:
    found = not_known(facts, samples, "n1", CUT, LATER)
    assert found is None if why is None else why in (found or "")


# The forecast


def throughput(days: int, size: int, slower: float = 1.0) -> Throughput:
    mib = 1 << 20
    return Throughput(NOW - timedelta(days=days), size * mib, size / 10 * slower, 100 * mib, 20 * slower, 5 * slower)


def test_a_restore_is_predicted_from_its_rates_with_an_interval() -> None:
    seen = [throughput(90, 1000), throughput(60, 1000, 1.1), throughput(30, 1000, 0.9)]
    found = predict(seen, 2000 << 20, 100 << 20)
    assert found is not None
    assert found.expected == pytest.approx(225, rel=0.01)
    assert found.low < found.expected < found.high
    assert found.misses(found.high) is False
    assert found.misses(found.low - 1) is True
    assert found.misses(found.expected) is None


def test_few_drills_give_a_wide_interval_that_is_said_to_be_a_guess() -> None:
    found = predict([throughput(1, 1000)], 1000 << 20, 100 << 20)
    assert found is not None
    assert found.high == pytest.approx(3 * found.expected)
    assert "too few" in found.how
    assert predict([], 1, 1) is None


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=12))
def test_the_interval_holds_the_expectation_and_grows_with_the_spread(factors: list[float]) -> None:
    seen = [throughput(10 * number, 1000, factor) for number, factor in enumerate(factors, 1)]
    found = predict(seen, 1000 << 20, 100 << 20)
    assert found is not None
    assert 0 < found.low <= found.high
    assert found.low <= max(t.total for t in seen) * (1 + 1e-9)  # of floating point


def test_growth_says_when_the_objective_will_be_missed() -> None:
    seen = [throughput(60, 1000), throughput(30, 2000), throughput(0, 3000)]
    grown = growth(seen)
    assert grown is not None
    assert grown.bytes_a_day / (1 << 20) == pytest.approx(1000 / 30)
    when = missed_at(seen, 100 << 20, 600, NOW, timedelta(days=182))
    assert when is not None
    assert timedelta(days=60) < when - NOW < timedelta(days=100)
    assert missed_at(seen, 100 << 20, 6000, NOW, timedelta(days=182)) is None


# What is overdue


def a_drill(target: str, days: int, verdict: str = "PASS", **more: Any) -> Drill:
    at = NOW - timedelta(days=days)
    return Drill(
        f"d{days}", "p", "restore-drill", {}, "", target, target, "test", "database-gone", "drill", {}, {}, "ann", "x", None, "",
        DrillState.ENDED, at, at, ended_at=at, verdict=verdict, card=more or None,
    )  # fmt: skip


DECLARED = Drills.model_validate(
    {"plan": [{"id": "p", "runbook": "restore-drill", "targets": ["app-db", "crm-db"], "every": "30d"}]}
)
CLASSES = {"app-db": Classification.INTERNAL, "crm-db": Classification.RESTRICTED}


def standing_of(*drills: Drill) -> dict[str, Any]:
    found = standings(DECLARED, {"restore-drill": "database-gone"}, CLASSES, drills, NOW)
    return {one.target: one for one in found}


def test_what_was_never_drilled_comes_first_and_the_classified_before_it() -> None:
    found = standings(DECLARED, {"restore-drill": "database-gone"}, CLASSES, [], NOW)
    assert [(one.target, one.risk) for one in found] == [("crm-db", 8 * NEVER), ("app-db", 2 * NEVER)]
    first = most_overdue(found)
    assert first is not None
    assert first.target == "crm-db"


def test_only_a_pass_proves() -> None:
    found = standing_of(a_drill("app-db", 3, "FAIL"), a_drill("crm-db", 3))
    assert (found["app-db"].overdue, found["app-db"].last_verdict) == (True, "FAIL")
    assert (found["crm-db"].overdue, found["crm-db"].proven_by) == (False, "d3")


def test_a_failure_and_another_size_since_raise_the_risk() -> None:
    calm = standing_of(a_drill("app-db", 15))["app-db"].risk
    failed = standing_of(a_drill("app-db", 15), a_drill("app-db", 3, "FAIL"))["app-db"].risk
    small, large = {"backups": [{"bytes": 100}]}, {"backups": [{"bytes": 200}]}
    grown = standing_of(a_drill("app-db", 15, **small), a_drill("app-db", 3, "COULD_NOT_VERIFY", **large))[
        "app-db"
    ].risk
    assert calm == 1.0
    assert failed == grown == 2.0


# The pages


def a_card(days: int, verdict: str = "PASS", rto: float | None = 20.0) -> DrillCard:
    begun = NOW - timedelta(days=days, minutes=5)
    step = StepCard(
        id="loss", kind="inject", title="The <primary> hangs", does="x", state="done", attempts=1, started=1.0, seconds=2.0,
        objective_seconds=None, met=None, said="", needs=[], critical=True,
    )  # fmt: skip
    probe = ProbeCard(
        step="writer", does="postgres.write", counts=True, attempts=9, failed=3, unavailable_seconds=20.0, longest_seconds=20.0,
        resolution_ms=51.0, median_ms=0.5, outages=[Outage(began=3.0, ended=23.0)], errors={"refused": 3},
    )  # fmt: skip
    return DrillCard(
        drill=f"d{days}", plan="p", runbook="r", runbook_sha256="0" * 64, title="A drill", scenario="loss", mode="drill",
        trigger="by hand", operator="ann", approved_by=None, target="app-db", environment="test", classification="internal",
        parameters={}, verdict=verdict, ending="completed", reason="because", started_at=begun,
        ended_at=begun + timedelta(minutes=1), versions={}, backups=[], recovery_target=None, reached=None,
        objectives=[ObjectiveCard(name="rto", objective=60, measured=rto, met=rto and rto < 60, confidence="measured", how="so")],
        measured=[Measured(name="rto", value=rto, how="so")], steps=[step], probes=[probe], checks=[],
        teardown=[ResourceCard(kind="frozen", name="n1", kept=False, gone=True, left=None)], answers=[], findings=[], notes=[],
        forecast=None, plan_digest="0" * 64, written_by="tests",
    )  # fmt: skip


def test_the_page_of_a_drill_shows_the_outage_where_it_was() -> None:
    html = drill_report(a_card(1), NOW)
    assert "no answer from 3 s to 23 s" in html
    assert 'x="5%" width="33.333%"' in html
    assert "The &lt;primary&gt; hangs" in html
    assert "<script" not in html


def test_a_drill_that_ended_before_its_first_step_has_a_page_and_a_picture() -> None:
    card = a_card(1, "COULD_NOT_VERIFY")
    never = [step.model_copy(update={"state": "skipped", "started": None, "seconds": None}) for step in card.steps]
    card = card.model_copy(update={"steps": never, "probes": []})
    assert "The &lt;primary&gt; hangs" in drill_report(card, NOW)
    assert "The <primary> hangs" not in drill_picture(card)


@pytest.mark.parametrize("answered", [False, True])
def test_a_probe_breaks_a_drill_off_only_once_it_has_seen_the_target_well(answered: bool) -> None:
    aborted: list[str] = []

    class Seen:
        def samples(self, *_: object) -> list[Sample]:
            return [sample(0, answered)]

        def get(self, _: str) -> Any:
            return SimpleNamespace(id="d", parameters={}, subject="cache")

        def abort(self, _: object, why: str, **__: object) -> None:
            aborted.append(why)

    step = Probe.model_validate({"id": "w", "kind": "probe", "does": "redis.read"})
    access: Any = SimpleNamespace(inventory=SimpleNamespace(subject=lambda _: SimpleNamespace(system=None)))
    store: Any = Seen()
    with patch("ops_platform.drills.probing.asker_of"):
        probing = Probing(access, store, "d", step, [(1.0, "the limit")])
    probing.lately.append(sample(50, False))
    probing._judge()  # pyright: ignore[reportPrivateUsage]
    assert bool(aborted) is answered


def test_the_page_shows_which_step_failed_and_which_was_only_broken_off() -> None:
    card = a_card(1)
    (loss,) = card.steps
    ended = loss.model_copy(update={"state": "failed", "said": ENDED_IN_IT})
    wrong = loss.model_copy(update={"state": "failed", "said": "not within 10 s: nobody leads", "critical": False})
    aborted = drill_report(
        card.model_copy(update={"steps": [ended], "ending": "aborted", "verdict": "COULD_NOT_VERIFY"}), NOW
    )
    failed = drill_report(card.model_copy(update={"steps": [wrong], "ending": "failed", "verdict": "FAIL"}), NOW)
    assert "Broken off" in aborted
    assert 'class="bar failed"' not in aborted
    assert "proves nothing, neither good nor bad" in aborted
    assert "ops drill run p app-db" in aborted
    assert 'class="bar failed"' in failed
    assert "nobody leads" in failed
    assert "proves nothing" not in failed


def test_the_page_names_the_step_of_a_person_and_reads_a_bound_as_one_sentence() -> None:
    answer = AnswerCard(step="loss", who="bob", at=NOW, text="done", evidence={})
    bound = ObjectiveCard(name="rto", objective=60, measured=9, met=True, confidence="bound", how="from the loss on")
    html = drill_report(a_card(1).model_copy(update={"answers": [answer], "objectives": [bound]}), NOW)
    assert "<dt>The &lt;primary&gt; hangs</dt><dd>done" in html
    assert "At most this much: from the loss on" in html


def test_dark_bars_are_those_of_the_longest_way_and_not_the_longest_bar() -> None:
    card = a_card(1)
    (loss,) = card.steps
    slow = loss.model_copy(update={"id": "clean", "started": 3.0, "seconds": 50.0, "critical": False})
    drawn = timeline_of(card.model_copy(update={"steps": [loss, slow]}))
    assert [bar.longest for bar in drawn.bars] == [True, False]
    assert drawn.total == 60, "the whole drill, on which the probes are drawn too"


def test_what_is_drawn_over_time_has_a_scale() -> None:
    part = StackPart(
        target="cache", kind="redis", needs=[], verdict="PASS", seconds=20.0, starts=0.0, critical=True, gain=20.0, said="all is well"
    )  # fmt: skip
    never = part.model_copy(
        update={"target": "app-db", "verdict": "FAIL", "seconds": None, "critical": False, "said": "the bytes differ"}
    )
    html = drill_report(a_card(1).model_copy(update={"stack": [part, never]}), NOW)
    assert html.count('<li class="scale"') == 3, "the steps, what was restored, the probes"
    assert html.count('class="bar longest"') == 1 + 1 + 1, (
        "in the key, the step, and what served: what never did has no bar"
    )
    assert "app-db: the bytes differ" in html


def test_the_page_opens_what_does_not_hold_and_says_how_to_take_away_what_is_left() -> None:
    sound = CheckCard(step="a", title="It holds", holds=True, query="q", result="yes")
    bad = sound.model_copy(update={"title": "It does not", "holds": False})
    left = ResourceCard(kind="process", name="writer", kept=False, gone=False, left="process 7 is alive")
    card = a_card(1, "FAIL")
    html = drill_report(card.model_copy(update={"checks": [sound, bad], "teardown": [left]}), NOW)
    assert html.count('<details class="gate tone-bad" open>') == html.count("<details") - 1 == 1
    assert "ops drill sweep" in html
    assert "ops drill sweep" not in drill_report(card, NOW)


def test_the_page_of_a_drill_names_a_run_as_dagster_does() -> None:
    held = a_card(1).model_copy(update={"operator": "dagster run be6c3958-250a-4126-b6e8-e4f29f8f08c5"})
    assert "<dd>dagster run be6c3958</dd>" in drill_report(held, NOW)


def test_the_strip_of_a_probe_is_drawn_for_as_long_as_it_looked() -> None:
    card = a_card(1)
    (probe,) = card.probes
    looked = probe.model_copy(update={"began": 2.4, "ended": 30.0})
    assert 'x="4%" width="46%"' in drill_report(card.model_copy(update={"probes": [looked]}), NOW)
    assert 'x="0%" width="100%"' in drill_report(card, NOW)  # a record that does not say it


def test_of_a_redis_that_cannot_be_asked_the_remedy_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    error = AccessDeniedError("it refuses our password", where="cache-0:6379", remedy="look at systems.cache.password")
    monkeypatch.setattr(redis, "_said", lambda *_: error)
    said = "it refuses our password; what to do: look at systems.cache.password"
    assert redis._word(MagicMock(), MagicMock()) == said
    assert redis._unfit(error, 0, 0) == said


def test_a_promise_of_a_drill_says_its_times_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    at = timedelta(days=30)
    one = Standing("p", "book", "s", "app-db", at, NOW, "d-1", NOW, "d-1", "FAIL", overdue=False, risk=0)
    monkeypatch.setattr(drilling, "standing", lambda *_: [one])
    times = {"rto": (14401.0, 14400.0, False), "rpo": (None, 300.0, None)}
    objectives = [
        ObjectiveCard(name=name, objective=most, measured=measured, met=met, confidence="measured", how="x")
        for name, (measured, most, met) in times.items()
    ]
    monkeypatch.setattr(drilling, "card_of", lambda _: SimpleNamespace(objectives=objectives))
    found = {one.name: one.text for one in drilling.promises(MagicMock(), MagicMock())}
    assert found["rto_met"] == "4 h, 4 h are allowed: 1 s too long"
    assert found["rpo_met"] == "never measured, 5 min are allowed"


def test_the_picture_of_a_drill_has_its_steps_and_its_promises() -> None:
    svg = drill_picture(a_card(1))
    assert "The &lt;primary&gt; hangs" in svg
    assert "20 s of 1 min, kept" in svg
    assert "not measured of 1 min, not judged" in drill_picture(a_card(1, rto=None))


def test_the_index_shows_what_was_never_drilled_what_is_late_and_the_outlook() -> None:
    found = standings(DECLARED, {"restore-drill": "database-gone"}, CLASSES, [], NOW)
    finding = Finding(
        "f1", "k", "d1", "p", "app-db", "r", "RTO is missed", "80 s", "team", NOW - timedelta(days=1), FindingState.OPEN, NOW, 2, "d1"
    )  # fmt: skip
    seen = [throughput(60, 1000), throughput(30, 2000), throughput(0, 3000)]
    today, later = predict(seen, 3000 << 20, 0), predict(seen, 9000 << 20, 0)
    assert today is not None
    assert later is not None
    outlook = Outlook("app-db", 600, today, later, NOW + timedelta(days=70))
    html = drills_report(found, [a_card(62), a_card(31, "FAIL", None), a_card(1)], [finding], [outlook], NOW)
    assert html.count("<span>never drilled") == 2
    assert "late" in html
    assert "missed from 2027-02-03 on" in html
    assert "RTO of 3 drills" in html
    assert ">not measured</text>" in html, "the lane of the drill without a figure"
    failed = a_card(31, "FAIL").model_copy(update={"scenario": "database-gone"})
    assert "31\u00a0d ago, overdue" in drills_report(found, [failed], [], [], NOW)
    assert drills_report([], [], [], [], NOW).count("empty") >= 5


# Acknowledged writes


def at(second: float) -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second)


def test_of_writes_without_an_answer_is_spoken_only_where_there_are_some() -> None:
    done = lost_of(Attempted({1: at(0)}, frozenset()), [1], Lost(injected="loss", writer="writer"), "select n")
    assert done.checks[0].result == "0 of 1 acknowledged writes are lost"


@pytest.mark.parametrize(("most", "holds"), [(0, False), (2, False), (3, True)])
def test_writes_that_asynchronous_replication_lost_are_bounded(most: int, holds: bool) -> None:
    """Of ten that were acknowledged every 100 ms the last three are not there; of three whose acknowledgement never came two are."""
    tried = Attempted({n: at(n / 10) for n in range(10)}, frozenset({41, 42, 43}))
    done = lost_of(tried, [*range(7), 41, 42, 50], Lost(injected="loss", writer="writer", most=most), "select n")
    (check,) = done.checks
    assert check.holds is holds
    assert check.result == "3 of 10 acknowledged writes are lost: 7-9; of 3 without an answer 2 are there"
    assert {m.name: m.value for m in done.measured} == {"rpo": pytest.approx(0.2), "lost": 3.0, "unknown": 2.0}
    assert done.facts == {"acknowledged": 10, "lost": 3, "unsure": 2}


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_lost_is_what_was_acknowledged_and_is_not_there_and_nothing_else(
    told: set[int], untold: set[int], there: set[int]
) -> None:
    tried = Attempted({n: at(n) for n in told}, frozenset(untold - told))
    done = lost_of(tried, there, Lost(injected="loss", writer="writer"), "select n")
    assert (done.facts["lost"], done.facts["unsure"]) == (len(told - there), len((untold - told) & there))
    assert done.checks[0].holds is (told <= there)


@pytest.mark.parametrize(
    ("senders", "follows"),
    [
        ({"a": ["b", "c", "ops_platform replication"]}, True),
        ({"a": ["b", "ops_platform replication"]}, False),
        ({"a": ["b"], "b": ["c"]}, True),  # c has the tag replicatefrom
    ],
)
def test_a_member_follows_that_somebody_streams_to_by_its_name(senders: dict[str, list[str]], follows: bool) -> None:
    def state(name: str) -> dict[str, Any]:
        streams = [{"application_name": to, "state": "streaming"} for to in senders.get(name, ())]
        return {
            "role": "primary" if name == "a" else "replica",
            "state": "running",
            "timeline": 2,
            "replication": streams,
        }

    words = Words([state(name) for name in "abc"])
    assert words.all_follow(["b", "c"]) is follows
    assert not words.all_follow(["b"]), "Patroni's store does not know c"
