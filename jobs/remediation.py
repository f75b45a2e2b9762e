"""The job that works on one incident. Its run shows what was seen, planned, ruled, done and verified, with links."""

from typing import Any

import dagster as dg

from assets.remediation import INCIDENTS
from ops_platform.errors import ConflictError
from ops_platform.resources import PlatformResource

INCIDENT_TAG, SUBJECT_TAG, RULE_TAG = "ops/incident", "ops/subject", "ops/rule"


class IncidentConfig(dg.Config):
    """`version`: the one at which the run was asked for; a run that starts late holds an old one and changes nothing. 0: whatever it is."""

    incident: str
    version: int = 0


@dg.op(description="Preflight, plan, guards, approval, apply, verify; undo what made it worse; escalate what is left.")
def work_on_incident(context: dg.OpExecutionContext, config: IncidentConfig, platform: PlatformResource) -> None:
    from ops_platform.ledger import Ledger
    from ops_platform.remediation.model import State
    from ops_platform.remediation.sources import Sources
    from ops_platform.remediation.store import Store
    from ops_platform.remediation.worker import Worker

    with platform.access() as access, Ledger(access.platform_db) as ledger:
        store = Store(ledger)
        worker = Worker(access, store, Sources(access, store), f"dagster run {context.run_id}")
        try:
            incident = worker.work(config.incident, config.version or None)
        except ConflictError as error:
            context.log.info(f"left alone: {error}")
            return
        metadata = incident_metadata(incident, store.history_of(incident.id))
        context.log_event(dg.AssetObservation(INCIDENTS, metadata=metadata))
        context.add_output_metadata(metadata)
    if incident.state is State.ESCALATED:
        # A red run is what people find first; it is not tried again: the incident itself says what comes next.
        raise dg.Failure(f"{incident.id} is escalated: {incident.reason}", metadata=metadata, allow_retries=False)


@dg.job(description="Work on one incident.", tags={"ops/domain": "remediation"})
def remediate() -> None:
    work_on_incident()


def build_jobs() -> dict[str, Any]:
    return {"remediate": remediate}


def incident_metadata(incident: Any, history: Any) -> dict[str, Any]:
    """What a person wants to see of it."""
    from ops_platform.remediation.words import plan_lines

    metadata: dict[str, Any] = {
        "incident": incident.id,
        "state": incident.state.value,
        "why": incident.reason,
        "rule": incident.rule,
        "playbook": incident.playbook,
        "target": incident.subject,
        "signal": incident.signal.name,
        "began": dg.MetadataValue.timestamp(incident.signal.starts_at),
        "attempts": incident.attempts,
        "plan": dg.MetadataValue.md("```\n" + ("\n".join(plan_lines(incident)) or "none") + "\n```"),
        "guards": dg.MetadataValue.md(rulings_table(incident.rulings)),
        "timeline": dg.MetadataValue.md(timeline(history)),
    }
    if incident.ending is not None:
        metadata["ending"] = incident.ending.value
    if incident.signal.link:
        metadata["alert"] = dg.MetadataValue.url(incident.signal.link)
    if incident.closed_at is not None:
        metadata["seconds to the end"] = (incident.closed_at - incident.opened_at).total_seconds()
    return metadata


def rulings_table(rulings: Any) -> str:
    rows = "\n".join(
        f"| {r['guard']} | {'allows' if r['allows'] else '**refuses**'} | {_cell(r['reason'])} |" for r in rulings
    )
    return f"| guard | | why |\n|---|---|---|\n{rows}"


def timeline(history: Any) -> str:
    """How long it stood in each state: one character is a fiftieth of the whole."""
    if not history:
        return "no record"
    first, last = history[0][0], history[-1][0]
    whole = max((last - first).total_seconds(), 0.001)
    lines: list[str] = []
    for number, (at, state, reason) in enumerate(history):
        end = history[number + 1][0] if number + 1 < len(history) else last
        begin = int((at - first).total_seconds() / whole * 50)
        length = max(1, int((end - at).total_seconds() / whole * 50))
        lines.append(f"{state:10} {' ' * begin}{'█' * length} +{(at - first).total_seconds():.1f} s  {reason[:80]}")
    return "```\n" + "\n".join(lines) + "\n```"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]
