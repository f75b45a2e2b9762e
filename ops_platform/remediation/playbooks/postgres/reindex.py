"""Invalid indexes: what a CREATE INDEX CONCURRENTLY or REINDEX CONCURRENTLY that broke off left behind.

An invalid index is not used for reading, and still costs at every write. REINDEX CONCURRENTLY that is interrupted leaves a half made
copy (`…_ccnew`) or the replaced original (`…_ccold`) behind, beside an index that stands as before: those are dropped.
PostgreSQL documentation, REINDEX, "Rebuilding Indexes Concurrently".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.errors import AccessDeniedError, OpsError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import PositiveDuration, Size
from ops_platform.remediation.playbook import Context
from ops_platform.remediation.playbooks.postgres.common import (
    PostgresAction,
    PostgresPlaybook,
    databases,
    fits,
    me,
    one,
)

if TYPE_CHECKING:
    import psycopg

REBUILT, DROPPED = {"valid": True}, None


class ReindexParameters(Strict):
    """Of `postgres.reindex_invalid`."""

    databases: list[str] = Field(default=["*"], description="Patterns of databases that are looked at.")
    indexes: list[str] = Field(
        default=["*"], description="Patterns of indexes, as schema.name, that may be rebuilt or dropped."
    )
    at_most: Annotated[int, Field(ge=1, le=50)] = Field(
        default=3, description="So many in one plan; leftovers first, then the smallest."
    )
    room: Size = Field(
        default=20 << 30,
        description="Disk space that one rebuild may take. SQL does not tell how much is free, so it is said here; a rebuild "
        "takes at most about the size of its table, and one that might take more is left alone.",
    )
    lock_timeout: PositiveDuration = Field(
        default=timedelta(seconds=30),
        description="A rebuild that waits for longer, also for the end of old transactions, is given up and cleaned up.",
    )
    time_limit: PositiveDuration = Field(default=timedelta(hours=6), description="One rebuild takes at most this long.")


@dataclass(frozen=True)
class Index:
    """An invalid index. `leftover`: of an interrupted REINDEX. `busy`: the process that works on its table."""

    database: str
    oid: int
    name: str  # schema and name, quoted
    plain: str  # the same, as patterns see it
    table: str
    leftover: bool
    constrained: bool
    room: int
    busy: int | None
    owner: str
    ours: bool
    may_rebuild: bool

    @property
    def object(self) -> str:
        return f"{self.database}: {self.name}"


# While an index is made concurrently its session holds a lock on the table that no reading or writing holds.
_INDEXES = """
select current_database(), i.indexrelid, format('%I.%I', n.nspname, c.relname), n.nspname || '.' || c.relname,
  format('%I.%I', tn.nspname, t.relname), c.relname ~ '_cc(new|old)[0-9]*$',
  exists (select from pg_constraint where conindid = i.indexrelid),
  greatest(pg_relation_size(i.indexrelid), pg_relation_size(i.indrelid)),
  (select l.pid from pg_locks l where l.locktype = 'relation' and l.relation = i.indrelid and l.granted
     and l.database = (select oid from pg_database where datname = current_database())
     and l.mode in ('ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'AccessExclusiveLock')
     and l.pid <> pg_backend_pid() limit 1),
  pg_get_userbyid(t.relowner), pg_has_role(current_user, t.relowner, 'USAGE'),
  pg_has_role(current_user, t.relowner, 'USAGE') {maintain}
from pg_index i join pg_class c on c.oid = i.indexrelid join pg_namespace n on n.oid = c.relnamespace
  join pg_class t on t.oid = i.indrelid join pg_namespace tn on tn.oid = t.relnamespace
where not i.indisvalid and c.relkind = 'i' and c.relpersistence <> 't'
order by 1, 3
"""


class ReindexAction(PostgresAction[ReindexParameters]):
    name = "postgres.reindex_invalid"

    def plan(self) -> Plan:
        with self.session() as connection:
            names, closed = databases(connection, self.parameters.databases)
        found: list[Index] = []
        population = 0
        for name in names:
            with self.session(dbname=name) as connection:
                found += self._invalid(connection)
                population += one(connection, "select count(*) from pg_index")
        reasons = {index.object: self._why_not(index) for index in found}
        left = [index for index in found if reasons[index.object] is None]
        left.sort(key=lambda index: (not index.leftover, index.room, index.object))
        chosen = left[: self.parameters.at_most]
        facts = {
            "indexes": [
                {"object": i.object, "table": i.table, "room_bytes": 0 if i.leftover else i.room} for i in chosen
            ],
            "left_alone": {name: why for name, why in reasons.items() if why is not None}
            | {index.object: "beyond at_most" for index in left[self.parameters.at_most :]},
            "not_looked_at": closed,
            "missing_right": [i.object for i in chosen if not _may(i)],
        }
        return self.planned((_change(index) for index in chosen), {"index": population}, facts)

    def check(self, change: Change) -> Applied | None:
        with self.session(dbname=change.detail["database"]) as connection:
            now = next((i for i in self._invalid(connection) if i.oid == change.before["oid"]), None)
            if now is None:
                return Applied(Outcome.ALREADY_DONE, "it is valid by now, or gone")
            if why := self._why_not(now):
                return Applied(Outcome.CONTENDED, why)
            if _change(now) != change:
                return Applied(Outcome.CONTENDED, "it is not any more what was planned")
            if not _may(now):
                raise _no_right(connection, now)
        return None

    def apply(self, change: Change) -> Applied:
        wanted = self.parameters
        with self.session(
            dbname=change.detail["database"],
            statement_timeout=wanted.time_limit.total_seconds(),
            lock_timeout=wanted.lock_timeout.total_seconds(),
        ) as connection:
            if change.after is DROPPED:
                return self._drop(connection, change.detail["index"])
            return self._rebuild(connection, change)

    def _rebuild(self, connection: psycopg.Connection[Any], change: Change) -> Applied:
        import psycopg
        from psycopg import errors

        before = {index.oid for index in self._invalid(connection)}
        try:
            connection.execute(f"reindex index concurrently {change.detail['index']}".encode())
        except psycopg.Error as error:
            if error.sqlstate is None:
                raise
            cleaned = self._clean_up(connection, change, before)
            if isinstance(error, errors.LockNotAvailable):
                return Applied(Outcome.CONTENDED, f"another session's transaction or lock was in the way{cleaned}")
            raise OpsError(
                f"it could not be rebuilt: {error.diag.message_primary}{cleaned}",
                where=f"{self.target_id}, {change.object}",
                remedy="a unique index needs its duplicates removed first",
            ) from None
        return Applied(Outcome.APPLIED, "rebuilt")

    def _clean_up(self, connection: psycopg.Connection[Any], change: Change, before: set[int]) -> str:
        """Drop what our own attempt left; where that fails, the next plan finds it."""
        ours = [
            i
            for i in self._invalid(connection)
            if i.oid not in before and i.leftover and i.table == change.detail["table"]
        ]
        done = [index.name for index in ours if self._drop(connection, index.name).outcome is Outcome.APPLIED]
        return f"; what it left was dropped: {', '.join(done)}" if done else ""

    def _drop(self, connection: psycopg.Connection[Any], name: str) -> Applied:
        from psycopg import errors

        try:
            connection.execute(f"drop index concurrently {name}".encode())
        except errors.LockNotAvailable:
            return Applied(Outcome.CONTENDED, "another session's transaction or lock was in the way")
        except errors.UndefinedObject:
            return Applied(Outcome.ALREADY_DONE, "it is gone")
        return Applied(Outcome.APPLIED, "dropped: a leftover beside an index that stands as before")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        checks: list[Check] = []
        for change in plan.changes:
            if (applied := outcomes.get(change.object)) and applied.outcome in (Outcome.APPLIED, Outcome.ALREADY_DONE):
                with self.session(dbname=change.detail["database"]) as connection:
                    row = connection.execute(_STANDS, [change.detail["index"]]).fetchone()
                valid = row[0] if row else None
                said = {None: "it is not there", True: "valid, ready and live", False: "not valid"}[valid]
                gone = valid is None
                # What somebody else settled meanwhile may be settled either way.
                holds = (
                    gone
                    if change.after is DROPPED
                    else valid is True or (gone and applied.outcome is Outcome.ALREADY_DONE)
                )
                checks.append(Check(f"index {change.object}", holds, said))
        return Verification(tuple(checks) or (Check("indexes", True, "nothing was rebuilt or dropped"),))

    def _invalid(self, connection: psycopg.Connection[Any]) -> list[Index]:
        maintain = "or has_table_privilege(t.oid, 'MAINTAIN')" if connection.info.server_version >= 170000 else ""
        rows = connection.execute(_INDEXES.format(maintain=maintain).encode()).fetchall()
        return [Index(*row) for row in rows]

    def _why_not(self, index: Index) -> str | None:
        cases = (
            (not fits(index.plain, self.parameters.indexes), "the rule does not allow it"),
            (index.busy is not None, f"pid {index.busy} works on its table"),
            (index.leftover and index.constrained, "a constraint hangs on it"),
            (not index.leftover and index.room > self.parameters.room, f"it might take {index.room} bytes"),
        )
        return next((why for applies, why in cases if applies), None)


_STANDS = """
select i.indisvalid and i.indisready and i.indislive from pg_index i join pg_class c on c.oid = i.indexrelid
join pg_namespace n on n.oid = c.relnamespace where format('%%I.%%I', n.nspname, c.relname) = %s
"""


def _may(index: Index) -> bool:
    return index.ours if index.leftover else index.may_rebuild


def _change(index: Index) -> Change:
    return Change(
        "index",
        index.object,
        {"oid": index.oid, "valid": False},
        DROPPED if index.leftover else REBUILT,
        reversible=False,
        detail={"database": index.database, "index": index.name, "table": index.table},
    )


def _no_right(connection: psycopg.Connection[Any], index: Index) -> AccessDeniedError:
    ours, verb = me(connection), "drop" if index.leftover else "rebuild"
    new = connection.info.server_version >= 170000 and not index.leftover
    grant = "pg_maintain" if new else one(connection, "select quote_ident(%s)", [index.owner])
    return AccessDeniedError(
        f"the role {ours} may not {verb} {index.object}, whose table {index.owner} owns",
        remedy=f"as a superuser: GRANT {grant} TO {ours}",
    )


class ReindexInvalid(PostgresPlaybook[ReindexParameters]):
    name = "postgres.reindex_invalid"
    title = "Rebuild invalid indexes"
    what = (
        "Rebuilds indexes that are invalid with REINDEX INDEX CONCURRENTLY, and drops what an interrupted rebuild left (`_ccnew`, "
        "`_ccold`). Indexes that somebody is building, or whose table is locked against it, are left alone; a rebuild that fails "
        "or has to wait for too long is cleaned up."
    )
    why_safe = (
        "An invalid index is used by no query; reading and writing of the table go on while it is rebuilt or dropped."
    )
    blast_radius = "Disk space up to the size of the table, and its reading, while one index after the other is rebuilt. At most `at_most` indexes."
    rights = (
        "CONNECT to the databases",
        "membership in the roles that own the tables; PostgreSQL 17 and later: pg_maintain is enough where no leftover is dropped",
    )
    Parameters = ReindexParameters

    def action(self, context: Context[ReindexParameters]) -> Action:
        return ReindexAction(context)
