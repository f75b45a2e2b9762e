"""workspace.yaml as Dagster's web server loads it, with a thousand targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from benchmarks.comparisons import inventory_of
from ops_platform.clients.postgres_binaries import free_port
from tests.integration.wal_rig import eventually

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


class Web:
    def __init__(self, home: Path) -> None:
        inventory = home / "platform.yaml"
        inventory.write_text(yaml.safe_dump(inventory_of(1000), sort_keys=False))
        (home / "dagster.yaml").write_text("telemetry: { enabled: false }\n")
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = home / "log"
        command = [
            sys.executable,
            "-m",
            "dagster_webserver",
            "-w",
            "workspace.yaml",
            "-h",
            "127.0.0.1",
            "-p",
            self.url.rpartition(":")[2],
        ]
        env = {**os.environ, "DAGSTER_HOME": str(home), "OPS_INVENTORY": str(inventory)}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
        eventually(self._answers, seconds=240, why=lambda: self.log.read_text()[-3000:])

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return urllib3.request("GET", f"{self.url}/server_info", timeout=5, retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def ask(self, query: str) -> Any:
        answer = urllib3.request("POST", f"{self.url}/graphql", json={"query": query}, timeout=120, retries=False)
        found = json.loads(answer.data)
        assert "errors" not in found, found["errors"]
        return found["data"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    made = Web(tmp_path)
    yield made
    made.stop()


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
