"""Brings a target back to a moment: into a directory that can be served, or some of its tables into a dump.

The base backup is fetched (resumable), then a server that nobody can reach replays the WAL up to the moment and leaves
recovery, so that what stands in the directory afterwards starts anywhere without archive and without this program.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ops_platform.backup.engine import open_engine
from ops_platform.backup.fetch import sync_file_system
from ops_platform.backup.model import (
    BackupEngine,
    BackupInfo,
    Lsn,
    Progress,
    RecoveryTarget,
    RecoveryWindow,
    no_progress,
)
from ops_platform.clients.postgres_binaries import find_tool, need_postgres, run_as
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import CouldNotVerifyError, OpsError, UsageError
from ops_platform.recovery.sandbox import Sandbox

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target

REPLAY_TIMEOUT = 24 * 3600.0


@dataclass(frozen=True)
class RestorePlan:
    """What a restore would do: nothing has been touched."""

    target_id: str
    recovery_target: str
    backup: BackupInfo
    window: RecoveryWindow
    into: str
    needed_bytes: int
    free_bytes: int
    server: str
    problems: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Restored:
    """A restored server at rest. `reached_lsn` and `newest_commit`: where recovery stopped. Seconds by step."""

    target_id: str
    backup_id: str
    recovery_target: str
    directory: str
    tablespaces: dict[int, str]
    reached_lsn: str
    newest_commit: datetime | None
    stopped_because: str | None
    timeline: int
    bytes: int
    wal_bytes: int
    fetch_seconds: float
    replay_seconds: float
    bindir: str


def work_directory(into: Path) -> Path:
    """Configuration, spool and log of a restore that is under way, beside its directory and on the same file system."""
    return into.with_name(f".{into.name}.ops")


def plan(
    access: Access, target: Target, recovery: RecoveryTarget, into: Path, *, clock: Clock = SYSTEM_CLOCK
) -> RestorePlan:
    """Choose the backup and look at the ground. Raises UsageError with the window for a moment outside of it."""
    engine = open_engine(access, target, clock=clock)
    backup = engine.choose(recovery)
    install = need_postgres(backup.server_version // 10000, target.sandbox.postgres.values())
    chain = _chain(engine.list(), backup)
    # A chain lies there twice for a while: its parts and what they are combined to.
    needed = sum(part.raw for part in chain) + (backup.raw if len(chain) > 1 else 0)
    free = shutil.disk_usage(_existing(into)).free
    problems: list[str] = []
    if needed * 1.05 > free:
        problems.append(f"{needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free at {into}")
    return RestorePlan(
        target.id, str(recovery), backup, engine.window(), str(into), needed, free,
        f"PostgreSQL {install.version} in {install.bindir}", problems,
    )  # fmt: skip


def _chain(backups: Sequence[BackupInfo], last: BackupInfo) -> list[BackupInfo]:
    by_id = {backup.backup_id: backup for backup in backups}
    chain = [last]
    while chain[0].parent_id is not None and chain[0].parent_id in by_id:
        chain.insert(0, by_id[chain[0].parent_id])
    return chain


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def restore(
    access: Access,
    target: Target,
    recovery: RecoveryTarget,
    into: Path,
    *,
    tablespaces: dict[str, Path] | None = None,
    progress: Progress = no_progress,
    clock: Clock = SYSTEM_CLOCK,
) -> Restored:
    """The target as it was at the moment, at rest in `into`, on a timeline of its own.

    `into` must be empty or the unfinished restore of the same thing, which goes on where it was. Raises UsageError (moment,
    directory), OpsError (space, recovery ended early with the server's reason), CorruptionError.
    """
    into = into.absolute()
    engine = open_engine(access, target, clock=clock)
    backup = _begin(engine, target, recovery, into)
    install = need_postgres(backup.server_version // 10000, target.sandbox.postgres.values())
    work = work_directory(into)
    if not (work / "fetched").exists():
        began = time.monotonic()
        base = engine.fetch_base(backup, into, tablespaces=tablespaces, progress=progress)
        spaces = {str(oid): str(path) for oid, path in base.tablespaces.items()}
        (work / "fetched").write_text(
            json.dumps({"raw": base.raw, "seconds": time.monotonic() - began, "tablespaces": spaces})
        )
    fetched = json.loads((work / "fetched").read_text())
    with ExitStack() as stack:
        began = time.monotonic()
        fetcher = stack.enter_context(engine.wal_fetcher(backup, _spool(work)))
        sandbox = Sandbox(install, into, work, clock=clock)
        stack.callback(sandbox.stop, "fast")
        sandbox.prepare(recovery, fetcher.restore_command)
        sandbox.start()
        lsn, newest = replayed(sandbox, recovery, backup, target, progress)
        because = sandbox.stopped_because()
        timeline = sandbox.promote()
        replay = time.monotonic() - began
    sandbox.release()
    progress("syncing to disk", 0, None)
    for place in (into, *(Path(path) for path in fetched["tablespaces"].values())):
        sync_file_system(place)
    return Restored(
        target.id, backup.backup_id, str(recovery), str(into), {int(k): v for k, v in fetched["tablespaces"].items()}, str(lsn), newest,
        because, timeline, fetched["raw"], fetcher.fetched_bytes, round(fetched["seconds"], 3), round(replay, 3), str(install.bindir),
    )  # fmt: skip


def _begin(engine: BackupEngine, target: Target, recovery: RecoveryTarget, into: Path) -> BackupInfo:
    """The backup to use: newly chosen, or that of the unfinished restore that stands here."""
    work = work_directory(into)
    note = work / "restore.json"
    wanted = {"target": target.id, "recovery_target": str(recovery), "into": str(into)}
    if note.exists():
        begun = json.loads(note.read_text())
        if {key: begun[key] for key in wanted} != wanted:
            raise UsageError(
                f"here stands an unfinished restore of {begun['target']} to {begun['recovery_target']}",
                where=str(into),
                remedy=f"finish it with the same options, or remove {into} and {work}",
            )
        found = [backup for backup in engine.list() if backup.backup_id == begun["backup"]]
        if not found:
            raise OpsError(f"the backup {begun['backup']} of this unfinished restore is gone", where=str(into))
        return found[0]
    if into.exists() and any(into.iterdir()):
        raise UsageError(
            "the directory is not empty", where=str(into), remedy="name another one; nothing is restored over files"
        )
    backup = engine.choose(recovery)
    user = run_as()
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(mode=0o700, exist_ok=True)
        into.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the directory cannot be made: {error.strerror}", where=str(error.filename or into)) from None
    user.own(work, into)
    _check_passage(into)
    note.write_text(json.dumps({**wanted, "backup": backup.backup_id}))
    return backup


def _check_passage(into: Path) -> None:
    """As root, the servers' user has to pass through every folder above."""
    if os.geteuid() != 0:
        return
    for parent in into.parents:
        if not parent.stat().st_mode & 0o001:
            raise UsageError(
                f"PostgreSQL runs as {run_as().name}, who cannot pass through {parent}",
                where=str(into),
                remedy="name a directory below one that others can pass through, such as /var/lib/restore",
            )


def _spool(work: Path) -> Path:
    spool = work / "spool"
    spool.mkdir(mode=0o700, exist_ok=True)
    run_as().own(spool)
    return spool


def replayed(
    sandbox: Sandbox, recovery: RecoveryTarget, backup: BackupInfo, target: Target, progress: Progress
) -> tuple[Lsn, datetime | None]:
    """Wait for the pause at the target; for `latest` until the WAL has ended, which is where such a recovery promotes."""
    sandbox.find_superuser({target.connection.user or "postgres": target.connection.dbname, "postgres": "postgres"})

    def told(lsn: Lsn) -> None:
        progress("replaying WAL", max(0, lsn - backup.start), None)

    if recovery.kind != "latest":
        return sandbox.wait_paused(timeout=REPLAY_TIMEOUT, progress=told)
    return sandbox.wait_ended(timeout=REPLAY_TIMEOUT, progress=told)


# Single tables


def dump_tables(
    access: Access,
    target: Target,
    recovery: RecoveryTarget,
    tables: Sequence[str],
    file: Path,
    *,
    dbname: str | None = None,
    progress: Progress = no_progress,
    clock: Clock = SYSTEM_CLOCK,
) -> Restored:
    """These tables as they were at the moment, as a pg_dump archive (custom format); the restored server goes again.

    Raises UsageError naming the tables that were not there at that moment, and where `file` exists.
    """
    import tempfile

    if file.exists():
        raise UsageError("this file exists", where=str(file), remedy="name another one; nothing is overwritten")
    base = Path(target.sandbox.directory or tempfile.gettempdir())
    home = Path(tempfile.mkdtemp(prefix=f"ops-tables-{target.id}-", dir=base))
    home.chmod(0o711)
    try:
        done = restore(
            access, target, recovery, home / "data",
            tablespaces=sandbox_tablespaces(access, target, recovery, home), progress=progress, clock=clock,
        )  # fmt: skip
        progress("dumping", 0, None)
        _dump(target, home / "data", home / "work", Path(done.bindir), tables, file, dbname or target.connection.dbname)
        return done
    finally:
        shutil.rmtree(home, ignore_errors=True)


def sandbox_tablespaces(
    access: Access, target: Target, recovery: RecoveryTarget, home: Path, backup: BackupInfo | None = None
) -> dict[str, Path]:
    """Every tablespace's old place mapped below `home`: a sandbox never writes where the source's paths would lead."""
    if target.repository.engine == "pgbackrest":
        from ops_platform.backup.pgbackrest import PgBackRestEngine

        engine = PgBackRestEngine(target)
        places = engine.tablespaces(backup or engine.choose(recovery))
        return {location: home / f"tablespace-{oid}" for oid, location in places.items()}
    from ops_platform.backup.archive import open_target_repository

    chosen = backup or open_engine(access, target).choose(recovery)
    manifest = open_target_repository(access, target).manifest(chosen.backup_id)
    return {a.location or "": home / f"tablespace-{a.oid}" for a in manifest.archives if a.oid is not None}


def _dump(target: Target, data: Path, work: Path, bindir: Path, tables: Sequence[str], file: Path, dbname: str) -> None:
    from ops_platform.clients.postgres_binaries import PgInstall

    version = next((int(line) for line in (data / "PG_VERSION").read_text().split()), 0)
    program = find_tool("pg_dump", version, target.sandbox.postgres.values())
    if program is None:
        raise CouldNotVerifyError("pg_dump is needed here", remedy=f"install postgresql-client-{version}")
    sandbox = Sandbox(PgInstall(bindir, version, str(version), "found"), data, work)
    try:
        sandbox.serve()
        sandbox.find_superuser({target.connection.user or "postgres": dbname, "postgres": dbname})
        with sandbox.connect(dbname) as connection:
            missing = [t for t in tables if connection.execute("select to_regclass(%s)", [t]).fetchone()[0] is None]
        if missing:
            raise UsageError(
                f"not there at that moment: {', '.join(missing)}", where=dbname, remedy='write SCHEMA.TABLE, quoted as in SQL: \'shop."My table"\''
            )  # fmt: skip
        fresh = file.with_name(f".{file.name}.new")
        command = [
            str(program),
            "-Fc",
            "-h",
            str(sandbox.server.sockets),
            "-p",
            str(sandbox.server.socket_port),
            "-U",
            sandbox.superuser,
        ]
        command += [part for table in tables for part in ("-t", _pattern(table))]
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:  # noqa: PTH123 - the mode counts
            done = subprocess.run([*command, dbname], stdout=out, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            fresh.unlink()
            raise OpsError(f"pg_dump failed: {done.stderr.decode(errors='replace').strip()[-600:]}", where=dbname)
        fresh.rename(file)
    finally:
        sandbox.stop("fast")


def _pattern(table: str) -> str:
    """pg_dump's -t takes a pattern: an unquoted name is one already, quotes keep the rest literal."""
    return table
