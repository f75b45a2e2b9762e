"""When backups are taken, proven and expired: each target by its own cron, zone and place in the spread.

One schedule asks every five minutes what is due, instead of one schedule for each of a thousand targets.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import dagster as dg
from dagster._core.storage.tags import RUN_KEY_TAG

from jobs.postgres import MOST_REQUESTS, TARGET_TAG
from ops_platform.inventory.model import Backed, Inventory, Schedule, Target
from ops_platform.timing import due

B = TypeVar("B", bound=Backed)
EVERY = timedelta(minutes=5)
_CRON = "*/5 * * * *"
# A night that the daemon missed is caught up after an outage of some hours; a missed week is not seven backups at once.
LOOK_BACK = timedelta(hours=6)


def build_schedules(inventory: Inventory, jobs: Mapping[str, Any]) -> list[dg.ScheduleDefinition]:
    running = dg.DefaultScheduleStatus.RUNNING

    def backups(target: Target) -> Schedule | None:
        return target.backup.schedule if target.repository.engine == "native" else None

    def proofs(target: Target) -> Schedule | None:
        return target.backup.verification.schedule

    def copies(target: Target) -> Schedule | None:
        return target.repository.copy_schedule if target.repository.copies else None

    return [
        by_target(
            "copies", jobs["replicate_backups"], inventory.targets, copies, "Copies, by repository.copy_schedule."
        ),
        by_target(
            "nightly_backups", jobs["nightly_backup"], inventory.targets, backups, "Backups, by backup.schedule."
        ),
        by_target(
            "verifications", jobs["verify_recovery"], inventory.targets, proofs, "Proofs, by verification.schedule."
        ),
        dg.ScheduleDefinition(
            name="promises",
            job=jobs["check_promises"],
            cron_schedule="7 * * * *",
            execution_timezone="UTC",
            description="Every promise is judged from the store once an hour.",
            default_status=running,
        ),
        dg.ScheduleDefinition(
            name="observations",
            job=jobs["observe_sources"],
            cron_schedule="*/15 * * * *",
            execution_timezone="UTC",
            description="Databases and WAL archives are looked at every quarter of an hour.",
            default_status=running,
        ),
        dg.ScheduleDefinition(
            name="expiry",
            job=jobs["expire_backups"],
            cron_schedule="40 11 * * *",
            execution_timezone="UTC",
            description="Expiry by day, when somebody is there to see it.",
        ),
    ]


def by_target(
    name: str, job: Any, targets: Sequence[B], of: Callable[[B], Schedule | None], text: str
) -> dg.ScheduleDefinition:
    """One schedule over all of them, which asks for a run of each that is due."""

    @dg.schedule(
        name=name,
        job=job,
        cron_schedule=_CRON,
        execution_timezone="UTC",
        description=text,
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.SkipReason | list[dg.RunRequest]:
        until = context.scheduled_execution_time
        schedules = [(target.id, found) for target in targets if (found := of(target)) is not None]
        # Of each target the newest moment alone: after an outage one copy makes good all the quarters of an hour that were missed.
        newest = {item.target_id: item for item in due(schedules, until - LOOK_BACK, until)}
        asked = [request(name, item.target_id, item.key) for item in newest.values()]
        launched = _launched(context.instance, [str(wanted.run_key) for wanted in asked])
        requests = [wanted for wanted in asked if wanted.run_key not in launched]
        if len(requests) > MOST_REQUESTS:
            # The rest stays due until it has a run. By lot, or those that are due again by then would always be before it.
            random.Random(until.isoformat()).shuffle(requests)  # noqa: S311 - no secret
        return requests[:MOST_REQUESTS] or dg.SkipReason(f"nothing is due at {until:%Y-%m-%d %H:%M} UTC")

    return schedule


def request(name: str, target_id: str, key: str) -> dg.RunRequest:
    """The key names the due moment, whichever tick asks for it."""
    return dg.RunRequest(run_key=f"{name}/{key}", partition_key=target_id, tags={TARGET_TAG: target_id})


def _launched(instance: dg.DagsterInstance, keys: Sequence[str]) -> set[str]:
    """The keys that have a run already. Dagster itself looks a schedule's keys up among the runs of the same tick alone."""
    if not keys:
        return set()
    # A run that was made and not launched is the rest of an interrupted tick, which Dagster resumes: it is asked for again.
    begun = [status for status in dg.DagsterRunStatus if status is not dg.DagsterRunStatus.NOT_STARTED]
    runs = instance.get_runs(dg.RunsFilter(tags={RUN_KEY_TAG: list(keys)}, statuses=begun))
    return {run.tags[RUN_KEY_TAG] for run in runs}
