"""`ops restore` against real servers: exactly the rows of the moment, or a refusal that says why; a kill loses nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ops_platform.backup.archive import read_archive
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import NativeEngine, open_engine
from ops_platform.backup.model import BackupInfo, Lsn, RecoveryTarget
from ops_platform.backup.receiver import receive_range
from ops_platform.backup.wal import parse_history
from ops_platform.clients.postgres_binaries import PostgresServer, find_postgres, find_tool, free_port, run_as, run_tool
from ops_platform.errors import ConflictError, CouldNotVerifyError, OpsError, UsageError
from ops_platform.recovery import restore as room
from ops_platform.recovery.restore import Restored, dump_tables, plan, restore, work_directory
from ops_platform.recovery.room import lacking, reserved
from tests.integration.wal_rig import eventually
from tests.rig import SETTINGS, Cluster, Ground, Platform, scratch

MakeCluster = Callable[..., Cluster]
MakePlatform = Callable[..., Platform]


@dataclass
class Mark:
    """One committed row: its transaction, the position after its commit, and a moment before the next one's."""

    xid: str
    lsn: str
    at: datetime


class Story:
    """A cluster with a backup, and rows that were committed one by one after it. All of its WAL is archived."""

    def __init__(self, cluster: Cluster, platform: Platform) -> None:
        self.cluster, self.platform = cluster, platform
        self.marks: dict[str, Mark] = {}

    def mark(self, name: str) -> Mark:
        with self.cluster.server.connect() as connection, connection.transaction():
            xid = connection.execute("insert into mark values (%s) returning pg_current_xact_id()::text", [name])
            number = xid.fetchone()[0]
        self.marks[name] = Mark(
            number,
            self.cluster.sql("select pg_current_wal_insert_lsn()::text"),
            self.cluster.sql("select clock_timestamp()"),
        )
        return self.marks[name]

    def archive(self, cluster: Cluster | None = None) -> None:
        """Everything that is written so far into the store."""
        server = cluster or self.cluster
        server.sql("select pg_switch_wal()")
        found = read_archive(self.platform.repository)
        assert found is not None
        timeline, lsn = server.sql("select timeline_id from pg_control_checkpoint()"), position(server)
        ends = [item.end for item in found.ranges if item.timeline == timeline]
        begin = max(ends) if ends else fork_of(server, timeline)
        receive_range(self.platform.access, self.platform.target, begin, Lsn.parse(lsn), timeline)

    def restore(self, recovery: RecoveryTarget, into: Path, **more: Any) -> Restored:
        return restore(self.platform.access, self.platform.target, recovery, into, **more)


def fork_of(cluster: Cluster, timeline: int) -> Lsn:
    history = cluster.sql("select pg_read_file(%s)", "postgres", f"pg_wal/{timeline:08X}.history")
    return parse_history(timeline, history.encode())[-1].begin


def position(cluster: Cluster) -> str:
    return cluster.sql("select pg_current_wal_flush_lsn()::text")


@pytest.fixture(scope="module")
def story(ground: Ground) -> Iterator[Story]:
    home = scratch("ops-pg-test-")
    cluster = Cluster(18, home)
    platform = Platform(ground, {"app-db": [cluster]})
    try:
        cluster.sql("""
            create table mark (name text);
            create schema shop;
            create table shop."Größe ""L"", rot" (i int primary key, t text);
            insert into shop."Größe ""L"", rot" select i, md5(i::text) from generate_series(1, 100) i;
            create table shop.payment (id int, day date) partition by range (day);
            create table shop.payment_1 partition of shop.payment for values from ('2026-01-01') to ('2026-02-01');
            create table shop."Payment 2" partition of shop.payment for values from ('2026-02-01') to ('2026-03-01');
            insert into shop.payment values (1, '2026-01-10'), (2, '2026-02-10'), (3, '2026-02-11');
        """)
        cluster.server.configure({"work_mem": "7MB"}, file="postgresql.conf")
        made = Story(cluster, platform)
        made.mark("before the backup")
        run_backup(platform.access, platform.target)
        made.mark("one")
        made.mark("two")
        cluster.sql("select pg_create_restore_point('Vor der \"Migration\"')")
        made.mark("three")
        cluster.sql('delete from shop.payment; drop table shop."Größe ""L"", rot"')
        made.mark("four")
        made.mark("five")  # recovery knows that it has reached a moment by a commit after it
        made.archive()
        yield made
    finally:
        cluster.stop()
        platform.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for restores, on a real file system. Whatever a restore makes in the system's folder for temporary files is gone when it ends."""
    home, temporary = scratch("ops-restore-", disk=True), scratch("ops-tmp-")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield home
    shutil.rmtree(home)
    left = [path for path in temporary.iterdir() if not path.name.startswith("ops-room-")]
    left += [note for note in temporary.glob("ops-room-*/*") if note.name != "lock"]
    shutil.rmtree(temporary)
    assert not left, "left in the folder for temporary files"


