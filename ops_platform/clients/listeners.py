"""Which process of this machine serves an address. Its port alone does not say so: a server of another machine has the same.

What shows it is a connection of ours whose other end stands in a table of this machine (/proc/PID/net/tcp and tcp6, see proc(5)): in our own
network namespace, or in another one, as a container has.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from ops_platform.clients.processes import Process, identify
from ops_platform.errors import CouldNotVerifyError

_ANSWERS_WITHIN = 2.0
_SEEN_WITHIN = 1.0  # the other end stands in its table once our last packet of the handshake has come
_LISTENS = "0A"
_OURS = Path("/proc/thread-self")
_REMEDY = "hold the drill on the server's machine, as a user who may see and signal its processes"

Place = tuple[IPv4Address | IPv6Address, int]


def listens(host: str, port: int) -> Process:
    """The process of this machine that serves host:port, the eldest of those that share its socket.

    Raises CouldNotVerifyError: somebody serves there who is not of this machine or may not be seen, nobody does, or several do.
    """
    where = f"{host}:{port}"
    reached = False
    found = set[Process]()
    for family, address in _addresses(host, port):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as ours:
            ours.settimeout(_ANSWERS_WITHIN)
            ours.connect(address)
            reached = True
            table = _table_with(server=_place(address), client=_place(ours.getsockname()))
            if table is None:
                raise CouldNotVerifyError(f"{address[0]} is another machine's address", where=where, remedy=_REMEDY)
            found |= _eldest(_listening(table, _place(address)))
    if not reached:
        raise CouldNotVerifyError("nobody answers there", where=where)
    if len(found) > 1:
        raise CouldNotVerifyError(f"several processes serve it: {sorted(p.pid for p in found)}", where=where)
    if not found:
        raise CouldNotVerifyError("it is served by a process that we may not see", where=where, remedy=_REMEDY)
    return found.pop()


def network_of(pid: int | None = None) -> str:
    """The name of its network namespace, of ours where none is given. Raises OSError: it is gone, or not ours to see."""
    return str(Path(f"/proc/{pid}/ns/net" if pid else _OURS / "ns/net").readlink())


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host else []
    except OSError as error:
        raise CouldNotVerifyError(f"its name has no address: {error.strerror}", where=f"{host}:{port}") from None
    if not found:
        raise CouldNotVerifyError("no host is named", where=f"{host}:{port}")
    return [(family, address) for family, _, _, _, address in found]


def _place(address: Any) -> Place:
    return _plain(ip_address(str(address[0]).partition("%")[0])), int(address[1])


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """A server of both versions sees one of version 4 as ::ffff:a.b.c.d."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


# Tables


@dataclass(frozen=True)
class _Socket:
    local: Place
    remote: Place
    state: str
    inode: str


def _table_with(*, server: Place, client: Place) -> list[_Socket] | None:
    """The sockets of the network namespace in which a connection's other end is; None where it is in none that we see."""
    until = time.monotonic() + _SEEN_WITHIN
    while True:
        for home in _networks():
            table = list(_sockets(home))
            if any(one.local == server and one.remote == client for one in table):
                return table
        if time.monotonic() > until:
            return None
        time.sleep(0.01)


def _networks() -> Iterator[Path]:
    """A folder of /proc for each network namespace, ours first."""
    yield _OURS
    seen = {network_of()}
    for pid in _pids():
        with contextlib.suppress(OSError):
            if (name := network_of(pid)) not in seen:
                seen.add(name)
                yield Path(f"/proc/{pid}")


def _sockets(home: Path) -> Iterator[_Socket]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (home / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                yield _Socket(_read(fields[1]), _read(fields[2]), fields[3], fields[9])


def _read(text: str) -> Place:
    """Words of 32 bits in the machine's order, each with its bytes in the network's."""
    words, _, port = text.partition(":")
    raw = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    return _plain(ip_address(raw)), int(port, 16)


def _listening(table: Collection[_Socket], place: Place) -> set[str]:
    """The inodes of those that listen there: at exactly that address, else at every one of its version, else at every one."""
    address, port = place
    same = [one for one in table if one.state == _LISTENS and one.local[1] == port]
    any4, any6 = IPv4Address(0), IPv6Address(0)
    for wanted in (address, any4 if address.version == 4 else any6, any6):
        if found := {one.inode for one in same if one.local[0] == wanted}:
            return found
    return set()


# Processes


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))


def _eldest(inodes: Collection[str]) -> set[Process]:
    """A server's children inherit its socket: the eldest that has it is the one."""
    holders = {pid for pid in _pids() if _holds(pid, inodes)}
    found = (identify(pid) for pid in holders if parent_of(pid) not in holders)
    return {process for process in found if process is not None}


def _holds(pid: int, inodes: Collection[str]) -> bool:
    with contextlib.suppress(OSError):
        return any(_inode(link) in inodes for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def _inode(link: Path) -> str | None:
    with contextlib.suppress(OSError):  # closed meanwhile
        target = str(link.readlink())
        return target[8:-1] if target.startswith("socket:[") else None
    return None


def parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
