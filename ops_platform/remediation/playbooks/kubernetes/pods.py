"""Pods that are stuck, and jobs that are finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.kubernetes import Kubernetes
from ops_platform.clients.kubernetes_objects import CRON_JOBS, JOBS, NODES, PODS, Json, Resource
from ops_platform.errors import ConflictError, NotThereError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import PositiveDuration
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, P, Playbook
from ops_platform.remediation.playbooks.kubernetes.shared import (
    KINDS,
    NOTHING_DONE,
    ClusterAction,
    Named,
    Namespace,
    Waits,
    cluster_of,
    condition,
    controller,
    detail_of,
    fence,
    is_going,
    is_ready,
    is_true,
    moment,
    time_to_look,
    title_of,
    uid,
    waited,
)

_TRIES = 4
_NO_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"


class DeleteAction(ClusterAction[P]):
    """Deletes objects, each only as what it was read as a moment before. `detail`: as of `detail_of`, and `grace` where it is 0."""

    resource: Resource

    def still_wanted(self, change: Change, found: Json) -> None:
        """Raises ConflictError where it is not to be deleted any more."""
        raise NotImplementedError

    def _read(self, change: Change) -> Json | None:
        """As it is now; None where exactly that one is gone. Raises ConflictError where it is to stay."""
        found = self.cluster.find(self.resource, change.detail["name"], change.detail["namespace"])
        if found is None or uid(found) != change.detail["uid"]:
            return None
        self.still_wanted(change, found)
        return found

    def check(self, change: Change) -> Applied | None:
        try:
            found = self._read(change)
        except ConflictError as error:
            return Applied(Outcome.CONTENDED, error.what)
        return Applied(Outcome.ALREADY_DONE, "it is gone already") if found is None else None

    def apply(self, change: Change) -> Applied:
        """What changes under our hands is looked at again: a pod that restarts all the time does so every few seconds."""
        detail, why = change.detail, ""
        for _ in range(_TRIES):
            try:
                if (found := self._read(change)) is None:
                    return Applied(Outcome.ALREADY_DONE, "it is gone already")
                version = found["metadata"]["resourceVersion"]
                self.cluster.delete(
                    self.resource,
                    detail["name"],
                    detail["namespace"],
                    uid=detail["uid"],
                    version=version,
                    grace=detail.get("grace"),
                )
            except ConflictError as error:
                why = error.what
            except NotThereError:
                return Applied(Outcome.ALREADY_DONE, "it is gone already")
            else:
                return Applied(Outcome.APPLIED, "deleted")
        return Applied(Outcome.CONTENDED, why)


# A stuck pod


class StuckPodParameters(Named, Waits):
    stuck_for: PositiveDuration = Field(
        default=timedelta(minutes=10), description="It must have been stuck for this long, beyond its grace period."
    )
    restarts: int = Field(default=3, ge=1, description="A crash loop counts after this many restarts.")
    force: bool = Field(
        default=False,
        description="Take a pod that does not end out of the API without its node's word, where that node is away.",
    )
    bare: bool = Field(default=False, description="Also a pod that no controller brings back.")


@dataclass(frozen=True)
class Stuck:
    """Why a pod counts as stuck: `terminating`, `crash loop`, `no image`, `unknown`."""

    why: str
    said: str


def stuck(pod: Json, now: datetime, given: StuckPodParameters) -> Stuck | str:
    """How it is stuck; a text that says why it is not."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    ready = condition(pod, "Ready") or {}
    since = moment(ready.get("lastTransitionTime") or metadata["creationTimestamp"])
    if is_going(pod):
        # The API writes the moment at which the grace period is over.
        return _for(
            now - moment(metadata["deletionTimestamp"]), given, Stuck("terminating", "it should have ended before")
        )
    if status.get("phase") == "Unknown" or status.get("reason") == "NodeLost" or ready.get("status") == "Unknown":
        return _for(now - since, given, Stuck("unknown", "its node does not tell of it"))
    containers: list[Json] = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for each in containers:
        reason = ((each.get("state") or {}).get("waiting") or {}).get("reason")
        if reason == "CrashLoopBackOff":
            count = int(each.get("restartCount") or 0)
            if count < given.restarts:
                return f"the container {each['name']} was restarted {count} times, {given.restarts} are asked for"
            return Stuck("crash loop", f"the container {each['name']} ends again and again")
        if reason in _NO_IMAGE:
            return _for(now - since, given, Stuck("no image", f"the image of {each['name']} cannot be had"))
    return f"it is {status.get('phase', 'in no phase')}" + (" and ready" if ready.get("status") == "True" else "")


