"""From the inventory to what it names: addresses, secrets, stores, keys, databases; each failure with its own words."""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops_platform.clients.access import Access, choose_member
from ops_platform.clients.postgres import Member
from ops_platform.clients.postgres_binaries import PostgresServer, free_port
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    NotThereError,
    OpsError,
    UnreachableError,
    UsageError,
)
from ops_platform.inventory import SecretRef, load
from tests.rig import PASSWORD, Cluster, Ground, Platform, copy_of, eventually

VALUE = "a value ünï $HOME 'quoted'"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Access]:
    """An inventory that names no server that is here."""
    body = {
        "version": 1,
        "platform": {"name": "bare"},
        "owners": {},
        "environments": {},
        "key_services": {"file": {"kind": "file", "path": "{inventory}/ops.key"}},
        "stores": {
            "s": {"endpoint": "local://s3", "bucket": "b", "access_key": "env://S3_ACCESS", "secret_key": "file://{inventory}/s3.secret"}
        },
    }  # fmt: skip
    (tmp_path / "platform.yaml").write_text(yaml.safe_dump(body))
    monkeypatch.setenv("OPS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("OPS_INVENTORY", raising=False)
    with Access(load(tmp_path / "platform.yaml")) as access:
        yield access


def write(path: Path, content: str | bytes = VALUE, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


# Secrets


def test_a_variable_is_read_at_each_use(bare: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = SecretRef.parse("env://OPS_TEST_SECRET")
    monkeypatch.setenv("OPS_TEST_SECRET", VALUE)
    assert bare.secret(ref).reveal() == VALUE
    monkeypatch.setenv("OPS_TEST_SECRET", "rotated")
    assert bare.secret(ref).reveal() == "rotated"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named(bare: Access, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("OPS_TEST_SECRET", raising=False)
    if value is not None:
        monkeypatch.setenv("OPS_TEST_SECRET", value)
    with pytest.raises(NotThereError, match="env://OPS_TEST_SECRET: this environment variable is not set"):
        bare.secret(SecretRef.parse("env://OPS_TEST_SECRET"))


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_a_file_is_read_without_the_end_of_its_line(bare: Access, tmp_path: Path, end: str) -> None:
    write(tmp_path / "secret", f" {VALUE} {end}")
    assert bare.secret(SecretRef.parse(f"file://{tmp_path}/secret")).reveal() == f" {VALUE} "


def test_a_file_stands_beside_the_inventory_or_in_the_state(bare: Access, tmp_path: Path) -> None:
    write(tmp_path / "here", "beside")
    write(tmp_path / "state" / "secrets" / "there", "in the state")
    assert bare.secret(SecretRef.parse("file://{inventory}/here")).reveal() == "beside"
    assert bare.secret(SecretRef.parse("file://{state}/secrets/there")).reveal() == "in the state"
    write(tmp_path / "here", "rotated")
    assert bare.secret(SecretRef.parse("file://{inventory}/here")).reveal() == "rotated"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_file_that_others_may_read_is_refused(bare: Access, tmp_path: Path, mode: int) -> None:
    file = write(tmp_path / "secret", mode=mode)
    with pytest.raises(AccessDeniedError, match="others may read this secret") as caught:
        bare.secret(SecretRef.parse(f"file://{file}"))
    assert caught.value.remedy == f"chmod 600 {file}"
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
def test_a_secret_that_kubernetes_mounted_is_read(bare: Access, tmp_path: Path, mode: int) -> None:
    """As the kubelet lays it out: the file is a link through `..data` into a folder that is swapped at a rotation."""
    volume = tmp_path / "etc" / "secret"
    write(volume / "..2026_11_24_01_00_00.123" / "password", mode=mode)
    (volume / "..data").symlink_to("..2026_11_24_01_00_00.123")
    (volume / "password").symlink_to("..data/password")
    assert bare.secret(SecretRef.parse(f"file://{volume}/password")).reveal() == VALUE


def test_a_link_alone_does_not_open_what_others_may_read(bare: Access, tmp_path: Path) -> None:
    write(tmp_path / "..data-of-somebody" / "secret", mode=0o644)
    (tmp_path / "link").symlink_to("..data-of-somebody/secret")
    with pytest.raises(AccessDeniedError):
        bare.secret(SecretRef.parse(f"file://{tmp_path}/link"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: None, "cannot be read: No such file or directory"),
        (lambda file: write(file, ""), "is empty"),
        (lambda file: write(file, "\n"), "is empty"),
        (lambda file: write(file, b"\xff\xfe\x00"), "holds no text in UTF-8"),
        (lambda file: (file.mkdir(), file.chmod(0o700)), "cannot be read: Is a directory"),
        (lambda file: write(file.parent / "file", "") and file.symlink_to("file/below"), "cannot be read: Not a directory"),
    ],
    ids=["missing", "empty", "an empty line", "no text", "a folder", "below a file"],
)  # fmt: skip
def test_a_file_that_holds_no_secret_is_named(
    bare: Access, tmp_path: Path, make: Callable[[Path], Any], words: str
) -> None:
    make(tmp_path / "secret")
    with pytest.raises(NotThereError, match=words) as caught:
        bare.secret(SecretRef.parse(f"file://{tmp_path}/secret"))
    assert caught.value.where == f"file://{tmp_path}/secret"


def test_a_vault_reference_without_a_vault_is_refused(bare: Access) -> None:
    with pytest.raises(UsageError, match="the inventory names no Vault"):
        bare.secret(SecretRef.parse("vault://secret/a#b"))


def test_a_vault_reference_is_resolved(
    ground: Ground, new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    name = f"test-{secrets.token_hex(6)}"
    _root(ground).secrets.kv.v2.create_or_update_secret(path=name, secret={"password": VALUE})
    assert platform.access.secret(SecretRef.parse(f"vault://secret/{name}#password")).reveal() == VALUE
    with pytest.raises(NotThereError, match="it has password") as caught:
        platform.access.secret(SecretRef.parse(f"vault://secret/{name}#user"))
    assert caught.value.remedy
    _root(ground).secrets.kv.v2.create_or_update_secret(path=name, secret={"password": ""})
    with pytest.raises(NotThereError, match=f"{name}#password: this secret is empty"):  # anybody could sign with it
        platform.access.secret(SecretRef.parse(f"vault://secret/{name}#password"))
    assert platform.access.vault("v") is platform.access.vault("v")


def _root(ground: Ground) -> Any:
    import hvac

    ground.component("vault")
    token = (ground.place.directory / "secrets" / "vault.root_token").read_text()
    return hvac.Client(url=f"http://127.0.0.1:{ground.place.port('vault')}", token=token, timeout=20)


# Addresses of the local stack


def _stack(tmp_path: Path, content: str) -> None:
    write(tmp_path / "state" / "stack.json", content)


GOOD = {
    "components": {
        "s3": {"host": "127.0.0.1", "port": 1234, "url": "https://127.0.0.1:1234"},
        "app-db": {"host": "127.0.0.1", "port": 5433, "url": ""},
    }
}


def test_a_local_name_is_the_address_that_the_stack_wrote(bare: Access, tmp_path: Path) -> None:
    _stack(tmp_path, json.dumps(GOOD))
    assert bare.url("local://s3") == "https://127.0.0.1:1234"
    assert bare.address("local://app-db", 5432) == ("127.0.0.1", 5433)
    _stack(tmp_path, json.dumps(GOOD).replace("1234", "4321"))
    assert bare.url("local://s3") == "https://127.0.0.1:4321"


def test_other_addresses_are_used_as_they_stand(bare: Access) -> None:
    assert bare.address("db.example.com", 5432) == ("db.example.com", 5432)
    assert bare.address("/run/postgresql", 5432) == ("/run/postgresql", 5432)
    assert bare.url("https://vault.example.com:8200/") == "https://vault.example.com:8200"


@pytest.mark.parametrize(
    "content", [None, "", "{}", "{", '{"components": []}', '{"components": {"s3": {}}}', '{"components": null}']
)
def test_a_stack_that_was_never_started_is_unreachable(bare: Access, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        _stack(tmp_path, content)
    for ask in (lambda: bare.url("local://s3"), lambda: bare.address("local://s3", 1), lambda: bare.store("s")):
        with pytest.raises(UnreachableError, match="the local stack has no component 's3' here") as caught:
            ask()
        assert caught.value.remedy == "start it: ops local up"


# Stores and keys


def test_a_store_opens_once_and_names_its_missing_secret(
    bare: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stack(tmp_path, json.dumps(GOOD))
    monkeypatch.delenv("S3_ACCESS", raising=False)
    write(tmp_path / "s3.secret")
    with pytest.raises(NotThereError, match="env://S3_ACCESS"):
        bare.store("s")
    monkeypatch.setenv("S3_ACCESS", "key")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: bare.store("s"), range(16)))
    assert len({id(store) for store in found}) == 1
    bare.close()
    assert bare.store("s") is not found[0]


def test_two_threads_do_not_open_the_same_twice(bare: Access) -> None:
    begun, made = threading.Event(), []

    def make() -> object:
        made.append(threading.current_thread())
        begun.set()
        threading.Event().wait(0.1)  # time for the other one to come in, where nothing keeps it out
        return object()

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(bare._once, "kind", "name", make)
        assert begun.wait(10)
        other = pool.submit(bare._once, "kind", "name", make)
        assert one.result() is other.result()
    assert len(made) == 1


def test_keys_in_a_file_stand_beside_the_inventory(bare: Access, tmp_path: Path) -> None:
    with pytest.raises(NotThereError, match="no such key file"):
        bare.keys("file").new_data_key()
    write(tmp_path / "ops.key", secrets.token_hex(32))
    keys = bare.keys("file")
    assert keys.unwrap(keys.new_data_key().wrapped)
    assert bare.keys("file") is keys


def test_the_platforms_store_and_keys_are_those_of_the_inventory(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    store, keys = platform.access.store("s"), platform.access.keys("k")
    store.put("a", b"x")
    assert store.get("a") == b"x"
    assert keys.unwrap(keys.new_data_key().wrapped)
    assert platform.prefix in store.name


# Databases


@dataclass
class Pair:
    """A primary and a real standby of it."""

    primary: Cluster
    standby: PostgresServer


@pytest.fixture
def pair(new_cluster: Callable[..., Cluster]) -> Iterator[Pair]:
    primary = new_cluster(18)
    standby = copy_of(primary.server)
    standby.start()
    yield Pair(primary, standby)
    standby.stop("immediate")


def hosts(platform: Platform, *ports: int | tuple[str, int]) -> Access:
    """The first target's hosts become these ports of 127.0.0.1."""
    places = [("127.0.0.1", port) if isinstance(port, int) else port for port in ports]
    platform.body["targets"][0]["connection"]["hosts"] = [{"host": host, "port": port} for host, port in places]
    platform.reload()
    return platform.access


def test_one_dead_host_is_named_and_does_not_hide_the_others(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    dead = free_port()
    for order in ((dead, shared_cluster.port), (shared_cluster.port, dead)):
        access = hosts(platform, *order)
        members = {member.port: member for member in access.members(platform.target)}
        assert "PostgreSQL does not answer" in (members[dead].error or "")
        assert "Connection refused" in (members[dead].error or "")
        assert isinstance(members[dead].failure, UnreachableError)
        assert members[shared_cluster.port].error is None
        assert members[shared_cluster.port].in_recovery is False
        assert members[shared_cluster.port].timeline == 1
        assert (members[shared_cluster.port].server_version or 0) // 10000 == 18
        assert access.member(platform.target).port == shared_cluster.port
        with access.postgres(platform.target) as connection:
            assert connection.execute("select 1").fetchone() == (1,)


def test_no_host_that_answers_is_unreachable_with_each_of_them(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    one, other = free_port(), free_port()
    access = hosts(platform, one, other, ("no-such-host.invalid", 5432))
    with pytest.raises(UnreachableError, match="no primary of app-db answers") as caught:
        access.postgres(platform.target)
    for text in (f"127.0.0.1:{one}: ", f"127.0.0.1:{other}: ", "no-such-host.invalid:5432: "):
        assert text in str(caught.value)
    with pytest.raises(UnreachableError, match="no server of app-db answers"):
        access.member(platform.target, "any")


def test_a_wrong_password_is_access_denied_with_its_remedy(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    write(platform.home / "password", "wrong")
    for ask in (platform.access.postgres, platform.access.replication, platform.access.member):
        with pytest.raises(AccessDeniedError, match="the password of ops_backup is refused") as caught:
            ask(platform.target)
        assert "check the secret that the inventory references" in (caught.value.remedy or "")
        assert f"127.0.0.1:{shared_cluster.port}" in str(caught.value)
    write(platform.home / "password", PASSWORD)  # rotated: the next connection has it
    platform.access.postgres(platform.target).close()


def test_a_refused_password_beside_a_dead_host_tells_both(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    write(platform.home / "password", "wrong")
    access = hosts(platform, free_port(), shared_cluster.port)
    with pytest.raises(UnreachableError, match=r"does not answer.*the password of ops_backup is refused") as caught:
        access.member(platform.target)
    assert caught.value.remedy == "ops doctor app-db looks at each"


def test_a_secret_that_cannot_be_read_is_what_is_reported(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    (platform.home / "password").chmod(0o644)
    with pytest.raises(
        AccessDeniedError, match=f"file://{platform.home}/password: others may read this secret"
    ) as caught:
        platform.access.postgres(platform.target)
    assert caught.value.remedy == f"chmod 600 {platform.home}/password"
    (platform.home / "password").unlink()
    with pytest.raises(NotThereError, match="No such file or directory"):
        platform.access.member(platform.target)


def test_a_vault_that_is_away_is_blamed_and_not_the_database(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    url = f"http://127.0.0.1:{free_port()}"
    platform.body["vaults"]["v"]["url"] = url
    for login in (
        {"user": "ops_backup", "password": "vault://secret/a#b"},
        {"credentials": "vault://database/creds/a"},
    ):
        connection = platform.body["targets"][0]["connection"]
        for key in ("user", "password", "credentials"):
            connection.pop(key, None)
        connection |= login
        platform.reload()
        for ask in (platform.access.postgres, platform.access.replication, platform.access.members):
            with pytest.raises(UnreachableError, match="Vault does not answer") as caught:
                ask(platform.target)
            assert str(caught.value).count(url) == 1
            assert "primary" not in str(caught.value)


def test_roles_are_asked_and_not_declared(new_platform: Callable[..., Platform], pair: Pair) -> None:
    platform = new_platform({"app-db": [pair.primary]})
    for order in ((pair.standby.port, pair.primary.port), (pair.primary.port, pair.standby.port)):
        access = hosts(platform, *order)
        assert access.member(platform.target).port == pair.primary.port
        assert access.member(platform.target, "standby").port == pair.standby.port
        assert access.member(platform.target, "any").port == order[0]
        with access.postgres(platform.target, role="standby") as connection:
            assert connection.execute("select pg_is_in_recovery()").fetchone() == (True,)
    access = hosts(platform, pair.standby.port)
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{pair.standby.port}: standby"):
        access.member(platform.target)
    access = hosts(platform, pair.primary.port)
    with pytest.raises(
        UnreachableError, match=f"no standby of app-db answers: 127.0.0.1:{pair.primary.port}: primary, timeline 1"
    ):
        access.member(platform.target, "standby")
    # After a promotion the old primary may come back: the newer timeline leads, whatever the order.
    with pair.standby.connect() as connection:
        connection.execute("select pg_promote()")
    for order in ((pair.standby.port, pair.primary.port), (pair.primary.port, pair.standby.port)):
        found = hosts(platform, *order).member(platform.target)
        assert (found.port, found.timeline) == (pair.standby.port, 2)


def test_an_old_primary_beside_a_standby_of_a_newer_timeline_is_not_taken_for_the_primary(
    new_platform: Callable[..., Platform], pair: Pair
) -> None:
    """The promoted one does not answer just now: its connections are full, or we do not reach it."""
    platform = new_platform({"app-db": [pair.primary]})
    promoted = pair.standby
    follower = copy_of(promoted)  # it streams from there, and is never ahead of it
    follower.start()
    try:
        access = hosts(platform, free_port(), pair.primary.port, follower.port)
        assert access.member(platform.target).port == pair.primary.port
        with promoted.connect() as connection:
            connection.execute("select pg_promote()")
        eventually(lambda: access.members(platform.target)[2].timeline == 2, why=follower.log_tail)
        _is_refused(access, platform, pair.primary.port, follower.port)
        # It is on its timeline still once it receives nothing any more, and for whoever may not see what it receives.
        pair.primary.sql("revoke pg_monitor from ops_backup")
        with promoted.connect() as connection:
            connection.execute("revoke pg_monitor from ops_backup; create table t ()")
            end = connection.execute("select pg_current_wal_lsn()").fetchone()
        with follower.connect() as connection:
            there = "select pg_last_wal_replay_lsn() >= %s"
            eventually(lambda: connection.execute(there, end).fetchone() == (True,), why=follower.log_tail)
            connection.execute("checkpoint")
            _is_refused(access, platform, pair.primary.port, follower.port)
            promoted.stop("immediate")
            gone = "select count(*) from pg_stat_wal_receiver"
            eventually(lambda: connection.execute(gone).fetchone() == (0,), why=follower.log_tail)
        _is_refused(access, platform, pair.primary.port, follower.port)
        assert hosts(platform, pair.primary.port).member(platform.target).port == pair.primary.port
    finally:
        follower.stop("immediate")


def _is_refused(access: Access, platform: Platform, old: int, follower: int) -> None:
    with pytest.raises(ConflictError, match="may be an old one, another was promoted since") as caught:
        access.postgres(platform.target)
    assert f"127.0.0.1:{old}: primary, timeline 1; 127.0.0.1:{follower}: standby, timeline 2" in str(caught.value)
    assert "stop the old one" in (caught.value.remedy or "")


def test_a_standby_that_is_behind_the_primarys_timeline_or_says_none_proves_nothing_against_it() -> None:
    primary = Member("a", 5432, in_recovery=False, timeline=2, system_identifier=1)
    for timeline in (1, None):
        standby = Member("b", 5432, in_recovery=True, timeline=timeline, system_identifier=1)
        assert choose_member("app-db", [standby, primary]) is primary


def test_two_primaries_of_one_timeline_are_a_conflict(
    new_platform: Callable[..., Platform], new_cluster: Callable[..., Cluster]
) -> None:
    cluster = new_cluster(18)
    twin = copy_of(cluster.server)
    (twin.directory / "standby.signal").unlink()
    twin.start()
    try:
        platform = new_platform({"app-db": [cluster]})
        access = hosts(platform, cluster.port, twin.port)
        with pytest.raises(ConflictError, match="2 servers of app-db say that they are the primary"):
            access.postgres(platform.target)
    finally:
        twin.stop("immediate")


def test_hosts_of_different_clusters_are_a_conflict(
    new_platform: Callable[..., Platform], shared_cluster: Cluster, new_cluster: Callable[..., Cluster]
) -> None:
    platform = new_platform({"app-db": [shared_cluster, new_cluster(18)]})
    for role in ("primary", "any", "standby"):
        with pytest.raises(ConflictError, match="the hosts of app-db belong to different clusters") as caught:
            platform.access.member(platform.target, role)
        assert "one cluster is one target" in (caught.value.remedy or "")


def test_a_socket_directory_is_a_host_and_needs_no_tls(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]}, extra={"connection": {"tls": {"mode": "verify-full"}}})
    access = hosts(platform, (str(shared_cluster.server.sockets), shared_cluster.server.socket_port))
    with access.postgres(platform.target) as connection:
        assert connection.execute("select current_user").fetchone() == ("ops_backup",)
    assert access.replication(platform.target).status == 0


def test_the_platforms_own_database_is_opened_or_named_as_missing(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    with pytest.raises(UsageError, match="the inventory names no database for the ledger"):
        platform.access.platform_db()
    platform.body["platform"]["database"] = {
        "host": "127.0.0.1", "port": shared_cluster.port, "dbname": "postgres", "user": "ops_backup",
        "password": f"file://{platform.home}/password", "tls": {"mode": "disable"},
    }  # fmt: skip
    platform.reload()
    with platform.access.platform_db(autocommit=False) as connection:
        assert connection.execute("select current_user").fetchone() == ("ops_backup",)
        assert connection.autocommit is False


def test_dynamic_credentials_open_a_target_and_end_with_the_access(
    ground: Ground, new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    name = f"t{secrets.token_hex(6)}"
    root = _root(ground)
    shared_cluster.sql(f"create role {name} login superuser password '{name}'")
    root.sys.enable_secrets_engine("database")
    try:
        root.secrets.database.configure(
            name="pg", plugin_name="postgresql-database-plugin", allowed_roles=["ops-backup"], username=name, password=name,
            connection_url=f"postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{shared_cluster.port}/postgres?sslmode=disable",
        )  # fmt: skip
        root.secrets.database.create_role(
            name="ops-backup", db_name="pg", default_ttl="1h", max_ttl="24h",
            creation_statements=[
                "create role \"{{name}}\" login replication password '{{password}}' valid until '{{expiration}}'",
                'grant pg_monitor to "{{name}}"',
            ],
            revocation_statements=['drop role if exists "{{name}}"'],
        )  # fmt: skip
        login = {"credentials": "vault://database/creds/ops-backup"}
        platform = new_platform({"app-db": [shared_cluster]})
        connection_entry = platform.body["targets"][0]["connection"]
        platform.body["targets"][0]["connection"] = {
            **{key: value for key, value in connection_entry.items() if key not in ("user", "password")},
            **login,
        }
        platform.reload()
        with platform.access.postgres(platform.target) as connection:
            (user,) = connection.execute("select current_user").fetchone() or ("",)
        assert user.startswith("v-")
        replication = platform.access.replication(platform.target)
        assert replication.user.decode() == user  # one lease for both
        replication.finish()
        platform.access.close()
        assert shared_cluster.sql("select count(*) from pg_roles where rolname = %s", "postgres", user) == 0
    finally:
        root.sys.revoke_prefix("database")
        root.sys.disable_secrets_engine("database")
        shared_cluster.sql(f"drop role {name}")


def test_nothing_that_is_printed_shows_a_password(
    new_platform: Callable[..., Platform], shared_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    platform = new_platform({"app-db": [shared_cluster]})
    connection = platform.target.connection
    login = platform.access.login(connection)
    texts = [repr(login), str(login), repr(platform.access.members(platform.target)), repr(platform.access.loaded)]
    with platform.access.postgres(platform.target) as opened:
        texts += [repr(opened), repr(opened.info), str(opened)]
    write(platform.home / "password", "another-wrong-secret")
    shutil.copy(platform.home / "password", platform.home / "copy")
    for ask in (platform.access.postgres, platform.access.replication):
        with pytest.raises(OpsError) as caught:
            ask(platform.target)
        texts += [repr(caught.value), str(caught.value), "".join(traceback.format_exception(caught.value))]
    everything = "\n".join([*texts, caplog.text])
    assert [secret for secret in (PASSWORD, "another-wrong-secret") if secret in everything] == []
    assert "Secret(***)" in everything


# Questions that the server refuses


def test_what_a_server_refuses_is_said_as_an_error_of_ours(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    """One target with a server that refuses must not end the round over all of them: only an OpsError is caught there."""
    from ops_platform.clients.postgres import asking

    platform = new_platform({"app-db": [shared_cluster]})

    def ask(text: str) -> None:
        with asking(platform.access.postgres(platform.target), "app-db") as connection:
            connection.execute(text)

    with pytest.raises(AccessDeniedError, match="our role may not ask this: permission denied") as refused:
        ask("select pg_read_file('/etc/passwd')")
    assert "ops doctor" in str(refused.value.remedy)
    with pytest.raises(UnreachableError, match="terminating connection"):
        ask("select pg_terminate_backend(pg_backend_pid())")
    with pytest.raises(OpsError, match="refuses a question of ours"):
        ask("select 1/0")


@pytest.mark.parametrize("what", ["archive_status", "slot_state", "backup", "running", "database"])
def test_a_server_that_refuses_every_question_is_an_error_that_a_round_over_all_targets_survives(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform], what: str
) -> None:
    """The catalogs that are asked are closed to our role, as some companies do."""
    from assets.postgres import _see_database
    from ops_platform.backup.archive import archive_status, slot_state
    from ops_platform.backup.basebackup import run_backup
    from ops_platform.backup.running import backup_running

    cluster = new_cluster(18)
    platform = new_platform({"app-db": [cluster]})
    cluster.sql("""
        revoke pg_read_all_data, pg_monitor from ops_backup;
        revoke select on pg_replication_slots, pg_locks from public;
        revoke execute on function pg_database_size(oid), pg_current_wal_flush_lsn(), pg_try_advisory_lock(int, int) from public;
    """)
    if what == "archive_status":
        assert "permission denied" in str(archive_status(platform.access, platform.target).slot_error)
        return
    with pytest.raises(AccessDeniedError, match="permission denied"):
        {
            "slot_state": slot_state,
            "backup": run_backup,
            "running": backup_running,
            "database": _see_database,
        }[what](platform.access, platform.target)  # type: ignore[operator]
