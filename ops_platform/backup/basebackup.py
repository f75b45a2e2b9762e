"""Takes base backups over the replication protocol, PostgreSQL 14 to 18, straight into the repository.

Protocol: PostgreSQL documentation, "Streaming Replication Protocol", BASE_BACKUP. 15 and later send one COPY stream whose
messages begin with n (new archive), m (manifest), d (data), p (progress); 14 sends one COPY stream per archive and one for
the manifest.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from psycopg import pq
from psycopg.pq import abc

from ops_platform.backup.archive import open_target_repository, wait_durable
from ops_platform.backup.blocks import BlockWriter
from ops_platform.backup.model import (
    AnyManifest,
    Archive,
    BackupKind,
    Block,
    Lsn,
    Manifest,
    Progress,
    no_progress,
)
from ops_platform.backup.receiver import receive_range
from ops_platform.backup.repository import Repository, new_backup_id
from ops_platform.backup.tarindex import Entry, TarIndexer
from ops_platform.backup.walstream import WalStream
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, CorruptionError, OpsError, UnreachableError, UsageError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.clients.keys import DataKey
    from ops_platform.clients.postgres import Member
    from ops_platform.inventory import Target

Wanted = Literal["auto", "full", "incremental"]
_FIRST_ANSWER_SECONDS = 3600.0  # the checkpoint before the first byte may take long on a busy server
_SUPPORTED = range(14, 19)


@dataclass(frozen=True)
class Choice:
    """What kind of backup is taken, on top of which one, and why."""

    kind: BackupKind
    parent: Manifest | None
    why: str


@dataclass(frozen=True)
class Source:
    """The server that is read, as it answered before the backup began."""

    where: str
    role: Literal["primary", "standby"]
    system_identifier: int
    server_version: int
    segment_size: int
    checksums: bool
    summarizes: bool

    @property
    def major(self) -> int:
        return self.server_version // 10000


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
class _Streamed:
    """What a BASE_BACKUP sent."""

    start: Lsn = field(default=Lsn(0))
    timeline: int = 0
    end: Lsn = field(default=Lsn(0))
    archives: list[Archive] = field(default_factory=list[Archive])
    entries: list[Entry] = field(default_factory=list[Entry])
    pg_manifest: bytearray = field(default_factory=bytearray)


def run_backup(
    access: Access,
    target: Target,
    *,
    kind: Wanted = "auto",
    progress: Progress = no_progress,
    clock: Clock = SYSTEM_CLOCK,
) -> Manifest:
    """Take a backup, wait until the WAL that it needs is archived, check what the store holds, write the manifest.

    Raises ConflictError while another backup of the target runs, and the OpsError that fits for everything else; in every
    case but success nothing is left that counts as a backup.
    """
    repository = open_target_repository(access, target)
    member = _source_member(access, target)
    with _lock(access, target, member):
        source = _describe(access, target, member)
        choice = choose_kind(repository, target, source, kind, clock)
        return _take(access, target, repository, member, source, choice, progress, clock)


def _take(  # the one place where all parts of a backup meet
    access: Access,
    target: Target,
    repository: Repository,
    member: Member,
    source: Source,
    choice: Choice,
    progress: Progress,
    clock: Clock,
) -> Manifest:
    began, started_at = clock.monotonic(), clock.now()
    backup_id = new_backup_id(choice.kind, started_at)
    transfer, key = target.backup.transfer, repository.keys.new_data_key()
    at_server = _server_compression(target, source)
    stored = _Counter()
    stream = BackupStream(
        access.replication(target, member), source.where, clock, command_timeout=_FIRST_ANSWER_SECONDS
    )
    try:
        if choice.parent is not None:
            stream.upload_manifest(repository.pg_manifest(choice.parent))
        with BlockWriter(
            repository,
            backup_id,
            key,
            block_size=transfer.block_size,
            workers=transfer.workers,
            compression="none" if at_server else transfer.compression,
            level=transfer.level,
            retries=transfer.retries,
            clock=clock,
            stored=stored.add,
        ) as writer:
            stream.send(_command(source.major, backup_id, target, choice, at_server))
            got = _receive(stream, writer, source, indexed=at_server is None, progress=progress)
            etags = writer.etags
    finally:
        stream.close()
    manifest = _manifest(target, repository, source, choice, key, got, backup_id=backup_id, at_server=at_server)
    _await_wal(access, target, repository, manifest, clock, progress)
    compare_with_store(repository, manifest, etags)
    ended = {"started_at": started_at, "ended_at": clock.now(), "seconds": round(clock.monotonic() - began, 3)}
    return repository.put_manifest(manifest.model_copy(update=ended), key)


class _Counter:
    """Bytes stored, counted by several threads."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.value += size


# What kind


