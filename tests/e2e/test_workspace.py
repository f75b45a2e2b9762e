"""workspace.yaml as Dagster's web server loads it, with a thousand targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.startup import inventory_of
from tests.dagster_rig import Web

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    inventory = tmp_path / "platform.yaml"
    inventory.write_text(yaml.safe_dump(inventory_of(1000), sort_keys=False))
    made = Web(tmp_path)
    with made.running(inventory):
        yield made


def test_workspace_yaml_loads_and_shows_every_asset_job_and_sensor(web: Web) -> None:
    found = web.ask("""{
        workspaceOrError { ... on Workspace { locationEntries {
            name loadStatus locationOrLoadError { __typename ... on PythonError { message } } } } }
        repositoriesOrError { ... on RepositoryConnection { nodes {
            jobs { name } schedules { name scheduleState { status } } sensors { name } } } }
        assetNodes { assetKey { path } partitionStats { numPartitions } } }""")
    (entry,) = found["workspaceOrError"]["locationEntries"]
    assert (entry["name"], entry["loadStatus"]) == ("ops_platform", "LOADED")
    assert entry["locationOrLoadError"]["__typename"] == "RepositoryLocation", entry
    assert {"/".join(node["assetKey"]["path"]) for node in found["assetNodes"]} >= {
        "postgres/database", "postgres/wal_archive", "postgres/base_backup", "postgres/pitr_verification",
    }  # fmt: skip
    postgres = [node for node in found["assetNodes"] if node["assetKey"]["path"][0] == "postgres"]
    assert {node["partitionStats"]["numPartitions"] for node in postgres if node["partitionStats"]} == {1000}
    (repository,) = found["repositoriesOrError"]["nodes"]
    assert {"nightly_backup", "verify_recovery", "check_promises"} <= {job["name"] for job in repository["jobs"]}
    states = {item["name"]: item["scheduleState"]["status"] for item in repository["schedules"]}
    assert {name: states[name] for name in ("nightly_backups", "promises", "observations")} == dict.fromkeys(
        ("nightly_backups", "promises", "observations"), "RUNNING"
    )
    assert {"new_targets", "wal_watch"} <= {item["name"] for item in repository["sensors"]}
