"""Which process serves an address: never one that only has its port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from ops_platform.clients.listeners import listens, network_of
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.errors import CouldNotVerifyError
from tests.rig import eventually, missing

SERVE = """\
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family, dualstack_ipv6=sys.argv[1] == "::")
print("listens", flush=True)
time.sleep(600)
"""
FIND = """\
import sys
from ops_platform.clients.listeners import listens
from ops_platform.errors import CouldNotVerifyError
try:
    print(listens(sys.argv[1], int(sys.argv[2])).pid)
except CouldNotVerifyError as error:
    print(error.what)
"""


@pytest.fixture
def serve() -> Iterator[Callable[..., int]]:
    """Start a process that listens; its pid."""
    with ExitStack() as stack:

        def start(host: str, port: int, *within: str) -> int:
            command = [*within, sys.executable, "-c", SERVE, host, str(port)]
            child = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(child.kill)
            assert child.stdout is not None
            assert child.stdout.readline() == "listens\n"
            return child.pid

        yield start


def test_of_two_servers_with_one_port_the_one_of_the_address_is_found(serve: Callable[..., int]) -> None:
    port = free_port()
    one, two = serve("127.0.0.1", port), serve("127.0.0.2", port)
    assert (listens("127.0.0.1", port).pid, listens("127.0.0.2", port).pid) == (one, two)
    with pytest.raises(CouldNotVerifyError, match="nobody answers there"):
        listens("127.0.0.3", port)


def test_who_listens_at_every_address_is_found_by_each_that_nobody_has_for_himself(serve: Callable[..., int]) -> None:
    port = free_port()
    everywhere = serve("0.0.0.0", port)
    assert listens("127.0.0.7", port).pid == everywhere
    assert listens("localhost", port).pid == everywhere


def test_addresses_of_both_versions_are_told_apart(serve: Callable[..., int]) -> None:
    try:
        port, other = free_port("::1"), free_port("::")
    except OSError:
        missing("IPv6", "the kernel has it")
    one, both = serve("::1", port), serve("::", other)
    assert listens("::1", port).pid == one
    with pytest.raises(CouldNotVerifyError):
        listens("127.0.0.1", port)
    assert listens("::1", other).pid == listens("127.0.0.1", other).pid == both


def test_a_server_of_another_machine_is_none_of_ours_though_one_here_has_its_port(serve: Callable[..., int]) -> None:
    """Reached over a wire, in namespaces of network and processes that are not ours."""
    if (
        os.geteuid()
        or shutil.which("ip") is None
        or subprocess.run(["unshare", "--net", "true"], check=False).returncode
    ):
        missing("network namespaces", "making one takes root, and iproute2")
    holder = subprocess.Popen(["unshare", "--net", "sleep", "600"])
    try:
        name, net = f"opst{os.getpid()}"[:14], f"--net=/proc/{holder.pid}/ns/net"
        eventually(lambda: network_of(holder.pid) != network_of(), why="it stays in our network")
        for words in (
            f"ip link add {name} type veth peer name eth0 netns {holder.pid}",
            f"ip addr add 198.18.255.1/30 dev {name}",
            f"ip link set {name} up",
            f"nsenter {net} ip addr add 198.18.255.2/30 dev eth0",
            f"nsenter {net} ip link set eth0 up",
        ):
            subprocess.run(words.split(), check=True)
        port = free_port()
        here, there = serve("0.0.0.0", port), serve("0.0.0.0", port, "nsenter", net)
        # In another network of this machine it is found as well.
        assert (listens("198.18.255.1", port).pid, listens("198.18.255.2", port).pid) == (here, there)
        # Who sees no process there sees another machine.
        alone = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", FIND, "198.18.255.2", str(port)]
        said = subprocess.run(alone, check=True, capture_output=True, text=True, timeout=60).stdout
        assert said == "198.18.255.2 is another machine's address\n"
    finally:
        holder.kill()
        holder.wait()


def test_a_name_of_several_machines_is_refused_unless_all_of_them_are_this_one(
    serve: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    serve("127.0.0.1", port)
    serve("127.0.0.2", port)
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", port)) for n in (1, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_more: both)
    with pytest.raises(CouldNotVerifyError, match="several processes serve it"):
        listens("db.example", port)


def test_a_name_without_an_address_and_no_name_are_refused() -> None:
    with pytest.raises(CouldNotVerifyError, match="its name has no address"):
        listens("nowhere.invalid", 5432)
    with pytest.raises(CouldNotVerifyError, match="no host is named"):
        listens("", 5432)
