"""Drills from their beginning to their end, on a real PostgreSQL: every guard, every ending, findings, people."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from ops_platform.actions import Status
from ops_platform.cli.main import cli
from ops_platform.clients.postgres_binaries import free_port, run_as
from ops_platform.clients.processes import Process, spawn, stop
from ops_platform.drills.begin import Beginner, planned
from ops_platform.drills.engine import Engine
from ops_platform.drills.model import Done, DrillState, Ending, Sample, StepState
from ops_platform.drills.registry import Context, NothingGiven, does
from ops_platform.drills.scorecard import card_of
from ops_platform.drills.steps import injection
from ops_platform.errors import ConflictError, CouldNotVerifyError, UsageError
from ops_platform.remediation import store as incidents
from ops_platform.remediation.model import Ending as IncidentEnding
from ops_platform.remediation.model import Opening
from tests.drill_rig import FROZEN, TRIED, Bench, interrupted_when
from tests.network_rig import network
from tests.remediation_rig import a_signal
from tests.rig import Cluster, eventually, missing
from tests.servers import accepts
from tests.stores_rig import MovedClock

SAY: dict[str, Any] = {"id": "say", "kind": "act", "does": "toy.say"}


@pytest.fixture
def bench(shared_cluster: Cluster) -> Iterator[Bench]:
    TRIED.clear()
    with ExitStack() as stack:
        yield Bench(shared_cluster, stack)


def refusals(bench: Bench, name: str = "toys", subject: str | None = None) -> dict[str, str]:
    """What refuses it, by guard; nothing may have been begun."""
    begun = bench.begin(bench.engine, name, subject)
    assert (begun.drill is None) == (begun.result.status is not Status.DONE)
    if begun.drill is not None:
        bench.engine.run(begun.drill.id)
    return {ruling.guard: ruling.reason for ruling in begun.result.rulings if not ruling.allows}


# Guards


def test_a_drill_only_observes_unless_the_inventory_says_enforce(bench: Bench) -> None:
    bench.both("toys", [SAY], mode="observe")
    begun = bench.begin(bench.engine, "toys")
    assert (begun.result.status, begun.drill) == (Status.OBSERVED, None)
    assert bench.engine.store.list() == []


def test_production_is_drilled_only_where_the_drill_says_so(bench: Bench) -> None:
    bench.both("toys", [SAY], targets=["throne"], approval="never")
    assert set(refusals(bench)) == {"production"}
    bench.body["drills"]["plan"][0]["production"] = True
    assert refusals(bench) == {}


def test_an_environment_that_says_nothing_is_production(bench: Bench) -> None:
    bench.body["environments"]["test"] = {}
    bench.both("toys", [SAY], approval="never")
    assert set(refusals(bench)) == {"production"}


def test_only_targets_that_the_drill_names_are_drilled(bench: Bench) -> None:
    bench.both("toys", [SAY])
    assert set(refusals(bench, subject="attic")) == {"target"}


def test_no_drill_begins_in_business_hours(bench: Bench) -> None:
    bench.both("toys", [SAY])
    begun = datetime.now(UTC) - timedelta(hours=1)
    bench.body["drills"]["business_hours"] = [{"start": f"{begun:%H:%M}", "length": "3h", "timezone": "UTC"}]
    assert set(refusals(bench)) == {"business hours"}


def test_a_freeze_refuses_and_so_does_pause_all(bench: Bench) -> None:
    bench.both("toys", [SAY])
    now = datetime.now(UTC)
    freeze = {
        "starts": (now - timedelta(hours=1)).isoformat(),
        "ends": (now + timedelta(hours=1)).isoformat(),
        "why": "x",
    }
    bench.body["remediation"]["freezes"] = [freeze]
    incidents.Store(bench.engine.store.ledger).pause("look first", who="ann")
    assert set(refusals(bench)) == {"change freeze", "pause"}


@pytest.mark.parametrize("ahead", [timedelta(minutes=10), -timedelta(minutes=10)])
def test_a_clock_that_is_not_the_databases_refuses(bench: Bench, ahead: timedelta) -> None:
    """Every time of a drill is of the machine that holds it; a second machine that goes on with it has the database's, too."""
    bench.both("toys", [SAY])
    engine = bench.engine
    request = planned(engine.access, "toys", None, {}, operator="ann", trigger="a test")
    beginner = Beginner(engine.access, engine.store, clock=MovedClock(ahead))
    begun = beginner.begin(request)
    assert begun.drill is None
    assert "clock" in {ruling.guard for ruling in begun.result.rulings if not ruling.allows}


