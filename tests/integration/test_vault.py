"""Vault: logins, leases and keys against a real server; Kubernetes' login against its published interface."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import secrets
import socket
import stat
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ops_platform.clients.vault import FileKeys, TransitKeys, VaultSealedError, VaultSession
from ops_platform.errors import (
    AccessDeniedError,
    CorruptionError,
    NotThereError,
    OpsError,
    UnreachableError,
)
from ops_platform.inventory import Secret, SecretRef
from ops_platform.inventory.model import VaultAuth
from tests.integration import http_faults as faults
from tests.integration.http_faults import FaultyProxy
from tests.rig import PASSWORD, Cluster, Ground

VALUE = "correct-horse-battery-staple"
NOTHING = 'path "nothing" { capabilities = ["read"] }'
POLICY = """
path "{mount}/*" {{ capabilities = ["read"] }}
path "sys/leases/renew" {{ capabilities = ["update"] }}
path "sys/leases/revoke" {{ capabilities = ["update"] }}
"""


@dataclass
class MovedClock:
    """The real time and what a test adds to it. Sleeping moves it on."""

    ahead: timedelta = timedelta(0)
    slept: list[float] = field(default_factory=list)

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def monotonic(self) -> float:
        return self.now().timestamp()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Desk:
    """Root's hands on the server of the tests: mounts, policies, roles of their own for each test."""

    def __init__(self, ground: Ground) -> None:
        ground.component("vault")
        self.url = f"http://127.0.0.1:{ground.place.port('vault')}"
        self.port = ground.place.port("vault")
        self.root = self.client((ground.place.directory / "secrets" / "vault.root_token").read_text())
        self.unseal_key = (ground.place.directory / "secrets" / "vault.unseal_key").read_text()
        self.name = f"t{secrets.token_hex(6)}"
        self.resolved: dict[str, str] = {}
        self.sessions: list[VaultSession] = []

    def client(self, token: str) -> Any:
        import hvac

        return hvac.Client(url=self.url, token=token, timeout=20)

    def kv(self, version: int, secret: dict[str, Any], path: str = "app/login") -> str:
        """A secret in a mount of its own; its path with the mount."""
        mount = f"{self.name}-kv{version}"
        self.root.sys.enable_secrets_engine("kv", path=mount, options={"version": str(version)})
        write = (
            self.root.secrets.kv.v2.create_or_update_secret
            if version == 2
            else self.root.secrets.kv.v1.create_or_update_secret
        )
        # A mount of version 2 upgrades itself for a moment after it was made.
        for _ in range(200):
            with contextlib.suppress(Exception):
                write(path=path, secret=secret, mount_point=mount)
                break
        else:
            pytest.fail(f"the mount {mount} takes no secret")
        return f"{mount}/{path}"

    def approle(self, policy: str = NOTHING, **options: Any) -> VaultAuth:
        """A role of its own for each call."""
        name = f"{self.name}-{len(self.resolved)}"
        self.root.sys.create_or_update_policy(name, policy)
        self.root.auth.approle.create_or_update_approle(name, token_policies=[name], **({"token_ttl": "1h"} | options))
        self.resolved[f"R{name}"] = self.root.auth.approle.read_role_id(name)["data"]["role_id"]
        self.resolved[f"S{name}"] = self.root.auth.approle.generate_secret_id(name)["data"]["secret_id"]
        return VaultAuth(method="approle", role_id=SecretRef("env", f"R{name}"), secret_id=SecretRef("env", f"S{name}"))

    def rotate(self, auth: VaultAuth) -> str:
        """Another secret_id than Vault knows."""
        assert auth.secret_id is not None
        wrong = self.resolved[auth.secret_id.path] = secrets.token_hex(16)
        return wrong

    def session(self, auth: VaultAuth, *, url: str | None = None, **more: Any) -> VaultSession:
        made = VaultSession(
            url or self.url, auth, lambda ref: Secret(self.resolved[ref.path]), **({"timeout": 20.0} | more)
        )
        self.sessions.append(made)
        return made

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        for mount in self.root.sys.list_mounted_secrets_engines()["data"]:
            if mount.startswith(self.name):
                with contextlib.suppress(Exception):
                    self.root.sys.revoke_prefix(mount)
                self.root.sys.disable_secrets_engine(mount)


@pytest.fixture
def desk(ground: Ground) -> Iterator[Desk]:
    made = Desk(ground)
    yield made
    made.close()


def token_of(session: VaultSession) -> str:
    return session._client.token


# Secrets behind references


