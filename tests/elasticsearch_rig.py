"""Elasticsearch 8 for the tests: one node with its HTTP API on a free loopback port, and the calls that a test makes to it.

The jars come from Maven, where the distribution is not: the folders, the module for HTTP and the arguments, which the start
script of the distribution would make, are made here. The security module is in Maven, too, but it cannot be loaded: it needs OpenSAML,
which is in other repositories alone. So the privileges of the playbooks are taken from the documentation, and not proven here.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ops_platform.clients.postgres_binaries import free_port, run_as
from tests.rig import eventually, missing
from tests.servers import Daemon, folder
from tests.services import maven

_MODULE = "transport-netty4"
_OF_MODULE = (_MODULE, "netty-")
_BRIDGE = "elasticsearch-entitlement-bridge"
_MAIN = "org.elasticsearch.server/org.elasticsearch.bootstrap.Elasticsearch"
_JVM = (
    "-Xms512m",
    "-Xmx512m",
    "-Xss1m",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-Djava.awt.headless=true",
    "-Dfile.encoding=UTF-8",
    "-Djna.nosys=true",
    "-Dio.netty.noUnsafe=true",
    "-Dio.netty.noKeySetOptimization=true",
    "-Dlog4j.shutdownHookEnabled=false",
    "-Dlog4j2.disable.jmx=true",
    "-Des.distribution.type=tar",
    "-Djdk.attach.allowAttachSelf=true",
    "--add-exports=java.base/org.elasticsearch.entitlement.bridge=org.elasticsearch.entitlement,"
    "java.desktop,java.logging,java.management,java.naming,java.net.http,jdk.net,jdk.zipfs,ALL-UNNAMED",
    "--add-modules=jdk.net",
    "--add-modules=ALL-MODULE-PATH",
)
_LOGGING = """
status = error
appender.file.type = File
appender.file.name = file
appender.file.fileName = ${sys:es.logs.base_path}/server.log
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = [%d{ISO8601}][%-5p][%c{1.}] %m%n
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
"""
SETTINGS = {
    "cluster.name": "tests",
    "node.name": "node",
    "discovery.type": "single-node",
    "network.host": "127.0.0.1",
    # How full the disk of this machine is, is no business of a test unless it says so.
    "cluster.routing.allocation.disk.threshold_enabled": "false",
}


class Elasticsearch:
    """`settings` as in elasticsearch.yml, over SETTINGS. Its data stays when it is killed; it runs as the servers' user."""

    def __init__(self, home: Path, settings: Mapping[str, str] | None = None) -> None:
        program = _need(maven.java())
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.user = run_as()
        self.repositories = home / "repositories"  # a snapshot may be written below it
        for name in (
            "config",
            "data",
            "lib/tools/ansi-console",
            f"modules/{_MODULE}",
            "plugins",
            "repositories",
            "tmp",
        ):
            (home / name).mkdir(parents=True)
        (home / "config" / "log4j2.properties").write_text(_LOGGING)
        self._make_module()
        server = maven.ELASTICSEARCH
        (home / "lib/tools/ansi-console/more.jar").symlink_to(server.home() / "more.jar")
        own = {
            "path.home": str(home),
            "path.data": str(home / "data"),
            "path.repo": str(self.repositories),
            "http.port": str(self.port),
            "transport.port": str(free_port()),
        }
        (home / "arguments").write_bytes(_arguments({**SETTINGS, **own, **(settings or {})}, home / "config", home))
        self.user.own(home, *home.rglob("*"))
        java = [
            str(program),
            *_JVM,
            f"-Djava.io.tmpdir={home / 'tmp'}",
            f"-Des.path.home={home}",
            f"-Des.entitlement.agentJar={server.home() / 'more.jar'}",
            f"--patch-module=java.base={server.home() / f'{_BRIDGE}-{server.version}.jar'}",
            f"--module-path={server.path(_BRIDGE, *_OF_MODULE)}",
            f"--module={_MAIN}",
        ]
        # It reads its arguments, and then lets go of its terminal.
        command = ["sh", "-c", 'exec "$@" < "$0"', str(home / "arguments"), *java]
        self.daemon = Daemon(
            f"Elasticsearch {self.port}",
            command,
            lambda: self.health()["status"] in ("green", "yellow"),
            log=home / "server.log",
            env={"LIBFFI_TMPDIR": str(home / "tmp")},
            seconds=120,
            user=self.user,
        )

    def _make_module(self) -> None:
        """What the server loads as a module: its jars, and two files that the distribution has beside them and the jar inside."""
        folder, jars = self.home / "modules" / _MODULE, maven.ELASTICSEARCH.home()
        for name in maven.ELASTICSEARCH.jars:
            if name.startswith(_OF_MODULE):
                (folder / name).symlink_to(jars / name)
        with zipfile.ZipFile(jars / f"{_MODULE}-{maven.ELASTICSEARCH.version}.jar") as jar:
            for name in ("plugin-descriptor.properties", "entitlement-policy.yaml"):
                (folder / name).write_bytes(jar.read(f"META-INF/es-plugins/{_MODULE}/{name}"))

    # Calls

    def call(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        """The JSON of the answer. Raises HTTPError, an OSError, for a refusal; its body says why."""
        address = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(address, method=method)
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "null")

    @property
    def version(self) -> str:
        """As the node tells it; `GET /` belongs to a module that no repository has, and is answered with 405."""
        return next(iter(self.call("GET", "/_nodes/_local/_none")["nodes"].values()))["version"]

    def health(self, index: str = "") -> Any:
        return self.call("GET", f"/_cluster/health/{index}")

    def create_index(self, name: str, **settings: str | int | bool) -> None:
        """One shard without replicas, since there is one node. Settings as for `configure_index`."""
        self.call("PUT", f"/{name}", {"settings": {"index.number_of_replicas": 0, **_dotted(settings)}})

    def add(self, index: str, document: Mapping[str, Any]) -> str:
        """Its id; visible to searches at once. Raises HTTPError 429 for an index that is blocked."""
        return self.call("POST", f"/{index}/_doc", dict(document), refresh="true")["_id"]

    def count(self, index: str) -> int:
        return self.call("GET", f"/{index}/_count")["count"]

    def configure_index(self, index: str, **settings: Any) -> None:
        """`__` stands for dots: `blocks__read_only_allow_delete=True`. None takes a setting back to its default."""
        self.call("PUT", f"/{index}/_settings", _dotted(settings))

    def index_setting(self, index: str, name: str) -> Any:
        """As text; None where it is not set. `blocks.read_only_allow_delete`."""
        found = self.call("GET", f"/{index}/_settings", flat_settings="true")[index]["settings"]
        return found.get(f"index.{name}")

    def break_shard(self, index: str) -> None:
        """Its only shard cannot be opened, until the server has tried as often as it does by itself and gives up."""
        self.call("POST", f"/{index}/_close")
        self._lock(index, 0)
        self.call("POST", f"/{index}/_open", wait_for_active_shards="0")
        eventually(lambda: self.failed_attempts(index) >= 5, why=lambda: f"{self.daemon}")

    def mend_shard(self, index: str) -> None:
        """The cause of `break_shard` is gone; the shard stays as it is until somebody asks for another try."""
        self._lock(index, 0o755)

    def failed_attempts(self, index: str) -> int:
        shards = self.call("GET", f"/_cluster/state/routing_table/{index}")["routing_table"]["indices"][index]["shards"]
        return shards["0"][0].get("unassigned_info", {}).get("failed_attempts", 0)

    def _lock(self, index: str, mode: int) -> None:
        key = self.call("GET", f"/{index}/_settings", flat_settings="true")[index]["settings"]["index.uuid"]
        (self.home / "data" / "indices" / key / "0" / "translog").chmod(mode)


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"index.{name.replace('__', '.')}": value for name, value in settings.items()}


