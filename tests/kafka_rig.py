"""Apache Kafka for the tests: one broker, or a cluster of three whose brokers can be killed, and the calls that a test makes to them.

Every broker is controller and broker in one (KRaft). It listens twice: in plain text, where whoever comes is the superuser
(the rig's own calls), and over TLS for users with a SCRAM password, who may do nothing until `grant` allows it.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from ops_platform.clients.postgres_binaries import free_port
from tests.authority import Authority
from tests.kafka_wire import Partition, metadata
from tests.rig import eventually, missing
from tests.servers import Daemon, accepts, folder
from tests.services import maven

HOST = "127.0.0.1"
PASSWORD = "correct horse battery staple"
LARGEST = 16 << 20  # bytes of a record, above the 10 MB that a test may want
_CLUSTER_ID = "b3BzIHRlc3RzIGthZmthIQ"  # any 16 bytes in base64
_SECONDS = 30.0
# It compiles little and starts in a second or two; a broker of a test holds next to nothing.
_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xms64m", "-Xmx256m", "-Dlog4j2.level=INFO")

SETTINGS = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL",
    "inter.broker.listener.name": "PLAINTEXT",
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": "User:ANONYMOUS",
    "sasl.enabled.mechanisms": "SCRAM-SHA-512",
    "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": "org.apache.kafka.common.security.scram.ScramLoginModule required;",
    "listener.name.sasl_ssl.ssl.keystore.type": "PEM",
    "auto.create.topics.enable": "false",
    "message.max.bytes": str(LARGEST),
    "replica.fetch.max.bytes": str(LARGEST),
    "log.retention.ms": "-1",  # records with an old timestamp stay, too, unless a test says otherwise
    # Small, and quick to notice what is old, dead or due.
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    "group.initial.rebalance.delay.ms": "0",
    "auto.leader.rebalance.enable": "false",  # who leads is for the tests to say, however long they take
    "group.min.session.timeout.ms": "1000",
    "log.initial.task.delay.ms": "200",
    "log.retention.check.interval.ms": "200",
    "file.delete.delay.ms": "200",
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
    "controller.quorum.election.timeout.ms": "500",
    "controller.quorum.fetch.timeout.ms": "1500",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
    "log.cleaner.dedupe.buffer.size": "4194304",
    "num.network.threads": "2",
    "num.io.threads": "4",
}


@dataclass(frozen=True)
class Record:
    """A record as it was read. `timestamp` in milliseconds since 1970."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int