def _for(lasted: timedelta, given: StuckPodParameters, found: Stuck) -> Stuck | str:
    return found if lasted >= given.stuck_for else f"{found.said}, but not for {given.stuck_for} yet"


class DeletePodAction(DeleteAction[StuckPodParameters]):
    resource = PODS

    def plan(self) -> Plan:
        given = self.parameters
        fence(self.system, given.namespace)
        pod = self.cluster.find(PODS, given.name, given.namespace)
        if pod is None:
            return self.planned((), facts={"pod": "it is gone"})
        found = stuck(pod, self.context.clock.now(), given)
        if isinstance(found, str):
            raise self.refuse(f"the pod {given.name} is not stuck: {found}")
        owner = self._owner(pod)
        force = found.why == "terminating"
        if force:
            self._refuse_unless_forced(pod, owner)
        siblings = [uid(each) for each in siblings_of(self.cluster, pod)]
        detail = detail_of(PODS, pod, **({"grace": 0} if force else {}))
        before = {"stuck": found.why, "controller": f"{owner['kind']} {owner['name']}" if owner else None}
        change = Change("pod", title_of(PODS, pod), before, None, False, detail)
        facts = {"why": found.said, "node": pod["spec"].get("nodeName"), "siblings": siblings, "force": force}
        return self.planned([change], facts=facts)

    def _owner(self, pod: Json) -> Json | None:
        if (owner := controller(pod)) is None and not self.parameters.bare:
            raise self.refuse("no controller would bring the pod back", "bare: true, if it is to go for good")
        if owner and owner["kind"] == "Node":
            raise self.refuse("it is a static pod of its node: what is deleted is only its mirror")
        if pod["metadata"].get("finalizers"):
            raise self.refuse(
                "it waits for a finalizer, which is never taken away here", "look who set metadata.finalizers"
            )
        return owner

    def _refuse_unless_forced(self, pod: Json, owner: Json | None) -> None:
        """Its deletion was asked for already. Without the node's word it may go on running, and two of a StatefulSet destroy data."""
        if not self.parameters.force:
            raise self.refuse("it is being deleted already, and its node does not confirm that it ended", "force: true")
        name = pod["spec"].get("nodeName")
        node = self.cluster.find(NODES, name) if name else None
        if node is None:
            return
        taints = {taint["key"] for taint in node["spec"].get("taints") or []}
        if _OUT_OF_SERVICE in taints:
            return
        if is_true(node, "Ready"):
            raise self.refuse(f"its node {name} is ready: the pod may still run there", "look at the node's kubelet")
        if owner and owner["kind"] == "StatefulSet":
            raise self.refuse(
                f"it is one of a StatefulSet, and may still run on {name}",
                f"make sure that {name} is off, and give it the taint {_OUT_OF_SERVICE}",
            )

    def still_wanted(self, change: Change, found: Json) -> None:
        now_stuck = stuck(found, self.context.clock.now(), self.parameters)
        if isinstance(now_stuck, str):
            raise ConflictError(f"it is not stuck any more: {now_stuck}")
        if (now_stuck.why == "terminating") != ("grace" in change.detail):
            raise ConflictError(f"it is stuck in another way than planned: {now_stuck.why}")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if (within := time_to_look(outcomes, self.parameters.within)) is None:
            return NOTHING_DONE
        given, change = self.parameters, plan.changes[0]
        with self.other_way() as cluster:

            def gone() -> tuple[bool | None, str]:
                there = any(uid(pod) == change.detail["uid"] for pod in cluster.list(PODS, given.namespace))
                return (None, "the pod is still there") if there else (True, "the pod is gone")

            checks = [waited(cluster, "gone", gone, PODS, given.namespace, within=within)]
            kind, _, name = (change.before["controller"] or "").partition(" ")
            # But for a StatefulSet, a controller replaces a pod as soon as it is asked to end: there is nothing more to come.
            if kind and (change.before["stuck"] != "terminating" or kind == "StatefulSet"):
                known = {change.detail["uid"], *plan.facts["siblings"]}

                def replaced() -> tuple[bool | None, str]:
                    fresh = [pod for pod in owned_pods(cluster, given.namespace, kind, name) if uid(pod) not in known]
                    return bool(fresh) or None, f"{len(fresh)} new pods of {kind} {name}"

                checks.append(waited(cluster, "replaced", replaced, PODS, given.namespace, within=within))
            return Verification(tuple(checks))