def _arguments(settings: Mapping[str, str], config: Path, logs: Path) -> bytes:
    """What the server reads from its standard input, in its own stream format: ServerArgs of Elasticsearch 8.19.

    Whether it lets go of its terminal, whether it is quiet, no file for its pid, an open keystore with the one entry that it
    has to have, the settings, two folders.
    """
    seed = os.urandom(16).hex().encode()
    keystore = _text("org.elasticsearch.common.settings.KeyStoreWrapper") + (4).to_bytes(4, "big") + b"\0\0"
    keystore += b"\1" + _text("keystore.seed") + _bytes(seed) + _bytes(hashlib.sha256(seed).digest()) + b"\0"
    pairs = b"".join(_text(key) + b"\0" + _text(value) for key, value in sorted(settings.items()))
    return b"\1\1\0" + keystore + _size(len(settings)) + pairs + _text(str(config)) + _text(str(logs))


def _size(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    more, rest = divmod(number, 128)
    return bytes([rest | 128]) + _size(more) if more else bytes([rest])


def _bytes(content: bytes) -> bytes:
    return _size(len(content)) + content


def _text(content: str) -> bytes:
    assert content.isascii(), content
    return _bytes(content.encode())


def _need(java: Path | None) -> Path:
    if java is None:
        missing(f"Java {maven.OLDEST}", "install a JDK, or name one in JAVA_HOME")
    if not maven.ELASTICSEARCH.home().exists():
        missing("Elasticsearch", "make services installs it")
    assert java is not None
    return java


@contextmanager
def node(settings: Mapping[str, str] | None = None) -> Iterator[Elasticsearch]:
    with folder("ops-elasticsearch-") as home:
        made = Elasticsearch(home, settings)
        try:
            made.daemon.start()
            yield made
        finally:
            made.daemon.stop()
