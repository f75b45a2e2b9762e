"""WAL on its way from a stream into the repository: cut into segments, sealed and put by a pool, in order, confirmed when it is durable.

Pure of the connection: what arrives is handed to `Segments`, which knows from where on the server may forget it.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ops_platform.backup.model import Lsn, segment_name
from ops_platform.backup.repository import Repository
from ops_platform.backup.wal import check_segment_head
from ops_platform.backup.walstream import Keepalive, WalData
from ops_platform.clients.keys import DataKey, KeyService
from ops_platform.clock import Clock
from ops_platform.errors import ConflictError, CorruptionError, OpsError, UnreachableError

IN_FLIGHT = 3
STALL_AFTER = 60.0


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
class Sink:
    """Where the WAL of one session goes: repository, cluster, pool and keys."""

    repository: Repository
    system_identifier: int
    segment_size: int
    source: str
    pool: ThreadPoolExecutor
    keys: DataKeys
    clock: Clock
    stored: Callable[[bool, int], None]  # whether it was the unfinished segment, and its bytes
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
        sink: Sink,
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
        self._sink.stored(job.partial, job.end - job.start)
        if not job.partial:
            self._sink.pool.submit(self._drop_partial, job.name)

    def _drop_partial(self, name: str) -> None:
        key = self._sink.repository.wal_key(self._sink.system_identifier, name, partial=True)
        # A leftover beside the whole segment is ignored by every reader, so a failure here costs nothing but space.
        with contextlib.suppress(OpsError):
            self._sink.repository.store.delete(key)

    def next_event(self) -> float:
        """Seconds until something must be done without the server or the pool saying anything; infinite where nothing is."""
        now = self._sink.clock.monotonic()
        times = [job.retry_at for job in self._jobs if job.future is None]
        if self._partial_due is not None and self.received > self._partial_end:
            times.append(self._partial_due)
        return max(0.0, min(times) - now) if times else math.inf
