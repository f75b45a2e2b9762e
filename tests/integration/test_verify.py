"""The verification against real servers: what is good passes, what is damaged fails, what cannot be asked is neither."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ops_platform.backup.archive import read_archive
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import open_engine
from ops_platform.backup.model import RecoveryTarget, segment_name
from ops_platform.clients.postgres_binaries import run_as
from ops_platform.errors import UsageError
from ops_platform.recovery import canary, records
from ops_platform.recovery.choosing import Choosing
from ops_platform.recovery.model import GateStatus, Scorecard, Verdict
from ops_platform.recovery.verdict import verdict_of
from ops_platform.recovery.verify import verify
from tests.rig import Cluster, Platform, eventually
from tests.unit.test_reports import make_card

MakeCluster = Callable[..., Cluster]
MakePlatform = Callable[..., Platform]


GATES = {
    "manifest",
    "reached",
    "canary",
    "promotes",
    "prepared",
    "reads",
    "row-counts",
    "schema",
    "sequences",
    "extensions",
    "amcheck",
    "checksums",
    "teardown",
}


def statuses(card: Scorecard) -> dict[str, GateStatus]:
    return {gate.id: gate.status for gate in card.gates}


def result(card: Scorecard, gate_id: str) -> str:
    return next(gate.result for gate in card.gates if gate.id == gate_id)


def filled(cluster: Cluster) -> Cluster:
    cluster.sql("""
        create table t (id int generated always as identity primary key, body text);
        insert into t (body) select md5(i::text) from generate_series(1, 5000) i;
        create index on t (body);
        create table "Namen mit ""Zitat"" und Ümlaut" (i int);
        insert into "Namen mit ""Zitat"" und Ümlaut" select generate_series(1, 10);
        analyze;
    """)
    return cluster


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
def test_a_good_backup_is_proven_on_every_major(
    major: int, new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    platform = new_platform({"app-db": [filled(new_cluster(major, initdb=()))]})
    manifest = run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason
    assert set(statuses(card).values()) <= {GateStatus.PASSED, GateStatus.NOT_APPLICABLE}
    assert {gate for gate, status in statuses(card).items() if status is GateStatus.PASSED} >= GATES
    (proof,) = platform.repository.proofs(manifest.backup_id)
    assert (proof.verdict, proof.scorecard) == ("PASS", records.scorecard_key("app-db", card.verification_id))
    assert records.scorecards(platform.repository) == [card]
    assert not list(platform.home.glob("ops-verify-*"))


def test_an_incremental_chain_is_proven(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    full = run_backup(platform.access, platform.target)
    cluster.sql("insert into t (body) select md5(i::text) from generate_series(1, 3000) i")
    increment = run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target, pick="chain")
    assert card.verdict is Verdict.PASS, card.reason
    assert card.chain == [full.backup_id, increment.backup_id]
    oldest = verify(platform.access, platform.target, pick="oldest")
    assert (oldest.verdict, oldest.backup_id) == (Verdict.PASS, full.backup_id), oldest.reason
    chance = verify(platform.access, platform.target, pick="random")
    assert chance.verdict is Verdict.PASS, chance.reason


def test_tablespaces_are_mapped_into_the_sandbox(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    cluster = filled(new_cluster(18))
    space = cluster.server.directory.parent / "fast disk"
    space.mkdir()
    run_as().own(space)
    cluster.sql(f"create tablespace fast location '{space}'")
    cluster.sql("create table in_space (i int) tablespace fast; insert into in_space select generate_series(1, 500)")
    before = sorted(space.rglob("*"))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason
    assert cluster.sql("select count(*) from in_space") == 500
    assert sorted(space.rglob("*")) == before


def test_larger_parameters_of_the_primary_do_not_stop_the_sandbox(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    settings = {"max_connections": "150", "max_prepared_transactions": "20", "max_locks_per_transaction": "128"}
    cluster = filled(new_cluster(18, settings))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason


def test_a_restored_subscription_does_not_connect(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    publisher = new_cluster(18, {"wal_level": "logical", "log_connections": "all"})
    publisher.sql("create table p (i int primary key); create publication everything for all tables")
    cluster = filled(new_cluster(18))
    cluster.sql("create table p (i int primary key)")
    host, port = publisher.server.sockets, publisher.server.socket_port
    cluster.sql(
        f"create subscription s connection 'host={host} port={port} dbname=postgres user=postgres' publication everything"
    )
    deadline = time.monotonic() + 30
    while not publisher.sql("select count(*) from pg_stat_replication where application_name = 's'"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    pid = publisher.sql("select pid from pg_stat_replication where application_name = 's'")
    seen = publisher.server.log.read_text().count("application_name=s")
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason
    # The sandbox shares the machine and could reach the publisher's socket: it did not try.
    assert publisher.sql("select pid from pg_stat_replication where application_name = 's'") == pid
    assert publisher.server.log.read_text().count("application_name=s") == seen


def test_libraries_that_act_on_their_own_are_left_out(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    cluster = filled(new_cluster(18))
    cluster.server.configure({"shared_preload_libraries": "pg_cron,auto_explain"}, file="postgresql.conf")
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason
    assert any("pg_cron" in note for note in card.notes)


def test_a_turn_is_noted_where_its_choice_fails(new_platform: MakePlatform, new_cluster: MakeCluster) -> None:
    """Else the same broken backup would have every turn, and the others none."""
    platform = new_platform(
        {"app-db": [new_cluster(18)]}, extra={"backup": {"verification": {"pick": ["oldest", "newest"]}}}
    )
    first = run_backup(platform.access, platform.target, kind="full")
    run_backup(platform.access, platform.target, kind="full")
    name = segment_name(first.timeline, first.start, first.wal_segment_size)
    store = platform.repository.store
    for partial in (True, False):
        store.delete(platform.repository.wal_key(first.system_identifier, name, partial=partial))
    card = verify(platform.access, platform.target)
    assert (card.verdict, card.turn, card.backup_id) == (Verdict.FAIL, 0, None), card.reason
    assert verify(platform.access, platform.target).turn == 1


def test_turns_are_counted_by_proofs_that_were_turns(new_platform: MakePlatform, shared_cluster: Cluster) -> None:
    """The proof that follows each nightly backup picks the newest: counted as a turn it would take every other one, for ever."""
    platform = new_platform(
        {"app-db": [shared_cluster]}, extra={"backup": {"verification": {"pick": ["newest", "chain", "oldest"]}}}
    )
    picked: list[str] = []
    for number in range(7):
        for asked in (True, False):
            choosing = by_turns(platform)
            if not asked:
                picked.append(choosing._turn())
            key = f"20260101T0000{number:02}Z-{'a' if asked else 'b'}"
            card = make_card(verification_id=key, target_id="app-db", turn=choosing.turn)
            assert records.keep(platform.repository, card)
    assert picked == ["newest", "chain", "oldest", "newest", "chain", "oldest", "newest"]


def by_turns(platform: Platform) -> Choosing:
    return Choosing(
        platform.access, platform.target, open_engine(platform.access, platform.target), "v", None,
        pick=None, at=None, backup_id=None, alone=False, notes=[],
    )  # fmt: skip


def test_a_turn_that_could_not_be_verified_is_taken_again_once(
    new_platform: MakePlatform, shared_cluster: Cluster
) -> None:
    platform = new_platform(
        {"app-db": [shared_cluster]}, extra={"backup": {"verification": {"pick": ["newest", "chain", "oldest"]}}}
    )
    picked: list[str] = []
    verdicts = ["COULD_NOT_VERIFY", "PASS", "COULD_NOT_VERIFY", "COULD_NOT_VERIFY", "FAIL", "COULD_NOT_VERIFY", "PASS"]
    for number, verdict in enumerate(verdicts):
        choosing = by_turns(platform)
        picked.append(choosing._turn())
        key = f"20260101T0000{number:02}Z-a"
        card = make_card(verification_id=key, target_id="app-db", turn=choosing.turn, verdict=Verdict(verdict))
        assert records.keep(platform.repository, card)
    assert picked == ["newest", "newest", "chain", "chain", "oldest", "newest", "newest"]


# What must not pass


def test_a_missing_wal_segment_fails_and_is_named(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    for _ in range(3):
        cluster.sql("insert into t (body) select md5(i::text) from generate_series(1, 5000) i")
        cluster.sql("select pg_switch_wal()")
    take, lost = canary.take, []

    def then_lost(*args: Any) -> canary.SourceMoment:
        moment = take(*args)
        archive = read_archive(platform.repository)
        assert archive is not None
        victim = [item for item in archive.listing if not item.partial and not item.history][-2]
        platform.repository.store.delete(victim.info.key)
        lost.append(victim.name)
        return moment

    monkeypatch.setattr(canary, "take", then_lost)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.FAIL, card.reason
    assert lost[0] in card.reason


def test_an_index_that_disagrees_with_its_table_fails(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    cluster = filled(new_cluster(18))
    cluster.sql("create function f(int) returns int immutable language sql as 'select $1'")
    cluster.sql("create table d (i int); insert into d select generate_series(1, 2000); create index d_i on d (f(i))")
    cluster.sql("create or replace function f(int) returns int immutable language sql as 'select -$1'")
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target, full=True)
    assert card.verdict is Verdict.FAIL
    assert statuses(card)["amcheck"] is GateStatus.FAILED
    assert "d_i" in result(card, "amcheck")


def test_a_schema_that_differs_and_rows_that_are_missing_fail(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    take = canary.take

    def lied_to(*args: Any) -> canary.SourceMoment:
        moment = take(*args)
        known = moment.facts["postgres"]
        known.fingerprint["columns"] = "0" * 64
        known.counts["public.t"] = type(known.counts["public.t"])(9000, exact=True)
        known.extensions["postgis"] = "3"
        return moment

    monkeypatch.setattr(canary, "take", lied_to)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.FAIL
    found = statuses(card)
    assert [found[gate] for gate in ("schema", "row-counts", "extensions")] == [GateStatus.FAILED] * 3
    assert "columns" in result(card, "schema")
    assert "public.t: 5000 rows" in result(card, "row-counts")


def test_a_row_after_the_moment_fails(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery that goes too far is found by row B: here the moment is moved behind it."""
    from datetime import timedelta

    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    take = canary.take

    def too_late(access: Any, target: Any, verification_id: str, clock: Any) -> canary.SourceMoment:
        from dataclasses import replace

        moment = take(access, target, verification_id, clock)
        at = cluster.sql("select at from ops_canary.canary where mark = 'B' order by id desc limit 1") + timedelta(
            seconds=0.5
        )
        eventually(lambda: cluster.sql("select clock_timestamp()") > at)
        later = take(access, target, f"{verification_id}-later", clock)  # a commit after the moved moment
        assert later.canary is not None
        return replace(moment, at=at, recovery=RecoveryTarget("time", at))

    monkeypatch.setattr(canary, "take", too_late)
    card = verify(platform.access, platform.target)
    assert statuses(card)["canary"] is GateStatus.FAILED
    assert card.verdict is Verdict.FAIL
    assert "THERE" in result(card, "canary")


