"""Real recoveries through the fetcher: they reach their target, or they stop. None ends early without anybody noticing."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ops_platform.backup import walfetch
from ops_platform.backup.archive import read_archive
from ops_platform.backup.model import Lsn, RecoveryTarget, segment_name, segment_start
from ops_platform.backup.repository import Repository
from ops_platform.backup.wal import history_name, parse_history
from ops_platform.backup.walfetch import WalFetchAhead
from ops_platform.clients.postgres_binaries import PostgresServer, run_as, run_tool
from ops_platform.errors import OpsError, UnreachableError
from tests.integration.wal_rig import (
    Child,
    FaultyStore,
    Rig,
    bare_server,
    copied,
    crash,
    eventually,
    fetch_task,
    new_server,
    remove,
)
from tests.rig import Ground, scratch

MB = 1 << 20


@dataclass
class Mark:
    """A row that says: I was here. `after` and `at` lie between its commit and the next one's."""

    name: str
    after: int
    at: datetime


@dataclass
class Story:
    """A cluster that lived on three timelines, its WAL in a real store, and a base backup from before all of it.

    Timeline 1: one, two, three. Failed over to 2: four, five, six. Restored to the moment after `two`, onto timeline 3: seven.
    """

    rig: Rig
    prefix: str
    base: PostgresServer
    sysid: int = 0
    marks: dict[str, Mark] = field(default_factory=dict[str, Mark])

    @property
    def repository(self) -> Repository:
        return self.rig.repository

    def mark(self, name: str, server: PostgresServer) -> None:
        rig = self.rig
        rig.sql(f"insert into mark values ('{name}')", server)
        self.marks[name] = Mark(name, rig.position(server), rig.sql("select clock_timestamp()", server))
        rig.load(4000, server)

    def key(self, timeline: int, number: int, *, partial: bool = False) -> str:
        return self.repository.wal_key(self.sysid, segment_name(timeline, number * MB, MB), partial=partial)

    def whole(self, timeline: int) -> list[int]:
        archive = read_archive(self.repository)
        assert archive is not None
        return sorted(archive.stocks[timeline].whole)

    def fork(self, timeline: int) -> int:
        sealed = self.repository.get_wal(self.sysid, history_name(timeline))
        assert sealed is not None
        return parse_history(timeline, sealed.plain)[-1].begin

    @contextlib.contextmanager
    def without(self, *keys: str) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for key in keys:
                undo.callback(self.rig.store.put, key, self.rig.store.get(key))
                self.rig.store.delete(key)
            yield

    @contextlib.contextmanager
    def replaced(self, key: str, content: bytes) -> Iterator[None]:
        with self.without(key):
            self.rig.store.put(key, content)
            yield


@pytest.fixture(scope="module")
def story(ground: Ground) -> Iterator[Story]:
    primary = new_server(settings={"wal_keep_size": "200MB"})
    standby = copied(primary, standby=True)
    servers = [primary, standby]
    prefix = uuid.uuid4().hex[:12]
    rig = Rig([primary, standby], ground.store(prefix))
    try:
        receiver, state = rig.streaming()
        told = Story(rig, prefix, copied(primary))
        servers.append(told.base)
        rig.sql("create table mark(name text)")
        for name in ("one", "two", "three"):
            told.mark(name, primary)
        rig.await_archived(rig.position())
        at = rig.position()
        eventually(lambda: rig.sql(f"select pg_last_wal_replay_lsn() >= '{Lsn(at)}'", standby), why="no standby")
        crash(primary)
        rig.sql("select pg_promote()", standby)
        eventually(lambda: state.timeline == 2 and state.phase == "streaming", why=lambda: state.last_error)
        for name in ("four", "five", "six"):
            told.mark(name, standby)
        rig.await_archived(rig.position(standby), timeline=2)
        rig.stop(receiver)
        crash(standby)
        told.sysid = state.system_identifier or 0
        restored = recover(told, RecoveryTarget("time", told.marks["two"].at)).server
        servers.append(restored)
        rig.servers[:] = [restored]
        receiver, state = rig.streaming()
        told.mark("seven", restored)
        rig.await_archived(rig.position(restored), timeline=3)
        rig.stop(receiver)
        crash(restored)
        yield told
    finally:
        rig.close()
        for server in servers:
            remove(server)


