"""Playbooks of Kafka on real brokers: one, and a cluster of three."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AclOperation, ConfigResource, ConfigSource, ResourceType

from ops_platform.actions import CountLimit, Outcome, Status
from ops_platform.errors import AccessDeniedError, NotThereError, OpsError, RefusedError, UnreachableError, UsageError
from ops_platform.inventory.model import Mode
from ops_platform.remediation.playbook import Playbook, playbook
from ops_platform.remediation.playbooks.kafka.shared import Desk
from tests.integration.incident_rig import solved
from tests.integration.systems_rig import Bench, Between, KilledError, bench, killed, outcomes
from tests.kafka_rig import HOST, PASSWORD, Kafka
from tests.rig import Cluster, eventually

ELECT, CUT, SKIP = (
    playbook(f"kafka.{name}") for name in ("elect_preferred_leaders", "cut_retention", "skip_poison_record")
)
DAY = 86_400_000


class Sites:
    """Benches of a user who may do what was granted, and nothing else."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        self._cluster, self._stack = cluster, stack

    def bench(self, kafka: Kafka, user: str = "", **system: Any) -> Bench:
        """In plain text whoever comes is the superuser; a user comes over TLS with a password."""
        login = {"tls": True, "ca": str(kafka.ca), "sasl": _sasl(user)} if user else {"tls": False}
        ports = [broker.sasl_port if user else broker.port for broker in kafka.brokers]
        body = {
            "kind": "kafka", "bootstrap": [{"host": HOST, "port": port} for port in ports], "timeout": "10s",
            **login, **system,
        }  # fmt: skip
        return self._stack.enter_context(bench(self._cluster, body, files={"password": PASSWORD}))

    def user(self, kafka: Kafka) -> str:
        name = f"ops-{secrets.token_hex(4)}"
        kafka.add_user(name)
        return name


def _sasl(user: str) -> dict[str, str]:
    return {"mechanism": "SCRAM-SHA-512", "user": user, "password": "file://{inventory}/password"}


@pytest.fixture
def sites(shared_cluster: Cluster) -> Iterator[Sites]:
    with ExitStack() as stack:
        yield Sites(shared_cluster, stack)


def said_of(run: Any) -> str:
    """Why it did not succeed, wherever that shows."""
    try:
        result = run()
    except OpsError as error:
        return str(error)
    assert not result.ok
    return " ".join(applied.reason for _, applied in result.outcomes)


# Preferred leaders


@pytest.fixture
def led(kafka_cluster: Kafka) -> Iterator[tuple[Kafka, str]]:
    """A topic of three partitions, one of which another broker leads since its own was away."""
    topic = kafka_cluster.create_topic(partitions=3)
    away = kafka_cluster.leader(topic, 0)
    kafka_cluster.kill(away)
    eventually(lambda: kafka_cluster.leader(topic, 0) not in (away, -1))
    kafka_cluster.restart(away)
    eventually(lambda: all(len(kafka_cluster.in_sync(topic, number)) == 3 for number in range(3)))
    yield kafka_cluster, topic
    kafka_cluster.delete_topic(topic)


def leaders(kafka: Kafka, topic: str) -> list[int]:
    return [kafka.leader(topic, number) for number in range(3)]


def test_partitions_are_led_by_their_preferred_replicas_again(led: tuple[Kafka, str], sites: Sites) -> None:
    kafka, topic = led
    user = sites.user(kafka)
    kafka.grant(user, AclOperation.DESCRIBE, topic=topic)
    kafka.grant(user, AclOperation.ALTER)
    it = sites.bench(kafka, user)
    result = it.run(ELECT, topics=[topic])
    assert result.status is Status.DONE, result.as_json()
    moved = [change for change, _ in result.outcomes]
    assert [change.object for change in moved] == [f"{topic}/0"]
    assert leaders(kafka, topic)[0] == moved[0].after["leader"] != moved[0].before["leader"]
    assert result.plan.population == {"partition": 3}
    assert it.run(ELECT, topics=[topic]).status is Status.NOTHING


def test_without_names_every_topic_is_looked_at(led: tuple[Kafka, str], sites: Sites) -> None:
    kafka, topic = led
    it = sites.bench(kafka)
    plan = it.action(ELECT).plan()
    assert f"{topic}/0" in [change.object for change in plan.changes]
    assert it.go(it.action(ELECT), CountLimit(0, "partition")).status is Status.REFUSED
    assert it.go(it.action(ELECT), mode=Mode.OBSERVE).status is Status.OBSERVED
    ours = next(change for change in plan.changes if change.object == f"{topic}/0")  # other tests have topics here, too
    assert leaders(kafka, topic)[0] == ours.before["leader"]


