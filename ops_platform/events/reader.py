"""Events from Kafka, exactly once into whatever is stored together with the cursor that comes with them.

A tick is `read(cursor)`: it assigns explicit offsets and never subscribes, so nothing else moves where reading stands. Whoever calls
stores the signals and the new cursor together, or neither; then every message is handed over once, named in a gap, or a dead letter.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ops_platform.clients.kafka import Kafka, Said, Topic, heard
from ops_platform.errors import ConflictError, OpsError, UnreachableError
from ops_platform.events.cloudevents import EventLabels, NotAnEventError, of_parts, signal_of_message
from ops_platform.events.cursor import (
    RESET,
    Cursor,
    Gap,
    Range,
    TopicCursor,
    Watermarks,
    begin,
    check_topic,
    made_anew,
    share,
)
from ops_platform.events.deadletters import DeadLetter, DeadLetters, Poison
from ops_platform.events.schemas import Schemas
from ops_platform.inventory.remediation import EventSource
from ops_platform.remediation.model import Signal

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Message
    from confluent_kafka.admin import AdminClient

    from ops_platform.clients.access import Access

BUDGET = 15.0  # seconds of a tick
LIMIT = 10_000  # offsets of a tick, over all partitions
_PIECE = 1000  # messages taken from librdkafka at once
_WAIT = 0.05  # seconds; librdkafka waits for a whole piece that long, also where the rest is all there is
_LETTERS = 5.0  # seconds of the budget that are kept for dead letters and for the brokers' last word
_RECEIVE = 100_000_000  # bytes; librdkafka's own default for one answer
_FETCH = 1 << 20


@dataclass(frozen=True)
class Lag:
    """`next`: the first offset that was not read. `end`: the one after the last. Messages wait where they differ."""

    topic: str
    partition: int
    next: int
    end: int

    @property
    def messages(self) -> int:
        """At most: offsets of transactions and of compacted messages count too."""
        return self.end - self.next


@dataclass(frozen=True)
class Batch:
    """What a tick brings, in the order of topic, partition and offset. `problems`: topics made anew, and partitions that could not be looked at; these
    stay where they were. `not_committed`: why the group's offsets could not be told to lag exporters, if so.
    """

    signals: list[Signal]
    cursor: Cursor
    gaps: tuple[Gap, ...] = ()
    dead_letters: tuple[DeadLetter, ...] = ()
    lag: tuple[Lag, ...] = ()
    problems: tuple[str, ...] = ()
    not_committed: str | None = None

    @property
    def more(self) -> bool:
        """Whether something waits to be read."""
        return any(one.messages for one in self.lag)


_URL_SAFE = str.maketrans("+/", "-_")  # as Kafka's own tools write the id of a topic


@dataclass
class _Part:
    """One partition while it is read. `next` is the first offset that was not yet taken; `prefix` begins its fingerprints.

    `topic_id` stands in them: a topic that was made anew begins at offset 0 again, and means other events.
    """

    wanted: Range
    next: int
    topic_id: str | None = None
    signals: list[Signal] = field(default_factory=list[Signal])
    poison: list[Poison] = field(default_factory=list[Poison])
    prefix: str = field(init=False)

    def __post_init__(self) -> None:
        mark = "@" + self.topic_id.translate(_URL_SAFE) if self.topic_id else ""
        self.prefix = f"{self.wanted.topic}{mark}/{self.wanted.partition}/"


@dataclass(frozen=True)
class _Seen:
    """The brokers' side at the start of a tick."""

    topics: Mapping[str, Topic]
    marks: Mapping[tuple[str, int], Watermarks]
    problems: tuple[str, ...]


