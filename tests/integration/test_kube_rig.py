"""The control plane of the tests is a real one: it knows rights, controllers, disruption budgets."""

from __future__ import annotations

import pytest

from tests.kube_rig import CORE, Api, ApiError, Kube, pod
from tests.rig import eventually
from tests.services import golang

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def namespace(kube: Kube) -> str:
    return kube.namespace()


def test_it_is_the_version_that_is_pinned(kube: Kube) -> None:
    assert kube.api.get("/version")["gitVersion"] == golang.version()


def test_who_has_no_right_is_refused_and_who_has_one_is_not(kube: Kube, namespace: str) -> None:
    read = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
    api = Api(kube.service_account(namespace, {namespace: [read]}))
    assert api.items(f"{CORE}/namespaces/{namespace}/pods") == []
    for path in (f"{CORE}/namespaces/{namespace}/secrets", f"{CORE}/pods", f"{CORE}/nodes"):
        with pytest.raises(ApiError) as refused:
            api.get(path)
        assert (refused.value.status, refused.value.reason) == (403, "Forbidden")
    nodes = {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}
    other = Api(kube.service_account(namespace, cluster=[nodes], name="other"))
    assert isinstance(other.items(f"{CORE}/nodes"), list)


def test_a_deployment_becomes_ready_and_is_rolled_over(kube: Kube, namespace: str) -> None:
    kube.node()
    path = kube.deployment(namespace, replicas=3)
    before = {each["metadata"]["name"] for each in kube.pods(namespace, "shop")}
    assert len(before) == 3
    stamp = {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": "2026-01-01T00:00:00Z"}}}
    kube.api.patch(path, {"spec": {"template": stamp}})
    kube.wait_rolled_out(path)
    # The last of the old ones may still be on its way out.
    eventually(lambda: len(kube.pods(namespace, "shop")) == 3)
    assert before.isdisjoint(each["metadata"]["name"] for each in kube.pods(namespace, "shop"))


def test_an_eviction_against_the_disruption_budget_is_refused(kube: Kube, namespace: str) -> None:
    kube.node()
    kube.deployment(namespace, replicas=2)
    kube.disruption_budget(namespace, minAvailable=2)
    name = kube.pods(namespace, "shop")[0]["metadata"]["name"]
    with pytest.raises(ApiError) as refused:
        kube.evict(namespace, name)
    assert (refused.value.status, refused.value.reason) == (429, "TooManyRequests")
    kube.api.patch(f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets/shop", {"spec": {"minAvailable": 1}})
    eventually(lambda: _evicted(kube, namespace, name))
    eventually(lambda: not kube.api.exists(f"{CORE}/namespaces/{namespace}/pods/{name}"))


def _evicted(kube: Kube, namespace: str, name: str) -> bool:
    try:
        kube.evict(namespace, name)
    except ApiError as error:  # until the controller has counted anew
        if error.status != 429:
            raise
        return False
    return True


def test_pods_behave_as_their_annotation_says(kube: Kube, namespace: str) -> None:
    kube.node()
    pods = f"{CORE}/namespaces/{namespace}/pods"
    for behaviour in ("unready", "crashing", "stuck"):
        kube.api.post(
            pods, {**(made := pod(behaviour, behaviour=behaviour)), "metadata": {**made["metadata"], "name": behaviour}}
        )
    for name, ready in (("unready", False), ("crashing", False), ("stuck", True)):
        status = eventually(lambda name=name: kube.api.get(f"{pods}/{name}")["status"].get("containerStatuses"))[0]
        assert status["ready"] is ready
        assert ("waiting" in status["state"]) is (name == "crashing")
    for name in ("unready", "stuck"):
        kube.api.delete(f"{pods}/{name}")
    eventually(lambda: not kube.api.exists(f"{pods}/unready"))
    assert kube.api.get(f"{pods}/stuck")["metadata"]["deletionTimestamp"]
    kube.api.delete(f"{pods}/stuck", gracePeriodSeconds=0)
    eventually(lambda: not kube.api.exists(f"{pods}/stuck"))


@pytest.mark.parametrize(("behaviour", "counted"), [(None, "succeeded"), ("failing", "failed")])
def test_a_job_ends(kube: Kube, namespace: str, behaviour: str | None, counted: str) -> None:
    kube.node()
    template = pod("report", behaviour=behaviour, spec={"restartPolicy": "Never"})
    jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    kube.api.post(jobs, {"metadata": {"name": "report"}, "spec": {"backoffLimit": 0, "template": template}})
    eventually(lambda: kube.api.get(f"{jobs}/report")["status"].get(counted) == 1)


def test_a_claim_that_asks_for_more_gets_it(kube: Kube, namespace: str) -> None:
    path = kube.claim(namespace, size="1Gi")
    kube.api.patch(path, {"spec": {"resources": {"requests": {"storage": "2Gi"}}}})
    eventually(lambda: kube.api.get(path)["status"]["capacity"]["storage"] == "2Gi")
    with pytest.raises(ApiError, match="less than"):
        kube.api.patch(path, {"spec": {"resources": {"requests": {"storage": "1Gi"}}}})


def test_a_drained_node_gets_no_pod(kube: Kube, namespace: str) -> None:
    drained = kube.node(labels={"test": namespace})
    kube.api.patch(f"{CORE}/nodes/{drained}", {"spec": {"unschedulable": True}})
    kube.deployment(namespace, replicas=1, template={"nodeSelector": {"test": namespace}}, wait=False)
    one = eventually(lambda: kube.pods(namespace, "shop"))[0]
    path = f"{CORE}/namespaces/{namespace}/pods/{one['metadata']['name']}"
    reasons = eventually(lambda: kube.api.get(path)["status"].get("conditions"))
    assert [each["reason"] for each in reasons if each["type"] == "PodScheduled"] == ["Unschedulable"]


def test_a_silent_node_is_not_ready_and_its_pods_do_not_go(kube: Kube, namespace: str) -> None:
    node = kube.node(labels={"test": namespace})
    kube.deployment(namespace, replicas=1, template={"nodeSelector": {"test": namespace}})
    kube.silence_node(node)
    path = f"{CORE}/nodes/{node}"
    eventually(
        lambda: "Unknown" in [each["status"] for each in kube.api.get(path)["status"]["conditions"]], seconds=120
    )
    name = kube.pods(namespace, "shop")[0]["metadata"]["name"]
    kube.api.delete(f"{CORE}/namespaces/{namespace}/pods/{name}")
    assert name in [each["metadata"]["name"] for each in kube.pods(namespace, "shop")]


def test_a_rollout_of_argo_is_an_object_that_the_server_knows(kube: Kube, namespace: str) -> None:
    kube.argo_rollouts()
    rollouts = f"/apis/argoproj.io/v1alpha1/namespaces/{namespace}/rollouts"
    selector = {"matchLabels": {"app": "shop"}}
    spec = {"replicas": 1, "selector": selector, "strategy": {"canary": {}}, "template": pod("shop")}
    body = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "metadata": {"name": "shop"}, "spec": spec}
    kube.api.post(rollouts, body)
    kube.api.patch(f"{rollouts}/shop/status", {"status": {"abort": True}})
    assert kube.api.get(f"{rollouts}/shop")["status"]["abort"] is True


def test_the_api_server_may_be_killed_and_started_again(kube: Kube, namespace: str) -> None:
    kube.apiserver.stop()
    with pytest.raises(OSError, match=r"."):
        kube.api.get(f"{CORE}/namespaces/{namespace}")
    kube.apiserver.start()
    assert kube.api.exists(f"{CORE}/namespaces/{namespace}")
    # The others are restarted by nobody here: they have to have found the server again by themselves.
    kube.node()
