"""Kafka: topics with their settings, access rules, names of users, groups' offsets, schemas; and the records of chosen topics, one by one.

In a sandbox the records' offsets begin at 0, so those of groups are translated: a group goes on with the record with which it would have
gone on.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from ops_platform.clients.kafka import Kafka, Said, heard
from ops_platform.clients.kafka_quotas import Quota, describe_quotas, set_quotas
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.clock import wait_until
from ops_platform.counting import count_of
from ops_platform.errors import ConflictError, CorruptionError, CouldNotVerifyError, OpsError, UnreachableError
from ops_platform.stores.kafka_records import read_partition, read_records, records_of
from ops_platform.stores.kind import FAILED, NOT_APPLICABLE, PASSED, Check, Dumped, Finding, Parts, Saved
from ops_platform.stores.servers import Server, find_program

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.clients.http import HttpApi
    from ops_platform.inventory.systems import KafkaSystem, StoreTarget

SUBJECTS = "subjects"
_WIRE = 5  # bytes: a zero and the schema's id, before the value itself
# Of the cluster that a topic was in, not of the topic: a single broker could not keep them.
_NOT_HERE = ("min.insync.replicas", "leader.replication.throttled.replicas", "follower.replication.throttled.replicas")
_CLUSTER_ID = "c2FuZGJveCBvZiBvcHMhIQ"
_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xms64m", "-Xmx512m")
_HOST = "127.0.0.1"


def open_store(access: Access, target: StoreTarget) -> KafkaStore:
    return KafkaStore(access, target, cast("KafkaSystem", target.system))


@dataclass(frozen=True)
class KafkaStore:
    """`stores.kind.Kind` over one cluster."""

    access: Access
    target: StoreTarget
    system: KafkaSystem

    # Dump

    def look(self) -> str:
        kafka, said = self.access.kafka(self.system), Said()
        return count_of(len(self._topics(kafka, kafka.admin(said), said)), "topic")

    def dump(self, parts: Parts) -> Dumped:
        kafka, said = self.access.kafka(self.system), Said()
        self._need_one_view(kafka)
        admin = kafka.admin(said)
        before = self._topics(kafka, admin, said)
        facts: dict[str, Any] = {
            "topics": before,
            "acls": _acls(kafka, admin, said),
            "users": _users(kafka, admin, said),
            "quotas": [asdict(quota) for quota in describe_quotas(kafka)],
            "groups": self._groups(kafka, admin, said, before),
            "records": [],
            "subjects": None,
        }
        chosen = [name for name in before if _fits(name, self.system.records)]
        # A compacted topic is somebody's database: those first.
        chosen.sort(key=lambda name: ("compact" not in before[name]["config"].get("cleanup.policy", ""), name))
        for name in chosen:
            for partition in range(before[name]["partitions"]):
                with parts.part(f"records-{len(facts['records'])}") as write:
                    read = read_partition(kafka, said, name, partition, write)
                facts["records"].append({"topic": name, "partition": partition, **read})
        if (registry := self.access.schema_registry(self.system)) is not None:
            with parts.part(SUBJECTS) as write:
                facts["subjects"] = _read_subjects(registry, write)
        after = self._topics(kafka, admin, said)
        changed = [name for name in chosen if after.get(name, {}).get("id") != before[name]["id"]]
        if changed:
            raise ConflictError(
                f"the topic {changed[0]} was deleted or made anew during the dump",
                where=kafka.where,
                remedy="take it again",
            )
        return Dumped(source=kafka.where, server="Kafka", facts=facts)

    def _need_one_view(self, kafka: Kafka) -> None:
        """Every broker names the same topics and leaders: one that hung and goes on would have us read less than was acknowledged.

        Waits while a leader moves. Raises ConflictError where they do not come to agree, UnreachableError where one does not say.
        """
        differ: list[tuple[str, int]] = []

        def agree() -> bool:
            differ[:] = _differ([self._leaders(view) for view in kafka.views()])
            return not differ

        if not wait_until(agree, clock=kafka.clock, seconds=kafka.timeout):
            raise ConflictError(
                f"the brokers do not agree who leads {differ[0][0]}/{differ[0][1]}", where=kafka.where,
                remedy="look whether one of them is cut off from the others; then take it again",
            )  # fmt: skip

    def _leaders(self, view: Any) -> dict[tuple[str, int], int]:
        topics = {name: topic for name, topic in view.topics.items() if _fits(name, self.system.topics)}
        return {(name, n): part.leader for name, topic in topics.items() for n, part in topic.partitions.items()}

    def _topics(self, kafka: Kafka, admin: Any, said: Said) -> dict[str, dict[str, Any]]:
        kinds = _admin_kinds()
        with kafka.named(said), heard(admin):
            listed = admin.list_topics(timeout=kafka.timeout).topics
        names = sorted(n for n in listed if not n.startswith("__") and _fits(n, self.system.topics))
        if not names:
            return {}
        found = kafka.topics(admin, said, names)
        asked = admin.describe_configs([kinds.ConfigResource(kinds.ResourceType.TOPIC, name) for name in names])
        out: dict[str, dict[str, Any]] = {}
        for resource, answer in asked.items():
            with kafka.named(said, resource.name), heard(admin):
                entries = answer.result(kafka.timeout + 1)
            own = {
                e.name: e.value
                for e in entries.values()
                if e.source == kinds.ConfigSource.DYNAMIC_TOPIC_CONFIG.value and not e.is_sensitive
            }
            topic = found[resource.name]
            if topic.leaderless:
                raise UnreachableError(
                    f"{topic.name} has partitions without a leader: {topic.leaderless}", where=kafka.where
                )
            out[topic.name] = {"id": topic.id, "partitions": len(topic.partitions), "config": own}
        return out

    def _groups(
        self, kafka: Kafka, admin: Any, said: Said, topics: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, list[list[Any]]]:
        from confluent_kafka import TopicPartition

        with kafka.named(said), heard(admin):
            listed = admin.list_consumer_groups().result(kafka.timeout + 1)
        if listed.errors:
            raise OpsError(f"not every broker lists its groups: {listed.errors[0]}", where=kafka.where)
        where = [TopicPartition(name, n) for name, topic in topics.items() for n in range(topic["partitions"])]
        out: dict[str, list[list[Any]]] = {}
        for group in sorted(one.group_id for one in listed.valid):
            found = kafka.committed(said, group, where) if where else []
            committed = [[one.topic, one.partition, one.offset] for one in found if one.offset >= 0]
            if committed:
                out[group] = committed
        return out

    # Level 1

    def files(self, saved: Saved) -> Iterator[Check]:
        def ask() -> Finding:
            total = 0
            for number, known in enumerate(saved.facts["records"]):
                counted = sum(1 for _ in read_records(saved.part(f"records-{number}")))
                if counted != known["count"]:
                    return Finding(
                        FAILED, f"{known['topic']}/{known['partition']}: {counted} records, {known['count']} were read"
                    )
                total += counted
            return Finding(PASSED, f"{total} records of {len(saved.facts['records'])} partitions")

        def subjects() -> Finding:
            counted = sum(1 for _ in read_subjects(saved))
            same = counted == saved.facts["subjects"]
            return Finding(PASSED if same else FAILED, f"{counted} versions of subjects")

        yield Check("records", "Every record can be read", "the form of each, counted", ask)
        if saved.facts.get("subjects") is not None:
            yield Check("subjects", "Every version of every subject can be read", "JSON, counted", subjects)

    # Level 2

    def need_programs(self) -> None:
        self._programs()

    def _programs(self) -> tuple[str, str]:
        programs = self.target.sandbox.programs
        return find_program("java", programs, "a JDK"), find_program("kafka", programs, "Apache Kafka")

    @contextmanager
    def restore(self, saved: Saved, home: Path) -> Generator[RestoredKafka]:
        java, jars = self._programs()
        place = home / "kafka"
        place.mkdir(mode=0o700)
        port, controller, password = free_port(), free_port(), secrets.token_hex(16)
        file = _properties(place, port, controller, password)
        libraries = Path(jars) / "libs"
        path = f"{libraries if libraries.is_dir() else jars}/*"
        done = subprocess.run(
            [java, *_JVM, "-cp", path, "kafka.tools.StorageTool", "format", f"--cluster-id={_CLUSTER_ID}", f"--config={file}"],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if done.returncode != 0:
            raise CouldNotVerifyError(f"the sandbox's broker cannot be made: {(done.stdout + done.stderr)[-500:]}")
        kafka = _SandboxKafka(port, password, self.access)
        command = [java, *_JVM, "-cp", path, "kafka.Kafka", file]
        # Its clients know TCP alone. It has no peers to call, and lets nobody in who does not know the password.
        with Server("kafka", command, place, kafka.ready, alone=False, clock=self.access.clock):
            restored = RestoredKafka(saved, kafka)
            restored.load()
            yield restored


def _differ(views: Sequence[Mapping[tuple[str, int], int]]) -> list[tuple[str, int]]:
    """Partitions of which they do not say the same."""
    named = {one for view in views for one in view}
    return sorted(one for one in named if len({view.get(one) for view in views}) > 1)


class _SandboxKafka(Kafka):
    """The broker of the sandbox."""

    def __init__(self, port: int, password: str, access: Access) -> None:
        super().__init__("sandbox", [(_HOST, port)], tls=False, timeout=60.0, clock=access.clock)
        self._word = password

    def settings(self) -> dict[str, Any]:
        login = {"sasl.mechanisms": "PLAIN", "sasl.username": "sandbox", "sasl.password": self._word}
        return {**super().settings(), "security.protocol": "SASL_PLAINTEXT", **login}

    def ready(self) -> bool:
        from confluent_kafka import KafkaException

        try:
            return bool(self.admin(Said()).list_topics(timeout=2).brokers)
        except KafkaException:
            return False


@dataclass(frozen=True)
class RestoredKafka:
    saved: Saved
    kafka: Kafka
    server: str = "Kafka, one broker"

    def load(self) -> None:
        """Topics, records, groups' offsets. Raises what keeps it from being whole."""
        said = Said()
        admin = self.kafka.admin(said)
        self._create(admin, said)
        for number, known in enumerate(self.saved.facts["records"]):
            self._produce(known, self.saved.part(f"records-{number}"))
        for group, committed in self.translated().items():
            self._commit(said, group, committed)
        self._let_in(admin, said)

    def _let_in(self, admin: Any, said: Said) -> None:
        """Access rules, and users under their own names: with passwords that nobody knows, because the source's cannot be read."""
        kinds = _admin_kinds()
        if quotas := _quotas(self.saved):
            set_quotas(self.kafka, quotas)
        rules = [_rule(row) for row in self.saved.facts["acls"] or ()]
        users = [
            kinds.UserScramCredentialUpsertion(
                name, kinds.ScramCredentialInfo(kinds.ScramMechanism[mechanism], 4096), secrets.token_bytes(24)
            )
            for name, mechanisms in self.saved.facts["users"].items()
            for mechanism in mechanisms
        ]
        asked = {
            **(admin.create_acls(rules) if rules else {}),
            **(admin.alter_user_scram_credentials(users) if users else {}),
        }
        for answer in asked.values():
            with self.kafka.named(said, "access rules and users"), heard(admin):
                answer.result(60)

    def _create(self, admin: Any, said: Said) -> None:
        kinds = _admin_kinds()
        topics = self.saved.facts["topics"]
        wanted = [
            kinds.NewTopic(name, topic["partitions"], 1, config=_here(topic["config"]))
            for name, topic in topics.items()
        ]
        for name, answer in (admin.create_topics(wanted) if wanted else {}).items():
            with self.kafka.named(said, name), heard(admin):
                answer.result(60)

    def _produce(self, known: Mapping[str, Any], file: Path) -> None:
        failed: list[str] = []

        def note(error: Any, _message: Any) -> None:
            if error is not None:
                failed.append(str(error.str()))

        producer = self.kafka.producer(Said(), message_max_bytes=1_000_000_000, linger_ms=5)
        for record in read_records(file):
            while True:
                try:
                    producer.produce(
                        known["topic"], record.value, record.key, known["partition"], on_delivery=note,
                        timestamp=max(0, record.timestamp), headers=list(record.headers),
                    )  # fmt: skip
                    break
                except BufferError:
                    producer.poll(0.5)
        left = producer.flush(600)
        if left or failed:
            raise CouldNotVerifyError(
                f"the sandbox did not take every record of {known['topic']}: {failed[0] if failed else f'{left} are left'}"
            )

    def _commit(self, said: Said, group: str, committed: Mapping[tuple[str, int], int]) -> None:
        from confluent_kafka import TopicPartition

        with contextlib.closing(self.kafka.consumer(said, group_id=group, enable_auto_commit=False)) as consumer:
            offsets = [TopicPartition(topic, partition, offset) for (topic, partition), offset in committed.items()]
            with self.kafka.named(said, group):
                consumer.commit(offsets=offsets, asynchronous=False)

    def translated(self) -> dict[str, dict[tuple[str, int], int]]:
        """Where each group goes on here: as many records before it as there were before it at the source."""
        kept = {(known["topic"], known["partition"]): n for n, known in enumerate(self.saved.facts["records"])}
        out: dict[str, dict[tuple[str, int], int]] = {}
        for group, committed in self.saved.facts["groups"].items():
            for topic, partition, offset in committed:
                if (topic, partition) in kept:
                    file = self.saved.part(f"records-{kept[topic, partition]}")
                    before = sum(1 for record in read_records(file) if record.offset < offset)
                    out.setdefault(group, {})[topic, partition] = before
        return out

    # Checks

    def checks(self) -> Iterator[Check]:
        yield Check("topics", "Topics and their settings are the source's", "describe of each", self._topics)
        for number, known in enumerate(self.saved.facts["records"]):
            yield Check(
                f"records-{number}", f"Every record of {known['topic']}/{known['partition']} is the source's",
                "key, value, headers, timestamp, in order", lambda number=number, known=known: self._records(number, known),
            )  # fmt: skip
        yield Check(
            "groups",
            "Groups go on with the record with which they would have gone on",
            "committed offsets",
            self._groups,
        )
        yield Check("acls", "Access rules are the source's", "describe of all", self._acls)
        yield Check("quotas", "Client quotas are the source's", "describe of all", self._quotas)
        yield Check("users", "SCRAM users have the source's names and mechanisms", "describe of all", self._users)
        if self.saved.facts.get("subjects") is not None:
            yield Check(
                "schemas", "Every record's schema is kept", "the schema id of each value in Confluent's wire format", self._schemas
            )  # fmt: skip

    def _acls(self) -> Finding:
        known, said = self.saved.facts["acls"], Said()
        if known is None:
            return Finding(NOT_APPLICABLE, "the source has no authorizer")
        here = _acls(self.kafka, self.kafka.admin(said), said) or []
        wrong = [row for row in known if row not in here] + [row for row in here if row not in known]
        text = f"differ: {'; '.join(' '.join(row) for row in wrong[:5])}" if wrong else f"{len(known)} rules"
        return Finding(FAILED if wrong else PASSED, text)

    def _users(self) -> Finding:
        known, said = self.saved.facts["users"], Said()
        here = _users(self.kafka, self.kafka.admin(said), said)
        wrong = sorted(name for name in {*known, *here} if known.get(name) != here.get(name))
        text = f"differ: {', '.join(wrong[:10])}" if wrong else f"{len(known)} users"
        return Finding(FAILED if wrong else PASSED, text)

    def _quotas(self) -> Finding:
        known, here = _quotas(self.saved), describe_quotas(self.kafka)
        wrong = [quota for quota in known if quota not in here] + [quota for quota in here if quota not in known]
        text = "; ".join(str(dict(quota.entity)) for quota in wrong[:5])
        return Finding(FAILED if wrong else PASSED, f"differ: {text}" if wrong else f"{len(known)} quotas")

    def _schemas(self) -> Finding:
        """Of topics that have a subject by the usual name: another producer's first byte may be zero, too."""
        found = list(read_subjects(self.saved))
        ids, subjects = {one["id"] for one in found}, {one["subject"] for one in found}
        lost: dict[str, int] = {}
        counted = 0
        for number, known in enumerate(self.saved.facts["records"]):
            if f"{known['topic']}-value" not in subjects:
                continue
            for record in read_records(self.saved.part(f"records-{number}")):
                value = record.value or b""
                if len(value) >= _WIRE and value[0] == 0:
                    counted += 1
                    if int.from_bytes(value[1:_WIRE], "big") not in ids:
                        lost[known["topic"]] = record.offset
        if lost:
            some = ", ".join(f"{topic} at offset {offset}" for topic, offset in list(lost.items())[:5])
            return Finding(FAILED, f"schemas of records are not kept: {some}")
        return Finding(PASSED, f"{len(found)} versions of {len(subjects)} subjects, for {counted} records")

    def _topics(self) -> Finding:
        kinds = _admin_kinds()
        said, known = Said(), self.saved.facts["topics"]
        if not known:
            return Finding(NOT_APPLICABLE, "the source has no topic that was asked for")
        admin = self.kafka.admin(said)
        found = self.kafka.topics(admin, said, list(known))
        asked = admin.describe_configs([kinds.ConfigResource(kinds.ResourceType.TOPIC, name) for name in known])
        wrong = [name for name, topic in found.items() if len(topic.partitions) != known[name]["partitions"]]
        for resource, answer in asked.items():
            entries = answer.result(60)
            wrong += [
                f"{resource.name}: {key}"
                for key, value in _here(known[resource.name]["config"]).items()
                if entries[key].value != value
            ]
        text = f"differ: {', '.join(wrong[:10])}" if wrong else count_of(len(known), "topic")
        return Finding(FAILED if wrong else PASSED, text)

    def _records(self, number: int, known: Mapping[str, Any]) -> Finding:
        stamped = self.saved.facts["topics"][known["topic"]]["config"].get("message.timestamp.type") == "LogAppendTime"
        here = records_of(self.kafka, Said(), known["topic"], known["partition"])
        compared = 0
        for was in read_records(self.saved.part(f"records-{number}")):
            now = next(here, None)
            same = now is not None and (was.key, was.value, was.headers) == (now.key, now.value, now.headers)
            if now is None or not same or not (stamped or was.timestamp == now.timestamp):
                return Finding(
                    FAILED, f"the record at offset {was.offset} is {'missing' if now is None else 'another one'}"
                )
            compared += 1
        if next(here, None) is not None:
            return Finding(FAILED, f"there are more than {compared} records")
        return Finding(PASSED, f"{compared} records are the same")

    def _groups(self) -> Finding:
        from confluent_kafka import TopicPartition

        wanted, wrong, said = self.translated(), list[str](), Said()
        for group, committed in wanted.items():
            where = [TopicPartition(topic, partition) for topic, partition in committed]
            found = {
                (one.topic, one.partition): one.offset for one in self.kafka.committed(said, group, where, seconds=60)
            }
            wrong += [group] if found != committed else []
        if not wanted:
            return Finding(NOT_APPLICABLE, "no group has offsets in the topics whose records are kept")
        text = f"differ: {', '.join(wrong[:10])}" if wrong else count_of(len(wanted), "group")
        return Finding(FAILED if wrong else PASSED, text)


