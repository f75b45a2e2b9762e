"""Kafka: whether it is fit to lose a broker, the one that leads the drill's topic broken, and what users had of it.

A broker that hung and goes on answers for some moments as it would have before: that it leads, that every replica is in sync, and
where the topic ended then. What one broker says is therefore not taken for the cluster's word where a drill is judged by it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ops_platform.clients.kafka import Kafka, Said, heard
from ops_platform.counting import count_of
from ops_platform.drills.askers import topic_of
from ops_platform.drills.model import Checked, Confidence, Done, Measured, Resource
from ops_platform.drills.registry import Context, NothingGiven, Remover, does, removes
from ops_platform.drills.steps.basics import moment_of
from ops_platform.drills.steps.injection import After, Break, Server, break_server, breakable, thaw, waited
from ops_platform.drills.steps.probes import start_probe
from ops_platform.drills.steps.writes import Lost, attempted, lost_of
from ops_platform.errors import CouldNotVerifyError, OpsError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.systems import KafkaSystem

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

_GOES_WITHIN = 20.0  # seconds for a topic or a group to be gone; a group's last member may be waited for
_LEFT = 2  # brokers without the one that is lost: as many as must have a record
_NAMED = 5
_END = b"the end"


def _kafka(access: Access, subject_id: str) -> Kafka:
    return access.kafka(access.inventory.system(subject_id, KafkaSystem))


@contextlib.contextmanager
def _admin(kafka: Kafka) -> Generator[tuple[Any, Said]]:
    said = Said()
    admin = kafka.admin(said)
    with kafka.named(said), heard(admin):
        yield admin, said


def _metadata(kafka: Kafka, topic: str | None = None, *, seconds: float | None = None) -> Any:
    """As a broker sees it now. Raises OpsError."""
    with _admin(kafka) as (admin, _):
        return admin.list_topics(topic, timeout=seconds or kafka.timeout)


def _behind(metadata: Any) -> list[str]:
    """Partitions of which a replica is not in sync."""
    return [f"{topic}/{number}" for topic, number, part in _partitions(metadata) if len(part.isrs) < len(part.replicas)]


def _partitions(metadata: Any) -> Iterator[tuple[str, int, Any]]:
    for name, topic in sorted(metadata.topics.items()):
        for number, part in sorted(topic.partitions.items()):
            yield name, number, part


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}" if names else "none"


# Fit


class Fit(Strict):
    """Of `kafka.fit`."""

    fragile: bool = Field(
        default=False, description="Whether topics may be there that take no more writes while a broker is away."
    )


@does("kafka.fit", "check", given=Fit)
def fit(context: Context, given: Fit) -> Done:
    """Every replica is in sync, enough brokers would be left, and every topic would take writes without one of its replicas."""
    kafka = _kafka(context.access, context.subject.id)
    try:
        views = list(kafka.views())
    except OpsError as error:
        title = "Every replica is in sync"
        return Done(error.what, checks=(Checked(title=title, holds=None, query="Metadata", result=error.line),))
    metadata, brokers = views[0], sorted(set.intersection(*(set(view.brokers) for view in views)))
    behind = sorted({name for view in views for name in _behind(view)})
    left = len(brokers) - 1
    checks = (
        Checked(
            title="Every replica is in sync", holds=not behind, query="Metadata",
            result=f"under-replicated partitions: {_some(behind)}",
        ),
        Checked(
            title="Enough brokers are left", holds=left >= _LEFT, query="Metadata",
            result=f"{left} would be left of {len(brokers)}, {_LEFT} are needed",
        ),
        _robust(kafka, metadata, given),
    )  # fmt: skip
    return Done(
        f"{count_of(len(brokers), 'broker')}, {count_of(len(behind), 'partition')} under-replicated",
        {"brokers": brokers},
        checks,
    )


def _robust(kafka: Kafka, metadata: Any, given: Fit) -> Checked:
    holds: bool | None = True
    said = "it is not asked for"
    try:
        if not given.fragile:
            fragile = _fragile(kafka, metadata)
            holds, said = not fragile, f"those that would not: {_some(fragile)}"
    except OpsError as error:
        holds, said = None, error.line
    return Checked(
        title="Every topic takes writes without one replica", holds=holds, query="DescribeConfigs", result=said
    )


def _fragile(kafka: Kafka, metadata: Any) -> list[str]:
    """Topics with a partition that has no more replicas in sync than min.insync.replicas asks for."""
    from confluent_kafka import admin as kinds

    nouns: Any = kinds
    least = {
        name: min(len(p.isrs) for p in topic.partitions.values())
        for name, topic in metadata.topics.items()
        if topic.partitions
    }
    asked = [nouns.ConfigResource(nouns.ResourceType.TOPIC, name) for name in sorted(least)]
    found: list[str] = []
    with _admin(kafka) as (admin, _):
        for resource, answer in (admin.describe_configs(asked) if asked else {}).items():
            wanted = int(answer.result(kafka.timeout)["min.insync.replicas"].value)
            if least[resource.name] - 1 < wanted:
                found.append(resource.name)
    return found


# Probes


class Write(Strict):
    """Of `kafka.write`."""

    timeout_ms: int = Field(
        default=1000, ge=50, le=60_000, description="A record that is not acknowledged by then has failed."
    )
    replicas: int = Field(default=3, ge=2, description="Replicas of the drill's topic.")
    in_sync: int = Field(default=2, ge=1, description="min.insync.replicas of the drill's topic.")


class Read(Strict):
    """Of `kafka.read`."""

    timeout_ms: int = Field(default=1000, ge=50, le=60_000, description="When no record comes by then it has failed.")


@does("kafka.write", "probe", given=Write, changes=lambda _given: "a topic ops-drill-…, which goes at the end")
def write(context: Context, given: Write) -> Done:
    """A writer: numbered records with acks=all to a topic of the drill, of one partition. A number is acknowledged when its delivery was reported."""
    from confluent_kafka import admin as kinds

    nouns: Any = kinds
    kafka, topic = _kafka(context.access, context.subject.id), topic_of(context.held)
    context.register("topic", topic, subject=context.subject.id)
    if topic not in _metadata(kafka).topics:
        config = {"min.insync.replicas": str(given.in_sync)}
        with _admin(kafka) as (admin, _):
            wanted = nouns.NewTopic(topic, 1, given.replicas, config=config)
            admin.create_topics([wanted])[topic].result(kafka.timeout)

    def complete() -> bool:
        found = _metadata(kafka).topics.get(topic)
        return found is not None and any(len(p.isrs) == given.replicas for p in found.partitions.values())

    context.wait(complete, every=0.2)
    return start_probe(context)


@does("kafka.read", "probe", given=Read, changes=lambda _given: "a consumer group ops-drill-…, which goes at the end")
def read(context: Context, given: Read) -> Done:
    """A consumer group that reads what the writer writes: an attempt is good when a record comes."""
    context.register("consumer group", topic_of(context.held), subject=context.subject.id)
    return start_probe(context)


def _delete_topic(access: Access, resource: Resource) -> None:
    kafka = _kafka(access, str(resource.detail["subject"]))
    if resource.name not in _metadata(kafka).topics:
        return
    with _admin(kafka) as (admin, _):
        admin.delete_topics([resource.name])[resource.name].result(kafka.timeout)
    until = time.monotonic() + _GOES_WITHIN
    while resource.name in _metadata(kafka).topics and time.monotonic() < until:
        time.sleep(0.2)


def _topic_left(access: Access, resource: Resource) -> str | None:
    there = resource.name in _metadata(_kafka(access, str(resource.detail["subject"]))).topics
    return "it exists" if there else None


def _delete_group(access: Access, resource: Resource) -> None:
    kafka = _kafka(access, str(resource.detail["subject"]))
    until = time.monotonic() + _GOES_WITHIN
    while resource.name in _groups(kafka):
        try:
            with _admin(kafka) as (admin, _):
                admin.delete_consumer_groups([resource.name])[resource.name].result(kafka.timeout)
        except OpsError:  # a member that did not say good-bye is waited for
            if time.monotonic() > until:
                raise
            time.sleep(0.3)


def _groups(kafka: Kafka) -> set[str]:
    with _admin(kafka) as (admin, _):
        listed = admin.list_consumer_groups().result(kafka.timeout + 1)
    if listed.errors:
        raise CouldNotVerifyError("a broker did not say which groups it has", where=kafka.where)
    return {group.group_id for group in listed.valid}


def _group_left(access: Access, resource: Resource) -> str | None:
    return "it exists" if resource.name in _groups(_kafka(access, str(resource.detail["subject"]))) else None


removes("topic", Remover(_delete_topic, _topic_left, local=False))
removes("consumer group", Remover(_delete_group, _group_left, local=False))


# Breaking a broker, and what comes after


@does("kafka.breakable", "check")
def brokers_breakable(context: Context, given: NothingGiven) -> Done:
    """Every broker runs on this machine: which one is going to lead the drill's topic is not known before."""

    def which() -> list[Server]:
        brokers = sorted(_metadata(_kafka(context.access, context.subject.id)).brokers.items())
        return [_broker(number, broker) for number, broker in brokers]

    return breakable("A broker can be broken from here", which)


