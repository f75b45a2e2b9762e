"""Playbooks of Redis on real servers: one alone, one under Sentinel, a cluster."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from ops_platform.actions import Change, CountLimit, Outcome, Status
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from ops_platform.inventory.model import Mode
from ops_platform.remediation.playbook import Playbook, playbook
from ops_platform.remediation.playbooks.redis import Failover
from tests.authority import Authority
from tests.integration.incident_rig import solved
from tests.integration.systems_rig import Bench, Between, KilledError, bench, killed, outcomes
from tests.redis_rig import Redis, RedisCluster, Replicated
from tests.rig import Cluster, eventually
from tests.servers import folder

PURGE, EVICT, FAILOVER = (
    playbook(f"redis.{name}") for name in ("purge_memory", "evict_slow_clients", "failover_shard")
)
PASSWORD = "correct horse 'battery'"
MIB = 1 << 20


def acl(book: Playbook[Any], *, sentinel: bool) -> set[str]:
    """The rules that a playbook's documentation names for a server or a sentinel."""
    lines = [line for line in book.rights if line.startswith("on sentinels") is sentinel]
    return set(re.findall(r"\+[a-z|-]+", " ".join(lines)))


class Sites:
    """Benches that log in with exactly the rights that are given to them."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        self._cluster, self._stack = cluster, stack

    def bench(
        self,
        servers: Sequence[Redis],
        book: Playbook[Any],
        *,
        hosts: Sequence[int] | None = None,
        without: str = "",
        password: str = PASSWORD,
        **system: Any,
    ) -> Bench:
        for server in servers:
            sentinel = "sentinel" in server.run("INFO", "server").partition("redis_mode:")[2][:10]
            rules = sorted(acl(book, sentinel=sentinel) - {without})
            server.run("ACL", "SETUSER", "ops", "reset", "on", f">{PASSWORD}", *rules)
        ports = hosts or [server.port for server in servers]
        body = {
            "kind": "redis", "tls": False, "user": "ops", "password": "file://{inventory}/password", "timeout": "20s",
            "hosts": [{"host": "127.0.0.1", "port": port} for port in ports], **system,
        }  # fmt: skip
        return self._stack.enter_context(bench(self._cluster, body, files={"password": password}))


@pytest.fixture
def sites(shared_cluster: Cluster) -> Iterator[Sites]:
    with ExitStack() as stack:
        yield Sites(shared_cluster, stack)


@pytest.fixture
def server() -> Iterator[Redis]:
    """Alone, and with an allocator that keeps what it has until it is asked."""
    with folder("ops-redis-") as directory:
        made = Redis(directory, {"jemalloc-bg-thread": "no"})
        made.daemon.start()
        yield made
        made.daemon.stop()


def at(server: Redis) -> str:
    return f"127.0.0.1:{server.port}"


# Memory


def waste(server: Redis) -> None:
    """Pages that were used and are not: many values, and none of them any more."""
    for command in ("redis.call('SET', 'k' .. i, string.rep('x', 20000))", "redis.call('DEL', 'k' .. i)"):
        server.run("EVAL", f"for i = 1, 3000 do {command} end", 0)
    eventually(lambda: kept(server) > 16 * MIB)


def kept(server: Redis) -> int:
    memory = server.info("memory")
    return int(memory["allocator_resident"]) - int(memory["allocator_active"])


@pytest.fixture
def wasteful(server: Redis) -> Redis:
    waste(server)
    return server


def test_what_nothing_uses_goes_back(wasteful: Redis, sites: Sites) -> None:
    it = sites.bench([wasteful], PURGE)
    before = kept(wasteful)
    result = it.run(PURGE, at_least="8MiB")
    assert result.status is Status.DONE, result.as_json()
    assert outcomes(result) == [(at(wasteful), Outcome.APPLIED)]
    assert kept(wasteful) < before / 2
    assert it.run(PURGE, at_least="8MiB").status is Status.NOTHING


def test_an_alert_about_memory_leads_to_a_closed_incident(
    wasteful: Redis, sites: Sites, shared_cluster: Cluster
) -> None:
    it = sites.bench([wasteful], PURGE)
    least = {"at_least": "8MiB"}
    solved(shared_cluster, it.access, PURGE.name, least, lambda: kept(wasteful) > 8 * MIB, secrets=[PASSWORD])


def test_little_memory_is_nothing_to_do(server: Redis, sites: Sites) -> None:
    assert sites.bench([server], PURGE).run(PURGE).status is Status.NOTHING


def test_memory_that_went_back_by_itself_is_not_purged(wasteful: Redis, sites: Sites) -> None:
    it = sites.bench([wasteful], PURGE)

    def purge() -> None:
        wasteful.run("MEMORY", "PURGE")
        eventually(lambda: kept(wasteful) < 8 * MIB)

    result = it.go(Between(it.action(PURGE, at_least="8MiB"), planned=purge))
    assert (result.status, outcomes(result)[0][1]) == (Status.DONE, Outcome.ALREADY_DONE)


def test_the_plan_does_not_hang_on_the_moment(wasteful: Redis, sites: Sites) -> None:
    it = sites.bench([wasteful], PURGE)
    digest = it.action(PURGE, at_least="8MiB").plan().digest
    waste(wasteful)
    assert it.action(PURGE, at_least="8MiB").plan().digest == digest


@pytest.mark.parametrize("killing", ["before", "after"])
def test_a_killed_purge_is_run_again(wasteful: Redis, sites: Sites, killing: str) -> None:
    it = sites.bench([wasteful], PURGE)
    with pytest.raises(KilledError):
        it.go(Between(it.action(PURGE, at_least="8MiB"), **{killing: killed}))
    eventually(lambda: (kept(wasteful) > 8 * MIB) is (killing == "before"))
    assert it.run(PURGE, at_least="8MiB").status is (Status.DONE if killing == "before" else Status.NOTHING)


def test_another_allocator_is_refused(server: Redis, sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    from ops_platform.clients.redis import RedisSession

    monkeypatch.setattr(RedisSession, "info", lambda *_: {"mem_allocator": "libc"})
    it = sites.bench([server], EVICT)
    monkeypatch.setattr(RedisSession, "replication", lambda *_: type("R", (), {"role": "master", "master": None})())
    with pytest.raises(RefusedError, match="its allocator is libc"):
        it.run(PURGE)


# Who cannot be asked, and who may not


@pytest.mark.parametrize("book", [PURGE, EVICT, FAILOVER], ids=lambda book: book.name)
def test_a_server_that_is_away_is_never_nothing_to_do(book: Playbook[Any], sites: Sites) -> None:
    it = sites.bench([], book, hosts=[1], mode="cluster")
    with pytest.raises(UnreachableError, match="no server of it answers"):
        it.run(book, **({"master": "127.0.0.1:1"} if book is FAILOVER else {}))


def test_a_server_that_hangs_is_away(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], EVICT, timeout="1s")
    server.daemon.pause()
    with pytest.raises(UnreachableError, match="does not answer"):
        it.run(EVICT)
    server.daemon.resume()


def test_a_refused_password_is_named_and_not_shown(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], EVICT, password="hunter2")
    with pytest.raises(AccessDeniedError, match="Redis refuses the login") as caught:
        it.run(EVICT)
    assert "hunter2" not in f"{caught.value!r} {caught.value}"


@pytest.mark.parametrize(
    ("book", "right"),
    [
        (PURGE, "+info"),
        (PURGE, "+memory|purge"),
        (EVICT, "+info"),
        (EVICT, "+client|list"),
        (EVICT, "+client|kill"),
        (EVICT, "+client|id"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_missing_right_is_named(wasteful: Redis, sites: Sites, book: Playbook[Any], right: str) -> None:
    it = sites.bench([wasteful], book, without=right)
    parameters: dict[str, Any] = {"at_least": "8MiB"} if book is PURGE else {"output": "4MiB"}
    with slow_client(wasteful):
        try:
            result = it.run(book, **parameters)
            assert not result.ok
            said = result.outcomes[0][1].reason
        except AccessDeniedError as error:
            said = str(error)
    assert f"ACL SETUSER ops {right}" in said


@pytest.fixture
def encrypted() -> Iterator[tuple[Redis, Authority, int]]:
    with folder("ops-redis-") as directory:
        authority, port = Authority(directory), free_port()
        chain, key = authority.issue("redis", "redis", hosts=("127.0.0.1",))
        tls = {"tls-port": str(port), "tls-cert-file": str(chain), "tls-key-file": str(key), "tls-auth-clients": "no"}
        made = Redis(directory, {**tls, "tls-ca-cert-file": str(authority.ca)})
        made.daemon.start()
        yield made, authority, port
        made.daemon.stop()


def test_over_tls_the_server_has_to_prove_who_it_is(encrypted: tuple[Redis, Authority, int], sites: Sites) -> None:
    server, authority, port = encrypted
    trusting = sites.bench([server], EVICT, hosts=[port], tls=True, ca=str(authority.ca))
    assert trusting.run(EVICT).status is Status.NOTHING
    doubting = sites.bench([server], EVICT, hosts=[port], tls=True)
    with pytest.raises(UnreachableError, match="TLS with Redis failed"):
        doubting.run(EVICT)


# Slow clients


class slow_client:
    """Somebody who asks for 20 MiB and reads none of it."""

    def __init__(self, server: Redis, *words: str) -> None:
        self.server = server
        self.words = words

    def __enter__(self) -> str:
        name = f"slow{secrets.token_hex(4)}"
        if not self.words:
            self.server.run("SETRANGE", "big", MIB, "x")
        self.socket = socket.create_connection(("127.0.0.1", self.server.port))
        self.socket.sendall(f"CLIENT SETNAME {name}\r\n".encode())
        for words in self.words or ["GET big"] * 20:
            self.socket.sendall(f"{words}\r\n".encode())
        self.address = "{}:{}".format(*self.socket.getsockname())
        if not self.words:
            eventually(lambda: self.client(name) is not None and int(self.client(name)["omem"]) > 8 * MIB)
        else:
            eventually(lambda: self.client(name) is not None)
        return name

    def client(self, name: str) -> Any:
        lines = self.server.run("CLIENT", "LIST").splitlines()
        found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if f"name={name} " in line]
        return found[0] if found else None

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def test_who_does_not_read_is_ended_and_nobody_else(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], EVICT)
    slow, other = slow_client(server), slow_client(server, "PING")
    with slow as name, other as innocent:
        result = it.run(EVICT, output="4MiB")
        assert result.status is Status.DONE, result.as_json()
        assert slow.client(name) is None
        assert other.client(innocent) is not None
    ((change, _),) = result.outcomes
    assert change.before == {"address": slow.address, "user": "default"}
    assert it.run(EVICT, output="4MiB").status is Status.NOTHING


def test_too_many_clients_are_left_alone(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], EVICT)
    first, second = slow_client(server), slow_client(server)
    with first as one, second as other:
        result = it.run(EVICT, CountLimit(1, "client"), output="4MiB")
        assert result.status is Status.REFUSED
        assert result.plan.population["client"] >= 2
        assert first.client(one) is not None
        assert second.client(other) is not None


def test_who_has_gone_meanwhile_is_already_done(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], EVICT)
    slow = slow_client(server)
    with slow as name:

        def goes() -> None:
            slow.socket.close()
            eventually(lambda: slow.client(name) is None)

        result = it.go(Between(it.action(EVICT, output="4MiB"), planned=goes))
    assert (result.status, outcomes(result)[0][1]) == (Status.DONE, Outcome.ALREADY_DONE)


def test_who_has_read_meanwhile_is_left_alone(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], EVICT)
    slow = slow_client(server)
    with slow as name:

        def reads() -> None:
            slow.socket.settimeout(30)
            while int(slow.client(name)["omem"]) > 0:
                slow.socket.recv(MIB)

        result = it.go(Between(it.action(EVICT, output="4MiB"), planned=reads))
        assert outcomes(result)[0][1] is Outcome.CONTENDED
        assert slow.client(name) is not None


def test_another_client_with_the_same_address_is_not_taken_for_it(server: Redis, sites: Sites) -> None:
    """Both the id and the address must be what was planned."""
    it = sites.bench([server], EVICT)
    slow = slow_client(server)
    with slow as name:
        (change,) = it.action(EVICT, output="4MiB").plan().changes
        action = it.action(EVICT, output="4MiB")
        from dataclasses import replace

        moved = replace(change, before={**change.before, "address": "127.0.0.1:9"})
        found = action.check(moved)
        assert found is not None
        assert found.outcome is Outcome.ALREADY_DONE
        assert action.apply(moved).outcome is Outcome.ALREADY_DONE
        other = replace(change, object=change.object + "0")
        assert action.apply(other).outcome is Outcome.ALREADY_DONE
        assert slow.client(name) is not None


@pytest.mark.parametrize("killing", ["before", "after"])
def test_a_killed_eviction_is_run_again(server: Redis, sites: Sites, killing: str) -> None:
    it = sites.bench([server], EVICT)
    slow = slow_client(server)
    with slow as name:
        with pytest.raises(KilledError):
            it.go(Between(it.action(EVICT, output="4MiB"), **{killing: killed}))
        if killing == "after":
            eventually(lambda: slow.client(name) is None)
        assert it.run(EVICT, output="4MiB").status is (Status.DONE if killing == "before" else Status.NOTHING)
        assert slow.client(name) is None


def test_idle_clients_are_ended_where_the_rule_says_so_but_not_those_that_wait(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], EVICT)
    idle, waiting, listening = (
        slow_client(server, "PING"),
        slow_client(server, "BLPOP queue 0"),
        slow_client(server, "SUBSCRIBE news"),
    )
    with idle as one, waiting as two, listening as three:
        eventually(
            lambda: min(int(c.client(n)["idle"]) for c, n in ((idle, one), (waiting, two), (listening, three))) > 1
        )
        assert it.run(EVICT).status is Status.NOTHING
        result = it.run(EVICT, output=None, idle="1s")
        assert result.status is Status.DONE
        assert idle.client(one) is None
        assert waiting.client(two) is not None
        assert listening.client(three) is not None


def test_subscribers_are_ended_only_where_the_rule_says_so(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], EVICT)
    slow = slow_client(server, "SUBSCRIBE news")
    with slow as name:
        for _ in range(20):
            server.run("EVAL", "return redis.call('PUBLISH', 'news', string.rep('x', 1000000))", 0)
        eventually(lambda: int(slow.client(name)["omem"]) > 8 * MIB)
        assert it.run(EVICT, output="4MiB").status is Status.NOTHING
        assert slow.client(name) is not None
        assert it.run(EVICT, output="4MiB", pubsub=True).status is Status.DONE
        assert slow.client(name) is None


def test_replicas_are_never_ended(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    redis = new_redis(replicas=1)
    master, (replica,) = redis.master, redis.replicas
    it = sites.bench([master, replica], EVICT)
    replica.daemon.pause()
    master.run("CONFIG", "SET", "client-output-buffer-limit", "replica 0 0 0")
    master.run("CONFIG", "SET", "repl-timeout", "600")
    master.run("SET", "big", "x")
    for _ in range(20):
        master.run("SETRANGE", "big", 2 * MIB, "x" * 100000)
    lines = master.run("CLIENT", "LIST").splitlines()
    assert [line for line in lines if "flags=S" in line]
    replica.daemon.resume()
    result = it.run(EVICT, output=None, idle="1s")
    assert not [change for change, _ in result.outcomes if "S" in str(change.before)]
    assert result.plan.population["client"] == 0
    assert replica.info("replication")["master_link_status"] == "up"


def test_a_condition_is_needed() -> None:
    with pytest.raises(UsageError, match="output, idle or both"):
        EVICT.read_parameters({"output": None})


# A shard of a cluster


@pytest.fixture
def cluster(new_redis_cluster: Callable[..., RedisCluster]) -> RedisCluster:
    """In which every node knows by now who is whose replica."""
    made = new_redis_cluster()
    for node in made.nodes:
        eventually(lambda node=node: node.run("CLUSTER", "NODES").count("slave ") == 3)
    return made


def in_cluster(cluster: RedisCluster, sites: Sites, **more: Any) -> Bench:
    return sites.bench(cluster.nodes, FAILOVER, mode="cluster", **more)


def test_a_replica_takes_over_its_shard_and_gives_it_back(cluster: RedisCluster, sites: Sites) -> None:
    it = in_cluster(cluster, sites)
    old, new = cluster.nodes[0], cluster.nodes[3]
    result = it.run(FAILOVER, master=at(old))
    assert result.status is Status.DONE, result.as_json()
    assert (old.role, new.role) == ("slave", "master")
    assert {cluster.state(node) for node in cluster.nodes} == {"ok"}
    assert [check.name for check in result.verification.checks] == [
        "the cluster agrees", "the new master answers", "the old master follows",
    ]  # fmt: skip
    assert it.run(FAILOVER, master=at(old)).status is Status.NOTHING
    back = it.undo(FAILOVER, result.plan.changes, master=at(old))
    assert back.status is Status.DONE, back.as_json()
    assert (old.role, new.role) == ("master", "slave")
    assert it.undo(FAILOVER, result.plan.changes, master=at(old)).status is Status.NOTHING


def test_a_master_is_also_known_by_its_id(cluster: RedisCluster, sites: Sites) -> None:
    it = in_cluster(cluster, sites)
    plan = it.action(FAILOVER, master=cluster.nodes[1].run("CLUSTER", "MYID")).plan()
    assert plan.changes[0].object == at(cluster.nodes[1])
    assert plan.changes[0].after == {"master": [at(cluster.nodes[4])]}
    with pytest.raises(NotThereError, match=r"there is no server 10\.0\.0\.1:1"):
        it.run(FAILOVER, master="10.0.0.1:1")


def test_who_took_over_meanwhile_is_already_done(cluster: RedisCluster, sites: Sites) -> None:
    it = in_cluster(cluster, sites)
    old, new = cluster.nodes[0], cluster.nodes[3]

    def switch() -> None:
        new.run("CLUSTER", "FAILOVER")
        eventually(lambda: (old.role, new.role) == ("slave", "master"))
        eventually(lambda: f"{at(old)}@" in cluster.nodes[1].run("CLUSTER", "NODES"))

    result = it.go(Between(it.action(FAILOVER, master=at(old)), planned=switch))
    assert (result.status, outcomes(result)[0][1]) == (Status.DONE, Outcome.ALREADY_DONE)


@pytest.mark.parametrize("killing", ["before", "after"])
def test_a_killed_failover_is_run_again(cluster: RedisCluster, sites: Sites, killing: str) -> None:
    it = in_cluster(cluster, sites)
    old, new = cluster.nodes[0], cluster.nodes[3]
    with pytest.raises(KilledError):
        it.go(Between(it.action(FAILOVER, master=at(old)), **{killing: killed}))
    assert new.role == ("slave" if killing == "before" else "master")
    assert it.run(FAILOVER, master=at(old)).status is (Status.DONE if killing == "before" else Status.NOTHING)
    assert (old.role, new.role) == ("slave", "master")


def test_a_replica_that_is_behind_does_not_take_over(cluster: RedisCluster, sites: Sites) -> None:
    it = in_cluster(cluster, sites, timeout="2s")
    master, replica = cluster.nodes[0], cluster.nodes[3]
    replica.daemon.pause()
    with pytest.raises(RefusedError, match="no replica is near enough"):
        it.run(FAILOVER, master=at(master))
    replica.daemon.resume()
    assert master.role == "master"


def test_a_replica_that_fell_behind_after_the_plan_does_not_take_over(cluster: RedisCluster, sites: Sites) -> None:
    it = in_cluster(cluster, sites, timeout="2s")
    master, replica = cluster.nodes[0], cluster.nodes[3]
    action = it.action(FAILOVER, master=at(master))
    result = it.go(Between(action, planned=replica.daemon.pause))
    replica.daemon.resume()
    assert outcomes(result)[0][1] is Outcome.REFUSED
    assert master.role == "master"


def test_a_cluster_that_is_not_whole_is_left_alone(cluster: RedisCluster, sites: Sites) -> None:
    it = in_cluster(cluster, sites)
    for node in (cluster.nodes[2], cluster.nodes[5]):
        node.daemon.stop()
    eventually(lambda: cluster.state(cluster.nodes[0]) == "fail")
    with pytest.raises(RefusedError, match="not whole"):
        it.run(FAILOVER, master=at(cluster.nodes[0]))


def test_a_node_that_is_split_off_with_the_old_master_does_not_say_that_it_has_its_shard_back(
    cluster: RedisCluster, sites: Sites
) -> None:
    old, heir = cluster.nodes[0], cluster.nodes[3]
    old.daemon.stop()  # what only hung would read afterwards what it was told meanwhile
    eventually(lambda: heir.role == "master")
    for node in cluster.nodes[1:]:
        node.daemon.pause()
    old.daemon.start()
    it = sites.bench([old], FAILOVER, mode="cluster")
    change = Change("shard", at(old), {"master": at(old)}, {"master": [at(heir)]}, reversible=True)
    with pytest.raises(RefusedError, match="the cluster is not whole"):
        it.undo(FAILOVER, [change], master=at(old))


def test_peers_are_the_replicas_in_sync(cluster: RedisCluster, sites: Sites) -> None:
    it = in_cluster(cluster, sites)
    context = it.context(FAILOVER, master=at(cluster.nodes[0]))
    peers = FAILOVER.peers(context)
    assert peers is not None
    assert (peers.healthy, peers.total, peers.what) == (1, 1, "replicas in sync")
    assert FAILOVER.min_healthy(context) == 1
    cluster.nodes[3].daemon.stop()
    assert FAILOVER.peers(context).healthy == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("right", ["+info", "+cluster|nodes", "+cluster|info", "+cluster|failover"])
def test_a_missing_right_in_a_cluster_is_named(cluster: RedisCluster, sites: Sites, right: str) -> None:
    it = in_cluster(cluster, sites, without=right)
    try:
        result = it.run(FAILOVER, master=at(cluster.nodes[0]))
        assert not result.ok
        said = result.outcomes[0][1].reason
    except OpsError as error:
        said = str(error)
    assert f"ACL SETUSER ops {right}" in said
    assert cluster.nodes[0].role == "master"


def test_purge_and_eviction_reach_every_node_of_a_cluster(cluster: RedisCluster, sites: Sites) -> None:
    it = sites.bench(cluster.nodes, EVICT, mode="cluster", hosts=[cluster.nodes[0].port])
    slow = slow_client(cluster.nodes[4], "PING")
    with slow as name:
        eventually(lambda: int(slow.client(name)["idle"]) > 1)
        result = it.run(EVICT, output=None, idle="1s")
        assert result.status is Status.DONE, result.as_json()
        assert slow.client(name) is None
    purging = sites.bench(cluster.nodes, PURGE, mode="cluster", hosts=[cluster.nodes[0].port])
    plan = purging.action(PURGE).plan()
    assert set(plan.facts["kept_bytes"]) == {at(node) for node in cluster.nodes}
    cluster.nodes[5].daemon.stop()
    eventually(lambda: f"{at(cluster.nodes[5])}@" in " ".join(
        line for line in cluster.nodes[0].run("CLUSTER", "NODES").splitlines() if "fail" in line and "fail?" not in line
    ))  # fmt: skip
    assert purging.action(PURGE).plan().facts["down"] == [at(cluster.nodes[5])]


# Under Sentinel, and alone


def under_sentinel(redis: Replicated, sites: Sites, **more: Any) -> Bench:
    servers = [*redis.servers, *redis.sentinels]
    ports = [sentinel.port for sentinel in redis.sentinels]
    for sentinel in redis.sentinels:  # by now connected to every replica
        seen = lambda one=sentinel: one.json("SENTINEL", "REPLICAS", Replicated.NAME)  # noqa: E731
        eventually(lambda seen=seen: {each["flags"] for each in seen()} == {"slave"})
    for replica in redis.replicas:
        replica.wait_in_sync()
    return sites.bench(servers, FAILOVER, hosts=ports, mode="sentinel", **{"master": Replicated.NAME, **more})


def test_sentinel_makes_a_replica_master_and_back(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    redis = new_redis(replicas=1, sentinels=3)
    it = under_sentinel(redis, sites)
    old = redis.master
    result = it.run(FAILOVER, master=at(old))
    assert result.status is Status.DONE, result.as_json()
    new = redis.master
    assert new is not old
    assert {redis.seen_master(sentinel) for sentinel in redis.sentinels} == {new.port}
    assert it.run(FAILOVER, master=at(old)).status is Status.NOTHING
    back = it.undo(FAILOVER, result.plan.changes, master=at(old))
    assert back.status is Status.DONE, back.as_json()
    assert redis.master is old


def test_a_sentinel_that_has_not_heard_yet_that_the_replica_is_fit_is_asked_again(
    new_redis: Callable[..., Replicated], sites: Sites
) -> None:
    redis = new_redis(replicas=1, sentinels=1)
    it = under_sentinel(redis, sites)
    (replica,), (sentinel,), old = redis.replicas, redis.sentinels, redis.master

    def heard() -> set[str]:
        return {each["slave-priority"] for each in sentinel.json("SENTINEL", "REPLICAS", Replicated.NAME)}

    replica.run("CONFIG", "SET", "replica-priority", 0)
    eventually(lambda: heard() == {"0"})
    replica.run("CONFIG", "SET", "replica-priority", 100)
    assert heard() == {"0"}
    result = it.run(FAILOVER, master=at(old))
    assert result.status is Status.DONE, result.as_json()
    assert redis.master is replica


def test_a_sentinel_that_goes_on_to_find_nobody_fit_is_a_failure(
    new_redis: Callable[..., Replicated], sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = new_redis(replicas=1, sentinels=1)
    it = under_sentinel(redis, sites)
    (replica,), (sentinel,), old = redis.replicas, redis.sentinels, redis.master
    replica.run("CONFIG", "SET", "replica-priority", 0)
    eventually(lambda: sentinel.json("SENTINEL", "REPLICAS", Replicated.NAME)[0]["slave-priority"] == "0")
    # As if the server did not say so itself.
    monkeypatch.setattr(Failover, "_offset", lambda self, address: 1 << 60)
    result = it.run(FAILOVER, master=at(old), within="1s")
    assert result.status is Status.FAILED
    assert "NOGOODSLAVE" in str(result.as_json())
    assert redis.master is old


def test_sentinel_cannot_be_told_whom_to_choose(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    redis = new_redis(replicas=2, sentinels=1)
    it = under_sentinel(redis, sites)
    old = redis.master
    result = it.run(FAILOVER, master=at(old))
    assert result.status is Status.DONE, result.as_json()
    with pytest.raises(RefusedError, match="Sentinel would choose among"):
        it.undo(FAILOVER, result.plan.changes, master=at(old))
    assert redis.master is not old


def test_sentinels_without_a_password_are_asked_without(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    redis = new_redis(replicas=1, sentinels=1, password=PASSWORD)
    it = under_sentinel(redis, sites, user=None)
    plan = it.action(FAILOVER, master=at(redis.master)).plan()
    assert plan.changes[0].after == {"master": [at(redis.replicas[0])]}


def test_a_name_that_no_sentinel_watches_is_said(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    redis = new_redis(replicas=1, sentinels=1)
    it = under_sentinel(redis, sites, master="other")
    with pytest.raises(NotThereError, match="watches no 'other'"):
        it.run(FAILOVER, master=at(redis.master))


def test_a_sentinel_that_is_split_off_makes_no_other_master(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    """Told to, it would: it asks nobody. The others have promoted another one by then."""
    redis = new_redis(replicas=2, sentinels=3)
    redis.split()
    (old, near, _), (mine, *_) = redis.servers, redis.sentinels
    for hosts in ([one.port for one in redis.sentinels], [mine.port]):
        here: dict[str, Any] = {
            "mode": "sentinel",
            "master": Replicated.NAME,
            "timeout": "3s",
        }  # those that hang never answer
        it = sites.bench([old, near, mine], FAILOVER, hosts=hosts, **here)
        with pytest.raises(
            CouldNotVerifyError, match=rf"1 of 3 sentinels say who is master.*{at(mine)} names {at(old)}"
        ):
            it.run(FAILOVER, master=at(old))
        with pytest.raises(CouldNotVerifyError):
            FAILOVER.peers(it.context(FAILOVER, master=at(old)))
    assert (old.role, near.role) == ("master", "slave")


def test_a_split_that_begins_after_the_plan_ends_it(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    redis = new_redis(replicas=1, sentinels=3)
    it = under_sentinel(redis, sites, timeout="3s")
    old, (replica,) = redis.master, redis.replicas

    def split() -> None:
        for one in redis.sentinels[1:]:
            one.daemon.pause()

    result = it.go(Between(it.action(FAILOVER, master=at(old)), before=split))
    assert result.status is Status.FAILED
    assert "sentinels" in result.outcomes[0][1].reason
    assert (old.role, replica.role) == ("master", "slave")


def test_sentinels_that_contradict_each_other_are_not_believed(
    new_redis: Callable[..., Replicated], sites: Sites, server: Redis
) -> None:
    """Whoever of them is asked first, and also where the inventory names it alone."""
    redis = new_redis(replicas=1, sentinels=3)
    it = under_sentinel(redis, sites)
    (mine, *others), old = redis.sentinels, redis.master
    mine.run("SENTINEL", "REMOVE", Replicated.NAME)
    mine.run("SENTINEL", "MONITOR", Replicated.NAME, "127.0.0.1", server.port, 1)
    with pytest.raises(ConflictError, match="do not agree who is master") as caught:
        it.run(FAILOVER, master=at(old))
    for one, master in ((mine, server), (others[0], old), (others[1], old)):
        assert f"{at(one)} names {at(master)}" in str(caught.value)


def test_of_three_sentinels_the_inventory_may_name_one(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    """The others are asked at the addresses by which it knows them; a majority is enough."""
    redis = new_redis(replicas=1, sentinels=3)
    under_sentinel(redis, sites)
    it = sites.bench([], FAILOVER, hosts=[redis.sentinels[0].port], mode="sentinel", master=Replicated.NAME)
    redis.sentinels[1].daemon.stop()
    old, (replica,) = redis.master, redis.replicas
    assert it.action(FAILOVER, master=at(old)).plan().changes[0].after == {"master": [at(replica)]}
    redis.sentinels[2].daemon.stop()
    with pytest.raises(CouldNotVerifyError, match="1 of 3 sentinels"):
        it.run(FAILOVER, master=at(old))


def test_a_sentinel_that_names_a_replica_is_not_believed(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    redis = new_redis(replicas=1, sentinels=1)
    it = under_sentinel(redis, sites)
    (replica,), (sentinel,) = redis.replicas, redis.sentinels
    sentinel.run("SENTINEL", "REMOVE", Replicated.NAME)
    sentinel.run("SENTINEL", "MONITOR", Replicated.NAME, "127.0.0.1", replica.port, 1)
    with pytest.raises(ConflictError, match=r"it says of itself that it is replica; .* names"):
        it.run(FAILOVER, master=at(replica))


def test_sentinels_that_cannot_agree_are_not_told(new_redis: Callable[..., Replicated], sites: Sites) -> None:
    redis = new_redis(replicas=1, sentinels=1)
    it = under_sentinel(redis, sites)
    redis.sentinels[0].run("SENTINEL", "SET", Replicated.NAME, "quorum", 2)
    with pytest.raises(RefusedError, match=r"the sentinels cannot agree: .*NOQUORUM"):
        it.run(FAILOVER, master=at(redis.master))


@pytest.mark.parametrize("right", sorted(acl(FAILOVER, sentinel=True)))
def test_a_missing_right_on_a_sentinel_is_named(new_redis: Callable[..., Replicated], sites: Sites, right: str) -> None:
    redis = new_redis(replicas=1, sentinels=1)
    it = under_sentinel(redis, sites, without=right)
    old = redis.master
    try:
        result = it.run(FAILOVER, master=at(old))
        assert not result.ok
        said = result.outcomes[0][1].reason
    except AccessDeniedError as error:
        said = str(error)
    assert f"ACL SETUSER ops {right}" in said
    assert redis.master is old


def test_a_single_server_is_refused(server: Redis, sites: Sites) -> None:
    it = sites.bench([server], FAILOVER)
    with pytest.raises(RefusedError, match="nobody who could take over"):
        it.run(FAILOVER, master=at(server))


def test_observing_changes_nothing(cluster: RedisCluster, sites: Sites) -> None:
    it = in_cluster(cluster, sites)
    result = it.go(it.action(FAILOVER, master=at(cluster.nodes[0])), mode=Mode.OBSERVE)
    assert (result.status, cluster.nodes[0].role) == (Status.OBSERVED, "master")
