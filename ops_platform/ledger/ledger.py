"""The ledger in PostgreSQL: one table in the schema `ops_ledger` that only grows.

Triggers refuse UPDATE, DELETE, TRUNCATE and an INSERT that does not extend the chain. They stop mistakes and programs; a superuser
can take them away, and then `verify` finds what was done.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, LiteralString, NamedTuple, Self, cast

import psycopg
from psycopg import errors

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import AccessDeniedError, ConflictError, OpsError, UnreachableError
from ops_platform.ledger import schema
from ops_platform.ledger.audit import TOLERANCE, Mark, check_chain
from ops_platform.ledger.chain import (
    GENESIS,
    Entry,
    LedgerCheck,
    Row,
    canonical,
    digest,
    entry_text,
    moment,
)

_WHERE = "the ledger's database"
_BATCH = 1000

_COLUMNS: LiteralString = "seq, at, kind, actor, subject, body, prev_sha256, sha256"
_NAMES = ("seq", "at", "kind", "actor", "subject", "text", "prev_sha256", "sha256")  # of an entry, in the same order

_ROWS: LiteralString = """
select seq, to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), kind, actor, subject, body, prev_sha256, sha256
from ops_ledger.entries where seq > %(after)s and seq <= coalesce(%(upto)s::bigint, 9223372036854775807) order by seq
"""
_DIGESTS: LiteralString = "select decode(sha256, 'hex') from ops_ledger.entries where seq <= %(upto)s order by seq"
_PAGE = 5000
_STANDING: LiteralString = """
select newest.seq, newest.at, checkpoint.size, checkpoint.at, waiting.number, oldest.at
from (select count(*) as number, min(seq) as seq from ops_ledger.outbox) waiting
left join ops_ledger.entries oldest on oldest.seq = waiting.seq
left join (select seq, at from ops_ledger.entries order by seq desc limit 1) newest on true
left join (select size, at from ops_ledger.checkpoints order by number desc limit 1) checkpoint on true
"""

# NULL where an older ledger has no outbox.
_MAY_EMPTY: LiteralString = "select has_table_privilege(to_regclass('ops_ledger.outbox'), 'delete')"
_PUBLISHES: LiteralString = (
    "(select 1 from ops_ledger.publishing limit 1) union all (select 1 from ops_ledger.outbox limit 1)"
)

# One statement for a batch of any size: one round trip, and each row still meets the triggers.
_INSERT: LiteralString = (
    f"insert into ops_ledger.entries ({_COLUMNS}) select * from unnest("
    "%s::bigint[], %s::timestamptz[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[])"
)


class Draft(NamedTuple):
    """An entry that is to be written."""

    kind: str
    subject: str
    body: Mapping[str, Any]


class Standing(NamedTuple):
    """`newest`: number and time of the newest entry; `checkpoint`: entries in the newest checkpoint that was put into the store, and its
    time; `waiting`: entries of the outbox, and when the oldest of them was written. None where there is none."""

    newest: tuple[int, datetime] | None
    checkpoint: tuple[int, datetime] | None
    waiting: tuple[int, datetime] | None


class LedgerTransaction:
    """Entries and rows of one transaction. `connection` is for the tables that stand beside the ledger."""

    def __init__(self, connection: psycopg.Connection[Any], clock: Clock) -> None:
        self.connection = connection
        self._clock = clock
        self._head: tuple[int, str] | None = None

    def append(self, kind: str, subject: str, body: Mapping[str, Any], *, actor: str) -> Entry:
        """As `Ledger.append`; durable when the transaction ends."""
        return self._write([self._checked(Draft(kind, subject, body), actor)], actor)[0]

    def append_all(self, drafts: Iterable[Draft], *, actor: str) -> list[Entry]:
        """Many entries in their order, with one round trip for a thousand."""
        ahead, written = iter(drafts), list[Entry]()
        while batch := [self._checked(draft, actor) for draft in itertools.islice(ahead, _BATCH)]:
            written += self._write(batch, actor)
        return written

    def _checked(self, draft: Draft, actor: str) -> tuple[str, str, str]:
        canonical([draft.kind, draft.subject, actor])
        return draft.kind, draft.subject, canonical(dict(draft.body))

    def _write(self, batch: Sequence[tuple[str, str, str]], actor: str) -> list[Entry]:
        seq, prev = self._newest()
        entries: list[Entry] = []
        for kind, subject, text in batch:
            seq, at = seq + 1, self._clock.now()
            sha256 = digest(prev, entry_text(seq, moment(at), kind, actor, subject, text))
            entries.append(Entry(seq, at, kind, actor, subject, text, prev, sha256))
            prev = sha256
        self.connection.execute(_INSERT, [[getattr(entry, name) for entry in entries] for name in _NAMES])
        self._head = (seq, prev)
        return entries

    def _newest(self) -> tuple[int, str]:
        if self._head is None:
            schema.one_at_a_time(self.connection, schema.APPEND)
            row = self.connection.execute(
                "select seq, sha256 from ops_ledger.entries order by seq desc limit 1"
            ).fetchone()
            self._head = (row[0], row[1]) if row else (0, GENESIS)
        return self._head


class Reading:
    """What a snapshot holds. `connection` is in a transaction that only reads."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._cursors = 0

    def rows(self, *, after: int = 0, upto: int | None = None) -> Iterator[Row]:
        """The entries in their order, in constant memory."""
        return cast("Iterator[Row]", self._pages(_ROWS, {"after": after, "upto": upto}))

    def digests(self, upto: int) -> Iterator[bytes]:
        """The digests of the first so many entries as they stand there."""
        return (found for (found,) in self._pages(_DIGESTS, {"upto": upto}))

    def _pages(self, query: LiteralString, values: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        self._cursors += 1
        # Binary, which is decoded faster; and a page ahead, so that the server reads on while we compute.
        with (
            self._connection.cursor(f"ops_ledger_{self._cursors}", binary=True) as cursor,
            ThreadPoolExecutor(1) as ahead,
        ):
            cursor.execute(query, values)
            page = ahead.submit(cursor.fetchmany, _PAGE)
            while rows := page.result():
                page = ahead.submit(cursor.fetchmany, _PAGE)
                yield from rows

    def digest_of(self, seq: int) -> str | None:
        row = self._connection.execute("select sha256 from ops_ledger.entries where seq = %s", [seq]).fetchone()
        return row[0] if row else None

    def numbers(self, since: datetime, until: datetime) -> tuple[int, int] | None:
        """The first and the last entry that say that they were written in that time."""
        query = "select min(seq), max(seq) from ops_ledger.entries where at >= %s and at < %s"
        row = self._connection.execute(query, [since, until]).fetchone()
        return (row[0], row[1]) if row and row[0] is not None else None

    def noted_checkpoints(self) -> list[int]:
        """The numbers of those that were put into the store."""
        return [row[0] for row in self._connection.execute("select number from ops_ledger.checkpoints order by number")]

    def unprotected(self) -> tuple[str, ...]:
        """What no longer keeps the table append-only."""
        found = dict(
            self._connection.execute(
                "select tgname, tgenabled::text from pg_trigger where tgrelid = 'ops_ledger.entries'::regclass and not tgisinternal"
            ).fetchall()
        )
        return tuple(
            f"the trigger {name} is {'gone' if name not in found else 'not always on'}"
            for name in ("append_only", "extends_chain")
            if found.get(name) != "A"
        )


class Ledger:
    """The ledger behind a connection that `connect` opens. Safe for threads; opens lazily, and again after the server was away.

    The schema is made at the first use. Every method raises UnreachableError where the database does not answer.
    """

    claim_space = schema.LOCK_SPACE + 1
    """The first of the two keys of the advisory locks that `claim` takes; the second is the name's hashtext."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._connect = connect
        self.clock = clock
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

    def append_all(self, drafts: Iterable[Draft], *, actor: str) -> list[Entry]:
        """Write many entries in their order, all or none. Durable when it returns."""
        with self.transaction() as transaction:
            return transaction.append_all(drafts, actor=actor)

    @contextlib.contextmanager
    def transaction(self) -> Generator[LedgerTransaction]:
        """A transaction of the platform's database: what is written in it and its entries stand there together or not at all.

        From the first `append` on every other writer waits: look and decide first, then append, then end it.
        """
        with self._session() as connection, connection.transaction():
            yield LedgerTransaction(connection, self.clock)

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
            with contextlib.suppress(psycopg.Error):  # a session that is only closed holds it a moment longer
                connection.execute("select pg_advisory_unlock_all()")
            connection.close()

    def claimed(self, name: LiteralString) -> str:
        """SQL that holds where somebody has the claim of that name, which is an expression of SQL itself."""
        return (
            "exists (select from pg_locks l where l.locktype = 'advisory' and l.granted and l.objsubid = 2"
            " and l.database = (select oid from pg_database where datname = current_database())"
            f" and l.classid::bigint = {self.claim_space} and l.objid::bigint = (hashtext({name})::bigint & 4294967295))"
        )

    # What is to be published

    def publish(self, kinds: Iterable[str]) -> None:
        """From now on entries of these kinds stand in the outbox as well; one that ends in a dot stands for every kind below it.

        It holds for every writer, whoever it is, until it is called with others; with none, nothing new is to be published.
        """
        wanted = sorted(set(kinds))
        with self._session() as connection:
            there = connection.execute("select kind from ops_ledger.publishing").fetchall()
            if sorted(kind for (kind,) in there) != wanted:
                with connection.transaction():
                    schema.one_at_a_time(connection, schema.SETUP)
                    connection.execute("delete from ops_ledger.publishing")
                    connection.execute("insert into ops_ledger.publishing select unnest(%s::text[])", [wanted])

    def publish_nothing(self, *, actor: str) -> int:
        """From now on no entry stands in the outbox, and what stands there goes; an entry of the ledger says so. How many went."""
        with self.transaction() as transaction:
            connection = transaction.connection
            # A role that may write entries and no more has asked for nothing to be published.
            if connection.execute(_MAY_EMPTY).fetchone() != (True,) or not connection.execute(_PUBLISHES).fetchone():
                return 0
            schema.one_at_a_time(connection, schema.SETUP)
            # Whoever appends at this moment has read the kinds: what it puts into the outbox has to be seen here.
            schema.one_at_a_time(connection, schema.APPEND)
            connection.execute("delete from ops_ledger.publishing")
            gone = sorted(seq for (seq,) in connection.execute("delete from ops_ledger.outbox returning seq"))
            body = {"entries": len(gone), "first": gone[0] if gone else None, "last": gone[-1] if gone else None}
            transaction.append("events.not_published", "outbox", body, actor=actor)
            return len(gone)

    def outbox(self, limit: int = 1000) -> list[Entry]:
        """The oldest entries that are to be published, in their order."""
        with self._session() as connection:
            rows = connection.execute(
                f"select {_COLUMNS} from ops_ledger.outbox join ops_ledger.entries using (seq) order by seq limit %s",
                [limit],
            )
            return [Entry(*row) for row in rows]

    def published(self, seqs: Iterable[int]) -> None:
        """These have arrived, and leave the outbox. Only once that is certain: what stays there is published again."""
        with self._session() as connection:
            connection.execute("delete from ops_ledger.outbox where seq = any(%s::bigint[])", [list(seqs)])

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

    def standing(self) -> Standing:
        """How far the ledger, its checkpoints and its outbox are: a few rows are read, however long it is."""
        with self._session() as connection:
            row: tuple[Any, ...] = connection.execute(_STANDING).fetchone() or (None,) * 6
        pairs = [(row[at], row[at + 1]) if row[at] else None for at in (0, 2, 4)]
        return Standing(*pairs)

    @contextlib.contextmanager
    def reading(self) -> Generator[Reading]:
        """The ledger as it is at this moment, for as long as the context lasts: one snapshot."""
        self._make_sure()
        # A connection of its own: writers of this process need not wait for the end of a long chain.
        with self._named(), contextlib.closing(self._open()) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            with connection.transaction():
                yield Reading(connection)

    def verify(
        self,
        *,
        anchor: tuple[int, str] | None = None,
        marks: Sequence[Mark] = (),
        tolerance: timedelta = TOLERANCE,
    ) -> LedgerCheck:
        """Recompute every digest from the first entry on, in one snapshot and constant memory, and compare with the marks."""
        began = time.monotonic()
        with self.reading() as reading:
            unprotected = reading.unprotected()
            found = check_chain(reading.rows(), anchor=anchor, marks=marks, tolerance=tolerance)
        return replace(found, unprotected=unprotected, seconds=round(time.monotonic() - began, 3))

    # Beside the entries

    def note_checkpoint(self, number: int, size: int, root: str, sha256: str, at: datetime) -> None:
        """What was put into the store, so that it is missed should it go there."""
        with self._session() as connection:
            connection.execute(
                "insert into ops_ledger.checkpoints values (%s, %s, %s, %s, %s) on conflict do nothing",
                [number, size, root, sha256, at],
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
                schema.set_up(self._kept)
            yield self._kept

    def _open(self) -> psycopg.Connection[Any]:
        connection = self._connect()
        # Read committed: what the writer before us committed must be seen once we have waited for its lock.
        connection.rollback()
        connection.autocommit = True
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.execute("set timezone to 'UTC'")
        return connection

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        try:
            yield
        except psycopg.Error as error:
            raise _named(error) from None  # the cause may quote connection parameters


def _alive(connection: psycopg.Connection[Any]) -> bool:
    """Asked before each use: a server that was restarted in between costs a new connection and not the entry."""
    if connection.closed:
        return False
    try:
        connection.execute("select 1")
    except psycopg.OperationalError:
        return False
    return True


def _named(error: psycopg.Error) -> OpsError:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, errors.LockNotAvailable):
        return ConflictError(
            f"another writer held the ledger for more than {schema.LOCK_TIMEOUT}",
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
