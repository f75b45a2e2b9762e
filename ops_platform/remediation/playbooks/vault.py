"""Playbooks for Vault and OpenBao: end what leaked, and change the password that Vault itself logs in with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, RefusedError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.systems import VaultSystem
from ops_platform.inventory.values import Id, PositiveDuration, Secret
from ops_platform.remediation.playbook import Context, Playbook

if TYPE_CHECKING:
    import psycopg

    from ops_platform.clients.vault import VaultSession

LEASES, TOKEN, ROOT = "lease tree", "token", "root credential"
_GONE = "invalid accessor"  # what Vault says of an accessor whose token is not there


class _Desk:
    """Calls to one Vault. A refusal names the very line that the policy lacks."""

    def __init__(self, context: Context[Any]) -> None:
        system = context.access.inventory.system(context.subject.id, VaultSystem)
        self._session: VaultSession = context.access.vault(system.vault)

    def read(self, path: str) -> dict[str, Any] | None:
        """None where there is nothing."""
        return self._ask("read", path, lambda client: client.read(path))

    def list(self, path: str) -> list[str]:
        """The names below a path; empty where there are none."""
        found = self._ask('list", "sudo', path, lambda client: client.list(path))
        return list(found["data"]["keys"]) if found else []

    def update(self, path: str, body: Mapping[str, Any], *, right: str = "update", timeout: float | None = None) -> Any:
        more = {"timeout": timeout} if timeout is not None else {}
        return self._ask(right, path, lambda client: client.adapter.put(f"/v1/{path}", json=dict(body), **more))

    def _ask(self, right: str, path: str, ask: Callable[[Any], Any]) -> Any:
        try:
            return self._session.call(ask, path)
        except OpsError as error:
            if _GONE in error.what:  # status 400 or 403, by version and make
                raise NotThereError("there is no such token", where=path) from None
            if not isinstance(error, AccessDeniedError):
                raise
            raise AccessDeniedError(
                error.what,
                where=error.where,
                remedy=f'the policy of this platform needs: path "{path}" {{ capabilities = ["{right}"] }}',
            ) from None


# A leaked lease tree


class Leaked(Strict):
    prefix: str | None = Field(
        default=None,
        description="Leases below this path are revoked, such as database/creds/shop or auth/userpass/login/bob.",
    )
    accessor: str | None = Field(
        default=None,
        description="Accessor of the token that leaked: it, its child tokens and their leases are revoked.",
    )
    whole_mount: bool = Field(
        default=False,
        description="Whether the prefix may be everything that one secrets engine or login method has issued.",
    )
    most: Annotated[int, Field(ge=1)] = Field(
        default=1000, description="More leases than this are not revoked at once."
    )
    within: PositiveDuration = Field(default=timedelta(minutes=1), description="Vault has revoked them by then.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prefix is None) == (self.accessor is None):
            raise ValueError("give either prefix or accessor")
        if self.prefix is not None:
            steps = self.prefix.strip("/").split("/")
            if steps[0] in ("", "sys") or steps == ["auth"] or not all(steps) or {".", "..", "*", "+"} & set(steps):
                raise ValueError("a prefix begins with the mount: never everything, all logins, or sys")
        return self


@dataclass
class RevokeLeases:
    """`actions.Action` over the leases below a prefix.

    One change for the tree and not one for each lease: leases come and go by the second, and what is approved is that all go.
    """

    context: Context[Leaked]
    name = "vault.revoke_lease_tree"

    def __post_init__(self) -> None:
        self._desk = _Desk(self.context)
        self._prefix = (self.context.parameters.prefix or "").strip("/") + "/"

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def plan(self) -> Plan:
        self._need_part_of_a_mount()
        self._need_not_ours()
        leases = self._count()
        change = Change(LEASES, self._prefix, "leases", "no leases", reversible=False)
        total = sum(leases.values())
        return Plan(
            self.name, self.target_id, (change,) if total else (), self.context.clock.now(),
            population={LEASES: 1}, facts={"leases": leases, "total": total},
        )  # fmt: skip

    def check(self, change: Change) -> Applied | None:
        self._need_not_ours()
        return None if self._count() else Applied(Outcome.ALREADY_DONE, "no lease is left")

    def apply(self, change: Change) -> Applied:
        seconds = self.context.parameters.within.total_seconds()
        path = f"sys/leases/revoke-prefix/{change.object.rstrip('/')}"
        self._desk.update(path, {"sync": True}, right='update", "sudo', timeout=seconds)
        return Applied(Outcome.APPLIED, "Vault revoked every lease below it")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        left = self._count()
        said = ", ".join(f"{count} below {path}" for path, count in left.items()) or "no lease is left"
        return Verification((Check("leases are gone", not left, said),))

    def _need_part_of_a_mount(self) -> None:
        """A mount may stand at several steps: only Vault knows where one ends and its roles begin."""
        login = self._prefix.startswith("auth/")
        where, before = ("sys/auth", "auth/") if login else ("sys/mounts", "")
        mounts = (self._desk.read(where) or {}).get("data") or {}
        fitting = [before + mount for mount in mounts if self._prefix.startswith(before + mount)]
        if not fitting:
            raise NotThereError(
                "no secrets engine or login method is mounted there", where=self._prefix, remedy=f"{where} lists them"
            )
        rest = self._prefix.removeprefix(max(fitting, key=len)).strip("/")
        # ENGINE/creds/ROLE, auth/METHOD/login/USER: what has fewer steps is all that the mount ever issued.
        if rest.count("/") < 1 and not self.context.parameters.whole_mount:
            raise RefusedError(
                "this prefix is everything that the mount has issued", where=self._prefix,
                remedy="name the role (database/creds/shop), or say whole_mount: true",
            )  # fmt: skip

    def _need_not_ours(self) -> None:
        own = (self._desk.read("auth/token/lookup-self") or {})["data"]["path"]
        if f"{own}/".startswith(self._prefix):
            raise RefusedError(
                "this platform's own login would end with it", where=self._prefix,
                remedy="revoke by accessor, or log this platform in by another method",
            )  # fmt: skip

    def _count(self) -> dict[str, int]:
        """Leases by the folder they stand in. Raises RefusedError where there are too many."""
        found: dict[str, int] = {}
        folders = [self._prefix]
        while folders:
            folder = folders.pop()
            names = self._desk.list(f"sys/leases/lookup/{folder}")
            folders += [folder + name for name in names if name.endswith("/")]
            if leases := sum(not name.endswith("/") for name in names):
                found[folder] = leases
            if sum(found.values()) > (most := self.context.parameters.most):
                raise RefusedError(
                    f"there are more than {most} leases", where=self._prefix,
                    remedy="name a smaller part, or raise the parameter most",
                )  # fmt: skip
        return dict(sorted(found.items()))


@dataclass
class RevokeToken:
    """`actions.Action` over a token that is known by its accessor."""

    context: Context[Leaked]
    name = "vault.revoke_lease_tree"

    def __post_init__(self) -> None:
        self._desk = _Desk(self.context)
        self._accessor = self.context.parameters.accessor or ""

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def plan(self) -> Plan:
        self._need_not_ours()
        token = self._look()
        changes: tuple[Change, ...] = ()
        if token is not None:
            # Who it belongs to (display name, entity) may be a person and stays out of the record.
            what = {"path": token["path"], "policies": sorted(token["policies"]), "orphan": token.get("orphan")}
            changes = (Change(TOKEN, f"accessor {self._accessor}", what, None, reversible=False),)
        return Plan(self.name, self.target_id, changes, self.context.clock.now(), population={TOKEN: 1})

    def check(self, change: Change) -> Applied | None:
        self._need_not_ours()
        return None if self._look() is not None else Applied(Outcome.ALREADY_DONE, "the token is gone")

    def apply(self, change: Change) -> Applied:
        try:
            self._desk.update("auth/token/revoke-accessor", {"accessor": self._accessor})
        except NotThereError:
            return Applied(Outcome.ALREADY_DONE, "the token is gone")
        return Applied(Outcome.APPLIED, "the token and its children are revoked; their leases follow at once")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        gone = self._look() is None
        return Verification(
            (Check("token is gone", gone, "Vault does not know it" if gone else "Vault knows it still"),)
        )

    def _look(self) -> dict[str, Any] | None:
        try:
            return self._desk.update("auth/token/lookup-accessor", {"accessor": self._accessor})["data"]
        except NotThereError:
            return None

    def _need_not_ours(self) -> None:
        own = (self._desk.read("auth/token/lookup-self") or {})["data"]
        # Whose child ours is Vault does not tell; only an orphan is nobody's.
        if own["accessor"] == self._accessor or not own.get("orphan"):
            raise RefusedError(
                "this platform's own token is it, or may be a child of it", where=f"accessor {self._accessor}",
                remedy="log this platform in by AppRole or Kubernetes, whose tokens are nobody's children",
            )  # fmt: skip


class RevokeLeaseTree(Playbook[Leaked]):
    name = "vault.revoke_lease_tree"
    title = "Revoke a leaked lease tree"
    kinds = frozenset({"vault"})
    what = (
        "Revokes every lease below a path, or a token with its children and their leases, and waits until the systems behind them "
        "have dropped the credentials."
    )
    why_safe = (
        "Only what the rule names is revoked, never a whole mount unless it says so and never this platform's own login; clients "
        "that ask Vault for credentials get new ones."
    )
    blast_radius = "Clients that use these credentials are refused until they have fetched new ones."
    rights = (
        'path "sys/mounts" { capabilities = ["read"] }',
        'path "sys/auth" { capabilities = ["read"] }',
        'path "sys/leases/lookup/PREFIX/*" { capabilities = ["list", "sudo"] }',
        'path "sys/leases/revoke-prefix/PREFIX" { capabilities = ["update", "sudo"] }',
        'path "auth/token/lookup-self" { capabilities = ["read"] }',
        'path "auth/token/lookup-accessor" { capabilities = ["update"] }',
        'path "auth/token/revoke-accessor" { capabilities = ["update"] }',
    )
    Parameters = Leaked

    def action(self, context: Context[Leaked]) -> Action:
        return RevokeToken(context) if context.parameters.accessor is not None else RevokeLeases(context)


# The password that Vault itself logs in with


class RootCredential(Strict):
    mount: str = Field(default="database", description="Where the database secrets engine is mounted.")
    connection: str = Field(description="Name of the connection in it.")
    user: str = Field(description="The user that Vault logs in as there. Where it is another one, nothing is done.")
    role: str = Field(
        description="A role of this connection; a credential of it is issued before and after, as the proof."
    )
    target: Id | None = Field(
        default=None, description="A PostgreSQL target of the inventory: the new credential also has to log in there."
    )


@dataclass
class RotateRoot:
    """`actions.Action` over one connection of a database secrets engine.

    Vault keeps no note of when it rotated: a second rotation, such as after a kill, is done again and does no harm.
    """

    context: Context[RootCredential]
    name = "vault.rotate_database_root"

    def __post_init__(self) -> None:
        self._desk = _Desk(self.context)
        self._mount = self.context.parameters.mount.strip("/")

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    @property
    def _object(self) -> str:
        return f"{self._mount}/config/{self.context.parameters.connection}"

    def plan(self) -> Plan:
        before = self._connection()
        after = {"user": before["user"], "password": "a new one that Vault alone knows"}
        change = Change(ROOT, self._object, before, after, reversible=False)
        return Plan(self.name, self.target_id, (change,), self.context.clock.now(), population={ROOT: 1})

    def check(self, change: Change) -> Applied | None:
        if self._connection() != change.before:
            return Applied(Outcome.CONTENDED, "the connection is not any more what was planned")
        try:
            self._issue(lambda _data: None)
        except OpsError as error:
            # A rotation over a connection that does not work may leave a password that nobody knows.
            return Applied(Outcome.REFUSED, f"no credential can be issued even before the rotation: {error}")
        return None

    def apply(self, change: Change) -> Applied:
        self._desk.update(f"{self._mount}/rotate-root/{self.context.parameters.connection}", {})
        return Applied(Outcome.APPLIED, "Vault set a new password and logs in with it")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By what the password is for: Vault logs in with it and makes a user, and that user logs in."""
        checks: list[Check] = []

        def log_in(data: Mapping[str, Secret]) -> None:
            checks.append(Check("a credential is issued", True, f"of the role {self.context.parameters.role}"))
            if self.context.parameters.target is not None:
                checks.append(self._logs_in(data))

        try:
            self._issue(log_in)
        except AccessDeniedError as error:
            checks.append(Check("a credential is issued", None, str(error)))
        except OpsError as error:
            checks.append(Check("a credential is issued", False, str(error)))
        return Verification(tuple(checks))

    def _connection(self) -> dict[str, Any]:
        parameters, where = self.context.parameters, self._object
        found = self._desk.read(where)
        role = self._desk.read(f"{self._mount}/roles/{parameters.role}")
        if found is None or role is None:
            missing = where if found is None else f"{self._mount}/roles/{parameters.role}"
            raise NotThereError("Vault has nothing there", where=missing, remedy="check mount, connection and role")
        if role["data"].get("db_name") != parameters.connection:
            raise RefusedError(f"the role {parameters.role} is of another connection", where=where)
        details = found["data"].get("connection_details") or {}
        if details.get("username") != parameters.user:
            raise RefusedError(
                f"Vault does not log in as {parameters.user!r} there", where=where,
                remedy="look who else uses that user before its password changes, and correct the parameter user",
            )  # fmt: skip
        if "{{password}}" not in (details.get("connection_url") or "").replace(" ", ""):
            raise RefusedError(
                "the connection's address holds the password itself: it would not work after the rotation", where=where,
                remedy="write {{username}} and {{password}} into its connection_url",
            )  # fmt: skip
        return {"user": parameters.user, "plugin": found["data"].get("plugin_name")}

    def _issue(self, use: Callable[[Mapping[str, Secret]], None]) -> None:
        """A credential for the length of `use`; revoked afterwards, or else it ends by itself."""
        path = f"{self._mount}/creds/{self.context.parameters.role}"
        answer = self._desk.read(path)
        if answer is None:
            raise NotThereError("there is no such role", where=path)
        try:
            use({name: Secret(str(value)) for name, value in answer["data"].items()})
        finally:
            with contextlib.suppress(OpsError):
                self._desk.update("sys/leases/revoke", {"lease_id": answer["lease_id"], "sync": True})

    def _logs_in(self, data: Mapping[str, Secret]) -> Check:
        name, target_id = "it logs in", self.context.parameters.target
        try:
            with contextlib.closing(self._connect(data)) as connection:
                connection.execute("select 1")
        except (AccessDeniedError, ConflictError, NotThereError) as error:
            return Check(name, False, str(error))
        except OpsError as error:
            return Check(name, None, str(error))
        return Check(name, True, f"at {target_id}")

    def _connect(self, data: Mapping[str, Secret]) -> psycopg.Connection[Any]:
        from dataclasses import replace

        from ops_platform.clients.postgres import connect

        access = self.context.access
        target = access.inventory.target(self.context.parameters.target or "")
        primary = access.member(target)
        login = access.login(target.connection)
        return connect(
            replace(login, user=data["username"].reveal(), password=data["password"]), primary.host, primary.port
        )