def test_an_open_incident_in_the_same_failure_domain_refuses(bench: Bench) -> None:
    bench.both("toys", [SAY])
    store = incidents.Store(bench.engine.store.ledger)
    opened = store.open(Opening("dark", "cellar", "toy", a_signal(at=datetime.now(UTC)), "ann"))
    assert opened is not None
    assert set(refusals(bench)) == {"open incidents"}
    store.close(opened, IncidentEnding.CLEARED, "it is bright", actor="ann")
    assert refusals(bench) == {}


def test_the_budget_of_unavailability_counts_what_is_expected(bench: Bench) -> None:
    bench.runbook("toys", [SAY], unavailable="2m")
    bench.plan("toys", unavailability={"most": "1m"})
    assert set(refusals(bench)) == {"budget of unavailability"}
    bench.body["drills"]["plan"][0]["unavailability"]["most"] = "2m"
    assert refusals(bench) == {}


def test_what_preflight_finds_refuses_before_anything_begins(bench: Bench) -> None:
    bench.both(
        "toys", [{"id": "fit", "kind": "check", "preflight": True, "does": "toy.say", "with": {"holds": False}}, SAY]
    )
    assert set(refusals(bench)) == {"preflight"}
    assert TRIED["say"] == 0


def test_two_drills_are_never_held_on_one_target_or_failure_domain(bench: Bench) -> None:
    bench.both("toys", [SAY])
    bench.both("others", [SAY], targets=["hall", "cellar", "attic"])
    first = bench.begin(bench.engine, "toys")
    assert first.drill is not None
    for subject in ("hall", "cellar"):
        found = bench.begin(bench.engine, "others", subject).result
        assert [r.guard for r in found.rulings if not r.allows] == ["overlap"]
    assert bench.drill("others", "attic").verdict == "PASS"
    assert bench.engine.run(first.drill.id).verdict == "PASS"
    assert bench.drill("others", "cellar").verdict == "PASS"


def test_the_database_itself_refuses_a_second_one(bench: Bench) -> None:
    bench.both("toys", [SAY])
    first = bench.begin(bench.engine, "toys").drill
    assert first is not None
    from dataclasses import replace

    with pytest.raises(ConflictError, match="another drill holds"):
        bench.engine.store.admit(replace(first, id="another"), ["say"], lambda _others: [])


def test_a_second_person_approves_exactly_the_plan(bench: Bench) -> None:
    bench.both("toys", [SAY], approval="always")
    begun = bench.begin(bench.engine, "toys")
    assert {r.guard for r in begun.result.rulings if not r.allows} == {"approval", "second person"}
    store, digest = bench.engine.store, begun.result.plan.digest
    store.approve(digest, "hall", who="ann", valid_for=timedelta(hours=1))
    assert set(refusals(bench)) == {"second person"}
    store.approve("0" * 64, "hall", who="bob", valid_for=timedelta(hours=1))
    assert set(refusals(bench)) == {"second person"}
    store.approve(digest, "hall", who="bob", valid_for=timedelta(hours=1))
    drill = bench.drill("toys")
    assert (drill.verdict, drill.approved_by) == ("PASS", "bob")


def test_a_refusal_stands_in_the_ledger(bench: Bench) -> None:
    bench.both("toys", [SAY], targets=["throne"], approval="never")
    refusals(bench)
    entry = bench.engine.store.ledger.entries(kind="action.plan")[-1]
    assert entry.body["verdict"] == "refused"


# Endings


def test_a_drill_goes_through_its_graph_in_the_order_of_its_needs(bench: Bench) -> None:
    bench.both("toys", [
        {"id": "last", "kind": "measure", "is": "rto", "does": "toy.number", "with": {"seconds": 2.5}, "needs": ["middle"]},
        {"id": "middle", "kind": "check", "does": "toy.say", "needs": ["first"]},
        {"id": "first", "kind": "act", "does": "toy.folder"},
    ])  # fmt: skip
    drill = bench.drill("toys")
    card = card_of(drill)
    assert card is not None
    assert [step.id for step in card.steps] == ["first", "middle", "last", "clean"]
    assert [step.critical for step in card.steps] == [True, True, True, False]
    assert (card.verdict, card.measured[0].value) == ("PASS", 2.5)
    assert bench.remains() == []
    kinds = [entry.kind for entry in bench.engine.store.ledger.entries()]
    assert kinds[:2] == ["action.plan", "action.outcome"] or "drill.begun" in kinds
    assert kinds[-2:] == ["drill.scorecard", "drill.ended"]


