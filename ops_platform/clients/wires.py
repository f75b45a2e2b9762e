"""The wires of a process that has a network namespace of its own, as a container has: the ends that are on this side, unplugged and plugged in.

An end that is down takes the carrier from the other one: what either side sends goes nowhere, without a word, as when a cable is pulled. Asked
and set by `ip` of iproute2, in another namespace by way of `nsenter`; both take root.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ops_platform.clients.listeners import network_of
from ops_platform.clients.processes import Process
from ops_platform.errors import CouldNotVerifyError

_ANSWERS_WITHIN = 20.0
_CLONE_NEWNET = 0x40000000  # <sched.h>

T = TypeVar("T")


@dataclass(frozen=True)
class Wire:
    """Its end on this side. An index is never given out twice, a name is."""

    index: int
    name: str


def wires_of(pid: int) -> list[Wire]:
    """Of every interface that it has. Raises CouldNotVerifyError: its network is ours, or does not end on this side, or we may not see it."""
    where = f"process {pid}"
    try:
        shared = network_of(pid) == network_of()
    except OSError as error:
        raise CouldNotVerifyError(f"its network may not be seen: {error.strerror}", where=where) from None
    if shared:
        raise CouldNotVerifyError(
            "it has the network of this machine: whoever cuts it off cuts off the drill, too", where=where,
            remedy="cut off a server in a network of its own, as a container has; freeze-drill tries a host that hangs",
        )  # fmt: skip
    ours = {link["ifindex"]: link for link in _links()}
    found: list[Wire] = []
    for link in _links("nsenter", f"--net=/proc/{pid}/ns/net"):
        if "LOOPBACK" in link["flags"] or "UP" not in link["flags"]:
            continue
        end = ours.get(link.get("link_index", 0))
        if end is None or end.get("link_index") != link["ifindex"] or "link_netnsid" not in end:
            raise CouldNotVerifyError(f"its interface {link['ifname']} does not end on this machine", where=where)
        found.append(Wire(end["ifindex"], end["ifname"]))
    if not found:
        raise CouldNotVerifyError("it has no interface that could be unplugged", where=where)
    return found


def plug(wire: Wire, *, up: bool) -> None:
    """Does nothing where it is gone. Raises CouldNotVerifyError where it cannot be set."""
    if is_up(wire) is not None:
        _ip("link", "set", "dev", wire.name, "up" if up else "down")


def is_up(wire: Wire) -> bool | None:
    """None: it is gone, with the network that it led to."""
    found = next((link for link in _links() if (link["ifindex"], link["ifname"]) == (wire.index, wire.name)), None)
    return None if found is None else "UP" in found["flags"]


def _links(*within: str) -> Sequence[dict[str, Any]]:
    return json.loads(_ip("-json", "link", "show", within=within))


def _ip(*words: str, within: Sequence[str] = ()) -> str:
    command = [*within, "ip", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWERS_WITHIN)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(error)
    else:
        if done.returncode == 0:
            return done.stdout
        said = done.stderr.strip()
    raise CouldNotVerifyError(f"{' '.join(command)}: {said}", remedy="it takes root, iproute2 and nsenter")


def network_kept(process: Process) -> int:
    """The process's network as an open file, which keeps it. Raises CouldNotVerifyError: the process is gone, or its network is not ours to see."""
    where = f"process {process.pid}"
    try:
        network = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CouldNotVerifyError(f"its network may not be seen: {error.strerror}", where=where) from None
    if not process.alive:
        os.close(network)
        raise CouldNotVerifyError("it is gone", where=where)
    return network


def within_network(network: int, work: Callable[[], T]) -> T:
    """In a thread of its own that has joined it: a socket stays in the network in which it was made, whoever uses it. Raises what `work` raises,
    and CouldNotVerifyError: we may not join it, which takes root."""

    def inside() -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network, _CLONE_NEWNET):  # os.setns is of Python 3.12
            raise CouldNotVerifyError(
                f"its network may not be joined: {os.strerror(ctypes.get_errno())}", remedy="it takes root"
            )
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(inside).result()