def _broker(number: int, broker: Any, topic: str = "") -> Server:
    return Server(f"broker {number}", broker.host, broker.port, {"broker": number, "topic": topic})


@does("kafka.break_broker", "inject", given=Break, changes=lambda given: f"a broker breaks: {given.how}")
def break_broker(context: Context, given: Break) -> Done:
    """The broker that leads the drill's topic is killed or frozen, on this machine. Whoever supervises it has to start it again."""

    def which() -> Server:
        kafka, topic = _kafka(context.access, context.subject.id), topic_of(context.held)
        metadata = _metadata(kafka)
        leader = metadata.topics[topic].partitions[0].leader
        if leader not in metadata.brokers:
            raise CouldNotVerifyError("nobody leads the drill's topic, so there is no broker to break", where=topic)
        return _broker(leader, metadata.brokers[leader], topic)

    return break_server(context, given.how, which)


@does("kafka.new_leader", "wait_until", given=After)
def new_leader(context: Context, given: After) -> Done:
    """Until another broker leads the drill's topic. When the old one was missed, and when the other one led."""
    kafka, topic = _kafka(context.access, context.subject.id), context.fact(given.injected, "topic")
    old, seen = context.fact(given.injected, "broker"), dict[str, Any]()

    def led() -> tuple[bool, str]:
        try:
            metadata = _metadata(kafka, topic, seconds=2.0)
        except OpsError as error:
            return False, error.line
        now, leader = context.clock.now().isoformat(), metadata.topics[topic].partitions[0].leader
        if old not in metadata.brokers or leader != old:
            seen.setdefault("missed_at", now)
        if leader in (old, -1):
            return False, f"broker {leader} leads"
        seen.update(promoted_at=now, member=leader)
        return True, ""

    waited(context, led, every=0.05)
    return Done(f"broker {seen['member']} leads in place of {old}", seen)


