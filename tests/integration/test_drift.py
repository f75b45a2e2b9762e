"""Drift between Git and a real API server: what is missing, extra and changed, and what is none."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from click.testing import CliRunner

from assets.stores import AS_IN_GIT, backup_key
from ops_platform.cli.main import cli
from ops_platform.definitions import build_defs
from ops_platform.errors import NotThereError, UsageError
from ops_platform.resources import PlatformResource
from ops_platform.stores.drift import (
    Changed,
    Drift,
    as_server,
    find_drift,
    read_manifests,
    stated_differences,
    with_manifests,
)
from tests import kube_rig
from tests.rig import Ground, Platform
from tests.stores_rig import with_store


@dataclass
class Site:
    """A namespace, and a Git repository that says what is in it."""

    kube: kube_rig.Kube
    platform: Platform
    namespace: str
    git: Path

    def write(self, name: str, *documents: Any) -> None:
        file = self.git / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump_all(documents))
        self.commit()

    def commit(self) -> None:
        run = ["git", "-C", str(self.git), "-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run([*run, "add", "-A"], check=True)
        subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", "more"], check=True)

    def declare(self, **more: Any) -> None:
        """The cluster and its repository in the inventory."""
        url = f"file://{self.git}"
        git = {
            "id": "config",
            "kind": "git",
            "environment": "test",
            "owner": "team",
            "repositories": [{"name": "infra", "url": url}],
        }
        others = [found for found in self.platform.body.get("systems", []) if found["id"] != "config"]
        self.platform.body["systems"] = [*others, git]
        manifests = {"git": "config", "repository": "infra", "path": "cluster", "namespaces": [self.namespace], **more}
        with_store(
            self.platform,
            {
                "id": "cluster",
                "kind": "kubernetes",
                "kubeconfig": f"file://{self.platform.home}/kubeconfig",
                "manifests": [manifests],
            },
        )

    def drift(self) -> Drift:
        [system] = with_manifests(self.platform.access.inventory)
        return find_drift(self.platform.access, system)

    def apply(self, path: str, manifest: dict[str, Any]) -> None:
        self.kube.api.post(path.format(namespace=self.namespace), manifest)


@pytest.fixture
def site(ground: Ground, kube: kube_rig.Kube, tmp_path: Path) -> Iterator[Site]:
    platform = Platform(ground, {})
    (platform.home / "kubeconfig").touch(mode=0o600)
    (platform.home / "kubeconfig").write_text(kube_rig.inline(kube.kubeconfig))
    git = tmp_path / "infra"
    subprocess.run(["git", "init", "-q", "-b", "main", str(git)], check=True)
    made = Site(kube, platform, kube.namespace("drift"), git)
    made.commit()
    made.declare()
    yield made
    platform.close()


def web(namespace: str) -> dict[str, Any]:
    container = {"name": "main", "image": "shop:1", "env": [{"name": "A", "value": "1"}],
                 "resources": {"limits": {"cpu": "1000m", "memory": "1Gi"}}}  # fmt: skip
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": namespace, "labels": {"app": "web"}},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}},
                 "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container]}}},
    }  # fmt: skip


def config(namespace: str, name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}, "data": data}


def login(namespace: str) -> dict[str, Any]:
    metadata = {"name": "login", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"password": "very secret"}}


DEPLOYMENTS = kube_rig.APPS + "/namespaces/{namespace}/deployments"
CONFIGS = kube_rig.CORE + "/namespaces/{namespace}/configmaps"
SECRETS = kube_rig.CORE + "/namespaces/{namespace}/secrets"


def test_what_is_as_in_git_is_no_drift_whatever_the_server_fills_in(site: Site) -> None:
    site.write("cluster/web.yaml", web(site.namespace), login(site.namespace))
    site.write("cluster/more/config.json", config(site.namespace, "settings", a="1"))
    site.apply(DEPLOYMENTS, web(site.namespace))
    site.apply(SECRETS, login(site.namespace))
    site.apply(CONFIGS, config(site.namespace, "settings", a="1"))
    # A controller's own is nobody's drift.
    owner = site.kube.api.get(DEPLOYMENTS.format(namespace=site.namespace) + "/web")["metadata"]
    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": owner["uid"], "controller": True}
    site.apply(CONFIGS, {"metadata": {"name": "made", "ownerReferences": [reference]}})
    found = site.drift()
    assert found.none, found
    assert found.compared == 3
    assert list(found.commits) == ["config/infra@HEAD"]


def test_what_is_missing_extra_and_changed_is_named_and_no_value_is_shown(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = site.namespace
    widget = {"apiVersion": "nobody.test/v1", "kind": "Gadget", "metadata": {"name": "g"}}
    site.write("cluster/all.yaml", web(namespace), login(namespace), config(namespace, "lost", a="1"), widget)
    changed = web(namespace)
    changed["spec"]["replicas"] = 3
    changed["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "B", "value": "2"}]
    site.apply(DEPLOYMENTS, changed)
    site.apply(SECRETS, {**login(namespace), "stringData": {"password": "another secret"}})
    site.apply(CONFIGS, config(namespace, "by-hand"))
    found = site.drift()
    assert found.missing == [f"configmaps {namespace}/lost", "Gadget g: the cluster has no such kind"]
    assert found.extra == [f"configmaps {namespace}/by-hand"]
    assert found.changed == [
        Changed(f"deployments.apps {namespace}/web", [
            "spec.replicas", "spec.template.spec.containers[main].env[A].name", "spec.template.spec.containers[main].env[A].value",
            "spec.template.spec.containers[main].env[B]"]),
        Changed(f"secrets {namespace}/login", ["data.password"]),
    ]  # fmt: skip
    monkeypatch.setenv("OPS_INVENTORY", str(site.platform.file))
    shown = CliRunner().invoke(cli, ["backup", "drift"])
    assert shown.exit_code == 1
    assert f"extra    configmaps {namespace}/by-hand" in shown.stdout
    as_json = CliRunner().invoke(cli, ["backup", "drift", "cluster", "--json"])
    assert json.loads(as_json.stdout)[0]["extra"] == found.extra
    for text in (shown.output, as_json.output, str(found)):
        assert "very secret" not in text
        assert "dmVyeSBzZWNyZXQ" not in text


def test_a_branch_a_tag_and_a_commit_are_looked_at_as_they_are(site: Site) -> None:
    site.write("cluster/a.yaml", config(site.namespace, "first"))
    subprocess.run(["git", "-C", str(site.git), "tag", "v1"], check=True)
    site.write("cluster/a.yaml", config(site.namespace, "second"))
    site.apply(CONFIGS, config(site.namespace, "first"))
    site.declare(ref="v1")
    assert site.drift().none
    site.declare(ref="main")
    assert site.drift().missing == [f"configmaps {site.namespace}/second"]
    site.declare(ref="gone")
    with pytest.raises(NotThereError, match="no branch, tag or commit gone"):
        site.drift()
    site.declare(path="elsewhere")
    with pytest.raises(NotThereError, match="no folder elsewhere"):
        site.drift()


def test_a_file_that_is_no_manifest_is_an_error_and_not_passed_over(site: Site) -> None:
    (site.git / "cluster").mkdir()
    (site.git / "cluster" / "chart.yaml").write_text("metadata: {{ .Values.name }}\n")
    site.commit()
    with pytest.raises(UsageError, match=r"cluster/chart.yaml.* cannot be read as YAML"):
        site.drift()
    site.write("cluster/chart.yaml", {"replicas": 3})
    with pytest.raises(UsageError, match="no object with a kind and a name"):
        site.drift()
    site.write("cluster/chart.yaml", config(site.namespace, "a"), config(site.namespace, "a"))
    with pytest.raises(UsageError, match="twice"):
        site.drift()


def test_dagster_says_it_and_keeps_no_backup_from_its_proof(site: Site) -> None:
    site.write("cluster/a.yaml", config(site.namespace, "lost"))
    repository = build_defs(site.platform.access.loaded).get_repository_def()
    key = dg.AssetCheckKey(backup_key("kubernetes"), AS_IN_GIT)
    assert not repository.asset_graph.get_check_spec(key).blocking
    with dg.DagsterInstance.ephemeral() as instance:
        done = repository.get_job("check_kubernetes").execute_in_process(
            instance=instance, raise_on_error=False,  # there is no backup here: that fails, too, and blocks
            resources={"platform": PlatformResource(inventory_path=str(site.platform.file))},
        )  # fmt: skip
    judged = {found.check_name: found for found in done.get_asset_check_evaluations()}
    assert (judged[AS_IN_GIT].passed, judged[AS_IN_GIT].metadata["missing"].value) == (False, 1.0)
    assert f"missing  configmaps {site.namespace}/lost" in (judged[AS_IN_GIT].description or "")


# Fields


def test_only_what_git_states_is_compared() -> None:
    here = {"a": 1, "more": 2, "list": [{"name": "x", "v": 1, "filled": True}], "plain": [1, 2], "empty": None}
    assert stated_differences({"a": 1, "list": [{"name": "x", "v": 1}], "plain": [1, 2], "empty": {}}, here) == []
    assert stated_differences({"plain": [1]}, here) == ["plain"]
    assert stated_differences({"list": [{"name": "y"}]}, here) == ["list[y].name", "list[x]"]
    assert stated_differences({"a": {"b": 1}}, here) == ["a.b"]


@pytest.mark.parametrize(
    ("stated", "here", "same"),
    [("1000m", "1", True), ("1Gi", "1024Mi", True), (1, "1", True), ("1", "2", False), ("x", "y", False)],
)
def test_an_amount_is_the_same_however_it_is_written(stated: Any, here: Any, same: bool) -> None:
    found = stated_differences({"limits": {"cpu": stated}}, {"limits": {"cpu": here}})
    assert found == ([] if same else ["limits.cpu"])
    assert stated_differences({"data": {"version": "1.0"}}, {"data": {"version": "1"}}) == ["data.version"]


def test_what_identifies_an_object_to_a_server_is_not_compared() -> None:
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "a", "uid": "1"},
        "stringData": {"k": "v"},
        "status": {},
    }
    assert as_server(manifest) == {"metadata": {"name": "a"}, "data": {"k": "dg=="}}


def test_a_list_is_its_objects_and_dates_are_text(tmp_path: Path) -> None:
    items = [config("n", "a"), config("n", "b")]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": items}))
    (tmp_path / "date.yml").write_text(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {day: 2026-01-01}}\n---\n"
    )
    (tmp_path / "README.md").write_text("not a manifest")
    found = list(read_manifests(tmp_path, tmp_path))
    assert [one["metadata"]["name"] for one in found] == ["c", "a", "b"]
    assert found[0]["data"] == {"day": "2026-01-01"}
