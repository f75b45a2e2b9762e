"""Networks of their own for servers of a test, as containers have them: a switch on this side, and a wire to each."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from ops_platform.clients.listeners import network_of
from ops_platform.clients.postgres_binaries import RunAs
from tests.rig import eventually


@cache
def allowed() -> bool:
    """Whether this machine lets us make them."""
    if os.geteuid() or not all(shutil.which(name) for name in ("ip", "nsenter", "unshare", "setpriv")):
        return False
    return subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode == 0


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


_LINK = re.compile(r"ops(\d+)x\d+(n\d+)?")  # a bridge of that process, or a wire on it


def remove_abandoned() -> None:
    """What a test run that was killed has left: links named as ours, of a process that is no more."""
    for link in json.loads(ip("-json", "link")):
        match = _LINK.fullmatch(link["ifname"])
        if match and not Path(f"/proc/{match[1]}").exists():
            # Another run may be at it, too, and a wire goes with the namespace behind it.
            subprocess.run(["ip", "link", "delete", link["ifname"]], check=False, capture_output=True)


class Network:
    """A bridge of this machine with an address, and namespaces that hang on it."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.count = stack, 0
        remove_abandoned()
        taken = ip("-json", "address")
        # Of the block that is kept for tests between networks (RFC 2544).
        free = [net for net in (f"198.18.{n}" for n in range(1, 255)) if f'"{net}.' not in taken]
        self.net = random.choice(free)
        self.name = f"ops{os.getpid()}x{self.net.rpartition('.')[2]}"
        ip("link", "add", self.name, "type", "bridge")
        stack.callback(ip, "link", "delete", self.name)
        ip("address", "add", f"{self.host}/24", "dev", self.name)
        ip("link", "set", self.name, "up")

    @property
    def host(self) -> str:
        """This machine's address in it."""
        return f"{self.net}.1"

    def place(self) -> Place:
        self.count += 1
        # It ends with us, and the namespace with it once nobody else is there.
        words = ["unshare", "--net", "--", "setpriv", "--pdeathsig", "KILL", "--", "sleep", "infinity"]
        holder = subprocess.Popen(words)
        self.stack.callback(holder.wait)
        self.stack.callback(holder.kill)
        eventually(lambda: network_of(holder.pid) != network_of(), why="it stays in our network")
        place = Place(f"{self.net}.{10 + self.count}", f"{self.name}n{self.count}"[-15:], holder.pid)
        ip("link", "add", place.wire, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        ip("link", "set", place.wire, "master", self.name, "up")
        for words in ("link set lo up", f"address add {place.host}/24 dev eth0", "link set eth0 up"):
            subprocess.run([*place.within, "ip", *words.split()], check=True)
        return place


class Place:
    """One namespace. `wire`: its end on this side."""

    def __init__(self, host: str, wire: str, holder: int) -> None:
        self.host, self.wire = host, wire
        self.within = ("nsenter", f"--net=/proc/{holder}/ns/net", "--")

    def command(self, command: list[str], user: RunAs) -> list[str]:
        """The words that start it there, as that user."""
        switch = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "--"] if user.popen else []
        return [*self.within, *switch, *command]

    @property
    def plugged(self) -> bool:
        (link,) = json.loads(ip("-json", "link", "show", "dev", self.wire))
        return "UP" in link["flags"]


@contextlib.contextmanager
def network() -> Iterator[Network | None]:
    """None where the machine forbids it."""
    with ExitStack() as stack:
        yield Network(stack) if allowed() else None
