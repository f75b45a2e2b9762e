"""Kubernetes: objects of a real API server, created again in an empty one and compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops_platform.clients.kubernetes_objects import Resource
from ops_platform.errors import UnreachableError
from ops_platform.recovery.model import Verdict
from ops_platform.stores.fetch import fetch_backup
from ops_platform.stores.kind import Check, Saved
from ops_platform.stores.kubernetes import KubernetesStore, clean, differences, ordered, read_objects
from tests import kube_rig, stores_rig
from tests.rig import Ground, Platform, eventually
from tests.stores_rig import dump, gate, gates, prove, with_store

WIDGETS = {
    "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
    "metadata": {"name": "widgets.stores.test"},
    "spec": {
        "group": "stores.test", "scope": "Namespaced", "names": {"plural": "widgets", "singular": "widget", "kind": "Widget"},
        "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": {
            "type": "object", "properties": {"spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}}}}],
    },
}  # fmt: skip
VALUE = "aGVsbG8gd29ybGQgdGhhdCBpcyBzZWNyZXQ="


@pytest.fixture(scope="module")
def platform(ground: Ground, kube: kube_rig.Kube) -> Iterator[Platform]:
    made = Platform(ground, {})
    stores_rig.hand_over(kube, made.home)
    yield made
    made.close()


def entry(platform: Platform, *namespaces: str) -> dict[str, Any]:
    return stores_rig.cluster_of(platform.home, *namespaces)


@pytest.fixture(scope="module")
def shop(kube: kube_rig.Kube) -> str:
    """A namespace with something of everything."""
    kube.custom_resource(WIDGETS)
    name = kube.namespace("stores")
    core, apps = f"{kube_rig.CORE}/namespaces/{name}", f"{kube_rig.APPS}/namespaces/{name}"
    kube.api.post(f"{core}/configmaps", {"metadata": {"name": "settings"}, "data": {"a": "1", "b": "zwei\n"}})
    kube.api.post(f"{core}/secrets", {"metadata": {"name": "login"}, "data": {"password": VALUE}})
    kube.api.post(
        f"{core}/services", {"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}
    )
    kube.api.post(f"{core}/serviceaccounts", {"metadata": {"name": "worker"}})
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]
    kube.api.post(f"{kube_rig.RBAC}/namespaces/{name}/roles", {"metadata": {"name": "reader"}, "rules": rules})
    kube.node()
    kube.deployment(name, "web", replicas=1)
    job = {"metadata": {"name": "once"}, "spec": {"suspend": True, "template": {"spec": {
        "restartPolicy": "Never", "containers": [{"name": "main", "image": "shop:1"}]}}}}  # fmt: skip
    kube.api.post(f"/apis/batch/v1/namespaces/{name}/jobs", job)
    kube.api.post(f"/apis/stores.test/v1/namespaces/{name}/widgets",
                  {"apiVersion": "stores.test/v1", "kind": "Widget", "metadata": {"name": "w"}, "spec": {"size": 3}})  # fmt: skip
    assert apps
    # A controller's own, and one that merely goes with another.
    owner = kube.api.get(f"{apps}/deployments/web")["metadata"]
    for config, controls in (("made", True), ("goes-with", False)):
        reference = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": "web",
            "uid": owner["uid"],
            "controller": controls,
        }
        kube.api.post(f"{core}/configmaps", {"metadata": {"name": config, "ownerReferences": [reference]}})
    return name


def test_objects_are_created_again_in_an_empty_server_and_are_the_same(platform: Platform, shop: str) -> None:
    manifest = dump(platform, entry(platform, shop))
    assert "kinds of objects" in stores_rig.kind(platform, entry(platform, shop)).look()
    card = prove(platform, entry(platform, shop))
    assert card.verdict is Verdict.PASS, card.reason
    assert gates(card) == {
        "whole": "passed", "age": "passed", "objects": "passed", "created": "passed", "compared": "passed", "teardown": "passed",
    }  # fmt: skip
    repository = stores_rig.repository(platform, entry(platform, shop))
    saved = fetch_backup(repository, manifest, platform.home / "looked-at")
    kept = {(resource.kind, found["metadata"].get("name")) for resource, found in read_objects(saved.part("objects"))}
    assert {("Deployment", "web"), ("Secret", "login"), ("Widget", "w"), ("Job", "once"), ("Namespace", shop)} <= kept
    assert ("ConfigMap", "goes-with") in kept
    assert ("ConfigMap", "made") not in kept
    # What a controller made of them is not kept: it makes it again.
    assert {"Pod", "ReplicaSet", "Endpoints", "Event", "Lease", "Node"}.isdisjoint(kind for kind, _ in kept)
    assert VALUE not in card.model_dump_json() + manifest.model_dump_json()
    for block in manifest.parts[0].blocks:
        assert VALUE.encode() not in repository.store.get(block.key)


class Changed(KubernetesStore):
    """The backup with one object of the kind changed or left out before it is restored."""

    kind: str = ""
    change: Any = None

    def restore(self, saved: Saved, home: Path) -> Any:
        file = saved.part("objects")
        import json

        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        kept = [type(self).change(line) if line["resource"]["kind"] == type(self).kind else line for line in lines]
        file.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in kept if line is not None))
        return super().restore(saved, home)

    def files(self, saved: Saved) -> Iterator[Check]:
        return iter(())


BINDING = {
    "resource": {"group": "rbac.authorization.k8s.io", "version": "v1", "plural": "clusterrolebindings",
                 "kind": "ClusterRoleBinding", "namespaced": False},
    "object": {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "cluster-admin"},
               "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"}},
}  # fmt: skip


def test_a_custom_resource_without_its_definition_and_a_field_that_cannot_be_changed_fail_by_their_names(
    platform: Platform, shop: str
) -> None:
    """The sandbox's server makes a binding of that name itself, with a role that nobody can change any more."""
    dump(platform, entry(platform, shop))
    target = with_store(platform, entry(platform, shop))
    kind = type(
        "Lacking", (Changed,), {"kind": "CustomResourceDefinition", "change": staticmethod(lambda line: BINDING)}
    )
    card = prove(platform, entry(platform, shop), kind=kind(platform.access, target, target.system))
    assert card.verdict is Verdict.FAIL
    assert "widgets.stores.test" in gate(card, "created").result
    assert "cluster-admin: 422" in gate(card, "created").result
    assert "field is immutable" in gate(card, "created").result
    assert "roleRef.name" in gate(card, "compared").result
    assert gates(card)["teardown"] == "passed"


