"""Systems that are operated beside the PostgreSQL targets: what a playbook may act on, and what tells of their state."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ops_platform.inventory.backups import BackupPolicy, Objectives, Repository, Sandbox
from ops_platform.inventory.base import (
    AnyClassification,
    AnyMode,
    Classification,
    HostPort,
    Mode,
    Strict,
    VaultAuth,
    Weekly,
)
from ops_platform.inventory.matchers import AlertMatcher
from ops_platform.inventory.values import Id, PositiveDuration, SecretRef, Size, Url


class HttpAuth(Strict):
    """How we show who we are to an HTTP API: by user and password, or by a bearer token or API key. None: not at all."""

    user: str | None = Field(default=None, description="HTTP Basic: the user.")
    password: SecretRef | None = Field(default=None, description="HTTP Basic: its password.")
    token: SecretRef | None = Field(default=None, description="Sent as `Authorization: Bearer …`.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password go together")
        if self.token is not None and self.user is not None:
            raise ValueError("give either user and password or token")
        return self


class HttpEndpoint(Strict):
    """How an HTTP API is reached."""

    auth: HttpAuth = Field(default=HttpAuth(), description="How we log in.")
    ca: str | None = Field(
        default=None, description="PEM file of its certificate authority; {state} and {inventory} are expanded."
    )
    timeout: PositiveDuration = Field(default=timedelta(seconds=10), description="One request takes at most this long.")


class System(Strict):
    """What every system has."""

    id: Id = Field(
        description="Its name in rules, incidents and the ledger; targets and systems share one space of ids."
    )
    description: str = Field(default="", description="For people.")
    environment: Id = Field(description="The id under `environments`.")
    owner: Id = Field(description="The id under `owners`; from the environment's defaults where not given.")
    classification: AnyClassification = Field(
        default=Classification.INTERNAL, description="Of its data; confidential and restricted ask for a second person."
    )
    failure_domain: str | None = Field(
        default=None,
        description="Systems and targets of one failure domain are acted on one at a time; its own id by default.",
    )
    depends_on: list[Id] = Field(
        default=[],
        description="Targets and systems that have to be there before it: a drill of the full stack restores them first.",
    )
    maintenance_windows: list[Weekly] = Field(default=[], description="When a rule with `maintenance: inside` may act.")
    legal_hold: bool = Field(default=False, description="Nothing of it is deleted while it is true.")
    labels: dict[str, str] = Field(default={}, description="For people; nothing is derived from them.")


class StoreSystem(System):
    """A system whose data can be backed up: it is, where `backup` says when, and `repository` where to."""

    objectives: Objectives = Field(
        default=Objectives(rpo=timedelta(hours=26)),
        description="What was promised. The loss that is measured is the age of the newest backup: there is no archive of what came after it.",
    )
    repository: Repository | None = Field(default=None, description="Where its backups are; engine native.")
    backup: BackupPolicy | None = Field(
        default=None,
        description="Its policy, as of a target; what concerns PostgreSQL alone (incremental, amcheck, canary rows) has no meaning here.",
    )
    sandbox: Sandbox = Field(default=Sandbox(), description="Where it is restored to be verified.")

    @model_validator(mode="after")
    def _backed(self) -> Self:
        if self.backup is not None and self.repository is None:
            raise ValueError("backup needs repository")
        if self.repository is not None and self.repository.engine != "native":
            raise ValueError("the repository's engine is native here")
        return self

    def stored(self) -> StoreTarget | None:
        """None where it is not backed up."""
        if self.backup is None or self.repository is None:
            return None
        return StoreTarget(self, self.repository, self.backup)


@dataclass(frozen=True)
class StoreTarget:
    """A system that is backed up, with what a target has."""

    system: StoreSystem
    repository: Repository
    backup: BackupPolicy

    @property
    def id(self) -> str:
        return self.system.id

    @property
    def kind(self) -> str:
        return str(getattr(self.system, "kind", ""))

    @property
    def description(self) -> str:
        return self.system.description

    @property
    def environment(self) -> str:
        return self.system.environment

    @property
    def owner(self) -> str:
        return self.system.owner

    @property
    def classification(self) -> Classification:
        return self.system.classification

    @property
    def objectives(self) -> Objectives:
        return self.system.objectives

    @property
    def sandbox(self) -> Sandbox:
        return self.system.sandbox

    @property
    def legal_hold(self) -> bool:
        return self.system.legal_hold


class Manifests(Strict):
    """Manifests in Git that a cluster should hold: rendered YAML or JSON, no templates."""

    git: Id = Field(description="The id of a system of kind git.")
    repository: Id = Field(description="The name of one of its repositories.")
    ref: str = Field(default="HEAD", pattern=r"^[A-Za-z0-9_][^\s]*$", description="A branch, tag or commit.")
    path: str = Field(
        default="",
        pattern=r"^(\w[\w.-]*(/\w[\w.-]*)*)?$",
        description="The folder in it, with all below; the whole repository by default.",
    )
    namespaces: list[str] = Field(
        default=[],
        description="Managed by Git alone: an object in one of these that Git does not have is reported, too; names or patterns.",
    )


class KubernetesSystem(StoreSystem):
    """A Kubernetes cluster."""

    kind: Literal["kubernetes"] = Field(description="What it is.")
    kubeconfig: SecretRef | None = Field(
        default=None, description="A kubeconfig file's content; without it the service account of the pod is used."
    )
    context: str | None = Field(default=None, description="Context of the kubeconfig; its current one by default.")
    namespaces: list[str] = Field(
        default=[],
        description="Playbooks act in these alone, names or patterns such as shop-*; empty: in every namespace."
        " Those of the cluster itself (kube-…, openshift-…) count only where they are named in full.",
    )
    manifests: list[Manifests] = Field(default=[], description="What Git says of it, compared by `ops backup drift`.")
    timeout: PositiveDuration = Field(default=timedelta(seconds=15), description="One request takes at most this long.")


class Sasl(Strict):
    """SASL as librdkafka does it."""

    mechanism: Literal["SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"] = Field(description="Mechanism.")
    user: str = Field(description="The user.")
    password: SecretRef = Field(description="Its password.")


class SchemaRegistry(HttpEndpoint):
    """A registry that speaks Confluent's REST API."""

    url: Url = Field(description="Its address.")


