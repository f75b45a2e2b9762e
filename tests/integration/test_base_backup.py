"""Base backups against real servers: what is taken comes back, byte by byte and row by row."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import open_engine
from ops_platform.backup.model import BackupKind
from ops_platform.clients.postgres_binaries import find_postgres, run_tool
from tests.rig import Cluster, Platform, scratch


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
def test_what_is_taken_comes_back(
    major: int, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = new_cluster(major)
    cluster.sql("create table t as select i, md5(i::text) from generate_series(1, 20000) i")
    platform = new_platform({"app-db": [cluster]})
    manifest = run_backup(platform.access, platform.target)
    assert (manifest.kind, manifest.major) == (BackupKind.FULL, major)
    engine = open_engine(platform.access, platform.target)
    (info,) = engine.list()
    assert info.backup_id == manifest.backup_id
    directory = scratch("ops-restore-")
    try:
        engine.fetch_base(info, directory / "data")
        checker = find_postgres(major)
        assert checker is not None
        if verify := checker.tool("pg_verifybackup"):
            done = run_tool([verify, "-n", "-i", "tablespace_map", directory / "data"])
            assert done.returncode == 0, done.stderr
    finally:
        shutil.rmtree(directory)
