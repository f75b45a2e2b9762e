"""What the code location holds, and what its schedules and sensors decide. No server: stores and archives answer as told."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.events import DagsterEvent, DagsterEventType
from dagster._core.run_coordinator.queued_run_coordinator import QueuedRunCoordinator
from dagster._core.storage.tags import PRIORITY_TAG, RUN_KEY_TAG
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import should_retry
from dagster._daemon.monitoring import run_monitoring

from assets.postgres import BASE_BACKUP, COPY, DATABASE, PITR_VERIFICATION, WAL_ARCHIVE
from jobs.remediation import remediate
from ops_platform.backup import archive, opening
from ops_platform.backup.model import WalGap
from ops_platform.definitions import build_defs
from ops_platform.errors import UnreachableError
from ops_platform.inventory import LoadedInventory, load
from ops_platform.inventory.backups import Copy
from ops_platform.resources import PlatformResource
from ops_platform.timing import offset
from schedules.postgres import LOOK_BACK
from sensors import postgres as sensors
from tests.unit.test_notify import SlackFake

HEAVY = (
    "great_expectations", "kubernetes", "dagster_k8s", "pandas", "polars", "duckdb", "plotly", "boto3", "dagster_postgres",
)  # fmt: skip
CHECKS = {"backup_fresh", "wal_continuous", "proven", "rpo_met", "rto_met"}  # of a night; `copied` is of the copy


def body(*ids: str, **extra: Any) -> dict[str, Any]:
    def target(target_id: str) -> dict[str, Any]:
        return {
            "id": target_id,
            "environment": "test",
            "owner": "shop",
            "classification": "internal",
            "objectives": {},
            "connection": {
                "hosts": [{"host": "db.invalid"}],
                "user": "ops_backup",
                "password": "env://OPS_TEST_SECRET",
            },
            "repository": {"store": "s", "keys": "k"},
            "backup": {"schedule": {"cron": "15 2 * * *", "timezone": "Europe/Berlin", "spread": "2h"}},
        }

    return {
        "version": 1,
        "platform": {"name": "tests", **extra},
        "owners": {"shop": {"name": "Team Shop", "slack": "#shop-oncall"}},
        "environments": {"test": {}},
        "key_services": {"k": {"kind": "file", "path": "key"}},
        "stores": {
            "s": {
                "endpoint": "https://store.invalid",
                "bucket": "b",
                "access_key": "env://OPS_TEST_SECRET",
                "secret_key": "env://OPS_TEST_SECRET",
            }
        },
        "targets": [target(target_id) for target_id in ids],
    }


def an_inventory(*ids: str, **extra: Any) -> LoadedInventory:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return written(Path(folder), *ids, **extra)


def written(folder: Path, *ids: str, **extra: Any) -> LoadedInventory:
    file = folder / "platform.yaml"
    file.write_text(yaml.safe_dump(body(*ids, **extra)))
    return load(file)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))) as made:
        yield made


@pytest.fixture
def stored(on_disk: dg.DagsterInstance) -> dg.DagsterInstance:
    """A schedule opens its instance by reference, so that one in memory would not do. Without runs."""
    on_disk.wipe()
    return on_disk


# Loading


def in_fresh_python(code: str, inventory: LoadedInventory, **env: str) -> str:
    environment = {**os.environ, "OPS_INVENTORY": str(inventory.path), **env}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_location_loads_without_heavy_modules_connections_and_secrets(tmp_path: Path) -> None:
    """The inventory's hosts do not exist and its secret is not set: whatever tried to use them would fail."""
    code = f"""
import socket, sys
def no_network(*args, **more): raise AssertionError("the code location opened a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network
from ops_platform.definitions import defs
defs.get_repository_def()
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert in_fresh_python(code, written(tmp_path, "a", "b")) == "[]\n"


def test_no_secret_is_in_what_the_code_location_publishes(tmp_path: Path) -> None:
    code = """
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster._serdes import serialize_value
from ops_platform.definitions import defs
print(serialize_value(RepositorySnap.from_def(defs.get_repository_def())))
"""
    inventory = written(tmp_path, "a", slack={"webhook": "env://OPS_TEST_SECRET"})
    published = in_fresh_python(code, inventory, OPS_TEST_SECRET="hunter2hunter2")
    assert "pitr_verification" in published
    assert "hunter2" not in published
    assert "OPS_TEST_SECRET" not in published  # not even where it stands


# Assets, checks, jobs


def test_the_assets_say_whose_they_are_and_what_they_are_for() -> None:
    defs = build_defs(an_inventory("b", "a"))
    repository = defs.get_repository_def()
    graph = repository.asset_graph
    assert set(graph.get_all_asset_keys()) == {DATABASE, WAL_ARCHIVE, BASE_BACKUP, PITR_VERIFICATION, COPY}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.partitions_def is not None
        assert node.partitions_def.get_partition_keys() == ["b", "a"]
        assert node.group_name == "postgres"
        assert node.description
        assert node.kinds
    assert graph.get(BASE_BACKUP).kinds == {"postgresql", "s3"}
    assert graph.get(PITR_VERIFICATION).parent_keys == {BASE_BACKUP, WAL_ARCHIVE}
    assert graph.get(BASE_BACKUP).parent_keys == {DATABASE, WAL_ARCHIVE}
    for key, window in ((BASE_BACKUP, timedelta(hours=26)), (PITR_VERIFICATION, timedelta(days=2))):
        assert list(graph.get(key).owners) == ["team:shop"]
        policy = graph.get(key).freshness_policy_or_from_metadata
        assert policy is not None
        assert policy.fail_window.to_timedelta() == window  # type: ignore[attr-defined]


def test_every_promise_is_a_blocking_check_that_says_what_it_judges() -> None:
    defs = build_defs(an_inventory("a"))
    specs = [spec for check in defs.asset_checks or [] for spec in check.check_specs]  # type: ignore[union-attr]
    assert {spec.name for spec in specs} == CHECKS | {"copied"}
    assert all(spec.blocking and spec.description for spec in specs)


def test_the_jobs_are_there_and_each_works_on_one_target_or_all() -> None:
    repository = build_defs(an_inventory("a")).get_repository_def()
    names = {
        "nightly_backup", "verify_recovery", "replicate_backups", "check_promises", "observe_sources", "expire_backups",
    }  # fmt: skip
    assert names <= set(repository.job_names)
    assert all(repository.get_job(name).description for name in names)
    nightly = repository.get_job("nightly_backup")
    checks = {key.name for key in nightly.asset_layer.asset_graph.asset_check_keys}
    assert checks == CHECKS


def test_a_thousand_targets_are_a_thousand_partitions_and_no_more_definitions() -> None:
    few = build_defs(an_inventory("t-0")).get_repository_def()
    many = build_defs(an_inventory(*(f"t-{i}" for i in range(1000)))).get_repository_def()
    assert many.asset_graph.get(BASE_BACKUP).partitions_def.get_num_partitions() == 1000  # type: ignore[union-attr]
    for count in (
        lambda r: len(r.asset_graph.get_all_asset_keys()),
        lambda r: len(r.job_names),
        lambda r: len(r.schedule_defs),
        lambda r: len(r.sensor_defs),
    ):
        assert count(few) == count(many)


def test_no_targets_is_an_inventory_too(stored: dg.DagsterInstance) -> None:
    repository = build_defs(an_inventory()).get_repository_def()
    assert isinstance(tick(repository, stored, datetime(2026, 7, 1, 2, tzinfo=UTC)), dg.SkipReason)


def test_wherever_there_is_a_ledger_a_sensor_empties_its_outbox() -> None:
    """Also where nothing is published: who took `remediation.publish` out again left entries there."""
    database = {"host": "db.invalid", "dbname": "ops", "user": "ops", "password": "env://OPS_TEST_SECRET"}
    kept = build_defs(an_inventory("a", database=database)).get_repository_def()
    assert "publish" in {sensor.name for sensor in kept.sensor_defs}
    assert "publish" not in {sensor.name for sensor in build_defs(an_inventory("a")).get_repository_def().sensor_defs}


# Schedules

NIGHT = datetime(2026, 7, 1, 0, 15, tzinfo=UTC)  # 02:15 in Berlin


def tick(
    repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, at: datetime, name: str = "nightly_backups"
) -> Any:
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=at)
    return repository.get_schedule_def(name)(context)


def launch(instance: dg.DagsterInstance, requested: dg.RunRequest, status: dg.DagsterRunStatus) -> None:
    create_run_for_test(instance, status=status, tags={**requested.tags, RUN_KEY_TAG: str(requested.run_key)})


def slot(target_id: str) -> datetime:
    """The first tick, every five minutes, at which the target is due."""
    at = NIGHT + offset(target_id, timedelta(hours=2))
    return NIGHT + -(-(at - NIGHT) // timedelta(minutes=5)) * timedelta(minutes=5)


def test_a_tick_requests_what_is_due_for_its_target_under_the_name_of_its_moment(stored: dg.DagsterInstance) -> None:
    repository = build_defs(an_inventory("shop")).get_repository_def()
    (wanted,) = tick(repository, stored, slot("shop"))
    assert wanted.partition_key == "shop"
    assert wanted.run_key == "nightly_backups/shop/2026-07-01T00:15Z"
    assert wanted.tags["ops/target"] == "shop"


def test_a_tick_before_the_targets_place_in_the_spread_says_that_nothing_is_due(stored: dg.DagsterInstance) -> None:
    repository = build_defs(an_inventory("shop")).get_repository_def()
    before = slot("shop") - timedelta(minutes=5)
    assert before >= NIGHT
    skipped = tick(repository, stored, before)
    assert isinstance(skipped, dg.SkipReason)
    assert f"{before:%Y-%m-%d %H:%M} UTC" in str(skipped.skip_message)


def test_however_many_ticks_see_a_moment_it_is_run_once(stored: dg.DagsterInstance) -> None:
    """Dagster looks a schedule's run keys up within one tick alone, and ticks look back over hours."""
    ids = [f"t-{i}" for i in range(40)]
    repository = build_defs(an_inventory(*ids)).get_repository_def()
    started: list[str] = []
    at = NIGHT
    while at <= NIGHT + timedelta(hours=3):
        found = tick(repository, stored, at)
        for wanted in [] if isinstance(found, dg.SkipReason) else found:
            started.append(wanted.partition_key)
            launch(stored, wanted, dg.DagsterRunStatus.FAILURE if len(started) % 2 else dg.DagsterRunStatus.STARTED)
        at += timedelta(minutes=10)
    assert sorted(started) == sorted(ids)


