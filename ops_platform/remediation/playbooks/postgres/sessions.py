"""Sessions that sit idle in a transaction, and queries that run away.

A process id is soon given to another session, so a session is identified by its process id, its start and the start of its
transaction or query; the statement that ends it looks at all of them. Between that look and the signal lies one call inside of
the server, which is as close as PostgreSQL lets anybody come. The text of a query is personal data and is not even read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.errors import AccessDeniedError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import PositiveDuration, format_duration
from ops_platform.remediation.playbook import Context
from ops_platform.remediation.playbooks.postgres.common import (
    PostgresAction,
    PostgresPlaybook,
    fits,
    need_roles,
    one,
    utc,
)

if TYPE_CHECKING:
    import psycopg

_SPARED = ["ops_platform*", "pg_dump*", "pg_repack*"]


class SessionParameters(Strict):
    """Which sessions are looked at."""

    at_most: Annotated[int, Field(ge=1, le=100)] = Field(
        default=10, description="So many in one plan: those that block most first, then the oldest."
    )
    only_blocking: bool = Field(default=False, description="Only those that another session waits for.")
    databases: list[str] = Field(
        default=["*"], description="Only sessions in databases that fit one of these patterns."
    )
    never_users: list[str] = Field(default=[], description="Patterns of roles whose sessions are left alone.")
    never_applications: list[str] = Field(
        default=_SPARED, description="Patterns of application names whose sessions are left alone."
    )


S = TypeVar("S", bound=SessionParameters)


@dataclass(frozen=True)
class Session:
    """A client's session as pg_stat_activity shows it. `since`: start of the transaction or query that identifies it."""

    pid: int
    backend_start: datetime
    since: datetime | None
    state: str
    user: str
    superuser: bool
    application: str
    database: str
    query_id: int | None
    seconds: float  # idle, or at work on its query
    transaction_seconds: float | None
    maintains: bool
    blocks: int

    def who(self) -> dict[str, Any]:
        return {"user": self.user, "application": self.application, "database": self.database}


# `since` is xact_start or query_start; both name the column that the caller is about.
_SESSIONS = """
with waiting as (
  select unnest(pg_blocking_pids(pid)) as blocker from pg_stat_activity where wait_event_type = 'Lock'
)
select a.pid, a.backend_start, a.{since}, coalesce(a.state, ''), coalesce(a.usename, ''), coalesce(r.rolsuper, false),
  coalesce(a.application_name, ''), coalesce(a.datname, ''), a.query_id,
  extract(epoch from clock_timestamp() - a.{clock})::float8, extract(epoch from clock_timestamp() - a.xact_start)::float8,
  exists (select from pg_stat_progress_vacuum p where p.pid = a.pid)
    or exists (select from pg_stat_progress_create_index p where p.pid = a.pid)
    or exists (select from pg_stat_progress_cluster p where p.pid = a.pid)
    or exists (select from pg_stat_progress_analyze p where p.pid = a.pid),
  (select count(*) from waiting w where w.blocker = a.pid)
from pg_stat_activity a left join pg_roles r on r.oid = a.usesysid
where a.backend_type = 'client backend' and a.pid <> pg_backend_pid()
"""


