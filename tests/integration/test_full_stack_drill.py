"""The drill of the full stack: a database, a cache and Git, each restored in its turn from a real backup, and the critical path told."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from ops_platform.backup.basebackup import run_backup
from ops_platform.cli.main import cli
from ops_platform.clients.access import Access
from ops_platform.drilling import write_reports
from ops_platform.drills.begin import Beginner, planned
from ops_platform.drills.model import Ending
from ops_platform.drills.scorecard import card_of
from ops_platform.inventory import load
from ops_platform.stores.redis import RestoredRedis
from tests import kube_rig
from tests.drill_rig import Held, die, held_on, killed, passed
from tests.redis_rig import Replicated
from tests.rig import Cluster, Ground, Platform, eventually
from tests.stores_rig import cluster_of, dump, hand_over, with_store


def repository(at: Path) -> str:
    at.mkdir()
    who = {f"GIT_{role}_{what}": "x@example.com" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    (at / "values.yaml").write_text("replicas: 2\n")
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        env = {**os.environ, **who, "GIT_CONFIG_GLOBAL": "/dev/null"}
        subprocess.run(["git", "-C", str(at), *words], check=True, env=env)
    return f"file://{at}"


@contextlib.contextmanager
def spoilt(platform: Platform, key: str) -> Iterator[None]:
    """One byte of an object is another one."""
    store = platform.repository.store
    whole = store.get(key)
    store.put(key, bytes([whole[0] ^ 1]) + whole[1:])
    yield
    store.put(key, whole)


def test_everything_comes_back_in_order_and_the_critical_path_is_told(
    new_cluster: Callable[..., Cluster],
    new_platform: Callable[..., Platform],
    new_redis: Callable[..., Replicated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First it is refused, because something has no backup; what is left out is named."""
    plan = {"id": "stack", "runbook": "full-stack-drill", "targets": ["manifests"]}
    manifests = {
        "id": "manifests", "kind": "git", "repositories": [{"name": "infra", "url": repository(tmp_path / "infra")}],
        "depends_on": ["app-db", "cache"],
    }  # fmt: skip
    redis = new_redis(replicas=0).master
    redis.run("SET", "k", "v")
    cache = {"id": "cache", "kind": "redis", "tls": False, "hosts": [{"host": "127.0.0.1", "port": redis.port}]}
    cluster = new_cluster(18)
    held = held_on(cluster, new_platform, [])
    platform = held.platform
    with_store(platform, cache)
    with_store(platform, manifests)
    platform.body["drills"]["plan"] = [{**plan, "mode": "enforce"}]
    platform.reload()
    cluster.sql("create table t as select generate_series(1, 1000) n")
    taken = run_backup(platform.access, platform.target)
    dump(platform, manifests)

    held = Held(cluster, platform)
    request = planned(platform.access, "stack", None, {}, operator="ann", trigger="a test")
    result = Beginner(platform.access, held.store).plan(request)
    (why,) = [r.reason for r in result.rulings if r.guard == "preflight" and not r.allows]
    assert "order: none" in why

    dump(platform, cache)
    held = Held(cluster, platform)
    drill = held.drill("stack")
    card = passed(drill)
    parts = {part.target: part for part in card.stack}
    assert list(parts) == ["app-db", "cache", "manifests"]
    assert parts["manifests"].needs == ["app-db", "cache"]
    seconds = {name: part.seconds or 0.0 for name, part in parts.items()}
    (rto,) = [o for o in card.objectives if o.name == "rto"]
    assert rto.measured == pytest.approx(max(seconds["app-db"], seconds["cache"]) + seconds["manifests"], abs=0.01)
    assert parts["manifests"].critical
    assert "Make faster first" in rto.how
    page = write_reports(platform.access, held.store, drill).read_text()
    assert "The critical path" in page
    monkeypatch.setenv("OPS_INVENTORY", str(platform.access.loaded.path))
    said = CliRunner().invoke(cli, ["drill", "show", drill.id], catch_exceptions=False).output
    assert "gain at most" in said
    assert "manifests" in said

    held = Held(cluster, platform)
    with spoilt(platform, taken.archives[0].blocks[0].key):
        bad = card_of(held.drill("stack"))
    assert bad is not None
    assert bad.verdict == "FAIL"
    assert "the verification broke off: app-db/backup/" in bad.reason
    assert "it never served" in bad.reason
    assert [o.how for o in bad.objectives] == ["it never served, so there is no time of the whole: app-db"]
    assert [(part.critical, part.gain) for part in bad.stack] == [(False, None)] * 3, "nobody knows the longest way"

    without = passed(held.drill("stack", without="cache, app-db"))
    assert {part.target: part.verdict for part in without.stack} == {
        "manifests": "PASS", "app-db": "SKIPPED", "cache": "SKIPPED",
    }  # fmt: skip
    assert any("nothing is proven of it: cache (left out" in note for note in without.notes)
    refused = held.begin("stack", without="manifests")
    assert refused.drill is None, "what it is about was left out"
    assert [r.guard for r in refused.result.rulings if not r.allows] == ["preflight"]

    # Killed while the cache's sandbox serves: the next start takes it away.
    def until_the_cache_serves() -> None:
        RestoredRedis.checks = die  # type: ignore[method-assign,assignment]
        platform.access = Access(load(platform.file))  # a process of its own has connections of its own
        Held(cluster, platform).drill("stack", without="app-db")

    assert killed(until_the_cache_serves)
    assert list(platform.home.glob("ops-verify-cache-*"))
    held = Held(cluster, platform)
    eventually(lambda: held.engine.sweep(lost_after=timedelta(0)), why="its worker holds it still")
    assert not list(platform.home.glob("ops-verify-*"))
    (lost,) = held.store.list()[-1:]
    assert lost.ending is Ending.LOST
    assert {r.kind: r.gone_at is not None for r in held.store.resources(lost.id)} == {"sandbox": True}

    # A machine without Redis' server: it is skipped, said, and nothing of it counts.
    with_store(platform, {**cache, "sandbox": {"programs": {"redis-server": "/nowhere/redis-server"}}})
    held = Held(cluster, platform)
    lacking = passed(held.drill("stack", without="app-db"))
    assert {part.target: part.verdict for part in lacking.stack}["cache"] == "SKIPPED"
    assert any("nothing is proven of it: cache (the program redis-server is not here" in note for note in lacking.notes)
    assert "Skipped, and not in it: " in next(o.how for o in lacking.objectives if o.name == "rto")
    assert "cache" not in " ".join(check.title for check in lacking.checks)


