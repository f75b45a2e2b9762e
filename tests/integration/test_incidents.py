"""Incidents from the signal to their end, on a real PostgreSQL: every way through, and every way in which it may be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ops_platform.clients.prometheus import Measured
from ops_platform.errors import ConflictError, UnreachableError
from ops_platform.remediation.intake import take
from ops_platform.remediation.model import Ending, Peers, Signal, State
from ops_platform.remediation.sources import forget_old_signals
from ops_platform.remediation.store import Store, incidents
from tests.remediation_rig import BEGIN, Engine, KilledError, a_rule, a_signal, new_engine

__all__ = ["new_engine"]
NewEngine = Callable[..., Engine]


def ends_after(engine: Engine, seconds: float) -> None:
    """The alert ends once so much time was slept."""
    begun = engine.clock.now()

    def slept() -> None:
        if engine.clock.now() - begun >= timedelta(seconds=seconds):
            engine.end()

    engine.clock.slept = slept


# The straight ways


def test_what_helps_is_applied_once_verified_and_closed(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    ends_after(engine, 30)
    done = engine.work(incident)
    assert (done.state, done.ending, done.attempts) == (State.CLOSED, Ending.HELPED, 1)
    assert engine.lamps.switched == [(incident.id, "lamp", "off")]
    assert engine.kinds() == [
        "incident.open", "incident.applying", "action.plan", "action.outcome", "action.verification", "incident.verifying",
        "incident.closed",
    ]  # fmt: skip
    assert engine.ledger.verify().ok


def test_observing_is_said_with_what_would_refuse_it_and_nothing_is_touched(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(mode="observe", min_healthy=2)])
    engine.lamps.peers = Peers(1, 3, "lamps on")
    done = engine.work(engine.fire())
    assert done.state is State.OBSERVED
    assert "1 × lamp" in done.reason
    assert "1 of 3 lamps on; 2 needed" in done.reason
    assert engine.lamps.switched == []


def test_an_observed_incident_is_looked_at_anew_when_its_rule_enforces(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(mode="observe")])
    observed = engine.work(engine.fire())
    engine.change([a_rule(mode="enforce")])
    take(engine.store, engine.inventory, [observed.signal], complete=True)
    assert engine.store.get(observed.id).state is State.OPEN


def test_what_does_not_help_is_undone_and_escalated(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    done = engine.work(incident)
    assert done.state is State.ESCALATED
    assert "undone" in done.reason
    assert "the alert still fires" in done.reason
    assert [to for _, _, to in engine.lamps.switched] == ["off", "on"]
    assert [claim.helped for claim in engine.store.claims(incident.opened_at)] == [False]


def test_what_makes_it_worse_is_undone_at_once(new_engine: NewEngine) -> None:
    metric = {"prometheus": "p", "query": "q", "holds": "< 1", "worse": "> 5"}
    engine = new_engine([a_rule(verify={"within": "1h", "metric": metric})])
    engine.eyes.metric = (Measured.WORSE, "7 > 5")
    began = engine.clock.now()
    done = engine.work(engine.fire())
    assert done.state is State.ESCALATED
    assert "it got worse" in done.reason
    assert engine.clock.now() == began, "nobody waited"


def test_without_a_way_back_it_is_tried_again_and_then_escalated(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(playbook="toy.switch_off_for_good")])

    def on_again() -> None:
        engine.lamps.put("lamp", "on")

    engine.clock.slept = on_again
    done = engine.work(engine.fire())
    assert (done.state, done.attempts) == (State.ESCALATED, 2)
    assert len(engine.lamps.switched) == 2


def test_what_was_meant_for_a_time_is_undone_when_it_is_over(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(parameters={"undo_after_seconds": 3600})])
    incident = engine.fire()
    ends_after(engine, 10)
    held = engine.work(incident)
    assert held.state is State.HELD
    assert engine.work(incident).state is State.HELD, "not before its time"
    assert engine.store.due() == []
    engine.clock.at += timedelta(hours=1, seconds=1)
    assert [one.id for one in engine.store.due()] == [incident.id]
    done = engine.work(incident)
    assert (done.state, done.ending) == (State.CLOSED, Ending.HELPED)
    assert [to for _, _, to in engine.lamps.switched] == ["off", "on"]


def test_a_change_that_is_not_allowed_says_what_a_person_needs(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine([a_rule(mode="observe")])
    incident = engine.fire()
    closed = engine.store.close(incident, Ending.BY_HAND, "ann saw to it", actor="ann")
    with pytest.raises(ConflictError) as refused:
        engine.store.close(closed, Ending.BY_HAND, "again", actor="ann")
    assert refused.value.what == "this incident is already closed"
    assert refused.value.remedy == f"nothing is to be done: ops incidents show {closed.id} says how it ended"
    applying = engine.store.move(
        engine.fire(a_signal("f2", at=engine.clock.now())), State.APPLYING, "admitted", actor="run 1"
    )
    with pytest.raises(ConflictError) as refused:
        engine.store.close(applying, Ending.BY_HAND, "enough", actor="ann")
    assert refused.value.what == "this incident is applying, and cannot be closed from there"
    assert "ops incidents pause-all stops it" in str(refused.value.remedy)
    assert engine.store.get(applying.id).state is State.APPLYING


def test_an_undo_that_was_asked_for_undoes_what_every_attempt_applied(new_engine: NewEngine) -> None:
    """The newest first, each once, also where whoever undid it was killed in between."""
    engine = new_engine([a_rule(undo="ask", parameters={"lamps": ["a", "b"]})])
    engine.lamps.put("a", "on")
    engine.clock.slept = lambda: engine.lamps.put("b", "on") if len(engine.lamps.switched) == 1 else None
    done = engine.work(engine.fire())
    assert (done.state, done.attempts) == (State.ESCALATED, 2)
    assert [lamp for _, lamp, _ in engine.lamps.switched] == ["a", "b"]
    assert done.can_be_undone
    asked = engine.store.move(done, State.UNDOING, "ann asked for it", actor="ann")
    noted, engine.store.note_undone = engine.store.note_undone, killed_after(engine.store.note_undone)  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        engine.work(asked)
    assert engine.lamps.switched[2:] == [(done.id, "b", "on")]
    engine.store.note_undone = noted  # type: ignore[method-assign]
    undone = engine.work(done.id)
    assert [(lamp, to) for _, lamp, to in engine.lamps.switched[2:]] == [("b", "on"), ("a", "on")]
    assert (undone.state, undone.can_be_undone) == (State.ESCALATED, False)
    assert undone.reason.startswith("undone.")


def killed_after(call: Callable[..., Any]) -> Callable[..., Any]:
    def once(*given: Any) -> None:
        call(*given)
        raise KilledError

    return once


def test_the_alert_that_ends_while_the_run_waits_is_left_alone(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    engine.end()
    done = engine.work(incident)
    assert (done.state, done.ending) == (State.CLOSED, Ending.CLEARED)
    assert engine.lamps.switched == []


def test_a_failed_change_is_undone_and_escalated_with_its_reason(new_engine: NewEngine) -> None:
    engine = new_engine()
    engine.lamps.fails = "the switch is stuck"
    done = engine.work(engine.fire())
    assert done.state is State.ESCALATED
    assert "the switch is stuck" in done.reason


def test_an_undo_that_fails_is_escalated_and_says_what_stands(new_engine: NewEngine) -> None:
    engine = new_engine()
    engine.lamps.undo_fails = "no power"
    done = engine.work(engine.fire())
    assert done.state is State.ESCALATED
    assert "no power" in done.reason
    assert engine.lamps.state("lamp") == "off"


def test_a_verification_that_never_answers_is_escalated_and_never_good(new_engine: NewEngine) -> None:
    metric = {"prometheus": "p", "query": "q", "holds": "< 1"}
    engine = new_engine([a_rule(verify={"within": "1m", "metric": metric})])
    engine.eyes.metric = (Measured.UNKNOWN, "Prometheus does not answer")
    done = engine.work(engine.fire())
    assert done.state is State.ESCALATED
    assert "not known: Prometheus does not answer" in done.reason
    assert engine.lamps.state("lamp") == "off", "what is not known to be bad is not undone"


def test_an_incident_that_nothing_solves_is_given_to_people(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(give_up_after="1h", min_healthy=1)])
    incident = engine.fire()
    assert engine.work(incident).state is State.SUPPRESSED
    engine.clock.at += timedelta(hours=1, minutes=1)
    assert engine.work(incident).state is State.ESCALATED


# Guards: each test fails when its guard is taken out


@pytest.mark.parametrize(
    ("rule", "prepare", "guard"),
    [
        ({}, lambda e: e.store.pause("looking", who="ann"), "pause"),
        ({"min_healthy": 1}, lambda e: None, "healthy peers"),
        ({"firing_for": "5m"}, lambda e: None, "firing for"),
        ({"maintenance": "inside"}, lambda e: None, "maintenance window"),
        (
            {"max_changes": 1, "parameters": {"lamps": ["lamp", "other"]}},
            lambda e: e.lamps.put("other", "on"),
            "limits",
        ),
    ],
)
def test_a_guard_that_refuses_puts_it_off_and_says_why(
    new_engine: NewEngine, rule: dict[str, Any], prepare: Callable[[Engine], Any], guard: str
) -> None:
    engine = new_engine([a_rule(**rule)])
    incident = engine.fire()
    prepare(engine)
    done = engine.work(incident)
    assert done.state is State.SUPPRESSED
    assert done.reason.startswith(guard)
    assert engine.lamps.switched == []
    assert done.retry_at is not None
    assert done.retry_at > engine.clock.now()


def test_a_freeze_refuses_in_its_environment_alone(new_engine: NewEngine) -> None:
    freeze = {"starts": "2026-02-01T00:00:00Z", "ends": "2026-04-01T00:00:00Z", "why": "the great sale"}
    engine = new_engine([a_rule()], freezes=[freeze])
    done = engine.work(engine.fire())
    assert "the great sale" in done.reason
    engine.change([a_rule()], freezes=[{**freeze, "environments": []} | {"ends": "2026-02-02T00:00:00Z"}])
    engine.clock.at += timedelta(minutes=2)
    ends_after(engine, 1)
    assert engine.work(done.id).ending is Ending.HELPED


def test_a_silence_that_is_set_between_plan_and_apply_stops_the_change(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    silenced = Signal.from_json({**incident.signal.as_json(), "silenced": True})
    looks = 0
    look = engine.eyes.look

    def later(one: Any) -> Signal | None:
        nonlocal looks
        looks += 1
        # The first look is the preflight, the second the guard, the third stands right before the change.
        return look(one) if looks < 3 else silenced

    engine.eyes.look = later  # type: ignore[method-assign]
    done = engine.work(incident)
    assert done.state is State.SUPPRESSED
    assert "silence" in done.reason
    assert engine.lamps.switched == []


def test_a_source_that_cannot_be_asked_is_no_reason_to_act(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    engine.eyes.away = "connection refused"
    done = engine.work(incident)
    assert done.state is State.SUPPRESSED
    assert "connection refused" in done.reason
    assert engine.lamps.switched == []


def test_a_target_that_does_not_answer_is_not_nothing_to_do(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    engine.lamps.away = True
    done = engine.work(incident)
    assert done.state is State.SUPPRESSED
    assert "the lamp does not answer" in done.reason


def test_a_clock_that_is_not_the_databases_refuses(new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    monkeypatch.setattr(type(engine.store), "clock_offset", Store.clock_offset)
    done = engine.work(engine.fire())
    assert done.state is State.SUPPRESSED
    assert done.reason.startswith("clock")


# What is scarce


def test_the_cooldown_holds_between_incidents_and_not_within_one(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(cooldown="1h")])
    first = engine.fire()
    ends_after(engine, 1)
    assert engine.work(first).ending is Ending.HELPED
    engine.lamps.put("lamp", "on")
    engine.clock.at += timedelta(minutes=20)
    second = engine.fire(a_signal(at=engine.clock.now()))
    refused = engine.work(second)
    assert refused.state is State.SUPPRESSED
    assert refused.reason.startswith("cooldown")
    engine.clock.at += timedelta(hours=1)
    assert engine.work(second).ending is Ending.HELPED


def test_the_budget_of_a_rule_is_never_exceeded(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(cooldown="0s", budget={"count": 2, "per": "1d"})])
    states: list[State] = []
    for number in range(4):
        engine.lamps.put("lamp", "on")
        incident = engine.fire(a_signal(f"f{number}", at=engine.clock.now()))
        engine.clock.slept = lambda: [engine.end(f"f{n}") for n in range(4)] and None
        states.append(engine.work(incident).state)
    assert states == [State.CLOSED, State.CLOSED, State.SUPPRESSED, State.SUPPRESSED]


def test_an_action_that_goes_on_keeps_its_failure_domain_to_itself(new_engine: NewEngine) -> None:
    other = a_rule(id="cellar", alert=["alertname=Other"], target="cellar", parameters={"lamps": ["second"]})
    engine = new_engine([a_rule(), other])
    engine.lamps.put("second", "on")
    engine.lamps.kill_at = "applied"
    with pytest.raises(KilledError):
        engine.work(engine.fire())
    engine.lamps.kill_at = None
    second = engine.fire(a_signal("f2", at=engine.clock.now(), labels={"alertname": "Other"}), rule="cellar")
    refused = engine.work(second)
    assert refused.state is State.SUPPRESSED
    assert "acts in hall already" in refused.reason


def test_the_circuit_opens_after_bad_ends_and_one_is_tried_when_it_is_half_open(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(cooldown="0s")], breaker={"failures": 2, "within": "1d", "open_for": "2h"})
    for number in range(2):
        engine.lamps.put("lamp", "on")
        assert engine.work(engine.fire(a_signal(f"bad{number}", at=engine.clock.now()))).state is State.ESCALATED
    engine.lamps.put("lamp", "on")
    incident = engine.fire(a_signal("next", at=engine.clock.now()))
    refused = engine.work(incident)
    assert refused.reason.startswith("circuit breaker")
    engine.clock.at += timedelta(hours=2, minutes=1)
    engine.clock.slept = lambda: engine.end("next")
    assert engine.work(incident).ending is Ending.HELPED


# People


def waiting(engine: Engine) -> Any:
    incident = engine.work(engine.fire())
    assert incident.state is State.WAITING
    assert incident.digest is not None
    return incident


def approve(engine: Engine, incident: Any, who: str = "bea", digest: str | None = None) -> None:
    engine.store.decide(
        incident, digest or incident.digest, "approve", who=who, via="test", valid_for=timedelta(hours=1)
    )


def test_a_classified_target_waits_for_a_second_person(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(target="attic")])
    incident = waiting(engine)
    assert "attic is restricted" in incident.reason
    assert engine.work(incident).state is State.WAITING, "asked again, it waits on"
    assert engine.lamps.switched == []
    approve(engine, incident)
    assert [one.id for one in engine.store.due()] == [incident.id]
    ends_after(engine, 1)
    assert engine.work(incident).ending is Ending.HELPED
    assert "incident.approve" in engine.kinds()


def test_who_proposed_cannot_approve(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(approval="always")])
    incident = waiting(engine)
    approve(engine, incident, who=incident.proposed_by)
    assert engine.work(incident).state is State.WAITING
    assert engine.lamps.switched == []


def test_who_is_not_among_the_approvers_cannot_approve(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(approval="always")], approvers=["ann"])
    incident = waiting(engine)
    approve(engine, incident, who="mallory")
    assert engine.work(incident).state is State.WAITING
    approve(engine, engine.store.get(incident.id), who="ann")
    ends_after(engine, 1)
    assert engine.work(incident).ending is Ending.HELPED


def test_an_approval_that_has_expired_counts_no_more(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(approval="always")])
    incident = waiting(engine)
    approve(engine, incident)
    engine.clock.at += timedelta(hours=1)
    assert engine.work(incident).state is State.WAITING
    assert engine.lamps.switched == []


def test_an_approval_of_a_plan_that_changed_since_counts_no_more(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(approval="always", parameters={"lamps": ["lamp", "second"]})])
    incident = waiting(engine)
    approve(engine, incident)
    engine.lamps.put("second", "on")
    again = engine.work(incident)
    assert again.state is State.WAITING
    assert again.digest != incident.digest
    assert engine.lamps.switched == []
    with pytest.raises(ConflictError, match="by now"):
        approve(engine, again, digest=incident.digest)


def test_a_person_who_refuses_closes_it(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(approval="always")])
    incident = waiting(engine)
    engine.store.decide(incident, incident.digest, "refuse", who="bea", via="test", valid_for=timedelta(hours=1))
    done = engine.work(incident)
    assert (done.state, done.ending) == (State.CLOSED, Ending.REFUSED)


# Kills, late runs, two at once


@pytest.mark.parametrize("moment", ["before", "applied"])
def test_a_run_that_is_killed_while_applying_is_brought_to_its_end_by_the_next(
    new_engine: NewEngine, moment: str
) -> None:
    engine = new_engine([a_rule(parameters={"lamps": ["lamp", "second"]})])
    engine.lamps.put("second", "on")
    incident = engine.fire()
    engine.lamps.kill_at = moment
    with pytest.raises(KilledError):
        engine.work(incident)
    engine.lamps.kill_at = None
    assert engine.store.get(incident.id).state is State.APPLYING
    ends_after(engine, 1)
    done = engine.work(incident)
    assert (done.state, done.ending, done.attempts) == (State.CLOSED, Ending.HELPED, 1)
    assert sorted(lamp for _, lamp, to in engine.lamps.switched if to == "off") == ["lamp", "second"]


def test_what_was_interrupted_is_not_made_larger_by_what_the_system_asks_for_since(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(parameters={"lamps": ["lamp", "second"]})])
    incident = engine.fire()
    engine.lamps.kill_at = "before"
    with pytest.raises(KilledError):
        engine.work(incident)
    engine.lamps.kill_at = None
    engine.lamps.put("second", "on")  # it was not there when the plan was admitted
    ends_after(engine, 1)
    assert engine.work(incident).ending is Ending.HELPED
    assert (engine.lamps.state("lamp"), engine.lamps.state("second")) == ("off", "on")


def test_an_event_whose_remedy_nobody_could_look_at_is_not_good(new_engine: NewEngine) -> None:
    rule = {key: value for key, value in a_rule(event={"type": "LampOn"}).items() if key not in ("alert", "verify")}
    engine = new_engine([rule])
    event = Signal("kafka", "t/0/0", "LampOn", {"type": "LampOn"}, engine.clock.now(), engine.clock.now())
    put = engine.lamps.put

    def then_dark(lamp: str, state: str) -> None:
        put(lamp, state)
        engine.lamps.away = True

    engine.lamps.put = then_dark  # type: ignore[method-assign]
    done = engine.work(engine.fire(event))
    assert done.state is State.ESCALATED
    assert "nobody could look" in done.reason


def test_a_run_that_starts_late_changes_nothing(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(min_healthy=1)])
    incident = engine.fire()
    engine.work(incident)
    with pytest.raises(ConflictError, match="late"):
        engine.work(incident, version=incident.version)
    assert engine.lamps.switched == []


def test_whoever_lost_its_lock_does_not_begin_another_change(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(parameters={"lamps": ["lamp", "second"]})])
    engine.lamps.put("second", "on")
    incident = engine.fire()
    put = engine.lamps.put

    def overtaken(lamp: str, state: str) -> None:
        put(lamp, state)
        engine.store.take_over(engine.store.get(incident.id), actor="another run")

    engine.lamps.put = overtaken  # type: ignore[method-assign]
    with pytest.raises(ConflictError):
        engine.work(incident)
    assert len(engine.lamps.switched) == 1, "the second lamp was left to whoever took over"


def test_two_runs_do_not_work_on_one_incident(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    with engine.store.work_on(incident.id) as ours:
        assert ours
        with pytest.raises(ConflictError, match="another run"):
            engine.work(incident)


def test_a_pause_stops_before_the_next_change(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(parameters={"lamps": ["lamp", "second"]}, playbook="toy.switch_off_for_good")])
    engine.lamps.put("second", "on")
    put = engine.lamps.put

    def pausing(lamp: str, state: str) -> None:
        put(lamp, state)
        engine.store.pause("stop", who="ann")

    engine.lamps.put = pausing  # type: ignore[method-assign]
    engine.work(engine.fire())
    assert len(engine.lamps.switched) == 1


def test_the_platforms_database_away_means_that_nothing_acts(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    engine.store.ledger.close()
    engine.store.ledger._connect = _away  # type: ignore[attr-defined]
    with pytest.raises(UnreachableError):
        engine.work(incident)
    assert engine.lamps.switched == []


def _away() -> Any:
    import psycopg

    raise psycopg.OperationalError("connection refused")


# Taking signals in


def test_the_same_signals_read_again_change_nothing(new_engine: NewEngine) -> None:
    engine = new_engine()
    signals = [a_signal(f"f{n}") for n in range(3)]
    first = take(engine.store, engine.inventory, signals, complete=True)
    before = engine.kinds()
    second = take(engine.store, engine.inventory, signals, complete=True)
    assert len(first.opened) == 3
    assert second.opened == ()
    assert engine.kinds() == before
    assert (
        len(engine.store.history(engine.clock.now() - timedelta(days=1), engine.clock.now() + timedelta(days=1))) == 3
    )


def test_an_alert_that_is_not_there_has_ended_only_when_all_were_heard(new_engine: NewEngine) -> None:
    engine = new_engine()
    take(engine.store, engine.inventory, [a_signal("a"), a_signal("b")], complete=True)
    assert take(engine.store, engine.inventory, [a_signal("a")], complete=False).ended == ()
    ended = take(engine.store, engine.inventory, [a_signal("a")], complete=True).ended
    assert [one.fingerprint for one in ended] == ["b"]
    assert ended[0].ending is Ending.CLEARED


def test_a_storm_is_taken_in_turns(new_engine: NewEngine) -> None:
    engine = new_engine()
    signals = [a_signal(f"f{n:04}") for n in range(250)]
    counts = [len(take(engine.store, engine.inventory, signals, complete=True).opened) for _ in range(4)]
    assert counts == [100, 100, 50, 0]


def test_what_is_silenced_opens_nothing_and_is_kept_for_replay(new_engine: NewEngine) -> None:
    engine = new_engine()
    taken = take(engine.store, engine.inventory, [a_signal("a", silenced=True)], complete=True)
    assert taken.opened == ()
    assert len(engine.store.firing("alertmanager")) == 1


def test_signals_are_forgotten_after_their_time_but_for_what_still_fires(new_engine: NewEngine) -> None:
    engine = new_engine(signals_kept="30d")
    began = engine.clock.now()
    event = Signal("kafka", "t/0/0", "Blocked", {"id": "1"}, began, began)
    take(engine.store, engine.inventory, [a_signal("ended"), a_signal("firing"), event], complete=True)
    take(engine.store, engine.inventory, [a_signal("firing")], complete=True)
    assert forget_old_signals(engine.access, engine.store) == 0
    engine.clock.at += timedelta(days=31)
    assert forget_old_signals(engine.access, engine.store) == 3
    assert [signal.fingerprint for _, signal in engine.store.history(began, engine.clock.now())] == ["firing"]
    assert [signal.fingerprint for signal in engine.store.firing("alertmanager")] == ["firing"]


def test_what_flaps_is_left_alone_until_it_has_fired_for_long_enough(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(firing_for="5m")])
    assert take(engine.store, engine.inventory, [a_signal()], complete=True).opened == ()
    engine.clock.at += timedelta(minutes=5)
    assert len(take(engine.store, engine.inventory, [a_signal()], complete=True).opened) == 1


def test_an_alert_that_goes_on_long_after_it_was_solved_is_a_new_incident(new_engine: NewEngine) -> None:
    metric = {"prometheus": "p", "query": "q", "holds": "< 1"}
    engine = new_engine([a_rule(verify={"metric": metric}, cooldown="0s")])
    incident = engine.fire()
    assert engine.work(incident).ending is Ending.HELPED
    assert take(engine.store, engine.inventory, [incident.signal], complete=True).opened == ()
    engine.clock.at += timedelta(minutes=16)
    again = take(engine.store, engine.inventory, [incident.signal], complete=True).opened
    assert len(again) == 1
    assert again[0].id != incident.id


def test_lost_runs_are_asked_for_again_and_running_ones_are_not(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    assert engine.store.due() == [], "its own run was just asked for"
    engine.clock.at += timedelta(minutes=2)
    assert [one.id for one in engine.store.due()] == [incident.id]
    with engine.store.work_on(incident.id):
        assert engine.store.due() == []


def test_a_tick_reads_no_more_however_long_the_history_is(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine([a_rule(mode="observe")])
    engine.clock.at += timedelta(hours=21)
    for hour in range(20):
        take(engine.store, engine.inventory, [a_signal(at=BEGIN + timedelta(hours=hour))], complete=True)
        take(engine.store, engine.inventory, [], complete=True)
    assert len(engine.store.list(all_=True)) == 20
    read: list[str] = []
    made = incidents._incident
    monkeypatch.setattr(incidents, "_incident", lambda row: read.append(row["id"]) or made(row))
    last, new = a_signal(at=BEGIN + timedelta(hours=19)), a_signal(at=BEGIN + timedelta(hours=20))
    assert take(engine.store, engine.inventory, [last], complete=True).opened == ()
    assert len(read) == 1, "what was closed of this very signal, and nothing else"
    (opened,) = take(engine.store, engine.inventory, [new], complete=True).opened
    assert len(read) == 1
    assert take(engine.store, engine.inventory, [new], complete=True).opened == ()
    assert {opened.id, *read} == {read[0], opened.id}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["alertmanager", "kafka"]), st.sampled_from(["", "a", "b", "ü", "a b"]), st.booleans()
        ),
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_fires_is_what_was_kept_last_as_not_ended(
    engine_of_signals: Engine, seen: list[tuple[str, str, bool]]
) -> None:
    store = engine_of_signals.store
    with store.transaction() as t:
        t.connection.execute("truncate ops_remediation.signals")
    newest: dict[tuple[str, str], bool] = {}
    for number, (source, fingerprint, ended) in enumerate(seen):
        at = BEGIN + timedelta(minutes=number)
        store.saw([Signal(source, fingerprint, "LampOn", {}, BEGIN, at, ends_at=at if ended else None)])
        newest[source, fingerprint] = ended
    for source in ("alertmanager", "kafka"):
        fires = {print_ for (of, print_), ended in newest.items() if of == source and not ended}
        assert {signal.fingerprint for signal in store.firing(source)} == fires


@pytest.fixture
def engine_of_signals(new_engine: NewEngine) -> Engine:
    return new_engine()