def test_a_preferred_replica_that_is_not_in_sync_is_not_elected(kafka_cluster: Kafka, sites: Sites) -> None:
    topic = kafka_cluster.create_topic(partitions=3)
    away = kafka_cluster.leader(topic, 0)
    kafka_cluster.kill(away)
    eventually(lambda: kafka_cluster.leader(topic, 0) not in (away, -1))
    it = sites.bench(kafka_cluster)
    plan = it.action(ELECT, topics=[topic]).plan()
    assert plan.changes == ()
    assert f"{topic}/0" in plan.facts["preferred_not_in_sync"]
    kafka_cluster.restart(away)
    kafka_cluster.delete_topic(topic)


def test_a_replica_that_fell_out_of_sync_after_the_plan_is_not_elected(led: tuple[Kafka, str], sites: Sites) -> None:
    kafka, topic = led
    it = sites.bench(kafka)
    action = it.action(ELECT, topics=[topic])
    preferred = action.plan().changes[0].after["leader"]

    def lose() -> None:
        kafka.kill(preferred)
        eventually(lambda: preferred not in kafka.in_sync(topic, 0))

    result = it.go(Between(action, planned=lose))
    kafka.restart(preferred)
    assert outcomes(result) == [(f"{topic}/0", Outcome.REFUSED)]


def test_who_leads_meanwhile_is_already_done(led: tuple[Kafka, str], sites: Sites) -> None:
    kafka, topic = led
    it = sites.bench(kafka)
    first = it.action(ELECT, topics=[topic])
    (change,) = first.plan().changes
    result = it.go(Between(it.action(ELECT, topics=[topic]), planned=lambda: first.apply(change)))
    assert (result.status, outcomes(result)) == (Status.DONE, [(f"{topic}/0", Outcome.ALREADY_DONE)])


@pytest.mark.parametrize("killing", ["before", "after"])
def test_a_killed_election_is_made_again(led: tuple[Kafka, str], sites: Sites, killing: str) -> None:
    kafka, topic = led
    it = sites.bench(kafka)
    with pytest.raises(KilledError):
        it.go(Between(it.action(ELECT, topics=[topic]), **{killing: killed}))
    eventually(lambda: it.action(ELECT, topics=[topic]).plan().changes == () or killing == "before")
    assert it.run(ELECT, topics=[topic]).status is (Status.DONE if killing == "before" else Status.NOTHING)


def test_peers_are_the_replicas_in_sync(led: tuple[Kafka, str], sites: Sites) -> None:
    kafka, topic = led
    it = sites.bench(kafka)
    peers = ELECT.peers(it.context(ELECT, topics=[topic]))
    assert peers is not None
    assert (peers.healthy, peers.total) == (2, 2)
    assert ELECT.min_healthy(it.context(ELECT)) == 1


def test_missing_rights_to_elect_are_named(led: tuple[Kafka, str], sites: Sites) -> None:
    kafka, topic = led
    user = sites.user(kafka)
    it = sites.bench(kafka, user)
    assert f"allow our user Describe on topic {topic}" in said_of(lambda: it.run(ELECT, topics=[topic]))
    assert "allow our user Describe on the topics" in said_of(lambda: it.run(ELECT))
    kafka.grant(user, AclOperation.DESCRIBE, topic=topic)
    assert "allow our user Alter on the cluster" in said_of(lambda: it.run(ELECT, topics=[topic]))


def test_a_topic_that_is_not_there_is_named(kafka: Kafka, sites: Sites) -> None:
    with pytest.raises(NotThereError, match="topic nowhere"):
        sites.bench(kafka).run(ELECT, topics=["nowhere"])


# Who cannot be asked

GIVEN: dict[str, dict[str, Any]] = {
    ELECT.name: {},
    CUT.name: {"topic": "t", "to": "1h"},
    SKIP.name: {"group": "g", "topic": "t", "partition": 0, "dead_letter": "d"},
}


@pytest.mark.parametrize("book", [ELECT, CUT, SKIP], ids=lambda book: book.name)
def test_a_cluster_that_is_away_is_never_nothing_to_do(book: Playbook[Any], sites: Sites, kafka: Kafka) -> None:
    it = sites.bench(kafka, bootstrap=[{"host": HOST, "port": 1}], timeout="2s")
    with pytest.raises(UnreachableError):
        it.run(book, **GIVEN[book.name])


