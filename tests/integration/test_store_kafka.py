"""Kafka: topics, groups and records of a real broker, in another one again, compared record by record."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AclOperation
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.backup.opening import open_target_repository
from ops_platform.clients.kafka import Kafka
from ops_platform.clients.kafka_quotas import Quota, describe_quotas, set_quotas
from ops_platform.errors import AccessDeniedError, ConflictError, CorruptionError, NotThereError, UnreachableError
from ops_platform.recovery.model import Verdict
from ops_platform.stores.dump import run_backup
from ops_platform.stores.fetch import fetch_backup
from ops_platform.stores.kafka import KafkaStore, RestoredKafka, read_subjects
from ops_platform.stores.kafka_records import Record, packed, read_records
from ops_platform.stores.kind import Check, Saved
from tests import drill_rig, kafka_rig, stores_rig
from tests.registry_rig import Registry
from tests.rig import Cluster, Ground, Platform, eventually
from tests.services import maven
from tests.stores_rig import dump, gate, gates, prove, with_store


@pytest.fixture(scope="module")
def platform(ground: Ground, shared_cluster: Cluster) -> Iterator[Platform]:
    made = Platform(ground, {})
    made.body["platform"]["database"] = drill_rig.ledger_database(shared_cluster, made.home, "events")
    yield made
    made.close()
    shared_cluster.sql("drop database events with (force)")


def entry(kafka: kafka_rig.Kafka, platform: Platform, prefix: str) -> dict[str, Any]:
    hosts = [{"host": "127.0.0.1", "port": broker.port} for broker in kafka.brokers]
    programs = {"java": str(maven.java()), "kafka": str(maven.KAFKA.home())}
    return {
        "id": "events", "kind": "kafka", "tls": False, "bootstrap": hosts, "topics": [f"{prefix}*"], "records": [f"{prefix}-kept*"],
        "timeout": "30s", "sandbox": {"directory": str(platform.home), "programs": programs},
    }  # fmt: skip


@pytest.fixture
def prefix(kafka: kafka_rig.Kafka) -> str:
    """Topics of its own: a compacted one with tombstones, one with transactions, one of which no record is kept."""
    name = f"s{uuid.uuid4().hex[:8]}"
    kafka.create_topic(f"{name}-kept-state", partitions=2, cleanup_policy="compact", min_cleanable_dirty_ratio="1.0")
    for number in range(20):
        kafka.produce(
            f"{name}-kept-state",
            f"v{number}",
            key=f"k{number % 7}",
            partition=number % 2,
            timestamp=1_700_000_000_000 + number,
        )
    kafka.produce(f"{name}-kept-state", None, key="k1", partition=1, headers=[("why", "gone"), ("empty", None)])
    kafka.create_topic(f"{name}-kept-orders", retention_ms="86400000")
    kafka.produce(f"{name}-kept-orders", "first", "second")
    with kafka.transaction() as producer:
        producer.produce(f"{name}-kept-orders", "paid", partition=0)
    with kafka.transaction(abort=True) as producer:
        producer.produce(f"{name}-kept-orders", "taken back", partition=0)
    kafka.produce(f"{name}-kept-orders", "third", "fourth")
    kafka.create_topic(f"{name}-other", partitions=3, max_message_bytes="2000000")
    end = kafka.watermarks(f"{name}-kept-orders")[1]
    group, wanted = f"{name}-group", {(f"{name}-kept-orders", 0): end - 1}

    def commits() -> bool:
        kafka.commit(group, f"{name}-kept-orders", end - 1)
        return kafka.committed(group) == wanted

    eventually(commits, why="a coordinator that is coming up takes a commit and forgets it")
    return name


def test_topics_records_and_groups_are_the_same_in_another_broker(
    platform: Platform, kafka: kafka_rig.Kafka, prefix: str
) -> None:
    manifest = dump(platform, entry(kafka, platform, prefix))
    assert [part.name for part in manifest.parts] == ["records-0", "records-1", "records-2"]
    assert stores_rig.kind(platform, entry(kafka, platform, prefix)).look() == "3 topics"
    card = prove(platform, entry(kafka, platform, prefix))
    assert card.verdict is Verdict.PASS, card.reason
    assert gates(card) == {
        "whole": "passed", "age": "passed", "records": "passed", "topics": "passed", "records-0": "passed",
        "records-1": "passed", "records-2": "passed", "groups": "passed", "acls": "passed", "quotas": "passed", "users": "passed",
        "teardown": "passed",
    }  # fmt: skip
    # Compacted ones first; what a transaction took back is no record.
    assert gate(card, "records").result == "26 records of 3 partitions"
    assert gate(card, "records-2").result == "5 records are the same"


def test_a_drill_of_the_full_stack_restores_it_and_one_that_was_killed_leaves_no_broker(
    platform: Platform, kafka: kafka_rig.Kafka, prefix: str, shared_cluster: Cluster
) -> None:
    dump(platform, entry(kafka, platform, prefix))
    card = drill_rig.stack_of(platform, shared_cluster, "events", RestoredKafka)
    assert [(part.target, part.verdict) for part in card.stack] == [("events", "PASS")]


def test_rules_users_and_schemas_are_kept_and_come_back(
    platform: Platform, kafka: kafka_rig.Kafka, prefix: str, registry: Registry
) -> None:
    topic = f"{prefix}-kept-state"
    kafka.add_user(f"{prefix}-user")
    kafka.grant(f"{prefix}-user", AclOperation.READ, AclOperation.WRITE, topic=topic)
    quotas = [
        Quota(
            (("client-id", None), ("user", f"{prefix}-user")),
            (("producer_byte_rate", 1.5e6), ("request_percentage", 25.5)),
        ),
        Quota((("user", prefix),), (("consumer_byte_rate", 1024.0),)),
    ]
    set_quotas(platform.access.kafka(with_store(platform, entry(kafka, platform, prefix)).system), quotas)  # type: ignore[arg-type]
    schema = {"type": "record", "name": "State", "fields": [{"name": "of", "type": "string"}]}
    known = registry.register(f"{topic}-value", schema)
    kafka.produce(topic, b"\0" + known.to_bytes(4, "big") + b"\x02a", key="k")
    system = {**entry(kafka, platform, prefix), "registry": {"url": registry.url}}
    manifest = dump(platform, system)
    card = prove(platform, system)
    assert card.verdict is Verdict.PASS, card.reason
    assert gate(card, "schemas").result.endswith(", for 1 records")
    assert (gates(card)["acls"], gates(card)["users"], gates(card)["subjects"]) == ("passed", "passed", "passed")
    repository = stores_rig.repository(platform, system)
    saved = fetch_backup(repository, manifest, platform.home / "subjects")
    assert set(quotas) <= set(describe_quotas(platform.access.kafka(with_store(platform, system).system)))  # type: ignore[arg-type]
    assert ["user", prefix] in [pair for quota in saved.facts["quotas"] for pair in quota["entity"]]
    assert gates(card)["quotas"] == "passed"
    assert saved.facts["users"][f"{prefix}-user"] == ["SCRAM_SHA_512"]
    rules = [(rule[1], rule[3], rule[5]) for rule in saved.facts["acls"] if rule[1] == topic]
    assert rules == [(topic, f"User:{prefix}-user", "READ"), (topic, f"User:{prefix}-user", "WRITE")]
    [kept] = [one for one in read_subjects(saved) if one["subject"] == f"{topic}-value"]
    assert (kept["id"], json.loads(kept["schema"])) == (known, schema)
    # A record whose schema nobody has kept is bytes that nobody can read.
    kafka.produce(topic, b"\0" + (known + 1000).to_bytes(4, "big") + b"\x02a", key="k")

    class Sandboxless(KafkaStore):
        """The sandbox of before would say the same of all else."""

        def restore(self, saved: Saved, home: Path) -> Any:
            return nullcontext(OnlySchemas(saved, self.access.kafka(self.system)))

    target = with_store(platform, system)
    run_backup(platform.access, target)
    card = prove(platform, system, kind=Sandboxless(platform.access, target, target.system))  # type: ignore[arg-type]
    assert (card.verdict, gates(card)["schemas"]) == (Verdict.FAIL, "failed")
    assert gate(card, "schemas").result.startswith(f"schemas of records are not kept: {topic} at offset")


class OnlySchemas(RestoredKafka):
    def checks(self) -> Iterator[Check]:
        return (check for check in super().checks() if check.id == "schemas")


def test_rules_and_users_that_are_not_the_sources_fail(platform: Platform, kafka: kafka_rig.Kafka, prefix: str) -> None:
    """Against the source itself, as if it were the sandbox."""
    rule = ["TOPIC", "t", "LITERAL", "User:gone", "*", "READ", "ALLOW"]
    quota = {"entity": [["user", "gone"]], "limits": [["producer_byte_rate", 1.0]]}
    facts = {"acls": [rule], "users": {"gone": ["SCRAM_SHA_512"]}, "quotas": [quota], "records": [], "subjects": None}
    target = with_store(platform, entry(kafka, platform, prefix))
    restored = RestoredKafka(
        Saved("b", datetime.now(UTC), {}, facts, "Kafka"), platform.access.kafka(target.system)  # type: ignore[arg-type]
    )  # fmt: skip
    found = {check.id: check.ask() for check in restored.checks() if check.id in ("acls", "quotas", "users")}
    assert {name: finding.status.value for name, finding in found.items()} == dict.fromkeys(
        ("acls", "quotas", "users"), "failed"
    )
    assert "TOPIC t LITERAL User:gone * READ ALLOW" in found["acls"].result
    assert "gone" in found["users"].result


def test_quotas_are_read_over_tls_with_scram_and_a_refused_login_says_so(
    platform: Platform, kafka: kafka_rig.Kafka, prefix: str
) -> None:
    user = f"{prefix}-quotas"
    kafka.add_user(user)
    kafka.grant(user, AclOperation.DESCRIBE_CONFIGS)
    for name, word in (("right", kafka_rig.PASSWORD), ("wrong", "wrong")):
        (platform.home / name).touch(mode=0o600)
        (platform.home / name).write_text(word)

    def system(word: str, name: str = user) -> Any:
        host, _, port = kafka.sasl_bootstrap.rpartition(":")
        sasl = {"mechanism": "SCRAM-SHA-512", "user": name, "password": f"file://{platform.home}/{word}"}
        over = {"bootstrap": [{"host": host, "port": int(port)}], "tls": True, "ca": str(kafka.ca), "sasl": sasl}
        return platform.access.kafka(with_store(platform, {**entry(kafka, platform, prefix), **over}).system)  # type: ignore[arg-type]

    set_quotas(platform.access.kafka(with_store(platform, entry(kafka, platform, prefix)).system), [  # type: ignore[arg-type]
        Quota((("user", user),), (("consumer_byte_rate", 2048.0),))
    ])  # fmt: skip
    assert Quota((("user", user),), (("consumer_byte_rate", 2048.0),)) in describe_quotas(system("right"))
    with pytest.raises(AccessDeniedError):
        describe_quotas(system("wrong"))
    kafka.add_user(f"{user}-without")
    with pytest.raises(AccessDeniedError):
        describe_quotas(system("right", f"{user}-without"))
    with pytest.raises(UnreachableError, match="no broker answers"):
        describe_quotas(Kafka("nobody", [("127.0.0.1", 1)], tls=False))


def test_a_record_that_is_another_one_fails(platform: Platform, kafka: kafka_rig.Kafka, prefix: str) -> None:
    dump(platform, entry(kafka, platform, prefix))

    class Altered(KafkaStore):
        """The sandbox gets another record than the one that is compared."""

        def restore(self, saved: Saved, home: Path) -> Any:
            restored = super().restore(saved, home)

            class Context:
                def __enter__(self) -> Any:
                    found = restored.__enter__()
                    file = saved.part("records-2")
                    records = list(read_records(file))
                    changed = Record(records[0].offset, records[0].timestamp, b"other", records[0].value, ())
                    file.write_bytes(b"".join(map(packed, [changed, *records[1:]])))
                    return found

                def __exit__(self, *error: Any) -> Any:
                    return restored.__exit__(*error)

            return Context()

    target = with_store(platform, entry(kafka, platform, prefix))
    card = prove(platform, entry(kafka, platform, prefix), kind=Altered(platform.access, target, target.system))  # type: ignore[arg-type]
    assert card.verdict is Verdict.FAIL
    assert [name for name, status in gates(card).items() if status == "failed"] == ["records-2"]


@pytest.mark.parametrize("again", [True, False])
def test_a_topic_that_is_deleted_or_made_anew_during_the_dump_is_no_backup(
    platform: Platform, kafka: kafka_rig.Kafka, prefix: str, again: bool
) -> None:
    target = with_store(platform, entry(kafka, platform, prefix))
    before = len(open_target_repository(platform.access, target).infos())

    class Meanwhile(KafkaStore):
        asked = 0

        def _topics(self, *args: Any) -> Any:
            type(self).asked += 1
            if self.asked == 2:
                (kafka.recreate_topic if again else kafka.delete_topic)(f"{prefix}-kept-orders")
            return super()._topics(*args)

    # A broker that has not heard of it yet lists it still, and then does not know it.
    with pytest.raises((ConflictError, NotThereError), match=r"deleted or made anew|kept-orders"):
        run_backup(platform.access, target, kind=Meanwhile(platform.access, target, target.system))  # type: ignore[arg-type]
    assert len(open_target_repository(platform.access, target).infos()) == before


RECORDS = st.builds(
    Record, st.integers(0, 2**60), st.integers(-1, 2**60), st.none() | st.binary(max_size=30), st.none() | st.binary(max_size=30),
    st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5)), max_size=3).map(tuple),
)  # fmt: skip


@given(st.lists(RECORDS, max_size=5))
def test_records_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    file = tmp_path_factory.getbasetemp() / "records"
    whole = b"".join(map(packed, records))
    file.write_bytes(whole)
    assert list(read_records(file)) == records
    if records:
        file.write_bytes(whole[:-1])
        with pytest.raises(CorruptionError):
            list(read_records(file))
