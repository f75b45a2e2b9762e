"""Which rules are about a signal, what they act on, with which parameters. Pure: the inventory and the signal, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ops_platform.errors import OpsError, UsageError
from ops_platform.inventory.base import Classification
from ops_platform.inventory.matchers import all_match
from ops_platform.inventory.model import Inventory, Target
from ops_platform.inventory.remediation import EventMatch, FromLabel, Remediation, Rule
from ops_platform.inventory.systems import AnySystem
from ops_platform.remediation.claims import Bounds
from ops_platform.remediation.model import Signal
from ops_platform.remediation.playbook import Playbook, playbook

_CLASSIFIED = frozenset({Classification.CONFIDENTIAL, Classification.RESTRICTED})


@dataclass(frozen=True)
class Decision:
    """A rule that is about a signal, with what it acts on and how."""

    rule: Rule
    signal: Signal
    subject: Target | AnySystem
    playbook: Playbook[Any]
    parameters: Any


@dataclass(frozen=True)
class Unresolved:
    """A rule that is about a signal and cannot be acted on: it is an incident all the same, and people have it at once."""

    rule: Rule
    signal: Signal
    problem: str


def subject_id(decision: Decision | Unresolved) -> str:
    return decision.subject.id if isinstance(decision, Decision) else "unknown"


def remediation_of(inventory: Inventory) -> Remediation:
    """Raises UsageError where the inventory has no such part."""
    if inventory.remediation is None:
        raise UsageError(
            "the inventory declares no remediation", remedy="add `remediation:` with rules to platform.yaml"
        )
    return inventory.remediation


def rule_named(inventory: Inventory, rule_id: str) -> Rule:
    """Raises UsageError: the incident's rule is gone from the inventory."""
    found = next((rule for rule in remediation_of(inventory).rules if rule.id == rule_id), None)
    if found is None:
        raise UsageError(
            f"there is no rule {rule_id!r} in the inventory any more", remedy="close its incidents by hand"
        )
    return found


def about(rule: Rule, signal: Signal) -> bool:
    """Whether the rule is about this signal."""
    if rule.event is not None:
        return signal.is_event and _is_event(rule.event, signal)
    return not signal.is_event and all_match(rule.alert or (), signal.labels)


def _is_event(match: EventMatch, signal: Signal) -> bool:
    labels = signal.labels
    right_source = match.source is None or labels.get("source") == match.source
    return labels.get("type") == match.type and right_source and all_match(match.match, labels)


def decisions(inventory: Inventory, signal: Signal) -> Iterator[Decision | Unresolved]:
    """One for each rule that is about the signal, in the order of the file."""
    by_name = remediation_of(inventory).by_alertname
    for rule in by_name.get(signal.labels.get("alertname", ""), by_name[None]):
        if about(rule, signal):
            yield resolve(inventory, rule, signal)


def resolve(inventory: Inventory, rule: Rule, signal: Signal) -> Decision | Unresolved:
    """Target and parameters of a rule for a signal. What cannot be resolved is never guessed."""
    try:
        subject = inventory.subject(_value(rule.target, signal) if isinstance(rule.target, FromLabel) else rule.target)
        found = playbook(rule.playbook)
        if subject.kind not in found.kinds:
            raise UsageError(
                f"playbook {found.name} acts on {', '.join(sorted(found.kinds))}, and {subject.id} is of kind {subject.kind}"
            )
        parameters = found.read_parameters({key: _parameter(value, signal) for key, value in rule.parameters.items()})
    except OpsError as error:
        return Unresolved(rule, signal, str(error))
    return Decision(rule, signal, subject, found, parameters)


def _parameter(value: Any, signal: Signal) -> Any:
    """`{label: NAME}` anywhere in a parameter is filled in."""
    if isinstance(value, Mapping):
        if value.keys() <= {"label", "strip"} and "label" in value:
            return _value(FromLabel.model_validate(dict(value)), signal)
        return {key: _parameter(inner, signal) for key, inner in value.items()}
    return [_parameter(inner, signal) for inner in value] if isinstance(value, list) else value


def _value(wanted: FromLabel, signal: Signal) -> str:
    value = signal.labels.get(wanted.label, "")
    if not value:
        raise UsageError(f"{signal.name} has no label {wanted.label!r}, which the rule asks for")
    return value.removesuffix(wanted.strip) if wanted.strip else value


def needs_approval(rule: Rule, subject: Target | AnySystem) -> tuple[bool, str]:
    """Whether a second person has to approve, and why."""
    if rule.approval == "always":
        return True, "the rule asks for it"
    if rule.approval == "classified" and subject.classification in _CLASSIFIED:
        return True, f"{subject.id} is {subject.classification.value}"
    return False, ""


def bounds(inventory: Inventory, rule: Rule) -> Bounds:
    whole = remediation_of(inventory)
    return Bounds(rule.cooldown, rule.budget, whole.budget, whole.breaker)


def failure_domain(subject: Target | AnySystem) -> str:
    return subject.failure_domain or subject.id


def problems(inventory: Inventory) -> list[str]:
    """What is wrong in the rules that a schema cannot say: playbooks that do not exist, of another kind, with wrong parameters."""
    found: list[str] = []
    for rule in remediation_of(inventory).rules:
        try:
            one = playbook(rule.playbook)
            if isinstance(rule.target, str) and (kind := inventory.subject(rule.target).kind) not in one.kinds:
                raise UsageError(
                    f"{one.name} acts on {', '.join(sorted(one.kinds))}, and {rule.target} is of kind {kind}"
                )
            one.check_parameters(
                rule.parameters, [key for key, value in rule.parameters.items() if _from_labels(value)]
            )
            if rule.undo == "auto" and rule.verify.within < timedelta(seconds=1):
                raise UsageError("verify.within is too short to see anything")
        except OpsError as error:
            found.append(f"rule {rule.id}: {error}")
    return found


def _from_labels(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "label" in value or any(_from_labels(inner) for inner in value.values())
    return isinstance(value, list) and any(_from_labels(inner) for inner in value)
