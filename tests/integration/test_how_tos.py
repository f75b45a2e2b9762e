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

import psycopg
import pytest
import yaml

from ops_platform.backup.basebackup import run_backup
from ops_platform.clients.s3 import Lock
from ops_platform.clock import SYSTEM_CLOCK
from ops_platform.doctor import Found, examine
from ops_platform.errors import AccessDeniedError, CouldNotVerifyError
from ops_platform.inventory import load
from ops_platform.recovery import canary
from tests.integration.http_faults import FaultyProxy, Request
from tests.rig import PASSWORD, Cluster, Ground, Platform, typed

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of that language ("" for those that name none), without the indentation of the list that they stand in."""
    text = (HOW_TO / page).read_text()
    fenced = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    found = [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, name, block in fenced if name == language]
    assert found, f"{page} has no block in {language}"
    return found


ROLE, SCHEMA, FUNCTIONS, GROUP, HANDED_OVER = blocks("least-privilege-role.md", "sql")
HBA_LINES, GROUP_HBA_LINES, VAULT_CONNECTION, VAULT_ROLE = blocks("least-privilege-role.md", "")
ENDING = yaml.safe_load(blocks("least-privilege-role.md", "yaml")[0])["connection"]


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
def vault_root(ground: Ground) -> Iterator[Any]:
    """Root at the Vault of the tests, which has no engine for databases yet."""
    import hvac

    ground.component("vault")
    token = (ground.place.directory / "secrets" / "vault.root_token").read_text()
    root = hvac.Client(url=f"http://127.0.0.1:{ground.place.port('vault')}", token=token, timeout=20)
    yield root
    root.sys.revoke_force("database")  # also what a test has made impossible to revoke
    root.sys.disable_secrets_engine("database")


@pytest.fixture
def database_engine(vault_root: Any) -> Any:
    """The same with the engine, at the path that the platform's policy names."""
    vault_root.sys.enable_secrets_engine("database")
    return vault_root


class Ending:
    """A target whose roles Vault makes, set up word for word as the page says but for addresses and TLS, which the tests have not."""

    def __init__(self, root: Any, cluster: Cluster, new_platform: Callable[..., Platform], path: Path) -> None:
        self.root, self.cluster = root, cluster
        self.path = path
        cluster.sql("create database shop")
        connection = {**ENDING, "hosts": [{"host": "127.0.0.1", "port": cluster.port}], "tls": {"mode": "disable"}}
        self.platform = new_platform({"app-db": [cluster]})
        self.platform.body["targets"][0]["connection"] = connection
        self.platform.reload()

    def set_up(self, *statements: str) -> None:
        """Steps 1 to 4. `statements`: what is typed in the database, the page's own for a new cluster unless others are given."""
        for statement in statements or (GROUP,):
            self.cluster.sql(statement, "shop")
        if self.cluster.server.install.major < 16:
            (superuser,) = re.findall(r"`(ALTER ROLE vault_ops .*?)`", (HOW_TO / "least-privilege-role.md").read_text())
            self.cluster.sql(superuser)
        self.cluster.sql("alter role vault_ops password 'typed'")
        lines = GROUP_HBA_LINES.replace("hostssl", "host").replace("10.0.0.0/8", "127.0.0.1/32")
        (self.cluster.server.directory / "pg_hba.conf").write_text("local all all trust\n" + lines)
        self.cluster.sql("select pg_reload_conf()")
        here = VAULT_CONNECTION.replace("verify-full", "disable").replace("db-0.example.com:5432", "127.0.0.1:1")
        self.type(here.replace("db-1.example.com:5432", f"127.0.0.1:{self.cluster.port}"))
        self.type(VAULT_ROLE)

    def type(self, command: str) -> None:
        typed(command, self.root, self.path)

    def look(self) -> dict[str, Found]:
        """What the doctor says of a session of its own."""
        self.platform.access.close()
        return {found.what: found for found in examine(self.platform.access, self.platform.target).findings}


