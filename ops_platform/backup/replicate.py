"""A second site: everything of a target's repository once more in another store, under another key service.

Objects are copied byte for byte, each authenticated on its way, so that digests, seals and the manifest's code say at the copy what
they say here. As in the repository itself a backup's manifest comes last: a copy of a backup exists when all of it does.

Proofs and scorecards stay where they were made: what was restored from here proves nothing of the copy.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from ops_platform.backup.archive import read_archive
from ops_platform.backup.continuity import newest_range
from ops_platform.backup.copykeys import CopyKeys
from ops_platform.backup.model import (
    AnyManifest,
    Block,
    Manifest,
    Progress,
    StoredPart,
    StoreManifest,
    no_progress,
    segment_start,
)
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository, WalObject
from ops_platform.clients.objectstore import ObjectInfo
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, CorruptionError, NotThereError, OpsError, UsageError
from ops_platform.inventory.model import at_copy

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed

T = TypeVar("T")
_MD5 = 32


@dataclass(frozen=True)
class Replicated:
    """What one run did, and where the copy stands now.

    `backups`: those that came to exist at the copy. `wrong`: objects that were not copied because they are damaged here, or are
    another thing there; each with why. `until`, `source_until`: up to these moments of the server all WAL is there, and here.
    """

    target_id: str
    copy_id: str
    started_at: datetime
    seconds: float
    objects: int
    bytes: int
    backups: list[str]
    wrong: list[str]
    until: datetime | None
    source_until: datetime | None

    @property
    def whole(self) -> bool:
        return not self.wrong

    @property
    def behind_seconds(self) -> float | None:
        """By how much the copy is behind its source; None where either has no WAL."""
        if self.until is None or self.source_until is None:
            return None
        return max(0.0, (self.source_until - self.until).total_seconds())


@dataclass(frozen=True)
class Inspected:
    """A copy that was read to its last byte with nothing but its own store and keys. `wrong`: what is damaged or missing, and why."""

    target_id: str
    copy_id: str
    seconds: float
    objects: int
    bytes: int
    wrong: list[str]

    @property
    def whole(self) -> bool:
        return not self.wrong


def replicate(
    access: Access, target: Backed, copy_id: str, *, progress: Progress = no_progress, clock: Clock = SYSTEM_CLOCK
) -> Replicated:
    """Bring the copy up to date. Killed at any moment it leaves a copy that the next run completes.

    Raises UsageError for an unknown copy, and what the stores and key services raise. A damaged object is left out and named.
    """
    there = at_copy(target, copy_id)
    began, clock_began = clock.now(), clock.monotonic()
    work = _Copying(
        open_target_repository(access, target), open_target_repository(access, there), target.backup.transfer.workers, progress
    )  # fmt: skip
    work.run()
    return Replicated(
        target.id, copy_id, began, clock.monotonic() - clock_began, work.objects, work.bytes, work.backups, work.wrong,
        _until(work.there), _until(work.source),
    )  # fmt: skip


def inspect(
    access: Access, target: Backed, copy_id: str, *, progress: Progress = no_progress, clock: Clock = SYSTEM_CLOCK
) -> Inspected:
    """Read every object of the copy and authenticate it, as a restore on the day without the first site would.

    Raises what the copy's store and key service raise.
    """
    began = clock.monotonic()
    repository = open_target_repository(access, at_copy(target, copy_id))
    reading = _Reading(repository, target.backup.transfer.workers, progress)
    reading.run()
    return Inspected(
        target.id, copy_id, clock.monotonic() - began, reading.objects, reading.bytes, reading.wrong
    )  # fmt: skip


def standing(access: Access, target: Backed, copy_id: str) -> datetime | None:
    """Up to which moment the copy can restore; None where it holds no backup, or none of its WAL is whole."""
    return _until(open_target_repository(access, at_copy(target, copy_id)))


def _until(repository: Repository) -> datetime | None:
    """By the WAL, or where there is none by the newest backup's moment. None also where damage does not let it be told."""
    if not (finished := repository.finished()):
        return None
    try:
        newest = repository.any_manifest(finished[-1])
        if isinstance(newest, StoreManifest):
            return newest.moment
        reached = newest_range(read_archive(repository))
    except CorruptionError:
        return None
    return reached.until if reached else None


