"""What may refuse a drill, beside the guards that every action has. Each looks at one thing and says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ops_platform.actions import Case, MaintenanceWindow, Ruling
from ops_platform.counting import count_of, duration
from ops_platform.drills.model import Checked, Drill, DrillState
from ops_platform.inventory import format_duration
from ops_platform.inventory.base import Weekly
from ops_platform.inventory.drills import Unavailability
from ops_platform.remediation.model import Incident


@dataclass(frozen=True)
class ForThisTarget:
    """Only on what the inventory names for this drill."""

    subject: str
    allowed: Sequence[str]
    name = "target"

    def rule(self, case: Case) -> Ruling:
        named = self.subject in self.allowed
        return Ruling(self.name, named, f"{self.subject} is {'' if named else 'not '}among the targets of the drill")


@dataclass(frozen=True)
class NotInProduction:
    """Never on a production target unless the inventory says so for this very drill."""

    environment: str
    production: bool
    allowed: bool
    name = "production"

    def rule(self, case: Case) -> Ruling:
        if not self.production:
            return Ruling(self.name, True, f"{self.environment} is no production environment")
        if self.allowed:
            return Ruling(self.name, True, f"{self.environment} is production, and the drill is allowed there")
        return Ruling(
            self.name, False, f"{self.environment} is production, and the drill does not say production: true"
        )


@dataclass(frozen=True)
class OutsideBusinessHours:
    hours: Sequence[Weekly]
    name = "business hours"

    def rule(self, case: Case) -> Ruling:
        if not self.hours:
            return Ruling(self.name, True, "none are declared")
        inside = MaintenanceWindow(self.hours).rule(case)
        if inside.allows:
            return Ruling(self.name, False, f"people are at work: {inside.reason}")
        return Ruling(self.name, True, "outside of them")


@dataclass(frozen=True)
class NoOpenIncident:
    """Nobody is to be disturbed who is fighting a fire. `incidents`: those that are open; raises where they cannot be had."""

    incidents: Callable[[], Sequence[Incident]]
    subjects: frozenset[str]
    name = "open incidents"

    def rule(self, case: Case) -> Ruling:
        about = [incident for incident in self.incidents() if incident.subject in self.subjects]
        if not about:
            return Ruling(self.name, True, "none in this failure domain")
        more = f", and {len(about) - 1} more" if len(about) > 1 else ""
        return Ruling(self.name, False, f"{about[0].id} is open on {about[0].subject}{more}")


@dataclass(frozen=True)
class WithinBudget:
    """Downtime by drills is bounded: what earlier ones took, and what this one is expected to take.

    `spent`: by ended drills of the target, when each ended and for how many seconds it kept users out.
    """

    budget: Unavailability
    expected: timedelta
    spent: Callable[[], Sequence[tuple[datetime, float]]]
    name = "budget of unavailability"

    def rule(self, case: Case) -> Ruling:
        used = sum(seconds for at, seconds in self.spent() if case.now - at < self.budget.per)
        most, expected = self.budget.most, self.expected
        per = format_duration(self.budget.per)
        text = f"{duration(used)} used within {per}, {duration(expected)} expected, {duration(most)} allowed"
        return Ruling(self.name, timedelta(seconds=used) + expected <= most, text)


@dataclass(frozen=True)
class Preflight:
    """What the runbook looks at before it begins. What could not be looked at refuses, too."""

    look: Callable[[], Mapping[str, Sequence[Checked]]]
    name = "preflight"

    def rule(self, case: Case) -> Ruling:
        found = self.look()
        bad = [f"{step}: {check.result}" for step, checks in found.items() for check in checks if not check.holds]
        unlooked = [step for step, checks in found.items() if not checks]
        if bad or unlooked:
            return Ruling(self.name, False, "; ".join(bad + [f"{step}: nothing was looked at" for step in unlooked]))
        return Ruling(
            self.name, True, count_of(sum(map(len, found.values())), "look") if found else "the runbook asks for none"
        )


@dataclass(frozen=True)
class RightMode:
    """A runbook is held in the mode that it is written for; in earnest it breaks nothing."""

    mode: str
    modes: Sequence[str]
    injects: bool
    name = "mode of the runbook"

    def rule(self, case: Case) -> Ruling:
        if self.mode not in self.modes:
            return Ruling(self.name, False, f"the runbook is for {', '.join(self.modes)}, and not for {self.mode}")
        if self.mode == "real" and self.injects:
            return Ruling(self.name, False, "it would break something, and this is earnest")
        return Ruling(self.name, True, self.mode)


def overlap(subject: str, domain: str, others: Sequence[Drill]) -> Ruling:
    """Two drills never at once on one target, or in one failure domain."""
    for other in others:
        if other.state is not DrillState.ENDED and (other.subject == subject or other.domain == domain):
            return Ruling("overlap", False, f"{other.id} is {other.state.value} on {other.subject}")
    return Ruling("overlap", True, "no other drill in this failure domain")
