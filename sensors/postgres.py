"""What is noticed: targets without a backup, WAL that lags or is missing, runs that failed. Pure decisions stand in `ops_platform`."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import dagster as dg

from assets.postgres import BASE_BACKUP, WAL_ARCHIVE, archive_metadata
from jobs.postgres import MOST_REQUESTS, TARGET_TAG, op_name
from ops_platform.errors import OpsError
from ops_platform.inventory.model import Backed, Inventory
from ops_platform.resources import PlatformResource

B = TypeVar("B", bound=Backed)
BUDGET = 20.0  # seconds of one tick; Dagster ends it at 60
CAUSE_TAG = "ops/cause"  # what a run was asked for, whichever try it is
TRY_AGAIN = timedelta(hours=1)  # after a try that did not mend its cause; its failure has been told meanwhile


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
            cursor = Round(context.cursor)
            for target in cursor.turn(known):
                if has_no_backup(access, target) and (wanted := asked(context.instance, f"first/{target.id}", target)):
                    requests.append(wanted)
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
        from ops_platform.backup.continuity import open_gaps

        requests: list[dg.RunRequest] = []
        events: list[dg.AssetObservation] = []
        away: list[str] = []
        cursor = Round(context.cursor)
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
                if found := open_gaps(status.gaps):
                    newest = max(found, key=lambda gap: (gap.timeline, gap.first))
                    cause = f"gap/{target.id}/{newest.first}"
                    if wanted := asked(context.instance, cause, target, _FULL):
                        requests.append(wanted)
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
            post(access.secret(slack.webhook), message, ref=slack.webhook)

    return [new_targets, wal_watch, failed_runs]


_FULL = {"ops": {op_name(BASE_BACKUP): {"config": {"kind": "full"}}}}


def asked(
    instance: dg.DagsterInstance,
    cause: str,
    target: Backed,
    config: Mapping[str, Any] | None = None,
    job_name: str | None = None,
) -> dg.RunRequest | None:
    """A run for the cause; None while one is at work, and for a while after one that has ended and left the cause.

    Dagster never launches a run key twice, also where its run failed: each try has a key of its own.
    """
    records = instance.get_run_records(dg.RunsFilter(tags={CAUSE_TAG: cause}))
    # A run that was made and not launched is the rest of an interrupted tick: asked for under its key, it is resumed.
    tries = [record for record in records if record.dagster_run.status is not dg.DagsterRunStatus.NOT_STARTED]
    if any(not record.dagster_run.is_finished for record in tries):
        return None
    ended = max((record.end_time or record.update_timestamp.timestamp() for record in tries), default=None)
    if ended is not None and time.time() - ended < TRY_AGAIN.total_seconds():
        return None
    return dg.RunRequest(
        run_key=f"{cause}/{len(tries) + 1}",
        partition_key=target.id,
        tags={TARGET_TAG: target.id, CAUSE_TAG: cause},
        run_config=dict(config or {}),
        job_name=job_name,
    )


def has_no_backup(access: Any, target: Backed) -> bool:
    """False where the store cannot be asked: an unreachable store is not an empty one."""
    from ops_platform.backup.opening import open_target_repository

    try:
        return not open_target_repository(access, target).infos()
    except OpsError:
        return False


def _reason(data: Any) -> str:
    error = getattr(data, "error", None)
    cause = getattr(error, "cause", None) or error
    return str(getattr(cause, "message", "") or "no reason was recorded").strip()


class Round:
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

    def turn(self, targets: Sequence[B]) -> Iterator[B]:
        """Once around, or as far as the tick's time goes."""
        ids = sorted(targets, key=lambda target: target.id)
        after = self._last
        deadline = time.monotonic() + BUDGET
        for target in [t for t in ids if t.id > after] + [t for t in ids if t.id <= after]:
            if time.monotonic() > deadline:
                break
            self._last = target.id
            yield target
