"""From the repository to a server that serves, on empty ground: what `restore-drill` is made of, in earnest as well."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
from pydantic import Field

from ops_platform.backup.archive import archive_status
from ops_platform.backup.engine import open_engine
from ops_platform.backup.model import BackupInfo, Lsn, RecoveryTarget
from ops_platform.clients.postgres import connect
from ops_platform.clients.postgres_binaries import PgInstall, PostgresServer, free_port, need_postgres, run_as
from ops_platform.drills.askers import TABLE
from ops_platform.drills.model import Checked, Confidence, Done
from ops_platform.drills.registry import Context, NothingGiven, does
from ops_platform.drills.steps.basics import measure, moment_of, processes_with
from ops_platform.errors import CouldNotVerifyError, OpsError, UsageError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Id
from ops_platform.recovery import gates
from ops_platform.recovery.findings import Record
from ops_platform.recovery.model import GateStatus
from ops_platform.recovery.restore import restore, sandbox_tablespaces
from ops_platform.recovery.sandbox import Sandbox

_LOOPBACK = "127.0.0.1"
_LONGEST = 90  # bytes of a directory of sockets


class To(Strict):
    """To which moment."""

    to: str = Field(default="latest", description="`latest`, or a moment with its zone: '2026-11-23 02:59:59+01:00'.")

    @property
    def recovery(self) -> RecoveryTarget:
        """Raises UsageError."""
        if self.to == "latest":
            return RecoveryTarget("latest")
        try:
            moment = datetime.fromisoformat(self.to)
        except ValueError:
            raise UsageError(f"{self.to!r} is neither `latest` nor a moment") from None
        if moment.tzinfo is None:
            raise UsageError(f"{self.to!r} has no zone", remedy=f"write '{self.to}+00:00' for UTC")
        return RecoveryTarget("time", moment)


@does("restore.possible", "check", given=To)
def possible(context: Context, given: To) -> Done:
    """The repository holds a backup from which the moment can be reached, its keys can be had, and a server of its major is here."""
    target = context.target
    try:
        engine = open_engine(context.access, target, clock=context.clock)
        backup = engine.choose(given.recovery)
        install = need_postgres(backup.server_version // 10000, target.sandbox.postgres.values())
    except OpsError as error:
        return Done(error.what, checks=(_check("The repository can be restored from", None, error.line),))
    said = f"{backup.backup_id}, ended {backup.ended_at:%Y-%m-%d %H:%M} UTC; PostgreSQL {install.version}"
    facts = {"versions": {"postgresql": install.version}}
    return Done(said, facts, (_check("The repository can be restored from", True, said),))


def _check(title: str, holds: bool | None, result: str, query: str = "", **detail: Any) -> Checked:
    return Checked(title=title, holds=holds, query=query, result=result, detail=detail)


@does("restore.suppose_lost", "inject")
def suppose_lost(context: Context, given: NothingGiven) -> Done:
    """From this moment on the database counts as gone. What the repository holds then is noted: later WAL does not count."""
    now = context.clock.now()
    facts: dict[str, Any] = {"at": now.isoformat()}
    target = context.target
    if target.repository.engine == "native":
        status = archive_status(context.access, target, ask_server=False)
        facts["archived_lsn"] = str(status.newest) if status.newest is not None else None
    window = open_engine(context.access, target, clock=context.clock).window()
    facts["restorable_until"] = window.latest.isoformat() if window.latest else None
    return Done(f"lost at {now:%H:%M:%S} UTC, restorable until {facts['restorable_until']}", facts)


class Files(To):
    """Of `restore.files`."""

    into: str = Field(default="", description="An empty directory; one of the drill's own where not given.")


@does(
    "restore.files",
    "act",
    given=Files,
    changes=lambda given: f"a directory with the restored target: {given.into or 'of its own'}",
)
def files(context: Context, given: Files) -> Done:
    """Fetch the backup, replay the WAL, leave recovery: a server at rest in a new directory. Killed, it goes on where it was."""
    target = context.target
    home, into = _ground(context, given)
    recovery = given.recovery

    def told(step: str, done: int, total: int | None) -> None:
        context.alive()

    spaces = sandbox_tablespaces(context.access, target, recovery, home)
    done = restore(context.access, target, recovery, into, tablespaces=spaces, progress=told, clock=context.clock)
    backup = _info(context, done.backup_id)
    facts = {
        "directory": done.directory,
        "recovery_target": done.recovery_target,
        "reached": f"{done.reached_lsn} on timeline {done.timeline}"
        + (f", newest commit {done.newest_commit.isoformat()}" if done.newest_commit else ""),
        "newest_commit": done.newest_commit.isoformat() if done.newest_commit else None,
        "bindir": done.bindir,
        "backup": {
            "id": done.backup_id,
            "sha256": _digest(context, done.backup_id),
            "kind": backup.kind.value,
            "ended_at": backup.ended_at.isoformat(),
            "bytes": done.bytes,
            "wal_bytes": done.wal_bytes,
            "fetch_seconds": done.fetch_seconds,
            "replay_seconds": done.replay_seconds,
        },
    }
    return Done(f"{done.backup_id} to {done.reached_lsn}, in {done.fetch_seconds + done.replay_seconds:.1f} s", facts)


def _ground(context: Context, given: Files) -> tuple[Path, Path]:
    """Empty ground: the drill's own folder, or in earnest the one that was named, which stays."""
    home = Path(given.into).absolute() if given.into else context.workspace
    if given.into and not home.is_absolute():
        raise UsageError("the directory is not absolute", where=given.into)
    context.register("directory", str(home), path=str(home), keep=context.held.real)
    home.mkdir(mode=0o711, parents=True, exist_ok=True)
    home.chmod(0o711)
    return home, home / "data"