class RotateDatabaseRoot(Playbook[RootCredential]):
    name = "vault.rotate_database_root"
    title = "Rotate a database root credential"
    kinds = frozenset({"vault"})
    what = (
        "Has Vault set a new password, which Vault alone knows, for the user with which its database secrets engine logs in. "
        "A credential is issued before it, so that a connection that does not work is left alone, and after it, as the proof."
    )
    why_safe = "Only Vault uses this user; the rule names it, and another one is refused. Credentials that were issued stay valid."
    blast_radius = (
        "Whoever else logs in as this user is refused from then on; a connection that breaks stops new credentials."
    )
    rights = (
        'path "MOUNT/config/CONNECTION" { capabilities = ["read"] }',
        'path "MOUNT/roles/ROLE" { capabilities = ["read"] }',
        'path "MOUNT/creds/ROLE" { capabilities = ["read"] }',
        'path "MOUNT/rotate-root/CONNECTION" { capabilities = ["update"] }',
        'path "sys/leases/revoke" { capabilities = ["update"] }',
    )
    Parameters = RootCredential

    def action(self, context: Context[RootCredential]) -> Action:
        return RotateRoot(context)


PLAYBOOKS: tuple[Playbook[Any], ...] = (RevokeLeaseTree(), RotateDatabaseRoot())
