"""One operation of ours in a process of its own, as an operator would run it: `python -m benchmarks.child JSON`.

The inventory comes by OPS_INVENTORY. The last line that is printed is JSON: seconds inside of the process, its peak of memory.
`receive` and `restore` with `wait` first say `ready` and go on when a line arrives: a receiver is long-lived, and what an
interpreter takes to start is no part of archiving.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main() -> None:
    task = json.loads(sys.argv[1])
    tasks = {
        "backup": _backup,
        "dump": _dump,
        "fetch": _fetch,
        "receive": _receive,
        "restore": _restore,
        "verify": _verify,
        "nothing": _nothing,
        "replicate": _replicate,
        "ticks": _ticks,
    }
    done = tasks[task["do"]](task)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")), 0.0)
    print(json.dumps({**done, "peak_mb": peak}), flush=True)


def _access() -> Any:
    import os

    from ops_platform.clients.access import Access
    from ops_platform.inventory import load

    return Access(load(Path(os.environ["OPS_INVENTORY"])))


def _nothing(task: dict[str, Any]) -> dict[str, Any]:
    """Imports what the others do, so that the first of them finds it compiled."""
    import ops_platform.backup.basebackup
    import ops_platform.backup.receiver
    import ops_platform.clients.access
    import ops_platform.clients.s3
    import ops_platform.recovery.restore
    import ops_platform.recovery.verify
    import ops_platform.stores.dump  # noqa: F401

    return {}


def _backup(task: dict[str, Any]) -> dict[str, Any]:
    from ops_platform.backup.basebackup import run_backup

    access = _access()
    manifest = run_backup(access, access.inventory.targets[0], kind=task.get("kind", "full"))
    shown = manifest.model_dump(include={"backup_id", "raw", "stored", "seconds", "why"})
    return {**shown, "kind": manifest.kind.value}


def _dump(task: dict[str, Any]) -> dict[str, Any]:
    """A backup of a store that is not PostgreSQL."""
    from ops_platform.inventory.systems import StoreTarget
    from ops_platform.stores.dump import run_backup

    access = _access()
    target = access.inventory.backed(task["target"])
    assert isinstance(target, StoreTarget)
    manifest = run_backup(access, target)
    return manifest.model_dump(include={"backup_id", "raw", "stored", "seconds"})


def _replicate(task: dict[str, Any]) -> dict[str, Any]:
    """To the second site."""
    from ops_platform.backup.replicate import replicate

    access = _access()
    done = replicate(access, access.inventory.backed(task["target"]), task["copy"])
    return {"seconds": done.seconds, "bytes": done.bytes, "objects": done.objects, "whole": done.whole}


def _fetch(task: dict[str, Any]) -> dict[str, Any]:
    """The base backup to disk, synced: what `pgbackrest restore` does."""
    from ops_platform.backup.engine import NativeEngine
    from ops_platform.backup.opening import open_target_repository

    access = _access()
    target = access.inventory.targets[0]
    engine = NativeEngine(open_target_repository(access, target), target)
    info = next(backup for backup in engine.list() if backup.backup_id == task["backup"])
    restored = engine.fetch_base(info, Path(task["into"]))
    return {"seconds": restored.seconds, "raw": restored.raw}


def _restore(task: dict[str, Any]) -> dict[str, Any]:
    from datetime import datetime

    from ops_platform.backup.model import RecoveryTarget
    from ops_platform.recovery.restore import restore

    access = _access()
    target = RecoveryTarget("time", datetime.fromisoformat(task["to"]))
    restored = restore(access, access.inventory.targets[0], target, Path(task["into"]))
    return {
        "fetch": restored.fetch_seconds,
        "replay": restored.replay_seconds,
        "wal": restored.wal_bytes,
        "newest": str(restored.newest_commit),
    }


def _verify(task: dict[str, Any]) -> dict[str, Any]:
    from ops_platform.recovery.verify import verify

    access = _access()
    card = verify(access, access.inventory.targets[0], pick="newest")
    return {
        "verdict": card.verdict.value,
        "reason": card.reason,
        "gates": {gate.id: gate.seconds for gate in card.gates},
        "steps": {step.name: step.seconds for step in card.steps},
    }


def _ticks(task: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the sensors of remediation in turn, `count` times; MiB of resident memory after each tenth of them."""
    import gc
    import os

    import dagster as dg

    from ops_platform.definitions import defs
    from ops_platform.errors import OpsError
    from ops_platform.resources import PlatformResource

    remediation = ("alerts", "events", "incidents")
    sensors = [one for one in defs.sensors or () if one.name in remediation]
    if len(sensors) != len(remediation):
        raise RuntimeError(f"the code location has of them only {[one.name for one in sensors]}")
    cursors: dict[str, str | None] = {}
    levels: list[float] = []
    failed = 0
    # One for all: Dagster makes one for each context that brings none, and keeps it as long as the process lives.
    instance = dg.DagsterInstance.ephemeral()
    for number in range(1, task["count"] + 1):
        sensor = sensors[number % len(sensors)]
        with dg.build_sensor_context(
            instance=instance, cursor=cursors.get(sensor.name), resources={"platform": PlatformResource()}
        ) as context:
            try:
                found: Any = sensor(context)
                cursors[sensor.name] = found.cursor
            except (OpsError, dg.Failure):
                failed += 1
        if number % max(task["count"] // 10, 1) == 0:
            gc.collect()
            levels.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20))
    if failed > task["count"] // 10:
        raise RuntimeError(f"{failed} of {task['count']} ticks failed")
    return {"levels": levels, "failed": failed}


def _receive(task: dict[str, Any]) -> dict[str, Any]:
    """`ready`; then for each line `LSN` the moment at which everything before it was durable; an empty line ends it."""
    from ops_platform.backup.model import Lsn
    from ops_platform.backup.receiver import Receiver

    access = _access()
    access.keys(access.inventory.targets[0].repository.keys)
    receiver = Receiver(access, access.inventory.targets)
    print("ready", flush=True)
    started = False
    for line in sys.stdin:
        word = line.strip()
        if not word:
            break
        if not started:
            receiver.start()
            started = True
        if word != "start":
            while receiver.states[0].durable < Lsn.parse(word):
                threading.Event().wait(0.005)
        else:
            while receiver.states[0].phase != "streaming":
                threading.Event().wait(0.005)
        print(json.dumps({"at": time.time(), "durable": receiver.states[0].durable}), flush=True)
    receiver.stop()
    receiver.join(60)
    return {}


if __name__ == "__main__":
    main()
