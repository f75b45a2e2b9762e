"""What breaks a server of this machine: the process is found by the port on which it listens, so the drill runs where the server does.

Written down before it is done, with the process: an attempt that was interrupted must not break the next server, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ops_platform.clients.processes import Process, identify
from ops_platform.drills.model import Done, Resource
from ops_platform.drills.registry import Context, Remover, removes
from ops_platform.errors import CouldNotVerifyError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Id

_DIES_WITHIN = 10.0


class Break(Strict):
    """Of steps that break a server."""

    how: Literal["kill", "freeze"] = Field(
        default="kill", description="kill -9, or SIGSTOP: a host that hangs, and keeps its connections."
    )


class After(Strict):
    """Of steps that follow an injection."""

    injected: Id = Field(description="The step that broke the server.")


def break_server(context: Context, how: str, which: Callable[[], tuple[str, int, dict[str, Any]]]) -> Done:
    """Kill or freeze one process. `which`: its name, its port, what later steps have to know; not asked again after an interruption."""
    return (freeze_server if how == "freeze" else kill_server)(context, which)


def kill_server(context: Context, which: Callable[[], tuple[str, int, dict[str, Any]]]) -> Done:
    """kill -9; whether it died is looked at. Raises CouldNotVerifyError where it did not."""
    if (before := noted(context)) is not None:
        process = Process(before.detail["pid"], before.detail["started"])
        with contextlib.suppress(ProcessLookupError):
            if process.alive:
                os.kill(process.pid, signal.SIGKILL)
        return Done("an interrupted attempt had done it", dict(before.detail))
    name, port, facts = which()
    process = listens(port)
    facts |= {"at": context.clock.now().isoformat(), "pid": process.pid, "started": process.started}
    context.register("injected", name, facts)
    os.kill(process.pid, signal.SIGKILL)
    facts |= {"at": context.clock.now().isoformat()}
    deadline = context.clock.monotonic() + _DIES_WITHIN
    while process.alive:
        if context.clock.monotonic() > deadline:
            raise CouldNotVerifyError(f"it did not die: process {process.pid} is alive", where=name)
        context.clock.sleep(0.01)
    return Done(f"{name}: process {process.pid} was killed", facts)


def freeze_server(context: Context, which: Callable[[], tuple[str, int, dict[str, Any]]]) -> Done:
    """SIGSTOP of one process; the teardown lets it go on."""
    if (done := frozen_before(context)) is not None:
        return done
    name, port, facts = which()
    process = listens(port)
    facts |= {"at": context.clock.now().isoformat()}
    context.register("frozen", name, facts, processes=[[process.pid, process.started]])
    freeze([[process.pid, process.started]])
    return Done(f"{name}: process {process.pid} hangs", facts)


def frozen_before(context: Context) -> Done | None:
    """What an interrupted attempt had begun to freeze is frozen; None where there was none."""
    if (before := noted(context)) is None:
        return None
    freeze(before.detail["processes"])
    return Done("an interrupted attempt had done it", {k: v for k, v in before.detail.items() if k != "processes"})


def noted(context: Context) -> Resource | None:
    """What an attempt of this step that was interrupted has written down."""
    return next((r for r in context.store.resources(context.held.id) if r.step == context.step.id), None)


def freeze(processes: Sequence[Sequence[int]]) -> None:
    for pid, started in processes:
        if Process(pid, started).alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)


def thaw(context: Context) -> None:
    """What was frozen goes on: before anything is looked at that needs it."""
    from ops_platform.drills.engine import remove_what_was_made

    remove_what_was_made(context.access, context.store, context.held, kinds=("frozen",))


def waited(context: Context, look: Callable[[], tuple[bool, str]], *, every: float = 0.2) -> str:
    """Until it holds. Raises what `alive` raises, with what was seen at last."""
    said = ["nothing was seen"]

    def holds() -> bool:
        good, said[0] = look()
        return good

    try:
        context.wait(holds, every=every)
    except CouldNotVerifyError as error:
        raise CouldNotVerifyError(f"{error.what}: {said[0]}", where=error.where) from None
    return said[0]


def listens(port: int) -> Process:
    """The process that listens on a port of this machine. Raises CouldNotVerifyError: it is elsewhere, or may not be seen."""
    inodes = set(_listening(port))
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for link in (entry / "fd").iterdir():
                target = str(link.readlink())
                if target.startswith("socket:[") and target[8:-1] in inodes:
                    found = _first_of(int(entry.name), inodes)
                    if found is not None:
                        return found
    raise CouldNotVerifyError(
        f"no process of this machine that we may see listens on port {port}",
        remedy="hold the drill on its machine, as a user who may signal it",
    )


def _first_of(pid: int, inodes: set[str]) -> Process | None:
    """A server's children inherit its socket: the eldest that has it is the one."""
    while True:
        parent = _parent(pid)
        if parent is None or parent <= 1 or not _holds(parent, inodes):
            return identify(pid)
        pid = parent


def _holds(pid: int, inodes: set[str]) -> bool:
    with contextlib.suppress(OSError):
        return any(str(link.readlink())[8:-1] in inodes for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def _listening(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def children(pid: int) -> list[Process]:
    found = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _parent(int(entry.name)) == pid]
    return [process for one in found if (process := identify(one)) is not None]


# A note of what was begun stands among what is made, so that it is written before it is done; there is nothing to take away.
removes("injected", Remover(lambda _access, _resource: None, lambda _access, _resource: None, local=False))
