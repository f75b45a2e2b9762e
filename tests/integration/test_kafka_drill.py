"""The Kafka drill on three real brokers: one is killed, another leads, no acknowledged record is lost, and all is replicated again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from threading import Timer

import pytest

from ops_platform.clients import kafka as client
from ops_platform.drills.engine import Engine
from ops_platform.drills.model import Ending
from ops_platform.drills.steps import kafka as steps
from ops_platform.errors import OpsError
from tests.drill_rig import Bench, measured, passed, preflight, preflight_elsewhere, supervised
from tests.kafka_rig import HOST, Broker, Kafka
from tests.kafka_wire import metadata
from tests.rig import Cluster, eventually


@pytest.fixture
def bench(shared_cluster: Cluster, kafka_cluster: Kafka) -> Iterator[Bench]:
    with ExitStack() as stack:
        made = Bench(shared_cluster, stack)
        events = {
            "id": "events", "kind": "kafka", "environment": "test", "owner": "team", "tls": False, "timeout": "5s",
            "bootstrap": [{"host": "127.0.0.1", "port": one.port} for one in kafka_cluster.brokers],
        }  # fmt: skip
        made.body["systems"].append(events)
        budget = {"unavailability": {"most": "10m"}, "targets": ["events"], "mode": "enforce"}
        made.body["drills"]["plan"].append({"id": "broker", "runbook": "kafka-broker-loss-drill", **budget})
        yield made


def test_a_killed_broker_costs_seconds_and_no_acknowledged_record(bench: Bench, kafka_cluster: Kafka) -> None:
    """Before it, what refuses it: a topic that would take no more writes; after it, replicas that are behind."""
    lonely = kafka_cluster.create_topic(replicas=1)
    assert lonely in preflight(bench, "broker")
    eventually(lambda: preflight(bench, "broker", fragile=True) == "", why="Kafka's own topics are not in sync again")
    why = preflight_elsewhere(bench, "broker", kafka_cluster.brokers[1].port, fragile=True)
    assert why.startswith("here: ")
    assert "127.0.0.1 is another machine's address" in why
    kafka_cluster.delete_topic(lonely)

    away: list[int] = []

    def replaced() -> bool:
        away[:] = [b.number for b in kafka_cluster.brokers if not b.daemon.alive]
        return not set(away) & kafka_cluster.known()

    with supervised([one.daemon for one in kafka_cluster.brokers], replaced):
        card = passed(bench.drill("broker", seconds_before=1))
    found = measured(card)
    assert found["errors"] > 0
    assert found["rpo"] == found["lost"] == 0
    assert 0 < found["detection"] <= found["promotion"]
    assert found["replicated"] > found["promotion"]
    kinds = {r.kind for r in card.teardown}
    assert kinds == {"topic", "consumer group", "directory", "process", "injected"}
    assert all(r.gone for r in card.teardown)
    assert bench.remains() == []
    reader = next(probe for probe in card.probes if probe.step == "reader")
    assert reader.attempts > reader.failed
    assert ours(kafka_cluster) == []

    topic = kafka_cluster.create_topic()
    try:
        kafka_cluster.kill(1)
        why = eventually(
            lambda: next((said for said in [preflight(bench, "broker")] if "1 would be left of 2" in said), ""),
            why="it is not refused",
        )
        assert "under-replicated partitions: " in why
    finally:
        kafka_cluster.restart(1)
        kafka_cluster.delete_topic(topic)
    assert len(bench.engine.store.list()) == 1


# One for each thing that it makes or breaks; the last one is not killed.
KILLED = (
    ("kafka.write", "registered topic"),
    ("kafka.read", "ended"),
    ("kafka.break_broker", "registered frozen"),
)


def test_a_broker_that_hangs_is_replaced_and_a_drill_killed_at_any_of_its_steps_leaves_no_topic_and_no_group(
    bench: Bench, kafka_cluster: Kafka
) -> None:
    def hold(engine: Engine) -> None:
        begun = bench.begin(engine, "broker", seconds_before=0.1, how="freeze", fragile=True)
        assert begun.drill is not None, [r.reason for r in begun.result.rulings if not r.allows]
        engine.run(begun.drill.id)

    for does, moment in KILLED:
        eventually(lambda: preflight(bench, "broker", fragile=True) == "", why="a partition is not in sync")
        assert bench.killed_when(does, moment, hold), f"{does} {moment}"
        bench.sweep()
        assert bench.remains() == [], f"{does} {moment}"
        assert ours(kafka_cluster) == []
    eventually(lambda: preflight(bench, "broker", fragile=True) == "", why="a partition is not in sync")
    card = passed(bench.drill("broker", seconds_before=1, how="freeze", fragile=True))
    found = measured(card)
    assert found["errors"] > 0
    assert found["rpo"] == found["lost"] == 0
    assert [r.gone for r in card.teardown if r.kind == "frozen"] == [True]
    assert ours(kafka_cluster) == []
    assert {drill.ending for drill in bench.engine.store.list()} == {Ending.LOST, Ending.COMPLETED}


def test_a_broker_that_hung_and_goes_on_is_not_taken_at_its_word(kafka_cluster: Kafka) -> None:
    """It thinks that it leads, with every replica in sync and the end of then, until it hears of more: here only once the others go on."""
    topic = kafka_cluster.create_topic()
    old = kafka_cluster.leader(topic)
    hung, others = kafka_cluster.broker(old), [b for b in kafka_cluster.brokers if b.number != old]
    kafka_cluster.produce(topic, "0", "1")
    with ExitStack() as thawed:
        frozen(thawed, [hung])
        eventually(
            lambda: {metadata(b.port, topic).partitions[0].leader for b in others} - {old, -1}, why="nobody leads"
        )
        kafka_cluster.produce(topic, "2", "3")
        again = frozen(thawed, others)
        hung.daemon.resume()
        mine = metadata(hung.port, topic).partitions[0]
        assert (mine.leader, set(mine.in_sync)) == (old, {1, 2, 3})
        cluster = client.Kafka("events", [(HOST, hung.port)], tls=False, timeout=3)
        there, said = steps._all_there(cluster, old)
        assert not there
        assert "does not answer" in said
        with pytest.raises(OpsError):
            steps._end(cluster, topic)
        cluster.timeout = 20
        later = Timer(1, again.close)
        later.start()
        try:
            assert steps._numbers(cluster, topic) == [0, 1, 2, 3]
            # Asked again, it passes over its own record of before.
            assert steps._numbers(cluster, topic) == [0, 1, 2, 3]
        finally:
            later.join()
    eventually(lambda: steps._all_there(cluster, old)[0], why=lambda: steps._all_there(cluster, old)[1])


def frozen(held: ExitStack, brokers: list[Broker]) -> ExitStack:
    """They hang until what is given back is closed, and no longer than `held`."""
    mine = held.enter_context(ExitStack())
    for broker in brokers:
        broker.daemon.pause()
        mine.callback(broker.daemon.resume)
    return mine


def ours(kafka: Kafka) -> list[str]:
    """Topics and groups of drills."""
    admin = kafka.admin
    topics = list(admin.list_topics(timeout=30).topics)
    groups = [group.group_id for group in admin.list_consumer_groups().result(30).valid]
    return [name for name in (*topics, *groups) if name.startswith("ops-drill-")]