def test_vault_database_cache_and_cluster_come_back_in_the_order_of_their_dependencies(
    ground: Ground,
    kube: kube_rig.Kube,
    new_cluster: Callable[..., Cluster],
    new_platform: Callable[..., Platform],
    new_redis: Callable[..., Replicated],
) -> None:
    """Everything that a company loses with a zone: what opens the backups, the database, two stores that need it, and the objects that run it."""
    cluster = new_cluster(18)
    held = held_on(cluster, new_platform, [])
    platform = held.platform
    redis = new_redis(replicas=0).master
    redis.run("SET", "k", "v")
    namespace = kube.namespace("stack")
    kube.api.post(
        f"{kube_rig.CORE}/namespaces/{namespace}/configmaps", {"metadata": {"name": "settings"}, "data": {"a": "1"}}
    )
    hand_over(kube, platform.home)
    infra = repository(platform.home / "infra")
    ground.component("vault")
    stores = [
        {"id": "keys", "kind": "vault", "vault": "v",
         "restore": {"shares": [f"file://{ground.place.directory}/secrets/vault.unseal_key"]}},
        {"id": "cache", "kind": "redis", "tls": False, "hosts": [{"host": "127.0.0.1", "port": redis.port}], "depends_on": ["app-db"]},
        {"id": "config", "kind": "git", "repositories": [{"name": "infra", "url": infra}], "depends_on": ["keys"]},
        {**cluster_of(platform.home, namespace), "id": "manifests", "depends_on": ["cache", "config"]},
    ]  # fmt: skip
    for store in stores:
        with_store(platform, store)
    platform.body["targets"][0]["depends_on"] = ["keys"]
    platform.body["drills"]["plan"] = [
        {"id": "stack", "runbook": "full-stack-drill", "targets": ["manifests"], "mode": "enforce"}
    ]
    platform.reload()
    run_backup(platform.access, platform.target)
    for store in stores:
        dump(platform, store)

    held = Held(cluster, platform)
    drill = held.drill("stack")
    card = passed(drill)
    turns = {part["target"]: part for part in held.store.steps(drill.id)["restored"].facts["parts"]}
    assert turns["config"]["began"] < turns["app-db"]["began"] + turns["app-db"]["took"], "side by side"
    assert turns["cache"]["began"] >= turns["app-db"]["began"] + turns["app-db"]["took"] - 0.01, "it needs it"
    parts = {part.target: part for part in card.stack}
    assert set(parts) == {"keys", "app-db", "cache", "config", "manifests"}
    assert {part.verdict for part in card.stack} == {"PASS"}
    assert set(parts["manifests"].needs) == set(parts) - {"manifests"}
    assert [part.target for part in card.stack if part.critical] == ["keys", "app-db", "cache", "manifests"]
    seconds = {name: part.seconds or 0.0 for name, part in parts.items()}
    (rto,) = [o for o in card.objectives if o.name == "rto"]
    assert rto.measured == pytest.approx(
        sum(seconds[name] for name in ("keys", "app-db", "cache", "manifests")), abs=0.01
    )
    assert parts["config"].starts == pytest.approx(seconds["keys"], abs=0.01)
    assert "keys → app-db → cache → manifests takes" in rto.how
    assert not [*platform.home.glob("ops-verify-*")]