def test_a_check_that_does_not_hold_fails_the_drill_and_the_rest_goes_on(bench: Bench) -> None:
    bench.both("toys", [
        {"id": "bad", "kind": "check", "does": "toy.say", "with": {"holds": False}, "on_failure": "go_on"},
        {**SAY, "id": "after"},
    ])  # fmt: skip
    drill = bench.drill("toys")
    assert (drill.verdict, TRIED["after"]) == ("FAIL", 1)
    ended = bench.engine.store.ledger.entries(kind="drill.ended")[-1].body
    card = card_of(drill)
    assert card is not None
    assert (ended["verdict"], ended["reason"]) == ("FAIL", card.reason), "which check, beside the verdict"
    assert drill.reason.startswith(card.checks[0].title)
    assert [finding.title for finding in bench.engine.store.findings()] == ["it is so: does not hold"]


def test_a_step_that_fails_is_tried_again_as_often_as_it_may(bench: Bench) -> None:
    again = {"error": "not yet", "times": 2}
    bench.both("toys", [{**SAY, "with": again, "retries": 2, "retry_after": "0s"}])
    assert bench.drill("toys").verdict == "PASS"
    TRIED.clear()
    bench.runbook(
        "toys", [{**SAY, "with": again, "retries": 1, "retry_after": "0s"}, {**SAY, "id": "after", "needs": ["say"]}]
    )
    drill = bench.drill("toys")
    assert (drill.ending, drill.verdict) == (Ending.FAILED, "FAIL")
    assert "not yet" in drill.reason
    assert TRIED["after"] == 0


def test_a_step_that_takes_too_long_has_failed(bench: Bench) -> None:
    bench.both("toys", [{**SAY, "with": {"seconds": 120.0}, "within": "1s"}])
    drill = bench.drill("toys")
    assert drill.verdict == "FAIL"
    assert "not within 1 s" in drill.reason


@does("toy.looks_long", "wait_until")
def looks_long(context: Context, _given: NothingGiven) -> Done:
    """One look that takes longer than the step may, and sees something."""
    over = context.deadline + 1
    eventually(lambda: context.clock.monotonic() > over, why="time stands still")
    raise CouldNotVerifyError("not within 1 s: nobody leads")


def test_a_step_that_takes_too_long_says_what_it_saw_at_last_whoever_notices_first(bench: Bench) -> None:
    bench.both("toys", [
        {"id": "look", "kind": "wait_until", "title": "Another one leads", "does": "toy.looks_long", "within": "1s"},
        {"id": "time", "kind": "measure", "title": "The time", "is": "rto", "does": "toy.number", "needs": ["look"]},
    ])  # fmt: skip
    drill = bench.drill("toys")
    assert (drill.verdict, drill.reason) == ("FAIL", "Another one leads: not within 1 s: nobody leads")
    card = card_of(drill)
    assert card is not None
    assert [objective.how for objective in card.objectives] == ["The time: the drill had ended before"]


def test_a_record_speaks_of_steps_by_their_names_and_of_time_as_people_do(bench: Bench) -> None:
    bench.both("toys", [
        {"id": "bad", "kind": "act", "title": "It breaks", "does": "toy.say", "with": {"error": "broken"}, "on_failure": "go_on"},
        {"id": "after", "kind": "act", "does": "toy.say", "needs": ["bad"]},
        {"id": "time", "kind": "measure", "is": "rto", "does": "toy.number", "with": {"seconds": 17203.0}},
        {"id": "decision", "kind": "measure", "title": "A decision", "is": "decision", "does": "clock.between",
         "with": {"since": "time", "until": "time"}, "needs": ["time"]},
    ], objectives={"rto": "4h"})  # fmt: skip
    drill = bench.drill("toys")
    card = card_of(drill)
    assert card is not None
    assert card.reason == "RTO of 4 h 47 min, 4 h at most were promised"
    assert next(step.said for step in card.steps if step.id == "after") == 'not tried: it needs "It breaks"'
    assert "RTO is missed: 4 h 47 min, 4 h at most were promised; by a toy" in [
        f"{f.title}: {f.detail}" for f in card.findings
    ]
    assert next(m.how for m in card.measured if m.name == "decision") == 'from "time" to the end of "time"'


