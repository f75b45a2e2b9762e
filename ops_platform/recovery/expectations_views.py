"""The tables and queries of a suite as temporary views with plain names, one set in each session of Great Expectations.

So names of every kind work, queries are PostgreSQL's own SQL (GX would double their percent signs and bind their colons),
columns of queries have types, and nothing is left in the database, whose sessions are read-only from then on.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, LiteralString, cast

from ops_platform.recovery.suite import Check, expand_sql, names

if TYPE_CHECKING:
    import psycopg

_SESSION = {
    "search_path": "public",
    "TimeZone": "UTC",
    "DateStyle": "ISO,YMD",
    "statement_timeout": "0",
    "jit": "off",
    # A query of a child that was killed ends with it.
    "client_connection_check_interval": "1000",
}


class CouldNotAskError(Exception):
    """Nothing can be said: the server does not answer, or gave up for a reason that is not the data."""


@dataclass
class Frame:
    """A table or a query under the plain name by which GX knows it. `error`: why it cannot be read."""

    view: str
    title: str
    sql: str
    error: str | None = None


@dataclass(frozen=True)
class Server:
    """The restored server, behind its socket."""

    socket_directory: str
    port: int
    user: str
    dbname: str

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "host": self.socket_directory,
            "port": self.port,
            "user": self.user,
            "dbname": self.dbname,
            "connect_timeout": 10,
            "application_name": "ops_platform expectations",
            "options": " ".join(f"-c {name}={value}" for name, value in _SESSION.items()),
        }

    @contextlib.contextmanager
    def session(self) -> Generator[psycopg.Connection[Any]]:
        import psycopg

        try:
            connection = psycopg.connect(**self.parameters, autocommit=True)
        except psycopg.OperationalError as error:
            raise CouldNotAskError(f"the restored server does not answer: {' '.join(str(error).split())}") from None
        with connection:
            yield connection


def frames_of(checks: Iterable[Check], target: datetime) -> dict[str, Frame]:
    """By the table or query as it was written; a table that another one is compared with is among them."""
    frames: dict[str, Frame] = {}
    for check in checks:
        for table in (check.table, check.arguments.get("other_table_name")):
            if table is not None:
                frames.setdefault(table, Frame(_plain_name(table, len(frames) + 1), table, _select(table)))
        if check.query is not None:
            name = f"query_{len(frames) + 1}"
            frames.setdefault(check.query, Frame(name, check.title, expand_sql(check.query, target)))
    return frames


def _plain_name(table: str, number: int) -> str:
    return f"{re.sub('[^a-z0-9]+', '_', table.lower()).strip('_')[:48] or 'table'}_{number}"


def _select(table: str) -> str:
    from psycopg import sql

    # A name that is none is asked for as it stands, and PostgreSQL says what it thinks of it.
    return f"select * from {sql.Identifier(*(names(table) or (table,))).as_string()}"


def make_view(connection: psycopg.Connection[Any], frame: Frame) -> None:
    from psycopg import sql

    data = sql.SQL("(\n{}\n) as data").format(sql.SQL(cast(LiteralString, frame.sql)))
    columns = connection.execute(sql.SQL("select * from {} limit 0").format(data)).description or []
    named = sql.SQL("({})").format(sql.SQL(", ").join(sql.Identifier(alias(column.name)) for column in columns))
    create = sql.SQL("create temporary view {} {} as select * from {}")
    connection.execute(create.format(sql.Identifier(frame.view), named if columns else sql.SQL(""), data))


def alias(column: str) -> str:
    """GX writes the names of columns into conditions of its own, in double quotes and on one line."""
    return re.sub(r"[\x00-\x1f]", " ", column.replace('"', "″"))


def try_views(server: Server, frames: Iterable[Frame]) -> None:
    """Note in each frame why it cannot be read. Raises CouldNotAskError."""
    import psycopg

    with server.session() as connection:
        recovering = connection.execute("select pg_is_in_recovery()").fetchone()
        if recovering is None or recovering[0]:
            raise CouldNotAskError("the server is still in recovery: expectations are asked after it was promoted")
        for frame in frames:
            try:
                make_view(connection, frame)
            except psycopg.Error as error:
                if connection.broken:
                    raise CouldNotAskError("the restored server went away") from None
                frame.error = said(type(error).__name__, error.sqlstate, error.diag.message_primary or str(error))


@contextlib.contextmanager
def views_in_every_session(frames: Iterable[Frame]) -> Generator[None]:
    """Temporary views belong to a session, and GX opens sessions as it likes."""
    from sqlalchemy import event
    from sqlalchemy.pool import Pool

    def prepare(connection: psycopg.Connection[Any], _record: object) -> None:
        connection.autocommit = True
        for frame in frames:
            if frame.error is None:
                make_view(connection, frame)
        connection.execute("set default_transaction_read_only = on")
        connection.autocommit = False

    event.listen(Pool, "connect", prepare)
    try:
        yield
    finally:
        event.remove(Pool, "connect", prepare)


def has_values(server: Server, frame: Frame, column: str) -> bool:
    """Whether a column of a frame holds anything but nulls."""
    from psycopg import sql

    with server.session() as connection:
        make_view(connection, frame)
        query = sql.SQL("select from {} where {} is not null limit 1")
        return connection.execute(query.format(sql.Identifier(frame.view), sql.Identifier(column))).rowcount > 0


# Errors in few words, and without values


def reason(text: str) -> str:
    """What PostgreSQL said in an error that GX passes on, without the query and the advice for users of SQLAlchemy."""
    import psycopg

    found = re.search(r"\(psycopg\.errors\.(\w+)\) (.*)", text)
    if not found:
        return text.strip().partition("\n")[0][:400] or "no reason was given"
    kind = getattr(psycopg.errors, found[1], psycopg.Error)
    return said(found[1], kind.sqlstate, found[2])


def said(name: str, sqlstate: str | None, message: str) -> str:
    kind = (sqlstate or "")[:2]
    if kind in ("53", "57"):  # out of disk or memory, shut down: not the data
        raise CouldNotAskError(f"the restored server gave up: {message}")
    # Class 22 quotes the value that it could not read, class 23 the row that breaks a rule.
    return f"PostgreSQL: {name}" if kind in ("22", "23") else f"PostgreSQL: {message}"[:400]
