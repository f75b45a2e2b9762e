"""The other stores: for each kind that the inventory backs up its backups and their proofs, with the promises as blocking checks.

One partition for each system of the kind, as for the targets of PostgreSQL.
"""

from collections.abc import Callable
from typing import Any, cast

import dagster as dg

from assets.owners import owners_of
from assets.postgres import (
    POOL,
    NotProvenError,
    backup_metadata,
    copy_over,
    log_steps,
    longest,
    materialize,
    promise_check,
    proof_metadata,
)
from ops_platform.clients.access import Access
from ops_platform.inventory.model import Backed, Inventory
from ops_platform.inventory.systems import KubernetesSystem, StoreTarget
from ops_platform.promises import STORE_PROMISES, Kept
from ops_platform.resources import PlatformResource

AS_IN_GIT = "as_in_git"
_TEXTS = {
    "backup_fresh": "The newest backup is younger than backup.max_age, judged from the store.",
    "proven": "A backup was restored and its data checked within verification.proven_within.",
    "rpo_met": "The newest backup was young enough when it was proven: what came after it would be lost.",
    "rto_met": "Its restore was within the objective.",
    "copied": "The newest backup is at each copy, judged from the copy alone.",
}


def kinds_of(inventory: Inventory) -> dict[str, list[StoreTarget]]:
    """The systems that are backed up, by their kind."""
    found: dict[str, list[StoreTarget]] = {}
    for target in inventory.store_targets():
        found.setdefault(target.kind, []).append(target)
    return found


def backup_key(kind: str) -> dg.AssetKey:
    return dg.AssetKey([kind, "backup"])


def verification_key(kind: str) -> dg.AssetKey:
    return dg.AssetKey([kind, "verification"])


def copy_key(kind: str) -> dg.AssetKey:
    return dg.AssetKey([kind, "copy"])


def promise_key(kind: str, promise: str) -> dg.AssetKey:
    """The asset that a promise is about."""
    return {"backup_fresh": backup_key(kind), "copied": copy_key(kind)}.get(promise, verification_key(kind))


class StoreVerificationConfig(dg.Config):
    """`pick`: newest, oldest, random, or turns, which goes through the policy's list."""

    pick: str = "newest"


def build_assets(inventory: Inventory) -> tuple[list[Any], list[dg.AssetChecksDefinition]]:
    """The assets of every kind that is backed up, and their checks."""
    assets: list[Any] = []
    checks: list[dg.AssetChecksDefinition] = []
    for kind, targets in kinds_of(inventory).items():
        made, promised = _of_kind(kind, targets)
        assets += made
        checks += promised
    return assets, checks


def _of_kind(kind: str, targets: list[StoreTarget]) -> tuple[list[Any], list[dg.AssetChecksDefinition]]:
    partitions = dg.StaticPartitionsDefinition([target.id for target in targets])
    owners = owners_of(targets)

    @dg.asset(
        key=backup_key(kind),
        description=f"Backups of {kind} over its own protocol, encrypted, in the store. It counts when it was restored.",
        owners=owners,
        kinds={kind, "s3"},
        pool=POOL,
        freshness_policy=dg.FreshnessPolicy.time_window(fail_window=longest(targets, lambda t: t.backup.max_age)),
        partitions_def=partitions,
        group_name=kind,
    )
    def backup(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult[Any]:
        def back_up(access: Access, target: Backed) -> dict[str, Any]:
            from ops_platform import proof

            actor = f"dagster run {context.run_id}"
            return backup_metadata(proof.back_up(access, target, actor=actor, progress=log_steps(context)))

        return materialize(context, platform, Inventory.backed, back_up)

    @dg.asset(
        key=verification_key(kind),
        deps=[backup_key(kind)],
        description=f"The proof: a backup of {kind} restored in a sandbox, and its data checked.",
        owners=owners,
        kinds={kind},
        pool=POOL,
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=longest(targets, lambda t: t.backup.verification.proven_within)
        ),
        partitions_def=partitions,
        group_name=kind,
    )
    def verification(
        context: dg.AssetExecutionContext, config: StoreVerificationConfig, platform: PlatformResource
    ) -> dg.MaterializeResult[Any]:
        def prove_it(access: Access, target: Backed) -> dict[str, Any]:
            from ops_platform.proof import prove
            from ops_platform.recovery.model import Verdict

            pick: Any = None if config.pick == "turns" else config.pick
            actor = f"dagster run {context.run_id}"
            proof = prove(access, target, pick=pick, actor=actor, progress=log_steps(context))
            metadata = proof_metadata(target, proof)
            if proof.scorecard.verdict is not Verdict.PASS:
                seen = dg.AssetObservation(verification_key(kind), partition=target.id, metadata=metadata)
                context.log_event(seen)
                raise NotProvenError(f"{proof.scorecard.verdict.value}: {proof.scorecard.reason}")
            return metadata

        return materialize(context, platform, Inventory.backed, prove_it)

    @dg.asset(
        key=copy_key(kind),
        deps=[backup_key(kind)],
        description=f"Backups of {kind} once more at a second site, openable with its own keys alone.",
        owners=owners,
        kinds={kind, "s3"},
        pool=POOL,
        partitions_def=partitions,
        group_name=kind,
    )
    def copy(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult[Any]:
        return materialize(
            context, platform, Inventory.backed, lambda access, target: copy_over(context, access, target)
        )

    checks = [
        promise_check(name, promise_key(kind, name), _TEXTS[name], partitions, _subjects(kind))
        for name in STORE_PROMISES
    ]
    if has_manifests(targets):
        text = "The cluster is what its manifests in Git say: nothing is missing, extra or changed."
        checks.append(
            promise_check(
                AS_IN_GIT, backup_key(kind), text, partitions, _subjects(kind), judged=_as_in_git, blocking=False
            )
        )
    return [backup, verification, copy], checks


def has_manifests(targets: list[StoreTarget]) -> bool:
    return any(getattr(target.system, "manifests", ()) for target in targets)


def _as_in_git(_name: str, access: Access, target: StoreTarget) -> Kept:
    """Drift keeps no backup from its proof: it is somebody's to look at."""
    from ops_platform.errors import OpsError
    from ops_platform.stores.drift import find_drift

    if not has_manifests([target]):
        return Kept(target.id, True, "Git says nothing of it")
    try:
        found = find_drift(access, cast("KubernetesSystem", target.system))
    except OpsError as error:
        return Kept(target.id, False, str(error), known=False)
    numbers = {"missing": len(found.missing), "extra": len(found.extra), "changed": len(found.changed)}
    return Kept(target.id, found.none, "\n".join(found.lines()), {name: float(n) for name, n in numbers.items()})


def _subjects(kind: str) -> Callable[[Any, Access], list[Backed]]:
    """The run's partitions; without any, all systems of the kind."""

    def find(context: Any, access: Access) -> list[Backed]:
        if context.has_partition_key or context.has_partition_key_range:
            return [access.inventory.backed(key) for key in context.partition_keys]
        return list(kinds_of(access.inventory).get(kind, []))

    return find
