"""Events of a Kafka tick beside librdkafka alone. A real broker, started by the tests' rig."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import Comparison, Goal, interleaved
from ops_platform.clients.kafka import Kafka, Said
from ops_platform.events.reader import EventReader
from ops_platform.events.schemas import Schemas
from ops_platform.inventory.remediation import EventSchema, EventSource

OURS, SCHEMA, PEER = "ours", "ours, with a JSON Schema", "librdkafka alone"
BINARY, PEER_BINARY = "ours, binary mode", "librdkafka alone, binary mode"
PARTITIONS = 4
STRUCTURED = [("content-type", b"application/cloudevents+json")]
SCHEMA_OF_DATA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["host", "mount", "used", "limits"],
    "properties": {
        "host": {"type": "string", "pattern": "^[a-z0-9.-]+$"},
        "mount": {"type": "string"},
        "used": {"type": "number", "minimum": 0, "maximum": 1},
        "limits": {"type": "object", "properties": {"warn": {"type": "number"}, "page": {"type": "number"}}},
    },
}


def event(number: int) -> tuple[dict[str, str], dict[str, object]]:
    attributes = {
        "specversion": "1.0",
        "id": f"4b3c1f0e-5a52-4d1e-9a7a-{number:012d}",
        "source": "/clusters/eu-1/nodes",
        "type": "com.example.disk.filling",
        "subject": f"node-{number % 500}",
        "time": datetime.fromtimestamp(1_700_000_000 + number, UTC).isoformat(),
        "datacontenttype": "application/json",
        "traceparent": f"00-0af7651916cd43dd8448eb211c80319c-{number:016x}-01",
    }
    data = {
        "host": f"node-{number % 500}.eu-1.example.com",
        "mount": "/var/lib/postgresql",
        "used": 0.5 + number % 50 / 100,
        "bytes": {"total": 1 << 40, "free": (1 << 30) + number},
        "limits": {"warn": 0.8, "page": 0.9},
        "labels": {"team": "shop", "zone": "eu-1a", "kind": "ssd"},
        "note": "filled by what the nightly job leaves behind until the morning",
    }
    return attributes, data


def structured_mode(attributes: dict[str, str], data: dict[str, object]) -> bytes:
    return json.dumps({**attributes, "data": data}).encode()


@dataclass(frozen=True)
class Broker:
    """A broker with the two topics of the comparison: structured and binary mode, `count` events each."""

    kafka: Kafka
    structured: str
    binary: str
    dead: str
    bytes: int

    def source(self, topic: str) -> EventSource:
        return EventSource(kafka="k", topics=[topic], dead_letter=self.dead, start="earliest")

    def ours(self, topic: str, count: int, schemas: Schemas) -> float:
        """From nothing to signals with a cursor: connections, watermarks, messages, decoding, checking."""
        began = time.perf_counter()
        with EventReader(self.kafka, self.source(topic), schemas) as reader:
            batch = reader.read(None, budget=60, limit=count)
        seconds = time.perf_counter() - began
        assert len(batch.signals) == count
        assert not batch.dead_letters
        return seconds

    def drain(self, topic: str, count: int) -> float:
        """The same messages from the same offsets, thrown away as they come. With the settings of our consumer."""
        from confluent_kafka import OFFSET_BEGINNING, TopicPartition

        began = time.perf_counter()
        consumer = self.kafka.consumer(
            Said(), group_id="peer", enable_auto_commit=False, enable_auto_offset_store=False, fetch_wait_max_ms=100,
            isolation_level="read_committed", auto_offset_reset="error", fetch_message_max_bytes=10 << 20,
        )  # fmt: skip
        consumer.assign([TopicPartition(topic, part, OFFSET_BEGINNING) for part in range(PARTITIONS)])
        left = count
        while left:
            left -= len(consumer.consume(min(1000, left), 1.0))
        consumer.close()
        return time.perf_counter() - began


@contextmanager
def broker(count: int) -> Iterator[Broker]:
    from tests import kafka_rig

    with kafka_rig.cluster() as cluster:
        structured, binary = (cluster.create_topic(partitions=PARTITIONS) for _ in range(2))
        producer = cluster.producer(**{"linger.ms": 20})
        size = 0
        for number in range(count):
            attributes, data = event(number)
            value = structured_mode(attributes, data)
            size += len(value)
            kind = attributes.pop("datacontenttype")
            headers = [("content-type", kind.encode()), *((f"ce_{k}", v.encode()) for k, v in attributes.items())]
            part = number % PARTITIONS
            _put(producer, structured, value, partition=part, headers=STRUCTURED)
            _put(producer, binary, json.dumps(data).encode(), partition=part, headers=headers)
        assert producer.flush(60) == 0
        at = [("127.0.0.1", one.port) for one in cluster.brokers]
        kafka = Kafka("bench", at, tls=False)
        yield Broker(kafka, structured, binary, cluster.create_topic(), size // count)


def _put(producer: object, *args: object, **more: object) -> None:
    while True:
        try:
            producer.produce(*args, **more)  # type: ignore[attr-defined]
        except BufferError:
            producer.poll(0.1)  # type: ignore[attr-defined]
        else:
            return


def kafka_tick(count: int, rounds: int) -> Comparison:
    plain = Schemas([], Path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "schema.json").write_text(json.dumps(SCHEMA_OF_DATA))
        checked = EventSchema(type="com.example.disk.filling", json_schema="schema.json")
        strict = Schemas([checked], Path(folder).joinpath)
    with broker(count) as at:
        found = Comparison(
            "kafka-tick",
            f"{count:,} events of {at.bytes} bytes, decoded and made into signals",
            "seconds",
            "One tick against one Apache Kafka on this machine, from no connection to signals and cursor; beside it the same messages drained "
            "with `Consumer.consume` in batches and thrown away undecoded. Each side opens its own connections in each round.",
            [Goal("≤ 1.5 × librdkafka alone", OURS, PEER, most=1.5), Goal("with a JSON Schema, too", SCHEMA, PEER, most=1.5),
             Goal("in binary mode, too", BINARY, PEER_BINARY, most=1.5, if_missed="as headers, attributes are objects of Python one by one")],
        )  # fmt: skip
        sides = {
            OURS: lambda: found.add(OURS, at.ours(at.structured, count, plain)),
            SCHEMA: lambda: found.add(SCHEMA, at.ours(at.structured, count, strict)),
            PEER: lambda: found.add(PEER, at.drain(at.structured, count)),
            BINARY: lambda: found.add(BINARY, at.ours(at.binary, count, plain)),
            PEER_BINARY: lambda: found.add(PEER_BINARY, at.drain(at.binary, count)),
        }
        for topic in (at.structured, at.binary):
            at.drain(topic, count)  # the broker has its pages and its compiled code
        interleaved(rounds, sides)
    return found
