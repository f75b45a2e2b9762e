"""How a drill begins: what it would do as a plan with a digest, every guard's word, the approval, the claim. Then it is the engine's.

The beginning is an action like any other (`actions.run_action`): observed by default, refused by any guard, recorded in any case.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from ops_platform.actions import (
    ActionResult,
    Applied,
    Approval,
    Case,
    Change,
    Check,
    Guard,
    ModeGuard,
    Outcome,
    Plan,
    Ruling,
    Verification,
    run_action,
)
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.drills import guards as g
from ops_platform.drills.engine import Engine
from ops_platform.drills.loader import runbook_named, runbooks
from ops_platform.drills.model import Checked, Drill, DrillState
from ops_platform.drills.registry import doing
from ops_platform.drills.runbook import Runbook, filled_in
from ops_platform.drills.scorecard import spent
from ops_platform.drills.store import Store
from ops_platform.drills.workspace import drills_of
from ops_platform.errors import OpsError, UsageError
from ops_platform.inventory.base import Mode
from ops_platform.inventory.drills import PlannedDrill
from ops_platform.inventory.loader import in_our_words
from ops_platform.ledger import canonical
from ops_platform.remediation import store as incidents
from ops_platform.remediation.guards import ClocksAgree, NoFreeze, NotPaused, TwoPersons

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Target
    from ops_platform.inventory.systems import AnySystem


@dataclass(frozen=True)
class Request:
    """What is to be held. `plan` None: a recovery in earnest, which no drill of the inventory stands for."""

    book: Runbook
    subject: Target | AnySystem
    mode: Literal["drill", "real"]
    parameters: Mapping[str, Any]
    objectives: Mapping[str, float]
    plan: PlannedDrill | None
    operator: str
    trigger: str
    production: bool

    @property
    def domain(self) -> str:
        return self.subject.failure_domain or self.subject.id


@dataclass(frozen=True)
class Begun:
    """What became of it. `drill` None: nothing was begun, and the result says why."""

    result: ActionResult
    drill: Drill | None = None
    left: list[str] = field(default_factory=list[str])


def planned(
    access: Access,
    plan_id: str,
    subject_id: str | None,
    parameters: Mapping[str, Any],
    *,
    operator: str,
    trigger: str,
) -> Request:
    """A drill of the inventory. Raises UsageError for one that is not there, and for parameters that it does not take."""
    drills = drills_of(access)
    plan = next((p for p in drills.plan if p.id == plan_id), None)
    if plan is None:
        known = ", ".join(p.id for p in drills.plan) or "none"
        raise UsageError(
            f"there is no drill {plan_id!r} in the inventory", remedy=f"declared under drills.plan: {known}"
        )
    if subject_id is None and len(plan.targets) > 1:
        raise UsageError(f"{plan_id} is for several targets", remedy=f"name one of {', '.join(plan.targets)}")
    subject = access.inventory.subject(subject_id or plan.targets[0])
    book = runbook_named(access, plan.runbook)
    values = _parameters(book, {**plan.parameters, **parameters})
    promised = _promised(subject)
    own = {"rto": plan.objectives.rto, "rpo": plan.objectives.rpo}
    promised |= {name: value.total_seconds() for name, value in own.items() if value is not None}
    return _checked(
        Request(book, subject, "drill", values, promised, plan, operator, trigger, _production(access, subject))
    )


def check_plans(access: Access) -> int:
    """Every runbook, and every declared drill on each of its targets; how many drills there are. Raises OpsError for what is wrong.

    A parameter that is only given when the drill is held is looked at then.
    """
    drills = access.inventory.drills
    if drills is None:
        return 0
    runbooks(access)
    for plan in drills.plan:
        for subject in plan.targets:
            try:
                if not _waits_for_a_parameter(runbook_named(access, plan.runbook), plan.parameters):
                    planned(access, plan.id, subject, {}, operator="", trigger="")
            except UsageError as error:
                where = f"drills.plan: {plan.id}" + (f": {error.where}" if error.where else "")
                raise UsageError(error.what, where=where, remedy=error.remedy) from None
    return len(drills.plan)


def _waits_for_a_parameter(book: Runbook, given: Mapping[str, Any]) -> bool:
    return any(parameter.default is None and name not in given for name, parameter in book.parameters.items())


def in_earnest(
    access: Access, runbook: str, subject_id: str, parameters: Mapping[str, Any], *, operator: str
) -> Request:
    """A recovery. Raises UsageError."""
    subject, book = access.inventory.subject(subject_id), runbook_named(access, runbook)
    values = _parameters(book, parameters)
    production = _production(access, subject)
    return _checked(
        Request(book, subject, "real", values, _promised(subject), None, operator, "in earnest", production)
    )


def _production(access: Access, subject: Target | AnySystem) -> bool:
    return access.inventory.environments[subject.environment].production


def _promised(subject: Target | AnySystem) -> dict[str, float]:
    promised = getattr(subject, "objectives", None)
    if promised is None:
        return {}
    return {"rto": promised.rto.total_seconds(), "rpo": promised.rpo.total_seconds()}


def _parameters(book: Runbook, given: Mapping[str, Any]) -> dict[str, Any]:
    known = ", ".join(sorted(book.parameters)) or "none"
    if unknown := sorted(given.keys() - book.parameters.keys()):
        raise UsageError(f"the runbook {book.id} has no parameter {unknown[0]!r}", remedy=f"its parameters: {known}")
    values = {name: given.get(name, parameter.default) for name, parameter in book.parameters.items()}
    if lacking := [name for name, value in values.items() if value is None]:
        raise UsageError(f"the parameter {lacking[0]!r} has to be given", where=f"runbook {book.id}")
    return values


def _checked(request: Request) -> Request:
    """With the parameters in their places every step must still be given what it takes."""
    book, subject = request.book, request.subject
    if subject.kind not in book.kinds:
        raise UsageError(
            f"the runbook {book.id} is for {', '.join(book.kinds)}, and {subject.id} is of kind {subject.kind}"
        )
    for step in book.steps_for(request.mode):
        try:
            doing(step.does).given.model_validate(filled_in(step.with_, dict(request.parameters)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"{where}: {in_our_words(first)}", where=f"runbook {book.id}, step {step.id}") from None
    return request


class _Beginning:
    """The action: one change, which is the drill with all that its steps would do."""

    name = "drill.begin"

    def __init__(self, request: Request, store: Store, clock: Clock) -> None:
        self.request, self.store, self.clock = request, store, clock
        self.drill: Drill | None = None

    @property
    def target_id(self) -> str:
        return self.request.subject.id

    def plan(self) -> Plan:
        request = self.request
        after = {
            "runbook_sha256": _digest(request.book),
            "mode": request.mode,
            "scenario": request.book.scenario,
            "parameters": dict(request.parameters),
            "steps": [_told(step, request) for step in request.book.steps_for(request.mode)],
        }
        change = Change("drill", f"{request.book.id} on {self.target_id}", None, after, reversible=True)
        return Plan(
            self.name, self.target_id, (change,), self.clock.now(),
            facts={"objectives": dict(request.objectives), "expected_unavailability": request.book.unavailable.total_seconds()},
        )  # fmt: skip

    def check(self, change: Change) -> Applied | None:
        return None

    def apply(self, change: Change) -> Applied:
        """It was begun with the claim, in one transaction: there is no moment in which one stands without the other."""
        assert self.drill is not None  # noqa: S101 - admitted before it is applied
        return Applied(Outcome.APPLIED, f"drill {self.drill.id} began", {"drill": self.drill.id})

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        assert self.drill is not None  # noqa: S101
        found = self.store.get(self.drill.id)
        begun = found.state is DrillState.RUNNING
        return Verification((Check("the drill stands in the platform's database", begun, found.state.value),))


def _told(step: Any, request: Request) -> dict[str, Any]:
    """What a person reads of a step before it is approved."""
    found = doing(step.does)
    given = found.given.model_validate(filled_in(step.with_, dict(request.parameters)))
    return {
        "step": step.id,
        "kind": step.kind,
        "does": step.does,
        "changes": found.changes(given) if found.changes else None,
        "with": filled_in(step.with_, dict(request.parameters)),
    }


def _digest(book: Runbook) -> str:
    return hashlib.sha256(canonical(book.model_dump(mode="json", by_alias=True)).encode()).hexdigest()


class Beginner:
    """Begins drills, or says why not."""

    def __init__(self, access: Access, store: Store, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.access, self.store, self.clock = access, store, clock

    def plan(self, request: Request) -> ActionResult:
        """What would be done, with every guard's word. Nothing is begun."""
        action = _Beginning(request, self.store, self.clock)
        guards = [ModeGuard(Mode.OBSERVE, "this is only the plan"), *self.guards(request, action.plan().digest)[1:]]
        return run_action(action, ledger=None, guards=guards, actor=request.operator, clock=self.clock)

    def begin(self, request: Request) -> Begun:
        """End what dead drills have left, rule, claim, begin."""
        left = self._swept(request)
        action = _Beginning(request, self.store, self.clock)
        digest = action.plan().digest
        approved = self.store.approvals(digest)

        def admit(case: Case) -> Sequence[Ruling]:
            action.drill = self._new(request, case.plan.digest, approved[-1].who if approved else None)
            steps = [step.id for step in request.book.steps_for(request.mode)]
            return self.store.admit(
                action.drill, steps, lambda others: [g.overlap(request.subject.id, request.domain, others)]
            )

        result = run_action(
            action, ledger=self.store.ledger, guards=self.guards(request, digest),
            approve_digest=digest if approved else None, actor=request.operator, clock=self.clock, admit=admit,
        )  # fmt: skip
        begun = any(applied.outcome is Outcome.APPLIED for _, applied in result.outcomes)
        return Begun(result, action.drill if begun else None, left)

    def _swept(self, request: Request) -> list[str]:
        """What dead drills left on this target goes first. One that cannot be ended refuses by itself: it still holds the target."""
        engine = Engine(self.access, self.store, request.operator, clock=self.clock)
        try:
            return [drill.id for drill in engine.sweep()]
        except OpsError:
            return []

    def _new(self, request: Request, digest: str, approved_by: str | None) -> Drill:
        now, book = self.clock.now(), request.book
        body = book.model_dump(mode="json", by_alias=True)
        objectives = dict(request.objectives)
        if request.plan is not None:
            objectives["unavailable"] = request.plan.unavailability.most.total_seconds() - self._used(request)
        return Drill(
            f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}", request.plan.id if request.plan else "", book.id, body,
            _digest(book), request.subject.id, request.domain, request.subject.environment, book.scenario, request.mode,
            dict(request.parameters), objectives, request.operator, request.trigger, approved_by, digest,
            DrillState.RUNNING, now, now,
        )  # fmt: skip

    def _used(self, request: Request) -> float:
        assert request.plan is not None  # noqa: S101
        per = request.plan.unavailability.per
        return sum(seconds for _, seconds in spent(self.store, request.subject.id, self.clock.now() - per))

    # Guards

    def guards(self, request: Request, digest: str) -> list[Guard]:
        """The mode first. In earnest nothing waits for business hours, and an open incident is why it is done."""
        whole, approvals = drills_of(self.access), self.store.approvals(digest)
        injects = any(step.kind == "inject" for step in request.book.steps_for(request.mode))
        fires = incidents.Store(self.store.ledger, clock=self.clock)
        always: list[Guard] = [
            g.RightMode(request.mode, request.book.modes, injects),
            ClocksAgree(fires.clock_offset),
            g.Preflight(lambda: self.preflight(request)),
        ]
        if request.plan is None:
            who = next((a.who for a in reversed(approvals) if whole.recover_alone or a.who != request.operator), None)
            who = who or (approvals[-1].who if approvals else None)
            proposer = "" if whole.recover_alone else request.operator
            mode = ModeGuard(Mode.ENFORCE, "a recovery that was asked for")
            return [
                mode,
                *always,
                Approval(True, "a recovery in earnest"),
                TwoPersons(who, proposer, whole.approvers, True),
            ]
        plan = request.plan
        asked = plan.approval == "always" or (plan.approval == "production" and request.production)
        who = next((a.who for a in reversed(approvals) if a.who != request.operator), None)
        who = who or (approvals[-1].who if approvals else None)
        freezes = self.access.inventory.remediation.freezes if self.access.inventory.remediation else []
        since = self.clock.now() - plan.unavailability.per
        return [
            ModeGuard(plan.mode, f"the drill {plan.id}"),
            *always,
            g.ForThisTarget(request.subject.id, plan.targets),
            g.NotInProduction(request.subject.environment, request.production, plan.production),
            NotPaused(fires.paused),
            g.OutsideBusinessHours(whole.business_hours),
            NoFreeze(freezes, request.subject.environment),
            g.NoOpenIncident(fires.list, self._same_domain(request)),
            g.WithinBudget(
                plan.unavailability, request.book.unavailable, lambda: spent(self.store, request.subject.id, since)
            ),
            Approval(asked, f"{request.subject.environment} is production" if request.production else "the drill asks for it"),
            TwoPersons(who, request.operator, whole.approvers, asked),
        ]  # fmt: skip

    def _same_domain(self, request: Request) -> frozenset[str]:
        everything = [*self.access.inventory.targets, *self.access.inventory.systems]
        return frozenset(one.id for one in everything if (one.failure_domain or one.id) == request.domain)

    def preflight(self, request: Request) -> dict[str, Sequence[Checked]]:
        """The runbook's own looks, before anything begins."""
        held = self._hypothetical(request)
        engine = Engine(self.access, self.store, request.operator, clock=self.clock)
        found: dict[str, Sequence[Checked]] = {}
        for step in request.book.steps_for(request.mode):
            if step.kind != "check" or not step.preflight:
                continue
            what = doing(step.does)
            given = what.given.model_validate(filled_in(step.with_, dict(request.parameters)))
            found[step.id] = what.run(engine.context(held, step, {}), given).checks
        return found

    def _hypothetical(self, request: Request) -> Drill:
        """For looks alone: it stands nowhere, so nothing can be registered for it."""
        now = self.clock.now()
        return Drill(
            "preflight", request.plan.id if request.plan else "", request.book.id, {}, "", request.subject.id, request.domain,
            request.subject.environment, request.book.scenario, request.mode, dict(request.parameters), {},
            request.operator, request.trigger, None, "", DrillState.RUNNING, now, now, version=0,
        )  # fmt: skip
