"""Time as a dependency, so that tests decide what time it is and nothing waits by sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """The wall clock, aware, in UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back: for durations, whatever NTP does to the wall clock."""
        ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


SYSTEM_CLOCK: Clock = SystemClock()


def wait_until(holds: Callable[[], bool], *, clock: Clock, seconds: float, every: float = 0.2) -> bool:
    """Ask until it holds or the time is over; asked once at least. Whether it holds."""
    deadline = clock.monotonic() + seconds
    while not holds():
        if clock.monotonic() >= deadline:
            return False
        clock.sleep(every)
    return True
