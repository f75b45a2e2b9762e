"""Playbooks for Kafka: lead from the preferred replicas again, make room for a time, get a group past a record that it cannot read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.kafka import Kafka, Record, Said
from ops_platform.clock import wait_until
from ops_platform.errors import AccessDeniedError, NotThereError, RefusedError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.systems import KafkaSystem
from ops_platform.inventory.values import PositiveDuration, Size
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Done, Playbook

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message
    from confluent_kafka.admin import AdminClient

T = TypeVar("T")
PARTITION, SETTING, RECORD = "partition", "topic setting", "record"
_SETTLES = 15.0  # seconds until every broker has heard of a change
_MOVED = {Outcome.APPLIED, Outcome.ALREADY_DONE}


def _whole(value: Any) -> Any:
    """Labels bring numbers as texts."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]


@dataclass(frozen=True)
class _Partition:
    """By the ids of brokers. The first of `replicas` is the preferred leader; `leader` None: there is none."""

    topic: str
    number: int
    leader: int | None
    replicas: tuple[int, ...]
    in_sync: frozenset[int]

    @property
    def name(self) -> str:
        return f"{self.topic}/{self.number}"

    @property
    def preferred(self) -> int:
        return self.replicas[0]

    @property
    def may_be_led_better(self) -> bool:
        return self.leader is not None and self.leader != self.preferred and self.preferred in self.in_sync


class _Desk:
    """Calls to one cluster, each with a client that has learnt nothing before. A refusal names the ACL that is missing."""

    def __init__(self, context: Context[Any]) -> None:
        self.kafka: Kafka = context.access.kafka(context.access.inventory.system(context.subject.id, KafkaSystem))
        self.seconds = self.kafka.timeout

    def ask(self, right: str, thing: str, ask: Callable[[AdminClient], T]) -> T:
        said = Said()
        with self.allowed(right, thing), self.kafka.named(said, thing):
            admin = self.kafka.admin(said)
            try:
                return ask(admin)
            finally:
                admin.poll(0)  # what librdkafka has to say, such as that the login is refused

    @contextlib.contextmanager
    def allowed(self, right: str, thing: str) -> Generator[None]:
        try:
            yield
        except AccessDeniedError as error:
            if "uthorization" not in error.what:  # then it is the login that is refused
                raise
            raise AccessDeniedError(
                error.what, where=error.where, remedy=f"allow our user {right} on {thing}"
            ) from None

    def names(self) -> list[str]:
        """Every topic that we may see. Kafka hides the others without a word."""
        found = self.ask("Describe", "topics", lambda admin: admin.list_topics(timeout=self.seconds))
        if not found.topics:
            raise AccessDeniedError(
                "no topic is to be seen", where=self.kafka.where, remedy="allow our user Describe on the topics"
            )
        return sorted(found.topics)

    def partitions(self, names: Sequence[str]) -> list[_Partition]:
        """Raises NotThereError, AccessDeniedError for any one of them. Asking makes no topic."""
        from confluent_kafka import TopicCollection

        def ask(admin: AdminClient) -> list[_Partition]:
            asked = admin.describe_topics(TopicCollection(list(names)), request_timeout=self.seconds)
            return [
                _Partition(
                    name, part.id, part.leader.id if part.leader is not None and part.leader.id >= 0 else None,
                    tuple(node.id for node in part.replicas), frozenset(node.id for node in part.isr),
                )
                for name, answer in asked.items()
                for part in answer.result(self.seconds + 1).partitions
            ]  # fmt: skip

        thing = f"topic {names[0]}" if len(names) == 1 else "the topics"
        return sorted(self.ask("Describe", thing, ask), key=lambda one: (one.topic, one.number))

    def settings(self, topic: str) -> dict[str, Any]:
        """The topic's configuration: entries of librdkafka by name."""
        from confluent_kafka.admin import ConfigResource, ResourceType  # pyright: ignore[reportPrivateImportUsage]

        resource = ConfigResource(ResourceType.TOPIC, topic)

        def ask(admin: AdminClient) -> dict[str, Any]:
            return admin.describe_configs([resource], request_timeout=self.seconds)[resource].result(self.seconds + 1)

        return self.ask("DescribeConfigs", f"topic {topic}", ask)

    def committed(self, group: str, topic: str, numbers: Sequence[int], right: str = "Read") -> dict[int, int | None]:
        """Offsets that the group has committed, by partition; None where it has none.

        Asked by a consumer, which never joins: the admin client's own call ends the process when the coordinator moves
        (librdkafka issue 5040).
        """
        from confluent_kafka import KafkaException, TopicPartition

        said, thing = Said(), f"group {group} and topic {topic}"
        consumer = self.kafka.consumer(said, group_id=group, enable_auto_commit=False)
        try:
            with self.allowed(right, thing), self.kafka.named(said, thing):
                where = [TopicPartition(topic, number) for number in numbers]
                try:
                    found = consumer.committed(where, timeout=self.seconds)
                except KafkaException:
                    _listen(consumer, said)
                    raise
                for one in found:
                    if one.error is not None:
                        raise KafkaException(one.error)
                return {one.partition: one.offset if one.offset >= 0 else None for one in found}
        finally:
            consumer.close()

    @contextlib.contextmanager
    def reader(self, topic: str, group: str) -> Generator[tuple[Consumer, Said]]:
        """It is told where to read and never joins the group, nor commits anything."""
        said = Said()
        consumer = self.kafka.consumer(
            said, group_id=group, enable_auto_commit=False, isolation_level="read_committed", auto_offset_reset="error",
            enable_partition_eof=True,
        )  # fmt: skip
        try:
            with self.allowed("Read", f"topic {topic}"), self.kafka.named(said, topic):
                yield consumer, said
        finally:
            consumer.close()


