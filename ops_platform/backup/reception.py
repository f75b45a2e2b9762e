"""The reception of one target's WAL: streams it into the repository and confirms to the server only what is durable there.

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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from ops_platform.backup.archive import SlotState, read_wal_header, slot_holder, slot_state
from ops_platform.backup.gapnotes import GapNote, gap_notes, put_gap
from ops_platform.backup.model import Lsn, segment_name
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository
from ops_platform.backup.wal import Span, Start, floor, history_name, parse_history, plan_start, stock
from ops_platform.backup.walsegments import DataKeys, Segments, Sink, backoff
from ops_platform.backup.walstream import CopyEnd, Keepalive, SlotActiveError, WalRemovedError, WalStream
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, CorruptionError, OpsError, UnreachableError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target

STATUS_EVERY = 10.0
SLOT_CHECK_EVERY = 30.0
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

    def stored(self, partial: bool, size: int) -> None:
        """A segment is in the store, or an unfinished one."""
        if partial:
            self.partials += 1
        else:
            self.segments += 1
            self.raw_bytes += size


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
        member = self.access.member(self.target)
        where = member.address
        stream = WalStream(self.access.replication(self.target, member), where, self._clock)
        try:
            sysid, timeline, _ = stream.identify()
            size = stream.segment_size()
            self._check_cluster(repository, sysid, where)
            sink = self._sink(repository, keys, sysid, size, where)
            line = store_histories(stream, repository, keys, sysid, timeline)
            start = self._begin(stream, sink, line)
            self.state.member, self.state.system_identifier, self.state.timeline = where, sysid, start.timeline
            self._waker.watch(stream.poller)
            self._stream_line(stream, sink, start)
        finally:
            stream.close()

    def _sink(self, repository: Repository, keys: DataKeys, sysid: int, size: int, where: str) -> Sink:
        return Sink(repository, sysid, size, where, self._pool, keys, self._clock, self.state.stored, self._waker.wake)

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

    def _begin(self, stream: WalStream, sink: Sink, line: list[Span]) -> Start:
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

    def _stream_line(self, stream: WalStream, sink: Sink, start: Start) -> None:
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
        member = self.access.member(self.target)
        where = member.address
        stream = WalStream(self.access.replication(self.target, member), where, self._clock)
        try:
            sysid, current, _ = stream.identify()
            size = stream.segment_size()
            self._check_cluster(repository, sysid, where)
            store_histories(stream, repository, keys, sysid, current)
            sink = self._sink(repository, keys, sysid, size, where)
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
        self, stream: WalStream, sink: Sink, line: list[Span], slot: SlotState | None, lost: Start, cause: str
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