def test_what_differs_is_named_by_its_path_and_never_by_its_value() -> None:
    known = {"data": {"password": "secret", "same": "1"}, "list": [{"a": 1}]}
    assert differences(known, {"data": {"password": "other", "same": "1"}, "list": [{"a": 2}]}) == [
        "data.password",
        "list[0].a",
    ]
    assert differences(known, known) == []
    assert differences({"spec": {}}, {}) == []
    assert differences({"list": [1]}, {"list": [1, 2]}) == ["list"]


def test_definitions_come_first_and_webhooks_last() -> None:
    kinds = [
        "ValidatingWebhookConfiguration",
        "Deployment",
        "Secret",
        "Namespace",
        "CustomResourceDefinition",
        "Pod",
        "Widget",
    ]
    found = [one.kind for one in ordered(Resource("", "v1", kind.lower() + "s", kind) for kind in kinds)]
    assert found == [
        "CustomResourceDefinition",
        "Namespace",
        "Secret",
        "Deployment",
        "Widget",
        "ValidatingWebhookConfiguration",
    ]


def test_what_the_server_chose_is_taken_off_and_what_somebody_wrote_stays() -> None:
    service = {
        "metadata": {"name": "web", "uid": "1", "resourceVersion": "2", "annotations": {"mine": "x"}, "finalizers": ["a/b"]},
        "spec": {"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ports": [{"port": 80, "nodePort": 30000}]},
        "status": {"loadBalancer": {}},
    }  # fmt: skip
    assert clean("Service", service) == {
        "metadata": {"name": "web", "annotations": {"mine": "x"}}, "spec": {"ports": [{"port": 80}]},
    }  # fmt: skip
    headless = {"metadata": {"name": "web"}, "spec": {"clusterIP": "None"}}
    assert clean("Service", headless)["spec"]["clusterIP"] == "None"


def test_a_group_that_does_not_say_what_it_has_is_an_error(platform: Platform, kube: kube_rig.Kube, shop: str) -> None:
    """An aggregated server that is away: what it holds would be missing, and nobody would know."""
    name = "v1.away.test"
    path = "/apis/apiregistration.k8s.io/v1/apiservices"
    spec = {"group": "away.test", "version": "v1", "groupPriorityMinimum": 100, "versionPriority": 100, "insecureSkipTLSVerify": True,
            "service": {"name": "nobody", "namespace": shop}}  # fmt: skip
    kube.api.post(path, {"metadata": {"name": name}, "spec": spec})
    try:

        def is_away() -> bool:
            try:
                kube.api.get("/apis/away.test/v1")
            except kube_rig.ApiError as error:
                return error.status == 503  # 404 until the server has heard of it
            return False

        eventually(is_away, why="the server does not hear of the group")
        with pytest.raises(UnreachableError):
            dump(platform, entry(platform, shop))
    finally:
        kube.api.delete(f"{path}/{name}")
