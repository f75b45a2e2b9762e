"""Replays the WAL of a restored base backup up to the recovery target: what a restore and a proof have in common."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from ops_platform.backup.model import Lsn, RecoveryTarget
from ops_platform.errors import OpsError
from ops_platform.inventory import Target
from ops_platform.recovery.sandbox import Sandbox

TIMEOUT = 24 * 3600.0  # seconds; larger than any objective, so that a server that hangs is noticed at all


def replay(
    sandbox: Sandbox,
    recovery: RecoveryTarget,
    target: Target,
    *,
    last_segment: Lsn | None,
    progress: Callable[[Lsn], None],
) -> tuple[Lsn, datetime | None]:
    """Start the prepared sandbox and wait for the pause at the target; for `latest` until it has promoted itself.

    The position, and the time of the last commit replayed (UTC). `last_segment`: as the engine says it, asked for before.
    Raises OpsError where recovery did not come there, with the reason of the server's log.
    """
    try:
        return _arrive(sandbox, recovery, target, progress)
    except OpsError:
        if last_segment is None or not sandbox.recover_to_end(last_segment):
            raise
    return _arrive(sandbox, recovery, target, progress)


def _arrive(
    sandbox: Sandbox, recovery: RecoveryTarget, target: Target, progress: Callable[[Lsn], None]
) -> tuple[Lsn, datetime | None]:
    sandbox.start()
    sandbox.find_superuser({target.connection.user or "postgres": target.connection.dbname, "postgres": "postgres"})
    wait = sandbox.wait_ended if recovery.kind == "latest" else sandbox.wait_paused
    return wait(timeout=TIMEOUT, progress=progress)
