"""The WAL receiver: all targets of one process, a thread for each target's reception, and one small pool that compresses, seals and puts.

Idle connections wait in `poll`. What is kept in memory is bounded: of each target the segment being filled, and `IN_FLIGHT` behind it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ops_platform.backup.model import Lsn
from ops_platform.backup.reception import KEY_LIFETIME, TargetReceiver, TargetState
from ops_platform.clock import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target


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
