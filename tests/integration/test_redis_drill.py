"""The Redis drill on real servers: under Sentinel and in a cluster the master goes, another takes over, and what was acknowledged is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from ops_platform.drills.engine import Engine
from ops_platform.drills.model import Ending
from tests.drill_rig import Bench, measured, passed, preflight, preflight_elsewhere, supervised
from tests.redis_rig import Redis, RedisCluster, Replicated
from tests.rig import Cluster, eventually


@pytest.fixture
def bench(shared_cluster: Cluster) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(shared_cluster, stack)


def declare(bench: Bench, mode: str, hosts: Sequence[Redis], **more: Any) -> None:
    """A Redis `cache`, and the shipped drill for it."""
    cache = {
        "id": "cache", "kind": "redis", "mode": mode, "environment": "test", "owner": "team", "tls": False, "timeout": "1s",
        "hosts": [{"host": "127.0.0.1", "port": one.port} for one in hosts], **more,
    }  # fmt: skip
    bench.body["systems"].append(cache)
    budget = {"unavailability": {"most": "10m"}, "targets": ["cache"], "mode": "enforce"}
    bench.body["drills"]["plan"].append({"id": "master", "runbook": "redis-failover-drill", **budget})


def keys(server: Redis) -> str:
    return server.run("KEYS", "ops-drill:*")


def test_under_sentinel_another_one_takes_over_and_the_old_master_follows(
    bench: Bench, new_redis: Callable[..., Replicated]
) -> None:
    """Killed, with writes that a replica has acknowledged; afterwards what refuses it."""
    rig = new_redis(replicas=2, sentinels=3)
    declare(bench, "sentinel", rig.sentinels, master=rig.NAME)
    old = rig.master

    def replaced() -> bool:
        return all(rig.seen_master(one) != old.port for one in rig.sentinels)

    with supervised([one.daemon for one in rig.servers], replaced):
        held = bench.drill("master", seconds_before=1, copies=1, most_lost=0)
    card = passed(held)
    store = bench.engine.store
    made_at = {r.step: r.made_at for r in store.resources(held.id) if r.kind == "process"}
    writing = store.steps(held.id)["writer"].ended_at
    assert writing is not None
    assert made_at["reader"] < writing, "the probes start up side by side"
    assert rig.master is not old
    found = measured(card)
    assert found["errors"] > 0
    assert found["rpo"] == found["lost"] == 0
    assert 0 < found["detection"] <= found["promotion"]
    assert old.role == "slave"
    assert {r.kind: r.gone for r in card.teardown}.keys() == {"redis key", "directory", "process", "injected"}
    assert keys(rig.master) == ""
    assert bench.remains() == []

    eventually(lambda: preflight(bench, "master") == "", why=lambda: preflight(bench, "master"))
    why = preflight_elsewhere(bench, "master", rig.master.port)
    assert why.startswith("here: ")
    assert "127.0.0.1 is another machine's address" in why
    behind(bench, rig)
    for replica in rig.replicas:
        replica.run("CONFIG", "SET", "replica-priority", 0)
    assert "its priority keeps it from it" in preflight(bench, "master")
    for replica in rig.replicas:
        replica.daemon.stop()
    why = eventually(lambda: preflight(bench, "master"), why="it is not refused")
    assert "0 of 2 replicas" in why
    assert len(bench.engine.store.list()) == 1


def test_in_a_cluster_a_master_that_hangs_is_replaced_and_follows_when_it_wakes(
    bench: Bench, new_redis_cluster: Callable[..., RedisCluster]
) -> None:
    rig = new_redis_cluster()
    declare(bench, "cluster", rig.nodes)
    old, heir = rig.nodes[1], rig.nodes[4]
    shard = f"127.0.0.1:{old.port}"
    eventually(lambda: not preflight(bench, "master", shard=shard), why="the nodes do not know each other's replicas")
    card = passed(bench.drill("master", seconds_before=1, how="freeze", shard=shard))
    assert heir.role == "master"
    assert old.role == "slave"
    found = measured(card)
    assert found["errors"] > 0
    assert 0 < found["detection"] <= found["promotion"]
    assert [r.gone for r in card.teardown if r.kind == "frozen"] == [True]
    assert keys(heir) == ""


def behind(bench: Bench, rig: Replicated) -> None:
    """One replica gets what is written from the other one, which hangs: it answers, its link is up, and it lags."""
    master, (relay, last) = rig.master, rig.replicas
    last.run("ACL", "SETUSER", "default", "-slaveof")  # the sentinels would set it right
    last.follow(relay)
    relay.daemon.pause()
    try:
        master.run("EVAL", "redis.call('SET', KEYS[1], string.rep('x', ARGV[1]))", 1, "large", 2 << 20)
        why = eventually(
            lambda: next((said for said in [preflight(bench, "master")] if "bytes behind" in said), ""), why="it is fit"
        )
        assert f"0 of 2 replicas of 127.0.0.1:{master.port}" in why
    finally:
        relay.daemon.resume()
        master.run("DEL", "large")
        last.run("ACL", "SETUSER", "default", "+slaveof")
    last.follow(master)
    eventually(lambda: preflight(bench, "master") == "", why=lambda: preflight(bench, "master"))


# One for each thing that it makes or breaks, and one behind a failover.
KILLED = (
    ("redis.write", "registered redis key"),
    ("redis.break_master", "registered frozen"),
    ("redis.break_master", "ended"),
    ("redis.new_master", "ended"),
)


def test_a_drill_killed_at_any_of_its_steps_leaves_no_key_no_process_and_nothing_frozen(
    bench: Bench, new_redis: Callable[..., Replicated]
) -> None:
    """One Redis for all of them: whoever leads it when the next one begins is frozen."""
    rig = new_redis(replicas=1, sentinels=3)
    declare(bench, "sentinel", rig.sentinels, master=rig.NAME)

    def hold(engine: Engine) -> None:
        begun = bench.begin(engine, "master", seconds_before=0.1, how="freeze")
        assert begun.drill is not None, [r.reason for r in begun.result.rulings if not r.allows]
        engine.run(begun.drill.id)

    for does, moment in KILLED:
        eventually(lambda: preflight(bench, "master") == "", why=lambda: preflight(bench, "master"), seconds=60)
        assert bench.killed_when(does, moment, hold), f"{does} {moment}"
        bench.sweep()
        assert bench.remains() == [], f"{does} {moment}"
        assert all(one.role in ("master", "slave") for one in rig.servers), "every one answers"
        assert [keys(one) for one in rig.servers if one.role == "master"] == [""]
    assert {drill.ending for drill in bench.engine.store.list()} == {Ending.LOST}
    assert bench.engine.store.ledger.verify().ok


def test_no_drill_begins_while_the_sentinels_contradict_each_other(
    bench: Bench, new_redis: Callable[..., Replicated]
) -> None:
    rig = new_redis(replicas=1, sentinels=3)
    declare(bench, "sentinel", rig.sentinels, master=rig.NAME)
    eventually(lambda: preflight(bench, "master") == "", why=lambda: preflight(bench, "master"))
    astray, (replica,) = rig.sentinels[1], rig.replicas
    astray.run("SENTINEL", "REMOVE", rig.NAME)
    astray.run("SENTINEL", "MONITOR", rig.NAME, "127.0.0.1", replica.port, 3)
    assert f"127.0.0.1:{astray.port} names 127.0.0.1:{replica.port}" in preflight(bench, "master")


def test_a_server_alone_is_refused(bench: Bench, new_redis: Callable[..., Replicated]) -> None:
    rig = new_redis(replicas=0)
    declare(bench, "single", rig.servers)
    assert "nobody who takes over" in preflight(bench, "master")
