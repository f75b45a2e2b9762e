"""PostgreSQL: the databases and their WAL as external assets, base backups and proofs as assets, promises as blocking checks.

One partition for each target, so that a thousand databases are a thousand partitions of one asset. A run without a partition
works on every target, one after the other, and fails at its end when any of them failed.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime, timedelta
from typing import Any, TypeVar

import dagster as dg

from assets.owners import owners_of
from ops_platform.backup.model import AnyManifest, Progress, StoreManifest
from ops_platform.clients.access import Access
from ops_platform.errors import OpsError
from ops_platform.inventory.model import Backed, Inventory, Target
from ops_platform.promises import PROMISES, Kept, judge
from ops_platform.resources import PlatformResource

DATABASE = dg.AssetKey(["postgres", "database"])
WAL_ARCHIVE = dg.AssetKey(["postgres", "wal_archive"])
BASE_BACKUP = dg.AssetKey(["postgres", "base_backup"])
PITR_VERIFICATION = dg.AssetKey(["postgres", "pitr_verification"])
B = TypeVar("B", bound=Backed)
COPY = dg.AssetKey(["postgres", "copy"])
POOL = "backup_store"  # bounds how many runs press on the store at once; its limit stands in dagster.yaml
CHECKED = {
    "backup_fresh": (BASE_BACKUP, "The newest backup is younger than backup.max_age, judged from the store."),
    "wal_continuous": (BASE_BACKUP, "No WAL is missing, and the archive is not further behind than wal.max_lag."),
    "proven": (PITR_VERIFICATION, "A backup was restored and its data checked within verification.proven_within."),
    "rpo_met": (PITR_VERIFICATION, "The loss that the newest verification measured is within the objective."),
    "rto_met": (PITR_VERIFICATION, "Its restore, and the estimate for the worst moment, are within the objective."),
    "copied": (COPY, "What each copy can restore is not older than its max_lag, judged from the copy alone."),
}


class BackupConfig(dg.Config):
    kind: str = "auto"


class VerificationConfig(dg.Config):
    """`pick`: newest, oldest, chain, random, or by turns; auto is the newest in a run that takes a backup, by turns in others.

    `at`: a moment with its zone instead.
    """

    pick: str = "auto"
    at: str = ""
    full: bool = False


def build_assets(inventory: Inventory) -> tuple[list[Any], list[dg.AssetChecksDefinition]]:
    """The assets of all targets, and their checks."""
    partitions = dg.StaticPartitionsDefinition([target.id for target in inventory.targets])
    owners = owners_of(inventory.targets)
    group = "postgres"

    @dg.observable_source_asset(
        key=DATABASE,
        description="The operated clusters. Observed: version, role, size, timeline.",
        tags={"dagster/kind/postgresql": ""},
        partitions_def=partitions,
        group_name=group,
    )
    def database(context: dg.OpExecutionContext, platform: PlatformResource) -> dg.DataVersionsByPartition:
        return _observe(context, platform, DATABASE, _see_database)

    @dg.observable_source_asset(
        key=WAL_ARCHIVE,
        description="The WAL that the receiver has put into the store. Observed: how far it reaches, gaps, lag.",
        tags={"dagster/kind/postgresql": "", "dagster/kind/s3": ""},
        partitions_def=partitions,
        group_name=group,
    )
    def wal_archive(context: dg.OpExecutionContext, platform: PlatformResource) -> dg.DataVersionsByPartition:
        return _observe(context, platform, WAL_ARCHIVE, _see_archive)

    @dg.asset(
        key=BASE_BACKUP,
        deps=[DATABASE, WAL_ARCHIVE],
        description="Base backups over the replication protocol, encrypted, in the store. It counts when it was restored.",
        owners=owners,
        kinds={"postgresql", "s3"},
        pool=POOL,
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=longest(inventory.targets, lambda t: t.backup.max_age)
        ),
        partitions_def=partitions,
        group_name=group,
    )
    def base_backup(
        context: dg.AssetExecutionContext, config: BackupConfig, platform: PlatformResource
    ) -> dg.MaterializeResult[Any]:
        def back_up(access: Access, target: Target) -> dict[str, Any]:
            from ops_platform import proof

            if target.repository.engine != "native":
                return {"backup": dg.MetadataValue.text(f"taken by {target.repository.engine}, proven by us")}
            kind: Any = config.kind
            actor = f"dagster run {context.run_id}"
            taken = proof.back_up(access, target, kind=kind, actor=actor, progress=log_steps(context))
            return backup_metadata(taken)

        return materialize(context, platform, Inventory.target, back_up)

    @dg.asset(
        key=PITR_VERIFICATION,
        deps=[BASE_BACKUP, WAL_ARCHIVE],
        description="The proof: a backup restored to a moment in a sandbox, and its data checked.",
        owners=owners,
        kinds={"postgresql", "greatexpectations"},
        pool=POOL,
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=longest(inventory.targets, lambda t: t.backup.verification.proven_within)
        ),
        partitions_def=partitions,
        group_name=group,
    )
    def pitr_verification(
        context: dg.AssetExecutionContext, config: VerificationConfig, platform: PlatformResource
    ) -> dg.MaterializeResult[Any]:
        def prove_it(access: Access, target: Target) -> dict[str, Any]:
            from ops_platform.proof import prove
            from ops_platform.recovery.model import Verdict

            at = datetime.fromisoformat(config.at) if config.at else None
            if at is not None and at.tzinfo is None:
                raise dg.Failure(f"at: {config.at!r} has no zone; write it with one, such as {config.at}+00:00")
            proof = prove(
                access, target, pick=_pick(context, config),  # type: ignore[arg-type]
                at=at, full=config.full, actor=f"dagster run {context.run_id}", progress=log_steps(context),
            )  # fmt: skip
            metadata = proof_metadata(target, proof)
            if proof.scorecard.verdict is not Verdict.PASS:
                context.log_event(dg.AssetObservation(PITR_VERIFICATION, partition=target.id, metadata=metadata))
                raise NotProvenError(f"{proof.scorecard.verdict.value}: {proof.scorecard.reason}")
            return metadata

        return materialize(context, platform, Inventory.target, prove_it)

    @dg.asset(
        key=COPY,
        deps=[BASE_BACKUP, WAL_ARCHIVE],
        description="Backups and WAL once more at a second site, openable with its own keys alone.",
        owners=owners,
        kinds={"s3"},
        pool=POOL,
        partitions_def=partitions,
        group_name=group,
    )
    def copy(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult[Any]:
        return materialize(
            context, platform, Inventory.target, lambda access, target: copy_over(context, access, target)
        )

    checks = [promise_check(name, key, text, partitions, targets_of) for name, (key, text) in CHECKED.items()]
    return [database, wal_archive, base_backup, pitr_verification, copy], checks


def copy_over(context: dg.AssetExecutionContext, access: Access, target: Backed) -> dict[str, Any]:
    """Every copy gets its turn; one that fails, or has an object that is wrong, fails the run at the end."""
    from ops_platform import proof

    bad: list[str] = []
    metadata: dict[str, Any] = {"copies": len(target.repository.copies)}
    for copy in target.repository.copies:
        try:
            done = proof.copy_over(
                access, target, copy.id, actor=f"dagster run {context.run_id}", progress=log_steps(context)
            )
        except OpsError as error:
            bad.append(f"{copy.id}: {error}")
            continue
        bad += [f"{copy.id}: {line}" for line in done.wrong]
        metadata |= {f"{copy.id}: objects": done.objects, f"{copy.id}: bytes": done.bytes}
        if done.until is not None:
            metadata[f"{copy.id}: whole until"] = dg.MetadataValue.timestamp(done.until)
    if bad:
        raise OpsError("; ".join(bad[:20]))
    return metadata


def _pick(context: dg.AssetExecutionContext, config: VerificationConfig) -> str | None:
    """None: by turns."""
    if config.pick == "auto":
        return "newest" if BASE_BACKUP in _assets_of(context) else None
    return None if config.pick == "turns" else config.pick


class NotProvenError(OpsError):
    """A verification ended without a PASS. It is recorded all the same."""


def longest(targets: Sequence[Backed], of: Callable[[Backed], timedelta]) -> timedelta:
    # One asset has one policy: the longest promise among the targets. The checks judge each target by its own.
    return max((of(target) for target in targets), default=timedelta(days=1))


# One run, one or many targets


def _assets_of(context: Any) -> AbstractSet[dg.AssetKey]:
    """Everything that the run makes, not this step alone."""
    return context.job_def.asset_layer.selected_asset_keys


def targets_of(context: Any, access: Access) -> list[Target]:
    """The run's partitions; without any, all targets."""
    inventory = access.inventory
    if context.has_partition_key or context.has_partition_key_range:
        return [inventory.target(key) for key in context.partition_keys]
    return list(inventory.targets)


