"""Where reading stands, and what is to be read next: pure functions over what the brokers say of a topic.

The cursor is the truth, and not the group's offsets: `{"v": 1, "topics": {TOPIC: {"id": …, "next": {PARTITION: offset}}}}`.
`next` is the first offset that was not yet read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ops_platform.errors import ConflictError, UsageError

_VERSION = 1
RESET = "find out whether events were lost; then ops events cursor reset TOPIC (docs/reference/events.md, Starting a topic anew)"


@dataclass(frozen=True)
class TopicCursor:
    """`id`: the topic's own, where the broker gives one. `next`: by partition."""

    next: Mapping[int, int]
    id: str | None = None


@dataclass(frozen=True)
class Cursor:
    """By topic. `str` writes it, `parse` reads it."""

    topics: Mapping[str, TopicCursor] = field(default_factory=dict[str, TopicCursor])

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """None and "" are a cursor that knows no topic. Raises UsageError for what we did not write."""
        if not text:
            return cls()
        try:
            value = json.loads(text)
            if value["v"] != _VERSION:
                raise ValueError(f"version {value['v']!r} is not {_VERSION}")
            return cls({name: _topic(topic) for name, topic in value["topics"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"this cursor cannot be read: {error}",
                where="the sensor's cursor",
                remedy="put the one of the last good tick back; an empty one begins each topic as `start` says, and loses what is between",
            ) from None

    def __str__(self) -> str:
        topics = {
            name: {"id": topic.id, "next": {str(part): offset for part, offset in sorted(topic.next.items())}}
            for name, topic in sorted(self.topics.items())
        }
        return json.dumps({"v": _VERSION, "topics": topics}, separators=(",", ":"))

    def without(self, topic: str) -> Cursor:
        """The topic forgotten: it begins anew as `start` says. A person's decision."""
        return Cursor({name: found for name, found in self.topics.items() if name != topic})

    def at(self, topic: str, offsets: Mapping[int, int]) -> Cursor:
        """Other offsets for some partitions of a topic that it knows."""
        known = self.topics[topic]
        return Cursor({**self.topics, topic: replace(known, next={**known.next, **offsets})})

    def entry(self, topic: str) -> dict[str, Any] | None:
        """What it says of a topic, as JSON."""
        return json.loads(str(self))["topics"].get(topic)

    def offsets(self) -> Iterable[tuple[str, int, int]]:
        for name, topic in sorted(self.topics.items()):
            for part, offset in sorted(topic.next.items()):
                yield name, part, offset


def _topic(value: Mapping[str, Any]) -> TopicCursor:
    parts = {int(part): offset for part, offset in value["next"].items()}
    if any(isinstance(offset, bool) or not isinstance(offset, int) or offset < 0 for offset in parts.values()):
        raise ValueError("an offset is a whole number from 0 on")
    name = value["id"]
    if name is not None and not isinstance(name, str):
        raise ValueError("a topic's id is a text")
    return TopicCursor(parts, name)


# Against the brokers


@dataclass(frozen=True)
class Watermarks:
    """`low`: the first offset that is still there. `high`: the one after the last that is committed."""

    low: int
    high: int


@dataclass(frozen=True)
class Gap:
    """Offsets from `first` to `last`, both included, that expired before they were read."""

    topic: str
    partition: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}: offsets {self.first} to {self.last} expired before they were read"

    def as_json(self) -> dict[str, Any]:
        return {"topic": self.topic, "partition": self.partition, "first": self.first, "last": self.last}


@dataclass(frozen=True)
class Range:
    """Offsets of one partition from `start` to before `end`."""

    topic: str
    partition: int
    start: int
    end: int


def check_topic(name: str, cursor: Cursor, topic_id: str | None, partitions: Sequence[int]) -> None:
    """That it is the topic which the cursor knows. Raises ConflictError for another one of its name, or one with fewer partitions."""
    known = cursor.topics.get(name)
    if known is None:
        return
    if known.id is not None and topic_id is not None and known.id != topic_id:
        raise ConflictError(
            f"the topic was deleted and made anew: it was {known.id}, and is {topic_id}", where=name, remedy=RESET
        )
    if gone := sorted(set(known.next) - set(partitions)):
        raise ConflictError(
            f"the topic has lost partitions ({', '.join(map(str, gone))}), which Kafka never does: it was made anew",
            where=name,
            remedy=RESET,
        )


def begin(
    name: str, partition: int, cursor: Cursor, marks: Watermarks, start: Literal["earliest", "latest"]
) -> tuple[int, Gap | None]:
    """The offset at which a partition goes on, and what was lost before it.

    A partition that a known topic got since the last tick begins at 0: everything in it is new. Raises ConflictError where the cursor
    stands behind the end.
    """
    known = cursor.topics.get(name)
    if known is None:
        return (marks.low if start == "earliest" else marks.high), None
    at = known.next.get(partition, 0)
    if at > marks.high:
        raise ConflictError(
            f"we have read up to offset {at}, and it ends at {marks.high}: it was made anew or cut off, or a broker that hung answers",
            where=f"{name}/{partition}",
            remedy=RESET,
        )
    if at < marks.low:
        return marks.low, Gap(name, partition, at, marks.low - 1)
    return at, None


def made_anew(
    name: str, cursor: Cursor, topic_id: str | None, marks: Mapping[int, Watermarks], partitions: Sequence[int]
) -> str | None:
    """Why it cannot be the topic which the cursor knows. `marks` by partition.

    With the same id it is the same topic, whatever else is said of it: a broker that hung and goes on tells for some moments what was.
    """
    known = cursor.topics.get(name)
    if known is not None and known.id is not None and known.id == topic_id:
        return None
    try:
        check_topic(name, cursor, topic_id, partitions)
        for partition, mark in marks.items():
            begin(name, partition, cursor, mark, "earliest")
    except ConflictError as error:
        return f"{error.where}: {error.what}"
    return None


def share(open_ranges: Sequence[Range], limit: int) -> list[Range]:
    """At most `limit` offsets of all ranges, evenly: a long partition takes what the short ones leave. In order of topic and partition.

    It depends on its arguments alone, so that what is read again ends where it ended before, as long as the ends are the same.
    """
    left, ends = limit, dict[tuple[str, int], int]()
    waiting = sorted(open_ranges, key=lambda one: (one.end - one.start, one.topic, one.partition))
    for number, one in enumerate(waiting):
        taken = min(one.end - one.start, -(-left // (len(waiting) - number)))
        ends[one.topic, one.partition] = one.start + taken
        left -= taken
    shared = [replace(one, end=ends[one.topic, one.partition]) for one in open_ranges]
    return sorted((one for one in shared if one.end > one.start), key=lambda one: (one.topic, one.partition))
