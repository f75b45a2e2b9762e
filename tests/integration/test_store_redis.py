"""Redis, single, under Sentinel and as a cluster: dumped over the replication protocol, restored, and compared."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.backup.opening import open_target_repository
from ops_platform.cli.main import cli
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.clients.redis import SLOTS, RdbStream, RedisSession, slot_ranges
from ops_platform.definitions import build_defs
from ops_platform.doctor import examine_store
from ops_platform.errors import AccessDeniedError, ConflictError, CouldNotVerifyError, UnreachableError
from ops_platform.recovery.model import Scorecard, Verdict
from ops_platform.resources import PlatformResource
from ops_platform.stores import redis as stores_redis
from ops_platform.stores.kind import Check, Saved
from ops_platform.stores.redis import missing_slots
from tests import redis_rig
from tests.authority import Authority
from tests.rig import Ground, Platform, eventually, small_disk
from tests.servers import program
from tests.stores_rig import dump, gate, gates, prove, with_store

PASSWORD = 'a "quoted" word'


@pytest.fixture(scope="module")
def platform(ground: Ground) -> Iterator[Platform]:
    made = Platform(ground, {})
    (made.home / "redis-password").touch(mode=0o600)
    (made.home / "redis-password").write_text(PASSWORD)
    yield made
    made.close()


@pytest.fixture(scope="module")
def single() -> Iterator[redis_rig.Redis]:
    with redis_rig.replicated(replicas=0, password=PASSWORD) as made:
        fill(made.master)
        yield made.master


def fill(server: redis_rig.Redis, *, prefix: str = "", many: int = 300) -> None:
    """Keys of every type, some that end, one large."""
    server.run("EVAL", f"for i=1,{many} do redis.call('SET', KEYS[1]..i, i) end", 1, f"{prefix}n:")
    server.run("SET", f"{prefix}ending", "soon", "EX", 100_000)
    server.run("RPUSH", f"{prefix}list", *range(50))
    server.run("SADD", f"{prefix}set", *(f"m{i}" for i in range(600)))
    server.run("HSET", f"{prefix}hash", *(word for i in range(200) for word in (f"f{i}", f"v{i}")))
    server.run("ZADD", f"{prefix}zset", *(word for i in range(200) for word in (i / 3, f"m{i}")))
    server.run("XADD", f"{prefix}stream", "*", "field", "value")
    server.run("SET", f"{prefix}large", "x" * 50_000)


def entry(port: int, platform: Platform, **more: Any) -> dict[str, Any]:
    return {
        "id": "cache", "kind": "redis", "tls": False, "hosts": [{"host": "127.0.0.1", "port": port}],
        "password": f"file://{platform.home}/redis-password", **more,
    }  # fmt: skip


@pytest.mark.parametrize("diskless", ["yes", "no"])
def test_a_single_server_is_dumped_and_restored_key_by_key(
    platform: Platform, single: redis_rig.Redis, diskless: str
) -> None:
    single.run("CONFIG", "SET", "repl-diskless-sync", diskless)
    manifest = dump(platform, entry(single.port, platform))
    assert [part.name for part in manifest.parts] == ["shard-0"]
    card = prove(platform, entry(single.port, platform))
    assert card.verdict is Verdict.PASS, card.reason
    assert gates(card) == {
        "whole": "passed", "age": "passed", "rdb-shard-0": "passed", "alone": "passed", "persistence": "passed",
        "keys-shard-0": "passed", "sample-shard-0": "passed", "teardown": "passed",
    }  # fmt: skip
    assert card.strength.startswith("level 2")
    assert PASSWORD not in card.model_dump_json()


def test_a_dump_beside_a_writer_is_compared_within_what_changed(platform: Platform, single: redis_rig.Redis) -> None:
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            single.run("SET", f"n:{number % 300}", f"changed {number}")
            single.run("SET", f"new:{number}", number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        dump(platform, entry(single.port, platform))
    finally:
        ended.set()
        writer.join()
    card = prove(platform, entry(single.port, platform))
    assert card.verdict is Verdict.PASS, card.reason


class Altered(stores_redis.RedisStore):
    """The facts of the dump with a change, as if the restored data were another."""

    change: Any = None

    def files(self, saved: Saved) -> Iterator[Check]:
        type(self).change(saved.facts)
        return super().files(saved)


def _more_keys(facts: Any) -> None:
    for counted in facts["shards"][0]["keys"]:
        counted["keys"] += 100_000


def _other_value(facts: Any) -> None:
    next(found for found in facts["shards"][0]["sample"].values() if "digest" in found)["digest"] = "0"


def _other_end(facts: Any) -> None:
    next(iter(facts["shards"][0]["sample"].values()))["expires"] = 4_102_444_800_000


@pytest.mark.parametrize(
    ("change", "failing"),
    [(_more_keys, "keys-shard-0"), (_other_value, "sample-shard-0"), (_other_end, "sample-shard-0")],
)
def test_restored_data_that_is_not_the_sources_fails(
    platform: Platform, single: redis_rig.Redis, change: Any, failing: str
) -> None:
    repository_has_one(platform, single)
    target = with_store(platform, entry(single.port, platform))
    kind = type("Changed", (Altered,), {"change": staticmethod(change)})(platform.access, target, target.system)
    card = prove(platform, entry(single.port, platform), kind=kind)
    assert card.verdict is Verdict.FAIL
    assert [name for name, status in gates(card).items() if status == "failed"] == [failing]


def test_a_sample_of_which_nothing_is_left_to_compare_reaches_no_level_2(
    platform: Platform, single: redis_rig.Redis
) -> None:
    repository_has_one(platform, single)
    target = with_store(platform, entry(single.port, platform))
    members = {"change": staticmethod(lambda facts: facts["shards"][0]["sample"].clear())}
    kind = type("Emptied", (Altered,), members)(platform.access, target, target.system)
    card = prove(platform, entry(single.port, platform), kind=kind)
    assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
    assert gate(card, "sample-shard-0").status.value == "could_not_check"
    assert card.strength.startswith("level 1")


class Broken(stores_redis.RedisStore):
    """The RDB with a change, before or after its own tool has looked at it."""

    change: Any = None
    early: bool = True

    def files(self, saved: Saved) -> Iterator[Check]:
        if self.early:
            type(self).change(saved.part("shard-0"))
        return super().files(saved)

    def restore(self, saved: Saved, home: Path) -> Any:
        if not self.early:
            type(self).change(saved.part("shard-0"))
        return super().restore(saved, home)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _newer(file: Path) -> None:
    body = file.read_bytes()
    assert body.startswith(b"REDIS00")
    file.write_bytes(b"REDIS0099" + body[9:])


@pytest.mark.parametrize(
    ("change", "early", "verdict", "said"),
    [
        (_cut, True, Verdict.FAIL, "not restored"),
        (_cut, False, Verdict.FAIL, "the RDB does not load"),
        (_newer, True, Verdict.COULD_NOT_VERIFY, "RDB format version 99"),
        (_newer, False, Verdict.COULD_NOT_VERIFY, "the sandbox's Redis is older than the source"),
    ],
)
def test_an_rdb_that_is_cut_off_fails_and_one_of_a_newer_redis_is_not_judged(
    platform: Platform, single: redis_rig.Redis, change: Any, early: bool, verdict: Verdict, said: str
) -> None:
    repository_has_one(platform, single)
    target = with_store(platform, entry(single.port, platform))
    members = {"change": staticmethod(change), "early": early}
    kind = type("Changed", (Broken,), members)(platform.access, target, target.system)
    card = prove(platform, entry(single.port, platform), kind=kind)
    assert card.verdict is verdict, card.reason
    assert said in card.reason + " ".join(card.notes)
    assert not list(platform.home.glob("ops-verify-*"))


def test_a_sandbox_without_memory_or_room_on_its_disk_judges_nothing_and_leaves_nothing(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of 128 MiB is little in the RDB and much for a server that may have 150 MB."""
    little = platform.home / "redis-server"
    little.write_text(f'#!/bin/sh\nulimit -v 150000\nexec {program("redis-server")} "$@"\n')
    little.chmod(0o755)
    with redis_rig.replicated(replicas=0, password=PASSWORD) as made:
        made.master.run("SETRANGE", "large", (128 << 20) - 1, "x")
        system = entry(made.master.port, platform, id="large")
        dump(platform, system)
        programs = {"redis-server": str(little)}
        card = prove(platform, {**system, "sandbox": {"directory": str(platform.home), "programs": programs}})
        assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
        assert "not enough memory" in card.reason
        assert not list(platform.home.glob("ops-verify-*"))
        with small_disk("200k") as disk:
            tight = {**system, "sandbox": {"directory": str(disk)}}
            card = prove(platform, tight)
            assert (card.verdict, "are free" in card.reason) == (Verdict.COULD_NOT_VERIFY, True)
            # As of a disk that others fill meanwhile.
            roomy = shutil.disk_usage("/")._replace(free=1 << 40)
            monkeypatch.setattr(shutil, "disk_usage", lambda _path: roomy)
            card = prove(platform, tight)
            assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
            assert "No space left on device" in card.reason
            assert list(disk.iterdir()) == []