class Broker:
    """One process; its data stays in its folder when it is killed."""

    def __init__(self, number: int, home: Path) -> None:
        self.number = number
        self.home = home
        self.port, self.sasl_port, self.controller_port = free_port(), free_port(), free_port()
        self.daemon = Daemon(
            f"Kafka broker {number}", _java("kafka.Kafka", self.file), lambda: accepts(self.port), log=home / "log"
        )

    @property
    def file(self) -> Path:
        return self.home / "server.properties"

    def configure(self, settings: Mapping[str, str]) -> None:
        own = {
            "node.id": str(self.number),
            "log.dirs": str(self.home / "data"),
            "listeners": f"PLAINTEXT://{HOST}:{self.port},SASL_SSL://{HOST}:{self.sasl_port},CONTROLLER://{HOST}:{self.controller_port}",
        }
        self.file.write_text("".join(f"{key}={value}\n" for key, value in {**own, **settings}.items()))

    def format(self) -> subprocess.Popen[str]:
        """Begins to write the files without which a broker does not start."""
        command = _java("kafka.tools.StorageTool", "format", f"--cluster-id={_CLUSTER_ID}", f"--config={self.file}")
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Kafka:
    """A cluster. `settings` as in server.properties, over SETTINGS, for every broker."""

    def __init__(self, home: Path, *, brokers: int = 1, settings: Mapping[str, str] | None = None) -> None:
        self.brokers: list[Broker] = []
        for number in range(1, brokers + 1):
            (home / str(number)).mkdir()
            self.brokers.append(Broker(number, home / str(number)))
        authority = Authority(home)
        self.ca = authority.ca
        chain, key = authority.issue("broker", "broker", hosts=(HOST, "localhost"))
        both = home / "keystore.pem"
        both.touch(0o600)
        both.write_bytes(key.read_bytes() + chain.read_bytes())
        copies, enough = str(min(3, brokers)), str(2 if brokers > 1 else 1)
        common = {
            **SETTINGS,
            "controller.quorum.voters": ",".join(f"{b.number}@{HOST}:{b.controller_port}" for b in self.brokers),
            "listener.name.sasl_ssl.ssl.keystore.location": str(both),
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": enough,
            "default.replication.factor": copies,
            "min.insync.replicas": enough,
        }
        for broker in self.brokers:
            broker.configure({**common, **(settings or {})})

    # Processes

    def create(self) -> None:
        for broker, made in [(broker, broker.format()) for broker in self.brokers]:
            said, _ = made.communicate(timeout=60)
            assert made.returncode == 0, f"{broker.file}: {said}"

    def start(self) -> None:
        """Every broker that does not run, until the cluster knows of all of them."""
        for broker in self.brokers:
            if not broker.daemon.alive:
                broker.daemon.spawn()
        for broker in self.brokers:
            broker.daemon.wait()
        eventually(lambda: self.known() == {b.number for b in self.brokers}, why=lambda: self.brokers[0].daemon)

    def stop(self) -> None:
        """kill -9 of all."""
        for broker in self.brokers:
            broker.daemon.stop()

    def broker(self, number: int) -> Broker:
        return self.brokers[number - 1]

    def kill(self, number: int) -> None:
        """kill -9. Its partitions have another leader when the controller notices, some seconds later: see `leader`."""
        self.broker(number).daemon.stop()

    def restart(self, number: int) -> None:
        """On the same data and ports, until the cluster knows it again."""
        self.broker(number).daemon.start()
        eventually(lambda: number in self.known(), why=lambda: self.broker(number).daemon)

    def _alive(self) -> list[Broker]:
        return [broker for broker in self.brokers if broker.daemon.alive]

    def known(self) -> set[int]:
        """The brokers that clients are told of, whichever one they ask. Empty when nobody runs."""
        told = [_told(broker) for broker in self._alive()]
        return set(frozenset.intersection(*told)) if told else set()

    # Clients

    @property
    def bootstrap(self) -> str:
        return ",".join(f"{HOST}:{broker.port}" for broker in self.brokers)

    @property
    def sasl_bootstrap(self) -> str:
        return ",".join(f"{HOST}:{broker.sasl_port}" for broker in self.brokers)

    @property
    def config(self) -> dict[str, Any]:
        """librdkafka's settings of a superuser in plain text. Its own complaints about dead brokers are left out."""
        return {
            "bootstrap.servers": self.bootstrap,
            "log_level": 0,
            "reconnect.backoff.max.ms": 500,
            "topic.metadata.propagation.max.ms": 1000,
        }

    def sasl(self, user: str, password: str = PASSWORD) -> dict[str, Any]:
        """librdkafka's settings of a user of `add_user`."""
        return {
            **self.config,
            "bootstrap.servers": self.sasl_bootstrap,
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": password,
            "ssl.ca.location": str(self.ca),
        }

    @property
    def admin(self) -> AdminClient:
        """A new one, which has learnt nothing yet that is no longer so. Hold it: what it was asked ends with it."""
        return AdminClient(self.config)

    def producer(self, **settings: Any) -> Producer:
        """With names as librdkafka has them, with dots: `producer(**{"transactional.id": "orders"})`."""
        usual = {
            "acks": "all",
            "linger.ms": 0,
            "message.max.bytes": LARGEST,
            "message.timeout.ms": int(_SECONDS * 1000),
        }
        return Producer({**self.config, **usual, **settings})

    def consumer(self, **settings: Any) -> Consumer:
        usual = {"group.id": "rig", "enable.auto.commit": False, "auto.offset.reset": "error"}
        return Consumer({**self.config, **usual, **settings})

    # Topics

    def create_topic(self, name: str = "", *, partitions: int = 1, replicas: int | None = None, **config: str) -> str:
        """Its name, a fresh one unless given. `config` as of the topic with `_` for dots: `retention_ms="1000"`."""
        name = name or f"topic-{uuid.uuid4().hex[:12]}"
        wanted = {key.replace("_", "."): value for key, value in config.items()}
        factor = replicas if replicas is not None else min(3, len(self.brokers))
        self._do(lambda admin: admin.create_topics([NewTopic(name, partitions, factor, config=wanted)]))
        eventually(lambda: self._complete(name, partitions, factor), why=f"{name} is not complete")
        return name

    def delete_topic(self, name: str) -> None:
        self._do(lambda admin: admin.delete_topics([name]))
        eventually(lambda: not any(self._seen(name)), why=f"{name} is still there")

    def delete_topics(self) -> None:
        """All but Kafka's own."""
        admin = self.admin
        for name in admin.list_topics(timeout=_SECONDS).topics:
            if not name.startswith("__"):
                self.delete_topic(name)

    def recreate_topic(self, name: str, *, partitions: int = 1, **config: str) -> None:
        """Another topic of the same name, whose offsets begin at 0."""
        self.delete_topic(name)
        self.create_topic(name, partitions=partitions, **config)

    def grow_topic(self, name: str, partitions: int) -> None:
        """To that many partitions; Kafka cannot take any away."""
        self._do(lambda admin: admin.create_partitions([NewPartitions(name, partitions)]))
        eventually(lambda: self._complete(name, partitions, 1), why=f"{name} has not grown")

    def configure_topic(self, name: str, **config: str) -> None:
        """As for `create_topic`."""
        how = AlterConfigOpType.SET
        entries = [ConfigEntry(k.replace("_", "."), v, incremental_operation=how) for k, v in config.items()]
        change = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
        self._do(lambda admin: admin.incremental_alter_configs([change]))

    def topic_config(self, name: str, key: str) -> str:
        """The value in force, such as that of `retention.ms`."""
        resource = ConfigResource(ResourceType.TOPIC, name)
        admin = self.admin
        return admin.describe_configs([resource])[resource].result(_SECONDS)[key].value

    def leader(self, topic: str, partition: int = 0) -> int:
        """-1 where there is none."""
        return self._partition(topic, partition).leader

    def in_sync(self, topic: str, partition: int = 0) -> set[int]:
        return set(self._partition(topic, partition).in_sync)

    def watermarks(self, topic: str, partition: int = 0) -> tuple[int, int]:
        """The first offset that is there, and the one that comes next."""
        self._partition(topic, partition)  # KeyError for one that is not there

        def ask() -> tuple[int, int] | None:
            with closing(self.consumer(**{"isolation.level": "read_uncommitted"})) as consumer:
                try:
                    return consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=5)
                except KafkaException:  # a new leader does not know it yet
                    return None

        return eventually(ask, seconds=_SECONDS, why=f"no broker tells the offsets of {topic}/{partition}")

    def expire(self, topic: str, before: int, partition: int = 0) -> None:
        """The records below that offset are gone, as after their retention."""
        self._do(lambda admin: admin.delete_records([TopicPartition(topic, partition, before)]))

    def expire_all(self, topic: str, partition: int = 0) -> None:
        """By the broker's own retention, which takes a second or two; its period is what it was afterwards."""
        before = self.topic_config(topic, "retention.ms")
        self.configure_topic(topic, retention_ms="1")
        eventually(lambda: len({*self.watermarks(topic, partition)}) == 1, why=f"{topic} did not expire")
        self.configure_topic(topic, retention_ms=before)

    def _partition(self, topic: str, partition: int) -> Partition:
        """As every living broker sees it: each hears of a change at its own time, and whoever is asked next may be the last."""

        def agreed() -> Partition | None:
            first, *others = (seen[partition] for seen in self._seen(topic))
            same = all((o.leader, {*o.in_sync}) == (first.leader, {*first.in_sync}) for o in others)
            return first if same else None

        return eventually(agreed, seconds=_SECONDS, why=f"the brokers do not agree about {topic}/{partition}")

    def _seen(self, topic: str) -> list[dict[int, Partition]]:
        """The topic's partitions as each living broker sees them."""
        return [metadata(broker.port, topic).partitions for broker in self._alive()]

    def _complete(self, topic: str, partitions: int, replicas: int) -> bool:
        """Every broker knows leaders and in-sync replicas: whoever writes now is not told to come back later."""
        return all(
            len(seen) == partitions and all(p.leader >= 0 and len(p.in_sync) >= replicas for p in seen.values())
            for seen in self._seen(topic)
        )

    # Records

    def produce(
        self,
        topic: str,
        *values: bytes | str | None,
        key: bytes | str | None = None,
        partition: int = 0,
        headers: Sequence[tuple[str, str | bytes | None]] = (),
        timestamp: int = 0,
    ) -> list[int]:
        """Their offsets, once every replica has them. Raises KafkaException for a record that was not taken."""
        producer = self.producer()
        delivered: list[Message] = []
        more: dict[str, Any] = {"timestamp": timestamp} if timestamp else {}

        def note(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                raise KafkaException(error)
            delivered.append(message)

        for value in values:
            self._put(
                producer, topic, value, key=key, partition=partition, headers=list(headers), on_delivery=note, **more
            )
        left = producer.flush(_SECONDS)
        assert not left, f"{left} records were not confirmed in {_SECONDS:.0f} s"
        return [message.offset() for message in delivered]

    def _put(self, producer: Producer, *args: Any, **more: Any) -> None:
        try:
            producer.produce(*args, **more)
        except BufferError:  # its queue is full
            producer.flush(_SECONDS)
            producer.produce(*args, **more)

    def read(self, topic: str, *, committed: bool = True) -> list[Record]:
        """Everything that is there, by partition and offset; with `committed=False` what transactions aborted or left open, too."""
        level = "read_committed" if committed else "read_uncommitted"
        found: list[Record] = []
        with closing(self.consumer(**{"isolation.level": level, "enable.partition.eof": True})) as consumer:
            open_ = set(self._seen(topic)[0])
            consumer.assign([TopicPartition(topic, number, self.watermarks(topic, number)[0]) for number in open_])
            while open_:
                message = consumer.poll(_SECONDS)
                assert message is not None, f"{topic} was not read to its end in {_SECONDS:.0f} s"
                if (error := message.error()) is None:
                    found.append(_record(message))
                elif error.code() == KafkaError._PARTITION_EOF:
                    open_.discard(message.partition())
                else:
                    raise KafkaException(error)
        return sorted(found, key=lambda record: (record.partition, record.offset))

    @contextmanager
    def transaction(self, *, abort: bool = False, name: str = "") -> Iterator[Producer]:
        """What is produced with it becomes visible together at the end, or never: with `abort`, or when the body fails."""
        name = name or f"tx-{uuid.uuid4().hex[:12]}"
        producer = self.producer(**{"transactional.id": name})
        producer.init_transactions(_SECONDS)
        producer.begin_transaction()
        try:
            yield producer
            producer.flush(_SECONDS)
        except BaseException:
            producer.abort_transaction(_SECONDS)
            raise
        (producer.abort_transaction if abort else producer.commit_transaction)(_SECONDS)
        # The broker answers before its markers stand in the partitions; only when they do it takes the next one of that name.
        self.producer(**{"transactional.id": name}).init_transactions(_SECONDS)

    # Groups and users

    def committed(self, group: str) -> dict[tuple[str, int], int]:
        """What the group has committed, by topic and partition.

        Asked by a consumer, which never joins: the admin client's own call ends the process when the coordinator is not there yet
        (librdkafka issue 5040).
        """

        def ask() -> list[TopicPartition] | None:
            with closing(self.consumer(**{"group.id": group})) as consumer:
                topics = consumer.list_topics(timeout=_SECONDS).topics
                where = [TopicPartition(name, number) for name, topic in topics.items() for number in topic.partitions]
                try:
                    return consumer.committed(where, timeout=_SECONDS)
                except KafkaException as error:
                    if error.args[0].code() in (KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_NOT_AVAILABLE):
                        return None  # it moves
                    raise

        found = eventually(ask, seconds=_SECONDS, why=f"no broker tells what {group} has committed")
        return {(each.topic, each.partition): each.offset for each in found if each.offset >= 0}

    def commit(self, group: str, topic: str, offset: int, partition: int = 0) -> None:
        where = [TopicPartition(topic, partition, offset)]
        self._do(lambda admin: admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, where)]))

    def add_user(self, user: str, password: str = PASSWORD) -> None:
        """Or another password for one that is there."""
        how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        wanted = UserScramCredentialUpsertion(user, how, password.encode())
        self._do(lambda admin: admin.alter_user_scram_credentials([wanted]))

    def grant(self, user: str, *operations: AclOperation, topic: str = "", group: str = "") -> None:
        """On that topic or group, else on the cluster; `*` is every one."""
        self._do(lambda admin: admin.create_acls([self._acl(user, each, topic, group) for each in operations]))

    def _acl(self, user: str, operation: AclOperation, topic: str, group: str) -> AclBinding:
        kind = ResourceType.TOPIC if topic else ResourceType.GROUP if group else ResourceType.BROKER
        name = topic or group or "kafka-cluster"
        return AclBinding(
            kind, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW
        )

    def _do(self, what: Callable[[AdminClient], Mapping[Any, Any]]) -> None:
        """Raises KafkaException for what was refused."""
        admin = self.admin
        for asked in what(admin).values():
            asked.result(_SECONDS)


def _told(broker: Broker) -> frozenset[int]:
    """Whom a broker knows: nobody, while it comes up and takes connections that it cuts off."""
    try:
        return metadata(broker.port).brokers
    except ConnectionError:
        return frozenset()


def _record(message: Message) -> Record:
    return Record(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        message.headers() or [],
        message.timestamp()[1],
    )


def _java(main: str, *args: str | Path) -> list[str]:
    java = maven.java()
    if java is None:
        missing(f"Java {maven.OLDEST}", "install a JDK, or name one in JAVA_HOME")
    if not maven.KAFKA.home().exists():
        missing("Apache Kafka", "make services installs it")
    return [str(java), *_JVM, "-cp", maven.KAFKA.path(), main, *map(str, args)]


@contextmanager
def cluster(*, brokers: int = 1, settings: Mapping[str, str] | None = None) -> Iterator[Kafka]:
    with folder("ops-kafka-") as home:
        made = Kafka(home, brokers=brokers, settings=settings)
        try:
            made.create()
            made.start()
            yield made
        finally:
            made.stop()
