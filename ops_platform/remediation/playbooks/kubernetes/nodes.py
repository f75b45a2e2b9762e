"""Cordon a node and drain it, as far as disruption budgets allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.kubernetes_errors import DisruptionBudgetError
from ops_platform.clients.kubernetes_objects import NODES, PODS, Json
from ops_platform.errors import ConflictError, NotThereError
from ops_platform.inventory.values import PositiveDuration
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Done, Playbook
from ops_platform.remediation.playbooks.kubernetes.shared import (
    KINDS,
    NOTHING_DONE,
    Name,
    PatchAction,
    Waits,
    cluster_of,
    controller,
    detail_of,
    fence,
    is_going,
    is_true,
    mark,
    marked,
    time_to_look,
    title_of,
    uid,
    waited,
)

CORDONED = "ops-platform/cordoned-for"
_MIRROR = "kubernetes.io/config.mirror"
_PAUSE = 5.0  # seconds between two requests for an eviction that a budget forbids, as kubectl has it


class DrainParameters(Waits):
    node: Name = Field(description="The node.")
    empty_dir: bool = Field(default=False, description="Also pods with an emptyDir, whose content is lost.")
    bare: bool = Field(default=False, description="Also pods that no controller brings back.")
    patience: PositiveDuration = Field(
        default=timedelta(minutes=2), description="How long one pod is waited for that a disruption budget keeps."
    )


class DrainAction(PatchAction[DrainParameters]):
    """First the node takes no more pods, then one pod after the other is asked to go. Nothing is ever deleted."""

    def changes(self) -> Plan:
        given = self.parameters
        node = self.cluster.get(NODES, given.node)
        pods = self.cluster.list(PODS, fields=f"spec.nodeName={given.node}")
        moving, staying = self._sorted(pods)
        changes = [self._cordon(node)] if self._is_ours(node) or not is_cordoned(node) else []
        changes += [
            Change("pod", title_of(PODS, pod), {"node": given.node}, {"node": None}, False, detail_of(PODS, pod))
            for pod in moving
        ]
        if not moving and is_cordoned(node):
            changes = []
        population = {"node": self.cluster.count(NODES), "pod": self.cluster.count(PODS)}
        facts = {
            "pods": len(pods),
            "staying": staying,
            "cordoned_before": is_cordoned(node) and not self._is_ours(node),
        }
        return self.planned(changes, population=population, facts=facts)

    def _is_ours(self, node: Json) -> bool:
        return is_cordoned(node) and marked(node, CORDONED, self.context.incident_id) is not None

    def _cordon(self, node: Json) -> Change:
        return Change(
            "node",
            title_of(NODES, node),
            {"unschedulable": False},
            {"unschedulable": True},
            True,
            detail_of(NODES, node),
        )

    def _sorted(self, pods: Iterable[Json]) -> tuple[list[Json], list[str]]:
        """What is to move, and what stays with its reason. Refuses the whole where something may do neither."""
        moving: list[Json] = []
        staying: list[str] = []
        for pod in sorted(pods, key=lambda pod: (pod["metadata"]["namespace"], pod["metadata"]["name"])):
            owner, title = controller(pod), title_of(PODS, pod)
            if _MIRROR in (pod["metadata"].get("annotations") or {}):
                staying.append(f"{title}: a static pod of the node")
            elif owner and owner["kind"] == "DaemonSet":
                staying.append(f"{title}: of a DaemonSet")
            elif (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
                staying.append(f"{title}: it has ended")
            elif is_going(pod):
                staying.append(f"{title}: it is going already")
            else:
                self._refuse_to_move(pod, owner, title)
                moving.append(pod)
        return moving, staying

    def _refuse_to_move(self, pod: Json, owner: Json | None, title: str) -> None:
        fence(self.system, pod["metadata"]["namespace"])
        if owner is None and not self.parameters.bare:
            raise self.refuse(f"no controller would bring {title} back", "bare: true, if it is to go for good")
        if not self.parameters.empty_dir and any("emptyDir" in volume for volume in pod["spec"].get("volumes") or []):
            raise self.refuse(f"{title} has an emptyDir, whose content would be lost", "empty_dir: true, if it may be")

    # The node

    def decide(self, change: Change, found: Json) -> Json | None:
        wanted = bool(change.after["unschedulable"])
        if is_cordoned(found) == wanted:
            return None
        if not wanted and marked(found, CORDONED, self.context.incident_id) is None:
            raise ConflictError("somebody else has cordoned it since")
        text = mark(self.context.incident_id, change) if wanted else None
        return {"metadata": {"annotations": {CORDONED: text}}, "spec": {"unschedulable": wanted or None}}

    # Pods

    def check(self, change: Change) -> Applied | None:
        return super().check(change) if change.kind == "node" else self._pod_is_to_go(change)

    def apply(self, change: Change) -> Applied:
        return super().apply(change) if change.kind == "node" else self._evict(change)

    def _pod_is_to_go(self, change: Change) -> Applied | None:
        detail = change.detail
        pod = self.cluster.find(PODS, detail["name"], detail["namespace"])
        if pod is None or uid(pod) != detail["uid"]:
            return Applied(Outcome.ALREADY_DONE, "it is not there any more")
        if is_going(pod):
            return Applied(Outcome.ALREADY_DONE, "it is going already")
        if not is_cordoned(self.cluster.get(NODES, self.parameters.node)):
            return Applied(Outcome.CONTENDED, "the node takes pods again: somebody does not want it drained")
        return None

    def _evict(self, change: Change) -> Applied:
        """Ask until the budget allows it or the patience is over; never by force."""
        detail, clock = change.detail, self.context.clock
        deadline = clock.monotonic() + self.parameters.patience.total_seconds()
        while True:
            try:
                self.cluster.evict(detail["name"], detail["namespace"], uid=detail["uid"])
            except DisruptionBudgetError as error:
                if clock.monotonic() + _PAUSE > deadline:
                    budget = f"the disruption budget {error.budget}" if error.budget else "a disruption budget"
                    return Applied(Outcome.CONTENDED, f"{budget} keeps it: {error.what}", {"budget": error.budget})
            except NotThereError:
                return Applied(Outcome.ALREADY_DONE, "it is not there any more")
            except ConflictError as error:
                if clock.monotonic() + _PAUSE > deadline:
                    return Applied(Outcome.CONTENDED, error.what)
            else:
                return Applied(Outcome.APPLIED, "evicted")
            clock.sleep(_PAUSE)
            if (done := self._pod_is_to_go(change)) is not None:
                return done

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if (within := time_to_look(outcomes, self.parameters.within)) is None:
            return NOTHING_DONE
        given = self.parameters
        gone = {
            change.detail["uid"] for change in plan.changes
            if change.kind == "pod" and outcomes[change.object].outcome in (Outcome.APPLIED, Outcome.ALREADY_DONE)
        }  # fmt: skip
        fields = f"spec.nodeName={given.node}"
        with self.other_way() as cluster:
            cordoned = is_cordoned(cluster.get(NODES, given.node))
            said = "it takes no pods" if cordoned else "it takes pods"
            node = Check("node", cordoned != bool(self.back), said)

            def moved() -> tuple[bool | None, str]:
                left = [pod for pod in cluster.list(PODS, fields=fields) if uid(pod) in gone]
                return not left or None, f"{len(gone) - len(left)} of {len(gone)} pods have left"

            if not gone:
                return Verification((node,))
            return Verification((node, waited(cluster, "pods", moved, PODS, None, fields=fields, within=within)))


def is_cordoned(node: Json) -> bool:
    return bool(node["spec"].get("unschedulable"))


class CordonDrain(Playbook[DrainParameters]):
    name = "kubernetes.cordon_drain"
    title = "Cordon a node and drain it"
    kinds = KINDS
    what = (
        "Marks a node as unschedulable and asks for the eviction of its pods, one after the other, so that their disruption budgets"
        " hold. Pods of DaemonSets, static ones and those that have ended stay. It is refused when a pod may not be moved: one that no"
        " controller brings back, one with an emptyDir, one outside of the system's namespaces. What a budget keeps stays, and is named."
    )
    why_safe = "Evictions respect every disruption budget, and nothing is ever deleted by force."
    blast_radius = "All pods of one node; they start again on other nodes, which must have room for them."
    rights = (
        "cluster core/nodes: get, list, patch",
        "cluster core/pods: get, list, watch",
        "cluster core/pods/eviction: create",
    )
    undo_text = (
        "Uncordons the node, unless it was cordoned before or by somebody else. Pods do not come back by themselves."
    )
    Parameters = DrainParameters

    def action(self, context: Context[DrainParameters]) -> Action:
        return DrainAction(context, self.name)

    def undo(self, context: Context[DrainParameters], done: Sequence[Done]) -> Action | None:
        cordons = [each for each in done if each.change.kind == "node"]
        return DrainAction(context, self.name, cordons) if cordons else None

    def peers(self, context: Context[DrainParameters]) -> Peers:
        nodes = cluster_of(context).list(NODES)
        others = [node for node in nodes if node["metadata"]["name"] != context.parameters.node]
        good = sum(is_true(node, "Ready") and not is_cordoned(node) for node in others)
        return Peers(good, len(others), "ready nodes that take pods")

    def min_healthy(self, context: Context[DrainParameters]) -> int:
        return 1