def repository_has_one(platform: Platform, single: redis_rig.Redis) -> None:
    target = with_store(platform, entry(single.port, platform))
    if not open_target_repository(platform.access, target).infos():
        dump(platform, entry(single.port, platform))


@pytest.mark.parametrize(("wanted", "said"), [("aof", "appendonly is no"), ("rdb", "save is empty")])
def test_a_source_that_keeps_nothing_fails_and_its_backup_is_restored_all_the_same(
    platform: Platform, single: redis_rig.Redis, wanted: str, said: str
) -> None:
    repository_has_one(platform, single)
    card = prove(platform, entry(single.port, platform, persistence=wanted))
    assert card.verdict is Verdict.FAIL
    assert said in gate(card, "persistence").result
    assert restored_whole(card)
    assert "the check persistence is about the source: it keeps the backup from nothing" in card.notes


def restored_whole(card: Scorecard) -> bool:
    """Restored, and every check of its data passed."""
    found = gates(card)
    return card.strength.startswith("level 2") and found["keys-shard-0"] == found["sample-shard-0"] == "passed"


def documented_rights() -> list[str]:
    """What the page says that the user needs of a server that is alone."""
    page = Path(__file__).parents[2] / "docs/how-to/back-up-other-stores.md"
    found = re.search(r"The user needs `(\+psync [^`]*)` on all keys", page.read_text())
    assert found is not None
    return found[1].split()