def test_after_an_outage_many_targets_are_asked_for_a_hundred_at_each_tick(stored: dg.DagsterInstance) -> None:
    ids = [f"t-{i}" for i in range(250)]
    repository = build_defs(an_inventory(*ids)).get_repository_def()
    late, asked = NIGHT + timedelta(hours=3), list[list[str]]()
    for minutes in (0, 5, 10):
        found = tick(repository, stored, late + timedelta(minutes=minutes))
        asked.append([wanted.partition_key for wanted in found])
        for wanted in found:
            launch(stored, wanted, dg.DagsterRunStatus.STARTED)
    assert [len(keys) for keys in asked] == [100, 100, 50]
    assert sorted(key for keys in asked for key in keys) == sorted(ids)


def test_what_tells_people_runs_without_anybody_turning_it_on() -> None:
    repository = build_defs(an_inventory("a")).get_repository_def()
    running = {s.name for s in repository.schedule_defs if s.default_status is dg.DefaultScheduleStatus.RUNNING}
    assert running == {"nightly_backups", "verifications", "copies", "promises", "observations"}


def test_a_target_is_never_worked_on_twice_whoever_starts_the_run() -> None:
    """A schedule's run has the tag and the partition, one from the web UI or a backfill the partition alone."""
    shipped = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "dagster.yaml").read_text())
    limits = {entry["key"]: entry for entry in shipped["concurrency"]["runs"]["tag_concurrency_limits"]}
    assert set(limits) == {"ops/target", "dagster/partition"}
    for entry in limits.values():
        assert entry["limit"] == 1
        assert entry["value"] == {"applyLimitPerUniqueValue": True}