@does("kafka.lost_records", "check", given=Lost)
def lost_records(context: Context, given: Lost) -> Done:
    """Every number that was acknowledged stands in the topic, read from its beginning to a record that is written for this, with acks=all."""
    kafka, topic = _kafka(context.access, context.subject.id), context.fact(given.injected, "topic")
    tried = attempted(context, given)
    return lost_of(tried, _numbers(kafka, topic), given, f"{topic}, from its beginning to its end")


def _numbers(kafka: Kafka, topic: str) -> list[int]:
    """All that stand before a record that is written now. Raises CouldNotVerifyError where that one is not reached."""
    from confluent_kafka import OFFSET_BEGINNING, TopicPartition

    said, found, end = Said(), list[int](), _end(kafka, topic)
    until, following = time.monotonic() + 2 * kafka.timeout, 0
    consumer = kafka.consumer(said, group_id=topic, enable_auto_commit=False, auto_offset_reset="error")
    with contextlib.closing(consumer), kafka.named(said, topic):
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        while following < end:
            message: Any = consumer.poll(0.5)
            if message is not None and message.error() is None:
                following = message.offset() + 1
                # An attempt that was interrupted has left such a record, too.
                found += [int(message.value())] if message.value() != _END else []
            elif time.monotonic() > until:
                raise CouldNotVerifyError(f"the topic was read to {following} of {end}", where=topic)
    return found


def _end(kafka: Kafka, topic: str) -> int:
    """The offset of a record written now with acks=all: whoever only thinks that it leads gets no other replica to take one."""
    said, told = Said(), list[tuple[Any, Any]]()

    def note(error: object, message: object) -> None:
        told.append((error, message))

    producer = kafka.producer(said, message_timeout_ms=round(kafka.timeout * 1000))
    with kafka.named(said, topic):
        producer.produce(topic, _END, partition=0, on_delivery=note)
        producer.flush(kafka.timeout + 1)
    error, message = told[0] if told else (None, None)
    if error is not None or message is None:
        producer.purge()
        raise kafka.error(error, said, topic)
    return message.offset()


@does("kafka.replicated", "wait_until", given=After)
def replicated(context: Context, given: After) -> Done:
    """Until the broker is back, whoever supervises it having started it again, and no partition is under-replicated; how long that took."""
    thaw(context)
    kafka, at = _kafka(context.access, context.subject.id), moment_of(context.fact(given.injected, "at"))
    broker = context.fact(given.injected, "broker")
    said = waited(context, lambda: _all_there(kafka, broker))
    seconds = (context.clock.now() - at).total_seconds()
    how = "from the injection until no partition was under-replicated, asked every 200 ms"
    found = Measured(name="replicated", value=round(seconds, 3), how=how, confidence=Confidence.BOUND)
    return Done(said, measured=(found,))


@does("kafka.whole", "teardown", given=NothingGiven)
def whole(context: Context, given: NothingGiven) -> Done:
    """Until the broker is back, and no partition is under-replicated."""
    thaw(context)
    noted = [r.detail["broker"] for r in context.store.resources(context.held.id) if "broker" in r.detail]
    kafka = _kafka(context.access, context.subject.id)
    return Done(waited(context, lambda: _all_there(kafka, noted[-1] if noted else None)))


def _all_there(kafka: Kafka, broker: int | None) -> tuple[bool, str]:
    """By the word of every broker, and that of the first who does not see it so."""
    said = ""
    try:
        for view in kafka.views():
            behind = _behind(view)
            back = broker is None or broker in view.brokers
            said = f"brokers {', '.join(map(str, sorted(view.brokers)))}; under-replicated partitions: {_some(behind)}"
            if behind or not back:
                return False, said
    except OpsError as error:
        return False, error.line
    return True, said
