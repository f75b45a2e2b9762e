"""Child processes that outlive the command that started them, known by pid *and* start time.

A pid alone is not an identity: after a crash or a reboot another program may have it, and must neither be taken for ours
nor be stopped by us.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process of ours. `started` is field 22 of /proc/PID/stat: clock ticks since boot."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        return _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    """None for a process that is not there, or that is only waiting to be collected by its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def identify(pid: int) -> Process | None:
    started = _started(pid)
    return None if started is None else Process(pid, started)


def spawn(command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, **popen: Any) -> Process:
    """Start in a session of its own, so that Ctrl-C at the terminal does not reach it. Output goes to `log`."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd="/",
            start_new_session=True,
            env={**os.environ, **(env or {})},
            **popen,
        )
    return identify(child.pid) or Process(child.pid, -1)


def without_libpq() -> dict[str, str]:
    """Our environment without libpq's own settings (PGHOST, PGSERVICE, PGSSLMODE …), which may mean another server.

    PGPASSWORD stays: it leads nowhere, and an inventory may refer to it as env://PGPASSWORD.
    """
    return {key: value for key, value in os.environ.items() if key == "PGPASSWORD" or not re.fullmatch("PG[A-Z]+", key)}


def stop(process: Process, how: signal.Signals = signal.SIGTERM, *, wait: float = 20) -> bool:
    """Ask, wait, kill. True when it is gone."""
    for sent, seconds in ((how, wait), (signal.SIGKILL, 10.0)):
        if not process.alive:
            break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, sent)
        deadline = time.monotonic() + seconds
        while process.alive and time.monotonic() < deadline:
            reap(process.pid)
            time.sleep(0.02)
    reap(process.pid)
    return not process.alive


def reap(pid: int) -> None:
    """Collect it if it is a child of this process; otherwise nothing."""
    with contextlib.suppress(OSError):
        os.waitpid(pid, os.WNOHANG)
