"""Get a consumer group past a record that it cannot read, which goes to the dead letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.kafka import Record, Said
from ops_platform.errors import RefusedError
from ops_platform.inventory.base import Strict
from ops_platform.remediation.playbook import Context, Done, Playbook
from ops_platform.remediation.playbooks.kafka.shared import MOVED, RECORD, Desk, Whole

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message
    from confluent_kafka.admin import AdminClient


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
        self.desk = Desk(context)
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
            if outcomes[change.object].outcome in MOVED:
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
            first, end = self.desk.kafka.watermarks(consumer, said, self.topic, self.number, seconds=self.desk.seconds)
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
        moved = [change for change in plan.changes if outcomes[change.object].outcome in MOVED]
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
