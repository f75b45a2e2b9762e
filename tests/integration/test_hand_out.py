"""`ops backup hand-out`: files that the stores' own programs take back, and nothing of a backup that is not whole."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ops_platform.errors import CorruptionError, CouldNotVerifyError
from ops_platform.stores.hand_out import HandedOut, hand_out
from tests import redis_rig
from tests.integration import test_commands
from tests.rig import Ground, Platform, small_disk
from tests.stores_rig import dump, repository, with_store

KEYS = 2000


@pytest.fixture(scope="module")
def platform(ground: Ground) -> Iterator[Platform]:
    made = Platform(ground, {})
    yield made
    made.close()


@pytest.fixture(scope="module")
def source() -> Iterator[redis_rig.Redis]:
    with redis_rig.replicated(replicas=0, settings={"enable-debug-command": "yes", "rdbcompression": "no"}) as made:
        made.master.run("EVAL", f"for i=1,{KEYS} do redis.call('SET', 'n:'..i, string.rep(i, 50)) end", 0)
        made.master.run("ZADD", "zset", 1, "a", 2, "b")
        yield made.master


@pytest.fixture(scope="module")
def cache(platform: Platform, source: redis_rig.Redis) -> dict[str, Any]:
    entry = {"id": "cache", "kind": "redis", "tls": False, "hosts": [{"host": "127.0.0.1", "port": source.port}]}
    dump(platform, entry)
    return entry


def ops(platform: Platform, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return test_commands.ops(platform, "backup", "hand-out", *map(str, words), code=code)


def test_redis_itself_takes_its_backup_back(
    platform: Platform, cache: dict[str, Any], source: redis_rig.Redis, tmp_path: Path
) -> None:
    into = tmp_path / "out" / "cache"
    done = TypeAdapter(HandedOut).validate_json(ops(platform, "cache", "--into", into, "--json").stdout)
    assert (done.target_id, done.kind, done.into) == ("cache", "redis", into)
    assert {path.name for path in into.iterdir()} == {"shard-0", "facts.json"}
    assert done.files == {"shard-0": (into / "shard-0").stat().st_size}
    assert stat.S_IMODE(into.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in into.iterdir()} == {0o600}
    server = redis_rig.Redis(tmp_path, {"dbfilename": "dump.rdb", "enable-debug-command": "yes"})
    (into / "shard-0").rename(server.home / "dump.rdb")
    server.daemon.start()
    try:
        assert server.run("DBSIZE") == source.run("DBSIZE") == str(KEYS + 1)
        assert server.run("DEBUG", "DIGEST") == source.run("DEBUG", "DIGEST")
    finally:
        server.daemon.stop()


def test_git_itself_takes_its_backup_back(platform: Platform, tmp_path: Path) -> None:
    def git(*words: object) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        done = subprocess.run(["git", *who, *map(str, words)], check=True, capture_output=True, text=True)
        return done.stdout

    work = tmp_path / "work"
    git("init", "-q", "-b", "main", work)
    git("-C", work, "commit", "-q", "--allow-empty", "-m", "first")
    git("-C", work, "tag", "-a", "v1", "-m", "One")
    dump(platform, {"id": "config", "kind": "git", "repositories": [{"name": "infra", "url": f"file://{work}"}]})
    (into := tmp_path / "out").mkdir()
    assert "repository-0" in ops(platform, "config", "--into", into).stdout
    git("clone", "-q", "--mirror", into / "repository-0", tmp_path / "infra.git")
    refs = ["for-each-ref", "--format=%(objectname) %(refname)", "refs/heads", "refs/tags"]
    assert git("-C", tmp_path / "infra.git", *refs) == git("-C", work, *refs) != ""


def test_what_cannot_be_handed_out_is_said_and_touches_nothing(
    platform: Platform, cache: dict[str, Any], tmp_path: Path
) -> None:
    with_store(platform, cache)
    (kept := tmp_path / "kept").write_text("somebody's")
    assert "it is not an empty directory" in ops(platform, "cache", "--into", tmp_path, code=2).stderr
    assert kept.read_text() == "somebody's"
    unknown = ops(platform, "cache", "--backup", "20200101T000000Z-S-00000000", "--into", tmp_path / "a", code=2)
    assert "there is no backup 20200101T000000Z-S-00000000 of cache" in unknown.stderr
    with_store(platform, {**cache, "id": "empty"})
    assert "there is no backup of empty" in ops(platform, "empty", "--into", tmp_path / "a", code=1).stderr
    assert not (tmp_path / "a").exists()


def test_a_block_that_is_not_as_it_was_written_leaves_no_file(
    platform: Platform, cache: dict[str, Any], tmp_path: Path
) -> None:
    manifest = dump(platform, cache)
    held = repository(platform, cache)
    key = manifest.parts[0].blocks[0].key
    raw = held.store.get(key)
    held.store.put(key, raw[:-1] + bytes([raw[-1] ^ 1]))
    (there := tmp_path / "there").mkdir()
    try:
        for into in (there, tmp_path / "new"):
            with pytest.raises(CorruptionError):
                hand_out(platform.access, with_store(platform, cache), into)
        assert list(there.iterdir()) == []
        assert not (tmp_path / "new").exists()
    finally:
        held.store.put(key, raw)


def test_a_disk_without_room_is_named_before_anything_is_written(platform: Platform, cache: dict[str, Any]) -> None:
    with small_disk("64k") as disk, pytest.raises(CouldNotVerifyError, match="are needed and"):
        hand_out(platform.access, with_store(platform, cache), disk / "out")
    assert not (disk / "out").exists()


def test_of_postgresql_it_is_a_restore(ground: Ground, new_platform: Any, new_cluster: Any, tmp_path: Path) -> None:
    platform = new_platform({"app-db": [new_cluster(18)]})
    said = ops(platform, "app-db", "--into", tmp_path / "x", code=2).stderr
    assert "ops restore app-db --latest --into" in said
