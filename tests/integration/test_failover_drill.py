"""Failover and switchover on a real Patroni cluster, with acknowledged writes counted. One cluster for all tests: it is whole after each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import yaml

from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.durable import holds
from ops_platform.backup.model import Lsn, RecoveryTarget
from ops_platform.backup.receiver import Receiver
from ops_platform.clients.postgres_binaries import PostgresServer, find_postgres
from ops_platform.clients.processes import identify
from ops_platform.drills.askers import TABLE
from ops_platform.drills.begin import Beginner, planned
from ops_platform.drills.loader import shipped
from ops_platform.drills.model import Done, DrillCard, ProbeCard
from ops_platform.drills.probing import command, word_of
from ops_platform.drills.registry import Context, NothingGiven, does
from ops_platform.drills.scorecard import card_of
from ops_platform.drills.steps import patroni as steps
from ops_platform.drills.steps import probes
from ops_platform.drills.steps.basics import processes_with
from ops_platform.recovery.restore import restore
from tests import patroni_rig
from tests.drill_rig import Held, held_on, ledger_database, measured, passed
from tests.integration.wal_rig import Wire
from tests.rig import Cluster, Platform, eventually, missing
from tests.servers import folder

pytestmark = pytest.mark.xdist_group("patroni")


UNDER_TEST: list[patroni_rig.Patroni] = []  # for steps of our own
QUORUM = contextlib.ExitStack()  # etcd without it, until it is closed


@pytest.fixture(scope="module")
def patroni() -> Iterator[patroni_rig.Patroni]:
    with patroni_rig.cluster(synchronous=True) as made:
        UNDER_TEST.append(made)
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


REWIND = "The old primary came back without a copy of everything"
TWO = "One leads at a time"


BESIDE = "Writes acknowledged beside the old primary are there"
NOT_WAITED_FOR = "committed, and whether a replica has it was not waited for"
CANCELLED = 20  # waits of the old primary for a replica, at most


def beside(card: DrillCard) -> ProbeCard:
    return next(probe for probe in card.probes if probe.step == "wrong-side")


def result(card: DrillCard, title: str) -> str:
    return next(check.result for check in card.checks if check.title == title)


def test_a_killed_primary_costs_seconds_and_no_acknowledged_write(held: Held, patroni: patroni_rig.Patroni) -> None:
    """The archive and the backups go on over the new timeline: what was committed on both sides of the failover is restored."""
    old, platform = patroni.leader, held.platform
    receiver = Receiver(platform.access, [platform.target], most_backoff=0.5)
    receiver.start()
    try:
        state = receiver.states[0]
        eventually(lambda: state.phase == "streaming", why=lambda: state.last_error)
        first = run_backup(platform.access, platform.target)
        with old.connect() as connection:
            connection.execute("create table mark as select 'before'::text as name")
        # The backup ended a WAL file: to Patroni the replicas are that much behind until its next turn.
        eventually(lambda: not preflight(held), why=lambda: preflight(held))
        card = passed(held.drill("failover-drill", seconds_before=2))
        assert patroni.leader is not old
        at = across(patroni)
        position = Lsn.parse(told(patroni.leader, "select pg_current_wal_flush_lsn()::text"))
        line = patroni.leader.state()["timeline"]
        eventually(
            lambda: state.timeline == line and holds(platform.repository, position, timeline=line),
            why=lambda: f"{state.phase}, timeline {state.timeline}: {state.last_error}",
        )
        backup = run_backup(platform.access, platform.target)
        again = across(patroni)
        position = Lsn.parse(told(patroni.leader, "select pg_current_wal_flush_lsn()::text"))
        eventually(lambda: holds(platform.repository, position, timeline=line), why=lambda: state.last_error)
    finally:
        receiver.stop()
        assert receiver.join(60)
    assert backup.timeline == line
    assert restored(held, at) == (["before", "after"], first.backup_id)
    assert restored(held, again) == (["before", "after", "later", "after"], backup.backup_id)
    found = measured(card)
    assert found["errors"] > 0
    assert found["rpo"] == 0
    assert found["promotion"] > 0
    assert found["rto"] > 0
    writer = next(probe for probe in card.probes if probe.step == "writer")
    assert writer.outages
    assert writer.outages[0].ended is not None
    assert writer.unavailable_seconds > 0
    assert result(card, REWIND).startswith(
        ("by pg_rewind", "as it was")
    )  # whether it wrote more than it sent, nobody says
    assert rows_left(patroni) == 0
    assert old.state()["role"] == "replica"


def told(node: patroni_rig.Node, query: str) -> Any:
    with node.connect() as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


def across(patroni: patroni_rig.Patroni) -> datetime:
    """A moment after a row of the new timeline, and before another one."""
    with patroni.leader.connect() as connection:
        connection.execute("insert into mark values ('after')")
        at = connection.execute("select clock_timestamp()").fetchone()
        connection.execute("insert into mark values ('later')")
        assert at is not None
        return at[0]


def restored(held: Held, at: datetime) -> tuple[list[str], str]:
    """The marks as they were at the moment, and the backup that they came from."""
    with folder("ops-restore-") as home:
        done = restore(held.platform.access, held.platform.target, RecoveryTarget("time", at), home / "data")
        install = find_postgres(15)
        assert install is not None
        server = PostgresServer(install, Path(done.directory))
        server.start()
        try:
            with server.connect("postgres") as connection:
                return [row[0] for row in connection.execute("select name from mark").fetchall()], done.backup_id
        finally:
            server.stop("immediate")


def told_by(node: patroni_rig.Node) -> Any:
    with urllib.request.urlopen(f"{node.url}/config", timeout=30) as answer:
        return json.load(answer)


def test_a_primary_that_is_started_in_its_place_was_not_lost(held: Held, patroni: patroni_rig.Patroni) -> None:
    old = patroni.leader
    patroni.configure(primary_start_timeout=300, master_start_timeout=300)
    try:
        eventually(lambda: "300" in json.dumps(told_by(old)), why="it is not told")
        card = card_of(held.drill("failover-drill", seconds_before=2))
    finally:
        patroni.configure(primary_start_timeout=0, master_start_timeout=0)
    assert card is not None
    assert (card.verdict, patroni.leader) == ("FAIL", old)
    assert "nobody took over: Patroni started it in its place" in card.reason


def test_a_frozen_primary_is_replaced_and_follows_when_it_wakes(held: Held, patroni: patroni_rig.Patroni) -> None:
    old = patroni.leader
    # How long a busy machine gives the woken primary no turn is not what is looked at here.
    card = passed(held.drill("freeze-drill", seconds_before=2, most_two_leaders="1m"))
    assert patroni.leader is not old
    assert measured(card)["rpo"] == 0
    frozen = [resource for resource in card.teardown if resource.kind == "frozen"]
    assert [resource.gone for resource in frozen] == [True]
    assert old.state()["state"] == "running"


def test_a_stranger_that_streams_does_not_stand_for_a_member_that_does_not(
    held: Held, patroni: patroni_rig.Patroni
) -> None:
    """One of two replicas cannot stream any more, and a receiver of WAL is connected in its stead."""
    lonely = next(node for node in patroni.nodes if node is not patroni.leader)
    receiver = Receiver(held.platform.access, [held.platform.target], most_backoff=0.5)
    context: Any = SimpleNamespace(access=held.platform.access, target=held.platform.target)
    state = receiver.states[0]
    receiver.start()
    try:
        eventually(lambda: state.phase == "streaming", why=lambda: state.last_error)
        assert steps._all_follow(context)[0]
        with patroni.leader.connect() as connection:
            connection.execute("alter role replicator nologin")
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_replication where application_name = %s", [lonely.name]
            )
        eventually(lambda: len(senders(patroni)) == 2, why=lambda: str(senders(patroni)))
        assert lonely.name not in senders(patroni)
        assert lonely.state()["timeline"] == patroni.leader.state()["timeline"]
        follow, said = steps._all_follow(context)
        assert not follow
        assert f"nobody streams to {lonely.name}" in said
    finally:
        with patroni.leader.connect() as connection:
            connection.execute("alter role replicator login")
        receiver.stop()
        assert receiver.join(60)
        patroni.whole()
    assert steps._all_follow(context)[0]


def senders(patroni: patroni_rig.Patroni) -> list[str]:
    return [r["application_name"] for r in patroni.leader.state()["replication"] if r["state"] == "streaming"]


def test_two_that_lead_at_once_fail_the_drill(held: Held, patroni: patroni_rig.Patroni) -> None:
    """A primary that wakes without its Patroni leads on: nobody is there who would tell it."""
    old = patroni.leader
    with ThreadPoolExecutor(1) as pool:
        lonely = pool.submit(wakes_without_patroni, patroni, old)
        card = card_of(held.drill("freeze-drill", seconds_before=1, most_two_leaders="1s"))
        lonely.result(60)
    assert card is not None
    assert card.verdict == "FAIL"
    assert f"{old.host}:{old.port}" in result(card, TWO)
    assert "led at once" in card.reason
    assert measured(card)["two_leaders"] > 1
    assert [finding.title for finding in card.findings] == [f"{TWO}: does not hold"]


def wakes_without_patroni(patroni: patroni_rig.Patroni, old: patroni_rig.Node) -> None:
    """Kill the Patroni of the one that hangs; start it again once both have led for a while."""
    others = [node for node in patroni.nodes if node is not old]
    new = eventually(lambda: next((n for n in others if leads(n)), None), seconds=90, why="nobody takes over")
    old.daemon.stop()
    eventually(lambda: leads(old) and leads(new), why="the old one does not wake")
    since = time.monotonic()
    eventually(lambda: time.monotonic() > since + 2, why="time stands still")
    old.daemon.start()


def leads(node: patroni_rig.Node) -> bool:
    """By PostgreSQL's own word, whoever of its cluster hangs."""
    with contextlib.suppress(psycopg.Error), node.connect(connect_timeout=2) as connection:
        row = connection.execute("select not pg_is_in_recovery()").fetchone()
        return bool(row and row[0])
    return False


