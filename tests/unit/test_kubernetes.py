"""What the Kubernetes client and its playbooks decide without a cluster: rules, fences, quantities, what counts as stuck."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_platform.clients.kubernetes_errors import QuotaError
from ops_platform.clients.kubernetes_objects import NODES, PODS, Right
from ops_platform.errors import RefusedError, UsageError
from ops_platform.inventory.systems import KubernetesSystem
from ops_platform.remediation.playbook import playbooks
from ops_platform.remediation.playbooks.kubernetes.pods import Stuck, StuckPodParameters, stuck
from ops_platform.remediation.playbooks.kubernetes.scale import pod_takes
from ops_platform.remediation.playbooks.kubernetes.shared import fence, is_inside, labels_of, quantity
from ops_platform.remediation.playbooks.kubernetes.storage import in_words

NOW = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
OURS = {name: book for name, book in playbooks().items() if name.startswith("kubernetes.")}
IN_VAULT = "in Vault: "


def system(*namespaces: str) -> KubernetesSystem:
    return KubernetesSystem(kind="kubernetes", id="main", environment="test", owner="team", namespaces=list(namespaces))


# Rules


@given(
    st.builds(
        Right,
        st.sampled_from(["", "apps", "argoproj.io", "storage.k8s.io"]),
        st.sampled_from(["pods", "pods/eviction", "rollouts/status"]),
        st.lists(st.sampled_from(["get", "list", "patch", "deletecollection"]), min_size=1, unique=True).map(tuple),
        st.booleans(),
    )
)
def test_a_rule_is_read_as_it_is_written(right: Right) -> None:
    assert Right.parse(str(right)) == right


@pytest.mark.parametrize(
    "text", ["pods: get", "core/pods", "core/pods: ", "core/pods: get list", "core/pods/a/b: get", "core/*: *"]
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no rule"):
        Right.parse(text)


def test_a_rule_becomes_one_of_rbac() -> None:
    rule = Right.parse("cluster core/pods/eviction: create").as_rule()
    assert rule == {"apiGroups": [""], "resources": ["pods/eviction"], "verbs": ["create"]}


@pytest.mark.parametrize("name", OURS)
def test_each_playbook_says_its_rights_exactly(name: str) -> None:
    book = OURS[name]
    rights = [Right.parse(text) for text in book.rights if not text.startswith(IN_VAULT)]
    assert rights
    assert all("*" not in str(right) for right in rights)
    for said in (book.title, book.what, book.why_safe, book.blast_radius):
        assert said.strip() == said != ""
    assert not book.title.endswith(".")


def test_there_are_the_playbooks_that_were_promised() -> None:
    assert set(OURS) == {
        "kubernetes.rollout_restart", "kubernetes.rollback", "kubernetes.argo_abort", "kubernetes.argo_retry",
        "kubernetes.delete_stuck_pod", "kubernetes.cordon_drain", "kubernetes.scale", "kubernetes.grow_volume_claim",
        "kubernetes.clean_finished_jobs", "kubernetes.renew_certificate_secret",
    }  # fmt: skip


# Addresses


def test_an_object_has_its_address() -> None:
    assert PODS.path("shop", "web-1", "eviction") == "/api/v1/namespaces/shop/pods/web-1/eviction"
    assert PODS.path() == "/api/v1/pods"
    assert NODES.path(None, "n:1") == "/api/v1/nodes/n%3A1"


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        PODS.path("shop", name)


@pytest.mark.parametrize("name", ["../nodes", "a/b", "A", "-a", "a-", "", "x" * 254])
def test_a_parameter_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="parameter 'name'"):
        OURS["kubernetes.delete_stuck_pod"].read_parameters({"namespace": "shop", "name": name})


# The fence


@pytest.mark.parametrize(
    ("namespaces", "namespace", "inside"),
    [
        ((), "shop", True),
        ((), "kube-system", False),
        ((), "openshift-etcd", False),
        (("shop",), "shop", True),
        (("shop",), "shop-2", False),
        (("shop-*",), "shop-2", True),
        (("*",), "shop", True),
        (("*",), "kube-system", False),
        (("kube-*",), "kube-system", False),
        (("*", "kube-system"), "kube-system", True),
        (("kube-system",), "shop", False),
    ],
)
def test_the_fence(namespaces: tuple[str, ...], namespace: str, inside: bool) -> None:
    assert is_inside(system(*namespaces), namespace) is inside
    if inside:
        fence(system(*namespaces), namespace)
    else:
        with pytest.raises(RefusedError, match=f"the namespace {namespace}"):
            fence(system(*namespaces), namespace)


# Selectors and quantities


def test_a_selector_is_written_as_the_api_reads_it() -> None:
    expressions = [
        {"key": "tier", "operator": "In", "values": ["a", "b"]},
        {"key": "old", "operator": "DoesNotExist"},
        {"key": "app", "operator": "Exists"},
        {"key": "x", "operator": "NotIn", "values": ["y"]},
    ]
    assert (
        labels_of({"matchLabels": {"app": "web"}, "matchExpressions": expressions})
        == "app=web,tier in (a,b),!old,app,x notin (y)"
    )


def test_an_empty_selector_is_not_taken_for_everything() -> None:
    with pytest.raises(RefusedError, match="every pod"):
        labels_of({})


@settings(deadline=None)  # the first one loads the client
@given(st.integers(1, 1 << 50))
def test_a_size_keeps_its_value_in_words(size: int) -> None:
    assert quantity(in_words(size)) == size


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("2Gi", 2 << 30), ("1e3", 1000), ("3", 3), (4, 4)])
def test_quantities(text: Any, value: float) -> None:
    assert quantity(text) == value


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(RefusedError, match="no quantity"):
        quantity("much")


RESOURCES = {"requests": {"cpu": "250m", "memory": "64Mi", "example.com/gpu": "1"}, "limits": {"memory": "128Mi"}}
SPEC = {"containers": [{"name": "a", "resources": RESOURCES}, {"name": "b", "resources": RESOURCES}]}


@pytest.mark.parametrize(
    ("key", "takes"),
    [
        ("pods", 1), ("count/pods", 1), ("cpu", 0.5), ("requests.cpu", 0.5), ("requests.memory", 128 << 20),
        ("limits.memory", 256 << 20), ("requests.example.com/gpu", 2), ("requests.ephemeral-storage", 0),
        ("requests.storage", None), ("services", None), ("count/deployments.apps", None), ("persistentvolumeclaims", None),
        ("fast.storageclass.storage.k8s.io/requests.storage", None),
    ],
)  # fmt: skip
def test_what_a_pod_takes_of_a_quota(key: str, takes: float | None) -> None:
    assert pod_takes(SPEC, key) == takes


def test_a_container_that_does_not_say_what_it_takes_is_not_taken_for_nothing() -> None:
    with pytest.raises(QuotaError, match=r"limits\.cpu"):
        pod_takes(SPEC, "limits.cpu")


# Stuck pods


def pod(
    *, going: timedelta | None = None, ready: str = "False", since: timedelta = timedelta(hours=1), **status: Any
) -> dict[str, Any]:
    metadata = {"name": "web", "creationTimestamp": (NOW - timedelta(days=1)).isoformat()}
    if going is not None:
        metadata["deletionTimestamp"] = (NOW - going).isoformat()
    condition = {"type": "Ready", "status": ready, "lastTransitionTime": (NOW - since).isoformat()}
    return {"metadata": metadata, "spec": {}, "status": {"phase": "Running", "conditions": [condition], **status}}


def waiting(reason: str, restarts: int = 0) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "main", "restartCount": restarts, "state": {"waiting": {"reason": reason}}}]}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (pod(going=timedelta(minutes=11)), "terminating"),
        (pod(going=timedelta(minutes=9)), None),
        (pod(going=-timedelta(seconds=20)), None),
        (pod(**waiting("CrashLoopBackOff", 3)), "crash loop"),
        (pod(**waiting("CrashLoopBackOff", 2)), None),
        (pod(**waiting("ImagePullBackOff")), "no image"),
        (pod(since=timedelta(minutes=1), **waiting("ErrImagePull")), None),
        (pod(**waiting("ContainerCreating")), None),
        (pod(phase="Unknown"), "unknown"),
        (pod(reason="NodeLost"), "unknown"),
        (pod(ready="Unknown"), "unknown"),
        (pod(ready="Unknown", since=timedelta(minutes=1)), None),
        (pod(ready="True"), None),
        (pod(), None),
        (pod(phase="Pending"), None),
        ({"metadata": {"creationTimestamp": NOW.isoformat()}, "spec": {}}, None),
    ],
)
def test_what_counts_as_stuck(found: dict[str, Any], why: str | None) -> None:
    said = stuck(found, NOW, StuckPodParameters(namespace="shop", name="web"))
    assert (said.why if isinstance(said, Stuck) else None) == why
    assert said


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 3, "by": 1, "at_most": 5}, {"at_most": 5}, {"replicas": 3}, {"replicas": "3", "at_most": 5},
        {"by": 1, "at_most": 1, "at_least": 2}, {"replicas": -1, "at_most": 5},
    ],
)  # fmt: skip
def test_a_scaling_that_says_too_little_or_too_much_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        OURS["kubernetes.scale"].read_parameters({"namespace": "shop", "name": "web", **wrong})
