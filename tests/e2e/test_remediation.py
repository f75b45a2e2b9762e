"""From the alert to the closed incident with nothing played: a real Alertmanager and Kafka, the real Dagster daemon, a real PostgreSQL.

A session of the application sits in a transaction and holds a lock; the alert (or the event) about it comes in; the daemon's sensors see
it, a run ends the session, sees that it helped, and everything stands in the ledger.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from dagster import DagsterInstance

from ops_platform.clients.processes import Process, spawn, stop
from ops_platform.ledger import Ledger
from ops_platform.remediation.model import Ending, Incident, State
from ops_platform.remediation.store import Store
from tests.integration.wal_rig import eventually
from tests.kafka_rig import Kafka
from tests.prometheus_rig import alertmanager
from tests.rig import PASSWORD, Cluster, Ground, Platform, scratch

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("remediation-e2e")]
ROOT = Path(__file__).parents[2]
RULE = {
    "id": "idle-sessions",
    "target": "app-db",
    "playbook": "postgres.end_idle_sessions",
    "parameters": {"older_than": "1s"},
    "mode": "enforce",
    "approval": "never",
}


@pytest.fixture
def daemon() -> Iterator[Any]:
    """Starts `dagster-daemon` over an inventory, in a DAGSTER_HOME of its own; ends whatever runs at the end."""
    home = scratch("ops-dagster-")
    running: list[Process] = []

    def start(platform: Platform, settings: str = "") -> Process:
        (home / "dagster.yaml").write_text(
            "telemetry: {enabled: false}\nrun_monitoring: {enabled: true, poll_interval_seconds: 5}\n" + settings
        )
        env = {**platform.env, "DAGSTER_HOME": str(home), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "dagster._daemon", "run", "-m", "ops_platform.definitions"]
        running.append(spawn(command, home / "daemon.log", env=env))
        return running[-1]

    start.home = home  # type: ignore[attr-defined]
    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # runs are its children
        stop(process, signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def blocked(shared_cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    """A session of the application that took a lock and then said nothing more."""
    shared_cluster.sql(
        "create role shop login password 'shop'; create table stock (id int); grant all on stock to shop"
    )
    connection = psycopg.connect(
        f"host=127.0.0.1 port={shared_cluster.port} dbname=postgres user=shop password=shop application_name=checkout"
    )
    connection.execute("lock table stock in access exclusive mode")
    yield connection
    connection.close()
    shared_cluster.sql("drop table stock; drop role shop")


def platform_of(
    new_platform: Any, cluster: Cluster, rule: Mapping[str, Any], systems: list[dict[str, Any]], **sources: Any
) -> Platform:
    """Rules over a target of which the login may end sessions; the platform's own database is beside it."""
    cluster.sql("grant pg_signal_backend to ops_backup")
    database = f"ops_{uuid.uuid4().hex[:12]}"
    with cluster.server.connect("postgres") as connection:
        connection.autocommit = True
        connection.execute(f"create database {database} owner ops_backup")
    platform: Platform = new_platform({"app-db": [cluster]}, platform={"name": "e2e"})
    platform.body["platform"]["database"] = {
        "host": "127.0.0.1", "port": cluster.port, "dbname": database, "user": "ops_backup",
        "password": f"file://{platform.home}/password", "tls": {"mode": "disable"},
    }  # fmt: skip
    platform.body["systems"] = [{"environment": "test", "owner": "team", **system} for system in systems]
    # An alert has to end; an event does not, and the playbook's own look says whether it helped.
    verify = {"verify": {"within": "3m", "every": "2s"}} if "alert" in rule else {}
    platform.body["remediation"] = {"rules": [{**RULE, **rule, **verify}], **sources}
    platform.reload()
    return platform


@contextlib.contextmanager
def store_of(platform: Platform) -> Iterator[Store]:
    with Ledger(platform.access.platform_db) as ledger:
        yield Store(ledger)


def closed(store: Store, home: Path) -> Incident:
    def look() -> Incident | None:
        found = store.list(all_=True)
        return next((one for one in found if one.state in (State.CLOSED, State.ESCALATED)), None)

    return eventually(
        look, seconds=240,
        why=lambda: f"{store.list(all_=True)}\n" + (home / "daemon.log").read_text(errors="replace")[-6000:],
    )  # fmt: skip


