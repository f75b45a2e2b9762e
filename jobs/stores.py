"""The jobs of the other stores: for each kind that is backed up one that backs up and proves, one that proves, one that judges."""

from typing import Any

import dagster as dg

from assets.stores import AS_IN_GIT, backup_key, copy_key, has_manifests, kinds_of, promise_key, verification_key
from jobs.each_target import each_target
from ops_platform.inventory.model import Inventory
from ops_platform.promises import STORE_PROMISES


def build_jobs(inventory: Inventory) -> dict[str, Any]:
    jobs: dict[str, Any] = {}
    tags = {"ops/domain": "backup"}
    for kind, targets in kinds_of(inventory).items():
        backup, proof = backup_key(kind), verification_key(kind)
        checks = [dg.AssetCheckKey(promise_key(kind, name), name) for name in STORE_PROMISES]
        if has_manifests(targets):
            checks.append(dg.AssetCheckKey(backup, AS_IN_GIT))
        made = [
            dg.define_asset_job(
                f"backup_{kind}",
                selection=dg.AssetSelection.assets(backup, proof),
                description=f"Back up {kind} and prove it: fails unless it was restored and its data checked.",
                executor_def=each_target,
                tags=tags,
            ),
            dg.define_asset_job(
                f"verify_{kind}",
                selection=dg.AssetSelection.assets(proof),
                description=f"Prove what is in the store of {kind}.",
                executor_def=each_target,
                tags=tags,
            ),
            dg.define_asset_job(
                f"replicate_{kind}",
                selection=dg.AssetSelection.assets(copy_key(kind)),
                description=f"Bring the copies of {kind} at other sites up to date.",
                executor_def=each_target,
                tags=tags,
            ),
            dg.define_asset_job(
                f"check_{kind}",
                selection=dg.AssetSelection.checks(*checks),
                description=f"Judge every promise for {kind} from the store: fresh, proven, RPO, RTO, copied.",
                tags=tags,
            ),
        ]
        jobs |= {job.name: job for job in made}
    return jobs
