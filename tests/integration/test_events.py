"""Events from a real Kafka: exactly once, whatever happens to topics, brokers, messages and to us."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastavro
import pytest
from confluent_kafka.admin import AclOperation

from ops_platform.clients.http import HttpApi
from ops_platform.clients.kafka import Kafka
from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, UnreachableError
from ops_platform.events.cursor import Cursor, Gap, TopicCursor
from ops_platform.events.reader import Batch, EventReader
from ops_platform.events.schemas import Schemas
from ops_platform.inventory.remediation import EventSchema, EventSource
from ops_platform.inventory.systems import Sasl
from ops_platform.inventory.values import Secret, SecretRef
from tests import kafka_rig
from tests.integration.http_faults import FaultyProxy, reply
from tests.rig import eventually

STRUCTURED = [("content-type", "application/cloudevents+json; charset=utf-8")]


def event(number: int | str, **more: Any) -> str:
    return json.dumps({"specversion": "1.0", "id": str(number), "source": "/tests", "type": "com.example.t", **more})


def connected(cluster: kafka_rig.Kafka) -> Kafka:
    places = [("127.0.0.1", broker.port) for broker in cluster.brokers]
    return Kafka("k", places, tls=False, timeout=15)


@contextmanager
def reading(
    cluster: kafka_rig.Kafka,
    *topics: str,
    dead: str = "",
    schemas: Schemas | None = None,
    kafka: Kafka | None = None,
    **more: Any,
) -> Iterator[EventReader]:
    source = EventSource(
        kafka="k", topics=list(topics), dead_letter=dead or cluster.create_topic(), **{"start": "earliest", **more}
    )
    with EventReader(kafka or connected(cluster), source, schemas or Schemas([], Path)) as reader:
        yield reader


def prints(batch: Batch) -> list[str]:
    """Where they stood, without which topic of that name it was."""
    return [re.sub("@[^/]+", "", signal.fingerprint) for signal in batch.signals]


def ids(batch: Batch) -> list[str]:
    return [signal.labels["id"] for signal in batch.signals]


def names(topic: str, offsets: Sequence[int], partition: int = 0) -> list[str]:
    return [f"{topic}/{partition}/{offset}" for offset in offsets]


# What a tick brings


def test_structured_and_binary_events_become_signals(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    data = {"disk": {"used": 0.93, "name": "sda"}, "ok": False, "tags": ["a"], "nothing": None}
    kafka.produce(
        topic, event(1, data=data, subject="db1", time="2026-11-01T10:00:00.5+01:00", team="shop"), headers=STRUCTURED
    )
    binary = [("content-type", "application/json"), ("ce_specversion", "1.0"), ("ce_id", "2"), ("ce_source", "/tests"),
              ("ce_type", "com.example.t"), ("ce_team", "shöp"), ("other", "x")]  # fmt: skip
    kafka.produce(topic, json.dumps(data), headers=binary, timestamp=1_700_000_000_123)
    with reading(kafka, topic) as reader:
        batch = reader.read(None)
    first, second = batch.signals
    assert prints(batch) == names(topic, range(2))
    assert (first.source, first.name) == ("kafka", "com.example.t")
    assert first.starts_at == datetime(2026, 11, 1, 9, 0, 0, 500_000, UTC)
    assert first.data == data
    assert first.labels == {
        "specversion": "1.0", "id": "1", "source": "/tests", "type": "com.example.t", "subject": "db1", "team": "shop",
        "time": "2026-11-01T10:00:00.5+01:00", "data.disk.used": "0.93", "data.disk.name": "sda", "data.ok": "false",
    }  # fmt: skip
    assert second.labels["team"] == "shöp"
    assert second.labels["datacontenttype"] == "application/json"
    assert second.data == data
    assert second.starts_at == datetime.fromtimestamp(1_700_000_000.123, UTC)
    assert first.is_event
    assert first.ends_at is None


def test_each_event_comes_once_and_the_cursor_goes_on(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic(partitions=3)
    for part in range(3):
        kafka.produce(topic, *(event(n) for n in range(10)), partition=part, headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        found, cursor = list[str](), None
        while (batch := reader.read(cursor, limit=7)).signals:
            assert len(batch.signals) <= 7
            found += prints(batch)
            cursor = str(batch.cursor)
        assert not batch.more
    assert sorted(found) == sorted(f"{topic}/{part}/{n}" for part in range(3) for n in range(10))


def test_what_is_read_again_ends_where_it_ended_before(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic(partitions=2)
    kafka.produce(topic, *(event(n) for n in range(50)), partition=0, headers=STRUCTURED)
    kafka.produce(topic, *(event(n) for n in range(3)), partition=1, headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        first = reader.read(None, limit=20)
    with reading(kafka, topic) as other:
        again = other.read(None, limit=20)
    assert prints(again) == prints(first) == [*names(topic, range(17)), *names(topic, range(3), 1)]
    assert again.cursor == first.cursor


def test_a_topic_that_was_never_read_begins_as_the_inventory_says(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, event(1), headers=STRUCTURED)
    with reading(kafka, topic, start="latest") as reader:
        begun = reader.read(None)
        assert begun.signals == []
        kafka.produce(topic, event(2), headers=STRUCTURED)
        assert ids(reader.read(begun.cursor)) == ["2"]
        assert ids(reader.read(Cursor.parse(str(begun.cursor)))) == ["2"]


def test_the_group_is_told_the_cursor_that_was_stored_and_not_the_one_that_comes(kafka: kafka_rig.Kafka) -> None:
    topic, group = kafka.create_topic(), "told"
    kafka.produce(topic, event(1), event(2), headers=STRUCTURED)
    with reading(kafka, topic, group=group) as reader:
        first = reader.read(None)
        assert kafka.committed(group) == {}
        kafka.produce(topic, event(3), headers=STRUCTURED)
        assert reader.read(first.cursor).not_committed is None
        eventually(lambda: kafka.committed(group) == {(topic, 0): 2})
        # What the group says is nothing that we read: set to anything, the cursor counts.
        kafka.commit(group, topic, 0)
        assert ids(reader.read(first.cursor)) == ["3"]


def test_lag_says_what_waits(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, *(event(n) for n in range(10)), headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        batch = reader.read(None, limit=4)
        assert [(one.topic, one.partition, one.next, one.end, one.messages) for one in batch.lag] == [
            (topic, 0, 4, 10, 6)
        ]
        assert batch.more


def test_several_topics_are_read_in_one_tick(kafka: kafka_rig.Kafka) -> None:
    one, other = kafka.create_topic(), kafka.create_topic()
    kafka.produce(one, event(1), headers=STRUCTURED)
    kafka.produce(other, event(2), headers=STRUCTURED)
    with reading(kafka, one, other) as reader:
        batch = reader.read(None)
        assert sorted(prints(batch)) == sorted([f"{one}/0/0", f"{other}/0/0"])
        assert set(batch.cursor.topics) == {one, other}


def test_an_event_twice_and_events_out_of_order_keep_their_own_identity(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    late, early = "2026-11-01T10:00:00Z", "2026-11-01T09:00:00Z"
    kafka.produce(topic, event(1, time=late), event(1, time=late), event(0, time=early), headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        batch = reader.read(None)
    signals = batch.signals
    assert prints(batch) == names(topic, range(3))
    assert [signal.labels["id"] for signal in signals] == ["1", "1", "0"]
    assert signals[2].starts_at < signals[0].starts_at == signals[1].starts_at


def test_a_message_of_ten_megabytes_is_read(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic(max_message_bytes=str(12 << 20))
    kafka.produce(topic, event("large", data={"text": "x" * (10 << 20)}), event("next"), headers=STRUCTURED)
    with reading(kafka, topic, largest=11 << 20) as reader:
        batch = reader.read(None)
    assert ids(batch) == ["large", "next"]
    assert len(batch.signals[0].data["text"]) == 10 << 20


# Transactions and compaction


def test_what_a_transaction_aborted_is_never_seen_and_no_gap(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, event("before"), headers=STRUCTURED)
    with kafka.transaction(abort=True) as producer:
        producer.produce(topic, event("aborted"), headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        batch = reader.read(None)
        assert ids(batch) == ["before"]
        assert batch.gaps == ()
        assert not batch.more  # the marker at the end is passed, or every tick would wait for it
        with kafka.transaction() as producer:
            producer.produce(topic, event("committed"), headers=STRUCTURED)
        kafka.produce(topic, event("after"), headers=STRUCTURED)
        assert ids(reader.read(batch.cursor)) == ["committed", "after"]


def test_an_open_transaction_is_waited_for(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    with reading(kafka, topic) as reader:
        with kafka.transaction() as producer:
            producer.produce(topic, event("open"), headers=STRUCTURED)
            producer.flush()
            kafka.produce(topic, event("behind"), headers=STRUCTURED)
            during = reader.read(None)
            assert during.signals == []
        assert ids(reader.read(during.cursor)) == ["open", "behind"]


def test_what_compaction_took_is_no_gap(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic(
        cleanup_policy="compact", segment_ms="100", min_cleanable_dirty_ratio="0.01", max_compaction_lag_ms="100",
        delete_retention_ms="100",
    )  # fmt: skip
    for number in range(5):
        kafka.produce(topic, event(number), key="same", headers=STRUCTURED)
    kafka.produce(topic, event("other"), key="other", headers=STRUCTURED)

    def compacted() -> bool:
        kafka.produce(topic, event("last"), key="last", headers=STRUCTURED)  # closes the segment before it
        return [record.offset for record in kafka.read(topic)][:2] == [4, 5]

    eventually(compacted, why="nothing was compacted")
    with reading(kafka, topic) as reader:
        batch = reader.read(Cursor.parse(f'{{"v":1,"topics":{{"{topic}":{{"id":null,"next":{{"0":0}}}}}}}}'))
    assert ids(batch)[:2] == ["4", "other"]
    assert batch.gaps == ()
    assert not batch.more


# Topics that change


def test_offsets_that_expired_are_a_gap_and_reading_goes_on(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, *(event(n) for n in range(10)), headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        first = reader.read(None, limit=3)
        kafka.expire(topic, 7)
        batch = reader.read(first.cursor)
        assert batch.gaps == (Gap(topic, 0, 3, 6),)
        assert str(batch.gaps[0]) == f"{topic}/0: offsets 3 to 6 expired before they were read"
        assert ids(batch) == ["7", "8", "9"]
        assert reader.read(batch.cursor).gaps == ()


def test_a_topic_made_anew_fails_closed_by_its_id_even_where_offsets_would_fit(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, event(1), headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        first = reader.read(None)
        cursor = first.cursor
        kafka.recreate_topic(topic)
        kafka.produce(topic, *(event(n) for n in range(5)), headers=STRUCTURED)
        with pytest.raises(ConflictError, match="made anew") as caught:
            eventually(lambda: _if_reached(lambda: reader.read(cursor)) and False)
        assert "Starting a topic anew" in (caught.value.remedy or "")
        anew = reader.read(cursor.without(topic))
        assert ids(anew) == ["0", "1", "2", "3", "4"]
        # An incident of the old topic may be open still: what stands at its offset now is another event.
        assert prints(anew)[0] == prints(first)[0]
        assert anew.signals[0].fingerprint != first.signals[0].fingerprint


def test_where_the_inventory_says_so_a_topic_made_anew_begins_and_is_named(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, event(1), headers=STRUCTURED)
    with reading(kafka, topic, made_anew="begin") as reader:
        first = reader.read(None)
        assert reader.read(first.cursor).problems == ()
        kafka.recreate_topic(topic)
        kafka.produce(topic, *(event(n) for n in range(5)), headers=STRUCTURED)
        anew = eventually(lambda: _if_reached(lambda: reader.read(first.cursor)))
        assert ids(anew) == ["0", "1", "2", "3", "4"]
        (said,) = anew.problems
        assert said.startswith(f"{topic}: the topic was deleted and made anew")
        assert said.endswith("it begins at its earliest offset")
        assert reader.read(anew.cursor).problems == ()
        # By the end alone only where a broker gives topics no id: with one it is the topic that we know, wherever it ends.
        with pytest.raises(ConflictError, match="we have read up to offset 9, and it ends at 5"):
            reader.read(anew.cursor.at(topic, {0: 9}))
        cut = reader.read(f'{{"v":1,"topics":{{"{topic}":{{"id":null,"next":{{"0":9}}}}}}}}')
        assert ids(cut) == ["0", "1", "2", "3", "4"]
        assert "we have read up to offset 9, and it ends at 5" in cut.problems[0]


def test_a_cursor_behind_the_end_fails_closed(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, event(1), headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        cursor = reader.read(None).cursor.at(topic, {0: 5})
        with pytest.raises(ConflictError, match="we have read up to offset 5, and it ends at 1"):
            reader.read(cursor)


def test_fewer_partitions_fail_closed(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    with reading(kafka, topic) as reader, pytest.raises(ConflictError, match="lost partitions"):
        reader.read(f'{{"v":1,"topics":{{"{topic}":{{"id":null,"next":{{"0":0,"1":0}}}}}}}}')
    # Also where a topic that was made anew may begin: with the id that we know it was not.
    with reading(kafka, topic, made_anew="begin") as reader:
        known = reader.read(None).cursor.topics[topic].id
        with pytest.raises(ConflictError, match="lost partitions"):
            reader.read(Cursor({topic: TopicCursor({0: 0, 1: 0}, known)}))


def test_a_partition_that_was_added_begins_at_its_beginning(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    with reading(kafka, topic, start="latest") as reader:
        cursor = reader.read(None).cursor
        kafka.grow_topic(topic, 2)
        kafka.produce(topic, event("new"), partition=1, headers=STRUCTURED)
        batch = eventually(lambda: (found := reader.read(cursor)).signals and found)
        assert prints(batch) == [f"{topic}/1/0"]
        assert batch.cursor.topics[topic].next == {0: 0, 1: 1}


def test_a_deleted_topic_is_an_error(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, event(1), headers=STRUCTURED)
    with reading(kafka, topic) as reader:
        cursor = reader.read(None).cursor
        kafka.delete_topic(topic)
        with pytest.raises(NotThereError, match="Unknown topic") as caught:
            eventually(lambda: _if_reached(lambda: reader.read(cursor)) and False)
        assert topic in (caught.value.where or "")


# Poison


POISON: list[tuple[str, bytes | str | None, list[tuple[str, str]], str]] = [
    ("no JSON", "garbage", STRUCTURED, "no JSON"),
    ("not UTF-8", b'{"a": "\xff"}', STRUCTURED, "no JSON"),
    ("a list", "[]", STRUCTURED, "a JSON object"),
    ("no id", '{"specversion": "1.0", "source": "/s", "type": "t"}', STRUCTURED, "id is missing"),
    ("another version", '{"specversion": "0.3", "id": "1", "source": "/s", "type": "t"}', STRUCTURED, "specversion"),
    ("a batch", "[]", [("content-type", "application/cloudevents-batch+json")], "batch"),
    ("nothing said", '{"id": "1"}', [], "neither"),
    ("no value", None, [], "neither"),
    ("a NUL", event(1, data={"a": "\0"}), STRUCTURED, "NUL"),
    ("too deep", event(1, data=json.loads("[" * 500 + "]" * 500)), STRUCTURED, "deep"),
    ("XML", "<a/>", [("content-type", "text/xml"), ("ce_specversion", "1.0"), ("ce_id", "1"), ("ce_source", "/"), ("ce_type", "t")], "no JSON"),
    ("framed without a registry", b"\0\0\0\0\1{}", STRUCTURED, "names no schema registry"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "headers", "why"), [case[1:] for case in POISON], ids=[case[0] for case in POISON])
def test_poison_goes_to_the_dead_letters_with_its_provenance_and_reading_goes_on(
    kafka: kafka_rig.Kafka, value: bytes | str | None, headers: list[tuple[str, str]], why: str
) -> None:
    topic, dead = kafka.create_topic(), kafka.create_topic()
    kafka.produce(topic, event("before"), headers=STRUCTURED)
    kafka.produce(topic, value, key="the key", headers=headers, timestamp=1_700_000_000_000)
    kafka.produce(topic, event("after"), headers=STRUCTURED)
    with reading(kafka, topic, dead=dead) as reader:
        batch = reader.read(None)
        assert ids(batch) == ["before", "after"]
        (letter,) = batch.dead_letters
        assert (letter.topic, letter.partition, letter.offset) == (topic, 0, 1)
        assert why in letter.reason
        assert reader.read(batch.cursor).dead_letters == ()
    (record,) = kafka.read(dead)
    raw = value.encode() if isinstance(value, str) else value
    assert (record.key, record.value) == (b"the key", raw)
    said = dict(record.headers)
    assert record.headers[: len(headers)] == [(name, text.encode()) for name, text in headers]
    assert {name.removeprefix("ops-dead-letter-"): said[name] for name in said if name.startswith("ops-dead-letter-")} == {
        "topic": topic.encode(), "partition": b"0", "offset": b"1", "timestamp": b"2023-11-14T22:13:20+00:00",
        "reason": letter.reason.encode(), "size": str(len(raw or b"")).encode(), "value": b"whole", "key": b"the key",
    }  # fmt: skip


def test_a_message_above_the_limit_is_a_dead_letter_without_its_value(kafka: kafka_rig.Kafka) -> None:
    topic, dead = kafka.create_topic(), kafka.create_topic()
    kafka.produce(topic, event(1, data="x" * 5000), event(2), headers=STRUCTURED)
    with reading(kafka, topic, dead=dead, largest=1000) as reader:
        batch = reader.read(None)
    assert ids(batch) == ["2"]
    (record,) = kafka.read(dead)
    assert record.value is None
    assert dict(record.headers)["ops-dead-letter-value"] == b"left out"
    assert b"1000 is the limit" in (dict(record.headers)["ops-dead-letter-reason"] or b"")


def test_a_dead_letter_topic_with_a_smaller_limit_gets_the_letter_without_its_value(kafka: kafka_rig.Kafka) -> None:
    topic, dead = kafka.create_topic(), kafka.create_topic(max_message_bytes="2000")
    kafka.produce(topic, "x" * 5000, "y", headers=STRUCTURED)
    with reading(kafka, topic, dead=dead) as reader:
        batch = reader.read(None)
    assert len(batch.dead_letters) == 2
    assert {dict(record.headers)["ops-dead-letter-offset"]: record.value for record in kafka.read(dead)} == {b"0": None, b"1": b"y"}  # fmt: skip


def test_without_a_dead_letter_topic_nothing_is_read_and_none_is_made(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, "garbage", headers=STRUCTURED)
    with reading(kafka, topic, dead="there-is-none") as reader:
        for _ in range(2):
            with pytest.raises(NotThereError) as caught:
                reader.read(None)
            assert "there-is-none" in (caught.value.where or "")


def test_the_cursor_stays_where_a_dead_letter_is_refused(kafka: kafka_rig.Kafka) -> None:
    topic, dead = kafka.create_topic(), kafka.create_topic()
    kafka.produce(topic, event("before"), "garbage", event("after"), headers=STRUCTURED)
    kafka.add_user("reader")
    kafka.grant("reader", AclOperation.READ, topic=topic)
    kafka.grant("reader", AclOperation.DESCRIBE, topic=dead)
    with reading(kafka, topic, dead=dead, kafka=as_user(kafka, kafka_rig.PASSWORD)) as reader:
        with pytest.raises(AccessDeniedError) as caught:
            eventually(lambda: _if_reached(lambda: reader.read(None, budget=4)) and False)
        assert dead in (caught.value.where or "")
        kafka.grant("reader", AclOperation.WRITE, topic=dead)
        batch = eventually(lambda: _or_none(lambda: reader.read(None)))
        assert ids(batch) == ["before", "after"]
        assert len(batch.dead_letters) == 1
    assert [record.value for record in kafka.read(dead)] == [b"garbage"]


def _or_none(what: Callable[[], Any]) -> Any:
    try:
        return what()
    except OpsError:
        return None


def _if_reached(what: Callable[[], Any]) -> Any:
    """A broker that is slow to answer says nothing of what is asked here."""
    try:
        return what()
    except UnreachableError:
        return None


# Schemas


SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "required": ["n"],
    "properties": {"n": {"type": "integer", "minimum": 0}},
}  # fmt: skip


def test_data_against_its_schema_is_a_dead_letter_that_does_not_quote_it(
    kafka: kafka_rig.Kafka, tmp_path: Path
) -> None:
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    schemas = Schemas([EventSchema(type="com.example.t", json_schema="s.json")], tmp_path.joinpath)
    topic = kafka.create_topic()
    kafka.produce(topic, event(1, data={"n": 1}), event(2, data={"n": "hunter2"}), event(3), headers=STRUCTURED)
    kafka.produce(topic, event(4, data={"n": "x"}).replace("com.example.t", "com.example.other"), headers=STRUCTURED)
    with reading(kafka, topic, schemas=schemas) as reader:
        batch = reader.read(None)
    assert ids(batch) == ["1", "4"]
    assert [(letter.offset, letter.reason) for letter in batch.dead_letters] == [
        (1, "its data is not as the schema of com.example.t says: n, properties.n.type"),
        (2, "its data is not as the schema of com.example.t says: the whole, type"),
    ]


AVRO = {"type": "record", "name": "R", "fields": [{"name": "n", "type": "int"}, {"name": "raw", "type": "bytes"}]}


def framed(schema_id: int, value: bytes) -> bytes:
    return b"\0" + struct.pack(">I", schema_id) + value


def avro(record: dict[str, Any]) -> bytes:
    from io import BytesIO

    out = BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(AVRO), record)
    return out.getvalue()


def registry_answers(handler: Any) -> None:
    """As a registry answers: https://docs.confluent.io/platform/current/schema-registry/develop/api.html."""
    known = {
        "/schemas/ids/1": {"schema": json.dumps(AVRO)},
        "/schemas/ids/2": {"schema": json.dumps(SCHEMA), "schemaType": "JSON"},
        "/schemas/ids/3": {"schema": 'syntax = "proto3";', "schemaType": "PROTOBUF"},
        "/schemas/ids/4": {
            "schema": json.dumps({"type": "object", "properties": {"inner": {"$ref": "inner.json"}}}),
            "schemaType": "JSON",
            "references": [{"name": "inner.json", "subject": "in/ner", "version": 2}],
        },
        "/subjects/in%2Fner/versions/2": {"schema": json.dumps(SCHEMA), "schemaType": "JSON"},
    }
    found = known.get(handler.path)
    body = found or {"error_code": 40403, "message": "Schema not found"}
    reply(200 if found else 404, json.dumps(body).encode())(handler)