@pytest.fixture
def shipped(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance as deploy/dagster.yaml says, but for its storage."""
    settings = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "dagster.yaml").read_text())
    del settings["storage"]
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(settings))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


def test_an_incident_is_launched_before_everything_that_waits() -> None:
    """The queue sorts by this tag; what has none counts as 0."""
    repository = build_defs(an_inventory("a")).get_repository_def()
    others = [job for job in repository.get_all_jobs() if not job.name.startswith("__")]
    assert others
    assert {job.tags.get(PRIORITY_TAG, "0") for job in others if job.name != "remediate"} == {"0"}
    assert int(remediate.tags[PRIORITY_TAG]) > 0


def test_the_shipped_instance_launches_within_a_second_and_keeps_its_limits(shipped: dg.DagsterInstance) -> None:
    assert isinstance(shipped.run_coordinator, QueuedRunCoordinator)
    assert shipped.run_coordinator.dequeue_interval_seconds == 1
    queue = shipped.get_concurrency_config().run_queue_config
    assert queue is not None
    assert queue.max_concurrent_runs == 20
    assert [limit["key"] for limit in queue.tag_concurrency_limits] == ["ops/target", "dagster/partition"]


def test_a_run_whose_daemon_died_while_it_was_launched_is_ended_and_tried_again(
    shipped: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands as STARTING, and no process has it: else it would keep its target's place for ever."""
    run = create_run_for_test(shipped, status=dg.DagsterRunStatus.NOT_STARTED)
    event = DagsterEvent(DagsterEventType.PIPELINE_STARTING.value, run.job_name, message="launching")
    shipped.report_dagster_event(event, run.run_id)

    def look(later: timedelta) -> dg.DagsterRun:
        monkeypatch.setattr(run_monitoring, "get_current_timestamp", lambda: time.time() + later.total_seconds())
        workspace: Any = SimpleNamespace(instance=shipped, create_request_context=lambda: None)
        assert list(run_monitoring.execute_run_monitoring_iteration(workspace, logging.getLogger())) == [None]
        found = shipped.get_run_by_id(run.run_id)
        assert found is not None
        return found

    assert look(timedelta(minutes=4)).status is dg.DagsterRunStatus.STARTING
    ended = look(timedelta(minutes=6))
    assert ended.status is dg.DagsterRunStatus.FAILURE
    assert should_retry(ended, shipped)


def test_a_night_missed_by_an_outage_is_caught_up_and_an_old_one_is_not(stored: dg.DagsterInstance) -> None:
    repository = build_defs(an_inventory("shop")).get_repository_def()
    (late,) = tick(repository, stored, slot("shop") + LOOK_BACK - timedelta(minutes=10))
    assert late.run_key == "nightly_backups/shop/2026-07-01T00:15Z"
    assert isinstance(tick(repository, stored, slot("shop") + LOOK_BACK + timedelta(minutes=5)), dg.SkipReason)


def test_what_an_outage_missed_several_times_is_made_good_once(stored: dg.DagsterInstance) -> None:
    loaded = an_inventory("shop", "bank")
    for target in loaded.inventory.targets:
        target.repository.copies.append(Copy(id="second-site", store="other", keys="other"))
    repository = build_defs(loaded).get_repository_def()
    found = tick(repository, stored, NIGHT, "copies")
    assert sorted(str(wanted.run_key) for wanted in found) == [
        "copies/bank/2026-07-01T00:15Z",
        "copies/shop/2026-07-01T00:15Z",
    ]
    for wanted in found:
        launch(stored, wanted, dg.DagsterRunStatus.STARTED)
    assert isinstance(tick(repository, stored, NIGHT + timedelta(minutes=10), "copies"), dg.SkipReason)


def test_a_run_that_an_interrupted_tick_made_and_did_not_launch_is_asked_for_again(
    stored: dg.DagsterInstance,
) -> None:
    repository = build_defs(an_inventory("shop")).get_repository_def()
    (wanted,) = tick(repository, stored, slot("shop"))
    launch(stored, wanted, dg.DagsterRunStatus.NOT_STARTED)
    (again,) = tick(repository, stored, slot("shop"))
    assert again.run_key == wanted.run_key


def test_the_clock_of_the_scheduling_machine_set_back_starts_nothing_twice(stored: dg.DagsterInstance) -> None:
    repository = build_defs(an_inventory("shop")).get_repository_def()
    ahead, right = slot("shop") + timedelta(minutes=30), slot("shop")
    (wanted,) = tick(repository, stored, ahead)
    launch(stored, wanted, dg.DagsterRunStatus.SUCCESS)
    for at in (right, right + timedelta(minutes=5), ahead):
        assert isinstance(tick(repository, stored, at), dg.SkipReason)


# Sensors


Archives = dict[str, list[WalGap] | Exception]


class Sensed:
    """One sensor over a written inventory, ticked with the cursor that its last tick left."""

    def __init__(self, name: str, inventory: LoadedInventory, instance: dg.DagsterInstance) -> None:
        self.repository = build_defs(inventory).get_repository_def()
        self.sensor = self.repository.get_sensor_def(name)
        self.path = str(inventory.path)
        self.instance = instance
        self.cursor: str | None = None

    def tick(self) -> Any:
        context = dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursor,
            repository_def=self.repository,
            resources={"platform": PlatformResource(inventory_path=self.path)},
        )
        found = self.sensor(context)
        self.cursor = found.cursor  # type: ignore[union-attr]
        return found


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str] | Exception]:
    """What each target's store answers when it is asked for its backups; none by default."""
    answers: dict[str, list[str] | Exception] = {}

    def opened(access: Any, target: Any) -> Any:
        def infos() -> list[str]:
            answer = answers.get(target.id, [])
            if isinstance(answer, Exception):
                raise answer
            return answer

        return SimpleNamespace(infos=infos)

    monkeypatch.setattr(opening, "open_target_repository", opened)
    return answers


