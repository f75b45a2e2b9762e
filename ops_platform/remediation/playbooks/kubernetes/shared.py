"""What the playbooks of Kubernetes share: the fence of namespaces, marks at objects, actions that patch, readiness of pods.

A mark is an annotation that names the incident and what was changed. By it a run that was killed finds what it did, and nothing that
depends on the state before (`10 % more`) is done twice in one incident.
"""

from __future__ import annotations

import contextlib
import json
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field

from ops_platform.actions import Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.kubernetes import Kubernetes
from ops_platform.clients.kubernetes_objects import (
    AUTOSCALERS,
    CERTIFICATES,
    CLAIMS,
    DAEMON_SETS,
    DEPLOYMENTS,
    NODES,
    PODS,
    ROLLOUTS,
    SECRETS,
    STATEFUL_SETS,
    Json,
    Resource,
)
from ops_platform.errors import ConflictError, NotThereError, OpsError, RefusedError, UsageError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.systems import KubernetesSystem
from ops_platform.inventory.values import PositiveDuration
from ops_platform.ledger import canonical
from ops_platform.remediation.playbook import Context, Done

KINDS = frozenset({"kubernetes"})
RESOURCES: Mapping[str, Resource] = {
    resource.kind: resource
    for resource in (
        AUTOSCALERS, CERTIFICATES, CLAIMS, DAEMON_SETS, DEPLOYMENTS, NODES, PODS, ROLLOUTS, SECRETS, STATEFUL_SETS,
    )
}  # fmt: skip

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
Namespace = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


class Named(Strict):
    """One object in a namespace."""

    namespace: Namespace = Field(description="Its namespace; within the fence of the system.")
    name: Name = Field(description="Its name.")


class Waits(Strict):
    """How long the look afterwards waits."""

    within: PositiveDuration = Field(
        default=timedelta(minutes=5), description="The cluster must have done it by then; until then it is waited for."
    )


P = TypeVar("P", bound=Strict)


# The fence


def is_protected(namespace: str) -> bool:
    """Namespaces that the cluster itself lives in."""
    return namespace.startswith(("kube-", "openshift-"))


def is_inside(system: KubernetesSystem, namespace: str) -> bool:
    """Whether playbooks may act there. What the cluster lives in counts only where it is named in full."""
    if is_protected(namespace):
        return namespace in system.namespaces
    return not system.namespaces or any(fnmatchcase(namespace, pattern) for pattern in system.namespaces)


def fence(system: KubernetesSystem, namespace: str) -> None:
    """Raises RefusedError."""
    if not is_inside(system, namespace):
        why = "the cluster itself lives there" if is_protected(namespace) else "it is not among the system's namespaces"
        raise RefusedError(
            f"nothing is changed in the namespace {namespace}: {why}",
            where=system.id,
            remedy=f"name {namespace} under `namespaces` of the system {system.id}, if that is meant",
        )


# Reading objects


def uid(found: Json) -> str:
    return str(found["metadata"]["uid"])


def labels_of(selector: Mapping[str, Any]) -> str:
    """A label selector as the API's query has it."""
    words = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for each in selector.get("matchExpressions") or []:
        key, values = each["key"], ",".join(each.get("values") or [])
        match each["operator"]:
            case "In":
                words.append(f"{key} in ({values})")
            case "NotIn":
                words.append(f"{key} notin ({values})")
            case "Exists":
                words.append(key)
            case "DoesNotExist":
                words.append(f"!{key}")
            case unknown:
                raise OpsError(f"a selector has the operator {unknown!r}, which is not known")
    if not words:
        raise RefusedError("the selector is empty: it would stand for every pod of the namespace")
    return ",".join(words)


def condition(found: Json, kind: str) -> Json | None:
    conditions: list[Json] = found.get("status", {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == kind), None)


def is_true(found: Json, kind: str) -> bool:
    return (condition(found, kind) or {}).get("status") == "True"


def controller(found: Json) -> Json | None:
    """The owner that keeps it alive, if any."""
    owners: list[Json] = found["metadata"].get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), None)


def is_going(found: Json) -> bool:
    return "deletionTimestamp" in found["metadata"]


def is_ready(pod: Json) -> bool:
    return is_true(pod, "Ready") and not is_going(pod)


def moment(text: str) -> datetime:
    """A time as the API writes it."""
    return datetime.fromisoformat(text)


def quantity(text: Any) -> float:
    """A quantity such as 500m, 2Gi or 3 in its unit. Raises RefusedError for what is none."""
    from kubernetes.utils.quantity import parse_quantity

    try:
        return float(parse_quantity(text))
    except ValueError:
        raise RefusedError(f"the cluster says {text!r}, which is no quantity") from None


# Marks


def mark(incident_id: str, change: Change) -> str:
    return canonical({"incident": incident_id, "before": change.before, "after": change.after})


def marked(found: Json, key: str, incident_id: str) -> Json | None:
    """The mark of this very incident: `before` and `after` of its change."""
    text = (found["metadata"].get("annotations") or {}).get(key)
    try:
        said = json.loads(text) if text else None
    except ValueError:
        return None
    return said if isinstance(said, dict) and said.get("incident") == incident_id else None


# Actions


def system_of(context: Context[Any]) -> KubernetesSystem:
    if not isinstance(context.subject, KubernetesSystem):
        raise UsageError(f"{context.subject.id} is no Kubernetes cluster", remedy="correct the rule's target")
    return context.subject


def cluster_of(context: Context[Any]) -> Kubernetes:
    return context.access.kubernetes(system_of(context))


