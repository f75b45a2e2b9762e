"""A port that was given to one server is given to no other, bound or not."""

from __future__ import annotations

import socket

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
