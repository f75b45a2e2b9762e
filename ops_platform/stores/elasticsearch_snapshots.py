"""A cluster's snapshot repository and its policy: as the inventory declares them, as the cluster has them, and the action between the two."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ops_platform.actions import (
    ActionResult,
    Applied,
    Change,
    Check,
    CountLimit,
    Guard,
    LegalHold,
    ModeGuard,
    Outcome,
    PercentLimit,
    Plan,
    Verification,
    run_action,
)
from ops_platform.clients.elasticsearch import Elasticsearch
from ops_platform.clock import Clock
from ops_platform.errors import CouldNotVerifyError, NotThereError, RefusedError
from ops_platform.inventory.base import Mode

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.systems import SlmPolicy, Snapshots, StoreTarget

T = TypeVar("T")
Json = dict[str, Any]
REPOSITORY, POLICY, SNAPSHOT = "repository", "policy", "snapshot"
_MANAGE = "the cluster privileges manage and manage_slm"
_TAKES = "the cluster privilege create_snapshot"
_BY = "ops_platform"
_DEAD_AFTER = timedelta(days=1)
_LOOK, _LOOK_AT_MOST = 0.1, 5.0  # seconds


def awaited(look: Callable[[], T | None], what: str, cluster: Elasticsearch, *, clock: Clock, seconds: float) -> T:
    """What `look` finds once it finds something, asked with growing pauses. Raises CouldNotVerifyError after `seconds`."""
    deadline, pause = clock.monotonic() + seconds, _LOOK
    while (found := look()) is None:
        if clock.monotonic() > deadline:
            raise CouldNotVerifyError(f"{what} did not come to an end", where=cluster.where)
        clock.sleep(pause)
        pause = min(pause * 1.5, _LOOK_AT_MOST)
    return found


@dataclass(frozen=True)
class Repository:
    """A snapshot repository of a cluster."""

    cluster: Elasticsearch
    name: str

    def registered(self) -> Json | None:
        """Its type and settings; None where the cluster has none of that name."""
        try:
            return self.cluster.ask(_TAKES, "GET", f"/_snapshot/{self.name}")[self.name]
        except NotThereError:
            return None

    def policy(self, policy: SlmPolicy) -> Json | None:
        try:
            return self.cluster.ask(_MANAGE, "GET", f"/_slm/policy/{policy.id}")[policy.id]["policy"]
        except NotThereError:
            return None

    def differs(self, wanted: Snapshots) -> list[str]:
        """What is not as it is declared: the thing, and which of its settings."""
        out: list[str] = []
        if wanted.type is not None:
            out += _differences(f"repository {self.name}", wanted_repository(wanted), self.registered())
        if wanted.policy is not None:
            out += _differences(
                f"policy {wanted.policy.id}", wanted_policy(wanted, wanted.policy), self.policy(wanted.policy)
            )
        return out

    def all(self) -> list[Json]:
        return self.cluster.ask(_TAKES, "GET", f"/_snapshot/{self.name}/_all")["snapshots"]

    def snapshot(self, name: str) -> Json:
        """Raises NotThereError."""
        return self.cluster.ask(_TAKES, "GET", f"/_snapshot/{self.name}/{name}")["snapshots"][0]

    def begin(self, name: str, indices: Sequence[str], target_id: str) -> None:
        body = {
            "indices": list(indices), "expand_wildcards": "all", "ignore_unavailable": False, "partial": False,
            "include_global_state": True, "metadata": {"taken_by": _BY, "target": target_id},
        }  # fmt: skip
        self.cluster.ask(_TAKES, "PUT", f"/_snapshot/{self.name}/{name}", {"wait_for_completion": "false"}, body)

    def finished(self, name: str, clock: Clock, seconds: float) -> Json:
        """Once it is not in progress any more. Raises CouldNotVerifyError after `seconds`."""

        def ended() -> Json | None:
            found = self.snapshot(name)
            return None if found["state"] in ("IN_PROGRESS", "STARTED") else found

        return awaited(ended, f"the snapshot {name}", self.cluster, clock=clock, seconds=seconds)

    def delete(self, name: str) -> bool:
        """Whether it was there."""
        try:
            self.cluster.ask(_MANAGE, "DELETE", f"/_snapshot/{self.name}/{name}")
        except NotThereError:
            return False
        return True


def wanted_repository(wanted: Snapshots) -> Json:
    """As the API says it: every setting is text."""
    return {"type": wanted.type, "settings": {key: _text(value) for key, value in wanted.settings.items()}}


def wanted_policy(wanted: Snapshots, policy: SlmPolicy) -> Json:
    retention = {key: value for key, value in policy.retention.model_dump().items() if value is not None}
    out: Json = {
        "name": policy.name, "schedule": policy.schedule, "repository": wanted.repository,
        "config": {"indices": policy.indices, "partial": False},
    }  # fmt: skip
    return out | ({"retention": retention} if retention else {})


def _text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _differences(what: str, wanted: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[str]:
    """What is declared counts; what the cluster has beside it does not."""
    if found is None:
        return [f"{what} is not there"]
    out: list[str] = []
    for key, value in wanted.items():
        here = found.get(key)
        if isinstance(value, dict) and isinstance(here, dict):
            out += _differences(f"{what} {key}", value, here)  # pyright: ignore[reportUnknownArgumentType] - JSON
        elif value != here and not (value is False and here is None):
            out.append(f"{what}: {key} is {json.dumps(here)}, not {json.dumps(value)}")
    return out


def policy_failure(snapshots: Iterable[Json], policy_id: str) -> str | None:
    """What is wrong with the newest snapshot that the cluster took by that policy; None where it is whole."""
    its = [one for one in snapshots if (one.get("metadata") or {}).get("policy") == policy_id]
    done = [one for one in its if one["state"] != "IN_PROGRESS"]
    if not done:
        return f"the policy {policy_id} has taken no snapshot yet"
    newest = max(done, key=lambda one: one["start_time_in_millis"])
    return None if newest["state"] == "SUCCESS" else f"{newest['snapshot']} is {newest['state']}"


# The action


def agree(access: Access, target: StoreTarget, wanted: Snapshots, cluster: Elasticsearch) -> list[str]:
    """Make repository and policy what the inventory declares, where it says so; what still differs.

    Raises RefusedError where a guard refuses, NotThereError where there is no repository to take a snapshot into.
    """
    repository = Repository(cluster, wanted.repository)
    action = SnapshotsAction(access, target, wanted, repository)
    result = _run(access, target, action, ModeGuard(wanted.mode, "snapshots.mode"), actor="ops backup run")
    if wanted.mode is Mode.ENFORCE and not result.ok:
        why = "; ".join(ruling.reason for ruling in result.refusals) or result.status.value
        raise RefusedError(f"repository and policy were not made what is declared: {why}", where=target.id)
    if repository.registered() is None:
        raise NotThereError(
            f"there is no snapshot repository {wanted.repository}", where=cluster.where,
            remedy="register it, or declare its type and settings with snapshots.mode: enforce",
        )  # fmt: skip
    return repository.differs(wanted)


def expire_snapshots(
    access: Access, target: StoreTarget, wanted: Snapshots, cluster: Elasticsearch, *, enforce: bool, actor: str
) -> ActionResult:
    """Remove snapshots of ours that no backup names any more, where `snapshots.mode` says enforce, too."""
    mode = wanted.mode if enforce else Mode.OBSERVE
    action = SnapshotsAction(access, target, wanted, Repository(cluster, wanted.repository), expiry_alone=True)
    return _run(access, target, action, ModeGuard(mode, "snapshots.mode" if enforce else "the expiry"), actor=actor)


def _run(access: Access, target: StoreTarget, action: SnapshotsAction, mode: ModeGuard, *, actor: str) -> ActionResult:
    from ops_platform.ledger import Ledger

    guards: list[Guard] = [
        mode,
        LegalHold(target.legal_hold),
        CountLimit(target.backup.expiry.max_count, SNAPSHOT),
        PercentLimit(target.backup.expiry.max_percent, SNAPSHOT),
    ]
    with contextlib.ExitStack() as stack:
        ledger = None
        if access.inventory.platform.database is not None:
            ledger = stack.enter_context(Ledger(access.platform_db, clock=access.clock))
        return run_action(action, ledger=ledger, guards=guards, actor=actor, clock=access.clock)


class SnapshotsAction:
    """`actions.Action`: registers repository and policy, and removes snapshots of ours that no backup names any more; or the latter alone."""

    name = "elasticsearch.snapshots"

    def __init__(
        self,
        access: Access,
        target: StoreTarget,
        wanted: Snapshots,
        repository: Repository,
        *,
        expiry_alone: bool = False,
    ) -> None:
        self._access, self._target, self._wanted, self._repository = access, target, wanted, repository
        self._alone = expiry_alone

    @property
    def target_id(self) -> str:
        return self._target.id

    def plan(self) -> Plan:
        wanted, changes = self._wanted, list[Change]()
        registered = self._repository.registered()
        if wanted.type is not None and not self._alone:
            body = wanted_repository(wanted)
            if _differences("", body, registered):
                changes.append(Change(REPOSITORY, wanted.repository, registered, body, reversible=True))
        if wanted.policy is not None and not self._alone:
            body, found = wanted_policy(wanted, wanted.policy), self._repository.policy(wanted.policy)
            if _differences("", body, found):
                changes.append(Change(POLICY, wanted.policy.id, found, body, reversible=True))
        ours = self._ours() if registered else []
        changes += [Change(SNAPSHOT, name, name, None, reversible=False) for name in self._unnamed(ours)]
        return Plan(
            self.name, self.target_id, tuple(changes), self._access.clock.now(), population={SNAPSHOT: len(ours)}
        )

    def _ours(self) -> list[Json]:
        mine = {"taken_by": _BY, "target": self.target_id}
        return [one for one in self._repository.all() if (one.get("metadata") or {}) == mine]

    def _unnamed(self, ours: Sequence[Json]) -> list[str]:
        """Those of expired backups and of dumps that died: no backup names them, and they are no news."""
        before = (self._access.clock.now() - _DEAD_AFTER).timestamp() * 1000
        old = [one["snapshot"] for one in ours if one["start_time_in_millis"] < before]
        if not old:
            return []
        named = self._named()
        return sorted(name for name in old if name not in named)

    def _named(self) -> set[str]:
        """By every finished backup. Raises where one of them cannot be read: then nobody knows what it names."""
        from ops_platform.backup.opening import open_target_repository

        catalog = open_target_repository(self._access, self._target)
        manifests = (catalog.store_manifest(backup_id) for backup_id in catalog.finished())
        return {str(json.loads(catalog.read_part(manifest.facts))["snapshot"]) for manifest in manifests}

    def check(self, change: Change) -> Applied | None:
        if change.kind == SNAPSHOT and change.object in self._named():
            return Applied(Outcome.CONTENDED, "a backup names it")
        return None

    def apply(self, change: Change) -> Applied:
        cluster = self._repository.cluster
        if change.kind == SNAPSHOT:
            there = self._repository.delete(change.object)
            return Applied(Outcome.APPLIED if there else Outcome.ALREADY_DONE, "deleted" if there else "it is gone")
        path = "/_snapshot/" if change.kind == REPOSITORY else "/_slm/policy/"
        cluster.ask(_MANAGE, "PUT", path + change.object, None, change.after)
        return Applied(Outcome.APPLIED, "put as declared")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        differs = [] if self._alone else self._repository.differs(self._wanted)
        removed = {
            change.object for change in plan.of_kind(SNAPSHOT) if outcomes[change.object].outcome is Outcome.APPLIED
        }
        left = sorted(removed & {one["snapshot"] for one in self._ours()})
        checks = list[Check]()
        if not self._alone:
            checks.append(
                Check("as declared", not differs, "; ".join(differs) or "repository and policy are as declared")
            )
        if removed:
            checks.append(Check("gone", not left, f"left: {', '.join(left)}" if left else f"{len(removed)} snapshots"))
        if any(change.kind == REPOSITORY for change in plan.changes):
            nodes = self._repository.cluster.ask(_MANAGE, "POST", f"/_snapshot/{self._repository.name}/_verify")[
                "nodes"
            ]
            checks.append(Check("written to", bool(nodes), f"{len(nodes)} nodes write to the repository"))
        return Verification(tuple(checks))
