"""The job that works on one incident. Its run shows what was seen, planned, ruled, done and verified, with links."""

from typing import Any
from urllib.parse import quote

import dagster as dg
from dagster._core.storage.tags import PRIORITY_TAG

from assets.remediation import INCIDENTS
from ops_platform.errors import NotOurTurnError
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
        except NotOurTurnError as error:
            context.log.info(f"left alone: {error}")
            return
        record = store.record_of(incident)
        metadata = incident_metadata(incident, store.history_of(incident.id), record)
        context.log_event(dg.AssetObservation(INCIDENTS, metadata=metadata))
    if incident.state is State.ESCALATED:
        # A red run is what people find first; it is not tried again: the incident itself says what comes next.
        raise dg.Failure(f"{incident.id} is escalated: {incident.reason}", metadata=metadata, allow_retries=False)


# An incident does not wait behind a night of backups.
@dg.job(description="Work on one incident.", tags={"ops/domain": "remediation", PRIORITY_TAG: "10"})
def remediate() -> None:
    work_on_incident()


def build_jobs() -> dict[str, Any]:
    return {"remediate": remediate}


def incident_metadata(incident: Any, history: Any, record: Any = ()) -> dict[str, Any]:
    """What a person wants to see of it, with where to look on. `record`: its entries in the ledger, and those of its actions."""
    from ops_platform.remediation.words import plan_lines

    plans = [entry for entry in record if entry.kind == "action.plan"]
    rulings = incident.rulings or (plans[-1].body["rulings"] if plans else [])
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
        "plan": dg.MetadataValue.md("\n".join(f"- {_cell(line)}" for line in plan_lines(incident)) or "none"),
        "guards": dg.MetadataValue.md(rulings_table(rulings) if rulings else "none were asked"),
        "timeline": dg.MetadataValue.md(timeline(history)),
        "record": dg.MetadataValue.md(record_table(record)),
        "look on": dg.MetadataValue.md(
            f"[its runs]({runs_of(incident.id)}) · `ops incidents show {incident.id}`"
            f" · `ops ledger list --target {incident.subject}`"
        ),
    }
    if incident.ending is not None:
        metadata["ending"] = incident.ending.value
    if incident.signal.link:
        metadata["alert"] = dg.MetadataValue.url(incident.signal.link)
    if incident.closed_at is not None:
        metadata["seconds to the end"] = round((incident.closed_at - incident.opened_at).total_seconds(), 3)
    return metadata


def runs_of(incident: str) -> str:
    """Where the web UI lists the runs that worked on it."""
    return f"/runs?q%5B0%5D=tag%3A{quote(f'{INCIDENT_TAG}={incident}', safe='')}"


def rulings_table(rulings: Any) -> str:
    rows = "\n".join(
        f"| {r['guard']} | {'allows' if r['allows'] else '**refuses**'} | {_cell(r['reason'])} |" for r in rulings
    )
    return f"| guard | | why |\n|---|---|---|\n{rows}"


def record_table(record: Any) -> str:
    """The entries of the ledger, by number: `ops ledger prove NUMBER` proves each."""
    rows = "\n".join(
        f"| {entry.seq} | {entry.at:%H:%M:%S} | {entry.kind} | {_cell(str(entry.body.get('reason') or ''))} | `{entry.sha256[:12]}` |"
        for entry in record
    )
    return f"| entry | UTC | what | | SHA-256 |\n|---|---|---|---|---|\n{rows}" if rows else "no entry"


_WIDTH = 30


def timeline(history: Any) -> str:
    """How long it stood in each state, drawn to scale."""
    if not history:
        return "no record"
    first, last = history[0][0], history[-1][0]
    whole = max((last - first).total_seconds(), 0.001)
    lines: list[str] = []
    for number, (at, state, _) in enumerate(history):
        end = history[number + 1][0] if number + 1 < len(history) else last
        begin = min(int((at - first).total_seconds() / whole * _WIDTH), _WIDTH - 1)
        length = max(1, int((end - at).total_seconds() / whole * _WIDTH))
        lines.append(f"{state:10} {' ' * begin + '█' * length:{_WIDTH}} +{(at - first).total_seconds():.1f} s")
    return "```\n" + "\n".join(lines) + "\n```"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]