RIGHTS = documented_rights()


def with_rights(server: redis_rig.Redis, *rights: str) -> dict[str, str]:
    """A user that may do this alone: what an entry says of it."""
    server.run("ACL", "SETUSER", "backup", "reset", "on", f">{PASSWORD}", "~*", *rights)
    return {"user": "backup"}


@pytest.mark.parametrize(
    ("wanted", "decides", "not_asked"), [("aof", "appendfsync", "save"), ("rdb", "save", "appendfsync")]
)
def test_settings_that_nobody_may_read_are_no_pass_and_the_backup_is_restored_all_the_same(
    platform: Platform, wanted: str, decides: str, not_asked: str
) -> None:
    settings = {"appendonly": "yes", "save": "3600 1"}
    with redis_rig.replicated(replicas=0, password=PASSWORD, settings=settings) as made:
        fill(made.master, many=50)
        system = entry(made.master.port, platform, id=f"no-config-{wanted}", persistence=wanted)
        system |= with_rights(made.master, *RIGHTS)
        dump(platform, system)
        card = prove(platform, system)
        assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
        assert [name for name, status in gates(card).items() if status != "passed"] == ["persistence"]
        found = gate(card, "persistence")
        assert found.status.value == "could_not_check"
        for words in (f"{decides} could not be read", "the user needs +info and +config|get"):
            assert words in found.result
        assert not_asked not in found.result
        assert restored_whole(card)
        system["persistence"] = "any"
        assert prove(platform, system).verdict is Verdict.PASS, "where nothing is asked of them they decide nothing"
        system["persistence"] = wanted

        with_rights(made.master, *RIGHTS, "+config|get")
        dump(platform, system)
        assert prove(platform, system).verdict is Verdict.PASS


def test_databases_beyond_the_usual_are_restored_although_nobody_may_ask_how_many_there_are(platform: Platform) -> None:
    with redis_rig.replicated(replicas=0, password=PASSWORD, settings={"databases": "40"}) as made:
        fill(made.master, many=50)
        made.master.run("-n", "37", "SET", "far", "out")
        system = entry(made.master.port, platform, id="many-databases", persistence="any")
        system |= with_rights(made.master, *RIGHTS)
        dump(platform, system)
        card = prove(platform, system)
        assert card.verdict is Verdict.PASS, card.reason
        assert restored_whole(card)


