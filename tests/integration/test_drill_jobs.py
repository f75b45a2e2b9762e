"""Drills in Dagster: a job for each, an op for each step, retried alone; a failed op puts back what was broken."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from ops_platform.definitions import build_defs
from ops_platform.drills.model import Ending
from ops_platform.inventory import load
from tests.drill_rig import FROZEN, TRIED, Bench, interrupted_when
from tests.rig import Cluster

SAY: dict[str, Any] = {"id": "say", "kind": "act", "does": "toy.say", "retry_after": "0s"}


@pytest.fixture
def bench(shared_cluster: Cluster) -> Iterator[Bench]:
    TRIED.clear()
    with ExitStack() as stack:
        yield Bench(shared_cluster, stack)


def definitions(bench: Bench) -> dg.Definitions:
    assert bench.engine
    return build_defs(load(bench.home / "platform.yaml"))


def run(bench: Bench, name: str = "drill_toys") -> dg.ExecuteInProcessResult:
    return definitions(bench).resolve_job_def(name).execute_in_process(raise_on_error=False)


def test_a_drill_is_a_job_with_an_op_for_each_step(bench: Bench) -> None:
    bench.both("toys", [
        {"id": "a-b", "kind": "act", "does": "toy.folder"},
        {**SAY, "needs": ["a-b"], "with": {"error": "not yet", "times": 1}, "retries": 1},
    ])  # fmt: skip
    done = run(bench)
    assert done.success
    steps = {event.step_key for event in done.all_events if event.is_step_success}
    assert steps == {"begin", "step_a_b", "step_say", "end_and_judge"}
    assert [event.step_key for event in done.all_events if event.is_step_up_for_retry] == ["step_say"]
    (drill,) = bench.engine.store.list()
    assert (drill.verdict, drill.trigger) == ("PASS", "by hand")
    assert drill.operator.startswith("dagster run ")
    assert (bench.home / "reports" / "drills" / f"{drill.id}.html").is_file()
    assert bench.remains() == []
    (seen,) = done.get_asset_observation_events()
    shown = seen.asset_observation_data.asset_observation.metadata
    assert (shown["verdict"].value, shown["drill"].value, shown["findings"].value) == ("PASS", drill.id, 0)
    assert "data:image/svg+xml;base64," in shown["steps"].value


def test_two_drills_stand_in_one_code_location(bench: Bench) -> None:
    bench.both("toys", [SAY])
    bench.both("other-toys", [SAY])
    # As Dagster's servers do, which refuse a name that stands twice.
    definitions(bench).get_repository_def().load_all_definitions()
    assert run(bench, "drill_toys").success
    assert run(bench, "drill_other_toys").success


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("retries", [0, 2])
def test_a_run_that_is_terminated_puts_back_what_was_broken(bench: Bench, number: signal.Signals, retries: int) -> None:
    """Its worker is told by a signal, as by Dagster's terminate and by Kubernetes. A step with retries is tried again then, and refused."""
    bench.both("toys", [*FROZEN, {**SAY, "needs": ["cold"], "with": {"seconds": 300.0}, "retries": retries}])
    told = interrupted_when(lambda: TRIED["say"] > 0, number)
    with contextlib.suppress(dg.DagsterExecutionInterruptedError):
        assert not run(bench).success
    told.join()
    (drill,) = bench.engine.store.list()
    assert (drill.state.value, drill.ending, drill.verdict) == ("ended", Ending.ABORTED, "COULD_NOT_VERIFY")
    assert drill.operator in drill.reason
    assert bench.remains() == []


def test_an_op_that_fails_ends_the_drill_and_puts_back_what_was_broken(bench: Bench) -> None:
    bench.both("toys", [*FROZEN, {**SAY, "needs": ["cold"], "with": {"error": "it broke"}}])
    assert not run(bench).success
    (drill,) = bench.engine.store.list()
    assert (drill.state.value, drill.verdict) == ("ended", "FAIL")
    assert "it broke" in drill.reason
    assert bench.remains() == []


def test_a_refusal_fails_the_run_and_touches_nothing(bench: Bench) -> None:
    bench.both("toys", [SAY], targets=["throne"], approval="never")
    assert not run(bench).success
    assert bench.engine.store.list() == []
    assert TRIED["say"] == 0


def test_the_checks_say_what_was_drilled_and_what_never_was(bench: Bench) -> None:
    bench.both("toys", [SAY])
    defs = definitions(bench)

    def checks() -> dict[str, bool]:
        done = defs.resolve_job_def("check_drills").execute_in_process(raise_on_error=False)
        return {one.check_name: one.passed for one in done.get_asset_check_evaluations()}

    assert checks() == {"drilled_within": False, "rto_met": False, "rpo_met": False}
    bench.drill("toys")
    assert checks() == {"drilled_within": True, "rto_met": True, "rpo_met": True}  # toys measure neither


def test_the_most_overdue_drill_is_asked_for_when_the_schedule_says_so(bench: Bench) -> None:
    fired = datetime.now(UTC) - timedelta(minutes=30)
    bench.body["drills"]["schedule"] = f"{fired:%M %H} * * *"  # and not once more while the test looks
    bench.both("toys", [SAY], targets=["hall", "attic"])
    defs = definitions(bench)
    sensor = defs.resolve_sensor_def("most_overdue_drill")
    platform = defs.resources["platform"] if defs.resources else None
    at = (fired - timedelta(minutes=1)).isoformat()
    with dg.build_sensor_context(cursor=at, resources={"platform": platform}) as context:
        found = sensor(context)
    (request,) = found.run_requests
    assert request.job_name == "drill_toys"
    assert request.tags["ops/target"] == "attic"  # restricted, and never drilled either
    with dg.build_sensor_context(cursor=datetime.now(UTC).isoformat(), resources={"platform": platform}) as context:
        assert not sensor(context).run_requests


def test_a_drill_whose_worker_died_is_swept_by_a_run(bench: Bench) -> None:
    bench.both("toys", [{"id": "server", "kind": "act", "does": "toy.process"}])
    assert bench.killed_at(32, lambda engine: engine.run(bench.begin(engine, "toys").drill.id))  # type: ignore[union-attr]
    engine = bench.engine
    (dead,) = engine.store.list(ended=False)
    with engine.store.transaction() as t:
        t.connection.execute("update ops_drills.drills set updated_at = updated_at - interval '1 hour'")
    defs = definitions(bench)
    platform = defs.resources["platform"] if defs.resources else None
    with dg.build_sensor_context(resources={"platform": platform}) as context:
        found = defs.resolve_sensor_def("dead_drills")(context)
    assert len(found.run_requests) == 1
    assert run(bench, "sweep_drills").success
    assert bench.engine.store.get(dead.id).state.value == "ended"
    assert bench.remains() == []