def _listen(consumer: Consumer, said: Said) -> None:
    """Why a call was not answered: a group that we may not see shows among its messages, and to the call as a time-out."""
    while (message := consumer.poll(0)) is not None:
        if (error := message.error()) is not None:
            said(error)


# Preferred leaders


class PreferredLeaders(Strict):
    topics: list[str] = Field(default=[], description="In these topics alone; empty: in all that our user may see.")


@dataclass
class ElectPreferred:
    """`actions.Action`: an election for each partition that is not led by its preferred replica, although that is in sync."""

    context: Context[PreferredLeaders]
    name = "kafka.elect_preferred_leaders"

    def __post_init__(self) -> None:
        self._desk = _Desk(self.context)

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def partitions(self) -> list[_Partition]:
        return self._desk.partitions(self.context.parameters.topics or self._desk.names())

    def plan(self) -> Plan:
        partitions = self.partitions()
        changes = [
            Change(PARTITION, one.name, {"leader": one.leader}, {"leader": one.preferred}, reversible=False)
            for one in partitions
            if one.may_be_led_better
        ]
        facts = {
            "without_leader": [one.name for one in partitions if one.leader is None],
            "preferred_not_in_sync": [one.name for one in partitions if one.preferred not in one.in_sync],
        }
        population = {PARTITION: len(partitions)}
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now(), population, facts)

    def check(self, change: Change) -> Applied | None:
        now = self._look(change)
        if now.leader == change.after["leader"]:
            return Applied(Outcome.ALREADY_DONE, "it leads by now")
        if now.preferred != change.after["leader"] or now.leader != change.before["leader"]:
            return Applied(Outcome.CONTENDED, f"led by {now.leader} and with {now.preferred} preferred by now")
        if not now.may_be_led_better:
            return Applied(Outcome.REFUSED, f"the preferred replica {now.preferred} is not in sync any more")
        return None

    def apply(self, change: Change) -> Applied:
        from confluent_kafka import ElectionType, TopicPartition

        topic, _, number = change.object.rpartition("/")
        where = TopicPartition(topic, int(number))

        def ask(admin: AdminClient) -> dict[Any, Any]:
            # Without request_timeout, at which the binding (2.16) fails; it is socket.timeout.ms then, which is the same.
            return admin.elect_leaders(ElectionType.PREFERRED, [where]).result(self._desk.seconds + 1)

        for error in self._desk.ask("Alter", "the cluster", ask).values():
            if error is None:
                continue
            name = error.args[0].name()
            if name == "ELECTION_NOT_NEEDED":
                return Applied(Outcome.ALREADY_DONE, "it leads by now")
            if name in ("PREFERRED_LEADER_NOT_AVAILABLE", "ELIGIBLE_LEADERS_NOT_AVAILABLE"):
                return Applied(Outcome.REFUSED, "the preferred replica cannot lead now")
            raise self._desk.kafka.error(error.args[0], Said(), change.object)
        return Applied(Outcome.APPLIED, f"led by {change.after['leader']}")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By the metadata that every client goes by."""
        moved = [change for change in plan.changes if outcomes[change.object].outcome in _MOVED]
        if not moved:
            return Verification((Check("leaders", True, "none was elected"),))
        wrong: list[str] = []

        def good() -> bool:
            leaders = {one.name: one.leader for one in self._desk.partitions(sorted({_topic_of(one) for one in moved}))}
            wrong[:] = [one.object for one in moved if leaders.get(one.object) != one.after["leader"]]
            return not wrong

        wait_until(good, clock=self.context.clock, seconds=_SETTLES)
        said = (
            f"{len(moved)} partitions are led by their preferred replica"
            if not wrong
            else f"not led so: {', '.join(wrong)}"
        )
        return Verification((Check("leaders", not wrong, said),))

    def _look(self, change: Change) -> _Partition:
        topic = _topic_of(change)
        for one in self._desk.partitions([topic]):
            if one.name == change.object:
                return one
        raise NotThereError("there is no such partition any more", where=change.object)


def _topic_of(change: Change) -> str:
    return change.object.rpartition("/")[0]


class ElectPreferredLeaders(Playbook[PreferredLeaders]):
    name = "kafka.elect_preferred_leaders"
    title = "Elect the preferred leaders"
    kinds = frozenset({"kafka"})
    what = (
        "Has partitions led by their preferred replica again, as after a broker's restart, so that brokers carry the load that they were "
        "meant to. Only where that replica is in sync."
    )
    why_safe = "Only a replica that has every record becomes the leader; clients follow it by themselves."
    blast_radius = "Writes and reads of each partition pause for some milliseconds while its leader changes."
    rights = ("Describe on the topics", "Alter on the cluster")
    Parameters = PreferredLeaders

    def action(self, context: Context[PreferredLeaders]) -> Action:
        return ElectPreferred(context)

    def peers(self, context: Context[PreferredLeaders]) -> Peers | None:
        """Of the partition that has the fewest: in-sync replicas besides its leader."""
        moving = [one for one in ElectPreferred(context).partitions() if one.may_be_led_better]
        if not moving:
            return None
        least = min(moving, key=lambda one: len(one.in_sync))
        return Peers(len(least.in_sync) - 1, len(least.replicas) - 1, "in-sync replicas besides the leader")

    def min_healthy(self, context: Context[PreferredLeaders]) -> int:
        return 1


# Retention


class Retention(Strict):
    topic: str = Field(description="The topic.")
    to: PositiveDuration | None = Field(default=None, description="retention.ms while it is cut.")
    to_bytes: Size | None = Field(default=None, description="retention.bytes, of each partition, while it is cut.")
    minimum: PositiveDuration = Field(default=timedelta(hours=1), description="`to` is never shorter.")
    minimum_bytes: Size = Field(default=1 << 30, description="`to_bytes` is never smaller.")
    hold: PositiveDuration = Field(default=timedelta(hours=4), description="After this time it is as it was.")
    readers: list[str] = Field(
        default=[], description="Consumer groups that must have read whatever `to` cuts off; else nothing is done."
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.to is None and self.to_bytes is None:
            raise ValueError("give to, to_bytes or both")
        if self.to is not None and self.to < self.minimum:
            raise ValueError("to is shorter than minimum")
        if self.to_bytes is not None and self.to_bytes < self.minimum_bytes:
            raise ValueError("to_bytes is smaller than minimum_bytes")
        if self.readers and self.to_bytes is not None:
            raise ValueError("which records to_bytes cuts off is not known before: readers goes with `to` alone")
        return self


class _Settings:
    """Settings of one topic that are set or taken back. In a change `own` says whether the topic itself has a value."""

    name = "kafka.cut_retention"

    def __init__(self, context: Context[Retention]) -> None:
        self.context = context
        self.desk = _Desk(context)
        self.topic = context.parameters.topic

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def check(self, change: Change) -> Applied | None:
        now = self.now(change)
        if _same(now, change.after):
            return Applied(Outcome.ALREADY_DONE, "it is so by now")
        if not _same(now, change.before):
            return Applied(Outcome.CONTENDED, f"somebody set it to {now['value']} meanwhile")
        return None

    def apply(self, change: Change) -> Applied:
        from confluent_kafka.admin import (  # pyright: ignore[reportPrivateImportUsage]
            AlterConfigOpType,  # pyright: ignore[reportPrivateImportUsage]
            ConfigEntry,  # pyright: ignore[reportPrivateImportUsage]
            ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
            ResourceType,  # pyright: ignore[reportPrivateImportUsage]
        )

        own = change.after["own"]
        entry = ConfigEntry(
            change.object.rpartition(" ")[2],
            change.after["value"] if own else None,  # pyright: ignore[reportArgumentType] - nothing is deleted to
            incremental_operation=AlterConfigOpType.SET if own else AlterConfigOpType.DELETE,
        )
        resource = ConfigResource(ResourceType.TOPIC, self.topic, incremental_configs=[entry])

        def ask(admin: AdminClient) -> None:
            seconds = self.desk.seconds
            admin.incremental_alter_configs([resource], request_timeout=seconds)[resource].result(seconds + 1)

        self.desk.ask("AlterConfigs", f"topic {self.topic}", ask)
        return Applied(
            Outcome.APPLIED, f"set to {change.after['value']}" if own else "taken back: the brokers' default counts"
        )

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """Asked anew, of whichever broker answers."""
        checks: list[Check] = []
        for change in plan.changes:
            if outcomes[change.object].outcome in _MOVED:
                good = wait_until(
                    lambda change=change: _same(self.now(change), change.after),
                    clock=self.context.clock,
                    seconds=_SETTLES,
                )
                checks.append(Check(change.object, good, f"it is {self.now(change)['value']}"))
        return Verification(tuple(checks) or (Check("settings", True, "none was changed"),))

    def now(self, change: Change) -> dict[str, Any]:
        return _stands(self.desk.settings(self.topic)[change.object.rpartition(" ")[2]])


def _stands(entry: Any) -> dict[str, Any]:
    from confluent_kafka.admin import ConfigSource  # pyright: ignore[reportPrivateImportUsage]

    return {"value": entry.value, "own": entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """What the default is where the topic has no value of its own does not matter."""
    return one["own"] == other["own"] and (not one["own"] or one["value"] == other["value"])


class CutRetention(_Settings):
    """`actions.Action`: a topic keeps its records for a shorter time."""

    def plan(self) -> Plan:
        settings, given = self.desk.settings(self.topic), self.context.parameters
        self._need_deleting(settings)
        wanted: list[tuple[str, int]] = []
        if given.to is not None:
            wanted.append(("retention.ms", int(given.to.total_seconds() * 1000)))
        if given.to_bytes is not None:
            wanted.append(("retention.bytes", given.to_bytes))
        changes: list[Change] = []
        for key, to in wanted:
            before = _stands(settings[key])
            if int(before["value"]) < 0 or int(before["value"]) > to:  # -1: without end
                after = {"value": str(to), "own": True}
                changes.append(Change(SETTING, f"{self.topic} {key}", before, after, reversible=True))
        if changes:
            self._need_read()
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now())

    def check(self, change: Change) -> Applied | None:
        if (found := super().check(change)) is not None:
            return found
        self._need_deleting(self.desk.settings(self.topic))
        self._need_read()
        return None

    def _need_deleting(self, settings: Mapping[str, Any]) -> None:
        policy = settings["cleanup.policy"].value
        if policy != "delete" or self.topic.startswith("__"):
            raise RefusedError(
                f"it is not a topic whose records only expire (cleanup.policy {policy})", where=self.topic,
                remedy="make room in another way: what a compacted topic holds is its data",
            )  # fmt: skip

    def _need_read(self) -> None:
        """Raises RefusedError where a reader would lose what it has not read."""
        readers, to = self.context.parameters.readers, self.context.parameters.to
        if not readers or to is None:
            return
        kept = self._kept(self.context.clock.now() - to)
        for group in readers:
            committed = self.desk.committed(group, self.topic, sorted(kept), "Describe")
            for number, (first, keep) in kept.items():
                at = committed.get(number)
                if max(first, at if at is not None else first) < keep:
                    raise RefusedError(
                        f"the group {group} has read up to {at}, and everything below {keep} would go",
                        where=f"{self.topic}/{number}", remedy="let it catch up, or choose a longer `to`",
                    )  # fmt: skip

    def _kept(self, since: datetime) -> dict[int, tuple[int, int]]:
        """By partition: the first offset that is there, and the first that is younger than `since` (else the next one)."""
        from confluent_kafka import TopicPartition
        from confluent_kafka.admin import OffsetSpec  # pyright: ignore[reportPrivateImportUsage]

        where = [TopicPartition(self.topic, one.number) for one in self.desk.partitions([self.topic])]

        def offsets(spec: Any) -> dict[int, int]:
            wanted: dict[TopicPartition, Any] = dict.fromkeys(where, spec)

            def ask(admin: AdminClient) -> dict[int, int]:
                asked = admin.list_offsets(wanted, request_timeout=self.desk.seconds)
                return {place.partition: answer.result(self.desk.seconds + 1).offset for place, answer in asked.items()}

            return self.desk.ask("Describe", f"topic {self.topic}", ask)

        first, end = offsets(OffsetSpec.earliest()), offsets(OffsetSpec.latest())
        young = offsets(OffsetSpec.for_timestamp(int(since.timestamp() * 1000)))
        return {number: (first[number], young[number] if young[number] >= 0 else end[number]) for number in first}


class RestoreRetention(_Settings):
    """`actions.Action`: exactly what stood there before. What somebody set meanwhile stays, and the undo is then not complete."""

    name = "kafka.cut_retention.undo"

    def __init__(self, context: Context[Retention], done: Sequence[Done]) -> None:
        super().__init__(context)
        self._done = done

    def plan(self) -> Plan:
        changes = [
            Change(SETTING, one.change.object, one.change.after, one.change.before, reversible=True)
            for one in self._done
            if not _same(self.now(one.change), one.change.before)
        ]
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now())


class CutRetentionPlaybook(Playbook[Retention]):
    name = "kafka.cut_retention"
    title = "Cut a topic's retention for a time"
    kinds = frozenset({"kafka"})
    what = (
        "On a disk that fills up: has a topic keep its records for a shorter time or in fewer bytes, within the rule's bounds, and sets "
        "back exactly what stood there when the time is over."
    )
    why_safe = (
        "Never a compacted topic, never below the rule's minimum, and nothing that the named readers have not read yet."
    )
    blast_radius = "Records older than the new retention are deleted for good within minutes; setting it back does not bring them back."
    rights = (
        "AlterConfigs on the topic (which brings DescribeConfigs)",
        "with `readers` also Describe on the topic and on those groups",
    )
    undo_text = "Sets the old value, or takes the topic's own value back where it had none; by itself after `hold`."
    Parameters = Retention

    def action(self, context: Context[Retention]) -> Action:
        return CutRetention(context)

    def undo(self, context: Context[Retention], done: Sequence[Done]) -> Action | None:
        return RestoreRetention(context, done)

    def undo_after(self, context: Context[Retention]) -> timedelta | None:
        return context.parameters.hold


# A poison record


class Poisoned(Strict):
    group: str = Field(description="The consumer group that is stuck.")
    topic: str = Field(description="The topic.")
    partition: Whole = Field(description="The partition.")
    offset: Whole | None = Field(
        default=None,
        description="Of the record; where the group stands elsewhere, nothing is done. None: where it stands.",
    )
    dead_letter: str = Field(description="The topic that the record is written to; it must exist.")


class _Offsets:
    """What moving a group's offset and moving it back have in common."""

    name = "kafka.skip_poison_record"

    def __init__(self, context: Context[Poisoned]) -> None:
        self.context = context
        self.desk = _Desk(context)
        given = context.parameters
        self.group, self.topic, self.number = given.group, given.topic, given.partition

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    @property
    def object(self) -> str:
        return f"{self.group} {self.topic}/{self.number}"

    def committed(self) -> int | None:
        return self.desk.committed(self.group, self.topic, [self.number]).get(self.number)

    def need_nobody(self) -> None:
        """While a consumer of the group lives its next commit would overwrite ours, and Kafka refuses it, too."""
        from confluent_kafka import ConsumerGroupState

        def ask(admin: AdminClient) -> Any:
            seconds = self.desk.seconds
            return admin.describe_consumer_groups([self.group], request_timeout=seconds)[self.group].result(seconds + 1)

        found = self.desk.ask("Describe", f"group {self.group}", ask)
        if found.state is not ConsumerGroupState.EMPTY:
            raise RefusedError(
                f"the group is {found.state.name.lower()} with {len(found.members)} consumers", where=self.group,
                remedy="stop its consumers; they read on from behind the record when they are started",
            )  # fmt: skip

    def check(self, change: Change) -> Applied | None:
        now = self.committed()
        if now == change.after["committed"]:
            return Applied(Outcome.ALREADY_DONE, "it stands there by now")
        if now != change.before["committed"]:
            return Applied(Outcome.CONTENDED, f"the group stands at {now} by now")
        self.need_nobody()
        return None

    def move(self, to: int) -> Applied:
        from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition

        where = [ConsumerGroupTopicPartitions(self.group, [TopicPartition(self.topic, self.number, to)])]

        def ask(admin: AdminClient) -> str:
            asked = admin.alter_consumer_group_offsets(where, request_timeout=self.desk.seconds)
            try:
                (one,) = asked[self.group].result(self.desk.seconds + 1).topic_partitions
                error = one.error
            except KafkaException as raised:
                error = raised.args[0]
            if error is not None and error.name() not in _JOINED:
                raise KafkaException(error)
            return error.name() if error is not None else ""

        if refused := self.desk.ask("Read", f"group {self.group} and topic {self.topic}", ask):
            return Applied(Outcome.CONTENDED, f"a consumer joined the group at this very moment ({refused})")
        return Applied(Outcome.APPLIED, f"the group goes on at {to}")

    def stands(self, change: Change) -> Check:
        """A consumer may have gone on from there."""
        now, to = self.committed(), change.after["committed"]
        return Check("offset", now is not None and now >= to, f"the group stands at {now}, and {to} was meant")


