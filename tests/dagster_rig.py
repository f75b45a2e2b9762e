"""Dagster's web server for the tests, over the real definitions and an inventory, with a DAGSTER_HOME of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3

from ops_platform.clients.postgres_binaries import free_port
from tests.servers import Daemon, answers

ROOT = Path(__file__).parents[1]


class Web:
    """`home` becomes DAGSTER_HOME. The port is known before the server runs, so that the inventory may name it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.url = f"http://127.0.0.1:{free_port()}"
        (home / "dagster.yaml").write_text("telemetry: { enabled: false }\n")

    @contextmanager
    def running(self, inventory: Path, *flags: str) -> Iterator[None]:
        """By default with workspace.yaml."""
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "dagster_webserver", "-h", "127.0.0.1", "-p", port]
        env = {**os.environ, "DAGSTER_HOME": str(self.home), "OPS_INVENTORY": str(inventory), "PYTHONPATH": str(ROOT)}
        workspace = flags or ("-w", str(ROOT / "workspace.yaml"))
        daemon = Daemon(
            "dagster-webserver", [*command, *workspace], lambda: answers(f"{self.url}/server_info"),
            log=self.home / "log", env=env, seconds=240,
        )  # fmt: skip
        try:
            daemon.start()
            yield
        finally:
            daemon.stop()

    def ask(self, query: str) -> Any:
        answer = urllib3.request("POST", f"{self.url}/graphql", json={"query": query}, timeout=120, retries=False)
        found = answer.json()
        assert "errors" not in found, found["errors"]
        return found["data"]