def materialize(
    context: dg.AssetExecutionContext,
    platform: PlatformResource,
    find: Callable[[Inventory, str], B],
    work: Callable[[Access, B], dict[str, Any]],
) -> dg.MaterializeResult[Any]:
    """Work on the run's target. A run over all of them is one such run after the other: see jobs/each_target.py."""
    with platform.access() as access:
        target = find(access.inventory, context.partition_key)
        try:
            return dg.MaterializeResult(metadata=work(access, target))
        except OpsError as error:
            # What a second try would not mend is not tried again by the run; retries of the run stand in dagster.yaml.
            raise dg.Failure(f"{target.id}: {error}") from None


def log_steps(context: Any) -> Progress:
    """Each step once in the run's log: bytes are for the terminal."""
    said: set[str] = set()

    def told(step: str, done: int, total: int | None) -> None:
        if step not in said:
            said.add(step)
            context.log.info(step)

    return told


# Checks


def promise_check(
    name: str,
    key: dg.AssetKey,
    text: str,
    partitions: dg.PartitionsDefinition[str],
    subjects: Callable[[Any, Access], Sequence[Backed]],
    *,
    judged: Callable[[str, Access, Any], Kept] = judge,
    blocking: bool = True,
) -> dg.AssetChecksDefinition:
    # A check may yield its events, whatever the type of the decorator says.
    @dg.asset_check(asset=key, name=name, description=text, blocking=blocking, partitions_def=partitions)  # pyright: ignore[reportArgumentType]
    def check(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> Iterator[Any]:
        with platform.access() as access:
            found = [judged(name, access, target) for target in subjects(context, access)]
        if context.has_partition_key:
            yield check_result(found[0])
            return
        # Dagster makes no AssetCheckResult of a partitioned check where the run has no partition: each target gets its own event.
        for kept in found:
            result = check_result(kept)
            yield dg.AssetCheckEvaluation(
                key, name, result.passed, result.metadata, severity=result.severity, description=result.description,
                blocking=blocking, partition=kept.target_id,
            )  # fmt: skip
        if not found:
            raise dg.Failure("the inventory has no target: no target at all is no kept promise")
        yield dg.Output(None, context.op_def.output_defs[0].name)

    return check


def check_result(kept: Kept) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=kept.kept,
        severity=dg.AssetCheckSeverity.ERROR,
        description=kept.text if kept.known else f"could not be judged: {kept.text}",
        metadata={**kept.numbers, "known": kept.known},
    )


