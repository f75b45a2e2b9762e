"""Our own events: what stands in the ledger's outbox goes to Kafka as CloudEvents, at least once, in order for each subject.

An entry leaves the outbox once every replica in sync has it. Whoever dies in between publishes it again: the event's id is the entry's
digest, by which a consumer knows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ops_platform.clients.kafka import Kafka, Record, Said
from ops_platform.events.cloudevents import STRUCTURED, to_json
from ops_platform.inventory.remediation import Publishing
from ops_platform.ledger import Entry
from ops_platform.ledger.chain import moment

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Producer

    from ops_platform.clients.access import Access

TYPE = "ops-platform"
BUDGET = 10.0  # seconds
LIMIT = 1000
_HEADERS = [("content-type", f"{STRUCTURED}; charset=UTF-8".encode())]


class Outbox(Protocol):
    """The ledger."""

    def outbox(self, limit: int = 1000) -> list[Entry]: ...

    def published(self, seqs: Iterable[int]) -> None: ...


@dataclass(frozen=True)
class Published:
    """`sent`: entries that arrived. `waiting`: those that were looked at and still stand in the outbox. `failures`: by subject.
    `dropped`: those that left it unsent, as nobody wants them any more."""

    sent: int
    waiting: int
    failures: Mapping[str, str]
    dropped: int = 0


class Publisher:
    """For one thread, and for one process at a time: two would each keep the order, and mix."""

    def __init__(self, kafka: Kafka, to: Publishing) -> None:
        self._kafka = kafka
        self._to = to
        self._said = Said()
        self._producer: Producer | None = None

    def close(self) -> None:
        self._producer = None

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self, ledger: Outbox, *, budget: float = BUDGET, limit: int = LIMIT) -> Published:
        """Send the oldest entries of the outbox. Raises what the ledger raises, and NotThereError, UnreachableError, AccessDeniedError
        where the topic cannot be looked at; an entry that is refused stops the later ones of its subject, and no others.
        """
        until = self._kafka.clock.monotonic() + budget
        entries = ledger.outbox(limit)
        if not entries:
            return Published(0, 0, {})
        self._said.clear()
        self._kafka.topics(self._kafka.admin(self._said), self._said, [self._to.topic], timeout=budget / 2)
        sent, failures = 0, dict[str, str]()
        # One entry of each subject at a time: a refused one must not be overtaken by the next, which may be on its way already.
        for wave in _waves(entries):
            going = [entry for entry in wave if entry.subject not in failures]
            left = until - self._kafka.clock.monotonic()
            if not going or left <= 0:
                break
            arrived = self._send(going, left, failures)
            if arrived:
                ledger.published(arrived)
                sent += len(arrived)
        return Published(sent, len(entries) - sent, failures)

    def _send(self, entries: Sequence[Entry], seconds: float, failures: dict[str, str]) -> list[int]:
        """The numbers of those that arrived."""
        if self._producer is None:
            # A batch of one: an entry that is refused for its size would take those of other subjects with it.
            self._producer = self._kafka.producer(
                self._said, linger_ms=0, batch_num_messages=1, message_max_bytes=_MOST
            )
        outcomes = self._kafka.deliver(self._producer, [self._record(entry) for entry in entries], seconds)
        arrived: list[int] = []
        for entry, outcome in zip(entries, outcomes, strict=True):
            if outcome is True:
                arrived.append(entry.seq)
            else:
                failures[entry.subject] = self._why(entry, outcome)
        if len(arrived) < len(entries):
            self._producer = None
        return arrived

    def _why(self, entry: Entry, outcome: KafkaError | bool) -> str:
        error = None if isinstance(outcome, bool) else outcome
        return f"entry {entry.seq}: {self._kafka.error(error, self._said, self._to.topic).what}"

    def _record(self, entry: Entry) -> Record:
        return Record(self._to.topic, entry.subject.encode(), event_of(entry, self._to.source), _HEADERS)


_MOST = 64 << 20


def event_of(entry: Entry, source: str) -> bytes:
    """An entry as a CloudEvent in JSON: docs/reference/events.md."""
    attributes = {
        "id": entry.sha256,
        "source": source,
        "type": f"{TYPE}.{entry.kind}",
        "subject": entry.subject,
        "time": moment(entry.at),
        "actor": entry.actor,
        "ledgerseq": str(entry.seq),
    }
    return to_json({name: text for name, text in attributes.items() if text}, entry.text)


def _waves(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The first entry of each subject, then the second of each, and so on."""
    waves: list[list[Entry]] = []
    seen: dict[str, int] = {}
    for entry in entries:
        number = seen.get(entry.subject, 0)
        seen[entry.subject] = number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(entry)
    return waves


def open_publisher(access: Access) -> Publisher | None:
    """The publisher of the inventory; None where it names no topic. The caller closes it."""
    from ops_platform.inventory.systems import KafkaSystem

    remediation = access.inventory.remediation
    if remediation is None or remediation.publish is None:
        return None
    system = access.inventory.system(remediation.publish.kafka, KafkaSystem)
    return Publisher(access.kafka(system), remediation.publish)