def test_what_is_known_to_be_wrong_is_a_failure_beside_settings_that_nobody_may_read(
    platform: Platform, single: redis_rig.Redis
) -> None:
    system = entry(single.port, platform, id="no-aof", persistence="aof", **with_rights(single, *RIGHTS))
    dump(platform, system)
    card = prove(platform, system)
    assert card.verdict is Verdict.FAIL
    assert "appendonly is no" in gate(card, "persistence").result
    assert restored_whole(card)


def test_a_wrong_password_says_so_and_shows_nothing(platform: Platform, single: redis_rig.Redis) -> None:
    (platform.home / "wrong").touch(mode=0o600)
    (platform.home / "wrong").write_text("not the password")
    with pytest.raises(AccessDeniedError) as caught:
        dump(platform, entry(single.port, platform, password=f"file://{platform.home}/wrong"))
    assert "not the password" not in str(caught.value)


def test_the_doctor_looks_at_a_store_and_at_what_its_restore_needs(platform: Platform, single: redis_rig.Redis) -> None:
    cache = with_store(platform, entry(single.port, platform))  # first: it makes the access anew
    found = examine_store(platform.access, cache)
    assert {one.what: one.state for one in found.findings if one.what in ("server", "store", "key service", "sandbox")} == {
        "server": "good", "store": "good", "key service": "good", "sandbox": "good",
    }  # fmt: skip
    lacking = {"sandbox": {"programs": {"redis-server": "/nowhere/redis-server"}}}
    cache = with_store(platform, entry(free_port(), platform, **lacking))
    found = examine_store(platform.access, cache)
    bad = {one.what: one.found for one in found.findings if one.state == "bad"}
    assert bad.keys() == {"server", "sandbox"}
    assert "redis-server is not here" in bad["sandbox"]
    env = {"OPS_INVENTORY": str(platform.file)}
    done = CliRunner().invoke(cli, ["doctor", "cache"], env=env)
    assert done.exit_code == 1
    assert "what to do: install redis-server" in done.output


# Sentinel, and a failover in the middle


def test_over_tls_all_is_read_and_a_server_of_another_authority_is_not_believed(platform: Platform) -> None:
    authority, other = platform.home / "authority", platform.home / "other"
    for folder in (authority, other):
        folder.mkdir()
    ours = Authority(authority)
    chain, key = ours.issue("redis", "redis", hosts=("127.0.0.1",))
    port = free_port()
    settings = {"tls-port": str(port), "tls-cert-file": str(chain), "tls-key-file": str(key),
                "tls-ca-cert-file": str(ours.ca), "tls-auth-clients": "no"}  # fmt: skip
    with redis_rig.replicated(replicas=0, password=PASSWORD, settings=settings) as made:
        fill(made.master, many=50)
        system = entry(port, platform, id="tls-cache", tls=True, ca=str(ours.ca))
        dump(platform, system)
        card = prove(platform, system)
        assert card.verdict is Verdict.PASS, card.reason
        with pytest.raises(UnreachableError, match="TLS with Redis failed"):
            dump(platform, {**system, "ca": str(Authority(other).ca)})
        with pytest.raises(UnreachableError):
            dump(platform, {**system, "hosts": [{"host": "127.0.0.1", "port": made.master.port}]})


def test_under_sentinel_the_master_is_dumped_and_a_failover_meanwhile_is_a_failure(platform: Platform) -> None:
    with redis_rig.replicated(replicas=1, sentinels=3, password=PASSWORD) as made:
        fill(made.master, many=50)
        system = entry(0, platform, id="sentinel", mode="sentinel", master="main",
                       hosts=[{"host": "127.0.0.1", "port": one.port} for one in made.sentinels])  # fmt: skip
        dump(platform, system)
        card = prove(platform, system)
        assert card.verdict is Verdict.PASS, card.reason

        class FailsOver(stores_redis.RedisStore):
            def _dump_shard(self, *args: Any) -> Any:
                found = super()._dump_shard(*args)
                old = made.master.port
                made.sentinels[0].run("SENTINEL", "FAILOVER", "main")
                eventually(lambda: all(made.seen_master(one) != old for one in made.sentinels), why="no failover")
                return found

        target = with_store(platform, system)
        from ops_platform.stores.dump import run_backup

        before = open_target_repository(platform.access, target).infos()
        with pytest.raises(ConflictError, match="changed during the dump"):
            run_backup(platform.access, target, kind=FailsOver(platform.access, target, target.system))  # type: ignore[arg-type]
        assert open_target_repository(platform.access, target).infos() == before


