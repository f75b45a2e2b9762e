"""Tables that near the wraparound of transaction ids, and what keeps vacuum from helping.

Terms and rules: PostgreSQL documentation, "Preventing Transaction ID Wraparound Failures". An aggressive vacuum moves a table's
relfrozenxid up to the horizon: the oldest transaction that anybody in the database may still look at. Where the horizon itself is
too old, vacuuming only costs, and what holds it has to be ended first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.errors import AccessDeniedError, ConflictError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Duration, PositiveDuration
from ops_platform.remediation.playbook import Context
from ops_platform.remediation.playbooks.postgres.common import (
    PostgresAction,
    PostgresPlaybook,
    databases,
    me,
    need_roles,
    one,
    refused,
)

if TYPE_CHECKING:
    import psycopg

_Age = Annotated[int, Field(ge=1, le=2_000_000_000)]


class VacuumParameters(Strict):
    """Of `postgres.vacuum_wraparound`."""

    xid_age: _Age = Field(default=500_000_000, description="Tables whose oldest transaction id is older than this.")
    mxid_age: _Age = Field(default=500_000_000, description="Or whose oldest multixact id is older than this.")
    databases: list[str] = Field(default=["*"], description="Patterns of databases that are looked at.")
    at_most: Annotated[int, Field(ge=1, le=100)] = Field(
        default=5, description="So many in one plan, the oldest first."
    )
    freeze: bool = Field(
        default=False,
        description="Freeze everything: more is written, and it lasts longest. Otherwise what is old alone.",
    )
    emergency: bool = Field(
        default=False, description="Only what moves the age: no cleaning of indexes, no truncation, no pauses."
    )
    cost_delay: Annotated[int, Field(ge=0, le=100)] = Field(
        default=2,
        description="Milliseconds of pause after each round of reading and writing, as autovacuum makes them.",
    )
    lock_timeout: PositiveDuration = Field(
        default=timedelta(seconds=10), description="A table that is locked for longer is left alone."
    )
    time_limit: Duration = Field(default=timedelta(hours=6), description="One table takes at most this long.")


@dataclass(frozen=True)
class Table:
    """One table with its TOAST table, as the catalog of its database shows it. Ages in transactions and multixacts."""

    database: str
    name: str  # schema and name, quoted
    xid: str
    mxid: str
    xid_age: int
    mxid_age: int
    bytes: int
    temporary: bool
    busy: str | None
    ours: bool
    owner: str
    shared: bool

    @property
    def object(self) -> str:
        return f"{self.database}: {self.name}"


@dataclass(frozen=True)
class Holder:
    """Somebody whose transaction, snapshot or slot keeps what others deleted. `here`: also of what is not shared."""

    what: str
    age: int | None
    here: bool


# pg_stat_progress_vacuum names the TOAST table while that is vacuumed.
_TABLES = """
select current_database(), format('%I.%I', n.nspname, c.relname),
  format('%s/%s', c.relfrozenxid, t.relfrozenxid), format('%s/%s', c.relminmxid, t.relminmxid),
  greatest(age(c.relfrozenxid), age(t.relfrozenxid)), greatest(mxid_age(c.relminmxid), mxid_age(t.relminmxid)),
  pg_total_relation_size(c.oid), c.relpersistence = 't',
  (select case when a.backend_type = 'autovacuum worker' then 'autovacuum' else 'another vacuum' end
   from pg_stat_progress_vacuum p join pg_stat_activity a using (pid)
   where p.datname = current_database() and p.relid in (c.oid, t.oid) limit 1),
  pg_has_role(current_user, c.relowner, 'USAGE')
    or (not c.relisshared and (select pg_has_role(current_user, datdba, 'USAGE') from pg_database where datname = current_database()))
    {maintain},
  pg_get_userbyid(c.relowner), c.relisshared
