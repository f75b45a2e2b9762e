"""Backups under Object Lock: every object that a restore needs is locked from its upload on, and the proof of it too."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.expiry import expire
from ops_platform.clients.objectstore import DeleteOutcome
from ops_platform.clients.s3 import Lock
from ops_platform.recovery.model import Verdict
from ops_platform.recovery.verify import verify
from tests.rig import Cluster, Ground, Platform


def test_a_backup_and_its_proof_are_locked(
    ground: Ground, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    ground.store("", bucket="locked-backups", lock=Lock("GOVERNANCE", timedelta(days=1))).close()
    lock = {"mode": "GOVERNANCE", "retain": "2d"}
    cluster = new_cluster(18)
    cluster.sql("create table t as select generate_series(1, 1000) i")
    platform = new_platform({"app-db": [cluster]}, store={"bucket": "locked-backups", "object_lock": lock})
    manifest = run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason

    store = platform.repository.store
    partial = [info.key for info in store.list("app-db/wal/") if info.key.endswith(".partial")]
    kept = [info.key for info in store.list("app-db/") if info.key not in partial]
    assert {key.split("/")[1] for key in kept} == {"backup", "wal", "proof", "scorecard"}
    soon = datetime.now(UTC) + timedelta(days=1)
    for key in kept:
        found = store.retention(key)
        assert found is not None, key
        assert (found.mode, found.until > soon) == ("GOVERNANCE", True), key
    for key in partial:
        assert store.retention(key) is None, "the unfinished segment is replaced every few seconds"

    assert store.delete(platform.repository.manifest_key(manifest.backup_id)) is DeleteOutcome.PINNED
    assert [info.backup_id for info in platform.repository.infos()] == [manifest.backup_id]
    assert expire(platform.access, platform.target, actor="test").ok