@pytest.mark.parametrize("version", [2, 1])
def test_a_field_of_a_secret_is_read_in_either_version(desk: Desk, version: int) -> None:
    path = desk.kv(version, {"password": VALUE, "port": 5432, "data": "a field of that name"})
    session = desk.session(desk.approle(POLICY.format(mount=path.partition("/")[0])))
    assert session.read(path, "password").reveal() == VALUE
    assert session.read(path, "port").reveal() == "5432"
    assert session.read(path, "data").reveal() == "a field of that name"
    assert VALUE not in repr(session.read(path, "password"))


@pytest.mark.parametrize("version", [2, 1])
def test_a_missing_field_names_those_that_are_there_and_not_their_values(desk: Desk, version: int) -> None:
    path = desk.kv(version, {"passwort": VALUE, "user": "x"})
    session = desk.session(desk.approle(POLICY.format(mount=path.partition("/")[0])))
    with pytest.raises(NotThereError, match="the secret has no field 'password'; it has passwort, user") as caught:
        session.read(path, "password")
    assert caught.value.where == f"vault://{path}"
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize("version", [2, 1])
def test_a_secret_that_is_not_there_is_no_matter_of_rights(desk: Desk, version: int) -> None:
    """The usual policy for version 2 forbids the plain path: that must not turn "nothing there" into "refused"."""
    path = desk.kv(version, {"password": VALUE})
    mount = path.partition("/")[0]
    policy = POLICY.format(mount=f"{mount}/data" if version == 2 else mount)
    session = desk.session(desk.approle(policy))
    with pytest.raises(NotThereError, match="Vault has nothing there"):
        session.read(f"{mount}/app/nothing", "password")


def test_a_deleted_version_is_not_there(desk: Desk) -> None:
    path = desk.kv(2, {"password": VALUE})
    mount, _, rest = path.partition("/")
    session = desk.session(desk.approle(POLICY.format(mount=f"{mount}/data")))
    desk.root.secrets.kv.v2.delete_latest_version_of_secret(path=rest, mount_point=mount)
    with pytest.raises(NotThereError):
        session.read(path, "password")


@pytest.mark.parametrize(
    "policy", [NOTHING, 'path "PATH" { capabilities = ["read"] }'], ids=["no rights", "a policy without data/"]
)
def test_a_policy_that_does_not_allow_it_is_named(desk: Desk, policy: str) -> None:
    path = desk.kv(2, {"password": VALUE})
    session = desk.session(desk.approle(policy.replace("PATH", path)))
    with pytest.raises(AccessDeniedError, match=r"Vault refuses: .*permission denied") as caught:
        session.read(path, "password")
    mount, _, rest = path.partition("/")
    assert f"allow read on {mount}/data/{rest} (KV version 2)" in (caught.value.remedy or "")


def test_a_refusal_by_policy_costs_no_new_login(desk: Desk) -> None:
    """A new login would end the leases of the old one, for nothing."""
    path = desk.kv(2, {"password": VALUE})
    session = desk.session(desk.approle(POLICY.format(mount=path.partition("/")[0])))
    session.read(path, "password")
    before = token_of(session)
    with pytest.raises(AccessDeniedError):
        session.read("transit/keys/ops-backup", "x")
    assert token_of(session) == before


# Logins


def test_a_wrong_secret_id_is_refused_with_what_to_check(desk: Desk) -> None:
    auth = desk.approle()
    wrong = desk.rotate(auth)
    with pytest.raises(AccessDeniedError, match="Vault refuses the login") as caught:
        desk.session(auth).read("secret/a", "b")
    assert caught.value.where == f"{desk.url} (approle login)"
    assert caught.value.remedy == "check role_id, secret_id and their age"
    assert wrong not in str(caught.value)


def test_a_secret_that_cannot_be_resolved_is_the_error_itself(desk: Desk) -> None:
    def resolve(ref: SecretRef) -> Secret:
        raise NotThereError("this environment variable is not set", where=str(ref))

    session = VaultSession(desk.url, desk.approle(), resolve)
    with pytest.raises(NotThereError, match=r"env://R.*: this environment variable is not set"):
        session.read("secret/a", "b")


def test_the_token_is_renewed_before_it_ends(desk: Desk) -> None:
    path = desk.kv(2, {"password": VALUE})
    clock = MovedClock()
    auth = desk.approle(POLICY.format(mount=path.partition("/")[0]), token_ttl="1h", token_max_ttl="4h")
    session = desk.session(auth, clock=clock)
    session.read(path, "password")
    token = token_of(session)
    clock.ahead = timedelta(minutes=39)
    session.read(path, "password")
    assert desk.root.auth.token.lookup(token)["data"].get("last_renewal_time") is None
    clock.ahead = timedelta(minutes=41)  # two thirds have gone
    session.read(path, "password")
    assert desk.root.auth.token.lookup(token)["data"]["last_renewal_time"]
    assert token_of(session) == token


