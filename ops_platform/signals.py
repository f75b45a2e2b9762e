"""Ctrl-C and SIGTERM end a command or a run, also where somebody's code swallowed the exception that says so.

Python tells of a signal by raising in whatever runs at that moment. An HTTP response that nobody holds any more closes itself, and
`io` clears what is raised there (`iobase_finalize` in CPython); a bare `except:` around an import does the same. That is then
the end of the interruption, and a restore that was stopped goes on. So the signal is raised again until the program unwinds.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_AGAIN_SECONDS = 0.5


class _Insisting:
    """A handler that is asked again each half second, unless what runs then is a `finally`, an `except` or the end of a generator on the way out."""

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self._handler = handler
        self.told: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.told = number
        signal.signal(signal.SIGALRM, lambda _number, frame: self._look(frame))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
        self._handler(number, frame)

    def _look(self, frame: FrameType | None) -> None:
        if not _unwinding(sys.exc_info()[1]):
            self.remind(frame)

    def remind(self, frame: FrameType | None = None) -> None:
        if self.told is not None:
            self._handler(self.told, frame)


def watch() -> None:
    """SIGINT raises KeyboardInterrupt, SIGTERM SystemExit(143): both unwind, so that sandboxes and locks go.

    A shell has what it puts into the background ignore SIGINT, which is for what stands in front: so it stays.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _Insisting(_interrupted))
    signal.signal(signal.SIGTERM, _Insisting(_terminated))


def unwound() -> None:
    """The interruption has arrived where it should."""
    signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def insisting() -> Generator[None]:
    """What the handlers of whoever runs us (Dagster) raise ends this block, whatever becomes of it in there."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are told to another
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: _Insisting(handler) for number, handler in found.items() if callable(handler)}
    try:
        for number, handler in ours.items():
            signal.signal(number, handler)
        yield
        _remind(ours.values())  # swallowed just now
    except Exception:
        # Or made another error of: that is not to be read as a failure after which the next has its turn.
        _remind(ours.values())
        raise
    finally:
        if any(handler.told is not None for handler in ours.values()):
            unwound()  # the alarm may be somebody else's otherwise
        for number in ours:
            signal.signal(number, found[number])


def _remind(handlers: Iterable[_Insisting]) -> None:
    for handler in handlers:
        handler.remind()


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


def _unwinding(error: BaseException | None) -> bool:
    """Whether an end of the program is being handled, or is what another error was raised from."""
    for _ in range(1000):  # somebody may have made a ring of them
        if error is None:
            return False
        if not isinstance(error, Exception):
            return True
        error = error.__context__
    return True
