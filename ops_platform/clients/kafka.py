"""Kafka through librdkafka: how a client of it is configured, and its errors in our words.

Secrets stand in librdkafka's configuration alone; what it logs goes to the logger `ops_platform.kafka` and holds addresses and errors.
A handle (consumer, producer, admin) is made by whoever uses it and closed there; making one opens no connection yet.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, UnreachableError
from ops_platform.inventory.systems import Sasl
from ops_platform.inventory.values import Secret, SecretRef

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
    from confluent_kafka.admin import AdminClient

T = TypeVar("T")
_LOG = logging.getLogger("ops_platform.kafka")
_KEPT = 50


@dataclass(frozen=True)
class Topic:
    """A topic as it is now. `id`: of this topic and no later one of the same name; None where the broker gives none."""

    name: str
    id: str | None
    partitions: tuple[int, ...]
    leaderless: tuple[int, ...] = ()


@dataclass(frozen=True)
class Record:
    """What is to be written; the partition follows from the key."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()


class Said:
    """What librdkafka said while we waited: a refused login shows here, and to the call itself as a mere time-out."""

    def __init__(self) -> None:
        self.errors: list[KafkaError] = []

    def __call__(self, error: KafkaError) -> None:
        self.errors = [*self.errors[1 - _KEPT :], error]

    def clear(self) -> None:
        self.errors = []