def keys_of(found: Any) -> list[str]:
    return [wanted.run_key for wanted in found.run_requests]


def test_a_target_without_a_backup_gets_its_first_one(
    tmp_path: Path, instance: dg.DagsterInstance, stores: dict[str, Any]
) -> None:
    sensed = Sensed("new_targets", written(tmp_path, "old", "new"), instance)
    stores["old"] = ["a backup"]
    found = sensed.tick()
    assert keys_of(found) == ["first/new/1"]
    assert found.run_requests[0].partition_key == "new"
    assert found.run_requests[0].tags["ops/target"] == "new"
    assert keys_of(sensed.tick()) == ["first/new/1"]  # the same key: Dagster runs it once


def ended(instance: dg.DagsterInstance, wanted: dg.RunRequest, status: dg.DagsterRunStatus, before: timedelta) -> None:
    """A run of that request which ended so long ago."""
    from dagster._core.events import DagsterEvent, DagsterEventType, JobFailureData
    from dagster._core.events.log import EventLogEntry
    from dagster._core.test_utils import create_run_for_test

    run = create_run_for_test(instance, status=status, tags={**wanted.tags, RUN_KEY_TAG: str(wanted.run_key)})
    if status is dg.DagsterRunStatus.FAILURE:
        event = DagsterEvent(DagsterEventType.RUN_FAILURE.value, run.job_name, event_specific_data=JobFailureData(None))
        at = (datetime.now(UTC) - before).timestamp()
        instance.handle_new_event(
            EventLogEntry(None, 10, "", run.run_id, at, job_name=run.job_name, dagster_event=event)
        )