class _Work:
    """Many objects by a few threads: what each found wrong, how much it was. Memory: one object for each thread."""

    def __init__(self, workers: int, progress: Progress) -> None:
        self.wrong: list[str] = []
        self.objects = 0
        self.bytes = 0
        self._workers = workers
        self._progress = progress
        self._lock = threading.Lock()

    def _count(self, size: int, step: str) -> None:
        with self._lock:
            self.objects += 1
            self.bytes += size
        self._progress(step, self.bytes, None)

    def _mark(self, error: OpsError) -> None:
        said = f"{error.where}: {error.what}" if error.where else error.what
        with self._lock:
            if said not in self.wrong:  # a second look finds the same
                self.wrong.append(said)

    def _each(self, work: Callable[[T], None], items: Iterable[T]) -> bool:
        """In the order of `items`, a few at once. Whether all of them were right; what is unreachable is raised."""
        before = len(self.wrong)
        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(self._noted, work, item))
                    if len(waiting) > 2 * self._workers:
                        waiting.popleft().result()
                while waiting:
                    waiting.popleft().result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return len(self.wrong) == before

    def _noted(self, work: Callable[[T], None], item: T) -> None:
        try:
            work(item)
        except (CorruptionError, ConflictError) as error:
            self._mark(error)


class _Copying(_Work):
    def __init__(self, source: Repository, there: Repository, workers: int, progress: Progress) -> None:
        super().__init__(workers, progress)
        self.source = source
        self.there = there
        self.backups: list[str] = []
        if not isinstance(there.keys, CopyKeys):
            raise UsageError("this repository is no copy", where=there.store.name)
        self._keys = there.keys

    def run(self) -> None:
        # Listed first: the WAL that a backup needs is archived before the backup exists, so what follows has it.
        finished = self.source.finished()
        self._wal()
        for backup_id in self._wanted(finished):
            self._backup(backup_id)
        self._wal()  # what came while the backups were copied
        self._tidy()

    # Backups

    def _wanted(self, finished: list[str]) -> list[str]:
        """Oldest first, parents before what builds on them. What the copy has expired is not brought back."""
        there = self.there.finished()
        return [backup_id for backup_id in finished if backup_id not in there and (not there or backup_id > there[0])]

    def _backup(self, backup_id: str) -> None:
        try:
            raw = self.source.store.get(self.source.manifest_key(backup_id))
            manifest = self.source.read_manifest(backup_id, raw)
        except NotThereError:
            return  # expired meanwhile
        except CorruptionError as error:
            self._mark(error)
            return
        parent = manifest.parent_id if isinstance(manifest, Manifest) else None
        if parent is not None and self.there.store.head(self.there.manifest_key(parent)) is None:
            self.wrong.append(f"{backup_id} builds on {parent}, which is not at the copy")
            return
        self._keys.hold(manifest.key, self.source.keys.unwrap(manifest.key))
        here = {info.key: info for info in self.source.objects_of(backup_id)}
        there = {info.key: info for info in self.there.objects_of(backup_id)}
        missing = [part for part in manifest.named if not _same(here.get(part.key), there.get(part.key))]
        step = f"copying {backup_id}"
        if self._each(lambda part: self._part(part, step), missing) and self._arrived(manifest, here):
            self._keys.hold_again()
            with contextlib.suppress(ConflictError):  # another run put it; it is the same, or the next look finds it
                self.there.store.put(self.there.manifest_key(backup_id), raw, if_absent=True, retain=True)
            self._count(len(raw), step)
            self.backups.append(backup_id)

    def _part(self, part: StoredPart | Block, step: str) -> None:
        self.there.store.put(part.key, self.source.checked(part.key, part.stored, part.sha256), retain=True)
        self._count(part.stored, step)

    def _arrived(self, manifest: AnyManifest, here: dict[str, ObjectInfo]) -> bool:
        """What the copy's store lists is what was sent."""
        there = {info.key: info for info in self.there.objects_of(manifest.backup_id)}
        lost = [part.key for part in manifest.named if not _same(here.get(part.key), there.get(part.key))]
        self.wrong += [f"{key}: the copy does not hold it as it was sent" for key in lost]
        return not lost

    # WAL

    def _wal(self) -> None:
        oldest = self._oldest()

        def wanted() -> Iterator[tuple[ObjectInfo, WalObject | None]]:
            for info in _missing(self.source, self.there, self.source.wal_prefix()):
                item = self.source.wal_object(info)
                if item is None and "/gaps/" not in info.key:
                    continue  # nothing of ours
                if item is None or oldest is None or not _before(item, oldest):
                    yield info, item

        self._each(self._wal_object, wanted())
        self._keys.hold_again()

    def _oldest(self) -> Manifest | None:
        """The oldest backup of the copy; None where there is none, or it cannot be read and nobody knows what it needs."""
        there = self.there.finished()
        try:
            oldest = self.there.any_manifest(there[0]) if there else None
        except CorruptionError:
            return None
        return oldest if isinstance(oldest, Manifest) else None

    def _wal_object(self, found: tuple[ObjectInfo, WalObject | None]) -> None:
        info, item = found
        try:
            stored = self.source.store.get(info.key)
        except NotThereError:
            return  # expired, or a `.partial` that has become whole
        if item is not None:
            opened = self.source.opened_wal(info.key, stored)
            self._keys.hold(opened.header.key, self.source.keys.unwrap(opened.header.key))
        once = item is not None and not item.partial
        try:
            self.there.store.put(info.key, stored, if_absent=once, retain=once)
        except ConflictError as error:
            if self.there.store.get(info.key) != stored:
                raise ConflictError("the copy holds another thing under this name", where=info.key) from error
        self._count(len(stored), "copying WAL")

    def _tidy(self) -> None:
        """A `.partial` whose segment is whole at the copy says nothing any more; it is listed right behind it."""
        whole = ""
        for info in self.there.store.list(self.there.wal_prefix()):
            item = self.there.wal_object(info)
            if item is not None and not item.partial:
                whole = info.key
            elif item is not None and info.key == f"{whole}.partial":
                self.there.store.delete(info.key)