def check_keys(names: Sequence[str] = tuple(PROMISES)) -> list[dg.AssetCheckKey]:
    return [dg.AssetCheckKey(CHECKED[name][0], name) for name in names]


# Observations


def _observe(
    context: dg.OpExecutionContext,
    platform: PlatformResource,
    key: dg.AssetKey,
    see: Callable[[Access, Target], tuple[str, dict[str, Any]]],
) -> dg.DataVersionsByPartition:
    versions: dict[str, str] = {}
    failed: list[str] = []
    with platform.access() as access:
        for target in targets_of(context, access):
            try:
                versions[target.id], metadata = see(access, target)
                context.log_event(dg.AssetObservation(key, partition=target.id, metadata=metadata))
            except OpsError as error:
                failed.append(f"{target.id}: {error}")
    if failed:
        raise dg.Failure("; ".join(failed))
    return dg.DataVersionsByPartition(versions)


def _see_database(access: Access, target: Target) -> tuple[str, dict[str, Any]]:
    from ops_platform.clients.postgres import asking

    member = access.member(target, "any")
    with asking(access.postgres(target, member=member), member.address) as connection:
        row = connection.execute(
            "select sum(pg_database_size(oid))::bigint, count(*) from pg_database where datallowconn"
        ).fetchone()
    major = (member.server_version or 0) // 10000
    size, databases = row or (0, 0)
    metadata = {
        "bytes": int(size or 0),
        "databases": int(databases),
        "major": major,
        "timeline": member.timeline or 0,
        "members": len(target.connection.hosts),
        "system identifier": str(member.system_identifier),
    }
    return f"{member.system_identifier}/{major}", metadata