def test_a_token_that_cannot_be_renewed_is_replaced(desk: Desk) -> None:
    path = desk.kv(2, {"password": VALUE})
    clock = MovedClock()
    session = desk.session(desk.approle(POLICY.format(mount=path.partition("/")[0]), token_type="batch"), clock=clock)
    session.read(path, "password")
    first = token_of(session)
    clock.ahead = timedelta(minutes=41)
    assert session.read(path, "password").reveal() == VALUE
    assert token_of(session) != first


def test_a_token_that_is_revoked_in_the_middle_is_replaced(desk: Desk) -> None:
    path = desk.kv(2, {"password": VALUE})
    session = desk.session(desk.approle(POLICY.format(mount=path.partition("/")[0])))
    session.read(path, "password")
    first = token_of(session)
    desk.root.auth.token.revoke(first)
    assert session.read(path, "password").reveal() == VALUE
    assert token_of(session) != first


def test_a_token_that_is_revoked_under_a_key_service_is_replaced(desk: Desk, ground: Ground) -> None:
    keys = TransitKeys(desk.session(_platform(desk, ground)))
    one = keys.new_data_key()
    desk.root.auth.token.revoke(token_of(keys._session))
    other = keys.new_data_key()
    assert one.plain != other.plain


def test_a_login_that_no_longer_works_is_the_error(desk: Desk) -> None:
    path = desk.kv(2, {"password": VALUE})
    auth = desk.approle(POLICY.format(mount=path.partition("/")[0]))
    session = desk.session(auth)
    session.read(path, "password")
    desk.root.auth.token.revoke(token_of(session))
    desk.rotate(auth)
    with pytest.raises(AccessDeniedError, match="Vault refuses the login"):
        session.read(path, "password")


def test_a_token_that_was_handed_to_us_is_used_and_not_ended(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = desk.kv(2, {"password": VALUE})
    desk.root.sys.create_or_update_policy(desk.name, POLICY.format(mount=path.partition("/")[0]))
    token = desk.resolved["TOKEN"] = desk.root.auth.token.create(policies=[desk.name], ttl="1h")["auth"]["client_token"]
    monkeypatch.setenv("VAULT_TOKEN", "one-that-happens-to-stand-in-the-environment")
    session = desk.session(VaultAuth(method="token", token=SecretRef("env", "TOKEN")))
    assert session.read(path, "password").reveal() == VALUE
    session.close()
    assert desk.root.auth.token.lookup(token)["data"]["id"] == token


def test_a_token_of_ours_ends_with_the_session(desk: Desk) -> None:
    import hvac.exceptions

    path = desk.kv(2, {"password": VALUE})
    session = desk.session(desk.approle(POLICY.format(mount=path.partition("/")[0])))
    session.read(path, "password")
    token = token_of(session)
    session.close()
    with pytest.raises(hvac.exceptions.Forbidden):
        desk.root.auth.token.lookup(token)
    assert session.read(path, "password").reveal() == VALUE  # it may be used again


# Kubernetes: no cluster is here, so its login is answered as the interface is published
# (POST /v1/auth/:mount/login with {"role", "jwt"}; 200 with "auth", 403 or 400 with "errors").


def _kubernetes(tmp_path: Path, jwt: str | None = "header.payload.signature", mount: str | None = None) -> VaultAuth:
    file = tmp_path / "token"
    if jwt is not None:
        file.write_text(jwt + "\n")
    return VaultAuth(method="kubernetes", role="ops", mount=mount, jwt_path=str(file))


def _logged_in(token: str = "hvs.from-kubernetes") -> faults.Fault:
    auth = {"client_token": token, "accessor": "a", "policies": ["ops"], "lease_duration": 3600, "renewable": True}
    return faults.reply(200, json.dumps({"request_id": "r", "auth": auth}).encode(), content_type="application/json")


def _says(status: int, *errors: str) -> faults.Fault:
    return faults.reply(status, json.dumps({"errors": errors}).encode(), content_type="application/json")


@pytest.mark.parametrize("mount", [None, "clusters/berlin"])
def test_a_pod_logs_in_with_its_service_account(
    tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch, mount: str | None
) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "one-that-happens-to-stand-in-the-environment")
    with FaultyProxy(None) as server:
        answer = json.dumps({"data": {"data": {"password": VALUE}, "metadata": {"version": 1}}}).encode()
        server.faults.extend([_logged_in(), faults.reply(200, answer, content_type="application/json")])
        session = desk.session(_kubernetes(tmp_path, mount=mount), url=server.url)
        assert session.read("secret/app", "password").reveal() == VALUE
        login, read = server.seen
        assert (login.method, login.path) == ("POST", f"/v1/auth/{mount or 'kubernetes'}/login")
        assert json.loads(login.body) == {"role": "ops", "jwt": "header.payload.signature"}
        assert "x-vault-token" not in login.headers
        assert (read.path, read.headers["x-vault-token"]) == ("/v1/secret/data/app", "hvs.from-kubernetes")
        server.always = _says(403, "permission denied")