class _Reading(_Work):
    def __init__(self, repository: Repository, workers: int, progress: Progress) -> None:
        super().__init__(workers, progress)
        self._repository = repository

    def run(self) -> None:
        self._each(self._wal, self._repository.wal_listing())
        for backup_id in self._repository.finished():
            try:
                manifest = self._repository.any_manifest(backup_id)
            except CorruptionError as error:
                self._mark(error)
                continue
            self._each(self._part, manifest.named)

    def _part(self, part: StoredPart | Block) -> None:
        self._repository.authenticated(part.key, part.stored, part.sha256)
        self._count(part.stored, "reading the copy")

    def _wal(self, item: WalObject) -> None:
        try:
            stored = self._repository.store.get(item.info.key)
        except NotThereError:
            return
        self._repository.opened_wal(item.info.key, stored)
        self._count(len(stored), "reading the copy")


def _missing(source: Repository, there: Repository, prefix: str) -> Iterator[ObjectInfo]:
    """What stands here and not there, or there as another thing, in the order of keys. Neither listing is held in memory."""
    others = iter(there.store.list(prefix))
    other = next(others, None)
    for info in source.store.list(prefix):
        while other is not None and other.key < info.key:
            other = next(others, None)
        if other is None or other.key != info.key or not _same(info, other):
            yield info


def _same(here: ObjectInfo | None, there: ObjectInfo | None) -> bool:
    """By size, and by MD5 where both stores show it: one that encrypts on its own shows something else."""
    if here is None or there is None or here.size != there.size:
        return False
    md5s = len(here.etag) == len(there.etag) == _MD5 and "-" not in here.etag + there.etag
    return not md5s or here.etag == there.etag


def _before(item: WalObject, oldest: Manifest) -> bool:
    """WAL from before the oldest backup of the copy: nothing there can use it."""
    if item.system_identifier != oldest.system_identifier or item.history or item.timeline > oldest.timeline:
        return False
    if item.timeline < oldest.timeline:
        return True
    begins = segment_start(item.name, oldest.wal_segment_size)[1]
    return begins + oldest.wal_segment_size <= oldest.start
