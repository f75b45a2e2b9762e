"""Servers of a sandbox: alone in a network of their own, gone with the program that started them, reached over a unix socket.

A restored store may act on its own: a Vault revokes at live databases what its leases say, a Redis replica calls its master, a broker its
peers. In a network namespace of its own it reaches nobody.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ops_platform.clients.processes import Process, spawn, stop
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import CouldNotVerifyError, OpsError
from ops_platform.recovery.sandbox import dies_with_us

_ALONE = ("unshare", "--user", "--map-root-user", "--net", "--")
# Its loopback is down in a new namespace: a server that calls itself over it needs it up. SIOCSIFFLAGS, IFF_UP | IFF_RUNNING.
_UP = (
    "import fcntl,os,socket,struct,sys;"
    "s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM);"
    "fcntl.ioctl(s,0x8914,struct.pack('16sh14x',b'lo',0x41));s.close();"
    "os.execvp(sys.argv[1],sys.argv[1:])"
)


@functools.cache
def own_network() -> tuple[str, ...]:
    """The words that put a program alone into a network with a loopback; empty where the machine forbids it."""
    words = (*_ALONE, sys.executable, "-I", "-S", "-c", _UP)
    if shutil.which("unshare") is None:
        return ()
    try:
        tried = subprocess.run([*words, "true"], capture_output=True, check=False, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ()
    return words if tried.returncode == 0 else ()


def need_own_network(why: str) -> None:
    """Raises CouldNotVerifyError where a sandbox would reach the world."""
    if not own_network():
        raise CouldNotVerifyError(
            f"this machine gives a program no network of its own, and {why}",
            remedy="verify where unshare --user --net is allowed",
        )


def find_program(name: str, programs: Mapping[str, str], package: str) -> str:
    """The program of a sandbox: as the inventory names it, beside this Python, or on the PATH. Raises CouldNotVerifyError."""
    beside = Path(sys.executable).parent / name
    found = programs.get(name) or (str(beside) if beside.exists() else shutil.which(name))
    if found is None or not Path(found).exists():
        raise CouldNotVerifyError(
            f"the program {name} is not here{f' ({found})' if found else ''}",
            remedy=f"install {package}, or name it under sandbox.programs",
        )
    return found


class Server:
    """A server of a sandbox: `home` holds its data, log and socket. Use as a context manager; it is killed at the end."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        home: Path,
        ready: Callable[[], bool],
        *,
        env: Mapping[str, str] | None = None,
        alone: bool = True,
        seconds: float = 120.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.name, self.home, self.ready = name, home, ready
        self.log = home / f"{name}.log"
        self._command = [*(own_network() if alone else ()), *dies_with_us(), *command]
        self._env, self._seconds, self._clock = env, seconds, clock
        self._process: Process | None = None

    def __enter__(self) -> Server:
        self._process = spawn(self._command, self.log, env={**(self._env or {})})
        try:
            self.wait(self.ready, "answer")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.alive

    def stop(self) -> None:
        if self._process is not None:
            # What it holds is thrown away.
            stop(self._process, signal.SIGKILL)
            self._process = None

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Poll. Raises OpsError with the end of its log where it ended, CouldNotVerifyError where time is up."""
        deadline = self._clock.monotonic() + self._seconds
        while not until():
            if not self.alive:
                raise OpsError(f"{self.name} ended in the sandbox: {self.tail()}", where=str(self.home))
            if self._clock.monotonic() > deadline:
                raise CouldNotVerifyError(
                    f"{self.name} did not {what} within {self._seconds:.0f} s: {self.tail()}", where=str(self.home)
                )
            self._clock.sleep(0.05)

    def tail(self, lines: int = 4) -> str:
        """The end of what it said."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return " | ".join(text.splitlines()[-lines:])[-1500:]


def socket_path(home: Path, name: str) -> Path:
    """Of a unix socket: below `home` unless that is too long for one (108 bytes)."""
    inside = home / name
    if len(os.fsencode(inside)) <= 100:
        return inside
    raise CouldNotVerifyError(
        "the path of the sandbox is too long for a unix socket",
        where=str(home),
        remedy="set a shorter sandbox.directory",
    )


def handed_out(
    name: str,
    commands: Sequence[Sequence[str | Path]],
    home: Path,
    listening: Path,
    ready: Callable[[], bool],
    *,
    port: int,
    tls: bool,
    clock: Clock = SYSTEM_CLOCK,
) -> Server:
    """Servers that know TCP alone, together in a network of their own; `port` in there is reached over the socket `listening`."""
    need_own_network("what is restored there could reach the world")
    spec = home / "inside.json"
    ends = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
    body = {
        "commands": [[str(word) for word in (*ends, *command)] for command in commands],
        "port": port,
        "tls": tls,
        "socket": str(listening),
    }
    spec.write_text(json.dumps(body))
    inside = Path(__file__).with_name("inside.py")
    return Server(name, [sys.executable, "-I", "-S", inside, spec], home, ready, clock=clock)
