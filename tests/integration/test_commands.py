"""Every command against real servers, as its user calls it: what it answers with --json, and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import TypeAdapter

from ops_platform.backup.archive import ArchiveStatus, read_archive
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.model import Manifest
from ops_platform.backup.running import backup_lock, backup_running
from ops_platform.cli.outputs import BackupDetail, BackupList
from ops_platform.clients.access import Access
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.doctor import Examination
from ops_platform.errors import ConflictError
from ops_platform.recovery.model import Scorecard, Verdict
from tests.rig import Cluster, Platform, copy_of, eventually

OPS = str(Path(sys.executable).with_name("ops"))
MakeCluster = Callable[..., Cluster]
MakePlatform = Callable[..., Platform]


def ops(platform: Platform, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([OPS, *words], env=platform.env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def answer(kind: Any, platform: Platform, *words: str, code: int = 0) -> Any:
    """What it prints as JSON, read by the type that is documented for it."""
    return TypeAdapter(kind).validate_json(ops(platform, *words, "--json", code=code).stdout)


# init


def init(platform: Platform, cluster: Cluster, out: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    host = ["--host", "127.0.0.1", "--port", str(cluster.port), "--tls", "disable"]
    return ops(platform, "init", *host, "--password", f"file://{platform.home}/password", "--out", str(out), code=code)


def test_init_writes_an_inventory_from_what_a_live_server_says(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = new_cluster(18)
    platform = new_platform({"app-db": [cluster]})
    out = platform.home / "made.yaml"
    done = init(platform, cluster, out)
    assert "PostgreSQL 18" in done.stdout
    assert "note" not in done.stdout
    checked = json.loads(ops(platform, "-i", str(out), "inventory", "check", "--json").stdout)
    assert checked["targets"] == 1
    text = out.read_text()
    assert str(cluster.port) in text
    assert "correct horse" not in text
    again = init(platform, cluster, out, code=2)
    assert "this file exists" in again.stderr
    assert out.read_text() == text


def test_init_counts_what_our_role_may_see_and_says_what_it_may_not(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = new_cluster(18)
    cluster.sql("create database closed")
    cluster.sql("revoke connect on database closed from public; revoke pg_monitor from ops_backup")
    platform = new_platform({"app-db": [cluster]})
    done = init(platform, cluster, platform.home / "made.yaml")
    assert "1 databases are not counted" in done.stdout
    cluster.sql("revoke execute on function pg_database_size(oid) from public")
    refused = init(platform, cluster, platform.home / "other.yaml", code=1)
    assert "our role may not ask this: permission denied" in refused.stderr
    assert not (platform.home / "other.yaml").exists()


# Backups from taking to expiring


def a_segment_lost(platform: Platform) -> str:
    """A whole one in the middle of the archive, deleted in the store."""
    archive = read_archive(platform.repository)
    assert archive is not None
    victim = [item for item in archive.listing if not item.partial and not item.history][-2]
    platform.repository.store.delete(victim.info.key)
    return victim.name


def test_a_backup_is_taken_shown_proven_reported_and_kept(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    cluster = new_cluster(18)
    cluster.sql("create table t as select generate_series(1, 1000) i")
    platform = new_platform({"app-db": [cluster]})
    empty = answer(list[BackupList], platform, "backup", "list")
    assert [item.backups for item in empty] == [[]]
    assert "restorable: nothing" in ops(platform, "backup", "list").stdout

    (taken,) = answer(list[Manifest], platform, "backup", "run", "app-db")
    shown = answer(BackupDetail, platform, "backup", "show", "app-db", taken.backup_id)
    assert shown.manifest == taken
    assert (shown.chain, shown.proofs) == ([taken.backup_id], [])
    unknown = ops(platform, "backup", "show", "app-db", "20200101T000000Z-F-00000000", code=2)
    assert "there is no backup 20200101T000000Z-F-00000000 of app-db" in unknown.stderr

    (card,) = answer(list[Scorecard], platform, "backup", "verify", "app-db")
    assert (card.verdict, card.backup_id, card.turn) == (Verdict.PASS, taken.backup_id, 0)
    (listed,) = answer(list[BackupList], platform, "backup", "list", "app-db")
    assert listed.backups[0].proof.verdict == "PASS"
    assert "PASS" in ops(platform, "backup", "list").stdout
    words = ops(platform, "backup", "show", "app-db", taken.backup_id).stdout
    assert "PASS" in words

    (status,) = answer(list[ArchiveStatus], platform, "wal", "status")
    assert (status.gaps, status.slot) == ([], None)
    assert "the receiver has not run yet" in ops(platform, "wal", "status").stdout

    pages = json.loads(ops(platform, "report", "--json").stdout)
    assert all("app-db" in Path(page).read_text() for page in [*pages["pages"], pages["index"]])
    (result,) = json.loads(ops(platform, "backup", "expire", "app-db", "--json").stdout)
    assert result["plan"]["action"] == "backup.expire"
    assert [info.backup_id for info in platform.repository.infos()] == [taken.backup_id]


def test_what_fails_exits_1_and_what_nobody_could_tell_exits_3(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = new_cluster(18)
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    platform.body["targets"][0]["sandbox"]["directory"] = str(platform.home / "gone")
    platform.reload()
    (card,) = answer(list[Scorecard], platform, "backup", "verify", "app-db", code=3)
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    platform.body["targets"][0]["sandbox"]["directory"] = str(platform.home)
    platform.reload()
    for _ in range(4):
        cluster.sql("create table if not exists t (i int); insert into t select generate_series(1, 1000)")
        cluster.sql("select pg_switch_wal()")
    (card,) = answer(list[Scorecard], platform, "backup", "verify", "app-db", "--no-report")
    assert card.verdict is Verdict.PASS
    lost = a_segment_lost(platform)
    (status,) = answer(list[ArchiveStatus], platform, "wal", "status", code=1)
    assert [(gap.first, gap.recovery_again_from) for gap in status.gaps] == [(lost, None)]
    # A full backup after it mends it: the gap is still named, and is no failure any more.
    (taken,) = answer(list[Manifest], platform, "backup", "run", "app-db", "--full")
    (status,) = answer(list[ArchiveStatus], platform, "wal", "status")
    assert lost in [gap.first for gap in status.gaps], "it is named all the same"
    assert {gap.recovery_again_from for gap in status.gaps} == {taken.backup_id}
    platform.repository.store.delete(taken.archives[0].blocks[0].key)
    (card,) = answer(list[Scorecard], platform, "backup", "verify", "app-db", "--no-report", code=1)
    assert card.verdict is Verdict.FAIL
    cluster.stop()
    (status,) = answer(list[ArchiveStatus], platform, "wal", "status", code=3)
    assert status.slot_error is not None


def test_one_broken_target_does_not_keep_the_others_from_their_turn(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    """The first of three has neither its server nor its store."""
    cluster = new_cluster(18)
    platform = new_platform({"broken": [cluster], "app-db": [cluster]})
    platform.body["stores"]["gone"] = platform.body["stores"]["s"] | {"secret_key": "file:///nowhere"}
    broken = platform.body["targets"][0]
    broken["repository"]["store"] = "gone"
    broken["connection"]["hosts"][0]["port"] = free_port()
    platform.reload()
    (taken,) = answer(list[Manifest], platform, "backup", "run", "--all", code=1)
    assert taken.target_id == "app-db"
    for kind, words in (
        (list[BackupList], ["backup", "list"]),
        (list[dict[str, Any]], ["backup", "expire", "--all"]),
        (list[ArchiveStatus], ["wal", "status"]),
        (dict[str, Any], ["report"]),
    ):
        done = ops(platform, *words, "--json", code=1)
        found = TypeAdapter(kind).validate_json(done.stdout)
        assert len(found["pages"] if isinstance(found, dict) else found) == 1, words
        assert "error: broken: " in done.stderr, words
        assert "/nowhere" in done.stderr, words
    cards = answer(list[Scorecard], platform, "backup", "verify", "--all", code=3)
    assert [card.verdict for card in cards] == [Verdict.COULD_NOT_VERIFY, Verdict.PASS]
    assert "/nowhere" in cards[0].reason
    # Alone it is an error like any other.
    alone = ops(platform, "wal", "status", "broken", code=1)
    assert alone.stderr.startswith("error: ")
    assert alone.stdout == ""


# doctor


def examined(platform: Platform, code: int) -> dict[str, Any]:
    """What it says of the targets; of what they share there is `test_doctor_platform`."""
    (found,) = answer(list[Examination], platform, "doctor", platform.target.id, code=code)
    return {item.what: item for item in found.findings}


def test_the_doctor_finds_nothing_bad_where_all_is_well(new_platform: MakePlatform, shared_cluster: Cluster) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    found = examined(platform, 0)
    assert {item.state for item in found.values()} <= {"good", "warn"}
    assert [item.what for item in found.values() if item.state == "good" and item.remedy] == []
    assert all(item.remedy for item in found.values() if item.state == "warn")
    assert {
        "version",
        "wal_level",
        "max_wal_senders",
        "max_replication_slots",
        "slot ops_wal",
        "store",
        "key service",
    } <= set(found)
    assert "ok   wal_level: replica" in ops(platform, "doctor").stdout


def test_the_doctor_asks_a_target_of_another_tool_for_what_its_proof_needs(
    new_platform: MakePlatform, shared_cluster: Cluster
) -> None:
    """Neither REPLICATION nor senders nor a slot; the right to finish a segment, without which nothing can be verified."""
    shared_cluster.sql("create role prover login password 'x'; grant pg_monitor, pg_read_all_data to prover")
    try:
        kept = {"engine": "pgbackrest", "stanza": "billing", "config": "/etc/pgbackrest.conf"}
        canary = {"verification": {"canary": False}}
        platform = new_platform({"app-db": [shared_cluster]}, extra={"repository": kept, "backup": canary})
        (platform.home / "password").write_text("x")
        platform.body["targets"][0]["connection"]["user"] = "prover"
        platform.reload()
        found = examined(platform, 1)
        assert [what for what, item in found.items() if item.state == "bad"] == ["pg_switch_wal"]
        assert "GRANT EXECUTE ON FUNCTION pg_switch_wal() TO prover" in found["pg_switch_wal"].remedy
        assert not {"REPLICATION", "replication login", "max_wal_senders", "slot ops_wal"} & set(found)
        shared_cluster.sql("grant execute on function pg_switch_wal() to prover")
        assert examined(platform, 0)["pg_switch_wal"].state == "good"
    finally:
        shared_cluster.sql("drop owned by prover; drop role prover")


@pytest.mark.parametrize(
    ("settings", "what", "says"),
    [
        ({"wal_level": "minimal", "max_wal_senders": "0", "summarize_wal": "off"}, "wal_level", "minimal"),
        ({"max_wal_senders": "1"}, "max_wal_senders", "0 of 1 in use"),
        ({"max_replication_slots": "1"}, "max_replication_slots", "1 of 1 in use"),
        ({"full_page_writes": "off"}, "full_page_writes", "off"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_the_doctor_finds_a_setting_that_keeps_a_backup_from_being_taken(
    new_cluster: MakeCluster, new_platform: MakePlatform, settings: dict[str, str], what: str, says: str
) -> None:
    cluster = new_cluster(18, settings)
    if what == "max_replication_slots":
        cluster.sql("select pg_create_physical_replication_slot('of_another')")
    platform = new_platform({"app-db": [cluster]})
    found = examined(platform, 1)[what]
    assert (found.state, found.found) == ("bad", says)
    assert found.remedy
    assert f"BAD  {what}: {says}" in ops(platform, "doctor", code=1).stdout


def test_the_doctor_says_what_our_role_may_not_see_as_unknown(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = new_cluster(18)
    cluster.sql("revoke select on pg_replication_slots from public; revoke pg_read_all_data from ops_backup")
    found = examined(new_platform({"app-db": [cluster]}), 3)
    assert found["servers"].state == "unknown"
    assert "pg_replication_slots" in found["servers"].found


@pytest.mark.parametrize(
    ("change", "what", "says"),
    [
        ({"stores": {"s": {"bucket": "never-heard-of"}}}, "store", "never-heard-of"),
        ({"stores": {"s": {"secret_key": "file:///nowhere"}}}, "store", "cannot be read"),
        ({"stores": {"s": {"object_lock": {"mode": "GOVERNANCE", "retain": "1d"}}}}, "Object Lock", "off"),
        ({"key_services": {"k": {"key": "never-made"}}}, "key service", "never-made"),
    ],
    ids=["bucket", "secret", "lock", "key"],
)
def test_the_doctor_finds_what_is_wrong_with_store_and_keys(
    new_platform: MakePlatform, shared_cluster: Cluster, change: dict[str, Any], what: str, says: str
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    for section, entries in change.items():
        for name, keys in entries.items():
            platform.body[section][name] |= keys
    platform.reload()
    found = examined(platform, 1)[what]
    assert found.state == "bad"
    assert says in found.found
    assert found.remedy


def test_the_doctor_names_the_versions_that_are_supported(
    new_platform: MakePlatform, shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from ops_platform.doctor import examine

    members = Access.members
    monkeypatch.setattr(
        Access, "members", lambda self, target: [replace(m, server_version=130022) for m in members(self, target)]
    )
    platform = new_platform({"app-db": [shared_cluster]})
    found = {item.what: item for item in examine(platform.access, platform.target).findings}
    assert (found["version"].state, found["version"].found) == ("bad", "major 13")
    assert "14 to 18" in str(found["version"].remedy)


def test_the_doctor_names_two_primaries_and_asks_the_one_that_is_acted_on(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    """The old primary was started again beside the one that was promoted, and stands first in the inventory."""
    old = new_cluster(18, {"max_slot_wal_keep_size": "1GB"})
    new = copy_of(old.server)
    try:
        new.start()
        with new.connect() as connection:
            connection.execute("select pg_promote()")
            connection.execute("alter system set max_slot_wal_keep_size = '2GB'")
            connection.execute("select pg_reload_conf()")
        hosts = [{"host": "127.0.0.1", "port": server.port} for server in (old, new)]
        platform = new_platform({"app-db": [old]}, extra={"connection": {"hosts": hosts}})
        found = examined(platform, 1)
        assert found["primary"].state == "bad"
        assert found["primary"].found == (
            "2 servers say that they are the primary: "
            f"127.0.0.1:{new.port} on timeline 2, which is acted on; 127.0.0.1:{old.port} on timeline 1"
        )
        assert f"stop 127.0.0.1:{old.port} on timeline 1, before" in found["primary"].remedy
        eventually(lambda: examined(platform, 1)["max_slot_wal_keep_size"].found == "2GB")
        with backup_lock(platform.access, platform.target):
            assert str(backup_running(platform.access, platform.target)).endswith(f"127.0.0.1:{new.port}")
    finally:
        new.stop("immediate")


def test_a_lock_that_was_given_back_is_free_before_its_session_has_ended(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server hears of the end of a session a moment later: the next backup may begin before that."""
    platform = new_platform({"app-db": [new_cluster(18)]})
    left: list[psycopg.Connection[Any]] = []

    def stay(session: psycopg.Connection[Any]) -> None:
        left.append(session)

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Connection, "close", stay)
        with backup_lock(platform.access, platform.target):
            pass
    assert left
    with backup_lock(platform.access, platform.target):
        pass
    for session in left:
        session.close()


