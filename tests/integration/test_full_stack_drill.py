"""The drill of the full stack: a database, a cache and Git, each restored in its turn from a real backup, and the critical path told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from ops_platform.backup.basebackup import run_backup
from ops_platform.cli.main import cli
from ops_platform.drilling import write_reports
from ops_platform.drills.begin import Beginner, planned
from ops_platform.drills.scorecard import card_of
from tests.drill_rig import Held, held_on, passed
from tests.redis_rig import Replicated
from tests.rig import Cluster, Platform
from tests.stores_rig import dump, with_store


def repository(at: Path) -> str:
    at.mkdir()
    who = {f"GIT_{role}_{what}": "x@example.com" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    (at / "values.yaml").write_text("replicas: 2\n")
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        env = {**os.environ, **who, "GIT_CONFIG_GLOBAL": "/dev/null"}
        subprocess.run(["git", "-C", str(at), *words], check=True, env=env)
    return f"file://{at}"


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
    run_backup(platform.access, platform.target)
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

    without = passed(held.drill("stack", without="cache, app-db"))
    assert [part.target for part in without.stack] == ["manifests"]
    assert any("left out" in note and "app-db, cache" in note for note in without.notes)
    assert card_of(drill) is not None
