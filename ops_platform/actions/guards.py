"""What may refuse a plan. Each looks at one thing and says why; none knows of the others.

A guard that cannot find what it needs refuses. None of them ever stands in the way of a preview: the plan and every ruling are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import cast
from zoneinfo import ZoneInfo

from ops_platform.actions.model import Case, Guard, Ruling
from ops_platform.inventory.model import Mode, Weekly

MODE = "mode"
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WEEK = timedelta(days=7)


@dataclass(frozen=True)
class ModeGuard:
    """Observe is the default; enforcing is a decision that somebody wrote down."""

    mode: Mode
    decided_by: str = "the inventory"
    name = MODE

    def rule(self, case: Case) -> Ruling:
        return Ruling(self.name, self.mode is Mode.ENFORCE, f"{self.decided_by} says {self.mode.value}")


@dataclass(frozen=True)
class CountLimit:
    """At most so many changes of one kind in one run. More refuse the whole plan: half of a wrong plan is wrong too."""

    most: int
    kind: str

    @property
    def name(self) -> str:
        return f"count of {self.kind}"

    def rule(self, case: Case) -> Ruling:
        count = len(case.plan.of_kind(self.kind))
        return Ruling(self.name, count <= self.most, f"{count} planned, {self.most} allowed")


@dataclass(frozen=True)
class PercentLimit:
    """At most this share of all that there are of one kind."""

    most: float
    kind: str

    @property
    def name(self) -> str:
        return f"share of {self.kind}"

    def rule(self, case: Case) -> Ruling:
        count, of = len(case.plan.of_kind(self.kind)), case.plan.population.get(self.kind)
        if count == 0:
            return Ruling(self.name, True, "none planned")
        if not of:
            return Ruling(self.name, False, f"{count} planned, and the plan does not say of how many")
        share = 100 * count / of
        return Ruling(self.name, share <= self.most, f"{count} of {of} planned, {share:.1f}%; {self.most:g}% allowed")


@dataclass(frozen=True)
class LegalHold:
    held: bool
    name = "legal hold"

    def rule(self, case: Case) -> Ruling:
        held = f"a legal hold lies on {case.plan.target_id}" if self.held else "no legal hold"
        return Ruling(self.name, not self.held, held)


@dataclass(frozen=True)
class Approval:
    """Somebody approved exactly this plan. An approval of another plan refuses even where none is needed."""

    required: bool
    why: str = ""
    name = "approval"

    def rule(self, case: Case) -> Ruling:
        if case.approved is None and not self.required:
            return Ruling(self.name, True, "none needed")
        digest = case.plan.digest
        if case.approved == digest:
            return Ruling(self.name, True, f"the plan {digest[:12]} is approved")
        if case.approved is not None:
            return Ruling(
                self.name, False, f"approved was the plan {case.approved[:12]}, and now it is {digest[:12]}: look again"
            )
        return Ruling(
            self.name, False, f"the plan {digest[:12]} needs approval" + (f": {self.why}" if self.why else "")
        )


@dataclass(frozen=True)
class MaintenanceWindow:
    """Only inside of one of the windows. A target without windows has no such restriction."""

    windows: Sequence[Weekly]
    name = "maintenance window"

    def rule(self, case: Case) -> Ruling:
        if not self.windows:
            return Ruling(self.name, True, "none is declared")
        for window in self.windows:
            for begin, end in openings(window, case.now):
                if begin <= case.now < end:
                    return Ruling(self.name, True, f"open until {end:%Y-%m-%d %H:%M} UTC")
        coming = next_opening(self.windows, case.now)
        return Ruling(self.name, False, f"closed until {coming:%Y-%m-%d %H:%M} UTC" if coming else "it never opens")


def openings(window: Weekly, around: datetime) -> Iterable[tuple[datetime, datetime]]:
    """The window's openings from those that may still be open at `around` to a week later, as moments in UTC.

    The start is local time, so it moves with daylight saving; the length is real time. A start that the clocks skip is when it
    would have been by the clock before; one that they repeat is the first.
    """
    zone = ZoneInfo(window.timezone)
    hour, minute = (int(part) for part in window.start.split(":"))
    here = around.astimezone(zone).date()
    first = here - timedelta(days=window.length.days + 2)
    for number in range((here - first).days + 9):
        day = first + timedelta(days=number)
        if _DAYS[day.weekday()] in window.days:
            begin = datetime.combine(day, time(hour, minute), tzinfo=zone).astimezone(UTC)
            yield begin, begin + window.length


def next_opening(windows: Sequence[Weekly], now: datetime) -> datetime | None:
    """When the next window opens after `now`; None where none ever does."""
    coming = [begin for window in windows for begin, end in openings(window, now) if begin > now and end > begin]
    return min(coming, default=None)


def rule_all(guards: Sequence[Guard], case: Case) -> tuple[Ruling, ...]:
    """Every guard's ruling: also after the first refusal, because a person wants to see all of them."""
    return tuple([_rule(guard, case) for guard in guards])


def _rule(guard: Guard, case: Case) -> Ruling:
    try:
        found = cast("object", guard.rule(case))
        name = guard.name
    except Exception as error:  # noqa: BLE001 - whatever it is: a guard that cannot decide refuses
        return Ruling(_name_of(guard), False, f"it could not decide: {type(error).__name__}: {error}")
    if not isinstance(found, Ruling) or (found.allows is not True and found.allows is not False):
        return Ruling(name, False, "it could not decide: it gave no ruling")
    return found if found.guard == name else Ruling(name, found.allows, found.reason)


def _name_of(guard: Guard) -> str:
    try:
        return str(guard.name)
    except Exception:  # noqa: BLE001
        return type(guard).__name__
