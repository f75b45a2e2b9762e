"""What the playbooks for PostgreSQL share: sessions with named errors, rights, patterns of names, peers."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ops_platform.actions import Applied, Change, Plan, Verification
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    NotThereError,
    OpsError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from ops_platform.inventory.base import Strict
from ops_platform.inventory.model import Target
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Playbook

if TYPE_CHECKING:
    import psycopg

P = TypeVar("P", bound=Strict)

POSTGRESQL = frozenset({"postgresql"})
LOOK_SECONDS = 30


class PostgresPlaybook(Playbook[P], Generic[P]):
    """A remedy for a PostgreSQL target. What acts on its primary has the streaming standbys for peers."""

    kinds = POSTGRESQL

    def peers(self, context: Context[P]) -> Peers | None:
        target = target_of(context)
        if len(target.connection.hosts) < 2:
            return None
        streaming = sum(_streams(context, target, number) for number in range(len(target.connection.hosts)))
        return Peers(streaming, len(target.connection.hosts) - 1, "streaming standbys")


def _streams(context: Context[Any], target: Target, number: int) -> bool:
    """Whether this member is a standby that receives WAL now: as it says itself. One that does not answer is not healthy."""
    only = target.model_copy(
        update={"connection": target.connection.model_copy(update={"hosts": [target.connection.hosts[number]]})}
    )
    (member,) = context.access.members(only)
    if member.error is not None or not member.in_recovery:
        return False
    with session(context, member=member) as connection:
        need_roles(connection, {"pg_read_all_stats": "to see whether a standby streams"})
        found = connection.execute("select status = 'streaming' from pg_stat_wal_receiver").fetchone()
    return found is not None and found[0] is True


class PostgresAction(ABC, Generic[P]):
    """An action on one PostgreSQL target. Every look has a connection of its own: what was seen before is not believed."""

    name: ClassVar[str]

    def __init__(self, context: Context[P]) -> None:
        self.context = context
        self.parameters: P = context.parameters
        self.target = target_of(context)

    @property
    def target_id(self) -> str:
        return self.target.id

    @abstractmethod
    def plan(self) -> Plan: ...

    @abstractmethod
    def check(self, change: Change) -> Applied | None: ...

    @abstractmethod
    def apply(self, change: Change) -> Applied: ...

    @abstractmethod
    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification: ...

    def planned(
        self,
        changes: Iterable[Change],
        population: Mapping[str, int] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Plan:
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now(), population or {}, facts or {})

    def session(self, **more: Any) -> contextlib.AbstractContextManager[psycopg.Connection[Any]]:
        return session(self.context, **more)


def target_of(context: Context[Any]) -> Target:
    if not isinstance(context.subject, Target):
        raise UsageError(f"{context.subject.id} is of kind {context.subject.kind}, and this acts on PostgreSQL alone")
    return context.subject


@contextlib.contextmanager
def session(
    context: Context[Any],
    *,
    dbname: str | None = None,
    member: Any = None,
    statement_timeout: float = LOOK_SECONDS,
    lock_timeout: float = 5,
) -> Generator[psycopg.Connection[Any]]:
    """A session in autocommit on the primary (or on `member`), closed at the end. Timeouts in seconds.

    Its errors are OpsErrors, with the server's first line alone: the detail of an error may quote the data.
    A statement whose client was killed ends within seconds and does not go on by itself.
    """
    import psycopg

    target = target_of(context)
    with contextlib.closing(context.access.postgres(target, dbname=dbname, member=member)) as connection:
        try:
            connection.execute(
                "select set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false),"
                " set_config('client_connection_check_interval', '5s', false)",
                [f"{int(statement_timeout * 1000)}ms", f"{int(lock_timeout * 1000)}ms"],
            )
            yield connection
        except psycopg.Error as error:
            raise named(error, f"{target.id}, database {connection.info.dbname}") from None


def named(error: psycopg.Error, where: str) -> OpsError:
    """The error that the server's answer stands for."""
    from psycopg import errors

    text = error.diag.message_primary or " ".join(str(error).split()) or type(error).__name__
    cases: tuple[tuple[type[psycopg.Error], type[OpsError], str, str | None], ...] = (
        (errors.InsufficientPrivilege, AccessDeniedError, text, "docs/reference/playbooks.md lists the rights of each playbook"),
        (errors.LockNotAvailable, ConflictError, f"another session holds a lock: {text}", "look at pg_locks, and try again"),
        (errors.ObjectInUse, ConflictError, text, None),
        (errors.QueryCanceled, ConflictError, text, "it took too long, or somebody cancelled it"),
        (errors.UndefinedObject, NotThereError, text, None),
        (errors.UndefinedTable, NotThereError, text, None),
        (errors.OperatorIntervention, UnreachableError, f"the server ended the session: {text}", None),
        (errors.ConnectionException, UnreachableError, text, None),
    )  # fmt: skip
    for kind, ours, what, remedy in cases:
        if isinstance(error, kind):
            return ours(what, where=where, remedy=remedy)
    if error.sqlstate is None:
        return UnreachableError(f"PostgreSQL does not answer: {text}", where=where)
    return OpsError(f"PostgreSQL refuses: {text}", where=where)


def one(
    connection: psycopg.Connection[Any], query: str, params: Sequence[Any] | Mapping[str, Any] | None = None
) -> Any:
    """The first column of the one row that such a query always has."""
    row = connection.execute(query.encode(), params).fetchone()
    if row is None:
        raise UnreachableError("the server gave no answer")
    return row[0]


# Rights


def me(connection: psycopg.Connection[Any]) -> str:
    """Our role, quoted as SQL wants it."""
    return one(connection, "select quote_ident(current_user)")


def lacks(connection: psycopg.Connection[Any], role: str) -> bool:
    """Whether we are without the rights of a predefined role."""
    return one(connection, "select not pg_has_role(current_user, %s, 'USAGE')", [role])


def need_roles(connection: psycopg.Connection[Any], needed: Mapping[str, str]) -> None:
    """Raises AccessDeniedError for the first predefined role whose rights are missing. `needed`: what each is for."""
    for role, purpose in needed.items():
        if lacks(connection, role):
            ours = me(connection)
            raise AccessDeniedError(
                f"the role {ours} is not a member of {role}, which is needed {purpose}",
                remedy=f"as a superuser: GRANT {role} TO {ours}",
            )


# Names


def fits(name: str | None, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of the shell patterns; upper and lower case are told apart."""
    return any(fnmatchcase(name or "", pattern) for pattern in patterns)


def utc(moment: datetime | None) -> str | None:
    """As plans hold it: with microseconds, because it identifies a session or a query."""
    from datetime import UTC

    return None if moment is None else moment.astimezone(UTC).isoformat(timespec="microseconds")


def refused(what: str, target: Target, remedy: str | None = None) -> RefusedError:
    return RefusedError(what, where=target.id, remedy=remedy)


def databases(connection: psycopg.Connection[Any], patterns: Iterable[str]) -> tuple[list[str], list[str]]:
    """Databases that fit and that we may connect to; and those that fit and that we may not."""
    rows = connection.execute(
        "select datname, datallowconn and has_database_privilege(datname, 'CONNECT'), datistemplate and not datallowconn"
        " from pg_database order by datname"
    ).fetchall()
    fitting = [(name, may) for name, may, closed in rows if fits(name, patterns) and not closed]
    return [name for name, may in fitting if may], [name for name, may in fitting if not may]
