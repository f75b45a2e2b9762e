"""Connections to PostgreSQL: every error named with what to do, passwords only through libpq's parameters in memory."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, UnreachableError
from ops_platform.inventory.values import Secret

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

APPLICATION = "ops_platform"


@dataclass(frozen=True)
class Member:
    """One server of a cluster as it answered, or `error` with the reason why it did not (`failure` is the whole of it)."""

    host: str
    port: int
    in_recovery: bool | None = None
    timeline: int | None = None
    server_version: int | None = None
    system_identifier: int | None = None
    error: str | None = None
    failure: OpsError | None = field(default=None, repr=False, compare=False)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Login:
    """Everything libpq needs but host and port. `made_by`: as the inventory's `PostgresConnection` says it."""

    dbname: str
    user: str
    password: Secret | None
    sslmode: str = "verify-full"
    sslrootcert: str | None = None
    connect_timeout: int = 10
    made_by: str | None = None

    def parameters(self, host: str, port: int, **more: str) -> dict[str, str]:
        """libpq keywords with the password in clear: pass them on, never print them."""
        found = {
            "host": host,
            "port": str(port),
            "dbname": self.dbname,
            "user": self.user,
            "sslmode": self.sslmode,
            "connect_timeout": str(max(2, self.connect_timeout)),
            "application_name": APPLICATION,
            # A peer that vanished without a word is noticed in about a minute.
            "keepalives_idle": "20",
            "keepalives_interval": "10",
            "keepalives_count": "4",
            "tcp_user_timeout": "60000",
        }
        if self.password is not None:
            found["password"] = self.password.reveal()
        if self.sslrootcert:
            found["sslrootcert"] = self.sslrootcert
        return found | more


def connect(
    login: Login, host: str, port: int, *, dbname: str | None = None, autocommit: bool = True
) -> psycopg.Connection[Any]:
    """An SQL session. Raises the OpsError that fits."""
    parameters = login.parameters(host, port) | ({"dbname": dbname} if dbname else {})
    try:
        return psycopg.connect(_conninfo(parameters), autocommit=autocommit)
    except psycopg.OperationalError as error:
        raise connection_error(
            str(error), f"{host}:{port}", login.user, login.made_by
        ) from None  # the cause may quote parameters


@contextmanager
def asking(connection: psycopg.Connection[Any], where: str) -> Generator[psycopg.Connection[Any]]:
    """A session for questions, closed at its end. What the server refuses or breaks off is raised as the OpsError that fits."""
    try:
        yield connection
    except psycopg.Error as error:
        raise _query_error(error, where) from None
    finally:
        connection.close()


def _query_error(error: psycopg.Error, where: str) -> OpsError:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return AccessDeniedError(
            f"our role may not ask this: {text}", where=where, remedy="ops doctor names each right that is missing"
        )
    if isinstance(error, psycopg.OperationalError):
        return UnreachableError(
            f"the server broke off: {text}", where=where, remedy="try again soon; its log says what happened"
        )
    return OpsError(f"the server refuses a question of ours: {text}", where=where, remedy="read the server's log")


def connect_replication(login: Login, host: str, port: int) -> PGconn:
    """A physical replication session of libpq. The caller finishes it."""
    parameters = login.parameters(host, port, replication="true", application_name=f"{APPLICATION} replication")
    conn = pq.PGconn.connect(_conninfo(parameters).encode())
    if conn.status != pq.ConnStatus.OK:
        message = conn.error_message.decode(errors="replace")
        conn.finish()
        raise connection_error(message, f"{host}:{port}", login.user, login.made_by)
    return conn


def _conninfo(parameters: Mapping[str, str]) -> str:
    from psycopg.conninfo import make_conninfo

    return make_conninfo("", **dict(parameters))


