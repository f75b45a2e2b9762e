"""The watcher against real servers: PostgreSQL, Dagster's web server, Prometheus with our rules, and every query of the dashboard."""

from __future__ import annotations

import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.remote_representation.handle import CompoundID
from dagster._core.scheduler.instigation import InstigatorType, TickData, TickStatus
from dagster_shared.error import SerializableErrorInfo

from ops_platform.backup import receiver_http
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.receiver import Receiver
from ops_platform.clients.access import Access
from ops_platform.errors import OpsError
from ops_platform.inventory import load
from ops_platform.ledger import Draft
from ops_platform.metrics import serve
from ops_platform.metrics.collect import LedgerReader, Sample, read_dagster, read_incidents
from ops_platform.metrics.serve import Collector
from ops_platform.recovery.model import Verdict
from ops_platform.recovery.verify import verify
from ops_platform.remediation.model import Peers, State
from tests.dagster_rig import Web
from tests.prometheus_rig import Prometheus
from tests.remediation_rig import BEGIN, Engine, a_rule, a_signal, new_engine
from tests.rig import Cluster, Platform, eventually
from tests.servers import program
from tests.unit.test_metrics import RULES, TARGETS

__all__ = ["new_engine"]
NewEngine = Callable[..., Engine]
RULE_FILES = Path(__file__).parents[2] / "deploy" / "prometheus"


def by_name(samples: Iterator[Sample]) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for name, labels, value in samples:
        assert labels not in found.setdefault(name, {}), f"{name} {labels} twice"
        found[name][labels] = value
    return found


def lived(engine: Engine) -> None:
    """An incident that was helped, one that escalated, one that a guard keeps back, one that was only opened."""
    helped = engine.fire()
    engine.clock.slept = engine.end
    assert engine.work(helped).state is State.CLOSED
    engine.clock.slept = lambda: None
    engine.clock.at += timedelta(hours=1)
    engine.lamps.put("lamp", "on")
    assert engine.work(engine.fire(a_signal("f2", at=engine.clock.now()))).state is State.ESCALATED
    engine.clock.at += timedelta(hours=1)
    engine.change([a_rule(min_healthy=2)])
    engine.lamps.peers = Peers(1, 3, "lamps on")
    engine.lamps.put("lamp", "on")
    assert engine.work(engine.fire(a_signal("f3", at=engine.clock.now()))).state is State.SUPPRESSED
    engine.fire(a_signal("f4", at=engine.clock.now()))


# From PostgreSQL


def test_incidents_and_actions_are_counted(new_engine: NewEngine) -> None:
    engine = new_engine()
    assert by_name(read_incidents(engine.store))["ops_incidents_open"] == {
        (state.value,): 0 for state in State if state is not State.CLOSED
    }, "no incident is a zero that was looked for"
    lived(engine)
    engine.store.keep_lag("events", [("orders", 0, 7), ("orders", 1, 0)])
    engine.store.mark_seen("watchdog/alerts", BEGIN)
    engine.store.mark_seen("something/else", BEGIN)
    found = by_name(read_incidents(engine.store))
    open_ = {labels: number for labels, number in found["ops_incidents_open"].items() if number}
    assert open_ == {("open",): 1, ("escalated",): 1, ("suppressed",): 1}
    assert found["ops_incidents_oldest_timestamp_seconds"].keys() == open_.keys()
    assert found["ops_incidents_oldest_timestamp_seconds"]["open",] == engine.clock.now().timestamp()
    assert found["ops_incidents_closed"] == {("dark", "helped"): 1}
    assert found["ops_actions"] == {("toy.switch_off", "true"): 1, ("toy.switch_off", "false"): 1}
    assert found["ops_paused"] == {(): 0}
    assert found["ops_messages_unsent"][()] > 4
    assert found["ops_messages_oldest_timestamp_seconds"] == {(): BEGIN.timestamp()}
    assert found["ops_events_lag"] == {("events", "orders", "0"): 7, ("events", "orders", "1"): 0}
    assert found["ops_watchdog_seen_timestamp_seconds"] == {("alerts",): BEGIN.timestamp()}
    engine.store.pause("a rehearsal", who="ann")
    assert by_name(read_incidents(engine.store))["ops_paused"] == {(): 1}


def test_the_ledger_says_how_far_it_its_checkpoints_and_its_outbox_are(new_engine: NewEngine) -> None:
    engine = new_engine()
    read = LedgerReader(engine.store)
    assert by_name(read()) == {"ops_ledger_entries": {(): 0}, "ops_outbox_entries": {(): 0}}
    engine.ledger.append("test.before", "app-db", {}, actor="ann")
    engine.ledger.publish(["test."])
    engine.clock.at += timedelta(minutes=1)
    written = engine.clock.at
    engine.ledger.append_all([Draft("test.one", "app-db", {}) for _ in range(3)], actor="ann")
    engine.ledger.note_checkpoint(1, 2, "r", "s", BEGIN)
    engine.ledger.note_checkpoint(2, 3, "r", "s", BEGIN + timedelta(seconds=5))
    assert by_name(read()) == {
        "ops_ledger_entries": {(): 4},
        "ops_ledger_newest_timestamp_seconds": {(): written.timestamp()},
        "ops_ledger_checkpoint_entries": {(): 3},
        "ops_ledger_checkpoint_timestamp_seconds": {(): BEGIN.timestamp() + 5},
        "ops_outbox_entries": {(): 3},
        "ops_outbox_oldest_timestamp_seconds": {(): written.timestamp()},
    }
    engine.ledger.published([2, 3])
    assert by_name(read())["ops_outbox_entries"] == {(): 1}


