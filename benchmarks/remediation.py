"""From an alert to what is done about it, with the real daemon; and the sensors' memory over many ticks. Real servers, by the tests' rigs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import yaml

from benchmarks import decisions, events
from benchmarks.ground import timed
from benchmarks.measure import Comparison, Goal
from ops_platform.clients.processes import spawn, stop
from ops_platform.ledger import Ledger
from ops_platform.remediation.model import Incident, State
from ops_platform.remediation.store import Store
from tests import kafka_rig, prometheus_rig
from tests.rig import PASSWORD, Cluster, Ground, Platform, scratch

ROOT = Path(__file__).parents[1]
T = TypeVar("T")

# Moments of a reaction, in their order, as the part that ends with each is called.
PARTS = (
    "waiting for the sensor's tick",
    "the tick, until the incident stands",
    "until Dagster holds the run",
    "until the run has started",
    "until the action is applied",
)
FROM_TICK, REACTION = "from the begin of the tick on", "from alert visible to action applied"
_SLOW = "a run of Dagster is a process that imports everything anew, and this machine was busy"


@dataclass(frozen=True)
class Moments:
    """Of one reaction. `visible`: Alertmanager lists the alert; `tick`: the daemon began the one that saw it."""

    visible: datetime
    tick: datetime
    opened: datetime
    requested: datetime
    started: datetime
    applied: datetime

    def parts(self) -> dict[str, float]:
        """Seconds, by PARTS and the two sums."""
        at = (self.visible, self.tick, self.opened, self.requested, self.started, self.applied)
        found = {name: (end - begin).total_seconds() for name, (begin, end) in zip(PARTS, pairwise(at), strict=True)}
        found[FROM_TICK] = (self.applied - self.tick).total_seconds()
        found[REACTION] = (self.applied - self.visible).total_seconds()
        return found


def reaction(rounds: int) -> Comparison:
    from sensors.remediation import ALERTS_EVERY

    found = Comparison(
        "reaction",
        "from an alert to the action against what it is about",
        "seconds",
        "A session of the application holds a lock; the alert about it is in a real Alertmanager; Dagster's daemon with its queue and its run "
        f"launcher sees it by the sensor `alerts` (every {ALERTS_EVERY} s), and a run ends the session. Moments are those that Alertmanager, "
        "Dagster's storage, the incident and the ledger hold. The alerts begin at moments spread over the sensor's interval.",
        [Goal(f"the sensor's interval + < 10 s, so < {ALERTS_EVERY + 10} s", REACTION, most=ALERTS_EVERY + 10.0, if_missed=_SLOW),
         Goal("from the tick on < 10 s", FROM_TICK, most=10.0, if_missed=_SLOW)],
    )  # fmt: skip
    with _scene() as scene:
        for number in range(rounds):
            found.load.append(os.getloadavg()[0])
            # The session has to be idle for a second before it counts as forgotten.
            time.sleep(1.5 + ALERTS_EVERY * number / rounds)
            for name, seconds in scene.react(number).parts().items():
                found.add(name, seconds)
    return found


@dataclass
class _Scene:
    """A database with an application, an Alertmanager, and Dagster's daemon over them."""

    cluster: Cluster
    manager: prometheus_rig.Alertmanager
    store: Store
    instance: Any
    log: Path

    def react(self, number: int) -> Moments:
        where = f"host=127.0.0.1 port={self.cluster.port} dbname=postgres user=shop password=shop application_name=shop"
        labels = {"alertname": "IdleInTransaction", "instance": "app-db", "round": str(number)}
        with contextlib.closing(psycopg.connect(where)) as session:
            session.execute("lock table stock in access exclusive mode")
            time.sleep(1.5)
            self.manager.fire(labels)
            self._until(lambda: any(one["labels"] == labels for one in self.manager.alerts()))
            visible = datetime.now(UTC)
            incident = self._until(lambda: self._in(labels, State.VERIFYING, State.CLOSED, State.ESCALATED))
            moments = self._moments(visible, incident)
        self.manager.resolve(labels)
        self._until(lambda: self._in(labels, State.CLOSED))
        return moments

    def _in(self, labels: Mapping[str, str], *states: State) -> Incident | None:
        found = (one for one in self.store.list(all_=True) if one.signal.labels == labels)
        return next((one for one in found if one.state in states), None)

    def _moments(self, visible: datetime, incident: Incident) -> Moments:
        import dagster as dg

        from jobs.remediation import INCIDENT_TAG

        (record,) = self.instance.get_run_records(dg.RunsFilter(tags={INCIDENT_TAG: incident.id}))
        applied = self.store.ledger.entries(kind="action.outcome", since=visible)
        if not applied:
            raise RuntimeError(f"nothing was applied: {incident.state}: {incident.reason}")
        tick = self._until(lambda: self._tick(record.dagster_run.run_id))
        started = datetime.fromtimestamp(record.start_time, UTC)
        return Moments(
            visible, tick, incident.opened_at, record.create_timestamp.astimezone(UTC), started, applied[0].at
        )

    def _tick(self, run_id: str) -> datetime | None:
        """When the tick of `alerts` that asked for the run began."""
        for state in self.instance.all_instigator_state():
            if state.instigator_name == "alerts":
                for tick in self.instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=20):
                    if run_id in tick.run_ids:
                        return datetime.fromtimestamp(tick.timestamp, UTC)
        return None

    def _until(self, what: Callable[[], T | None], seconds: float = 300) -> T:
        """A look every fifth of a second: often enough for what waits, and seldom enough not to be what is measured."""
        deadline = time.monotonic() + seconds
        while True:
            if found := what():
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"waited for too long; the daemon says:\n{self.log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.2)


