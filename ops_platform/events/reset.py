"""The cursor of an events sensor, where Dagster keeps it: looked at beside the brokers, and set by a person, as a recorded action.

Both go over the API of Dagster's web server, so that whoever resets a cursor needs no access to Dagster's own database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ops_platform.actions import (
    ActionResult,
    Applied,
    Approval,
    Case,
    Change,
    Check,
    ModeGuard,
    Outcome,
    Plan,
    Ruling,
    Verification,
    run_action,
)
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, NotThereError, OpsError, UnreachableError, UsageError
from ops_platform.events.cursor import Cursor, TopicCursor, Watermarks, begin, check_topic, made_anew
from ops_platform.events.reader import EventReader, open_reader
from ops_platform.inventory.model import Mode
from ops_platform.inventory.remediation import EventSource
from ops_platform.ledger import Ledger

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.clients.kafka import Topic

ACTION = "events.reset_cursor"

_SENSORS = """
query { repositoriesOrError { __typename
  ... on RepositoryConnection { nodes { name location { name } sensors { name sensorState {
    status typeSpecificData { ... on SensorData { lastCursor } } ticks(limit: 1) { status } } } } }
  ... on PythonError { message } } }"""
_SET = """
mutation($sensor: SensorSelector!, $cursor: String) { setSensorCursor(sensorSelector: $sensor, cursor: $cursor) { __typename
  ... on Sensor { name } ... on Error { message } } }"""


def sensor_name(number: int) -> str:
    """Of the entry with this number under `remediation.events`, from 0 on."""
    return "events" if number == 0 else f"events_{number}"


@dataclass(frozen=True)
class Kept:
    """What Dagster keeps of a sensor. `ticking`: its newest tick has not ended. `selector`: how its API names it."""

    cursor: Cursor
    on: bool
    ticking: bool
    selector: Mapping[str, str]


@dataclass(frozen=True)
class EventsSensor:
    """A sensor that reads events, and the entry of the inventory that it reads by."""

    access: Access
    number: int
    source: EventSource

    @property
    def name(self) -> str:
        return sensor_name(self.number)

    def kept(self) -> Kept:
        """Raises NotThereError where Dagster has no such sensor, ConflictError where two code locations have it."""
        from ops_platform.clients.dagster import ask

        api = self.access.dagster()
        found = ask(api, _SENSORS, {}, "repositoriesOrError", "RepositoryConnection")
        places = [(node, s) for node in found["nodes"] for s in node["sensors"] if s["name"] == self.name]
        if not places:
            raise NotThereError(
                f"it has no sensor {self.name}", where=api.host, remedy="its code location reads another inventory"
            )
        if len(places) > 1:
            raise ConflictError(f"several code locations have a sensor {self.name}", where=api.host)
        ((node, sensor),) = places
        state = sensor["sensorState"]
        return Kept(
            Cursor.parse((state["typeSpecificData"] or {}).get("lastCursor")),
            state["status"] == "RUNNING",
            any(tick["status"] == "STARTED" for tick in state["ticks"]),
            {
                "repositoryName": node["name"],
                "repositoryLocationName": node["location"]["name"],
                "sensorName": self.name,
            },
        )

    def set(self, kept: Kept, cursor: Cursor) -> None:
        from ops_platform.clients.dagster import ask

        ask(
            self.access.dagster(),
            _SET,
            {"sensor": dict(kept.selector), "cursor": str(cursor)},
            "setSensorCursor",
            "Sensor",
        )


def sensors(access: Access) -> list[EventsSensor]:
    remediation = access.inventory.remediation
    return [EventsSensor(access, n, source) for n, source in enumerate(remediation.events if remediation else ())]


# Looking


@dataclass(frozen=True)
class PartitionStanding:
    """`next`: the first offset that was not read, None where the partition was never read. `low`, `high`: what the brokers have, from
    the first offset that is still there to the one after the last; None where it could not be asked.
    """

    partition: int
    next: int | None
    low: int | None
    high: int | None


@dataclass(frozen=True)
class TopicStanding:
    """`id`: as the cursor has it; `id_now`: as the brokers have it. `state`: goes on (with the next tick), not begun (it begins as
    `start` says), has a gap (events expired unread: it goes on behind them), stands (a person has to decide), unknown (not asked).
    """

    sensor: str
    kafka: str
    topic: str
    state: str
    why: str | None
    id: str | None
    id_now: str | None
    partitions: tuple[PartitionStanding, ...]


GOES_ON, NOT_BEGUN, GAP, STANDS, UNKNOWN = "goes on", "not begun", "has a gap", "stands", "unknown"


def standing(sensor: EventsSensor) -> list[TopicStanding]:
    """Its topics in the cursor and at the brokers. Raises where Dagster cannot be asked; a topic that cannot is `unknown`."""
    cursor = sensor.kept().cursor
    with open_reader(sensor.access, sensor.source) as reader:
        return [_topic_standing(sensor, cursor, reader, name) for name in sensor.source.topics]


def _topic_standing(sensor: EventsSensor, cursor: Cursor, reader: EventReader, name: str) -> TopicStanding:
    known = cursor.topics.get(name, TopicCursor({}))
    nowhere = tuple(PartitionStanding(part, at, None, None) for part, at in sorted(known.next.items()))
    unknown = TopicStanding(sensor.name, sensor.source.kafka, name, UNKNOWN, None, known.id, None, nowhere)
    try:
        topic, marks = reader.look(name)
    except NotThereError as error:
        return replace(unknown, state=STANDS, why=str(error))
    except OpsError as error:
        return replace(unknown, why=str(error))
    parts = sorted({*known.next, *topic.partitions})
    partitions = tuple(
        PartitionStanding(part, known.next.get(part), mark.low if mark else None, mark.high if mark else None)
        for part in parts
        for mark in (marks.get(part),)
    )
    state, why = _state(cursor, topic, marks, sensor.source)
    return replace(unknown, state=state, why=why, id_now=topic.id, partitions=partitions)


def _state(
    cursor: Cursor, topic: Topic, marks: Mapping[int, Watermarks], source: EventSource
) -> tuple[str, str | None]:
    """As the next tick would find it."""
    try:
        check_topic(topic.name, cursor, topic.id, topic.partitions)
        gaps = [gap for part, mark in marks.items() if (gap := begin(topic.name, part, cursor, mark, source.start)[1])]
    except ConflictError as error:
        begins = source.made_anew == "begin"
        if begins and (why := made_anew(topic.name, cursor, topic.id, marks, topic.partitions)):
            return NOT_BEGUN, f"{why}; it begins at its {source.start} offset"
        return STANDS, error.what
    if away := sorted(set(topic.partitions) - set(marks)):
        return UNKNOWN, f"partitions {', '.join(map(str, away))} could not be looked at"
    if topic.name not in cursor.topics:
        return NOT_BEGUN, f"it begins at its {source.start} offset"
    return (GAP, "; ".join(map(str, gaps))) if gaps else (GOES_ON, None)


# Setting


@dataclass(frozen=True)
class SensorOff:
    """A tick that runs would write its own cursor over ours when it ends."""

    sensor: EventsSensor
    name = "sensor is off"

    def rule(self, case: Case) -> Ruling:
        return Ruling(
            self.name, (why := _busy(self.sensor, self.sensor.kept())) is None, why or "it is, and no tick runs"
        )


def _busy(sensor: EventsSensor, kept: Kept) -> str | None:
    if kept.on:
        return f"the sensor {sensor.name} is on: switch it off on its page in the web UI, and on again afterwards"
    return f"a tick of {sensor.name} still runs: wait for its end" if kept.ticking else None


class ResetCursor:
    """Has a topic forgotten (`offsets` empty: it begins as `start` says), or go on at other offsets, in one sensor's cursor."""

    name = ACTION

    def __init__(
        self, sensor: EventsSensor, topic: str, offsets: Mapping[int, int], clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._sensor, self._topic, self._offsets, self._clock = sensor, topic, offsets, clock

    @property
    def target_id(self) -> str:
        return self._sensor.source.kafka

    def plan(self) -> Plan:
        """Raises what keeps Dagster or the brokers from being asked, and UsageError for offsets that are not there."""
        before = self._sensor.kept().cursor
        with open_reader(self._sensor.access, self._sensor.source) as reader:
            topic, marks = reader.look(self._topic)
        if away := sorted(set(topic.partitions) - set(marks)):
            raise UnreachableError(
                f"partitions {', '.join(map(str, away))} of {self._topic} cannot be looked at",
                where=self.target_id,
                remedy="look whether its brokers run",
            )
        after = self._after(before, topic, marks)
        made = Change("cursor", self._object, before.entry(self._topic), after.entry(self._topic), reversible=True)
        facts = {
            "topic_id": topic.id,
            "start": self._sensor.source.start,
            "partitions": self._words(before, after, marks),
        }
        changes = (made,) if made.before != made.after else ()
        return Plan(self.name, self.target_id, changes, self._clock.now(), {}, facts)

    @property
    def _object(self) -> str:
        return f"{self._topic} in the cursor of the sensor {self._sensor.name}"

    def _after(self, before: Cursor, topic: Topic, marks: Mapping[int, Watermarks]) -> Cursor:
        if not self._offsets:
            return before.without(self._topic)
        for part, at in sorted(self._offsets.items()):
            if part not in marks:
                raise UsageError(f"{self._topic} has no partition {part}", where="--at")
            if not marks[part].low <= at <= marks[part].high:
                raise UsageError(
                    f"{self._topic}/{part} has the offsets {marks[part].low} to {marks[part].high}, and not {at}",
                    where="--at",
                )
        kept = self._still_good(before, topic, marks)
        if left := sorted(set(topic.partitions) - {*kept, *self._offsets}):
            raise UsageError(
                f"what the cursor says of the partitions {', '.join(map(str, left))} does not hold for the topic as it is now",
                where="--at",
                remedy="name an offset for each of them; ops events cursor show says what is there",
            )
        entry = TopicCursor({**kept, **self._offsets}, topic.id)
        return Cursor({**before.topics, self._topic: entry})

    def _still_good(self, before: Cursor, topic: Topic, marks: Mapping[int, Watermarks]) -> dict[int, int]:
        """Offsets that are still those of this topic: of another one of its name none is."""
        known = before.topics.get(self._topic)
        try:
            check_topic(self._topic, before, topic.id, topic.partitions)
        except ConflictError:
            return {}
        return {part: at for part, at in known.next.items() if at <= marks[part].high} if known else {}

    def _words(self, before: Cursor, after: Cursor, marks: Mapping[int, Watermarks]) -> dict[str, str]:
        """What follows for each partition, for people."""
        was, start = before.topics.get(self._topic, TopicCursor({})), self._sensor.source.start
        said: dict[str, str] = {}
        for part, mark in sorted(marks.items()):
            at, _ = begin(self._topic, part, after, mark, start)
            read = f"read up to {was.next[part]}" if part in was.next else "not read"
            said[str(part)] = f"{read}; there are {mark.low} to {mark.high}; goes on at {at}"
        return said

    def check(self, change: Change) -> Applied | None:
        kept = self._sensor.kept()
        if (why := _busy(self._sensor, kept)) is not None:
            return Applied(Outcome.CONTENDED, why)
        now = kept.cursor.entry(self._topic)
        if now == change.after:
            return Applied(Outcome.ALREADY_DONE, "the cursor says so already")
        return None if now == change.before else Applied(Outcome.CONTENDED, "the cursor has moved since it was planned")

    def apply(self, change: Change) -> Applied:
        kept = self._sensor.kept()
        others = kept.cursor.without(self._topic)
        made = {} if change.after is None else Cursor.parse(_document({self._topic: change.after})).topics
        self._sensor.set(kept, Cursor({**others.topics, **made}))
        return Applied(Outcome.APPLIED, "set; switch the sensor on again")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        now = self._sensor.kept().cursor.entry(self._topic)
        checks = tuple(Check("cursor", now == change.after, f"it is {now}") for change in plan.changes)
        return Verification(checks)


def _document(topics: Mapping[str, Any]) -> str:
    import json

    return json.dumps({"v": 1, "topics": topics})


def reset(
    access: Access,
    topic: str,
    offsets: Mapping[int, int],
    *,
    sensor: str | None = None,
    enforce: bool,
    approve: str | None = None,
    actor: str,
    clock: Clock = SYSTEM_CLOCK,
) -> ActionResult:
    """Observes, unless `enforce` comes with the digest of the plan that somebody read. `sensor`: which, where several read the topic."""
    action = ResetCursor(chosen := _reader_of(access, topic, sensor), topic, offsets, clock)
    guards = [
        ModeGuard(Mode.ENFORCE if enforce else Mode.OBSERVE, "the call"),
        SensorOff(chosen),
        Approval(True, "it decides which events are read again or never"),
    ]
    with Ledger(access.platform_db, clock=clock) as ledger:
        return run_action(action, ledger=ledger, guards=guards, approve_digest=approve, actor=actor, clock=clock)


def _reader_of(access: Access, topic: str, sensor: str | None) -> EventsSensor:
    readers = [one for one in sensors(access) if topic in one.source.topics and sensor in (None, one.name)]
    if not readers:
        raise UsageError(
            f"no topic {topic!r} is read" + (f" by {sensor}" if sensor else ""),
            remedy="ops events cursor show lists them",
        )
    if len(readers) > 1:
        names = ", ".join(one.name for one in readers)
        raise UsageError(f"several sensors read {topic}: {names}", remedy="name one with --sensor")
    return readers[0]