def test_an_abort_puts_back_what_was_broken(bench: Bench) -> None:
    bench.both("toys", [*FROZEN, {**SAY, "with": {"seconds": 300.0}, "needs": ["cold"]}])
    engine = bench.engine
    begun = bench.begin(engine, "toys").drill
    assert begun is not None
    worker = threading.Thread(target=engine.run, args=[begun.id])
    worker.start()
    eventually(lambda: engine.store.steps(begun.id)["say"].state is StepState.RUNNING, why="it does not come that far")
    assert engine.store.abort(begun, "enough", who="bob")
    worker.join(60)
    drill = engine.store.get(begun.id)
    assert (drill.state, drill.ending, drill.verdict) == (DrillState.ENDED, Ending.ABORTED, "COULD_NOT_VERIFY")
    assert "bob" in drill.reason
    assert bench.remains() == []


def interrupted_in(engine: Engine, drill_id: str, step: str) -> threading.Thread:
    """Ctrl-C for this process once the step runs."""
    return interrupted_when(lambda: engine.store.steps(drill_id)[step].state is StepState.RUNNING)


@pytest.mark.parametrize("alone", [True, False])
def test_an_interruption_puts_back_what_was_broken_before_it_goes_on(bench: Bench, alone: bool) -> None:
    """Of a drill that is held whole, and of a step that Dagster takes alone."""
    bench.both("toys", [*FROZEN, {**SAY, "with": {"seconds": 300.0}, "needs": ["cold"]}])
    engine = bench.engine
    begun = bench.begin(engine, "toys").drill
    assert begun is not None
    for step in ("server", "cold") if alone else ():
        engine.step(begun.id, step)
    pressed = interrupted_in(engine, begun.id, "say")
    with pytest.raises(KeyboardInterrupt):
        engine.step(begun.id, "say") if alone else engine.run(begun.id)
    pressed.join()
    drill = engine.store.get(begun.id)
    assert (drill.state, drill.ending, drill.verdict) == (DrillState.ENDED, Ending.ABORTED, "COULD_NOT_VERIFY")
    assert drill.reason == "aborted by ann: its worker was interrupted"
    assert bench.remains() == []


def test_a_second_interruption_leaves_the_rest_to_the_sweep(bench: Bench) -> None:
    slow = {"id": "slow", "kind": "teardown", "does": "toy.say", "with": {"seconds": 300.0, "once": True}}
    bench.both("toys", [*FROZEN, {**SAY, "with": {"seconds": 300.0}, "needs": ["cold"]}, slow])
    engine = bench.engine
    begun = bench.begin(engine, "toys").drill
    assert begun is not None
    TRIED.clear()
    pressed = [interrupted_in(engine, begun.id, "say"), interrupted_when(lambda: TRIED["slow"] > 0)]
    with pytest.raises(KeyboardInterrupt):
        engine.run(begun.id)
    for thread in pressed:
        thread.join()
    assert engine.store.get(begun.id).state is DrillState.ENDING
    assert bench.remains() != []
    bench.sweep()
    assert engine.store.get(begun.id).ending is Ending.ABORTED
    assert bench.remains() == []


def test_an_interruption_leaves_what_waits_for_a_person(bench: Bench) -> None:
    bench.both("toys", [*FROZEN, {"id": "call", "kind": "human", "asks": "Call.", "needs": ["cold"]}])
    engine = bench.engine
    begun = bench.begin(engine, "toys").drill
    assert begun is not None
    pressed = interrupted_when(lambda: engine.store.get(begun.id).state is DrillState.WAITING)
    with pytest.raises(KeyboardInterrupt):
        engine.run(begun.id)
    pressed.join()
    assert engine.store.get(begun.id).state is DrillState.WAITING
    engine.store.answer(engine.store.get(begun.id), "call", "done", {}, who="bob")
    assert engine.run(begun.id).verdict == "PASS"
    assert bench.remains() == []