class KafkaSystem(StoreSystem):
    """A Kafka cluster."""

    kind: Literal["kafka"] = Field(description="What it is.")
    bootstrap: Annotated[list[HostPort], Field(min_length=1)] = Field(description="Some of its brokers.")
    tls: bool = Field(default=True, description="Whether connections are encrypted, and the broker's name is checked.")
    ca: str | None = Field(default=None, description="PEM file of its certificate authority.")
    sasl: Sasl | None = Field(default=None, description="How we log in.")
    registry: SchemaRegistry | None = Field(default=None, description="Where the schemas of its messages are.")
    topics: list[str] = Field(
        default=["*"],
        description="Backed up: the topics whose settings and groups are kept, names or patterns such as shop-*.",
    )
    records: list[str] = Field(
        default=[], description="Backed up: of these among them every record is kept, too; names or patterns."
    )
    timeout: PositiveDuration = Field(default=timedelta(seconds=15), description="One request takes at most this long.")


class RedisSystem(StoreSystem):
    """Redis: one server with its replicas, under Sentinel, or a cluster."""

    kind: Literal["redis"] = Field(description="What it is.")
    mode: Literal["single", "sentinel", "cluster"] = Field(default="single", description="Which servers `hosts` names.")
    hosts: Annotated[list[HostPort], Field(min_length=1)] = Field(
        description="single: the server; sentinel: the sentinels; cluster: some of its nodes."
    )
    master: str | None = Field(default=None, description="sentinel: name of the monitored master.")
    user: str | None = Field(default=None, description="ACL user; the default one where not given.")
    password: SecretRef | None = Field(default=None, description="Its password.")
    tls: bool = Field(default=True, description="Whether connections are encrypted.")
    ca: str | None = Field(default=None, description="PEM file of its certificate authority.")
    timeout: PositiveDuration = Field(default=timedelta(seconds=5), description="One command takes at most this long.")

    persistence: Literal["aof", "rdb", "any"] = Field(
        default="any", description="What its servers have to keep their data by; looked at with each verified backup."
    )

    @model_validator(mode="after")
    def _needs(self) -> Self:
        if (self.mode == "sentinel") != (self.master is not None):
            raise ValueError("sentinel needs master, and nothing else has one")
        return self


