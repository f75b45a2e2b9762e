"""What the rest needs of an object store. `clients.s3` is the real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """An object as the store lists it. `etag` is without quotes; for a single put it is the MD5 in hex on most stores."""

    key: str
    size: int
    modified: datetime
    etag: str


@dataclass(frozen=True)
class Retention:
    mode: str
    until: datetime


class DeleteOutcome(StrEnum):
    DELETED = "deleted"
    MISSING = "missing"
    PINNED = "pinned"  # Object Lock or a legal hold keeps it


class ObjectStore(Protocol):
    """Keys are relative to the store's prefix. Safe for use from several threads.

    Every method raises UnreachableError (no answer, after retries), AccessDeniedError (403, with clock skew named where
    that is the cause), NotThereError (404: of the bucket or of the key, told apart in its text), or OpsError.
    """

    @property
    def name(self) -> str:
        """For messages: `s3://bucket/prefix at host:port`."""
        ...

    def put(
        self, key: str, body: bytes | bytearray | memoryview, *, if_absent: bool = False, retain: bool = False
    ) -> ObjectInfo:
        """Store and confirm. `if_absent` raises ConflictError where the key exists. `retain` applies the store's Object Lock."""
        ...

    def get(self, key: str, *, start: int | None = None, length: int | None = None) -> bytes: ...

    def head(self, key: str) -> ObjectInfo | None:
        """None only when the store said that it is not there."""
        ...

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """All keys below `prefix` in byte order, page after page."""
        ...

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        """The next path elements below `prefix` (which ends with a slash or is empty), without slashes."""
        ...

    def delete(self, key: str) -> DeleteOutcome: ...

    def retention(self, key: str) -> Retention | None: ...

    def incomplete_uploads(self, prefix: str = "") -> Iterator[tuple[str, str, datetime]]:
        """Multipart uploads that nobody finished: key, upload id, when begun."""
        ...

    def abort_upload(self, key: str, upload_id: str) -> None: ...

    def check(self) -> dict[str, object]:
        """For `ops doctor`: bucket reachable, writable (a probe object put, read, deleted), versioning, Object Lock, clock skew in s."""
        ...

    def close(self) -> None: ...