@pytest.fixture
def ending(
    vault_root: Any, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform], tmp_path: Path
) -> Callable[..., Ending]:
    return lambda major=18: Ending(vault_root, bare(new_cluster, major), new_platform, tmp_path)


RIGHTS = ("REPLICATION", "pg_monitor", "pg_read_all_data", "schema ops_canary", "replication login")


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_roles_that_vault_makes_share_the_canary_and_leave_nothing(major: int, ending: Callable[..., Ending]) -> None:
    """And the doctor says so: what a login replicates with is its own, everything else its group's."""
    at = ending(major)
    at.set_up()
    platform, cluster = at.platform, at.cluster
    for session in ("v1", "v2"):
        found = at.look()
        assert {name: found[name].state for name in RIGHTS} == dict.fromkeys(RIGHTS, "good")
        run_backup(platform.access, platform.target)
        assert canary.take(platform.access, platform.target, session, SYSTEM_CLOCK).canary is not None
        assert cluster.sql(MADE) == 1
        platform.access.close()  # the next one is another role, and writes into the same table
        assert cluster.sql(MADE) == 0
    assert cluster.sql("select count(distinct verification) from ops_canary.canary", "shop") == 2
    assert cluster.sql("select rolreplication from pg_roles where rolname = 'ops_backup_rights'") is False
    with pytest.raises(psycopg.OperationalError):  # what was typed is no password any more
        psycopg.connect(f"host=127.0.0.1 port={cluster.port} dbname=shop user=vault_ops password=typed")


MADE = "select count(*) from pg_roles where rolname like 'v-%'"


def test_a_login_that_vault_makes_without_replication_is_mended_in_vault(ending: Callable[..., Ending]) -> None:
    """Not at the role, which is gone with the session, nor at the group, which hands it on to nobody."""
    at = ending()
    at.set_up()
    at.type(VAULT_ROLE.replace(" REPLICATION", "", 1))
    found = at.look()
    for name in ("REPLICATION", "replication login"):
        assert found[name].state == "bad"
        remedy = str(found[name].remedy)
        assert "REPLICATION into the creation_statements of database/roles/ops-backup" in remedy
        assert "ALTER ROLE" not in remedy
    with pytest.raises(AccessDeniedError, match="may not replicate") as caught:
        run_backup(at.platform.access, at.platform.target)
    assert caught.value.remedy == found["replication login"].remedy


def test_what_belongs_to_a_role_of_one_session_is_noticed(ending: Callable[..., Ending]) -> None:
    """Without SET role the first proof would pass, its role could not be dropped, and the second one could not write."""
    at = ending()
    at.set_up()
    alone = re.sub(r"^ *creation_statements=\"ALTER ROLE.*\n", "", VAULT_ROLE, flags=re.MULTILINE)
    assert alone != VAULT_ROLE
    at.type(alone)
    found = at.look()["schema ops_canary"]
    assert (found.state, found.found) == ("bad", "what we write would belong to a role of one session")
    assert """creation_statements of database/roles/ops-backup with ALTER ROLE "{{name}}" SET role =""" in str(
        found.remedy
    )
    run_backup(at.platform.access, at.platform.target)
    canary.take(at.platform.access, at.platform.target, "v1", SYSTEM_CLOCK)
    found = at.look()["schema ops_canary"]
    assert (found.state, found.found) == ("bad", "exists, but not ours")
    assert "ALTER TABLE ops_canary.canary OWNER TO THE_GROUP" in str(found.remedy)
    with pytest.raises(CouldNotVerifyError, match="permission denied for table canary") as caught:
        canary.take(at.platform.access, at.platform.target, "v2", SYSTEM_CLOCK)
    assert "ops doctor app-db names the statement" in str(caught.value.remedy)
    # Rights are given to the group then, and not to the role that ends.
    at.cluster.sql("revoke pg_monitor from ops_backup_rights")
    assert "GRANT pg_monitor TO THE_GROUP (" in str(at.look()["pg_monitor"].remedy)
    # Once the table is the group's, a session may write into it as a member.
    at.cluster.sql(HANDED_OVER, "shop")
    assert at.look()["schema ops_canary"].state == "good"
    canary.take(at.platform.access, at.platform.target, "v3", SYSTEM_CLOCK)


