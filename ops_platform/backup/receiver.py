"""The WAL receiver: streams each target's WAL into its repository and confirms to the server only what is durable there.

One process, many targets: a thread for each target's connection (idle ones wait in `poll`), and one small pool that compresses,
seals and puts. What is kept in memory is bounded: the segment being filled, and `IN_FLIGHT` behind it.

What counts as durable: whole segments confirmed by the store, in order; and the unfinished segment up to the end of its last
`.partial`, because that object can be restored from. The server keeps the whole file in which the confirmed position lies, so
after a crash of ours reception begins again at that segment's first byte and the longer content replaces the `.partial`, never a
shorter one. Nothing is remembered outside the store and the slot.

When the store or the key service is away, nothing is confirmed, reading stops at the memory bound, and after `STALL_AFTER`
seconds the connection is given back: a server that shuts down waits for its WAL senders, and must not wait for our store.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ops_platform.backup.archive import (
    GapNote,
    SlotState,
    gap_notes,
    open_target_repository,
    put_gap,
    read_wal_header,
    slot_holder,
    slot_state,
)
from ops_platform.backup.model import Lsn, segment_name
from ops_platform.backup.repository import Repository
from ops_platform.backup.wal import (
    Span,
    Start,
    check_segment_head,
    floor,
    history_name,
    parse_history,
    plan_start,
    stock,
)
from ops_platform.backup.walstream import (
    CopyEnd,
    Keepalive,
    SlotActiveError,
    WalData,
    WalRemovedError,
    WalStream,
)
from ops_platform.clients.keys import DataKey, KeyService
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, CorruptionError, OpsError, UnreachableError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access, Member
    from ops_platform.inventory import Target

IN_FLIGHT = 3
STATUS_EVERY = 10.0
SLOT_CHECK_EVERY = 30.0
STALL_AFTER = 60.0
KEY_LIFETIME = 3600.0
GOODBYE = 15.0


@dataclass
class TargetState:
    """What is known of one target's reception, for metrics and health. Positions are bytes of WAL, times UTC."""

    target_id: str
    phase: str = "starting"  # starting, streaming, waiting (after an error), stopped
    member: str | None = None
    system_identifier: int | None = None
    timeline: int | None = None
    slot: str = ""
    slot_status: str | None = None
    slot_retained: int | None = None
    received: int = 0
    durable: int = 0
    server_end: int = 0
    server_asked: bool = False  # whether `server_end` is what the server answered at the last question
    behind_since: float | None = (
        None  # monotonic: the oldest bytes here that are not durable; the end of the stream while there is none
    )
    segments: int = 0
    partials: int = 0
    raw_bytes: int = 0
    gaps: int | None = None  # as the store has them; None before it was looked at
    reconnects: int = 0
    last_error: str | None = None
    last_error_kind: str | None = None
    last_error_at: datetime | None = None
    alive_at: float = 0.0  # monotonic

    @property
    def lag_bytes(self) -> int | None:
        """None where it is not known: nothing was received yet, or the server cannot be asked how far it is."""
        known = self.server_asked if self.phase != "streaming" else self.server_end > 0
        return max(0, self.server_end - self.durable) if known and self.durable else None

    def lag_seconds(self, now: float) -> float | None:
        """It grows while nothing is received, whatever the server writes meanwhile: nobody would know of it. None at the very beginning."""
        if self.behind_since is not None:
            return max(0.0, now - self.behind_since)
        return 0.0 if self.phase == "streaming" else None


class DataKeys:
    """The data key at hand; a new one after `lifetime` seconds. Safe for several threads."""

    def __init__(self, keys: KeyService, clock: Clock, lifetime: float) -> None:
        self._keys, self._clock, self._lifetime = keys, clock, lifetime
        self._lock = threading.Lock()
        self._key: tuple[float, DataKey] | None = None

    def get(self) -> DataKey:
        with self._lock:
            now = self._clock.monotonic()
            if self._key is None or now - self._key[0] >= self._lifetime:
                self._key = (now, self._keys.new_data_key())
            return self._key[1]


def backoff(attempt: int, rng: Callable[[], float], *, first: float = 0.5, most: float = 30.0) -> float:
    """Seconds before the next try: doubling, at most `most`, half of it by chance, so that many receivers do not knock together."""
    return min(most, first * 2 ** min(attempt, 16)) * (0.5 + rng() / 2)