def test_an_alert_is_seen_acted_on_verified_and_recorded(
    ground: Ground, new_platform: Any, shared_cluster: Cluster, blocked: psycopg.Connection[Any], daemon: Any
) -> None:
    with alertmanager() as manager:
        system = {"id": "alerts", "kind": "alertmanager", "urls": [manager.url], "settled_after": "1s"}
        platform = platform_of(
            new_platform, shared_cluster, {"alert": ["alertname=IdleInTransaction"]}, [system], alertmanagers=["alerts"]
        )
        labels = {"alertname": "IdleInTransaction", "instance": "app-db"}
        manager.fire(labels)
        daemon(platform)
        eventually(
            lambda: blocked.closed or shared_cluster.sql("select count(*) from pg_stat_activity where application_name = 'checkout'") == 0,
            seconds=240, why=lambda: (daemon.home / "daemon.log").read_text(errors="replace")[-6000:],
        )  # fmt: skip
        with pytest.raises(psycopg.OperationalError):
            blocked.execute("select 1")
        manager.resolve(labels)
        with store_of(platform) as store:
            incident = closed(store, daemon.home)
            assert (incident.state, incident.ending, incident.attempts) == (State.CLOSED, Ending.HELPED, 1), (
                incident.reason
            )
            kinds = [entry.kind for entry in store.ledger.entries(subject="app-db")]
            assert kinds.index("incident.open") < kinds.index("incident.applying") < kinds.index("action.plan")
            assert kinds.index("action.plan") < kinds.index("action.outcome") < kinds.index("incident.closed")
            assert all(PASSWORD not in entry.text for entry in store.ledger.entries())
            assert store.ledger.verify().ok


# The first run of an incident that is handed over kills the daemon.
DYING = "run_coordinator: {module: tests.e2e.dying_coordinator, class: DyingCoordinator}\n"


def test_an_event_is_read_once_and_acted_on_although_the_daemon_dies_before_it_launches_the_run(
    ground: Ground,
    new_platform: Any,
    shared_cluster: Cluster,
    blocked: psycopg.Connection[Any],
    daemon: Any,
    kafka: Kafka,
) -> None:
    topic, letters = kafka.create_topic(), kafka.create_topic()
    host, _, port = kafka.bootstrap.split(",")[0].rpartition(":")
    system = {"id": "events", "kind": "kafka", "bootstrap": [{"host": host, "port": int(port)}], "tls": False}
    source = {"kafka": "events", "topics": [topic], "dead_letter": letters, "start": "earliest"}
    rule = {
        "event": {"type": "com.example.blocked", "match": ["data.database=app-db"]},
        "target": {"label": "data.database"},
    }
    platform = platform_of(new_platform, shared_cluster, rule, [system], events=[source])
    body = (
        b'{"specversion":"1.0","id":"1","source":"/shop","type":"com.example.blocked","datacontenttype":"application/json",'
        b'"data":{"database":"app-db"}}'
    )
    kafka.produce(topic, body, headers=[("content-type", b"application/cloudevents+json")])
    killed = daemon(platform, DYING)
    said = lambda: (daemon.home / "daemon.log").read_text(errors="replace")[-6000:]  # noqa: E731
    eventually(lambda: not killed.alive, seconds=240, why=said)
    asked_for = (daemon.home / "died").read_text()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)  # the code server that it left
    with store_of(platform) as store:
        (begun,) = store.list(all_=True)
        assert (begun.state, begun.attempts) == (State.OPEN, 0), (
            "the cursor has passed the event, and nobody works on it"
        )
        daemon(platform, DYING)
        incident = closed(store, daemon.home)
        assert (incident.state, incident.ending, incident.attempts) == (State.CLOSED, Ending.HELPED, 1)
        assert re.fullmatch(rf"{topic}(@[\w-]+)?/0/0", incident.fingerprint)
        assert [one.id for one in store.list(all_=True)] == [begun.id]
    with DagsterInstance.from_config(str(daemon.home)) as instance:
        runs = eventually(
            lambda: [r for r in instance.get_runs() if r.job_name == "remediate" and r.is_finished], why=said
        )
    assert [(run.run_id, run.is_success) for run in runs] == [(asked_for, True)], (
        "the tick was resumed with the run that it had stored"
    )
    with pytest.raises(psycopg.OperationalError):
        blocked.execute("select 1")
