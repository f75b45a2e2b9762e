"""What the how-tos tell people to type is typed here, and is enough: no right is missing, and none is for show."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from ops_platform.backup.basebackup import run_backup
from ops_platform.clients.s3 import Lock
from ops_platform.clock import SYSTEM_CLOCK
from ops_platform.doctor import examine
from ops_platform.errors import CouldNotVerifyError
from ops_platform.inventory import load
from ops_platform.recovery import canary
from tests.integration.http_faults import FaultyProxy, Request
from tests.rig import PASSWORD, Cluster, Ground, Platform

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


def blocks(page: str, language: str) -> list[str]:
    text = (HOW_TO / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no block in {language}"
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


ROLE, SCHEMA, FUNCTIONS, GROUP = blocks("least-privilege-role.md", "sql")


def bare(new_cluster: Callable[..., Cluster], major: int = 18) -> Cluster:
    """A cluster without the role that the tests usually have."""
    cluster = new_cluster(major)
    cluster.sql("drop schema ops_canary")
    cluster.sql("drop owned by ops_backup")
    cluster.sql("drop role ops_backup")
    return cluster


def findings(platform: Platform) -> dict[str, str]:
    return {finding.what: finding.state for finding in examine(platform.access, platform.target).findings}


# The role


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_the_role_of_the_how_to_backs_up_and_marks_a_moment(
    major: int, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = bare(new_cluster, major)
    cluster.sql(ROLE)
    cluster.sql(SCHEMA)
    cluster.sql(f"alter role ops_backup password '{PASSWORD.replace(chr(39), chr(39) * 2)}'")
    cluster.sql(
        "create schema private; create table private.t as select generate_series(1, 10) i; revoke all on schema private from public"
    )
    cluster.sql("create table rls (i int); insert into rls values (1), (2); alter table rls enable row level security")
    platform = new_platform({"app-db": [cluster]})
    states = findings(platform)
    rights = ("REPLICATION", "pg_monitor", "pg_read_all_data", "schema ops_canary", "replication login")
    assert [name for name in rights if states[name] != "good"] == []
    assert run_backup(platform.access, platform.target).archives
    moment = canary.take(platform.access, platform.target, "v1", SYSTEM_CLOCK)
    assert moment.canary is not None
    counts = moment.facts["postgres"].counts
    assert (counts["private.t"].rows, counts["private.t"].exact) == (10, True)
    # Row-level security hides rows from the role: it must not compare with a number that is too small.
    assert "public.rls" not in counts or not counts["public.rls"].exact
    assert (
        cluster.sql(
            "select rolsuper or rolcreaterole or rolcreatedb or rolbypassrls from pg_roles where rolname = 'ops_backup'"
        )
        is False
    )


@pytest.mark.parametrize(
    ("without", "state", "name"),
    [
        ("REPLICATION", "bad", "REPLICATION"),
        ("pg_monitor, ", "warn", "pg_monitor"),
        (", pg_read_all_data", "warn", "pg_read_all_data"),
    ],
)
def test_the_doctor_misses_each_right_of_the_how_to(
    without: str, state: str, name: str, shared_cluster: Cluster, new_platform: Callable[..., Platform]
) -> None:
    role = f"poor_{secrets.token_hex(4)}"
    assert without in ROLE
    shared_cluster.sql(ROLE.replace(without, "", 1).replace("ops_backup", role))
    shared_cluster.sql(f"alter role {role} password '{PASSWORD.replace(chr(39), chr(39) * 2)}'")
    try:
        platform = new_platform({"app-db": [shared_cluster]}, extra={"connection": {"user": role}})
        assert findings(platform)[name] == state
    finally:
        shared_cluster.sql(f"drop owned by {role}; drop role {role}")


def test_without_a_canary_the_role_alone_is_enough(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = bare(new_cluster)
    cluster.sql(ROLE)
    cluster.sql(f"alter role ops_backup password '{PASSWORD.replace(chr(39), chr(39) * 2)}'")
    platform = new_platform({"app-db": [cluster]}, extra={"backup": {"verification": {"canary": False}}})
    run_backup(platform.access, platform.target)
    moment = canary.observe(platform.access, platform.target, "v1", SYSTEM_CLOCK)
    assert moment.recovery.kind == "time"
    assert "schema ops_canary" not in findings(platform)


def test_another_tools_archive_asks_for_one_more_right(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = new_cluster(18, {"archive_mode": "on", "archive_command": "true"})
    cluster.sql("revoke execute on function pg_switch_wal() from ops_backup")
    platform = new_platform(
        {"app-db": [cluster]}, extra={"repository": {"engine": "pgbackrest", "stanza": "s", "config": "/x"}}
    )
    with pytest.raises(CouldNotVerifyError, match="may not finish a WAL segment") as caught:
        canary.take(platform.access, platform.target, "v1", SYSTEM_CLOCK)
    assert FUNCTIONS.rstrip(";\n") in (caught.value.remedy or "")
    cluster.sql(FUNCTIONS)
    cluster.sql("select pg_switch_wal()")
    assert canary.take(platform.access, platform.target, "v2", SYSTEM_CLOCK).canary is not None


@pytest.fixture
def database_engine(ground: Ground) -> Iterator[Any]:
    """Root at the Vault of the tests, with the engine at the path that the platform's policy names."""
    import hvac

    ground.component("vault")
    token = (ground.place.directory / "secrets" / "vault.root_token").read_text()
    root = hvac.Client(url=f"http://127.0.0.1:{ground.place.port('vault')}", token=token, timeout=20)
    root.sys.enable_secrets_engine("database")
    yield root
    root.sys.revoke_prefix("database")
    root.sys.disable_secrets_engine("database")


