"""Ctrl-C and SIGTERM end a command, also where somebody's code swallowed the exception that says so.

Python tells of a signal by raising in whatever runs at that moment. An HTTP response that nobody holds any more closes itself, and
`io` clears what is raised there (`iobase_finalize` in CPython); a bare `except:` around an import does the same. That is then
the end of the interruption, and a restore that was stopped goes on. So the signal is raised again until the program unwinds.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

_AGAIN_SECONDS = 0.5


def watch() -> None:
    """SIGINT raises KeyboardInterrupt, SIGTERM SystemExit(143): both unwind, so that sandboxes and locks go.

    A shell has what it puts into the background ignore SIGINT, which is for what stands in front: so it stays.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _terminated)


def unwound() -> None:
    """The interruption has arrived where it should."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupted(_number: int, _frame: Any) -> NoReturn:
    _raise(KeyboardInterrupt)


def _terminated(_number: int, _frame: Any) -> NoReturn:
    _raise(SystemExit)


def _raise(what: type[BaseException]) -> NoReturn:
    signal.signal(signal.SIGALRM, lambda _number, _frame: _look(what))
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
    raise what(143) if what is SystemExit else what()


def _look(what: type[BaseException]) -> None:
    """Raise again, unless what runs now is a `finally`, an `except` or the end of a generator on the way out."""
    if not _unwinding(sys.exc_info()[1]):
        _raise(what)


def _unwinding(error: BaseException | None) -> bool:
    """Whether an end of the program is being handled, or is what another error was raised from."""
    for _ in range(1000):  # somebody may have made a ring of them
        if error is None:
            return False
        if not isinstance(error, Exception):
            return True
        error = error.__context__
    return True