def test_ctrl_c_says_what_became_of_the_drill(bench: Bench) -> None:
    bench.both("toys", [*FROZEN, {**SAY, "with": {"seconds": 300.0}, "needs": ["cold"]}])
    engine = bench.open()

    def press() -> None:
        (held,) = eventually(lambda: engine.store.list(ended=False))
        interrupted_in(engine, held.id, "say").join()

    thread = threading.Thread(target=press)
    thread.start()
    done = ops(bench, "drill", "run", "toys")
    thread.join()
    assert isinstance(done.exception, click.Abort)
    (held,) = engine.store.list()
    assert f"drill {held.id} began; Ctrl-C breaks it off" in done.stderr
    assert f"{held.id} is aborted: ops drill show {held.id}" in done.stderr
    assert bench.remains() == []
    engine.store.ledger.close()
    engine.access.close()


def serving(host: str, port: int) -> str:
    return f"import socket, time; s = socket.create_server(({host!r}, {port})); time.sleep(600)"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Process, str]]:
    """A process of ours that serves an address, and nothing else."""
    port = free_port()
    process = spawn([sys.executable, "-c", serving("127.0.0.1", port)], tmp_path / "log")
    eventually(lambda: accepts(port), why="it does not listen")
    yield process, f"127.0.0.1:{port}"
    assert stop(process, signal.SIGKILL)


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_server_elsewhere_is_not_broken_by_its_port(bench: Bench, server: tuple[Process, str], how: str) -> None:
    process, address = server
    elsewhere = address.replace("127.0.0.1", "127.0.0.2")
    bench.both(
        "toys", [{"id": "loss", "kind": "inject", "does": "toy.break", "with": {"address": elsewhere, "how": how}}]
    )
    drill = bench.drill("toys")
    assert (drill.verdict, drill.ending) == ("FAIL", Ending.FAILED)
    assert f"{elsewhere}: nobody answers there" in drill.reason
    assert process.alive
    assert bench.engine.store.resources(drill.id) == []


