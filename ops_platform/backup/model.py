"""The nouns of backup: positions in the WAL, manifests, the recovery window. Plain data.

The format is written down in docs/reference/repository-format.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Lsn(int):
    """A byte position in the WAL, written `16/B374D848`."""

    @classmethod
    def parse(cls, text: str) -> Lsn:
        match = re.fullmatch(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})", text)
        if not match:
            raise ValueError(f"{text!r} is not a WAL position; they look like 16/B374D848")
        return cls((int(match[1], 16) << 32) | int(match[2], 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn({self})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """In JSON it is the text that PostgreSQL writes."""
        as_text = core_schema.str_schema(pattern=r"^[0-9A-F]{1,8}/[0-9A-F]{1,8}$")
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls.parse(value),
            json_schema_input_schema=as_text,
            serialization=core_schema.plain_serializer_function_ser_schema(str, return_schema=as_text),
        )


def segment_name(timeline: int, lsn: int, segment_size: int) -> str:
    """The 24 hex digits of the WAL file that holds the byte at `lsn`."""
    per_id = (1 << 32) // segment_size
    number = lsn // segment_size
    return f"{timeline:08X}{number // per_id:08X}{number % per_id:08X}"


def segment_start(name: str, segment_size: int) -> tuple[int, Lsn]:
    """Timeline and first position of a WAL file's name."""
    per_id = (1 << 32) // segment_size
    return int(name[:8], 16), Lsn((int(name[8:16], 16) * per_id + int(name[16:24], 16)) * segment_size)


class BackupKind(StrEnum):
    FULL = "full"
    INCREMENTAL = "incremental"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Block(Frozen):
    """One stored object of an archive's bytes. `sha256` is of the stored bytes."""

    key: str
    raw: int
    stored: int
    sha256: str


class Archive(Frozen):
    """One tar stream of BASE_BACKUP: the data directory (`oid` None) or a tablespace."""

    oid: int | None
    location: str | None
    raw: int
    blocks: list[Block]


class StoredPart(Frozen):
    """Another sealed object that belongs to a backup: the file index, PostgreSQL's backup_manifest, backup_label's WAL range."""

    key: str
    stored: int
    sha256: str


class Manifest(Frozen):
    """What makes a backup exist: written last, authenticated, complete in itself. Times are UTC; sizes bytes.

    `mac` is HMAC-SHA256 over the canonical JSON of everything else, under a key derived from the data key.
    """

    format: Literal[1]
    backup_id: str
    target_id: str
    kind: BackupKind
    parent_id: str | None
    why: str
    system_identifier: int
    server_version: int
    timeline: int
    start_lsn: str
    end_lsn: str
    started_at: datetime
    ended_at: datetime
    source: str
    source_role: Literal["primary", "standby"]
    wal_segment_size: int
    data_checksums: bool
    compression: Literal["zstd", "lz4", "none"]
    compress_at: Literal["client", "server"]
    block_size: int
    archives: list[Archive]
    index: StoredPart | None
    pg_manifest: StoredPart
    raw: int
    stored: int
    seconds: float
    key: str
    written_by: str
    mac: str = ""

    @property
    def named(self) -> list[Block | StoredPart]:
        """Every stored object that it names."""
        blocks = [block for archive in self.archives for block in archive.blocks]
        return [*blocks, *(part for part in (self.index, self.pg_manifest) if part)]

    @property
    def start(self) -> Lsn:
        return Lsn.parse(self.start_lsn)

    @property
    def end(self) -> Lsn:
        return Lsn.parse(self.end_lsn)

    @property
    def major(self) -> int:
        return self.server_version // 10000


class StoredStream(Frozen):
    """A named part of a store's backup: a snapshot, a shard, a topic. `sha256` is of all its raw bytes."""

    name: str
    raw: int
    sha256: str
    blocks: list[Block]


class StoreManifest(Frozen):
    """The manifest of a backup of any store but PostgreSQL, with the same meaning, place and code as `Manifest`.

    `store`: the kind of system; `moment`: what was acknowledged before it is in the backup; `server`: product and version; `facts`:
    what was seen at the source meanwhile, sealed, because it may name what is in the store.
    """

    format: Literal[1]
    store: str
    backup_id: str
    target_id: str
    source: str
    server: str
    moment: datetime
    started_at: datetime
    ended_at: datetime
    compression: Literal["zstd", "lz4", "none"]
    block_size: int
    parts: list[StoredStream]
    facts: StoredPart
    raw: int
    stored: int
    seconds: float
    key: str
    written_by: str
    mac: str = ""

    @property
    def named(self) -> list[Block | StoredPart]:
        """Every stored object that it names."""
        return [*(block for part in self.parts for block in part.blocks), self.facts]


AnyManifest = Manifest | StoreManifest


class Proof(Frozen):
    """That a backup was restored and its data checked; stands beside the backup in the store."""

    target_id: str
    backup_id: str
    verdict: Literal["PASS", "FAIL", "COULD_NOT_VERIFY"]
    verified_at: datetime
    recovery_target: str
    proven_until: datetime | None
    rpo_seconds: float | None
    rto_seconds: float | None
    scorecard: str  # key of the whole scorecard in the store


