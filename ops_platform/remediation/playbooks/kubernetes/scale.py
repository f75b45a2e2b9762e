"""Scale a Deployment or StatefulSet, within bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from ops_platform.actions import Action, Applied, Change, Plan, Verification
from ops_platform.clients.kubernetes_errors import QuotaError
from ops_platform.clients.kubernetes_objects import AUTOSCALERS, PODS, QUOTAS, Json
from ops_platform.errors import ConflictError
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Done, Playbook
from ops_platform.remediation.playbooks.kubernetes.shared import (
    KINDS,
    NOTHING_DONE,
    RESOURCES,
    Named,
    PatchAction,
    Waits,
    condition,
    detail_of,
    fence,
    is_going,
    is_ready,
    mark,
    marked,
    quantity,
    time_to_look,
    title_of,
    waited,
)
from ops_platform.remediation.playbooks.kubernetes.workload import (
    Workload,
    peers_of,
    read_workload,
    refuse_foreign,
)

SCALED = "ops-platform/scaled-for"


class ScaleParameters(Named, Waits):
    kind: Literal["Deployment", "StatefulSet"] = Field(default="Deployment", description="What it is.")
    replicas: int | None = Field(default=None, ge=0, description="To this number …")
    by: int | None = Field(default=None, description="… or by this many, down where it is negative.")
    at_least: int = Field(default=1, ge=0, description="Never below this number.")
    at_most: int = Field(ge=1, description="Never above this number.")
    through_autoscaler: bool = Field(
        default=False, description="Where an autoscaler owns it, change the autoscaler's minimum, within its maximum."
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.replicas is None) == (self.by is None):
            raise ValueError("give either replicas or by")
        if self.at_least > self.at_most:
            raise ValueError("at_least is above at_most")
        return self


class ScaleAction(PatchAction[ScaleParameters]):
    def changes(self) -> Plan:
        given = self.parameters
        fence(self.system, given.namespace)
        found = read_workload(self.cluster, given.kind, given.namespace, given.name)
        scaler = self._autoscaler()
        resource, body = (AUTOSCALERS, scaler) if scaler else (RESOURCES[given.kind], found.body)
        facts: Json = {"wanted": found.wanted, "ready": found.ready}
        if said := marked(body, SCALED, self.context.incident_id):
            before, after = said["before"], said["after"]
            if found.progress()[0] and _replicas(resource.kind, body) == after["replicas"]:
                return self.planned((), facts={**facts, "scaled": "in this incident, and complete"})
        else:
            refuse_foreign(self, found.body)
            before = {"replicas": _replicas(resource.kind, body)}
            after = {"replicas": self._wanted(before["replicas"], scaler)}
            facts["quotas"] = self._room(found, after["replicas"] - found.wanted)
        if before == after:
            return self.planned((), facts=facts)
        change = Change("workload", title_of(resource, body), before, after, True, detail_of(resource, body))
        return self.planned([change], facts=facts)

    def _wanted(self, now: int, scaler: Json | None) -> int:
        given = self.parameters
        wanted = given.replicas if given.replicas is not None else now + (given.by or 0)
        most = min(given.at_most, int(scaler["spec"]["maxReplicas"])) if scaler else given.at_most
        least = max(given.at_least, 1) if scaler else given.at_least
        if not least <= wanted <= most:
            raise self.refuse(f"{wanted} replicas are asked for, and {least} to {most} are allowed")
        return wanted

    def _autoscaler(self) -> Json | None:
        given = self.parameters
        for scaler in self.cluster.list(AUTOSCALERS, given.namespace):
            of = scaler["spec"]["scaleTargetRef"]
            if (of["kind"], of["name"]) != (given.kind, given.name):
                continue
            if not given.through_autoscaler:
                spec = scaler["spec"]
                raise self.refuse(
                    f"the autoscaler {scaler['metadata']['name']} owns its number of replicas"
                    f" ({spec.get('minReplicas', 1)} to {spec['maxReplicas']}) and would undo the change",
                    "through_autoscaler: true changes the autoscaler's minimum",
                )
            return scaler
        if given.through_autoscaler:
            raise self.refuse("no autoscaler scales it", "leave through_autoscaler out")
        return None

    def _room(self, found: Workload, more: int) -> Json:
        """What each quota of the namespace has left after `more` pods. Raises QuotaError where that is too little."""
        given = self.parameters
        quotas = self.cluster.list(QUOTAS, given.namespace) if more > 0 else []
        if not quotas:
            return {}
        # A living pod has what the namespace's LimitRange put in; the template has not.
        living = [pod for pod in self.cluster.list(PODS, given.namespace, labels=found.labels) if not is_going(pod)]
        spec: Json = living[0]["spec"] if living else found.spec["template"]["spec"]
        left: Json = {}
        for quota in quotas:
            name, status = quota["metadata"]["name"], quota.get("status") or {}
            for key, hard in (status.get("hard") or quota["spec"].get("hard") or {}).items():
                each = pod_takes(spec, key)
                if each is None:
                    continue
                room = quantity(hard) - quantity((status.get("used") or {}).get(key, 0)) - more * each
                if room < 0:
                    raise QuotaError(
                        f"the quota {name} allows {hard} {key}, and {more} pods more would exceed it",
                        where=f"{self.system.id} namespace {given.namespace}",
                        remedy="raise the quota, or scale by less",
                    )
                left[f"{name} {key}"] = room
        return left

    def decide(self, change: Change, found: Json) -> Json | None:
        kind = change.detail["kind"]
        now = _replicas(kind, found)
        if now == change.after["replicas"]:
            return None
        if now != change.before["replicas"]:
            raise ConflictError(f"somebody else scaled it to {now} since the plan was made")
        field = "minReplicas" if kind == "HorizontalPodAutoscaler" else "replicas"
        text = None if self.back else mark(self.context.incident_id, change)
        return {"metadata": {"annotations": {SCALED: text}}, "spec": {field: change.after["replicas"]}}

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if (within := time_to_look(outcomes, self.parameters.within)) is None:
            return NOTHING_DONE
        given, change = self.parameters, plan.changes[0]
        wanted = int(change.after["replicas"])
        through = change.detail["kind"] == "HorizontalPodAutoscaler"
        with self.other_way() as cluster:
            labels = read_workload(cluster, given.kind, given.namespace, given.name).labels

            def counted() -> tuple[bool | None, str]:
                found = read_workload(cluster, given.kind, given.namespace, given.name)
                if found.wanted != wanted and not through:
                    return False, f"{found.wanted} are wanted, not {wanted}: somebody else scaled it"
                failure = condition(found.body, "ReplicaFailure") or {}
                if failure.get("status") == "True":
                    return False, f"pods cannot be made: {failure.get('message', '')}"
                pods = [pod for pod in cluster.list(PODS, given.namespace, labels=labels) if is_ready(pod)]
                good = len(pods) >= wanted if through else len(pods) == wanted
                return good or None, f"{len(pods)} pods are ready, {wanted} are wanted"

            return Verification(
                (waited(cluster, "pods", counted, PODS, given.namespace, labels=labels, within=within),)
            )


def _replicas(kind: str, found: Json) -> int:
    field = "minReplicas" if kind == "HorizontalPodAutoscaler" else "replicas"
    return int(found["spec"].get(field, 1))


def pod_takes(spec: Json, key: str) -> float | None:
    """How much of a quota's resource one such pod takes; None where the quota does not count pods by it.

    Raises QuotaError where a container does not say: then such a pod may be refused.
    """
    if key in ("pods", "count/pods"):
        return 1.0
    if key in ("cpu", "memory", "ephemeral-storage"):
        side, what = "requests", key
    else:
        side, _, what = key.partition(".")
    if side not in ("requests", "limits") or what == "storage":
        return None
    total = 0.0
    for container in spec["containers"]:
        given = ((container.get("resources") or {}).get(side) or {}).get(what)
        if given is None and what in ("cpu", "memory"):
            raise QuotaError(
                f"a quota limits {key}, and the container {container['name']} does not say how much it takes",
                remedy=f"give it resources.{side}.{what}, or the namespace a LimitRange",
            )
        total += quantity(given or 0)
    return total


class Scale(Playbook[ScaleParameters]):
    name = "kubernetes.scale"
    title = "Scale a Deployment or StatefulSet"
    kinds = KINDS
    what = (
        "Sets the number of replicas, within bounds, once for each incident. It is refused when an autoscaler owns the number (its"
        " minimum can be changed instead, within its maximum), and when a quota has no room for the pods that come."
    )
    why_safe = (
        "The number stays within the bounds of the rule, the autoscaler and the quotas, and the one before is kept."
    )
    blast_radius = "The pods of one workload; more pods take room from others on the nodes, fewer carry more load each."
    rights = (
        "apps/deployments: get, patch",
        "apps/statefulsets: get, patch",
        "autoscaling/horizontalpodautoscalers: get, list, patch",
        "core/resourcequotas: list",
        "core/pods: list, watch",
    )
    undo_text = "Sets the number from before, unless somebody has changed it since."
    Parameters = ScaleParameters

    def action(self, context: Context[ScaleParameters]) -> Action:
        return ScaleAction(context, self.name)

    def undo(self, context: Context[ScaleParameters], done: Sequence[Done]) -> Action:
        return ScaleAction(context, self.name, done)

    def peers(self, context: Context[ScaleParameters]) -> Peers:
        return peers_of(context, context.parameters.kind)