class SlmRetention(Strict):
    """How long the cluster itself keeps the snapshots of its policy."""

    expire_after: str | None = Field(
        default=None, pattern=r"^[1-9][0-9]*[dhm]$", description="Older ones are deleted, such as 30d."
    )
    min_count: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Kept whatever their age.")
    max_count: Annotated[int, Field(ge=1)] | None = Field(default=None, description="More than these are not kept.")


class SlmPolicy(Strict):
    """A policy of snapshot lifecycle management, as the cluster should have it."""

    id: Id = Field(description="Its id in the cluster.")
    schedule: str = Field(description="When, in Elasticsearch's cron syntax: 0 30 1 * * ?")
    name: str = Field(default="<nightly-{now/d}>", description="Names of its snapshots, with date math.")
    indices: list[str] = Field(default=["*"], description="What it takes: names or patterns.")
    retention: SlmRetention = Field(default=SlmRetention(), description="How long they stay.")


class Snapshots(Strict):
    """Where a cluster's snapshots go, and by which policy it takes its own: as code, compared with what the cluster has."""

    repository: Id = Field(description="Name of the snapshot repository in the cluster; it may not be read-only there.")
    type: str | None = Field(
        default=None, description="fs, s3, gcs, azure, …: as it should be registered; where not given it is only used."
    )
    settings: dict[str, str | int | bool] = Field(
        default={}, description="Its settings, such as bucket and base_path. No credentials: those are in the keystore."
    )
    policy: SlmPolicy | None = Field(default=None, description="The cluster's own policy, if it should have one.")
    mode: AnyMode = Field(
        default=Mode.OBSERVE,
        description="observe says what differs; enforce registers it with the next backup, and removes snapshots of backups that expired.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.settings and self.type is None:
            raise ValueError("settings needs type")
        return self


class ElasticsearchRestore(HttpEndpoint):
    """Where snapshots are restored to be looked at: under other names, in the cluster itself or in a sandbox cluster."""

    urls: list[Url] = Field(
        default=[],
        description="Nodes of a sandbox cluster that has the same repository by the same name, read-only; the cluster itself where not given.",
    )
    indices: list[str] = Field(default=["*"], description="Of these some are restored: names or patterns.")
    sample: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="So many of them each time, by chance; all of them where not given."
    )
    documents: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=100, description="Documents of each index that are compared, by chance."
    )


class ElasticsearchSystem(StoreSystem, HttpEndpoint):
    """An Elasticsearch cluster. `auth.token` is an API key there."""

    kind: Literal["elasticsearch"] = Field(description="What it is.")
    urls: Annotated[list[Url], Field(min_length=1)] = Field(description="Some of its nodes.")
    indices: list[str] = Field(
        default=["*"], description="Backed up: indices and data streams, names or patterns; those of the system never."
    )
    snapshots: Snapshots | None = Field(default=None, description="Where its snapshots go. A backup needs it.")
    restore: ElasticsearchRestore = Field(
        default=ElasticsearchRestore(), description="How a snapshot is restored to be verified."
    )

    @model_validator(mode="after")
    def _snapshotted(self) -> Self:
        if self.backup is not None and self.snapshots is None:
            raise ValueError("backup needs snapshots")
        return self


class VaultRestore(Strict):
    """How a restored copy of a Vault is opened, so that what is in it can be looked at. Nothing of it is kept."""

    shares: list[SecretRef] = Field(
        default=[], description="Key shares that unseal it, as many as its threshold. Not from Vault itself."
    )
    seal: SecretRef | None = Field(
        default=None,
        description="Auto-unseal: a `seal` stanza in JSON, as the server's own configuration has it. Not from Vault itself.",
    )
    auth: VaultAuth | None = Field(
        default=None, description="How we log in to the copy; as to the original by default, whose logins it holds."
    )
    canary: SecretRef | None = Field(
        default=None,
        description="A secret, such as vault://secret/ops/canary#value, that has to read as in the original.",
    )

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        if self.shares and self.seal is not None:
            raise ValueError("give either shares or seal")
        if any(ref.scheme == "vault" for ref in (*self.shares, *([self.seal] if self.seal else ()))):
            raise ValueError("what opens Vault cannot stand in Vault: use file:// or env://")
        if self.canary is not None and self.canary.scheme != "vault":
            raise ValueError("the canary stands in Vault: vault://…")
        return self


