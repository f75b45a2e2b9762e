"""The typed model of platform.yaml: what is operated, and what was promised for it.

Strict: unknown keys are errors, nothing is guessed from a wrong type. This module only says what an inventory is;
`loader` reads it from a file and names file, line and key of every mistake.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import Field, model_validator

from ops_platform.inventory.backups import (
    BackupPolicy,
    Copy,
    Expectations,
    Expiry,
    Incremental,
    Objectives,
    Repository,
    Sandbox,
    Schedule,
    Transfer,
    Verification,
)
from ops_platform.inventory.base import AnyClassification, HostPort, Mode, Strict, Tls, VaultAuth, Weekly
from ops_platform.inventory.drills import Drills
from ops_platform.inventory.evidence import Control
from ops_platform.inventory.remediation import Remediation
from ops_platform.inventory.systems import AnySystem, HttpEndpoint, StoreSystem, StoreTarget, System
from ops_platform.inventory.values import Duration, Host, Id, Origin, PositiveDuration, SecretRef, Size, Url

__all__ = [
    "Backed",
    "BackupPolicy",
    "Copy",
    "Environment",
    "Expectations",
    "Expiry",
    "Incremental",
    "Inventory",
    "KeyService",
    "LedgerCheckpoints",
    "LedgerConfig",
    "Mode",
    "ObjectLock",
    "Objectives",
    "Owner",
    "Platform",
    "PostgresConnection",
    "Repository",
    "Sandbox",
    "Schedule",
    "Store",
    "Target",
    "Tls",
    "Transfer",
    "Vault",
    "VaultAuth",
    "Verification",
    "WalArchive",
    "Weekly",
    "at_copy",
    "copy_named",
]

S = TypeVar("S", bound=System)


class Owner(Strict):
    """Whoever answers for a target."""

    name: str = Field(description="As reports and the Dagster UI show it.")
    email: str | None = Field(default=None, description="Where the owner is reached.")
    slack: str | None = Field(default=None, description="Channel that hears of failures, such as #platform-oncall.")


class Vault(Strict):
    """A Vault (or OpenBao) server: secrets of `vault://` references and key services use it."""

    url: Url = Field(description="Its address, such as https://vault.example.com:8200.")
    namespace: str | None = Field(default=None, description="Vault Enterprise: the namespace.")
    ca: str | None = Field(
        default=None, description="PEM file of its certificate authority; {state} and {inventory} are expanded."
    )
    auth: VaultAuth = Field(description="How we log in.")
    timeout: PositiveDuration = Field(default=timedelta(seconds=10), description="One request takes at most this long.")


class KeyService(Strict):
    """Wraps the data keys of backups. `vault-transit` is the one for earnest; `file` keeps a key on a local disk."""

    kind: Literal["vault-transit", "file"] = Field(description="vault-transit needs vault, file needs path.")
    vault: Id | None = Field(default=None, description="vault-transit: the id under `vaults`.")
    mount: str = Field(default="transit", description="vault-transit: path of the secrets engine.")
    key: str = Field(default="ops-backup", description="vault-transit: name of the key; it need not be exportable.")
    path: str | None = Field(
        default=None, description="file: a file of 32 random bytes in hex, readable by its owner alone."
    )

    @model_validator(mode="after")
    def _needs(self) -> Self:
        if self.kind == "vault-transit" and self.vault is None:
            raise ValueError("vault-transit needs vault")
        if self.kind == "file" and self.path is None:
            raise ValueError("file needs path")
        return self


class ObjectLock(Strict):
    """Objects that nobody can delete before their date. The bucket must have been made with Object Lock."""

    mode: Literal["GOVERNANCE", "COMPLIANCE"] = Field(
        description="GOVERNANCE can be lifted by who has the right to; COMPLIANCE by nobody."
    )
    retain: PositiveDuration = Field(description="How long each object is locked, counted from its upload.")


class Store(Strict):
    """An S3 bucket."""

    kind: Literal["s3"] = Field(default="s3", description="The S3 protocol, whoever speaks it.")
    endpoint: Origin = Field(description="Address of the service, such as https://s3.example.com; no bucket, no path.")
    region: str = Field(default="us-east-1", description="Region that requests are signed for.")
    bucket: str = Field(description="Its name; the bucket must exist.")
    prefix: str = Field(default="", description="Everything stands below it; no slash at either end.")
    access_key: SecretRef = Field(description="The access key's id.")
    secret_key: SecretRef = Field(description="The secret access key.")
    session_token: SecretRef | None = Field(default=None, description="Of temporary credentials.")
    addressing: Literal["path", "virtual"] = Field(
        default="path", description="path: endpoint/bucket/key; virtual: bucket.endpoint/key."
    )
    ca: str | None = Field(default=None, description="PEM file of the store's certificate authority.")
    object_lock: ObjectLock | None = Field(default=None, description="Lock every object that is written.")
    timeout: PositiveDuration = Field(
        default=timedelta(seconds=30), description="An answer is waited for at most this long before the next try."
    )


class PostgresConnection(Strict):
    """How to reach a cluster: every member, any order; which one is the primary is asked, not declared."""

    hosts: Annotated[list[HostPort], Field(min_length=1)] = Field(description="Every member, primary and standbys.")
    dbname: str = Field(
        default="postgres", description="The database that is connected to; the canary and the expectations are there."
    )
    user: str | None = Field(default=None, description="The role that takes backups; or `credentials`.")
    password: SecretRef | None = Field(default=None, description="Its password; none where the server asks for none.")
    credentials: str | None = Field(
        default=None,
        pattern=r"^vault://[^#]+$",
        description="Dynamic credentials, such as vault://database/creds/ops-backup: user and password of one lease.",
    )
    tls: Tls = Field(default=Tls(), description="How the connection is secured.")
    connect_timeout: PositiveDuration = Field(
        default=timedelta(seconds=10), description="A member that has not answered by then is taken for away."
    )

    @model_validator(mode="after")
    def _one_login(self) -> Self:
        if (self.credentials is None) == (self.user is None):
            raise ValueError("give either user (with password) or credentials")
        return self

    @property
    def made_by(self) -> str | None:
        """The role in Vault that makes the user for each session, if one does; below static-creds/ stand users that stay."""
        path = (self.credentials or "").removeprefix("vault://")
        return path.replace("/creds/", "/roles/", 1) if "/creds/" in path else None


class PatroniApi(HttpEndpoint):
    """Patroni, where it keeps the cluster: asked by drills of failover, and told to switch over."""

    urls: Annotated[list[Url], Field(min_length=1)] = Field(description="The REST API of each member.")


class WalArchive(Strict):
    """How the receiver keeps a target's WAL."""

    slot: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,63}$")] = Field(
        default="ops_wal", description="The replication slot; the receiver makes it."
    )
    partial_every: PositiveDuration = Field(
        default=timedelta(seconds=5), description="The unfinished segment is stored this often."
    )
    max_lag: Duration = Field(default=timedelta(minutes=5), description="More than this behind fails the check.")
    max_slot_wal: Size = Field(
        default=64 << 30, description="Above this much retained WAL the slot is reported as a danger."
    )


