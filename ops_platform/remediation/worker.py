"""What a run does with one incident: look, plan, guards, approval, apply, verify, undo, escalate.

Each step ends in a state that is written with its record, so that a run may be killed anywhere: the next one takes the incident over
and goes on from there, or gives up by the rules below. Only one run works on an incident, and whoever is late holds an old version and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from ops_platform.actions import (
    Action,
    ActionResult,
    Applied,
    Approval,
    Case,
    Change,
    Guard,
    LegalHold,
    ModeGuard,
    Outcome,
    Plan,
    Ruling,
    Status,
    run_action,
)
from ops_platform.clients.prometheus import Measured
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import NotOurTurnError, OpsError, RefusedError
from ops_platform.inventory.base import Mode
from ops_platform.inventory.remediation import MetricCheck, Rule
from ops_platform.remediation import guards as g
from ops_platform.remediation.claims import Claim, rule_on
from ops_platform.remediation.fence import Fenced, Rest
from ops_platform.remediation.machine import TOUCHED
from ops_platform.remediation.model import Ending, Incident, Signal, State
from ops_platform.remediation.playbook import Context, Done
from ops_platform.remediation.rules import (
    Decision,
    Unresolved,
    bounds,
    failure_domain,
    needs_approval,
    remediation_of,
    resolve,
    rule_named,
)
from ops_platform.remediation.store import Store
from ops_platform.tracing import Traces, traces_of

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

_SOONEST, _LATEST = timedelta(seconds=30), timedelta(minutes=15)
# A step's name in a trace.
_SPANS = {
    State.OPEN: "look", State.SUPPRESSED: "look", State.WAITING: "look", State.APPLYING: "resume", State.VERIFYING: "verify",
    State.UNDOING: "undo",
}  # fmt: skip
_PEOPLE = {"approval", "second person"}  # what a person can let through


class Eyes(Protocol):
    """How the worker sees the outside. Each raises OpsError where it cannot look."""

    def look(self, incident: Incident) -> Signal | None:
        """The signal as its source has it now; None where it has ended."""
        ...

    def measure(self, check: MetricCheck, incident: Incident) -> tuple[Measured, str]: ...


@dataclass
class Worker:
    """Works on the incidents of one platform. `actor`: the run or person, for the ledger."""

    access: Access
    store: Store
    eyes: Eyes
    actor: str
    clock: Clock = SYSTEM_CLOCK
    traces: Traces = field(default_factory=Traces, init=False)

    def work(self, incident_id: str, version: int | None = None) -> Incident:
        """Bring it as far as it goes now. Raises NotOurTurnError where somebody else works on it, or went on since `version`."""
        with self.store.work_on(incident_id) as ours:
            if not ours:
                raise NotOurTurnError("another run works on this incident", where=incident_id)
            incident = self.store.get(incident_id)
            if version is not None and incident.version != version:
                raise NotOurTurnError(
                    f"this run is late: it was asked for at version {version}, and the incident is at {incident.version}",
                    where=incident_id,
                )
            if incident.state in TOUCHED and incident.state is not State.HELD:
                incident = self.store.take_over(incident, actor=self.actor)
            with traces_of(self.access, incident.id, self.clock) as self.traces:
                try:
                    return self._traced(incident)
                except OpsError:
                    raise
                except Exception as error:
                    self._give_up(incident_id, error)
                    raise

    def _traced(self, incident: Incident) -> Incident:
        """`_go_on`, and the whole trace once the incident is over for us."""
        done = self._go_on(incident)
        if done.version != incident.version and done.state in (State.CLOSED, State.ESCALATED):
            ending = done.ending.value if done.ending else done.state.value
            self.traces.whole(
                done.signal.starts_at,
                done.updated_at,
                incident=done.id,
                rule=done.rule,
                playbook=done.playbook,
                ending=ending,
            )
        return done

    def _give_up(self, incident_id: str, error: Exception) -> None:
        """A mistake of ours in the middle of a change is not made again and again by the runs that follow: people have it."""
        incident = self.store.get(incident_id)
        if incident.state in TOUCHED:
            self._escalate(incident, f"unexpected {type(error).__name__}: {error}", helped=False)

    def _go_on(self, incident: Incident) -> Incident:
        """Step by step, until it rests."""
        while True:
            before = (incident.state, incident.version)
            incident = self._step(incident)
            if (incident.state, incident.version) == before:
                return incident

    def _step(self, incident: Incident) -> Incident:
        steps: Mapping[State, Callable[[Incident, Decision], Incident]] = {
            State.OPEN: self._consider,
            State.SUPPRESSED: self._consider,
            State.WAITING: self._consider,
            State.APPLYING: self._resume,
            State.VERIFYING: self._verify,
            State.UNDOING: self._undo,
        }
        if incident.state is State.HELD and incident.undo_at is not None and self.clock.now() >= incident.undo_at:
            return self._move(incident, State.UNDOING, "it was meant for a time, and the time is over")
        early = incident.state is State.SUPPRESSED and incident.retry_at and self.clock.now() < incident.retry_at
        if early or incident.state not in steps:
            return incident
        with self.traces.span(_SPANS[incident.state], attempts=incident.attempts) as note:
            moved = self._guarded(incident, steps[incident.state])
            note("state", moved.state.value)
            return moved

    def _guarded(self, incident: Incident, step: Callable[[Incident, Decision], Incident]) -> Incident:
        """A step with its rule and playbook; where these cannot be found any more, people have to look."""
        try:
            decision = resolve(self.access.inventory, rule_named(self.access.inventory, incident.rule), incident.signal)
        except OpsError as error:
            return self._escalate(incident, error.line)
        if isinstance(decision, Unresolved):
            return self._escalate(incident, decision.problem)
        now_named = (decision.playbook.name, decision.subject.id)
        if now_named != (incident.playbook, incident.subject):
            # Another playbook's undo knows nothing of what was applied, and what was approved was this one.
            return self._escalate(
                incident,
                f"the rule names {decision.playbook.name} on {decision.subject.id} by now: it was opened for {incident.playbook} on"
                f" {incident.subject}",
            )
        return step(incident, decision)

    # Looking

    def _consider(self, incident: Incident, decision: Decision) -> Incident:
        now, rule = self.clock.now(), decision.rule
        try:
            signal = self.eyes.look(incident)
        except OpsError as error:
            return self._put_off(incident, [Ruling("signal", False, f"its source cannot be asked: {error.line}")])
        if signal is None or signal.ends_at is not None:
            ended = signal.ends_at if signal and signal.ends_at else now
            return self.store.end_signal(incident, ended, actor=self.actor)
        if now - began(incident) >= rule.give_up_after:
            return self._escalate(incident, f"not solved within {rule.give_up_after}: {incident.reason}")
        approval = None
        if incident.state is State.WAITING:
            approval = self.store.decision(incident)
            if approval is not None and approval.decision == "refuse":
                return self.store.close(incident, Ending.REFUSED, f"refused by {approval.who}", actor=approval.who)
        return self._plan_and_apply(
            incident,
            decision,
            approved=approval.digest if approval else None,
            approver=approval.who if approval else None,
        )

    def _plan_and_apply(
        self, incident: Incident, decision: Decision, *, approved: str | None, approver: str | None
    ) -> Incident:
        try:
            action = Fenced(decision.playbook.action(self.context(incident, decision)), self, incident)
            rulings = self.guards(incident, decision, approver)
        except OpsError as error:
            return self._put_off(incident, [Ruling("plan", False, error.line)])
        try:
            result = run_action(
                action, ledger=self.store.ledger, guards=rulings, approve_digest=approved, actor=self.actor,
                clock=self.clock, admit=lambda case: self._admit(action, decision, case, rulings),
            )  # fmt: skip
        except RefusedError as error:
            return self._put_off(incident, [Ruling("precondition", False, error.line)])
        except OpsError as error:
            if action.incident.state is State.APPLYING:
                return self._after_failure(action.incident, decision, error.line)
            return self._put_off(incident, [Ruling("plan", False, error.line)])
        if action.incident.state is not State.APPLYING:
            return self._not_applied(incident, decision, result)
        return self._applied(action.incident, decision, result)

    def _not_applied(self, incident: Incident, decision: Decision, result: ActionResult) -> Incident:
        plan, rulings = _plan_fields(result), [ruling.as_json() for ruling in result.rulings]
        if result.status is Status.NOTHING:
            if incident.signal.is_event:
                return self.store.close(incident, Ending.CLEARED, "there was nothing to do", actor=self.actor)
            return self._put_off(incident, [Ruling("plan", False, "it fires, and the playbook finds nothing to do")])
        if result.status is Status.OBSERVED:
            return self._observed(incident, result)
        refusing = {ruling.guard for ruling in result.refusals}
        if refusing and refusing <= _PEOPLE:
            if incident.state is State.WAITING and incident.digest == result.plan.digest:
                if self.store.decision(incident) is None:
                    return incident
                self.store.void(incident)
            return self._move(
                incident, State.WAITING, f"{_said(result.refusals)}: {_summary(result.plan)}", rulings=rulings,
                retry_at=began(incident) + decision.rule.give_up_after, **plan,
            )  # fmt: skip
        return self._put_off(incident, result.refusals, rulings, **plan)

    def _observed(self, incident: Incident, result: ActionResult) -> Incident:
        would = "; it would be refused: " + _said(result.refusals) if result.refusals else ""
        reason = f"observed: {_summary(result.plan)}{would}"
        rulings = [ruling.as_json() for ruling in result.rulings]
        if incident.state is not State.OPEN:
            incident = self._move(incident, State.OPEN, "the rule only observes now")
        observed = self._move(incident, State.OBSERVED, reason, rulings=rulings, **_plan_fields(result))
        if incident.signal.is_event:
            # It never ends by itself, and must not be acted on when the rule enforces weeks later.
            return self.store.close(observed, Ending.OBSERVED, reason, actor=self.actor)
        return observed

    def _put_off(
        self,
        incident: Incident,
        refusals: Sequence[Ruling],
        rulings: Sequence[Mapping[str, Any]] | None = None,
        **fields: Any,
    ) -> Incident:
        """Refused for now: looked at again sooner at first, later and later."""
        now = self.clock.now()
        wait = retry_after(incident.opened_at, now)
        shown = list(rulings or [ruling.as_json() for ruling in refusals])
        if incident.state is State.SUPPRESSED and _refusing(incident.rulings) == _refusing(shown):
            return self.store.put_off(incident, now + wait, shown)
        return self._move(incident, State.SUPPRESSED, _said(refusals), retry_at=now + wait, rulings=shown, **fields)

    # Guards

    def _standing(self, decision: Decision) -> list[Guard]:
        """What holds for as long as anything is applied: also for what a killed run has left."""
        rule, subject = decision.rule, decision.subject
        return [
            ModeGuard(rule.mode, f"the rule {rule.id}"),
            g.NotPaused(self.store.paused),
            g.ClocksAgree(self.store.clock_offset),
            LegalHold(subject.legal_hold),
            g.NoFreeze(remediation_of(self.access.inventory).freezes, subject.environment),
        ]

    def guards(self, incident: Incident, decision: Decision, approver: str | None) -> list[Guard]:
        rule, subject, whole = decision.rule, decision.subject, remediation_of(self.access.inventory)
        context, book = self.context(incident, decision), decision.playbook
        required, why = needs_approval(rule, subject)
        windows = subject.maintenance_windows
        found: list[Guard] = [
            *self._standing(decision),
            g.StillWanted(lambda: self.eyes.look(incident)),
            g.FiringFor(incident.signal, rule.firing_for),
            g.HealthyPeers(
                lambda: book.peers(context),
                rule.min_healthy if rule.min_healthy is not None else book.min_healthy(context),
            ),
            g.Limits(rule.max_changes, rule.max_percent),
            Approval(required, why),
            g.TwoPersons(approver, incident.proposed_by, whole.approvers, required),
        ]
        if rule.maintenance == "inside":
            found.append(g.InsideMaintenance(windows))
        if rule.maintenance == "outside":
            found.append(g.OutsideMaintenance(windows))
        return found

    def _admit(self, action: Fenced, decision: Decision, case: Case, guards: Sequence[Guard]) -> Sequence[Ruling]:
        """Claim what is scarce; with the claim the incident is APPLYING."""
        incident, rule = action.incident, decision.rule
        limits, now = bounds(self.access.inventory, rule), self.clock.now()
        claim = Claim(
            incident.id, incident.attempts + 1, rule.id, decision.subject.id, failure_domain(decision.subject),
            rule.playbook, now,
        )  # fmt: skip
        if claim.attempt > rule.max_attempts:
            return [Ruling("attempts", False, f"{incident.attempts} of {rule.max_attempts} were made")]
        rulings, moved = self.store.admit(
            incident, claim, lambda claims, at: rule_on(claim, claims, limits, at), since=now - limits.looks_back,
            actor=self.actor, plan=case.plan.as_json(), digest=case.plan.digest,
        )  # fmt: skip
        if moved is not None:
            action.incident = moved
        return rulings

    # Applying

    def _applied(self, incident: Incident, decision: Decision, result: ActionResult) -> Incident:
        if result.unrecorded:
            return self._escalate(incident, f"the ledger was lost in the middle: {result.unrecorded}", helped=False)
        if result.status is Status.FAILED:
            return self._after_failure(incident, decision, _failures(result))
        if not incident.touched:
            left = _said([Ruling(change.object, False, applied.reason) for change, applied in result.outcomes])
            self.store.end_claim(
                incident, helped=None
            )  # nothing was tried: neither a good nor a bad end of the playbook
            return self._move(incident, State.SUPPRESSED, left, retry_at=self.clock.now() + _SOONEST)
        if result.status is not Status.DONE and _by_own_look(incident, decision):
            unseen = result.status is Status.UNVERIFIED
            why = "applied, and nobody could look whether it holds" if unseen else "applied in part"
            return self._escalate(incident, f"{why}: {_failures(result)}", helped=False)
        reason = f"{_summary(result.plan)}: {result.status.value}"
        return self._move(incident, State.VERIFYING, reason, deadline=self.clock.now() + decision.rule.verify.within)

    def _after_failure(self, incident: Incident, decision: Decision, why: str) -> Incident:
        if incident.touched and decision.rule.undo == "auto" and self._undoing(incident, decision) is not None:
            return self._to_undo(incident, f"it failed, and is undone: {why}")
        return self._escalate(incident, f"it failed: {why}", helped=False)

    def _resume(self, incident: Incident, decision: Decision) -> Incident:
        """Somebody was killed while applying. What is left of the very plan that was admitted is brought to its end."""
        action = Rest(decision.playbook.action(self.context(incident, decision)), self, incident)
        try:
            result = run_action(
                action, ledger=self.store.ledger, guards=self._standing(decision), actor=self.actor, clock=self.clock
            )
        except OpsError as error:
            return self._after_failure(action.incident, decision, f"it was interrupted, and cannot go on: {error}")
        if result.status in (Status.REFUSED, Status.OBSERVED):
            refusing = [ruling for ruling in result.rulings if not ruling.allows]
            return self._escalate(incident, f"it was interrupted, and {_said(refusing)}", helped=False)
        if action.beyond and _by_own_look(incident, decision):
            return self._escalate(
                action.incident, f"it was interrupted, and what is left is not what was admitted: {action.beyond[0].object}",
                helped=False,
            )  # fmt: skip
        if result.status is Status.NOTHING:
            left = "what is left is not what was admitted" if action.beyond else "everything had been done"
            return self._move(
                action.incident, State.VERIFYING, f"interrupted, and {left}",
                deadline=self.clock.now() + decision.rule.verify.within,
            )  # fmt: skip
        return self._applied(action.incident, decision, result)

    # Verifying

    def _verify(self, incident: Incident, decision: Decision) -> Incident:
        """Look until it is good, worse, or too late."""
        rule, said = decision.rule, "nothing was seen yet"
        deadline = incident.deadline or self.clock.now()
        while True:
            found, said = self._looks(incident, rule)
            if found is Measured.GOOD:
                return self._helped(incident, decision, said)
            if found is Measured.WORSE or self.clock.now() >= deadline:
                break
            self.clock.sleep(
                min(rule.verify.every, max(deadline - self.clock.now(), timedelta(seconds=1))).total_seconds()
            )
        if found is Measured.UNKNOWN:
            return self._escalate(incident, f"whether it helped is not known: {said}", helped=False)
        bad = "it got worse" if found is Measured.WORSE else "it did not help in time"
        if rule.undo == "auto" and self._undoing(incident, decision) is not None:
            return self._to_undo(incident, f"{bad}, and is undone: {said}")
        if found is not Measured.WORSE and incident.attempts < rule.max_attempts:
            self.store.end_claim(incident, helped=False)
            return self._move(incident, State.OPEN, f"{bad}: {said}", deadline=None)
        return self._escalate(incident, f"{bad}: {said}", helped=False)

    def _looks(self, incident: Incident, rule: Rule) -> tuple[Measured, str]:
        try:
            if rule.verify.metric is not None:
                return self.eyes.measure(rule.verify.metric, incident)
            if incident.signal.is_event:
                return Measured.GOOD, "the playbook's own look found it done"
            signal = self.eyes.look(incident)
        except OpsError as error:
            return Measured.UNKNOWN, error.line
        if signal is None or signal.ends_at is not None:
            return Measured.GOOD, "the alert has ended"
        return Measured.NOT_YET, "the alert still fires"

    def _helped(self, incident: Incident, decision: Decision, said: str) -> Incident:
        self.store.end_claim(incident, helped=True)
        after = decision.playbook.undo_after(self.context(incident, decision))
        if after is not None:
            until = self.clock.now() + after
            return self._move(
                incident, State.HELD, f"it helped ({said}); undone at {until:%Y-%m-%d %H:%M} UTC", undo_at=until
            )
        return self.store.close(incident, Ending.HELPED, f"it helped: {said}", actor=self.actor, deadline=None)

    # Undoing

    def _undoing(self, incident: Incident, decision: Decision, place: int | None = None) -> Action | None:
        """The undo of one attempt, by its place in `Incident.standing`; of the newest one where not given."""
        standing = incident.standing.get(len(incident.earlier) if place is None else place, [])
        done = [
            Done(_change(entry["change"]), Applied(Outcome.APPLIED, entry["reason"], entry.get("detail", {})))
            for entry in standing
        ]
        if not done:
            return None
        return decision.playbook.undo(self.context(incident, decision), done)

    def _to_undo(self, incident: Incident, reason: str) -> Incident:
        """It did not help, and its claim goes on: what is undone is acted on, and its failure domain is not free yet."""
        self.store.end_claim(incident, helped=False, free=False)
        return self._move(incident, State.UNDOING, reason)

    def _undo(self, incident: Incident, decision: Decision) -> Incident:
        """Attempt by attempt, the newest first: each found the system as the one before had left it."""
        if not incident.standing:
            return self._escalate(incident, "there is no way to undo it: look at what stands")
        if pause := self.store.paused():
            return self._escalate(
                incident, f"the undo is paused by {pause.who} ({pause.why}): undo it by hand or later"
            )
        if not self.store.claim_again(incident):
            return incident  # somebody acts in its failure domain: it has its turn after that
        for place in incident.standing:
            if problem := self._undo_attempt(incident, decision, place):
                return self._escalate(incident, problem)
            incident = self.store.note_undone(incident, place)
        return self._undone(incident)

    def _undo_attempt(self, incident: Incident, decision: Decision, place: int) -> str | None:
        """Why the attempt is not undone; None where it is."""
        action = self._undoing(incident, decision, place)
        if action is None:
            return "there is no way to undo it: look at what stands"
        try:
            result = run_action(
                Fenced(action, self, incident, wanted=False), ledger=self.store.ledger, actor=self.actor, clock=self.clock,
                guards=[ModeGuard(Mode.ENFORCE, "the undo of what was applied"), g.NotPaused(self.store.paused)],
            )  # fmt: skip
        except OpsError as error:
            return f"the undo failed: {error}"
        return None if result.ok else f"the undo is not complete ({result.status.value}): {_failures(result)}"

    def _undone(self, incident: Incident) -> Incident:
        if incident.undo_at is not None and self.clock.now() >= incident.undo_at:
            return self.store.close(incident, Ending.HELPED, "it helped, and was undone as planned", actor=self.actor)
        if incident.signal_ended_at is not None:
            return self.store.close(incident, Ending.UNDONE, "undone", actor=self.actor)
        return self._escalate(incident, f"undone. Before that: {incident.reason}")

    # Words and small steps

    def context(self, incident: Incident, decision: Decision) -> Context[Any]:
        return Context(
            self.access,
            decision.subject,
            decision.parameters,
            incident.id,
            incident.signal.starts_at,
            self.clock,
        )

    def _move(self, incident: Incident, to: State, reason: str, **fields: Any) -> Incident:
        return self.store.move(incident, to, reason, actor=self.actor, **fields)

    def _escalate(self, incident: Incident, reason: str, *, helped: bool | None = None) -> Incident:
        if helped is not None:
            self.store.end_claim(incident, helped=helped)
        return self._move(incident, State.ESCALATED, reason)


def _change(value: Mapping[str, Any]) -> Change:
    return Change(**{key: value[key] for key in ("kind", "object", "before", "after", "reversible", "detail")})


def _plan_fields(result: ActionResult) -> dict[str, Any]:
    return {"plan": result.plan.as_json(), "digest": result.plan.digest}


def _said(rulings: Sequence[Ruling]) -> str:
    return "; ".join(f"{ruling.guard}: {ruling.reason}" for ruling in rulings) or "refused"


def _refusing(rulings: Sequence[Mapping[str, Any]]) -> set[str]:
    return {ruling["guard"] for ruling in rulings if not ruling["allows"]}


def _summary(plan: Plan) -> str:
    kinds = sorted({change.kind for change in plan.changes})
    return ", ".join(f"{len(plan.of_kind(kind))} × {kind}" for kind in kinds) or "nothing to do"


def _by_own_look(incident: Incident, decision: Decision) -> bool:
    """An event does not end: without a metric nothing but the playbook's own look says whether it helped."""
    return incident.signal.is_event and decision.rule.verify.metric is None


def _failures(result: ActionResult) -> str:
    failed = [
        f"{change.object}: {applied.reason}"
        for change, applied in result.outcomes
        if applied.outcome not in (Outcome.APPLIED, Outcome.ALREADY_DONE, Outcome.PINNED)
    ]
    checks = (
        [f"{check.name}: {check.detail}" for check in result.verification.checks if check.holds is not True]
        if result.verification
        else []
    )
    return "; ".join([*failed, *checks]) or result.status.value


def retry_after(opened_at: datetime, now: datetime) -> timedelta:
    """How long a refused incident is left alone: soon at first, later and later."""
    return min(max((now - opened_at) / 4, _SOONEST), _LATEST)


def began(incident: Incident) -> datetime:
    """From when an incident's time runs. An event that is read late is as old as it is: what it asked for may be long over."""
    return min(incident.signal.starts_at, incident.opened_at) if incident.signal.is_event else incident.opened_at


def proposer(rule: Rule) -> str:
    """Who proposes what a rule leads to: nobody who could approve it."""
    return f"rule {rule.id}"
