"""A Patroni cluster for the tests: three PostgreSQL nodes and three members of etcd, all real: each node in a network of its own where the machine allows
it, so that it can be cut off, on loopback ports elsewhere.

It is as impatient as Patroni allows, so that a failover takes seconds. A node whose Patroni was killed is started again by nobody but
the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import yaml

from ops_platform.clients.postgres_binaries import find_postgres, free_port, run_as
from ops_platform.clients.processes import identify, stop
from tests.network_rig import Network, Place, network
from tests.rig import PASSWORD, eventually, missing
from tests.servers import Daemon, answers, folder, program

SUPERUSER_PASSWORD, REPLICATION_PASSWORD = "super", "replication"


class Node:
    """One member: a Patroni, and the PostgreSQL that it starts."""

    def __init__(
        self, name: str, home: Path, etcd: list[str], bindir: Path, place: Place | None, *, synchronous: bool
    ) -> None:
        self.name, self.home, self.place = name, home / name, place
        self.host = place.host if place else "127.0.0.1"
        self.home.mkdir()
        user = run_as()
        user.own(self.home)
        self.port, self.rest = free_port(), free_port()
        self.file = self.home / "patroni.yaml"
        self._body = self._config(etcd, self._programs(bindir), synchronous)
        self.file.write_text(yaml.safe_dump(self._body))
        command, switched = [program("patroni"), str(self.file)], user if place is None else None
        if place is not None:
            command = place.command(command, user)
        self.daemon = Daemon(name, command, self.running, log=self.home / "patroni.log", seconds=120, user=switched)
        self.daemon.log.touch()
        user.own(self.daemon.log)

    def _programs(self, bindir: Path) -> Path:
        """PostgreSQL's, but for a server whose clock is the one of `skewed`."""
        ours = self.home / "bin"
        ours.mkdir()
        for tool in bindir.iterdir():
            (ours / tool.name).symlink_to(tool)
        (ours / "postgres").unlink()
        (ours / "postgres").write_text(
            "#!/bin/sh\n"
            f'if [ -s "{self.clock}" ]; then\n'
            f'  . "{self.clock}"; export LD_PRELOAD FAKETIME FAKETIME_DONT_FAKE_MONOTONIC=1\n'
            "fi\n"
            f'exec "{bindir}/postgres" "$@"\n'
        )
        (ours / "postgres").chmod(0o755)
        return ours

    @property
    def clock(self) -> Path:
        return self.home / "clock"

    @contextlib.contextmanager
    def skewed(self, offset: str) -> Iterator[None]:
        """As if the clock of its PostgreSQL were set wrong (`+3600s`): it leads on, if it did."""
        library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
        if library is None:
            missing("libfaketime", "make services installs it")
        self.clock.write_text(f"LD_PRELOAD={library} FAKETIME={offset}\n")
        self.clock.chmod(0o644)
        try:
            self.restart()
            yield
        finally:
            self.clock.unlink()
            self.restart()

    def restart(self) -> None:
        """Its PostgreSQL, as an operator does: it keeps the lead, if it had it."""
        request = urllib.request.Request(f"{self.url}/restart", method="POST")

        def restarted() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60):
                return True
            return False

        eventually(restarted, seconds=120, why=lambda: str(self.daemon))

    def _config(self, etcd: list[str], bindir: Path, synchronous: bool) -> dict[str, Any]:
        cluster = {
            "ttl": 20, "loop_wait": 1, "retry_timeout": 3, "maximum_lag_on_failover": 1 << 20,
            "primary_start_timeout": 0, "master_start_timeout": 0, "synchronous_mode": synchronous,
            "ignore_slots": [{"name": "ops_wal", "type": "physical"}],  # the receiver's, which is Patroni's no more than its WAL
            "postgresql": {
                "use_pg_rewind": True, "use_slots": True,
                "parameters": {"wal_level": "replica", "hot_standby": "on", "wal_log_hints": "on", "wal_keep_size": "64MB"},
            },
        }  # fmt: skip
        login = {"superuser": ("postgres", SUPERUSER_PASSWORD), "replication": ("replicator", REPLICATION_PASSWORD)}
        return {
            "scope": "app", "namespace": "/ops/", "name": self.name,
            "restapi": {"listen": f"{self.host}:{self.rest}", "connect_address": f"{self.host}:{self.rest}"},
            # Not etcd3: with it Patroni 3.0.2 (dcs/etcd3.py) puts the leader's key without comparing it, so that a leader whose lease ran out
            # while it hung takes the lead from its successor when it wakes, before its watch has caught up.
            "etcd": {"hosts": etcd},
            "bootstrap": {
                "dcs": cluster,
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"],
                "pg_hba": ["local all all trust", "host all all all scram-sha-256", "host replication all all scram-sha-256"],
            },
            "postgresql": {
                "listen": f"{self.host}:{self.port}", "connect_address": f"{self.host}:{self.port}",
                "data_dir": str(self.home / "data"), "bin_dir": str(bindir), "pgpass": str(self.home / "pgpass"),
                "authentication": {role: {"username": name, "password": word} for role, (name, word) in login.items()},
                "parameters": {"unix_socket_directories": str(self.home), "fsync": "off", "shared_buffers": "16MB"},
            },
            "watchdog": {"mode": "off"},
        }  # fmt: skip

    def tag(self, **tags: bool) -> None:
        """Change its tags, as an operator does: in its file, with a reload."""
        self.file.write_text(yaml.safe_dump({**self._body, "tags": tags}))
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/reload", method="POST"), timeout=30):
            pass
        eventually(lambda: self.state().get("tags", {}) == {k: v for k, v in tags.items() if v}, why=self.state)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.rest}"

    def running(self) -> bool:
        return answers(f"{self.url}/health")

    def state(self) -> dict[str, Any]:
        """What Patroni says of it; empty where it does not answer."""
        return self.ask("patroni")

    def ask(self, what: str) -> dict[str, Any]:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/{what}", timeout=10) as answer:
            return json.load(answer)
        return {}

    def connect(self, **more: Any) -> psycopg.Connection[Any]:
        login = {"user": "postgres", "password": SUPERUSER_PASSWORD, "autocommit": True}
        return psycopg.connect(host=self.host, port=self.port, **login, **more)

    def connect_beside(self) -> psycopg.Connection[Any]:
        """Over its socket: also while nobody reaches it by its network."""
        return psycopg.connect(host=str(self.home), port=self.port, user="postgres", autocommit=True)

    @property
    def log(self) -> str:
        return self.daemon.log.read_text(errors="replace")

    @property
    def postmaster(self) -> int | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int((self.home / "data" / "postmaster.pid").read_text().split()[0])
        return None

    def stop(self) -> None:
        with contextlib.suppress(AssertionError):
            self.daemon.resume()
        pid = self.postmaster
        self.daemon.stop()
        if pid is not None and (process := identify(pid)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            assert stop(process, signal.SIGQUIT)


class Etcd:
    """Three members: the store in which Patroni says who leads."""

    def __init__(self, home: Path, host: str) -> None:
        ports = {f"e{n}": (free_port(), free_port()) for n in (1, 2, 3)}
        everyone = ",".join(f"{name}=http://{host}:{peer}" for name, (_, peer) in ports.items())
        self.hosts = [f"{host}:{client}" for client, _ in ports.values()]
        self.members: list[Daemon] = []
        for name, (client, peer) in ports.items():
            here, between = f"http://{host}:{client}", f"http://{host}:{peer}"
            flags = {
                "name": name, "data-dir": home / name, "listen-client-urls": here, "advertise-client-urls": here,
                "listen-peer-urls": between, "initial-advertise-peer-urls": between, "initial-cluster": everyone,
                # A machine that is busy with other tests is no reason to choose another leader.
                "heartbeat-interval": 500, "election-timeout": 3000, "enable-v2": "true",
            }  # fmt: skip
            command = [program("etcd"), *(f"--{flag}={value}" for flag, value in flags.items())]
            ready = partial(answers, f"{here}/health")  # it has a leader, then
            self.members.append(Daemon(name, command, ready, log=home / f"{name}.log"))

    def start(self) -> None:
        """Also those again that were lost."""
        for member in self.members:
            if not member.alive:
                member.spawn()
        for member in self.members:
            member.wait()

    @contextlib.contextmanager
    def without_quorum(self) -> Iterator[None]:
        """Two of three are killed, and come back at the end."""
        try:
            for member in self.members[1:]:
                member.stop()
            yield
        finally:
            self.start()

    def stop(self) -> None:
        for member in self.members:
            member.stop()


class Patroni:
    """The cluster: `nodes`, of which one leads."""

    def __init__(self, home: Path, network: Network | None, *, synchronous: bool) -> None:
        install = find_postgres(15)
        if install is None or install.tool("pg_rewind") is None:
            missing("PostgreSQL 15 with pg_rewind", "make services installs it")
        assert install is not None
        if shutil.which("patroni") is None or shutil.which("etcd") is None:
            missing("Patroni and etcd", "make services installs them")
        self.etcd = Etcd(home, network.host if network else "127.0.0.1")
        self.nodes = [
            Node(f"n{n}", home, self.etcd.hosts, install.bindir, network and network.place(), synchronous=synchronous)
            for n in (1, 2, 3)
        ]

    def start(self) -> None:
        self.etcd.start()
        self.nodes[0].daemon.spawn()
        eventually(lambda: self.leader, seconds=120, why=lambda: str(self.nodes[0].daemon))
        for node in self.nodes[1:]:
            node.daemon.spawn()
        self.whole()
        with self.leader.connect() as connection:
            connection.execute(
                f"create role ops_backup login replication password '{PASSWORD.replace(chr(39), chr(39) * 2)}'"
            )
            connection.execute("grant pg_monitor, pg_read_all_data, pg_checkpoint to ops_backup")
            connection.execute("grant execute on function pg_create_restore_point(text), pg_switch_wal() to ops_backup")
            connection.execute("create schema ops_canary authorization ops_backup")

    @property
    def leader(self) -> Node:
        """Raises StopIteration-free: None is false, for polling."""
        return next(
            (
                n
                for n in self.nodes
                if n.state().get("role") in ("primary", "master") and n.state().get("state") == "running"
            ),
            None,
        )  # type: ignore[return-value]

    def configure(self, **settings: Any) -> None:
        """Change what all members are told: each hears of it in its next turn."""
        body, url = json.dumps(settings).encode(), f"{eventually(lambda: self.leader).url}/config"
        with urllib.request.urlopen(urllib.request.Request(url, body, method="PATCH"), timeout=30):
            pass

    def whole(self) -> None:
        """Until one leads and two stream from it, and one of them is synchronous where commits wait for one."""

        def streaming() -> bool:
            leader = self.leader
            if leader is None:
                return False
            others = [n.state() for n in self.nodes if n is not leader]
            line = leader.state().get("timeline")
            streams = leader.state().get("replication", [])
            chosen = any(m["role"] == "sync_standby" for m in leader.ask("cluster").get("members", ()))
            chosen = chosen or leader.ask("config").get("synchronous_mode") is False
            follow = all(o.get("state") == "running" and o.get("timeline") == line for o in others)
            return chosen and follow and len(streams) == len(others)

        eventually(streaming, seconds=120, why=lambda: "\n".join(str(n.daemon) for n in self.nodes))

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()
        self.etcd.stop()


@contextlib.contextmanager
def cluster(*, synchronous: bool = True) -> Iterator[Patroni]:
    with folder("ops-patroni-") as home, network() as net:
        made = Patroni(home, net, synchronous=synchronous)
        try:
            made.start()
            yield made
        finally:
            made.stop()
