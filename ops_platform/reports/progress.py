"""Bytes on their way: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from ops_platform.backup.model import Progress
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.counting import duration, size
from ops_platform.reports.words import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

EVERY = 10.0
LONG_ENOUGH = 1.0  # seconds before a rate is said: blocks that end together say nothing about how fast they came


@contextmanager
def progress_bar(title: str = "", *, stream: TextIO | None = None, clock: Clock = SYSTEM_CLOCK) -> Generator[Progress]:
    """Gives a `Progress` to hand to whatever moves bytes; it may be called from several threads. Writes to stderr by default.

    `title` stands before each step, such as the target's id.
    """
    out = stream or sys.stderr
    if not out.isatty():
        lines = _Lines(out, title, clock)
        try:
            yield lines
        finally:
            lines.finish()
        return
    from rich.console import Console

    with _Bars(Console(file=out), title) as bars:
        yield bars


@dataclass
class _Seen:
    first: tuple[float, int]  # when and where the step was first heard of: a resumed one does not begin at zero
    said: tuple[float, int]
    last: int
    total: int | None


class _Lines:
    """For logs and pipes: a line when a step begins, every ten seconds, and when it is done."""

    def __init__(self, out: TextIO, title: str, clock: Clock) -> None:
        self._out = out
        self._title = title
        self._clock = clock
        self._steps: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        with self._lock:
            now = self._clock.monotonic()
            seen = self._steps.get(step)
            if seen is None:
                seen = self._steps[step] = _Seen((now, done), (now, done), done, total)
                self._say(step, seen, now)
                return
            complete = total is not None and done >= total > seen.last
            seen.last, seen.total = done, total
            if complete or now - seen.said[0] >= EVERY:
                self._say(step, seen, now)

    def _say(self, step: str, seen: _Seen, now: float) -> None:
        (since, before), seen.said = seen.said, (now, seen.last)
        text = plain(f"{self._title} {step}".strip())
        if seen.total:
            share = min(100 * seen.last // seen.total, 100)
            text += f": {size(seen.last)} of {size(seen.total)} ({share} %)"
        elif seen.last:
            text += f": {size(seen.last)}"
        rate = (seen.last - before) / (now - since) if now - since >= LONG_ENOUGH else 0.0
        if rate > 0:
            text += f", {size(rate)}/s"
            if seen.total and seen.total > seen.last:
                text += f", {duration(round((seen.total - seen.last) / rate))} left"
        encoding = self._out.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=self._out, flush=True)

    def finish(self) -> None:
        """What was never said to be complete is said once more, with all that was heard."""
        with self._lock:
            now = self._clock.monotonic()
            for step, seen in self._steps.items():
                if seen.last != seen.said[1]:
                    self._say(step, seen, now)


class _Bars:
    """One bar for each step, in the order in which the steps were first heard of."""

    def __init__(self, console: Console, title: str) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.text import Text

        class Figures(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(_figures(task.completed, task.total, task.speed, task.time_remaining), no_wrap=True)

        name = TextColumn("{task.description}", markup=False)
        self._progress = Progress(name, BarColumn(bar_width=None), Figures(), console=console, expand=True)
        self._title = title
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        with self._lock:
            if step not in self._tasks:
                self._tasks[step] = self._progress.add_task(
                    plain(f"{self._title} {step}".strip()), total=total, completed=done
                )
        self._progress.update(self._tasks[step], completed=done, total=total)


def _figures(done: float, total: float | None, rate: float | None, left: float | None) -> str:
    if not done and not total:
        return ""
    parts = [f"{size(done)} of {size(total)}" if total else size(done)]
    if rate:
        parts.append(f"{size(rate)}/s")
    if left:
        parts.append(f"{duration(round(left))} left")
    return "  ".join(parts)
