"""The ledger in PostgreSQL: one table in the schema `ops_ledger` that only grows.

Triggers refuse UPDATE, DELETE, TRUNCATE and an INSERT that does not extend the chain. They stop mistakes and programs; a superuser
can take them away, and then `verify` finds what was done.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, LiteralString, Self, cast

import psycopg
from psycopg import errors

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import AccessDeniedError, ConflictError, OpsError, UnreachableError
from ops_platform.ledger.chain import (
    GENESIS,
    Entry,
    LedgerCheck,
    Row,
    canonical,
    check_chain,
    digest,
    entry_text,
    moment,
)

_WHERE = "the ledger's database"
_LOCK_SPACE = 0x6F70736C  # "opsl": advisory locks of the ledger
_SETUP, _APPEND = 1, 2
_LOCK_TIMEOUT: LiteralString = "30s"
_PAGE = 5000

# The advisory lock in the trigger keeps writers apart even where somebody inserts without `append`.
_SCHEMA: LiteralString = """
create schema if not exists ops_ledger;

create table ops_ledger.entries (
  seq bigint primary key check (seq > 0),
  at timestamptz not null,
  kind text not null,
  actor text not null,
  subject text not null,
  body text not null check (jsonb_typeof(body::jsonb) = 'object'),
  prev_sha256 text not null check (prev_sha256 ~ '^[0-9a-f]{64}$'),
  sha256 text not null check (sha256 ~ '^[0-9a-f]{64}$')
);
create index entries_subject on ops_ledger.entries (subject, seq);
create index entries_kind on ops_ledger.entries (kind, seq);
comment on table ops_ledger.entries is 'Append-only and chained; format 1, see docs/reference/ledger.md';
comment on column ops_ledger.entries.body is 'Canonical JSON, kept as text because the digest is over these very bytes';

create function ops_ledger.refuse() returns trigger language plpgsql set search_path = '' as $$
begin
  raise exception 'the ledger is append-only: % is refused', tg_op using errcode = 'restrict_violation';
end $$;

create function ops_ledger.extend() returns trigger language plpgsql set search_path = '' as $$
declare last record;
begin
  perform pg_catalog.pg_advisory_xact_lock(1869640556, 2);
  select seq, sha256 into last from ops_ledger.entries order by seq desc limit 1;
  if new.seq <> coalesce(last.seq, 0) + 1 or new.prev_sha256 <> coalesce(last.sha256, pg_catalog.repeat('0', 64)) then
    raise exception 'entry % does not extend the chain, whose newest entry is %', new.seq, coalesce(last.seq, 0)
      using errcode = 'restrict_violation';
  end if;
  return new;
end $$;

create trigger append_only before update or delete or truncate on ops_ledger.entries
  for each statement execute function ops_ledger.refuse();
create trigger extends_chain before insert on ops_ledger.entries
  for each row execute function ops_ledger.extend();