def test_the_canary_of_the_role_before_changes_hands(ending: Callable[..., Ending]) -> None:
    at = ending()
    at.cluster.sql(ROLE + SCHEMA, "shop")
    at.cluster.sql("set role ops_backup; create table ops_canary.canary (i int)", "shop")
    (schema,) = re.findall(r"^CREATE SCHEMA .*\n", GROUP, re.MULTILINE)
    at.set_up(GROUP.replace(schema, ""))
    found = at.look()["schema ops_canary"]
    assert (found.state, found.found) == ("bad", "exists, but not ours")
    assert found.remedy.startswith(
        f"in shop: {HANDED_OVER.replace(chr(10), ' ').replace(' IF EXISTS', '').rstrip('; ')}"
    )  # type: ignore[union-attr]
    at.cluster.sql(HANDED_OVER, "shop")
    assert at.look()["schema ops_canary"].state == "good"


@pytest.mark.parametrize("lacks", ["alter role vault_ops noreplication", "revoke ops_backup_rights from vault_ops"])
def test_vaults_own_role_is_blamed_for_what_it_may_not(lacks: str, ending: Callable[..., Ending]) -> None:
    at = ending()
    at.set_up()
    # Over the socket, where pg_hba.conf asks no group: the second one takes away what lets it in.
    at.cluster.sql(lacks)
    if "revoke" in lacks:
        (at.cluster.server.directory / "pg_hba.conf").write_text(
            "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
        )
        at.cluster.sql("select pg_reload_conf()")
    found = at.look()["servers"]
    assert found.state == "bad"
    assert "Vault's own role in the database may not make ours" in found.found
    assert "WITH ADMIN OPTION" in str(found.remedy)


@pytest.mark.parametrize(
    ("spoil", "says", "remedy"),
    [
        ("alter schema ops_canary owner to postgres", "exists, but not ours", "ALTER SCHEMA ops_canary OWNER TO ops_backup;"),
        ("alter schema ops_canary owner to postgres; grant usage on schema ops_canary to ops_backup", "exists, but not ours",
         "ALTER SCHEMA ops_canary OWNER TO ops_backup;"),
        ("alter schema ops_canary owner to postgres; grant create on schema ops_canary to ops_backup;"
         " revoke pg_read_all_data from ops_backup", "exists, but not ours", "ALTER SCHEMA ops_canary OWNER TO ops_backup;"),
        ("create table ops_canary.canary (i int)", "exists, but not ours", "ALTER TABLE ops_canary.canary OWNER TO ops_backup;"),
        ("create table ops_canary.canary (i int); grant select, insert on ops_canary.canary to ops_backup", "exists, but not ours",
         "ALTER TABLE ops_canary.canary OWNER TO ops_backup;"),
        ("drop schema ops_canary", "missing", "CREATE SCHEMA ops_canary AUTHORIZATION ops_backup;"),
    ],
    ids=["nothing", "usage alone", "create alone", "table", "no delete", "no schema"],
)  # fmt: skip
def test_the_doctor_says_of_the_canary_what_a_proof_meets(
    spoil: str, says: str, remedy: str, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    """One right of several is not enough, and what is there already is not made: each advice mends it."""
    cluster = new_cluster(18)
    cluster.sql(spoil)
    platform = new_platform({"app-db": [cluster]})

    def look() -> Found:
        found = examine(platform.access, platform.target).findings
        return next(one for one in found if one.what == "schema ops_canary")

    assert (look().state, look().found) == ("bad", says)
    advice = str(look().remedy)
    assert remedy in advice
    with pytest.raises(CouldNotVerifyError, match="the canary cannot be written"):
        canary.take(platform.access, platform.target, "v1", SYSTEM_CLOCK)
    cluster.sql(advice.removeprefix("in postgres: ").partition("; or verification")[0])
    assert look().state == "good"


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
