"""A schema registry for the tests: Apicurio's, which has Confluent's REST API below /apis/ccompat/v7. It keeps its schemas in memory."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ops_platform.clients.postgres_binaries import free_port
from tests.rig import missing
from tests.servers import Daemon, answers, folder
from tests.services import maven

_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx384m")


class Registry:
    """`url` is what stands in an inventory."""

    def __init__(self, home: Path) -> None:
        java, server = maven.java(), maven.APICURIO
        if java is None:
            missing(f"Java {maven.OLDEST}", "install a JDK, or name one in JAVA_HOME")
        if not server.home().exists():
            missing(server.thing, "make services installs it")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
        runner = server.home() / f"apicurio-registry-app-{server.version}-runner.jar"
        command = [
            str(java),
            *_JVM,
            "-Dquarkus.http.host=127.0.0.1",
            f"-Dquarkus.http.port={port}",
            "-jar",
            str(runner),
        ]
        self.daemon = Daemon(
            f"Apicurio Registry {port}", command, lambda: answers(f"{self.url}/subjects"), log=home / "log", seconds=120
        )

    def register(
        self, subject: str, schema: Mapping[str, Any], kind: str = "AVRO", references: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """A schema's id; the same one for the same schema. A JSON Schema has to name its `$schema`."""
        body = {"schema": json.dumps(schema), "schemaType": kind, "references": list(references)}
        return self.call("POST", f"/subjects/{quote(subject, safe='')}/versions", body)["id"]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer. Raises HTTPError, an OSError, for a refusal; its body says why."""
        request = urllib.request.Request(f"{self.url}{path}", method=method)
        request.add_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        request.data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


@contextmanager
def registry() -> Iterator[Registry]:
    with folder("ops-registry-") as home:
        made = Registry(home)
        try:
            made.daemon.start()
            yield made
        finally:
            made.daemon.stop()
