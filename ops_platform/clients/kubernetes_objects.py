"""Kinds of objects as Kubernetes' addresses name them, and the rules of RBAC that allow something with them. Plain data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ops_platform.errors import UsageError

Json = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """A kind of object, as the server's addresses name it. `group` is empty for the core."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        parts += [self.plural, *(part for part in (name, sub) if part is not None)]
        if not all(parts) or {".", ".."} & set(parts):
            raise UsageError(f"{name!r} is no name of a {self.kind}")
        return "/" + "/".join(quote(part, safe="") for part in parts)


PODS = Resource("", "v1", "pods", "Pod")
NODES = Resource("", "v1", "nodes", "Node", namespaced=False)
SECRETS = Resource("", "v1", "secrets", "Secret")
CLAIMS = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
QUOTAS = Resource("", "v1", "resourcequotas", "ResourceQuota")
DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment")
REPLICA_SETS = Resource("apps", "v1", "replicasets", "ReplicaSet")
STATEFUL_SETS = Resource("apps", "v1", "statefulsets", "StatefulSet")
DAEMON_SETS = Resource("apps", "v1", "daemonsets", "DaemonSet")
JOBS = Resource("batch", "v1", "jobs", "Job")
CRON_JOBS = Resource("batch", "v1", "cronjobs", "CronJob")
AUTOSCALERS = Resource("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler")
BUDGETS = Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
STORAGE_CLASSES = Resource("storage.k8s.io", "v1", "storageclasses", "StorageClass", namespaced=False)
ROLLOUTS = Resource("argoproj.io", "v1alpha1", "rollouts", "Rollout")
CERTIFICATES = Resource("cert-manager.io", "v1", "certificates", "Certificate")


@dataclass(frozen=True)
class Right:
    """One rule of RBAC. As text `apps/deployments: get, patch`; the core group is `core`.

    A rule that begins with `cluster` belongs into a ClusterRole bound by a ClusterRoleBinding; any other may stand in a Role in each
    namespace that is acted in.
    """

    group: str
    resource: str  # with its subresource: pods/eviction
    verbs: tuple[str, ...]
    cluster: bool = False

    @classmethod
    def parse(cls, text: str) -> Right:
        """Raises ValueError."""
        found = re.fullmatch(r"(cluster )?([a-z0-9.-]+)/([a-z]+(?:/[a-z]+)?): ([a-z]+(?:, [a-z]+)*)", text)
        if not found:
            raise ValueError(f"{text!r} is no rule; write it like 'apps/deployments: get, patch'")
        group = "" if found[2] == "core" else found[2]
        return cls(group, found[3], tuple(found[4].split(", ")), found[1] is not None)

    def __str__(self) -> str:
        return f"{'cluster ' if self.cluster else ''}{self.group or 'core'}/{self.resource}: {', '.join(self.verbs)}"

    def as_rule(self) -> Json:
        """As it stands under `rules` of a Role or ClusterRole."""
        return {"apiGroups": [self.group], "resources": [self.resource], "verbs": list(self.verbs)}
