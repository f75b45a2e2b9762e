"""The life of the local stack: up, status, logs, down, reset, and the supervisor that restarts what died.

What runs is written to `stack.json` in the state directory. `up` adopts what is alive and starts the rest, so it may be
called at any time, after a kill -9 of any part and of this program too. The components run in sessions of their own; the
supervisor only restarts them and may itself be gone without harm.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops_platform.clients.processes import Process, reap, spawn, stop
from ops_platform.errors import OpsError
from ops_platform.local import STATE_FILE, UI_FILE, closed_folder, state_dir
from ops_platform.local.components import COMPONENTS, find_marked, sockets_path
from ops_platform.local.parts import HOST, Component, Place

READY_SECONDS = 60.0
_OTHER_PORTS = 3  # times that a server which was crowded out of one is started anew
_READ = {"vault", "s3", "platform-db", "app-db"}  # what our own servers ask
_READERS = ("wal-receiver", "metrics")
_UI_ENDS_WITHIN = 70.0  # its web server and its daemon have half a minute each
_BEGUN = {"lock", "stack.new"}  # all that there is before the first state is written


def present() -> list[Component]:
    """Those that this machine can start."""
    return [component for component in COMPONENTS if not component.lacking()]


@dataclass(frozen=True)
class Status:
    name: str
    kind: str
    url: str
    pid: int | None
    ready: bool
    skipped: str
    """Why it is left out on this machine; empty where it is not."""

    @property
    def good(self) -> bool:
        return self.ready or bool(self.skipped)


@dataclass
class Stack:
    """The stack of one state directory. Use `opened`, which holds the lock that keeps two commands apart."""

    place: Place
    running: dict[str, Process]

    @classmethod
    def load(cls, directory: Path) -> Stack:
        try:
            state = json.loads((directory / STATE_FILE).read_text())
        except FileNotFoundError:
            state = {}
        except ValueError as error:
            raise OpsError(
                f"the state file cannot be read: {error}", where=str(directory / STATE_FILE), remedy="ops local reset"
            ) from error
        running = {name: Process(*pair) for name, pair in state.get("running", {}).items()}
        return cls(Place(directory, state.get("ports", {})), running)

    def save(self) -> None:
        """Whole or not at all: a killed `up` leaves the old state, never half of a new one."""
        components = {
            c.name: {"host": HOST, "port": self.place.port(c.port_names[0]), "url": c.url(self.place)}
            for c in present()
        }
        state = {
            "ports": self.place.ports,
            "running": {name: [process.pid, process.started] for name, process in self.running.items()},
            "components": components,
        }
        file = self.place.directory / STATE_FILE
        fresh = file.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(state, indent=1))
        except OSError as error:
            raise OpsError(
                f"the state cannot be written: {error.strerror}", where=str(file), remedy="free space on that disk"
            ) from error
        fresh.rename(file)

    def alive(self, name: str) -> Process | None:
        process = self.running.get(name)
        return process if process is not None and process.alive else None

    def status(self) -> list[Status]:
        known = bool(self.place.ports)
        found: list[Status] = []
        for component in COMPONENTS:
            process = self.alive(component.name)
            ready = process is not None and component.ready(self.place)
            skipped = "" if process else component.lacking()
            url = component.url(self.place) if known and not skipped else ""
            pid = process.pid if process else None
            found.append(Status(component.name, component.kind, url, pid, ready, skipped))
        return found

    def adopt(self) -> None:
        """Take up what runs and does not stand in the state: its starter was killed before it could write it down."""
        marks = {c.name: c.mark(self.place) for c in COMPONENTS} | {"supervisor": supervisor_mark(self.place)}
        missing = {name: mark for name, mark in marks.items() if self.alive(name) is None}
        if missing:
            self.running.update(find_marked(missing))

    def ensure(self, component: Component, say: Callable[[str], None]) -> None:
        """Running, ready and set up, whatever it was before."""
        if (process := self.alive(component.name)) and component.hopeless(self.place):
            component.stop(process)
        if self.alive(component.name) is None:
            say("starting")
            self._start(component)
        for again in range(_OTHER_PORTS, -1, -1):
            if self._ready(component, may_lose_a_port=again > 0):
                break
            say("starting at another port: somebody took one meanwhile")
            self._start(component)
        try:
            component.finish(self.place)
        except OpsError:
            raise
        except Exception as error:
            raise OpsError(
                f"{component.name} could not be set up: {str(error).strip() or type(error).__name__}",
                where=str(self.place.log(component.name)),
                remedy="look at free disk space and at this log; ops local up goes on where it stopped",
            ) from error

    def _start(self, component: Component) -> None:
        self._free_ports(component)
        self.save()  # before it starts: whoever finds it must know where it listens
        try:
            self.running[component.name] = component.start(self.place)
        except OSError as error:
            raise OpsError(
                f"{component.name} could not be started: {error.strerror or error}",
                where=str(error.filename or self.place.directory),
                remedy="look at free disk space and at who owns the state directory",
            ) from error
        self.save()

    def _free_ports(self, component: Component) -> None:
        """Keep the ports that the state names; choose another for one that somebody else has taken meanwhile."""
        for name in component.port_names:
            if not _is_free(self.place.port(name)):
                self.place.ports[name] = self.place.new_port()
                for reader in _READERS if component.name in _READ else ():
                    if (process := self.alive(reader)) is not None:
                        stop(process)  # it knows the old address; it comes back with the new one

    def _ready(self, component: Component, *, may_lose_a_port: bool) -> bool:
        """Wait for it. False when it ended because a port that was free when it was chosen is not any more."""
        deadline = time.monotonic() + READY_SECONDS
        while not component.ready(self.place):
            process = self.running[component.name]
            if not process.alive or time.monotonic() > deadline:
                state = "stopped" if not process.alive else f"is not ready after {READY_SECONDS:.0f} s"
                tail = log_tail(self.place.log(component.name), 12)
                self.running.pop(component.name, None)
                component.stop(process)
                self.save()
                if may_lose_a_port and not all(_is_free(self.place.port(name)) for name in component.port_names):
                    return False
                raise OpsError(
                    f"{component.name} {state}. The end of its log:\n{tail}",
                    where=str(self.place.log(component.name)),
                    remedy="read the log; no space left on the disk and a port taken by another program are the usual causes",
                )
            time.sleep(0.05)
        return True


@contextlib.contextmanager
def opened(directory: Path | None = None, *, create: bool = False) -> Generator[Stack]:
    """The stack under an exclusive lock, which ends with this process whatever ends it."""
    place = (directory or state_dir()).absolute()
    _refuse_foreign(place)
    try:
        if create:
            place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o711)  # the servers' user passes through, and sees only what is its own
        lock = (place / "lock").open("w")
    except OSError as error:
        raise OpsError(
            f"the state directory cannot be used: {error.strerror}", where=str(place), remedy="set OPS_STATE_DIR"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stack = Stack.load(place)
        stack.adopt()
        yield stack


def _refuse_foreign(place: Path) -> None:
    """A folder with other things in it is left alone: its mode would be changed, and `reset` would remove it."""
    try:
        inside = {entry.name for entry in place.iterdir()} if place.exists() else set[str]()
    except OSError as error:
        raise OpsError(
            f"the state directory cannot be used: {error.strerror}", where=str(place), remedy="set OPS_STATE_DIR"
        ) from error
    if STATE_FILE not in inside and not inside <= _BEGUN:
        raise OpsError(
            "this folder is no state of a local stack; nothing in it was touched",
            where=str(place),
            remedy="set OPS_STATE_DIR to an empty folder, or to one that ops local up made",
        )


def up(
    directory: Path | None = None, *, say: Callable[[str, str], None] = lambda name, text: None, supervise: bool = True
) -> list[Status]:
    """Everything running, ready and set up. Idempotent. Raises OpsError naming the component and the end of its log."""
    with opened(directory, create=True) as stack:
        _check_reachable(stack.place)
        stack.save()
        for component in COMPONENTS:
            if skipped := component.lacking():
                say(component.name, f"skipped: {skipped}")
        for component in present():
            begun = time.monotonic()
            stack.ensure(component, lambda text, name=component.name: say(name, text))
            say(component.name, f"ready ({time.monotonic() - begun:.1f} s)")
            stack.save()
        if supervise and stack.alive("supervisor") is None:
            command = [
                sys.executable,
                "-X",
                supervisor_mark(stack.place),
                "-m",
                "ops_platform.local.stack",
                str(stack.place.directory),
            ]
            stack.running["supervisor"] = spawn(command, stack.place.log("supervisor"))
            stack.save()
        return stack.status()


def down(directory: Path | None = None) -> list[str]:
    """Stop everything, the web UI and the supervisor first. Returns the names of what ran. Raises OpsError if something does not go."""
    if not (directory or state_dir()).exists():
        return []
    ended = _end_web_ui(directory or state_dir())
    with opened(directory) as stack:
        names = ["supervisor", *(component.name for component in reversed(COMPONENTS))]
        how = {component.name: component.stop for component in COMPONENTS}
        stopped = [name for name in names if stack.alive(name)]
        left = [name for name in stopped if not how.get(name, stop)(stack.running[name])]
        stack.running = {name: process for name, process in stack.running.items() if name in left}
        if stack.place.ports:
            stack.save()
        if left:
            raise OpsError(f"still running after SIGKILL: {', '.join(left)}", remedy="look at these processes by hand")
        return ended + stopped


def _end_web_ui(directory: Path) -> list[str]:
    """Dagster has its storage in the stack: left running it would fill its terminal with tracebacks."""
    try:
        said = json.loads((directory / UI_FILE).read_text())
        running = Process(int(said["pid"]), int(said["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not running.alive:
        return []
    stop(running, wait=_UI_ENDS_WITHIN)
    return ["web UI"]


def reset(directory: Path | None = None) -> Path:
    """Stop everything and remove the state directory."""
    place = (directory or state_dir()).absolute()
    if place.exists():
        _refuse_foreign(place)
        try:
            Stack.load(place)
        except OpsError:
            (place / STATE_FILE).write_text("{}")  # unreadable: what runs is found by its arguments
        down(place)
        shutil.rmtree(sockets_path(Place(place)), ignore_errors=True)
        shutil.rmtree(place)
    return place


def status(directory: Path | None = None) -> list[Status]:
    """Without the lock: looking must work while `up` is at work."""
    return Stack.load((directory or state_dir()).absolute()).status()


def log_tail(log: Path, lines: int = 40) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _check_reachable(place: Place) -> None:
    """As root, the servers' user has to pass through every folder above the state."""
    if os.geteuid() == 0 and (closed := closed_folder(place.directory)) is not None:
        raise OpsError(
            f"PostgreSQL runs as {place.user.name}, who cannot pass through {closed}",
            where=str(place.directory),
            remedy="set OPS_STATE_DIR to a place that others can pass through, such as /var/lib/ops_platform/local",
        )


def supervisor_mark(place: Place) -> str:
    return f"ops-local-supervisor={place.directory}"


def supervise(directory: Path) -> None:
    """Restart what died, with a growing pause for what keeps dying. Ends when it is no longer the one that the state names."""
    pause: dict[str, float] = {}
    due: dict[str, float] = {}
    while True:
        time.sleep(1)
        with opened(directory) as stack:
            me = stack.running.get("supervisor")
            if me is None or me.pid != os.getpid():
                return
            for component in present():
                name = component.name
                if (dead := stack.running.get(name)) is not None and not dead.alive:
                    reap(dead.pid)
                if stack.alive(name) or time.monotonic() < due.get(name, 0):
                    continue
                pause[name] = min(30.0, pause.get(name, 0.5) * 2)
                due[name] = time.monotonic() + pause[name]
                _log(f"{name} is not running; starting it")
                try:
                    stack.ensure(component, _log)
                    stack.save()
                except OpsError as error:
                    _log(str(error))


def _log(text: str) -> None:
    from datetime import UTC, datetime

    sys.stderr.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")
    sys.stderr.flush()


def as_json(found: list[Status]) -> list[dict[str, Any]]:
    return [vars(item) for item in found]


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))
