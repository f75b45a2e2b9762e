"""Reception of WAL against real servers and a real store: nothing lost, nothing confirmed that is not durable, gaps named."""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import urllib3
from prometheus_client.parser import text_string_to_metric_families

from ops_platform.backup import receiver_http, walsegments
from ops_platform.backup import reception as reception_module
from ops_platform.backup.archive import archive_status, read_archive
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.durable import holds, wait_durable
from ops_platform.backup.engine import open_engine
from ops_platform.backup.gapnotes import GapNote, gap_notes, put_gap
from ops_platform.backup.model import Lsn, segment_name, segment_start
from ops_platform.backup.receiver import Receiver, receive_range
from ops_platform.backup.reception import TargetReceiver, TargetState
from ops_platform.backup.repository import Repository
from ops_platform.backup.wal import history_name, parse_history
from ops_platform.backup.walsegments import IN_FLIGHT, Segments
from ops_platform.backup.walstream import WalRemovedError
from ops_platform.clients.postgres_binaries import PostgresServer
from ops_platform.clients.s3 import S3Store
from ops_platform.errors import CorruptionError, UnreachableError, UsageError
from ops_platform.local.components import s3_settings
from tests.integration.wal_rig import (
    Child,
    Keys,
    Rig,
    Wire,
    copied,
    crash,
    eventually,
    new_server,
    receive_task,
    removing_servers,
    target,
)
from tests.rig import Cluster, Ground, Platform

MB = 1 << 20


@pytest.fixture(autouse=True)
def servers() -> Iterator[None]:
    with removing_servers():
        yield


@pytest.fixture
def new_rig(ground: Ground, servers: None) -> Iterator[Callable[..., Rig]]:
    """Makes a target with an archive of its own: `new_rig(server, …)`, or with a fresh server where none is given."""
    rigs: list[Rig] = []

    def make(*servers: PostgresServer, store: Any = None, **settings: Any) -> Rig:
        held = list(servers) or [new_server(**settings)]
        rigs.append(Rig(held, store or ground.store(uuid.uuid4().hex[:12])))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is told all the time what we received and what is durable: a lie would not stay unsaid for ten seconds."""
    monkeypatch.setattr(reception_module, "STATUS_EVERY", 0.05)


def told_received(rig: Rig) -> int:
    """How far we told the server that we have received, durable or not."""
    return int(rig.sql("select coalesce(max(write_lsn - '0/0'::pg_lsn), 0) from pg_stat_replication"))


def keep_wal(megabytes: int = 400) -> dict[str, str]:
    """Settings under which the server throws no WAL away that a test wants to compare."""
    return {"wal_keep_size": f"{megabytes}MB"}


# What arrives


@pytest.mark.parametrize("segment_mb", [1, 16])
def test_what_is_received_is_what_stands_in_pg_wal(new_rig: Callable[..., Rig], segment_mb: int) -> None:
    rig = new_rig(settings=keep_wal(), segment_mb=segment_mb)
    _, state = rig.streaming()
    for _ in range(3):
        rig.load(6000 * (3 if segment_mb == 16 else 1))
        rig.switch()
    rig.load(100)
    rig.await_archived(rig.position())
    assert rig.holes() == []
    assert rig.assert_identical() >= 4
    assert len(rig.archived()) >= 3
    assert state.timeline == 1
    assert eventually(lambda: rig.confirmed() >= rig.position(), why="the server was not told what is durable")


def test_a_commit_is_durable_without_waiting_for_a_full_segment(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(segment_mb=16)
    _, state = rig.streaming()
    rig.load(1)
    at = rig.position()
    rig.await_archived(at)
    assert rig.archived() == {}, "no segment became full meanwhile: the unfinished one did it"
    (name,) = rig.archived(partial=True)
    assert state.partials >= 1
    # It grows in its place, and the whole segment takes it away.
    rig.load(1)
    rig.await_archived(rig.position())
    assert list(rig.archived(partial=True)) == [name]
    rig.switch()
    rig.load(1)
    eventually(lambda: name in rig.archived(), why="the segment did not become whole")
    eventually(
        lambda: f"{name}.partial" not in stored_names(rig), why="the unfinished segment was left beside the whole one"
    )


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 15, 16, 17])
def test_every_major_is_received_and_its_losses_are_understood(new_rig: Callable[..., Rig], major: int) -> None:
    small = {"max_slot_wal_keep_size": "2MB", "max_wal_size": "4MB", "min_wal_size": "2MB"}
    rig = new_rig(major=major, settings=small)
    receiver, _ = rig.streaming()
    rig.switch()
    rig.load(100)
    rig.await_archived(rig.position())
    assert rig.assert_identical() >= 1
    rig.stop(receiver)
    rig.load(60000)
    rig.sql("checkpoint")
    assert rig.slot("wal_status") == "lost"
    _, state = rig.streaming()
    rig.load(100)
    rig.await_archived(rig.position())
    assert state.gaps == 1
    assert len(rig.holes()) == 1
    assert rig.assert_identical() >= 1


def stored_names(rig: Rig) -> list[str]:
    return [info.key.rpartition("/")[2] for info in rig.repository.store.list(rig.repository.wal_prefix())]


@pytest.mark.usefixtures("talkative")
def test_nothing_is_confirmed_past_a_segment_that_is_still_on_its_way(new_rig: Callable[..., Rig]) -> None:
    """Segments are put side by side: a later one in the store does not make the earlier one durable."""
    rig = new_rig(settings=keep_wal())
    rig.streaming()
    rig.await_archived(rig.switch())
    gate, begun = threading.Event(), list[str]()
    blocked = rig.position() // MB  # the segment that now begins

    def slow(verb: str, key: str) -> None:
        if verb == "put" and segment_of(key) == blocked:
            begun.append(key)
            assert gate.wait(60)

    rig.store.fault = slow
    rig.load(12000)
    eventually(lambda: any(segment_of(key) > blocked for key in rig.store.puts), why="nothing was put side by side")
    assert begun
    eventually(lambda: told_received(rig) >= (blocked + 2) * MB, why=lambda: f"told {Lsn(told_received(rig))}")
    assert rig.confirmed() <= (blocked + 1) * MB
    assert not rig.holds((blocked + 2) * MB, since=blocked * MB), "the archive has a hole there"
    gate.set()
    rig.await_archived(rig.position())
    assert rig.confirmed() >= (blocked + 1) * MB
    rig.assert_identical()
    assert rig.holes() == []


def segment_of(key: str) -> int:
    """The number of a segment of 1 MB from its object's key; -1 for other objects."""
    name = key.rpartition("/")[2].removesuffix(".partial")
    return segment_start(name, MB)[1] // MB if len(name) == 24 else -1