class ClusterAction(Generic[P]):
    """What is planned and looked at in one cluster. It is opened at the first look: making an action asks nobody for anything."""

    def __init__(self, context: Context[P], name: str) -> None:
        self.context = context
        self.name = name
        self.parameters = context.parameters

    @cached_property
    def system(self) -> KubernetesSystem:
        return system_of(self.context)

    @cached_property
    def cluster(self) -> Kubernetes:
        return cluster_of(self.context)

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    @contextlib.contextmanager
    def other_way(self) -> Generator[Kubernetes]:
        """A connection and a login of its own, for the look afterwards."""
        with contextlib.closing(self.cluster.again()) as cluster:
            yield cluster

    def planned(
        self,
        changes: Iterable[Change],
        *,
        population: Mapping[str, int] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Plan:
        now = self.context.clock.now()
        return Plan(self.name, self.target_id, tuple(changes), now, dict(population or {}), dict(facts or {}))

    def refuse(self, what: str, remedy: str | None = None) -> RefusedError:
        return RefusedError(what, where=self.system.id, remedy=remedy)


class PatchAction(ClusterAction[P]):
    """Changes objects by patches. `decide` is all that a playbook has to say; it serves the check, the write and every retry.

    `back` holds what was applied, where the action is the way back. A change's `detail` names the object: kind, name, uid, and
    namespace unless it has none.
    """

    def __init__(self, context: Context[P], name: str, back: Sequence[Done] = ()) -> None:
        super().__init__(context, f"{name}.undo" if back else name)
        self.back = tuple(back)

    @abstractmethod
    def changes(self) -> Plan:
        """The plan of the way there."""

    @abstractmethod
    def decide(self, change: Change, found: Json) -> Json | list[Json] | None:
        """The patch that makes `change` of what was just read; None where it is done. Raises ConflictError where it is not wanted."""

    subresource: str | None = None

    def plan(self) -> Plan:
        return self.planned(map(reversed_change, self.back)) if self.back else self.changes()

    def check(self, change: Change) -> Applied | None:
        try:
            found = self.read(self.cluster, change)
            if self._decide(change, found) is None:
                return Applied(Outcome.ALREADY_DONE, "it is so already")
        except NotThereError as error:
            return Applied(Outcome.MISSING, error.what)
        except ConflictError as error:
            return Applied(Outcome.CONTENDED, error.what)
        return None

    def apply(self, change: Change) -> Applied:
        resource, detail = RESOURCES[change.detail["kind"]], change.detail
        try:
            written = self.cluster.change(
                resource,
                detail["name"],
                lambda found: self._decide(change, found),
                detail.get("namespace"),
                self.subresource,
            )
        except NotThereError as error:
            return Applied(Outcome.MISSING, error.what)
        except ConflictError as error:
            return Applied(Outcome.CONTENDED, error.what)
        return Applied(Outcome.APPLIED, "changed") if written else Applied(Outcome.ALREADY_DONE, "it is so already")

    def read(self, cluster: Kubernetes, change: Change) -> Json:
        detail = change.detail
        return cluster.get(RESOURCES[detail["kind"]], detail["name"], detail.get("namespace"))

    def _decide(self, change: Change, found: Json) -> Json | list[Json] | None:
        if uid(found) != change.detail["uid"]:
            raise ConflictError("it is another object of the same name now")
        if is_going(found):
            raise ConflictError("it is being deleted")
        return self.decide(change, found)


def detail_of(resource: Resource, found: Json, **more: Any) -> Json:
    """What identifies the object, for `Change.detail`."""
    metadata = found["metadata"]
    where = {"namespace": metadata["namespace"]} if resource.namespaced else {}
    return {"kind": resource.kind, **where, "name": metadata["name"], "uid": metadata["uid"], **more}


def title_of(resource: Resource, found: Json) -> str:
    """What a person reads, for `Change.object`: Deployment shop/web."""
    metadata = found["metadata"]
    return (
        f"{resource.kind} {metadata['namespace']}/{metadata['name']}"
        if resource.namespaced
        else f"{resource.kind} {metadata['name']}"
    )


def reversed_change(done: Done) -> Change:
    change = done.change
    return Change(change.kind, change.object, change.after, change.before, True, change.detail)


def waited(
    cluster: Kubernetes,
    name: str,
    look: Callable[[], tuple[bool | None, str]],
    resource: Resource,
    namespace: str | None,
    *,
    labels: str | None = None,
    fields: str | None = None,
    within: timedelta,
) -> Check:
    """Look until it holds, or until there is no hope. `look` gives None for `not yet`, which at the end of the time is a no."""
    last: list[tuple[bool | None, str]] = []

    def seen() -> bool:
        last[:] = [look()]
        return last[0][0] is not None

    cluster.wait(seen, resource, namespace, labels=labels, fields=fields, seconds=within.total_seconds())
    holds, said = last[0]
    return Check(name, holds is True, said if holds is not None or not within else f"{said}, after {within}")


def time_to_look(outcomes: Mapping[str, Applied], within: timedelta) -> timedelta | None:
    """How long to wait for what was written, or found done; None where there is nothing of ours to look at.

    What failed may have been written all the same: that is looked at, but not waited for.
    """
    found = {applied.outcome for applied in outcomes.values()}
    if Outcome.FAILED in found:
        return timedelta(0)
    return within if found & {Outcome.APPLIED, Outcome.ALREADY_DONE} else None


NOTHING_DONE = Verification((Check("changes", True, "nothing was changed"),))
