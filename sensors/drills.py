"""What is noticed of drills: that one is due, and that one died."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from jobs.drills import BEGIN, TARGET_TAG, job_name
from ops_platform.inventory.model import Inventory
from ops_platform.resources import PlatformResource

LOOK_BACK = timedelta(hours=6)  # a moment that the daemon missed is caught up within this time


def build_sensors(inventory: Inventory, jobs: Mapping[str, Any]) -> list[dg.SensorDefinition]:
    declared = inventory.drills
    if declared is None or not declared.plan:
        return []
    running = dg.DefaultSensorStatus.RUNNING
    drills = [jobs[job_name(plan.id)] for plan in declared.plan if job_name(plan.id) in jobs]
    if not drills:
        return []

    @dg.sensor(
        jobs=drills,
        minimum_interval_seconds=300,
        default_status=running,
        description="When drills.schedule says so, the most overdue drill is held: classification × age × change since.",
    )
    def most_overdue_drill(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        from ops_platform.drilling import open_store, standing
        from ops_platform.drills.overdue import most_overdue
        from ops_platform.timing import fires

        now = datetime.now(UTC)
        since = datetime.fromisoformat(context.cursor) if context.cursor else now
        with platform.access() as access:
            whole = access.inventory.drills
            if whole is None or whole.schedule is None:
                return dg.SensorResult(skip_reason="drills.schedule is not given", cursor=now.isoformat())
            due = list(fires(whole.schedule, whole.timezone, max(since, now - LOOK_BACK), now))
            if not due:
                return dg.SensorResult(skip_reason="not due", cursor=now.isoformat())
            with open_store(access) as store:
                first = most_overdue(standing(access, store))
        if first is None:
            return dg.SensorResult(skip_reason="nothing is overdue", cursor=now.isoformat())
        config = {"ops": {BEGIN: {"config": {"target": first.target, "trigger": "drills.schedule"}}}}
        request = dg.RunRequest(
            run_key=f"{first.plan}/{first.target}/{due[-1].isoformat()}", job_name=job_name(first.plan),
            run_config=config, tags={TARGET_TAG: first.target},
        )  # fmt: skip
        return dg.SensorResult(run_requests=[request], cursor=now.isoformat())

    @dg.sensor(
        job=jobs["sweep_drills"],
        minimum_interval_seconds=120,
        default_status=running,
        description="A drill whose worker died is ended, and what it left is taken away.",
    )
    def dead_drills(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        from ops_platform.drilling import open_store

        with platform.access() as access, open_store(access) as store:
            found = [*(d for d in store.dead() if not d.real), *store.with_remains()]
        if not found:
            return dg.SensorResult(skip_reason="none")
        key = f"{found[0].id}/{found[0].version}/{datetime.now(UTC):%Y%m%dT%H}"
        return dg.SensorResult(run_requests=[dg.RunRequest(run_key=key)])

    return [most_overdue_drill, dead_drills]