def test_the_service_account_is_read_anew_at_each_login(tmp_path: Path, desk: Desk) -> None:
    """Kubernetes rotates it every hour."""
    with FaultyProxy(None) as server:
        auth = _kubernetes(tmp_path)
        answer = json.dumps({"data": {"data": {"a": "b"}, "metadata": {}}}).encode()
        good = faults.reply(200, answer, content_type="application/json")
        denied = _says(403, "permission denied")
        server.faults.extend([_logged_in("hvs.one"), good, denied, denied, _logged_in("hvs.two"), good])
        session = desk.session(auth, url=server.url)
        session.read("secret/app", "a")
        Path(auth.jwt_path).write_text("rotated")
        session.read("secret/app", "a")
        assert [json.loads(r.body)["jwt"] for r in server.seen if r.path.endswith("/login")] == [
            "header.payload.signature",
            "rotated",
        ]
        server.always = denied


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (_says(403, "namespace not authorized"), AccessDeniedError, "namespace not authorized"),
        (_says(400, "missing role"), AccessDeniedError, "missing role"),
        (
            _says(500, "Post https://10.0.0.1/apis/authentication: connection refused"),
            UnreachableError,
            "connection refused",
        ),
        (_says(404, "no handler for route"), NotThereError, "nothing there"),
    ],
    ids=["not bound", "no role", "no token reviewer", "not enabled"],
)
def test_a_refused_pod_hears_why(
    tmp_path: Path, desk: Desk, answer: faults.Fault, kind: type[OpsError], words: str
) -> None:
    with FaultyProxy(None, always=answer) as server:
        session = desk.session(_kubernetes(tmp_path), url=server.url, clock=MovedClock())
        with pytest.raises(kind, match=words) as caught:
            session.read("secret/app", "a")
        assert "kubernetes login" in str(caught.value)
        assert "header.payload.signature" not in str(caught.value)
        if kind is AccessDeniedError:
            assert "service account" in (caught.value.remedy or "")


def test_a_pod_without_a_service_account_hears_that(tmp_path: Path, desk: Desk) -> None:
    session = desk.session(_kubernetes(tmp_path, jwt=None))
    with pytest.raises(NotThereError, match="service account token cannot be read") as caught:
        session.read("secret/app", "a")
    assert "automountServiceAccountToken" in (caught.value.remedy or "")


# No answer


def test_nobody_there_is_unreachable_after_three_tries(desk: Desk) -> None:
    clock = MovedClock()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UnreachableError, match="Vault does not answer: ConnectionError") as caught:
            desk.session(desk.approle(), url=url, clock=clock).read("secret/a", "b")
    assert len(clock.slept) == 2
    assert url in str(caught.value)


def test_a_moment_without_an_answer_is_waited_out(desk: Desk) -> None:
    path = desk.kv(2, {"password": VALUE})
    auth = desk.approle(POLICY.format(mount=path.partition("/")[0]))
    with FaultyProxy(desk.port) as proxy:
        session = desk.session(auth, url=proxy.url, clock=MovedClock())
        proxy.faults.extend(
            [faults.reset_in_the_request, _says(500, "local node not active but active cluster node not found")]
        )
        assert session.read(path, "password").reveal() == VALUE
        proxy.faults.extend([faults.cut_the_answer, faults.lose_the_answer])
        assert session.read(path, "password").reveal() == VALUE


def test_a_server_that_never_answers_times_out(desk: Desk) -> None:
    with FaultyProxy(None, always=faults.never_answer) as server:
        session = desk.session(desk.approle(), url=server.url, timeout=0.1, clock=MovedClock())
        with pytest.raises(UnreachableError, match="Vault does not answer: ReadTimeout"):
            session.read("secret/a", "b")


def test_a_renewal_without_an_answer_keeps_the_token(desk: Desk) -> None:
    path = desk.kv(2, {"password": VALUE})
    auth = desk.approle(POLICY.format(mount=path.partition("/")[0]))
    clock = MovedClock()
    with FaultyProxy(desk.port) as proxy:
        session = desk.session(auth, url=proxy.url, clock=clock)
        session.read(path, "password")
        token = token_of(session)
        clock.ahead = timedelta(minutes=41)
        proxy.faults.append(faults.reset_in_the_request)
        session.read(path, "password")
        assert token_of(session) == token