# Recoveries


@dataclass
class Outcome:
    server: PostgresServer
    promoted: bool
    fetched: int

    @property
    def log(self) -> str:
        return self.server.log.read_text(errors="replace")

    def marks(self) -> list[str]:
        with self.server.connect() as conn:
            return [row[0] for row in conn.execute("select name from mark")]

    def state(self) -> str:
        """As the control file says."""
        tool = self.server.install.tool("pg_controldata")
        assert tool is not None
        lines = run_tool([tool, self.server.directory]).stdout.splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("Database cluster state"))


def ready(story: Story) -> tuple[PostgresServer, Path]:
    """The base backup in a place of its own, and a spool whose name nobody would choose."""
    server = bare_server(scratch("ops-recover-"))
    subprocess.run(["cp", "-a", str(story.base.directory), str(server.directory)], check=True)
    spool = server.directory.parent / '100% of o\'clock "spool"'
    spool.mkdir(mode=0o700)
    run_as().own(spool)
    return server, spool


def recover(
    story: Story,
    wanted: RecoveryTarget,
    *,
    repository: Repository | None = None,
    during: Callable[[PostgresServer], None] = lambda _: None,
    **options: Any,
) -> Outcome:
    """Until the server is promoted, or has stopped."""
    server, spool = ready(story)
    with WalFetchAhead(repository or story.repository, story.sysid, spool, segment_size=MB, **options) as fetcher:
        promoted = run_recovery(server, fetcher.restore_command, wanted, during)
        return Outcome(server, promoted, fetcher.fetched_segments)


def run_recovery(
    server: PostgresServer,
    restore_command: str,
    wanted: RecoveryTarget,
    during: Callable[[PostgresServer], None] = lambda _: None,
) -> bool:
    settings = {"restore_command": restore_command, "recovery_target_action": "promote"}
    server.configure(settings | wanted.settings())
    (server.directory / "recovery.signal").touch()
    run_as().own(server.directory / "recovery.signal")
    starting = threading.Thread(target=start, args=[server])
    starting.start()
    during(server)
    starting.join()
    eventually(lambda: server.pid is None or not in_recovery(server), why=server.log_tail)
    return server.pid is not None


def start(server: PostgresServer) -> None:
    with contextlib.suppress(OpsError):  # it did not start: the caller looks at it
        server.start()


def in_recovery(server: PostgresServer) -> bool:
    try:
        with server.connect(timeout=2) as conn:
            return conn.execute("select pg_is_in_recovery()").fetchone()[0]
    except psycopg.Error:
        return True  # not yet, or no more: `pid` says which


@pytest.fixture
def recovered(story: Story) -> Iterator[Callable[..., Outcome]]:
    """`recover`, with its server removed after the test."""
    outcomes: list[Outcome] = []

    def run(wanted: RecoveryTarget, **more: Any) -> Outcome:
        outcomes.append(recover(story, wanted, **more))
        return outcomes[-1]

    yield run
    for outcome in outcomes:
        remove(outcome.server)


FIRST_LINE = ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize("reached", [1, 2, 3, 5])
def test_a_recovery_to_a_time_brings_back_what_was_committed_before(
    story: Story, recovered: Callable[..., Outcome], reached: int
) -> None:
    moment = story.marks[FIRST_LINE[reached - 1]].at
    outcome = recovered(RecoveryTarget("time", moment, timeline=2))
    assert outcome.promoted, outcome.log[-2000:]
    assert outcome.marks() == FIRST_LINE[:reached]
    assert outcome.fetched >= reached


