"""Elasticsearch 8 for the tests: one node with its HTTP API on a free loopback port, and the calls that a test makes to it.

The jars come from Maven, where the distribution is not: the folders, the modules and the arguments, which the start script of the
distribution would make, are made here. The security module needs OpenSAML, which is in other repositories alone; as only SAML realms use
it, modules that are empty but for three interfaces stand in its place.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shutil
import urllib.error
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

_HTTP, _CORE, _SECURITY = "transport-netty4", "x-pack-core", "x-pack-security"
# What the names of a module's jars begin with. All other jars are the server's.
_MODULES = {
    _HTTP: (_HTTP, "netty-", "elasticsearch-ssl-config"),
    _CORE: (
        _CORE,
        "x-pack-template-resources",
        "elasticsearch-ssl-config",
        "commons-",
        "http",
        "log4j-1.2-api",
        "log4j-slf4j2-impl",
        "slf4j-api",
        "unboundid-ldapsdk",
    ),
    _SECURITY: (
        _SECURITY,
        _HTTP,
        "netty-",
        "accessors-smart",
        "asm",
        "content-type",
        "jcip-annotations",
        "json-smart",
        "lang-tag",
        "nimbus-jose-jwt",
        "oauth2-oidc-sdk",
    ),
}
_OPENSAML = "org/opensaml/"  # in more.jar
_ABSENT = (  # modules that the security module names
    "net.shibboleth.utilities.java.support",
    "org.opensaml.core",
    "org.opensaml.saml",
    "org.opensaml.saml.impl",
    "org.opensaml.security",
    "org.opensaml.security.impl",
    "org.opensaml.xmlsec",
    "org.opensaml.xmlsec.impl",
)
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
_SECURED = {
    "xpack.security.enabled": "true",
    "resource.reload.interval.high": "200ms",  # how often it looks whether its users and roles have changed
}
_ADMIN = "tests"
_ROUNDS = 10_000
SETTINGS = {
    "cluster.name": "tests",
    "node.name": "node",
    "discovery.type": "single-node",
    "network.host": "127.0.0.1",
    # How full the disk of this machine is, is no business of a test unless it says so.
    "cluster.routing.allocation.disk.threshold_enabled": "false",
    # Whenever it looks at its disks it takes blocks off by itself, and a shorter interval counts only after the look that is due.
    "cluster.info.update.interval": "1h",
}


class Elasticsearch:
    """`settings` as in elasticsearch.yml, over SETTINGS. Its data stays when it is killed; it runs as the servers' user.

    `secured`: with logins and privileges. The calls here are then those of a superuser.
    """

    def __init__(self, home: Path, settings: Mapping[str, str] | None = None, *, secured: bool = False) -> None:
        program = _need(maven.java())
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._runs_as = run_as()
        self.repositories = home / "repositories"  # a snapshot may be written below it
        for name in (
            "config",
            "data",
            "lib/tools/ansi-console",
            "modules",
            "plugins",
            "repositories",
            "tmp",
        ):
            (home / name).mkdir(parents=True)
        (home / "config" / "log4j2.properties").write_text(_LOGGING)
        self._login: tuple[str, str] | None = None
        self._users: dict[str, tuple[str, str]] = {}
        self._roles: dict[str, Any] = {}
        for module in (_HTTP, _CORE, _SECURITY) if secured else (_HTTP,):
            self._make_module(module)
        if secured:
            self._stand_in_for_opensaml()
            self._enter(_ADMIN, "superuser", password := secrets.token_hex(8))
            self._login = (_ADMIN, password)
        server = maven.ELASTICSEARCH
        (home / "lib/tools/ansi-console/more.jar").symlink_to(server.home() / "more.jar")
        own = {
            "path.home": str(home),
            "path.data": str(home / "data"),
            "path.repo": str(self.repositories),
            "http.port": str(self.port),
            "transport.port": str(free_port()),
        }
        (home / "arguments").write_bytes(
            _arguments({**SETTINGS, **(_SECURED if secured else {}), **own, **(settings or {})}, home / "config", home)
        )
        self._runs_as.own(home, *home.rglob("*"))
        java = [
            str(program),
            *_JVM,
            f"-Djava.io.tmpdir={home / 'tmp'}",
            f"-Des.path.home={home}",
            f"-Des.entitlement.agentJar={server.home() / 'more.jar'}",
            f"--patch-module=java.base={server.home() / f'{_BRIDGE}-{server.version}.jar'}",
            f"--module-path={server.path(_BRIDGE, *(name for names in _MODULES.values() for name in names))}",
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
            user=self._runs_as,
        )

    def _make_module(self, module: str) -> None:
        """What the server loads as a module: its jars, and two files that the distribution has beside them and the jar inside.

        Copies: the server lets a module read below `modules` and nowhere else.
        """
        folder, jars = self.home / "modules" / module, maven.ELASTICSEARCH.home()
        folder.mkdir()
        for name in maven.ELASTICSEARCH.jars:
            if name.startswith(_MODULES[module]):
                shutil.copyfile(jars / name, folder / name)
        with zipfile.ZipFile(jars / f"{module}-{maven.ELASTICSEARCH.version}.jar") as jar:
            for name in ("plugin-descriptor.properties", "entitlement-policy.yaml"):
                (folder / name).write_bytes(jar.read(f"META-INF/es-plugins/{module}/{name}"))

    def _stand_in_for_opensaml(self) -> None:
        with zipfile.ZipFile(maven.ELASTICSEARCH.home() / "more.jar") as more:
            classes = {name: more.read(name) for name in more.namelist() if name.startswith(_OPENSAML)}
        for module in _ABSENT:
            with zipfile.ZipFile(self.home / "modules" / _SECURITY / f"{module}.jar", "w") as jar:
                jar.writestr("META-INF/MANIFEST.MF", f"Manifest-Version: 1.0\nAutomatic-Module-Name: {module}\n")
                for name, content in classes.items() if module == "org.opensaml.core" else ():
                    jar.writestr(name, content)

    # Users, of a secured node

    def user(self, role: Mapping[str, Any]) -> tuple[str, str]:
        """A new one that may do just this (not nothing), once the node knows it: its name and password. `role` as in roles.yml."""
        name, password = f"u{secrets.token_hex(4)}", secrets.token_hex(8)
        self._roles[name] = dict(role)
        self._enter(name, name, password)
        eventually(lambda: self._knows(name, password), why=lambda: f"{self.daemon}")
        return name, password

    def _enter(self, name: str, role: str, password: str) -> None:
        salt = os.urandom(32)
        digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ROUNDS, 32)
        hashed = f"{{PBKDF2}}{_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"
        self._users[name] = (role, hashed)
        lines = {
            "roles.yml": "".join(f"{name}: {json.dumps(role)}\n" for name, role in self._roles.items()),
            "users_roles": "".join(f"{role}:{user}\n" for user, (role, _) in self._users.items()),
            "users": "".join(f"{user}:{hashed}\n" for user, (_, hashed) in self._users.items()),
        }
        for file, content in lines.items():
            new = self.home / "config" / f".{file}"
            new.write_text(content)
            self._runs_as.own(new)
            new.replace(self.home / "config" / file)

    def _knows(self, name: str, password: str) -> bool:
        """Its role, too: users and roles are read one after the other."""
        try:
            found = self._send("GET", "/_security/user/_privileges", login=(name, password))
        except urllib.error.HTTPError as refused:
            if refused.code != 401:
                raise
            return False
        return bool(found["cluster"] or found["indices"])

    # Calls

    def call(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        """The JSON of the answer. Raises HTTPError, an OSError, for a refusal; its body says why."""
        return self._send(method, path, body, query, self._login)

    def _send(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        login: tuple[str, str] | None = None,
    ) -> Any:
        address = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(address, method=method)
        if login is not None:
            request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(login).encode()).decode()}")
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
def node(settings: Mapping[str, str] | None = None, *, secured: bool = False) -> Iterator[Elasticsearch]:
    with folder("ops-elasticsearch-") as home:
        made = Elasticsearch(home, settings, secured=secured)
        try:
            made.daemon.start()
            yield made
        finally:
            made.daemon.stop()