def _see_archive(access: Access, target: Target) -> tuple[str, dict[str, Any]]:
    if target.repository.engine != "native":
        return target.repository.engine, {"engine": target.repository.engine}
    from ops_platform.backup.archive import archive_status

    return archive_metadata(archive_status(access, target))


def archive_metadata(status: Any) -> tuple[str, dict[str, Any]]:
    """The archive's version (timeline and position) and what a person wants to see of it."""
    metadata: dict[str, Any] = {
        "segments": status.segments,
        "stored bytes": status.stored_bytes,
        "gaps": len(status.gaps),
        "up to": str(status.newest),
        "timeline": status.newest_timeline or 0,
    }
    if status.until is not None:
        metadata["whole until"] = dg.MetadataValue.timestamp(status.until)
    if status.lag_bytes is not None:
        metadata["lag bytes"] = status.lag_bytes
    if status.slot_error is not None:
        metadata["server"] = status.slot_error
    return f"{status.newest_timeline}/{status.newest}", metadata


# Metadata


def backup_metadata(manifest: AnyManifest) -> dict[str, Any]:
    found: dict[str, Any] = {
        "backup": manifest.backup_id,
        "bytes": manifest.raw,
        "stored bytes": manifest.stored,
        "ratio": round(manifest.raw / max(1, manifest.stored), 2),
        "seconds": manifest.seconds,
        "MiB per second": round(manifest.raw / 2**20 / max(manifest.seconds, 1e-3), 1),
        "ended": dg.MetadataValue.timestamp(manifest.ended_at),
    }
    if isinstance(manifest, StoreManifest):
        return found | {"source": manifest.source, "server": manifest.server, "parts": len(manifest.parts)}
    return found | {
        "kind": manifest.kind.value,
        "why": manifest.why,
        "source": f"{manifest.source} ({manifest.source_role})",
        "timeline": manifest.timeline,
        "start": manifest.start_lsn,
        "end": manifest.end_lsn,
    }


def proof_metadata(target: Backed, proof: Any) -> dict[str, Any]:
    from ops_platform.reports.pictures import as_markdown, history_picture, proof_picture

    card = proof.scorecard
    history = history_picture(target, proof.history)
    metadata: dict[str, Any] = {
        "verdict": card.verdict.value,
        "reason": card.reason[:2000],
        "backup": card.backup_id or "none",
        "picked": card.picked,
        "recovery target": card.recovery_target,
        "strength": card.strength,
        "gates": dg.MetadataValue.md(gates_table(card.gates)),
        "restore": dg.MetadataValue.md(as_markdown(proof_picture(target, card), "the steps of the restore")),
        "history": dg.MetadataValue.md(as_markdown(history, "RPO and RTO of past verifications")),
    }
    for objective in card.objectives:
        if objective.measured_seconds is not None:
            metadata[f"{objective.name} seconds"] = float(objective.measured_seconds)
    metadata |= {f"{step.name} seconds": float(step.seconds) for step in card.steps}
    if proof.report is not None:
        metadata["report"] = dg.MetadataValue.path(proof.report)
    return metadata


def gates_table(gates: Sequence[Any]) -> str:
    rows = "\n".join(f"| {g.title} | {g.status.value} | {_cell(g.result)} | {g.seconds:.2f} |" for g in gates)
    return f"| check | status | result | seconds |\n|---|---|---|---|\n{rows}"


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= 200 else f"{flat[:199]}…"
