"""The data keys of a copy: those of the first site, wrapped once more by the key service of the second.

A copied object is the first site's object to the byte, and the wrapped key in its header opens with the first site's service
alone. Beside the objects the copy therefore keeps, for each data key, the same key as its own service wraps it.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

from ops_platform.backup.repository import Repository, is_backup_id
from ops_platform.backup.sealed import HEADER_PREFIX, read_header
from ops_platform.clients.keys import DataKey, KeyService
from ops_platform.clients.objectstore import ObjectInfo, ObjectStore
from ops_platform.errors import ConflictError, CorruptionError, NotThereError

_KEY_NAME = re.compile(r"[0-9a-f]{64}\.json")
_WORKERS = 8


class CopyKeys:
    """A `KeyService` over a copy. What was sealed at the copy itself (proofs, scorecards) has keys of its service as ever."""

    def __init__(self, inner: KeyService, store: ObjectStore, target_id: str) -> None:
        self._inner = inner
        self._store = store
        self._prefix = f"{target_id}/keys/"
        self._known: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._inner.name

    def new_data_key(self) -> DataKey:
        return self._inner.new_data_key()

    def wrap(self, plain: bytes) -> str:
        return self._inner.wrap(plain)

    def check(self) -> dict[str, object]:
        return self._inner.check()

    def hold(self, wrapped: str, plain: bytes) -> None:
        """Keep the data key that the first site knows as `wrapped`. To be called before the first object that needs it is put.

        Raises CorruptionError where another key stands in its place.
        """
        with self._lock:
            if wrapped in self._known:
                return
        if (held := self._held(wrapped)) is None:
            body = json.dumps({"v": 1, "wrapped": wrapped, "here": self._inner.wrap(plain)}, sort_keys=True).encode()
            try:
                self._store.put(self.place(wrapped), body, if_absent=True, retain=True)
            except ConflictError:  # another run was quicker
                held = self._held(wrapped)
            else:
                held = plain
        if held != plain:
            raise CorruptionError("this data key is kept at the copy as another one", where=self.place(wrapped))
        with self._lock:
            self._known[wrapped] = plain

    def unwrap(self, wrapped: str) -> bytes:
        with self._lock:
            if wrapped in self._known:
                return self._known[wrapped]
        if (plain := self._held(wrapped)) is None:
            return self._inner.unwrap(wrapped)
        with self._lock:
            self._known[wrapped] = plain
        return plain

    def hold_again(self) -> None:
        """To be called once the objects are put: an expiry that could not see them yet may have taken their keys away meanwhile."""
        there = {info.key for info in self.stored()}
        with self._lock:
            lost = {wrapped: plain for wrapped, plain in self._known.items() if self.place(wrapped) not in there}
            self._known = {wrapped: plain for wrapped, plain in self._known.items() if wrapped not in lost}
        for wrapped, plain in lost.items():
            self.hold(wrapped, plain)

    def stored(self) -> Iterator[ObjectInfo]:
        """The keys that are kept, as the store lists them."""
        return (info for info in self._store.list(self._prefix) if _KEY_NAME.fullmatch(info.key[len(self._prefix) :]))

    def place(self, wrapped: str) -> str:
        return f"{self._prefix}{hashlib.sha256(wrapped.encode()).hexdigest()}.json"

    def _held(self, wrapped: str) -> bytes | None:
        """None only where the copy's store said that it has no such key."""
        key = self.place(wrapped)
        try:
            raw = self._store.get(key)
        except NotThereError:
            return None
        try:
            match json.loads(raw):
                case {"v": 1, "wrapped": str(there), "here": str(here)} if there == wrapped:
                    pass
                case _:
                    raise ValueError("it is not what stands there for this key")
        except ValueError as error:
            raise CorruptionError(f"this data key cannot be read: {error}", where=key) from error
        try:
            return self._inner.unwrap(here)
        except CorruptionError as error:
            raise CorruptionError(f"this data key does not open: {error.what}", where=key) from error


class Needed:
    """Which of a copy's data keys are needed: those with which anything was sealed that stands there."""

    def __init__(self, repository: Repository, keys: CopyKeys) -> None:
        self._repository = repository
        self._keys = keys
        self._read: dict[tuple[str, str], str] = {}  # by key and etag: a header that was read need not be read again

    def stored(self) -> Iterator[ObjectInfo]:
        """The keys that are kept, needed or not."""
        return self._keys.stored()

    def places(self, without: Collection[str] = ()) -> set[str]:
        """Where they stand, were it not for these backups (by id) and WAL files (by key).

        Raises CorruptionError where that cannot be read of anything: nobody knows then which key is needed.
        """
        found = [*self._unfinished(), *self._wal(without)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            headers = {wrapped for wrapped in pool.map(self._wrapped, found) if wrapped is not None}
        return {self._keys.place(wrapped) for wrapped in headers.union(self._manifests(without))}

    def _manifests(self, without: Collection[str]) -> Iterator[str]:
        for backup_id in self._repository.finished():
            if backup_id not in without:
                yield self._repository.any_manifest(backup_id).key

    def _unfinished(self) -> Iterator[ObjectInfo]:
        """One object of each backup without a manifest: all of them were sealed with the same key."""
        for backup_id in filter(is_backup_id, self._repository.unfinished()):
            if (first := next(self._repository.objects_of(backup_id), None)) is not None:
                yield first

    def _wal(self, without: Collection[str]) -> Iterator[ObjectInfo]:
        for item in self._repository.wal_listing():
            if item.info.key not in without:
                yield item.info

    def _wrapped(self, info: ObjectInfo) -> str | None:
        """None where it is gone by now."""
        known = info.key, info.etag
        if known not in self._read:
            try:
                head = self._repository.store.get(info.key, start=0, length=HEADER_PREFIX)
            except NotThereError:
                return None
            self._read[known] = read_header(head, place=info.key).key
        return self._read[known]
