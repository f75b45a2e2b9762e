"""What the code location holds: one explicit list. `dagster -m ops_platform.definitions` and workspace.yaml load `defs`."""

from __future__ import annotations

import gc
import warnings

from dagster import BetaWarning, Definitions, PreviewWarning, in_process_executor

from assets import drills as drill_assets
from assets import postgres as postgres_assets
from assets import remediation as remediation_assets
from assets import stores as stores_assets
from jobs import drills as drill_jobs
from jobs import ledger as ledger_jobs
from jobs import postgres as postgres_jobs
from jobs import remediation as remediation_jobs
from jobs import stores as stores_jobs
from ops_platform.clients.access import Access
from ops_platform.drills.runbook import Runbook, shapes
from ops_platform.inventory import LoadedInventory, load
from ops_platform.inventory.drills import PlannedDrill
from ops_platform.resources import PlatformResource
from schedules import drills as drill_schedules
from schedules import ledger as ledger_schedules
from schedules import postgres as postgres_schedules
from schedules import stores as stores_schedules
from sensors import drills as drill_sensors
from sensors import postgres as postgres_sensors
from sensors import remediation as remediation_sensors
from sensors import stores as stores_sensors

# Observable assets are beta and partitioned checks preview in Dagster 1.13; the pinned version is what is tested.
warnings.filterwarnings("ignore", category=BetaWarning)
warnings.filterwarnings("ignore", category=PreviewWarning)


def build_defs(loaded: LoadedInventory | None = None) -> Definitions:
    """All of it, for an inventory. Reads platform.yaml and nothing else: no connection, no secret."""
    found = loaded or load()
    inventory = found.inventory
    assets, checks = postgres_assets.build_assets(inventory)
    store_assets, store_checks = stores_assets.build_assets(inventory)
    jobs = postgres_jobs.build_jobs() | remediation_jobs.build_jobs() | ledger_jobs.build_jobs()
    jobs |= stores_jobs.build_jobs(inventory) | drill_jobs.build_jobs(_drills(found))
    drills, drill_checks = drill_assets.build_assets(inventory)
    return Definitions(
        assets=[*assets, *store_assets, *remediation_assets.build_assets(inventory), *drills],
        asset_checks=[*checks, *store_checks, *drill_checks],
        jobs=list(jobs.values()),
        schedules=[
            *postgres_schedules.build_schedules(inventory, jobs),
            *stores_schedules.build_schedules(inventory, jobs),
            *ledger_schedules.build_schedules(inventory, jobs),
            *drill_schedules.build_schedules(inventory, jobs),
        ],
        sensors=[
            *postgres_sensors.build_sensors(inventory, jobs),
            *stores_sensors.build_sensors(inventory, jobs),
            *remediation_sensors.build_sensors(inventory, jobs),
            *drill_sensors.build_sensors(inventory, jobs),
        ],
        # Steps follow each other and share nothing but the store: a process for each would cost an import of Dagster each.
        executor=in_process_executor,
        resources={"platform": PlatformResource(inventory_path=str(found.path))},
    )


def _drills(found: LoadedInventory) -> list[tuple[PlannedDrill, Runbook]]:
    """Each declared drill with its runbook; one whose runbook cannot be read has no job, and `ops drill plan` says why."""
    declared = found.inventory.drills
    if declared is None:
        return []
    books = shapes(Access(found).path(declared.runbooks) if declared.runbooks else None)
    return [(plan, books[plan.runbook]) for plan in declared.plan if plan.runbook in books]


defs = build_defs()

# What is loaded by now stays as long as the process does, and the collector need not walk it again: otherwise it lets the ticks' garbage
# grow to a quarter of all this before it looks, and walks all of it while a tick reads ten thousand alerts.
gc.freeze()