@dataclass
class _Job:
    """A put on its way. Kept in the order of the WAL; `future` is replaced when it is tried again."""

    name: str
    start: int
    end: int
    partial: bool
    body: bytes | bytearray
    meta: dict[str, Any]
    future: Future[bool] | None = None
    attempts: int = 0
    retry_at: float = 0.0
    failing_since: float | None = None


@dataclass
class _Sink:
    """Where the WAL of one session goes: repository, cluster, pool and keys."""

    repository: Repository
    system_identifier: int
    segment_size: int
    source: str
    pool: ThreadPoolExecutor
    keys: DataKeys
    clock: Clock
    state: TargetState
    wake: Callable[[], None] = lambda: None

    def put(self, job: _Job) -> bool:
        return self.repository.put_wal(
            self.system_identifier,
            job.name,
            job.body,
            data_key=self.keys.get(),
            meta=job.meta,
            partial=job.partial,
        )

    def submit(self, job: _Job) -> None:
        job.future = self.pool.submit(self.put, job)
        job.future.add_done_callback(lambda _: self.wake())


class Segments:
    """The WAL of one timeline on its way into the repository: cuts segments, keeps their order, knows what is durable."""

    def __init__(
        self,
        sink: _Sink,
        timeline: int,
        start: int,
        *,
        partial_every: float,
        partial_end: int = 0,
        note: Callable[[OpsError], None] = lambda _: None,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._sink = sink
        self._size = sink.segment_size
        self.timeline = timeline
        self.begin = start  # of the segment being filled
        self.received = start
        self._durable = max(start, partial_end)
        self._buffer = bytearray()
        self._jobs: deque[_Job] = deque()
        self._partial_every = partial_every
        self._partial_end = max(start, partial_end)  # never replace a stored .partial by a shorter one
        self._partial_due: float | None = None
        self._first_at: datetime | None = None
        self._last_at: datetime | None = None
        self._complete: tuple[int, datetime] | None = None
        self._note = note
        self._rng = rng
        self._arrivals: deque[tuple[int, float]] = deque()

    @property
    def durable(self) -> int:
        """Everything before this is in the store."""
        return min(self._durable, self.received)

    @property
    def full(self) -> bool:
        """No room for more: the caller stops reading, and TCP makes the server wait."""
        return len(self._jobs) >= IN_FLIGHT

    @property
    def idle(self) -> bool:
        return not self._jobs

    def unsettled(self) -> list[Future[bool]]:
        """Puts of which nobody knows yet whether they arrive."""
        return [job.future for job in self._jobs if job.future is not None and not job.future.done()]

    def behind_since(self) -> float | None:
        """When the oldest bytes that are not durable came (monotonic); None where all are."""
        while self._arrivals and self._arrivals[0][0] <= self.durable:
            self._arrivals.popleft()
        return self._arrivals[0][1] if self._arrivals else None

    def add(self, message: WalData) -> None:
        if message.start != self.received:
            raise OpsError(f"the server sent {Lsn(message.start)} where {Lsn(self.received)} comes next")
        now = self._sink.clock.monotonic()
        rest = message.data
        end = message.start + len(rest)
        if not self._arrivals or now - self._arrivals[-1][1] > 0.25:
            self._arrivals.append((end, now))
        else:
            self._arrivals[-1] = (end, self._arrivals[-1][1])
        if self._partial_due is None:
            self._partial_due = now + self._partial_every
        self._first_at = self._first_at or message.sent
        self._last_at = message.sent
        while rest:
            part = rest[: self._size - len(self._buffer)]
            self._buffer += part
            self.received += len(part)
            rest = rest[len(part) :]
            if self.received >= message.server_end:
                self._complete = (self.received, message.sent)
            if len(self._buffer) == self._size:
                self._segment_done(message.sent if rest else None)

    def caught_up(self, message: Keepalive) -> None:
        if self.received >= message.server_end:
            self._complete = (self.received, message.sent)

    def _meta(self) -> dict[str, Any]:
        complete = self._complete
        return {
            "timeline": self.timeline,
            "start_lsn": str(Lsn(self.begin)),
            "end_lsn": str(Lsn(self.received)),
            "segment_size": self._size,
            "first_at": self._first_at.isoformat() if self._first_at else None,
            "last_at": self._last_at.isoformat() if self._last_at else None,
            # The server's time at which everything that it had flushed is in here: None while a backlog is caught up.
            "complete_at": complete[1].isoformat() if complete and complete[0] >= self.begin else None,
            "source": self._sink.source,
        }

    def _segment_done(self, next_first: datetime | None) -> None:
        name = segment_name(self.timeline, self.begin, self._size)
        check_segment_head(self._buffer, self.begin, self._sink.system_identifier, f"{self._sink.source} {name}")
        self._push(_Job(name, self.begin, self.received, False, self._buffer, self._meta()))
        self._buffer = bytearray()
        self.begin = self.received
        self._first_at = self._last_at = next_first
        self._partial_due = None if next_first is None else self._sink.clock.monotonic() + self._partial_every

    def _push(self, job: _Job) -> None:
        self._jobs.append(job)
        self._sink.submit(job)

    def put_partial(self, *, now: bool = False) -> None:
        """Store the unfinished segment where it grew and its time has come (or at once)."""
        if self.received <= max(self.begin, self._partial_end) or any(job.partial for job in self._jobs):
            return
        clock = self._sink.clock.monotonic()
        if not now and (self._partial_due is None or clock < self._partial_due):
            return
        name = segment_name(self.timeline, self.begin, self._size)
        check_segment_head(self._buffer, self.begin, self._sink.system_identifier, f"{self._sink.source} {name}")
        self._partial_end = self.received
        self._partial_due = None
        self._push(_Job(name, self.begin, self.received, True, bytes(self._buffer), self._meta()))

    def settle(self) -> None:
        """Take in what the pool has finished, in order; try again what failed. Raises what trying again cannot mend."""
        now = self._sink.clock.monotonic()
        for job in self._jobs:
            self._look_after(job, now)
        while self._jobs and (future := self._jobs[0].future) is not None and future.done():
            self._done(self._jobs.popleft())

    def _look_after(self, job: _Job, now: float) -> None:
        if job.future is None:
            if now >= job.retry_at:
                self._sink.submit(job)
            return
        error = job.future.exception() if job.future.done() else None
        if error is None:
            return
        if not isinstance(error, OpsError) or isinstance(error, (ConflictError, CorruptionError)):
            raise error
        self._note(error)
        job.failing_since = job.failing_since or now
        if now - job.failing_since > STALL_AFTER:
            raise UnreachableError(
                f"{job.name} could not be stored for {STALL_AFTER:.0f} s: {error.what}; the server keeps the WAL meanwhile",
                where=error.where,
                remedy=error.remedy,
            ) from error
        job.retry_at = now + backoff(job.attempts, self._rng, most=10.0)
        job.attempts += 1
        job.future = None

    def _done(self, job: _Job) -> None:
        self._durable = max(self._durable, job.end)
        state = self._sink.state
        if job.partial:
            state.partials += 1
            return
        state.segments += 1
        state.raw_bytes += job.end - job.start
        self._sink.pool.submit(self._drop_partial, job.name)

    def _drop_partial(self, name: str) -> None:
        key = self._sink.repository.wal_key(self._sink.system_identifier, name, partial=True)
        # A leftover beside the whole segment is ignored by every reader, so a failure here costs nothing but space.
        with contextlib.suppress(OpsError):
            self._sink.repository.store.delete(key)

    def next_event(self) -> float:
        """Seconds until something must be done without the server or the pool saying anything."""
        now = self._sink.clock.monotonic()
        times = [job.retry_at for job in self._jobs if job.future is None]
        if self._partial_due is not None and self.received > self._partial_end:
            times.append(self._partial_due)
        return max(0.0, min(times) - now) if times else STATUS_EVERY


class _Waker:
    """Lets the pool wake a thread that waits in poll."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._lock = threading.RLock()  # a signal handler may wake while its own thread does
        self._open = True

    def watch(self, poller: select.poll) -> None:
        poller.register(self._read, select.POLLIN)

    def wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._open:
                os.write(self._write, b"!")

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        with self._lock:
            self._open = False
            os.close(self._read)
            os.close(self._write)


class TargetReceiver:
    """One target's reception: finds the primary, begins where the archive ends, follows timelines, comes back after errors."""

    def __init__(
        self,
        access: Access,
        target: Target,
        pool: ThreadPoolExecutor,
        *,
        clock: Clock = SYSTEM_CLOCK,
        key_lifetime: float = KEY_LIFETIME,
        accept_cluster: int | None = None,
        log: Callable[[str, str], None] = lambda _target, _text: None,
        rng: Callable[[], float] = random.random,
        most_backoff: float = 30.0,
    ) -> None:
        self.access, self.target, self._pool, self._clock = access, target, pool, clock
        self.state = TargetState(target.id, slot=target.wal.slot)
        self._repository: Repository | None = None
        self._keys: DataKeys | None = None
        self._key_lifetime = key_lifetime
        self._accept = accept_cluster
        self._log, self._rng, self._most_backoff = log, rng, most_backoff
        self._stop = threading.Event()
        self._waker = _Waker()
        self._slot_checked = -SLOT_CHECK_EVERY
        self._slot_check: Future[None] | None = None
        self._lost: tuple[Start, str] | None = None
        self._unsettled: list[Future[bool]] = []

    def stop(self) -> None:
        self._stop.set()
        self._waker.wake()

    def run(self) -> None:
        """Until `stop`. Every error is noted, waited for with back-off, and tried again: somebody may mend it."""
        attempt = 0
        while not self._stop.is_set():
            before = self.state.durable
            try:
                self._follow()
            except OpsError as error:
                self._trouble(error)
            except Exception as error:  # noqa: BLE001 - one target's bug must not end the others' reception
                self._trouble(OpsError(f"unexpected {type(error).__name__}: {error}", where=self.target.id))
            if self._stop.is_set():
                break
            attempt = 0 if self.state.durable > before else attempt + 1
            self.state.phase = "waiting"
            if self.state.behind_since is None:
                self.state.behind_since = self._clock.monotonic()
            self.state.reconnects += 1
            self._pause(backoff(attempt, self._rng, most=self._most_backoff))
        self.state.phase = "stopped"
        self._waker.close()

    def _pause(self, seconds: float) -> None:
        end = self._clock.monotonic() + seconds
        while not self._stop.is_set() and (left := end - self._clock.monotonic()) > 0:
            self.state.alive_at = self._clock.monotonic()
            self._look_at_slot(self.state.alive_at)
            self._stop.wait(min(left, 1.0))

    def _trouble(self, error: OpsError) -> None:
        text = str(error)
        if text != self.state.last_error or self.state.phase == "streaming":
            self._log(self.target.id, text)
        self.state.last_error, self.state.last_error_kind = text, type(error).__name__.removesuffix("Error")
        self.state.last_error_at = self._clock.now()

    def _open(self) -> tuple[Repository, DataKeys]:
        if self._repository is None or self._keys is None:
            self._repository = open_target_repository(self.access, self.target)
            self._keys = DataKeys(self._repository.keys, self._clock, self._key_lifetime)
        return self._repository, self._keys

    def _follow(self) -> None:
        """One connection, from finding the primary to the end of the stream."""
        self.state.phase = "starting"
        repository, keys = self._open()
        keys.get()  # a sealed key service is found out before the server is kept waiting
        self._settle_last()
        member = find_primary(self.access, self.target)
        where = f"{member.host}:{member.port}"
        stream = WalStream(self.access.replication(self.target, member), where, self._clock)
        try:
            sysid, timeline, _ = stream.identify()
            size = stream.segment_size()
            self._check_cluster(repository, sysid, where)
            sink = _Sink(repository, sysid, size, where, self._pool, keys, self._clock, self.state, self._waker.wake)
            line = store_histories(stream, repository, keys, sysid, timeline)
            start = self._begin(stream, sink, line)
            self.state.member, self.state.system_identifier, self.state.timeline = where, sysid, start.timeline
            self._waker.watch(stream.poller)
            self._stream_line(stream, sink, start)
        finally:
            stream.close()

    def _settle_last(self) -> None:
        """Nothing of the last connection may still be on its way: a late `.partial` would replace a longer one of the next."""
        self._unsettled = [future for future in self._unsettled if not future.cancel() and not future.done()]
        if self._unsettled:
            raise UnreachableError(
                f"{len(self._unsettled)} puts of the last connection are still on their way",
                where=self.target.id,
                remedy="look at the store's health; the server keeps the WAL meanwhile",
            )

    def _check_cluster(self, repository: Repository, sysid: int, where: str) -> None:
        known = {int(name) for name in repository.store.list_folders(repository.wal_prefix()) if name.isdigit()}
        if known and sysid not in known and sysid != self._accept:
            raise ConflictError(
                f"this is the cluster {sysid}; the archive of {self.target.id} holds {', '.join(map(str, sorted(known)))}",
                where=where,
                remedy="correct the hosts in the inventory; after pg_upgrade or a new initdb accept it once: "
                f"ops wal receive {self.target.id} --accept-cluster {sysid}",
            )

    def _begin(self, stream: WalStream, sink: _Sink, line: list[Span]) -> Start:
        """Make the slot where it is missing or lost, and say where reception begins."""
        slot = slot_state(self.access, self.target)
        if slot is not None and slot.kind != "physical":
            raise ConflictError(
                f"the slot {self.target.wal.slot} is a {slot.kind} one",
                where=stream.where,
                remedy=f"name another under targets.{self.target.id}.wal.slot",
            )
        if slot is not None and slot.wal_status == "lost":
            self._log(self.target.id, f"the slot {self.target.wal.slot} lost its WAL; it is made anew")
            stream.drop_slot(self.target.wal.slot)
            slot = None
        if slot is None or slot.restart_lsn is None:
            if slot is not None:
                stream.drop_slot(self.target.wal.slot)
            stream.create_slot(self.target.wal.slot)
            slot = slot_state(self.access, self.target)
        if self._lost is not None:
            slot = self._note_gap(stream, sink, line, slot, *self._lost)
            self._lost = None
        listing = sink.repository.wal_listing(sink.system_identifier)
        notes = gap_notes(sink.repository, sink.system_identifier)
        self.state.gaps = len(notes)
        lost = {name for note in notes for name in note.names(sink.segment_size)}
        restart = slot.restart_lsn if slot else None
        start = plan_start(stock(listing, sink.segment_size), line, restart, sink.segment_size, lost)
        if start is None:
            raise OpsError(f"the slot {self.target.wal.slot} holds no position", where=stream.where)
        return start

    def _stream_line(self, stream: WalStream, sink: _Sink, start: Start) -> None:
        """Stream from `start`, timeline after timeline, until stopped or the connection ends."""
        while True:
            self.state.timeline = start.timeline
            segments = Segments(
                sink,
                start.timeline,
                start.lsn,
                partial_every=self.target.wal.partial_every.total_seconds(),
                partial_end=stored_partial(sink.repository, sink.system_identifier, start, sink.segment_size),
                note=self._trouble,
                rng=self._rng,
            )
            try:
                end = self._stream(stream, segments, start)
            except WalRemovedError as error:
                self._lost = (Start(start.timeline, Lsn(segments.begin)), error.what)  # noted once we are back
                raise
            except SlotActiveError as error:
                raise ConflictError(
                    f"the slot {self.target.wal.slot} is in use by process {error.pid} of the server "
                    f"({slot_holder(self.access, self.target, error.pid)})",
                    where=stream.where,
                    remedy="one receiver serves a target; this one waits until the other ends",
                ) from error
            finally:
                self._goodbye(segments)
            if end is None:
                stream.status(segments.received, segments.durable)
                stream.finish()
                return
            if end.timeline is None or end.lsn is None:
                raise UnreachableError("the server ended the stream: it shuts down", where=stream.where)
            if not segments.idle or segments.durable < segments.received:
                raise UnreachableError("the end of the timeline could not be stored yet", where=stream.where)
            self._log(self.target.id, f"timeline {start.timeline} ended at {end.lsn}; following {end.timeline}")
            store_histories(stream, sink.repository, sink.keys, sink.system_identifier, end.timeline)
            start = Start(end.timeline, floor(end.lsn, sink.segment_size))

    def _stream(self, stream: WalStream, segments: Segments, start: Start) -> CopyEnd | None:
        """None when stopped. A timeline's last bytes and a stream's end are left in `segments` for the goodbye."""
        ended = stream.start(start.timeline, start.lsn, self.target.wal.slot)
        if ended is not None:
            return ended
        self._note_streaming(segments)
        reported, reported_at = 0, self._clock.monotonic()
        while not self._stop.is_set():
            quiet = True
            # Twice: TLS may hold decrypted bytes of which the socket says nothing.
            for _ in range(2):
                if segments.full or not quiet:
                    break
                stream.consume()
                quiet, ended = self._take(stream, segments)
                if ended is not None:
                    return ended
            segments.put_partial()
            segments.settle()
            now = self._clock.monotonic()
            self._publish(segments, now)
            if segments.durable > reported or now - reported_at >= STATUS_EVERY:
                stream.status(segments.received, segments.durable)
                reported, reported_at = segments.durable, now
            if quiet:
                stream.wait(min(1.0, segments.next_event()), readable=not segments.full)
                self._waker.drain()
        return None

    def _take(self, stream: WalStream, segments: Segments) -> tuple[bool, CopyEnd | None]:
        """Handle the messages that are here, while there is room: (there was none, the stream's end)."""
        quiet = True
        for message in stream.messages():
            quiet = False
            if isinstance(message, CopyEnd):
                return quiet, message
            self.state.server_end = max(self.state.server_end, message.server_end)
            if isinstance(message, Keepalive):
                segments.caught_up(message)
                if message.reply:
                    # Asked before the server shuts down, too: it waits until everything sent is confirmed.
                    segments.put_partial(now=True)
                    stream.status(segments.received, segments.durable)
            else:
                segments.add(message)
                if segments.full:
                    break
        return quiet, None

    def _note_streaming(self, segments: Segments) -> None:
        self.state.phase = "streaming"
        self.state.last_error = self.state.last_error_kind = None
        self.state.received, self.state.durable = segments.received, segments.durable
        self.state.server_end = segments.received
        self._log(self.target.id, f"streaming from {Lsn(segments.begin)} on timeline {segments.timeline}")

    def receive_once(self, start_lsn: Lsn, end_lsn: Lsn, timeline: int) -> int:
        """See `receive_range`."""
        repository, keys = self._open()
        keys.get()
        member = find_primary(self.access, self.target)
        where = f"{member.host}:{member.port}"
        stream = WalStream(self.access.replication(self.target, member), where, self._clock)
        try:
            sysid, current, _ = stream.identify()
            size = stream.segment_size()
            self._check_cluster(repository, sysid, where)
            store_histories(stream, repository, keys, sysid, current)
            sink = _Sink(repository, sysid, size, where, self._pool, keys, self._clock, self.state, self._waker.wake)
            self._waker.watch(stream.poller)
            start = Start(timeline, floor(start_lsn, size))
            partial_end = stored_partial(repository, sysid, start, size)
            segments = Segments(
                sink, timeline, start.lsn, partial_every=3600, partial_end=partial_end, note=self._trouble
            )
            # The last segment to its end, where the server has that much (a primary switches when a backup ends): an unfinished one
            # counts only as long as it is the newest, and this backup is to outlive the next one.
            whole = floor(end_lsn + size - 1, size)
            if stream.start(start.timeline, start.lsn, None) is None:
                while segments.received < max(end_lsn, min(whole, self.state.server_end)):
                    stream.wait(1.0, readable=not segments.full)
                    self._waker.drain()
                    if not segments.full:
                        stream.consume()
                        if self._take(stream, segments)[1] is not None:
                            break
                    segments.settle()
            self._goodbye(segments)
            if segments.durable < end_lsn:
                cause = f": {self.state.last_error}" if self.state.last_error else ""
                raise UnreachableError(
                    f"WAL up to {end_lsn} could not be stored, only to {Lsn(segments.durable)}{cause}", where=where
                )
            return segments.received - start.lsn
        finally:
            stream.close()
            self._waker.close()

    def _publish(self, segments: Segments, now: float) -> None:
        state = self.state
        state.received, state.durable = segments.received, segments.durable
        state.behind_since, state.alive_at = segments.behind_since(), now
        if segments.idle and state.last_error:
            state.last_error = state.last_error_kind = None
        self._look_at_slot(now)

    def _look_at_slot(self, now: float) -> None:
        if now - self._slot_checked >= SLOT_CHECK_EVERY and (self._slot_check is None or self._slot_check.done()):
            self._slot_checked = now
            self._slot_check = self._pool.submit(self._check_slot)

    def _check_slot(self) -> None:
        state = self.state
        try:
            slot = slot_state(self.access, self.target)
        except OpsError:
            state.slot_status, state.slot_retained, state.server_asked = None, None, False
            return
        state.slot_status = slot.wal_status if slot else "missing"
        state.slot_retained = slot.retained if slot else None
        state.server_asked = slot is not None and slot.restart_lsn is not None and slot.retained is not None
        if slot is not None and slot.restart_lsn is not None and slot.retained is not None:
            # While nothing is received the server's position is known by this question alone.
            state.server_end = max(state.server_end, slot.restart_lsn + slot.retained)

    def _goodbye(self, segments: Segments) -> None:
        """Store what was received, whatever ended the stream: the server's disk may be gone."""
        deadline = self._clock.monotonic() + GOODBYE
        with contextlib.suppress(OpsError):
            segments.put_partial(now=True)
            while not segments.idle and self._clock.monotonic() < deadline:
                segments.settle()
                segments.put_partial(now=True)
                if not segments.idle:
                    select.select([], [], [], 0.02)
        self._unsettled = segments.unsettled()
        self.state.received, self.state.durable = segments.received, segments.durable

    def _note_gap(
        self, stream: WalStream, sink: _Sink, line: list[Span], slot: SlotState | None, lost: Start, cause: str
    ) -> SlotState | None:
        """Write down what the server no longer has, up to the position from which the slot holds WAL."""

        def held(state: SlotState | None) -> Lsn:
            return floor(state.restart_lsn, sink.segment_size) if state and state.restart_lsn is not None else Lsn(0)

        if held(slot) <= lost.lsn:
            stream.drop_slot(self.target.wal.slot)
            stream.create_slot(self.target.wal.slot)
            slot = slot_state(self.access, self.target)
        for note in gap_pieces(line, lost, held(slot), sink.segment_size, cause, self._clock.now()):
            put_gap(sink.repository, sink.system_identifier, note)
            self._log(
                self.target.id,
                f"GAP on timeline {note.timeline}: the WAL files {note.first} to {note.last} are lost ({cause}); "
                "no moment after them can be restored from an older backup: take a full backup now",
            )
        return slot


def gap_pieces(
    line: list[Span], lost: Start, again: Lsn, segment_size: int, cause: str, now: datetime
) -> list[GapNote]:
    """The lost segments from `lost` up to `again` (exclusive), one note for each timeline."""
    found: list[GapNote] = []
    for span in line:
        if span.timeline < lost.timeline:
            continue
        begin = max(lost.lsn, floor(span.begin, segment_size))
        # With the segment in which the timeline was left: where it stands on the child alone, that one is lost, too.
        end = min(again, again if span.end is None else floor(span.end + segment_size - 1, segment_size))
        if begin < end:
            names = [segment_name(span.timeline, at, segment_size) for at in (begin, end - segment_size)]
            found.append(GapNote(span.timeline, names[0], names[1], cause, now))
    return found


def find_primary(access: Access, target: Target) -> Member:
    """The one member that is not in recovery. Members of different clusters, none or two primaries are errors."""
    members = access.members(target)
    answered = [member for member in members if member.error is None]
    clusters = {member.system_identifier for member in answered if member.system_identifier}
    where = ", ".join(f"{member.host}:{member.port}" for member in members)
    if len(clusters) > 1:
        raise ConflictError(
            f"the hosts belong to different clusters ({', '.join(map(str, sorted(clusters)))})",
            where=where,
            remedy=f"correct targets.{target.id}.connection.hosts",
        )
    primaries = [member for member in answered if member.in_recovery is False]
    if not primaries:
        errors = "; ".join(f"{member.host}:{member.port}: {member.error}" for member in members if member.error)
        raise UnreachableError(
            "no primary answers" + (f" ({errors})" if errors else ": all members are in recovery"), where=where
        )
    newest = max(member.timeline or 0 for member in primaries)
    leading = [member for member in primaries if (member.timeline or 0) == newest]
    if len(leading) > 1:
        raise ConflictError("two members say that they are the primary of the same timeline", where=where)
    return leading[0]


def store_histories(
    stream: WalStream, repository: Repository, keys: DataKeys, system_identifier: int, timeline: int
) -> list[Span]:
    """Store the timeline's history file and those of its ancestors; the line of descent.

    Raises ConflictError where the archive has another history under the same number.
    """
    line = [Span(1, Lsn(0), None)]
    if timeline == 1:
        return line
    line = parse_history(timeline, stream.history(timeline))
    for span in line:
        if span.timeline == 1:
            continue
        try:
            content = stream.history(span.timeline)
        except OpsError:
            if span.timeline == timeline:
                raise
            continue  # an ancestor's file that the server no longer keeps: its content is part of ours
        repository.put_wal(
            system_identifier,
            history_name(span.timeline),
            content,
            data_key=keys.get(),
            meta={"timeline": span.timeline, "source": stream.where},
        )
    return line


def stored_partial(repository: Repository, system_identifier: int, start: Start, segment_size: int) -> int:
    """The position up to which the store holds the unfinished segment that begins at `start`; 0 for nothing."""
    name = segment_name(start.timeline, start.lsn, segment_size)
    try:
        header = read_wal_header(repository, system_identifier, name, partial=True)
    except CorruptionError:
        return 0  # worth nothing: it is replaced
    return start.lsn + header.raw if header is not None else 0


class Receiver:
    """All targets of one process. `run` returns after `stop` when every target has stored what it had received."""

    def __init__(
        self,
        access: Access,
        targets: Iterable[Target],
        *,
        workers: int | None = None,
        clock: Clock = SYSTEM_CLOCK,
        key_lifetime: float = KEY_LIFETIME,
        accept_cluster: int | None = None,
        log: Callable[[str, str], None] = lambda _target, _text: None,
        most_backoff: float = 30.0,
    ) -> None:
        chosen = list(targets)
        # Two threads keep two cores busy with compression; more of them only cover the store's latency.
        count = workers or min(16, max(4, 2 * (os.cpu_count() or 1), len(chosen) // 8))
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="wal-put")
        self._clock = clock
        self.receivers = [
            TargetReceiver(
                access,
                target,
                self._pool,
                clock=clock,
                key_lifetime=key_lifetime,
                accept_cluster=accept_cluster,
                log=log,
                most_backoff=most_backoff,
            )
            for target in chosen
        ]
        self._threads: list[threading.Thread] = []

    @property
    def states(self) -> list[TargetState]:
        return [receiver.state for receiver in self.receivers]

    def start(self) -> None:
        for receiver in self.receivers:
            thread = threading.Thread(target=receiver.run, name=f"wal-{receiver.target.id}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Ask every target to finish. May be called from a signal handler."""
        for receiver in self.receivers:
            receiver.stop()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the targets' ends; True when all have."""
        deadline = None if timeout is None else self._clock.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - self._clock.monotonic()))
        done = not any(thread.is_alive() for thread in self._threads)
        if done:
            self._pool.shutdown(wait=True)
        return done

    def dead(self) -> list[str]:
        """Targets whose thread has ended without being asked to: never expected, so health says it."""
        return [
            receiver.target.id
            for receiver, thread in zip(self.receivers, self._threads, strict=False)
            if not thread.is_alive() and receiver.state.phase != "stopped"
        ]


def receive_range(
    access: Access, target: Target, start_lsn: int, end_lsn: int, timeline: int, *, clock: Clock = SYSTEM_CLOCK
) -> int:
    """Put the WAL from `start_lsn` to `end_lsn` into the archive once, without a slot; the bytes received.

    For a base backup of a target that has no receiver running. Where the last segment is unfinished it is stored as `.partial`.
    Raises WalRemovedError where the server no longer has it.
    """
    receiver_pool = ThreadPoolExecutor(2, thread_name_prefix="wal-put")
    one = TargetReceiver(access, target, receiver_pool, clock=clock)
    try:
        return one.receive_once(Lsn(start_lsn), Lsn(end_lsn), timeline)
    finally:
        receiver_pool.shutdown(wait=True)
