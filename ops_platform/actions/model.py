"""The nouns of an action: changes and the plan that holds them, rulings, outcomes, what was verified. Plain data."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from ops_platform.ledger import canonical


class Outcome(StrEnum):
    """What became of one change."""

    APPLIED = "applied"
    ALREADY_DONE = "already_done"
    CONTENDED = "contended"  # somebody else works on it, or it is not any more what was planned
    PINNED = "pinned"  # a lock of the store keeps it: no error, it goes when the lock ends
    MISSING = "missing"  # what should be changed does not exist
    REFUSED = "refused"  # not tried
    FAILED = "failed"


class Status(StrEnum):
    """How the whole ended."""

    NOTHING = "nothing to do"
    OBSERVED = "observed"
    REFUSED = "refused"  # by a guard: nothing was applied
    DONE = "done"  # and verified
    INCOMPLETE = "incomplete"  # something was left out; the next run takes it up
    FAILED = "failed"  # a change failed, or the look afterwards found something wrong
    UNVERIFIED = "unverified"  # applied, and nobody could look whether it holds


@dataclass(frozen=True)
class Change:
    """One step of a plan. `before` and `after` are JSON (None: it is not there); `kind` is what limits count by.

    Nothing in it may depend on the moment of planning: the same change must give the same digest tomorrow.
    """

    kind: str
    object: str
    before: Any
    after: Any
    reversible: bool
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "object": self.object,
            "before": self.before,
            "after": self.after,
            "reversible": self.reversible,
            "detail": dict(self.detail),
        }


@dataclass(frozen=True)
class Plan:
    """What would be changed, in this order.

    `digest` identifies it: SHA-256 of the canonical JSON of action, target and changes. Neither the time nor `population` (how many
    there are of each kind, for percentages) nor `facts` (what a person wants to know beside the changes) is part of it.
    """

    action: str
    target_id: str
    changes: tuple[Change, ...]
    created_at: datetime
    population: Mapping[str, int] = field(default_factory=dict[str, int])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def digest(self) -> str:
        changes = [change.as_json() for change in self.changes]
        text = canonical({"action": self.action, "target": self.target_id, "changes": changes})
        return hashlib.sha256(text.encode()).hexdigest()

    def of_kind(self, kind: str) -> list[Change]:
        return [change for change in self.changes if change.kind == kind]

    def as_json(self) -> dict[str, Any]:
        return {
            "action": self.action,
            "target": self.target_id,
            "digest": self.digest,
            "created_at": self.created_at.astimezone(UTC).isoformat(),
            "changes": [change.as_json() for change in self.changes],
            "population": dict(self.population),
            "facts": dict(self.facts),
        }


@dataclass(frozen=True)
class Case:
    """What a guard rules on. `approved`: the digest of the plan that somebody approved."""

    plan: Plan
    approved: str | None
    now: datetime


class Ruling(NamedTuple):
    """One guard's word. A tuple, since a tick may need a hundred thousand: a frozen dataclass takes twice as long to make."""

    guard: str
    allows: bool
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {"guard": self.guard, "allows": self.allows, "reason": self.reason}


class Guard(Protocol):
    """May refuse a plan. One that raises has refused: it could not find what it needs."""

    @property
    def name(self) -> str: ...

    def rule(self, case: Case) -> Ruling: ...


@dataclass(frozen=True)
class Applied:
    """What became of a change, and why, for people."""

    outcome: Outcome
    reason: str
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        return {"outcome": self.outcome.value, "reason": self.reason, "detail": dict(self.detail)}


@dataclass(frozen=True)
class Check:
    """One look at the system afterwards. `holds` None: it could not be looked at."""

    name: str
    holds: bool | None
    detail: str

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "holds": self.holds, "detail": self.detail}


@dataclass(frozen=True)
class Verification:
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool | None:
        """False where anything is wrong; None where something could not be looked at, or nothing was."""
        found = {check.holds for check in self.checks}
        if False in found:
            return False
        return None if None in found or not found else True

    def as_json(self) -> dict[str, Any]:
        return {"holds": self.holds, "checks": [check.as_json() for check in self.checks]}


class Action(Protocol):
    """Something that changes a live system. `run_action` calls its methods in this order, on one object."""

    @property
    def name(self) -> str:
        """Such as `backup.expire`."""
        ...

    @property
    def target_id(self) -> str: ...

    def plan(self) -> Plan:
        """Look, and say what would be done. Changes nothing, and raises where it cannot look."""
        ...

    def check(self, change: Change) -> Applied | None:
        """Right before `apply`: whether the change is still wanted and safe. None: go ahead."""
        ...

    def apply(self, change: Change) -> Applied:
        """Idempotent: what a killed run began is finished by the next."""
        ...

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """Look again, by another way than the one that wrote. `outcomes` by the object of each change."""
        ...


@dataclass(frozen=True)
class ActionResult:
    """All that happened. `recorded`: the ledger's entries; `unrecorded`: why something does not stand there."""

    run_id: str
    actor: str
    plan: Plan
    rulings: tuple[Ruling, ...]
    status: Status
    outcomes: tuple[tuple[Change, Applied], ...] = ()
    verification: Verification | None = None
    recorded: tuple[int, ...] = ()
    unrecorded: str | None = None

    @property
    def ok(self) -> bool:
        return self.status in (Status.NOTHING, Status.OBSERVED, Status.DONE) and self.unrecorded is None

    @property
    def refusals(self) -> list[Ruling]:
        """Why nothing was applied, or would not be if it were not for observing."""
        return [ruling for ruling in self.rulings if not ruling.allows and ruling.guard != "mode"]

    @property
    def counts(self) -> dict[str, int]:
        """Changes by outcome."""
        return dict(Counter(applied.outcome.value for _, applied in self.outcomes))

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "actor": self.actor,
            "status": self.status.value,
            "ok": self.ok,
            "plan": self.plan.as_json(),
            "rulings": [ruling.as_json() for ruling in self.rulings],
            "outcomes": [{"object": change.object, **applied.as_json()} for change, applied in self.outcomes],
            "verification": self.verification.as_json() if self.verification else None,
            "ledger": list(self.recorded),
            "unrecorded": self.unrecorded,
        }
