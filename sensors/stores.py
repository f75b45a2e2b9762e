"""What is noticed of the other stores: one that has no backup yet, and one that could be backed up and is not."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from assets.stores import kinds_of
from jobs.postgres import MOST_REQUESTS
from ops_platform.inventory.model import Inventory
from ops_platform.inventory.systems import StoreSystem
from ops_platform.resources import PlatformResource
from sensors.postgres import Round, asked, has_no_backup


def build_sensors(inventory: Inventory, jobs: Mapping[str, Any]) -> list[dg.SensorDefinition]:
    """Nothing where no store is backed up."""
    kinds = kinds_of(inventory)
    if not kinds:
        return []
    known = {target.id for targets in kinds.values() for target in targets}

    @dg.sensor(
        jobs=[jobs[f"backup_{kind}"] for kind in kinds],
        minimum_interval_seconds=120,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="A store of the inventory that has no backup yet gets its first one, and its first proof.",
    )
    def new_stores(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        requests: list[dg.RunRequest] = []
        with platform.access() as access:
            targets = access.inventory.store_targets()
            if unknown := sorted({target.id for target in targets} - known):
                context.log.warning(f"new in platform.yaml, reload the code location: {', '.join(unknown)}")
            systems = [s for s in access.inventory.systems if isinstance(s, StoreSystem) and s.stored() is None]
            if systems:
                context.log.info(f"not backed up: {', '.join(sorted(system.id for system in systems))}")
            cursor = Round(context.cursor)
            for target in cursor.turn([target for target in targets if target.id in known]):
                if not has_no_backup(access, target):
                    continue
                job = f"backup_{target.kind}"
                if wanted := asked(context.instance, f"first/{target.id}", target, job_name=job):
                    requests.append(wanted)
                if len(requests) == MOST_REQUESTS:
                    break
        return dg.SensorResult(run_requests=requests, cursor=cursor.next)

    return [new_stores]