def test_refusals_are_counted_once_and_from_now_on(new_engine: NewEngine) -> None:
    engine = new_engine([a_rule(min_healthy=2)])
    engine.lamps.peers = Peers(1, 3, "lamps on")
    engine.work(engine.fire())
    read = LedgerReader(engine.store)
    assert "ops_guard_refusals" not in by_name(read()), "what was refused before it began is not counted"
    engine.work(engine.fire(a_signal("f2")))
    assert [by_name(read())["ops_guard_refusals"] for _ in range(2)] == [{("healthy peers",): 1}] * 2
    engine.change([a_rule(mode="observe")])
    engine.work(engine.fire(a_signal("f3")))
    assert by_name(read())["ops_guard_refusals"] == {("healthy peers",): 1}, "observing is no refusal"


def test_a_database_that_is_away_has_no_values_and_comes_back(new_engine: NewEngine, shared_cluster: Cluster) -> None:
    engine = new_engine()
    lived(engine)
    collector = Collector(engine.access, engine.store)

    def told() -> tuple[set[str], dict[tuple[str, ...], float]]:
        found = by_name(iter(collector.samples()))
        return found.keys() - {"ops_source_up", "ops_source_read_timestamp_seconds"}, found["ops_source_up"]

    name = engine.lamps.connection.info.dbname
    names, up = told()
    assert {"ops_incidents_open", "ops_ledger_entries"} <= names
    assert up == {("incidents",): 1, ("ledger",): 1, ("promises",): 0}
    shared_cluster.sql(f'alter database "{name}" with allow_connections false')
    shared_cluster.sql(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = %s", "postgres", name
    )
    assert told() == (set(), {("incidents",): 0, ("ledger",): 0, ("promises",): 0})
    shared_cluster.sql(f'alter database "{name}" with allow_connections true')
    assert told() == (names, up)


# From Dagster


def remediation() -> dict[str, Any]:
    """Of an inventory: a rule, and an Alertmanager that is not there."""
    system = {
        "id": "alerts",
        "kind": "alertmanager",
        "urls": ["http://127.0.0.1:1"],
        "environment": "test",
        "owner": "team",
    }
    parameters = {"url": "https://hooks.example.com/", "secret": "env://HOOK"}
    rule = {
        "id": "idle",
        "alert": ["alertname=A"],
        "target": "alerts",
        "playbook": "http.webhook",
        "parameters": parameters,
    }
    return {"systems": [system], "remediation": {"rules": [rule], "alertmanagers": ["alerts"]}}


def an_inventory(home: Path, url: str) -> Path:
    body = {
        "version": 1, "platform": {"name": "tests", "dagster": {"url": url}}, "owners": {"team": {"name": "Team"}},
        "environments": {"test": {}}, **remediation(),
    }  # fmt: skip
    file = home / "platform.yaml"
    file.write_text(yaml.safe_dump(body))
    return file


