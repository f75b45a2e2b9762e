"""What must never be taken for good, done twice, or done because it was wanted once: on a real PostgreSQL, and a real Alertmanager."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from ops_platform.errors import ConflictError
from ops_platform.remediation.intake import take
from ops_platform.remediation.model import Ending, Incident, Signal, State
from ops_platform.remediation.sources import Polls, Sources, poll_alerts
from ops_platform.remediation.worker import Worker
from tests import prometheus_rig
from tests.remediation_rig import Desk, Engine, KilledError, a_rule, a_signal, new_desk, new_engine, settled
from tests.rig import eventually

__all__ = ["new_desk", "new_engine"]
NewEngine = Callable[..., Engine]
NewDesk = Callable[..., Desk]
BOTH = {"lamps": ["lamp", "second"]}


def event_rule(**more: Any) -> dict[str, Any]:
    rule = a_rule(event={"type": "LampOn"}, **more)
    return {key: value for key, value in rule.items() if key not in ("alert", "verify")}


def an_event(engine: Engine, offset: int = 0, *, ident: str = "1", age: timedelta = timedelta(0)) -> Signal:
    now = engine.clock.now()
    labels = {"type": "LampOn", "source": "/hall", "id": ident}
    return Signal("kafka", f"t/0/{offset}", "LampOn", labels, now - age, now)


def open_claims(engine: Engine) -> list[str]:
    return [claim.incident for claim in engine.store.claims(engine.clock.now()) if claim.ended_at is None]


def killed_at(engine: Engine, incident: Incident, moment: str) -> Incident:
    engine.lamps.kill_at = moment
    with pytest.raises(KilledError):
        engine.work(incident)
    engine.lamps.kill_at = None
    return engine.store.get(incident.id)


# Events


def test_an_event_that_the_producer_sent_twice_is_acted_on_once_and_that_is_recorded(new_engine: NewEngine) -> None:
    engine = new_engine([event_rule(cooldown="0s")])
    first, again, other = an_event(engine), an_event(engine, 1), an_event(engine, 2, ident="2")
    (opened,) = take(engine.store, engine.inventory, [first], complete=False, most=None).opened
    found = take(engine.store, engine.inventory, [first, again, other, an_event(engine, 3, ident="2")], complete=False)
    assert [one.fingerprint for one in found.opened] == ["t/0/2"]
    assert [one.fingerprint for one in engine.store.list()] == ["t/0/0", "t/0/2"]
    engine.eyes.signals[first.fingerprint] = first
    assert engine.work(opened).ending is Ending.HELPED
    assert take(engine.store, engine.inventory, [again], complete=False).opened == (), "not when it is over, either"
    repeated = [entry.body for entry in engine.ledger.entries(kind="events.repeated")]
    assert {"rule": "dark", "event": "t/0/1", "first": "t/0/0"} in repeated


def test_an_event_that_is_read_long_after_it_happened_is_for_people(new_engine: NewEngine) -> None:
    engine = new_engine([event_rule(give_up_after="4h")])
    late = engine.work(engine.fire(an_event(engine, age=timedelta(hours=5))))
    assert late.state is State.ESCALATED
    assert engine.lamps.switched == []
    assert engine.work(engine.fire(an_event(engine, 1, ident="2", age=timedelta(hours=3)))).ending is Ending.HELPED


def test_an_observed_event_is_over_and_nothing_is_done_about_it_when_the_rule_enforces(new_engine: NewEngine) -> None:
    engine = new_engine([event_rule(mode="observe")])
    event = an_event(engine)
    done = engine.work(engine.fire(event))
    assert (done.state, done.ending) == (State.CLOSED, Ending.OBSERVED)
    engine.change([event_rule()])
    assert take(engine.store, engine.inventory, [event], complete=False).opened == ()
    assert engine.store.due() == []


def test_an_event_of_which_a_part_was_left_out_is_not_good(new_engine: NewEngine) -> None:
    engine = new_engine([event_rule(parameters=BOTH)])
    engine.lamps.put("second", "on")
    put = engine.lamps.put

    def then_paused(lamp: str, state: str) -> None:
        put(lamp, state)
        engine.store.pause("enough", who="ann")

    engine.lamps.put = then_paused  # type: ignore[method-assign]
    done = engine.work(engine.fire(an_event(engine)))
    assert done.state is State.ESCALATED
    assert "applied in part" in done.reason
    assert "paused by ann" in done.reason


def test_an_interrupted_event_whose_rest_is_not_what_was_admitted_is_not_good(new_engine: NewEngine) -> None:
    engine = new_engine([event_rule()])
    incident = killed_at(engine, engine.fire(an_event(engine)), "before")
    engine.lamps.put("lamp", "glowing")  # another change than the admitted one
    done = engine.work(incident)
    assert done.state is State.ESCALATED
    assert "not what was admitted" in done.reason
    assert engine.lamps.switched == []


# What was decided since


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "observe"}, "says observe"),
        ({"playbook": "toy.switch_off_for_good"}, "names toy.switch_off_for_good"),
        ({"target": "attic"}, "on attic by now"),
    ],
    ids=["observe", "another playbook", "another target"],
)
def test_what_a_killed_run_has_left_is_not_done_by_a_rule_that_says_something_else(
    new_engine: NewEngine, change: dict[str, Any], said: str
) -> None:
    engine = new_engine()
    incident = killed_at(engine, engine.fire(), "before")
    engine.change([a_rule(**change)])
    done = engine.work(incident)
    assert done.state is State.ESCALATED
    assert said in done.reason
    assert engine.lamps.switched == []
    assert open_claims(engine) == []


def test_a_freeze_holds_for_what_a_killed_run_has_left(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = killed_at(engine, engine.fire(), "before")
    begins = engine.clock.now() - timedelta(minutes=1)
    freeze = {"starts": begins.isoformat(), "ends": (begins + timedelta(hours=1)).isoformat(), "why": "the launch"}
    engine.change([a_rule()], freezes=[freeze])
    done = engine.work(incident)
    assert done.state is State.ESCALATED
    assert "the launch" in done.reason
    assert engine.lamps.switched == []


def test_the_undo_of_another_playbook_is_not_tried_on_what_was_applied(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(playbook="toy.switch_off_for_good")])
    incident = engine.fire()
    engine.clock.slept = engine.end
    done = engine.work(incident)
    assert done.ending is Ending.HELPED
    asked = engine.store.move(done, State.UNDOING, "ann asked", actor="ann", ending=None, closed_at=None)
    engine.change([a_rule()])
    assert engine.work(asked).state is State.ESCALATED
    assert [to for _, _, to in engine.lamps.switched] == ["off"]


def test_a_silence_that_is_set_while_the_plan_is_made_stops_the_change_at_once(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        labels = {"alertname": "LampOn", "instance": "node-1"}
        am.fire(labels)
        system = {"id": "am", "kind": "alertmanager", "urls": [am.url], "settled_after": "1s"}
        desk = new_desk(alertmanagers=["am"], systems=[system])
        (incident,) = poll_alerts(desk.access, desk.store, budget=20).opened
        state = desk.lamps.state
        admit = desk.store.admit

        def silenced(*arguments: Any, **more: Any) -> Any:
            """All guards have looked and allowed: the last moment before the change."""
            am.silence(labels)
            return admit(*arguments, **more)

        desk.store.admit = silenced  # type: ignore[method-assign]
        done = Worker(desk.access, desk.store, Sources(desk.access, desk.store), "run 1").work(incident.id)
        assert done.state is State.SUPPRESSED
        assert "a silence lies on it" in done.reason
        assert state("lamp") == "on"


# Alerting that has broken


LAMP, WATCHDOG = {"alertname": "LampOn", "instance": "node-1"}, {"alertname": "Watchdog"}


def watched_desk(new_desk: NewDesk, am: prometheus_rig.Alertmanager, **rule: Any) -> Desk:
    system = {"id": "am", "kind": "alertmanager", "urls": [am.url], "settled_after": "1s", "watchdog": {}}
    desk = new_desk([a_rule(**rule)], alertmanagers=["am"], systems=[system])
    settled(desk)
    return desk


def dropped(am: prometheus_rig.Alertmanager, *labels: dict[str, str]) -> None:
    """As Alertmanager does with what nobody sends any more."""
    am.resolve(*labels)
    eventually(lambda: all(one["labels"] not in labels for one in am.alerts()), why="it is listed still")


def worked_on(desk: Desk, am: prometheus_rig.Alertmanager, *lost: dict[str, str]) -> Incident:
    """The incident of the lamp; right after the change Alertmanager drops what is `lost`."""
    am.fire(LAMP, WATCHDOG)
    (incident,) = poll_alerts(desk.access, desk.store, budget=20).opened
    put = desk.lamps.put

    def then_dropped(lamp: str, state: str) -> None:
        put(lamp, state)
        dropped(am, *lost)

    desk.lamps.put = then_dropped  # type: ignore[method-assign]
    return Worker(desk.access, desk.store, Sources(desk.access, desk.store), "run 1").work(incident.id)


def test_an_alert_that_is_gone_with_the_watchdog_is_no_help_and_goes_to_people(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        desk = watched_desk(new_desk, am, verify={"within": "2s", "every": "1s"})
        done = worked_on(desk, am, LAMP, WATCHDOG)
        assert done.state is State.ESCALATED
        assert "whether it helped is not known" in done.reason
        assert 'the watchdog {alertname="Watchdog"} is not listed' in done.reason
        assert desk.lamps.state("lamp") == "off", "what is not known to be bad is not undone"
        assert [claim.helped for claim in desk.store.claims(done.opened_at)] == [False]


def test_an_alert_that_is_gone_while_the_watchdog_arrives_was_helped(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        done = worked_on(watched_desk(new_desk, am, verify={"within": "5m", "every": "1s"}), am, LAMP)
        assert (done.ending, done.reason) == (Ending.HELPED, "it helped: the alert has ended")


def test_nothing_is_planned_for_an_alert_that_is_gone_with_the_watchdog(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        desk = watched_desk(new_desk, am)
        am.fire(LAMP, WATCHDOG)
        (incident,) = poll_alerts(desk.access, desk.store, budget=20).opened
        dropped(am, LAMP, WATCHDOG)
        done = Worker(desk.access, desk.store, Sources(desk.access, desk.store), "run 1").work(incident.id)
        assert done.state is State.SUPPRESSED
        assert "the watchdog" in done.reason
        assert desk.lamps.switched == []


def test_a_poll_without_the_watchdog_ends_no_incident_until_it_is_back(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        desk = watched_desk(new_desk, am)

        def tick() -> Polls:
            return poll_alerts(desk.access, desk.store, budget=20)

        am.fire(LAMP, WATCHDOG)
        (incident,) = tick().opened
        eventually(lambda: tick().doubts == (), why="the watchdog is there, and settled")
        dropped(am, LAMP, WATCHDOG)
        assert tick().doubts == ('am: the watchdog {alertname="Watchdog"} is not listed',)
        assert [one.id for one in desk.store.list()] == [incident.id]
        assert incident.fingerprint in [one.fingerprint for one in desk.store.firing("alertmanager")]
        am.fire(WATCHDOG)
        eventually(lambda: tick() and desk.store.list() == [], why="Prometheus sends again, and does not send this one")


# Approvals


def test_a_plan_that_nobody_decides_on_is_given_to_people_in_the_end(new_engine: NewEngine) -> None:
    engine = new_engine([event_rule(approval="always", give_up_after="4h")])
    waits = engine.work(engine.fire(an_event(engine)))
    assert waits.state is State.WAITING
    assert engine.store.due() == []
    engine.clock.at += timedelta(hours=4)
    assert [one.id for one in engine.store.due()] == [waits.id]
    assert engine.work(waits).state is State.ESCALATED
    assert engine.lamps.switched == []


# One at a time


def two_in_one_domain(new_engine: NewEngine) -> tuple[Engine, Incident, Incident]:
    """What was applied in the hall helped and is to be undone; something else is begun in the cellar, which is the hall's domain."""
    rules = [
        a_rule(parameters={"undo_after_seconds": 600}, cooldown="0s"),
        a_rule(id="below", alert=["alertname=Below"], target="cellar", cooldown="0s", parameters={"lamps": ["below"]}),
    ]
    engine = new_engine(rules)
    held = engine.fire()
    engine.clock.slept = engine.end
    assert engine.work(held).state is State.HELD
    engine.clock.slept = lambda: None
    engine.clock.at += timedelta(minutes=11)
    engine.lamps.put("below", "on")
    below = engine.fire(a_signal("b", at=engine.clock.now(), labels={"alertname": "Below"}), rule="below")
    return engine, held, below