def _info(context: Context, backup_id: str) -> BackupInfo:
    listed = open_engine(context.access, context.target, clock=context.clock).list()
    return next(b for b in listed if b.backup_id == backup_id)


def _digest(context: Context, backup_id: str) -> str | None:
    """As proofs name it. None: another engine keeps the backup."""
    if context.target.repository.engine != "native":
        return None
    from ops_platform.backup.opening import open_target_repository

    return open_target_repository(context.access, context.target).manifest_digest(backup_id)


class Serve(Strict):
    """Of `restore.serve`."""

    files: Id = Field(description="The step that restored the files.")
    listen: str = Field(default=_LOOPBACK, description="The address on which it listens.")
    port: int = Field(default=0, ge=0, le=65535, description="The port; a free one where it is 0.")


_HBA = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\nhost all all ::1/128 scram-sha-256\n"
# Nothing of a restored server reaches out by itself: it is the same database, and others would believe it.
_CLOSED = {
    "ssl": "off",
    "archive_mode": "off",
    "primary_conninfo": "",
    "primary_slot_name": "",
    "max_logical_replication_workers": "0",
    "shared_preload_libraries": "",
    "autovacuum": "off",
    "log_line_prefix": "%m [%p] %e ",
    "lc_messages": "C",
}


@does("restore.serve", "act", given=Serve, changes=lambda given: f"a server on {given.listen}")
def serve(context: Context, given: Serve) -> Done:
    """Start the restored server. In a drill it listens on loopback alone, archives nothing and connects to nobody."""
    data = Path(context.fact(given.files, "directory"))
    install, sockets = _install(context, given.files), _sockets(context, data.parent)
    context.register("directory", str(sockets), path=str(sockets), keep=context.held.real)
    context.register("process", str(data), word=str(data), signal="INT", seconds=60, keep=context.held.real)
    if not any(processes_with(str(data))):
        port = given.port or free_port(given.listen)
        _start(context, install, data, sockets, given.listen, port)
    port = int((data.parent / "port").read_text())
    facts = {"host": given.listen, "port": port, "directory": str(data), "sockets": str(sockets)}
    return Done(f"started on {given.listen}:{port}", facts)


def _start(context: Context, install: PgInstall, data: Path, sockets: Path, listen: str, port: int) -> None:
    user, home = run_as(), data.parent
    sockets.mkdir(mode=0o700, exist_ok=True)
    hba, settings = home / "pg_hba.conf", home / "postgresql.conf"
    hba.write_text(_HBA)
    ours = _CLOSED | {"hba_file": str(hba), "ident_file": str(home / "pg_ident.conf")}
    (home / "pg_ident.conf").write_text("")
    settings.write_text("".join(f"{key} = '{value}'\n" for key, value in ours.items()))
    (home / "port").write_text(str(port))
    log = home / "server.log"
    log.touch(mode=0o600)
    user.own(sockets, hba, settings, home / "pg_ident.conf", log)
    (data / "postmaster.pid").unlink(missing_ok=True)  # of one that was killed: none runs over this directory
    server = PostgresServer(install, data, port=port, sockets=sockets, log=log)
    own = context.held.real and (data / "postgresql.conf").exists()
    server.spawn({"listen_addresses": listen} | ({} if own else {"config_file": str(settings), **ours}))