def test_a_primary_that_is_cut_off_gives_up_and_what_it_wrote_alone_is_gone(
    held: Held, patroni: patroni_rig.Patroni
) -> None:
    """An attempt at a split brain, and acknowledgements that are lost on their way: those writes are neither lost nor promised."""
    old = patroni.leader
    if old.place is None:
        missing("a network of its own for each node", "making one takes root, iproute2 and nsenter")
    with old.connect() as connection:
        connection.execute("create table ops_canary.alone (n int)")
    wires = {node: Wire(node.port, node.host) for node in patroni.nodes}
    try:
        hosts = [{"host": "127.0.0.1", "port": wire.port} for wire in wires.values()]
        held.platform.body["targets"][0]["connection"]["hosts"] = hosts
        held.platform.reload()
        with ThreadPoolExecutor(1) as pool:
            alone = pool.submit(split, old, wires[old])
            card = passed(Held(held.cluster, held.platform).drill("cut-drill", seconds_before=4))
            assert alone.result(60) > 0
    finally:
        for wire in wires.values():
            wire.close()
    assert patroni.leader is not old
    assert [told(node, "select count(*) from ops_canary.alone") for node in patroni.nodes] == [0, 0, 0]
    assert result(card, REWIND).startswith("by pg_rewind")
    found = measured(card)
    assert found["unknown"] > 0
    assert (found["lost"], found["rpo"], found["two_leaders"]) == (0, 0, 0)
    # Commits wait for a replica, and an answer that one that was cancelled does not is no acknowledgement.
    assert (found["wrong_side_lost"], found["wrong_side"]) == (0, 0)
    errors = beside(card).errors
    assert 0 < errors.pop(NOT_WAITED_FOR) <= CANCELLED
    assert errors  # the one that hung until the old primary gave up
    assert "0 of " in result(card, BESIDE)
    assert [resource.gone for resource in card.teardown if resource.kind == "cut off"] == [True]
    assert all(node.place is not None and node.place.plugged for node in patroni.nodes)