def choose_kind(repository: Repository, target: Target, source: Source, wanted: Wanted, clock: Clock) -> Choice:
    """By the policy, unless asked otherwise. An incremental that cannot be taken becomes a full one, and says why."""
    policy = target.backup.incremental
    if wanted == "full":
        return Choice(BackupKind.FULL, None, "asked for")
    if wanted == "auto" and not policy.enabled:
        return Choice(BackupKind.FULL, None, "the policy takes full backups only")
    reason = _no_incremental(source)
    backups = [] if reason else [m for m in repository.backups() if m.system_identifier == source.system_identifier]
    if reason is None and not backups:
        reason = "there is no earlier backup of this cluster"
    if reason is not None:
        return Choice(BackupKind.FULL, None, f"full, because {reason}")
    parent = backups[-1]
    chain = repository.chain(parent.backup_id)
    if wanted == "auto":
        if clock.now() - chain[0].started_at >= policy.full_every - timedelta(minutes=30):
            return Choice(
                BackupKind.FULL,
                None,
                f"full, because the last one is {(clock.now() - chain[0].started_at).days} days old",
            )
        if len(chain) > policy.max_chain:
            return Choice(BackupKind.FULL, None, f"full, because the chain has {len(chain) - 1} incrementals")
    return Choice(BackupKind.INCREMENTAL, parent, f"on top of {parent.backup_id}")


def _no_incremental(source: Source) -> str | None:
    if source.major < 17:
        return f"PostgreSQL {source.major} has no incremental backups (17 has)"
    return None if source.summarizes else "summarize_wal is off on the server"


# The source


def _source_member(access: Access, target: Target) -> Member:
    """By the policy a standby, where one answers; otherwise the primary."""
    if target.backup.from_standby:
        members = [m for m in access.members(target) if m.error is None and m.in_recovery]
        if members:
            return members[0]
    return access.member(target, "primary")


_DESCRIBE = """
select pg_is_in_recovery(), current_setting('server_version_num')::int, (select system_identifier from pg_control_system()),
  current_setting('wal_segment_size'), current_setting('data_checksums') = 'on', current_setting('wal_level'),
  coalesce(current_setting('summarize_wal', true), 'off') = 'on'
"""


def _describe(access: Access, target: Target, member: Member) -> Source:
    from ops_platform.clients.postgres import asking

    where = f"{member.host}:{member.port}"
    with asking(access.postgres(target, member=member), where) as connection:
        row = connection.execute(_DESCRIBE).fetchone()
    if row is None:
        raise UnreachableError("the server gave no answer", where=where)
    recovery, version, sysid, segment, checksums, wal_level, summarizes = row
    if version // 10000 not in _SUPPORTED:
        raise UsageError(
            f"PostgreSQL {version // 10000} is not supported", where=where, remedy="14 to 18 are; upgrade the server"
        )
    if wal_level == "minimal":
        raise UsageError("wal_level is minimal", where=where, remedy="set wal_level = replica and restart the server")
    number, unit = re.fullmatch(r"(\d+)(\w+)", segment).groups()  # type: ignore[union-attr]
    size = int(number) << {"MB": 20, "GB": 30, "kB": 10}[unit]
    return Source(where, "standby" if recovery else "primary", sysid, version, size, checksums, summarizes)


_LOCK_SPACE = 0x6F7073  # "ops": advisory locks of ours


@contextmanager
def _lock(access: Access, target: Target, source: Member) -> Generator[None]:
    """One backup of a target at a time, across machines, held by a session: the server drops it with the connection."""
    from ops_platform.clients.postgres import asking, connect

    primaries = [m for m in access.members(target) if m.error is None and m.in_recovery is False]
    at = primaries[0] if primaries else source
    where = f"{at.host}:{at.port}"
    with asking(connect(access.login(target.connection), at.host, at.port), where) as connection:
        connection.execute(
            "select set_config('application_name', %s, false)", [f"ops_platform backup of {target.id}"[:63]]
        )
        row = connection.execute("select pg_try_advisory_lock(%s, hashtext(%s))", [_LOCK_SPACE, target.id]).fetchone()
        if row is None or not row[0]:
            raise ConflictError(
                f"another backup of {target.id} is running: {_holder(connection, target)}",
                where=where,
                remedy="wait until it ends; the lock goes with its session",
            )
        yield


def _holder(connection: object, target: Target) -> str:
    row = connection.execute(  # type: ignore[attr-defined]
        "select a.pid, a.client_addr, a.backend_start from pg_locks l join pg_stat_activity a using (pid)"
        " where l.locktype = 'advisory' and l.classid = %s and l.objid = (hashtext(%s)::bigint & 4294967295)::oid",
        [_LOCK_SPACE, target.id],
    ).fetchone()
    return (
        f"pid {row[0]} from {row[1] or 'a local socket'} since {row[2]:%Y-%m-%d %H:%M:%SZ}"
        if row
        else "its session ended just now"
    )


# The command and its stream


