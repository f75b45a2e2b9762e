"""What the playbooks of Kafka have in common: calls that name the right that is missing, partitions, offsets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from ops_platform.actions import Outcome
from ops_platform.clients.kafka import Kafka, Said
from ops_platform.errors import AccessDeniedError
from ops_platform.inventory.systems import KafkaSystem
from ops_platform.remediation.playbook import Context

if TYPE_CHECKING:
    from confluent_kafka import Consumer
    from confluent_kafka.admin import AdminClient

T = TypeVar("T")
PARTITION, SETTING, RECORD = "partition", "topic setting", "record"
SETTLES = 15.0  # seconds until every broker has heard of a change
MOVED = {Outcome.APPLIED, Outcome.ALREADY_DONE}


def _whole(value: Any) -> Any:
    """Labels bring numbers as texts."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]


@dataclass(frozen=True)
class Partition:
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


class Desk:
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

    def partitions(self, names: Sequence[str]) -> list[Partition]:
        """Raises NotThereError, AccessDeniedError for any one of them. Asking makes no topic."""
        from confluent_kafka import TopicCollection

        def ask(admin: AdminClient) -> list[Partition]:
            asked = admin.describe_topics(TopicCollection(list(names)), request_timeout=self.seconds)
            return [
                Partition(
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
        """Offsets that the group has committed, by partition; None where it has none."""
        from confluent_kafka import TopicPartition

        with self.allowed(right, f"group {group} and topic {topic}"):
            found = self.kafka.committed(
                Said(), group, [TopicPartition(topic, number) for number in numbers], seconds=self.seconds
            )
        return {one.partition: one.offset if one.offset >= 0 else None for one in found}

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
