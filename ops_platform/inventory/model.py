"""The typed model of platform.yaml: what is operated, and what was promised for it.

Strict: unknown keys are errors, nothing is guessed from a wrong type. This module only says what an inventory is;
`loader` reads it from a file and names file, line and key of every mistake.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ops_platform.inventory.values import Cron, Duration, Host, Id, Origin, PositiveDuration, SecretRef, Size, Url, Zone


class Strict(BaseModel):
    # Strict also in its types: "no" is not false, "5432" is not 5432, true is not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)


class Classification(StrEnum):
    PUBLIC = "public"
    INTERNAL = "internal"
    CONFIDENTIAL = "confidential"
    RESTRICTED = "restricted"


class Mode(StrEnum):
    """Observe says what would be done; enforce does it."""

    OBSERVE = "observe"
    ENFORCE = "enforce"


# Strict mode would ask for the enumeration itself, and the file holds its text.
_Classification = Annotated[Classification, Field(strict=False)]
_Mode = Annotated[Mode, Field(strict=False)]


class Owner(Strict):
    name: str
    email: str | None = None
    slack: str | None = Field(default=None, description="Channel that hears of failures, such as #platform-oncall.")


class Objectives(Strict):
    rto: Duration = Field(
        default=timedelta(hours=4), description="Recovery time objective: the service is back within this time."
    )
    rpo: Duration = Field(
        default=timedelta(hours=1), description="Recovery point objective: at most this much is lost."
    )


class Tls(Strict):
    mode: Literal["disable", "require", "verify-ca", "verify-full"] = "verify-full"
    ca: str | None = Field(
        default=None, description="PEM file of the certificate authority; {state} and {inventory} are expanded."
    )


class VaultAuth(Strict):
    method: Literal["approle", "kubernetes", "token"]
    mount: str | None = Field(default=None, description="Path of the auth method; its name by default.")
    role: str | None = Field(default=None, description="kubernetes: the role.")
    role_id: SecretRef | None = None
    secret_id: SecretRef | None = None
    token: SecretRef | None = None
    jwt_path: str = "/var/run/secrets/kubernetes.io/serviceaccount/token"

    @model_validator(mode="after")
    def _needs(self) -> Self:
        need = {"approle": ("role_id", "secret_id"), "kubernetes": ("role",), "token": ("token",)}[self.method]
        missing = [name for name in need if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{self.method} needs {' and '.join(missing)}")
        if any(ref and ref.scheme == "vault" for ref in (self.role_id, self.secret_id, self.token)):
            raise ValueError("what opens Vault cannot stand in Vault: use file:// or env://")
        return self


class Vault(Strict):
    """A Vault (or OpenBao) server: secrets of `vault://` references and key services use it."""

    url: Url
    namespace: str | None = None
    ca: str | None = None
    auth: VaultAuth
    timeout: PositiveDuration = timedelta(seconds=10)


class KeyService(Strict):
    """Wraps the data keys of backups. `vault-transit` is the one for earnest; `file` keeps a key on a local disk."""

    kind: Literal["vault-transit", "file"]
    vault: Id | None = Field(default=None, description="vault-transit: the id under `vaults`.")
    mount: str = "transit"
    key: str = "ops-backup"
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
    mode: Literal["GOVERNANCE", "COMPLIANCE"]
    retain: PositiveDuration = Field(description="How long each object is locked, counted from its upload.")


class Store(Strict):
    """An S3 bucket."""

    kind: Literal["s3"] = "s3"
    endpoint: Origin
    region: str = "us-east-1"
    bucket: str
    prefix: str = Field(default="", description="Everything stands below it; no slash at either end.")
    access_key: SecretRef
    secret_key: SecretRef
    session_token: SecretRef | None = None
    addressing: Literal["path", "virtual"] = "path"
    ca: str | None = Field(default=None, description="PEM file of the store's certificate authority.")
    object_lock: ObjectLock | None = None
    timeout: PositiveDuration = timedelta(seconds=30)


class Weekly(Strict):
    """A window that comes back every week, in a named zone."""

    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] = [
        "mon",
        "tue",
        "wed",
        "thu",
        "fri",
        "sat",
        "sun",
    ]
    start: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
    length: PositiveDuration
    timezone: Zone


class Schedule(Strict):
    cron: Cron
    timezone: Zone = "UTC"
    spread: Duration = Field(
        default=timedelta(0),
        description="Targets start spread over this time, each at its own fixed moment, so that they do not start at once.",
    )


class Incremental(Strict):
    enabled: bool = True
    full_every: Duration = Field(default=timedelta(days=7), description="A full backup at least this often.")
    max_chain: Annotated[int, Field(ge=1, le=100)] = Field(
        default=7, description="Incrementals on top of one full at most."
    )


class Transfer(Strict):
    """How bytes travel from the server to the store."""

    compression: Literal["zstd", "lz4", "none"] = "zstd"
    level: Annotated[int, Field(ge=1, le=19)] = 1
    compress_at: Literal["client", "server"] = Field(
        default="client", description="server: PostgreSQL 15+; for thin networks."
    )
    block_size: Size = Field(default=16 << 20, description="Bytes of one block; a multiple of 512.")
    workers: Annotated[int, Field(ge=1, le=16)] = 2
    rate_limit: Annotated[Size, Field(ge=1)] | None = Field(
        default=None, description="Bytes a second read from the server, at most."
    )
    retries: Annotated[int, Field(ge=0, le=20)] = 5

    @model_validator(mode="after")
    def _block(self) -> Self:
        if self.block_size % 512 or not 1 << 16 <= self.block_size <= 1 << 28:
            raise ValueError(
                "block_size is a multiple of 512 from 64KiB to 256MiB, so that no tar header straddles blocks"
            )
        return self


class Expectations(Strict):
    suite: str = Field(description="YAML file with Great Expectations expectations, relative to platform.yaml.")


class Verification(Strict):
    """How backups of a target are proven."""

    schedule: Schedule | None = None
    proven_within: Duration = Field(default=timedelta(days=2), description="Older proof fails the check.")
    pick: list[Literal["newest", "oldest", "chain", "random"]] = Field(
        default=["newest"],
        description="What is restored, by turns: newest backup, the oldest promised one, the longest chain, a random moment.",
    )
    amcheck: Literal["sample", "full", "off"] = "sample"
    full_every: Duration = Field(default=timedelta(days=7), description="Everything is checked at least this often.")
    canary: bool = Field(
        default=True, description="Write canary rows to the source; without, the proof is weaker and says so."
    )
    row_count_tolerance: Annotated[float, Field(ge=0, le=1)] = 0.02
    expectations: Expectations | None = None


class Expiry(Strict):
    mode: _Mode = Mode.OBSERVE
    max_count: Annotated[int, Field(ge=1)] = Field(default=10, description="Backups that one run may delete at most.")
    max_percent: Annotated[float, Field(gt=0, le=100)] = Field(
        default=34, description="Share of the backups that one run may delete."
    )


class BackupPolicy(Strict):
    schedule: Schedule
    recovery_window: Duration = Field(
        default=timedelta(days=14), description="Every moment of this time stays restorable."
    )
    minimum_redundancy: Annotated[int, Field(ge=1)] = Field(
        default=2, description="Full backups kept whatever their age."
    )
    max_age: Duration = Field(
        default=timedelta(hours=26), description="An older newest backup fails the freshness check."
    )
    incremental: Incremental = Incremental()
    transfer: Transfer = Transfer()
    verification: Verification = Verification()
    expiry: Expiry = Expiry()
    from_standby: bool = Field(default=False, description="Prefer a standby as the source of base backups.")


class HostPort(Strict):
    host: Host
    port: Annotated[int, Field(ge=1, le=65535)] = 5432


class PostgresConnection(Strict):
    """How to reach a cluster: every member, any order; which one is the primary is asked, not declared."""

    hosts: Annotated[list[HostPort], Field(min_length=1)]
    dbname: str = "postgres"
    user: str | None = None
    password: SecretRef | None = None
    credentials: str | None = Field(
        default=None,
        pattern=r"^vault://[^#]+$",
        description="Dynamic credentials, such as vault://database/creds/ops-backup: user and password of one lease.",
    )
    tls: Tls = Tls()
    connect_timeout: PositiveDuration = timedelta(seconds=10)

    @model_validator(mode="after")
    def _one_login(self) -> Self:
        if (self.credentials is None) == (self.user is None):
            raise ValueError("give either user (with password) or credentials")
        return self


class WalArchive(Strict):
    """How the receiver keeps a target's WAL."""

    slot: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,63}$")] = "ops_wal"
    partial_every: PositiveDuration = Field(
        default=timedelta(seconds=5), description="The unfinished segment is stored this often."
    )
    max_lag: Duration = Field(default=timedelta(minutes=5), description="More than this behind fails the check.")
    max_slot_wal: Size = Field(
        default=64 << 30, description="Above this much retained WAL the slot is reported as a danger."
    )


