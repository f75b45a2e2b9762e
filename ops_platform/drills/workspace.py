"""Where a drill puts its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ops_platform.inventory.drills import Drills

if TYPE_CHECKING:
    from ops_platform.clients.access import Access


def drills_of(access: Access) -> Drills:
    """The inventory's part; what it would be where there is none."""
    return access.inventory.drills or Drills()


def workspace_of(access: Access, drill_id: str) -> Path:
    return access.path(drills_of(access).workspace).absolute() / drill_id
