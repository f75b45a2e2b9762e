"""The Kafka of the tests does what the tests of others rely on."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AclOperation

from tests.kafka_rig import Kafka
from tests.rig import eventually


def code(caught: pytest.ExceptionInfo[KafkaException]) -> int:
    return caught.value.args[0].code()


# One broker


def test_what_is_produced_is_read_back_with_its_provenance(kafka: Kafka) -> None:
    topic = kafka.create_topic(partitions=2)
    assert kafka.produce(topic, "a", None, "c", key="k", headers=[("h", b"1")], timestamp=1_700_000_000_000) == [
        0,
        1,
        2,
    ]
    assert kafka.produce(topic, "other", partition=1) == [0]
    read = kafka.read(topic)
    assert [(r.partition, r.offset, r.value) for r in read] == [
        (0, 0, b"a"),
        (0, 1, None),
        (0, 2, b"c"),
        (1, 0, b"other"),
    ]
    assert (read[0].key, read[0].headers, read[0].timestamp) == (b"k", [("h", b"1")], 1_700_000_000_000)
    assert kafka.watermarks(topic) == (0, 3)


def test_a_record_of_ten_megabytes_passes(kafka: Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, b"x" * 10_000_000)
    assert [len(record.value or b"") for record in kafka.read(topic)] == [10_000_000]


def test_what_expired_is_gone_and_the_offsets_go_on(kafka: Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, *"abcd")
    kafka.expire(topic, 3)
    assert kafka.watermarks(topic) == (3, 4)
    assert [record.offset for record in kafka.read(topic)] == [3]
    kafka.expire_all(topic)
    assert kafka.watermarks(topic) == (4, 4)
    assert kafka.produce(topic, "e") == [4]
    assert kafka.topic_config(topic, "retention.ms") == "-1"


def test_a_topic_that_is_made_again_begins_at_zero(kafka: Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, *"abc")
    kafka.recreate_topic(topic, partitions=2)
    assert kafka.watermarks(topic) == (0, 0)
    kafka.grow_topic(topic, 3)
    assert kafka.watermarks(topic, 2) == (0, 0)
    kafka.delete_topic(topic)
    with pytest.raises(KafkaException) as gone:
        kafka.produce(topic, "x")
    assert code(gone) in (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART)


def test_a_transaction_is_seen_whole_or_not_at_all(kafka: Kafka) -> None:
    one, other = kafka.create_topic(), kafka.create_topic()
    with kafka.transaction() as producer:
        producer.produce(one, "kept")
        producer.produce(other, "kept")
    with kafka.transaction(abort=True) as producer:
        producer.produce(one, "aborted")

    def fails() -> None:
        with kafka.transaction() as producer:
            producer.produce(other, "broken")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [[record.value for record in kafka.read(topic)] for topic in (one, other)] == [[b"kept"], [b"kept"]]
    assert [record.value for record in kafka.read(one, committed=False)] == [b"kept", b"aborted"]


def test_a_group_goes_on_from_what_was_committed_for_it(kafka: Kafka) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, *"abc")
    kafka.commit("shop", topic, 2)
    assert kafka.committed("shop") == {(topic, 0): 2}


def test_a_user_over_tls_may_do_what_was_granted_and_nothing_else(kafka: Kafka) -> None:
    topic = kafka.create_topic()
    kafka.add_user("writer")
    producer = kafka.producer(**kafka.sasl("writer"))

    def outcome() -> int | None:
        """The code of the error of one record, None when it was taken."""
        said: list[KafkaError | None] = []
        try:
            producer.produce(topic, "a", on_delivery=lambda error, _message: said.append(error))
        except KafkaException as error:  # what it was refused before it remembers for a while
            said = [error.args[0]]
        producer.flush(30)
        return said[0] and said[0].code()

    assert outcome() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    kafka.grant("writer", AclOperation.WRITE, topic=topic)
    eventually(lambda: outcome() is None)
    assert [record.value for record in kafka.read(topic)] == [b"a"]


def test_a_wrong_password_is_refused(kafka: Kafka) -> None:
    kafka.add_user("known")
    said: list[KafkaError] = []
    consumer = kafka.consumer(**kafka.sasl("known", "wrong"), error_cb=said.append)
    eventually(lambda: consumer.poll(0.1) or said)
    assert said[0].code() == KafkaError._AUTHENTICATION
    consumer.close()


# Three brokers


def test_a_partition_has_another_leader_when_its_broker_dies_and_loses_nothing(kafka_cluster: Kafka) -> None:
    topic = kafka_cluster.create_topic()
    assert kafka_cluster.in_sync(topic) == {1, 2, 3}
    kafka_cluster.produce(topic, "before")
    dead = kafka_cluster.leader(topic)
    kafka_cluster.kill(dead)
    eventually(lambda: kafka_cluster.leader(topic) not in (dead, -1))
    kafka_cluster.produce(topic, "meanwhile")
    kafka_cluster.restart(dead)
    eventually(lambda: kafka_cluster.in_sync(topic) == {1, 2, 3})
    assert [record.value for record in kafka_cluster.read(topic)] == [b"before", b"meanwhile"]


def test_all_brokers_may_be_away_and_come_back_with_their_data(kafka_cluster: Kafka) -> None:
    topic = kafka_cluster.create_topic()
    kafka_cluster.produce(topic, "kept")
    kafka_cluster.stop()
    assert kafka_cluster.known() == set()
    kafka_cluster.start()
    assert [record.value for record in kafka_cluster.read(topic)] == [b"kept"]


def test_a_cluster_whose_brokers_a_test_killed_is_whole_for_the_next(kafka_cluster: Kafka) -> None:
    assert kafka_cluster.known() == {1, 2, 3}
