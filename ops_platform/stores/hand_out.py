"""Hands a store's backup out of the repository, as plain files that the store's own programs read: recovery where no runbook leads."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ops_platform.backup.model import Progress, StoreManifest, no_progress
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository
from ops_platform.counting import no_room
from ops_platform.errors import CorruptionError, CouldNotVerifyError, OpsError, UsageError
from ops_platform.recovery.restore import occupied
from ops_platform.stores.fetch import fetch_backup

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.systems import StoreTarget

FACTS = "facts.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_ANOTHER = "name an empty directory, or one that does not exist yet"


@dataclass(frozen=True)
class HandedOut:
    """`files`: below `into`; the size of each in bytes. One more, facts.json, has what the dump noted of the store."""

    target_id: str
    backup_id: str
    kind: str
    moment: datetime
    server: str
    into: Path
    files: dict[str, int]


def hand_out(
    access: Access, target: StoreTarget, into: Path, *, backup_id: str | None = None, progress: Progress = no_progress
) -> HandedOut:
    """The backup (the newest by default) as one file for each part, readable by us alone, every byte checked.

    Raises UsageError (no such backup, a directory that is not empty), CouldNotVerifyError (no room), CorruptionError; nothing is left of
    what was written then.
    """
    if occupied(into):
        raise UsageError("it is not an empty directory", where=str(into), remedy=_ANOTHER)
    repository = open_target_repository(access, target)
    manifest = _chosen(repository, target.id, backup_id)
    made = not into.exists()
    try:
        into.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the directory cannot be made: {error.strerror}", where=str(into), remedy=_ANOTHER) from None
    whole = False
    try:
        into.chmod(0o700)  # before the first byte is in it
        files = _written(repository, manifest, into, progress)
        whole = True
    except OSError as error:
        raise CouldNotVerifyError(
            f"the backup cannot be written: {error.strerror}",
            where=str(into),
            remedy="free space, or name another disk",
        ) from None
    finally:
        if not whole:
            _remove(into, altogether=made)
    return HandedOut(target.id, manifest.backup_id, target.kind, manifest.moment, manifest.server, into, files)


def _chosen(repository: Repository, target_id: str, backup_id: str | None) -> StoreManifest:
    if backup_id is None:
        infos = [info for info in repository.infos() if info.error is None]
        if not infos:
            raise OpsError(f"there is no backup of {target_id} that can be read", remedy=f"ops backup list {target_id}")
        backup_id = infos[-1].backup_id
    else:
        repository.need_backup(backup_id)
    return repository.store_manifest(backup_id)


def _written(repository: Repository, manifest: StoreManifest, into: Path, progress: Progress) -> dict[str, int]:
    wrong = [part.name for part in manifest.parts if not _NAME.fullmatch(part.name) or part.name == FACTS]
    if wrong:
        raise CorruptionError(f"the part {wrong[0]!r} has no name for a file", where=manifest.backup_id)
    if problem := no_room(manifest.raw, shutil.disk_usage(into).free):
        raise CouldNotVerifyError(problem, where=str(into), remedy="free space, or name another disk")
    saved = fetch_backup(repository, manifest, into, progress=progress)
    for name, path in saved.parts.items():
        path.chmod(0o600)
        path.rename(into / name)
    with open(into / FACTS, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
        json.dump(saved.facts, out, indent=1, ensure_ascii=False)
    return {part.name: part.raw for part in manifest.parts}


def _remove(into: Path, *, altogether: bool) -> None:
    if altogether:
        shutil.rmtree(into, ignore_errors=True)
        return
    for path in into.iterdir():
        path.unlink()
