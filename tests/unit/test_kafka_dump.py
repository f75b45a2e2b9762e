"""What ends the reading of a Kafka partition, and brokers that do not say the same of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError

from ops_platform.clients.kafka import Kafka, Said
from ops_platform.errors import ConflictError, OpsError
from ops_platform.stores.kafka import KafkaStore
from ops_platform.stores.kafka_records import _until
from tests.remediation_rig import TurnedClock


class Message:
    def __init__(self, offset: int, error: KafkaError | None = None) -> None:
        self.offset, self.error = lambda: offset, lambda: error


def end(offset: int) -> Message:
    return Message(offset, KafkaError(KafkaError._PARTITION_EOF))


@pytest.mark.parametrize(
    ("came", "good", "over"),
    [
        ([Message(3), Message(4)], [3, 4], False),
        ([Message(4), Message(5)], [4], True),
        ([Message(3), end(5)], [3], True),
        # A leader that has just taken over tells an end of before, and then the rest.
        ([Message(3), end(4)], [3], False),
        ([end(3), Message(3), end(4), Message(4), end(5)], [3, 4], True),
    ],
)
def test_a_partition_is_read_to_the_end_that_it_had_when_its_reading_began(
    came: list[Message], good: list[int], over: bool
) -> None:
    found, ended = _until(came, 5, Kafka("bus", []), Said(), "t/0")
    assert ([message.offset() for message in found], ended) == (good, over)


def test_what_was_removed_meanwhile_is_no_end() -> None:
    with pytest.raises(ConflictError, match="were removed before they were read"):
        _until([Message(3, KafkaError(KafkaError.OFFSET_OUT_OF_RANGE))], 5, Kafka("bus", []), Said(), "t/0")


def view(**leaders: int) -> Any:
    topics = {name: SimpleNamespace(partitions={0: SimpleNamespace(leader=leader)}) for name, leader in leaders.items()}
    return SimpleNamespace(topics=topics)


class Brokers(Kafka):
    """They say each of these in turn, and the last one for good."""

    def __init__(self, *said: Sequence[Any]) -> None:
        super().__init__("bus", [("kafka", 9092)], timeout=2, clock=TurnedClock())
        self.said = list(said)

    def views(self) -> Iterator[Any]:
        yield from self.said.pop(0) if len(self.said) > 1 else self.said[0]


def store(*topics: str) -> KafkaStore:
    return KafkaStore(cast("Any", None), cast("Any", None), cast("Any", SimpleNamespace(topics=topics)))


def test_a_dump_waits_until_the_brokers_agree_who_leads() -> None:
    brokers = Brokers([view(a=1), view(a=2)], [view(a=2), view()], [view(a=2), view(a=2)])
    store("*")._need_one_view(brokers)
    assert len(brokers.said) == 1
    # What is not to be kept is nothing to agree on.
    store("b*")._need_one_view(Brokers([view(a=1, b=3), view(a=2, b=3)]))


@pytest.mark.parametrize("other", [view(a=1, b=2), view(b=1)])
def test_brokers_that_do_not_agree_are_not_dumped(other: Any) -> None:
    with pytest.raises(OpsError, match=r"the brokers do not agree who leads (a|b)/0"):
        store("*")._need_one_view(Brokers([view(a=1, b=1), other]))
