"""What the local stack has to listen to and to act on: a Kafka broker, Redis, Alertmanager, Prometheus."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import urllib3
import yaml
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from ops_platform.clients.processes import stop
from ops_platform.errors import UnreachableError
from ops_platform.local import endpoint, sources, stack
from ops_platform.local.parts import Place
from ops_platform.local.stack import Stack
from tests.rig import eventually, missing, scratch

RULES = {
    "groups": [
        {
            "name": "tests",
            "rules": [
                {"alert": "Watchdog", "expr": "vector(1)"},
                {"alert": "ReceiverDown", "expr": 'up{component="wal-receiver"} == 0'},
            ],
        }
    ]
}


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Stack]]:
    """Starts one component after the other in a stack of its own, beside an inventory with rules for Prometheus."""
    home = scratch("ops-local-sources-")
    rules = home / "deploy" / "prometheus"
    rules.mkdir(parents=True)
    (rules / "tests.rules.yaml").write_text(yaml.safe_dump(RULES))
    (rules / "tests.rules.test.yaml").write_text("tests: []\n")  # for promtool; no server takes it
    monkeypatch.setenv("OPS_INVENTORY", str(home / "platform.yaml"))
    (home / "state").mkdir()
    made = Stack(Place(home / "state"), {})

    def ensure(name: str) -> Stack:
        component = next(each for each in sources.COMPONENTS if each.name == name)
        if why := component.lacking():
            missing(name, why)
        made.ensure(component, lambda _text: None)
        return made

    yield ensure
    for process in made.running.values():
        assert stop(process, signal.SIGKILL)
    shutil.rmtree(home)


def kill(made: Stack, name: str) -> None:
    assert stop(made.running[name], signal.SIGKILL)


def test_the_broker_has_its_topics_and_carries_records(part: Callable[[str], Stack]) -> None:
    made = part("kafka")
    address = {"bootstrap.servers": f"127.0.0.1:{made.place.port('kafka')}", "log_level": 0}
    topics = AdminClient(address).list_topics(timeout=60).topics
    assert {name: len(topic.partitions) for name, topic in topics.items()} == sources.TOPICS
    producer = Producer({**address, "acks": "all"})
    producer.produce("ops.events", "deployed", headers=[("ce_type", b"shop.deployed")], partition=0)
    assert producer.flush(30) == 0
    consumer = Consumer({**address, "group.id": "tests", "auto.offset.reset": "error", "enable.auto.commit": False})
    consumer.assign([TopicPartition("ops.events", 0, 0)])
    read = consumer.poll(30)
    consumer.close()
    assert read is not None
    assert (read.value(), read.headers()) == (b"deployed", [("ce_type", b"shop.deployed")])


def test_a_killed_broker_is_empty_and_has_its_topics_again(part: Callable[[str], Stack]) -> None:
    made = part("kafka")
    kill(made, "kafka")
    part("kafka")
    address = {"bootstrap.servers": f"127.0.0.1:{made.place.port('kafka')}", "log_level": 0}
    assert set(AdminClient(address).list_topics(timeout=60).topics) == set(sources.TOPICS)


def test_redis_wants_its_password_and_keeps_its_data_when_it_is_killed(part: Callable[[str], Stack]) -> None:
    made = part("redis")

    def redis(*words: str, password: str = "") -> str:
        command = ["redis-cli", "-p", str(made.place.port("redis")), *words]
        env = {**os.environ, "REDISCLI_AUTH": password}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=30, check=False).stdout.strip()

    password = made.place.secret("redis.password")
    assert "NOAUTH" in redis("SET", "order", "1")
    assert redis("SET", "order", "42", password=password) == "OK"
    assert redis("CONFIG", "SET", "appendfsync", "always", password=password) == "OK"
    assert redis("SET", "order", "43", password=password) == "OK"
    kill(made, "redis")
    part("redis")
    assert redis("GET", "order", password=password) == "43"


def test_an_alert_of_the_shipped_rules_arrives(part: Callable[[str], Stack]) -> None:
    part("alertmanager")
    made = part("prometheus")

    def firing() -> set[str]:
        address = f"http://127.0.0.1:{made.place.port('alertmanager')}/api/v2/alerts"
        return {alert["labels"]["alertname"] for alert in urllib3.request("GET", address, timeout=30).json()}

    # The receiver does not run here: it is scraped all the same, and found to be down.
    eventually(lambda: firing() == {"Watchdog", "ReceiverDown"}, why=firing)


def test_prometheus_follows_an_alertmanager_that_moved(part: Callable[[str], Stack]) -> None:
    part("alertmanager")
    made = part("prometheus")
    kill(made, "alertmanager")
    made.place.ports["alertmanager"] = moved = made.place.new_port()
    part("alertmanager")
    part("prometheus")
    address = f"http://127.0.0.1:{made.place.port('prometheus')}/api/v1/alertmanagers"

    def told() -> list[str]:
        found = urllib3.request("GET", address, timeout=30).json()["data"]["activeAlertmanagers"]
        return [each["url"] for each in found]

    eventually(lambda: told() == [f"http://127.0.0.1:{moved}/api/v2/alerts"], why=told)


def test_what_the_machine_lacks_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "COMPONENTS", sources.COMPONENTS)
    monkeypatch.setattr(sources.shutil, "which", lambda _name: None)
    home, said = scratch(), list[tuple[str, str]]()
    try:
        found = stack.up(home / "state", say=lambda name, text: said.append((name, text)), supervise=False)
        assert {item.name: (item.ready, item.good) for item in found} == {
            "kafka": (True, True), "redis": (False, True), "alertmanager": (False, True), "prometheus": (False, True),
        }  # fmt: skip
        skipped = dict(said)
        assert skipped["redis"] == "skipped: there is no redis-server here; Debian's package redis-server brings it"
        assert found[1].skipped in skipped["redis"]
        assert found[1].url == ""
        assert endpoint("kafka", home / "state").port == Stack.load(home / "state").place.port("kafka")
        with pytest.raises(UnreachableError, match="no component 'redis'"):
            endpoint("redis", home / "state")
        assert stack.down(home / "state") == ["kafka"]
        assert [item.good for item in stack.status(home / "state")] == [False, True, True, True]
    finally:
        stack.down(home / "state")
        shutil.rmtree(home)