@pytest.mark.parametrize("name", ["new_targets", "wal_watch"])
def test_a_try_that_failed_is_followed_by_another_after_a_while(
    tmp_path: Path, instance: dg.DagsterInstance, stores: dict[str, Any], archives: Archives, name: str
) -> None:
    """Dagster launches no run key twice, not even one whose run failed: the target would be left without its backup for ever."""
    archives["new"] = [a_gap("000000010000000000000007")]
    sensed = Sensed(name, written(tmp_path, "new"), instance)
    (first,) = sensed.tick().run_requests
    ended(instance, first, dg.DagsterRunStatus.FAILURE, sensors.TRY_AGAIN + timedelta(minutes=1))
    (second,) = sensed.tick().run_requests
    assert (first.run_key[-2:], second.run_key[-2:]) == ("/1", "/2")
    assert first.run_key[:-2] == second.run_key[:-2]
    ended(instance, second, dg.DagsterRunStatus.FAILURE, timedelta(minutes=1))
    assert sensed.tick().run_requests == [], "not again at once"


def test_while_its_run_is_at_work_or_waits_nothing_more_is_asked_for(
    tmp_path: Path, instance: dg.DagsterInstance, stores: dict[str, Any]
) -> None:
    sensed = Sensed("new_targets", written(tmp_path, "new"), instance)
    (wanted,) = sensed.tick().run_requests
    ended(
        instance, wanted, dg.DagsterRunStatus.NOT_STARTED, timedelta()
    )  # an interrupted tick's, which Dagster resumes
    assert keys_of(sensed.tick()) == [wanted.run_key]
    for status in (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED):
        ended(instance, wanted, status, timedelta())
        assert sensed.tick().run_requests == [], status


