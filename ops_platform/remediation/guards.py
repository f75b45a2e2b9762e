"""What may refuse the plan of an incident, beside the guards that every action has. Each looks at one thing and says why.

What is scarce (cooldown, budgets, circuit breaker, failure domain) is not here: it is claimed when all of these allow, see `claims`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta

from ops_platform.actions import Case, MaintenanceWindow, PercentLimit, Ruling
from ops_platform.inventory.base import Weekly
from ops_platform.inventory.remediation import Freeze
from ops_platform.remediation.model import Pause, Peers, Signal

CLOCKS_APART = timedelta(minutes=1)


@dataclass(frozen=True)
class NotPaused:
    """Pause-all: one switch that stops everything, whatever else is away."""

    paused: Callable[[], Pause | None]
    name = "pause"

    def rule(self, case: Case) -> Ruling:
        pause = self.paused()
        if pause is None:
            return Ruling(self.name, True, "nothing is paused")
        return Ruling(
            self.name, False, f"everything is paused by {pause.who} since {pause.at:%H:%M:%S} UTC: {pause.why}"
        )


@dataclass(frozen=True)
class StillWanted:
    """The alert still fires, by a fresh look at its source, and nobody silenced it or inhibits it.

    `look` gives the signal as it is now; None where it has ended. It raises where it cannot look, and that refuses.
    """

    look: Callable[[], Signal | None]
    name = "signal"

    def rule(self, case: Case) -> Ruling:
        signal = self.look()
        if signal is None or signal.ends_at is not None:
            return Ruling(self.name, False, "it fires no more")
        if signal.silenced:
            return Ruling(self.name, False, "a silence lies on it: somebody is at work")
        if signal.inhibited:
            return Ruling(self.name, False, "another alert inhibits it: that one comes first")
        return Ruling(self.name, True, "it happened" if signal.is_event else "it still fires")


@dataclass(frozen=True)
class FiringFor:
    """What flaps is left alone."""

    since: Signal
    least: timedelta
    name = "firing for"

    def rule(self, case: Case) -> Ruling:
        age = case.now - self.since.starts_at
        text = f"for {max(timedelta(0), age) // timedelta(seconds=1)} s, {self.least // timedelta(seconds=1)} s are asked for"
        return Ruling(self.name, age >= self.least, text)


@dataclass(frozen=True)
class NoFreeze:
    """No freeze of changes in this environment."""

    freezes: Sequence[Freeze]
    environment: str
    name = "change freeze"

    def rule(self, case: Case) -> Ruling:
        for freeze in self.freezes:
            here = not freeze.environments or self.environment in freeze.environments
            if here and freeze.starts <= case.now < freeze.ends:
                until = f"{freeze.ends.astimezone(UTC):%Y-%m-%d %H:%M}"
                return Ruling(self.name, False, f"until {until} UTC: {freeze.why}")
        return Ruling(self.name, True, "none now")


@dataclass(frozen=True)
class OutsideMaintenance:
    """Not while people work on it by plan."""

    windows: Sequence[Weekly]
    name = "maintenance window"

    def rule(self, case: Case) -> Ruling:
        if not self.windows:
            return Ruling(self.name, True, "none is declared")
        inside = MaintenanceWindow(self.windows).rule(case)
        return Ruling(self.name, not inside.allows, inside.reason)


@dataclass(frozen=True)
class InsideMaintenance:
    """In a window alone. A target without windows is never inside of one."""

    windows: Sequence[Weekly]
    name = "maintenance window"

    def rule(self, case: Case) -> Ruling:
        if not self.windows:
            return Ruling(self.name, False, "none is declared, and the rule asks for one")
        return MaintenanceWindow(self.windows).rule(case)


@dataclass(frozen=True)
class HealthyPeers:
    """Enough of what stands beside it is healthy. `peers` None: it has none."""

    peers: Callable[[], Peers | None]
    least: int
    name = "healthy peers"

    def rule(self, case: Case) -> Ruling:
        found = self.peers()
        if found is None:
            return Ruling(self.name, self.least == 0, f"it has no peers; {self.least} must be healthy")
        return Ruling(
            self.name,
            found.healthy >= self.least,
            f"{found.healthy} of {found.total} {found.what}; {self.least} needed",
        )


@dataclass(frozen=True)
class TwoPersons:
    """Whoever approves is not who proposed, and is one of those who may. `who`: who approved; None: nobody."""

    who: str | None
    proposed_by: str
    approvers: Sequence[str]
    required: bool
    name = "second person"

    def rule(self, case: Case) -> Ruling:
        if self.who is None:
            return Ruling(self.name, not self.required, "nobody approved" if self.required else "none needed")
        if self.who == self.proposed_by:
            return Ruling(self.name, False, f"{self.who} proposed it and cannot approve it")
        if self.approvers and self.who not in self.approvers:
            return Ruling(self.name, False, f"{self.who} is not among those who may approve")
        return Ruling(self.name, True, f"{self.who} approved what {self.proposed_by} proposed")


@dataclass(frozen=True)
class ClocksAgree:
    """Every bound in time is void where the clock is wrong: ours must be the database's."""

    offset: Callable[[], timedelta]
    name = "clock"

    def rule(self, case: Case) -> Ruling:
        offset = abs(self.offset()) / timedelta(seconds=1)
        most = CLOCKS_APART / timedelta(seconds=1)
        return Ruling(self.name, offset <= most, f"{offset:.1f} s from the database's; {most:.0f} s are allowed")


@dataclass(frozen=True)
class Limits:
    """The count of all changes, and the percent of each kind. A single change is no share of anything."""

    max_changes: int
    max_percent: float
    name = "limits"

    def rule(self, case: Case) -> Ruling:
        plan = case.plan
        if len(plan.changes) > self.max_changes:
            return Ruling(self.name, False, f"{len(plan.changes)} changes planned, {self.max_changes} allowed")
        for kind in sorted(plan.population):
            limit = PercentLimit(self.max_percent, kind)
            if len(plan.of_kind(kind)) > 1 and not (ruling := limit.rule(case)).allows:
                return Ruling(self.name, False, f"{limit.name}: {ruling.reason}")
        return Ruling(self.name, True, f"{len(plan.changes)} changes planned, {self.max_changes} allowed")
