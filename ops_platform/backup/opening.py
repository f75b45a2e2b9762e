"""Opens the repository in which the backups and the WAL of a target are kept, or a copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ops_platform.backup.copykeys import CopyKeys
from ops_platform.backup.repository import Repository
from ops_platform.errors import UsageError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed


def open_target_repository(access: Access, target: Backed) -> Repository:
    where = target.repository
    # Another engine's target may name store and keys, too: for its proofs.
    if where.engine != "native" or where.store is None or where.keys is None:
        raise UsageError(
            f"backups and WAL of {target.id} are kept by {where.engine}, not by us",
            remedy="its own tool takes and expires them; ours lists, restores and proves them",
        )
    return open_repository(access, where.store, where.keys, target)


def open_repository(access: Access, store_id: str, keys_id: str, target: Backed) -> Repository:
    """What of the target is kept in that store, under that key service."""
    store, keys = access.store(store_id), access.keys(keys_id)
    return Repository(store, CopyKeys(keys, store, target.id) if target.repository.is_copy else keys, target.id)
