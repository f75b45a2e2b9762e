"""The past through changed rules, in virtual time: what would have been done, suppressed, escalated.

Pure: signals with their beginnings and ends go in, a report comes out; the same decisions, claims and guards of time as in earnest. What only
the living system knows is not asked: plans, peers and limits by count count as allowing, and an action counts as having helped when the
alert ended in the past within the rule's `verify.within`. So a replay says what the rules would have let through, and not that it would have
worked.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import count
from typing import Any

from ops_platform.actions import Case, Plan, Ruling
from ops_platform.actions.guards import rule_all
from ops_platform.inventory.base import Mode
from ops_platform.inventory.model import Inventory
from ops_platform.remediation import guards as g
from ops_platform.remediation.claims import Claim, rule_on
from ops_platform.remediation.model import Incident, Signal, State, incident_id
from ops_platform.remediation.rules import (
    Decision,
    Unresolved,
    bounds,
    decisions,
    failure_domain,
    needs_approval,
    remediation_of,
    subject_id,
)
from ops_platform.remediation.worker import retry_after


class Would(StrEnum):
    """How an incident would have ended."""

    HELPED = "applied, and the alert ended in time"
    APPLIED = "applied; whether it helped, an event does not say"
    TRIED = "applied, the alert went on, and people were called"
    OBSERVED = "observed"
    WAITED = "waited for a person"
    SUPPRESSED = "suppressed until the alert ended"
    GAVE_UP = "suppressed for too long, and people were called"
    ESCALATED = "people were called at once"
    CLEARED = "the alert ended before anything was to be done"


@dataclass(frozen=True)
class Replayed:
    """One incident that would have been. `applied_at`: when actions would have been begun. `refused`: guards, and how often."""

    incident: str
    rule: str
    target: str
    playbook: str
    signal: str
    began_at: datetime
    ended_at: datetime | None
    would: Would
    why: str
    applied_at: tuple[datetime, ...] = ()
    refused: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Report:
    since: datetime
    until: datetime
    signals: int
    unmatched: int
    incidents: tuple[Replayed, ...]

    @property
    def actions(self) -> int:
        return sum(len(one.applied_at) for one in self.incidents)

    def by_rule(self) -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = {}
        for one in self.incidents:
            found.setdefault(one.rule, Counter())[one.would.value] += 1
        return found


@dataclass
class _Open:
    """An incident in virtual time."""

    decision: Decision
    signal: Signal
    id: str
    opened_at: datetime
    ended_at: datetime | None
    attempts: list[datetime] = field(default_factory=list[datetime])
    refused: Counter[str] = field(default_factory=Counter[str])
    why: str = ""


def spans(history: Iterable[tuple[datetime, Signal]]) -> list[Signal]:
    """Signals as they were kept, each beginning joined with its end; silenced is what it was when it began."""
    found: dict[tuple[str, datetime], Signal] = {}
    for _, signal in history:
        key = (signal.fingerprint, signal.starts_at)
        first = found.get(key)
        if first is None:
            found[key] = signal
        elif signal.ends_at is not None:
            found[key] = replace(first, ends_at=signal.ends_at)
        elif first.silenced and not signal.silenced:
            found[key] = replace(first, silenced=False, seen_at=signal.seen_at)
    return sorted(found.values(), key=lambda signal: (signal.seen_at, signal.fingerprint))


def replay(inventory: Inventory, signals: Sequence[Signal], since: datetime, until: datetime) -> Report:
    """Run the rules of `inventory` over signals (see `spans`) that were seen between the two moments."""
    run = _Replay(inventory, until)
    within = [signal for signal in signals if since <= signal.seen_at < until]
    unmatched = 0
    for signal in within:
        about = list(decisions(inventory, signal))
        unmatched += not about
        for decision in about:
            run.begin(decision, signal)
    return Report(since, until, len(within), unmatched, tuple(run.go()))


class _Replay:
    """A queue of moments: when each incident is to be looked at next."""

    def __init__(self, inventory: Inventory, until: datetime) -> None:
        self._inventory, self._until = inventory, until
        self._queue: list[tuple[datetime, int, _Open]] = []
        self._number = count()
        self._claims: list[Claim] = []
        self._done: list[Replayed] = []

    def begin(self, decision: Decision | Unresolved, signal: Signal) -> None:
        rule = decision.rule
        name = incident_id(rule.id, signal.fingerprint, signal.starts_at)
        if isinstance(decision, Unresolved):
            self._done.append(
                Replayed(
                    name, rule.id, subject_id(decision), rule.playbook, signal.name, signal.starts_at, signal.ends_at,
                    Would.ESCALATED, decision.problem,
                )
            )  # fmt: skip
            return
        opened = max(signal.seen_at, signal.starts_at + rule.firing_for)
        self._push(opened, _Open(decision, signal, name, opened, signal.ends_at))

    def go(self) -> list[Replayed]:
        while self._queue:
            now, _, one = heapq.heappop(self._queue)
            self._look(one, now)
        return sorted(self._done, key=lambda found: (found.began_at, found.incident))

    def _push(self, at: datetime, one: _Open) -> None:
        heapq.heappush(self._queue, (at, next(self._number), one))

    def _look(self, one: _Open, now: datetime) -> None:
        rule, subject = one.decision.rule, one.decision.subject
        over = self._over(one, now)
        if over is not None:
            return self._end(one, *over)
        refusals = [ruling for ruling in self._rulings(one, now) if not ruling.allows]
        if refusals:
            one.refused.update(ruling.guard for ruling in refusals)
            one.why = "; ".join(f"{ruling.guard}: {ruling.reason}" for ruling in refusals)
            return self._push(now + retry_after(one.opened_at, now), one)
        if rule.mode is Mode.OBSERVE:
            return self._end(one, Would.OBSERVED)
        required, why = needs_approval(rule, subject)
        return self._end(one, Would.WAITED, why) if required else self._apply(one, now)

    def _over(self, one: _Open, now: datetime) -> tuple[Would, str] | None:
        if one.ended_at is not None and one.ended_at <= now and not one.signal.is_event:
            return Would.SUPPRESSED if one.refused else Would.CLEARED, ""
        if now >= self._until:
            return Would.SUPPRESSED, "the replayed time ended"
        return (Would.GAVE_UP, "") if now - one.opened_at > one.decision.rule.give_up_after else None

    def _rulings(self, one: _Open, now: datetime) -> list[Ruling]:
        rule, subject = one.decision.rule, one.decision.subject
        whole = remediation_of(self._inventory)
        found: list[Any] = [
            g.StillWanted(lambda: replace(one.signal, ends_at=None)),
            g.NoFreeze(whole.freezes, subject.environment),
        ]
        if rule.maintenance == "inside":
            found.append(g.InsideMaintenance(subject.maintenance_windows))
        if rule.maintenance == "outside":
            found.append(g.OutsideMaintenance(subject.maintenance_windows))
        case = Case(Plan(rule.playbook, subject.id, (), now), None, now)
        held = [
            c if c.ended_at is None or c.ended_at <= now else replace(c, ended_at=None, helped=None)
            for c in self._claims
        ]
        return [*rule_all(found, case), *rule_on(self._claim(one, now), held, bounds(self._inventory, rule), now)]

    def _claim(self, one: _Open, now: datetime) -> Claim:
        rule, subject = one.decision.rule, one.decision.subject
        return Claim(one.id, len(one.attempts) + 1, rule.id, subject.id, failure_domain(subject), rule.playbook, now)

    def _apply(self, one: _Open, now: datetime) -> None:
        rule = one.decision.rule
        deadline = now + rule.verify.within
        helped = one.signal.is_event or (one.ended_at is not None and one.ended_at <= deadline)
        ended = min(one.ended_at, deadline) if one.ended_at is not None and not one.signal.is_event else deadline
        ended = now if one.signal.is_event else ended
        self._claims.append(replace(self._claim(one, now), ended_at=ended, helped=helped))
        one.attempts.append(now)
        if helped:
            return self._end(one, Would.APPLIED if one.signal.is_event else Would.HELPED)
        if len(one.attempts) >= rule.max_attempts or (
            rule.undo == "auto" and one.decision.playbook.undo_text is not None
        ):
            return self._end(one, Would.TRIED)
        return self._push(deadline, one)

    def _end(self, one: _Open, would: Would, why: str = "") -> None:
        decision, signal = one.decision, one.signal
        if would is Would.SUPPRESSED and one.attempts:
            would = Would.TRIED
        self._done.append(
            Replayed(
                one.id, decision.rule.id, decision.subject.id, decision.rule.playbook, signal.name, signal.starts_at, one.ended_at,
                would, why or one.why, tuple(one.attempts), dict(one.refused),
            )
        )  # fmt: skip


def recorded(report: Report, incidents: Sequence[Incident]) -> dict[str, int]:
    """Beside the replay: what really became of the incidents of that time, by state or ending."""
    found: Counter[str] = Counter()
    for incident in incidents:
        if report.since <= incident.opened_at < report.until:
            found[
                incident.ending.value if incident.state is State.CLOSED and incident.ending else incident.state.value
            ] += 1
    return dict(found)


def step_of(since: datetime, until: datetime) -> timedelta:
    """For Prometheus: fine enough to see an alert that fires for a minute, coarse enough to read weeks."""
    return timedelta(seconds=15) if until - since <= timedelta(days=2) else timedelta(minutes=1)