class Repository(Strict):
    """Where the backups of a target are and which engine wrote them."""

    engine: Literal["native", "pgbackrest"] = "native"
    store: Id | None = None
    keys: Id | None = None
    stanza: str | None = Field(default=None, description="pgbackrest: the stanza.")
    config: str | None = Field(default=None, description="pgbackrest: its configuration file.")

    @model_validator(mode="after")
    def _needs(self) -> Self:
        need = ("store", "keys") if self.engine == "native" else ("stanza", "config")
        missing = [name for name in need if getattr(self, name) is None]
        if missing:
            raise ValueError(f"engine {self.engine} needs {' and '.join(missing)}")
        return self


class Sandbox(Strict):
    """Where restored servers run."""

    directory: str | None = Field(
        default=None, description="Parent of the restore directories; the system's temporary one by default."
    )
    postgres: dict[int, str] = Field(
        default={}, description="Major version to bin directory, where none is found by itself."
    )


class Target(Strict):
    """One PostgreSQL cluster."""

    id: Id
    kind: Literal["postgresql"] = "postgresql"
    description: str = ""
    environment: Id
    owner: Id
    classification: _Classification
    objectives: Objectives
    connection: PostgresConnection
    repository: Repository
    wal: WalArchive = WalArchive()
    backup: BackupPolicy
    maintenance_windows: list[Weekly] = []
    sandbox: Sandbox = Sandbox()
    labels: dict[str, str] = {}
    legal_hold: bool = Field(default=False, description="Nothing of this target is deleted while it is true.")


