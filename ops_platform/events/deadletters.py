"""What cannot be read goes to the dead-letter topic, confirmed there before the cursor passes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ops_platform.clients.kafka import Kafka, Record, Said
from ops_platform.errors import OpsError

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message, Producer

_PREFIX = "ops-dead-letter-"
_ROOM = 1 << 20  # for headers and the record's own frame


@dataclass(frozen=True)
class DeadLetter:
    """A message that was set aside. `reason` says what is wrong with it and never quotes it. `size`: of its value, in bytes."""

    topic: str
    partition: int
    offset: int
    at: datetime | None
    reason: str
    size: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        return {
            "topic": self.topic,
            "partition": self.partition,
            "offset": self.offset,
            "at": self.at.isoformat() if self.at else None,
            "reason": self.reason,
            "size": self.size,
        }


@dataclass(frozen=True)
class Poison:
    """A dead letter with all of it that is written."""

    letter: DeadLetter
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]

    @classmethod
    def of(cls, message: Message, reason: str, at: datetime | None) -> Poison:
        value = message.value()
        letter = DeadLetter(
            message.topic() or "", message.partition() or 0, message.offset() or 0, at, reason, len(value or b"")
        )  # fmt: skip
        return cls(letter, message.key(), value, list(message.headers() or ()))  # pyright: ignore[reportArgumentType]

    def provenance(self, *, with_value: bool) -> list[tuple[str, bytes | None]]:
        """The message's own headers, then where it stood and why it was set aside."""
        letter = self.letter
        said = {
            "topic": letter.topic,
            "partition": str(letter.partition),
            "offset": str(letter.offset),
            "timestamp": letter.at.isoformat() if letter.at else "",
            "reason": letter.reason,
            "size": str(letter.size),
            "value": "whole" if with_value else "left out",
        }
        own = [(f"{_PREFIX}{name}", text.encode()) for name, text in said.items()]
        return [*self.headers, *own, (f"{_PREFIX}key", self.key)]


class DeadLetters:
    """The topic for them. `largest`: a value above this many bytes is left out; it still stands where the headers say."""

    def __init__(self, kafka: Kafka, topic: str, *, largest: int) -> None:
        self.topic = topic
        self._kafka = kafka
        self._largest = largest
        self._said = Said()
        self._producer: Producer | None = None

    def close(self) -> None:
        self._producer = None

    def write(self, poison: Sequence[Poison], seconds: float) -> None:
        """All of them, confirmed by every replica in sync. Raises OpsError where one is not: then some may stand there already."""
        if not poison:
            return
        until = self._kafka.clock.monotonic() + seconds
        left = self._write([(one, one.letter.size <= self._largest) for one in poison], seconds)
        if left and all(_too_large(error) for _, error in left):
            # The topic's own limit may be smaller than ours: better without its value than never past it.
            remaining = max(until - self._kafka.clock.monotonic(), 0.1)
            left = self._write([(one, False) for one, _ in left], remaining)
        for one, error in left:
            raise self._error(one.letter, error)

    def _write(self, letters: Sequence[tuple[Poison, bool]], seconds: float) -> list[tuple[Poison, KafkaError | bool]]:
        """Those that were not confirmed."""
        producer = self._open()
        records = [
            Record(self.topic, one.key, one.value if whole else None, one.provenance(with_value=whole))
            for one, whole in letters
        ]
        found = self._kafka.deliver(producer, records, seconds)
        left = [(one, outcome) for (one, _), outcome in zip(letters, found, strict=True) if outcome is not True]
        if left:
            self._producer = None
        return left

    def _error(self, letter: DeadLetter, error: KafkaError | bool) -> OpsError:
        if not isinstance(error, bool):
            return self._kafka.error(error, self._said, self.topic)
        return self._kafka.error(
            None, self._said, f"the dead letter of {letter.topic}/{letter.partition}/{letter.offset} to {self.topic}"
        )

    def _open(self) -> Producer:
        if self._producer is None:
            self._producer = self._kafka.producer(
                self._said,
                enable_idempotence=False,  # a tick that is repeated writes them again anyway
                message_max_bytes=self._largest + _ROOM,
                linger_ms=0,
                batch_num_messages=1,  # one that is refused for its size would take its neighbours with it
                queue_buffering_max_kbytes=1 << 18,
            )
        return self._producer


def _too_large(error: KafkaError | bool) -> bool:
    return not isinstance(error, bool) and error.name() in _TOO_LARGE


_TOO_LARGE = frozenset({"MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE"})