def _sockets(context: Context, home: Path) -> Path:
    """Beside the data; elsewhere where that is too long: the path of a socket may have 107 bytes."""
    beside = home / "sockets"
    return beside if len(str(beside)) <= _LONGEST else Path(tempfile.gettempdir()) / f"ops-{context.held.id[-13:]}"


def _install(context: Context, step: str) -> PgInstall:
    bindir = Path(context.fact(step, "bindir"))
    version = (Path(context.fact(step, "directory")) / "PG_VERSION").read_text().strip()
    return need_postgres(int(version), [bindir, *context.target.sandbox.postgres.values()])


class Serving(Strict):
    """The step that started the server."""

    server: Id = Field(description="The step that started the server.")


@does("restore.serves", "wait_until", given=Serving)
def serves(context: Context, given: Serving) -> Done:
    """Until it lets the target's own login in over the network, has left recovery, and takes a write."""
    said = ["nothing was asked yet"]
    data = context.fact(given.server, "directory")

    def ready() -> bool:
        try:
            with contextlib.closing(_login(context, given.server)) as connection:
                row = connection.execute("select pg_is_in_recovery()").fetchone()
                connection.execute("create temporary table ops_drill_write (n int)")
                return row is not None and row[0] is False
        except OpsError as error:
            said[0] = error.what
        except psycopg.Error as error:
            said[0] = " ".join(str(error).split())
        if not any(processes_with(data)):
            raise CouldNotVerifyError(f"the server has ended: {_log_tail(Path(data))}", where=data)
        return False

    try:
        context.wait(ready)
    except CouldNotVerifyError as error:
        raise CouldNotVerifyError(f"{error.what}; at last: {said[0]}", where=error.where) from None
    return Done(f"{context.target.connection.user or 'the login'} is let in, and writes")


def _login(context: Context, server: str) -> psycopg.Connection[Any]:
    host, port = context.fact(server, "host"), context.fact(server, "port")
    login = context.access.login(context.target.connection)
    return connect(login if context.held.real else replace(login, sslmode="disable", sslrootcert=None), host, port)


def _log_tail(data: Path) -> str:
    log = data.parent / "server.log"
    return log.read_text(errors="replace")[-600:].strip() if log.exists() else "no log"


class Look(Serving):
    """Of `restore.look`."""

    amcheck: bool = Field(default=True, description="Whether tables and indexes are looked at page by page, by sample.")


@does("restore.look", "check", given=Look)
def look(context: Context, given: Look) -> Done:
    """Every table reads to its end, sequences are ahead of their columns, tables and indexes are sound."""
    sandbox = _sandbox(context, given.server)
    record = Record(lambda _title: context.alive())
    counted: dict[str, dict[str, int]] = {}
    record.check("reads", "Every table reads to its end", *gates.read_tables(sandbox, counted))
    record.check("sequences", "Sequences are ahead of their columns", *gates.sequences(sandbox))
    record.check("prepared", "No prepared transaction is left hanging", *gates.prepared(sandbox, None))
    if given.amcheck:
        record.check("amcheck", "Tables and indexes are sound", *gates.amcheck(sandbox, "sample", context.held.id))
    holds = {GateStatus.PASSED: True, GateStatus.FAILED: False}
    asked = [gate for gate in record.gates if gate.status is not GateStatus.NOT_APPLICABLE]
    checks = tuple(_check(gate.title, holds.get(gate.status), gate.result, gate.query, **gate.detail) for gate in asked)
    rows = sum(sum(tables.values()) for tables in counted.values())
    return Done(f"{len(checks)} looks over {rows} rows", {"rows": rows}, checks)


def _sandbox(context: Context, server: str) -> Sandbox:
    """The hands of the verification's gates, on the server that the drill started."""
    data = Path(context.fact(server, "directory"))
    version = int((data / "PG_VERSION").read_text().strip())
    install = need_postgres(version, context.target.sandbox.postgres.values())
    running = PostgresServer(
        install, data, port=context.fact(server, "port"), sockets=Path(context.fact(server, "sockets")),
        log=data.parent / "server.log",
    )  # fmt: skip
    made = Sandbox(install, data, data.parent / "look", isolate=False, server=running, clock=context.clock)
    connection = context.target.connection
    made.find_superuser({connection.user or "postgres": connection.dbname, "postgres": "postgres"})
    return made