def _server_compression(target: Target, source: Source) -> str | None:
    """The server's COMPRESSION option, or None where our side compresses."""
    transfer = target.backup.transfer
    if transfer.compress_at == "client" or transfer.compression == "none":
        return None
    if source.major < 15:
        raise UsageError(
            "compression at the server needs PostgreSQL 15 or later",
            where=target.id,
            remedy="set transfer.compress_at: client",
        )
    return transfer.compression


def _command(major: int, label: str, target: Target, choice: Choice, at_server: str | None) -> str:
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
    options += ["INCREMENTAL"] if choice.kind is BackupKind.INCREMENTAL else []
    return f"BASE_BACKUP ({', '.join(options)})"


def _receive(
    stream: BackupStream, writer: BlockWriter, source: Source, *, indexed: bool, progress: Progress
) -> _Streamed:
    got = _Streamed()
    start = stream.rows()[0]
    got.start, got.timeline = Lsn.parse(_text(start[0])), int(_text(start[1]))
    spaces = stream.rows()
    total = sum(int(_text(row[2])) for row in spaces if row[2]) * 1024 or None
    told = _Teller(progress, total)
    if source.major >= 15:
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

    def __init__(self, writer: BlockWriter, got: _Streamed, indexed: bool) -> None:
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


def _receive_one_stream(
    stream: BackupStream, writer: BlockWriter, got: _Streamed, indexed: bool, told: _Teller
) -> None:
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
    stream: BackupStream, writer: BlockWriter, got: _Streamed, spaces: list[list[bytes | None]], told: _Teller
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


# Finishing


def _manifest(
    target: Target,
    repository: Repository,
    source: Source,
    choice: Choice,
    key: DataKey,
    got: _Streamed,
    *,
    backup_id: str,
    at_server: str | None,
) -> Manifest:
    transfer = target.backup.transfer
    index = None
    if at_server is None:
        lines = "".join(
            json.dumps(asdict(entry), ensure_ascii=True, separators=(",", ":")) + "\n" for entry in got.entries
        )
        index = repository.put_part(backup_id, "index", lines.encode(), key)
    pg_manifest = repository.put_part(backup_id, "pg_manifest", bytes(got.pg_manifest), key)
    from ops_platform import __version__

    now = SYSTEM_CLOCK.now()
    blocks: list[Block] = [block for archive in got.archives for block in archive.blocks]
    parts = pg_manifest.stored + (index.stored if index else 0)
    return Manifest(
        format=1,
        backup_id=backup_id,
        target_id=target.id,
        kind=choice.kind,
        parent_id=choice.parent.backup_id if choice.parent else None,
        why=choice.why,
        system_identifier=source.system_identifier,
        server_version=source.server_version,
        timeline=got.timeline,
        start_lsn=str(got.start),
        end_lsn=str(got.end),
        started_at=now,
        ended_at=now,
        source=source.where,
        source_role=source.role,
        wal_segment_size=source.segment_size,
        data_checksums=source.checksums,
        compression=transfer.compression,
        compress_at="server" if at_server else "client",
        block_size=transfer.block_size,
        archives=got.archives,
        index=index,
        pg_manifest=pg_manifest,
        raw=sum(archive.raw for archive in got.archives),
        stored=sum(block.stored for block in blocks) + parts,
        seconds=0.0,
        key=key.wrapped,
        written_by=f"ops_platform {__version__}",
    )


def _await_wal(
    access: Access, target: Target, repository: Repository, manifest: Manifest, clock: Clock, progress: Progress
) -> None:
    """A backup can be restored once the WAL from its start to its end is archived: by the receiver, or fetched here."""
    from ops_platform.backup.archive import slot_state

    progress("waiting for its WAL", 0, None)
    slot = slot_state(access, target)
    if slot is None or slot.active_pid is None:
        receive_range(access, target, manifest.start, manifest.end, manifest.timeline, clock=clock)
    wait_durable(
        access, target, manifest.end, since=manifest.start, timeline=manifest.timeline, timeout=120, clock=clock
    )


def compare_with_store(repository: Repository, manifest: AnyManifest, etags: Mapping[str, str]) -> None:
    """Every object of the backup is listed by the store with the size that was sent and the etag that was confirmed.

    The MD5 of each was compared when it was put (the store refuses a body whose MD5 differs, and answers with its own); an etag that
    is another one now means that somebody wrote there since. Raises CorruptionError naming those that differ.
    """
    listed = {info.key: info for info in repository.objects_of(manifest.backup_id)}
    expected = {item.key: item.stored for item in manifest.named}
    wrong = [
        f"{key} ({'missing' if info is None else f'{info.size} bytes, etag {info.etag}'}; {size} bytes were sent)"
        for key, size in expected.items()
        if (info := listed.get(key)) is None or info.size != size or info.etag != (etags.get(key) or info.etag)
    ]
    if wrong:
        raise CorruptionError(
            f"{len(wrong)} of {len(expected)} objects are not in the store as they were sent, the first: {wrong[0]}",
            where=repository.store.name,
            remedy="the backup does not count; take it again and look at the store's health",
        )