from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_class t on t.oid = c.reltoastrelid
where c.relkind in ('r', 'm')
"""
_OLD = " and (greatest(age(c.relfrozenxid), age(t.relfrozenxid)) > %s or greatest(mxid_age(c.relminmxid), mxid_age(t.relminmxid)) > %s)"
_ONE = " and format('%%I.%%I', n.nspname, c.relname) = %s"

# `here` is false for another database's, which holds the horizon of the shared catalogs alone; a WAL sender holds everybody's.
_HOLDERS = """
select 'transaction of pid ' || pid || ' (' || coalesce(usename, backend_type) || ', ' || coalesce(nullif(application_name, ''), 'unnamed')
    || ') since ' || to_char(xact_start at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS "UTC"') as holder,
  greatest(age(backend_xmin), age(backend_xid)) as age, datname = current_database() or backend_type = 'walsender' as here
from pg_stat_activity
where pid <> pg_backend_pid() and coalesce(backend_xmin, backend_xid) is not null
  and not exists (select from pg_stat_progress_vacuum p where p.pid = pg_stat_activity.pid)
union all
select 'prepared transaction ' || gid || ' of ' || owner || ' since '
    || to_char(prepared at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS "UTC"'), age(transaction), database = current_database()
from pg_prepared_xacts
union all
select 'replication slot ' || slot_name || case when active then '' else ', inactive' end, age(xmin), true
from pg_replication_slots where xmin is not null
order by 2 desc
"""


class VacuumAction(PostgresAction[VacuumParameters]):
    name = "postgres.vacuum_wraparound"

    def plan(self) -> Plan:
        found: list[Table] = []
        holders: dict[str, list[Holder]] = {}
        population = 0
        with self.session() as connection:
            need_roles(connection, {"pg_read_all_stats": "to see what holds the horizon"})
            names, closed = databases(connection, self.parameters.databases)
        for name in names:
            with self.session(dbname=name) as connection:
                old = self._tables(connection, _OLD, [self.parameters.xid_age, self.parameters.mxid_age])
                population += one(connection, "select count(*) from pg_class where relkind in ('r', 'm')")
                if old:
                    self._need_effect(connection)
                    holders[name] = _holders(connection, self.parameters.xid_age)
            found += old
        usable = [t for t in found if not t.temporary and t.busy is None]
        usable.sort(
            key=lambda t: (-max(t.xid_age / self.parameters.xid_age, t.mxid_age / self.parameters.mxid_age), t.object)
        )
        helped = [t for t in usable if not self._in_vain(t, holders[t.database])]
        if usable and not helped:
            raise refused(_vain(usable[0], holders[usable[0].database]), self.target, _END)
        chosen = helped[: self.parameters.at_most]
        facts = {
            "tables": [
                {"object": t.object, "xid_age": t.xid_age, "mxid_age": t.mxid_age, "bytes": t.bytes} for t in chosen
            ],
            "holds_the_horizon": {
                name: [{"holder": h.what, "age": h.age, "shared_catalogs_only": not h.here} for h in held]
                for name, held in holders.items()
                if held
            },
            "left_alone": {t.object: "temporary: it goes with its session" if t.temporary else f"{t.busy} works on it" for t in found if t not in usable}
            | {t.object: "vacuum could not help: the horizon is too old" for t in usable if t not in helped}
            | {t.object: "beyond at_most" for t in helped[self.parameters.at_most :]},
            "not_looked_at": closed,
            "missing_right": [t.object for t in chosen if not t.ours],
        }  # fmt: skip
        return self.planned((self._change(t) for t in chosen), {"table": population}, facts)

    def check(self, change: Change) -> Applied | None:
        with self.session(dbname=change.detail["database"]) as connection:
            need_roles(connection, {"pg_read_all_stats": "to see what holds the horizon"})
            now = self._now(connection, change)
            if now is None:
                return Applied(Outcome.ALREADY_DONE, "the table is gone")
            if not self._old(now):
                return Applied(Outcome.ALREADY_DONE, f"vacuumed by somebody else: its age is {now.xid_age}")
            if now.busy is not None:
                return Applied(Outcome.CONTENDED, f"{now.busy} works on it")
            if not now.ours:
                raise _no_right(connection, now)
            holders = _holders(connection, self.parameters.xid_age)
        return Applied(Outcome.REFUSED, _vain(now, holders)) if self._in_vain(now, holders) else None

    def apply(self, change: Change) -> Applied:
        wanted = self.parameters
        delay = 0 if wanted.emergency else wanted.cost_delay
        with self.session(
            dbname=change.detail["database"],
            statement_timeout=wanted.time_limit.total_seconds(),
            lock_timeout=wanted.lock_timeout.total_seconds(),
        ) as connection:
            # Aggressive, whatever the role or the database is set to: every page that may hold something old is read.
            connection.execute("set vacuum_freeze_table_age = 0; set vacuum_multixact_freeze_table_age = 0")
            connection.execute("select set_config('vacuum_cost_delay', %s, false)", [str(delay)])
            try:
                connection.execute(f"vacuum ({', '.join(self._options())}) {change.detail['table']}".encode())
            except _lock_timeout():
                return Applied(Outcome.CONTENDED, "another session holds a lock on the table")
            now = self._now(connection, change)
        if now is not None and self._old(now):
            raise ConflictError(
                f"it was vacuumed, and its age is still {now.xid_age} (multixacts: {now.mxid_age})",
                where=f"{self.target_id}, {change.object}",
                remedy="look at what holds the horizon (plan's facts), or set freeze: true",
            )
        return Applied(Outcome.APPLIED, f"vacuumed; its age is {now.xid_age if now else 0}")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        checks: list[Check] = []
        for change in plan.changes:
            if (applied := outcomes.get(change.object)) and applied.outcome in (Outcome.APPLIED, Outcome.ALREADY_DONE):
                with self.session(dbname=change.detail["database"]) as connection:
                    now = self._now(connection, change)
                said = f"age {now.xid_age}, multixacts {now.mxid_age}" if now else "the table is gone"
                checks.append(Check(f"age of {change.object}", now is None or not self._old(now), said))
        return Verification(tuple(checks) or (Check("ages", True, "nothing was vacuumed"),))

    # What is old, and whether vacuum helps

    def _old(self, table: Table) -> bool:
        return table.xid_age > self.parameters.xid_age or table.mxid_age > self.parameters.mxid_age

    def _in_vain(self, table: Table, holders: Sequence[Holder]) -> bool:
        """Transaction ids alone: what holds back multixacts nobody can see."""
        return table.xid_age > self.parameters.xid_age and bool(_holding(table, holders))

    def _need_effect(self, connection: psycopg.Connection[Any]) -> None:
        """Without freeze everything younger than vacuum_freeze_min_age is left: the age cannot fall below that."""
        least = one(
            connection,
            "select least(current_setting('vacuum_freeze_min_age')::bigint, current_setting('autovacuum_freeze_max_age')::bigint / 2)",
        )
        if not self.parameters.freeze and least >= self.parameters.xid_age:
            raise refused(
                f"a vacuum leaves what is younger than {least} transactions, and xid_age asks for {self.parameters.xid_age}",
                self.target,
                "set freeze: true, or a larger xid_age",
            )

    def _tables(self, connection: psycopg.Connection[Any], which: str, values: Sequence[Any]) -> list[Table]:
        maintain = " or has_table_privilege(c.oid, 'MAINTAIN')" if connection.info.server_version >= 170000 else ""
        query = _TABLES.replace("%I", "%%I").replace("%s", "%%s").format(maintain=maintain) + which
        return [Table(*row) for row in connection.execute(query.encode(), values).fetchall()]

    def _now(self, connection: psycopg.Connection[Any], change: Change) -> Table | None:
        return next(iter(self._tables(connection, _ONE, [change.detail["table"]])), None)

    def _options(self) -> list[str]:
        """What VACUUM is told, for the plan and for the server."""
        wanted = self.parameters
        return (["freeze"] if wanted.freeze else []) + (
            ["index_cleanup off", "truncate off"] if wanted.emergency else ["truncate off"]
        )

    def _change(self, table: Table) -> Change:
        return Change(
            "table",
            table.object,
            {"relfrozenxid": table.xid, "relminmxid": table.mxid},
            {"vacuumed": self._options()},
            reversible=False,
            detail={"database": table.database, "table": table.name},
        )


_END = "end what holds it: postgres.end_idle_sessions, postgres.cancel_query, postgres.drop_inactive_slot, ROLLBACK PREPARED"


def _lock_timeout() -> type[Exception]:
    from psycopg import errors

    return errors.LockNotAvailable


def _holders(connection: psycopg.Connection[Any], older_than: int) -> list[Holder]:
    """What keeps the horizon further back than that, the oldest first."""
    found = [Holder(*row) for row in connection.execute(_HOLDERS).fetchall()]
    return [holder for holder in found if holder.age is not None and holder.age >= older_than]


def _holding(table: Table, holders: Sequence[Holder]) -> list[Holder]:
    return [holder for holder in holders if holder.here or table.shared]


def _vain(table: Table, holders: Sequence[Holder]) -> str:
    held = "; ".join(f"{holder.what} (age {holder.age})" for holder in _holding(table, holders)[:5])
    return f"vacuum could not help {table.object} (age {table.xid_age}): the horizon is held by {held}"


def _no_right(connection: psycopg.Connection[Any], table: Table) -> AccessDeniedError:
    ours = me(connection)
    grant = (
        "pg_maintain"
        if connection.info.server_version >= 170000
        else one(connection, "select quote_ident(%s)", [table.owner])
    )
    return AccessDeniedError(
        f"the role {ours} may not vacuum {table.object}, which {table.owner} owns",
        remedy=f"as a superuser: GRANT {grant} TO {ours}",
    )


class VacuumWraparound(PostgresPlaybook[VacuumParameters]):
    name = "postgres.vacuum_wraparound"
    title = "Vacuum what nears wraparound"
    what = (
        "Vacuums the tables whose oldest transaction or multixact id is older than a limit, the oldest first. A table that autovacuum "
        "or another vacuum works on is left alone. Where an old transaction, a prepared one or a slot holds the horizon back, so that "
        "vacuum could not help, it says who and refuses."
    )
    why_safe = "VACUUM takes no lock that reading or writing waits for, waits only shortly for its own, and can be stopped at any moment."
    blast_radius = "Reading and writing of the disk for as long as it takes, and a connection. At most `at_most` tables, one after the other."
    rights = (
        "CONNECT to the databases",
        "pg_read_all_stats (part of pg_monitor)",
        "PostgreSQL 17 and later: pg_maintain; before: membership in the roles that own the tables, or in the owner of the database",
    )
    Parameters = VacuumParameters

    def action(self, context: Context[VacuumParameters]) -> Action:
        return VacuumAction(context)
