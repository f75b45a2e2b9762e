"""When the promises about drills are judged. The drills themselves are asked for by a sensor, which picks the most overdue one."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from ops_platform.inventory.model import Inventory


def build_schedules(inventory: Inventory, jobs: Mapping[str, Any]) -> list[dg.ScheduleDefinition]:
    if inventory.drills is None or "check_drills" not in jobs:
        return []
    return [
        dg.ScheduleDefinition(
            name="drills_judged",
            job=jobs["check_drills"],
            cron_schedule="20 6 * * *",
            execution_timezone=inventory.drills.timezone,
            description="Once a day: drilled within the time, RTO and RPO met.",
            default_status=dg.DefaultScheduleStatus.RUNNING,
        )
    ]
