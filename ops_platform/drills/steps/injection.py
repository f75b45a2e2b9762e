"""What breaks a server of this machine: the process is found by the address that it serves (`listens`), so the drill runs where the server does.

Written down before it is done, with the process: an attempt that was interrupted must not break the next server, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ops_platform.clients.listeners import listens, parent_of
from ops_platform.clients.processes import Process, identify
from ops_platform.clients.wires import Wire, is_up, plug, wires_of
from ops_platform.drills.model import Checked, Done, Resource
from ops_platform.drills.registry import Context, Remover, removes
from ops_platform.errors import CouldNotVerifyError, OpsError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Id

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

_DIES_WITHIN = 10.0


class Break(Strict):
    """Of steps that break a server."""

    how: Literal["kill", "freeze"] = Field(
        default="kill", description="kill -9, or SIGSTOP: a host that hangs, and keeps its connections."
    )


class After(Strict):
    """Of steps that follow an injection."""

    injected: Id = Field(description="The step that broke the server.")


@dataclass(frozen=True)
class Server:
    """One that is to be broken. `facts`: what later steps have to know."""

    name: str
    host: str
    port: int
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


def at(name: str, address: str, **facts: Any) -> Server:
    """By host:port, [host]:port where the host is an address of version 6."""
    host, _, port = address.rpartition(":")
    return Server(name, host.strip("[]"), int(port), facts)


def breakable(title: str, which: Callable[[], Sequence[Server]]) -> Done:
    """Of preflights: whether each of these runs on this machine, where alone it can be broken."""
    query = "/proc of this machine"
    try:
        found = [f"{server.name}: process {listens(server.host, server.port).pid}" for server in which()]
    except OpsError as error:
        return Done(error.what, checks=(Checked(title=title, holds=None, query=query, result=str(error)),))
    said = ", ".join(found) or "there is none"
    return Done(said, checks=(Checked(title=title, holds=bool(found), query=query, result=said),))


def break_server(context: Context, how: str, which: Callable[[], Server]) -> Done:
    """Kill or freeze one process. `which` is not asked again after an interruption."""
    return (freeze_server if how == "freeze" else kill_server)(context, which)


def kill_server(context: Context, which: Callable[[], Server]) -> Done:
    """kill -9; whether it died is looked at. Raises CouldNotVerifyError where it did not, and what `listens` raises."""
    if (before := noted(context)) is not None:
        process = Process(before.detail["pid"], before.detail["started"])
        with contextlib.suppress(ProcessLookupError):
            if process.alive:
                os.kill(process.pid, signal.SIGKILL)
        return Done("an interrupted attempt had done it", dict(before.detail))
    server = which()
    process, name = listens(server.host, server.port), server.name
    facts = {**server.facts, "at": context.clock.now().isoformat(), "pid": process.pid, "started": process.started}
    context.register("injected", name, facts)
    os.kill(process.pid, signal.SIGKILL)
    facts |= {"at": context.clock.now().isoformat()}
    deadline = context.clock.monotonic() + _DIES_WITHIN
    while process.alive:
        if context.clock.monotonic() > deadline:
            raise CouldNotVerifyError(f"it did not die: process {process.pid} is alive", where=name)
        context.clock.sleep(0.01)
    return Done(f"{name}: process {process.pid} was killed", facts)


def freeze_server(context: Context, which: Callable[[], Server]) -> Done:
    """SIGSTOP of one process; the teardown lets it go on. Raises what `listens` raises."""
    if (done := frozen_before(context)) is not None:
        return done
    server = which()
    process = listens(server.host, server.port)
    facts = {**server.facts, "at": context.clock.now().isoformat()}
    context.register("frozen", server.name, facts, processes=[[process.pid, process.started]])
    freeze([[process.pid, process.started]])
    return Done(f"{server.name}: process {process.pid} hangs", facts)


def cut_server(context: Context, which: Callable[[], Server]) -> Done:
    """Unplug the network of one server, and of whatever else shares it; the teardown plugs it in. Raises what `listens` and `wires_of` raise."""
    if (before := noted(context)) is not None:
        _unplug(before.detail["wires"])
        return Done("an interrupted attempt had done it", {k: v for k, v in before.detail.items() if k != "wires"})
    server = which()
    wires = wires_of(listens(server.host, server.port).pid)
    facts = {**server.facts, "at": context.clock.now().isoformat()}
    context.register("cut off", server.name, facts, wires=[[wire.index, wire.name] for wire in wires])
    _unplug([[wire.index, wire.name] for wire in wires])
    return Done(f"{server.name} is cut off: {', '.join(wire.name for wire in wires)} is down", facts)


def _unplug(wires: Sequence[Any]) -> None:
    for index, name in wires:
        plug(Wire(index, name), up=False)


def _plug_in(_access: Access, resource: Resource) -> None:
    for index, name in resource.detail["wires"]:
        plug(Wire(index, name), up=True)


def _unplugged(_access: Access, resource: Resource) -> str | None:
    down = [name for index, name in resource.detail["wires"] if is_up(Wire(index, name)) is False]
    return f"{', '.join(down)} is down" if down else None


removes("cut off", Remover(_plug_in, _unplugged))


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
    """What was frozen goes on, and what was cut off is plugged in: before anything is looked at that needs it."""
    from ops_platform.drills.engine import remove_what_was_made

    remove_what_was_made(context.access, context.store, context.held, kinds=("frozen", "cut off"))


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


def children(pid: int) -> list[Process]:
    found = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if parent_of(int(entry.name)) == pid]
    return [process for one in found if (process := identify(one)) is not None]


# A note of what was begun stands among what is made, so that it is written before it is done; there is nothing to take away.
removes("injected", Remover(lambda _access, _resource: None, lambda _access, _resource: None, local=False))