@contextmanager
def _scene() -> Generator[_Scene]:
    from dagster import DagsterInstance

    from tests.e2e.test_remediation import platform_of

    with contextlib.ExitStack() as stack:
        home, cluster = _folder(stack), _cluster(stack)
        ground = Ground()
        stack.callback(ground.close)
        manager = stack.enter_context(prometheus_rig.alertmanager())
        cluster.sql("create role shop login password 'shop'; create table stock (id int); grant all on stock to shop")

        def new_platform(clusters: Mapping[str, list[Cluster]], **more: Any) -> Platform:
            made = Platform(ground, clusters, **more)
            stack.callback(made.close)
            return made

        system = {"id": "alerts", "kind": "alertmanager", "urls": [manager.url], "settled_after": "1s"}
        rule = {"alert": ["alertname=IdleInTransaction"], "cooldown": "0s", "budget": {"count": 1000, "per": "1h"}}
        platform = platform_of(
            new_platform, cluster, rule, [system], alertmanagers=["alerts"], budget={"count": 1000, "per": "1h"}
        )
        instance = stack.enter_context(_daemon(platform, home))
        store = Store(stack.enter_context(Ledger(platform.access.platform_db)))
        yield _Scene(
            cluster, manager, store, stack.enter_context(DagsterInstance.from_config(str(instance))), home / "log"
        )


@contextmanager
def _daemon(platform: Platform, home: Path) -> Iterator[Path]:
    """`dagster-daemon` with the queue, the monitoring and the retries of deploy/dagster.yaml, and Dagster's own launcher and storage."""
    config = yaml.safe_load((ROOT / "deploy/dagster.yaml").read_text())
    del config["storage"]
    (home / "dagster.yaml").write_text(yaml.safe_dump(config))
    env = {**platform.env, "DAGSTER_HOME": str(home), "PYTHONPATH": str(ROOT)}
    process = spawn(
        [sys.executable, "-m", "dagster._daemon", "run", "-m", "ops_platform.definitions"], home / "log", env=env
    )
    try:
        yield home
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # runs are its children
        stop(process, signal.SIGKILL)


# Memory

_SYSTEMS = 20  # each tick reads the inventory, and it is not how long that takes that is measured


def memory_sides(count: int) -> tuple[str, str, str]:
    return f"ours, after {count:,} ticks", f"after {count // 2:,} ticks", f"after {count // 10:,} ticks"


