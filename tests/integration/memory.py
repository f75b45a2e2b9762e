"""Folders in memory, for tests that write much and prove nothing about disks."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.rig import scratch


def in_memory(prefix: str, need: int = 2 << 30) -> Path:
    """Like `scratch`, in memory where the machine has `need` bytes free there: what is synced file by file costs nothing then."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shutil.disk_usage(shared).free < need:
        return scratch(prefix)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=shared))
    path.chmod(0o755)
    return path
