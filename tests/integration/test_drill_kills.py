"""A drill killed at every moment leaves nothing behind once the next start has looked: no process, no folder, nothing frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ops_platform.drills.engine import Engine
from ops_platform.drills.model import DrillState, Ending
from tests.drill_rig import Bench
from tests.rig import Cluster

LOST_AT_ONCE = timedelta(0)

STEPS: list[dict[str, Any]] = [
    {"id": "ground", "kind": "act", "does": "toy.folder"},
    {"id": "server", "kind": "act", "does": "toy.process", "needs": ["ground"]},
    {"id": "cold", "kind": "inject", "does": "toy.freeze", "with": {"step": "server"}, "needs": ["server"]},
    {"id": "look", "kind": "check", "does": "toy.say", "needs": ["cold"]},
]


@pytest.fixture
def bench(shared_cluster: Cluster) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(shared_cluster, stack)


def hold(bench: Bench, engine: Engine) -> None:
    begun = bench.begin(engine, "toys")
    assert begun.drill is not None
    engine.run(begun.drill.id)


def test_a_drill_killed_at_any_moment_leaves_nothing_behind_after_the_next_start(bench: Bench) -> None:
    bench.both("toys", STEPS)
    number, endings = 1, set[Ending | None]()
    # Every ninth moment: neighbours differ by what a transaction's end adds, and the property below draws any.
    while bench.killed_at(number, lambda engine: hold(bench, engine)):
        bench.sweep()
        assert bench.remains() == [], f"killed at moment {number}"
        drills = bench.engine.store.list()
        assert all(drill.state is DrillState.ENDED for drill in drills)
        endings |= {drill.ending for drill in drills}
        number += 9
    assert number > 60
    assert endings == {Ending.LOST, Ending.COMPLETED}
    assert bench.engine.store.ledger.verify().ok


@st.composite
def graphs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Steps in any order with any needs among those before them; some fail."""
    steps: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 4))):
        what = draw(st.sampled_from(["toy.folder", "toy.process", "toy.freeze", "toy.say"]))
        servers = [step["id"] for step in steps if step["does"] == "toy.process"]
        step: dict[str, Any] = {"id": f"s{number}", "kind": "act", "does": what}
        step["needs"] = draw(st.lists(st.sampled_from([s["id"] for s in steps]), unique=True)) if steps else []
        if what in ("toy.folder", "toy.process"):
            step["with"] = {"name": f"n{number}"}
        elif what == "toy.freeze" and servers:
            step |= {"kind": "inject", "with": {"step": servers[0]}, "needs": [*{*step["needs"], servers[0]}]}
        else:
            step |= {"does": "toy.say", "with": {"error": draw(st.sampled_from(["", "it broke"]))}}
        steps.append(step)
    return draw(st.permutations(steps))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=graphs(), first=st.integers(1, 120), second=st.integers(1, 60))
def test_whatever_the_runbook_and_however_often_it_is_killed(
    bench: Bench, steps: list[dict[str, Any]], first: int, second: int
) -> None:
    """The one that cleans up is killed, too."""
    bench.body["drills"]["plan"] = []
    bench.both("toys", steps)
    bench.killed_at(first, lambda engine: hold(bench, engine))
    bench.killed_at(second, lambda engine: engine.sweep(lost_after=LOST_AT_ONCE))
    bench.sweep()
    assert bench.remains() == []
    assert all(drill.state is DrillState.ENDED and drill.card for drill in bench.engine.store.list())
