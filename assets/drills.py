"""Drills: what they have proven as an external asset, with its checks: drilled within the time, RTO and RPO met."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.owners import owners_of
from ops_platform.inventory.model import Inventory
from ops_platform.resources import PlatformResource

DRILLS = dg.AssetKey(["platform", "drills"])


def build_assets(inventory: Inventory) -> tuple[list[Any], list[Any]]:
    """Nothing where the inventory declares no drill. Observed by each run that held one."""
    if inventory.drills is None or not inventory.drills.plan:
        return [], []
    spec = dg.AssetSpec(
        DRILLS,
        description="Recovery, tried out: every declared drill on each of its targets.",
        group_name="recovery",
        owners=owners_of([*inventory.targets, *inventory.systems]),
        kinds={"postgresql"},
    )
    return [spec], [drill_checks]


NEWEST = "by the newest drill of each declared one. What was never drilled keeps no promise."
NAMES = {
    "drilled_within": "Every declared drill was held and passed within its time, ",
    "rto_met": "The database served again within its objective, ",
    "rpo_met": "No more than the objective allows was lost, ",
}


@dg.multi_asset_check(
    specs=[dg.AssetCheckSpec(name, asset=DRILLS, description=text + NEWEST) for name, text in NAMES.items()]
)
def drill_checks(platform: PlatformResource) -> Iterator[dg.AssetCheckResult]:
    from ops_platform.drilling import open_store, promises

    with platform.access() as access, open_store(access) as store:
        found = promises(access, store)
    for name in NAMES:
        broken = {f"{one.plan} on {one.target}": one.text for one in found if one.name == name and not one.kept}
        count = sum(one.name == name for one in found)
        yield dg.AssetCheckResult(
            asset_key=DRILLS, check_name=name, passed=not broken, metadata={"drills": count, **broken}
        )
