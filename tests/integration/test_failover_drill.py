"""Failover and switchover on a real Patroni cluster, with acknowledged writes counted. One cluster for all tests: it is whole after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ops_platform.drills.begin import Beginner, planned
from tests import patroni_rig
from tests.drill_rig import Held, ledger_database, measured, passed
from tests.rig import Cluster, Platform, eventually

pytestmark = pytest.mark.xdist_group("patroni")


@pytest.fixture(scope="module")
def patroni() -> Iterator[patroni_rig.Patroni]:
    with patroni_rig.cluster(synchronous=True) as made:
        yield made


@pytest.fixture
def held(
    patroni: patroni_rig.Patroni, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> Held:
    own = new_cluster(18)
    platform = new_platform(
        {"app-db": patroni.nodes}, extra={"patroni": {"urls": [node.url for node in patroni.nodes]}}
    )
    platform.body["platform"]["database"] = ledger_database(own, platform.home)
    platform.body["environments"]["test"] = {"production": False}
    names = ("failover-drill", "freeze-drill", "switchover-drill")
    platform.body["drills"] = {
        "plan": [
            {"id": name, "runbook": name, "targets": ["app-db"], "mode": "enforce", "unavailability": {"most": "10m"}} for name in names
        ],
        "business_hours": [],
        "workspace": "{inventory}/drills",
    }  # fmt: skip
    platform.reload()
    return Held(own, platform)


def rows_left(patroni: patroni_rig.Patroni) -> int:
    with patroni.leader.connect() as connection:
        row = connection.execute("select count(*) from ops_canary.drill_writes").fetchone()
    return row[0] if row else -1


def test_a_killed_primary_costs_seconds_and_no_acknowledged_write(held: Held, patroni: patroni_rig.Patroni) -> None:
    old = patroni.leader
    card = passed(held.drill("failover-drill", seconds_before=2))
    assert patroni.leader is not old
    found = measured(card)
    assert found["errors"] > 0
    assert found["rpo"] == 0
    assert 0 < found["promotion"] <= found["rto"] + 1
    writer = next(probe for probe in card.probes if probe.step == "writer")
    assert writer.outages
    assert writer.outages[0].ended is not None
    assert writer.unavailable_seconds > 0
    assert rows_left(patroni) == 0
    assert old.state()["role"] == "replica"


def test_a_frozen_primary_is_replaced_and_follows_when_it_wakes(held: Held, patroni: patroni_rig.Patroni) -> None:
    old = patroni.leader
    card = passed(held.drill("freeze-drill", seconds_before=2))
    assert patroni.leader is not old
    assert measured(card)["rpo"] == 0
    frozen = [resource for resource in card.teardown if resource.kind == "frozen"]
    assert [resource.gone for resource in frozen] == [True]
    assert old.state()["state"] == "running"


def test_a_switchover_there_and_back_loses_nothing(held: Held, patroni: patroni_rig.Patroni) -> None:
    line = patroni.leader.state()["timeline"]
    card = passed(held.drill("switchover-drill", seconds_before=2))
    assert patroni.leader.state()["timeline"] == line + 2
    assert measured(card)["rpo"] == 0
    assert [step.state for step in card.steps if step.id in ("there", "back")] == ["done", "done"]


def test_no_drill_begins_where_no_replica_is_fit(held: Held, patroni: patroni_rig.Patroni) -> None:
    others = [node for node in patroni.nodes if node is not patroni.leader]
    for node in others:
        node.tag(nofailover=True)
    try:
        # What a member says of itself comes to the others with its next turn.
        why = eventually(lambda: preflight(held), why="it is not refused")
    finally:
        for node in others:
            node.tag(nofailover=False)
        eventually(lambda: not preflight(held), why="it stays refused")
    assert "0 of 2" in why
    assert "nofailover" in why
    assert held.store.list() == []


def preflight(held: Held) -> str:
    """Why the plan is refused before anything begins; empty where it is not."""
    request = planned(held.platform.access, "failover-drill", None, {}, operator="ann", trigger="a test")
    result = Beginner(held.platform.access, held.store).plan(request)
    return next((r.reason for r in result.rulings if r.guard == "preflight" and not r.allows), "")
