"""Redis servers for the tests: one with replicas, three sentinels that watch it, and a cluster of three shards with a replica each.

They are asked through `redis-cli`, so that a test sees what an operator would see.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ops_platform.clients.postgres_binaries import free_port
from tests.rig import eventually
from tests.servers import Daemon, folder, program

SLOTS = 16384
SHARDS = 3


class RedisError(AssertionError):
    """What the server answered with an error, such as `NOAUTH Authentication required.`"""


class Redis:
    """A server on a free loopback port, without persistence. `settings` as in redis.conf; `password` for the user `default`."""

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, str] | None = None,
        *,
        password: str = "",
        sentinel: bool = False,
    ) -> None:
        self.port = free_port()
        self.password = password
        self.home = directory / f"redis-{self.port}"
        self.home.mkdir()
        chosen = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.home),
            **({} if sentinel else {"save": '""', "appendonly": "no", "repl-diskless-sync-delay": "0"}),
            **(
                {"requirepass": _quoted(password), "masterauth": _quoted(password)} if password and not sentinel else {}
            ),
            **(settings or {}),
        }
        file = self.home / "redis.conf"  # sentinels and cluster nodes write into theirs
        file.write_text("".join(f"{key} {value}\n" for key, value in chosen.items()))
        file.chmod(0o600)
        command = [program("redis-server"), file, *(["--sentinel"] if sentinel else [])]
        self.daemon = Daemon(f"redis {self.port}", command, self.ping, log=self.home / "log")

    def run(self, *words: object) -> str:
        """What `redis-cli` prints for one command. Raises RedisError for an error, OSError when nothing answers."""
        done = self._cli("-e", *words)
        text = done.stdout.strip() or done.stderr.strip()
        if done.returncode == 0:
            return text
        if "reset by peer" in text:
            raise ConnectionResetError(text)
        if "Could not connect" in text or "closed the connection" in text:
            raise ConnectionError(text)
        raise RedisError(text)

    def json(self, *words: object) -> Any:
        """The same as structured data, in the types of RESP3."""
        return json.loads(self.run("--json", *words))

    def info(self, section: str) -> dict[str, str]:
        try:
            said = self.run("INFO", section)
        except ConnectionResetError:  # a sentinel that makes a master of it ends its clients' connections
            said = self.run("INFO", section)
        lines = (line.strip() for line in said.splitlines())
        return dict(line.split(":", 1) for line in lines if ":" in line)

    @property
    def role(self) -> str:
        """`master` or `slave`, as the server calls it."""
        return self.info("replication")["role"]

    def ping(self) -> bool:
        """Whether it answers; one that refuses is up."""
        try:
            return self.run("PING") == "PONG"
        except RedisError as error:
            return "LOADING" not in str(error)

    def follow(self, master: Redis) -> None:
        """Replicate it, and wait until the data is the same."""
        self.run("REPLICAOF", "127.0.0.1", master.port)
        self.wait_in_sync()

    def wait_in_sync(self) -> None:
        eventually(lambda: self.info("replication").get("master_link_status") == "up", why=lambda: f"{self.daemon}")

    def _cli(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program("redis-cli"), "-h", "127.0.0.1", "-p", str(self.port), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **({"REDISCLI_AUTH": self.password} if self.password else {})},
        )


class Replicated:
    """A master with replicas that are in sync, and sentinels that agree about it under the name `main`."""

    NAME = "main"

    def __init__(
        self,
        directory: Path,
        *,
        replicas: int = 1,
        sentinels: int = 0,
        password: str = "",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.servers = [Redis(directory, settings, password=password) for _ in range(1 + replicas)]
        self.sentinels: list[Redis] = []
        self.password = password
        self._directory = directory
        self._sentinels = sentinels

    @property
    def master(self) -> Redis:
        """The one that says so itself, whoever it is after a failover."""
        return next(server for server in self.servers if server.daemon.alive and server.role == "master")

    @property
    def replicas(self) -> list[Redis]:
        return [server for server in self.servers if server.daemon.alive and server.role == "slave"]

    def start(self) -> None:
        for server in self.servers:
            server.daemon.spawn()
        first, *others = self.servers
        for server in self.servers:
            server.daemon.wait()
        for server in others:
            server.follow(first)
        for _ in range(self._sentinels):
            self.sentinels.append(self._sentinel(first.port))
            self.sentinels[-1].daemon.start()
        if self.sentinels:
            eventually(lambda: all(self._complete(one) for one in self.sentinels), why="the sentinels do not agree")

    def stop(self) -> None:
        for server in [*self.sentinels, *self.servers]:
            server.daemon.stop()

    def seen_master(self, sentinel: Redis) -> int:
        """The port of the master in the eyes of this sentinel."""
        return int(sentinel.json("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.NAME)[1])

    def split(self) -> None:
        """Of three servers and three sentinels we are left with the old master, its first replica and the first sentinel, which knows
        of nothing: the others have made the last server master, and hang, so that nothing comes across."""
        old, near, far = self.servers
        mine, *others = self.sentinels
        for one in (mine, old, near):  # what only hung would read afterwards what it was told meanwhile
            one.daemon.stop()
        eventually(
            lambda: far.role == "master" and {self.seen_master(one) for one in others} == {far.port},
            why=lambda: f"{others[0].daemon}",
        )
        for one in (far, *others):
            one.daemon.pause()
        old.daemon.start()
        near.daemon.start()
        near.follow(old)
        mine.daemon.start()
        eventually(lambda: near.port in self._fit(mine), why=lambda: f"{mine.daemon}")
        assert self.seen_master(mine) == old.port

    def _fit(self, sentinel: Redis) -> list[int]:
        """The ports of the replicas that this sentinel would promote."""
        seen = sentinel.json("SENTINEL", "REPLICAS", self.NAME)
        return [int(one["port"]) for one in seen if (one["flags"], one["master-link-status"]) == ("slave", "ok")]

    def _complete(self, sentinel: Redis) -> bool:
        seen = sentinel.json("SENTINEL", "MASTER", self.NAME)
        return (int(seen["num-other-sentinels"]), int(seen["num-slaves"])) == (
            self._sentinels - 1,
            len(self.servers) - 1,
        )

    def _sentinel(self, master: int) -> Redis:
        one = Redis(self._directory, sentinel=True)
        quorum = self._sentinels // 2 + 1
        lines = [f"sentinel monitor {self.NAME} 127.0.0.1 {master} {quorum}"]
        lines += [f"sentinel down-after-milliseconds {self.NAME} 2000", f"sentinel failover-timeout {self.NAME} 10000"]
        lines += [f"sentinel auth-pass {self.NAME} {_quoted(self.password)}"] if self.password else []
        with (one.home / "redis.conf").open("a") as out:
            out.write("".join(f"{line}\n" for line in lines))
        return one


class RedisCluster:
    """Three masters with a third of the slots each, and a replica for each. `nodes[i + 3]` follows `nodes[i]` at first."""

    def __init__(self, directory: Path, *, password: str = "") -> None:
        self.buses: dict[int, int] = {}
        self.nodes = [self._node(directory, password) for _ in range(2 * SHARDS)]

    def _node(self, directory: Path, password: str) -> Redis:
        bus = free_port()
        settings = {"cluster-enabled": "yes", "cluster-port": str(bus), "cluster-node-timeout": "3000"}
        node = Redis(directory, {**settings, "cluster-config-file": "nodes.conf"}, password=password)
        self.buses[node.port] = bus
        return node

    def start(self) -> None:
        for node in self.nodes:
            node.daemon.spawn()
        for number, node in enumerate(self.nodes, 1):
            node.daemon.wait()
            node.run("CLUSTER", "SET-CONFIG-EPOCH", number)  # else they would have to settle who is right
        first, masters = self.nodes[0], self.nodes[:SHARDS]
        for node in self.nodes[1:]:
            first.run("CLUSTER", "MEET", "127.0.0.1", node.port, self.buses[node.port])
        for number, node in enumerate(masters):
            begin, end = SLOTS * number // SHARDS, SLOTS * (number + 1) // SHARDS - 1
            node.run("CLUSTER", "ADDSLOTSRANGE", begin, end)
        eventually(lambda: all(self._knows_all(node) for node in self.nodes), why="the nodes do not know each other")
        for node, replica in zip(masters, self.nodes[SHARDS:], strict=True):
            replica.run("CLUSTER", "REPLICATE", node.run("CLUSTER", "MYID"))
        for node in self.nodes:
            eventually(lambda node=node: self.state(node) == "ok", why=lambda node=node: f"{node.daemon}")
        for replica in self.nodes[SHARDS:]:
            replica.wait_in_sync()

    def stop(self) -> None:
        for node in self.nodes:
            node.daemon.stop()

    def state(self, node: Redis) -> str:
        """`ok` when this node sees every slot served, else `fail`."""
        lines = node.run("CLUSTER", "INFO").splitlines()
        return dict(line.strip().split(":", 1) for line in lines)["cluster_state"]

    def _knows_all(self, node: Redis) -> bool:
        lines = node.run("CLUSTER", "NODES").splitlines()
        return len(lines) == len(self.nodes) and all("handshake" not in line for line in lines)


def _quoted(text: str) -> str:
    """A word of redis.conf."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@contextmanager
def replicated(
    *, replicas: int = 1, sentinels: int = 0, password: str = "", settings: Mapping[str, str] | None = None
) -> Iterator[Replicated]:
    """`settings` as in redis.conf, of the master and its replicas."""
    with folder("ops-redis-") as directory:
        made = Replicated(directory, replicas=replicas, sentinels=sentinels, password=password, settings=settings)
        try:
            made.start()
            yield made
        finally:
            made.stop()


@contextmanager
def cluster(*, password: str = "") -> Iterator[RedisCluster]:
    with folder("ops-redis-") as directory:
        made = RedisCluster(directory, password=password)
        try:
            made.start()
            yield made
        finally:
            made.stop()