class Environment(Strict):
    description: str = ""
    defaults: dict[str, Any] = Field(
        default={}, description="Keys of a target that every target of this environment has unless it says otherwise."
    )


class LedgerConfig(Strict):
    """The platform's own database, which holds the ledger."""

    host: Host
    port: Annotated[int, Field(ge=1, le=65535)] = 5432
    dbname: str = "ops"
    user: str
    password: SecretRef
    tls: Tls = Tls()


class SlackConfig(Strict):
    webhook: SecretRef


class Platform(Strict):
    name: str
    database: LedgerConfig | None = None
    slack: SlackConfig | None = None
    reports: str = Field(
        default="reports", description="Folder for reports, relative to platform.yaml; {state} is expanded."
    )
    maintenance_windows: list[Weekly] = []


class Inventory(Strict):
    """All of platform.yaml."""

    version: Literal[1]
    platform: Platform
    owners: dict[Id, Owner]
    environments: dict[Id, Environment]
    vaults: dict[Id, Vault] = {}
    key_services: dict[Id, KeyService] = {}
    stores: dict[Id, Store] = {}
    backup_policies: dict[Id, BackupPolicy] = {}
    targets: list[Target] = []

    def target(self, target_id: str) -> Target:
        """The target of that id. Raises UsageError that names the nearest ids."""
        from difflib import get_close_matches

        from ops_platform.errors import UsageError

        for target in self.targets:
            if target.id == target_id:
                return target
        near = get_close_matches(target_id, [t.id for t in self.targets], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "ops inventory show lists the targets"
        raise UsageError(f"there is no target {target_id!r} in the inventory", remedy=hint)
