"""The Kubernetes client against a real API server, and against a proxy before it that does what servers and networks do on bad days."""

from __future__ import annotations

import base64
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops_platform.clients import kubernetes as client_module
from ops_platform.clients.kubernetes import Kubernetes, open_kubernetes
from ops_platform.clients.kubernetes_errors import DisruptionBudgetError, QuotaError
from ops_platform.clients.kubernetes_objects import DEPLOYMENTS, NODES, PODS, SECRETS, Json, Resource
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    NotThereError,
    OpsError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from ops_platform.inventory.systems import KubernetesSystem
from ops_platform.inventory.values import Secret, SecretRef
from tests.integration import http_faults as faults
from tests.integration.http_faults import FaultyProxy
from tests.integration.kubernetes_faults import as_admin, config, refusal
from tests.kube_rig import CORE, Kube, pod
from tests.rig import eventually

pytestmark = pytest.mark.timeout(600)

MAPS = Resource("", "v1", "configmaps", "ConfigMap")
TOKEN = "a-token-that-nobody-may-see"


@dataclass
class Sleepless:
    """The real time; sleeping is only noted."""

    slept: list[float] = field(default_factory=list)

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return self.now().timestamp()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


Open = Callable[..., Kubernetes]


@pytest.fixture
def clock() -> Sleepless:
    return Sleepless()


@pytest.fixture
def opened(clock: Sleepless) -> Iterator[Open]:
    """Opens the client with a kubeconfig: a file, or its content."""
    with ExitStack() as stack:

        def make(content: Path | str | Mapping[str, Any], **more: Any) -> Kubernetes:
            text = content.read_text() if isinstance(content, Path) else content
            text = text if isinstance(text, str) else yaml.safe_dump(dict(text))
            system = KubernetesSystem(
                kind="kubernetes",
                id="main",
                environment="test",
                owner="team",
                kubeconfig=SecretRef("env", "KUBE"),
                **more,
            )
            cluster = open_kubernetes(system, lambda _ref: Secret(text), clock=clock)
            return stack.enter_context(closing(cluster))

        yield make


@pytest.fixture
def cluster(kube: Kube, opened: Open) -> Kubernetes:
    return opened(kube.kubeconfig)


@pytest.fixture
def namespace(kube: Kube) -> str:
    return kube.namespace()


@pytest.fixture
def proxy(kube: Kube) -> Iterator[FaultyProxy]:
    with FaultyProxy(kube.port, upstream=as_admin(kube)) as made:
        yield made


@pytest.fixture
def through(proxy: FaultyProxy, opened: Open) -> Kubernetes:
    """The client behind the proxy, as the administrator."""
    return opened(config(proxy.url))


def a_map(name: str, **data: str) -> Json:
    return {"metadata": {"name": name}, "data": data}


# Rights


def test_a_missing_verb_is_named_with_the_rule_that_gives_it(kube: Kube, namespace: str, opened: Open) -> None:
    nobody = opened(kube.service_account(namespace))
    for ask, said in (
        (lambda: nobody.list(PODS, namespace), "core/pods: list"),
        (lambda: nobody.get(DEPLOYMENTS, "web", namespace), "apps/deployments: get"),
        (lambda: nobody.evict("web", namespace, uid="x"), "core/pods/eviction: create"),
        (lambda: nobody.delete(PODS, "web", namespace, uid="x"), "core/pods: delete"),
        (lambda: nobody.patch(DEPLOYMENTS, "web", {}, namespace), "apps/deployments: patch"),
    ):
        with pytest.raises(AccessDeniedError) as refused:
            ask()
        assert said in (refused.value.remedy or "")
        assert f"in namespace {namespace}" in refused.value.what
        assert f"system:serviceaccount:{namespace}:ops may not" in refused.value.what
    with pytest.raises(AccessDeniedError) as refused:
        nobody.list(NODES)
    assert "cluster core/nodes: list" in (refused.value.remedy or "")