# What else there is


def _acls(kafka: Kafka, admin: Any, said: Said) -> list[list[str]] | None:
    """None where the cluster has no authorizer."""
    from confluent_kafka import KafkaError, KafkaException

    kinds = _admin_kinds()
    anything = kinds.AclBindingFilter(
        kinds.ResourceType.ANY,
        None,
        kinds.ResourcePatternType.ANY,
        None,
        None,
        kinds.AclOperation.ANY,
        kinds.AclPermissionType.ANY,
    )
    try:
        found = admin.describe_acls(anything).result(kafka.timeout + 1)
    except KafkaException as error:
        if error.args[0].code() == KafkaError.SECURITY_DISABLED:
            return None
        raise kafka.error(error.args[0], said, "access rules") from None
    return sorted(
        [
            a.restype.name,
            a.name,
            a.resource_pattern_type.name,
            a.principal,
            a.host,
            a.operation.name,
            a.permission_type.name,
        ]
        for a in found
    )


def _quotas(saved: Saved) -> list[Quota]:
    def pairs(found: Any) -> tuple[Any, ...]:
        return tuple((key, value) for key, value in found)

    return [Quota(pairs(one["entity"]), pairs(one["limits"])) for one in saved.facts.get("quotas", ())]


def _rule(row: Sequence[str]) -> Any:
    """What `_acls` made a row of."""
    kinds = _admin_kinds()
    resource, name, pattern, principal, host, operation, permission = row
    return kinds.AclBinding(
        kinds.ResourceType[resource], name, kinds.ResourcePatternType[pattern], principal, host,
        kinds.AclOperation[operation], kinds.AclPermissionType[permission],
    )  # fmt: skip


