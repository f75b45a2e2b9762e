"""The order in which backups are shown: by chains, so that one sees what needs what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ops_platform.backup.model import BackupInfo, BackupKind
from ops_platform.reports.words import utc


@dataclass(frozen=True)
class ListedBackup:
    info: BackupInfo
    depth: int  # incrementals on top of the full one
    under_parent: bool  # the row above is the backup that it builds on
    orphan: bool  # the backup that it builds on is not in the list


def listed(backups: Sequence[BackupInfo]) -> list[ListedBackup]:
    """Chains newest first, within a chain the full backup first and its incrementals below it."""
    by_id = {backup.backup_id: backup for backup in backups}
    lines: dict[str, list[BackupInfo]] = {}
    for backup in backups:
        lines.setdefault(_line(backup, by_id)[0].backup_id, []).append(backup)
    chains = sorted(lines.values(), key=lambda chain: max(utc(b.ended_at) for b in chain), reverse=True)
    ordered = [b for chain in chains for b in sorted(chain, key=lambda b: (utc(b.ended_at), b.backup_id))]
    return [
        ListedBackup(
            b, len(_line(b, by_id)) - 1, above is not None and above.backup_id == b.parent_id, _orphan(b, by_id)
        )
        for above, b in zip([None, *ordered], ordered, strict=False)
    ]


def _line(backup: BackupInfo, by_id: dict[str, BackupInfo]) -> list[BackupInfo]:
    """The backup and what it builds on, as far as that is listed, oldest first."""
    line = [backup]
    while line[0].parent_id in by_id and by_id[line[0].parent_id] not in line:
        line.insert(0, by_id[line[0].parent_id])
    return line


def _orphan(backup: BackupInfo, by_id: dict[str, BackupInfo]) -> bool:
    root = _line(backup, by_id)[0]
    return root.error is None and root.kind is BackupKind.INCREMENTAL
