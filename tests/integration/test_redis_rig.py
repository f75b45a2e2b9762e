"""The Redis servers of the tests do what the tests of others rely on."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests.redis_rig import RedisCluster, RedisError, Replicated
from tests.rig import eventually

PASSWORD = "correct horse"


def test_a_replica_has_what_its_master_was_given(new_redis: Callable[..., Replicated]) -> None:
    redis = new_redis(password=PASSWORD)
    redis.master.run("SET", "order", "42")
    assert redis.master.run("WAIT", 1, 10000) == "1"
    assert [replica.run("GET", "order") for replica in redis.replicas] == ["42"]
    redis.master.password = "wrong"
    with pytest.raises(RedisError, match="NOAUTH"):
        redis.servers[0].run("GET", "order")


def test_a_server_that_is_away_is_no_answer(new_redis: Callable[..., Replicated]) -> None:
    server = new_redis(replicas=0).servers[0]
    server.daemon.stop()
    with pytest.raises(ConnectionError):
        server.run("PING")
    server.daemon.start()
    assert server.run("DBSIZE") == "0"


def test_a_server_that_hangs_takes_connections_and_does_not_answer(new_redis: Callable[..., Replicated]) -> None:
    server = new_redis(replicas=0).servers[0]
    server.daemon.pause()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(0.2)
        connection.sendall(b"PING\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(100)
        server.daemon.resume()
        connection.settimeout(30)
        assert connection.recv(100) == b"+PONG\r\n"


def test_sentinels_promote_a_replica_when_the_master_dies(new_redis: Callable[..., Replicated]) -> None:
    redis = new_redis(replicas=1, sentinels=3, password=PASSWORD)
    old = redis.master
    assert {redis.seen_master(sentinel) for sentinel in redis.sentinels} == {old.port}
    old.daemon.stop()
    other = next(server for server in redis.servers if server is not old)
    eventually(lambda: other.role == "master", why=lambda: f"{redis.sentinels[0].daemon}")
    eventually(lambda: {redis.seen_master(sentinel) for sentinel in redis.sentinels} == {other.port})
    assert redis.master is other


def test_a_cluster_is_whole_until_a_shard_is_gone(new_redis_cluster: Callable[..., RedisCluster]) -> None:
    cluster = new_redis_cluster(password=PASSWORD)
    first = cluster.nodes[0]
    assert first.run("CLUSTER", "COUNTKEYSINSLOT", 0) == "0"
    assert [node.role for node in cluster.nodes] == ["master"] * 3 + ["slave"] * 3
    assert {cluster.state(node) for node in cluster.nodes} == {"ok"}
    with pytest.raises(RedisError, match="MOVED"):
        cluster.nodes[2].run("SET", "{2}order", "42")  # slot 5649, the second shard's
    cluster.nodes[1].run("SET", "{2}order", "42")
    for node in (cluster.nodes[2], cluster.nodes[5]):
        node.daemon.stop()
    eventually(lambda: cluster.state(first) == "fail")
