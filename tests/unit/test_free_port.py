"""A port that was given to one server is given to no other, bound or not."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from ops_platform.clients import postgres_binaries
from ops_platform.clients.postgres_binaries import free_port


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_binaries, "PORTS", postgres_binaries.PORTS[:400])
    given = [free_port() for _ in range(120)]
    assert len({*given}) == len(given)


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port()
    with socket.create_server(("127.0.0.1", taken)):
        monkeypatch.setattr(postgres_binaries, "PORTS", [taken] * 100)
        monkeypatch.setattr(postgres_binaries, "_given", set[int]())
        assert free_port() != taken


CHOOSE = """
import sys
from ops_platform.clients import postgres_binaries
postgres_binaries.PORTS = range(int(sys.argv[1]), int(sys.argv[2]))
print(*[postgres_binaries.free_port() for _ in range(40)], flush=True)
sys.stdin.read()
"""


def test_two_programs_are_not_given_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has bound any of them yet: a server takes seconds to come that far."""
    few = range(begin := min(free_port(), 31000), begin + 300)
    words = [sys.executable, "-c", CHOOSE, str(few.start), str(few.stop)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        theirs = {int(port) for port in other.stdout.readline().split()}
        monkeypatch.setattr(postgres_binaries, "PORTS", few)
        ours = {free_port() for _ in range(40)}
        assert (len(theirs), ours & theirs) == (40, set())
    finally:
        other.communicate("")
    assert all(postgres_binaries._claimed(port) for port in theirs), "a program that ended still holds its ports"