class _SessionAction(PostgresAction[S], Generic[S]):
    """What ending a session and cancelling a query have in common."""

    kind: str
    since: str  # the column that identifies, with process id and start, what is meant
    clock: str  # the column from which its age counts
    verb: str

    @abstractmethod
    def fitting(self, found: Session) -> bool:
        """Whether its state and age are those that this is about."""

    def goes_on(self, found: Session) -> bool:
        """Whether what `since` is the start of has not ended."""
        return True

    @abstractmethod
    def signal(self, connection: psycopg.Connection[Any], change: Change) -> Applied: ...

    def plan(self) -> Plan:
        with self.session() as connection:
            need_roles(connection, {"pg_read_all_stats": "to see the sessions of other roles"})
            everybody = self._look(connection)
            superuser, missing = _our_rights(connection)
        mine = [
            s
            for s in everybody
            if s.since is not None and self.fitting(s) and fits(s.database, self.parameters.databases)
        ]
        spared = [s for s in mine if self._spared(s)]
        beyond = [s for s in mine if s not in spared and s.superuser and not superuser]
        left = [
            s for s in mine if s not in spared and s not in beyond and (s.blocks or not self.parameters.only_blocking)
        ]
        left.sort(key=lambda s: (-s.blocks, -s.seconds, s.pid))
        chosen = left[: self.parameters.at_most]
        facts: dict[str, Any] = {
            self.kind: [
                {"object": self._object(s), **s.who(), "seconds": round(s.seconds), "blocks": s.blocks}
                | ({"transaction_seconds": round(s.transaction_seconds)} if s.transaction_seconds is not None else {})
                for s in chosen
            ],
            "left_alone": {
                "by the rule": len(spared),
                "of superusers": len(beyond),
                "block nobody": len(mine) - len(spared) - len(beyond) - len(left),
                "beyond at_most": len(left) - len(chosen),
            },
        }
        if missing is not None:
            facts["missing_right"] = missing.what
        return self.planned((self._change(s) for s in chosen), {self.kind: len(everybody)}, facts)

    def check(self, change: Change) -> Applied | None:
        with self.session() as connection:
            need_roles(connection, {"pg_read_all_stats": "to see the sessions of other roles"})
            if (missing := _our_rights(connection)[1]) is not None:
                raise missing
            found = self._find(connection, change)
        if found is None:
            return Applied(Outcome.ALREADY_DONE, "it ended by itself")
        if not self.fitting(found):
            return Applied(
                Outcome.CONTENDED, f"it is not any more what was planned: {found.state}, for {_age(found.seconds)}"
            )
        if self.parameters.only_blocking and not found.blocks:
            return Applied(Outcome.CONTENDED, "nobody waits for it any more")
        return None

    def apply(self, change: Change) -> Applied:
        # A moment longer than a signal is waited for, so that the wait ends by its own answer.
        with self.session(statement_timeout=120) as connection:
            return self.signal(connection, change)

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        ended = [
            c
            for c in plan.changes
            if (a := outcomes.get(c.object)) and a.outcome in (Outcome.APPLIED, Outcome.ALREADY_DONE)
        ]
        with self.session() as connection:
            still = [change.object for change in ended if self._find(connection, change)]
        told = f"{len(ended) - len(still)} of {len(ended)} gone from pg_stat_activity"
        return Verification(
            (Check(f"{self.kind} {self.verb}", not still, "; ".join([told, *(f"still there: {s}" for s in still)])),)
        )

    def _spared(self, found: Session) -> bool:
        return fits(found.user, self.parameters.never_users) or fits(
            found.application, self.parameters.never_applications
        )

    def _look(self, connection: psycopg.Connection[Any], pid: int | None = None) -> list[Session]:
        query = _SESSIONS.format(since=self.since, clock=self.clock) + (" and a.pid = %s" if pid is not None else "")
        rows = connection.execute(query.encode(), None if pid is None else [pid]).fetchall()
        return [Session(*row) for row in rows]

    def _find(self, connection: psycopg.Connection[Any], change: Change) -> Session | None:
        """The very session of the change; another one under its process id is not it."""
        before = change.before
        for found in self._look(connection, before["pid"]):
            same = (utc(found.backend_start), utc(found.since)) == (before["backend_start"], before[self.since])
            if same and self.goes_on(found):
                return found
        return None

    def _object(self, found: Session) -> str:
        return f"pid {found.pid} since {utc(found.since)}"

    def _change(self, found: Session) -> Change:
        before = {
            "pid": found.pid,
            "backend_start": utc(found.backend_start),
            self.since: utc(found.since),
            **found.who(),
        } | ({"query_id": str(found.query_id)} if found.query_id is not None else {})
        return Change(self.kind, self._object(found), before, None, reversible=False)

    def _identity(self, change: Change) -> Sequence[Any]:
        return [change.before["pid"], change.before["backend_start"], change.before[self.since]]


def _our_rights(connection: psycopg.Connection[Any]) -> tuple[bool, AccessDeniedError | None]:
    """Whether we are a superuser, who alone may signal superusers; and what keeps us from signalling anybody."""
    superuser = one(connection, "select rolsuper from pg_roles where rolname = current_user")
    try:
        need_roles(connection, {"pg_signal_backend": "to signal other sessions"})
    except AccessDeniedError as error:
        return superuser, error
    return superuser, None


def _age(seconds: float) -> str:
    return format_duration(timedelta(seconds=round(seconds)))


# Idle in transaction


class EndIdleParameters(SessionParameters):
    """Of `postgres.end_idle_sessions`."""

    older_than: PositiveDuration = Field(
        default=timedelta(minutes=15), description="Idle in its transaction without a break for longer than this."
    )


class EndIdleAction(_SessionAction[EndIdleParameters]):
    name = "postgres.end_idle_sessions"
    kind, since, clock, verb = "session", "xact_start", "state_change", "ended"

    def fitting(self, found: Session) -> bool:
        return (
            found.state.startswith("idle in transaction") and found.seconds > self.parameters.older_than.total_seconds()
        )

    def signal(self, connection: psycopg.Connection[Any], change: Change) -> Applied:
        row = connection.execute(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity"
            " where pid = %s and backend_start = %s and xact_start = %s and state like 'idle in transaction%%'"
            " and clock_timestamp() - state_change > %s",
            [*self._identity(change), self.parameters.older_than],
        ).fetchone()
        if row is None:
            return Applied(Outcome.CONTENDED, "it went back to work, or ended, in this very moment")
        if row[0] is not True:
            return Applied(Outcome.FAILED, "it was told to end, and is still there after 10s")
        return Applied(Outcome.APPLIED, "ended; its transaction was rolled back")


