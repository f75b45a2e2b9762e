"""kill -9 in the middle: of a process that takes a backup, of one that restores, of the database itself; and a promotion.

The processes are children of ours (`killed_child`) that stop before every step and are told to go on, so that a kill hits the
moment that it is meant for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import NativeEngine
from ops_platform.backup.fetch import JOURNAL, fetch_backup
from ops_platform.backup.model import BackupKind, Manifest
from ops_platform.backup.repository import Repository
from ops_platform.clients.postgres_binaries import PostgresServer, find_postgres, free_port, run_as, run_tool
from ops_platform.errors import ConflictError, UnreachableError, UsageError
from tests.integration.wal_rig import FaultyStore, eventually
from tests.rig import Cluster, Ground, Platform, scratch

ROOT = Path(__file__).parents[2]
CONTROL = "global/pg_control"


def killed_at(platform: Platform, moment: Callable[[str], bool], *arguments: object) -> list[str]:
    """Run the child up to the step that `moment` chooses, kill it there; the steps that it had done or begun."""
    words = [sys.executable, "-m", "tests.integration.killed_child", *map(str, arguments)]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=platform.env
    )
    assert process.stdin is not None
    assert process.stdout is not None
    steps: list[str] = []
    try:
        for line in process.stdout:
            steps.append(line.strip())
            if moment(steps[-1]):
                process.send_signal(signal.SIGKILL)
                assert process.wait(30) == -signal.SIGKILL
                return steps
            process.stdin.write("\n")
            process.stdin.flush()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    raise AssertionError(f"the child ended by itself after {steps[-3:]}")


def nth(number: int, begins: str) -> Callable[[str], bool]:
    """The moment before the n-th step of that kind."""
    seen: list[str] = []

    def moment(text: str) -> bool:
        if begins in text:
            seen.append(text)
        return len(seen) == number

    return moment


@dataclass
class Rig:
    cluster: Cluster
    platform: Platform
    full: Manifest
    incremental: Manifest

    @property
    def space(self) -> str:
        return next(archive.location or "" for archive in self.full.archives if archive.oid)


@pytest.fixture(scope="module")
def rig(ground: Ground) -> Iterator[Rig]:
    """A cluster with a tablespace, a full backup and an incremental on top of it."""
    home = scratch("ops-pg-test-")
    cluster = Cluster(18, home)
    (home / "space").mkdir()
    run_as().own(home / "space")
    platform = Platform(ground, {"app-db": [cluster]})
    try:
        cluster.sql(f"create tablespace aside location '{home}/space'")
        cluster.sql("create table t tablespace aside as select i, md5(i::text) from generate_series(1, 20000) i")
        full = run_backup(platform.access, platform.target)
        cluster.sql("insert into t select i, 'later' from generate_series(1, 5000) i")
        incremental = run_backup(platform.access, platform.target)
        assert incremental.kind is BackupKind.INCREMENTAL
        yield Rig(cluster, platform, full, incremental)
    finally:
        platform.close()
        cluster.stop()
        shutil.rmtree(home)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = scratch("ops-restore-")
    yield made
    shutil.rmtree(made)


def tree(root: Path) -> dict[str, tuple[int, int, str]]:
    """Everything below: mode, owner, and the content's digest."""
    found: dict[str, tuple[int, int, str]] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content = b"" if not path.is_file() or path.is_symlink() else path.read_bytes()
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, hashlib.sha256(content).hexdigest())
    return found


# A backup


def test_a_killed_backup_counts_for_nothing_and_stands_in_nobodys_way(rig: Rig, ground: Ground) -> None:
    platform = Platform(ground, {"app-db": [rig.cluster]})
    moments = [("put app-db/backup", number) for number in sorted(random.sample(range(1, 20), 2))]
    moments += [("put app-db/wal", 1), ("/manifest.json", 1)]
    try:
        engine, dead = NativeEngine(platform.repository, platform.target), set[str]()
        for number, (begins, count) in enumerate(moments, 1):
            # That it comes so far says that the one before has left no lock.
            steps = killed_at(platform, nth(count, begins), "backup")
            assert engine.list() == [], (begins, count, steps)
            left = platform.repository.unfinished()
            assert len(left) <= number
            blocks = [text.split("/")[2] for text in steps if text.startswith("put app-db/backup/")]
            # Of the steps that were begun each worker may have died in one: what is before those is in the store.
            assert {*blocks[: -platform.target.backup.transfer.workers]} <= set(left), (begins, count, steps)
            dead |= set(left)
        assert len(dead) >= 2  # the last two moments come after all blocks
        for backup_id in dead:
            assert list(platform.repository.objects_of(backup_id))
        eventually(lambda: rig.cluster.sql("select count(*) from pg_locks where locktype = 'advisory'") == 0)
        good = run_backup(platform.access, platform.target)
        assert [info.backup_id for info in engine.list()] == [good.backup_id]
        assert set(platform.repository.unfinished()) >= dead
    finally:
        platform.close()