# What cannot be asked is no pass


def test_without_the_right_to_write_canaries_it_could_not_verify(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = filled(new_cluster(18))
    cluster.sql("drop schema ops_canary")
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    assert "ops doctor app-db names the statement that gives us the right" in card.reason
    platform.body["targets"][0]["backup"]["verification"] = {"canary": False}
    platform.reload()
    weaker = verify(platform.access, platform.target)
    assert (weaker.verdict, weaker.strength) == (Verdict.PASS, "observed"), weaker.reason


def test_a_major_that_is_not_here_could_not_be_verified(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ops_platform.clients import postgres_binaries

    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    run_backup(platform.access, platform.target)
    installs = postgres_binaries.all_installs
    monkeypatch.setattr(
        postgres_binaries, "all_installs", lambda extra=(): [i for i in installs(extra) if i.major != 18]
    )
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    assert "postgresql-18" in card.reason


def test_no_backup_is_nothing_verified(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    platform = new_platform({"app-db": [new_cluster(18)]})
    card = verify(platform.access, platform.target)
    assert (card.verdict, card.backup_id) == (Verdict.COULD_NOT_VERIFY, None)


def test_the_database_away_is_when_the_backup_is_proven_all_the_more(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    verify(platform.access, platform.target)
    cluster.sql("create table later (i int)")
    verify(platform.access, platform.target)
    cluster.server.stop("immediate")
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason
    assert card.strength == "observed"
    assert statuses(card)["schema"] is GateStatus.NOT_APPLICABLE
    cluster.server.start()


def test_a_moment_that_was_asked_for_and_does_not_exist_is_a_usage_error(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    run_backup(platform.access, platform.target)
    with pytest.raises(UsageError, match="no backup"):
        verify(platform.access, platform.target, backup_id="20200101T000000Z-F-00000000")


# Killed

_SLOW = """
import sys, time
from ops_platform.inventory import load
from ops_platform.clients.access import Access
from ops_platform.recovery import gates
from ops_platform.recovery.verify import verify
looked = gates.read_tables
def slow(*args):
    print("reading", flush=True)
    time.sleep(600)
gates.read_tables = slow
with Access(load()) as access:
    verify(access, access.inventory.targets[0])
"""


def test_a_killed_verification_leaves_no_server_and_the_next_one_tidies_up(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    run_backup(platform.access, platform.target)
    child = subprocess.Popen[bytes]([sys.executable, "-c", _SLOW], env=platform.env, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"reading\n"
    (home,) = platform.home.glob("ops-verify-*")
    assert _servers_of(home)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 30
    while _servers_of(home):
        assert time.monotonic() < deadline, "the sandbox's server outlived its verification"
        time.sleep(0.05)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason
    assert not list(platform.home.glob("ops-verify-*"))


def _servers_of(home: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if str(home) in words and "postgres" in words:
                found.append(words)
    return found


def test_the_verdict_is_the_worst_of_the_gates() -> None:
    from ops_platform.recovery.model import Gate

    def gate(status: GateStatus) -> Gate:
        return Gate(id=status.value, title="t", status=status, query="", result="r", seconds=0)

    passed, failed = gate(GateStatus.PASSED), gate(GateStatus.FAILED)
    unchecked, skipped = gate(GateStatus.COULD_NOT_CHECK), gate(GateStatus.NOT_APPLICABLE)
    assert verdict_of([passed, skipped])[0] is Verdict.PASS
    assert verdict_of([passed, unchecked])[0] is Verdict.COULD_NOT_VERIFY
    assert verdict_of([passed, unchecked, failed])[0] is Verdict.FAIL
    assert verdict_of([skipped])[0] is Verdict.COULD_NOT_VERIFY
    assert verdict_of([])[0] is Verdict.COULD_NOT_VERIFY