_JOINED = {
    "UNKNOWN_MEMBER_ID",
    "REBALANCE_IN_PROGRESS",
    "NON_EMPTY_GROUP",
    "GROUP_SUBSCRIBED_TO_TOPIC",
    "ILLEGAL_GENERATION",
}


class SkipRecord(_Offsets):
    """`actions.Action`: one record goes to the dead letters, confirmed there, and then the group past it.

    Whoever was killed in between has written the dead letter: it is looked for before it is written again.
    """

    def plan(self) -> Plan:
        now, wanted = self.committed(), self.context.parameters.offset
        if now is None:
            raise RefusedError("the group has committed nothing there", where=self.object)
        if wanted is not None and now > wanted:
            return Plan(self.name, self.target_id, (), self.context.clock.now())
        self._need_letters()
        message, end = self._read(now)
        if message is None:
            return Plan(self.name, self.target_id, (), self.context.clock.now(), facts={"lag": end - now})
        offset = message.offset() or 0
        if wanted is not None and offset != wanted:
            raise RefusedError(
                f"the group stands before the record {offset} and not before {wanted}", where=self.object,
                remedy="wait until it gets there, or correct the offset",
            )  # fmt: skip
        self.need_nobody()
        detail = {
            "offset": offset, "bytes": len(message.value() or b""), "at": _stamp(message),
            "dead_letter": self.context.parameters.dead_letter,
        }  # fmt: skip
        change = Change(
            RECORD, self.object, {"committed": now}, {"committed": offset + 1}, reversible=True, detail=detail
        )
        return Plan(self.name, self.target_id, (change,), self.context.clock.now(), facts={"lag": end - now})

    def apply(self, change: Change) -> Applied:
        offset = change.detail["offset"]
        message, _ = self._read(offset)
        if message is None or message.offset() != offset:
            return Applied(Outcome.MISSING, "the record is not there any more")
        if not self._letter_stands(offset):
            self._write(message)
        return self.move(change.after["committed"])

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By the offset that the group's coordinator tells, and by reading the dead letter."""
        checks: list[Check] = []
        for change in plan.changes:
            if outcomes[change.object].outcome in _MOVED:
                checks.append(self.stands(change))
            if outcomes[change.object].outcome is Outcome.APPLIED:
                there = self._letter_stands(change.detail["offset"])
                said = "it was read" if there else "it is not there"
                checks.append(Check("dead letter", there, f"{said} in {self.context.parameters.dead_letter}"))
        return Verification(tuple(checks) or (Check("offset", True, "nothing was moved"),))

    # The record

    def _read(self, offset: int) -> tuple[Message | None, int]:
        """The first record at or after an offset as a consumer gets it (None at the end), and the offset that comes next at the end."""
        from confluent_kafka import TopicPartition

        with self.desk.reader(self.topic, self.group) as (consumer, said):
            where = TopicPartition(self.topic, self.number, offset)
            first, end = consumer.get_watermark_offsets(where, timeout=self.desk.seconds, cached=False)
            if offset < first:
                raise RefusedError(
                    f"what stood at {offset} has expired: the first record that is there is {first}", where=self.object,
                    remedy="auto.offset.reset of its consumers decides where they go on",
                )  # fmt: skip
            if offset >= end:
                return None, end
            consumer.assign([where])
            return self._poll(consumer, said), end

    def _poll(self, consumer: Consumer, said: Said) -> Message | None:
        """The next record; None at the end of a partition. Raises where none of both comes in time."""
        message = consumer.poll(self.desk.seconds)
        if message is None:
            raise self.desk.kafka.error(None, said, self.topic)
        error = message.error()
        if error is None:
            return message
        if error.name() == "_PARTITION_EOF":
            return None
        raise self.desk.kafka.error(error, said, self.topic)

    # The dead letter

    def _need_letters(self) -> None:
        name = self.context.parameters.dead_letter
        if name == self.topic:
            raise RefusedError("the dead letters cannot go to the topic itself", where=name)
        self.desk.partitions([name])

    def _origin(self, offset: int) -> dict[str, bytes]:
        """By which a dead letter is known again."""
        said = {"topic": self.topic, "partition": str(self.number), "offset": str(offset), "group": self.group}
        return {f"{_LETTER}{key}": value.encode() for key, value in said.items()}

    def _write(self, message: Message) -> None:
        kafka, name = self.desk.kafka, self.context.parameters.dead_letter
        about = {
            **self._origin(message.offset() or 0),
            f"{_LETTER}timestamp": (_stamp(message) or "").encode(),
            f"{_LETTER}reason": f"skipped for a consumer group that could not get past it, incident {self.context.incident_id}".encode(),
        }
        headers: list[Any] = [*(message.headers() or []), *about.items()]
        said = Said()
        with self.desk.allowed("Write", f"topic {name}"), kafka.named(said, name):
            # Whatever the consumer could read, the producer may send: the topic's own limit decides. An idempotent one would show a
            # missing right as a fatal error; a dead letter that stands twice does no harm.
            producer = kafka.producer(said, message_max_bytes=_LARGEST, enable_idempotence=False)
            (found,) = kafka.deliver(
                producer, [Record(name, message.key(), message.value(), headers)], self.desk.seconds
            )
            if found is not True:
                raise kafka.error(None if isinstance(found, bool) else found, said, name)

    def _letter_stands(self, offset: int) -> bool:
        """Whether a run of this incident has written it. Older letters are not asked for, and none of our own is older."""
        name, origin = self.context.parameters.dead_letter, set(self._origin(offset).items())
        since = int((self.context.signal_at - timedelta(minutes=5)).timestamp() * 1000)
        with self.desk.reader(name, self.group) as (consumer, said):
            open_ = self._since(consumer, name, since)
            consumer.assign(open_)
            left = len(open_)
            while left:
                message = self._poll(consumer, said)
                if message is None:
                    left -= 1
                elif origin <= {(key, value) for key, value in message.headers() or [] if isinstance(value, bytes)}:
                    return True
        return False

    def _since(self, consumer: Consumer, name: str, since: int) -> list[Any]:
        from confluent_kafka import TopicPartition

        where = [TopicPartition(name, one.number, since) for one in self.desk.partitions([name])]
        # -1, the end, where nothing there is younger.
        return consumer.offsets_for_times(where, timeout=self.desk.seconds)