def test_a_server_that_will_not_die_is_a_failed_drill(
    bench: Bench, server: tuple[Process, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(injection, "_DIES_WITHIN", 0.2)
    bench.both("toys", [{"id": "loss", "kind": "inject", "does": "toy.break", "with": {"address": server[1]}}])
    with monkeypatch.context() as deaf:
        deaf.setattr(injection.os, "kill", lambda _pid, _signal: None)
        drill = bench.drill("toys")
    assert (drill.verdict, drill.ending) == ("FAIL", Ending.FAILED)
    assert f"it did not die: process {server[0].pid} is alive" in drill.reason
    assert bench.drill("toys").verdict == "PASS"
    assert not server[0].alive


def test_who_shares_our_network_is_not_cut_off(bench: Bench, server: tuple[Process, str]) -> None:
    bench.both("toys", [{"id": "loss", "kind": "inject", "does": "toy.cut", "with": {"address": server[1]}}])
    drill = bench.drill("toys")
    assert (drill.verdict, drill.ending) == ("FAIL", Ending.FAILED)
    assert "whoever cuts it off cuts off the drill, too" in drill.reason
    assert bench.engine.store.resources(drill.id) == []


def test_who_was_cut_off_is_plugged_in_however_the_drill_ends(bench: Bench, tmp_path: Path) -> None:
    def hold(engine: Engine) -> None:
        begun = bench.begin(engine, "toys")
        assert begun.drill is not None, [r.reason for r in begun.result.rulings if not r.allows]
        engine.run(begun.drill.id)

    port = free_port()
    with network() as net, ExitStack() as stack:
        if net is None:
            missing("a network of its own for a server", "making one takes root, iproute2 and nsenter")
        assert net is not None
        place = net.place()
        process = spawn(place.command([sys.executable, "-c", serving(place.host, port)], run_as()), tmp_path / "log")
        stack.callback(stop, process, signal.SIGKILL)
        eventually(lambda: accepts(port, place.host), why="it does not listen")
        loss = {"id": "loss", "kind": "inject", "does": "toy.cut", "with": {"address": f"{place.host}:{port}"}}
        bench.both("toys", [loss, {**SAY, "needs": ["loss"], "with": {"error": "broken off"}}])
        for moment, plugged in (("registered cut off", True), ("ended", False)):
            assert bench.killed_when("toy.cut", moment, hold)
            assert (place.plugged, accepts(port, place.host)) == (plugged, plugged)
            bench.sweep()
            assert place.plugged
            assert bench.remains() == []
            eventually(lambda: accepts(port, place.host), why="nobody reaches it")
        drill = bench.drill("toys")
        assert drill.ending is Ending.FAILED
        assert [r.gone_at is not None for r in bench.engine.store.resources(drill.id)] == [True]
        assert place.plugged


def test_a_teardown_that_fails_is_a_failed_drill_and_stays_a_finding_until_one_shows_that_it_is_gone(
    bench: Bench,
) -> None:
    teardown = {"id": "clean", "kind": "teardown", "does": "toy.say", "with": {"error": "it will not go"}}
    bench.both("toys", [SAY, teardown])
    drill = bench.drill("toys")
    assert (drill.verdict, drill.ending) == ("FAIL", Ending.COMPLETED)
    (finding,) = bench.engine.store.findings()
    assert (finding.title, finding.owner, finding.state.value) == ("The teardown failed", "team", "open")
    bench.runbook("toys", [SAY])
    assert bench.drill("toys").verdict == "PASS"
    (gone,) = bench.engine.store.findings(all_=True)
    assert (gone.id, gone.state.value, gone.closed_by) == (finding.id, "gone", bench.engine.store.list()[-1].id)


def test_a_finding_that_is_found_again_is_the_same_one(bench: Bench) -> None:
    bench.both("toys", [{"id": "bad", "kind": "check", "does": "toy.say", "with": {"holds": False}}])
    bench.drill("toys")
    bench.drill("toys")
    (finding,) = bench.engine.store.findings()
    assert finding.seen == 2
    changed = bench.engine.store.assign(finding.id, owner="bob", due=None, note="ordered", actor="ann")
    assert (changed.owner, changed.note, changed.due) == ("bob", "ordered", finding.due)


def test_what_probes_saw_is_forgotten_in_its_time_and_not_before_its_drill_has_ended(bench: Bench) -> None:
    bench.body["drills"]["samples_kept"] = "30d"
    bench.both("toys", [SAY])
    bench.both("others", [SAY], targets=["attic"])
    old, running = bench.drill("toys"), bench.begin(bench.engine, "others").drill
    assert running is not None
    now = datetime.now(UTC)
    for drill in (old, running):
        bench.engine.store.saw(drill.id, "writer", [Sample(now - timedelta(days=90), True, 1.0, 1)])

    def kept() -> list[int]:
        return [len(bench.engine.store.samples(drill.id, "writer")) for drill in (old, running)]

    def ended(days: int) -> None:
        with bench.engine.store.transaction() as t:
            t.connection.execute(
                "update ops_drills.drills set ended_at = %s where id = %s", [now - timedelta(days=days), old.id]
            )

    ended(29)
    bench.engine.sweep()
    assert kept() == [1, 1]
    ended(31)
    bench.engine.sweep()
    assert kept() == [0, 1]
    assert bench.engine.store.get(old.id).card == old.card
    bench.engine.run(running.id)


def test_a_late_worker_makes_nothing(bench: Bench) -> None:
    bench.both("toys", [SAY])
    engine = bench.engine
    late = bench.begin(engine, "toys").drill
    assert late is not None
    engine.run(late.id)
    with pytest.raises(ConflictError, match="somebody else went on"):
        engine.store.register(late, "say", "directory", "/nowhere", {"path": "/nowhere"})


# People


def test_a_drill_waits_for_a_person_and_the_clock_runs(bench: Bench, tmp_path: Path) -> None:
    asks = {"id": "call", "kind": "human", "asks": "Call the provider.", "who": "on call", "evidence": True}
    bench.both("toys", [asks, {**SAY, "needs": ["call"]}])
    engine = bench.engine
    begun = bench.begin(engine, "toys").drill
    assert begun is not None
    waiting = engine.run(begun.id, wait=False)
    assert (waiting.state, TRIED["say"]) == (DrillState.WAITING, 0)
    engine.store.answer(waiting, "call", "called, they know", {"note.txt": "0" * 64}, who="bob")
    drill = engine.run(begun.id)
    card = card_of(drill)
    assert card is not None
    assert (card.verdict, card.answers[0].who, card.answers[0].evidence) == ("PASS", "bob", {"note.txt": "0" * 64})
    with pytest.raises(ConflictError, match="not waiting"):
        engine.store.answer(drill, "call", "again", {}, who="bob")


def test_the_table_top_that_is_shipped_is_gone_through_with_evidence(bench: Bench) -> None:
    bench.body["drills"]["plan"].append(
        {"id": "people", "runbook": "table-top", "targets": ["hall"], "mode": "enforce"}
    )
    engine = bench.engine
    begun = bench.begin(engine, "people").drill
    assert begun is not None
    asked: list[str] = []
    while (held := engine.run(begun.id, wait=False)).state is DrillState.WAITING:
        (waiting,) = [r.step for r in engine.store.steps(held.id).values() if r.state is StepState.WAITING]
        engine.store.answer(held, waiting, f"{waiting} is done", {"page.pdf": "0" * 64}, who="bob")
        asked.append(waiting)
    card = card_of(held)
    assert card is not None
    assert asked == ["alarm", "lead", "access", "keys", "order"]
    assert (card.verdict, card.measured[0].name, len(card.answers)) == ("PASS", "decision", 5)
    assert card.reason.startswith("every step is done; none looks at")


def test_nobody_who_answers_in_time_fails_it(bench: Bench) -> None:
    bench.both("toys", [{"id": "call", "kind": "human", "asks": "Call.", "within": "1s"}])
    drill = bench.drill("toys")
    assert (drill.ending, drill.verdict) == (Ending.FAILED, "FAIL")
    assert "nobody answered" in drill.reason


# In earnest


def test_in_earnest_nothing_is_broken_and_a_second_person_approves(bench: Bench) -> None:
    from ops_platform.drills.begin import Beginner, in_earnest

    bench.runbook("toys", [
        {"id": "server", "kind": "act", "does": "toy.process"},
        {"id": "cold", "kind": "inject", "does": "toy.freeze", "with": {"step": "server"}, "needs": ["server"]},
        {**SAY, "needs": ["cold"]},
    ], modes=["drill", "real"])  # fmt: skip
    engine = bench.engine
    request = in_earnest(engine.access, "toys", "throne", {}, operator="ann")
    beginner = Beginner(engine.access, engine.store)
    begun = beginner.begin(request)
    assert {r.guard for r in begun.result.rulings if not r.allows} == {"approval", "second person"}
    engine.store.approve(begun.result.plan.digest, "throne", who="bob", valid_for=timedelta(hours=1))
    begun = beginner.begin(request)
    assert begun.drill is not None
    drill = engine.run(begun.drill.id)
    assert set(engine.store.steps(drill.id)) == {"server", "say", "clean"}
    assert (drill.verdict, drill.mode) == ("PASS", "real")


def test_a_runbook_that_is_not_meant_for_earnest_is_refused(bench: Bench) -> None:
    from ops_platform.drills.begin import Beginner, in_earnest

    bench.runbook("toys", [SAY])
    engine = bench.engine
    begun = Beginner(engine.access, engine.store).begin(in_earnest(engine.access, "toys", "hall", {}, operator="ann"))
    assert "mode of the runbook" in {r.guard for r in begun.result.rulings if not r.allows}


# The command line


def ops(bench: Bench, *words: str) -> Result:
    bench.open()
    env = {"OPS_INVENTORY": str(bench.home / "platform.yaml"), "OPS_ACTOR": "ann"}
    return CliRunner().invoke(cli, words, env=env, standalone_mode=False)


def test_the_commands_hold_a_drill_and_show_what_it_found(bench: Bench) -> None:
    bench.both("toys", [SAY, {"id": "bad", "kind": "check", "does": "toy.say", "with": {"holds": False}}])
    plan = ops(bench, "drill", "plan", "toys", "--json")
    assert plan.return_value == 0, plan.output
    assert json.loads(plan.stdout)["status"] == "observed"
    done = ops(bench, "drill", "run", "toys", "--json")
    card = json.loads(done.stdout)
    assert (done.return_value, card["verdict"], card["operator"]) == (1, "FAIL", "ann")
    listed = json.loads(ops(bench, "drill", "list", "--json").stdout)
    assert [(one["target"], one["overdue"], one["last_verdict"]) for one in listed] == [("hall", True, "FAIL")]
    assert card["drill"] in ops(bench, "drill", "list", "--held").stdout
    assert "FAIL" in ops(bench, "drill", "show", card["drill"]).stdout
    found = json.loads(ops(bench, "drill", "findings", "--json").stdout)
    assert [one["title"] for one in found] == ["it is so: does not hold"]
    assert "nothing to break off" in ops(bench, "drill", "abort", card["drill"], "--why", "x").stdout


def test_a_wrong_parameter_is_a_usage_error(bench: Bench) -> None:
    bench.both("toys", [SAY])
    with pytest.raises(UsageError, match="no parameter 'much'"):
        bench.begin(bench.engine, "toys", much=1)
