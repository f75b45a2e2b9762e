"""The incident's state machine, model-checked on the real code over a real PostgreSQL: whatever happens in whatever order.

Signals fire and end, people approve and refuse and pause, runs are killed in the middle, start late and overtake one another, time goes
on. Never two actions of one incident at once, never a change without its record before it, never past the budget, and a pause always wins.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ops_platform.errors import ConflictError, OpsError
from ops_platform.remediation.machine import ALLOWED
from ops_platform.remediation.model import State
from tests.remediation_rig import (
    Engine,
    KilledError,
    SwitchOff,
    SwitchOffForGood,
    a_rule,
    a_signal,
    fresh_database,
)
from tests.rig import Cluster

BUDGET = 3


class Machine(RuleBasedStateMachine):
    cluster: ClassVar[Cluster]

    @initialize(
        approval=st.sampled_from(["never", "always"]),
        book=st.sampled_from(["toy.switch_off", "toy.switch_off_for_good"]),
    )
    def begin(self, approval: str, book: str) -> None:
        self.stack = contextlib.ExitStack()
        rule_ = a_rule(
            approval=approval, playbook=book, cooldown="0s", budget={"count": BUDGET, "per": "1d"}, max_attempts=2
        )
        self.engine = Engine(
            self.cluster,
            fresh_database(self.cluster, self.stack),
            [rule_],
            breaker={"failures": 100},
            budget={"count": 50, "per": "1h"},
        )
        self.stack.callback(self.engine.close)
        self.paused_switches: int | None = None
        self.versions: dict[str, int] = {}
        self.begun = self.engine.clock.now()

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()

    def incidents(self) -> list[Any]:
        return self.engine.store.list()

    @rule(which=st.sampled_from(["a", "b"]))
    def fires(self, which: str) -> None:
        self.engine.lamps.put("lamp", "on")
        self.engine.clock.at += timedelta(seconds=1)  # what ended and fires again began later
        incident = self.engine.fire(a_signal(which, at=self.engine.clock.now()))
        self.versions.setdefault(incident.id, incident.version)

    @rule(which=st.sampled_from(["a", "b"]))
    def ends(self, which: str) -> None:
        self.engine.end(which)

    @rule(
        number=st.integers(0, 1),
        kill=st.sampled_from([None, None, "before", "applied"]),
        helps=st.booleans(),
        stuck=st.booleans(),
    )
    def works(self, number: int, kill: str | None, helps: bool, stuck: bool) -> None:
        found = self.incidents()
        if not found:
            return
        incident = found[number % len(found)]
        engine = self.engine
        engine.lamps.kill_at, engine.lamps.fails = kill, "stuck" if stuck else None
        engine.clock.slept = (lambda: engine.end(incident.fingerprint)) if helps else (lambda: None)
        with contextlib.suppress(KilledError):
            engine.work(incident)
        engine.lamps.kill_at = engine.lamps.fails = None

    @rule(number=st.integers(0, 5))
    def starts_late(self, number: int) -> None:
        """A run that was asked for at the incident's first version."""
        if not self.versions:
            return
        incident_id = sorted(self.versions)[number % len(self.versions)]
        before = len(self.engine.lamps.switched)
        late = self.engine.store.get(incident_id).version != self.versions[incident_id]
        try:
            self.engine.work(incident_id, self.versions[incident_id])
        except ConflictError:
            assert late
            assert len(self.engine.lamps.switched) == before

    @rule(who=st.sampled_from(["bea", "rule dark"]), decision=st.sampled_from(["approve", "approve", "refuse"]))
    def decides(self, who: str, decision: str) -> None:
        for incident in self.incidents():
            if incident.state is State.WAITING:
                self.engine.store.decide(
                    incident, incident.digest, decision, who=who, via="test", valid_for=timedelta(hours=1)
                )

    @rule(minutes=st.integers(1, 300))
    def time_goes_on(self, minutes: int) -> None:
        self.engine.clock.at += timedelta(minutes=minutes)

    @rule()
    def pauses(self) -> None:
        self.engine.store.pause("looking", who="ann")
        self.paused_switches = len(self.engine.lamps.switched)

    @rule()
    def resumes(self) -> None:
        self.engine.store.resume(who="ann")
        self.paused_switches = None

    @precondition(lambda self: hasattr(self, "engine"))
    @rule(number=st.integers(0, 1))
    def somebody_asks_for_the_undo(self, number: int) -> None:
        found = [one for one in self.engine.store.list(all_=True) if one.state in (State.ESCALATED, State.CLOSED)]
        if found:
            one = found[number % len(found)]
            with contextlib.suppress(OpsError):
                self.engine.store.move(one, State.UNDOING, "ann asked", actor="ann", ending=None, closed_at=None)

    @invariant()
    def a_pause_always_wins(self) -> None:
        if getattr(self, "paused_switches", None) is not None:
            assert len(self.engine.lamps.switched) == self.paused_switches

    @invariant()
    def one_incident_has_no_more_actions_than_attempts(self) -> None:
        if hasattr(self, "engine"):
            for incident in self.engine.store.list(all_=True):
                offs = [to for owner, _, to in self.engine.lamps.switched if owner == incident.id and to == "off"]
                assert len(offs) <= incident.attempts <= 2

    @invariant()
    def the_budget_holds(self) -> None:
        if hasattr(self, "engine"):
            claims = self.engine.store.claims(self.begun)
            for claim in claims:
                within = [c for c in claims if claim.at - timedelta(days=1) < c.at <= claim.at]
                assert len(within) <= BUDGET

    @invariant()
    def nobody_acts_beside_another_in_one_failure_domain(self) -> None:
        if hasattr(self, "engine"):
            assert len([claim for claim in self.engine.store.claims(self.begun) if claim.ended_at is None]) <= 1

    @invariant()
    def every_change_was_recorded_before_it_was_made(self) -> None:
        if hasattr(self, "engine"):
            bodies = [(e.kind, e.body) for e in self.engine.ledger.entries()]
            plans = sum(kind == "action.plan" and body["verdict"] == "apply" for kind, body in bodies)
            applying = sum(kind == "incident.applying" for kind, _ in bodies)
            offs = sum(to == "off" for _, _, to in self.engine.lamps.switched)
            assert offs <= applying <= plans + sum(kind == "incident.taken_over" for kind, _ in bodies)

    @invariant()
    def no_state_follows_another_that_it_may_not_follow(self) -> None:
        if hasattr(self, "engine"):
            for entry in self.engine.ledger.entries(kind="incident."):
                body = entry.body
                if body.get("was") is not None:
                    assert State(body["state"]) in ALLOWED[State(body["was"])]

    @invariant()
    def the_ledger_is_whole(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.ledger.verify().ok


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    from ops_platform.remediation import playbook as playbook_module

    made = {"toy.switch_off": SwitchOff(), "toy.switch_off_for_good": SwitchOffForGood()}
    monkeypatch.setattr(playbook_module, "playbooks", lambda: made)


@pytest.mark.timeout(600)
def test_whatever_happens_in_whatever_order(shared_cluster: Cluster, toys: None) -> None:
    Machine.cluster = shared_cluster
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )  # fmt: skip
