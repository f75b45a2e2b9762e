"""The canary: a row before the moment that is restored, a row after it, and what was true of the source in between.

Row A is committed, then the server's clock is read (T), then row B is committed. A restore to T must hold A and must not hold
B. Row B also makes sure that there is a commit after T, without which PostgreSQL cannot know that T was reached.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ops_platform.backup.archive import read_archive, slot_state
from ops_platform.backup.durable import wait_durable
from ops_platform.backup.model import Lsn, RecoveryTarget
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.receiver import receive_range
from ops_platform.backup.repository import Repository
from ops_platform.clock import Clock
from ops_platform.errors import CouldNotVerifyError, OpsError
from ops_platform.recovery.facts import DatabaseFacts, database_facts

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target

_TABLE = """
create table if not exists ops_canary.canary (
    id bigint generated always as identity primary key,
    verification text not null,
    mark text not null check (mark in ('A', 'B')),
    at timestamptz not null default clock_timestamp()
)"""
_INSERT = "insert into ops_canary.canary (verification, mark) values (%s, %s) returning id, at"
_KEPT = "400 days"


@dataclass(frozen=True)
class Canary:
    """`at`: the moment between the two rows, by the source's clock. `durable_seconds`: until the store held row B."""

    verification_id: str
    id_a: int
    id_b: int
    at: datetime
    lsn: Lsn
    durable_seconds: float


@dataclass(frozen=True)
class SourceMoment:
    """The source at `at`: `facts` by database, empty where the schema changed while we looked. `recovery`: how to come there."""

    at: datetime
    facts: dict[str, DatabaseFacts]
    recovery: RecoveryTarget
    canary: Canary | None
    note: str | None = None


def take(access: Access, target: Target, verification_id: str, clock: Clock) -> SourceMoment:
    """Write the canary and note what is true at T. Raises CouldNotVerifyError where the rows cannot be written or archived."""
    import psycopg

    with contextlib.closing(access.postgres(target, role="primary")) as connection:
        try:
            _prepare(connection)
            before = database_facts(connection)
            id_a, at_a = _insert(connection, verification_id, "A")
            moment = _between(connection)
            id_b, at_b = _insert(connection, verification_id, "B")
            after = database_facts(connection)
            lsn, timeline = _position(connection)
        except psycopg.Error as error:
            raise CouldNotVerifyError(
                f"the canary cannot be written: {str(error).strip().splitlines()[0]}",
                where=f"{target.id}, schema ops_canary",
                remedy=f"ops doctor {target.id} names the statement that gives us the right; "
                "or set verification.canary: false for a weaker proof",
            ) from error
    if not at_a <= moment < at_b:
        raise CouldNotVerifyError(
            "the source's clock went back while the canary was written", where=target.id, remedy="look at its NTP, then verify again"
        )  # fmt: skip
    seconds = ensure_archived(access, target, lsn, timeline, clock)
    canary = Canary(verification_id, id_a, id_b, moment, lsn, seconds)
    same = before.fingerprint == after.fingerprint
    facts = {target.connection.dbname: before} if same else {}
    note = None if same else "the schema changed while the canary was written"
    return SourceMoment(moment, facts, RecoveryTarget("time", moment), canary, note)


def observe(access: Access, target: Target, verification_id: str, clock: Clock) -> SourceMoment:
    """Without a row of ours: the source as it is read now. The proof is weaker, because no row marks the moment.

    A message in the WAL, which needs no right to write anywhere, makes a commit after the moment; without one PostgreSQL cannot know
    that the moment was reached. Where even that is forbidden, the newest record that the server itself has read back is the target.
    """
    from ops_platform.clients.postgres import asking

    with asking(access.postgres(target, role="primary"), target.id) as connection:
        connection.execute("set synchronous_commit to local")
        facts = database_facts(connection)
        moment = _between(connection)
        marked = _message(connection, verification_id)
        recovery = RecoveryTarget("time", moment) if marked else _known_record(connection)
        lsn, timeline = _position(connection)
    ensure_archived(access, target, lsn, timeline, clock)
    return SourceMoment(moment, {target.connection.dbname: facts}, recovery, None)


def _message(connection: Any, verification_id: str) -> bool:
    """A transaction that changes nothing and whose commit stands in the WAL."""
    import psycopg

    try:
        connection.execute("select pg_logical_emit_message(true, 'ops_platform', %s)", [verification_id])
    except psycopg.errors.InsufficientPrivilege:
        return False
    return True