def test_a_recovery_to_a_position_stops_there(story: Story, recovered: Callable[..., Outcome]) -> None:
    outcome = recovered(RecoveryTarget("lsn", str(Lsn(story.marks["four"].after)), timeline=2))
    assert outcome.promoted, outcome.log[-2000:]
    assert outcome.marks() == FIRST_LINE[:4]


def test_a_recovery_follows_the_failover_to_the_last_stored_byte(
    story: Story, recovered: Callable[..., Outcome]
) -> None:
    outcome = recovered(RecoveryTarget("latest", timeline=2))
    assert outcome.promoted, outcome.log[-2000:]
    assert outcome.marks() == FIRST_LINE
    with outcome.server.connect() as conn:
        # The last of it stood in the unfinished segment alone.
        last = story.key(2, story.whole(2)[-1] + 1, partial=True)
        assert story.rig.store.head(last) is not None
        assert conn.execute("select count(*) from load").fetchone()[0] == 6 * 4000


def test_the_newest_timeline_is_the_one_that_was_restored_and_went_on(
    story: Story, recovered: Callable[..., Outcome]
) -> None:
    outcome = recovered(RecoveryTarget("latest"))
    assert outcome.promoted, outcome.log[-2000:]
    assert outcome.marks() == ["one", "two", "seven"]


def test_a_server_restored_to_before_a_fork_names_a_parent_that_was_left_before_it_began(story: Story) -> None:
    """What PostgreSQL really writes, and what `parse_history` has to make of it."""
    sealed = story.repository.get_wal(story.sysid, history_name(3))
    assert sealed is not None
    left = [line.split()[:2] for line in sealed.plain.decode().splitlines() if line]
    assert [int(timeline) for timeline, _ in left] == [1, 2]
    assert Lsn.parse(left[1][1]) < Lsn.parse(left[0][1])
    assert [span.timeline for span in parse_history(3, sealed.plain)] == [1, 3]
    assert story.rig.holes() == []


# What must stop a recovery


def assert_stopped(outcome: Outcome, said: str) -> None:
    """Neither promoted nor ended: the same data directory can go on once the WAL is there."""
    assert not outcome.promoted, f"recovered to {outcome.marks()} as if nothing were wrong"
    assert said in outcome.log, outcome.log[-2000:]
    assert outcome.state() == "in archive recovery"
    assert (outcome.server.directory / "recovery.signal").exists()
    assert not list((outcome.server.directory / "pg_wal").glob("00000004*"))


@pytest.mark.parametrize("where", ["middle", "before the fork", "after the fork", "the last whole one"])
def test_a_missing_segment_stops_the_recovery(story: Story, recovered: Callable[..., Outcome], where: str) -> None:
    fork = story.fork(2) // MB
    missing = {
        "middle": [story.key(1, fork - 2)],
        "before the fork": [story.key(1, fork - 1)],
        "after the fork": [story.key(2, fork)],
        "the last whole one": [story.key(2, story.whole(2)[-1])],
    }[where]
    with story.without(*missing):
        outcome = recovered(RecoveryTarget("latest", timeline=2))
    assert_stopped(outcome, f"the archive has a gap: {missing[0].rpartition('/')[2]} is missing")


def test_wal_that_only_a_childs_history_tells_of_is_missed_too(story: Story, recovered: Callable[..., Outcome]) -> None:
    """Nothing of timeline 1 is stored after the hole, and the server never looks at timeline 2."""
    fork = story.fork(2) // MB
    tail = [story.key(1, number) for number in story.whole(1) if number >= fork - 2]
    tail += [key for number in (fork, fork + 1) if story.rig.store.head(key := story.key(1, number, partial=True))]
    with story.without(*tail):
        outcome = recovered(RecoveryTarget("latest", timeline=1))
    assert_stopped(outcome, f"the archive has a gap: {segment_name(1, (fork - 2) * MB, MB)} is missing")


