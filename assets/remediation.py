"""Remediation: the incidents as an external asset, observed by each run that worked on one."""

from typing import Any

import dagster as dg

from assets.owners import owners_of
from ops_platform.inventory.model import Inventory

INCIDENTS = dg.AssetKey(["remediation", "incidents"])


def build_assets(inventory: Inventory) -> list[Any]:
    """Nothing where the inventory declares no remediation."""
    if inventory.remediation is None:
        return []
    return [
        dg.AssetSpec(
            INCIDENTS,
            description="Alerts and events, and what was done about them. Observed: each incident as a run left it.",
            group_name="remediation",
            owners=owners_of([*inventory.targets, *inventory.systems]),
            kinds={"postgresql"},
        )
    ]
