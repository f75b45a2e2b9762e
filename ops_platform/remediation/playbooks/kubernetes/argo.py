"""Argo Rollouts: abort a progressive delivery, or retry one that was aborted.

Both set `status.abort` through the status subresource, as Argo's own command line does; the controller of Argo Rollouts does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ops_platform.actions import Action, Applied, Change, Plan, Verification
from ops_platform.clients.kubernetes import Kubernetes
from ops_platform.clients.kubernetes_objects import PODS, ROLLOUTS, Json
from ops_platform.errors import ConflictError
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Done, Playbook
from ops_platform.remediation.playbooks.kubernetes.shared import (
    KINDS,
    NOTHING_DONE,
    Named,
    PatchAction,
    Waits,
    cluster_of,
    detail_of,
    fence,
    is_ready,
    time_to_look,
    title_of,
    waited,
)

_HASH = "rollouts-pod-template-hash"


class ArgoParameters(Named, Waits):
    pass


class AbortAction(PatchAction[ArgoParameters]):
    """`abort`: what `status.abort` becomes on the way there; the way back is the opposite."""

    subresource = "status"

    def __init__(self, context: Context[ArgoParameters], name: str, *, abort: bool, back: Sequence[Done] = ()) -> None:
        super().__init__(context, name, back)
        self.abort = abort != bool(back)

    def changes(self) -> Plan:
        given = self.parameters
        fence(self.system, given.namespace)
        found = self.cluster.get(ROLLOUTS, given.name, given.namespace)
        status: Json = found.get("status") or {}
        current, stable = status.get("currentPodHash"), status.get("stableRS")
        facts: Json = {
            "phase": status.get("phase"),
            "current": current,
            "stable": stable,
            "step": status.get("currentStepIndex"),
        }
        if bool(status.get("abort")) == self.abort:
            return self.planned((), facts=facts)
        if not current or not stable:
            raise self.refuse(
                "it has no stable revision to fall back to" if self.abort else "its controller has not seen it yet"
            )
        if current == stable:
            raise self.refuse("no delivery is under way: the newest revision is the stable one")
        if self.abort:
            ready = self._stable_pods(self.cluster, stable)
            facts["stable_ready"] = ready
            if ready == 0:
                raise self.refuse("no pod of the stable revision is ready: aborting would send everything to nothing")
        elif found["spec"].get("paused"):
            raise self.refuse(
                "spec.paused is set: a retry would wait until somebody resumes it", "kubectl argo rollouts resume"
            )
        change = Change(
            "rollout", title_of(ROLLOUTS, found), {"abort": not self.abort}, {"abort": self.abort}, True,
            detail_of(ROLLOUTS, found, current=current, stable=stable),
        )  # fmt: skip
        return self.planned([change], facts=facts)

    def _stable_pods(self, cluster: Kubernetes, stable: str) -> int:
        pods = cluster.list(PODS, self.parameters.namespace, labels=f"{_HASH}={stable}")
        return sum(is_ready(pod) for pod in pods)

    def decide(self, change: Change, found: Json) -> Json | None:
        status: Json = found.get("status") or {}
        if bool(status.get("abort")) == change.after["abort"]:
            return None
        detail = change.detail
        if (status.get("currentPodHash"), status.get("stableRS")) != (detail["current"], detail["stable"]):
            raise ConflictError(
                "another revision is being delivered, or this one became stable, since the plan was made"
            )
        return {"status": {"abort": change.after["abort"]}}

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if (within := time_to_look(outcomes, self.parameters.within)) is None:
            return NOTHING_DONE
        given, change = self.parameters, plan.changes[0]
        with self.other_way() as cluster:

            def settled() -> tuple[bool | None, str]:
                found = self.read(cluster, change)
                return self._settled(found), f"the phase is {(found.get('status') or {}).get('phase')}"

            fields = f"metadata.name={given.name}"
            phase = waited(cluster, "phase", settled, ROLLOUTS, given.namespace, fields=fields, within=within)
            if not self.abort:
                return Verification((phase,))
            wanted = int(self.read(cluster, change)["spec"].get("replicas", 1))

            def served() -> tuple[bool | None, str]:
                ready = self._stable_pods(cluster, change.detail["stable"])
                return ready >= wanted or None, f"{ready} of {wanted} pods of the stable revision are ready"

            labels = f"{_HASH}={change.detail['stable']}"
            pods = waited(cluster, "stable pods", served, PODS, given.namespace, labels=labels, within=within)
            return Verification((phase, pods))

    def _settled(self, found: Json) -> bool | None:
        """Aborted: Argo calls that Degraded. Retried: it progresses again, or is through.

        `abortedAt` is the controller's own: without it a Rollout that was Degraded before would look as if somebody had heard of the abort.
        """
        status: Json = found.get("status") or {}
        if not bool(status.get("abort")) == bool(status.get("abortedAt")) == self.abort:
            return None
        return status.get("phase") in ({"Degraded"} if self.abort else {"Progressing", "Paused", "Healthy"}) or None


def _peers(context: Context[Any]) -> Peers:
    given = context.parameters
    cluster = cluster_of(context)
    found = cluster.get(ROLLOUTS, given.name, given.namespace)
    stable = (found.get("status") or {}).get("stableRS")
    pods = cluster.list(PODS, given.namespace, labels=f"{_HASH}={stable}") if stable else []
    return Peers(
        sum(is_ready(pod) for pod in pods), int(found["spec"].get("replicas", 1)), "ready pods of the stable revision"
    )


_RIGHTS = (
    "argoproj.io/rollouts: get, list, watch",
    "argoproj.io/rollouts/status: patch",
    "core/pods: list, watch",
)


class ArgoAbort(Playbook[ArgoParameters]):
    name = "kubernetes.argo_abort"
    title = "Abort an Argo Rollout"
    kinds = KINDS
    what = (
        "Aborts the delivery that is under way, so that all traffic goes back to the stable revision. It is refused when nothing is"
        " being delivered, and when no pod of the stable revision is ready."
    )
    why_safe = "The stable revision still runs and takes its traffic back; nothing is deleted that a retry would miss."
    blast_radius = "The traffic of one Rollout: users of the new revision get the stable one."
    rights = _RIGHTS
    undo_text = "Retries the delivery from its first step, unless another revision has come since."
    Parameters = ArgoParameters

    def action(self, context: Context[ArgoParameters]) -> Action:
        return AbortAction(context, self.name, abort=True)

    def undo(self, context: Context[ArgoParameters], done: Sequence[Done]) -> Action:
        return AbortAction(context, self.name, abort=True, back=done)

    def peers(self, context: Context[ArgoParameters]) -> Peers:
        return _peers(context)

    def min_healthy(self, context: Context[ArgoParameters]) -> int:
        return 1


class ArgoRetry(Playbook[ArgoParameters]):
    name = "kubernetes.argo_retry"
    title = "Retry an aborted Argo Rollout"
    kinds = KINDS
    what = (
        "Starts the delivery of an aborted Rollout again, from its first step and with all of its analysis. It is refused when it is"
        " paused by hand, and when nothing is left to deliver."
    )
    why_safe = "The delivery goes through its own steps and analysis again, and aborts by itself when these fail."
    blast_radius = "The traffic of one Rollout: a growing share of its users gets the new revision."
    rights = _RIGHTS
    undo_text = "Aborts the delivery again."
    Parameters = ArgoParameters

    def action(self, context: Context[ArgoParameters]) -> Action:
        return AbortAction(context, self.name, abort=False)

    def undo(self, context: Context[ArgoParameters], done: Sequence[Done]) -> Action:
        return AbortAction(context, self.name, abort=False, back=done)

    def peers(self, context: Context[ArgoParameters]) -> Peers:
        return _peers(context)

    def min_healthy(self, context: Context[ArgoParameters]) -> int:
        return 1
