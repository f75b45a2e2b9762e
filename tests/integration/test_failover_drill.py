"""Failover and switchover on a real Patroni cluster, with acknowledged writes counted. One cluster for all tests: it is whole after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import yaml

from ops_platform.drills.askers import TABLE
from ops_platform.drills.begin import Beginner, planned
from ops_platform.drills.loader import shipped
from ops_platform.drills.model import Done
from ops_platform.drills.registry import Context, NothingGiven, does
from ops_platform.drills.scorecard import card_of
from tests import patroni_rig
from tests.drill_rig import Held, held_on, ledger_database, measured, passed
from tests.rig import Cluster, Platform, eventually, missing

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
    hosts = [{"host": node.host, "port": node.port} for node in patroni.nodes]
    platform = new_platform(
        {"app-db": patroni.nodes},
        extra={"connection": {"hosts": hosts}, "patroni": {"urls": [node.url for node in patroni.nodes]}},
    )
    platform.body["platform"]["database"] = ledger_database(own, platform.home)
    platform.body["environments"]["test"] = {"production": False}
    names = ("failover-drill", "freeze-drill", "cut-drill", "switchover-drill")
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


def test_a_primary_that_is_cut_off_is_replaced_and_gives_up(held: Held, patroni: patroni_rig.Patroni) -> None:
    old = patroni.leader
    if old.place is None:
        missing("a network of its own for each node", "making one takes root, iproute2 and nsenter")
    card = passed(held.drill("cut-drill", seconds_before=2))
    assert patroni.leader is not old
    assert measured(card)["rpo"] == 0
    assert measured(card)["two_leaders"] == 0
    assert [resource.gone for resource in card.teardown if resource.kind == "cut off"] == [True]


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


# Who wakes and takes the lead again. Patroni over etcd's third protocol may do so; here a step does what it does to the rows.


@does("toy.takes_the_lead_again", "wait_until")
def takes_the_lead_again(context: Context, _given: NothingGiven) -> Done:
    """What the successor acknowledged is gone."""
    with context.access.postgres(context.target) as connection:
        gone = connection.execute(f"delete from {TABLE} where drill = %s and n between 3 and 7", [context.held.id])
        return Done(f"{gone.rowcount} are gone")


def test_what_a_primary_that_wakes_throws_away_is_counted(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    """The shipped runbook, its looks at Patroni replaced: nothing else counts the writes later."""
    stands_for = {
        "patroni.fit": "toy.say", "patroni.freeze_primary": "drill.suppose", "patroni.new_primary": "toy.say",
        "patroni.rejoined": "toy.takes_the_lead_again", "patroni.whole": "toy.say",
    }  # fmt: skip
    book = shipped()["freeze-drill"].model_dump(mode="json", by_alias=True) | {"id": "wakes"}
    for step in book["steps"]:
        if step["does"] in stands_for:
            step.update({"does": stands_for[step["does"]], "with": {}})
    plan = {"id": "wakes", "runbook": "wakes", "targets": ["app-db"], "unavailability": {"most": "10m"}}
    held = held_on(new_cluster(18), new_platform, [plan], runbooks="runbooks")
    (held.platform.home / "runbooks").mkdir()
    (held.platform.home / "runbooks" / "wakes.yaml").write_text(yaml.safe_dump(book, sort_keys=False))
    card = card_of(held.drill("wakes", seconds_before=1))
    assert card is not None
    assert (card.verdict, measured(card)["lost"]) == ("FAIL", 5)
    assert "5 of" in card.reason
    assert "acknowledged writes are lost: [3, 4, 5, 6, 7]" in card.reason
