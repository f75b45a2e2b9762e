"""What BASE_BACKUP sends, PostgreSQL 14 to 18, into the blocks of a repository.

Protocol: PostgreSQL documentation, "Streaming Replication Protocol", BASE_BACKUP. 15 and later send one COPY stream whose
messages begin with n (new archive), m (manifest), d (data), p (progress); 14 sends one COPY stream per archive and one for
the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from psycopg import pq
from psycopg.pq import abc

from ops_platform.backup.blocks import BlockWriter
from ops_platform.backup.model import Archive, BackupKind, Lsn, Progress
from ops_platform.backup.tarindex import Entry, TarIndexer
from ops_platform.backup.walstream import WalStream
from ops_platform.errors import ConflictError, CorruptionError, OpsError, UnreachableError

if TYPE_CHECKING:
    from ops_platform.inventory import Target


class BackupStream(WalStream):
    """BASE_BACKUP's results and COPY data on top of the replication connection."""

    _after_copy: abc.PGresult | None = None

    def _result(self) -> abc.PGresult | None:
        result, self._after_copy = self._after_copy, None
        return result or super()._result()

    def _check(self, result: abc.PGresult) -> None:
        """An error of the server ends the backup. Those of class 57P (shutdown, crash) mean that the server is gone."""
        state = result.error_field(pq.DiagnosticField.SQLSTATE) or b""
        if state.startswith(b"57P"):
            text = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode("utf-8", "replace")
            raise UnreachableError(
                f"the server went away during the backup: {text}",
                where=self.where,
                remedy="nothing of it counts; take it again when the server is back",
            )
        try:
            super()._check(result)
        except OpsError as error:
            if "promoted during online backup" in error.what:
                raise ConflictError(
                    f"{error.what}: PostgreSQL does not finish a backup across a promotion",
                    where=self.where,
                    remedy="nothing of it counts; take it again",
                ) from error
            raise

    def rows(self) -> list[list[bytes | None]]:
        """The next result set."""
        result = self._result()
        if result is None:
            raise UnreachableError("the server ended the backup without a result", where=self.where)
        self._check(result)
        return [[result.get_value(row, column) for column in range(result.nfields)] for row in range(result.ntuples)]

    def begin_copy(self) -> bool:
        """Whether a COPY stream follows; False where a result set does (it is then read by `last_rows`)."""
        result = self._result()
        if result is None:
            raise UnreachableError("the server ended the backup without a result", where=self.where)
        self._check(result)
        return result.status == pq.ExecStatus.COPY_OUT

    def copy_data(self) -> Iterator[memoryview]:
        """The messages of one COPY stream. `get_copy_data(0)` would hold the interpreter while it waits, so it is polled."""
        get, wait, consume = self._conn.get_copy_data, self.wait, self.consume
        dry = False
        while True:
            try:
                size, data = get(1)
            except Exception as error:
                raise self._gone() from error
            if size > 0:
                dry = False
                yield memoryview(data)
            elif size < 0:
                # An error ends the COPY like its regular end does: it is raised here, before half an archive is looked at.
                if (result := self._result()) is not None:
                    self._check(result)
                self._after_copy = result
                return
            else:
                # Mostly there is more already, in the socket or decrypted behind it: asking poll first costs a tenth of the backup.
                if dry:
                    wait(5.0)
                consume()
                dry = True

    def drain(self) -> list[list[bytes | None]]:
        """The rows of the last result set, once everything has been read; an error that arrives at the very end is raised."""
        rows: list[list[bytes | None]] = []
        for result in self._results():
            self._check(result)
            if result.status == pq.ExecStatus.TUPLES_OK and result.ntuples:
                rows = [[result.get_value(r, c) for c in range(result.nfields)] for r in range(result.ntuples)]
        return rows

    def send(self, command: str) -> None:
        self._send(command)

    def upload_manifest(self, content: bytes) -> None:
        """UPLOAD_MANIFEST (17+): the parent's manifest, from which the server decides what to send."""
        self._send("UPLOAD_MANIFEST")
        result = self._result()
        if result is None or result.status != pq.ExecStatus.COPY_IN:
            if result is not None:
                self._check(result)
            raise OpsError("the server does not take the parent's manifest", where=self.where)
        for begin in range(0, len(content), 1 << 16):
            while self._conn.put_copy_data(content[begin : begin + (1 << 16)]) == 0:  # its buffer is full
                self.wait(5.0, readable=False)
        self._conn.put_copy_end()
        self.drain()


@dataclass
class Streamed:
    """What a BASE_BACKUP sent."""

    start: Lsn = field(default=Lsn(0))
    timeline: int = 0
    end: Lsn = field(default=Lsn(0))
    archives: list[Archive] = field(default_factory=list[Archive])
    entries: list[Entry] = field(default_factory=list[Entry])
    pg_manifest: bytearray = field(default_factory=bytearray)


# The command and its stream