def split(old: patroni_rig.Node, wire: Wire) -> int:
    """Lose the answers of the primary from some write on; once it is cut off, write to it for as long as it lets us. How many it took."""
    there = f"select to_regclass('{TABLE}') is not null"
    written = f"select count(*) from {TABLE} where drill like '%/wrong-side'"  # the last that begins
    eventually(lambda: told(old, there) and told(old, written) > 10, why="nobody writes")
    wire.mute = True  # seconds before it is cut off: the next write on each connection is done, and nobody hears of it
    assert old.place is not None
    eventually(lambda: not old.place.plugged, why="it is not cut off")  # type: ignore[union-attr]
    wire.mute = False
    number = 0
    with contextlib.suppress(psycopg.Error), old.connect_beside() as connection:
        connection.execute("set synchronous_commit to local")
        while not old.place.plugged:
            connection.execute("insert into ops_canary.alone values (%s)", [number])
            number += 1
            if number <= CANCELLED:
                connection.execute(
                    "select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'"
                    " and application_name = 'ops drill probe'"
                )
            time.sleep(0.05)
    return number


def test_what_an_asynchronous_primary_acknowledges_once_it_is_cut_off_is_lost_counted_and_named(
    held: Held, patroni: patroni_rig.Patroni
) -> None:
    """What it had when nobody reached it any more, by its own socket, against what its successor has."""
    old = patroni.leader
    if old.place is None:
        missing("a network of its own for each node", "making one takes root, iproute2 and nsenter")
    patroni.configure(synchronous_mode=False)
    try:
        eventually(lambda: told(old, "show synchronous_standby_names") == "", why="it waits for replicas still")
        with ThreadPoolExecutor(1) as pool:
            look = pool.submit(taken_alone, patroni, old)
            allowed = {"most_lost": 10_000, "most_wrong_side": 10_000}
            card = passed(held.drill("cut-drill", seconds_before=2, **allowed))
            had, kept = look.result(60)
    finally:
        patroni.configure(synchronous_mode=True)
    patroni.whole()
    eventually(lambda: told(patroni.leader, "show synchronous_standby_names") != "", why="it waits for no replica")
    (check,) = [check for check in card.checks if check.title == BESIDE]
    lost = {n for first, last in check.detail["lost"] for n in range(first, last + 1)}
    samples = held.store.samples(card.drill, "wrong-side")
    acknowledged = {s.n for s in samples if s.ok}
    one_at_a_time = [a.at + timedelta(milliseconds=a.ms - 5) <= b.at for a, b in pairwise(samples)]
    assert all(one_at_a_time)
    assert len(had - kept) > 10
    assert lost == acknowledged - kept
    assert {n for n in lost if n <= max(had)} == (had & acknowledged) - kept
    assert f"{len(lost)} of {len(acknowledged)} writes" in check.result
    assert f"{min(lost)}-{max(lost)}" in check.result
    found = measured(card)
    assert found["wrong_side_lost"] == len(lost)
    (at,) = [datetime.fromisoformat(held.store.steps(card.drill)["loss"].facts["at"])]
    last = max(s.at + timedelta(milliseconds=s.ms) for s in samples if s.n in lost)
    assert found["wrong_side"] == pytest.approx((last - at).total_seconds(), abs=0.01)
    assert rows_left(patroni) == 0