class Kafka:
    """One cluster. Safe for threads."""

    def __init__(
        self,
        system_id: str,
        bootstrap: Sequence[tuple[str, int]],
        *,
        tls: bool = True,
        ca: str | None = None,
        sasl: Sasl | None = None,
        resolve: Callable[[SecretRef], Secret] | None = None,
        timeout: float = 15.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.system_id = system_id
        self.timeout = timeout
        self.clock = clock
        self._servers = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in bootstrap)
        self._tls = tls
        self._ca = ca
        self._sasl = sasl
        self._resolve = resolve

    @property
    def where(self) -> str:
        return f"{self.system_id} ({self._servers})"

    def settings(self) -> dict[str, Any]:
        """librdkafka's configuration, with the password: for a constructor, and nowhere else."""
        found: dict[str, Any] = {
            "bootstrap.servers": self._servers,
            "client.id": "ops-platform",
            "security.protocol": ("SASL_" if self._sasl else "") + ("SSL" if self._tls else "PLAINTEXT"),
            "socket.timeout.ms": int(self.timeout * 1000),
            "socket.connection.setup.timeout.ms": max(1000, int(self.timeout * 1000)),
            "reconnect.backoff.max.ms": 1000,
            "logger": _LOG,
        }
        if self._tls:
            found["ssl.endpoint.identification.algorithm"] = "https"
            found["enable.ssl.certificate.verification"] = True
            if self._ca:
                found["ssl.ca.location"] = self._ca
        if self._sasl is not None and self._resolve is not None:
            found["sasl.mechanisms"] = self._sasl.mechanism
            found["sasl.username"] = self._sasl.user
            found["sasl.password"] = self._resolve(self._sasl.password).reveal()
        return found

    # Handles

    def consumer(self, said: Said, **more: Any) -> Consumer:
        """`more`: names with `_` for `.`, such as `group_id`."""
        from confluent_kafka import Consumer

        with self.named(said):
            return Consumer({**self.settings(), "error_cb": said, **_dotted(more)})

    def producer(self, said: Said, **more: Any) -> Producer:
        """Idempotent: each message stands once and in order in its partition, whatever is sent again."""
        from confluent_kafka import Producer

        safe = {"enable.idempotence": True, "acks": "all"}
        with self.named(said):
            return Producer({**self.settings(), **safe, "error_cb": said, **_dotted(more)})

    def admin(self, said: Said, **more: Any) -> AdminClient:
        from confluent_kafka.admin import AdminClient

        with self.named(said):
            settings: dict[str, Any] = {**self.settings(), "error_cb": said, **_dotted(more)}
            return AdminClient(settings)

    def deliver(self, producer: Producer, records: Sequence[Record], seconds: float) -> list[KafkaError | bool]:
        """For each record: True once it stands there for good, the error that refused it, or False where nobody said in time.

        After False or an error the producer is done with: what it still holds is thrown away, and another one is to be made.
        """
        found: list[KafkaError | bool] = [False] * len(records)
        until = self.clock.monotonic() + seconds
        for number, record in enumerate(records):
            if not self._put(producer, record, partial(_note, found, number), until):
                break
        producer.flush(max(until - self.clock.monotonic(), 0.001))
        if any(one is not True for one in found):
            producer.purge()
            producer.flush(0.1)
        return found

    def _put(self, producer: Producer, record: Record, note: Callable[..., None], until: float) -> bool:
        """False where its queue stays full until time is up."""
        from confluent_kafka import KafkaException

        while True:
            try:
                producer.produce(record.topic, record.value, record.key, headers=list(record.headers), on_delivery=note)
            except BufferError:
                if self.clock.monotonic() >= until:
                    return False
                producer.poll(0.1)
            except KafkaException as error:
                note(error.args[0], None)
                return True
            else:
                producer.poll(0)
                return True

    def views(self) -> Iterator[Any]:
        """The cluster's metadata as each of its brokers has it, in no order. Raises OpsError where one of them does not say.

        A broker that hung and goes on, or that nobody else reaches, believes what was so before. librdkafka asks by chance one of those to
        which it has a connection: here it gets one to each, and is asked until all have answered.
        """
        said, seen = Said(), set[int]()
        until, wanted = self.clock.monotonic() + self.timeout, set[int]()
        admin = self.admin(said, enable_sparse_connections=False)
        while not seen or wanted - seen:
            with self.named(said), heard(admin):
                found = admin.list_topics(timeout=self.timeout)
            wanted = set(found.brokers)
            # Until a broker of `bootstrap` has told its number it has none here.
            if found.orig_broker_id in wanted - seen:
                seen.add(found.orig_broker_id)
                yield found
            elif self.clock.monotonic() > until:
                silent = ", ".join(map(str, sorted(wanted - seen)))
                raise UnreachableError(
                    f"broker {silent} does not answer, and others do", where=self.where, remedy=_AWAY
                )
            else:
                self.clock.sleep(0.002)

    def topics(
        self, admin: AdminClient, said: Said, names: Sequence[str], *, timeout: float | None = None
    ) -> dict[str, Topic]:
        """Raises NotThereError where one does not exist; asking makes none, whatever the broker's `auto.create.topics.enable`."""
        from confluent_kafka import TopicCollection

        seconds = min(timeout, self.timeout) if timeout is not None else self.timeout
        found: dict[str, Topic] = {}
        with self.named(said):
            asked = admin.describe_topics(TopicCollection(list(names)), request_timeout=max(seconds, 0.1))
        for name, answer in asked.items():
            with self.named(said, name), heard(admin):
                described = answer.result(seconds + 1)
            partitions = tuple(sorted(part.id for part in described.partitions))
            leaderless = tuple(
                sorted(part.id for part in described.partitions if part.leader is None or part.leader.id < 0)
            )
            given = str(described.topic_id) if described.topic_id is not None else ""
            found[name] = Topic(name, given if given.strip("A=") else None, partitions, leaderless)
        return found

    def committed(
        self, said: Said, group: str, where: Sequence[TopicPartition], *, seconds: float | None = None
    ) -> list[TopicPartition]:
        """What the group has committed there; an offset below 0 where it has nothing.

        Asked by a consumer, which never joins: the admin client's own call ends the process when the coordinator moves
        (librdkafka issue 5040). While it moves the question is asked again, for `seconds` in all.
        """

        def ask(left: float) -> list[TopicPartition]:
            with contextlib.closing(self.consumer(said, group_id=group, enable_auto_commit=False)) as consumer:
                return _ask_committed(consumer, said, where, left)

        return self._while_it_moves(ask, _COORDINATOR_MOVES, said, f"group {group}", seconds)

    def watermarks(
        self, consumer: Consumer, said: Said, topic: str, partition: int, *, seconds: float | None = None
    ) -> tuple[int, int]:
        """The first offset that is there, and the one that comes next. While the partition's leader moves the question is asked again."""
        from confluent_kafka import TopicPartition

        def ask(left: float) -> tuple[int, int]:
            return consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=left)

        return self._while_it_moves(ask, _LEADER_MOVES, said, f"{topic}/{partition}", seconds)

    def _while_it_moves(
        self, ask: Callable[[float], T], moves: frozenset[str], said: Said, thing: str, seconds: float | None
    ) -> T:
        """The answer to what `ask` asks with the time that is left; asked again after the errors `moves`, for `seconds` in all."""
        from confluent_kafka import KafkaException

        until = self.clock.monotonic() + (left := seconds if seconds is not None else self.timeout)
        while True:
            try:
                return ask(max(left, 0.1))
            except KafkaException as error:
                left = until - self.clock.monotonic()
                if error.args[0].name() not in moves or left <= _AGAIN:
                    raise self.error(error.args[0], said, thing) from None
                self.clock.sleep(_AGAIN)

    # Errors

    @contextlib.contextmanager
    def named(self, said: Said, thing: str = "") -> Generator[None]:
        """librdkafka's errors become ours."""
        from concurrent.futures import TimeoutError as LateError

        from confluent_kafka import KafkaException

        try:
            yield
        except KafkaException as error:
            raise self.error(error.args[0], said, thing) from None
        except LateError:
            raise self.error(None, said, thing) from None

    def error(self, error: KafkaError | None, said: Said, thing: str = "") -> OpsError:
        """The most telling of an error and what librdkafka said besides. None: no answer in time."""
        where = f"{thing}, {self.where}" if thing else self.where
        errors = [*([error] if error is not None else []), *reversed(said.errors)]
        for kind, names, remedy in _KINDS:
            for one in errors:
                if one.name() in names:
                    return kind(_text(one), where=where, remedy=remedy)
        if error is None:
            return UnreachableError("Kafka did not answer in time", where=where, remedy=_AWAY)
        return OpsError(_text(error), where=where)


