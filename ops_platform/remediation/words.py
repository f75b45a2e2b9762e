"""An incident in lines that a tired person reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ops_platform.counting import count_of
from ops_platform.ledger import Entry
from ops_platform.remediation.model import Approval, Incident, State

_MOST = 20


def lines(incident: Incident, record: Sequence[Entry], decision: Approval | None) -> list[str]:
    return list(_lines(incident, record, decision))


def _lines(incident: Incident, record: Sequence[Entry], decision: Approval | None) -> Iterator[str]:
    yield f"{incident.id}  {incident.state.value}" + (f" ({incident.ending.value})" if incident.ending else "")
    yield f"  {incident.reason}"
    yield f"  rule {incident.rule} · {incident.playbook} · {incident.subject} · opened {_at(incident.opened_at)}"
    yield f"  {incident.signal.name} since {_at(incident.signal.starts_at)}" + (
        f", ended {_at(incident.signal_ended_at)}" if incident.signal_ended_at else ""
    )
    yield from plan_lines(incident)
    for ruling in incident.rulings:
        yield f"  {'allows ' if ruling['allows'] else 'REFUSES'}  {ruling['guard']}: {ruling['reason']}"
    if decision is not None:
        yield f"  {decision.decision}d by {decision.who} via {decision.via} at {_at(decision.at)}"
    for entry in record:
        what, why = entry.kind.removeprefix("incident."), entry.body.get("reason", "")
        yield f"  {_at(entry.at)}  {what}{f': {why}' if why else ''}  ({entry.actor}, entry {entry.seq})"
    if incident.state is State.WAITING:
        yield f"  to approve: ops incidents approve {incident.id} --digest {(incident.digest or '')[:12]}"


def plan_lines(incident: Incident) -> list[str]:
    if incident.plan is None:
        return []
    became = {entry["object"]: entry for entry in incident.outcomes}
    changes: Sequence[Mapping[str, Any]] = incident.plan["changes"]
    found = [f"  plan {(incident.digest or '')[:12]} with {count_of(len(changes), 'change')}"]
    for change in changes[:_MOST]:
        done = became.get(change["object"])
        what = f"{done['outcome']}: {done['reason']}" if done else f"{change['before']} → {change['after']}"
        what += "; undone" if done and done.get("undone") else ""
        found.append(
            f"    {change['kind']} {change['object']}: {what}" + ("" if change["reversible"] else "; cannot be undone")
        )
    if len(changes) > _MOST:
        found.append(f"    … and {len(changes) - _MOST} more (--json shows all)")
    return found


def _at(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