def taken_alone(patroni: patroni_rig.Patroni, old: patroni_rig.Node) -> tuple[set[int], set[int]]:
    """Rows of the client beside it: what it had when it was looked at last before it gave up, and what its successor has."""
    query = f"select n from {TABLE} where drill like '%/wrong-side'"
    place, had = old.place, set[int]()
    assert place is not None
    eventually(lambda: not place.plugged, seconds=120, why="it is not cut off")
    with contextlib.suppress(psycopg.Error), old.connect_beside() as connection:
        while not place.plugged:
            had |= {row[0] for row in connection.execute(query).fetchall()}
            time.sleep(0.02)
    others = [node for node in patroni.nodes if node is not old]
    new = eventually(lambda: next((node for node in others if leads(node)), None), seconds=90, why="nobody takes over")
    with new.connect() as connection:
        return had, {row[0] for row in connection.execute(query).fetchall()}


def test_a_client_that_may_not_stand_beside_the_primary_leaves_the_drill_unproven(
    held: Held, patroni: patroni_rig.Patroni, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may do all but join a network; the drill itself goes on, and is no pass."""
    if patroni.leader.place is None:
        missing("a network of its own for each node", "making one takes root, iproute2 and nsenter")

    def confined(word: str) -> list[str]:
        limits = ["setpriv", "--bounding-set=-sys_admin", "--"] if word.endswith("/wrong-side") else []
        return [*limits, *command(word)]

    monkeypatch.setattr(probes, "command", confined)
    card = card_of(held.drill("cut-drill", seconds_before=1))
    assert card is not None
    assert card.verdict == "COULD_NOT_VERIFY", card.reason
    (check,) = [check for check in card.checks if check.title == BESIDE]
    assert check.holds is None
    assert "its network may not be joined: Operation not permitted" in check.result
    assert "wrong_side_lost" not in measured(card)


def test_a_client_beside_the_primary_ends_with_a_drill_that_was_killed(
    held: Held, patroni: patroni_rig.Patroni
) -> None:
    old = patroni.leader
    if old.place is None:
        missing("a network of its own for each node", "making one takes root, iproute2 and nsenter")
    held.ledger.close()
    assert held.killed_when("patroni.cut_primary", "ended", "cut-drill")
    held = held.elsewhere()
    (lost,) = held.store.list()
    word = word_of(lost.id, "wrong-side")
    assert not old.place.plugged
    assert [*processes_with(word)]
    rows = f"select count(*) from {TABLE} where drill = '{word}'"
    with old.connect_beside() as connection:
        assert (connection.execute(rows).fetchone() or [0])[0] > 0
    held.nothing_left()
    assert old.place.plugged
    assert not [*processes_with(word)]
    patroni.whole()
    assert rows_left(patroni) == 0
    talks = "select count(*) from pg_stat_activity where application_name = 'ops drill probe'"
    assert [told(node, talks) for node in patroni.nodes] == [0, 0, 0]


def test_a_switchover_there_and_back_loses_nothing(held: Held, patroni: patroni_rig.Patroni) -> None:
    line = patroni.leader.state()["timeline"]
    card = passed(held.drill("switchover-drill", seconds_before=2))
    assert patroni.leader.state()["timeline"] == line + 2
    assert measured(card)["rpo"] == 0
    assert [step.state for step in card.steps if step.id in ("there", "back")] == ["done", "done"]
    ways = [m.how.partition(":")[0] for m in card.measured if m.name == "rto"]
    assert ways == ["Without a write on the way there", "Without a write on the way back"]


def test_no_drill_begins_where_no_replica_is_fit(held: Held, patroni: patroni_rig.Patroni) -> None:
    why = refused_while_replicas_have(held, patroni, "nofailover")
    assert "0 of 2" in why
    assert "nofailover" in why
    assert held.store.list() == []


def test_no_drill_begins_while_no_replica_is_synchronous(held: Held, patroni: patroni_rig.Patroni) -> None:
    """Where commits wait for one: Patroni lets no other take over, however near it is."""
    why = refused_while_replicas_have(held, patroni, "nosync")
    assert "0 of 2" in why
    assert "it is not synchronous, and Patroni lets no other take over" in why


def refused_while_replicas_have(held: Held, patroni: patroni_rig.Patroni, tag: str) -> str:
    """Why the drill is refused while every replica has the tag; without it, it is not."""
    others = [node for node in patroni.nodes if node is not patroni.leader]
    for node in others:
        node.tag(**{tag: True})
    try:
        # What a member says of itself comes to the others with its next turn.
        return eventually(lambda: preflight(held), why="it is not refused")
    finally:
        for node in others:
            node.tag(**{tag: False})
        eventually(lambda: not preflight(held), why="it stays refused")


def preflight(held: Held) -> str:
    """Why the plan is refused before anything begins; empty where it is not."""
    request = planned(held.platform.access, "failover-drill", None, {}, operator="ann", trigger="a test")
    result = Beginner(held.platform.access, held.store).plan(request)
    return next((r.reason for r in result.rulings if r.guard == "preflight" and not r.allows), "")


def test_a_clock_that_is_wrong_is_named_and_no_measure_goes_by_it(held: Held, patroni: patroni_rig.Patroni) -> None:
    old = patroni.leader
    with old.skewed("+3600s"):
        patroni.whole()
        assert patroni.leader is old
        why = preflight(held)
        card = passed(held.drill("failover-drill", seconds_before=1, most_skew="2h"))
        assert patroni.leader is not old
    patroni.whole()
    assert why.startswith(f"fit: {old.host}:{old.port} is 3")
    assert "s ahead of us" in why
    assert not preflight(held)
    found = measured(card)
    assert 0 < found["detection"] <= found["promotion"] < 600
    assert 0 < found["rto"] < 600


@pytest.mark.parametrize("drill", ["failover-drill", "cut-drill"])
def test_no_drill_begins_on_a_machine_that_is_not_the_primarys(
    held: Held, patroni: patroni_rig.Patroni, drill: str
) -> None:
    """As whoever sees no process of it, and nothing of its network but what comes over the wire."""
    if patroni.leader.place is None:
        missing("a network of its own for each node", "making one takes root, iproute2 and nsenter")
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "ops_platform.cli.main"]
    words = [*elsewhere, "--inventory", str(held.platform.file), "drill", "plan", drill, "--json"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
    (why,) = [one["reason"] for one in json.loads(done.stdout)["rulings"] if one["guard"] == "preflight"]
    assert why.startswith("here: ")
    assert f"{patroni.leader.host} is another machine's address" in why
    assert "hold the drill on the server's machine" in why


def test_no_drill_begins_where_etcd_has_lost_its_quorum(held: Held, patroni: patroni_rig.Patroni) -> None:
    old = patroni.leader
    with patroni.etcd.without_quorum():
        # What is left of etcd goes on to say who led; that nobody may lead any more shows once Patroni has given up, and between
        # two looks of one preflight it may.
        eventually(lambda: "lost its quorum" in preflight(held), why=lambda: preflight(held))
        eventually(lambda: not leads(old), why="it leads on")
        begun = held.begin("failover-drill")
    patroni.whole()
    assert begun.drill is None
    assert held.store.list() == []


@does("toy.loses_quorum", "act")
def loses_quorum(_context: Context, _given: NothingGiven) -> Done:
    """From here on etcd has none."""
    QUORUM.enter_context(UNDER_TEST[-1].etcd.without_quorum())
    return Done("two are gone")


@does("toy.has_quorum", "teardown")
def has_quorum(_context: Context, _given: NothingGiven) -> Done:
    """The others of etcd are back."""
    QUORUM.close()
    return Done("all are there")


def test_a_drill_in_which_etcd_loses_its_quorum_has_failed_and_its_teardown_is_proven(
    held: Held, patroni: patroni_rig.Patroni
) -> None:
    """The shipped runbook, and what happens to etcd in it: right before the primary is killed, until the teardown."""
    book = shipped()["failover-drill"].model_dump(mode="json", by_alias=True) | {"id": "quorum"}
    steps = {step["id"]: step for step in book["steps"]}
    steps["loss"]["needs"] = ["quorum"]
    steps["promoted"]["within"] = "12s"
    lost = {"id": "quorum", "kind": "act", "does": "toy.loses_quorum", "needs": ["before"]}
    back = {"id": "back", "kind": "teardown", "does": "toy.has_quorum"}
    book["steps"] = [*book["steps"][:5], lost, *book["steps"][5:-2], back, *book["steps"][-2:]]
    with QUORUM:
        card = card_of(drilled_by(held, book).drill("quorum", seconds_before=1))
    assert card is not None
    assert (card.verdict, card.ending) == ("FAIL", "failed")
    states = {step.id: step.state for step in card.steps}
    assert (states["loss"], states["promoted"], states["whole"], states["clean"]) == ("done", "failed", "done", "done")
    assert "Another member leads" in [finding.title.partition(":")[0] for finding in card.findings]
    assert all(one.gone for one in card.teardown)
    patroni.whole()
    assert rows_left(patroni) == 0


def drilled_by(held: Held, book: dict[str, Any]) -> Held:
    """A runbook of the inventory's own, and a drill of the same name."""
    platform = held.platform
    (platform.home / "runbooks").mkdir(exist_ok=True)
    (platform.home / "runbooks" / f"{book['id']}.yaml").write_text(yaml.safe_dump(book, sort_keys=False))
    drills = platform.body["drills"]
    drills["runbooks"] = "runbooks"
    drills["plan"].append({**drills["plan"][0], "id": book["id"], "runbook": book["id"]})
    platform.reload()
    return Held(held.cluster, platform)


def test_writes_that_an_asynchronous_cluster_loses_are_counted_exactly_and_named(
    held: Held, patroni: patroni_rig.Patroni
) -> None:
    """What the replicas had not received when the primary was killed. The inventory allows it."""
    old = patroni.leader
    held.platform.body["drills"]["plan"][0]["parameters"] = {"most_lost": 10_000}
    held.platform.reload()
    held = Held(held.cluster, held.platform)
    patroni.configure(synchronous_mode=False)
    try:
        eventually(lambda: told(old, "show synchronous_standby_names") == "", why="it waits for replicas still")
        with ThreadPoolExecutor(1) as pool:
            hold = pool.submit(held_back, patroni, old)
            card = passed(held.drill("failover-drill", seconds_before=4))
            had, kept = hold.result(60)
    finally:
        patroni.configure(synchronous_mode=True)
    patroni.whole()
    eventually(lambda: told(patroni.leader, "show synchronous_standby_names") != "", why="it waits for no replica")
    (check,) = [check for check in card.checks if check.title == "Acknowledged writes are there"]
    lost = {n for first, last in check.detail["lost"] for n in range(first, last + 1)}
    acknowledged = {s.n for s in held.store.samples(card.drill, "writer") if s.ok}
    assert lost
    assert measured(card)["lost"] == len(lost)
    assert lost <= acknowledged - kept
    assert {n for n in lost if n <= max(had)} == (had & acknowledged) - kept
    assert f"acknowledged writes are lost: {min(lost)}" in check.result
    assert measured(card)["rpo"] > 0


def held_back(patroni: patroni_rig.Patroni, old: patroni_rig.Node) -> tuple[set[int], set[int]]:
    """The replicas receive nothing more, from some write on until the primary is dead. What that had, and what its successor has."""
    query = f"select n from {TABLE}"
    there = f"select to_regclass('{TABLE}') is not null"
    eventually(lambda: told(old, there) and told(old, f"select count(*) from {TABLE}") > 20, why="nobody writes")
    others = [node for node in patroni.nodes if node is not old]
    receivers = [told(node, "select pid from pg_stat_wal_receiver") for node in others]
    postmaster = identify(old.postmaster or 0)
    assert postmaster is not None
    for pid in receivers:
        os.kill(pid, signal.SIGSTOP)
    had: set[int] = set()
    with contextlib.suppress(psycopg.Error), old.connect() as connection:
        while postmaster.alive:
            had |= {row[0] for row in connection.execute(query).fetchall()}
            time.sleep(0.02)
    eventually(lambda: not postmaster.alive, why="it is not killed")
    for pid in receivers:  # it ends before it reads what waits for it
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
    new = eventually(lambda: next((node for node in others if leads(node)), None), why="nobody takes over")
    with new.connect() as connection:
        return had, {row[0] for row in connection.execute(query).fetchall()}


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
        "patroni.fit": "toy.say", "patroni.breakable": "toy.say", "patroni.freeze_primary": "drill.suppose", "patroni.new_primary": "toy.say",
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
    assert "acknowledged writes are lost: 3-7" in card.reason
