"""The data keys of a copy: those of the first site, wrapped once more by the key service of the second.

A copied object is the first site's object to the byte, and the wrapped key in its header opens with the first site's service
alone. Beside the objects the copy therefore keeps, for each data key, the same key as its own service wraps it.
"""

from __future__ import annotations

import hashlib
import json
import threading

from ops_platform.clients.keys import DataKey, KeyService
from ops_platform.clients.objectstore import ObjectStore
from ops_platform.errors import ConflictError, CorruptionError, NotThereError


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
                self._store.put(self._key(wrapped), body, if_absent=True, retain=True)
            except ConflictError:  # another run was quicker
                held = self._held(wrapped)
            else:
                held = plain
        if held != plain:
            raise CorruptionError("this data key is kept at the copy as another one", where=self._key(wrapped))
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

    def forget(self, wrapped: str) -> None:
        """To be called once the last object that needs it is gone. The store's Object Lock may keep it, which opens nothing any more."""
        self._store.delete(self._key(wrapped))
        with self._lock:
            self._known.pop(wrapped, None)

    def _key(self, wrapped: str) -> str:
        return f"{self._prefix}{hashlib.sha256(wrapped.encode()).hexdigest()}.json"

    def _held(self, wrapped: str) -> bytes | None:
        """None only where the copy's store said that it has no such key."""
        key = self._key(wrapped)
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