def test_a_certificate_that_nobody_vouches_for_is_refused(desk: Desk, ground: Ground) -> None:
    ground.component("s3")  # its certificate authority serves here too
    place = ground.place.directory / "secrets"
    path = desk.kv(2, {"password": VALUE})
    auth = desk.approle(POLICY.format(mount=path.partition("/")[0]))
    with FaultyProxy(desk.port, (place / "s3.crt", place / "s3.key")) as proxy:
        with pytest.raises(UnreachableError, match="TLS with Vault failed") as caught:
            desk.session(auth, url=proxy.url, clock=MovedClock()).read(path, "password")
        assert "set ca" in (caught.value.remedy or "")
        trusting = desk.session(auth, url=proxy.url, ca=str(place / "s3-ca.pem"))
        assert trusting.read(path, "password").reveal() == VALUE
        trusting.close()


def test_a_namespace_is_sent_with_each_request(desk: Desk, tmp_path: Path) -> None:
    with FaultyProxy(None, always=_says(403, "no")) as server:
        session = desk.session(_kubernetes(tmp_path), url=server.url, namespace="ops/berlin")
        with pytest.raises(AccessDeniedError):
            session.read("secret/a", "b")
        assert {request.headers.get("x-vault-namespace") for request in server.seen} == {"ops/berlin"}


def test_a_sealed_vault_says_so_and_is_not_asked_twice(desk: Desk, ground: Ground) -> None:
    path = desk.kv(2, {"password": VALUE})
    clock = MovedClock()
    auth = desk.approle(POLICY.format(mount=path.partition("/")[0]))
    session, fresh = desk.session(auth, clock=clock), desk.session(auth, clock=clock)
    keys = TransitKeys(desk.session(_platform(desk, ground), clock=clock))
    session.read(path, "password")
    wrapped = keys.new_data_key().wrapped
    desk.root.sys.seal()
    try:
        asks: list[Callable[[], Any]] = [
            lambda: session.read(path, "password"), lambda: fresh.read(path, "password"), keys.new_data_key,
            lambda: TransitKeys(keys._session).unwrap(wrapped), keys.check,
        ]  # fmt: skip
        for ask in asks:
            with pytest.raises(UnreachableError, match="Vault is sealed") as caught:
                ask()
            assert isinstance(caught.value, VaultSealedError)
            assert desk.url in str(caught.value)
            assert "unseal it" in (caught.value.remedy or "")
    finally:
        desk.root.sys.submit_unseal_key(desk.unseal_key)
        _until(lambda: desk.root.sys.read_leader_status()["is_self"])
    assert clock.slept == []
    assert session.read(path, "password").reveal() == VALUE


def _until(holds: Callable[[], Any]) -> None:
    import time

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if holds():
                return
        time.sleep(0.02)
    pytest.fail("it did not come about in 30 s")


# Dynamic credentials of a real PostgreSQL


