"""The fence around a playbook's action: right before each change it is asked whether the change is still ours to make, and wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ops_platform.actions import Action, Applied, Case, Change, Outcome, Plan, Verification
from ops_platform.errors import ConflictError, OpsError
from ops_platform.remediation import guards as g
from ops_platform.remediation.model import Incident

if TYPE_CHECKING:
    from ops_platform.remediation.worker import Worker


class Fenced:
    """A playbook's action in which no change is begun by whoever is late, under a pause, or when it is not wanted any more.

    What is begun and what became of it is noted at the incident, for an undo by somebody else.
    """

    def __init__(self, inner: Action, worker: Worker, incident: Incident, *, wanted: bool = True) -> None:
        self.inner, self.worker, self.incident, self._wanted = inner, worker, incident, wanted

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def target_id(self) -> str:
        return self.inner.target_id

    def plan(self) -> Plan:
        with self.worker.traces.span("plan") as note:
            plan = self.inner.plan()
            note("changes", len(plan.changes))
            return plan

    def check(self, change: Change) -> Applied | None:
        try:
            pause = self.worker.store.still_mine(self.incident)
        except ConflictError as error:
            return Applied(Outcome.CONTENDED, error.line)
        if pause is not None:
            return Applied(Outcome.REFUSED, f"everything is paused by {pause.who}: {pause.why}")
        if self._wanted:
            case = Case(
                Plan(self.name, self.target_id, (change,), self.worker.clock.now()), None, self.worker.clock.now()
            )
            ruling = g.StillWanted(lambda: self.worker.eyes.look(self.incident)).rule(case)
            if not ruling.allows:
                return Applied(Outcome.REFUSED, ruling.reason)
        return self.inner.check(change)

    def apply(self, change: Change) -> Applied:
        self._note(change, {"outcome": "begun", "reason": "begun", "detail": {}})
        try:
            with self.worker.traces.span("apply", kind=change.kind) as note:
                applied = self.inner.apply(change)
                note("outcome", applied.outcome.value)
        except OpsError as error:
            self._note(change, {"outcome": "failed", "reason": error.line, "detail": {}})
            raise
        self._note(change, applied.as_json())
        return applied

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        with self.worker.traces.span("check"):
            return self.inner.verify(plan, outcomes)

    def _note(self, change: Change, became: Mapping[str, Any]) -> None:
        if not self._wanted:
            return  # an undo leaves what it undoes as it was noted
        rest = [entry for entry in self.incident.outcomes if entry["object"] != change.object]
        entry = {"object": change.object, "change": change.as_json(), **became}
        self.incident = self.worker.store.note(self.incident, [*rest, entry])


class Rest(Fenced):
    """What is left of the admitted plan. Whatever the system would ask for beyond it was not admitted, and is left alone."""

    beyond: Sequence[Change] = ()

    def plan(self) -> Plan:
        plan = super().plan()
        admitted = list((self.incident.plan or {}).get("changes", []))
        self.beyond = [change for change in plan.changes if change.as_json() not in admitted]
        return replace(plan, changes=tuple(change for change in plan.changes if change not in self.beyond))