-- Also for sessions that replicate, which skip ordinary triggers.
alter table ops_ledger.entries enable always trigger append_only;
alter table ops_ledger.entries enable always trigger extends_chain;
"""

_COLUMNS: LiteralString = "seq, at, kind, actor, subject, body, prev_sha256, sha256"


class LedgerTransaction:
    """Entries and rows of one transaction. `connection` is for the tables that stand beside the ledger."""

    def __init__(self, connection: psycopg.Connection[Any], clock: Clock) -> None:
        self.connection = connection
        self._clock = clock
        self._head: tuple[int, str] | None = None

    def append(self, kind: str, subject: str, body: Mapping[str, Any], *, actor: str) -> Entry:
        """As `Ledger.append`; durable when the transaction ends."""
        canonical([kind, subject, actor])
        text = canonical(dict(body))
        seq, prev = self._newest()
        seq, at = seq + 1, self._clock.now()
        sha256 = digest(prev, entry_text(seq, moment(at), kind, actor, subject, text))
        self.connection.execute(
            "insert into ops_ledger.entries (seq, at, kind, actor, subject, body, prev_sha256, sha256)"
            " values (%s, %s, %s, %s, %s, %s, %s, %s)",
            [seq, at, kind, actor, subject, text, prev, sha256],
        )
        self._head = (seq, sha256)
        return Entry(seq, at, kind, actor, subject, text, prev, sha256)

    def _newest(self) -> tuple[int, str]:
        if self._head is None:
            _one_at_a_time(self.connection, _APPEND)
            row = self.connection.execute(
                "select seq, sha256 from ops_ledger.entries order by seq desc limit 1"
            ).fetchone()
            self._head = (row[0], row[1]) if row else (0, GENESIS)
        return self._head


class Ledger:
    """The ledger behind a connection that `connect` opens. Safe for threads; opens lazily, and again after the server was away.

    The schema is made at the first use. Every method raises UnreachableError where the database does not answer.
    """

    claim_space = _LOCK_SPACE + 1
    """The first of the two keys of the advisory locks that `claim` takes; the second is the name's hashtext."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._connect = connect
        self._clock = clock
        self._kept: psycopg.Connection[Any] | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._kept is not None:
                self._kept.close()
                self._kept = None

    # Writing

    def append(self, kind: str, subject: str, body: Mapping[str, Any], *, actor: str) -> Entry:
        """Write one entry behind the newest. Durable when it returns; writers wait for one another.

        Raises UsageError for a body that holds a secret or is not plain JSON, before anything is sent.
        """
        with self.transaction() as transaction:
            return transaction.append(kind, subject, body, actor=actor)

    @contextlib.contextmanager
    def transaction(self) -> Generator[LedgerTransaction]:
        """A transaction of the platform's database: what is written in it and its entries stand there together or not at all.

        From the first `append` on every other writer waits: look and decide first, then append, then end it.
        """
        with self._session() as connection, connection.transaction():
            yield LedgerTransaction(connection, self._clock)

    @contextlib.contextmanager
    def claim(self, name: str) -> Generator[bool]:
        """Whether `name` is ours alone, across machines, until the context ends. The server frees it with the session."""
        with self._named():
            connection = self._open()
        try:
            with self._named():
                row = connection.execute(
                    "select pg_try_advisory_lock(%s, hashtext(%s))", [self.claim_space, name]
                ).fetchone()
            yield row is not None and row[0] is True
        finally:
            connection.close()

    # Reading

    def entries(
        self,
        *,
        subject: str | None = None,
        kind: str | None = None,
        since: datetime | None = None,
        after_seq: int = 0,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[Entry]:
        """The entries that fit, oldest first unless asked otherwise. `kind` ending in a dot fits every kind below it."""
        query: LiteralString = (
            f"select {_COLUMNS} from ops_ledger.entries where seq > %(after)s"
            " and (%(subject)s::text is null or subject = %(subject)s)"
            " and (%(kind)s::text is null or kind = %(kind)s or (right(%(kind)s, 1) = '.' and starts_with(kind, %(kind)s)))"
            " and (%(since)s::timestamptz is null or at >= %(since)s)"
        )
        query += " order by seq desc" if newest_first else " order by seq"
        query += " limit %(limit)s"
        values = {"after": after_seq, "subject": subject, "kind": kind, "since": since, "limit": limit}
        with self._session() as connection:
            return [Entry(*row) for row in connection.execute(query, values)]

    def verify(self, *, anchor: tuple[int, str] | None = None) -> LedgerCheck:
        """Recompute every digest from the first entry on, in one snapshot and constant memory."""
        began = time.monotonic()
        self._make_sure()
        # A connection of its own: writers of this process need not wait for the end of a long chain.
        with self._named(), contextlib.closing(self._open()) as connection, connection.transaction():
            unprotected = _unprotected(connection)
            found = check_chain(_rows(connection), anchor=anchor)
        return LedgerCheck(
            found.entries,
            found.head_seq,
            found.head_sha256,
            found.broken,
            unprotected,
            round(time.monotonic() - began, 3),
        )

    # What stands below

    def _make_sure(self) -> None:
        """A ledger into which nothing was written yet is an unbroken chain, and not a missing table."""
        with self._session():
            pass

    @contextlib.contextmanager
    def _session(self) -> Generator[psycopg.Connection[Any]]:
        with self._lock, self._named():
            if self._kept is not None and not _alive(self._kept):
                self._kept.close()
                self._kept = None
            if self._kept is None:
                self._kept = self._open()
                self._set_up(self._kept)
            yield self._kept

    def _open(self) -> psycopg.Connection[Any]:
        connection = self._connect()
        # Read committed: what the writer before us committed must be seen once we have waited for its lock.
        connection.rollback()
        connection.autocommit = True
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.execute("set timezone to 'UTC'")
        return connection

    def _set_up(self, connection: psycopg.Connection[Any]) -> None:
        if _is_there(connection):
            return
        with connection.transaction():
            _one_at_a_time(connection, _SETUP)
            if not _is_there(connection):
                connection.execute(_SCHEMA)

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        try:
            yield
        except psycopg.Error as error:
            raise _named(error) from None  # the cause may quote connection parameters


def _one_at_a_time(connection: psycopg.Connection[Any], what: int) -> None:
    connection.execute(f"set local lock_timeout = '{_LOCK_TIMEOUT}'")
    connection.execute("select pg_advisory_xact_lock(%s, %s)", [_LOCK_SPACE, what])


def _is_there(connection: psycopg.Connection[Any]) -> bool:
    # By the catalog as a query sees it: to_regclass may answer from before the wait for another's set-up.
    row = connection.execute(
        "select exists (select from pg_tables where schemaname = 'ops_ledger' and tablename = 'entries')"
    ).fetchone()
    return row is not None and row[0] is True


def _alive(connection: psycopg.Connection[Any]) -> bool:
    """Asked before each use: a server that was restarted in between costs a new connection and not the entry."""
    if connection.closed:
        return False
    try:
        connection.execute("select 1")
    except psycopg.OperationalError:
        return False
    return True


def _rows(connection: psycopg.Connection[Any]) -> Iterator[Row]:
    with connection.cursor("ops_ledger_verify") as cursor:
        cursor.itersize = _PAGE
        cursor.execute(
            "select seq, to_char(at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'),"
            " kind, actor, subject, body, prev_sha256, sha256 from ops_ledger.entries order by seq"
        )
        yield from cast("Iterable[Row]", cursor)


def _unprotected(connection: psycopg.Connection[Any]) -> tuple[str, ...]:
    found = dict(
        connection.execute(
            "select tgname, tgenabled::text from pg_trigger where tgrelid = 'ops_ledger.entries'::regclass and not tgisinternal"
        ).fetchall()
    )
    return tuple(
        f"the trigger {name} is {'gone' if name not in found else 'not always on'}"
        for name in ("append_only", "extends_chain")
        if found.get(name) != "A"
    )


def _named(error: psycopg.Error) -> OpsError:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, errors.LockNotAvailable):
        return ConflictError(
            f"another writer held the ledger for more than {_LOCK_TIMEOUT}",
            where=_WHERE,
            remedy="look for a session that sits in a transaction: pg_stat_activity",
        )
    if isinstance(error, psycopg.OperationalError):
        return UnreachableError(
            f"the ledger does not answer: {text}",
            where=_WHERE,
            remedy="check platform.database in the inventory, and the server",
        )
    if isinstance(error, errors.InsufficientPrivilege):
        return AccessDeniedError(
            f"the ledger may not be used: {text}",
            where=_WHERE,
            remedy="the role needs CREATE on the database for the first use; later INSERT and SELECT on ops_ledger.entries",
        )
    return OpsError(f"the ledger refuses: {text}", where=_WHERE)
