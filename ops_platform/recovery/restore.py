"""Brings a target back to a moment: into a directory that can be served, or some of its tables into a dump.

The base backup is fetched (resumable), then a server that nobody can reach replays the WAL up to the moment and leaves
recovery, so that what stands in the directory afterwards starts anywhere without archive and without this program.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ops_platform.backup.engine import open_engine
from ops_platform.backup.fetch import JOURNAL, sync_file_system
from ops_platform.backup.model import (
    BackupEngine,
    BackupInfo,
    Progress,
    RecoveryTarget,
    RecoveryWindow,
    no_progress,
)
from ops_platform.clients.postgres_binaries import find_tool, need_postgres, run_as
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, CouldNotVerifyError, OpsError, UsageError
from ops_platform.recovery.replay import replay
from ops_platform.recovery.room import existing, lacking, reserved
from ops_platform.recovery.sandbox import Sandbox, take_away, temporary_home

if TYPE_CHECKING:
    import psycopg

    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target


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
    _need_right(into)
    engine = open_engine(access, target, clock=clock)
    backup = engine.choose(recovery)
    install = need_postgres(backup.server_version // 10000, target.sandbox.postgres.values())
    backups = engine.list()
    room, full = lacking(existing(into), _room(backups, backup)), occupied(into)
    problems = [f"{problem}: {into}" for problem in (room, _NOT_EMPTY if full else None) if problem]
    return RestorePlan(
        target.id, str(recovery), backup, engine.window(), str(into), needed_bytes(backups, backup), shutil.disk_usage(existing(into)).free,
        f"PostgreSQL {install.version} in {install.bindir}", problems,
    )  # fmt: skip


def _chain(backups: Sequence[BackupInfo], last: BackupInfo) -> list[BackupInfo]:
    by_id = {backup.backup_id: backup for backup in backups}
    chain = [last]
    while chain[0].parent_id is not None and chain[0].parent_id in by_id:
        chain.insert(0, by_id[chain[0].parent_id])
    return chain


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
    backup, needed = _begin(engine, target, recovery, into)
    install = need_postgres(backup.server_version // 10000, target.sandbox.postgres.values())
    work = work_directory(into)
    sandbox = Sandbox(install, into, work, clock=clock)
    with ExitStack() as stack:
        stack.callback(sandbox.stop, "fast")
        stack.enter_context(_alone(into))
        sandbox.wait_gone()
        if not (work / "restored").exists():
            fetched = _fetched(engine, backup, needed, into, tablespaces, progress)
            done = _replay(engine, backup, recovery, target, sandbox, fetched, progress)
            _write_whole(work / "restored", TypeAdapter(Restored).dump_json(done).decode())
        done = TypeAdapter(Restored).validate_json((work / "restored").read_text())
        progress("syncing to disk", 0, None)
        for place in (into, *(Path(path) for path in done.tablespaces.values())):
            sync_file_system(place)
        sandbox.release()
        sync_file_system(into)
    return done


@contextlib.contextmanager
def _alone(into: Path) -> Generator[None]:
    """Two programs that replay in one directory would ruin it. The system frees the lock of one that was killed."""
    with (work_directory(into) / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError("another program restores into this directory", where=str(into)) from None
        yield


@dataclass(frozen=True)
class _Fetched:
    """`boot`: after a crash of the machine what was written may not have reached the disk, and is fetched again."""

    raw: int
    seconds: float
    tablespaces: dict[int, str]
    boot: str


def _fetched(
    engine: BackupEngine,
    backup: BackupInfo,
    needed: float,
    into: Path,
    tablespaces: dict[str, Path] | None,
    progress: Progress,
) -> _Fetched:
    """The files of the backup in `into`: those that stand there, where they can still be replayed."""
    work = work_directory(into)
    note = work / "fetched"
    if note.exists():
        known = TypeAdapter(_Fetched).validate_json(note.read_text())
        if known.boot == _boot() and not _promoted(into):
            return known
        # Half promoted, it is neither at the target nor on its own timeline; replay does not sync to disk.
        _clear(into, *map(Path, known.tablespaces.values()), _spool(work))
        note.unlink()
        for mark in ("replaying", "promoting"):
            (work / mark).unlink(missing_ok=True)
    elif engine.name == "native" and (into / _CONTROL).exists() and not (into / JOURNAL).exists():
        # Whole, but killed before that was written down.
        _clear(into, *[link.resolve() for link in (into / "pg_tblspc").glob("*")])
    began = time.monotonic()
    parts = into.with_name(f".{into.name}.parts")
    with reserved([into, parts], needed, begun=occupied(into) or parts.exists()):
        base = engine.fetch_base(backup, into, tablespaces=tablespaces, progress=progress)
    spaces = {oid: str(path) for oid, path in base.tablespaces.items()}
    fetched = _Fetched(base.raw, time.monotonic() - began, spaces, _boot())
    _write_whole(note, TypeAdapter(_Fetched).dump_json(fetched).decode())
    return fetched


def _promoted(into: Path) -> bool:
    """Whether a killed replay had begun to leave recovery; without a target PostgreSQL does so by itself."""
    work = work_directory(into)
    by_itself = (work / "replaying").exists() and not (into / "recovery.signal").exists()
    return by_itself or (work / "promoting").exists()


def _replay(
    engine: BackupEngine,
    backup: BackupInfo,
    recovery: RecoveryTarget,
    target: Target,
    sandbox: Sandbox,
    fetched: _Fetched,
    progress: Progress,
) -> Restored:
    into, work, install = sandbox.data, sandbox.work, sandbox.install
    with ExitStack() as stack:
        began = time.monotonic()
        fetcher = stack.enter_context(engine.wal_fetcher(backup, _spool(work)))
        stack.callback(sandbox.stop, "fast")
        sandbox.prepare(recovery, fetcher.restore_command)
        (work / "replaying").touch()
        lsn, newest = replay(
            sandbox, recovery, target, last_segment=engine.last_segment(backup, recovery),
            progress=lambda lsn: progress("replaying WAL", max(0, lsn - backup.start), None),
        )  # fmt: skip
        because = sandbox.stopped_because()
        (work / "promoting").touch()
        timeline = sandbox.promote()
        seconds = time.monotonic() - began
    return Restored(
        target.id, backup.backup_id, str(recovery), str(into), dict(fetched.tablespaces), str(lsn), newest,
        because, timeline, fetched.raw, max(0, lsn - backup.start), round(fetched.seconds, 3), round(seconds, 3), str(install.bindir),
    )  # fmt: skip


def _write_whole(path: Path, text: str) -> None:
    """Never half of it, whenever we are killed."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.rename(path)