@dataclass(frozen=True)
class BackupInfo:
    """A backup as any engine lists it."""

    backup_id: str
    target_id: str
    engine: str
    kind: BackupKind
    parent_id: str | None
    started_at: datetime
    ended_at: datetime
    timeline: int
    start: Lsn
    end: Lsn
    server_version: int
    system_identifier: int
    raw: int
    stored: int
    proof: Proof | None = None
    store: str = "postgresql"  # the kind of system; of others than PostgreSQL `server` says what was read, and the positions are 0
    server: str = ""
    error: str | None = None  # set where the store holds something that cannot be read as a backup


@dataclass(frozen=True)
class WalRange:
    """Stored WAL of one timeline without a hole, from the start of `first` to `end`; `until` is the newest server time seen in it."""

    timeline: int
    first: str
    last: str
    end: Lsn
    until: datetime | None


@dataclass(frozen=True)
class WalGap:
    """A hole: the segments `first` to `last` (both missing), and the first backup from which recovery is possible again."""

    timeline: int
    first: str
    last: str
    recovery_again_from: str | None


@dataclass(frozen=True)
class RecoveryWindow:
    """The moments that can be restored: from the end of the oldest usable backup to the newest stored WAL. UTC.

    `pieces` are what remains where gaps cut it; `earliest` and `latest` None: nothing can be restored.
    """

    earliest: datetime | None
    latest: datetime | None
    pieces: list[tuple[datetime, datetime]]
    gaps: list[WalGap]

    def holds(self, moment: datetime) -> bool:
        return any(begin <= moment <= end for begin, end in self.pieces)


class Progress(Protocol):
    """Told of bytes as they move; `total` None when unknown."""

    def __call__(self, step: str, done: int, total: int | None) -> None: ...


def no_progress(step: str, done: int, total: int | None) -> None:
    """For callers that show none."""


@dataclass(frozen=True)
class RecoveryTarget:
    """Where recovery stops. `kind` latest has no value; time is aware; inclusive as PostgreSQL's recovery_target_inclusive."""

    kind: Literal["latest", "time", "lsn", "name", "xid", "immediate"]
    value: str | datetime | None = None
    inclusive: bool = True
    timeline: int | Literal["latest", "current"] = "latest"

    def settings(self) -> dict[str, str]:
        """The recovery_target… settings for postgresql.conf."""
        from datetime import UTC

        found = {
            "recovery_target_timeline": str(self.timeline),
            "recovery_target_inclusive": "on" if self.inclusive else "off",
        }
        if self.kind == "immediate":
            return found | {"recovery_target": "immediate"}
        if self.kind == "latest":
            return found
        if self.kind == "time":
            if not isinstance(self.value, datetime) or self.value.tzinfo is None:
                raise TypeError("a recovery target of kind time has a datetime with a zone")
            return found | {"recovery_target_time": self.value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00")}
        if not isinstance(self.value, str) or not self.value:
            raise TypeError(f"a recovery target of kind {self.kind} has a text")
        return found | {f"recovery_target_{self.kind}": self.value}

    def __str__(self) -> str:
        value = self.value.isoformat() if isinstance(self.value, datetime) else self.value
        return self.kind if value is None else f"{self.kind} {value}"


@dataclass(frozen=True)
class RestoredBase:
    """A base backup on disk, ready for recovery settings: its directory, tablespaces (oid to path), bytes, seconds."""

    directory: Path
    tablespaces: dict[int, Path]
    raw: int
    seconds: float


class BackupEngine(Protocol):
    """A repository of one target, whoever wrote it. Native and pgBackRest both stand behind it."""

    @property
    def name(self) -> str: ...

    def list(self) -> list[BackupInfo]:
        """Oldest first. Raises where the store cannot be asked: an unreachable store is not an empty one."""
        ...

    def window(self) -> RecoveryWindow: ...

    def choose(self, target: RecoveryTarget) -> BackupInfo:
        """The newest backup from which `target` can be reached. Raises UsageError with the window where there is none."""
        ...

    def carried_until(self, backup: BackupInfo, target: RecoveryTarget) -> datetime | None:
        """The last moment (UTC) to which the WAL at hand carries this backup on the target's timeline. None: it restores nothing."""
        ...

    def last_segment(self, backup: BackupInfo, target: RecoveryTarget) -> Lsn | None:
        """Where the last stored WAL segment on that way begins. None where no moment or position can lie behind the last record: for
        another kind of target, and where the window ends with a commit."""
        ...

    def fetch_base(
        self,
        backup: BackupInfo,
        into: Path,
        *,
        tablespaces: dict[str, Path] | None = None,
        progress: Progress = no_progress,
    ) -> RestoredBase:
        """Restore the files (an incremental with its chain combined) into an empty directory. `tablespaces`: old location to new."""
        ...

    def wal_fetcher(self, backup: BackupInfo, spool: Path) -> WalFetcher:
        """A context manager that serves WAL to a recovering server."""
        ...

    def expire(self) -> Callable[..., object] | None:
        """None where the engine is read-only."""
        ...


class WalFetcher(Protocol):
    """Fetches WAL ahead of a recovering server for as long as it is entered."""

    def __enter__(self) -> WalFetcher: ...

    def __exit__(self, *_: object) -> None: ...

    @property
    def restore_command(self) -> str:
        """For postgresql.conf. Exit 0: there; 1: the store said that it has none; 126 and above: could not ask, recovery must stop."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """Why the recovery was told to stop: CorruptionError where the archive is to blame. None where it never was."""
        ...

    @property
    def fetched_bytes(self) -> int: ...

    @property
    def fetched_segments(self) -> int: ...
