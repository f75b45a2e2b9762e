"""What a Deployment, a StatefulSet or a DaemonSet says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ops_platform.clients.kubernetes import Kubernetes
from ops_platform.clients.kubernetes_objects import Json
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context
from ops_platform.remediation.playbooks.kubernetes.shared import (
    RESOURCES,
    ClusterAction,
    cluster_of,
    condition,
    controller,
    labels_of,
)


@dataclass(frozen=True)
class Workload:
    """A Deployment, StatefulSet or DaemonSet as it was read."""

    kind: str
    body: Json

    @property
    def spec(self) -> Json:
        return self.body["spec"]

    @property
    def status(self) -> Json:
        return self.body.get("status") or {}

    @property
    def wanted(self) -> int:
        if self.kind == "DaemonSet":
            return int(self.status.get("desiredNumberScheduled") or 0)
        return int(self.spec.get("replicas", 1))

    def _counted(self, name: str, of_daemons: str) -> int:
        return int(self.status.get(of_daemons if self.kind == "DaemonSet" else name) or 0)

    @property
    def ready(self) -> int:
        return self._counted("readyReplicas", "numberReady")

    @property
    def updated(self) -> int:
        return self._counted("updatedReplicas", "updatedNumberScheduled")

    @property
    def there(self) -> int:
        return self._counted("replicas", "currentNumberScheduled")

    @property
    def available(self) -> int:
        return self._counted("availableReplicas", "numberAvailable")

    @property
    def strategy(self) -> str:
        """RollingUpdate, Recreate or OnDelete."""
        field = "strategy" if self.kind == "Deployment" else "updateStrategy"
        return str((self.spec.get(field) or {}).get("type", "RollingUpdate"))

    @property
    def labels(self) -> str:
        return labels_of(self.spec["selector"])

    @property
    def is_rolling(self) -> bool:
        """Pods of another revision are still there, or pods of the newest still to come."""
        seen = int(self.status.get("observedGeneration") or 0) >= int(self.body["metadata"]["generation"])
        older = self.there > self.updated if self.kind == "Deployment" else False
        return not seen or older or self.updated < self.wanted

    def progress(self) -> tuple[bool | None, str]:
        """Whether the rollout is complete, as `kubectl rollout status` tells it; None: not yet."""
        said = f"{self.updated} of {self.wanted} updated, {self.available} available"
        progressing = condition(self.body, "Progressing")
        seen = int(self.status.get("observedGeneration") or 0) >= int(self.body["metadata"]["generation"])
        if seen and progressing and progressing.get("reason") == "ProgressDeadlineExceeded":
            return False, f"the rollout exceeded its deadline: {said}"
        if self.is_rolling or self.available < self.wanted:
            return None, said
        return True, said


def read_workload(cluster: Kubernetes, kind: str, namespace: str, name: str) -> Workload:
    return Workload(kind, cluster.get(RESOURCES[kind], name, namespace))


def peers_of(context: Context[Any], kind: str) -> Peers:
    given = context.parameters
    found = read_workload(cluster_of(context), kind, given.namespace, given.name)
    return Peers(found.ready, found.wanted, "ready replicas")


def images(template: Json) -> list[str]:
    return [str(each.get("image")) for each in template["spec"]["containers"]]


def refuse_foreign(action: ClusterAction[Any], found: Json) -> None:
    """What a controller of its own keeps as it is would be put back at once."""
    if owner := controller(found):
        raise action.refuse(
            f"{owner['kind']} {owner['name']} controls it and would undo the change", "act on that instead"
        )
