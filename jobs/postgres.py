"""The jobs of PostgreSQL's backups. Each works on the run's partition (`--tags '{"dagster/partition": "app-db"}'`), or on all targets."""

from typing import Any

import dagster as dg

from assets.postgres import BASE_BACKUP, COPY, DATABASE, PITR_VERIFICATION, POOL, WAL_ARCHIVE, check_keys
from jobs.each_target import each_target
from ops_platform.clients.access import Access
from ops_platform.errors import OpsError
from ops_platform.inventory.model import Backed
from ops_platform.resources import PlatformResource

TARGET_TAG = "ops/target"  # dagster.yaml lets one run at a time have each value of it
MOST_REQUESTS = 100  # of one tick of a schedule or a sensor: each is a run to make and to launch within the tick's time


class ExpiryConfig(dg.Config):
    """`mode`: by the policy, observe or enforce. `approve`: the digest of exactly one plan."""

    mode: str = "policy"
    approve: str = ""


@dg.op(pool=POOL, description="Delete what no promise needs any more; observes unless the policy says enforce.")
def expire(context: dg.OpExecutionContext, config: ExpiryConfig, platform: PlatformResource) -> None:
    from ops_platform.actions.words import lines
    from ops_platform.proof import expire as run_expiry

    bad: list[str] = []
    with platform.access() as access:
        for target in _expiring(context, access):
            if target.repository.engine != "native":
                continue
            try:
                done = run_expiry(
                    access, target, mode=None if config.mode == "policy" else config.mode,  # type: ignore[arg-type]
                    approve=config.approve or None, actor=f"dagster run {context.run_id}",
                )  # fmt: skip
            except OpsError as error:
                bad.append(f"{target.id}: {error}")
                continue
            for result in done:
                for line in lines(result):
                    context.log.info(f"{target.id}: {line}")
                if not result.ok:
                    bad.append(f"{target.id}: {'; '.join(lines(result))}")
    if bad:
        raise dg.Failure("; ".join(bad))


def _expiring(context: dg.OpExecutionContext, access: Access) -> list[Backed]:
    """The run's partition, or everything that has backups."""
    if context.has_partition_key:
        return [access.inventory.backed(context.partition_key)]
    return access.inventory.all_backed()


@dg.job(description="Expire the backups of one target, or of all.", tags={"ops/domain": "backup"})
def expire_backups() -> None:
    expire()


def op_name(key: dg.AssetKey) -> str:
    """The name under which run config knows an asset's op."""
    return "__".join(key.path)


def build_jobs() -> dict[str, Any]:
    backup, proof = dg.AssetSelection.assets(BASE_BACKUP), dg.AssetSelection.assets(PITR_VERIFICATION)
    tags = {"ops/domain": "backup"}
    return {
        "nightly_backup": dg.define_asset_job(
            "nightly_backup",
            selection=backup | proof,
            description="Take a backup and prove it: fails unless it was restored and its data checked.",
            executor_def=each_target,
            tags=tags,
        ),
        "verify_recovery": dg.define_asset_job(
            "verify_recovery",
            selection=proof,
            description="Prove what is in the store: the newest, the oldest, a chain, a moment by chance, by turns.",
            executor_def=each_target,
            tags=tags,
        ),
        "replicate_backups": dg.define_asset_job(
            "replicate_backups",
            selection=dg.AssetSelection.assets(COPY),
            description="Bring the copies at other sites up to date.",
            executor_def=each_target,
            tags=tags,
        ),
        "check_promises": dg.define_asset_job(
            "check_promises",
            selection=dg.AssetSelection.checks(*check_keys()),
            description="Judge every promise from the store: fresh, continuous, proven, RPO, RTO.",
            tags=tags,
        ),
        "observe_sources": dg.define_asset_job(
            "observe_sources",
            selection=dg.AssetSelection.assets(DATABASE, WAL_ARCHIVE),
            description="Look at the databases and their WAL archives.",
            tags=tags,
        ),
        "expire_backups": expire_backups,
    }
