"""Playbooks of Vault on a real server of its interface, with a real database behind it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import hvac
import psycopg
import pytest

from ops_platform.actions import Outcome, Status
from ops_platform.errors import AccessDeniedError, NotThereError, RefusedError, UnreachableError, UsageError
from ops_platform.inventory.model import Mode
from ops_platform.remediation.playbook import playbook
from tests.integration.incident_rig import solved
from tests.integration.systems_rig import Bench, Between, KilledError, bench, killed, outcomes
from tests.integration.wal_rig import eventually
from tests.rig import PASSWORD, Cluster, Ground

REVOKE, ROTATE = playbook("vault.revoke_lease_tree"), playbook("vault.rotate_database_root")


def policy(rights: tuple[str, ...], *, leave_out: str = "", **names: str) -> str:
    """The lines of a playbook's documentation with their names filled in."""
    text = "\n".join(line for line in rights if not leave_out or leave_out not in line)
    for name, value in names.items():
        text = text.replace(name, value)
    return text


class Safe:
    """Vault with a database engine over a cluster, and a platform with exactly the rights that are given to it."""

    def __init__(self, ground: Ground, cluster: Cluster, stack: ExitStack) -> None:
        ground.component("vault")
        self.url = f"http://127.0.0.1:{ground.place.port('vault')}"
        self.root = self.client((ground.place.directory / "secrets" / "vault.root_token").read_text())
        self.cluster, self._stack = cluster, stack
        self.name = f"p{secrets.token_hex(6)}"
        self.mount = f"{self.name}/db"
        self.password = secrets.token_hex(8)
        cluster.sql(f"create role {self.name} login superuser password '{self.password}'")
        self.root.sys.enable_secrets_engine("database", path=self.mount)
        self.configure()
        for role in ("shop", "billing"):
            self.root.secrets.database.create_role(
                name=role, db_name="pg", mount_point=self.mount, default_ttl="1h", max_ttl="2h",
                creation_statements=["create role \"{{name}}\" login password '{{password}}'"],
                revocation_statements=['drop role if exists "{{name}}"'],
            )  # fmt: skip

    def configure(
        self, url: str = "postgresql://{{username}}:{{password}}@127.0.0.1:PORT/postgres?sslmode=disable"
    ) -> None:
        self.root.secrets.database.configure(
            name="pg", plugin_name="postgresql-database-plugin", allowed_roles=["*"], mount_point=self.mount,
            username=self.name, password=self.password, connection_url=url.replace("PORT", str(self.cluster.port)),
        )  # fmt: skip

    def client(self, token: str) -> Any:
        return hvac.Client(url=self.url, token=token, timeout=20)

    def issue(self, role: str, client: Any = None) -> dict[str, str]:
        return (client or self.root).read(f"{self.mount}/creds/{role}")["data"]

    def opens(self, data: dict[str, str]) -> bool:
        return self._opens(data["username"], data["password"])

    def _opens(self, user: str, password: str) -> bool:
        try:
            with psycopg.connect(
                host="127.0.0.1",
                port=self.cluster.port,
                dbname="postgres",
                user=user,
                password=password,
                connect_timeout=10,
            ) as connection:
                return connection.execute("select 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False

    def old_password_opens(self) -> bool:
        return self._opens(self.name, self.password)

    def leases(self, role: str) -> int:
        found = self.root.list(f"sys/leases/lookup/{self.mount}/creds/{role}")
        return len(found["data"]["keys"]) if found else 0

    def bench(self, policy: str, url: str | None = None) -> Bench:
        """A platform that logs in by AppRole."""
        name = f"{self.name}-{secrets.token_hex(4)}"
        self.root.sys.create_or_update_policy(name, policy or 'path "nothing" { capabilities = ["read"] }')
        self.root.auth.approle.create_or_update_approle(name, token_policies=[name], token_ttl="1h")
        files = {
            "role": self.root.auth.approle.read_role_id(name)["data"]["role_id"],
            "secret": self.root.auth.approle.generate_secret_id(name)["data"]["secret_id"],
            "password": PASSWORD,
        }
        login = {"method": "approle", "role_id": "file://{inventory}/role", "secret_id": "file://{inventory}/secret"}
        body = {"vaults": {"v": {"url": url or self.url, "auth": login, "timeout": "20s"}}, **_target(self.cluster)}
        return self._stack.enter_context(bench(self.cluster, {"kind": "vault", "vault": "v"}, files=files, body=body))

    def close(self) -> None:
        self.root.sys.revoke_force(self.mount)
        self.root.sys.disable_secrets_engine(self.mount)
        self.cluster.sql(f"drop role if exists {self.name}")


def _target(cluster: Cluster) -> dict[str, Any]:
    key = "file://{inventory}/password"
    return {
        "key_services": {"k": {"kind": "file", "path": "{inventory}/key"}},
        "stores": {"s": {"endpoint": "https://127.0.0.1:1", "bucket": "none", "access_key": key, "secret_key": key}},
        "targets": [
            {
                "id": "app-db", "environment": "test", "owner": "team", "classification": "internal", "objectives": {},
                "connection": {
                    "hosts": [{"host": "127.0.0.1", "port": cluster.port}], "dbname": "postgres", "user": "ops_backup",
                    "password": key, "tls": {"mode": "disable"},
                },
                "repository": {"store": "s", "keys": "k"},
                "backup": {"schedule": {"cron": "15 2 * * *"}},
            }
        ],
    }  # fmt: skip


@pytest.fixture
def safe(ground: Ground, shared_cluster: Cluster) -> Iterator[Safe]:
    with ExitStack() as stack:
        made = Safe(ground, shared_cluster, stack)
        stack.callback(made.close)
        yield made


# A leaked lease tree


@pytest.fixture
def revoker(safe: Safe) -> Bench:
    """With exactly the rights of the playbook's documentation."""
    return safe.bench(policy(REVOKE.rights, PREFIX=f"{safe.mount}/creds/shop"))


def test_every_lease_below_the_prefix_is_revoked_and_no_other(safe: Safe, revoker: Bench) -> None:
    leaked, other = [safe.issue("shop") for _ in range(3)], safe.issue("billing")
    result = revoker.run(REVOKE, prefix=f"{safe.mount}/creds/shop")
    assert result.status is Status.DONE, result.as_json()
    assert result.plan.facts["total"] == 3
    assert [safe.opens(data) for data in leaked] == [False, False, False]
    assert safe.opens(other)
    assert (safe.leases("shop"), safe.leases("billing")) == (0, 1)
    assert not any(data["username"] in revoker.written(result) for data in leaked)


def test_an_alert_about_leaked_leases_leads_to_a_closed_incident(
    safe: Safe, revoker: Bench, shared_cluster: Cluster
) -> None:
    leaked, other = [safe.issue("shop") for _ in range(3)], safe.issue("billing")
    given = {"prefix": f"{safe.mount}/creds/shop"}
    passwords = [data["password"] for data in leaked]
    solved(shared_cluster, revoker.access, REVOKE.name, given, lambda: safe.leases("shop") > 0, secrets=passwords)
    assert [safe.opens(data) for data in (*leaked, other)] == [False, False, False, True]


def test_observing_revokes_nothing_and_counts(safe: Safe, revoker: Bench) -> None:
    leaked = safe.issue("shop")
    result = revoker.go(revoker.action(REVOKE, prefix=f"{safe.mount}/creds/shop"), mode=Mode.OBSERVE)
    assert (result.status, result.plan.facts["total"]) == (Status.OBSERVED, 1)
    assert safe.opens(leaked)


def test_no_lease_is_nothing_to_do(safe: Safe, revoker: Bench) -> None:
    assert revoker.run(REVOKE, prefix=f"{safe.mount}/creds/shop").status is Status.NOTHING


def test_the_plan_is_the_same_however_many_leases_there_are(safe: Safe, revoker: Bench) -> None:
    """Leases come by the second: an approval would never hold otherwise."""
    digests = set()
    for _ in range(2):
        safe.issue("shop")
        digests.add(revoker.action(REVOKE, prefix=f"{safe.mount}/creds/shop/").plan().digest)
    assert len(digests) == 1


def test_leases_that_ended_between_plan_and_apply_are_already_done(safe: Safe, revoker: Bench) -> None:
    safe.issue("shop")
    prefix = f"{safe.mount}/creds/shop"
    action = Between(
        revoker.action(REVOKE, prefix=prefix), planned=lambda: safe.root.sys.revoke_prefix(f"{safe.mount}/creds/shop")
    )
    result = revoker.go(action)
    eventually(lambda: safe.leases("shop") == 0)
    assert [outcome for _, outcome in outcomes(result)] in ([Outcome.ALREADY_DONE], [Outcome.APPLIED])
    assert result.status is Status.DONE


def test_a_run_that_is_killed_after_revoking_leaves_nothing_to_do(safe: Safe, revoker: Bench) -> None:
    safe.issue("shop")
    prefix = f"{safe.mount}/creds/shop"
    with pytest.raises(KilledError):
        revoker.go(Between(revoker.action(REVOKE, prefix=prefix), after=killed))
    assert revoker.run(REVOKE, prefix=prefix).status is Status.NOTHING


def test_a_run_that_is_killed_before_revoking_is_made_again(safe: Safe, revoker: Bench) -> None:
    leaked = safe.issue("shop")
    prefix = f"{safe.mount}/creds/shop"
    with pytest.raises(KilledError):
        revoker.go(Between(revoker.action(REVOKE, prefix=prefix), before=killed))
    assert revoker.run(REVOKE, prefix=prefix).status is Status.DONE
    assert not safe.opens(leaked)


def test_more_leases_than_allowed_are_refused(safe: Safe, revoker: Bench) -> None:
    leaked = [safe.issue("shop") for _ in range(3)]
    with pytest.raises(RefusedError, match="more than 2 leases"):
        revoker.run(REVOKE, prefix=f"{safe.mount}/creds/shop", most=2)
    action = revoker.action(REVOKE, prefix=f"{safe.mount}/creds/shop", most=3)
    result = revoker.go(Between(action, planned=lambda: leaked.append(safe.issue("shop"))))
    assert (result.status, outcomes(result)[0][1]) == (Status.FAILED, Outcome.FAILED)
    assert all(safe.opens(data) for data in leaked)


@pytest.mark.parametrize("prefix", ["", "/", "auth", "auth/", "sys", "sys/leases", "a//b", "../secret", "database/+/x"])
def test_a_prefix_that_is_everything_is_no_parameter(prefix: str) -> None:
    with pytest.raises(UsageError, match="never everything"):
        REVOKE.read_parameters({"prefix": prefix})


@pytest.mark.parametrize("given", [{}, {"prefix": "a/b/c", "accessor": "x"}])
def test_either_prefix_or_accessor(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="either prefix or accessor"):
        REVOKE.read_parameters(given)


def test_a_whole_mount_is_revoked_only_where_the_rule_says_so(safe: Safe) -> None:
    """The mount has two steps here: counting slashes alone would take `NAME/db/creds` for one role."""
    shop, billing = safe.issue("shop"), safe.issue("billing")
    at = safe.bench(
        policy(REVOKE.rights, PREFIX=safe.mount).replace(
            f'revoke-prefix/{safe.mount}"', f'revoke-prefix/{safe.mount}*"'
        )
    )
    for prefix in (safe.mount, f"{safe.mount}/creds"):
        with pytest.raises(RefusedError, match="everything that the mount has issued"):
            at.run(REVOKE, prefix=prefix)
    result = at.run(REVOKE, prefix=safe.mount, whole_mount=True)
    assert result.status is Status.DONE
    assert not safe.opens(shop)
    assert not safe.opens(billing)


def test_a_mount_that_is_not_there_is_not_an_empty_one(revoker: Bench) -> None:
    with pytest.raises(NotThereError, match="no secrets engine or login method"):
        revoker.run(REVOKE, prefix="nowhere/creds/shop")


def test_our_own_login_is_never_revoked(safe: Safe) -> None:
    at = safe.bench(policy(REVOKE.rights, PREFIX="auth/approle"))
    with pytest.raises(RefusedError, match="own login would end"):
        at.run(REVOKE, prefix="auth/approle/login", whole_mount=True)


@pytest.mark.parametrize("right", ["sys/mounts", "sys/leases/lookup/", "sys/leases/revoke-prefix/"])
def test_a_missing_right_is_named(safe: Safe, right: str) -> None:
    leaked = safe.issue("shop")
    prefix = f"{safe.mount}/creds/shop"
    at = safe.bench(policy(REVOKE.rights, leave_out=right, PREFIX=prefix))
    try:
        result = at.run(REVOKE, prefix=prefix)
        assert result.status is Status.FAILED
        said = result.outcomes[0][1].reason
    except AccessDeniedError as error:
        said = str(error)
    assert f'needs: path "{right}' in said
    assert safe.opens(leaked)


def test_a_vault_that_is_away_is_not_one_without_leases(safe: Safe) -> None:
    at = safe.bench("", url="http://127.0.0.1:1")
    for parameters in ({"prefix": f"{safe.mount}/creds/shop"}, {"accessor": "x"}):
        with pytest.raises(UnreachableError):
            at.run(REVOKE, **parameters)


def test_a_leaked_token_is_revoked_with_its_children_and_their_leases(safe: Safe, revoker: Bench) -> None:
    token = safe.root.auth.token.create(policies=["root"], ttl="1h", display_name="maria.muster")["auth"]
    child = safe.client(token["client_token"]).auth.token.create(policies=["root"], ttl="1h")["auth"]
    leaked = [safe.issue("shop", safe.client(one["client_token"])) for one in (token, child)]
    result = revoker.run(REVOKE, accessor=token["accessor"])
    assert result.status is Status.DONE
    for one in (token, child):
        with pytest.raises(hvac.exceptions.Forbidden):
            safe.client(one["client_token"]).auth.token.lookup_self()
    eventually(lambda: not any(safe.opens(data) for data in leaked))
    assert "maria.muster" not in revoker.written(result)
    assert revoker.run(REVOKE, accessor=token["accessor"]).status is Status.NOTHING


def test_a_token_that_ended_between_plan_and_apply_is_already_done(safe: Safe, revoker: Bench) -> None:
    accessor = safe.root.auth.token.create(policies=["default"], ttl="1h")["auth"]["accessor"]
    action = Between(
        revoker.action(REVOKE, accessor=accessor), planned=lambda: safe.root.auth.token.revoke_accessor(accessor)
    )
    result = revoker.go(action)
    assert (result.status, outcomes(result)[0][1]) == (Status.DONE, Outcome.ALREADY_DONE)


def test_our_own_token_is_not_revoked(revoker: Bench) -> None:
    own = revoker.access.vault("v").call(lambda client: client.auth.token.lookup_self(), "self")["data"]["accessor"]
    with pytest.raises(RefusedError, match="own token"):
        revoker.run(REVOKE, accessor=own)


def test_a_token_that_may_be_our_parent_is_not_revoked(safe: Safe) -> None:
    at = safe.bench("")
    parent = safe.root.auth.token.create(policies=["root"], ttl="1h")["auth"]
    child = safe.client(parent["client_token"]).auth.token.create(policies=["root"], ttl="1h")["auth"]["client_token"]
    (at.home / "token").write_text(child)
    (at.home / "token").chmod(0o600)
    login = {"method": "token", "token": "file://{inventory}/token"}
    file = at.home / "platform.yaml"
    import yaml

    from ops_platform.clients.access import Access
    from ops_platform.inventory import load

    body = yaml.safe_load(file.read_text())
    body["vaults"]["v"]["auth"] = login
    file.write_text(yaml.safe_dump(body))
    at.access = Access(load(file))
    with pytest.raises(RefusedError, match="may be a child of it"):
        at.run(REVOKE, accessor=parent["accessor"])


@pytest.mark.parametrize("right", ["auth/token/lookup-accessor", "auth/token/revoke-accessor"])
def test_a_missing_right_to_a_token_is_named(safe: Safe, right: str) -> None:
    token = safe.root.auth.token.create(policies=["default"], ttl="1h")["auth"]
    at = safe.bench(policy(REVOKE.rights, leave_out=right, PREFIX="x"))
    try:
        result = at.run(REVOKE, accessor=token["accessor"])
        assert result.status is Status.FAILED
        said = result.outcomes[0][1].reason
    except AccessDeniedError as error:
        said = str(error)
    assert f'needs: path "{right}"' in said
    assert safe.root.auth.token.lookup_accessor(token["accessor"])


# The root credential of a database


def rotation(safe: Safe, **more: Any) -> dict[str, Any]:
    return {"mount": safe.mount, "connection": "pg", "user": safe.name, "role": "shop", **more}


@pytest.fixture
def rotator(safe: Safe) -> Bench:
    """With exactly the rights of the playbook's documentation."""
    return safe.bench(policy(ROTATE.rights, MOUNT=safe.mount, CONNECTION="pg", ROLE="shop"))


def test_the_password_is_another_one_and_new_credentials_log_in(safe: Safe, rotator: Bench) -> None:
    held = safe.issue("billing")
    assert safe.old_password_opens()
    result = rotator.run(ROTATE, **rotation(safe, target="app-db"))
    assert result.status is Status.DONE, result.as_json()
    assert [check.name for check in result.verification.checks] == ["a credential is issued", "it logs in"]
    assert not safe.old_password_opens()
    assert safe.opens(held)
    assert safe.opens(safe.issue("shop"))
    assert safe.password not in rotator.written(result)


def test_the_credentials_of_the_proof_do_not_stay(safe: Safe, rotator: Bench) -> None:
    assert rotator.run(ROTATE, **rotation(safe)).status is Status.DONE
    assert safe.leases("shop") == 0
    assert safe.cluster.sql("select count(*) from pg_roles where rolname like 'v-%-shop-%'") == 0


def test_planning_issues_nothing(safe: Safe, rotator: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    action = rotator.action(ROTATE, **rotation(safe))
    monkeypatch.setattr(type(action), "_issue", lambda *_: pytest.fail("it issued a credential"))
    result = rotator.go(action, mode=Mode.OBSERVE)
    assert result.status is Status.OBSERVED
    assert safe.old_password_opens()


@pytest.mark.parametrize(("killing", "opens"), [("before", True), ("after", False)])
def test_a_killed_rotation_is_made_again(safe: Safe, rotator: Bench, killing: str, opens: bool) -> None:
    with pytest.raises(KilledError):
        rotator.go(Between(rotator.action(ROTATE, **rotation(safe)), **{killing: killed}))
    assert safe.old_password_opens() is opens
    assert rotator.run(ROTATE, **rotation(safe, target="app-db")).status is Status.DONE
    assert not safe.old_password_opens()


def test_a_connection_that_does_not_work_is_left_alone(safe: Safe, rotator: Bench) -> None:
    safe.cluster.sql(f"alter role {safe.name} password 'by hand'")
    safe.cluster.sql(f"select pg_terminate_backend(pid, 5000) from pg_stat_activity where usename = '{safe.name}'")
    result = rotator.run(ROTATE, **rotation(safe))
    assert outcomes(result)[0][1] is Outcome.REFUSED
    assert "even before the rotation" in result.outcomes[0][1].reason
    assert safe._opens(safe.name, "by hand")


def test_another_user_than_the_rule_names_is_refused(safe: Safe, rotator: Bench) -> None:
    with pytest.raises(RefusedError, match="does not log in as 'postgres'"):
        rotator.run(ROTATE, **rotation(safe, user="postgres"))
    assert safe.old_password_opens()


def test_a_connection_that_changed_between_plan_and_apply_is_left_alone(safe: Safe, rotator: Bench) -> None:
    def swap() -> None:
        safe.cluster.sql(f"create role {safe.name}_2 login superuser password '{safe.password}'")
        safe.name += "_2"
        safe.configure()

    parameters, first = rotation(safe), safe.name
    try:
        result = rotator.go(Between(rotator.action(ROTATE, **parameters), planned=swap))
        assert result.status is Status.FAILED
        assert "does not log in as" in result.outcomes[0][1].reason
        assert safe.old_password_opens()
    finally:
        safe.cluster.sql(f"drop role if exists {first}")


def test_a_password_in_the_address_is_refused(safe: Safe, rotator: Bench) -> None:
    safe.configure(f"postgresql://{safe.name}:{safe.password}@127.0.0.1:PORT/postgres?sslmode=disable")
    with pytest.raises(RefusedError, match="address holds the password") as caught:
        rotator.run(ROTATE, **rotation(safe))
    assert safe.password not in str(caught.value)
    assert safe.old_password_opens()


@pytest.mark.parametrize(("what", "value"), [("connection", "other"), ("role", "nobody")])
def test_what_is_not_there_is_named(safe: Safe, what: str, value: str) -> None:
    at = safe.bench(policy(ROTATE.rights, MOUNT=safe.mount, CONNECTION="*", ROLE="*"))
    with pytest.raises(NotThereError, match="Vault has nothing there") as caught:
        at.run(ROTATE, **rotation(safe, **{what: value}))
    assert value in (caught.value.where or "")


@pytest.mark.parametrize("right", ["/config/", "/roles/", "/creds/", "/rotate-root/"])
def test_a_missing_right_to_rotate_is_named(safe: Safe, right: str) -> None:
    at = safe.bench(policy(ROTATE.rights, leave_out=right, MOUNT=safe.mount, CONNECTION="pg", ROLE="shop"))
    try:
        result = at.run(ROTATE, **rotation(safe))
        assert not result.ok
        said = result.outcomes[0][1].reason
    except AccessDeniedError as error:
        said = str(error)
    assert f'needs: path "{safe.mount}{right}' in said
    assert safe.old_password_opens()


def test_a_credential_that_cannot_be_issued_after_the_rotation_is_seen(safe: Safe, rotator: Bench) -> None:
    def lose() -> None:
        safe.cluster.sql(f"alter role {safe.name} nologin")

    result = rotator.go(Between(rotator.action(ROTATE, **rotation(safe)), after=lose))
    assert result.status is Status.FAILED
    assert result.verification.holds is False


def test_a_vault_that_is_away_cannot_rotate(safe: Safe) -> None:
    at = safe.bench("", url="http://127.0.0.1:1")
    with pytest.raises(UnreachableError):
        at.run(ROTATE, **rotation(safe))


def test_neither_can_be_undone() -> None:
    nothing: Callable[..., Any] = REVOKE.undo
    assert nothing(None, []) is None
    assert ROTATE.undo(None, []) is None  # type: ignore[arg-type]
    assert (REVOKE.undo_text, ROTATE.undo_text) == (None, None)