def _clear(*directories: Path) -> None:
    """What this restore itself has put there."""
    for directory in directories:
        for entry in list(directory.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _begin(engine: BackupEngine, target: Target, recovery: RecoveryTarget, into: Path) -> tuple[BackupInfo, float]:
    """The backup to use: newly chosen, or that of the unfinished restore that stands here. And the bytes that it takes on disk."""
    _need_right(into)
    work = work_directory(into)
    note = work / "restore.json"
    wanted = {
        "target": target.id,
        "recovery_target": str(recovery),
        "inclusive": recovery.inclusive,
        "timeline": recovery.timeline,
        "into": str(into),
    }
    if note.exists():
        begun = json.loads(note.read_text())
        if {key: begun.get(key) for key in wanted} != wanted:
            stop = "" if begun.get("inclusive", True) else ", exclusive"
            raise UsageError(
                f"here stands an unfinished restore of {begun['target']} to {begun['recovery_target']}{stop}",
                where=str(into),
                remedy=f"finish it with the same options, or remove {into} and {work}",
            )
        backups = engine.list()
        found = [backup for backup in backups if backup.backup_id == begun["backup"]]
        if not found:
            raise OpsError(f"the backup {begun['backup']} of this unfinished restore is gone", where=str(into))
        return found[0], _room(backups, found[0])
    if occupied(into):
        raise UsageError(_NOT_EMPTY, where=str(into), remedy="name another one; nothing is restored over files")
    backup = engine.choose(recovery)
    needed = _room(engine.list(), backup)
    if problem := lacking(existing(into), needed):
        raise OpsError(problem, where=str(into), remedy="free space, or name a directory on another disk")
    need_postgres(backup.server_version // 10000, target.sandbox.postgres.values())
    _check_passage(into)
    user = run_as()
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(mode=0o700, exist_ok=True)
        into.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        where = str(error.filename or into)
        raise UsageError(f"the directory cannot be made: {error.strerror}", where=where, remedy=_ANOTHER) from None
    user.own(work, into)
    _write_whole(note, json.dumps({**wanted, "backup": backup.backup_id}))
    return backup, needed


_NOT_EMPTY = "the directory is not empty"
_ANOTHER = "name a directory below one that you may write to, or restore as a user who may"
_CONTROL = "global/pg_control"


def _need_right(into: Path) -> None:
    """What goes on is noted beside the directory, so both have to be open to us. Raises UsageError."""
    try:
        places = {existing(into), existing(into.parent)}
    except PermissionError as error:
        raise UsageError("we may not look there", where=str(error.filename or into), remedy=_ANOTHER) from None
    for place in sorted(places):
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
            raise UsageError(f"we may not write to {place}", where=str(into), remedy=_ANOTHER)


def occupied(into: Path) -> bool:
    """Whether something is there that a restore would be mixed with or put over."""
    return into.exists() and (not into.is_dir() or any(into.iterdir()))


def needed_bytes(backups: Sequence[BackupInfo], backup: BackupInfo) -> int:
    """Bytes on disk. A chain lies there twice for a while: its parts and what they are combined to."""
    chain = _chain(backups, backup)
    return sum(part.raw for part in chain) + (backup.raw if len(chain) > 1 else 0)


def _room(backups: Sequence[BackupInfo], backup: BackupInfo) -> float:
    return needed_bytes(backups, backup) * 1.05


def _check_passage(into: Path) -> None:
    """As root, the servers' user has to pass through every folder above."""
    if os.geteuid() != 0:
        return
    for parent in into.parents:
        if parent.exists() and not parent.stat().st_mode & 0o001:
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
    if not tables:
        raise UsageError("no table is named", remedy="--tables shop.orders,shop.order_items")
    if file.exists():
        raise UsageError("this file exists", where=str(file), remedy="name another one; nothing is overwritten")
    if not file.parent.is_dir():
        raise UsageError("there is no such directory", where=str(file.parent), remedy="make it, or name another file")
    backup = open_engine(access, target, clock=clock).choose(recovery)
    program = _pg_dump(target, backup.server_version // 10000)
    home = temporary_home(target, "tables")
    home.chmod(0o711)
    try:
        done = restore(
            access, target, recovery, home / "data",
            tablespaces=sandbox_tablespaces(access, target, recovery, home, backup), progress=progress, clock=clock,
        )  # fmt: skip
        progress("dumping", 0, None)
        install = need_postgres(backup.server_version // 10000, target.sandbox.postgres.values())
        sandbox = Sandbox(install, home / "data", home / "work", clock=clock)
        _dump(sandbox, program, target, tables, file, dbname or target.connection.dbname)
        return done
    finally:
        take_away(home)


def _pg_dump(target: Target, major: int) -> Path:
    """Asked for before the restore: hours later would be too late."""
    program = find_tool("pg_dump", major, target.sandbox.postgres.values())
    if program is None:
        raise CouldNotVerifyError("pg_dump is needed here", remedy=f"install postgresql-client-{major}")
    return program


def sandbox_tablespaces(
    access: Access, target: Target, recovery: RecoveryTarget, home: Path, backup: BackupInfo | None = None
) -> dict[str, Path]:
    """Every tablespace's old place mapped below `home`: a sandbox never writes where the source's paths would lead."""
    if target.repository.engine == "pgbackrest":
        from ops_platform.backup.pgbackrest import PgBackRestEngine

        engine = PgBackRestEngine(target)
        places = engine.tablespaces(backup or engine.choose(recovery))
        return {location: home / f"tablespace-{oid}" for oid, location in places.items()}
    from ops_platform.backup.opening import open_target_repository

    chosen = backup or open_engine(access, target).choose(recovery)
    manifest = open_target_repository(access, target).manifest(chosen.backup_id)
    return {a.location or "": home / f"tablespace-{a.oid}" for a in manifest.archives if a.oid is not None}


def _dump(sandbox: Sandbox, program: Path, target: Target, tables: Sequence[str], file: Path, dbname: str) -> None:
    from psycopg.conninfo import make_conninfo

    fresh = file.with_name(f".{file.name}.new")
    try:
        sandbox.serve()
        sandbox.find_superuser({target.connection.user or "postgres": "postgres", "postgres": "postgres"})
        names = _named(sandbox, tables, dbname)
        server = sandbox.server
        command: list[str] = [str(program), "-Fc", "-h", str(server.sockets), "-p", str(server.socket_port)]
        command += [
            "-U",
            sandbox.superuser,
            *(part for name in names for part in ("-t", name)),
            "-d",
            make_conninfo(dbname=dbname),
        ]
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:  # noqa: PTH123 - the mode counts
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            raise OpsError(f"pg_dump failed: {done.stderr.decode(errors='replace').strip()[-600:]}", where=dbname)
        fresh.rename(file)
    finally:
        fresh.unlink(missing_ok=True)
        sandbox.stop("fast")


# pg_dump's -t leaves out partitions and children, where a partitioned table has all its rows.
_WITH_CHILDREN = """
with recursive family as (
  select c.oid from pg_class c where c.oid = to_regclass(%s) and c.relkind in ('r', 'p', 'm', 'v', 'f', 'S')
  union select i.inhrelid from pg_inherits i join family f on i.inhparent = f.oid
)
select format('%%I.%%I', n.nspname, c.relname) from family f join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p', 'm', 'v', 'f', 'S')
"""


def _named(sandbox: Sandbox, tables: Sequence[str], dbname: str) -> list[str]:
    """The tables and all that hangs below them, quoted so that pg_dump takes them literally."""
    import psycopg

    names: list[str] = []
    missing: list[str] = []
    try:
        connection: Any = sandbox.connect(dbname)
    except psycopg.OperationalError as error:
        raise UsageError(
            f"the restored server has no such database: {' '.join(str(error).split())}", where=dbname
        ) from None
    with connection:
        for table in tables:
            names += (found := _family(connection, table))
            missing += [] if found else [table]
    if missing:
        raise UsageError(
            f"not there at that moment: {', '.join(missing)}",
            where=dbname,
            remedy="write SCHEMA.TABLE, quoted as in SQL: 'shop.\"My table\"'",
        )
    return list(dict.fromkeys(names))


def _family(connection: psycopg.Connection[Any], table: str) -> list[str]:
    """The table and all that hangs below it, quoted; empty where there is none, or where this is no name of a table."""
    import psycopg

    try:
        return [row[0] for row in connection.execute(_WITH_CHILDREN, [table]).fetchall()]
    except psycopg.Error:  # such as `a.b.c.d` or an open quote
        return []


def not_there_now(access: Access, target: Target, tables: Sequence[str], dbname: str | None = None) -> list[str]:
    """Those of the tables that the live database does not have; empty where it cannot be asked.

    Only the restored server knows what was there at the moment, hours later; a name that was misspelt is seen here at once.
    """
    from ops_platform.clients.postgres import asking

    try:
        live = access.postgres(target, role="any", dbname=dbname)
        with asking(live, target.id) as connection:
            return [table for table in tables if not _family(connection, table)]
    except OpsError:
        return []