class Target(Strict):
    """One PostgreSQL cluster."""

    id: Id = Field(description="Its name in commands, reports, partitions and the store; it cannot change later.")
    kind: Literal["postgresql"] = Field(default="postgresql", description="What it is.")
    description: str = Field(default="", description="For people.")
    environment: Id = Field(description="The id under `environments`.")
    owner: Id = Field(description="The id under `owners`.")
    classification: AnyClassification = Field(description="Of its data; every report shows it.")
    objectives: Objectives = Field(description="What was promised.")
    connection: PostgresConnection = Field(description="How to reach it.")
    patroni: PatroniApi | None = Field(default=None, description="Patroni's REST API, where Patroni keeps the cluster.")
    repository: Repository = Field(description="Where its backups are.")
    wal: WalArchive = Field(default=WalArchive(), description="How its WAL is kept.")
    backup: BackupPolicy = Field(description="Its policy.")
    maintenance_windows: list[Weekly] = Field(
        default=[],
        description="When a rule with `maintenance: inside` may act, and one with `outside` may not. Backups and expiry do not wait for them.",
    )
    failure_domain: str | None = Field(
        default=None,
        description="Targets and systems of one failure domain are acted on one at a time; its own id by default.",
    )
    depends_on: list[Id] = Field(
        default=[],
        description="Targets and systems that have to be there before it: a drill of the full stack restores them first.",
    )
    sandbox: Sandbox = Field(default=Sandbox(), description="Where it is restored to be verified.")
    labels: dict[str, str] = Field(default={}, description="For people; nothing is derived from them.")
    legal_hold: bool = Field(default=False, description="Nothing of this target is deleted while it is true.")


