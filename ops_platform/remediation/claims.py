"""What bounds actions: cooldown, budgets, circuit breaker, failure domains. Pure, over the list of claims; replay uses the same.

A claim in the future (a clock that jumped back since) counts as one of now: what cannot be told is taken for the worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ops_platform.actions import Ruling
from ops_platform.counting import count_of
from ops_platform.inventory.remediation import Budget, CircuitBreaker
from ops_platform.inventory.values import format_duration


@dataclass(frozen=True)
class Claim:
    """The right to apply once. `helped` None: not known yet, or never known."""

    incident: str
    attempt: int
    rule: str
    subject: str
    domain: str
    playbook: str
    at: datetime
    ended_at: datetime | None = None
    helped: bool | None = None


@dataclass(frozen=True)
class Bounds:
    cooldown: timedelta
    budget: Budget
    overall: Budget
    breaker: CircuitBreaker

    @property
    def looks_back(self) -> timedelta:
        """How far back a claim may matter."""
        breaker = self.breaker.within + self.breaker.open_for
        return max(self.cooldown, self.budget.per, self.overall.per, breaker)


def rule_on(wanted: Claim, claims: Sequence[Claim], bounds: Bounds, now: datetime) -> list[Ruling]:
    """Whether `wanted` may be claimed beside the others."""
    others = [c for c in claims if c.incident != wanted.incident or c.attempt != wanted.attempt]
    return [
        _cooldown(wanted, others, bounds.cooldown, now),
        _budget("budget of the rule", [c for c in others if c.rule == wanted.rule], bounds.budget, now),
        _budget("budget of all rules", others, bounds.overall, now),
        _breaker([c for c in others if c.playbook == wanted.playbook], bounds.breaker, now),
        _domain(wanted, others),
    ]


def _cooldown(wanted: Claim, others: Sequence[Claim], cooldown: timedelta, now: datetime) -> Ruling:
    """Between incidents: a further attempt within one incident is bounded by `max_attempts`."""
    mine = [
        c.at for c in others if c.rule == wanted.rule and c.subject == wanted.subject and c.incident != wanted.incident
    ]
    last = max(mine, default=None)
    if last is None or now - last >= cooldown:
        return Ruling("cooldown", True, "no action of this rule on this target lately")
    return Ruling(
        "cooldown", False, f"this rule acted on it at {last:%H:%M:%S} UTC; again from {last + cooldown:%H:%M:%S} on"
    )


def _budget(name: str, claims: Sequence[Claim], budget: Budget, now: datetime) -> Ruling:
    used = sum([now - c.at < budget.per for c in claims])
    return Ruling(name, used < budget.count, f"{used} of {budget.count} used within {format_duration(budget.per)}")


def _breaker(claims: Sequence[Claim], breaker: CircuitBreaker, now: datetime) -> Ruling:
    """Closed, open, or half open: then one is tried at a time, and a good end closes it."""
    name = "circuit breaker"
    ended = sorted(
        (c for c in claims if c.helped is not None and c.ended_at is not None), key=lambda c: c.ended_at or c.at
    )
    bad: list[datetime] = []
    for claim in ended:
        # A success after the circuit had opened closes it; one among failures before that does not count against them.
        if claim.helped and len(bad) >= breaker.failures:
            bad = []
        elif not claim.helped:
            moment = claim.ended_at or claim.at
            bad = [*(b for b in bad if moment - b <= breaker.within), moment]
    recent = [b for b in bad if now - b <= breaker.within + breaker.open_for]
    if len(recent) < breaker.failures:
        return Ruling(name, True, f"{len(recent)} bad ends lately, {breaker.failures} open it")
    again = recent[-1] + breaker.open_for
    if now < again:
        return Ruling(
            name,
            False,
            f"open: {count_of(len(recent), 'action')} of this playbook did not help; one is tried from {again:%Y-%m-%d %H:%M} UTC on",
        )
    if any(c.ended_at is None for c in claims):
        return Ruling(name, False, "half open, and its one trial goes on")
    return Ruling(name, True, "half open: this is the trial")


def _domain(wanted: Claim, others: Sequence[Claim]) -> Ruling:
    busy = [c for c in others if c.ended_at is None and c.domain == wanted.domain and c.incident != wanted.incident]
    if busy:
        return Ruling("failure domain", False, f"incident {busy[0].incident} acts in {wanted.domain} already")
    return Ruling("failure domain", True, f"nobody else acts in {wanted.domain}")
