"""The shapes of the commands' JSON, where no domain type is the answer as it stands. docs/reference/json-output.md is made from these."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Self

from ops_platform.backup.model import AnyManifest, BackupInfo, Proof, RecoveryWindow

if TYPE_CHECKING:
    from pathlib import Path

    from ops_platform.ledger.checkpoint import Checkpoint
    from ops_platform.ledger.pack import Cover


@dataclass(frozen=True)
class BackupList:
    target_id: str
    backups: list[BackupInfo]
    window: RecoveryWindow


@dataclass(frozen=True)
class BackupDetail:
    manifest: AnyManifest
    chain: list[str]
    proofs: list[Proof]


@dataclass(frozen=True)
class CheckpointWritten:
    """`new` false: there is nothing new since this one. All else is null for an empty ledger."""

    new: bool
    number: int | None
    size: int | None
    root: str | None
    sha256: str | None
    at: datetime | None

    @classmethod
    def of(cls, made: Checkpoint | None, new: bool) -> Self:
        if made is None:
            return cls(new, None, None, None, None, None)
        return cls(new, made.number, made.size, made.root, made.sha256, made.at)


@dataclass(frozen=True)
class PublicKey:
    """`fingerprint`: the SHA-256 of the key's SubjectPublicKeyInfo in DER."""

    keyid: str
    fingerprint: str
    pem: str

    @classmethod
    def of(cls, keyid: str, public: bytes) -> Self:
        from ops_platform.ledger.dsse import fingerprint, pem

        return cls(keyid, fingerprint(public), pem(public))


@dataclass(frozen=True)
class PackWritten:
    """`evidence` of the pack's `entries` fit; `whole`: all from `first` to `last` are in it. `covered_until`: by a checkpoint."""

    path: str
    framework: str
    control: str
    since: datetime
    until: datetime
    covered_until: datetime
    whole: bool
    entries: int
    evidence: int
    first: int
    last: int

    @classmethod
    def of(cls, path: Path, cover: Cover) -> Self:
        covered = min(cover.until, cover.end.at)
        return cls(
            str(path), cover.control.framework, cover.control.id, cover.since, cover.until, covered, cover.whole, cover.entries,
            cover.evidence, cover.first, cover.last,
        )  # fmt: skip