def sensor_memory(count: int) -> Comparison:
    last, half, first = memory_sides(count)
    found = Comparison(
        "sensor-memory",
        f"resident memory of a process that evaluates the sensors {count:,} times",
        "MiB",
        "The sensors `alerts`, `events` and `incidents` in turn, in one process, against a real Alertmanager, Kafka and PostgreSQL, while alerts begin "
        "and end and events arrive. Each tick reads the inventory and opens its connections anew, as it does in Dagster.",
        [
            Goal("flat: within 5 %", last, first, most=1.05),
            Goal("flat in the second half: within 2 %", last, half, most=1.02),
        ],
    )  # fmt: skip
    found.load.append(os.getloadavg()[0])
    with _sources() as (file, stirred):
        task = f'{{"do": "ticks", "count": {count}}}'
        env = {**os.environ, "OPS_INVENTORY": str(file), "PYTHONPATH": str(ROOT)}
        ran = timed([sys.executable, "-m", "benchmarks.child", task], env=env)
        if not stirred():
            raise RuntimeError("nothing began or ended meanwhile")
    levels: list[float] = ran.said["levels"]
    found.add(first, levels[0])
    found.add(half, levels[4])
    found.add(last, levels[-1])
    found.notes.append(f"MiB after each tenth: {', '.join(f'{level:.1f}' for level in levels)}.")
    found.notes.append(f"{ran.seconds / count * 1000:.0f} ms for each tick; {ran.said['failed']} of them failed.")
    return found


@contextmanager
def _sources() -> Generator[tuple[Path, Callable[[], int]]]:
    """An inventory over sources in which something happens all the time; and how often it has."""
    with contextlib.ExitStack() as stack:
        home, cluster = _folder(stack), _cluster(stack)
        manager = stack.enter_context(prometheus_rig.alertmanager())
        kafka = stack.enter_context(kafka_rig.cluster())
        topic, letters = kafka.create_topic(partitions=events.PARTITIONS), kafka.create_topic()
        file = home / "platform.yaml"
        file.write_text(yaml.safe_dump(_inventory(home, cluster, manager.url, kafka.brokers[0].port, topic, letters)))
        stop_, done = threading.Event(), [0]

        def stir() -> None:
            producer = kafka.producer()
            labels = [
                {
                    "alertname": f"MemoryFilling{n % decisions.RULE_COUNT}",
                    "service": f"cache-{n % _SYSTEMS}",
                    "instance": f"node-{n}",
                    "severity": "page",
                }
                for n in range(200)
            ]
            while not stop_.wait(0.5):
                half = labels[done[0] % 2 :: 2]
                (manager.fire if done[0] % 4 < 2 else manager.resolve)(*half)
                for number in range(5):
                    attributes, data = events.event(5 * done[0] + number)
                    producer.produce(topic, events.structured_mode(attributes, data), headers=events.STRUCTURED)
                producer.flush(10)
                done[0] += 1

        thread = threading.Thread(target=stir, daemon=True)
        thread.start()
        stack.callback(thread.join, 30)
        stack.callback(stop_.set)
        yield file, lambda: done[0]


def _inventory(home: Path, cluster: Cluster, alerts: str, kafka: int, topic: str, letters: str) -> dict[str, Any]:
    (home / "password").write_text(PASSWORD)
    (home / "password").chmod(0o600)
    cluster.sql("alter database postgres owner to ops_backup")
    body = decisions.fleet(_SYSTEMS)
    body["platform"]["database"] = {
        "host": "127.0.0.1", "port": cluster.port, "dbname": "postgres", "user": "ops_backup",
        "password": f"file://{home}/password", "tls": {"mode": "disable"},
    }  # fmt: skip
    common = {"environment": "production", "owner": "team"}
    body["systems"] += [
        {"id": "alerts", "kind": "alertmanager", "urls": [alerts], "settled_after": "1s", **common},
        {"id": "events", "kind": "kafka", "bootstrap": [{"host": "127.0.0.1", "port": kafka}], "tls": False, **common},
    ]
    remediation = body["remediation"]
    remediation["rules"] = [{**rule, "firing_for": "0s"} for rule in remediation["rules"]]
    remediation["alertmanagers"] = ["alerts"]
    remediation["events"] = [{"kafka": "events", "topics": [topic], "dead_letter": letters, "start": "earliest"}]
    return body


# Both


def _folder(stack: contextlib.ExitStack) -> Path:
    made = scratch("ops-bench-")
    stack.callback(shutil.rmtree, made, ignore_errors=True)
    return made


def _cluster(stack: contextlib.ExitStack) -> Cluster:
    made = Cluster(18, _folder(stack))
    stack.callback(made.stop)
    return made