BINARY = [("content-type", "application/json"), ("ce_specversion", "1.0"), ("ce_source", "/s"), ("ce_type", "t")]


def test_values_in_confluents_wire_format_are_read_by_the_schemas_of_the_registry(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    values = [
        framed(1, avro({"n": 7, "raw": b"\x00\xff"})), framed(2, b'{"n": 8}'), framed(2, b'{"n": -1}'), framed(3, b"x"),
        framed(9, b"{}"), framed(1, b"\xff" * 20), framed(1, avro({"n": 1, "raw": b""}) + b"more"), b"\0\0\0",
        framed(4, b'{"inner": {"n": 1}}'), framed(4, b'{"inner": {}}'),
    ]  # fmt: skip
    for number, value in enumerate(values):
        kafka.produce(topic, value, headers=[*BINARY, ("ce_id", str(number))])
    with FaultyProxy(None) as registry:
        registry.always = registry_answers
        schemas = Schemas([], Path, HttpApi(registry.url, "the registry"))
        with reading(kafka, topic, schemas=schemas) as reader:
            batch = reader.read(None)
            assert [(signal.labels["id"], dict(signal.data)) for signal in batch.signals] == [
                ("0", {"n": 7, "raw": "AP8="}), ("1", {"n": 8}), ("8", {"inner": {"n": 1}}),
            ]  # fmt: skip
            assert [letter.offset for letter in batch.dead_letters] == [2, 3, 4, 5, 6, 7, 9]
            asked = [request.path for request in registry.seen]
            assert asked.count("/schemas/ids/1") == 1
            assert asked.count("/schemas/ids/2") == 1


@pytest.mark.parametrize(
    "answer", [reply(500, b"oops"), reply(401, b"no"), reply(404, b"<html>"), reply(404, b"{}"), reply(200, b"{}"), reply(200, b"[]")]
)  # fmt: skip
def test_a_registry_that_is_away_or_lies_fails_the_tick_and_poisons_nothing(
    kafka: kafka_rig.Kafka, answer: Any
) -> None:
    topic, dead = kafka.create_topic(), kafka.create_topic()
    kafka.produce(topic, framed(2, b'{"n": 8}'), headers=[*BINARY, ("ce_id", "1")])
    with FaultyProxy(None) as registry:
        registry.always = answer
        schemas = Schemas([], Path, HttpApi(registry.url, "the registry"))
        with reading(kafka, topic, dead=dead, schemas=schemas) as reader:
            with pytest.raises(OpsError):
                reader.read(None)
            assert kafka.read(dead) == []
            registry.always = registry_answers
            assert ids(reader.read(None)) == ["1"]


# Logging in


def as_user(
    cluster: kafka_rig.Kafka, password: str, *, ca: bool = True, host: str = "127.0.0.1", timeout: float = 15
) -> Kafka:
    return Kafka(
        "k",
        [(host, cluster.brokers[0].sasl_port)],
        tls=True,
        ca=str(cluster.ca) if ca else None,
        sasl=Sasl(mechanism="SCRAM-SHA-512", user="reader", password=SecretRef.parse("env://X")),
        resolve=lambda _ref: Secret(password),
        timeout=timeout,
    )


def test_over_tls_and_scram_with_no_more_rights_than_are_needed(
    kafka: kafka_rig.Kafka, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    topic, dead = kafka.create_topic(), kafka.create_topic()
    kafka.produce(topic, event(1), "garbage", headers=STRUCTURED)
    kafka.add_user("reader")

    def read(client: Kafka, *, budget: float = 40) -> Batch:
        with reading(kafka, topic, dead=dead, kafka=client, group="g") as reader:
            return reader.read(None, budget=budget)

    with pytest.raises(AccessDeniedError, match="Topic authorization failed"):
        read(as_user(kafka, kafka_rig.PASSWORD))
    kafka.grant("reader", AclOperation.READ, topic=topic)
    kafka.grant("reader", AclOperation.WRITE, topic=dead)
    kafka.grant("reader", AclOperation.READ, group="g")
    assert ids(eventually(lambda: _or_none(lambda: read(as_user(kafka, kafka_rig.PASSWORD))))) == ["1"]
    with pytest.raises(AccessDeniedError, match=r"(?i)authentication") as refused:
        read(as_user(kafka, "hunter2-wrong"))
    with pytest.raises(UnreachableError) as untrusted:
        read(as_user(kafka, kafka_rig.PASSWORD, ca=False, timeout=5), budget=12)
    assert "ca" in (untrusted.value.remedy or "")
    captured = capfd.readouterr()
    for text in (str(refused.value), str(untrusted.value), caplog.text, captured.out, captured.err):
        assert "hunter2" not in text
        assert kafka_rig.PASSWORD not in text


def test_a_broker_whose_certificate_has_another_name_is_not_trusted(kafka: kafka_rig.Kafka) -> None:
    topic = kafka.create_topic()
    kafka.add_user("reader")
    kafka.grant("reader", AclOperation.READ, topic=topic)
    with reading(kafka, topic, kafka=as_user(kafka, kafka_rig.PASSWORD, host="127.0.0.2")) as reader, pytest.raises(UnreachableError):  # fmt: skip
        reader.read(None, budget=6)


# Brokers that go away


def test_with_all_brokers_away_a_tick_is_an_error_within_its_budget_and_goes_on_later() -> None:
    with kafka_rig.cluster() as cluster:
        topic = cluster.create_topic()
        cluster.produce(topic, *(event(n) for n in range(4)), headers=STRUCTURED)
        with reading(cluster, topic, kafka=connected(cluster)) as reader:
            first = reader.read(None, limit=2)
            cluster.stop()
            with pytest.raises(UnreachableError):
                reader.read(first.cursor, budget=3)
            cluster.start()
            batch = eventually(lambda: _or_none(lambda: reader.read(first.cursor)), seconds=60)
            assert ids(batch) == ["2", "3"]


def test_a_broker_killed_in_the_middle_of_a_tick_costs_and_doubles_nothing(kafka_cluster: kafka_rig.Kafka) -> None:
    topic = kafka_cluster.create_topic(partitions=3)
    for part in range(3):
        kafka_cluster.produce(topic, *(event(n) for n in range(200)), partition=part, headers=STRUCTURED)
    found, cursor = list[str](), None
    with reading(kafka_cluster, topic) as reader:
        batch = reader.read(cursor, limit=30)
        found, cursor = prints(batch), str(batch.cursor)
        kafka_cluster.kill(2)
        until = 60
        while len(found) < 600 and until:
            until -= 1
            batch = _or_none(lambda at=cursor: reader.read(at, budget=6, limit=100))
            if batch is not None:
                found, cursor = found + prints(batch), str(batch.cursor)
                assert batch.gaps == ()
    assert sorted(found) == sorted(f"{topic}/{part}/{n}" for part in range(3) for n in range(200))


def test_partitions_without_a_leader_wait_and_the_others_are_read(kafka_cluster: kafka_rig.Kafka) -> None:
    topic = kafka_cluster.create_topic(partitions=3, replicas=1)
    dead = kafka_cluster.create_topic()
    for part in range(3):
        kafka_cluster.produce(topic, event(part), partition=part, headers=STRUCTURED)
    with reading(kafka_cluster, topic, dead=dead) as reader:
        cursor = reader.read(None).cursor
        for part in range(3):
            kafka_cluster.produce(topic, event(f"new {part}"), partition=part, headers=STRUCTURED)
        away = kafka_cluster.leader(topic, 1)
        kafka_cluster.kill(away)
        eventually(lambda: kafka_cluster.leader(topic, 1) == -1)
        others = [part for part in range(3) if kafka_cluster.leader(topic, part) != -1]
        wanted = [f"{topic}/{part}/1" for part in others]
        # Within the budget of one read a busy broker may not be heard.
        batch = eventually(lambda: _or_none(lambda: (b := reader.read(cursor, budget=6)).problems and prints(b) == wanted and b))  # fmt: skip
        assert any(f"{topic}/1" in problem for problem in batch.problems)
        assert batch.cursor.topics[topic].next[1] == 1
        with pytest.raises(UnreachableError):  # never begun, it has to be seen whole
            reader.read(None, budget=6)
        kafka_cluster.restart(away)
        last = eventually(lambda: _or_none(lambda: (b := reader.read(batch.cursor)).signals and b), seconds=60)
        assert f"{topic}/1/1" in prints(last)
