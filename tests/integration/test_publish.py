"""Our own events on their way: from the ledger's transaction through the outbox to Kafka, in order, whoever dies in between."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ops_platform.clients.access import Access
from ops_platform.errors import ConflictError
from ops_platform.inventory import LoadedInventory
from ops_platform.ledger import Draft
from ops_platform.remediation.sources import publish_events
from tests.kafka_rig import Kafka
from tests.remediation_rig import Engine, a_rule, inventory, new_engine

__all__ = ["new_engine"]


def with_kafka(engine: Engine, kafka: Kafka, topic: str) -> None:
    made = inventory([a_rule()], publish={"kafka": "bus", "topic": topic})
    host, _, port = kafka.bootstrap.split(",")[0].rpartition(":")
    bus = {
        "id": "bus",
        "kind": "kafka",
        "environment": "test",
        "owner": "team",
        "bootstrap": [{"host": host, "port": int(port)}],
        "tls": False,
    }
    body = made.model_dump(mode="json")
    whole = type(made).model_validate({**body, "systems": [*body["systems"], bus]})
    engine.access = Access(LoadedInventory(whole, Path("/platform.yaml")))


def test_what_is_recorded_is_published_once_and_in_order(new_engine: Callable[..., Engine], kafka: Kafka) -> None:
    engine, topic = new_engine(), kafka.create_topic()
    with_kafka(engine, kafka, topic)
    assert publish_events(engine.access, engine.store, budget=20).sent == 0, "from now on entries are to be published"
    engine.clock.slept = engine.end
    engine.work(engine.fire())
    recorded = [entry.kind for entry in engine.ledger.entries()]
    assert publish_events(engine.access, engine.store, budget=20).sent == len(recorded)
    assert publish_events(engine.access, engine.store, budget=20).sent == 0
    events = [json.loads(record.value or b"") for record in kafka.read(topic)]
    assert [event["type"] for event in events] == [f"ops-platform.{kind}" for kind in recorded]
    assert {event["subject"] for event in events} == {"hall"}
    assert len({event["id"] for event in events}) == len(events)


def test_what_was_rolled_back_is_never_published(new_engine: Callable[..., Engine], kafka: Kafka) -> None:
    engine, topic = new_engine(), kafka.create_topic()
    with_kafka(engine, kafka, topic)
    publish_events(engine.access, engine.store, budget=20)
    with contextlib.suppress(ZeroDivisionError), engine.ledger.transaction() as t:
        t.append("incident.open", "hall", {}, actor="test")
        raise ZeroDivisionError
    assert publish_events(engine.access, engine.store, budget=20).sent == 0


def test_once_nothing_is_published_any_more_nothing_waits_for_it(
    new_engine: Callable[..., Engine], kafka: Kafka
) -> None:
    engine, topic = new_engine(), kafka.create_topic()
    without = engine.access
    assert publish_events(without, engine.store, budget=20).dropped == 0
    assert engine.kinds() == [], "nothing was to be published: nothing is said"
    with_kafka(engine, kafka, topic)
    publish_events(engine.access, engine.store, budget=20)
    engine.ledger.append_all([Draft("incident.open", "hall", {})] * 3, actor="test")
    assert publish_events(without, engine.store, budget=20).dropped == 3
    engine.ledger.append("incident.open", "hall", {}, actor="test")
    assert engine.ledger.outbox() == []
    said = engine.ledger.entries(kind="events.not_published")
    assert [entry.body for entry in said] == [{"entries": 3, "first": 1, "last": 3}]
    assert publish_events(without, engine.store, budget=20).dropped == 0
    assert len(engine.ledger.entries(kind="events.not_published")) == 1, "said once"
    publish_events(engine.access, engine.store, budget=20)
    engine.ledger.append("incident.open", "hall", {}, actor="test")
    assert publish_events(engine.access, engine.store, budget=20).sent == 1, "published again once it is declared again"


def test_two_processes_do_not_publish_at_once(new_engine: Callable[..., Engine], kafka: Kafka) -> None:
    engine, topic = new_engine(), kafka.create_topic()
    with_kafka(engine, kafka, topic)
    with engine.ledger.claim("publish") as ours:
        assert ours
        with pytest.raises(ConflictError):
            publish_events(engine.access, engine.store, budget=20)
