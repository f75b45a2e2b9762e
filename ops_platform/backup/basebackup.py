"""Takes base backups over the replication protocol, PostgreSQL 14 to 18, straight into the repository.

Which kind, of which server, under the lock; then the stream (`basestream`), the WAL that it needs, a look at the store, the manifest.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from ops_platform.backup.basestream import BackupStream, Streamed, base_backup_command, receive
from ops_platform.backup.blocks import BlockWriter
from ops_platform.backup.durable import wait_durable
from ops_platform.backup.model import AnyManifest, BackupKind, Block, Manifest, Progress, no_progress
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.receiver import receive_range
from ops_platform.backup.repository import Repository, new_backup_id
from ops_platform.backup.running import backup_lock
from ops_platform.clients.access import Access, choose_member
from ops_platform.clock import SYSTEM_CLOCK, Clock, wait_until
from ops_platform.errors import CorruptionError, OpsError, UnreachableError, UsageError

if TYPE_CHECKING:
    import psycopg

    from ops_platform.clients.keys import DataKey
    from ops_platform.clients.postgres import Member
    from ops_platform.inventory import Target

Wanted = Literal["auto", "full", "incremental"]
_FIRST_ANSWER_SECONDS = 3600.0  # the checkpoint before the first byte may take long on a busy server
_SUPPORTED = range(14, 19)
# Within so many seconds a standby has to replay what the primary has now, or the primary is read. The manifest dates the backup from
# now, and one that lags (its replay is paused, late on purpose, or too slow) would leave its lag to every restore. A backup that takes
# minutes can wait that long, and a standby that keeps up is asked once.
_MOST_BEHIND = 60.0


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
    member, no_standby = _source_member(access, target, clock)
    with backup_lock(access, target):
        source = _describe(access, target, member)
        choice = choose_kind(repository, target, source, kind, clock)
        if no_standby is not None:
            choice = replace(choice, why=f"{choice.why}; of the primary, because {no_standby}")
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
            stream.send(base_backup_command(source.major, backup_id, target, choice.kind, at_server))
            got = receive(stream, writer, source.major, indexed=at_server is None, progress=progress)
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


def _source_member(access: Access, target: Target, clock: Clock) -> tuple[Member, str | None]:
    """By the policy the first standby that is fit; otherwise the primary, and why it is no standby.

    Raises what `choose_member` raises: without the primary nobody knows how far behind a standby is, or the WAL of its backup.
    """
    members = access.members(target)
    primary = choose_member(target.id, members)
    if not target.backup.from_standby:
        return primary, None
    unfit: list[str] = []
    for standby in members:
        if standby.error is None and standby.in_recovery:
            why = _unfit(access, target, standby, primary, clock)
            if why is None:
                return standby, None
            unfit.append(f"{standby.address} {why}")
    return primary, "; ".join(unfit) or "no standby answers"


def _unfit(access: Access, target: Target, standby: Member, primary: Member, clock: Clock) -> str | None:
    """Why a backup of this standby would be one of the past. One that streams from another standby is as good."""
    from ops_platform.clients.postgres import asking

    if standby.timeline != primary.timeline:
        return f"is on timeline {standby.timeline}, the primary on {primary.timeline}"
    with asking(access.postgres(target, member=primary), primary.address) as connection:
        now = connection.execute("select pg_current_wal_flush_lsn()").fetchone()
    try:
        with asking(access.postgres(target, member=standby), standby.address) as connection:
            return _lags(connection, now, clock)
    except OpsError as error:
        return f"cannot be asked: {error.what}"


def _lags(connection: psycopg.Connection[Any], now: tuple[str] | None, clock: Clock) -> str | None:
    """`now`: the primary's position."""
    received = connection.execute("select status from pg_stat_wal_receiver").fetchone()
    if received is None:
        return "receives no WAL"
    if received[0] is None:
        return "does not show our role whether it streams: GRANT pg_monitor"
    if received[0] != "streaming":
        return f"does not stream, its WAL receiver is {received[0]}"

    def replayed() -> bool:
        return connection.execute("select pg_last_wal_replay_lsn() >= %s", now).fetchone() == (True,)

    return (
        None if wait_until(replayed, clock=clock, seconds=_MOST_BEHIND) else f"is more than {_MOST_BEHIND:.0f} s behind"
    )


_DESCRIBE = """
select pg_is_in_recovery(), current_setting('server_version_num')::int, (select system_identifier from pg_control_system()),
  current_setting('wal_segment_size'), current_setting('data_checksums') = 'on', current_setting('wal_level'),
  coalesce(current_setting('summarize_wal', true), 'off') = 'on'
"""


def _describe(access: Access, target: Target, member: Member) -> Source:
    from ops_platform.clients.postgres import asking

    where = member.address
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


# Where it is compressed


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


# Finishing


def _manifest(
    target: Target,
    repository: Repository,
    source: Source,
    choice: Choice,
    key: DataKey,
    got: Streamed,
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