def test_a_master_that_only_a_sentinel_names_that_is_split_off_is_not_dumped(platform: Platform) -> None:
    """What the other one has acknowledged since is not in it, and would be missed by no comparison with it."""
    plain = platform.home / "plain-password"  # a sentinel cannot read the other one again from what it writes
    plain.touch(mode=0o600)
    plain.write_text("plain")
    with redis_rig.replicated(replicas=2, sentinels=3, password="plain") as made:
        made.split()
        old, mine = made.servers[0], made.sentinels[0]
        system = entry(0, platform, id="split", mode="sentinel", master="main", timeout="2s", password=f"file://{plain}",
                       hosts=[{"host": "127.0.0.1", "port": one.port} for one in made.sentinels])  # fmt: skip
        wanted = f"1 of 3 sentinels say who is master.*127.0.0.1:{mine.port} names 127.0.0.1:{old.port}"
        with pytest.raises(CouldNotVerifyError, match=wanted):
            dump(platform, system)
        target = with_store(platform, system)
        assert open_target_repository(platform.access, target).infos() == []
        found = next(one for one in examine_store(platform.access, target).findings if one.what == "server")
        assert (found.state, "name addresses in `hosts`" in str(found.remedy)) == ("bad", True)


# A cluster


def test_a_cluster_is_dumped_shard_by_shard_and_one_without_all_slots_is_refused(
    platform: Platform, new_redis_cluster: Callable[..., redis_rig.RedisCluster]
) -> None:
    made = new_redis_cluster(password=PASSWORD)
    for number, tag in enumerate(("{a}", "{b}", "{c}", "{d}")):
        node = owner_of(made, tag)
        fill(node, prefix=tag, many=20 + number)
    system = entry(made.nodes[0].port, platform, id="cluster", mode="cluster",
                   hosts=[{"host": "127.0.0.1", "port": node.port} for node in made.nodes])  # fmt: skip
    manifest = dump(platform, system)
    assert [part.name for part in manifest.parts] == ["shard-0", "shard-1", "shard-2"]
    card = prove(platform, system)
    assert card.verdict is Verdict.PASS, card.reason
    assert gates(card)["slots"] == "passed"

    # A node of it that the inventory has as a single server: two thirds of the keys would be in no backup.
    for node in (made.nodes[0], made.nodes[redis_rig.SHARDS]):
        refused_as_a_node(platform, entry(node.port, platform, id="node"))

    made.nodes[0].run("CLUSTER", "DELSLOTS", 0)
    for node in made.nodes[1:]:
        node.run("CLUSTER", "DELSLOTS", 0)
    with pytest.raises(ConflictError, match="nobody serves 0-0 of the 16384 slots"):
        dump(platform, system)


def refused_as_a_node(platform: Platform, system: dict[str, Any]) -> None:
    """No backup begins, the doctor says so, and what to do is a key of the inventory."""
    wanted = f"set `mode: cluster` at the system {system['id']} in platform.yaml"
    with pytest.raises(ConflictError, match="it is a node of a cluster") as caught:
        dump(platform, system)
    assert wanted in str(caught.value)
    target = with_store(platform, system)
    assert open_target_repository(platform.access, target).infos() == []
    found = next(one for one in examine_store(platform.access, target).findings if one.what == "server")
    assert (found.state, wanted in str(found.remedy)) == ("bad", True)


def test_a_node_of_a_cluster_under_sentinel_is_refused(platform: Platform) -> None:
    settings = {"cluster-enabled": "yes", "cluster-port": str(free_port()), "cluster-config-file": "nodes.conf"}
    with redis_rig.replicated(replicas=0, sentinels=1, password=PASSWORD, settings=settings) as made:
        hosts = [{"host": "127.0.0.1", "port": one.port} for one in made.sentinels]
        refused_as_a_node(platform, entry(0, platform, id="sentinel-node", mode="sentinel", master="main", hosts=hosts))