def base_backup_command(major: int, label: str, target: Target, kind: BackupKind, at_server: str | None) -> str:
    rate = target.backup.transfer.rate_limit
    kilobytes = max(32, min(1 << 20, rate // 1024)) if rate else None
    if major < 15:
        limit = f" MAX_RATE {kilobytes}" if kilobytes else ""
        return f"BASE_BACKUP LABEL '{label}' PROGRESS FAST NOWAIT TABLESPACE_MAP{limit} MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
    options = [f"LABEL '{label}'", "PROGRESS", "CHECKPOINT 'fast'", "WAIT false", "WAL false", "TABLESPACE_MAP"]
    options += ["MANIFEST 'yes'", "MANIFEST_CHECKSUMS 'CRC32C'"]
    options += [f"MAX_RATE {kilobytes}"] if kilobytes else []
    options += (
        [f"COMPRESSION '{at_server}'", f"COMPRESSION_DETAIL 'level={target.backup.transfer.level}'"]
        if at_server
        else []
    )
    options += ["INCREMENTAL"] if kind is BackupKind.INCREMENTAL else []
    return f"BASE_BACKUP ({', '.join(options)})"


def receive(stream: BackupStream, writer: BlockWriter, major: int, *, indexed: bool, progress: Progress) -> Streamed:
    got = Streamed()
    start = stream.rows()[0]
    got.start, got.timeline = Lsn.parse(_text(start[0])), int(_text(start[1]))
    spaces = stream.rows()
    total = sum(int(_text(row[2])) for row in spaces if row[2]) * 1024 or None
    told = _Teller(progress, total)
    if major >= 15:
        _receive_one_stream(stream, writer, got, indexed, told)
    else:
        _receive_streams(stream, writer, got, spaces, told)
    got.end = Lsn.parse(_text(stream.drain()[0][0]))
    return got


class _Teller:
    """Tells of progress about ten times a second and not for each of a hundred thousand messages."""

    def __init__(self, progress: Progress, total: int | None) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._told = 0

    def add(self, size: int) -> None:
        self._done += size
        if self._done - self._told >= 4 << 20:
            self._told = self._done
            self._progress("backup", self._done, self._total)


class _ArchiveReader:
    """One archive at a time: bytes into blocks, headers into the index."""

    def __init__(self, writer: BlockWriter, got: Streamed, indexed: bool) -> None:
        self._writer, self._got, self._indexed = writer, got, indexed
        self._open: tuple[int | None, str | None, TarIndexer] | None = None

    def begin(self, oid: int | None, location: str | None) -> None:
        self.end()
        number = len(self._got.archives)
        self._writer.begin(number)
        self._open = (oid, location, TarIndexer(number, self._got.entries.append))

    def data(self, piece: memoryview) -> None:
        if self._open is None:
            raise CorruptionError("data came before the first archive")
        if self._indexed:
            self._open[2].feed(piece)
        self._writer.write(piece)

    def end(self) -> None:
        if self._open is None:
            return
        oid, location, indexer = self._open
        if self._indexed:
            indexer.finish()
        raw, blocks = self._writer.end()
        self._got.archives.append(Archive(oid=oid, location=location, raw=raw, blocks=blocks))
        self._open = None


def _receive_one_stream(stream: BackupStream, writer: BlockWriter, got: Streamed, indexed: bool, told: _Teller) -> None:
    """PostgreSQL 15 and later."""
    if not stream.begin_copy():
        raise UnreachableError("the server sent no archive", where=stream.where)
    archive, in_manifest = _ArchiveReader(writer, got, indexed), False
    for message in stream.copy_data():
        kind = message[0]
        if kind == 0x64:  # d
            if in_manifest:
                got.pg_manifest += message[1:]
            else:
                archive.data(message[1:])
                told.add(len(message) - 1)
        elif kind == 0x6E:  # n
            name, location = bytes(message[1:]).split(b"\0")[:2]
            oid = None if not location else int(name.split(b".")[0])
            archive.begin(oid, location.decode() or None)
        elif kind == 0x6D:  # m
            archive.end()
            in_manifest = True
        elif kind != 0x70:  # p
            raise CorruptionError(f"unknown backup message {chr(kind)!r}", where=stream.where)
    archive.end()


def _receive_streams(
    stream: BackupStream, writer: BlockWriter, got: Streamed, spaces: list[list[bytes | None]], told: _Teller
) -> None:
    """PostgreSQL 14: the tablespaces in the order of the result set, then the manifest."""
    archive = _ArchiveReader(writer, got, indexed=True)
    for row in spaces:
        if not stream.begin_copy():
            raise UnreachableError("the server sent fewer archives than it announced", where=stream.where)
        archive.begin(int(_text(row[0])) if row[0] else None, _text(row[1]) if row[1] else None)
        for piece in stream.copy_data():
            archive.data(piece)
            told.add(len(piece))
        archive.end()
    if not stream.begin_copy():
        raise UnreachableError("the server sent no manifest", where=stream.where)
    for piece in stream.copy_data():
        got.pg_manifest += piece


def _text(value: bytes | None) -> str:
    return (value or b"").decode()
