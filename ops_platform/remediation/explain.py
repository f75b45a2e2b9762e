"""What the rules would do about a signal, and which guard would refuse, without doing any of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from ops_platform.actions import Case, Plan, Ruling
from ops_platform.actions.guards import rule_all
from ops_platform.clients.prometheus import Measured
from ops_platform.counting import count_of
from ops_platform.errors import OpsError, UsageError
from ops_platform.inventory.remediation import MetricCheck
from ops_platform.remediation.claims import Claim, rule_on
from ops_platform.remediation.model import Incident, Signal, State, incident_id
from ops_platform.remediation.rules import Decision, Unresolved, bounds, decisions, failure_domain
from ops_platform.remediation.store import Store
from ops_platform.remediation.worker import Worker, proposer

if TYPE_CHECKING:
    from ops_platform.clients.access import Access


@dataclass(frozen=True)
class Explained:
    """What one rule would do. `plan` and `rulings` are None where no system was asked."""

    rule: str
    playbook: str
    target: str | None
    mode: str
    parameters: dict[str, Any]
    problem: str | None
    plan: dict[str, Any] | None = None
    rulings: list[dict[str, Any]] | None = None

    @property
    def would_apply(self) -> bool | None:
        if self.problem is not None:
            return False
        return (
            None
            if self.rulings is None
            else bool(self.plan and self.plan["changes"]) and all(r["allows"] for r in self.rulings)
        )

    def lines(self) -> Iterator[str]:
        yield f"rule {self.rule}: {self.playbook} on {self.target or 'an unknown target'} ({self.mode})"
        if self.problem is not None:
            yield f"  cannot be acted on: {self.problem}"
            return
        for name, value in self.parameters.items():
            yield f"  {name} = {value}"
        if self.plan is not None:
            changes = self.plan["changes"]
            yield f"  plan {self.plan['digest'][:12]} with {count_of(len(changes), 'change')}"
            for change in changes[:20]:
                yield f"    {change['kind']} {change['object']}"
        for ruling in self.rulings or ():
            yield f"  {'allows ' if ruling['allows'] else 'REFUSES'}  {ruling['guard']}: {ruling['reason']}"
        if self.rulings is not None:
            yield "  it would be applied" if self.would_apply else "  it would NOT be applied"


def explain_signal(access: Access, signal: Signal, *, offline: bool) -> list[Explained]:
    """One for each rule that is about the signal. Asks the systems unless `offline`; changes and records nothing."""
    return [_explain(access, decision, offline) for decision in decisions(access.inventory, signal)]


def _explain(access: Access, decision: Decision | Unresolved, offline: bool) -> Explained:
    from dataclasses import replace

    from ops_platform.ledger import Ledger

    rule = decision.rule
    if isinstance(decision, Unresolved):
        target = rule.target if isinstance(rule.target, str) else None
        return Explained(rule.id, rule.playbook, target, rule.mode.value, {}, decision.problem)
    parameters = decision.parameters.model_dump(mode="json")
    found = Explained(rule.id, rule.playbook, decision.subject.id, rule.mode.value, parameters, None)
    if offline:
        return found
    with Ledger(access.platform_db) as ledger:
        plan, rulings = _judge(access, Store(ledger), decision)
    return replace(found, plan=plan.as_json() if plan else None, rulings=[ruling.as_json() for ruling in rulings])


def _judge(access: Access, store: Store, decision: Decision) -> tuple[Plan | None, list[Ruling]]:
    signal, rule, now = decision.signal, decision.rule, store.clock.now()
    incident = Incident(
        incident_id(rule.id, signal.fingerprint, signal.starts_at), rule.id, signal.fingerprint, decision.subject.id,
        rule.playbook, State.OPEN, signal, now, now, proposed_by=proposer(rule),
    )  # fmt: skip
    worker = Worker(access, store, _AsGiven(signal), "explain", store.clock)
    try:
        plan = decision.playbook.action(worker.context(incident, decision)).plan()
    except OpsError as error:
        return None, [Ruling("plan", False, error.line)]
    rulings = list(rule_all(worker.guards(incident, decision, None), Case(plan, None, now)))
    limits = bounds(access.inventory, rule)
    claim = Claim(incident.id, 1, rule.id, decision.subject.id, failure_domain(decision.subject), rule.playbook, now)
    return plan, rulings + rule_on(claim, store.claims(now - limits.looks_back), limits, now)


@dataclass(frozen=True)
class _AsGiven:
    """The signal is as the file has it."""

    signal: Signal

    def look(self, incident: Incident) -> Signal | None:
        return self.signal

    def measure(self, check: MetricCheck, incident: Incident) -> tuple[Measured, str]:
        return Measured.UNKNOWN, "not measured"


# Files


def read_signals(value: Any, where: str) -> list[Signal]:
    """An alert, a list of them, a webhook's body with `alerts`, or a CloudEvent. Raises UsageError."""
    if isinstance(value, Mapping) and isinstance(value.get("alerts"), list):
        value = value["alerts"]
    items: list[Any] = value if isinstance(value, list) else [value]
    return [
        _signal(item, f"{where}: entry {number + 1}" if len(items) > 1 else where) for number, item in enumerate(items)
    ]


def _signal(item: Any, where: str) -> Signal:
    from datetime import UTC

    if not isinstance(item, dict):
        raise UsageError("this is neither an alert nor a CloudEvent", where=where)
    found = cast("dict[str, Any]", item)
    now = datetime.now(UTC)
    if "specversion" in found:
        from ops_platform.events import signal_of_event

        return signal_of_event(found, fingerprint=f"file/{found.get('id', '')}", seen_at=now)
    labels = found.get("labels")
    if not isinstance(labels, dict) or not all(isinstance(v, str) for v in labels.values()):
        raise UsageError("an alert has `labels`, a mapping of texts", where=where)
    starts = found.get("startsAt")
    try:
        starts_at = datetime.fromisoformat(starts) if isinstance(starts, str) else now
    except ValueError:
        raise UsageError(f"startsAt: {starts!r} is not a time", where=where) from None
    digest = hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()[:16]
    return Signal(
        "alertmanager", str(found.get("fingerprint") or digest), str(labels.get("alertname", "alert")), labels,
        starts_at if starts_at.tzinfo else starts_at.replace(tzinfo=UTC), now, annotations=found.get("annotations") or {},
        link=found.get("generatorURL"),
    )  # fmt: skip