def test_servers_of_which_none_has_the_others_data_are_refused_and_a_replica_of_the_same_is_not(
    platform: Platform,
) -> None:
    with (
        redis_rig.replicated(replicas=1, password=PASSWORD) as one,
        redis_rig.replicated(replicas=1, password=PASSWORD) as other,
    ):
        fill(one.master, many=50)
        fill(other.master, many=60)

        def named(*servers: redis_rig.Redis) -> dict[str, Any]:
            return entry(0, platform, id="several", hosts=[{"host": "127.0.0.1", "port": s.port} for s in servers])

        for servers in (
            (one.master, other.master),
            (one.replicas[0], other.replicas[0]),
            (one.master, other.replicas[0]),
        ):
            with pytest.raises(ConflictError, match="none has the other's data") as caught:
                dump(platform, named(*servers))
            assert all(f"127.0.0.1:{server.port}" in caught.value.what for server in servers)
            assert "declare a system for each master" in str(caught.value)
        manifest = dump(platform, named(one.replicas[0], one.master))
        assert manifest.source == f"127.0.0.1:{one.master.port}"
        assert prove(platform, named(one.replicas[0], one.master)).verdict is Verdict.PASS


def test_a_server_that_may_not_be_asked_whether_it_is_a_node_is_not_dumped(
    platform: Platform, single: redis_rig.Redis
) -> None:
    """All that a dump reads of INFO is allowed but this one section; then INFO goes by another name."""
    sections = [f"+info|{name}" for name in ("replication", "server", "keyspace", "persistence")]
    rights = [*(right for right in RIGHTS if right != "+info"), *sections]
    system = entry(single.port, platform, id="unasked", **with_rights(single, *rights))
    with pytest.raises(AccessDeniedError, match="nobody can say whether this server is a node of a cluster") as caught:
        dump(platform, system)
    assert caught.value.remedy == "ACL SETUSER backup +info"
    with_rights(single, *rights, "+info|cluster")
    dump(platform, system)

    with redis_rig.replicated(replicas=0, password=PASSWORD, settings={"rename-command": "INFO HIDDEN"}) as made:
        renamed = entry(made.servers[0].port, platform, id="renamed")
        with pytest.raises(AccessDeniedError, match=r"nobody can say .* unknown command 'INFO'") as caught:
            dump(platform, renamed)
        assert "let the user ask INFO (+info), by that name" in str(caught.value)


def test_no_answer_to_whether_it_is_a_node_is_no_no() -> None:
    """As from a proxy that makes up an INFO of its own."""

    class Proxy:
        def execute_command(self, *_words: Any, **_options: Any) -> dict[str, str]:
            return {}

    with pytest.raises(AccessDeniedError, match="INFO has no cluster_enabled"):
        stores_redis._is_node(RedisSession(Proxy(), "here:1", "default"))


def test_a_backup_that_does_not_say_whether_its_server_was_a_node_is_restored_and_proves_nothing(
    platform: Platform, single: redis_rig.Redis
) -> None:
    """One that was taken before that was asked."""
    repository_has_one(platform, single)
    target = with_store(platform, entry(single.port, platform))
    members = {"change": staticmethod(lambda facts: facts.pop("alone"))}
    kind = type("Older", (Altered,), members)(platform.access, target, target.system)
    card = prove(platform, entry(single.port, platform), kind=kind)
    assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
    assert "may hold one node's slots" in gate(card, "alone").result
    assert restored_whole(card)


