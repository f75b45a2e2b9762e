"""When the ledger is signed."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from ops_platform.inventory.model import Inventory


def build_schedules(inventory: Inventory, jobs: Mapping[str, Any]) -> list[dg.ScheduleDefinition]:
    declared = inventory.platform.ledger
    if declared is None:
        return []
    return [
        dg.ScheduleDefinition(
            name="ledger_checkpoints",
            job=jobs["ledger_checkpoint"],
            cron_schedule=declared.schedule.cron,
            execution_timezone=declared.schedule.timezone,
            description="The ledger's new entries are signed, by platform.ledger.schedule.",
            default_status=dg.DefaultScheduleStatus.RUNNING,
        )
    ]