def test_a_login_that_the_server_does_not_know_is_refused(kube: Kube, opened: Open) -> None:
    ca = base64.b64encode(kube.authority.ca.read_bytes()).decode()
    stranger = opened(config(f"https://127.0.0.1:{kube.port}", cluster={"certificate-authority-data": ca}, token=TOKEN))
    with pytest.raises(AccessDeniedError, match="does not know who we are") as refused:
        stranger.list(PODS, "default")
    assert TOKEN not in str(refused.value)


# What is there


def test_a_list_is_read_page_by_page(cluster: Kubernetes, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        cluster.create(MAPS, a_map(f"m{number}"), namespace)
    monkeypatch.setattr(client_module, "_PAGE", 2)
    names = [found["metadata"]["name"] for found in cluster.list(MAPS, namespace)]
    assert [name for name in names if name.startswith("m")] == [f"m{number}" for number in range(5)]
    assert cluster.count(MAPS, namespace) == len(names)


def test_a_list_that_the_server_has_forgotten_is_read_anew(
    through: Kubernetes, proxy: FaultyProxy, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        through.create(MAPS, a_map(f"m{number}"), namespace)
    monkeypatch.setattr(client_module, "_PAGE", 2)
    proxy.faults.extend([None, refusal(410, "the continue parameter is too old")])
    assert {"m0", "m1", "m2"} <= {found["metadata"]["name"] for found in through.list(MAPS, namespace)}


def test_what_is_not_there_is_told_from_what_the_cluster_does_not_know(cluster: Kubernetes, namespace: str) -> None:
    with pytest.raises(NotThereError, match="there is no Pod web"):
        cluster.get(PODS, "web", namespace)
    with pytest.raises(NotThereError, match="the cluster has no gadgets") as missing:
        cluster.get(Resource("example.com", "v1", "gadgets", "Gadget"), "web", namespace)
    assert "install" in (missing.value.remedy or "")
    assert cluster.find(PODS, "web", namespace) is None


# Changing


def labelled(found: Json) -> Json | None:
    return None if (found.get("data") or {}).get("done") else {"data": {"done": "yes"}}


def test_whoever_was_faster_makes_it_be_decided_again(cluster: Kubernetes, kube: Kube, namespace: str) -> None:
    cluster.create(MAPS, a_map("m", count="1"), namespace)
    seen: list[str] = []

    def decide(found: Json) -> Json | None:
        seen.append(found["data"]["count"])
        if len(seen) == 1:
            kube.api.patch(f"{CORE}/namespaces/{namespace}/configmaps/m", {"data": {"count": "2"}})
        return {"data": {"double": str(2 * int(found["data"]["count"]))}}

    assert cluster.change(MAPS, "m", decide, namespace)
    assert seen == ["1", "2"]
    assert cluster.get(MAPS, "m", namespace)["data"] == {"count": "2", "double": "4"}


def test_a_json_patch_is_for_the_state_that_was_read_alone(cluster: Kubernetes, kube: Kube, namespace: str) -> None:
    cluster.create(MAPS, a_map("m", count="1"), namespace)
    seen: list[str] = []

    def decide(found: Json) -> list[Json]:
        seen.append(found["data"]["count"])
        if len(seen) == 1:
            kube.api.patch(f"{CORE}/namespaces/{namespace}/configmaps/m", {"data": {"count": "2"}})
        return [{"op": "replace", "path": "/data", "value": {"was": found["data"]["count"]}}]

    assert cluster.change(MAPS, "m", decide, namespace)
    assert cluster.get(MAPS, "m", namespace)["data"] == {"was": "2"}


def test_what_never_stands_still_is_given_up(cluster: Kubernetes, kube: Kube, namespace: str) -> None:
    cluster.create(MAPS, a_map("m", count="0"), namespace)
    tries: list[int] = []

    def decide(_found: Json) -> Json:
        tries.append(1)
        kube.api.patch(f"{CORE}/namespaces/{namespace}/configmaps/m", {"data": {"count": str(len(tries))}})
        return {"data": {"done": "yes"}}

    with pytest.raises(ConflictError):
        cluster.change(MAPS, "m", decide, namespace)
    assert 1 < len(tries) < 10
    assert "done" not in cluster.get(MAPS, "m", namespace)["data"]


@pytest.mark.parametrize(
    "fault", [faults.lose_the_answer, faults.cut_the_answer, refusal(500), refusal(503), faults.reset_in_the_request]
)
def test_a_write_without_an_answer_is_found_out(
    through: Kubernetes, proxy: FaultyProxy, namespace: str, fault: faults.Fault
) -> None:
    through.create(MAPS, a_map("m"), namespace)
    proxy.faults.extend([None, fault])
    assert through.change(MAPS, "m", labelled, namespace)
    assert through.get(MAPS, "m", namespace)["data"] == {"done": "yes"}
    written = [request for request in proxy.seen if request.method == "PATCH"]
    assert len(written) == (1 if fault in (faults.lose_the_answer, faults.cut_the_answer) else 2)


def test_a_change_that_is_there_already_is_not_written(through: Kubernetes, proxy: FaultyProxy, namespace: str) -> None:
    through.create(MAPS, a_map("m", done="yes"), namespace)
    assert not through.change(MAPS, "m", labelled, namespace)
    assert [request.method for request in proxy.seen] == ["POST", "GET"]


def test_a_write_without_an_answer_is_not_asked_twice(through: Kubernetes, proxy: FaultyProxy, namespace: str) -> None:
    proxy.faults.append(faults.lose_the_answer)
    with pytest.raises(UnreachableError):
        through.create(MAPS, a_map("m"), namespace)
    assert len(proxy.seen) == 1


def test_only_what_was_read_is_deleted(cluster: Kubernetes, kube: Kube, namespace: str) -> None:
    made = cluster.create(MAPS, a_map("m"), namespace)["metadata"]
    with pytest.raises(ConflictError):
        cluster.delete(MAPS, "m", namespace, uid="11111111-2222-3333-4444-555555555555")
    kube.api.patch(f"{CORE}/namespaces/{namespace}/configmaps/m", {"data": {"a": "b"}})
    with pytest.raises(ConflictError):
        cluster.delete(MAPS, "m", namespace, uid=made["uid"], version=made["resourceVersion"])
    cluster.delete(MAPS, "m", namespace, uid=made["uid"])
    assert cluster.find(MAPS, "m", namespace) is None


def test_a_quota_that_is_used_up_is_named(cluster: Kubernetes, kube: Kube, namespace: str) -> None:
    path = f"{CORE}/namespaces/{namespace}/resourcequotas"
    kube.api.post(path, {"metadata": {"name": "small"}, "spec": {"hard": {"pods": "0"}}})
    eventually(lambda: "hard" in kube.api.get(f"{path}/small").get("status", {}))
    with pytest.raises(QuotaError, match="small"):
        cluster.create(PODS, {**pod("web"), "metadata": {"name": "web"}}, namespace)


def test_what_admission_does_not_want_is_refused_with_its_words(
    cluster: Kubernetes, kube: Kube, namespace: str
) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    kube.api.patch(f"{CORE}/namespaces/{namespace}", {"metadata": {"labels": label}})
    with pytest.raises(RefusedError, match="PodSecurity"):
        cluster.create(PODS, {**pod("web"), "metadata": {"name": "web"}}, namespace)
    with pytest.raises(RefusedError, match="422"):
        cluster.create(MAPS, a_map("NOT A NAME"), namespace)


def test_a_disruption_budget_is_named_and_not_waited_for(
    cluster: Kubernetes, kube: Kube, namespace: str, clock: Sleepless
) -> None:
    kube.node()
    kube.deployment(namespace, replicas=1)
    kube.disruption_budget(namespace, minAvailable=1)
    found = kube.pods(namespace, "shop")[0]["metadata"]
    with pytest.raises(DisruptionBudgetError) as kept:
        cluster.evict(found["name"], namespace, uid=found["uid"])
    assert kept.value.budget == "shop"
    assert clock.slept == []


# Bad days


def test_a_server_that_asks_to_come_back_is_left_alone_for_so_long(
    through: Kubernetes, proxy: FaultyProxy, namespace: str, clock: Sleepless
) -> None:
    proxy.faults.extend([refusal(429, retry_after="7"), refusal(429), refusal(429, retry_after="3600")])
    through.create(MAPS, a_map("m"), namespace)
    assert clock.slept == [7.0, 1.0, 15.0]
    assert through.get(MAPS, "m", namespace)


def test_a_server_that_never_has_time_is_given_up(
    through: Kubernetes, proxy: FaultyProxy, namespace: str, clock: Sleepless
) -> None:
    proxy.always = refusal(429, retry_after="10")
    with pytest.raises(UnreachableError, match="overloaded"):
        through.list(MAPS, namespace)
    assert 0 < sum(clock.slept) <= 60


@pytest.mark.parametrize("fault", [refusal(500), refusal(503), faults.cut_the_answer, faults.reset_in_the_request])
def test_a_read_is_asked_again(
    through: Kubernetes, proxy: FaultyProxy, namespace: str, fault: faults.Fault, clock: Sleepless
) -> None:
    proxy.faults.extend([fault, fault])
    assert through.list(MAPS, namespace)
    assert len(clock.slept) == 2


def test_a_read_that_is_never_answered_is_not_nothing(through: Kubernetes, proxy: FaultyProxy, namespace: str) -> None:
    proxy.always = refusal(500, "etcd is away")
    with pytest.raises(UnreachableError, match="etcd is away"):
        through.find(MAPS, "m", namespace)
    proxy.always = faults.reply(200, b"<html>sign in</html>", content_type="text/html")
    with pytest.raises(UnreachableError, match="no object in JSON"):
        through.list(MAPS, namespace)


def test_a_server_that_hangs_is_not_waited_for(proxy: FaultyProxy, opened: Open) -> None:
    from datetime import timedelta

    impatient = opened(config(proxy.url), timeout=timedelta(seconds=0.2))
    proxy.always = faults.never_answer
    with pytest.raises(UnreachableError, match="does not answer"):
        impatient.list(PODS, "default")


def test_nobody_there_is_said(opened: Open) -> None:
    with pytest.raises(UnreachableError, match="does not answer"):
        opened(config("http://127.0.0.1:1")).list(PODS, "default")


# Watching


def watching(fault: faults.Fault, first: bool = True) -> faults.Fault:
    """The first watch meets the fault; everything else streams through."""
    left = [fault] if first else []

    def choose(handler: Any) -> None:
        chosen = left.pop() if left and "watch=true" in handler.path else faults.streaming()
        chosen(handler)

    return choose


GONE = json.dumps({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old resource version"}})


@pytest.mark.parametrize(
    "fault",
    [
        faults.streaming(0),
        faults.reset_in_the_request,
        refusal(500),
        refusal(429, retry_after="1"),
        refusal(410, "too old"),
        faults.reply(200, GONE.encode() + b"\n", content_type="application/json"),
        faults.reply(200, b'{"type": "ADD', content_type="application/json"),
    ],
    ids=["cut", "reset", "500", "429", "410", "gone", "torn"],
)
def test_a_watch_that_breaks_off_is_taken_up_again(
    through: Kubernetes, proxy: FaultyProxy, kube: Kube, namespace: str, fault: faults.Fault
) -> None:
    through.create(MAPS, a_map("m"), namespace)
    proxy.always = watching(fault)
    looked: list[int] = []

    def look() -> bool:
        looked.append(1)
        if len(looked) == 2:  # after the fault
            kube.api.patch(f"{CORE}/namespaces/{namespace}/configmaps/m", {"data": {"done": "yes"}})
        return "done" in (through.get(MAPS, "m", namespace).get("data") or {}) and len(looked) > 2

    assert through.wait(look, MAPS, namespace, fields="metadata.name=m", seconds=60)


def test_what_happens_while_the_watch_is_cut_is_not_missed(
    through: Kubernetes, proxy: FaultyProxy, kube: Kube, namespace: str
) -> None:
    through.create(MAPS, a_map("m"), namespace)

    def change_and_cut(handler: Any) -> None:
        handler.take()
        kube.api.patch(f"{CORE}/namespaces/{namespace}/configmaps/m", {"data": {"done": "yes"}})
        handler.hang_up()

    proxy.always = watching(change_and_cut)
    looks = through.wait(
        lambda: "done" in (through.get(MAPS, "m", namespace).get("data") or {}), MAPS, namespace, seconds=60
    )
    assert looks


def test_a_watch_wakes_at_once(cluster: Kubernetes, kube: Kube, namespace: str) -> None:
    """Well before the time is up: a change ends the wait, not the deadline."""
    cluster.create(MAPS, a_map("m"), namespace)
    waits = threading.Event()

    def later() -> None:
        waits.wait(30)
        kube.api.patch(f"{CORE}/namespaces/{namespace}/configmaps/m", {"data": {"done": "yes"}})

    def look() -> bool:
        waits.set()
        return "done" in (cluster.get(MAPS, "m", namespace).get("data") or {})

    threading.Thread(target=later, daemon=True).start()
    assert cluster.wait(look, MAPS, namespace, seconds=600)


def test_a_wait_ends_when_its_time_is_up(cluster: Kubernetes, namespace: str) -> None:
    looked: list[int] = []
    assert not cluster.wait(lambda: bool(looked.append(1)), MAPS, namespace, seconds=1)
    assert len(looked) >= 2


# Logging in


def test_a_client_certificate_logs_in_and_its_key_never_has_a_name(
    kube: Kube, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parts = {name: base64.b64encode((kube.directory / f"admin.{end}").read_bytes()).decode()
             for name, end in (("client-certificate-data", "pem"), ("client-key-data", "key"))}  # fmt: skip
    ca = base64.b64encode(kube.authority.ca.read_bytes()).decode()
    server = f"https://127.0.0.1:{kube.port}"
    cluster = opened(config(server, cluster={"certificate-authority-data": ca}, **parts))
    assert isinstance(cluster.list(NODES), list)
    assert list(tmp_path.iterdir()) == []


def test_a_look_from_elsewhere_is_another_login(cluster: Kubernetes, kube: Kube, opened: Open, namespace: str) -> None:
    cluster.create(MAPS, a_map("m"), namespace)
    with closing(cluster.again()) as other:
        cluster.close()
        assert other.get(MAPS, "m", namespace)["metadata"]["name"] == "m"


def test_a_token_in_a_file_is_read_again_when_it_is_rotated(
    kube: Kube, namespace: str, opened: Open, tmp_path: Path
) -> None:
    known = yaml.safe_load(kube.service_account(namespace).read_text())
    token = tmp_path / "token"
    token.write_text("an old one")
    server = known["clusters"][0]["cluster"]
    cluster = opened(
        config(
            server["server"], cluster={"certificate-authority": server["certificate-authority"]}, tokenFile=str(token)
        )
    )
    with pytest.raises(AccessDeniedError, match="does not know"):
        cluster.list(PODS, namespace)
    token.write_text(known["users"][0]["user"]["token"])
    with pytest.raises(AccessDeniedError, match="may not list pods"):
        cluster.list(PODS, namespace)


def test_the_context_that_is_named_is_taken(kube: Kube, opened: Open) -> None:
    known = yaml.safe_load(kube.kubeconfig.read_text())
    known["contexts"].append({"name": "other", "context": {"cluster": "nowhere", "user": "admin"}})
    assert isinstance(opened(known, context="tests").list(NODES), list)
    with pytest.raises(UsageError, match="no cluster 'nowhere'"):
        opened(known, context="other")
    with pytest.raises(UsageError, match="no context 'third'"):
        opened(known, context="third")


def test_a_server_with_a_certificate_of_somebody_else_is_not_talked_to(opened: Open, kube: Kube) -> None:
    with pytest.raises(UnreachableError, match="TLS with the API server failed"):
        opened(config(f"https://127.0.0.1:{kube.port}", token=TOKEN)).list(PODS, "default")
    ca = base64.b64encode(kube.authority.ca.read_bytes()).decode()
    known = config(
        f"https://127.0.0.1:{kube.port}",
        cluster={"certificate-authority-data": ca, "tls-server-name": "elsewhere.example"}, token=TOKEN,
    )  # fmt: skip
    with pytest.raises(UnreachableError, match="TLS with the API server failed"):
        opened(known).list(PODS, "default")


SERVER = "https://kube.example"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (config(SERVER, exec={"command": "aws", "args": [TOKEN]}), "starts a program"),
        (config(SERVER, **{"auth-provider": {"name": "gcp", "config": {"x": TOKEN}}}), "starts a program"),
        (config(SERVER, cluster={"insecure-skip-tls-verify": True}, token=TOKEN), "does not check the server"),
        (config("http://kube.example", token=TOKEN), "no https"),
        (config("", token=TOKEN), "no https"),
        (config(SERVER, **{"client-certificate-data": "LS0t"}), "go together"),
        (config(SERVER, **{"client-key-data": TOKEN, "client-certificate-data": "LS0t"}), "no base64"),
        (config(SERVER, **{"client-key": "key.pem"}), "relative path"),
        (config(SERVER, **{"client-key": "/nowhere/key.pem"}), "cannot be read"),
        (config(SERVER, tokenFile="/nowhere/token"), "cannot be read"),
        (config(SERVER, cluster={"certificate-authority-data": "LS0t"}, token=TOKEN), "cannot be used"),
        ({"users": TOKEN}, "names no context"),
        (f"- {TOKEN}", "no mapping"),
        (f"{{{TOKEN}: [", "no YAML"),
        (f"a: b: {TOKEN}", "no YAML"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_refused_without_a_word_of_it(
    opened: Open, content: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        opened(content)
    assert TOKEN not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_pod_logs_in_by_its_service_account(
    kube: Kube, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    system = KubernetesSystem(kind="kubernetes", id="main", environment="test", owner="team")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(NotThereError, match="no pod of a cluster"):
        open_kubernetes(system, lambda _ref: Secret(""))
    token = yaml.safe_load(kube.service_account(namespace).read_text())["users"][0]["user"]["token"]
    (tmp_path / "token").write_text(token)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(kube.authority.ca))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(kube.port))
    with (
        closing(open_kubernetes(system, lambda _ref: Secret(""))) as cluster,
        pytest.raises(AccessDeniedError, match=r"serviceaccount:.*:ops may not"),
    ):
        cluster.list(PODS, namespace)


def test_nothing_secret_is_logged_or_shown(
    kube: Kube, namespace: str, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    rule = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "create"]}
    file = kube.service_account(namespace, {namespace: [rule]})
    token = yaml.safe_load(file.read_text())["users"][0]["user"]["token"]
    cluster = opened(file)
    value = base64.b64encode(b"do not show").decode()
    cluster.create(SECRETS, {"metadata": {"name": "s"}, "data": {"password": value}}, namespace)
    assert cluster.get(SECRETS, "s", namespace)["data"]["password"] == value
    with pytest.raises(OpsError) as refused:
        cluster.create(SECRETS, {"metadata": {"name": "s"}, "data": {"password": value}}, namespace)
    assert f"/api/v1/namespaces/{namespace}/secrets" in caplog.text  # the library does log the requests
    shown = [caplog.text, str(refused.value), repr(cluster), repr(vars(cluster))]
    assert not [text for text in shown if token in text or value in text]


@pytest.mark.parametrize("level", [logging.NOTSET, logging.DEBUG, logging.ERROR])
def test_opening_a_cluster_leaves_the_logs_of_the_process_as_they_are(opened: Open, level: int) -> None:
    log = logging.getLogger("urllib3")
    before = log.level
    try:
        log.setLevel(level)
        opened(config("http://127.0.0.1:1")).again().close()
        assert log.level == level
    finally:
        log.setLevel(before)
