"""Everything that opens something, from the inventory: lazily, once, closed together. Safe for threads."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    NotThereError,
    OpsError,
    UnreachableError,
    UsageError,
)
from ops_platform.inventory.loader import LoadedInventory
from ops_platform.inventory.model import (
    DagsterWeb,
    LedgerCheckpoints,
    ObjectLock,
    PostgresConnection,
    Target,
    Tls,
    VaultAuth,
)
from ops_platform.inventory.systems import HttpAuth, HttpEndpoint
from ops_platform.inventory.values import Secret, SecretRef

if TYPE_CHECKING:
    import psycopg
    from psycopg.pq.abc import PGconn

    from ops_platform.clients.alertmanager import Alertmanager
    from ops_platform.clients.http import HttpApi
    from ops_platform.clients.kafka import Kafka
    from ops_platform.clients.keys import KeyService
    from ops_platform.clients.kubernetes import Kubernetes
    from ops_platform.clients.objectstore import ObjectStore
    from ops_platform.clients.postgres import Login, Member
    from ops_platform.clients.prometheus import Prometheus
    from ops_platform.clients.redis import Redis
    from ops_platform.clients.slack import Slack
    from ops_platform.clients.vault import TransitSigner, VaultSession
    from ops_platform.inventory.systems import (
        AlertmanagerSystem,
        ElasticsearchSystem,
        GitSystem,
        KafkaSystem,
        KubernetesSystem,
        PrometheusSystem,
        RedisSystem,
    )

T = TypeVar("T")


class Access:
    """The way to every system that the inventory names."""

    def __init__(self, loaded: LoadedInventory, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.loaded = loaded
        self.inventory = loaded.inventory
        self.clock = clock
        self._lock = threading.RLock()
        self._open: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            opened, self._open = list(self._open.values()), {}
        for thing in reversed(opened):
            with contextlib.suppress(OpsError):
                if close := getattr(thing, "close", None):
                    close()

    def _once(self, kind: str, name: str, make: Callable[[], T]) -> T:
        with self._lock:
            if (kind, name) not in self._open:
                self._open[kind, name] = make()
            return self._open[kind, name]

    def path(self, text: str) -> Path:
        """`{state}` and `{inventory}` expanded; a relative path stands beside platform.yaml."""
        from ops_platform.local import state_dir

        home = self.loaded.path.parent
        return home / text.replace("{state}", str(state_dir())).replace("{inventory}", str(home))

    # Secrets

    def secret(self, ref: SecretRef) -> Secret:
        """The secret's value now: files and variables are read each time, Vault's leases are kept until they end."""
        if ref.scheme == "env":
            value = os.environ.get(ref.path)
            if not value:
                raise NotThereError(
                    "this environment variable is not set", where=str(ref), remedy=f"export {ref.path}=…"
                )
            return Secret(value)
        if ref.scheme == "file":
            return self._file_secret(ref)
        value = self._vault_of(ref.path).read(ref.path, ref.field or "value")
        if not value.reveal():
            raise NotThereError("this secret is empty", where=str(ref), remedy="write it, or name another field")
        return value

    def _file_secret(self, ref: SecretRef) -> Secret:
        file, where = self.path(ref.path), str(ref)
        try:
            if file.stat().st_mode & 0o077 and not _mounted_by_kubernetes(file):
                raise AccessDeniedError("others may read this secret", where=where, remedy=f"chmod 600 {file}")
            value = file.read_text().rstrip("\r\n")
        except OSError as error:
            raise NotThereError(
                f"this secret's file cannot be read: {error.strerror}", where=where, remedy=f"write it to {file}"
            ) from None
        except UnicodeDecodeError:
            raise NotThereError("this secret's file holds no text in UTF-8", where=where) from None
        if not value:
            raise NotThereError("this secret's file is empty", where=where)
        return Secret(value)

    def _vault_of(self, path: str) -> VaultSession:
        if not self.inventory.vaults:
            raise UsageError(
                "the inventory names no Vault", where=f"vault://{path}", remedy="declare one under `vaults`"
            )
        return self.vault(next(iter(self.inventory.vaults)))

    def vault(self, vault_id: str) -> VaultSession:
        return self._once("vault", vault_id, lambda: self.vault_as(vault_id, self.inventory.vaults[vault_id].auth))

    def vault_as(self, vault_id: str, auth: VaultAuth) -> VaultSession:
        """A session of its own with another login. The caller closes it."""
        from ops_platform.clients.vault import VaultSession

        server = self.inventory.vaults[vault_id]
        return VaultSession(
            self.url(server.url),
            auth,
            self.secret,
            namespace=server.namespace,
            ca=str(self.path(server.ca)) if server.ca else None,
            timeout=server.timeout.total_seconds(),
            clock=self.clock,
        )

    def with_vault(self, vault_id: str, session: VaultSession) -> Access:
        """The same ways, but that Vault is the one of the session: secrets and keys come from it. Closing it closes the session."""
        other = Access(self.loaded, clock=self.clock)
        other._open["vault", vault_id] = session
        return other

    # Stores and keys

    def store(self, store_id: str) -> ObjectStore:
        return self._once(
            "store", store_id, lambda: self._make_store(store_id, self.inventory.stores[store_id].object_lock)
        )

    def checkpoint_store(self, checkpoints: LedgerCheckpoints) -> ObjectStore:
        """The store of the ledger's checkpoints, with a lock of their own where the inventory gives them one."""
        lock = checkpoints.object_lock or self.inventory.stores[checkpoints.store].object_lock
        return self._once("checkpoints", checkpoints.store, lambda: self._make_store(checkpoints.store, lock))

    def _make_store(self, store_id: str, lock: ObjectLock | None) -> ObjectStore:
        from ops_platform.clients.s3 import Lock, S3Settings, S3Store

        store = self.inventory.stores[store_id]
        settings = S3Settings(
            endpoint=self.url(store.endpoint),
            bucket=store.bucket,
            access_key=self.secret(store.access_key),
            secret_key=self.secret(store.secret_key),
            session_token=self.secret(store.session_token) if store.session_token else None,
            region=store.region,
            prefix=store.prefix,
            virtual=store.addressing == "virtual",
            ca=str(self.path(store.ca)) if store.ca else None,
            timeout=store.timeout.total_seconds(),
            lock=Lock(lock.mode, lock.retain) if lock else None,
        )
        return S3Store(settings, clock=self.clock)

    def keys(self, key_service_id: str) -> KeyService:
        return self._once("keys", key_service_id, lambda: self._make_keys(key_service_id))

    def _make_keys(self, key_service_id: str) -> KeyService:
        from ops_platform.clients.vault import FileKeys, TransitKeys

        service = self.inventory.key_services[key_service_id]
        if service.kind == "file":
            return FileKeys(self.path(service.path or ""))
        return TransitKeys(self.vault(service.vault or ""), mount=service.mount, key=service.key)

    def signer(self, checkpoints: LedgerCheckpoints) -> TransitSigner:
        from ops_platform.clients.vault import TransitSigner

        return TransitSigner(self.vault(checkpoints.vault), mount=checkpoints.mount, key=checkpoints.key)

    # Databases

    def platform_db(self, *, autocommit: bool = True) -> psycopg.Connection[Any]:
        """The platform's own database. Raises UsageError where the inventory names none."""
        from ops_platform.clients.postgres import Login, connect

        database = self.inventory.platform.database
        if database is None:
            raise UsageError(
                "the inventory names no database for the ledger",
                where=str(self.loaded.path),
                remedy="declare platform.database",
            )
        host, port = self.address(database.host, database.port)
        mode, ca = self._tls(database.tls)
        return connect(
            Login(database.dbname, database.user, self.secret(database.password), mode, ca),
            host,
            port,
            autocommit=autocommit,
        )

    def login(self, connection: PostgresConnection) -> Login:
        from ops_platform.clients.postgres import Login

        if connection.credentials:
            path = connection.credentials.removeprefix("vault://")
            data = self._vault_of(path).credentials(path)
            user, password = data["username"].reveal(), data["password"]
        else:
            user, password = connection.user or "", self.secret(connection.password) if connection.password else None
        mode, ca = self._tls(connection.tls)
        timeout = int(connection.connect_timeout.total_seconds())
        return Login(connection.dbname, user, password, mode, ca, timeout, connection.made_by)

    def members(self, target: Target) -> list[Member]:
        """Each declared server as it answers now; one that does not answer has its reason.

        Raises OpsError where the credentials cannot be had: then no server was asked, and none is to blame.
        """
        from ops_platform.clients.postgres import Member, ask_member

        found: list[Member] = []
        login = self.login(target.connection)
        for place in target.connection.hosts:
            try:
                found.append(ask_member(login, *self.address(place.host, place.port)))
            except OpsError as error:
                said = f"{error.where}: {error.what}" if error.where else error.what
                found.append(Member(place.host, place.port, error=said, failure=error))
        return found

    def member(self, target: Target, role: Literal["primary", "standby", "any"] = "primary") -> Member:
        """As `choose_member` does, of the servers as they answer now."""
        return choose_member(target.id, self.members(target), role)

    def postgres(
        self,
        target: Target,
        *,
        role: Literal["primary", "standby", "any"] = "primary",
        dbname: str | None = None,
        autocommit: bool = True,
        member: Member | None = None,
    ) -> psycopg.Connection[Any]:
        from ops_platform.clients.postgres import connect

        at = member or self.member(target, role)
        return connect(self.login(target.connection), at.host, at.port, dbname=dbname, autocommit=autocommit)

    def replication(self, target: Target, member: Member | None = None) -> PGconn:
        from ops_platform.clients.postgres import connect_replication

        at = member or self.member(target, "primary")
        return connect_replication(self.login(target.connection), at.host, at.port)

    # Other systems

    def http(self, system: ElasticsearchSystem | PrometheusSystem | AlertmanagerSystem) -> tuple[HttpApi, ...]:
        """Its HTTP API, once for each address."""
        urls = (system.url,) if system.kind == "prometheus" else system.urls
        scheme = "ApiKey" if system.kind == "elasticsearch" else "Bearer"
        return tuple(self._http(f"{system.id} {url}", system.kind.capitalize(), system, url, scheme) for url in urls)

    def http_sandbox(self, system: ElasticsearchSystem) -> tuple[HttpApi, ...]:
        """The cluster in which its snapshots are restored, once for each address: itself where the inventory names no other."""
        restore = system.restore
        named = tuple(
            self._http(f"{system.id} sandbox {url}", "Elasticsearch", restore, url, "ApiKey") for url in restore.urls
        )
        return named or self.http(system)

    def _http(
        self, name: str, what: str, endpoint: HttpEndpoint, url: str, scheme: Literal["Bearer", "ApiKey"] = "Bearer"
    ) -> HttpApi:
        from ops_platform.clients.http import HttpApi, Login

        return self._once(
            "http",
            name,
            lambda: HttpApi(
                self.url(url),
                what,
                login=Login(endpoint.auth, self.secret, scheme),
                ca=str(self.path(endpoint.ca)) if endpoint.ca else None,
                timeout=endpoint.timeout.total_seconds(),
                clock=self.clock,
            ),
        )

    def patroni(self, target: Target) -> tuple[HttpApi, ...]:
        """Patroni's REST API, once for each member. Raises UsageError where the inventory names none."""
        if target.patroni is None:
            raise UsageError(
                f"{target.id} names no Patroni",
                where=str(self.loaded.path),
                remedy="declare patroni.urls of the target",
            )
        api = target.patroni
        return tuple(self._http(f"{target.id} patroni {url}", "Patroni", api, url) for url in api.urls)

    def dagster(self) -> HttpApi:
        """Our own Dagster's web server; where the inventory names none the one of `ops ui`. Raises UsageError without either."""
        from ops_platform.local import web_ui

        web = self.inventory.platform.dagster
        if web is None and (url := web_ui(self.loaded.path)) is not None:
            web = DagsterWeb(url=url)
        if web is None:
            raise UsageError(
                "the inventory names no Dagster web server, and ops ui runs none over it",
                where=str(self.loaded.path),
                remedy="declare platform.dagster, or start ops ui",
            )
        return self._http("dagster", "Dagster", web, web.url)

    def github(self, system: GitSystem) -> HttpApi:
        """GitHub's REST API, for the repositories of that system."""
        endpoint = HttpEndpoint(auth=HttpAuth(token=system.token), ca=system.ca, timeout=system.timeout)
        return self._http(f"{system.id} github", "GitHub", endpoint, system.api)

    def alertmanager(self, system: AlertmanagerSystem) -> Alertmanager:
        from ops_platform.clients.alertmanager import Alertmanager

        return self._once(
            "alertmanager",
            system.id,
            lambda: Alertmanager(
                system.id,
                self.http(system),
                largest=system.largest_answer,
                settled_after=system.settled_after,
                watchdog=system.watchdog,
                clock=self.clock,
            ),
        )

    def prometheus(self, system: PrometheusSystem) -> Prometheus:
        from ops_platform.clients.prometheus import Prometheus

        return self._once("prometheus", system.id, lambda: Prometheus(self.http(system)[0]))

    def slack(self) -> Slack | None:
        """The bot; None where the inventory has none."""
        from ops_platform.clients.http import HttpApi, Login
        from ops_platform.clients.slack import Slack

        chat = self.inventory.remediation.slack if self.inventory.remediation else None
        if chat is None:
            return None
        login = Login(HttpAuth(token=chat.bot_token), self.secret)
        return self._once(
            "slack", "bot", lambda: Slack(HttpApi(self.url(chat.api), "Slack", login=login, clock=self.clock))
        )

    def kafka(self, system: KafkaSystem) -> Kafka:
        from ops_platform.clients.kafka import Kafka

        return self._once(
            "kafka",
            system.id,
            lambda: Kafka(
                system.id,
                [self.address(place.host, place.port) for place in system.bootstrap],
                tls=system.tls,
                ca=str(self.path(system.ca)) if system.ca else None,
                sasl=system.sasl,
                resolve=self.secret,
                timeout=system.timeout.total_seconds(),
                clock=self.clock,
            ),
        )

    def schema_registry(self, system: KafkaSystem) -> HttpApi | None:
        """The registry's API; None where the system names none."""
        if (registry := system.registry) is None:
            return None
        return self._http(f"{system.id} registry", "the schema registry", registry, registry.url)

    def redis(self, system: RedisSystem) -> Redis:
        from ops_platform.clients.redis import Redis

        return self._once(
            "redis",
            system.id,
            lambda: Redis(
                system.id,
                system.mode,
                [self.address(place.host, place.port) for place in system.hosts],
                master=system.master,
                user=system.user,
                password=partial(self.secret, system.password) if system.password else None,
                tls=system.tls,
                ca=str(self.path(system.ca)) if system.ca else None,
                timeout=system.timeout.total_seconds(),
            ),
        )

    def kubernetes(self, system: KubernetesSystem) -> Kubernetes:
        from ops_platform.clients.kubernetes import open_kubernetes

        return self._once("kubernetes", system.id, lambda: open_kubernetes(system, self.secret, clock=self.clock))

    # Addresses

    def address(self, host: str, port: int) -> tuple[str, int]:
        from ops_platform.local import endpoint

        if not host.startswith("local://"):
            return host, port
        found = endpoint(host.removeprefix("local://"))
        return found.host, found.port

    def url(self, text: str) -> str:
        from ops_platform.local import endpoint

        parts = urlsplit(text)
        return endpoint(parts.netloc).url if parts.scheme == "local" else urlunsplit(parts).rstrip("/")

    def _tls(self, tls: Tls) -> tuple[str, str | None]:
        """Over a unix socket libpq leaves TLS out, whatever is asked."""
        return tls.mode, (str(self.path(tls.ca)) if tls.ca else None)