STORE_KINDS = tuple(
    get_args(member.model_fields["kind"].annotation)[0]
    for member in get_args(get_args(AnySystem)[0])
    if issubclass(member, StoreSystem)
)
Backed = Target | StoreTarget
"""Whatever has backups: what the store, the catalog, expiry and the promises need of it is the same."""
B = TypeVar("B", bound=Backed)


def copy_named(target: Backed, copy_id: str) -> Copy:
    """Raises UsageError that names the copies there are."""
    from ops_platform.errors import UsageError

    for copy in target.repository.copies:
        if copy.id == copy_id:
            return copy
    known = ", ".join(copy.id for copy in target.repository.copies)
    raise UsageError(
        f"{target.id} has no copy called {copy_id!r}",
        remedy=f"its copies: {known}" if known else "declare one under repository.copies",
    )


def at_copy(target: B, copy_id: str) -> B:
    """The same target, its backups read from that copy. Raises UsageError."""
    copy = copy_named(target, copy_id)
    there = {"store": copy.store, "keys": copy.keys, "copies": [], "is_copy": True}
    repository = target.repository.model_copy(update=there)
    if isinstance(target, Target):
        return target.model_copy(update={"repository": repository})
    return replace(target, repository=repository)


class Environment(Strict):
    """What targets have in common."""

    description: str = Field(default="", description="For people.")
    production: bool = Field(
        default=True, description="Drills keep away from its targets unless they are allowed to by name."
    )
    defaults: dict[str, Any] = Field(
        default={}, description="Keys of a target that every target of this environment has unless it says otherwise."
    )