@pytest.mark.parametrize("book", [ELECT, CUT, SKIP], ids=lambda book: book.name)
def test_a_refused_login_is_no_matter_of_rights(book: Playbook[Any], sites: Sites, kafka: Kafka) -> None:
    it = sites.bench(kafka, "nobody", timeout="5s")
    with pytest.raises(AccessDeniedError) as caught:
        it.run(book, **GIVEN[book.name])
    assert "check sasl" in str(caught.value)
    assert PASSWORD not in str(caught.value)


# Retention


def own(kafka: Kafka, topic: str, key: str) -> str | None:
    """The topic's own value; None where the brokers' default counts."""
    resource, admin = ConfigResource(ResourceType.TOPIC, topic), kafka.admin
    entry = admin.describe_configs([resource])[resource].result(30)[key]
    return entry.value if entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value else None


def cutter(kafka: Kafka, sites: Sites, topic: str, *operations: AclOperation) -> Bench:
    user = sites.user(kafka)
    kafka.grant(user, *(operations or (AclOperation.ALTER_CONFIGS,)), topic=topic)
    return sites.bench(kafka, user)


def test_a_topics_own_retention_is_cut_and_exactly_set_back(kafka: Kafka, sites: Sites) -> None:
    topic = kafka.create_topic(retention_ms=str(7 * DAY), retention_bytes="5000000000")
    it = cutter(kafka, sites, topic)
    given = {"topic": topic, "to": "2h", "to_bytes": "2GiB", "hold": "3h"}
    result = it.run(CUT, **given)
    assert result.status is Status.DONE, result.as_json()
    assert (own(kafka, topic, "retention.ms"), own(kafka, topic, "retention.bytes")) == ("7200000", str(2 << 30))
    assert result.outcomes[0][0].before == {"value": str(7 * DAY), "own": True}
    assert CUT.undo_after(it.context(CUT, **given)) == timedelta(hours=3)
    assert it.run(CUT, **given).status is Status.NOTHING
    back = it.undo(CUT, result.plan.changes, **given)
    assert back.status is Status.DONE, back.as_json()
    assert (own(kafka, topic, "retention.ms"), own(kafka, topic, "retention.bytes")) == (str(7 * DAY), "5000000000")
    assert it.undo(CUT, result.plan.changes, **given).status is Status.DONE
    assert (own(kafka, topic, "retention.ms"), own(kafka, topic, "retention.bytes")) == (str(7 * DAY), "5000000000")