def _mounted_by_kubernetes(file: Path) -> bool:
    """A secret's volume: a file there is a link through the link `..data`. Only the pod's own containers see it."""
    return (file.parent / "..data").is_symlink() or str(file).startswith(("/run/secrets/", "/var/run/secrets/"))


def choose_member(
    target_id: str, members: Sequence[Member], role: Literal["primary", "standby", "any"] = "primary"
) -> Member:
    """A server in that role; of several primaries the one of the newest timeline.

    Raises UnreachableError with each server's answer where there is none (or the one kind of error that all of them
    have: a refused password is AccessDeniedError), ConflictError where the servers contradict each other.
    """
    answered = [member for member in members if member.error is None]
    if len({member.system_identifier for member in answered}) > 1:
        raise ConflictError(
            f"the hosts of {target_id} belong to different clusters: {_said(answered)}",
            remedy="correct connection.hosts: one cluster is one target",
        )
    fitting = [member for member in answered if role == "any" or member.in_recovery == (role == "standby")]
    if not fitting:
        raise _nobody(target_id, role, members)
    return _leading(target_id, fitting, answered) if role == "primary" else fitting[0]


def _leading(target_id: str, primaries: Sequence[Member], answered: Sequence[Member]) -> Member:
    newest = max(member.timeline or 0 for member in primaries)
    leading = [member for member in primaries if (member.timeline or 0) == newest]
    if len(leading) > 1:
        raise ConflictError(
            f"{len(leading)} servers of {target_id} say that they are the primary: {_said(leading)}",
            remedy="stop the one that is not, before both are written to",
        )
    # A standby that still follows the timeline before the primary's is on its way to it. One that says no timeline proves nothing
    # against the primary; there is none: a server that answers has at least the one in its control file.
    ahead = [member for member in answered if (member.timeline or 0) > newest]
    if ahead:
        raise ConflictError(
            f"the primary of {target_id} that answers may be an old one, another was promoted since: {_said([*leading, *ahead])}",
            remedy="bring the promoted one back to answer, and stop the old one; a standby that left the cluster by itself is made anew,"
            " or taken out of connection.hosts",
        )
    return leading[0]


def _said(members: Sequence[Member]) -> str:
    def role(member: Member) -> str:
        return f"{'standby' if member.in_recovery else 'primary'}, timeline {member.timeline}"

    return "; ".join(f"{m.address}: {m.error or role(m)}" for m in members)


def _nobody(target_id: str, role: str, members: Sequence[Member]) -> OpsError:
    what = f"no {'server' if role == 'any' else role} of {target_id} answers: {_said(members)}"
    failures = [member.failure for member in members]
    first = failures[0]
    if first is not None and all(type(failure) is type(first) for failure in failures):
        return type(first)(what, remedy=first.remedy)
    return UnreachableError(what, remedy=f"ops doctor {target_id} looks at each")