def rows(done: Restored, query: str = "select name from mark", dbname: str = "postgres") -> list[Any]:
    """Of the restored server, started by itself: with its own configuration and nothing of ours."""
    directory = Path(done.directory)
    install = find_postgres(18)
    assert install is not None
    server = PostgresServer(install, directory)
    try:
        server.start()
        with server.connect(dbname) as connection:
            assert not connection.execute("select pg_is_in_recovery()").fetchone()[0]
            return [row[0] for row in connection.execute(query).fetchall()]
    finally:
        server.stop()


BASE = ["before the backup"]


@pytest.mark.parametrize(
    ("kind", "mark", "inclusive", "expected"),
    [
        ("time", "one", True, ["one"]),
        ("time", "two", False, ["one", "two"]),
        ("xid", "two", True, ["one", "two"]),
        ("xid", "two", False, ["one"]),
        ("lsn", "one", True, ["one"]),
        ("latest", None, True, ["one", "two", "three", "four", "five"]),
        ("name", 'Vor der "Migration"', True, ["one", "two"]),
    ],
)
def test_exactly_the_rows_of_the_moment(
    story: Story, place: Path, kind: Any, mark: str | None, inclusive: bool, expected: list[str]
) -> None:
    value: Any = mark
    if kind in ("time", "xid", "lsn"):
        known = story.marks[mark or ""]
        value = {"time": known.at, "xid": known.xid, "lsn": known.lsn}[kind]
    done = story.restore(RecoveryTarget(kind, value, inclusive), place / "data")
    assert rows(done) == BASE + expected
    assert done.timeline == 2
    (backup,) = open_engine(story.platform.access, story.platform.target).list()
    assert done.wal_bytes == Lsn.parse(done.reached_lsn) - backup.start
    assert not work_directory(place / "data").exists()


def test_a_position_is_a_commit_that_exclusive_leaves_out(story: Story, place: Path) -> None:
    """The record that begins at the position: inclusive replays it, exclusive stops before it."""
    before = commit_of(story, "two")
    inside = story.restore(RecoveryTarget("lsn", before, inclusive=True), place / "in")
    outside = story.restore(RecoveryTarget("lsn", before, inclusive=False), place / "out")
    assert rows(inside) == [*BASE, "one", "two"]
    assert rows(outside) == [*BASE, "one"]