class Lost(Serving):
    """Of `restore.lost`."""

    loss: Id = Field(description="The step at which the loss was supposed.")
    writer: Id | None = Field(default=None, description="The probe that wrote numbered rows until then.")
    files: Id = Field(description="The step that restored the files.")


@does("restore.lost", "measure", given=Lost)
def lost(context: Context, given: Lost) -> Done:
    """What would have been lost: from the newest acknowledged commit that the repository held at the moment of loss to that moment.

    By the writer's numbers, where there is one; without it by the newest moment that was restorable then, which is a bound.
    """
    record = context.results.get(given.loss)
    if record is None or "at" not in record.facts:
        return _lost_in_earnest(context, given)
    at = moment_of(record.facts["at"])
    if record.facts.get("restorable_until") is None:
        return Done("not measured", measured=(measure(context, None, "nothing was restorable at that moment"),))
    if given.writer is not None and record.facts.get("archived_lsn"):
        by_numbers = _lost_by_numbers(context, given, at, Lsn.parse(record.facts["archived_lsn"]))
        if by_numbers is not None:
            return by_numbers
    seconds = max(0.0, (at - moment_of(record.facts["restorable_until"])).total_seconds())
    how = "from the newest moment that was restorable then; none of the writer's commits was in the repository yet"
    return Done(f"{seconds:.1f} s at most", measured=(measure(context, seconds, how, Confidence.BOUND),))


def _lost_in_earnest(context: Context, given: Lost) -> Done:
    """What is gone cannot be asked: everything after the newest restored commit may have been lost, or after the backup's own end."""
    newest, what = context.fact(given.files, "newest_commit"), "the newest restored commit"
    if newest is None:
        newest, what = (
            context.fact(given.files, "backup")["ended_at"],
            "the end of the backup, behind which there was no commit,",
        )
    seconds = max(0.0, (context.held.started_at - moment_of(newest)).total_seconds())
    how = f"from {what} ({newest}) to the beginning of the recovery"
    return Done(f"{seconds:.1f} s at most", measured=(measure(context, seconds, how, Confidence.BOUND),))


def _lost_by_numbers(context: Context, given: Lost, at: datetime, archived: Lsn) -> Done | None:
    """None where the repository held none of the numbers: then they say nothing of how far back it reaches."""
    acknowledged = {s.n: s.at for s in context.samples(given.writer or "") if s.ok and s.n is not None and s.at <= at}
    rows = _numbers(context, given.server)
    there = {n for n, _ in rows}
    # A row's LSN lies before its commit: only one that a later row within the archive follows is certain to be whole.
    stored = {n for (n, _), (_, lsn) in pairwise(rows) if Lsn.parse(lsn) <= archived}
    safe = acknowledged.keys() & stored
    if not safe:
        return None
    missing = sorted(n for n in acknowledged if n < max(safe) and n not in there)
    seconds = max(0.0, (at - acknowledged[max(safe)]).total_seconds())
    lost = len(acknowledged.keys() - stored)
    how = f"{len(acknowledged)} commits were acknowledged before the loss; the repository held all but the last {lost}"
    check = _check(
        "No acknowledged commit is missing in between", not missing,
        f"missing: {', '.join(map(str, missing[:20]))}" if missing else f"{len(safe)} commits, without a hole",
        f"select n from {TABLE} where drill = …", acknowledged=len(acknowledged), restored=len(there),
    )  # fmt: skip
    facts = {"acknowledged": len(acknowledged), "lost": lost}
    return Done(f"{seconds:.1f} s", facts, (check,), (measure(context, seconds, how),))


def _numbers(context: Context, server: str) -> list[tuple[int, str]]:
    """What the restored server holds of the writer's rows, with their positions, in the order of the WAL."""
    with _sandbox(context, server).connect(context.target.connection.dbname) as connection:
        if connection.execute(f"select to_regclass('{TABLE}')").fetchone()[0] is None:
            return []
        query = f"select n, lsn::text from {TABLE} where drill = %s order by lsn, n"
        return connection.execute(query, [context.held.id]).fetchall()