def test_the_doctor_asks_no_old_primary_beside_a_standby_of_a_newer_timeline(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    old = new_cluster(18)
    servers = [copy_of(old.server)]
    try:
        servers[0].start()
        servers.append(copy_of(servers[0]))
        servers[1].start()
        new, follower = servers
        with new.connect() as connection:
            connection.execute("select pg_promote()")
        hosts = [{"host": "127.0.0.1", "port": port} for port in (old.port, free_port(), follower.port)]
        platform = new_platform({"app-db": [old]}, extra={"connection": {"hosts": hosts}})
        eventually(lambda: platform.access.members(platform.target)[2].timeline == 2, why=follower.log_tail)
        found = examined(platform, 1)
        assert found["primary"].state == "bad"
        assert f"127.0.0.1:{old.port}: primary, timeline 1; 127.0.0.1:{follower.port}: standby, timeline 2" in (
            found["primary"].found
        )
        assert "wal_level" not in found
        with (
            pytest.raises(ConflictError, match="another was promoted since"),
            backup_lock(platform.access, platform.target),
        ):
            pass
    finally:
        for server in servers:
            server.stop("immediate")


def test_the_doctor_looks_at_the_slot(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    cluster = new_cluster(18)
    platform = new_platform({"app-db": [cluster]})
    cluster.sql("select pg_create_physical_replication_slot('ops_wal', true)")
    found = examined(platform, 1)["slot ops_wal"]
    assert "nobody reads it" in found.found
