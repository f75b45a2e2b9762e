"""`ops events cursor` over a real broker, Dagster's web server and the ledger: what it shows, what it sets, what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from dagster import DagsterInstance
from dagster._core.remote_representation.handle import CompoundID
from dagster._core.scheduler.instigation import InstigatorType, TickData, TickStatus

from ops_platform.cli.main import cli
from ops_platform.clients.dagster import ask
from ops_platform.errors import ConflictError, NotThereError, OpsError
from ops_platform.events.cursor import Cursor
from ops_platform.events.reader import open_reader
from ops_platform.events.reset import EventsSensor, sensors
from tests import kafka_rig
from tests.dagster_rig import Web
from tests.remediation_rig import Desk, a_rule, inventory_body, new_desk
from tests.rig import scratch

__all__ = ["new_desk"]
pytestmark = [pytest.mark.xdist_group("events-cursor"), pytest.mark.timeout(600)]

_STATE = """query { repositoriesOrError { __typename ... on RepositoryConnection { nodes { sensors {
    name sensorState { id selectorId status } } } } } }"""
_STOP = "mutation($id: String) { stopSensor(id: $id) { __typename ... on Error { message } } }"
_START = """mutation($sensor: SensorSelector!) { startSensor(sensorSelector: $sensor) { __typename ... on Error { message } } }"""


@pytest.fixture(scope="module")
def web(kafka: kafka_rig.Kafka) -> Iterator[Web]:
    """Dagster over an inventory whose sensor `events` every test has its topics in; it is on, and no daemon runs it."""
    made = Web(scratch("ops-cursor-"))
    file = made.home / "platform.yaml"
    file.write_text(yaml.safe_dump(_body(kafka, ["t"], "dead", made)))
    with made.running(file):
        yield made


def _body(kafka: kafka_rig.Kafka, topics: list[str], dead: str, web: Web) -> dict[str, Any]:
    body = inventory_body(
        [a_rule(playbook="http.webhook", parameters={"url": "https://x.example", "secret": "env://X"})]
    )
    body["platform"]["dagster"] = {"url": web.url}
    body["systems"].append(_kafka(kafka) | {"environment": "test", "owner": "team"})
    body["remediation"]["events"] = [_source(topics, dead)]
    return body


def _kafka(kafka: kafka_rig.Kafka) -> dict[str, Any]:
    return {
        "id": "k",
        "kind": "kafka",
        "bootstrap": [{"host": "127.0.0.1", "port": kafka.brokers[0].port}],
        "tls": False,
    }


def _source(topics: list[str], dead: str) -> dict[str, Any]:
    return {"kafka": "k", "topics": topics, "dead_letter": dead, "start": "earliest"}


@dataclass
class Reading:
    """The sensor `events` with a topic of its own, and everything that looks at it."""

    desk: Desk
    kafka: kafka_rig.Kafka
    web: Web
    topic: str

    @property
    def sensor(self) -> EventsSensor:
        return sensors(self.desk.access)[0]

    @property
    def cursor(self) -> Cursor:
        return self.sensor.kept().cursor

    def read(self) -> list[str]:
        """A tick of the sensor, whose cursor Dagster keeps; what it brought."""
        with open_reader(self.desk.access, self.sensor.source) as reader:
            batch = reader.read(self.cursor)
        self.sensor.set(self.sensor.kept(), batch.cursor)
        return [signal.labels["id"] for signal in batch.signals]

    def ops(self, *words: str, code: int = 0) -> str:
        """In this process: what it prints, or what its error says."""
        done = CliRunner().invoke(cli, ["events", "cursor", *words], env=self.desk.env, standalone_mode=False)
        if isinstance(error := done.exception, OpsError):
            assert error.exit_code == code, error
            return str(error)
        assert error is None, error
        assert (done.return_value or 0) == code, done.output
        return done.output

    def show(self, *, code: int = 0) -> dict[str, Any]:
        (found,) = json.loads(self.ops("show", "--json", code=code))
        return found

    def switch(self, *, on: bool) -> None:
        api, kept = self.desk.access.dagster(), self.sensor.kept()
        if on:
            ask(api, _START, {"sensor": dict(kept.selector)}, "startSensor", "Sensor")
        elif kept.on:
            ask(api, _STOP, {"id": self.state["id"]}, "stopSensor", "StopSensorMutationResult")

    @property
    def state(self) -> dict[str, str]:
        nodes = ask(self.desk.access.dagster(), _STATE, {}, "repositoriesOrError", "RepositoryConnection")["nodes"]
        return next(one["sensorState"] for one in nodes[0]["sensors"] if one["name"] == "events")


def _event(number: int) -> str:
    return json.dumps({"specversion": "1.0", "id": str(number), "source": "/tests", "type": "com.example.t"})


@pytest.fixture
def reading(web: Web, kafka: kafka_rig.Kafka, new_desk: Callable[..., Desk]) -> Reading:
    """Five events were read of six; the sensor is off."""
    topic = kafka.create_topic(partitions=2)
    desk = new_desk(
        [a_rule()], systems=[_kafka(kafka)], events=[_source([topic], kafka.create_topic())],
        platform={"dagster": {"url": web.url}},
    )  # fmt: skip
    made = Reading(desk, kafka, web, topic)
    made.switch(on=False)
    kafka.produce(topic, *(_event(n) for n in range(3)), partition=0)
    kafka.produce(topic, *(_event(n) for n in range(3, 5)), partition=1)
    made.sensor.set(made.sensor.kept(), Cursor())
    assert made.read() == ["0", "1", "2", "3", "4"]
    kafka.produce(topic, _event(5), partition=1)
    return made


def digest_in(said: str) -> str:
    (found,) = re.findall(r"plan ([0-9a-f]{64})", said)
    return found


def test_it_shows_where_reading_stands_and_begins_the_topic_anew_once_its_plan_is_approved(reading: Reading) -> None:
    found = reading.show()
    assert (found["sensor"], found["topic"], found["state"]) == ("events", reading.topic, "goes on")
    assert [(p["partition"], p["next"], p["low"], p["high"]) for p in found["partitions"]] == [
        (0, 3, 0, 3),
        (1, 2, 0, 3),
    ]
    before = reading.cursor

    said = reading.ops("reset", reading.topic)
    assert "partition 1: read up to 2; there are 0 to 3; goes on at 0" in said
    assert reading.cursor == before
    reading.ops("reset", reading.topic, "--enforce", code=1)
    refused = reading.ops("reset", reading.topic, "--enforce", "--approve", "0" * 64, code=1)
    assert "refused by approval" in refused
    assert reading.cursor == before

    done = reading.ops("reset", reading.topic, "--enforce", "--approve", digest_in(said))
    assert "verified, cursor: holds" in done
    assert reading.topic not in reading.cursor.topics
    assert reading.show()["state"] == "not begun"
    assert reading.read() == ["0", "1", "2", "3", "4", "5"]
    entries = list(reading.desk.store.ledger.entries(subject="k"))
    assert [(e.kind, e.actor, e.body.get("verdict") or e.body.get("outcome") or e.body["status"]) for e in entries] == [
        ("action.plan", "ann", "observed"), ("action.plan", "ann", "refused"), ("action.plan", "ann", "refused"),
        ("action.plan", "ann", "apply"), ("action.outcome", "ann", "applied"), ("action.verification", "ann", "done"),
    ]  # fmt: skip
    assert reading.ops("reset", reading.topic, "--at", "0=3", "--at", "1=3").count("nothing to do") == 1


def test_it_goes_on_at_other_offsets_and_not_at_those_that_are_not_there(reading: Reading) -> None:
    assert "has the offsets 0 to 3, and not 4" in reading.ops("reset", reading.topic, "--at", "1=4", code=2)
    assert "has no partition 2" in reading.ops("reset", reading.topic, "--at", "2=0", code=2)
    assert "is not PARTITION=OFFSET" in reading.ops("reset", reading.topic, "--at", "1", code=2)
    assert "no topic 'else' is read" in reading.ops("reset", "else", code=2)
    words = ("reset", reading.topic, "--at", "0=2")
    reading.ops(*words, "--enforce", "--approve", digest_in(reading.ops(*words)))
    assert reading.read() == ["2", "5"]


def test_a_topic_that_was_made_anew_stands_until_it_is_begun_anew(reading: Reading) -> None:
    reading.kafka.recreate_topic(reading.topic, partitions=2)
    reading.kafka.produce(reading.topic, _event(7))
    with pytest.raises(ConflictError):
        reading.read()
    found = reading.show(code=1)
    assert found["state"] == "stands"
    assert found["id"] != found["id_now"]
    said = reading.ops("reset", reading.topic, "--at", "0=0", code=2)
    assert "what the cursor says of the partitions 1 does not hold" in said
    words = ("reset", reading.topic, "--at", "0=0", "--at", "1=0")
    reading.ops(*words, "--enforce", "--approve", digest_in(reading.ops(*words)))
    assert reading.cursor.topics[reading.topic].id == found["id_now"]
    assert reading.read() == ["7"]
    reading.kafka.delete_topic(reading.topic)
    with pytest.raises(NotThereError):
        reading.read()
    assert reading.show(code=1)["state"] == "stands"


def test_nothing_is_set_while_a_tick_may_write_over_it(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    before, approved = reading.cursor, ("--enforce", "--approve", digest_in(reading.ops("reset", reading.topic)))
    reading.switch(on=True)
    assert "refused by sensor is off" in reading.ops("reset", reading.topic, *approved, code=1)
    reading.switch(on=False)
    monkeypatch.setenv("DAGSTER_HOME", str(reading.web.home))
    with DagsterInstance.get() as instance:
        state = reading.state
        origin = CompoundID.from_string(state["id"]).remote_origin_id
        tick = TickData(origin, "events", InstigatorType.SENSOR, TickStatus.STARTED, 1000.0, selector_id=state["selectorId"])  # fmt: skip
        made = instance.create_tick(tick)
        assert "a tick of events still runs" in reading.ops("reset", reading.topic, *approved, code=1)
        instance.update_tick(made.with_status(TickStatus.SKIPPED))
    assert reading.cursor == before
    reading.ops("reset", reading.topic, *approved)
    assert reading.topic not in reading.cursor.topics


def test_a_cursor_that_moved_since_it_was_planned_is_left_alone(reading: Reading) -> None:
    from ops_platform.actions import Outcome
    from ops_platform.events.reset import ResetCursor

    action = ResetCursor(reading.sensor, reading.topic, {})
    (change,) = action.plan().changes
    assert action.check(change) is None
    assert reading.read() == ["5"]
    found = action.check(change)
    assert found is not None
    assert found.outcome is Outcome.CONTENDED
