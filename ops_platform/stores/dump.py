"""Takes a backup of a store: its parts into sealed blocks, its facts beside them, the manifest last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ops_platform.backup.basebackup import compare_with_store
from ops_platform.backup.blocks import BlockWriter
from ops_platform.backup.model import BackupKind, Progress, StoredStream, StoreManifest, no_progress
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository, new_backup_id
from ops_platform.backup.running import claim_of
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError
from ops_platform.stores.kind import Dumped, Kind, open_kind

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.clients.keys import DataKey
    from ops_platform.inventory.systems import StoreTarget


def run_backup(
    access: Access,
    target: StoreTarget,
    *,
    kind: Kind | None = None,
    progress: Progress = no_progress,
    clock: Clock = SYSTEM_CLOCK,
) -> StoreManifest:
    """Dump the store, check what the repository holds, write the manifest.

    Raises ConflictError while another backup of it runs (where the platform has a database that knows), and the OpsError that fits for
    everything else; in every case but success nothing is left that counts as a backup.
    """
    repository = open_target_repository(access, target)
    with _claimed(access, target):
        return _take(repository, target, kind or open_kind(access, target), progress, clock)


@contextmanager
def _claimed(access: Access, target: StoreTarget) -> Generator[None]:
    """One backup of a store at a time, across machines."""
    if access.inventory.platform.database is None:
        # Two at once are two whole backups: each has its own id and blocks.
        yield
        return
    from ops_platform.ledger import Ledger

    with Ledger(access.platform_db) as ledger, ledger.claim(claim_of(target)) as ours:
        if not ours:
            raise ConflictError(
                f"another backup of {target.id} is running",
                remedy="wait until it ends; the claim goes with its session",
            )
        yield


def _take(repository: Repository, target: StoreTarget, kind: Kind, progress: Progress, clock: Clock) -> StoreManifest:
    began, started_at = clock.monotonic(), clock.now()
    backup_id, key = new_backup_id(BackupKind.FULL, started_at), repository.keys.new_data_key()
    transfer, counted = target.backup.transfer, _Counted(progress)
    with BlockWriter(
        repository,
        backup_id,
        key,
        block_size=transfer.block_size,
        workers=transfer.workers,
        compression=transfer.compression,
        level=transfer.level,
        retries=transfer.retries,
        clock=clock,
    ) as writer:
        parts = _Writing(writer, counted)
        dumped = kind.dump(parts)
        etags = writer.etags
    facts = json.dumps(dict(dumped.facts), sort_keys=True, ensure_ascii=False).encode()
    manifest = _manifest(repository, target, dumped, parts.done, facts, backup_id, key)
    compare_with_store(repository, manifest, etags)
    seconds = round(clock.monotonic() - began, 3)
    # What the store acknowledged before the dump began is in it; of what came meanwhile nobody knows.
    times = {"moment": started_at, "started_at": started_at, "ended_at": clock.now(), "seconds": seconds}
    return repository.put_manifest(manifest.model_copy(update=times), key)


def _manifest(
    repository: Repository,
    target: StoreTarget,
    dumped: Dumped,
    parts: list[StoredStream],
    facts: bytes,
    backup_id: str,
    key: DataKey,
) -> StoreManifest:
    from ops_platform import __version__

    kept, now = repository.put_part(backup_id, "facts", facts, key), SYSTEM_CLOCK.now()
    return StoreManifest(
        format=1,
        store=target.kind,
        backup_id=backup_id,
        target_id=target.id,
        source=dumped.source,
        server=dumped.server,
        moment=now,
        started_at=now,
        ended_at=now,
        compression=target.backup.transfer.compression,
        block_size=target.backup.transfer.block_size,
        parts=parts,
        facts=kept,
        raw=sum(part.raw for part in parts),
        stored=sum(block.stored for part in parts for block in part.blocks) + kept.stored,
        seconds=0.0,
        key=key.wrapped,
        written_by=f"ops_platform {__version__}",
    )


class _Counted:
    """Bytes read, told as they move."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._read = 0

    def read(self, name: str, size: int) -> None:
        self._read += size
        self._progress(name, self._read, None)


class _Writing:
    """`Parts` over the block writer: a part is an archive of blocks."""

    def __init__(self, writer: BlockWriter, counted: _Counted) -> None:
        self._writer, self._counted = writer, counted
        self.done: list[StoredStream] = []
        self._open = False

    @contextmanager
    def part(self, name: str) -> Generator[Callable[[bytes | memoryview], None]]:
        if self._open or any(part.name == name for part in self.done):
            raise RuntimeError(f"part {name!r}: one at a time, and each name once")
        self._open, digest = True, hashlib.sha256()

        def write(data: bytes | memoryview) -> None:
            view = memoryview(data)
            digest.update(view)
            self._writer.write(view)
            self._counted.read(name, len(view))

        self._writer.begin(len(self.done))
        yield write
        raw, blocks = self._writer.end()
        self.done.append(StoredStream(name=name, raw=raw, sha256=digest.hexdigest(), blocks=blocks))
        self._open = False
