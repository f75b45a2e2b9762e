"""The timed parts of a verification, whatever it verifies."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from ops_platform.recovery.model import Step


@dataclass
class Moved:
    """How many bytes a part moved, where it says so."""

    bytes: int | None = None


class Steps:
    """`taken`: the parts so far, each with its place in the time since the verification began."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.taken: list[Step] = []

    @contextmanager
    def timed(self, name: str) -> Generator[Moved]:
        """Time a part; it is written down even where it fails."""
        began, moved = time.monotonic(), Moved()
        try:
            yield moved
        finally:
            now = time.monotonic()
            started, seconds = round(began - self._began, 3), round(now - began, 3)
            self.taken.append(Step(name=name, started=started, seconds=seconds, bytes=moved.bytes))
