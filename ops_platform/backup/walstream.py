"""One physical replication connection: commands, COPY messages, status reports. Never blocks while it holds the GIL.

Protocol: PostgreSQL documentation, "Streaming Replication Protocol". `psycopg.pq` waits inside libpq with the GIL held in
`get_result` and `get_copy_data(0)`, so every wait here is a `poll` on the socket.
"""

from __future__ import annotations

import re
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from psycopg import pq
from psycopg.pq import abc as pq_abc

from ops_platform.backup.model import Lsn
from ops_platform.clock import Clock
from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, UnreachableError

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_DATA = struct.Struct(">QQq")
_KEEPALIVE = struct.Struct(">QqB")
_STATUS = struct.Struct(">cQQQqB")


class WalRemovedError(OpsError):
    """The server no longer has the WAL asked for: a gap, unless another member has it."""


class SlotLostError(OpsError):
    """The slot is there and worthless: it fell behind `max_slot_wal_keep_size` (wal_status lost)."""


class SlotActiveError(ConflictError):
    """Another process streams from the slot. `pid` is the server process that serves it."""

    def __init__(self, what: str, *, pid: int, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.pid = pid


@dataclass(frozen=True)
class WalData:
    """Bytes of WAL from `start`. `server_end`: how far the server had flushed when it sent them, at its time `sent`."""

    start: int
    server_end: int
    sent: datetime
    data: memoryview


@dataclass(frozen=True)
class Keepalive:
    server_end: int
    sent: datetime
    reply: bool


@dataclass(frozen=True)
class CopyEnd:
    """The server ended the stream: at a timeline's end with the next one and where it begins, else at its shutdown."""

    timeline: int | None = None
    lsn: Lsn | None = None


_WHAT_TO_DO: list[tuple[str, type[OpsError], str | None]] = [
    (r"has already been removed", WalRemovedError, None),
    (
        r"(can no longer get changes|cannot read) from .*slot|has been invalidated|exceeded the maximum reserved",
        SlotLostError,
        None,
    ),
    (r'replication slot "[^"]+" does not exist', NotThereError, "it is made anew by itself"),
    (
        r"max_wal_senders|too many clients|remaining connection slots",
        UnreachableError,
        "raise max_wal_senders (needs a restart of the server), or end a WAL sender",
    ),
    (
        r"max_replication_slots|all replication slots are in use",
        OpsError,
        "raise max_replication_slots, or drop a slot that nobody uses",
    ),
    (r"wal_level", OpsError, "set wal_level = replica and restart the server"),
    (
        r"build does not support compression|invalid compression specification",
        OpsError,
        "set transfer.compress_at: client, or a compression that the server was built with",
    ),
    (
        r"permission denied|must be superuser or replication role|authentication",
        AccessDeniedError,
        "ALTER ROLE … REPLICATION, and a pg_hba.conf line for it",
    ),
]


def replication_error(message: str, where: str) -> OpsError:
    """What the server's refusal means. The texts are those of PostgreSQL 14 to 18; an unknown one stays a plain OpsError."""
    text = " ".join(re.sub(r"^(FATAL|ERROR):\s+", "", message.strip()).split())
    if match := re.search(r"is active for PID (\d+)", text):
        return SlotActiveError(text, pid=int(match[1]), where=where)
    for pattern, kind, remedy in _WHAT_TO_DO:
        if re.search(pattern, text):
            return kind(text, where=where, remedy=remedy)
    return OpsError(text or "the server gave no reason", where=where)


class WalStream:
    """Commands before START_REPLICATION, then messages. Not for use from two threads at once."""

    def __init__(self, conn: pq_abc.PGconn, where: str, clock: Clock, *, command_timeout: float = 60.0) -> None:
        self._conn = conn
        self._clock = clock
        self._timeout = command_timeout
        self.where = where
        self.poller = select.poll()
        self._registered = -1
        conn.nonblocking = 1
        self._register(select.POLLIN)

    def close(self) -> None:
        self._conn.finish()

    def _register(self, events: int) -> None:
        if events == self._registered:
            return
        if events:
            self.poller.register(self._conn.socket, events)
        else:  # registered without events, a dead connection would end every poll at once
            self.poller.unregister(self._conn.socket)
        self._registered = events

    def wait(self, seconds: float, *, readable: bool = True) -> None:
        """Until the socket has something (or `seconds`); also sends what is still to be sent."""
        pending = self._flush()
        self._register((select.POLLIN if readable else 0) | (select.POLLOUT if pending else 0))
        self.poller.poll(max(0, int(seconds * 1000)))

    def _flush(self) -> bool:
        try:
            return bool(self._conn.flush())
        except Exception as error:
            raise self._gone() from error

    def consume(self) -> None:
        """Read what has arrived; never waits."""
        try:
            self._conn.consume_input()
        except Exception as error:
            raise self._gone() from error

    def _gone(self) -> OpsError:
        text = self._conn.get_error_message().strip()
        error = replication_error(text, self.where)
        if type(error) is OpsError:
            return UnreachableError(" ".join(text.split()) or "the connection was lost", where=self.where)
        return error

    def command(self, sql: str) -> list[list[bytes | None]]:
        """Run a replication command; the rows of its last result set. Raises OpsError of the kind that fits."""
        self._send(sql)
        rows: list[list[bytes | None]] = []
        for result in self._results():
            self._check(result)
            if result.status == pq.ExecStatus.TUPLES_OK:
                rows = _rows(result)
        return rows

    def identify(self) -> tuple[int, int, Lsn]:
        """System identifier, timeline, and how far the WAL is flushed."""
        sysid, timeline, position = self.command("IDENTIFY_SYSTEM")[0][:3]
        return int(sysid or b""), int(timeline or b""), Lsn.parse((position or b"").decode())

    def segment_size(self) -> int:
        text = (self.command("SHOW wal_segment_size")[0][0] or b"").decode()
        match = re.fullmatch(r"(\d+)(MB|GB)", text)
        if not match:
            raise OpsError(f"wal_segment_size is {text!r}", where=self.where)
        return int(match[1]) << (20 if match[2] == "MB" else 30)

    def history(self, timeline: int) -> bytes:
        """The timeline's history file as it stands on the server."""
        return self.command(f"TIMELINE_HISTORY {timeline}")[0][1] or b""

    def create_slot(self, slot: str) -> None:
        """A physical slot that holds WAL back from the last checkpoint on, at once."""
        self.command(f'CREATE_REPLICATION_SLOT "{slot}" PHYSICAL RESERVE_WAL')

    def drop_slot(self, slot: str) -> None:
        self.command(f'DROP_REPLICATION_SLOT "{slot}"')

    def start(self, timeline: int, lsn: int, slot: str | None) -> CopyEnd | None:
        """START_REPLICATION. None: messages follow. A CopyEnd where the timeline has nothing from `lsn` on."""
        named = f'SLOT "{slot}" ' if slot else ""
        self._send(f"START_REPLICATION {named}PHYSICAL {Lsn(lsn)} TIMELINE {timeline}")
        result = self._result()
        if result is not None and result.status == pq.ExecStatus.COPY_BOTH:
            return None
        end = CopyEnd()
        while result is not None:
            self._check(result)
            end = _copy_end(result) or end
            result = self._result()
        return end

    def messages(self) -> Iterator[WalData | Keepalive | CopyEnd]:
        """The messages that have arrived; ends when there is none. A CopyEnd is the last of the stream."""
        while True:
            try:
                size, data = self._conn.get_copy_data(1)
            except Exception as error:
                raise self._gone() from error
            if size == 0:
                return
            if size < 0:
                yield self._end()
                return
            kind = data[0]
            if kind == 0x77:  # w
                start, end, sent = _DATA.unpack_from(data, 1)
                yield WalData(start, end, _EPOCH + timedelta(microseconds=sent), memoryview(data)[25:])
            elif kind == 0x6B:  # k
                end, sent, reply = _KEEPALIVE.unpack_from(data, 1)
                yield Keepalive(end, _EPOCH + timedelta(microseconds=sent), bool(reply))
            else:
                raise OpsError(f"unknown replication message {chr(kind)!r}", where=self.where)

    def status(self, received: int, durable: int) -> None:
        """Tell the server what is durable: it may forget what lies before."""
        now = int((self._clock.now() - _EPOCH) / timedelta(microseconds=1))
        try:
            self._conn.put_copy_data(_STATUS.pack(b"r", received, durable, 0, now, 0))
        except Exception as error:
            raise self._gone() from error
        self._flush()

    def finish(self) -> None:
        """Say that we are done, as far as the connection takes it without waiting."""
        try:
            self._conn.put_copy_end()
            self._conn.flush()
        except Exception:  # noqa: BLE001 - it is being closed; what was lost is sent again next time
            return

    def _end(self) -> CopyEnd:
        end = CopyEnd()
        result = self._result()
        if result is not None and result.status in (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_BOTH):
            self._conn.put_copy_end()
            result = self._result()
        while result is not None:
            self._check(result)
            end = _copy_end(result) or end
            result = self._result()
        return end

    def _send(self, sql: str) -> None:
        try:
            self._conn.send_query(sql.encode())
        except Exception as error:
            raise self._gone() from error

    def _results(self) -> Iterator[pq_abc.PGresult]:
        while (result := self._result()) is not None:
            yield result

    def _result(self) -> pq_abc.PGresult | None:
        deadline = self._clock.monotonic() + self._timeout
        while self._flush() or self._conn.is_busy():
            if self._clock.monotonic() > deadline:
                raise UnreachableError(f"no answer within {self._timeout:.0f} s", where=self.where)
            self.wait(0.5)
            self.consume()
        return self._conn.get_result()

    def _check(self, result: pq_abc.PGresult) -> None:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            message = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode("utf-8", "replace")
            detail = (result.error_field(pq.DiagnosticField.MESSAGE_DETAIL) or b"").decode("utf-8", "replace")
            text = f"{message} {detail}" if message else self._conn.get_error_message()
            error = replication_error(text, self.where)
            if type(error) is OpsError and not message:
                raise UnreachableError(error.what or "the connection was lost", where=self.where)
            raise error


def _rows(result: pq_abc.PGresult) -> list[list[bytes | None]]:
    return [[result.get_value(row, column) for column in range(result.nfields)] for row in range(result.ntuples)]


def _copy_end(result: pq_abc.PGresult) -> CopyEnd | None:
    if result.status != pq.ExecStatus.TUPLES_OK or result.ntuples != 1 or result.nfields < 2:
        return None
    timeline, lsn = _rows(result)[0][:2]
    return CopyEnd(int(timeline), Lsn.parse(lsn.decode())) if timeline and lsn else None
