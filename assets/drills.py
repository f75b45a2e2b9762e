"""Drills: what they have proven as an external asset, with its checks: drilled within the time, RTO and RPO met."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from ops_platform.inventory.model import Inventory
from ops_platform.resources import PlatformResource

DRILLS = dg.AssetKey(["platform", "drills"])


def build_assets(inventory: Inventory) -> tuple[list[Any], list[Any]]:
    """Nothing where the inventory declares no drill."""
    if inventory.drills is None or not inventory.drills.plan:
        return [], []
    spec = dg.AssetSpec(
        DRILLS,
        description="Recovery, tried out: every declared drill on each of its targets.",
        group_name="recovery",
        kinds={"postgresql"},
    )
    return [spec], [drill_checks]


NAMES = ("drilled_within", "rto_met", "rpo_met")


@dg.multi_asset_check(
    specs=[dg.AssetCheckSpec(name, asset=DRILLS) for name in NAMES],
    description="By the newest drill of each declared one; what was never drilled keeps no promise.",
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