def test_an_undo_waits_until_nobody_acts_in_its_failure_domain(new_engine: NewEngine) -> None:
    engine, held, below = two_in_one_domain(new_engine)
    killed_at(engine, below, "applied")
    before = list(engine.lamps.switched)
    assert engine.work(held).state is State.UNDOING
    assert engine.lamps.switched == before
    engine.clock.slept = lambda: engine.end("b")
    assert engine.work(below).ending is Ending.HELPED
    engine.clock.at += timedelta(minutes=3)
    assert [one.id for one in engine.store.due()] == [held.id]
    assert engine.work(held).ending is Ending.HELPED
    assert engine.lamps.state("lamp") == "on"
    assert open_claims(engine) == []


def test_nobody_acts_in_the_failure_domain_of_an_undo_that_was_killed(new_engine: NewEngine) -> None:
    engine, held, below = two_in_one_domain(new_engine)
    killed_at(engine, held, "before")
    assert open_claims(engine) == [held.id]
    done = engine.work(below)
    assert done.state is State.SUPPRESSED
    assert done.reason.startswith("failure domain")
    assert engine.work(held).ending is Ending.HELPED
    assert open_claims(engine) == []


def test_an_undo_by_itself_keeps_the_failure_domain_from_the_action_on(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    put, seen = engine.lamps.put, list[list[str]]()

    def looked(lamp: str, state: str) -> None:
        seen.append(open_claims(engine))
        put(lamp, state)

    engine.lamps.put = looked  # type: ignore[method-assign]
    assert engine.work(incident).state is State.ESCALATED
    assert [to for _, _, to in engine.lamps.switched] == ["off", "on"]
    assert seen == [[incident.id], [incident.id]]
    (claim,) = engine.store.claims(incident.opened_at)
    assert claim.helped is False
    assert claim.ended_at is not None


def test_what_is_open_anew_cannot_be_undone_beside_itself(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(cooldown="0s")])
    incident = engine.fire()
    engine.clock.slept = engine.end
    done = engine.work(incident)
    engine.clock.at += timedelta(minutes=1)
    engine.fire()
    with pytest.raises(ConflictError, match="another incident"):
        engine.store.move(done, State.UNDOING, "ann asked", actor="ann", ending=None, closed_at=None)


