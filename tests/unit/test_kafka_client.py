"""What the client of Kafka makes of a coordinator that moves: no broker can be told to move one at a chosen moment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from ops_platform.clients.kafka import Kafka, Said
from ops_platform.errors import OpsError, UnreachableError
from tests.remediation_rig import TurnedClock

WHERE = [TopicPartition("orders", 0)]


class Consumer:
    def __init__(self, answer: int | list[TopicPartition], message: int | None = None) -> None:
        self.answer = answer
        self.messages = [message] if message is not None else []
        self.closed = False

    def committed(self, where: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        assert where == WHERE
        assert timeout > 0
        if isinstance(self.answer, int):
            raise KafkaException(KafkaError(self.answer))
        return self.answer

    def get_watermark_offsets(self, where: TopicPartition, timeout: float) -> tuple[int, int]:
        assert (where.topic, where.partition) == ("orders", 0)
        if isinstance(self.answer, int):
            code, self.answer = self.answer, WHERE
            raise KafkaException(KafkaError(code))
        return 3, 7

    def poll(self, timeout: float) -> Any:
        return _Message(self.messages.pop()) if self.messages else None

    def close(self) -> None:
        self.closed = True


class _Message:
    def __init__(self, code: int) -> None:
        self.code = code

    def error(self) -> KafkaError:
        return KafkaError(self.code)


class Cluster(Kafka):
    def __init__(self, *consumers: Consumer) -> None:
        super().__init__("shop-events", [("127.0.0.1", 9)], clock=TurnedClock(), timeout=5)
        self.left = list(consumers)
        self.asked: list[Consumer] = []

    def consumer(self, said: Said, **more: Any) -> Any:
        assert more == {"group_id": "billing", "enable_auto_commit": False}
        self.asked.append(self.left.pop(0) if len(self.left) > 1 else self.left[0])
        return self.asked[-1]


@pytest.mark.parametrize(
    "moves", [KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS]
)
def test_a_coordinator_that_moves_is_asked_again(moves: int) -> None:
    answer = [TopicPartition("orders", 0, 7)]
    cluster = Cluster(Consumer(moves), Consumer(moves), Consumer(answer))
    assert cluster.committed(Said(), "billing", WHERE) == answer
    assert cluster.clock.monotonic() == 1.0
    assert len(cluster.asked) == 3
    assert all(consumer.closed for consumer in cluster.asked)


def test_one_that_moves_for_ever_is_named_once_time_is_up() -> None:
    cluster = Cluster(Consumer(KafkaError.NOT_COORDINATOR))
    with pytest.raises(UnreachableError, match=r"(?i)not coordinator") as error:
        cluster.committed(Said(), "billing", WHERE)
    assert "group billing" in str(error.value)
    assert 4 <= cluster.clock.monotonic() <= 5


def test_a_refusal_is_told_at_once_and_what_a_message_tells_counts() -> None:
    cluster = Cluster(Consumer(KafkaError._TIMED_OUT, message=KafkaError.GROUP_AUTHORIZATION_FAILED))
    with pytest.raises(OpsError, match=r"(?i)group authorization failed"):
        cluster.committed(Said(), "billing", WHERE)
    assert len(cluster.asked) == 1


def test_one_partition_that_is_refused_refuses_the_whole() -> None:
    refused: Any = SimpleNamespace(error=KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART))
    with pytest.raises(OpsError, match=r"(?i)unknown topic"):
        Cluster(Consumer([refused])).committed(Said(), "billing", WHERE)


def test_a_leader_that_moves_is_asked_again_and_a_topic_that_is_gone_is_not() -> None:
    consumer: Any = Consumer(KafkaError.NOT_LEADER_FOR_PARTITION)
    cluster = Cluster(consumer)
    assert cluster.watermarks(consumer, Said(), "orders", 0) == (3, 7)
    assert cluster.clock.monotonic() == 0.5
    gone: Any = Consumer(KafkaError.UNKNOWN_TOPIC_OR_PART)
    with pytest.raises(OpsError, match=r"(?i)unknown topic"):
        cluster.watermarks(gone, Said(), "orders", 0)