def owned_pods(cluster: Kubernetes, namespace: str, kind: str, name: str) -> list[Json]:
    owned: list[Json] = []
    for pod in cluster.list(PODS, namespace):
        owner = controller(pod) or {}
        if (owner.get("kind"), owner.get("name")) == (kind, name) and not is_going(pod):
            owned.append(pod)
    return owned


def siblings_of(cluster: Kubernetes, pod: Json) -> list[Json]:
    """Other pods of the same controller."""
    owner = controller(pod)
    if owner is None:
        return []
    pods = owned_pods(cluster, pod["metadata"]["namespace"], owner["kind"], owner["name"])
    return [each for each in pods if uid(each) != uid(pod)]


class DeleteStuckPod(Playbook[StuckPodParameters]):
    name = "kubernetes.delete_stuck_pod"
    title = "Delete a stuck pod"
    kinds = KINDS
    what = (
        "Deletes one pod that ends again and again, has no image, is unknown to its node or does not end, so that its controller makes"
        " a new one, elsewhere if need be. A pod without a controller is left alone unless asked for. One that does not end is taken"
        " out of the API only when asked (`force`) and when its node is away; of a StatefulSet only when the node is gone for certain."
    )
    why_safe = "The pod does not serve, its controller brings a new one, and exactly this pod in exactly this state is deleted."
    blast_radius = "One pod that is not ready. By force: a container that still runs on a node that nobody reaches."
    rights = ("core/pods: get, list, watch, delete", "cluster core/nodes: get")
    Parameters = StuckPodParameters

    def action(self, context: Context[StuckPodParameters]) -> Action:
        return DeletePodAction(context, self.name)

    def peers(self, context: Context[StuckPodParameters]) -> Peers | None:
        cluster, given = cluster_of(context), context.parameters
        pod = cluster.find(PODS, given.name, given.namespace)
        if pod is None or controller(pod) is None:
            return None
        siblings = siblings_of(cluster, pod)
        return Peers(sum(is_ready(each) for each in siblings), len(siblings), "ready pods of the same controller")


# Finished jobs


class CleanJobsParameters(Strict):
    namespace: Namespace = Field(description="Where the jobs are; within the fence of the system.")
    older_than: PositiveDuration = Field(default=timedelta(days=1), description="Finished before this long.")
    keep: int = Field(default=3, ge=0, description="The newest of each kind (completed, failed) that stay in any case.")
    failed: bool = Field(default=False, description="Failed ones too; their pods' logs go with them.")
    at_most: int = Field(
        default=20, ge=1, description="Jobs in one plan, the oldest first; the rest is for the next one."
    )


@dataclass(frozen=True)
class Finished:
    body: Json
    how: str  # Complete or Failed
    at: datetime


def finished(job: Json) -> Finished | None:
    for how in ("Complete", "Failed"):
        if is_true(job, how):
            ended = (job.get("status") or {}).get("completionTime") or (condition(job, how) or {}).get(
                "lastTransitionTime"
            )
            return Finished(job, how, moment(ended)) if ended else None
    return None