# A standby's timeline is the newest that is known of it, and may lag behind the one that it follows; it follows each of the three or a
# later one. What it receives is seen by pg_monitor alone and while it receives; the control file knows of a new timeline at the next
# restartpoint, and of what was replayed once pages of it were written out.
_MEMBER = """
select pg_is_in_recovery(), current_setting('server_version_num')::int, (select system_identifier from pg_control_system()),
  case when pg_is_in_recovery()
       then greatest((select received_tli from pg_stat_wal_receiver), (select timeline_id from pg_control_checkpoint()),
                     (select min_recovery_end_timeline from pg_control_recovery()))
       else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end
"""


def ask_member(login: Login, host: str, port: int) -> Member:
    """What a server says of itself. Never raises for a server that cannot be asked: that is in `error`."""
    try:
        with connect(login, host, port) as connection:
            row = connection.execute(_MEMBER).fetchone()
    except OpsError as error:
        return Member(host, port, error=error.what, failure=error)
    except psycopg.Error as error:
        return Member(host, port, error=" ".join(str(error).split()))
    if row is None:
        return Member(host, port, error="it gave no answer")
    return Member(host, port, row[0], row[3], row[1], row[2])


def give_attribute(attribute: str, role: str, made_by: str | None) -> str:
    """How a login gets LOGIN or REPLICATION, which no group hands on. `role` is quoted; one that Vault makes for a session ends with it."""
    if made_by is None:
        return f"as a superuser: ALTER ROLE {role} {attribute}"
    return f"in Vault: write {attribute} into the creation_statements of {made_by}; no group hands it on"


def connection_error(message: str, where: str, user: str, made_by: str | None = None) -> OpsError:
    """The error that libpq's words stand for. `made_by` as in `Login`."""
    text = " ".join(message.split()).removeprefix("connection failed: ")
    name = user if re.fullmatch("[a-z_][a-z0-9_]*", user) else '"' + user.replace('"', '""') + '"'
    grantee = name if made_by is None else f"THE_GROUP (in which {made_by} makes its roles)"
    cases: tuple[tuple[tuple[str, ...], type[OpsError], str, str], ...] = (
        (("password authentication failed", "no password supplied"), AccessDeniedError, f"the password of {user} is refused",
         "check the secret that the inventory references; a rotated one is read at the next connection"),
        (("must be superuser or replication role", "permission denied to start WAL sender", "must have the REPLICATION"), AccessDeniedError,
         f"the role {user} may not replicate", give_attribute("REPLICATION", name, made_by)),
        (("is not permitted to log in",), AccessDeniedError, f"the role {user} may not log in", give_attribute("LOGIN", name, made_by)),
        (("permission denied for database",), AccessDeniedError, f"the role {user} may not connect to this database",
         f"as its owner: GRANT CONNECT ON DATABASE … TO {grantee}"),
        (("no pg_hba.conf entry",), AccessDeniedError, f"pg_hba.conf has no line that lets {user} in",
         "add a line for this host, user and database; for backups also one for the database `replication`"),
        (("number of requested standby connections exceeds", "max_wal_senders"), ConflictError, "all WAL sender slots are in use",
         "raise max_wal_senders, or end a replication connection that nobody needs (pg_stat_replication)"),
        (("too many clients", "too many connections for", "remaining connection slots"), ConflictError, "all connections are in use",
         "raise max_connections, or the connection limit of the role or database"),
        (("does not exist",), NotThereError, text.rpartition("FATAL: ")[2].strip(), "correct dbname or user in the inventory"),
        (("certificate", "SSL", "sslmode"), UnreachableError, f"TLS failed: {text}",
         "set tls.ca to the server's CA, or tls.mode for a server without TLS (of ops init: --ca, --tls)"),
        (("starting up", "shutting down", "not yet accepting"), UnreachableError, "the server is starting or stopping", "try again soon"),
    )  # fmt: skip
    for needles, kind, what, remedy in cases:
        if any(needle in message for needle in needles):
            return kind(what, where=where, remedy=remedy)
    return UnreachableError(
        f"PostgreSQL does not answer: {text}", where=where, remedy="check host, port, network and whether it runs"
    )