def test_the_end_of_what_was_stored_is_no_gap(story: Story, recovered: Callable[..., Outcome]) -> None:
    """Or the tests above would prove nothing: here the server is told that there is no more, and ends."""
    first = story.marks["four"].after // MB + 1
    tail = [story.key(2, number) for number in story.whole(2) if number >= first]
    tail.append(story.key(2, story.whole(2)[-1] + 1, partial=True))
    with story.without(*tail):
        outcome = recovered(RecoveryTarget("latest", timeline=2))
    assert outcome.promoted, outcome.log[-2000:]
    assert outcome.marks() == FIRST_LINE[:4]


def test_a_target_beyond_the_stored_wal_is_never_taken_for_reached(
    story: Story, recovered: Callable[..., Outcome]
) -> None:
    first = story.marks["four"].after // MB + 1
    tail = [story.key(2, number) for number in story.whole(2) if number >= first]
    tail.append(story.key(2, story.whole(2)[-1] + 1, partial=True))
    with story.without(*tail):
        outcome = recovered(RecoveryTarget("time", story.marks["five"].at, timeline=2))
    assert not outcome.promoted
    assert "recovery ended before configured recovery target was reached" in outcome.log


def damaged(story: Story, key: str, how: str) -> tuple[bytes, str]:
    """Other bytes for the object, and what shall be said of them."""
    stored = story.rig.store.get(key)
    number = segment_start(key.rpartition("/")[2], MB)[1] // MB
    if how == "one flipped bit":
        return stored[:-500] + bytes([stored[-500] ^ 1]) + stored[-499:], "authentication failed"
    if how == "cut off":
        return stored[: len(stored) // 2], "authentication failed"
    if how == "empty":
        return b"", "not a readable sealed object"
    if how == "swapped":
        return story.rig.store.get(story.key(1, number + 1)), "it was moved or swapped"
    from ops_platform.backup.sealed import seal

    key_of_data = story.rig.keys.new_data_key()
    if how == "short":
        plain = story.repository.get_wal(story.sysid, key.rpartition("/")[2]).plain[: MB // 2]  # type: ignore[union-attr]
        said = f"{MB // 2} bytes where a segment has {MB}"
    else:
        plain = story.repository.get_wal(story.sysid, segment_name(1, (number + 1) * MB, MB)).plain  # type: ignore[union-attr]
        said = f"first page says that it belongs at {Lsn((number + 1) * MB)}"
    import hashlib

    meta = {"sha256": hashlib.sha256(plain).hexdigest(), "segment_size": MB}
    return seal(plain, place=key, data_key=key_of_data, meta=meta), said


@pytest.mark.parametrize(
    "how", ["one flipped bit", "cut off", "empty", "swapped", "short", "another segment under its name"]
)
def test_a_damaged_segment_stops_the_recovery(story: Story, recovered: Callable[..., Outcome], how: str) -> None:
    key = story.key(1, story.fork(2) // MB - 2)
    content, said = damaged(story, key, how)
    with story.replaced(key, content):
        outcome = recovered(RecoveryTarget("latest", timeline=2))
    assert_stopped(outcome, said)


def test_a_damaged_history_stops_the_recovery(story: Story, recovered: Callable[..., Outcome]) -> None:
    key = story.repository.wal_key(story.sysid, history_name(2))
    stored = story.rig.store.get(key)
    with story.replaced(key, stored[:-1] + bytes([stored[-1] ^ 1])):
        outcome = recovered(RecoveryTarget("latest", timeline=2))
    assert not outcome.promoted
    assert "authentication failed" in outcome.log


# The store, for a moment and for good


def through(story: Story, fault: Callable[[str, str], None]) -> Repository:
    store = FaultyStore(story.rig.store)
    store.fault = fault
    return Repository(store, story.rig.keys, "app-db")  # type: ignore[arg-type]


def test_a_store_that_is_away_for_a_moment_delays_the_recovery_and_nothing_else(
    story: Story, recovered: Callable[..., Outcome]
) -> None:
    failures: dict[str, int] = {}

    def fault(verb: str, key: str) -> None:
        failures[key] = failures.get(key, 0) + 1
        if verb == "get" and failures[key] <= 2:  # once ahead of the server, once when it asks
            raise UnreachableError("the store refused 6 tries: SlowDown 503", where=key)

    outcome = recovered(RecoveryTarget("time", story.marks["three"].at, timeline=2), repository=through(story, fault))
    assert outcome.promoted, outcome.log[-2000:]
    assert outcome.marks() == FIRST_LINE[:3]
    assert sum(failures.values()) > len(failures)


@pytest.mark.parametrize("what", ["the store", "the key service"])
def test_a_store_that_stays_away_stops_the_recovery(story: Story, recovered: Callable[..., Outcome], what: str) -> None:
    last = segment_name(1, (story.fork(2) // MB - 2) * MB, MB)

    def fault(verb: str, key: str) -> None:
        if key.rpartition("/")[2] >= last and ".history" not in key:
            raise UnreachableError(f"{what} does not answer", where=key)

    outcome = recovered(RecoveryTarget("latest", timeline=2), repository=through(story, fault), retry_for=0.2, ahead=2)
    assert_stopped(outcome, f"{what} does not answer")


def test_a_killed_fetcher_stops_the_recovery(story: Story, ground: Ground) -> None:
    server, spool = ready(story)
    before, held = (segment_name(1, (story.fork(2) // MB - back) * MB, MB) for back in (3, 2))
    task = fetch_task(ground.place, story.prefix, story.sysid, spool, MB, hold=held)
    try:
        with Child(task) as child:
            command = child.until("serving").removeprefix("serving ")

            def during(_server: PostgresServer) -> None:
                child.until("held")
                eventually(lambda: before in server.log_tail(100_000), why=server.log_tail)
                child.kill9()

            promoted = run_recovery(server, command, RecoveryTarget("latest", timeline=2), during)
        outcome = Outcome(server, promoted, 0)
        assert_stopped(outcome, "is gone")
    finally:
        remove(server)


def test_a_recovery_that_was_shut_down_while_it_waited_goes_on_where_it_was(story: Story) -> None:
    server, spool = ready(story)
    slow, go_on = threading.Event(), threading.Event()
    held = story.key(1, story.fork(2) // MB - 2)

    def fault(verb: str, key: str) -> None:
        if (verb, key) == ("get", held):
            slow.set()
            assert go_on.wait(60)

    def during(server: PostgresServer) -> None:
        assert slow.wait(60)
        eventually(lambda: server.log.exists() and server.pid, why="the server is not there")
        server.stop("fast")

    try:
        with WalFetchAhead(through(story, fault), story.sysid, spool, segment_size=MB) as fetcher:
            wanted = RecoveryTarget("latest", timeline=2)
            assert not run_recovery(server, fetcher.restore_command, wanted, during)
            go_on.set()
            assert run_recovery(server, fetcher.restore_command, wanted)
            assert Outcome(server, True, 0).marks() == FIRST_LINE
    finally:
        remove(server)


# The script and its spool, without a server


@dataclass
class Asking:
    """A spool with a fetcher behind it, and the script as the server would call it."""

    spool: Path
    fetcher: WalFetchAhead

    def ask(self, name: str) -> tuple[int, str, bytes | None]:
        """Exit code, what was said, and what was handed over."""
        to = self.spool.parent / f"RECOVERYXLOG-{uuid.uuid4().hex[:6]}"
        words = {"%f": name, "%p": str(to), "%%": "%"}
        command = re.sub("%[fp%]", lambda found: words[found[0]], self.fetcher.restore_command)
        done = run_tool(["sh", "-c", command], timeout=60)
        return done.returncode, done.stderr.strip(), to.read_bytes() if to.exists() else None

    def ready(self) -> list[str]:
        return sorted(path.name for path in (self.spool / "ready").iterdir())


@pytest.fixture
def asking(story: Story) -> Iterator[Callable[..., Asking]]:
    with contextlib.ExitStack() as stack:

        def make(repository: Repository | None = None, **options: Any) -> Asking:
            home = scratch("ops-spool-")
            stack.callback(shutil.rmtree, home)
            run_as().own(home)
            spool = home / "spool"
            spool.mkdir(mode=0o700)
            run_as().own(spool)
            fetcher = WalFetchAhead(repository or story.repository, story.sysid, spool, segment_size=MB, **options)
            return Asking(spool, stack.enter_context(fetcher))

        yield make


def test_the_next_segments_are_there_before_they_are_asked_for(story: Story, asking: Callable[..., Asking]) -> None:
    away = threading.Event()

    def fault(_verb: str, key: str) -> None:
        if away.is_set():
            raise UnreachableError("the store is away", where=key)

    it = asking(through(story, fault), ahead=3, retry_for=0.1)
    numbers = story.whole(1)
    names = [segment_name(1, number * MB, MB) for number in numbers]
    assert it.ask(names[0])[0] == 0
    eventually(lambda: it.ready() == names[1:4], why=it.ready)
    away.set()
    for name in names[1:4]:
        code, _, content = it.ask(name)
        assert code == 0
        assert content == story.repository.get_wal(story.sysid, name).plain  # type: ignore[union-attr]
    code, said, content = it.ask(names[4])
    assert (code, content) == (126, None)
    assert "the store is away" in said
    assert it.fetcher.fetched_segments == 4
    assert it.fetcher.fetched_bytes == 4 * MB


def test_the_spool_never_holds_more_than_it_may(story: Story, asking: Callable[..., Asking]) -> None:
    it = asking(ahead=2, workers=4)
    most = 0
    for number in story.whole(1):
        assert it.ask(segment_name(1, number * MB, MB))[0] == 0
        most = max(most, len(it.ready()))
    assert 0 < most <= 2


def test_segments_that_came_after_the_last_look_are_fetched_ahead_too(
    story: Story, asking: Callable[..., Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walfetch, "_RELIST_AFTER", 0.0)
    numbers = story.whole(1)
    with story.without(*(story.key(1, number) for number in numbers[1:])):
        it = asking()
        assert it.ask(segment_name(1, numbers[0] * MB, MB))[0] == 0
    assert it.ask(segment_name(1, numbers[1] * MB, MB))[0] == 0
    eventually(lambda: segment_name(1, numbers[2] * MB, MB) in it.ready(), why=it.ready)


@pytest.mark.parametrize(
    "name", ["00000009.history", "0000000100000000000000FF", "000000010000000000000001.00000028.backup"]
)
def test_what_the_store_does_not_have_is_the_end_of_wal(asking: Callable[..., Asking], name: str) -> None:
    assert asking().ask(name) == (1, "", None)


def test_an_answer_to_a_question_whose_asker_was_killed_is_not_taken_for_the_next_ones(
    story: Story, asking: Callable[..., Asking]
) -> None:
    """The server was stopped while it asked; meanwhile the segment has come."""
    it = asking()
    name = segment_name(1, story.whole(1)[0] * MB, MB)
    for kind in ("absent", "failed"):
        (it.spool / kind / name).write_text("said to nobody")
        assert it.ask(name)[0] == 0, kind


def test_a_fetcher_that_hangs_is_given_up(
    story: Story, asking: Callable[..., Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walfetch, "_PATIENCE", 10)
    it = asking()
    it.fetcher._stop.set()
    code, said, _ = it.ask(segment_name(1, story.whole(1)[0] * MB, MB))
    assert code == 126
    assert "does not answer" in said


def test_a_full_disk_stops_the_recovery_and_says_so(
    story: Story, asking: Callable[..., Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = WalFetchAhead._write

    def full(self: WalFetchAhead, path: Path, body: bytes) -> None:
        if path.parent.name == "ready":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path, body)

    monkeypatch.setattr(WalFetchAhead, "_write", full)
    code, said, _ = asking().ask(segment_name(1, story.whole(1)[0] * MB, MB))
    assert code == 126
    assert "No space left on device" in said


@pytest.mark.parametrize("gone", ["ask", "restore.sh", "."])
def test_a_spool_of_which_a_part_is_gone_stops_the_recovery(
    story: Story, asking: Callable[..., Asking], gone: str
) -> None:
    """Shells leave with 1 or 2 when they cannot read or write, and PostgreSQL would take that for the end of WAL."""
    it = asking()
    name = segment_name(1, story.whole(1)[0] * MB, MB)
    held = it.spool.rename(it.spool.with_name("held")) if gone == "." else (it.spool / gone).rename(it.spool / "held")
    try:
        assert it.ask(name)[::2] == (126, None)
    finally:
        held.rename(it.spool if gone == "." else it.spool / gone)
    assert it.ask(name)[0] == 0


def test_a_segment_that_cannot_be_handed_over_stops_the_recovery(story: Story, asking: Callable[..., Asking]) -> None:
    it = asking()
    name = segment_name(1, story.whole(1)[0] * MB, MB)
    done = run_tool(["sh", it.spool / "restore.sh", name, "/nowhere/RECOVERYXLOG"], timeout=60)
    assert done.returncode == 126
    assert "cannot move" in done.stderr


def test_what_is_cleared_away_while_the_server_reaches_for_it_is_asked_for_again(
    story: Story, asking: Callable[..., Asking]
) -> None:
    """PostgreSQL comes back to a segment that it had passed, in the moment in which the fetcher clears it away."""
    it = asking(ahead=1)
    name = segment_name(1, story.whole(1)[0] * MB, MB)
    assert it.ask(name)[0] == 0
    tools = it.spool.parent / "tools"
    tools.mkdir()
    mover = tools / "mv"
    mover.write_text(f'#!/bin/sh\nrm "$0" "$1"\nexec {shutil.which("mv")} "$@"\n')
    for path in (tools, mover):
        path.chmod(0o755)
        run_as().own(path)
    (it.spool / "ready" / name).write_bytes(b"left over from an earlier question")
    to = it.spool.parent / "RECOVERYXLOG"
    path = f"{tools}:/usr/bin:/bin"
    done = run_tool(["sh", it.spool / "restore.sh", name, to], timeout=60, env={"PATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    assert not mover.exists(), "it was not used: this shows nothing"
    assert to.read_bytes() == story.repository.get_wal(story.sysid, name).plain  # type: ignore[union-attr]


def test_a_question_that_comes_while_its_last_answer_is_just_taken_is_answered(
    story: Story, asking: Callable[..., Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL asks twice for a history. The second question comes before the first fetch has ended."""
    hand_over, go_on, first = WalFetchAhead._ready, threading.Event(), threading.Event()

    def slow(self: WalFetchAhead, name: str, plain: bytes) -> None:
        hand_over(self, name, plain)
        if not first.is_set():
            first.set()
            assert go_on.wait(30)

    monkeypatch.setattr(WalFetchAhead, "_ready", slow)
    it, answers = asking(), list[int]()
    assert it.ask("00000002.history")[0] == 0
    second = threading.Thread(target=lambda: answers.append(it.ask("00000002.history")[0]))
    second.start()
    eventually(lambda: "00000002.history" in it.fetcher._waiting, why="the second question was not heard")
    go_on.set()
    second.join(30)
    assert answers == [0]