def test_a_trial_of_the_circuit_in_which_nothing_was_tried_does_not_close_it(new_engine: NewEngine) -> None:
    rule = a_rule(playbook="toy.switch_off_for_good", cooldown="0s", max_attempts=1)
    engine = new_engine([rule], breaker={"failures": 1, "within": "1h", "open_for": "1h"})
    assert engine.work(engine.fire()).state is State.ESCALATED
    engine.clock.at += timedelta(hours=1, minutes=1)
    engine.lamps.put("lamp", "on")
    admit = engine.store.admit

    def then_silenced(*arguments: Any, **more: Any) -> Any:
        done = admit(*arguments, **more)
        engine.eyes.signals["f2"] = a_signal("f2", at=engine.clock.now(), silenced=True)
        return done

    engine.store.admit = then_silenced  # type: ignore[method-assign]
    trial = engine.work(engine.fire(a_signal("f2", at=engine.clock.now())))
    assert (trial.state, trial.attempts) == (State.SUPPRESSED, 1)
    engine.store.admit = admit  # type: ignore[method-assign]
    claims = engine.store.claims(engine.clock.now() - timedelta(days=1))
    assert [(claim.helped, claim.ended_at is None) for claim in claims] == [(False, False), (None, False)]
    again = engine.work(engine.fire(a_signal("f3", at=engine.clock.now())))
    assert (again.state, again.attempts) == (State.ESCALATED, 1), "the next one is the trial, and does not help"
    engine.lamps.put("lamp", "on")
    last = engine.work(engine.fire(a_signal("f4", at=engine.clock.now())))
    assert last.reason.startswith("circuit breaker: open")