# A restore


def fetched(rig: Rig, into: Path, space: Path, manifest: Manifest) -> int:
    """Restore it, in this process; the bytes of blocks that were fetched."""
    sizes: list[int] = []
    by_key = {block.key: block.stored for m in (rig.full, rig.incremental) for a in m.archives for block in a.blocks}
    store = FaultyStore(rig.platform.access.store("s"))
    store.fault = lambda verb, key: sizes.append(by_key.get(key, 0)) if verb == "get" else None
    repository = Repository(store, rig.platform.access.keys("k"), "app-db")  # type: ignore[arg-type]
    engine = NativeEngine(repository, rig.platform.target)
    (info,) = (info for info in engine.list() if info.backup_id == manifest.backup_id)
    engine.fetch_base(info, into, tablespaces={rig.space: space})
    return sum(sizes)


def test_a_killed_restore_goes_on_where_it_was(rig: Rig, folder: Path) -> None:
    whole, again = folder / "whole", folder / "again"
    everything = fetched(rig, whole, folder / "whole.space", rig.full)
    arguments = ("restore", rig.full.backup_id, again, folder / "again.space")
    first, second = sorted(random.sample(range(3, 18), 2))
    killed_at(rig.platform, nth(first, "get"), *arguments)
    assert not (again / CONTROL).exists()
    done = len((again / JOURNAL).read_text().split(" .")) - 1
    killed_at(rig.platform, nth(second - done, "get"), *arguments)
    assert not (again / CONTROL).exists()
    rest = fetched(rig, again, folder / "again.space", rig.full)
    assert rest < everything, (first, second)
    same(folder, "whole", "again")


def same(folder: Path, one: str, two: str, *, but: tuple[str, ...] = ()) -> None:
    trees: list[dict[str, tuple[int, int, str]]] = []
    for name in (one, two):
        found = {
            f"{part}/{path}": value for part in ("", ".space") for path, value in tree(folder / f"{name}{part}").items()
        }
        trees.append({path: value for path, value in found.items() if path.removeprefix("/") not in but})
    assert len(trees[0]) > 900
    assert trees[0] == trees[1]


@pytest.mark.parametrize("last", [1, 3])
def test_killed_in_its_last_steps(last: int, rig: Rig, folder: Path) -> None:
    """Before everything is on disk (1), and after the control file was put in its place (3: two roots are synced before)."""
    into, space = folder / "data", folder / "space"
    killed_at(rig.platform, nth(last, "sync_file_system"), "restore", rig.full.backup_id, into, space)
    assert (into / CONTROL).exists() is (last == 3)
    assert (into / JOURNAL).exists()
    assert fetched(rig, into, space, rig.full) == 0
    assert (into / CONTROL).exists()
    assert not list(into.glob(f"{JOURNAL}*"))
    with pytest.raises(UsageError, match="not empty"):
        fetched(rig, into, space, rig.full)


def test_what_was_written_before_a_crash_of_the_machine_is_fetched_again(rig: Rig, folder: Path) -> None:
    into, space = folder / "data", folder / "space"
    everything = sum(block.stored for archive in rig.full.archives for block in archive.blocks)
    killed_at(rig.platform, nth(12, "get"), "restore", rig.full.backup_id, into, space)
    head, _, rest = (into / JOURNAL).read_text().partition("\n")
    (into / JOURNAL).write_text(f"{json.dumps(json.loads(head) | {'boot': 'another'})}\n{rest}")
    assert fetched(rig, into, space, rig.full) == everything


def test_an_unfinished_restore_is_continued_by_itself_alone(rig: Rig, folder: Path) -> None:
    into, space = folder / "data", folder / "space"
    killed_at(rig.platform, nth(5, "get"), "restore", rig.full.backup_id, into, space)
    repository = rig.platform.repository
    with pytest.raises(UsageError, match=f"an unfinished restore of {rig.full.backup_id}"):
        fetch_backup(repository, rig.incremental, into, tablespaces={rig.space: space})
    (folder / "precious").mkdir()
    (folder / "precious" / "file").write_text("mine")
    with pytest.raises(UsageError, match="begun with other tablespace directories"):
        fetch_backup(repository, rig.full, into, tablespaces={rig.space: folder / "precious"})
    assert (folder / "precious" / "file").read_text() == "mine"


