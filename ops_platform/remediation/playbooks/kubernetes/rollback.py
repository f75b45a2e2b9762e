"""Roll a Deployment back to its last healthy revision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Plan, Verification
from ops_platform.clients.kubernetes import Kubernetes
from ops_platform.clients.kubernetes_objects import DEPLOYMENTS, PODS, REPLICA_SETS, Json
from ops_platform.errors import ConflictError
from ops_platform.inventory.values import PositiveDuration
from ops_platform.ledger import canonical
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Done, Playbook
from ops_platform.remediation.playbooks.kubernetes.shared import (
    KINDS,
    NOTHING_DONE,
    Named,
    PatchAction,
    Waits,
    controller,
    detail_of,
    fence,
    is_going,
    is_ready,
    labels_of,
    mark,
    marked,
    moment,
    time_to_look,
    title_of,
    waited,
)
from ops_platform.remediation.playbooks.kubernetes.workload import (
    Workload,
    images,
    peers_of,
    refuse_foreign,
)

ROLLED_BACK = "ops-platform/rolled-back-for"
_ROLLED_BACK_AT = "/metadata/annotations/" + ROLLED_BACK.replace(
    "/", "~1"
)  # a Deployment always has annotations: its revision
_REVISION, _HISTORY = "deployment.kubernetes.io/revision", "deployment.kubernetes.io/revision-history"
_HASH = "pod-template-hash"


class RollbackParameters(Named, Waits):
    stood_for: PositiveDuration = Field(
        default=timedelta(hours=1),
        description="A revision without ready pods counts as healthy when it was the current one for this long.",
    )
    only_ready: bool = Field(default=False, description="Only to a revision that has ready pods now.")
    even_when_ready: bool = Field(default=False, description="Also when every pod of the current revision is ready.")


@dataclass(frozen=True)
class Revision:
    number: int
    body: Json

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def template(self) -> Json:
        return bare_template(self.body["spec"]["template"])

    def healthy_because(self, later: Revision, stood_for: timedelta, *, only_ready: bool) -> str | None:
        """The evidence that it worked; None where there is none. `later` is the revision that came next."""
        if ready := int((self.body.get("status") or {}).get("readyReplicas") or 0):
            return f"{ready} of its pods are ready now"
        reused = any(_HISTORY in (each.body["metadata"].get("annotations") or {}) for each in (self, later))
        if only_ready or reused:
            return None  # one that was the current one several times does not say when
        stood = moment(later.body["metadata"]["creationTimestamp"]) - moment(self.body["metadata"]["creationTimestamp"])
        return f"it was the current one for {stood}, until revision {later.number} came" if stood >= stood_for else None


def bare_template(template: Json) -> Json:
    """Without the label that the Deployment's controller adds."""
    metadata = dict(template.get("metadata") or {})
    metadata["labels"] = {key: value for key, value in (metadata.get("labels") or {}).items() if key != _HASH}
    return {**template, "metadata": metadata}


def digest_of(template: Json) -> str:
    """A template may hold what nobody should read in a ledger: only its digest stands there."""
    return hashlib.sha256(canonical(bare_template(template)).encode()).hexdigest()


def revisions(cluster: Kubernetes, deployment: Json) -> list[Revision]:
    """Newest first."""
    metadata = deployment["metadata"]
    sets = cluster.list(REPLICA_SETS, metadata["namespace"], labels=labels_of(deployment["spec"]["selector"]))
    ours = [each for each in sets if (controller(each) or {}).get("uid") == metadata["uid"]]
    numbers = [(each["metadata"].get("annotations") or {}).get(_REVISION, "") for each in ours]
    known = [Revision(int(number), each) for number, each in zip(numbers, ours, strict=True) if number.isdecimal()]
    return sorted(known, key=lambda revision: revision.number, reverse=True)


