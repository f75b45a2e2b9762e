"""plan -> guards -> apply -> verify -> record: the order in which every action runs, whatever it changes.

Three entries stand in the ledger for a run that changes something: `action.plan` with the rulings before anything is touched,
`action.outcome` for each change, `action.verification` at the end. A run that was killed shows as a plan without an end, and the
next run takes it up from what it finds.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ops_platform.actions.guards import MODE, Approval, ModeGuard, rule_all
from ops_platform.actions.model import (
    Action,
    ActionResult,
    Applied,
    Case,
    Change,
    Check,
    Guard,
    Outcome,
    Plan,
    Ruling,
    Status,
    Verification,
)
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import OpsError, RefusedError, UnreachableError
from ops_platform.inventory.model import Mode
from ops_platform.ledger import Ledger

PLANNED, OUTCOME, VERIFIED = "action.plan", "action.outcome", "action.verification"
_LEFT_OUT = {Outcome.CONTENDED, Outcome.REFUSED, Outcome.MISSING}


def run_action(
    action: Action,
    *,
    ledger: Ledger | None,
    guards: Sequence[Guard],
    approve_digest: str | None = None,
    actor: str,
    clock: Clock = SYSTEM_CLOCK,
    admit: Callable[[Case], Sequence[Ruling]] | None = None,
) -> ActionResult:
    """Run it. Without a mode guard it observes. `ledger` may be None only where nothing is applied.

    `admit` is asked last, when every guard allows and something would be applied: it claims what is scarce (a budget, a cooldown)
    and may refuse, too. Raises what planning raises; and, with nothing applied, whatever keeps the plan from being recorded.
    """
    plan = action.plan()
    case = Case(plan, approve_digest, clock.now())
    rulings = rule_all(_complete(guards, approve_digest), case)
    result = ActionResult(secrets.token_hex(8), actor, plan, rulings, Status.NOTHING)
    if not plan.changes:
        return _record_quietly(ledger, result)
    if any(ruling.guard == MODE and not ruling.allows for ruling in rulings):
        return _record_quietly(ledger, replace(result, status=Status.OBSERVED))
    if not all(ruling.allows for ruling in rulings):
        return _record_quietly(ledger, replace(result, status=Status.REFUSED))
    if ledger is None:
        raise RefusedError(
            f"{plan.action} changes something, and there is no ledger to record it",
            where=plan.target_id,
            remedy="declare platform.database in the inventory",
        )
    if admit is not None:
        claimed = tuple(admit(case))
        result = replace(result, rulings=rulings + claimed)
        if not claimed or not all(ruling.allows is True for ruling in claimed):
            return _record_quietly(ledger, replace(result, status=Status.REFUSED))
    return _Run(action, ledger, result).go()


def _complete(guards: Sequence[Guard], approve_digest: str | None) -> list[Guard]:
    """Without a mode guard an action observes; an approval that was given always counts."""
    complete = list(guards)
    if not any(isinstance(guard, ModeGuard) for guard in guards):
        complete.insert(0, ModeGuard(Mode.OBSERVE, "no mode was given: the default"))
    if approve_digest is not None and not any(isinstance(guard, Approval) for guard in guards):
        complete.append(Approval(required=False))
    return complete


def _plan_entry(result: ActionResult, verdict: str) -> dict[str, Any]:
    return {
        "run": result.run_id,
        "plan": result.plan.as_json(),
        "rulings": [ruling.as_json() for ruling in result.rulings],
        "verdict": verdict,
    }


def _record_quietly(ledger: Ledger | None, result: ActionResult) -> ActionResult:
    """Nothing is applied: a ledger that is away does not take the preview from whoever asked for it, but it is said."""
    if ledger is None:
        return result
    try:
        body = _plan_entry(result, result.status.value)
        entry = ledger.append(PLANNED, result.plan.target_id, body, actor=result.actor)
    except OpsError as error:
        return replace(result, unrecorded=str(error))
    return replace(result, recorded=(entry.seq,))


class _Run:
    """One run that applies."""

    def __init__(self, action: Action, ledger: Ledger, result: ActionResult) -> None:
        self._action, self._ledger, self._result = action, ledger, result
        self._plan: Plan = result.plan
        self._recorded: list[int] = []
        self._outcomes: list[tuple[Change, Applied]] = []
        self._unrecorded: str | None = None

    def go(self) -> ActionResult:
        self._write(PLANNED, _plan_entry(self._result, "apply"))
        with self._ledger.claim(f"{self._plan.action}/{self._plan.target_id}") as ours:
            if ours:
                self._apply_all()
                verification = self._verify()
                status = self._status(verification)
            else:
                self._skip(self._plan.changes, Outcome.CONTENDED, "another run of this action works on this target")
                verification, status = None, Status.INCOMPLETE
        ending = {"run": self._result.run_id, "digest": self._plan.digest, "status": status.value}
        with self._at_the_end():
            self._write(VERIFIED, ending | {"verification": verification.as_json() if verification else None})
        return replace(
            self._result,
            status=status,
            outcomes=tuple(self._outcomes),
            verification=verification,
            recorded=tuple(self._recorded),
            unrecorded=self._unrecorded,
        )

    def _apply_all(self) -> None:
        for number, change in enumerate(self._plan.changes):
            rest = self._plan.changes[number + 1 :]
            try:
                applied, away = self._apply(change), False
            except UnreachableError as error:
                applied, away = Applied(Outcome.FAILED, error.line), True
            except OpsError as error:
                applied, away = Applied(Outcome.FAILED, error.line), False
            except Exception as error:
                # A mistake of ours: what was begun is put down, and nothing more is touched.
                self._note(change, Applied(Outcome.FAILED, f"unexpected {type(error).__name__}: {error}"))
                raise
            if not self._note(change, applied):
                return self._skip(rest, Outcome.REFUSED, "not tried: the ledger could not be written")
            if away:
                return self._skip(rest, Outcome.REFUSED, "not tried: the change before it got no answer")
        return None

    def _apply(self, change: Change) -> Applied:
        return self._action.check(change) or self._action.apply(change)

    def _note(self, change: Change, applied: Applied) -> bool:
        """Whether the ledger has it."""
        self._outcomes.append((change, applied))
        body = {"run": self._result.run_id, "digest": self._plan.digest, "object": change.object, "kind": change.kind}
        with self._at_the_end():
            self._write(OUTCOME, body | applied.as_json())
        return self._unrecorded is None

    def _skip(self, changes: Sequence[Change], outcome: Outcome, why: str) -> None:
        """Left alone: in the result each, in the ledger as one entry."""
        self._outcomes.extend((change, Applied(outcome, why)) for change in changes)
        if changes and self._unrecorded is None:
            body = {"run": self._result.run_id, "digest": self._plan.digest, "outcome": outcome.value, "reason": why}
            with self._at_the_end():
                self._write(OUTCOME, body | {"objects": [change.object for change in changes]})

    def _verify(self) -> Verification:
        outcomes: Mapping[str, Applied] = {change.object: applied for change, applied in self._outcomes}
        try:
            return self._action.verify(self._plan, outcomes)
        except OpsError as error:
            return Verification((Check("verification", None, error.line),))

    def _status(self, verification: Verification) -> Status:
        found = {applied.outcome for _, applied in self._outcomes}
        if Outcome.FAILED in found or verification.holds is False:
            return Status.FAILED
        if verification.holds is None:
            return Status.UNVERIFIED
        return Status.INCOMPLETE if found & _LEFT_OUT else Status.DONE

    def _write(self, kind: str, body: Mapping[str, Any]) -> None:
        self._recorded.append(self._ledger.append(kind, self._plan.target_id, body, actor=self._result.actor).seq)

    @contextlib.contextmanager
    def _at_the_end(self) -> Generator[None]:
        """What was applied cannot be taken back because the ledger is away: it is said instead, and nothing more is applied."""
        try:
            yield
        except OpsError as error:
            self._unrecorded = self._unrecorded or str(error)