class EventReader:
    """The topics of one entry under `remediation.events`. For one thread; keeps its connections until `close`."""

    def __init__(self, kafka: Kafka, source: EventSource, schemas: Schemas) -> None:
        self.source = source
        self._kafka = kafka
        self._schemas = schemas
        self._letters = DeadLetters(kafka, source.dead_letter, largest=source.largest)
        self._said = Said()
        self._consumer: Consumer | None = None
        self._admin: AdminClient | None = None
        self._refused: str | None = None

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
        self._consumer = self._admin = None
        self._letters.close()

    def __enter__(self) -> EventReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, cursor: str | Cursor | None, *, budget: float = BUDGET, limit: int = LIMIT) -> Batch:
        """One tick, within `budget` seconds and at most `limit` offsets.

        Raises UnreachableError where nothing could be looked at or read (or a schema registry is away), NotThereError for a topic or
        dead-letter topic that does not exist, ConflictError where a topic is not the one that the cursor knows, AccessDeniedError,
        UsageError for a cursor that is none. The cursor stays then, and so does everything that was to be read.
        """
        from confluent_kafka import KafkaException

        known = Cursor.parse(cursor) if cursor is None or isinstance(cursor, str) else cursor
        clock = self._kafka.clock
        until = clock.monotonic() + budget
        self._said.clear()
        try:
            return self._read(known, until, min(limit, 1 << 31), budget)
        except KafkaException as error:
            raise self._kafka.error(error.args[0], self._said) from None

    def look(self, topic: str) -> tuple[Topic, Mapping[int, Watermarks]]:
        """A topic as the brokers have it now, and where its partitions begin and end; those that cannot be looked at are left out.

        Raises as `read` does.
        """
        from confluent_kafka import KafkaException

        self._said.clear()
        try:
            admin = self._admin = self._admin or self._kafka.admin(self._said)
            found = self._kafka.topics(admin, self._said, [topic])[topic]
            marks, _ = self._watermarks(admin, {topic: found}, self._kafka.timeout)
        except KafkaException as error:
            raise self._kafka.error(error.args[0], self._said) from None
        return found, {part: mark for (_, part), mark in marks.items()}

    def _read(self, cursor: Cursor, until: float, limit: int, budget: float) -> Batch:
        left = _Left(self._kafka, until)
        seen = self._look(cursor, left)
        cursor, anew = self._forgotten(cursor, seen)
        starts, gaps = self._starts(cursor, seen)
        ranges = share([Range(*where, at, seen.marks[where].high) for where, at in starts.items()], limit)
        consumer = self._open()
        self._tell_group(consumer, cursor)
        parts = {(one.topic, one.partition): _Part(one, one.start, seen.topics[one.topic].id) for one in ranges}
        if parts:
            self._consume(consumer, parts, min(until - min(_LETTERS, budget / 3), until))
        else:
            consumer.poll(0)
        poison = [one for part in parts.values() for one in part.poison]
        self._letters.write(poison, left.seconds)
        after = self._after(cursor, seen, starts, parts)
        return Batch(
            [signal for part in parts.values() for signal in part.signals],
            after,
            tuple(gaps),
            tuple(one.letter for one in poison),
            tuple(Lag(*where, at, max(at, seen.marks[where].high)) for where, at in self._stands(after, seen)),
            (*anew, *seen.problems),
            self._refused,
        )

    # Before reading

    def _look(self, cursor: Cursor, left: _Left) -> _Seen:
        """Topics and watermarks, and that each topic is the one which the cursor knows."""
        admin = self._admin = self._admin or self._kafka.admin(self._said)
        names = [*self.source.topics, self.source.dead_letter]
        topics = self._kafka.topics(admin, self._said, names, timeout=left.seconds / 2)
        del topics[self.source.dead_letter]
        for name, topic in topics.items():
            if self.source.made_anew == "stand":
                check_topic(name, cursor, topic.id, topic.partitions)
        marks, problems = self._watermarks(admin, topics, left.seconds)
        if not marks:
            raise UnreachableError(
                f"no partition can be looked at: {'; '.join(problems)}",
                where=self._kafka.where,
                remedy="look whether its brokers run",
            )
        return _Seen(topics, marks, problems)

    def _forgotten(self, cursor: Cursor, seen: _Seen) -> tuple[Cursor, list[str]]:
        """The cursor without the topics that were made anew, where the inventory lets them begin; and what is said of them."""
        said: list[str] = []
        for name, topic in seen.topics.items() if self.source.made_anew == "begin" else ():
            marks = {part: mark for (of, part), mark in seen.marks.items() if of == name}
            if why := made_anew(name, cursor, topic.id, marks, topic.partitions):
                cursor = cursor.without(name)
                said.append(f"{why}; it begins at its {self.source.start} offset")
            else:
                check_topic(name, cursor, topic.id, topic.partitions)
        return cursor, said

    def _watermarks(
        self, admin: AdminClient, topics: Mapping[str, Topic], seconds: float
    ) -> tuple[dict[tuple[str, int], Watermarks], tuple[str, ...]]:
        """Of all partitions at once. `high` is the end of what is committed: beyond it a transaction may still be open."""
        from confluent_kafka import IsolationLevel, TopicPartition
        from confluent_kafka.admin import OffsetSpec  # pyright: ignore[reportPrivateImportUsage]

        where = [(name, part) for name, topic in topics.items() for part in topic.partitions]
        asked = [
            admin.list_offsets(
                {TopicPartition(*one): spec for one in where},  # pyright: ignore[reportArgumentType] - its own constants
                isolation_level=IsolationLevel.READ_COMMITTED,
                request_timeout=max(min(seconds / 2, self._kafka.timeout), 0.1),
            )
            for spec in (OffsetSpec.earliest(), OffsetSpec.latest())
        ]
        answers = [{(one.topic, one.partition): answer for one, answer in each.items()} for each in asked]
        marks: dict[tuple[str, int], Watermarks] = {}
        problems: list[str] = []
        for one in where:
            try:
                with self._kafka.named(self._said, f"{one[0]}/{one[1]}"), heard(admin):
                    low, high = (each[one].result(seconds).offset for each in answers)
                marks[one] = Watermarks(low, high)
            except UnreachableError as error:
                problems.append(f"{error.where}: {error.what}")
        return marks, tuple(problems)

    def _starts(self, cursor: Cursor, seen: _Seen) -> tuple[dict[tuple[str, int], int], list[Gap]]:
        """Where each partition goes on. A topic that was never read has to be seen whole, or a part of it would never begin."""
        starts: dict[tuple[str, int], int] = {}
        gaps: list[Gap] = []
        for name, topic in seen.topics.items():
            if name not in cursor.topics and any((name, part) not in seen.marks for part in topic.partitions):
                raise UnreachableError(
                    f"not all partitions of {name} can be looked at, and it is to be begun: {'; '.join(seen.problems)}",
                    where=self._kafka.where,
                    remedy="look whether its brokers run",
                )
        for (name, part), marks in seen.marks.items():
            starts[name, part], gap = begin(name, part, cursor, marks, self.source.start)
            gaps += [gap] if gap else []
        return starts, gaps

    def _tell_group(self, consumer: Consumer, cursor: Cursor) -> None:
        """The received cursor: what was surely stored. For lag exporters alone: nothing of ours reads it, and nothing fails by it."""
        from confluent_kafka import KafkaException, TopicPartition

        offsets = [TopicPartition(*one) for one in cursor.offsets() if one[0] in self.source.topics]
        if not offsets:
            return
        try:
            consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._refused = error.args[0].str()

    def _committed(self, error: KafkaError | None, _offsets: object) -> None:
        self._refused = error.str() if error is not None else None

    def _open(self) -> Consumer:
        if self._consumer is None:
            largest = self.source.largest
            self._consumer = self._kafka.consumer(
                self._said,
                group_id=self.source.group,
                enable_auto_commit=False,
                enable_auto_offset_store=False,
                isolation_level="read_committed",
                auto_offset_reset="error",
                enable_partition_eof=True,
                allow_auto_create_topics=False,
                fetch_wait_max_ms=100,
                fetch_message_max_bytes=max(_FETCH, largest),
                receive_message_max_bytes=max(_RECEIVE, 2 * largest + _FETCH),
                on_commit=self._committed,
            )
        return self._consumer

    # Reading

    def _consume(self, consumer: Consumer, parts: Mapping[tuple[str, int], _Part], until: float) -> None:
        """Until each partition is at its end, or time is up. Raises where nothing at all came."""
        from confluent_kafka import TopicPartition

        clock = self._kafka.clock
        where = [TopicPartition(one.wanted.topic, one.wanted.partition, one.next) for one in parts.values()]
        consumer.assign(where)
        consumer.resume(where)  # a partition that the tick before has paused stays so over every assignment
        open_parts = dict(parts)
        try:
            with _no_search_for_cycles():
                while open_parts and (left := until - clock.monotonic()) > 0:
                    most = min(_PIECE, sum(part.wanted.end - part.next for part in open_parts.values()))
                    closed = self._take(consumer.consume(most, min(left, _WAIT)), open_parts, clock.now())
                    for one in closed:
                        del open_parts[one]
                    if closed and open_parts:
                        consumer.pause([TopicPartition(*one) for one in closed])
        finally:
            consumer.unassign()
        if all(part.next == part.wanted.start for part in parts.values()):
            raise self._nothing(parts)

    def _nothing(self, parts: Mapping[tuple[str, int], _Part]) -> OpsError:
        names = ", ".join(f"{topic}/{part}" for topic, part in list(parts)[:5])
        found = self._kafka.error(None, self._said, names)
        if isinstance(found, UnreachableError) and not self._said.errors:
            return UnreachableError("there are messages, and none came in time", where=found.where, remedy=found.remedy)
        return found

    def _take(
        self, messages: Sequence[Message], parts: Mapping[tuple[str, int], _Part], now: datetime
    ) -> list[tuple[str, int]]:
        """What came, in its partitions; those that came to their end by it."""
        closed: list[tuple[str, int]] = []
        content, check = self._schemas.content, self._schemas.check if self._schemas.any else None
        largest = self.source.largest
        for message in messages:
            where = (message.topic(), message.partition())
            part = parts.get(where)  # pyright: ignore[reportArgumentType, reportCallIssue]
            if part is None or part.next >= (end := part.wanted.end):
                continue  # beyond the end of this tick: it comes again in the next one
            offset: int = message.offset()  # pyright: ignore[reportAssignmentType]
            if (error := message.error()) is not None:
                self._notice(error, part, offset)
            elif offset >= end:
                part.next = end
            else:
                try:
                    value = message.value()
                    if value is not None and len(value) > largest:
                        raise NotAnEventError(f"it has {len(value)} bytes, and {largest} is the limit")
                    event = of_parts(content(value), message.headers())  # pyright: ignore[reportArgumentType]
                    if check is not None:
                        check(event)
                    at = _moment(message) if event.time is None else None
                    labels = EventLabels(event, value, content)
                    part.signals.append(signal_of_message(f"{part.prefix}{offset}", event, labels, now, at))
                except NotAnEventError as why:
                    part.poison.append(Poison.of(message, why.what, _moment(message)))
                part.next = offset + 1
            if part.next >= end:
                closed.append(where)  # pyright: ignore[reportArgumentType]
        return closed

    def _notice(self, error: KafkaError, part: _Part, offset: int) -> None:
        """The end of a partition moves the cursor over what no reader sees: aborted transactions, what compaction took."""
        name = error.name()
        if name == "_PARTITION_EOF":
            part.next = max(part.next, min(offset, part.wanted.end))
        elif name in ("_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE"):
            raise ConflictError(
                f"offset {part.next} is not there any more: it expired or the topic was made anew while it was read",
                where=f"{part.wanted.topic}/{part.wanted.partition}",
                remedy=f"the next tick looks again, and says which; if it was made anew, {RESET}",
            )
        elif name not in _PASSING:
            raise self._kafka.error(error, self._said, f"{part.wanted.topic}/{part.wanted.partition}")
        else:
            self._said(error)

    # After reading

    def _after(
        self, cursor: Cursor, seen: _Seen, starts: Mapping[tuple[str, int], int], parts: Mapping[tuple[str, int], _Part]
    ) -> Cursor:
        """Of partitions that could not be looked at nothing is changed; topics that are no longer read are forgotten."""
        topics: dict[str, TopicCursor] = {}
        for name, topic in seen.topics.items():
            known = cursor.topics.get(name)
            now = {
                part: parts[name, part].next if (name, part) in parts else at
                for (of, part), at in starts.items()
                if of == name
            }
            topics[name] = TopicCursor(
                {**(known.next if known else {}), **now}, topic.id or (known.id if known else None)
            )
        return Cursor(topics)

    def _stands(self, cursor: Cursor, seen: _Seen) -> list[tuple[tuple[str, int], int]]:
        return [((name, part), at) for name, part, at in cursor.offsets() if (name, part) in seen.marks]