class LedgerConfig(Strict):
    """The platform's own database, which holds the ledger."""

    host: Host = Field(description="Where it is reached.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(default=5432, description="Its port.")
    dbname: str = Field(default="ops", description="The database.")
    user: str = Field(description="A role that may create a schema there, or write into ops_ledger.")
    password: SecretRef = Field(description="Its password.")
    tls: Tls = Field(default=Tls(), description="How the connection is secured.")


class LedgerCheckpoints(Strict):
    """Signed statements of what the ledger held, kept where the administrators of its database do not reach."""

    id: Id = Field(
        default="platform",
        description="Of the ledger, in the store and in every checkpoint. A database that was made anew, or restored to an "
        "earlier moment, is another ledger: give it another id.",
    )
    store: Id = Field(description="The id under `stores` where they are put.")
    object_lock: ObjectLock | None = Field(
        default=None, description="Nobody can delete them before their date; that of the store by default."
    )
    vault: Id = Field(description="The id under `vaults` of the server that signs them.")
    mount: str = Field(default="transit", description="Path of Vault's Transit engine.")
    key: str = Field(default="ops-ledger", description="Name of the key there, of type ed25519.")
    schedule: Schedule = Field(
        default=Schedule(cron="*/5 * * * *"),
        description="When one is written, if there are new entries; every sound `ops ledger verify` writes one, too.",
    )
    tolerance: Duration = Field(
        default=timedelta(minutes=1), description="By which the clocks of the machines that write may differ."
    )


class SlackConfig(Strict):
    """Where failed runs are told of."""

    webhook: SecretRef = Field(
        description="Address of an incoming webhook; whoever knows it may write, so it is a secret."
    )


class DagsterWeb(HttpEndpoint):
    """The web server of our own Dagster: asked by the playbook dagster.run_job, `ops events cursor` and `ops metrics serve`."""

    url: Url = Field(description="Its address, with the path prefix where it has one.")


class Tracing(Strict):
    """Where traces of incidents go: OTLP over HTTP. Credentials come from OTEL_EXPORTER_OTLP_HEADERS in the environment."""

    endpoint: Url = Field(description="The collector's address; /v1/traces is added to it.")


class Platform(Strict):
    """The platform itself."""

    name: str = Field(description="For people.")
    database: LedgerConfig | None = Field(
        default=None, description="The ledger's database. Without it nothing is recorded and expiry only observes."
    )
    ledger: LedgerCheckpoints | None = Field(
        default=None, description="Checkpoints of the ledger. Without them a ledger that is rewritten whole looks good."
    )
    slack: SlackConfig | None = Field(default=None, description="Without it failed runs are told to nobody.")
    dagster: DagsterWeb | None = Field(
        default=None,
        description="Without it no playbook runs a Dagster job, and no cursor of events is shown or reset.",
    )
    tracing: Tracing | None = Field(default=None, description="Without it no traces are made.")
    reports: str = Field(
        default="reports", description="Folder for reports, relative to platform.yaml; {state} is expanded."
    )
    maintenance_windows: list[Weekly] = Field(
        default=[], description="Checked and shown; nothing waits for them: those of a target or system count."
    )


class Inventory(Strict):
    """All of platform.yaml."""

    version: Literal[1] = Field(description="Of this format.")
    platform: Platform = Field(description="The platform itself.")
    owners: dict[Id, Owner] = Field(description="Who answers for targets.")
    environments: dict[Id, Environment] = Field(description="What targets have in common, such as production.")
    vaults: dict[Id, Vault] = Field(default={}, description="Where secrets stand.")
    key_services: dict[Id, KeyService] = Field(default={}, description="What wraps the data keys of backups.")
    stores: dict[Id, Store] = Field(default={}, description="Where backups are kept.")
    backup_policies: dict[Id, BackupPolicy] = Field(
        default={}, description="Backup policies, by the name that targets use."
    )
    targets: list[Target] = Field(default=[], description="The PostgreSQL clusters that are operated.")
    systems: list[AnySystem] = Field(default=[], description="What else is operated, or tells of its state.")
    evidence: list[Control] = Field(
        default=[],
        description="Controls that evidence is exported for, beside those that are built in and in their place.",
    )
    remediation: Remediation | None = Field(default=None, description="Which alerts and events lead to which action.")
    drills: Drills | None = Field(default=None, description="Which drills are held, on what and how often.")

    def target(self, target_id: str) -> Target:
        """The target of that id. Raises UsageError that names the nearest ids."""
        from difflib import get_close_matches

        from ops_platform.errors import UsageError

        if found := self._targets_by_id.get(target_id):
            return found
        near = get_close_matches(target_id, [t.id for t in self.targets], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "ops inventory show lists the targets"
        raise UsageError(f"there is no target {target_id!r} in the inventory", remedy=hint)

    def all_backed(self) -> list[Backed]:
        """Everything that has backups: the targets, then the other stores."""
        return [*self.targets, *self.store_targets()]

    def store_targets(self) -> list[StoreTarget]:
        """The systems that are backed up."""
        found = (system.stored() for system in self.systems if isinstance(system, StoreSystem))
        return [stored for stored in found if stored is not None]

    def backed(self, subject_id: str) -> Backed:
        """The target, or the system that is backed up, of that id. Raises UsageError."""
        from ops_platform.errors import UsageError

        subject = self.subject(subject_id)
        if isinstance(subject, Target):
            return subject
        stored = subject.stored() if isinstance(subject, StoreSystem) else None
        if stored is None:
            raise UsageError(
                f"{subject_id!r} is of kind {subject.kind}, and the inventory names no backup of it",
                remedy=f"give it `backup` and `repository`; kinds that can be: {', '.join(STORE_KINDS)}",
            )
        return stored

    def subject(self, subject_id: str) -> Target | AnySystem:
        """What an action is about: the target or system of that id. Raises UsageError that names the nearest ids."""
        return self._systems_by_id.get(subject_id) or self.target(subject_id)

    @cached_property
    def _targets_by_id(self) -> dict[str, Target]:
        return {one.id: one for one in self.targets}

    @cached_property
    def _systems_by_id(self) -> dict[str, AnySystem]:
        return {one.id: one for one in self.systems}

    def system(self, system_id: str, kind: type[S]) -> S:
        """The system of that id and kind. Raises UsageError."""
        from ops_platform.errors import UsageError

        found = self.subject(system_id)
        if not isinstance(found, kind):
            raise UsageError(f"{system_id!r} is of kind {found.kind}, and something else is needed here")
        return found