class EndIdleSessions(PostgresPlaybook[EndIdleParameters]):
    name = "postgres.end_idle_sessions"
    title = "End sessions idle in transaction"
    what = (
        "Ends client sessions of the primary that have been idle in an open transaction for longer than a limit. Such a session "
        "keeps its locks, and keeps vacuum from removing what was deleted since. Sessions of replication, background processes, "
        "superusers (unless the login is one) and of the users and applications that the rule spares are left alone."
    )
    why_safe = (
        "Each session is identified by process id, start and transaction, looked at again right before, and left alone when it "
        "went back to work."
    )
    blast_radius = (
        "The client of an ended session loses its connection, and what its open transaction had written and not committed. "
        "At most `at_most` sessions."
    )
    rights = ("CONNECT to the database of the inventory", "pg_read_all_stats (part of pg_monitor)", "pg_signal_backend")
    Parameters = EndIdleParameters

    def action(self, context: Context[EndIdleParameters]) -> Action:
        return EndIdleAction(context)


# Runaway queries


class CancelParameters(SessionParameters):
    """Of `postgres.cancel_query`."""

    older_than: PositiveDuration = Field(
        default=timedelta(minutes=30), description="At work on one query for longer than this."
    )
    at_most: Annotated[int, Field(ge=1, le=100)] = Field(
        default=5, description="So many in one plan: those that block most first, then the oldest."
    )
    query_ids: list[int] = Field(
        default=[], description="Only queries with one of these ids, as pg_stat_statements shows them; empty: any."
    )
    maintenance: bool = Field(
        default=False, description="Also VACUUM, ANALYZE, CLUSTER and index builds, which otherwise are left alone."
    )
    wait: PositiveDuration = Field(
        default=timedelta(seconds=10), description="A cancelled query must have ended by then."
    )
    terminate: bool = Field(
        default=False, description="End the session of a query that does not obey the cancellation."
    )


class CancelAction(_SessionAction[CancelParameters]):
    name = "postgres.cancel_query"
    kind, since, clock, verb = "query", "query_start", "query_start", "cancelled"

    def fitting(self, found: Session) -> bool:
        wanted = self.parameters
        return (
            found.state == "active"
            and found.seconds > wanted.older_than.total_seconds()
            and (wanted.maintenance or not found.maintains)
            and (not wanted.query_ids or found.query_id in wanted.query_ids)
        )

    def goes_on(self, found: Session) -> bool:
        return found.state == "active"  # the start of a query is shown until the next one begins

    def signal(self, connection: psycopg.Connection[Any], change: Change) -> Applied:
        row = connection.execute(_SIGNAL.format("pg_cancel_backend(pid)").encode(), self._identity(change)).fetchone()
        if row is None:
            return Applied(Outcome.CONTENDED, "it ended in this very moment")
        clock = self.context.clock
        deadline = clock.monotonic() + self.parameters.wait.total_seconds()
        while clock.monotonic() < deadline:
            if self._find(connection, change) is None:
                return Applied(Outcome.APPLIED, "cancelled; its session goes on")
            clock.sleep(0.05)
        if not self.parameters.terminate:
            return Applied(
                Outcome.FAILED, f"it does not obey the cancellation within {format_duration(self.parameters.wait)}"
            )
        row = connection.execute(
            _SIGNAL.format("pg_terminate_backend(pid, 10000)").encode(), self._identity(change)
        ).fetchone()
        if row is not None and row[0] is not True:
            return Applied(Outcome.FAILED, "its session was told to end, and is still there after 10s")
        return Applied(Outcome.APPLIED, "it did not obey the cancellation; its session was ended")


_SIGNAL = (
    "select {} from pg_stat_activity where pid = %s and backend_start = %s and query_start = %s and state = 'active'"
)


class CancelQuery(PostgresPlaybook[CancelParameters]):
    name = "postgres.cancel_query"
    title = "Cancel runaway queries"
    what = (
        "Cancels queries of the primary that have been running for longer than a limit; where the rule says so, the session of one "
        "that does not obey is ended. The text of a query is never read: plan and ledger have its id, role, application and age."
    )
    why_safe = "A query is identified by process id and start and looked at again right before; a cancelled one leaves nothing half done."
    blast_radius = (
        "The client gets an error for its query, and its transaction is rolled back; with `terminate` it may lose its connection. "
        "At most `at_most` queries."
    )
    rights = EndIdleSessions.rights
    Parameters = CancelParameters

    def action(self, context: Context[CancelParameters]) -> Action:
        return CancelAction(context)