def owner_of(made: redis_rig.RedisCluster, tag: str) -> redis_rig.Redis:
    slot = int(made.nodes[0].run("CLUSTER", "KEYSLOT", tag))
    return made.nodes[slot * redis_rig.SHARDS // SLOTS]


# The protocol, byte for byte


def stream_of(answer: bytes, *, piece: int = 1 << 16) -> bytes:
    """What `RdbStream` makes of a server that says this after PSYNC, in pieces of that size."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        for _ in range(2):
            theirs.recv(1 << 16)
            theirs.sendall(b"+OK\r\n")
        theirs.recv(1 << 16)
        with contextlib.suppress(OSError):  # who has heard enough goes away
            for at in range(0, len(answer), piece):
                theirs.sendall(answer[at : at + piece])
        theirs.close()

    server = threading.Thread(target=serve)
    server.start()
    try:
        return b"".join(bytes(piece) for piece in RdbStream(ours, "here").pieces())
    finally:
        ours.close()
        server.join()


HEAD = b"+FULLRESYNC " + b"f" * 40 + b" 123\r\n\n\n\n"
MARK = b"m" * 39 + b"k"


@given(body=st.binary(max_size=300), piece=st.integers(1, 90), diskless=st.booleans())
def test_the_data_arrives_whole_however_it_is_cut(body: bytes, piece: int, diskless: bool) -> None:
    sent = b"$EOF:" + MARK + b"\r\n" + body + MARK if diskless else b"$%d\r\n" % len(body) + body
    assert stream_of(HEAD + sent, piece=piece) == body


@pytest.mark.parametrize("diskless", [True, False])
def test_data_that_comes_at_once_with_its_head_arrives_whole(diskless: bool) -> None:
    """As from a fast server to a reader that was kept waiting."""
    body = random.Random(1).randbytes(3 << 20)
    sent = b"$EOF:" + MARK + b"\r\n" + body + MARK if diskless else b"$%d\r\n" % len(body) + body
    assert stream_of(HEAD + sent, piece=len(HEAD + sent)) == body


def test_what_never_ends_its_first_line_is_an_error() -> None:
    with pytest.raises(UnreachableError, match="no answer"):
        stream_of(b"x" * (1 << 20), piece=1 << 20)


@pytest.mark.parametrize(
    "answer",
    [
        HEAD, HEAD + b"$100\r\nshort", HEAD + b"$EOF:" + MARK + b"\r\nno end mark", HEAD + b"$EOF:short\r\nbody", b"",
    ],
)  # fmt: skip
def test_data_that_does_not_come_to_its_end_is_an_error(answer: bytes) -> None:
    with pytest.raises(UnreachableError, match="did not come to its end"):
        stream_of(answer)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(b"-NOPERM no right\r\n", AccessDeniedError), (b"-LOADING it loads\r\n", UnreachableError)],
)
def test_a_refusal_is_told_apart(answer: bytes, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        stream_of(answer)


@given(
    st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)).map(lambda p: (min(p), max(p))), max_size=6
    )
)
def test_missing_slots_are_exactly_those_that_nobody_holds(held: list[tuple[int, int]]) -> None:
    covered = {slot for first, last in held for slot in range(first, last + 1)}
    missing = {slot for first, last in missing_slots(held) for slot in range(first, last + 1)}
    assert missing == set(range(SLOTS)) - covered


def test_slots_that_move_are_refused() -> None:
    line = "a 127.0.0.1:1@2 myself,master - 0 0 1 connected 0-5460 [77->-b]\n"
    with pytest.raises(ConflictError, match="slot 77 is being moved"):
        slot_ranges(line)
    assert slot_ranges(line.replace(" [77->-b]", " 9000")) == {"a": [(0, 5460), (9000, 9000)]}


# Dagster: the same shape as of PostgreSQL


def test_dagster_backs_up_proves_and_judges_each_store_as_a_partition_of_its_kind(
    platform: Platform, single: redis_rig.Redis
) -> None:
    with_store(platform, entry(single.port, platform, id="other-cache"))
    with_store(platform, entry(single.port, platform))
    repository = build_defs(platform.access.loaded).get_repository_def()
    assert {"backup_redis", "verify_redis", "check_redis"} <= set(repository.job_names)
    assert {"backups_redis", "verifications_redis", "promises_redis"} <= {s.name for s in repository.schedule_defs}
    node = repository.asset_graph.get(dg.AssetKey(["redis", "backup"]))
    assert node.partitions_def is not None
    assert set(node.partitions_def.get_partition_keys()) >= {"cache", "other-cache"}
    with dg.DagsterInstance.ephemeral() as instance:
        sensor = repository.get_sensor_def("new_stores")
        path = str(platform.file)
        context = dg.build_sensor_context(instance=instance, repository_def=repository,
                                          resources={"platform": PlatformResource(inventory_path=path)})  # fmt: skip
        asked = {request.partition_key: request.job_name for request in sensor(context).run_requests}  # type: ignore[union-attr]
        assert asked["other-cache"] == "backup_redis"

        done = repository.get_job("backup_redis").execute_in_process(
            instance=instance, partition_key="cache", resources={"platform": PlatformResource(inventory_path=path)}
        )
        assert done.success
        made = {
            event.asset_key.to_user_string() for event in done.get_asset_materialization_events() if event.asset_key
        }
        assert made == {"redis/backup", "redis/verification"}
        judged = {found.check_name: found.passed for found in done.get_asset_check_evaluations()}
        assert judged == {"backup_fresh": True, "proven": True, "rpo_met": True, "rto_met": True}