def test_a_range_is_fetched_without_a_slot_for_a_target_that_nobody_receives(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(settings=keep_wal())
    rig.load(6000)
    begin = rig.position() - 3 * MB
    end = rig.position()
    received = receive_range(rig.access, rig.target, begin, end, 1)  # type: ignore[arg-type]
    assert received >= end - begin
    assert rig.holds(end, since=begin, timeline=1)
    assert rig.slot("slot_name") is None
    rig.assert_identical()
    with pytest.raises(WalRemovedError):  # refused, and not answered with something later
        receive_range(rig.access, rig.target, 0, end, 1)  # type: ignore[arg-type]


# What is durable, asked of the store


def test_a_position_is_durable_only_on_its_own_timeline(new_rig: Callable[..., Rig]) -> None:
    """The old primary ran ahead of the fork: its WAL at a position says nothing about the new one's."""
    primary = new_server()
    rig = new_rig(primary)
    rig.streaming()
    at = rig.load(3000)
    rig.await_archived(at)
    sysid = read_archive(rig.repository).system_identifier  # type: ignore[union-attr]
    assert holds(rig.repository, at, timeline=1)
    assert not holds(rig.repository, at, timeline=2)
    history = f"1\t{Lsn(at - MB)}\tno recovery target specified\n".encode()
    rig.repository.put_wal(sysid, history_name(2), history, data_key=rig.keys.new_data_key(), meta={})
    name = segment_name(2, at - MB, MB)
    meta = {"segment_size": MB}
    rig.repository.put_wal(sysid, name, b"x" * 100, data_key=rig.keys.new_data_key(), meta=meta, partial=True)
    assert not holds(rig.repository, at), "found on timeline 1, beyond the fork"
    assert holds(rig.repository, (at - MB) // MB * MB), "before the fork, where timeline 1 counts"


def test_an_empty_archive_holds_no_byte_and_lacks_none_where_none_is_asked_for(new_rig: Callable[..., Rig]) -> None:
    """A receiver that was killed before its first put has confirmed where it began, and nothing more."""
    rig = new_rig()
    at = rig.position()
    assert not rig.holds(at)
    assert not rig.holds(at, since=at - 1)
    assert rig.holds(at, since=at)


def test_the_few_segments_before_a_position_must_be_there_too(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    receiver, state = rig.streaming()
    begin = rig.confirmed() // MB * MB
    for _ in range(4):
        rig.load(1)
        rig.switch()
    rig.await_archived(rig.position())
    rig.stop(receiver)
    whole = sorted(rig.archived())
    end = segment_start(whole[-1], MB)[1] + MB
    assert rig.holds(end)
    assert rig.holds(end, since=begin)
    assert rig.holds(begin, since=begin), "nothing is asked for"
    assert not rig.holds(end, since=begin - MB), "from before the archive's beginning"
    assert not rig.holds(end + MB)
    rig.store.delete(rig.repository.wal_key(state.system_identifier or 0, whole[-2]))
    assert not rig.holds(end)
    assert not rig.holds(end, since=begin)
    assert rig.holds(end, since=end - MB)


def test_waiting_for_a_position_that_never_comes_ends_with_what_to_look_at(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    receiver, _ = rig.streaming()
    at = rig.load(10)
    assert wait_durable(rig.access, rig.target, at) >= 0  # type: ignore[arg-type]
    rig.stop(receiver)
    with pytest.raises(UnreachableError, match="does not hold the WAL up to") as caught:
        wait_durable(rig.access, rig.target, rig.load(10) + MB, timeout=0.2)  # type: ignore[arg-type]
    assert "receiver" in (caught.value.remedy or "")


# Interruptions


def test_reception_goes_on_after_a_restart_of_the_server(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(settings=keep_wal())
    _, state = rig.streaming()
    for how in ("fast", "crash"):
        rig.load(3000)
        if how == "fast":
            rig.primary.stop("fast")  # kills what does not stop in time, so:
            assert "database system is shut down" in rig.primary.log_tail(500), "the server waited for us"
        else:
            crash(rig.primary)
        eventually(lambda: state.phase == "waiting", why="the end of the server was not noticed")
        rig.primary.start()
        rig.load(3000)
        rig.await_archived(rig.position())
    assert state.reconnects >= 2
    assert rig.holes() == []
    assert rig.assert_identical() >= 4


def test_kill_9_of_the_receiver_loses_nothing_and_never_confirmed_too_much(
    new_rig: Callable[..., Rig], ground: Ground
) -> None:
    prefix, seed = uuid.uuid4().hex[:12], random.randrange(10**6)
    rig = new_rig(store=ground.store(prefix), settings=keep_wal(2000))
    moments, stop = random.Random(seed), threading.Event()
    rig.load(1)

    def write() -> None:
        with rig.primary.connect() as conn:
            while not stop.wait(0.02):
                conn.execute(
                    "insert into load(t) select md5(i::text) || repeat('x', 150) from generate_series(1, 300) i"
                )

    with Child(receive_task(ground.place, prefix, rig.primary)) as child:
        child.until("streaming")
        begin = rig.confirmed()
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(5):
            with Child(receive_task(ground.place, prefix, rig.primary)) as child:
                child.until("streaming")
                time.sleep(moments.uniform(0, 0.6))  # the moment is random, that is the point
            confirmed = rig.confirmed()
            assert rig.holds(confirmed, since=begin), (
                f"{Lsn(confirmed)} was confirmed and is not in the store; seed {seed}"
            )
    finally:
        stop.set()
        writer.join(30)
    rig.streaming()
    rig.await_archived(rig.position(), since=begin)
    assert rig.holes() == []
    assert rig.assert_identical() >= 5, f"too little was received to say anything; seed {seed}"


# The store and the key service


def assert_kept_and_caught_up(rig: Rig, away: Callable[[], None], back: Callable[[], None], said: str) -> None:
    """While nothing can be stored, the server is told nothing, memory is bounded, the reason is shown; then it goes on by itself."""
    _, state = rig.streaming(key_lifetime=0)
    rig.await_archived(rig.load(1000))
    away()
    before = rig.confirmed()
    rig.load(20000)  # far more than is kept in memory
    eventually(lambda: said in str(state.last_error), why=lambda: f"{state.last_error} does not say {said!r}")
    eventually(lambda: told_received(rig) > before + 2 * MB, why=lambda: f"told {Lsn(told_received(rig))}")
    assert rig.confirmed() <= before + MB, "something was confirmed that cannot be durable"
    assert state.received - state.durable <= (IN_FLIGHT + 1) * MB
    back()
    rig.await_archived(rig.position())
    eventually(lambda: rig.confirmed() >= rig.position(), why="the server was not told")
    eventually(lambda: state.last_error is None, why="the error is over and still shown")
    assert rig.holes() == []
    assert rig.assert_identical() >= 4


@pytest.mark.usefixtures("talkative")
def test_a_store_that_answers_503_costs_nothing_but_time(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(settings=keep_wal())

    def refuse(verb: str, key: str) -> None:
        raise UnreachableError("the store refused 6 tries: SlowDown 503", where=key)

    def away() -> None:
        rig.store.fault = refuse

    def back() -> None:
        rig.store.fault = lambda verb, key: None

    assert_kept_and_caught_up(rig, away, back, "SlowDown 503")


@pytest.mark.usefixtures("talkative")
def test_a_connection_to_the_store_that_is_reset_in_the_middle_of_a_put_costs_nothing_but_time(
    new_rig: Callable[..., Rig], ground: Ground
) -> None:
    ground.store("").close()
    wire = Wire(ground.place.port("s3"))
    try:
        endpoint = f"https://127.0.0.1:{wire.port}"
        settings = replace(
            s3_settings(ground.place, "tests"), prefix=uuid.uuid4().hex[:12], endpoint=endpoint, retries=1
        )
        rig = new_rig(store=S3Store(settings), settings=keep_wal())
        assert_kept_and_caught_up(rig, wire.cut, wire.mend, "the store did not answer")
    finally:
        wire.close()


def test_a_slow_store_is_waited_for_and_the_lag_is_shown(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(settings=keep_wal())
    _, state = rig.streaming()

    def slow(verb: str, key: str) -> None:
        if verb == "put":
            time.sleep(0.3)

    rig.store.fault = slow
    before = state.reconnects
    rig.load(20000)
    eventually(
        lambda: (state.lag_bytes or 0) > MB and (state.lag_seconds(time.monotonic()) or 0) > 0.2, why=lambda: state
    )
    assert state.received - state.durable <= (IN_FLIGHT + 1) * MB
    rig.await_archived(rig.position())
    eventually(lambda: state.lag_bytes == 0 and state.lag_seconds(time.monotonic()) == 0, why=lambda: state)
    assert state.reconnects == before
    assert state.last_error is None
    rig.assert_identical()


@pytest.mark.usefixtures("talkative")
def test_a_sealed_key_service_costs_nothing_but_time(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(settings=keep_wal())

    def seal(sealed: bool) -> Callable[[], None]:
        def do() -> None:
            rig.keys.sealed = sealed

        return do

    assert_kept_and_caught_up(rig, seal(True), seal(False), "Vault is sealed")


def test_a_server_may_shut_down_while_the_store_is_away(
    new_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server waits for its WAL senders: after a while the connection is given back to it."""
    monkeypatch.setattr(walsegments, "STALL_AFTER", 0.5)
    monkeypatch.setattr(reception_module, "GOODBYE", 0.2)
    rig = new_rig(settings=keep_wal())
    _, state = rig.streaming()

    def refuse(verb: str, key: str) -> None:
        raise UnreachableError("the store is away")

    rig.store.fault = refuse
    rig.load(3000)
    eventually(lambda: rig.slot("active") is False, why="the connection was not given back")
    assert state.phase == "waiting"
    rig.store.fault = lambda verb, key: None
    rig.await_archived(rig.position())
    rig.assert_identical()


def test_a_late_put_of_an_old_connection_never_replaces_a_newer_one(
    new_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished segment hangs in the store's hands while its connection ends; the next one stores more of it."""
    monkeypatch.setattr(reception_module, "GOODBYE", 0.2)
    rig = new_rig(segment_mb=16)
    _, state = rig.streaming()
    rig.await_archived(rig.load(10))
    gate, hanging = threading.Event(), threading.Event()

    def hang(verb: str, key: str) -> None:
        if verb == "put" and key.endswith(".partial") and not hanging.is_set():
            hanging.set()
            assert gate.wait(60)

    rig.store.fault = hang
    rig.load(10)
    assert hanging.wait(30)
    rig.sql("select pg_terminate_backend(active_pid) from pg_replication_slots")
    eventually(lambda: "still on their way" in str(state.last_error), why=lambda: state.last_error)
    at = rig.load(1000)
    gate.set()
    rig.await_archived(at)
    assert eventually(lambda: rig.confirmed() >= at)
    assert rig.holds(rig.confirmed()), "the server was told more than the store holds"


# Slots


def test_a_slot_that_was_dropped_is_made_anew(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(settings=keep_wal())
    _, state = rig.streaming()
    rig.await_archived(rig.load(3000))

    def dropped() -> bool:
        with rig.primary.connect() as conn:
            conn.execute("select pg_terminate_backend(active_pid) from pg_replication_slots where active")
            try:
                conn.execute("select pg_drop_replication_slot('ops_wal')")
            except psycopg.errors.ObjectInUse:
                return False
        return True

    eventually(dropped, why="the slot is always in use")
    at = rig.load(3000)
    rig.await_archived(at)
    assert eventually(lambda: rig.confirmed() >= at)
    assert rig.holes() == []
    assert state.gaps == 0
    rig.assert_identical()


def test_a_slot_that_lost_its_wal_leaves_a_gap_that_is_named_everywhere(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = new_cluster(
        18,
        {"max_slot_wal_keep_size": "2MB", "max_wal_size": "4MB", "min_wal_size": "2MB", "wal_keep_size": "0"},
        initdb=("--wal-segsize=1",),
    )
    platform = new_platform({"app-db": [cluster]})
    access, it = platform.access, platform.target
    log = list[str]()
    receiver = Receiver(access, [it], log=lambda _target, text: log.append(text), most_backoff=0.5)
    receiver.start()
    try:
        eventually(lambda: receiver.states[0].phase == "streaming", why=lambda: log)
        first = run_backup(access, it)
    finally:
        receiver.stop()
        assert receiver.join(30)
    before = open_engine(access, it).window()
    assert before.gaps == []
    archive = read_archive(platform.repository)
    assert archive is not None
    newest = max(archive.stocks[1].whole)

    cluster.sql("create table noise as select md5(i::text) || repeat('x', 150) from generate_series(1, 60000) i")
    cluster.sql("checkpoint")
    assert cluster.sql("select wal_status from pg_replication_slots") == "lost"

    log.clear()
    receiver = Receiver(access, [it], log=lambda _target, text: log.append(text), most_backoff=0.5)
    receiver.start()
    try:
        cluster.sql("create table more as select 1")
        at = int(cluster.sql("select pg_current_wal_flush_lsn() - '0/0'::pg_lsn"))
        eventually(lambda: holds(platform.repository, at), why=lambda: log)
        assert not archive_status(access, it).continuous, "no backup begins after the gap yet"
        second = run_backup(access, it)
    finally:
        receiver.stop()
        assert receiver.join(30)

    status = archive_status(access, it)
    (gap,) = status.gaps
    (note,) = status.notes
    lost = [segment_name(1, newest * MB + MB, MB), note.last]
    assert [gap.first, gap.last] == [note.first, note.last] == lost
    stored = {item.name for item in read_archive(platform.repository).listing if not item.partial}  # type: ignore[union-attr]
    assert not set(note.names(MB)) & stored
    assert segment_name(1, segment_start(note.last, MB)[1] + MB, MB) in stored, "the gap is wider than what was lost"
    assert "removed" in note.cause
    assert status.continuous, "from the backup after the gap on, every moment can be restored"
    assert any(f"GAP on timeline 1: the WAL files {gap.first} to {gap.last} are lost" in text for text in log)
    assert gap.recovery_again_from == second.backup_id

    window = open_engine(access, it).window()
    assert [(g.first, g.last, g.recovery_again_from) for g in window.gaps] == [(*lost, second.backup_id)]
    assert len(window.pieces) == 2
    assert window.pieces[0][0] == first.ended_at
    assert window.pieces[1][0] == second.ended_at
    assert not window.holds(note.noticed_at)


def test_a_slot_that_loses_its_wal_while_the_store_is_away_leaves_one_gap(
    new_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walsegments, "STALL_AFTER", 1.0)
    monkeypatch.setattr(reception_module, "GOODBYE", 0.2)
    rig = new_rig(settings={"max_slot_wal_keep_size": "2MB", "max_wal_size": "4MB", "min_wal_size": "2MB"})
    _, state = rig.streaming()
    rig.await_archived(rig.load(1000))
    away = threading.Event()
    away.set()

    def refuse(verb: str, key: str) -> None:
        if verb == "put" and away.is_set():
            raise UnreachableError("the store is away")

    rig.store.fault = refuse
    rig.load(25000)
    rig.sql("checkpoint")
    eventually(lambda: state.reconnects > 0, why="the end of the connection was not noticed")
    eventually(lambda: "the store is away" in str(state.last_error), why=lambda: state.last_error)
    assert stored_gaps(rig) == []
    away.clear()
    at = rig.load(1000)
    rig.await_archived(at)
    (note,) = stored_gaps(rig)
    assert rig.holes() == [(1, note.first, note.last)]
    assert not set(note.names(MB)) & set(rig.archived())
    assert rig.slot("wal_status") == "reserved"
    rig.assert_identical()


def stored_gaps(rig: Rig) -> list[GapNote]:
    archive = read_archive(rig.repository)
    return archive.notes if archive else []


@pytest.mark.parametrize(
    "note",
    [
        b"not json",
        b"[]",
        b'{"timeline": 1}',
        b'{"timeline": 1, "first": "x", "last": "y", "cause": "", "noticed_at": "2026-01-01T00:00:00+00:00"}',
        b'{"timeline": 2, "first": "000000010000000000000001", "last": "000000010000000000000002", "cause": "",'
        b' "noticed_at": "2026-01-01T00:00:00+00:00"}',
        b'{"timeline": 1, "first": "000000010000000000000001", "last": "000000010000000000000002", "cause": "",'
        b' "noticed_at": 7}',
    ],
)
def test_a_note_of_a_gap_that_cannot_be_read_is_named(ground: Ground, note: bytes) -> None:
    repository = Repository(ground.store(uuid.uuid4().hex[:12]), Keys(), "app-db")  # type: ignore[arg-type]
    key = f"{repository.wal_prefix(7)}gaps/note.json"
    repository.store.put(key, note)
    with pytest.raises(CorruptionError, match="note of a gap cannot be read") as caught:
        gap_notes(repository, 7)
    assert caught.value.where == key


def test_one_receiver_serves_a_target_and_the_other_waits(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    first, _ = rig.streaming()
    pid = rig.slot("active_pid")
    second = rig.receiver()
    state = second.states[0]
    eventually(lambda: state.last_error_kind == "Conflict", why=lambda: state.last_error)
    assert f"the slot ops_wal is in use by process {pid} of the server (ops-wal from 127.0.0.1" in str(state.last_error)
    at = rig.load(1000)
    rig.await_archived(at)
    assert rig.slot("active_pid") == pid, "the second pushed the first aside"
    rig.stop(first)
    eventually(lambda: state.phase == "streaming", why=lambda: state.last_error)
    rig.await_archived(rig.load(1000))
    rig.assert_identical()


# Who may not


def test_a_role_without_replication_is_told_what_to_do(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = new_cluster(18)
    cluster.sql("alter role ops_backup noreplication")
    platform = new_platform({"app-db": [cluster]})
    receiver = Receiver(platform.access, [platform.target], most_backoff=0.5)
    receiver.start()
    state = receiver.states[0]
    try:
        eventually(lambda: state.last_error is not None, why="no error was shown")
        assert state.last_error_kind == "AccessDenied"
        assert "ALTER ROLE ops_backup REPLICATION" in str(state.last_error)
        assert state.phase in ("starting", "waiting")
        assert cluster.sql("select count(*) from pg_replication_slots") == 0
        cluster.sql("alter role ops_backup replication")
        eventually(lambda: state.phase == "streaming", why=lambda: state.last_error)
    finally:
        receiver.stop()
        assert receiver.join(30)


def test_another_cluster_under_the_same_target_is_refused_until_it_is_accepted(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    receiver, state = rig.streaming()
    rig.await_archived(rig.load(1000))
    known = state.system_identifier
    rig.stop(receiver)
    other = new_rig(store=rig.store)  # another server, the same place in the store
    held = stored_names(rig)
    waiting = other.receiver()
    eventually(lambda: waiting.states[0].last_error_kind == "Conflict", why=lambda: waiting.states[0].last_error)
    sysid = int(other.sql("select system_identifier from pg_control_system()"))
    text = str(waiting.states[0].last_error)
    assert f"this is the cluster {sysid}" in text
    assert f"holds {known}" in text
    assert f"--accept-cluster {sysid}" in text
    assert stored_names(rig) == held
    assert other.slot("slot_name") is None, "a slot on a server that is not ours"
    other.stop(waiting)
    other.streaming(accept_cluster=sysid)
    at = other.load(1000)
    eventually(lambda: holds(other.repository, at, sysid), why="the accepted cluster is not received")
    assert {name for name in stored_names(rig) if name in held} == set(held)


def test_a_segment_that_is_there_with_other_content_is_never_overwritten(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(settings=keep_wal())
    receiver, state = rig.streaming()
    rig.await_archived(rig.switch())
    sysid = state.system_identifier
    assert sysid is not None
    rig.stop(receiver)
    next_one = segment_name(1, rig.position() + MB, MB)
    strange = b"from another life".ljust(MB, b"\0")
    rig.repository.put_wal(sysid, next_one, strange, data_key=rig.keys.new_data_key(), meta={"segment_size": MB})
    stored = rig.repository.store.get(rig.repository.wal_key(sysid, next_one))
    # Plan of the start passes over what is stored whole: it is met while streaming.
    _, state = rig.streaming()
    rig.load(8000)
    eventually(lambda: state.last_error_kind == "Conflict", why=lambda: state.last_error)
    assert next_one in str(state.last_error)
    assert "is not overwritten" in str(state.last_error)
    assert rig.repository.store.get(rig.repository.wal_key(sysid, next_one)) == stored
    assert rig.confirmed() <= segment_start(next_one, MB)[1] + MB


def test_a_stored_segment_that_was_damaged_is_not_taken_for_good(new_rig: Callable[..., Rig]) -> None:
    """Received again after a crash, it is compared with what stands there: a damaged one is neither overwritten nor confirmed."""
    rig = new_rig(settings=keep_wal())
    receiver, state = rig.streaming()
    rig.await_archived(rig.switch())
    assert state.system_identifier is not None
    rig.stop(receiver)
    first = min(rig.archived())
    key = rig.repository.wal_key(state.system_identifier, first)
    stored = bytearray(rig.repository.store.get(key))
    stored[-20] ^= 1
    rig.repository.store.put(key, bytes(stored))
    with pytest.raises(CorruptionError, match="authentication failed"):
        rig.archived()
    with pytest.raises(CorruptionError, match="authentication failed") as caught:
        rig.repository.put_wal(state.system_identifier, first, b"", data_key=rig.keys.new_data_key(), meta={})
    assert caught.value.where == key


# Failover


@pytest.mark.parametrize("caught_up", [True, False], ids=["the standby had all", "the standby was behind"])
def test_a_promoted_standby_is_followed_and_the_archive_goes_on(new_rig: Callable[..., Rig], caught_up: bool) -> None:
    primary = new_server(settings=keep_wal())
    standby = copied(primary, standby=True)
    rig = new_rig(primary, standby)
    receiver, state = rig.streaming()
    rig.load(3000)
    eventually(lambda: replayed(standby) >= rig.position(), why="the standby does not stream")
    if not caught_up:
        with standby.connect() as conn:
            conn.execute("alter system set primary_conninfo = ''")
            conn.execute("select pg_reload_conf()")
        eventually(
            lambda: rig.sql("select count(*) from pg_stat_replication where application_name = 'walreceiver'") == 0
        )
        rig.load(6000)  # three segments that only the old primary and the archive have
    ahead = rig.position()
    rig.await_archived(ahead)
    crash(primary)
    rig.sql("select pg_promote()", standby)
    eventually(lambda: state.timeline == 2 and state.phase == "streaming", why=lambda: f"{state.last_error} {rig.log}")
    at = rig.load(3000, standby)
    rig.await_archived(at, timeline=2)
    archive = read_archive(rig.repository)
    assert archive is not None
    sealed = rig.repository.get_wal(archive.system_identifier, history_name(2))
    assert sealed is not None
    on_disk = standby.directory / "pg_wal" / history_name(2)
    assert sealed.plain == on_disk.read_bytes()
    fork = parse_history(2, sealed.plain)[-1].begin
    assert (fork < ahead - MB) is not caught_up
    assert rig.holes() == []
    assert min(archive.stocks[2].whole | archive.stocks[2].partial) == fork // MB
    assert rig.assert_identical(standby, timeline=2) >= 2
    assert state.gaps == 0

    # The old primary comes back and is the only one that answers: its WAL must not go into the archive.
    rig.stop(receiver)
    crash(standby)
    primary.start()
    held = stored_names(rig)
    rig.servers[:] = [primary]
    came_back = rig.receiver()
    eventually(lambda: came_back.states[0].last_error_kind == "Conflict", why=lambda: came_back.states[0].last_error)
    assert "already on timeline 2, the server on 1" in str(came_back.states[0].last_error)
    assert stored_names(rig) == held
    rig.servers[:] = [primary, standby]


def test_nothing_is_received_of_an_old_primary_beside_a_standby_of_a_newer_timeline(
    new_rig: Callable[..., Rig],
) -> None:
    """The promoted server does not answer, and of its timeline the archive has nothing yet."""
    old = new_server(settings=keep_wal())
    promoted = copied(old, standby=True)
    follower = copied(promoted, standby=True)
    rig = new_rig(old, follower)
    rig.sql("select pg_promote()", promoted)
    line = "select received_tli from pg_stat_wal_receiver where status = 'streaming'"
    eventually(lambda: rig.sql(f"select ({line})", follower) == 2, why=follower.log_tail)
    state = rig.receiver().states[0]
    eventually(lambda: state.last_error_kind, why="it has no trouble")
    assert state.last_error_kind == "Conflict"
    assert f"127.0.0.1:{old.port}: primary, timeline 1; 127.0.0.1:{follower.port}: standby, timeline 2" in rig.log[-1]
    assert stored_names(rig) == []
    rig.servers.append(promoted)
    eventually(lambda: state.phase == "streaming" and state.timeline == 2, why=lambda: state.last_error)
    rig.await_archived(rig.load(1000, promoted), timeline=2)


def replayed(standby: PostgresServer) -> int:
    with standby.connect() as conn:
        return int(conn.execute("select pg_last_wal_replay_lsn() - '0/0'::pg_lsn").fetchone()[0] or 0)


def test_wal_that_was_lost_in_a_failover_is_a_gap_across_the_fork(new_rig: Callable[..., Rig]) -> None:
    """The store was away when the primary died, and the new one had thrown the old WAL away already."""
    small = {"max_wal_size": "4MB", "min_wal_size": "2MB"}
    primary = new_server(settings=small)
    standby = copied(primary, standby=True)
    rig = new_rig(primary, standby)
    receiver, _ = rig.streaming()
    rig.await_archived(rig.load(1000))
    rig.stop(receiver)
    rig.load(6000)
    eventually(lambda: replayed(standby) >= rig.position(), why="the standby does not stream")
    crash(primary)
    rig.sql("select pg_promote()", standby)
    rig.load(12000, standby)
    for _ in range(3):
        rig.sql("checkpoint", standby)
        rig.switch(standby)
    _, state = rig.streaming()
    at = rig.load(1000, standby)
    rig.await_archived(at, timeline=2)
    archive = read_archive(rig.repository)
    assert archive is not None
    assert {note.timeline for note in archive.notes} == {1, 2}, "the loss lies on both sides of the fork"
    assert [(note.timeline, note.first, note.last) for note in archive.notes if note.timeline == 2] == [
        hole for hole in rig.holes() if hole[0] == 2
    ]
    assert state.gaps == 2
    assert sum("GAP on timeline" in text for text in rig.log) == 2, "the same loss is met again and again"


# Many


def test_one_process_receives_many_targets_and_one_that_fails_hurts_no_other(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(settings={"max_wal_senders": "40", "max_replication_slots": "40", "wal_level": "logical"})
    targets = [target(f"db-{number}", slot=f"ops_wal_{number}") for number in range(20)]
    rig.sql("select pg_create_logical_replication_slot('of_others', 'test_decoding')")
    lame = target("lame", slot="of_others")
    receiver = rig.receiver(targets=[*targets, lame])
    healthy = receiver.states[:-1]
    eventually(
        lambda: all(state.phase == "streaming" for state in healthy), why=lambda: [s.last_error for s in healthy]
    )
    at = rig.load(6000)
    for it in targets:
        repository = Repository(rig.store, rig.keys, it.id)  # type: ignore[arg-type]
        eventually(lambda repository=repository: holds(repository, at), why=f"{it.id} is behind")
    assert "the slot of_others is a logical one" in str(receiver.states[-1].last_error)
    assert rig.sql("select slot_type from pg_replication_slots where slot_name = 'of_others'") == "logical"
    assert all(state.last_error is None for state in healthy)
    assert receiver.dead() == []
    rig.stop(receiver)
    assert [state.phase for state in receiver.states] == ["stopped"] * 21
    eventually(lambda: rig.sql("select count(*) from pg_replication_slots where active") == 0)


# Seen from outside


class Outside:
    """What a monitoring system and an orchestrator see of a receiver."""

    def __init__(self, receiver: Receiver) -> None:
        self._server = receiver_http.serve(receiver, "127.0.0.1", 0)
        self.port = self._server.server_address[1]

    def get(self, path: str) -> tuple[int, str]:
        answer = urllib3.request("GET", f"http://127.0.0.1:{self.port}{path}", retries=False, timeout=60)
        return answer.status, answer.data.decode()

    def health(self, path: str = "/healthz") -> tuple[int, dict[str, str]]:
        status, text = self.get(path)
        return status, json.loads(text)

    def metrics(self) -> dict[str, float]:
        """By the name under which Prometheus stores them, of the one target that there is."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                assert sample.labels == {"target": "app-db"}
                found[sample.name] = sample.value
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def outside() -> Iterator[Callable[[Receiver], Outside]]:
    made: list[Outside] = []

    def look(receiver: Receiver) -> Outside:
        made.append(Outside(receiver))
        return made[-1]

    yield look
    for one in made:
        one.close()


def test_the_metrics_say_what_is_received_and_what_is_durable(
    new_rig: Callable[..., Rig], outside: Callable[[Receiver], Outside]
) -> None:
    rig = new_rig()
    receiver, _ = rig.streaming()
    seen = outside(receiver)
    at = rig.load()
    rig.await_archived(at)
    eventually(lambda: seen.metrics()["ops_wal_durable_lsn_bytes"] >= at, why=seen.metrics)
    eventually(lambda: seen.metrics().get("ops_wal_lag_seconds") == 0, why=seen.metrics)
    eventually(lambda: "ops_wal_slot_lost" in seen.metrics(), why="the server was not asked")
    found = seen.metrics()
    assert set(found) == {
        "ops_wal_streaming", "ops_wal_lag_bytes", "ops_wal_lag_seconds", "ops_wal_received_lsn_bytes",
        "ops_wal_durable_lsn_bytes", "ops_wal_timeline", "ops_wal_slot_retained_bytes", "ops_wal_slot_lost",
        "ops_wal_segments_total", "ops_wal_partials_total", "ops_wal_raw_bytes_total", "ops_wal_gaps", "ops_wal_reconnects_total",
    }  # fmt: skip
    assert (found["ops_wal_streaming"], found["ops_wal_timeline"], found["ops_wal_slot_lost"]) == (1, 1, 0)
    assert found["ops_wal_received_lsn_bytes"] >= found["ops_wal_durable_lsn_bytes"]
    assert (found["ops_wal_gaps"], found["ops_wal_lag_bytes"]) == (0, 0)
    assert found["ops_wal_segments_total"] >= 1
    assert found["ops_wal_raw_bytes_total"] == found["ops_wal_segments_total"] * MB
    assert seen.health() == (200, {})
    assert seen.health("/readyz") == (200, {"app-db": "streaming"})
    status, text = seen.get("/")
    assert (status, "/metrics" in text) == (404, True)


def test_a_gap_is_a_gauge_that_falls_when_its_note_expires(
    new_rig: Callable[..., Rig], outside: Callable[[Receiver], Outside]
) -> None:
    rig = new_rig()
    receiver, state = rig.streaming()
    name = segment_name(1, 0, MB)
    put_gap(rig.repository, state.system_identifier or 0, GapNote(1, name, name, "removed", datetime.now(UTC)))
    rig.stop(receiver)
    receiver, _ = rig.streaming()
    seen = outside(receiver)
    assert seen.metrics()["ops_wal_gaps"] == 1
    assert "# TYPE ops_wal_gaps gauge" in seen.get("/metrics")[1]


def test_while_nothing_is_received_lag_and_slot_do_not_stand_still(
    new_rig: Callable[..., Rig], outside: Callable[[Receiver], Outside], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key service is sealed when the stream has to be begun anew; the server goes on writing."""
    monkeypatch.setattr(reception_module, "SLOT_CHECK_EVERY", 0.05)
    rig = new_rig()
    receiver, state = rig.streaming(key_lifetime=0.0)
    seen = outside(receiver)
    rig.await_archived(rig.load(100))
    rig.keys.sealed = True
    rig.sql("select pg_terminate_backend(active_pid) from pg_replication_slots")
    eventually(lambda: state.phase == "waiting", why=lambda: state)
    rig.load()
    eventually(lambda: seen.metrics().get("ops_wal_lag_bytes", 0) > MB, why=seen.metrics)
    first = seen.metrics()
    assert first["ops_wal_streaming"] == 0
    eventually(lambda: seen.metrics()["ops_wal_lag_seconds"] > first["ops_wal_lag_seconds"] > 0, why=seen.metrics)
    status, why = seen.health("/readyz")
    assert status == 503
    assert "sealed" in why["app-db"]
    assert seen.health()[0] == 200, "a restart would not help it"
    rig.sql("select pg_drop_replication_slot(slot_name) from pg_replication_slots")
    eventually(lambda: seen.metrics().get("ops_wal_slot_lost") == 1, why=seen.metrics)
    rig.keys.sealed = False
    eventually(lambda: state.phase == "streaming", why=lambda: state)
    eventually(lambda: seen.metrics().get("ops_wal_slot_lost") == 0, why=seen.metrics)


def test_what_is_not_known_has_no_sample(
    new_rig: Callable[..., Rig], outside: Callable[[Receiver], Outside], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before a server was reached, nor while it cannot be asked: a distance of 0 would be read as all being well."""
    monkeypatch.setattr(reception_module, "SLOT_CHECK_EVERY", 0.05)
    unknown = {
        "ops_wal_lag_bytes", "ops_wal_slot_lost", "ops_wal_slot_retained_bytes", "ops_wal_timeline", "ops_wal_received_lsn_bytes",
        "ops_wal_durable_lsn_bytes",
    }  # fmt: skip
    rig = new_rig()
    blank = {name for name, (_, _, read) in receiver_http.METRICS.items() if read(TargetState("app-db")) is None}
    assert blank == {*unknown, "ops_wal_lag_seconds", "ops_wal_gaps"}
    receiver, state = rig.streaming()
    seen = outside(receiver)
    rig.await_archived(rig.load(100))
    rig.primary.stop("immediate")
    eventually(lambda: state.phase == "waiting" and "ops_wal_lag_bytes" not in seen.metrics(), why=seen.metrics)
    found = seen.metrics()
    assert (found["ops_wal_streaming"], found["ops_wal_timeline"]) == (0, 1)
    assert not {"ops_wal_slot_lost", "ops_wal_slot_retained_bytes"} & set(found)
    assert found["ops_wal_lag_seconds"] > 0
    rig.primary.start()
    eventually(lambda: seen.metrics().get("ops_wal_lag_bytes") == 0, why=seen.metrics)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_target_whose_thread_has_ended_is_not_healthy(
    new_rig: Callable[..., Rig], outside: Callable[[Receiver], Outside], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(_self: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(TargetReceiver, "_follow", end)
    receiver = new_rig().receiver()
    seen = outside(receiver)
    eventually(lambda: seen.health() == (503, {"app-db": "ended"}), why=seen.health)
    assert seen.health("/readyz")[0] == 503


def test_a_target_that_hangs_is_not_healthy(
    new_rig: Callable[..., Rig], outside: Callable[[Receiver], Outside], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(receiver_http, "STUCK_AFTER", 1.5)
    settle = Segments.settle
    rig = new_rig()
    receiver, _ = rig.streaming()
    seen = outside(receiver)
    monkeypatch.setattr(Segments, "settle", lambda self: (go_on.wait(60), settle(self))[1])
    try:
        eventually(lambda: seen.health()[0] == 503, why=seen.health)
        assert "no sign of life for" in seen.health()[1]["app-db"]
    finally:
        go_on.set()
    eventually(lambda: seen.health() == (200, {}), why=seen.health)


def test_an_address_that_is_taken_is_said(new_rig: Callable[..., Rig], outside: Callable[[Receiver], Outside]) -> None:
    receiver = new_rig().receiver()
    seen = outside(receiver)
    with pytest.raises(UsageError, match="--listen") as refused:
        receiver_http.serve(receiver, "127.0.0.1", seen.port)
    assert refused.value.where == f"127.0.0.1:{seen.port}"