class CleanJobsAction(DeleteAction[CleanJobsParameters]):
    resource = JOBS

    def plan(self) -> Plan:
        given = self.parameters
        fence(self.system, given.namespace)
        jobs = self.cluster.list(JOBS, given.namespace)
        crons = {uid(cron): cron for cron in self.cluster.list(CRON_JOBS, given.namespace)}
        old = sorted(self._superfluous(jobs, crons), key=lambda each: (each.at, each.body["metadata"]["name"]))
        changes = [
            Change(
                "job", title_of(JOBS, each.body), {"ended": each.how, "at": each.at.isoformat()}, None, False, detail_of(JOBS, each.body)
            )
            for each in old[: given.at_most]
        ]  # fmt: skip
        facts = {"jobs": len(jobs), "superfluous": len(old), "left_for_next_time": max(0, len(old) - given.at_most)}
        return self.planned(changes, population={"job": len(jobs)}, facts=facts)

    def _superfluous(self, jobs: Sequence[Json], crons: Mapping[str, Json]) -> Iterator[Finished]:
        """Of each CronJob, and of all jobs that nobody owns, what is older than asked and not among the newest."""
        given, now = self.parameters, self.context.clock.now()
        groups: dict[tuple[str, str], list[Finished]] = {}
        for job in jobs:
            found, owner = finished(job), controller(job)
            group = "" if owner is None else str(owner["uid"])
            # What another controller owns, or removes itself after a time, is not ours to remove.
            if (
                found is None
                or is_going(job)
                or (group and group not in crons)
                or "ttlSecondsAfterFinished" in job["spec"]
            ):
                continue
            if found.how == "Complete" or given.failed:
                groups.setdefault((group, found.how), []).append(found)
        for (group, how), members in groups.items():
            keep = max(given.keep, history(crons[group], how)) if group else given.keep
            newest_first = sorted(members, key=lambda each: each.at, reverse=True)
            yield from (each for each in newest_first[keep:] if now - each.at >= given.older_than)

    def still_wanted(self, change: Change, found: Json) -> None:
        if finished(found) is None:
            raise ConflictError("it runs again")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if time_to_look(outcomes, timedelta(0)) is None:
            return NOTHING_DONE
        named = {
            change.detail["uid"]: change.object for change in plan.changes if _is_done(outcomes.get(change.object))
        }
        with self.other_way() as cluster:
            present = cluster.list(JOBS, self.parameters.namespace)
        left = sorted(named[uid(job)] for job in present if uid(job) in named and not is_going(job))
        said = f"still there: {', '.join(left)}" if left else f"{len(named)} jobs are gone"
        return Verification((Check("jobs", not left, said),))


def history(cron: Json, how: str) -> int:
    """How many a CronJob itself keeps."""
    field, usual = ("successfulJobsHistoryLimit", 3) if how == "Complete" else ("failedJobsHistoryLimit", 1)
    return int(cron["spec"].get(field, usual))


def _is_done(applied: Applied | None) -> bool:
    return applied is not None and applied.outcome in (Outcome.APPLIED, Outcome.ALREADY_DONE)


class CleanFinishedJobs(Playbook[CleanJobsParameters]):
    name = "kubernetes.clean_finished_jobs"
    title = "Remove finished jobs"
    kinds = KINDS
    what = (
        "Deletes jobs of one namespace that ended long enough ago, with their pods: those that nobody owns, and those of a CronJob"
        " beyond the history that it keeps. The newest stay, failed ones stay unless asked for, and what another controller owns is"
        " left alone."
    )
    why_safe = "What is deleted has ended; nothing that runs is touched, and the newest of each kind stay."
    blast_radius = "Finished jobs of one namespace, and the logs of their pods."
    rights = ("batch/jobs: get, list, delete", "batch/cronjobs: list")
    Parameters = CleanJobsParameters

    def action(self, context: Context[CleanJobsParameters]) -> Action:
        return CleanJobsAction(context, self.name)