class SkipBack(_Offsets):
    """`actions.Action`: the group stands before the record again. The dead letter stays."""

    name = "kafka.skip_poison_record.undo"

    def __init__(self, context: Context[Poisoned], done: Sequence[Done]) -> None:
        super().__init__(context)
        self._done = done

    def plan(self) -> Plan:
        now = self.committed()
        changes = [
            Change(RECORD, one.change.object, one.change.after, one.change.before, reversible=True)
            for one in self._done
            if one.change.before["committed"] != now
        ]
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now())

    def apply(self, change: Change) -> Applied:
        return self.move(change.after["committed"])

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        moved = [change for change in plan.changes if outcomes[change.object].outcome in _MOVED]
        return Verification(tuple(self.stands(one) for one in moved) or (Check("offset", True, "nothing was moved"),))


_LETTER = "ops-dead-letter-"
_LARGEST = 64 << 20


def _stamp(message: Message) -> str | None:
    kind, at = message.timestamp()
    return datetime.fromtimestamp(at / 1000, UTC).isoformat() if kind else None


class SkipPoisonRecord(Playbook[Poisoned]):
    name = "kafka.skip_poison_record"
    title = "Skip a poison record"
    kinds = frozenset({"kafka"})
    what = (
        "Copies the record at which a consumer group is stuck to the dead-letter topic, with headers that say where it comes from, and "
        "once that is confirmed moves the group past it, by this one record."
    )
    why_safe = "The record is kept twice, in its topic and among the dead letters; only a group without running consumers is moved."
    blast_radius = "The group never processes this record unless somebody replays it from the dead letters."
    rights = ("Read on the topic", "Read on the group", "Read and Write on the dead-letter topic")
    undo_text = "Sets the group's offset back before the record, as long as it has not gone on; the dead letter stays."
    Parameters = Poisoned

    def action(self, context: Context[Poisoned]) -> Action:
        return SkipRecord(context)

    def undo(self, context: Context[Poisoned], done: Sequence[Done]) -> Action | None:
        return SkipBack(context, done)


PLAYBOOKS: tuple[Playbook[Any], ...] = (CutRetentionPlaybook(), ElectPreferredLeaders(), SkipPoisonRecord())