@pytest.mark.parametrize("kind", ["time", "lsn"])
def test_what_no_commit_follows_is_reached_at_the_end_of_the_stored_wal(
    story: Story, place: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """PostgreSQL itself stops only once it reads what comes after: of an idle database that may never come."""
    last = story.marks["five"]
    behind = str(Lsn(Lsn.parse(last.lsn) + 0x100))  # where the switch to the next segment has left nothing but zeros
    wanted = RecoveryTarget(kind, {"time": last.at, "lsn": behind}[kind])
    done = story.restore(wanted, place / "data")
    assert rows(done) == [*BASE, "one", "two", "three", "four", "five"]
    assert "the last record of the stored WAL" in (done.stopped_because or "")
    assert done.timeline == 2

    # WAL that ends before its last segment is no such end, whatever PostgreSQL makes of it.
    known = NativeEngine.last_segment
    later = 16 << 20

    def one_more(engine: NativeEngine, backup: BackupInfo, target: RecoveryTarget) -> Lsn:
        found = known(engine, backup, target)
        assert found is not None
        return Lsn(found + later)

    monkeypatch.setattr(NativeEngine, "last_segment", one_more)
    with pytest.raises(OpsError, match="recovery ended before"):
        story.restore(wanted, place / "more")


def commit_of(story: Story, name: str) -> str:
    """The position at which the commit record of a mark begins."""
    tool = find_tool("pg_waldump", 18, ())
    assert tool is not None
    first = story.cluster.sql("select pg_walfile_name(%s)", "postgres", story.marks["one"].lsn)
    path = story.cluster.server.directory / "pg_wal" / first
    done = run_tool([tool, "-r", "Transaction", "-x", story.marks[name].xid, path])
    line = next(line for line in done.stdout.splitlines() if "desc: COMMIT" in line)
    return line.split("lsn: ", 1)[1].split(",", 1)[0].strip()


def test_the_directory_has_its_own_configuration_back(story: Story, place: Path) -> None:
    done = story.restore(RecoveryTarget("time", story.marks["two"].at), place / "data")
    data, source = Path(done.directory), story.cluster.server.directory
    assert (data / "postgresql.conf").read_text() == (source / "postgresql.conf").read_text()
    assert (data / "postgresql.auto.conf").read_text() == (source / "postgresql.auto.conf").read_text()
    for name in ("recovery.signal", "standby.signal", "postmaster.pid", "postmaster.opts"):
        assert not (data / name).exists(), name
    settings = "select setting from pg_settings where name in ('work_mem', 'max_replication_slots') order by name"
    assert rows(done, settings) == [SETTINGS["max_replication_slots"], "7168"]
    owner = data.stat().st_uid
    assert {path.lstat().st_uid for path in data.rglob("*")} == {owner} == {run_as().uid}


# Refused


def test_a_time_outside_of_the_window_is_refused_with_the_window(story: Story, place: Path) -> None:
    (info,) = story.platform.repository.infos()
    before = RecoveryTarget("time", info.ended_at - timedelta(days=1))
    future = RecoveryTarget("time", datetime.now(UTC) + timedelta(hours=1))
    for wanted, said in ((before, "outside"), (future, "in the future")):
        with pytest.raises(UsageError, match=said) as refused:
            story.restore(wanted, place / "data")
        assert f"{info.ended_at:%Y-%m-%d %H:%M:%S}" in str(refused.value.remedy)
        assert not (place / "data").exists()


def test_a_directory_with_something_in_it_is_refused(story: Story, place: Path) -> None:
    (place / "data").mkdir()
    (place / "data" / "letter").write_text("dear")
    wanted = RecoveryTarget("time", story.marks["one"].at)
    with pytest.raises(UsageError, match="not empty"):
        story.restore(wanted, place / "data")
    assert (place / "data" / "letter").read_text() == "dear"
    shown = plan(story.platform.access, story.platform.target, wanted, place / "data")
    assert any("not empty" in problem for problem in shown.problems)


@pytest.mark.parametrize(("mode", "said"), [(0o000, "may not look"), (0o555, "may not write")])
def test_a_place_that_is_closed_to_us_is_named(mode: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = scratch("ops-closed-")
    closed.chmod(mode)
    into, access = closed / "in" / "data", None  # refused before anybody is asked
    monkeypatch.setattr(room, "open_engine", lambda *_args, **_options: None)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        for call in (restore, plan):
            with pytest.raises(UsageError, match=said) as refused:
                call(access, None, RecoveryTarget("latest"), into)
            assert str(closed) in str(refused.value)
            assert refused.value.remedy
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o700)
        shutil.rmtree(closed)


def test_too_little_room_is_refused_before_anything_is_fetched(
    story: Story, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: small)
    wanted = RecoveryTarget("time", story.marks["one"].at)
    with pytest.raises(OpsError, match="are needed and"):
        story.restore(wanted, place / "data")
    assert not (place / "data").exists()
    assert plan(story.platform.access, story.platform.target, wanted, place / "data").problems


def test_restores_side_by_side_do_not_take_each_others_room(
    story: Story, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access, target = story.platform.access, story.platform.target
    wanted = RecoveryTarget("time", story.marks["one"].at)
    needed = plan(access, target, wanted, place / "data").needed_bytes * 1.05
    enough = shutil.disk_usage("/")._replace(free=int(needed) + 4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: enough)
    with reserved([place / "another"], 1 << 20):
        with pytest.raises(OpsError, match="for restores that are under way"):
            story.restore(wanted, place / "data")
        assert not (place / "data").exists()
    seen: list[str | None] = []

    def look(step: str, _done: int, _total: int | None) -> None:
        if not seen:
            seen.append(lacking(place, needed))

    restore(access, target, wanted, place / "data", progress=look)
    assert "for restores that are under way" in str(seen[0]), "while it fetches, it counts for others"
    assert lacking(place, needed) is None


def test_without_a_server_of_its_major_nothing_is_made(
    story: Story, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_asked: Any) -> Any:
        raise CouldNotVerifyError("a server is needed here")

    monkeypatch.setattr(room, "need_postgres", none)
    with pytest.raises(CouldNotVerifyError, match="is needed here"):
        story.restore(RecoveryTarget("time", story.marks["one"].at), place / "data")
    assert not (place / "data").exists()
    assert not work_directory(place / "data").exists()


def test_a_target_that_recovery_does_not_reach_is_no_success(story: Story, place: Path) -> None:
    with pytest.raises(OpsError, match="recovery ended before"):
        story.restore(RecoveryTarget("name", "never made"), place / "data")
    assert not list((place / "data").glob("postmaster.pid"))


# Killed

_CHILD = """
import sys, threading
from datetime import datetime
from pathlib import Path
from ops_platform.backup.model import RecoveryTarget
from ops_platform.clients.access import Access
from ops_platform.inventory import load
from ops_platform.recovery import restore as room
from ops_platform.recovery.sandbox import Sandbox
stop, at, into = sys.argv[1:]
def wait():
    print("now", flush=True)
    threading.Event().wait()
def progress(step, done, total):
    if stop == "fetch" and done > 4 << 20:
        wait()
replayed = room.replay
def stopped(*args, **more):
    found = replayed(*args, **more)
    if stop == "replay":
        wait()
    return found
room.replay = stopped
promote = Sandbox.promote
def promoted(sandbox):
    timeline = promote(sandbox)
    if stop == "promote":
        wait()
    return timeline
Sandbox.promote = promoted
sync = room.sync_file_system
room.sync_file_system = lambda place: wait() if stop == "sync" else sync(place)
with Access(load()) as access:
    recovery = RecoveryTarget("time", datetime.fromisoformat(at)) if at else RecoveryTarget("latest")
    room.restore(access, access.inventory.targets[0], recovery, Path(into), progress=progress)
"""


def begun(story: Story, moment: str, at: datetime | None, into: Path) -> subprocess.Popen[bytes]:
    """A restore that says `now` at that moment and waits. A killed one's note on the room it needs goes with the next that looks."""
    command = [sys.executable, "-c", _CHILD, moment, at.isoformat() if at else "", str(into)]
    (into.parent / "tmp").mkdir(exist_ok=True)
    env = {**story.platform.env, "TMPDIR": str(into.parent / "tmp")}
    return subprocess.Popen[bytes](command, env=env, stdout=subprocess.PIPE)


def killed(story: Story, moment: str, at: datetime | None, into: Path) -> None:
    child = begun(story, moment, at, into)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"now\n"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    left = [path.name for path in (into.parent / "tmp").iterdir()]
    assert all(name.startswith("ops-room-") for name in left), "its server's socket is not beside what it restores"


@pytest.mark.parametrize("moment", ["fetch", "replay", "promote", "sync"])
def test_killed_it_goes_on_when_it_is_called_again(story: Story, place: Path, moment: str) -> None:
    at = story.marks["two"].at
    killed(story, moment, at, place / "data")
    assert work_directory(place / "data").exists()
    done = story.restore(RecoveryTarget("time", at), place / "data")
    assert rows(done) == [*BASE, "one", "two"]


def test_killed_after_it_had_left_recovery_by_itself(story: Story, place: Path) -> None:
    killed(story, "replay", None, place / "data")
    done = story.restore(RecoveryTarget("latest"), place / "data")
    assert rows(done) == [*BASE, "one", "two", "three", "four", "five"]


def test_replay_begins_anew_after_a_crash_of_the_machine(
    story: Story, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replay does not sync: what a crash of the machine left may be anything."""
    at = story.marks["one"].at
    killed(story, "replay", at, place / "data")
    torn = next((place / "data" / "base").rglob("1259"))
    eventually(lambda: not (place / "data" / "postmaster.pid").exists(), why="the killed restore's server stays")
    torn.write_bytes(b"\0" * torn.stat().st_size)
    monkeypatch.setattr(room, "_boot", lambda: "another boot")
    assert rows(story.restore(RecoveryTarget("time", at), place / "data")) == [*BASE, "one"]


def test_an_unfinished_restore_of_something_else_is_refused(story: Story, place: Path) -> None:
    wanted = RecoveryTarget("time", story.marks["two"].at)
    killed(story, "fetch", story.marks["two"].at, place / "data")
    for other in (
        RecoveryTarget("time", story.marks["one"].at),
        replace(wanted, inclusive=False),
        replace(wanted, timeline=1),
    ):
        with pytest.raises(UsageError, match="unfinished restore of app-db to time"):
            story.restore(other, place / "data")
    target = story.platform.target.model_copy(update={"id": "other"})
    with pytest.raises(UsageError, match="unfinished restore of app-db"):
        room._begin(room.open_engine(story.platform.access, story.platform.target), target, wanted, place / "data")


def test_two_programs_do_not_restore_into_one_directory(story: Story, place: Path) -> None:
    at = story.marks["two"].at
    child = begun(story, "replay", at, place / "data")
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"now\n"
        with pytest.raises(ConflictError, match="another program"):
            story.restore(RecoveryTarget("time", at), place / "data")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert rows(story.restore(RecoveryTarget("time", at), place / "data")) == [*BASE, "one", "two"]


def test_interrupted_it_leaves_no_server(story: Story, place: Path) -> None:
    words = [str(Path(sys.executable).with_name("ops")), "restore", "app-db", "--to", story.marks["two"].at.isoformat()]
    child = subprocess.Popen[str](
        [*words, "--into", str(place / "data")],
        env={**story.platform.env, "TMPDIR": tempfile.gettempdir()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    eventually((work_directory(place / "data") / "restore.json").exists, why="it did not begin")
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not (place / "data" / "postmaster.pid").exists()
    done = story.restore(RecoveryTarget("time", story.marks["two"].at), place / "data")
    assert rows(done) == [*BASE, "one", "two"]


# Tablespaces


def test_tablespaces_go_where_they_are_mapped(
    place: Path, new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = new_cluster(18)
    space = cluster.server.directory.parent / "fast disk"
    space.mkdir()
    run_as().own(space)
    cluster.sql(f"create tablespace fast location '{space}'")
    cluster.sql("create table in_space tablespace fast as select generate_series(1, 500) i")
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    before = sorted(space.rglob("*"))
    story = Story(cluster, platform)
    with pytest.raises(UsageError, match="is not empty"):  # unmapped it would lie in the live server's files
        story.restore(RecoveryTarget("latest"), place / "unmapped")
    done = story.restore(RecoveryTarget("latest"), place / "data", tablespaces={str(space): place / "here"})
    assert rows(done, "select count(*) from in_space") == [500]
    assert set(done.tablespaces.values()) == {str(place / "here")}
    assert sorted(space.rglob("*")) == before


# A timeline's fork


def test_moments_before_and_after_a_fork(place: Path, new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    """A standby is promoted: what came before stands on timeline 1, what came after on 2; the lost end of 1 is never seen."""
    from tests.rig import HBA

    cluster = new_cluster(18, {"wal_keep_size": "200MB"})
    cluster.sql("create table mark (name text)")
    tool, home = cluster.server.install.tool("pg_basebackup"), scratch("ops-pg-test-")
    assert tool is not None
    run_as().own(home)
    standby = PostgresServer(cluster.server.install, home / "data", port=free_port())
    source = ["-h", str(cluster.server.sockets), "-p", str(cluster.server.socket_port), "-U", "postgres"]
    made = run_tool([tool, "-D", standby.directory, *source, "-c", "fast", "--no-sync", "-X", "stream", "-R"])
    assert made.returncode == 0, made.stderr
    other = Cluster.__new__(Cluster)
    other.server = standby
    try:
        standby.configure({}, hba=HBA)
        standby.start()
        platform = new_platform({"app-db": [cluster, other]})
        run_backup(platform.access, platform.target)
        story = Story(cluster, platform)
        story.mark("before")
        story.archive()
        at = position(cluster)
        eventually(lambda: other.sql("select pg_last_wal_replay_lsn() >= %s::pg_lsn", "postgres", at))
        # The standby is cut off, and the old primary goes on for a while: what it commits now, nobody will go on from.
        other.sql("alter system set primary_conninfo = ''")
        other.sql("select pg_reload_conf()")
        eventually(lambda: cluster.sql("select count(*) from pg_stat_replication") == 0)
        story.mark("lost")
        story.mark("lost, too")
        story.archive()
        cluster.stop()
        other.sql("select pg_promote()")
        fork = other.sql("select clock_timestamp()")
        story.cluster = other
        story.mark("after")
        other.sql("checkpoint")
        assert other.sql("select pg_walfile_name(pg_current_wal_lsn())").startswith("00000002")
        story.archive()
        run_backup(platform.access, platform.target, kind="full")
        story.mark("much later")
        story.mark("the end")
        story.archive()
        expected = {"before": ["before"], "after": ["before", "after"], "much later": ["before", "after", "much later"]}
        for name, there in expected.items():
            done = story.restore(RecoveryTarget("time", story.marks[name].at), place / name.replace(" ", "-"))
            assert rows(done) == there, name
        assert story.marks["lost"].at < fork < story.marks["after"].at
        # At the second of the fork, and at a moment that both timelines have: the newest one is followed, unless another is named.
        for name, wanted, there in (
            ("at-the-fork", RecoveryTarget("time", fork), ["before"]),
            ("both", RecoveryTarget("time", story.marks["lost"].at), ["before"]),
            ("left", RecoveryTarget("time", story.marks["lost"].at, timeline=1), ["before", "lost"]),
        ):
            assert rows(story.restore(wanted, place / name)) == there, name
    finally:
        standby.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


# Single tables


QUOTED = 'shop."Größe ""L"", rot"'


def test_tables_come_as_a_dump_that_pg_restore_takes(story: Story, place: Path, new_cluster: MakeCluster) -> None:
    """A partitioned table comes with its partitions: they are where its rows are."""
    wanted, file = RecoveryTarget("time", story.marks["three"].at), place / "lost.dump"
    left = set(story.platform.home.iterdir())
    dump_tables(story.platform.access, story.platform.target, wanted, [QUOTED, "shop.payment"], file)
    assert set(story.platform.home.iterdir()) == left
    assert sorted(path.name for path in place.iterdir()) == ["lost.dump"]
    assert file.stat().st_mode & 0o777 == 0o600
    fresh = new_cluster(18)
    fresh.sql("create schema shop")
    tool = find_tool("pg_restore", 18, ())
    assert tool is not None
    os.chown(file, run_as().uid, run_as().gid)
    socket = ["-h", str(fresh.server.sockets), "-p", str(fresh.server.socket_port), "-U", "postgres"]
    done = run_tool([tool, *socket, "-d", "postgres", "--exit-on-error", file])
    assert done.returncode == 0, done.stderr
    assert fresh.sql(f"select count(*) from {QUOTED}") == 100
    assert fresh.sql("select array_agg(id order by id) from shop.payment") == [1, 2, 3]
    assert fresh.sql("select to_regclass('mark')") is None


def test_a_table_that_was_not_there_is_named(story: Story, place: Path) -> None:
    wanted = RecoveryTarget("time", story.marks["four"].at)
    names = ["shop.payment", QUOTED, "shop.*", 'shop."open']
    with pytest.raises(UsageError) as refused:
        dump_tables(story.platform.access, story.platform.target, wanted, names, place / "lost.dump")
    assert refused.value.what == f'not there at that moment: {QUOTED}, shop.*, shop."open'
    assert not list(place.iterdir())


def test_a_table_that_is_not_there_now_is_warned_of_before_anything_is_restored(story: Story, place: Path) -> None:
    command = [sys.executable, "-m", "ops_platform.cli.main", "restore", story.platform.target.id, "--latest"]
    command += ["--tables", 'shop.payment,shop.paymnt,shop."open', "--as-dump", str(place / "lost.dump"), "--dry-run"]
    done = subprocess.run(command, env=story.platform.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith('warning: not there now: shop.paymnt, shop."open. Whether it was')
    (host,) = story.platform.target.connection.hosts
    nowhere = {"hosts": [host.model_copy(update={"port": free_port()})]}
    connection = story.platform.target.connection.model_copy(update=nowhere)
    away = story.platform.target.model_copy(update={"connection": connection})
    assert room.not_there_now(story.platform.access, away, ["shop.paymnt"]) == []


_DUMP = """
import sys, threading
from pathlib import Path
from ops_platform.backup.model import RecoveryTarget
from ops_platform.clients.access import Access
from ops_platform.inventory import load
from ops_platform.recovery import restore as room
def waiting(*args):
    print("now", flush=True)
    threading.Event().wait()
room._dump = waiting
with Access(load()) as access:
    room.dump_tables(access, access.inventory.targets[0], RecoveryTarget("latest"), ["public.mark"], Path(sys.argv[1]))
"""


def test_a_copy_that_a_killed_dump_left_is_removed_by_the_next_one(story: Story, place: Path) -> None:
    file = place / "lost.dump"
    child = subprocess.Popen[bytes](
        [sys.executable, "-c", _DUMP, str(file)], env=story.platform.env, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"now\n"
        (copy,) = story.platform.home.glob("ops-tables-*")
        assert (copy / "data" / "PG_VERSION").exists()
        others = story.platform.target.model_copy(update={"id": "app-db"})
        assert room.temporary_home(others, "tables").parent == copy.parent
        assert copy.exists(), "its program lives"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    dump_tables(
        story.platform.access,
        story.platform.target,
        RecoveryTarget("time", story.marks["three"].at),
        ["public.mark"],
        file,
    )
    assert not copy.exists()
    for left in story.platform.home.glob("ops-tables-*"):  # ours, who live
        shutil.rmtree(left)


def test_a_dump_is_never_written_over_a_file(story: Story, place: Path) -> None:
    (place / "lost.dump").write_text("dear")
    wanted = RecoveryTarget("time", story.marks["three"].at)
    with pytest.raises(UsageError, match="exists"):
        dump_tables(story.platform.access, story.platform.target, wanted, ["mark"], place / "lost.dump")
    with pytest.raises(UsageError, match="no such directory"):
        dump_tables(story.platform.access, story.platform.target, wanted, ["mark"], place / "none" / "lost.dump")
    assert (place / "lost.dump").read_text() == "dear"
