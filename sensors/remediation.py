"""What turns alerts and events into incidents and incidents into runs. A poll that fails is a failed tick, and never "no alerts"."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from jobs.remediation import INCIDENT_TAG, RULE_TAG, SUBJECT_TAG
from ops_platform.clients.access import Access
from ops_platform.clock import SYSTEM_CLOCK
from ops_platform.errors import OpsError
from ops_platform.inventory.model import Inventory
from ops_platform.resources import PlatformResource

ALERTS_EVERY = EVENTS_EVERY = INCIDENTS_EVERY = 30  # seconds, at least: Dagster's daemon looks at sensors no more often
OUTBOX_EVERY = 300  # where nothing is published (any more)
LOST_AFTER = 120.0  # seconds after which the run of a step is taken for lost when nobody works on it
BUDGET = 20.0  # seconds of a tick, which Dagster ends after 60


def build_sensors(inventory: Inventory, jobs: Mapping[str, Any]) -> list[dg.SensorDefinition]:
    """Of the remediation where the inventory declares one; and wherever there is a ledger, somebody empties its outbox."""
    made: list[dg.SensorDefinition] = []
    declared = inventory.remediation
    if declared is not None:
        made.append(_incidents(jobs["remediate"]))
        if declared.alertmanagers:
            made.append(_alerts(jobs["remediate"]))
        made += [_events(jobs["remediate"], number) for number in range(len(declared.events))]
    publishes = declared is not None and declared.publish is not None
    if publishes or inventory.platform.database is not None:
        made.append(_publish(INCIDENTS_EVERY if publishes else OUTBOX_EVERY))
    return made


def _alerts(job: Any) -> dg.SensorDefinition:
    @dg.sensor(
        name="alerts", job=job, minimum_interval_seconds=ALERTS_EVERY, default_status=dg.DefaultSensorStatus.RUNNING,
        description="Polls the Alertmanagers, opens and ends incidents, asks for a run for each that is new.",
    )  # fmt: skip
    def alerts(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        from ops_platform.remediation.sources import poll_alerts

        with platform.access() as access, _opened(access) as store:
            taken = poll_alerts(access, store, budget=BUDGET)
            for text in taken.problems:
                context.log.error(text)
            for text in taken.doubts:
                context.log.warning(f"nothing has ended for all we know: {text}")
            if taken.left:
                context.log.warning(f"{taken.left} more have their turn in the next tick")
            if taken.failed:
                # What was opened goes on by the sensor `incidents`; here it must be seen that alerts were not.
                raise dg.Failure("; ".join(taken.failed))
            return _result(taken.opened, None)

    return alerts


def _events(job: Any, number: int) -> dg.SensorDefinition:
    from ops_platform.events.reset import sensor_name

    @dg.sensor(
        name=sensor_name(number), job=job, minimum_interval_seconds=EVENTS_EVERY,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reads the topics from the cursor on, opens incidents, asks for a run for each: exactly once.",
    )  # fmt: skip
    def events(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        from ops_platform.remediation.sources import read_events

        with platform.access() as access, _opened(access) as store:
            read = read_events(access, store, number, cursor=context.cursor, budget=BUDGET)
            for text in read.notes:
                context.log.warning(text)
            return _result(read.opened, read.cursor)

    return events


def _incidents(job: Any) -> dg.SensorDefinition:
    @dg.sensor(
        name="incidents", job=job, minimum_interval_seconds=INCIDENTS_EVERY, default_status=dg.DefaultSensorStatus.RUNNING,
        description="Goes on with incidents: approved, to be looked at again, to be undone, or whose run was lost. Tells people, forgets what is old.",
    )  # fmt: skip
    def incidents(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        from datetime import timedelta

        from ops_platform.remediation.sources import forget_old_signals
        from ops_platform.remediation.tell import tell_everybody

        with platform.access() as access, _opened(access) as store:
            due = store.due(lost_after=timedelta(seconds=LOST_AFTER))
            if forgotten := forget_old_signals(access, store):
                context.log.info(f"{forgotten} signals are older than remediation.signals_kept, and were forgotten")
            try:
                for text in tell_everybody(access, store):
                    context.log.warning(text)
            except OpsError as error:
                # Nobody can be told: what is due goes on all the same, and the messages wait.
                context.log.error(str(error))
            return _result(due, None)

    return incidents


def _publish(every: int) -> dg.SensorDefinition:
    @dg.sensor(
        name="publish", minimum_interval_seconds=every, default_status=dg.DefaultSensorStatus.RUNNING,
        description="Sends what stands in the ledger's outbox to Kafka: backups, proofs, incidents, actions, as CloudEvents. "
        "Where nothing is published any more it empties the outbox.",
    )  # fmt: skip
    def publish(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SkipReason:
        from ops_platform.remediation.sources import publish_events

        with platform.access() as access, _opened(access) as store:
            sent = publish_events(access, store, budget=BUDGET)
        if sent.failures:
            raise dg.Failure("; ".join(f"{subject}: {why}" for subject, why in sent.failures.items()))
        if sent.dropped:
            context.log.warning(f"remediation.publish is gone: {sent.dropped} events that waited are not sent any more")
        return dg.SkipReason(f"{sent.sent} events sent, {sent.waiting} wait")

    return publish


def _opened(access: Access) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def store() -> Any:
        from ops_platform.ledger import Ledger
        from ops_platform.remediation.store import Store

        with Ledger(access.platform_db) as ledger:
            yield Store(ledger)

    return store()


def _result(incidents: Sequence[Any], cursor: str | None) -> dg.SensorResult:
    from ops_platform.remediation.intake import MOST, run_key

    now = SYSTEM_CLOCK.now()
    requests = [
        dg.RunRequest(
            run_key=run_key(incident, now, LOST_AFTER),
            run_config={
                "ops": {"work_on_incident": {"config": {"incident": incident.id, "version": incident.version}}}
            },
            tags={INCIDENT_TAG: incident.id, SUBJECT_TAG: incident.subject, RULE_TAG: incident.rule},
        )
        for incident in incidents[:MOST]
    ]
    return dg.SensorResult(run_requests=requests, cursor=cursor)