def test_a_store_that_cannot_be_asked_is_not_an_empty_one(
    tmp_path: Path, instance: dg.DagsterInstance, stores: dict[str, Any]
) -> None:
    sensed = Sensed("new_targets", written(tmp_path, "away", "new"), instance)
    stores["away"] = UnreachableError("no answer", where="store")
    assert keys_of(sensed.tick()) == ["first/new/1"]


def test_more_new_targets_than_one_tick_may_request_have_their_turn_in_the_next(
    tmp_path: Path, instance: dg.DagsterInstance, stores: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors, "MOST_REQUESTS", 3)
    ids = [f"t-{i}" for i in range(8)]
    sensed = Sensed("new_targets", written(tmp_path, *ids), instance)
    asked = [keys_of(sensed.tick()) for _ in range(3)]
    assert [len(keys) for keys in asked] == [3, 3, 3]
    assert {key for keys in asked for key in keys} == {f"first/{target_id}/1" for target_id in ids}


def test_when_the_time_of_a_tick_ends_the_next_goes_on_from_there(
    tmp_path: Path, instance: dg.DagsterInstance, stores: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(0, 10_000, 7))  # each look takes 7 s, 20 are allowed
    monkeypatch.setattr(sensors, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    sensed = Sensed("new_targets", written(tmp_path, "a", "b", "c", "d", "e"), instance)
    assert keys_of(sensed.tick()) == ["first/a/1", "first/b/1"]
    assert keys_of(sensed.tick()) == ["first/c/1", "first/d/1"]
    assert keys_of(sensed.tick()) == ["first/e/1", "first/a/1"]


@pytest.mark.parametrize("cursor", ["", "nonsense", "{}", "[]", '{"after": "zzz"}'])
def test_a_cursor_that_says_nothing_begins_at_the_beginning(
    tmp_path: Path, instance: dg.DagsterInstance, stores: dict[str, Any], cursor: str
) -> None:
    sensed = Sensed("new_targets", written(tmp_path, "a", "b"), instance)
    sensed.cursor = cursor
    assert keys_of(sensed.tick()) == ["first/a/1", "first/b/1"]
    assert json.loads(sensed.cursor) == {"after": "b"}


def test_a_target_that_the_code_location_does_not_know_yet_is_not_requested(
    tmp_path: Path, instance: dg.DagsterInstance, stores: dict[str, Any]
) -> None:
    sensed = Sensed("new_targets", written(tmp_path, "a"), instance)
    written(tmp_path, "a", "added-since")
    assert keys_of(sensed.tick()) == ["first/a/1"]


@pytest.fixture
def archives(monkeypatch: pytest.MonkeyPatch) -> Archives:
    """The gaps of each target's archive; none by default."""
    answers: Archives = {}

    def status(access: Any, target: Any) -> Any:
        answer = answers.get(target.id, [])
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(
            gaps=answer, segments=3, stored_bytes=9, newest="0/3000000", newest_timeline=1, until=None, lag_bytes=0,
            slot_error=None,
        )  # fmt: skip

    monkeypatch.setattr(archive, "archive_status", status)
    return answers


def a_gap(first: str, again: str | None = None) -> WalGap:
    return WalGap(1, first, first, again)


def test_each_archive_that_answers_is_observed(
    tmp_path: Path, instance: dg.DagsterInstance, archives: Archives
) -> None:
    archives["away"] = UnreachableError("no answer")
    found = Sensed("wal_watch", written(tmp_path, "a", "away"), instance).tick()
    (seen,) = found.asset_events
    assert (seen.asset_key, seen.partition) == (WAL_ARCHIVE, "a")
    assert seen.metadata["gaps"].value == 0
    assert found.run_requests == []


def test_a_gap_gets_one_full_backup_and_one_that_has_it_gets_none(
    tmp_path: Path, instance: dg.DagsterInstance, archives: Archives
) -> None:
    archives["mended"] = [a_gap("000000010000000000000007", again="a backup")]
    archives["torn"] = [a_gap("000000010000000000000007"), a_gap("000000010000000000000009")]
    sensed = Sensed("wal_watch", written(tmp_path, "mended", "torn"), instance)
    found = sensed.tick()
    assert keys_of(found) == ["gap/torn/000000010000000000000009/1"]
    (wanted,) = found.run_requests
    assert wanted.run_config["ops"]["postgres__base_backup"] == {"config": {"kind": "full"}}
    assert (wanted.partition_key, wanted.tags["ops/target"]) == ("torn", "torn")
    job = sensed.repository.get_job("nightly_backup")
    assert dg.validate_run_config(job, wanted.run_config)
    assert keys_of(sensed.tick()) == keys_of(found)


def test_when_no_archive_can_be_asked_the_tick_fails(
    tmp_path: Path, instance: dg.DagsterInstance, archives: Archives
) -> None:
    archives["a"] = archives["b"] = UnreachableError("no answer", where="store")
    sensed = Sensed("wal_watch", written(tmp_path, "a", "b"), instance)
    with pytest.raises(dg.Failure, match="no answer"):
        sensed.tick()
    assert sensed.cursor is None


# Failed runs


@pytest.fixture
def slack() -> Iterator[SlackFake]:
    fake = SlackFake()
    yield fake
    fake.close()


Fail = Callable[[str], str]


def failed_run(
    repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, path: str, tags: dict[str, str]
) -> Any:
    """A run of expire_backups that fails on a store that cannot be reached."""
    job = repository.get_job("expire_backups")
    return job.execute_in_process(
        instance=instance,
        raise_on_error=False,
        tags=tags,
        resources={"platform": PlatformResource(inventory_path=path)},
    )


def test_a_failed_run_is_told_with_job_target_owner_reason_and_run(
    tmp_path: Path, instance: dg.DagsterInstance, slack: SlackFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPS_TEST_WEBHOOK", slack.webhook.reveal())
    monkeypatch.delenv("OPS_TEST_SECRET", raising=False)
    inventory = written(tmp_path, "shop", slack={"webhook": "env://OPS_TEST_WEBHOOK"})
    repository = build_defs(inventory).get_repository_def()
    done = failed_run(repository, instance, str(inventory.path), {"ops/target": "shop"})
    assert not done.success
    failure = next(e for e in done.all_events if e.event_type_value == "PIPELINE_FAILURE")
    context = dg.build_run_status_sensor_context(
        "failed_runs_to_slack", failure, instance, done.dagster_run,
        resources={"platform": PlatformResource(inventory_path=str(inventory.path))},
    ).for_run_failure()  # fmt: skip
    repository.get_sensor_def("failed_runs_to_slack")(context)
    (message,) = slack.got
    text = message["blocks"][0]["text"]["text"]
    assert "*expire_backups failed for shop*" in text
    assert "environment variable is not set" in text
    assert "owner: Team Shop #shop-oncall" in text
    assert f"run `{done.run_id}`" in text
    assert not re.search("secretsecret|Traceback", text)


def test_without_a_webhook_nothing_is_sent_and_the_sensor_is_off(tmp_path: Path) -> None:
    with_one = build_defs(an_inventory("a", slack={"webhook": "env://X"})).get_repository_def()
    without = build_defs(an_inventory("a")).get_repository_def()
    name = "failed_runs_to_slack"
    assert with_one.get_sensor_def(name).default_status is dg.DefaultSensorStatus.RUNNING
    assert without.get_sensor_def(name).default_status is dg.DefaultSensorStatus.STOPPED
