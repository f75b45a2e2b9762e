"""What is noticed: targets without a backup, WAL that lags or is missing, runs that failed. Pure decisions stand in `ops_platform`."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from assets.postgres import BASE_BACKUP, PITR_VERIFICATION, WAL_ARCHIVE, archive_metadata
from jobs.postgres import TARGET_TAG, op_name
from ops_platform.errors import OpsError
from ops_platform.inventory.model import Inventory, Target
from ops_platform.resources import PlatformResource

BUDGET = 20.0  # seconds of one tick; Dagster ends it at 60
MOST_REQUESTS = 100


def build_sensors(inventory: Inventory, jobs: Mapping[str, Any]) -> list[dg.SensorDefinition]:
    running = dg.DefaultSensorStatus.RUNNING

    @dg.sensor(
        job=jobs["nightly_backup"],
        minimum_interval_seconds=120,
        default_status=running,
        description="A target of the inventory that has no backup yet gets its first one, and its first proof.",
    )
    def new_targets(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        requests: list[dg.RunRequest] = []
        with platform.access() as access:
            native = [t for t in access.inventory.targets if t.repository.engine == "native"]
            unknown = {t.id for t in native} - {t.id for t in inventory.targets}
            if unknown:
                context.log.warning(f"new in platform.yaml, reload the code location: {', '.join(sorted(unknown))}")
            known = [t for t in native if t.id not in unknown]
            cursor = _Round(context.cursor)
            for target in cursor.turn(known):
                if _has_no_backup(access, target):
                    requests.append(
                        dg.RunRequest(
                            run_key=f"first/{target.id}", partition_key=target.id, tags={TARGET_TAG: target.id}
                        )
                    )
                if len(requests) == MOST_REQUESTS:
                    break
        return dg.SensorResult(run_requests=requests, cursor=cursor.next)

    @dg.sensor(
        job=jobs["nightly_backup"],
        minimum_interval_seconds=60,
        default_status=running,
        description="Looks at each WAL archive; a new gap gets a full backup, from which recovery is possible again.",
    )
    def wal_watch(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        from ops_platform.backup.archive import archive_status

        requests: list[dg.RunRequest] = []
        events: list[dg.AssetObservation] = []
        away: list[str] = []
        cursor = _Round(context.cursor)
        with platform.access() as access:
            native = [t for t in access.inventory.targets if t.repository.engine == "native"]
            for target in cursor.turn(native):
                try:
                    status = archive_status(access, target)
                except OpsError as error:
                    away.append(f"{target.id}: {error}")
                    continue
                events.append(
                    dg.AssetObservation(WAL_ARCHIVE, partition=target.id, metadata=archive_metadata(status)[1])
                )
                # However many gaps there are, one full backup after the newest of them mends them all.
                open_gaps = [gap for gap in status.gaps if gap.recovery_again_from is None]
                if open_gaps:
                    newest = max(open_gaps, key=lambda gap: (gap.timeline, gap.first))
                    requests.append(full_after_gap(target, newest.first))
                if len(requests) == MOST_REQUESTS:
                    break
        if away and not events:
            # Nothing could be asked: a failed tick, never "no gaps".
            raise dg.Failure("; ".join(away))
        for text in away:
            context.log.error(text)
        return dg.SensorResult(run_requests=requests, asset_events=events, cursor=cursor.next)

    @dg.run_failure_sensor(
        name="failed_runs_to_slack",
        minimum_interval_seconds=30,
        default_status=running if inventory.platform.slack else dg.DefaultSensorStatus.STOPPED,
        description="Tells the owners' channel which run failed, why, and where to look.",
    )
    def failed_runs(context: dg.RunFailureSensorContext, platform: PlatformResource) -> None:
        from ops_platform.notify import post, run_failed

        with platform.access() as access:
            slack = access.inventory.platform.slack
            if slack is None:
                return
            target_id = context.dagster_run.tags.get(TARGET_TAG) or context.dagster_run.tags.get("dagster/partition")
            steps = [_reason(event.event_specific_data) for event in context.get_step_failure_events()]
            message = run_failed(
                access.inventory,
                context.dagster_run.job_name,
                context.dagster_run.run_id,
                target_id,
                # A run that was ended from outside has no failed step; what ended it says why.
                steps or [context.failure_event.message or ""],
            )
            post(access.secret(slack.webhook), message)

    return [new_targets, wal_watch, failed_runs]


def full_after_gap(target: Target, first: str) -> dg.RunRequest:
    config = {
        "ops": {
            op_name(BASE_BACKUP): {"config": {"kind": "full"}},
            op_name(PITR_VERIFICATION): {"config": {"pick": "newest"}},
        }
    }
    return dg.RunRequest(
        run_key=f"gap/{target.id}/{first}", partition_key=target.id, tags={TARGET_TAG: target.id}, run_config=config
    )


def _has_no_backup(access: Any, target: Target) -> bool:
    """False where the store cannot be asked: an unreachable store is not an empty one."""
    from ops_platform.backup.archive import open_target_repository

    try:
        return not open_target_repository(access, target).infos()
    except OpsError:
        return False


def _reason(data: Any) -> str:
    error = getattr(data, "error", None)
    cause = getattr(error, "cause", None) or error
    return str(getattr(cause, "message", "") or "no reason was recorded").strip()


class _Round:
    """Goes on with the targets where the last tick ended, so that each has its turn however many there are."""

    def __init__(self, cursor: str | None) -> None:
        try:
            self._last = str(json.loads(cursor)["after"]) if cursor else ""
        except (ValueError, KeyError, TypeError):
            self._last = ""

    @property
    def next(self) -> str:
        """The cursor behind the target that had its turn last."""
        return json.dumps({"after": self._last})

    def turn(self, targets: Sequence[Target]) -> Iterator[Target]:
        """Once around, or as far as the tick's time goes."""
        ids = sorted(targets, key=lambda target: target.id)
        after = self._last
        deadline = time.monotonic() + BUDGET
        for target in [t for t in ids if t.id > after] + [t for t in ids if t.id <= after]:
            if time.monotonic() > deadline:
                break
            self._last = target.id
            yield target