def _read_subjects(registry: HttpApi, write: Callable[[bytes], None]) -> int:
    """Every version of every subject of the registry, a line of JSON each, with the subject's compatibility where it has its own."""
    count = 0
    for subject in sorted(registry.get("/subjects").json()):
        path = f"/subjects/{quote(subject, safe='')}/versions"
        compatibility = registry.get(f"/config/{quote(subject, safe='')}", good=(200, 404))
        level = compatibility.json().get("compatibilityLevel") if compatibility.status == 200 else None
        for version in sorted(registry.get(path).json()):
            found = registry.get(f"{path}/{version}").json()
            kept = {key: found.get(key) for key in ("subject", "version", "id", "schemaType", "schema", "references")}
            write(json.dumps({**kept, "compatibility": level}, sort_keys=True).encode() + b"\n")
            count += 1
    return count


def read_subjects(saved: Saved) -> Iterator[dict[str, Any]]:
    """Raises CorruptionError."""
    for number, line in enumerate(saved.part(SUBJECTS).read_bytes().splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise CorruptionError(f"line {number} of the subjects cannot be read", where=saved.backup_id) from None


def _users(kafka: Kafka, admin: Any, said: Said) -> dict[str, list[str]]:
    """The names of SCRAM users, with their mechanisms. Their passwords cannot be read."""
    with kafka.named(said, "users"), heard(admin):
        found = admin.describe_user_scram_credentials().result(kafka.timeout + 1)
    return {name: sorted(one.mechanism.name for one in user.scram_credential_infos) for name, user in found.items()}


def _admin_kinds() -> Any:
    """The nouns of the admin client, which does not say that it exports them."""
    import confluent_kafka.admin

    return confluent_kafka.admin


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _here(config: Mapping[str, str]) -> dict[str, str]:
    """What of a topic's settings a single broker can keep."""
    return {k: v for k, v in config.items() if k not in _NOT_HERE and not k.startswith("remote.")}


def _properties(place: Path, port: int, controller: int, password: str) -> Path:
    never = str(2**62)
    login = f'org.apache.kafka.common.security.plain.PlainLoginModule required username="sandbox" password="{password}" user_sandbox="{password}";'
    settings = {
        "node.id": "1",
        "process.roles": "broker,controller",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": f"1@{_HOST}:{controller}",
        "listeners": f"CLIENT://{_HOST}:{port},CONTROLLER://{_HOST}:{controller}",
        "listener.security.protocol.map": "CLIENT:SASL_PLAINTEXT,CONTROLLER:SASL_PLAINTEXT",
        "inter.broker.listener.name": "CLIENT",
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "sasl.mechanism.controller.protocol": "PLAIN",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:sandbox",
        "listener.name.client.plain.sasl.jaas.config": login,
        "listener.name.controller.plain.sasl.jaas.config": login,
        "log.dirs": str(place / "data"),
        "auto.create.topics.enable": "false",
        "message.max.bytes": str(1 << 30),
        "offsets.topic.num.partitions": "1",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        # Nothing may go by its age or be compacted while it is compared.
        "log.retention.check.interval.ms": never,
        "log.initial.task.delay.ms": never,
        "log.cleaner.backoff.ms": never,
    }
    file = place / "server.properties"
    file.touch(mode=0o600)
    file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    return file