def test_it_is_set_back_whatever_one_broker_says_of_it(
    kafka: Kafka, sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka.create_topic(retention_ms=str(7 * DAY))
    it = cutter(kafka, sites, topic)
    before = Desk(it.context(CUT, topic=topic, to="2h")).settings(topic)
    result = it.run(CUT, topic=topic, to="2h")
    assert result.status is Status.DONE, result.as_json()
    # As if a broker were asked that has not heard of the cut.
    monkeypatch.setattr(Desk, "settings", lambda *_: before)
    assert it.undo(CUT, result.plan.changes, topic=topic, to="2h").status is Status.DONE
    eventually(lambda: own(kafka, topic, "retention.ms") == str(7 * DAY))


def test_a_topic_without_its_own_retention_has_none_afterwards(kafka: Kafka, sites: Sites) -> None:
    topic = kafka.create_topic()
    it = cutter(kafka, sites, topic)
    assert own(kafka, topic, "retention.ms") is None
    result = it.run(CUT, topic=topic, to="2h")
    assert result.status is Status.DONE, result.as_json()
    assert own(kafka, topic, "retention.ms") == "7200000"
    assert it.undo(CUT, result.plan.changes, topic=topic, to="2h").status is Status.DONE
    assert own(kafka, topic, "retention.ms") is None


def test_old_records_really_go(kafka: Kafka, sites: Sites) -> None:
    topic = kafka.create_topic(segment_ms="1000", retention_ms=str(7 * DAY))
    old = int((datetime.now(UTC) - timedelta(hours=5)).timestamp() * 1000)
    kafka.produce(topic, "old", timestamp=old)
    kafka.produce(topic, "young")
    result = sites.bench(kafka).run(CUT, topic=topic, to="2h")
    assert result.status is Status.DONE
    eventually(lambda: kafka.watermarks(topic)[0] >= 1)


def test_what_is_kept_for_less_already_is_nothing_to_do(kafka: Kafka, sites: Sites) -> None:
    topic = kafka.create_topic(retention_ms="3600000")
    assert sites.bench(kafka).run(CUT, topic=topic, to="2h").status is Status.NOTHING


@pytest.mark.parametrize("policy", ["compact", "compact,delete"])
def test_a_compacted_topic_is_never_cut(kafka: Kafka, sites: Sites, policy: str) -> None:
    topic = kafka.create_topic(cleanup_policy=policy)
    with pytest.raises(RefusedError, match=r"cleanup\.policy compact"):
        sites.bench(kafka).run(CUT, topic=topic, to="2h")


def test_a_topic_that_became_compacted_after_the_plan_is_not_cut(kafka: Kafka, sites: Sites) -> None:
    topic = kafka.create_topic()
    it = sites.bench(kafka)
    action = Between(
        it.action(CUT, topic=topic, to="2h"), planned=lambda: kafka.configure_topic(topic, cleanup_policy="compact")
    )
    result = it.go(action)
    assert (result.status, outcomes(result)[0][1]) == (Status.FAILED, Outcome.FAILED)
    assert own(kafka, topic, "retention.ms") is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"to": "30m"}, "shorter than minimum"),
        ({"to_bytes": "1MiB"}, "smaller than minimum_bytes"),
        ({}, "give to, to_bytes or both"),
        ({"to_bytes": "2GiB", "readers": ["g"]}, "readers goes with"),
    ],
)
def test_bounds_are_part_of_the_parameters(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CUT.read_parameters({"topic": "t", **given})


def test_what_a_reader_has_not_read_is_not_cut(kafka: Kafka, sites: Sites) -> None:
    topic, group = kafka.create_topic(partitions=2), f"group-{secrets.token_hex(4)}"
    old = int((datetime.now(UTC) - timedelta(hours=5)).timestamp() * 1000)
    kafka.produce(topic, "a", "b", timestamp=old)
    kafka.produce(topic, "c")
    user = sites.user(kafka)
    kafka.grant(user, AclOperation.DESCRIBE, AclOperation.ALTER_CONFIGS, topic=topic)
    it = sites.bench(kafka, user)
    given = {"topic": topic, "to": "2h", "readers": [group]}
    # A broker's first group waits until the topic for offsets is made.
    eventually(lambda: f"allow our user Describe on group {group}" in said_of(lambda: it.run(CUT, **given)))
    kafka.grant(user, AclOperation.DESCRIBE, group=group)
    with pytest.raises(RefusedError, match=f"the group {group} has read up to None, and everything below 2"):
        it.run(CUT, **given)
    kafka.commit(group, topic, 1)
    with pytest.raises(RefusedError, match="has read up to 1"):
        it.run(CUT, **given)
    kafka.commit(group, topic, 2)
    result = it.go(Between(it.action(CUT, **given), planned=lambda: kafka.commit(group, topic, 1)))
    assert result.status is Status.FAILED
    assert own(kafka, topic, "retention.ms") is None
    kafka.commit(group, topic, 2)
    assert it.run(CUT, **given).status is Status.DONE


def test_a_retention_that_somebody_sets_meanwhile_is_left_alone(kafka: Kafka, sites: Sites) -> None:
    topic = kafka.create_topic(retention_ms=str(7 * DAY))
    it = sites.bench(kafka)

    def somebody(value: int) -> None:
        kafka.configure_topic(topic, retention_ms=str(value))
        eventually(lambda: own(kafka, topic, "retention.ms") == str(value))

    result = it.go(Between(it.action(CUT, topic=topic, to="2h"), planned=lambda: somebody(3 * DAY)))
    assert (result.status, outcomes(result)[0][1]) == (Status.INCOMPLETE, Outcome.CONTENDED)
    done = it.run(CUT, topic=topic, to="2h")
    assert done.status is Status.DONE
    somebody(2 * DAY)
    back = it.undo(CUT, done.plan.changes, topic=topic, to="2h")
    assert (back.status, outcomes(back)[0][1]) == (Status.INCOMPLETE, Outcome.CONTENDED)
    assert own(kafka, topic, "retention.ms") == str(2 * DAY)


@pytest.mark.parametrize("killing", ["before", "after"])
def test_a_cut_that_was_killed_is_undone_exactly(kafka: Kafka, sites: Sites, killing: str) -> None:
    """The incident knows only that the change was begun."""
    topic = kafka.create_topic(retention_ms=str(7 * DAY))
    it = sites.bench(kafka)
    action = it.action(CUT, topic=topic, to="2h")
    changes = action.plan().changes
    with pytest.raises(KilledError):
        it.go(Between(action, **{killing: killed}))
    wanted = str(7 * DAY) if killing == "before" else "7200000"
    eventually(lambda: own(kafka, topic, "retention.ms") == wanted)
    assert it.undo(CUT, changes, topic=topic, to="2h").status is Status.DONE
    assert own(kafka, topic, "retention.ms") == str(7 * DAY)


@pytest.mark.parametrize(
    ("given", "missing"),
    [(AclOperation.DESCRIBE, "DescribeConfigs"), (AclOperation.DESCRIBE_CONFIGS, "AlterConfigs")],
)
def test_a_missing_right_to_cut_is_named(kafka: Kafka, sites: Sites, given: AclOperation, missing: str) -> None:
    topic = kafka.create_topic(retention_ms=str(7 * DAY))
    it = cutter(kafka, sites, topic, given)
    assert f"allow our user {missing} on topic {topic}" in said_of(lambda: it.run(CUT, topic=topic, to="2h"))
    assert own(kafka, topic, "retention.ms") == str(7 * DAY)


# A poison record

POISON = b"\x00\xff not what was agreed"


class Stuck:
    """A group that stands before the second of three records, and nobody consumes."""

    def __init__(self, kafka: Kafka, sites: Sites) -> None:
        self.kafka, self.sites = kafka, sites
        self.topic, self.letters = kafka.create_topic(partitions=2), kafka.create_topic(partitions=2)
        self.group = f"group-{secrets.token_hex(4)}"
        kafka.produce(self.topic, "first", key="k", partition=1)
        kafka.produce(self.topic, POISON, key="k", partition=1, headers=[("trace", b"t1"), ("none", None)])
        kafka.produce(self.topic, "third", partition=1)
        eventually(self._commit)

    def _commit(self) -> bool:
        """The first group of a broker waits until the topic for offsets is made."""
        self.kafka.commit(self.group, self.topic, 1, partition=1)
        return (self.topic, 1) in self.kafka.committed(self.group)

    @property
    def given(self) -> dict[str, Any]:
        return {"group": self.group, "topic": self.topic, "partition": "1", "dead_letter": self.letters}

    @property
    def at(self) -> int:
        return self.kafka.committed(self.group)[self.topic, 1]

    def dead(self) -> list[Any]:
        return self.kafka.read(self.letters)

    def bench(self, *without: tuple[str, AclOperation]) -> Bench:
        """With exactly the rights of the playbook's documentation, but for some."""
        user = self.sites.user(self.kafka)
        rights = [
            ("topic", AclOperation.READ), ("group", AclOperation.READ), ("letters", AclOperation.READ),
            ("letters", AclOperation.WRITE),
        ]  # fmt: skip
        for what, right in rights:
            if (what, right) not in without:
                thing = {"group": self.group} if what == "group" else {"topic": getattr(self, what)}
                self.kafka.grant(user, right, **thing)
        return self.sites.bench(self.kafka, user)

    def member(self) -> Consumer:
        """Somebody consumes."""
        consumer = self.kafka.consumer(**{"group.id": self.group, "session.timeout.ms": 6000})
        consumer.subscribe([self.topic])
        eventually(lambda: consumer.poll(0.2) is not None or consumer.assignment())
        return consumer


@pytest.fixture
def stuck(kafka: Kafka, sites: Sites) -> Stuck:
    return Stuck(kafka, sites)


def test_the_record_goes_to_the_dead_letters_and_the_group_past_it(stuck: Stuck) -> None:
    it = stuck.bench()
    result = it.run(SKIP, **stuck.given)
    assert result.status is Status.DONE, result.as_json()
    assert stuck.at == 2
    (letter,) = stuck.dead()
    assert (letter.key, letter.value) == (b"k", POISON)
    headers = dict(letter.headers)
    assert (headers["trace"], headers["none"]) == (b"t1", None)
    assert headers["ops-dead-letter-topic"] == stuck.topic.encode()
    assert (headers["ops-dead-letter-partition"], headers["ops-dead-letter-offset"]) == (b"1", b"1")
    assert headers["ops-dead-letter-group"] == stuck.group.encode()
    assert [check.holds for check in result.verification.checks] == [True, True]
    assert "not what was agreed" not in it.written(result)


def test_an_alert_about_a_group_that_is_stuck_leads_to_a_closed_incident(stuck: Stuck, shared_cluster: Cluster) -> None:
    it = stuck.bench()
    solved(shared_cluster, it.access, SKIP.name, stuck.given, lambda: stuck.at == 1, secrets=[PASSWORD])
    assert (stuck.at, len(stuck.dead())) == (2, 1)


def test_it_can_be_undone_and_the_dead_letter_stays(stuck: Stuck) -> None:
    it = stuck.bench()
    result = it.run(SKIP, **stuck.given)
    back = it.undo(SKIP, result.plan.changes, **stuck.given)
    assert back.status is Status.DONE, back.as_json()
    assert (stuck.at, len(stuck.dead())) == (1, 1)
    assert it.undo(SKIP, result.plan.changes, **stuck.given).status is Status.NOTHING


def test_a_group_that_went_on_is_not_set_back(stuck: Stuck) -> None:
    it = stuck.bench()
    result = it.run(SKIP, **stuck.given)
    stuck.kafka.commit(stuck.group, stuck.topic, 3, partition=1)
    back = it.undo(SKIP, result.plan.changes, **stuck.given)
    assert (back.status, outcomes(back)[0][1], stuck.at) == (Status.INCOMPLETE, Outcome.CONTENDED, 3)


def test_a_group_with_consumers_is_left_alone(stuck: Stuck) -> None:
    it = stuck.bench()
    with closing(stuck.member()):
        with pytest.raises(RefusedError, match="stop its consumers"):
            it.run(SKIP, **stuck.given)
        assert (stuck.at, stuck.dead()) == (1, [])


def test_a_consumer_that_comes_after_the_plan_is_left_alone(stuck: Stuck) -> None:
    it = stuck.bench()
    came: list[Consumer] = []
    result = it.go(Between(it.action(SKIP, **stuck.given), planned=lambda: came.append(stuck.member())))
    assert outcomes(result)[0][1] is Outcome.FAILED
    assert "stop its consumers" in result.outcomes[0][1].reason
    came[0].close()
    assert (stuck.at, stuck.dead()) == (1, [])


def test_a_consumer_that_comes_at_the_last_moment_wins(stuck: Stuck) -> None:
    """Kafka itself refuses then; the dead letter stands, and is not written twice."""
    it = stuck.bench()
    came: list[Consumer] = []
    result = it.go(Between(it.action(SKIP, **stuck.given), before=lambda: came.append(stuck.member())))
    assert outcomes(result)[0][1] is Outcome.CONTENDED, result.as_json()
    came[0].close()
    assert (stuck.at, len(stuck.dead())) == (1, 1)
    eventually(lambda: it.run(SKIP, **stuck.given).status is Status.DONE)
    assert (stuck.at, len(stuck.dead())) == (2, 1)


def test_a_group_that_moved_after_the_plan_is_left_alone(stuck: Stuck) -> None:
    it = stuck.bench()
    action = it.action(SKIP, **stuck.given)
    result = it.go(Between(action, planned=lambda: stuck.kafka.commit(stuck.group, stuck.topic, 3, partition=1)))
    assert outcomes(result)[0][1] is Outcome.CONTENDED
    assert (stuck.at, stuck.dead()) == (3, [])


def test_killed_between_dead_letter_and_offset_it_writes_no_second_one(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = stuck.bench()
    action = it.action(SKIP, **stuck.given)
    with monkeypatch.context() as patched:
        patched.setattr(type(action), "move", lambda *_: killed())
        with pytest.raises(KilledError):
            it.go(action)
    assert (stuck.at, len(stuck.dead())) == (1, 1)
    assert it.run(SKIP, **stuck.given).status is Status.DONE
    assert (stuck.at, len(stuck.dead())) == (2, 1)


def test_killed_after_the_offset_it_skips_no_second_record(stuck: Stuck) -> None:
    it = stuck.bench()
    given = {**stuck.given, "offset": "1"}
    with pytest.raises(KilledError):
        it.go(Between(it.action(SKIP, **given), after=killed))
    assert it.run(SKIP, **given).status is Status.NOTHING
    assert (stuck.at, len(stuck.dead())) == (2, 1)


def test_another_record_than_the_named_one_is_not_skipped(stuck: Stuck) -> None:
    with pytest.raises(RefusedError, match="stands before the record 1 and not before 2"):
        stuck.bench().run(SKIP, **stuck.given, offset=2)
    assert (stuck.at, stuck.dead()) == (1, [])


def test_a_group_at_the_end_is_not_stuck(stuck: Stuck) -> None:
    stuck.kafka.commit(stuck.group, stuck.topic, 3, partition=1)
    assert stuck.bench().run(SKIP, **stuck.given).status is Status.NOTHING


def test_a_group_that_never_committed_is_refused(stuck: Stuck) -> None:
    with pytest.raises(RefusedError, match="committed nothing there"):
        stuck.bench().run(SKIP, **{**stuck.given, "partition": 0})


def test_a_record_that_expired_is_not_taken_for_another(stuck: Stuck) -> None:
    stuck.kafka.expire(stuck.topic, 2, partition=1)
    with pytest.raises(RefusedError, match="what stood at 1 has expired"):
        stuck.bench().run(SKIP, **stuck.given)
    assert stuck.at == 1


def test_records_that_no_consumer_sees_are_passed_over(kafka: Kafka, sites: Sites) -> None:
    """Of an aborted transaction nothing is delivered: the poison record is the next that is."""
    stuck = Stuck(kafka, sites)
    with kafka.transaction(abort=True) as producer:
        producer.produce(stuck.topic, b"aborted", partition=1)
    (offset,) = kafka.produce(stuck.topic, POISON, partition=1)
    kafka.commit(stuck.group, stuck.topic, 3, partition=1)
    assert offset > 3
    assert stuck.bench().run(SKIP, **stuck.given, offset=offset).status is Status.DONE
    assert stuck.at == offset + 1
    assert [letter.value for letter in stuck.dead()] == [POISON]


def test_a_dead_letter_topic_that_is_not_there_stops_it(stuck: Stuck) -> None:
    with pytest.raises((NotThereError, AccessDeniedError), match="nowhere"):
        stuck.bench().run(SKIP, **{**stuck.given, "dead_letter": "nowhere"})
    assert stuck.at == 1


def test_a_record_that_the_dead_letters_refuse_is_not_skipped(stuck: Stuck) -> None:
    stuck.kafka.configure_topic(stuck.letters, max_message_bytes="1000")
    (offset,) = stuck.kafka.produce(stuck.topic, b"x" * 100_000, partition=1)
    stuck.kafka.commit(stuck.group, stuck.topic, offset, partition=1)
    result = stuck.bench().run(SKIP, **stuck.given)
    assert result.status is Status.FAILED
    assert (stuck.at, stuck.dead()) == (offset, [])


def test_a_tombstone_is_a_record_too(stuck: Stuck) -> None:
    (offset,) = stuck.kafka.produce(stuck.topic, None, key="gone", partition=1)
    stuck.kafka.commit(stuck.group, stuck.topic, offset, partition=1)
    assert stuck.bench().run(SKIP, **stuck.given).status is Status.DONE
    assert [(letter.key, letter.value) for letter in stuck.dead()] == [(b"gone", None)]


@pytest.mark.parametrize(
    ("what", "right"),
    [
        ("topic", AclOperation.READ), ("group", AclOperation.READ), ("letters", AclOperation.READ),
        ("letters", AclOperation.WRITE),
    ],
)  # fmt: skip
def test_a_missing_right_to_skip_is_named(stuck: Stuck, what: str, right: AclOperation) -> None:
    it = stuck.bench((what, right))
    said = said_of(lambda: it.run(SKIP, **stuck.given))
    assert re.search(rf"allow our user {right.name.title()} on .*{getattr(stuck, what)}", said), said
    assert stuck.at == 1


@pytest.mark.parametrize("value", ["-1", "1.5", "one", True, None])
def test_a_partition_is_a_number(value: Any) -> None:
    with pytest.raises(UsageError, match="partition"):
        SKIP.read_parameters({"group": "g", "topic": "t", "partition": value, "dead_letter": "d"})


def rights_of(book: Playbook[Any]) -> Sequence[str]:
    return book.rights


def test_the_documented_rights_are_those_that_were_tried() -> None:
    assert rights_of(SKIP) == ("Read on the topic", "Read on the group", "Read and Write on the dead-letter topic")
    assert rights_of(ELECT) == ("Describe on the topics", "Alter on the cluster")
