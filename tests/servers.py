"""One server process of a test: started in a folder of its own, waited for, killed, started again, removed.

The rigs of the single systems (`redis_rig`, `prometheus_rig`, `kube_rig`) are made of these.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ops_platform.clients.postgres_binaries import RunAs
from ops_platform.clients.processes import Process, spawn, stop
from tests.rig import eventually, missing, scratch


def program(name: str, remedy: str = "make services installs it") -> str:
    """Where it is. A skip, or a failure where everything is required, when the machine does not have it."""
    path = shutil.which(name)
    if path is None:
        missing(name, remedy)
    assert path is not None
    return path


class Daemon:
    """`ready` says whether the server answers; it is asked until it does, or the process has ended, or time is up."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        ready: Callable[[], object],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        seconds: float = 60,
        user: RunAs | None = None,
    ) -> None:
        self.name = name
        self.command = command
        self.ready = ready
        self.log = log
        self.env = env
        self.seconds = seconds
        self.user = user
        self.process: Process | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def spawn(self) -> None:
        """Without waiting: several may come up side by side."""
        assert not self.alive, f"{self.name} runs already"
        self.process = spawn(self.command, self.log, env=self.env, **(self.user.popen if self.user else {}))

    def wait(self) -> None:
        eventually(lambda: self._ready() or not self.alive, seconds=self.seconds, why=lambda: f"{self}")
        assert self.alive, f"{self} has ended"

    def start(self) -> None:
        self.spawn()
        self.wait()

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Killed unless a test asks for less: what it holds is thrown away. Does nothing when it does not run."""
        if self.process is not None:
            assert stop(self.process, how), f"{self.name} did not stop"
            self.process = None

    def pause(self) -> None:
        """It keeps its connections and does not answer, as a host does that hangs. `resume` ends it."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, what: signal.Signals) -> None:
        assert self.process is not None
        assert self.alive, f"{self.name} does not run"
        os.kill(self.process.pid, what)

    def _ready(self) -> bool:
        # A server that is coming up refuses, cuts off, or answers with an error: each is "not yet".
        with contextlib.suppress(OSError, ValueError):
            return bool(self.ready())
        return False

    def __str__(self) -> str:
        tail = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else "no log"
        return f"{self.name}; the end of its log:\n{tail}"


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def answers(url: str) -> bool:
    """Whether a GET is answered with 2xx. Raises OSError otherwise."""
    with urllib.request.urlopen(url, timeout=2) as answer:
        return 200 <= answer.status < 300


@contextlib.contextmanager
def folder(prefix: str) -> Iterator[Path]:
    path = scratch(prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