@dataclass
class Database:
    desk: Desk
    cluster: Cluster
    path: str

    def opens(self, data: dict[str, Secret]) -> bool:
        try:
            with psycopg.connect(
                host="127.0.0.1", port=self.cluster.port, dbname="postgres", user=data["username"].reveal(),
                password=data["password"].reveal(), connect_timeout=10,
            ) as connection:  # fmt: skip
                return connection.execute("select 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False

    def roles(self) -> int:
        return self.cluster.sql(f"select count(*) from pg_roles where rolname like 'v-%{self.desk.name[:8]}%'")


@pytest.fixture
def database(desk: Desk, shared_cluster: Cluster) -> Iterator[Database]:
    """Vault's database engine over the shared cluster, with a role `ops` whose credentials live an hour and two at most."""
    mount = f"{desk.name}-db"
    shared_cluster.sql(f"create role {desk.name} login superuser password '{desk.name}'")
    desk.root.sys.enable_secrets_engine("database", path=mount)
    desk.root.secrets.database.configure(
        name="pg", plugin_name="postgresql-database-plugin", allowed_roles=["ops"], mount_point=mount,
        username=desk.name, password=desk.name,
        connection_url=f"postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{shared_cluster.port}/postgres?sslmode=disable",
    )  # fmt: skip
    _role(desk, mount)
    yield Database(desk, shared_cluster, f"{mount}/creds/ops")
    for session in desk.sessions:
        session.close()
    desk.root.sys.revoke_prefix(mount)
    desk.root.sys.disable_secrets_engine(mount)
    shared_cluster.sql(f"drop role {desk.name}")


def _role(desk: Desk, mount: str, ttl: str = "1h", most: str = "2h") -> None:
    desk.root.secrets.database.create_role(
        name="ops", db_name="pg", mount_point=mount, default_ttl=ttl, max_ttl=most,
        creation_statements=["create role \"{{name}}\" login password '{{password}}' valid until '{{expiration}}'"],
        revocation_statements=['drop role if exists "{{name}}"'],
    )  # fmt: skip


def _lease(desk: Desk, session: VaultSession, path: str) -> dict[str, Any]:
    return desk.root.sys.read_lease(session._leases[path].lease_id)["data"]


def test_dynamic_credentials_open_the_database_and_end_with_the_session(database: Database, desk: Desk) -> None:
    session = desk.session(desk.approle(POLICY.format(mount=database.path.partition("/")[0])))
    data = session.credentials(database.path)
    assert database.opens(data)
    assert session.credentials(database.path) is data  # one lease, not one for each question
    assert session.read(database.path, "password") == data["password"]
    assert data["password"].reveal() not in f"{data}{session._leases}{vars(session)}"
    session.close()
    assert not database.opens(data)


def test_every_lease_ends_with_the_session_also_where_its_token_does_not(database: Database, desk: Desk) -> None:
    desk.root.sys.create_or_update_policy(desk.name, POLICY.format(mount=database.path.partition("/")[0]))
    token = desk.root.auth.token.create(policies=[desk.name], ttl="24h")["auth"]["client_token"]
    desk.resolved["TOKEN"] = token
    clock = MovedClock()
    session = desk.session(VaultAuth(method="token", token=SecretRef("env", "TOKEN")), clock=clock)
    one = session.credentials(database.path)
    clock.ahead = timedelta(hours=3)
    other = session.credentials(database.path)
    assert one["username"] != other["username"]
    session.close()
    assert not database.opens(one)
    assert not database.opens(other)
    assert desk.root.auth.token.lookup(token)["data"]["id"] == token


def test_a_lease_is_renewed_at_two_thirds_and_replaced_near_its_end(database: Database, desk: Desk) -> None:
    clock = MovedClock()
    auth = desk.approle(POLICY.format(mount=database.path.partition("/")[0]), token_ttl="8h", token_max_ttl="24h")
    session = desk.session(auth, clock=clock)
    data = session.credentials(database.path)
    clock.ahead = timedelta(minutes=39)
    session.credentials(database.path)
    assert _lease(desk, session, database.path)["last_renewal"] is None
    clock.ahead = timedelta(minutes=41)
    assert session.credentials(database.path) is data
    assert _lease(desk, session, database.path)["last_renewal"] is not None
    clock.ahead = timedelta(hours=3)  # past its end by our clock
    fresh = session.credentials(database.path)
    assert fresh["username"] != data["username"]
    assert database.opens(fresh)
    assert database.opens(data)  # who still holds them is not cut off…
    session.close()
    assert not database.opens(data)  # … until the session ends
    assert not database.opens(fresh)


def test_a_lease_that_gets_no_more_time_is_replaced_while_it_lives(database: Database, desk: Desk) -> None:
    """Near its max_ttl a renewal succeeds and gives seconds: such credentials would end in somebody's hands."""
    _role(desk, database.path.partition("/")[0], ttl="60s", most="60s")
    clock = MovedClock()
    session = desk.session(desk.approle(POLICY.format(mount=database.path.partition("/")[0])), clock=clock)
    data = session.credentials(database.path)
    real = session._client.sys.renew_lease
    session._client.sys.renew_lease = lambda lease_id: real(lease_id) | {"lease_duration": 3}
    clock.ahead = timedelta(seconds=45)
    fresh = session.credentials(database.path)
    assert fresh["username"] != data["username"]


def test_credentials_are_replaced_with_the_token_that_leased_them(database: Database, desk: Desk) -> None:
    """Vault revokes what a token leased when the token ends, whatever time the lease had left."""
    session = desk.session(desk.approle(POLICY.format(mount=database.path.partition("/")[0])))
    data = session.credentials(database.path)
    desk.root.auth.token.revoke(token_of(session))
    _until(lambda: not database.opens(data))
    with pytest.raises(NotThereError):
        session.read(f"{database.path.partition('/')[0]}/config/nothing", "x")  # any call that meets the dead token
    assert database.opens(session.credentials(database.path))


def test_a_revoked_lease_is_replaced_when_it_is_due(database: Database, desk: Desk) -> None:
    clock = MovedClock()
    session = desk.session(desk.approle(POLICY.format(mount=database.path.partition("/")[0])), clock=clock)
    data = session.credentials(database.path)
    desk.root.sys.revoke_lease(session._leases[database.path].lease_id)
    clock.ahead = timedelta(minutes=41)
    fresh = session.credentials(database.path)
    assert fresh["username"] != data["username"]
    assert database.opens(fresh)


def test_a_role_that_is_not_there_is_named(database: Database, desk: Desk) -> None:
    mount = database.path.partition("/")[0]
    session = desk.session(desk.approle(POLICY.format(mount=mount)), clock=MovedClock())
    with pytest.raises(OpsError, match=r"unknown role|no such role|nothing there"):
        session.credentials(f"{mount}/creds/nobody")


def test_a_database_that_vault_cannot_reach_is_unreachable(database: Database, desk: Desk) -> None:
    mount = database.path.partition("/")[0]
    database.cluster.sql(f"alter role {desk.name} nologin")
    with contextlib.suppress(Exception):  # it cannot be reached, which is the point
        desk.root.secrets.database.reset_connection("pg", mount_point=mount)
    session = desk.session(desk.approle(POLICY.format(mount=mount)), clock=MovedClock())
    with pytest.raises(UnreachableError, match="Vault cannot answer") as caught:
        session.credentials(database.path)
    assert f"'{desk.name}'" not in str(caught.value)
    database.cluster.sql(f"alter role {desk.name} login")


def test_threads_share_one_lease(database: Database, desk: Desk) -> None:
    session = desk.session(desk.approle(POLICY.format(mount=database.path.partition("/")[0])))
    with ThreadPoolExecutor(8) as pool:
        users = list(pool.map(lambda _: session.credentials(database.path)["username"].reveal(), range(24)))
    assert len(set(users)) == 1


# The key that wraps data keys


def _platform(desk: Desk, ground: Ground) -> VaultAuth:
    """The role that the platform itself has."""
    place = ground.place.directory / "secrets"
    desk.resolved["PLATFORM_ROLE"] = (place / "vault.role_id").read_text()
    desk.resolved["PLATFORM_SECRET"] = (place / "vault.secret_id").read_text()
    return VaultAuth(
        method="approle", role_id=SecretRef("env", "PLATFORM_ROLE"), secret_id=SecretRef("env", "PLATFORM_SECRET")
    )


@pytest.fixture
def transit(desk: Desk) -> TransitKeys:
    """A key of this test's own, with the rights that the platform needs and no more."""
    mount = f"{desk.name}-transit"
    desk.root.sys.enable_secrets_engine("transit", path=mount)
    desk.root.secrets.transit.create_key("k", mount_point=mount)
    policy = f"""
    path "{mount}/datakey/plaintext/k" {{ capabilities = ["update"] }}
    path "{mount}/decrypt/k" {{ capabilities = ["update"] }}
    path "{mount}/keys/k" {{ capabilities = ["read"] }}
    """
    return TransitKeys(desk.session(desk.approle(policy), clock=MovedClock()), mount=mount, key="k")


def test_a_data_key_is_wrapped_and_opens_again(transit: TransitKeys, desk: Desk) -> None:
    one, other = transit.new_data_key(), transit.new_data_key()
    assert len(one.plain) == 32
    assert one.plain != other.plain
    assert one.wrapped.startswith("vault:v1:")
    stranger = TransitKeys(transit._session, mount=transit._mount, key="k")
    assert stranger.unwrap(one.wrapped) == one.plain
    assert transit.check() == {"key": "k", "type": "aes256-gcm96", "exportable": False, "versions": 1}
    assert transit.name == f"{desk.url}/{transit._mount}/k"


def test_a_wrapped_key_is_asked_for_once(transit: TransitKeys, desk: Desk) -> None:
    wrapped = transit.new_data_key().wrapped
    fresh = TransitKeys(transit._session, mount=transit._mount, key="k")
    plain = fresh.unwrap(wrapped)
    desk.root.secrets.transit.update_key_configuration("k", deletion_allowed=True, mount_point=transit._mount)
    desk.root.secrets.transit.delete_key("k", mount_point=transit._mount)
    assert fresh.unwrap(wrapped) == plain  # 10,000 blocks do not ask 10,000 times


def test_what_was_wrapped_before_a_rotation_opens(transit: TransitKeys, desk: Desk) -> None:
    old = transit.new_data_key()
    desk.root.secrets.transit.rotate_key("k", mount_point=transit._mount)
    new = transit.new_data_key()
    assert new.wrapped.startswith("vault:v2:")
    fresh = TransitKeys(transit._session, mount=transit._mount, key="k")
    assert (fresh.unwrap(old.wrapped), fresh.unwrap(new.wrapped)) == (old.plain, new.plain)


def test_a_deleted_key_is_not_there(transit: TransitKeys, desk: Desk) -> None:
    wrapped = transit.new_data_key().wrapped
    desk.root.secrets.transit.update_key_configuration("k", deletion_allowed=True, mount_point=transit._mount)
    desk.root.secrets.transit.delete_key("k", mount_point=transit._mount)
    fresh = TransitKeys(transit._session, mount=transit._mount, key="k")
    for ask in (fresh.new_data_key, lambda: fresh.unwrap(wrapped), fresh.check):
        with pytest.raises(NotThereError) as caught:
            ask()
        assert transit._mount in str(caught.value)
        assert caught.value.remedy


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w[:-4] + ("AAAA" if w[-4:] != "AAAA" else "BBBB"),
        lambda w: "vault:v1:" + base64.b64encode(os.urandom(60)).decode(),
        lambda w: "vault:v9:" + w[9:],
        lambda w: "file:v1:" + w[9:],
        lambda w: "not wrapped at all",
        lambda w: "",
    ],
    ids=["cut", "another", "a version that never was", "another service's", "no wrapping", "nothing"],
)
def test_a_spoilt_wrapping_is_corruption_and_not_silence(transit: TransitKeys, spoil: Callable[[str], str]) -> None:
    wrapped = spoil(transit.new_data_key().wrapped)
    with pytest.raises(CorruptionError, match="does not open"):
        transit.unwrap(wrapped)