# A broker that went away while we read: librdkafka looks for the next leader, and the partition waits.
_PASSING = frozenset(
    {"_TRANSPORT", "_ALL_BROKERS_DOWN", "_RESOLVE", "_TIMED_OUT", "_MAX_POLL_EXCEEDED", "NOT_LEADER_FOR_PARTITION",
     "LEADER_NOT_AVAILABLE", "REPLICA_NOT_AVAILABLE", "FENCED_LEADER_EPOCH", "UNKNOWN_LEADER_EPOCH", "KAFKA_STORAGE_ERROR",
     "REQUEST_TIMED_OUT", "OFFSET_NOT_AVAILABLE"}
)  # fmt: skip


_MANY = 50_000  # objects that the collector has not seen; some for each event


@contextlib.contextmanager
def _no_search_for_cycles() -> Generator[None]:
    """Events hold no cycles, and there are many of them: the collector would look at each of them again and again, for nothing.

    Afterwards many of them are among its oldest objects at once, as they would be in the end. In a process that has frozen what it loaded they are
    frozen too, and what a tick holds in circles at that moment stays with them: for a few events that would be a bad bargain.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            if gc.get_count()[0] > _MANY:
                frozen = gc.get_freeze_count() > 0
                gc.freeze()
                if not frozen:
                    gc.unfreeze()
            gc.enable()


class _Left:
    """What is left of the budget."""

    def __init__(self, kafka: Kafka, until: float) -> None:
        self._clock = kafka.clock
        self._until = until

    @property
    def seconds(self) -> float:
        return max(self._until - self._clock.monotonic(), 0.1)


def _moment(message: Message) -> datetime | None:
    kind, milliseconds = message.timestamp()
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if kind and milliseconds >= 0 else None


def open_reader(access: Access, source: EventSource) -> EventReader:
    """The reader of one entry of the inventory. The caller closes it."""
    from ops_platform.inventory.systems import KafkaSystem

    system = access.inventory.system(source.kafka, KafkaSystem)
    schemas = Schemas(source.schemas, access.path, access.schema_registry(system))
    return EventReader(access.kafka(system), source, schemas)