def test_roles_that_vault_makes_share_the_canary_and_leave_nothing(
    database_engine: Any, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = bare(new_cluster)
    cluster.sql(GROUP)
    cluster.sql("alter role vault_ops password 'vault'")
    page = (HOW_TO / "least-privilege-role.md").read_text()
    creating, revoking = (
        [statement.replace('\\"', '"') for statement in re.findall(rf'{kind}_statements="(.*?;)"', page)]
        for kind in ("creation", "revocation")
    )
    assert (len(creating), len(revoking)) == (2, 1)
    database_engine.secrets.database.configure(
        name="app-db", plugin_name="postgresql-database-plugin", allowed_roles=["ops-backup"], username="vault_ops", password="vault",
        connection_url=f"postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{cluster.port}/postgres?sslmode=disable",
    )  # fmt: skip
    database_engine.secrets.database.create_role(
        name="ops-backup", db_name="app-db", default_ttl="1h", max_ttl="24h",
        creation_statements=creating, revocation_statements=revoking,
    )  # fmt: skip
    platform = new_platform({"app-db": [cluster]})
    login = platform.body["targets"][0]["connection"]
    (credentials,) = re.findall(r"credentials: (vault://\S+)\n", page)
    platform.body["targets"][0]["connection"] = {
        **{key: value for key, value in login.items() if key not in ("user", "password")},
        "credentials": credentials,
    }
    platform.reload()
    run_backup(platform.access, platform.target)
    made = "select count(*) from pg_roles where rolname like 'v-%'"
    for session in ("v1", "v2"):
        assert canary.take(platform.access, platform.target, session, SYSTEM_CLOCK).canary is not None
        assert findings(platform)["schema ops_canary"] == "good"
        assert cluster.sql(made) == 1
        platform.access.close()  # the next one is another role, and writes into the same table
        assert cluster.sql(made) == 0
    assert cluster.sql("select count(distinct verification) from ops_canary.canary") == 2


# The store and the key service

PAGE = "move-to-your-own-s3-and-vault.md"
BUCKET_ACTIONS = {"uploads": "ListBucketMultipartUploads", "versions": "ListBucketVersions", "versioning": "GetBucketVersioning",
                  "object-lock": "GetBucketObjectLockConfiguration", "list-type": "ListBucket"}  # fmt: skip


def actions_of(request: Request, bucket: str) -> set[str]:
    """The rights that a request takes, as the S3 documentation lists them for each operation."""
    parts = urlsplit(request.path)
    query = parse_qs(parts.query, keep_blank_values=True)
    if parts.path.strip("/") == bucket:
        return {BUCKET_ACTIONS[name] for name in query if name in BUCKET_ACTIONS} or {"ListBucket"}
    if request.method == "PUT":
        retained = any(name.startswith("x-amz-object-lock") for name in request.headers)
        return {"PutObject", "PutObjectRetention"} if retained else {"PutObject"}
    if request.method == "DELETE":
        return {
            "AbortMultipartUpload"
            if "uploadId" in query
            else "DeleteObjectVersion"
            if "versionId" in query
            else "DeleteObject"
        }
    return {
        "GetObjectRetention" if "retention" in query else "GetObjectLegalHold" if "legal-hold" in query else "GetObject"
    }


def test_the_rights_of_the_store_are_those_that_are_used(ground: Ground) -> None:
    (text,) = blocks(PAGE, "json")
    policy = json.loads(text)
    allowed = {
        action.removeprefix("s3:"): entry["Resource"] for entry in policy["Statement"] for action in entry["Action"]
    }
    ground.component("s3")
    used: set[str] = set()
    with FaultyProxy(ground.place.port("s3-http")) as proxy:
        for bucket, lock in (("how-to-locked", Lock("COMPLIANCE", timedelta(hours=1))), ("tests", None)):
            ground.store("", bucket, lock=lock).close()
            store = _through(ground, proxy, bucket, lock)
            proxy.seen.clear()
            store.check()
            store.put("a", b"x", retain=True)
            store.put("b", b"x", if_absent=True)
            store.get("a")
            list(store.list())
            list(store.list_folders())
            store.delete("b")
            store.delete("a")
            store.retention("a")
            list(store.incomplete_uploads())
            store.abort_upload("never", "begun")
            used |= {action for request in proxy.seen for action in actions_of(request, bucket)}
            store.close()
    assert used == set(allowed)
    for action, resource in allowed.items():
        assert resource.endswith("/*") == (action not in BUCKET_ACTIONS.values())


def _through(ground: Ground, proxy: FaultyProxy, bucket: str, lock: Lock | None) -> Any:
    from dataclasses import replace

    from ops_platform.clients.s3 import S3Store
    from ops_platform.local.components import s3_settings

    return S3Store(
        replace(s3_settings(ground.place, bucket), endpoint=proxy.url, prefix="how-to", lock=lock, timeout=20.0)
    )


def test_the_inventory_of_the_how_to_loads(tmp_path: Path) -> None:
    (text,) = blocks(PAGE, "yaml")
    whole = {"version": 1, "platform": {"name": "x"}, "owners": {}, "environments": {}} | yaml.safe_load(text)
    (tmp_path / "platform.yaml").write_text(yaml.safe_dump(whole))
    found = load(tmp_path / "platform.yaml").inventory
    assert found.stores["main"].object_lock is not None
    (other,) = re.findall(r"# (auth: \{.*method: approle.*\})", text)
    whole["vaults"]["main"] |= yaml.safe_load(other)
    (tmp_path / "platform.yaml").write_text(yaml.safe_dump(whole))
    assert load(tmp_path / "platform.yaml").inventory.vaults["main"].auth.method == "approle"


def test_the_policy_for_vault_is_enough(
    database_engine: Any, new_platform: Callable[..., Platform], shared_cluster: Cluster, tmp_path: Path
) -> None:
    """A role with that policy alone does all that the platform does; the same key and the same paths."""
    root = database_engine
    (policy,) = blocks(PAGE, "hcl")
    name = f"how-to-{secrets.token_hex(4)}"
    root.sys.create_or_update_policy(name, policy)
    root.auth.approle.create_or_update_approle(name, token_policies=[name], **{"token_ttl": "1h"})
    for half, value in (
        ("role_id", root.auth.approle.read_role_id(name)["data"]["role_id"]),
        ("secret_id", root.auth.approle.generate_secret_id(name)["data"]["secret_id"]),
    ):
        (tmp_path / half).write_text(value)
        (tmp_path / half).chmod(0o600)
    root.secrets.kv.v2.create_or_update_secret(path="ops/s3", secret={"access_key": "a", "secret_key": "b"})
    admin = f"t{secrets.token_hex(6)}"
    shared_cluster.sql(f"create role {admin} login superuser password '{admin}'")
    try:
        root.secrets.database.configure(
            name="pg", plugin_name="postgresql-database-plugin", allowed_roles=["ops-backup"], username=admin, password=admin,
            connection_url=f"postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{shared_cluster.port}/postgres?sslmode=disable",
        )  # fmt: skip
        root.secrets.database.create_role(
            name="ops-backup", db_name="pg", default_ttl="1h", max_ttl="24h",
            creation_statements=["create role \"{{name}}\" login password '{{password}}'"],
            revocation_statements=['drop role if exists "{{name}}"'],
        )  # fmt: skip
        platform = new_platform({"app-db": [shared_cluster]})
        platform.body["vaults"]["v"]["auth"] |= {half: f"file://{tmp_path}/{half}" for half in ("role_id", "secret_id")}
        platform.reload()
        keys = platform.access.keys("k")
        assert keys.check()["exportable"] is False
        session = platform.access.vault("v")
        assert session.read("secret/ops/s3", "access_key").reveal() == "a"
        lease = session.credentials("database/creds/ops-backup")
        lease_id = session._leases["database/creds/ops-backup"].lease_id
        session.call(lambda client: client.sys.renew_lease(lease_id), "renewal")
        session.call(lambda client: client.auth.token.renew_self(), "renewal")
        platform.access.close()
        assert (
            shared_cluster.sql(
                "select count(*) from pg_roles where rolname = %s", "postgres", lease["username"].reveal()
            )
            == 0
        )
    finally:
        root.sys.revoke_prefix("database")
        shared_cluster.sql(f"drop role {admin}")


@pytest.mark.parametrize("page", ["least-privilege-role.md", PAGE])
def test_the_pages_that_a_page_points_to_exist(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)", (HOW_TO / page).read_text()):
        assert link.startswith("https://") or (HOW_TO / link).exists()