def _known_record(connection: Any) -> RecoveryTarget:
    """The newest checkpoint's record: it has been read back by the server itself, so it is there and whole."""
    row = connection.execute("select checkpoint_lsn::text from pg_control_checkpoint()").fetchone()
    return RecoveryTarget("lsn", row[0])


def _prepare(connection: Any) -> None:
    connection.execute("set synchronous_commit to local")
    if connection.execute("select to_regclass('ops_canary.canary')").fetchone()[0] is None:
        # Asked first: IF NOT EXISTS wants the right to create even where there is nothing to create.
        if connection.execute("select to_regnamespace('ops_canary')").fetchone()[0] is None:
            connection.execute("create schema ops_canary")
        connection.execute(_TABLE)
    connection.execute(f"delete from ops_canary.canary where at < now() - interval '{_KEPT}'")


def _insert(connection: Any, verification_id: str, mark: str) -> tuple[int, datetime]:
    return connection.execute(_INSERT, [verification_id, mark]).fetchone()


def _between(connection: Any) -> datetime:
    """A moment after A's commit; the clock has moved on when this returns, so that B's commit is later."""
    moment: datetime = connection.execute("select clock_timestamp()").fetchone()[0]
    while connection.execute("select clock_timestamp()").fetchone()[0] <= moment:
        time.sleep(0.001)
    return moment


def _position(connection: Any) -> tuple[Lsn, int]:
    row = connection.execute(
        "select pg_current_wal_flush_lsn()::text, ('x' || substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8))::bit(32)::int"
    ).fetchone()
    return Lsn.parse(row[0]), row[1]


def ensure_archived(access: Access, target: Target, lsn: Lsn, timeline: int, clock: Clock) -> float:
    """Wait until the store holds the WAL up to `lsn`; the seconds. Where no receiver runs, fetch what is missing ourselves."""
    if target.repository.engine != "native":
        return _ask_for_archiving(access, target, clock)
    began = clock.monotonic()
    repository = open_target_repository(access, target)
    since = _newest_start(repository, timeline)
    slot = slot_state(access, target)
    if slot is None or slot.active_pid is None:
        archive = read_archive(repository)
        # From the end of the piece that carries the newest backup: what was never archived before it concerns no proof of it.
        ends = [r.end for r in archive.ranges if r.timeline == timeline and r.end >= (since or 0)] if archive else []
        if ends and min(ends) < lsn:
            receive_range(access, target, min(ends), lsn, timeline, clock=clock)
    try:
        wait_durable(access, target, lsn, since=since, timeline=timeline, timeout=60, clock=clock)
    except OpsError as error:
        raise CouldNotVerifyError(error.what, where=error.where, remedy=error.remedy) from error
    return clock.monotonic() - began


def _newest_start(repository: Repository, timeline: int) -> Lsn | None:
    """Where the newest backup of this timeline begins: from there on the archive has to be whole."""
    starts = [info.start for info in repository.infos() if info.error is None and info.timeline == timeline]
    return starts[-1] if starts else None


def _ask_for_archiving(access: Access, target: Target, clock: Clock) -> float:
    """For repositories of other tools: switch the segment and wait until PostgreSQL's archiver has handed it on."""
    import psycopg

    from ops_platform.clients.postgres import asking

    began = clock.monotonic()
    with asking(access.postgres(target, role="primary"), target.id) as connection:
        try:
            row = connection.execute("select pg_walfile_name(pg_switch_wal())").fetchone()
        except psycopg.errors.InsufficientPrivilege:
            # Of a login that sets a role it is that one that asks.
            (role,) = connection.execute("select quote_ident(current_user)").fetchone() or ("our role",)
            raise CouldNotVerifyError(
                "our role may not finish a WAL segment, so that its archiver would hand it on",
                where=target.id,
                remedy=f"as a superuser in {target.connection.dbname}: GRANT EXECUTE ON FUNCTION pg_switch_wal() TO {role}",
            ) from None
        name = row[0] if row else ""
        while clock.monotonic() - began < 120:
            done = connection.execute("select last_archived_wal from pg_stat_archiver").fetchone()
            if done and done[0] is not None and done[0][:24] >= name:
                return clock.monotonic() - began
            clock.sleep(0.1)
    raise CouldNotVerifyError(
        f"the archiver has not handed on {name} within 120 s", where=target.id, remedy="look at pg_stat_archiver and archive_command"
    )  # fmt: skip