@contextlib.contextmanager
def heard(admin: AdminClient) -> Generator[None]:
    """An admin client calls back only when it is polled: why it got no answer stands in what it has to say."""
    try:
        yield
    except Exception:
        admin.poll(0)
        raise


def _ask_committed(
    consumer: Consumer, said: Said, where: Sequence[TopicPartition], seconds: float
) -> list[TopicPartition]:
    """Raises KafkaException, also for one partition alone."""
    from confluent_kafka import KafkaException

    try:
        found = consumer.committed(list(where), timeout=seconds)
    except KafkaException:
        # A group that we may not see shows among its messages, and to the call as a time-out.
        while (message := consumer.poll(0)) is not None:
            if (error := message.error()) is not None:
                said(error)
        raise
    if wrong := next((one.error for one in found if one.error is not None), None):
        raise KafkaException(wrong)
    return found


def _note(found: list[KafkaError | bool], number: int, error: KafkaError | None, _message: object) -> None:
    found[number] = True if error is None else error


_COORDINATOR_MOVES = frozenset(
    {"NOT_COORDINATOR", "COORDINATOR_NOT_AVAILABLE", "COORDINATOR_LOAD_IN_PROGRESS", "_WAIT_COORD"}
)
_LEADER_MOVES = frozenset(
    {"NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE", "FENCED_LEADER_EPOCH", "UNKNOWN_LEADER_EPOCH"}
)
_AGAIN = 0.5  # seconds

_AWAY = "check `bootstrap`, the network, and whether the brokers run"
# By name: https://kafka.apache.org/protocol#protocol_error_codes, and librdkafka's own with an underscore. The first that fits counts.
_KINDS: tuple[tuple[type[OpsError], frozenset[str], str], ...] = (
    (
        AccessDeniedError,
        frozenset({"_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED", "UNSUPPORTED_SASL_MECHANISM", "ILLEGAL_SASL_STATE"}),
        "check sasl.mechanism, user and password",
    ),
    (
        AccessDeniedError,
        frozenset({"TOPIC_AUTHORIZATION_FAILED", "GROUP_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED"}),
        "give our user the rights that docs/reference/events.md names",
    ),
    (
        UnreachableError,
        frozenset({"_SSL"}),
        "set `ca` to the PEM file of the brokers' certificate authority, and check that `bootstrap` has their certificates' names",
    ),
    (
        NotThereError,
        frozenset({"UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "_UNKNOWN_PARTITION", "UNKNOWN_TOPIC_ID"}),
        "create the topic, or take it out of the inventory",
    ),
    (ConflictError, frozenset({"_FENCED", "INVALID_PRODUCER_EPOCH", "PRODUCER_FENCED"}), "another producer of ours runs"),
    (
        UnreachableError,
        frozenset(
            {
                "_TRANSPORT", "_ALL_BROKERS_DOWN", "_RESOLVE", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "_MSG_TIMED_OUT", "_WAIT_COORD",
                "REQUEST_TIMED_OUT", "LEADER_NOT_AVAILABLE", "NOT_LEADER_FOR_PARTITION", "BROKER_NOT_AVAILABLE",
                "COORDINATOR_NOT_AVAILABLE", "COORDINATOR_LOAD_IN_PROGRESS", "NOT_COORDINATOR", "NETWORK_EXCEPTION",
                "NOT_ENOUGH_REPLICAS", "NOT_ENOUGH_REPLICAS_AFTER_APPEND", "KAFKA_STORAGE_ERROR", "_PURGE_QUEUE", "_PURGE_INFLIGHT",
            }
        ),
        _AWAY,
    ),
)  # fmt: skip


def _text(error: KafkaError) -> str:
    return f"Kafka: {' '.join(error.str().split())}"


def _dotted(names: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace("_", ".") if name not in ("on_commit", "stats_cb") else name: value
        for name, value in names.items()
    }