def test_a_policy_without_the_key_is_access_denied(transit: TransitKeys, desk: Desk) -> None:
    other = TransitKeys(transit._session, mount=transit._mount, key="other")
    for ask in (other.new_data_key, lambda: other.unwrap("vault:v1:abc"), other.check):
        with pytest.raises(AccessDeniedError, match="permission denied"):
            ask()


def test_no_error_log_or_repr_shows_what_is_secret(
    transit: TransitKeys, database: Database, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = desk.kv(2, {"password": VALUE})
    session = desk.session(
        desk.approle(POLICY.format(mount="*").replace('"*/*"', f'"{desk.name}-*"')), clock=MovedClock()
    )
    data = session.credentials(database.path)
    texts = [repr(session.read(path, "password")), repr(vars(session)), repr(data)]
    key = transit.new_data_key()
    texts += [repr(key), repr(transit)]
    asks: list[Callable[[], Any]] = [
        lambda: session.read(path, "nothing"), lambda: session.read("x/y", "z"), lambda: session.credentials("x/creds/z"),
        lambda: transit.unwrap("x"), lambda: desk.session(desk.approle()).read("a/b", "c"),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(OpsError) as caught:
            ask()
        texts += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    everything = "\n".join([*texts, caplog.text])
    hidden = [VALUE, data["password"].reveal(), *desk.resolved.values(), token_of(session), token_of(transit._session)]
    hidden += [base64.b64encode(key.plain).decode(), key.plain.hex(), PASSWORD]
    assert "/v1/" in caplog.text  # the library does log the requests
    assert [text for text in hidden if text in everything] == []


# Keys in a file, for places without a Vault


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "ops.key"
    file.write_text(secrets.token_hex(32) + "\n")
    file.chmod(0o600)
    return file


def test_a_key_file_wraps_and_opens(key_file: Path) -> None:
    one, other = FileKeys(key_file).new_data_key(), FileKeys(key_file).new_data_key()
    assert (len(one.plain), one.plain != other.plain, one.wrapped != other.wrapped) == (32, True, True)
    assert FileKeys(key_file).unwrap(one.wrapped) == one.plain
    assert FileKeys(key_file).check()["exportable"] is True
    assert key_file.read_text().strip() not in one.wrapped


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_key_file_that_others_may_read_is_refused(key_file: Path, mode: int) -> None:
    keys = FileKeys(key_file)
    wrapped = keys.new_data_key().wrapped
    key_file.chmod(mode)
    for ask in (keys.new_data_key, lambda: keys.unwrap(wrapped), keys.check):
        with pytest.raises(AccessDeniedError, match="others may read the key file") as caught:
            ask()
        assert caught.value.remedy == f"chmod 600 {key_file}"
    assert stat.S_IMODE(key_file.stat().st_mode) == mode


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (None, NotThereError, "no such key file"),
        (b"", OpsError, "32 bytes in hex"),
        (b"abcd", OpsError, "32 bytes in hex"),
        (b"z" * 64, OpsError, "cannot be read: ValueError"),
        (b"\xff" * 64, OpsError, "cannot be read: UnicodeDecodeError"),
    ],
)
def test_a_key_file_that_is_none_is_named(
    key_file: Path, content: bytes | None, kind: type[OpsError], words: str
) -> None:
    key_file.unlink() if content is None else key_file.write_bytes(content)
    with pytest.raises(kind, match=words) as caught:
        FileKeys(key_file).new_data_key()
    assert str(key_file) in str(caught.value)


def test_another_key_file_does_not_open_it(key_file: Path) -> None:
    wrapped = FileKeys(key_file).new_data_key().wrapped
    key_file.write_text(secrets.token_hex(32))
    for spoilt in (wrapped, wrapped[:-8], "vault:v1:abc", "", "file:v1:"):
        with pytest.raises(CorruptionError, match="does not open with this key file"):
            FileKeys(key_file).unwrap(spoilt)
