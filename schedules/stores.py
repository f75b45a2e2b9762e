"""When the other stores are backed up, proven and judged: each by its own policy, as the targets of PostgreSQL are."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from assets.stores import kinds_of
from ops_platform.inventory.model import Inventory
from schedules.postgres import by_target


def build_schedules(inventory: Inventory, jobs: Mapping[str, Any]) -> list[dg.ScheduleDefinition]:
    made: list[dg.ScheduleDefinition] = []
    for kind, targets in kinds_of(inventory).items():
        made += [
            by_target(
                f"backups_{kind}", jobs[f"backup_{kind}"], targets, lambda t: t.backup.schedule,
                f"Backups of {kind}, by backup.schedule.",
            ),
            by_target(
                f"verifications_{kind}", jobs[f"verify_{kind}"], targets, lambda t: t.backup.verification.schedule,
                f"Proofs of {kind}, by verification.schedule.",
            ),
            by_target(
                f"copies_{kind}", jobs[f"replicate_{kind}"], targets,
                lambda t: t.repository.copy_schedule if t.repository.copies else None,
                f"Copies of {kind}, by repository.copy_schedule.",
            ),
            dg.ScheduleDefinition(
                name=f"promises_{kind}",
                job=jobs[f"check_{kind}"],
                cron_schedule="7 * * * *",
                execution_timezone="UTC",
                description=f"Every promise for {kind} is judged from the store once an hour.",
                default_status=dg.DefaultScheduleStatus.RUNNING,
            ),
        ]  # fmt: skip
    return made
