"""Restart a workload, pod by pod."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Plan, Verification
from ops_platform.clients.kubernetes import Kubernetes
from ops_platform.clients.kubernetes_objects import PODS, Json
from ops_platform.errors import ConflictError
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Playbook
from ops_platform.remediation.playbooks.kubernetes.shared import (
    KINDS,
    NOTHING_DONE,
    RESOURCES,
    Named,
    PatchAction,
    Waits,
    detail_of,
    fence,
    is_going,
    is_ready,
    time_to_look,
    title_of,
    waited,
)
from ops_platform.remediation.playbooks.kubernetes.workload import (
    Workload,
    images,
    peers_of,
    read_workload,
    refuse_foreign,
)

RESTARTED = "ops-platform/restarted-for"


class RestartParameters(Named, Waits):
    kind: Literal["Deployment", "StatefulSet", "DaemonSet"] = Field(default="Deployment", description="What it is.")
    allow_downtime: bool = Field(
        default=False, description="Also where all pods go before the new ones come (Recreate)."
    )


class RestartAction(PatchAction[RestartParameters]):
    """A mark in the pods' template: the cluster replaces the pods by its own rules, and they carry the mark."""

    def changes(self) -> Plan:
        given = self.parameters
        fence(self.system, given.namespace)
        found = read_workload(self.cluster, given.kind, given.namespace, given.name)
        resource, metadata = RESOURCES[given.kind], found.body["metadata"]
        facts = {"ready": found.ready, "wanted": found.wanted, "images": images(found.spec["template"])}
        if self._mark(found.body) == self.context.incident_id:
            if found.progress()[0]:
                return self.planned((), facts={**facts, "restarted": "in this incident, and complete"})
        else:
            self._refuse_unless_it_rolls(found)
        change = Change(
            "workload", title_of(resource, found.body), {"restarted": False},
            {"restarted": self.context.incident_id}, False, detail_of(resource, found.body),
        )  # fmt: skip
        return self.planned([change], facts={**facts, "generation": metadata["generation"]})

    def _refuse_unless_it_rolls(self, found: Workload) -> None:
        refuse_foreign(self, found.body)
        if found.spec.get("paused"):
            raise self.refuse("it is paused: a restart would wait until somebody resumes it", "kubectl rollout resume")
        if found.strategy == "OnDelete":
            raise self.refuse("its strategy is OnDelete: pods are replaced only when somebody deletes them")
        if found.strategy == "Recreate" and not self.parameters.allow_downtime:
            raise self.refuse("its strategy is Recreate: a restart takes all pods down at once", "allow_downtime: true")
        if int(((found.spec.get("updateStrategy") or {}).get("rollingUpdate") or {}).get("partition") or 0):
            raise self.refuse(
                "its update is partitioned: a restart would reach only some pods", "finish the staged update"
            )
        if found.wanted == 0:
            raise self.refuse("it wants no pods: there is nothing to restart")
        if found.is_rolling:
            raise self.refuse("a rollout of it is under way", "let it end, or use kubernetes.rollback")

    def _mark(self, found: Json) -> str | None:
        return (found["spec"]["template"].get("metadata", {}).get("annotations") or {}).get(RESTARTED)

    def decide(self, change: Change, found: Json) -> Json | None:
        incident = change.after["restarted"]
        if self._mark(found) == incident:
            return None
        self._still_rolls(Workload(change.detail["kind"], found))
        return {"spec": {"template": {"metadata": {"annotations": {RESTARTED: incident}}}}}

    def _still_rolls(self, found: Workload) -> None:
        if found.is_rolling or found.spec.get("paused"):
            raise ConflictError("somebody else rolls it out or has paused it since the plan was made")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if (within := time_to_look(outcomes, self.parameters.within)) is None:
            return NOTHING_DONE
        given, incident = self.parameters, self.context.incident_id
        with self.other_way() as cluster:
            labels = read_workload(cluster, given.kind, given.namespace, given.name).labels

            def rolled() -> tuple[bool | None, str]:
                return read_workload(cluster, given.kind, given.namespace, given.name).progress()

            resource, fields = RESOURCES[given.kind], f"metadata.name={given.name}"
            rollout = waited(cluster, "rollout", rolled, resource, given.namespace, fields=fields, within=within)
            return Verification((rollout, self._pods(cluster, labels, incident)))

    def _pods(self, cluster: Kubernetes, labels: str, incident: str) -> Check:
        """The pods themselves, whatever the workload counts: each that stays carries the mark and is ready."""
        pods = [pod for pod in cluster.list(PODS, self.parameters.namespace, labels=labels) if not is_going(pod)]
        fresh = [pod for pod in pods if (pod["metadata"].get("annotations") or {}).get(RESTARTED) == incident]
        ready = [pod for pod in fresh if is_ready(pod)]
        return Check(
            "pods", bool(pods) and len(ready) == len(pods), f"{len(ready)} of {len(pods)} pods are new and ready"
        )


class RolloutRestart(Playbook[RestartParameters]):
    name = "kubernetes.rollout_restart"
    title = "Restart a workload, pod by pod"
    kinds = KINDS
    what = (
        "Replaces the pods of a Deployment, StatefulSet or DaemonSet as `kubectl rollout restart` does, once for each incident."
        " It is refused while another rollout is under way, when it is paused, and where all pods would go at once."
    )
    why_safe = "New pods must become ready before more of the old ones go, by the workload's own rules."
    blast_radius = "The pods of one workload; what they hold in memory is lost, long connections are cut."
    rights = (
        "apps/deployments: get, list, watch, patch",
        "apps/statefulsets: get, list, watch, patch",
        "apps/daemonsets: get, list, watch, patch",
        "core/pods: list",
    )
    Parameters = RestartParameters

    def action(self, context: Context[RestartParameters]) -> Action:
        return RestartAction(context, self.name)

    def peers(self, context: Context[RestartParameters]) -> Peers:
        return peers_of(context, context.parameters.kind)