class VaultSystem(StoreSystem):
    """A Vault that playbooks act on, and that is backed up (raft storage)."""

    kind: Literal["vault"] = Field(description="What it is.")
    vault: Id = Field(description="The id under `vaults`.")
    restore: VaultRestore = Field(default=VaultRestore(), description="How a restored copy is opened to be verified.")


class GitRepository(Strict):
    """One repository."""

    name: Id = Field(description="Its name in checks and reports.")
    url: str = Field(
        pattern=r"^(https://[^@\s]+|ssh://\S+|file:///\S+)$",
        description="Where it is cloned from; no credentials in it.",
    )
    github: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$",
        description="OWNER/NAME at GitHub, whose branch protection, rulesets and workflow settings are kept too.",
    )


class GitSystem(StoreSystem):
    """Configuration in Git repositories."""

    kind: Literal["git"] = Field(description="What it is.")
    repositories: Annotated[list[GitRepository], Field(min_length=1)] = Field(description="Which ones.")
    token: SecretRef | None = Field(default=None, description="Of GitHub, or whoever serves them over HTTPS.")
    api: Url = Field(default="https://api.github.com", description="Address of GitHub's REST API.")
    ca: str | None = Field(default=None, description="PEM file of the API's certificate authority.")
    timeout: PositiveDuration = Field(default=timedelta(seconds=30), description="One request takes at most this long.")

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [repository.name for repository in self.repositories]
        if len(set(names)) != len(names):
            raise ValueError("two repositories have the same name")
        return self


class PrometheusSystem(System, HttpEndpoint):
    """A Prometheus (or what speaks its HTTP API), asked by rules that verify by metric."""

    kind: Literal["prometheus"] = Field(description="What it is.")
    url: Url = Field(description="Its address, with the path prefix where it has one.")


class Watchdog(Strict):
    """An alert that always fires. Where it does not arrive, alerting itself is broken: that is an incident, and no other alert has ended."""

    match: Annotated[list[AlertMatcher], Field(min_length=1)] = Field(
        default=[AlertMatcher.parse("alertname=Watchdog")], description="Which alert it is."
    )
    absent_for: PositiveDuration = Field(
        default=timedelta(minutes=5), description="An incident when it has not been seen for this long."
    )
    fresh_for: PositiveDuration = Field(
        default=timedelta(minutes=2),
        description="It counts as seen for this long after it was sent, and no longer than half of the time that it was sent to last. "
        "Twice Prometheus's `--rules.alert.resend-delay` is right: later, others may be dropped while it is still listed.",
    )


class AlertmanagerSystem(System, HttpEndpoint):
    """The Alertmanagers of one cluster: their answers are merged, one that answers is enough."""

    kind: Literal["alertmanager"] = Field(description="What it is.")
    urls: Annotated[list[Url], Field(min_length=1)] = Field(description="Every member of the cluster.")
    watchdog: Watchdog | None = Field(
        default=None,
        description="The alert that must always be there. Without one, an alerting that has broken looks like alerts that ended: "
        "incidents end, and what was done for them is taken to have helped.",
    )
    settled_after: PositiveDuration = Field(
        default=timedelta(minutes=5),
        description="A member that was started later may not have heard of every alert yet: "
        "until one has been up for this long nothing has ended. Nor has it until the watchdog, where there is one, has fired for this long.",
    )
    largest_answer: Size = Field(default=64 << 20, description="An answer above this many bytes is refused.")


AnySystem = Annotated[
    KubernetesSystem
    | KafkaSystem
    | RedisSystem
    | ElasticsearchSystem
    | VaultSystem
    | GitSystem
    | PrometheusSystem
    | AlertmanagerSystem,
    Field(discriminator="kind"),
]
