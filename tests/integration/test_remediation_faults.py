"""Bad days of remediation: storms, several Alertmanagers, lost runs, killed servers, clocks that jump, what nobody would come back to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest

from jobs.remediation import build_jobs
from ops_platform.clients.alertmanager import NoWatchdogError
from ops_platform.errors import ConflictError, OpsError, UnreachableError
from ops_platform.ledger import Ledger
from ops_platform.remediation.intake import MOST, take
from ops_platform.remediation.model import Ending, Incident, State
from ops_platform.remediation.sources import Sources, poll_alerts, read_events
from ops_platform.remediation.store import Store
from ops_platform.remediation.worker import Worker
from ops_platform.resources import PlatformResource
from sensors.remediation import LOST_AFTER, build_sensors
from tests import prometheus_rig
from tests.kafka_rig import Kafka
from tests.remediation_rig import (
    Desk,
    Engine,
    FakeEyes,
    Lamps,
    SwitchOff,
    a_rule,
    a_signal,
    new_desk,
    new_engine,
    settled,
)
from tests.rig import Cluster, eventually

__all__ = ["new_desk", "new_engine"]
NewEngine = Callable[..., Engine]
NewDesk = Callable[..., Desk]


def am_system(name: str, *members: Any) -> dict[str, Any]:
    return {"id": name, "kind": "alertmanager", "urls": [one.url for one in members], "settled_after": "1s"}


def lamp(number: int = 0) -> dict[str, str]:
    return {"alertname": "LampOn", "instance": f"node-{number}"}


# Storms and several Alertmanagers


def test_ten_thousand_alerts_are_taken_in_turns_and_none_is_lost(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        am.fire(*(lamp(number) for number in range(10_000)))
        desk = new_desk(alertmanagers=["am"], systems=[am_system("am", am)])
        seen: set[str] = set()
        for tick in range(1, 4):
            polls = poll_alerts(desk.access, desk.store, budget=30)
            assert polls.failed == ()
            assert len(polls.opened) == MOST
            assert polls.left == 10_000 - tick * MOST
            assert seen.isdisjoint(one.fingerprint for one in polls.opened)
            seen |= {one.fingerprint for one in polls.opened}
        assert len(desk.store.firing("alertmanager")) == 10_000, (
            "each is kept for replay, whether it has its turn yet or not"
        )


def test_what_is_closed_and_still_fires_takes_no_place_from_what_is_new(new_engine: NewEngine) -> None:
    engine = new_engine()
    old = [a_signal(f"a{number:03}") for number in range(MOST)]
    for incident in take(engine.store, engine.inventory, old, complete=True).opened:
        engine.store.close(incident, Ending.BY_HAND, "people have dealt with it", actor="ann")
    taken = take(engine.store, engine.inventory, [*old, a_signal("new")], complete=True)
    assert [one.fingerprint for one in taken.opened] == ["new"]
    assert taken.left == 0


def test_one_alert_at_two_members_of_a_cluster_is_one_incident(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanagers(count=2) as members:
        for one in members:
            one.fire(lamp())
        desk = new_desk(alertmanagers=["am"], systems=[am_system("am", *members)])
        polled = [poll_alerts(desk.access, desk.store, budget=20) for _ in range(2)]
        assert [len(polls.opened) for polls in polled] == [1, 0]
        assert len(desk.store.list()) == 1


def test_two_clusters_are_one_source_a_silence_in_either_counts_and_only_both_say_what_ended(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as one, prometheus_rig.alertmanager() as other:
        desk = new_desk(
            [a_rule(mode="observe")], alertmanagers=["one", "other"],
            systems=[am_system("one", one), am_system("other", other)],
        )  # fmt: skip

        def tick() -> list[str]:
            poll_alerts(desk.access, desk.store, budget=20)
            return [incident.id for incident in desk.store.list()]

        one.fire(lamp())
        other.fire(lamp(), lamp(1))
        opened = poll_alerts(desk.access, desk.store, budget=20).opened
        assert len(opened) == 2
        both = next(incident for incident in opened if incident.signal.labels == lamp())
        one.silence(lamp())
        eventually(
            lambda: (found := Sources(desk.access, desk.store).look(both)) is not None and found.silenced,
            why="the silence of one cluster is not seen",
        )
        other.resolve(lamp(), lamp(1))
        eventually(lambda: other.alerts() == [], why="it is not resolved")
        eventually(lambda: tick() == [both.id], why="at the first cluster it still fires, and the other one nowhere")
        other.daemon.stop()
        one.resolve(lamp())
        eventually(lambda: one.alerts() == [], why="it is not resolved")
        assert len(poll_alerts(desk.access, desk.store, budget=20).failed) == 1
        assert [incident.id for incident in desk.store.list()] == [both.id], (
            "one of both was not heard: nothing has ended"
        )
        other.daemon.start()
        eventually(lambda: tick() == [], why="both were heard, and it fires nowhere")


def test_a_watchdog_that_stops_arriving_is_an_incident_until_it_arrives_again(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        system = {**am_system("am", am), "watchdog": {"absent_for": "1s"}}
        rule = a_rule(alert=["alertname=WatchdogAbsent", "alertmanager=am"], mode="observe")
        desk = new_desk([rule], alertmanagers=["am"], systems=[system])

        def tick() -> list[Incident]:
            poll_alerts(desk.access, desk.store, budget=20)
            return desk.store.list()

        am.fire(watchdog := {"alertname": "Watchdog"})
        eventually(lambda: desk.store.last_seen("watchdog/am") or tick())
        assert tick() == []
        am.resolve(watchdog)
        (missed,) = eventually(tick, why="it does not arrive any more")
        assert missed.signal.labels["alertname"] == "WatchdogAbsent"
        am.daemon.stop()
        assert [one.id for one in tick()] == [missed.id], "nobody can say that it arrives again"
        am.daemon.start()
        am.fire(watchdog)
        eventually(lambda: not tick(), why="it arrives again")


def test_a_watchdog_that_is_listed_and_not_sent_any_more_is_an_incident_too(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        system = {**am_system("am", am), "watchdog": {"absent_for": "1s", "fresh_for": "1s"}}
        desk = new_desk([a_rule(alert=["alertname=WatchdogAbsent"], mode="observe")], alertmanagers=["am"], systems=[system])  # fmt: skip

        def tick() -> list[Incident]:
            poll_alerts(desk.access, desk.store, budget=20)
            return desk.store.list()

        am.fire(watchdog := {"alertname": "Watchdog"})
        eventually(tick, why="it was sent once, and not again")
        assert [one["labels"] for one in am.alerts()] == [watchdog]

        def sent_again() -> bool:
            am.fire(watchdog)
            return tick() == []

        eventually(sent_again, why="it is sent again")


def test_what_one_cluster_lists_fires_though_the_watchdog_of_another_one_is_away(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as one, prometheus_rig.alertmanager() as other:
        systems = [{**am_system("one", one), "watchdog": {}}, am_system("other", other)]
        desk = new_desk([a_rule(mode="observe")], alertmanagers=["one", "other"], systems=systems)
        eyes = Sources(desk.access, desk.store)
        settled(desk)
        other.fire(lamp())
        (incident,) = poll_alerts(desk.access, desk.store, budget=20).opened
        assert eyes.look(incident) is not None
        other.resolve(lamp())
        eventually(lambda: other.alerts() == [], why="it is not resolved")
        with pytest.raises(NoWatchdogError, match="the watchdog"):
            eyes.look(incident)


# Sensors


def ticked(desk: Desk, name: str, *, cursor: str | None = None) -> Any:
    """One evaluation, as the daemon makes it."""
    (sensor,) = (one for one in build_sensors(desk.access.inventory, build_jobs()) if one.name == name)
    with dg.DagsterInstance.ephemeral() as instance:
        platform = PlatformResource(inventory_path=str(desk.file))
        context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"platform": platform})
        return sensor(context)


def keys(result: Any) -> list[str]:
    return [request.run_key for request in result.run_requests]


def test_an_alertmanager_that_is_away_is_a_failed_tick_and_ends_nothing(new_desk: NewDesk) -> None:
    with prometheus_rig.alertmanager() as am:
        desk = new_desk(alertmanagers=["am"], systems=[am_system("am", am)])
        am.fire(lamp())
        (request,) = ticked(desk, "alerts").run_requests
        (incident,) = desk.store.list()
        assert request.tags["ops/incident"] == incident.id
        config = request.run_config["ops"]["work_on_incident"]["config"]
        assert config == {"incident": incident.id, "version": incident.version}
    with pytest.raises(dg.Failure, match="am:"):
        ticked(desk, "alerts")
    assert [one.id for one in desk.store.list()] == [incident.id]


def test_a_tick_without_the_watchdog_says_so(new_desk: NewDesk, capsys: pytest.CaptureFixture[str]) -> None:
    with prometheus_rig.alertmanager() as am:
        desk = new_desk(alertmanagers=["am"], systems=[{**am_system("am", am), "watchdog": {}}])
        am.fire(lamp())
        assert len(ticked(desk, "alerts").run_requests) == 1
    assert "nothing has ended for all we know: am: the watchdog" in capsys.readouterr().err


def aged(desk: Desk, seconds: float) -> None:
    """As if everything had been left alone for so long."""
    with desk.store.transaction() as t:
        t.connection.execute(
            "update ops_remediation.incidents set updated_at = updated_at - %s", [timedelta(seconds=seconds)]
        )


def test_a_lost_run_is_asked_for_again_with_a_key_of_its_own_and_once_per_period(new_desk: NewDesk) -> None:
    desk = new_desk()
    (incident,) = desk.fire("a")
    assert ticked(desk, "incidents").run_requests == []
    aged(desk, LOST_AFTER + 5)
    first = keys(ticked(desk, "incidents"))
    assert first == keys(ticked(desk, "incidents")) == [f"{incident.id}/{incident.version}/1"]
    aged(desk, LOST_AFTER)
    assert keys(ticked(desk, "incidents")) == [f"{incident.id}/{incident.version}/2"]


def test_a_tick_asks_for_no_more_than_a_hundred_runs_and_never_forgets_what_is_half_changed(new_desk: NewDesk) -> None:
    desk = new_desk()
    opened = [*desk.fire(*(f"f{number:03}" for number in range(100))), *desk.fire("approved", "half")]
    approved, half = opened[-2:]
    now = desk.store.clock.now()
    for incident in opened[:-2]:
        desk.store.move(incident, State.SUPPRESSED, "not now", actor="test", retry_at=now)
    aged(desk, 1000)
    plan = {"digest": "d" * 64, "plan": {"changes": []}}
    waits = desk.store.move(approved, State.WAITING, "who approves?", actor="test", retry_at=None, **plan)
    desk.store.decide(waits, plan["digest"], "approve", who="bea", via="test", valid_for=timedelta(hours=1))
    desk.store.move(half, State.APPLYING, "attempt 1", actor="test")
    with desk.store.transaction() as t:
        t.connection.execute(
            "update ops_remediation.incidents set updated_at = %s where id = %s",
            [now - timedelta(seconds=130), half.id],
        )
    found = ticked(desk, "incidents").run_requests
    assert len(found) == MOST
    assert [request.tags["ops/incident"] for request in found[:2]] == [half.id, approved.id]


def test_events_read_again_after_a_daemon_was_killed_before_its_cursor_open_and_ask_for_nothing_twice(
    new_desk: NewDesk, kafka: Kafka
) -> None:
    topic, letters = kafka.create_topic(), kafka.create_topic()
    host, _, port = kafka.bootstrap.split(",")[0].rpartition(":")
    system = {"id": "bus", "kind": "kafka", "bootstrap": [{"host": host, "port": int(port)}], "tls": False}
    rule = {**a_rule(event={"type": "com.example.dark"})}
    del rule["alert"], rule["verify"]
    source = {"kafka": "bus", "topics": [topic], "dead_letter": letters, "start": "earliest"}
    desk = new_desk([rule], systems=[system], events=[source])
    for number in range(3):
        body = f'{{"specversion":"1.0","id":"{number}","source":"/hall","type":"com.example.dark","data":{{}}}}'
        kafka.produce(topic, body.encode(), headers=[("content-type", b"application/cloudevents+json")])
    # The incidents stand in the database, and whoever read them dies: neither its requests nor its cursor are stored.
    lost = read_events(desk.access, desk.store, 0, cursor=None, budget=20)
    assert len(lost.opened) == 3
    again = ticked(desk, "events")
    assert len(desk.store.list(all_=True)) == 3
    assert again.cursor == lost.cursor
    assert keys(again) == []
    # The runs that were never asked for are asked for as lost ones, once each.
    aged(desk, LOST_AFTER + 5)
    found = [keys(ticked(desk, "incidents")) for _ in range(2)]
    assert sorted(found[0]) == sorted(f"{one.id}/1/1" for one in lost.opened)
    assert found[0] == found[1]
    assert keys(ticked(desk, "events", cursor=again.cursor)) == []


def test_the_run_of_an_older_version_succeeds_and_changes_nothing(new_desk: NewDesk) -> None:
    desk = new_desk()
    (incident,) = desk.fire("a")
    moved = desk.store.move(incident, State.SUPPRESSED, "not now", actor="test", retry_at=desk.store.clock.now())
    before = [entry.kind for entry in desk.store.ledger.entries()]
    done = build_jobs()["remediate"].execute_in_process(
        run_config={"ops": {"work_on_incident": {"config": {"incident": incident.id, "version": incident.version}}}},
        resources={"platform": PlatformResource(inventory_path=str(desk.file))},
    )
    assert done.success
    assert desk.store.get(incident.id) == moved
    assert [entry.kind for entry in desk.store.ledger.entries()] == before
    assert desk.lamps.switched == []


def test_the_run_of_a_conflict_that_is_none_of_turns_fails(new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = new_desk()
    (incident,) = desk.fire("a")

    def conflict(*_: object) -> None:
        raise ConflictError("this incident is open, and cannot be undoing from there")

    monkeypatch.setattr(Worker, "work", conflict)
    done = build_jobs()["remediate"].execute_in_process(
        run_config={"ops": {"work_on_incident": {"config": {"incident": incident.id}}}},
        resources={"platform": PlatformResource(inventory_path=str(desk.file))},
        raise_on_error=False,
    )
    assert not done.success


def test_the_sensor_that_goes_on_with_incidents_forgets_what_is_old(new_desk: NewDesk) -> None:
    desk = new_desk(signals_kept="1d")
    began = desk.store.clock.now() - timedelta(days=2)
    desk.store.saw([a_signal("old", at=began, ends_at=began + timedelta(hours=1)), a_signal("firing", at=began)])
    ticked(desk, "incidents")
    kept = desk.store.history(began, desk.store.clock.now())
    assert [signal.fingerprint for _, signal in kept] == ["firing"]


# What nobody would come back to


def test_what_ended_while_it_was_worked_on_is_closed_once_people_have_it(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(playbook="toy.switch_off_for_good", max_attempts=1)])
    incident = engine.fire()

    def seen_by_a_tick() -> None:
        take(engine.store, engine.inventory, [], complete=True)

    engine.clock.slept = seen_by_a_tick
    assert engine.work(incident).state is State.ESCALATED
    assert engine.store.get(incident.id).signal_ended_at is not None
    ended = take(engine.store, engine.inventory, [], complete=True).ended
    assert [(one.id, one.ending) for one in ended] == [(incident.id, Ending.BY_HAND)]


def test_what_ended_and_fires_anew_is_another_incident_and_not_swallowed_by_the_first(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(playbook="toy.switch_off_for_good", max_attempts=1)])
    incident = engine.fire()

    def seen_by_a_tick() -> None:
        take(engine.store, engine.inventory, [], complete=True)

    engine.clock.slept = seen_by_a_tick
    engine.work(incident)
    engine.clock.at += timedelta(minutes=1)
    anew = a_signal(at=engine.clock.now())
    take(engine.store, engine.inventory, [anew], complete=True)
    (opened,) = take(engine.store, engine.inventory, [anew], complete=True).opened
    assert opened.id != incident.id
    assert engine.store.get(incident.id).ending is Ending.BY_HAND


def test_what_was_meant_for_a_time_and_could_not_be_undone_stays_with_people(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(parameters={"undo_after_seconds": 600})])
    incident = engine.fire()
    engine.clock.slept = engine.end
    assert engine.work(incident).state is State.HELD
    engine.clock.at += timedelta(minutes=11)
    engine.lamps.undo_fails = "the switch is stuck"
    assert engine.work(incident).state is State.ESCALATED
    for _ in range(2):
        take(engine.store, engine.inventory, [], complete=True)
    assert engine.store.get(incident.id).state is State.ESCALATED


def applied_and_killed(engine: Engine) -> Incident:
    incident = engine.fire()

    def killed() -> None:
        raise SystemExit

    engine.clock.slept = killed
    with pytest.raises(SystemExit):
        engine.work(incident)
    engine.clock.slept = lambda: None
    found = engine.store.get(incident.id)
    assert found.state is State.VERIFYING
    return found


def open_claims(engine: Engine) -> list[str]:
    return [claim.incident for claim in engine.store.claims(engine.clock.now()) if claim.ended_at is None]


def test_a_rule_that_is_gone_in_the_middle_leaves_its_failure_domain_free(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = applied_and_killed(engine)
    assert open_claims(engine) == [incident.id]
    engine.change([a_rule(id="another")])
    assert engine.work(incident).state is State.ESCALATED
    assert open_claims(engine) == []


def test_an_incident_closed_by_hand_in_the_middle_leaves_its_failure_domain_free(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = applied_and_killed(engine)
    engine.store.close(incident, Ending.BY_HAND, "done by hand", actor="ann")
    assert open_claims(engine) == []


def test_a_mistake_of_ours_in_the_middle_of_a_change_is_made_once(new_engine: NewEngine) -> None:
    engine = new_engine()
    incident = engine.fire()
    put = engine.lamps.put

    def mistaken(name: str, state: str) -> None:
        put(name, state)
        raise KeyError("lamp")

    engine.lamps.put = mistaken  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        engine.work(incident)
    found = engine.store.get(incident.id)
    assert found.state is State.ESCALATED
    assert "unexpected KeyError" in found.reason
    assert open_claims(engine) == []
    engine.clock.at += timedelta(hours=1)
    assert engine.store.due() == []


# Clocks


@pytest.mark.parametrize("jump", [timedelta(hours=-6), timedelta(days=-400)], ids=["hours back", "a year back"])
def test_a_clock_that_jumps_back_frees_neither_cooldown_nor_budget(new_engine: NewEngine, jump: timedelta) -> None:
    rules = [a_rule(cooldown="1h"), a_rule(id="often", alert=["alertname=Often"], cooldown="0s")]
    rules[1]["budget"] = {"count": 1, "per": "1d"}
    engine = new_engine(rules)

    def both_end() -> None:
        engine.end("f1")
        engine.end("o1")

    engine.clock.slept = both_end
    assert engine.work(engine.fire()).ending is Ending.HELPED
    engine.lamps.put("lamp", "on")
    often = {"alertname": "Often"}
    assert (
        engine.work(engine.fire(a_signal("o1", at=engine.clock.now(), labels=often), rule="often")).ending
        is Ending.HELPED
    )
    engine.clock.at += jump
    engine.lamps.put("lamp", "on")
    cool = engine.work(engine.fire(a_signal("f2", at=engine.clock.now())))
    spent = engine.work(engine.fire(a_signal("o2", at=engine.clock.now(), labels=often), rule="often"))
    assert cool.reason.startswith("cooldown")
    assert "budget of the rule: 1 of 1 used" in spent.reason
    assert len(engine.lamps.switched) == 2


@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)], ids=["forward", "back"])
def test_a_clock_that_jumps_away_from_the_databases_lets_nothing_be_applied(new_desk: NewDesk, jump: timedelta) -> None:
    desk = new_desk([a_rule(approval="always")])
    (incident,) = desk.fire("a")
    waits = desk.work(incident)
    assert waits.digest is not None
    desk.store.decide(waits, waits.digest, "approve", who="bea", via="test", valid_for=timedelta(hours=1))

    class Jumped:
        def now(self) -> Any:
            return real.now() + jump

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    real = desk.store.clock
    desk.store.clock = Jumped()  # type: ignore[assignment]
    desk.work(incident)
    found = desk.store.get(incident.id)
    assert found.attempts == 0
    assert desk.lamps.switched == []
    assert "clock" in {ruling["guard"] for ruling in found.rulings if not ruling["allows"]}


# The platform's own PostgreSQL, and two processes


@pytest.fixture
def apart(
    new_engine: NewEngine, new_cluster: Callable[..., Cluster], shared_cluster: Cluster
) -> Iterator[tuple[Engine, Cluster]]:
    """An engine whose incidents are in a PostgreSQL that may be killed, and whose lamps are in another one."""
    toys = new_engine()  # the toy playbooks are known from here on
    with contextlib.ExitStack() as stack:
        own = new_cluster(18)
        engine = Engine(own, "postgres", [a_rule()])
        stack.callback(lambda: contextlib.suppress(psycopg.Error, OpsError) and engine.ledger.close())
        engine.lamps.connection.close()
        engine.lamps = SwitchOff.lamps = toys.lamps
        yield engine, own


def killed(cluster: Cluster) -> None:
    pid = cluster.server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: cluster.server.pid is None, why="it is still there")


@pytest.mark.parametrize("moment", ["between the claim and the change", "between the change and its note"])
def test_the_platforms_database_killed_in_the_middle_doubles_nothing_and_the_incident_is_brought_to_its_end(
    apart: tuple[Engine, Cluster], moment: str
) -> None:
    engine, own = apart
    incident = engine.fire()
    put, state = engine.lamps.put, engine.lamps.state
    admitted = engine.store.admit

    def admit(*arguments: Any, **more: Any) -> Any:
        done = admitted(*arguments, **more)
        killed(own)
        return done

    def put_and_kill(name: str, to: str) -> None:
        put(name, to)
        killed(own)

    if moment == "between the claim and the change":
        engine.store.admit = admit  # type: ignore[method-assign]
    else:
        engine.lamps.put = put_and_kill  # type: ignore[method-assign]
    with pytest.raises(OpsError):
        engine.work(incident)
    engine.store.admit, engine.lamps.put = admitted, put  # type: ignore[method-assign]
    was = len(engine.lamps.switched)
    assert was == (0 if moment == "between the claim and the change" else 1)
    with pytest.raises(UnreachableError):
        engine.work(incident)
    assert len(engine.lamps.switched) == was, "with the database away nothing acts"
    own.server.start()
    engine.clock.at += timedelta(minutes=3)
    assert [one.id for one in engine.store.due()] == [incident.id]
    engine.clock.slept = engine.end
    done = engine.work(incident)
    assert (done.state, done.ending, done.attempts) == (State.CLOSED, Ending.HELPED, 1)
    assert [to for _, _, to in engine.lamps.switched] == ["off"]
    assert state("lamp") == "off"
    assert open_claims(engine) == []
    assert engine.ledger.verify().ok


def _process(desk_file: str, incident: str, lamps: Callable[[], psycopg.Connection[Any]], gate: Any, said: Any) -> None:
    from pathlib import Path

    from ops_platform.clients.access import Access
    from ops_platform.inventory import load
    from ops_platform.remediation.worker import Worker

    with Access(load(Path(desk_file))) as access, Ledger(access.platform_db) as ledger, lamps() as connection:
        connection.autocommit = True
        store = Store(ledger)
        SwitchOff.lamps = Lamps(connection)
        eyes = FakeEyes({"a": replace(a_signal("a"), starts_at=store.clock.now())})
        real = SwitchOff.lamps.put

        def put(name: str, state: str) -> None:
            said.put(("applies", os.getpid()))
            gate.wait(60)
            real(name, state)
            eyes.signals.clear()

        SwitchOff.lamps.put = put  # type: ignore[method-assign]
        try:
            done = Worker(access, store, eyes, f"process {os.getpid()}").work(incident)
            said.put((done.state.value, os.getpid()))
        except ConflictError:
            said.put(("left alone", os.getpid()))


def test_of_two_processes_on_one_incident_one_acts_and_the_other_leaves_it_alone(
    new_desk: NewDesk, shared_cluster: Cluster
) -> None:
    desk = new_desk()
    (incident,) = desk.fire("a")
    name = desk.lamps.connection.info.dbname
    fork = multiprocessing.get_context("fork")
    gate, said = fork.Event(), fork.Queue()
    arguments = (str(desk.file), incident.id, lambda: shared_cluster.server.connect(name), gate, said)
    both = [fork.Process(target=_process, args=arguments) for _ in range(2)]
    try:
        for one in both:
            one.start()
        first = [said.get(timeout=60) for _ in range(2)]
        assert {what for what, _ in first} == {"applies", "left alone"}, (
            "the other one ended while the first was in its change"
        )
        assert len({pid for _, pid in first}) == 2
        gate.set()
        assert said.get(timeout=60)[0] == "closed"
    finally:
        for one in both:
            one.join(30)
            if one.is_alive():
                one.kill()
    assert desk.lamps.state("lamp") == "off"
    kinds = [entry.kind for entry in desk.store.ledger.entries()]
    assert kinds.count("incident.applying") == kinds.count("action.outcome") == 1
