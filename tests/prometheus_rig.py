"""Prometheus and Alertmanager for the tests, on free loopback ports, and the calls that a test makes to them.

An Alertmanager gets its alerts as from a Prometheus, through its API v2; two of them make a cluster that shares silences.
"""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from ops_platform.clients.postgres_binaries import free_port
from tests.rig import eventually
from tests.servers import Daemon, folder, program

USER, PASSWORD = "ops", "correct horse battery staple"
# bcrypt of PASSWORD with the smallest cost, as both servers want it in their web configuration.
BASIC_AUTH = {USER: "$2b$04$.eBebyBPoA6rd7Nn4xYqXONzM1kHYitbnm2ZxEDj9hB2lIKw7TqY2"}
# Nobody is told: the tests read the alerts from the API.
SILENT = {"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}
_WAY = {"scrape_interval": "1s", "evaluation_interval": "1s"}


class _Web:
    """What both servers have in common: a web configuration (TLS, users), a configuration that can be loaded anew."""

    def __init__(self, name: str, home: Path, flags: Sequence[str], web: Mapping[str, Any] | None) -> None:
        self.port = free_port()
        self.home = home
        self._context: ssl.SSLContext | None = None
        self.password = PASSWORD if (web or {}).get("basic_auth_users") else ""
        scheme = "http"
        if web:
            self._write("web.yml", web)
            flags = [*flags, f"--web.config.file={home / 'web.yml'}"]
            if "tls_server_config" in web:
                scheme, self._context = "https", ssl._create_unverified_context()  # the rig's own call, on loopback
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        command = [program(name), f"--web.listen-address=127.0.0.1:{self.port}", *flags]
        self.daemon = Daemon(
            f"{name} {self.port}", command, lambda: self.call("GET", "/-/ready", raw=True), log=home / "log"
        )

    def call(self, method: str, path: str, body: Any = None, *, raw: bool = False) -> Any:
        """The JSON of the answer (with `raw` its text). Raises HTTPError, an OSError, for a refusal."""
        request = urllib.request.Request(f"{self.url}{path}", method=method)
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        if self.password:
            known = base64.b64encode(f"{USER}:{self.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {known}")
        with urllib.request.urlopen(request, timeout=60, context=self._context) as answer:
            text = answer.read().decode()
        return text if raw else json.loads(text or "null")

    def reload(self) -> None:
        self.call("POST", "/-/reload", raw=True)

    def _write(self, name: str, content: Mapping[str, Any]) -> Path:
        file = self.home / name
        file.write_text(yaml.safe_dump(dict(content), sort_keys=False))
        return file


class Prometheus(_Web):
    """`config` as in prometheus.yml without `rule_files`; `rules` are the groups of a rule file."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any] | None = None,
        *,
        rules: Sequence[Mapping[str, Any]] = (),
        flags: Sequence[str] = (),
        web: Mapping[str, Any] | None = None,
    ) -> None:
        home = directory / "prometheus"
        home.mkdir()
        own = [f"--config.file={home / 'prometheus.yml'}", f"--storage.tsdb.path={home / 'data'}"]
        # An alert from before its Alertmanager was discovered would be told again in a minute.
        own += ["--web.enable-lifecycle", "--rules.alert.resend-delay=1s"]
        super().__init__("prometheus", home, [*own, *flags], web)
        self.configure(config, rules)

    def configure(self, config: Mapping[str, Any] | None = None, rules: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write its files. A running server takes them up at `reload`."""
        self._write("rules.yml", {"groups": list(rules)})
        given = dict(config or {})
        world = {**_WAY, **given.pop("global", {})}
        self._write("prometheus.yml", {"global": world, "rule_files": [str(self.home / "rules.yml")], **given})

    def query(self, expression: str) -> list[Any]:
        """The result of an instant query. Raises HTTPError for one that is wrong."""
        query = urllib.parse.urlencode({"query": expression})
        return self.call("GET", f"/api/v1/query?{query}")["data"]["result"]

    def alerts(self) -> list[Any]:
        return self.call("GET", "/api/v1/alerts")["data"]["alerts"]


class Alertmanager(_Web):
    """`config` as in alertmanager.yml. With `cluster` it gossips, with those of `peers` that are named."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any] | None = None,
        *,
        cluster: bool = False,
        peers: Sequence[Alertmanager] = (),
        flags: Sequence[str] = (),
        web: Mapping[str, Any] | None = None,
    ) -> None:
        self.gossip = free_port()
        home = directory / f"alertmanager-{self.gossip}"
        home.mkdir()
        own = [f"--config.file={home / 'alertmanager.yml'}", f"--storage.path={home / 'data'}"]
        gossip = f"127.0.0.1:{self.gossip}" if cluster else ""
        own += [f"--cluster.listen-address={gossip}"]
        if cluster:
            own += [f"--cluster.advertise-address={gossip}", "--cluster.gossip-interval=50ms"]
            own += ["--cluster.pushpull-interval=1s", "--cluster.settle-timeout=2s"]
            own += [f"--cluster.peer=127.0.0.1:{peer.gossip}" for peer in peers]
        super().__init__("prometheus-alertmanager", home, [*own, *flags], web)
        self.configure(config)

    def configure(self, config: Mapping[str, Any] | None = None) -> None:
        """Write its file. A running server takes it up at `reload`."""
        self._write("alertmanager.yml", config or SILENT)

    def fire(self, *labels: Mapping[str, str], ends: datetime | None = None, **annotations: str) -> None:
        """One alert for each set of labels, active from now on until `ends` (in an hour)."""
        now = datetime.now(UTC)
        times = {"startsAt": now.isoformat(), "endsAt": (ends or now + timedelta(hours=1)).isoformat()}
        self.post([{"labels": dict(each), "annotations": annotations, **times} for each in labels])

    def resolve(self, *labels: Mapping[str, str]) -> None:
        self.post([{"labels": dict(each), "endsAt": datetime.now(UTC).isoformat()} for each in labels])

    def post(self, alerts: Sequence[Mapping[str, Any]]) -> None:
        """As a Prometheus would."""
        self.call("POST", "/api/v2/alerts", list(alerts), raw=True)

    def alerts(self, query: str = "") -> list[Any]:
        return self.call("GET", f"/api/v2/alerts{query}")

    def silence(self, matchers: Mapping[str, str], *, seconds: float = 3600, comment: str = "a test") -> str:
        """Its id. Equality matchers alone."""
        now = datetime.now(UTC)
        wanted = {
            "matchers": [{"name": k, "value": v, "isRegex": False, "isEqual": True} for k, v in matchers.items()],
            "startsAt": now.isoformat(),
            "endsAt": (now + timedelta(seconds=seconds)).isoformat(),
            "createdBy": "tests",
            "comment": comment,
        }
        return self.call("POST", "/api/v2/silences", wanted)["silenceID"]

    def silences(self) -> list[Any]:
        return self.call("GET", "/api/v2/silences")

    def expire(self, silence: str) -> None:
        self.call("DELETE", f"/api/v2/silence/{silence}", raw=True)

    def peers(self) -> int:
        """How many it sees, itself among them."""
        return len(self.call("GET", "/api/v2/status")["cluster"].get("peers", []))


@contextmanager
def prometheus(config: Mapping[str, Any] | None = None, **more: Any) -> Iterator[Prometheus]:
    with folder("ops-prometheus-") as directory:
        made = Prometheus(directory, config, **more)
        try:
            made.daemon.start()
            yield made
        finally:
            made.daemon.stop()


@contextmanager
def alertmanager(config: Mapping[str, Any] | None = None, **more: Any) -> Iterator[Alertmanager]:
    with folder("ops-alertmanager-") as directory:
        made = Alertmanager(directory, config, **more)
        try:
            made.daemon.start()
            yield made
        finally:
            made.daemon.stop()


@contextmanager
def alertmanagers(config: Mapping[str, Any] | None = None, *, count: int = 2) -> Iterator[list[Alertmanager]]:
    """A cluster whose members know each other."""
    with folder("ops-alertmanager-") as directory, contextlib.ExitStack() as stop:
        made: list[Alertmanager] = []
        for _ in range(count):
            made.append(Alertmanager(directory, config, cluster=True, peers=tuple(made)))
            stop.callback(made[-1].daemon.stop)
            made[-1].daemon.start()
        eventually(lambda: all(one.peers() == count for one in made), why="they do not see each other")
        yield made
