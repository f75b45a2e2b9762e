"""A process that takes a backup or restores one, stops before each step, says which, and waits to be told to go on.

For tests that kill it at a chosen moment: `python -m tests.integration.killed_child backup`, or `restore BACKUP INTO SPACE`.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import NativeEngine
from ops_platform.backup.repository import Repository
from ops_platform.clients.access import Access
from ops_platform.inventory import load
from tests.integration.wal_rig import FaultyStore

_one_at_a_time = threading.Lock()


def step(text: str) -> None:
    """Say what comes next, and wait until the parent lets it happen."""
    with _one_at_a_time:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        sys.stdin.readline()


def child(what: str, *arguments: str) -> None:
    access = Access(load(Path(os.environ["OPS_INVENTORY"])))
    store = FaultyStore(access.store("s"))
    access._open["store", "s"] = store
    target = access.inventory.targets[0]
    if what == "backup":
        store.fault = lambda verb, key: step(f"put {key}") if verb == "put" else None
        run_backup(access, target, kind="full")
        return
    backup_id, into, space = arguments
    engine = NativeEngine(Repository(store, access.keys("k"), target.id), target)  # type: ignore[arg-type]
    _stop_before("ops_platform.backup.fetch", "sync_file_system")
    _stop_before("ops_platform.backup.engine", "combine", after=True)
    (info,) = (info for info in engine.list() if info.backup_id == backup_id)
    store.fault = lambda verb, key: step(f"get {key}") if verb == "get" and "/data/" in key else None
    location = next(a.location or "" for a in engine.repository.manifest(backup_id).archives if a.oid)
    engine.fetch_base(info, Path(into), tablespaces={location: Path(space)})


def _stop_before(module: str, name: str, *, after: bool = False) -> None:
    place = importlib.import_module(module)
    real = getattr(place, name)

    def stopping(*arguments: Any, **more: Any) -> Any:
        result = real(*arguments, **more) if after else None
        step(name)
        return result if after else real(*arguments, **more)

    setattr(place, name, stopping)


if __name__ == "__main__":
    child(*sys.argv[1:])