class RollbackAction(PatchAction[RollbackParameters]):
    """Puts the template of an older ReplicaSet back into the Deployment. A plan names templates by ReplicaSet and digest."""

    def changes(self) -> Plan:
        given = self.parameters
        fence(self.system, given.namespace)
        body = self.cluster.get(DEPLOYMENTS, given.name, given.namespace)
        found = Workload("Deployment", body)
        refuse_foreign(self, body)
        if found.spec.get("paused"):
            raise self.refuse("it is paused: a rollback would wait until somebody resumes it", "kubectl rollout resume")
        facts: Json = {"ready": found.ready, "wanted": found.wanted, "managed_by": _manager(body)}
        if said := marked(body, ROLLED_BACK, self.context.incident_id):
            if found.progress()[0]:
                return self.planned((), facts={**facts, "rolled_back": "in this incident, and complete"})
            before, after = said["before"], said["after"]
        else:
            before, after = self._way_back(found, facts)
        change = Change("deployment", title_of(DEPLOYMENTS, body), before, after, True, detail_of(DEPLOYMENTS, body))
        return self.planned([change], facts=facts)

    def _way_back(self, found: Workload, facts: Json) -> tuple[Json, Json]:
        """The current revision and the one to go back to; `facts` gets the evidence."""
        given = self.parameters
        known = revisions(self.cluster, found.body)
        current = next((each for each in known if digest_of(each.template) == digest_of(found.spec["template"])), None)
        if current is None:
            raise self.refuse(
                "no ReplicaSet has the Deployment's present template", "wait until its controller has seen it"
            )
        if not given.even_when_ready and found.progress()[0]:
            raise self.refuse(
                f"every pod of revision {current.number} is ready", "even_when_ready: true, if it is bad nevertheless"
            )
        chosen, because = self._last_healthy([each for each in known if each.number <= current.number])
        facts |= {"from_revision": current.number, "to_revision": chosen.number, "evidence": because}
        return _as_json(current), _as_json(chosen)

    def _last_healthy(self, known: Sequence[Revision]) -> tuple[Revision, str]:
        for later, revision in pairwise(known):
            because = revision.healthy_because(later, self.parameters.stood_for, only_ready=self.parameters.only_ready)
            if because:
                return revision, because
        raise self.refuse(
            f"of {len(known) - 1} older revisions none is known to have been healthy",
            "look at `kubectl rollout history`, and roll back by hand",
        )

    def decide(self, change: Change, found: Json) -> list[Json] | None:
        present = digest_of(found["spec"]["template"])
        if present == change.after["template"]:
            return None
        if present != change.before["template"]:
            raise ConflictError("somebody rolled out something else since the plan was made")
        wanted = self.cluster.get(REPLICA_SETS, change.after["replica_set"], change.detail["namespace"])
        template = bare_template(wanted["spec"]["template"])
        if digest_of(template) != change.after["template"]:
            raise ConflictError(f"the ReplicaSet {change.after['replica_set']} is not what it was")
        note = {"op": "add", "path": _ROLLED_BACK_AT, "value": mark(self.context.incident_id, change)}
        if self.back:
            note = {"op": "remove", "path": _ROLLED_BACK_AT}
            if ROLLED_BACK not in found["metadata"]["annotations"]:
                return [{"op": "replace", "path": "/spec/template", "value": template}]
        return [note, {"op": "replace", "path": "/spec/template", "value": template}]

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if (within := time_to_look(outcomes, self.parameters.within)) is None:
            return NOTHING_DONE
        change, given = plan.changes[0], self.parameters
        with self.other_way() as cluster:
            present = digest_of(self.read(cluster, change)["spec"]["template"])
            template = Check("template", present == change.after["template"], f"it is {change.after['replica_set']}'s")
            if self.back:
                # The way forward again leads to what was not healthy: that its template stands there is all that can be asked.
                return Verification((template,))
            labels = labels_of(self.read(cluster, change)["spec"]["selector"])
            rollout = waited(
                cluster, "rollout", lambda: Workload("Deployment", self.read(cluster, change)).progress(),
                DEPLOYMENTS, given.namespace, fields=f"metadata.name={given.name}", within=within,
            )  # fmt: skip
            return Verification((template, rollout, self._pods(cluster, labels, change.after["replica_set"])))

    def _pods(self, cluster: Kubernetes, labels: str, replica_set: str) -> Check:
        pods = [pod for pod in cluster.list(PODS, self.parameters.namespace, labels=labels) if not is_going(pod)]
        right = [pod for pod in pods if (controller(pod) or {}).get("name") == replica_set and is_ready(pod)]
        return Check(
            "pods",
            bool(pods) and len(right) == len(pods),
            f"{len(right)} of {len(pods)} pods are {replica_set}'s and ready",
        )


def _as_json(revision: Revision) -> Json:
    """Without the number: that one changes when a revision comes back."""
    return {"replica_set": revision.name, "template": digest_of(revision.template), "images": images(revision.template)}


def _manager(body: Json) -> str | None:
    """Who would put it back: a tool that keeps the cluster as a repository says."""
    metadata = body["metadata"]
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    if "argocd.argoproj.io/tracking-id" in annotations or "argocd.argoproj.io/instance" in labels:
        return "Argo CD; with self-heal on it rolls forward again"
    if "kustomize.toolkit.fluxcd.io/name" in labels or "helm.toolkit.fluxcd.io/name" in labels:
        return "Flux; at its next reconciliation it rolls forward again"
    return None


class Rollback(Playbook[RollbackParameters]):
    name = "kubernetes.rollback"
    title = "Roll a Deployment back to its last healthy revision"
    kinds = KINDS
    what = (
        "Looks through the Deployment's ReplicaSets for the newest older revision with evidence that it was healthy: pods of it are"
        " ready now, or it was the current one for long enough. Its template is put back as `kubectl rollout undo` does."
        " It is refused while the current revision is ready, and when nothing shows that an older one was healthy."
    )
    why_safe = "It goes back to what ran before, and what is ready of the old revision keeps serving meanwhile."
    blast_radius = "The pods of one Deployment. What the newer version wrote must be readable by the older one."
    rights = ("apps/deployments: get, list, watch, patch", "apps/replicasets: get, list", "core/pods: list")
    undo_text = "Rolls forward again to the revision that was current before, whether or not it becomes ready."
    Parameters = RollbackParameters

    def action(self, context: Context[RollbackParameters]) -> Action:
        return RollbackAction(context, self.name)

    def undo(self, context: Context[RollbackParameters], done: Sequence[Done]) -> Action:
        return RollbackAction(context, self.name, done)

    def peers(self, context: Context[RollbackParameters]) -> Peers:
        return peers_of(context, "Deployment")
