"""An action's result in lines that a person reads."""

from __future__ import annotations

from collections.abc import Iterator

from ops_platform.actions.model import ActionResult
from ops_platform.counting import count_of

_MOST = 25


def lines(result: ActionResult) -> list[str]:
    return list(_lines(result))


def _lines(result: ActionResult) -> Iterator[str]:
    plan = result.plan
    yield f"{result.status.value}; plan {plan.digest[:16]} with {count_of(len(plan.changes), 'change')}"
    outcomes = {change.object: applied for change, applied in result.outcomes}
    shown = plan.changes[:_MOST]
    for change in shown:
        applied = outcomes.get(change.object)
        became = f"{applied.outcome.value}: {applied.reason}" if applied else "would be changed"
        yield f"{change.kind} {change.object}: {became}"
    if len(plan.changes) > len(shown):
        yield f"… and {len(plan.changes) - len(shown)} more (--json shows all)"
    for ruling in result.refusals:
        yield f"refused by {ruling.guard}: {ruling.reason}"
    for check in result.verification.checks if result.verification else ():
        holds = {True: "holds", False: "DOES NOT HOLD", None: "could not be looked at"}[check.holds]
        yield f"verified, {check.name}: {holds} ({check.detail})"
    if result.unrecorded:
        yield f"not recorded: {result.unrecorded}"
