"""Our own events on their way out: from the ledger's outbox to a real Kafka, at least once, in order for each subject."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from cloudevents.core.bindings import kafka as sdk
from cloudevents.core.formats.json import JSONFormat
from confluent_kafka.admin import AclOperation

from ops_platform.clients.kafka import Kafka
from ops_platform.errors import AccessDeniedError, NotThereError, UnreachableError
from ops_platform.events.publisher import Publisher
from ops_platform.inventory.remediation import Publishing
from ops_platform.ledger import Ledger
from tests import kafka_rig
from tests.integration.test_events import as_user, connected
from tests.rig import Cluster, eventually


@pytest.fixture
def ledger(shared_cluster: Cluster) -> Iterator[Ledger]:
    """One of its own, whose entries below `test.` are published."""
    name = f"ledger_{shared_cluster.sql('select count(*) from pg_database')}"
    shared_cluster.sql(f"create database {name}")
    with Ledger(lambda: shared_cluster.server.connect(name)) as made:
        made.publish(["test."])
        yield made
    shared_cluster.sql(f"drop database {name} with (force)")


def publisher(kafka: Kafka, topic: str) -> Publisher:
    return Publisher(kafka, Publishing(kafka="k", topic=topic, source="/ops/test"))


def sent(cluster: kafka_rig.Kafka, topic: str) -> list[dict[str, object]]:
    return [json.loads(record.value or b"") for record in cluster.read(topic)]


def test_an_entry_is_published_as_an_event_that_the_sdk_reads(kafka: kafka_rig.Kafka, ledger: Ledger) -> None:
    topic = kafka.create_topic()
    entry = ledger.append("test.done", "app-db", {"size": 5, "text": "ü"}, actor="nightly")
    ledger.append("other.done", "app-db", {}, actor="nightly")
    with publisher(connected(kafka), topic) as ours:
        done = ours.publish(ledger)
    assert (done.sent, done.waiting, done.failures) == (1, 0, {})
    assert ledger.outbox() == []
    (record,) = kafka.read(topic)
    assert record.key == b"app-db"
    headers = {name: text or b"" for name, text in record.headers}
    found = sdk.from_structured(sdk.KafkaMessage(headers, None, record.value or b""), JSONFormat())
    assert found.get_attributes() == {
        "specversion": "1.0", "id": entry.sha256, "source": "/ops/test", "type": "ops-platform.test.done", "subject": "app-db",
        "time": entry.at, "actor": "nightly", "ledgerseq": str(entry.seq), "datacontenttype": "application/json",
    }  # fmt: skip
    assert found.get_data() == {"size": 5, "text": "ü"}


def test_the_order_of_each_subject_is_kept(kafka: kafka_rig.Kafka, ledger: Ledger) -> None:
    topic = kafka.create_topic(partitions=3)
    for number in range(20):
        ledger.append("test.n", f"s{number % 4}", {"n": number}, actor="a")
    with publisher(connected(kafka), topic) as ours:
        assert ours.publish(ledger, limit=7).sent == 7
        assert ours.publish(ledger).sent == 13
    by_subject: dict[object, list[int]] = {}
    for event in sent(kafka, topic):
        by_subject.setdefault(event["subject"], []).append(event["data"]["n"])  # type: ignore[index]
    assert by_subject == {f"s{s}": list(range(s, 20, 4)) for s in range(4)}


def test_a_refused_entry_stops_the_later_ones_of_its_subject_and_no_others(
    kafka: kafka_rig.Kafka, ledger: Ledger
) -> None:
    topic = kafka.create_topic(max_message_bytes="3000")
    ledger.append("test.a", "large", {"text": "x" * 5000}, actor="a")
    ledger.append("test.b", "large", {}, actor="a")
    ledger.append("test.c", "small", {}, actor="a")
    ledger.append("test.d", "small", {}, actor="a")
    with publisher(connected(kafka), topic) as ours:
        for waits in (2, 2):
            done = ours.publish(ledger)
            assert done.waiting == waits
            assert set(done.failures) == {"large"}
            assert "too large" in done.failures["large"]
        assert [event["type"] for event in sent(kafka, topic)] == ["ops-platform.test.c", "ops-platform.test.d"]
        kafka.configure_topic(topic, max_message_bytes="9000")
        eventually(lambda: ours.publish(ledger).sent == 2)
    assert [event["type"] for event in sent(kafka, topic)][2:] == ["ops-platform.test.a", "ops-platform.test.b"]


class _Dies(Exception):
    pass


def test_whoever_dies_before_the_outbox_knows_publishes_again_under_the_same_id(
    kafka: kafka_rig.Kafka, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka.create_topic()
    ledger.append("test.a", "s", {}, actor="a")

    def die(_: object) -> None:
        raise _Dies

    with publisher(connected(kafka), topic) as ours, monkeypatch.context() as patched:
        patched.setattr(ledger, "published", die)
        with pytest.raises(_Dies):
            ours.publish(ledger)
    assert len(ledger.outbox()) == 1
    with publisher(connected(kafka), topic) as other:
        assert other.publish(ledger).sent == 1
    first, second = sent(kafka, topic)
    assert first == second


def test_with_all_brokers_away_nothing_leaves_the_outbox(ledger: Ledger) -> None:
    ledger.append("test.a", "s", {}, actor="a")
    with kafka_rig.cluster() as cluster:
        topic = cluster.create_topic()
        with publisher(connected(cluster), topic) as ours:
            assert ours.publish(ledger).sent == 1
            ledger.append("test.b", "s", {}, actor="a")
            cluster.stop()
            with pytest.raises(UnreachableError):
                ours.publish(ledger, budget=3)
            assert len(ledger.outbox()) == 1
            cluster.start()
            eventually(lambda: _sent(lambda: ours.publish(ledger).sent) == 1, seconds=60)
        assert [event["type"] for event in sent(cluster, topic)] == ["ops-platform.test.a", "ops-platform.test.b"]


def _sent(what: Callable[[], int]) -> int:
    try:
        return what()
    except UnreachableError:
        return 0


def test_a_topic_that_is_missing_or_not_ours_is_an_error_and_nothing_is_made(
    kafka: kafka_rig.Kafka, ledger: Ledger
) -> None:
    ledger.append("test.a", "s", {}, actor="a")
    with publisher(connected(kafka), "there-is-none") as ours, pytest.raises(NotThereError):
        ours.publish(ledger)
    topic = kafka.create_topic()
    kafka.add_user("reader")
    with publisher(as_user(kafka, kafka_rig.PASSWORD), topic) as ours:
        with pytest.raises(AccessDeniedError):
            ours.publish(ledger)
        kafka.grant("reader", AclOperation.WRITE, topic=topic)
        eventually(lambda: _may(lambda: ours.publish(ledger).sent) == 1)
    assert ledger.outbox() == []


def _may(what: Callable[[], int]) -> int:
    try:
        return what()
    except AccessDeniedError:
        return 0


def test_an_empty_outbox_asks_nobody(ledger: Ledger) -> None:
    nowhere = Kafka("k", [("127.0.0.1", 1)], tls=False, timeout=1)
    with publisher(nowhere, "t") as ours:
        assert ours.publish(ledger).sent == 0