def test_a_chain_killed_while_it_is_combined(rig: Rig, folder: Path) -> None:
    fetched(rig, folder / "whole", folder / "whole.space", rig.incremental)
    again, space = folder / "again", folder / "again.space"
    killed_at(rig.platform, nth(1, "combine"), "restore", rig.incremental.backup_id, again, space)
    assert not again.exists()
    half = folder / ".again.parts" / "combined"
    (half / CONTROL).unlink()  # as if pg_combinebackup had been killed, too, in the middle
    (half / "base" / "half").write_text("half")
    assert fetched(rig, again, space, rig.incremental) == 0
    assert not (folder / ".again.parts").exists()
    same(folder, "whole", "again", but=("backup_manifest",))  # which holds the time at which each file was written
    verify = find_postgres(18).tool("pg_verifybackup")  # type: ignore[union-attr]
    done = run_tool([verify or "", "-n", again])
    assert done.returncode == 0, done.stderr


# The database


def nothing_counts(platform: Platform) -> None:
    assert NativeEngine(platform.repository, platform.target).list() == []
    assert len(platform.repository.unfinished()) == 1


SLOWLY = {"backup": {"transfer": {"rate_limit": "16MiB"}}}


def test_a_backup_that_an_administrator_ends(rig: Rig, new_platform: Callable[..., Platform]) -> None:
    """The server says so in the middle of a file: that is what is told, not that the archive is cut off."""
    platform, ended = new_platform({"app-db": [rig.cluster]}, extra=SLOWLY), list[bool]()

    def end(name: str, done: int, total: int | None) -> None:
        if name == "backup" and not ended:
            ended.append(rig.cluster.sql("select pg_terminate_backend(pid) from pg_stat_replication"))

    with pytest.raises(UnreachableError, match="administrator command"):
        run_backup(platform.access, platform.target, progress=end)
    assert ended == [True]
    nothing_counts(platform)


@pytest.mark.parametrize("victim", ["its process", "the whole server"])
def test_a_database_killed_during_its_backup(
    victim: str, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = new_cluster(18)
    platform = new_platform({"app-db": [cluster]}, extra=SLOWLY)
    killed: list[int] = []
    size = cluster.sql("select sum(pg_database_size(oid))::bigint from pg_database")
    moment = random.randrange(int(size) * 9 // 10)  # bytes of the backup

    def kill(name: str, done: int, total: int | None) -> None:
        if name == "backup" and done >= moment and not killed:
            killed.append(cluster.sql("select pid from pg_stat_replication"))
            if victim == "the whole server":
                cluster.server.kill9()
            with contextlib.suppress(ProcessLookupError):  # it may have noticed already
                os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(UnreachableError) as caught:
        run_backup(platform.access, platform.target, progress=kill)
    assert killed, moment
    assert f"127.0.0.1:{cluster.port}" in str(caught.value)
    nothing_counts(platform)
    if victim == "its process":  # PostgreSQL starts again by itself, and so does a backup
        eventually(cluster.server.accepts)
        assert run_backup(platform.access, platform.target).kind is BackupKind.FULL


class Standby:
    """A streaming copy of a cluster."""

    def __init__(self, primary: Cluster, directory: Path) -> None:
        install = find_postgres(18)
        assert install is not None
        run_as().own(directory)
        from_there = ["-h", str(primary.server.sockets), "-p", str(primary.port), "-U", "postgres"]
        where = directory / "data"
        done = run_tool([install.bindir / "pg_basebackup", "-D", where, "-R", "-c", "fast", "--no-sync", *from_there])
        assert done.returncode == 0, done.stderr
        self.server = PostgresServer(install, where, port=free_port())
        self.server.start()

    @property
    def port(self) -> int:
        return self.server.port

    def value(self, query: str) -> Any:
        with self.server.connect() as connection:
            return connection.execute(query).fetchone()[0]


def test_a_standby_promoted_during_its_backup(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    primary = new_cluster(18)
    directory = scratch("ops-pg-test-")
    standby = Standby(primary, directory)
    try:
        platform = new_platform(
            {"app-db": [primary, standby]},  # type: ignore[list-item]
            extra={"backup": {**SLOWLY["backup"], "from_standby": True}},
        )
        promoted: list[bool] = []

        def promote(name: str, done: int, total: int | None) -> None:
            if name == "backup" and not promoted:
                promoted.append(standby.value("select pg_promote()"))

        with pytest.raises(ConflictError, match="promoted during online backup") as caught:
            run_backup(platform.access, platform.target, progress=promote)
        assert promoted == [True]
        assert f"127.0.0.1:{standby.port}" in str(caught.value)
        nothing_counts(platform)
    finally:
        standby.server.stop("immediate")
        shutil.rmtree(directory)
