"""The shapes of the commands' JSON, where no domain type is the answer as it stands. docs/reference/json-output.md is made from these."""

from __future__ import annotations

from dataclasses import dataclass

from ops_platform.backup.model import BackupInfo, Manifest, Proof, RecoveryWindow


@dataclass(frozen=True)
class BackupList:
    target_id: str
    backups: list[BackupInfo]
    window: RecoveryWindow


@dataclass(frozen=True)
class BackupDetail:
    manifest: Manifest
    chain: list[str]
    proofs: list[Proof]