def ticked(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the daemon would have kept: a failed tick after a good one of the sensor alerts, a run that has not started."""
    nodes = web.ask(
        "{repositoriesOrError {... on RepositoryConnection {nodes {sensors {name sensorState {id selectorId}}}}}}"
    )
    (state,) = [
        sensor["sensorState"]
        for sensor in nodes["repositoriesOrError"]["nodes"][0]["sensors"]
        if sensor["name"] == "alerts"
    ]
    monkeypatch.setenv("DAGSTER_HOME", str(web.home))
    with DagsterInstance.get() as instance:
        for at, status in ((1000.0, TickStatus.SKIPPED), (2000.0, TickStatus.FAILURE)):
            origin = CompoundID.from_string(state["id"]).remote_origin_id
            error = SerializableErrorInfo("away", [], "UnreachableError") if status is TickStatus.FAILURE else None
            kind = InstigatorType.SENSOR
            tick = TickData(origin, "alerts", kind, status, at, selector_id=state["selectorId"], error=error)
            instance.create_tick(tick)
        instance.add_run(DagsterRun(job_name="remediate", status=DagsterRunStatus.NOT_STARTED))


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_dagster_says_what_is_on_and_how_its_ticks_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web = Web(tmp_path)
    file = an_inventory(tmp_path, web.url)
    with Access(load(file)) as access:
        with pytest.raises(OpsError):
            list(read_dagster(access))
        with web.running(file):
            found = by_name(read_dagster(access))
            assert found["ops_instigator_running"]["alerts", "sensor"] == 1
            assert found["ops_instigator_running"]["promises", "schedule"] == 1
            assert found.get("ops_tick_timestamp_seconds", {}) == {}
            assert found["ops_runs"] == {("queued",): 0, ("started",): 0}
            ticked(web, monkeypatch)
            found = by_name(read_dagster(access))
        assert found["ops_tick_timestamp_seconds"] == {("alerts", "sensor"): 2000}
        assert found["ops_tick_failed"] == {("alerts", "sensor"): 1}
        assert found["ops_runs"] == {("queued",): 1, ("started",): 0}


# Rules and dashboard


@pytest.mark.parametrize("arguments", [["check", "rules", "ops-platform.rules.yaml"], ["test", "rules", "ops-platform.rules.test.yaml"]])  # fmt: skip
def test_prometheus_agrees_with_the_rules_that_are_shipped(arguments: list[str]) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=RULE_FILES, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout + done.stderr


# The worst moment is estimated once so much WAL was archived that its rate is known.
NOT_MEASURED = ('ops_rto_whole_seconds{target=~"$target"}', 'ops:rto:ratio{target=~"$target"}')


class Watched:
    """A Prometheus that scrapes a metrics server and a receiver, behind which everything lives."""

    def __init__(self, prometheus: Prometheus) -> None:
        self.prometheus = prometheus

    def get(self, path: str, **parameters: str) -> Any:
        """Its data. Raises HTTPError for a query that is wrong."""
        answer = self.prometheus.call("GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        assert answer["status"] == "success", answer
        return answer["data"]

    def graph(self, query: str) -> list[Any]:
        """As Grafana asks for a graph, with the variables filled in."""
        now = time.time()
        asked = query.replace("$target", ".*").replace("$__rate_interval", "1m")
        assert "$" not in asked, "a variable that is not filled in"
        span = {"start": str(now - 60), "end": str(now), "step": "5"}
        return self.get("query_range", query=asked, **span)["result"]


def proven(platform: Platform, receiver: Receiver) -> None:
    """Receive, back up, verify."""
    receiver.start()
    eventually(lambda: receiver.states[0].phase == "streaming", why=lambda: receiver.states[0])
    run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason


@pytest.fixture
def watched(
    new_engine: NewEngine, new_platform: Callable[..., Platform], new_cluster: Callable[..., Cluster],
    new_prometheus: Callable[..., Prometheus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Watched]:  # fmt: skip
    web, engine = Web(tmp_path), new_engine()
    platform = new_platform({"app-db": [new_cluster(18)]}, platform={"dagster": {"url": web.url}})
    platform.body |= remediation()
    platform.reload()
    receiver = Receiver(platform.access, [platform.target], most_backoff=0.5)
    with ExitStack() as stop:
        stop.callback(lambda: (receiver.stop(), receiver.join(30)))
        proven(platform, receiver)
        stop.enter_context(web.running(platform.file))
        ticked(web, monkeypatch)
        servers = [serve(platform.access, engine.store, "127.0.0.1", 0, every=5)]
        servers.append(receiver_http.serve(receiver, "127.0.0.1", 0))
        for server in servers:
            stop.callback(server.shutdown)
        targets = [f"127.0.0.1:{server.server_address[1]}" for server in servers]
        scrape = {"job_name": "ops-platform", "static_configs": [{"targets": targets}]}
        groups = yaml.safe_load((RULE_FILES / "ops-platform.rules.yaml").read_text())["groups"]
        made = Watched(new_prometheus({"scrape_configs": [scrape]}, rules=groups))
        eventually(lambda: made.prometheus.query('ops_source_up{source="ledger"} == 1'))
        engine.ledger.publish(["incident."])
        lived(engine)
        engine.ledger.note_checkpoint(1, 3, "r", "s", BEGIN)
        engine.store.keep_lag("events", [("orders", 0, 7)])
        engine.store.mark_seen("watchdog/alerts", BEGIN)
        yield made


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_every_query_of_the_dashboard_and_every_rule_is_answered_by_a_real_prometheus(watched: Watched) -> None:
    queries = {target["expr"]: title for title, target in TARGETS}
    assert len(queries) > 40
    empty = {query: title for query, title in queries.items() if query not in NOT_MEASURED}
    for query in NOT_MEASURED:
        assert queries[query]
        assert watched.graph(query) == []

    def answered() -> bool:
        for query in list(empty):
            if watched.graph(query):
                del empty[query]
        return not empty

    eventually(answered, seconds=90, why=lambda: f"no answer to {empty}")
    assert watched.get("label/target/values", **{"match[]": "ops_promise_known"}) == ["app-db"]
    rules = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    assert len(rules) == len(RULES)
    assert [point["metric"]["target"] for point in watched.prometheus.query("ops:rpo:ratio < 1")] == ["app-db"]
    kept = watched.prometheus.query("ops_promise_kept")
    assert {(one["metric"]["promise"], one["value"][1]) for one in kept} == {
        (name, "1") for name in ("backup_fresh", "wal_continuous", "proven", "rpo_met", "rto_met", "copied")
    }
