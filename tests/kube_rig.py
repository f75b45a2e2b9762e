"""A Kubernetes control plane for the tests: etcd, kube-apiserver with RBAC, the controllers, the scheduler, and kwok for nodes and pods.

All of it is real but the kubelets: kwok plays them, as `kube_stages.yaml` says, so a Deployment gets pods that become ready and
no container ever runs. It takes seconds to start, so it is started once for a test process; each test has a namespace of its
own, and nodes of its own where it changes them.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import urllib3
import yaml

from ops_platform.clients.postgres_binaries import free_port
from tests.authority import Authority, key_pair
from tests.rig import eventually, missing
from tests.servers import Daemon, answers, folder
from tests.services.golang import kube_home

STAGES = Path(__file__).parent / "kube_stages.yaml"
BEHAVIOUR = "ops.test/behaviour"
MANAGED = {"ops.test/kubelet": "kwok"}  # a label: a node that loses it is taken out of the watch at once
# Kinds that the rig makes itself; a test names other paths in full.
APPS, CORE, RBAC = "/apis/apps/v1", "/api/v1", "/apis/rbac.authorization.k8s.io/v1"
DISRUPTION = "/apis/policy/v1"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
STORAGE_CLASS = "grows"


class ApiError(Exception):
    """A refusal by the API server: its HTTP status, and its reason, such as `Forbidden` or `TooManyRequests`."""

    def __init__(self, status: int, answer: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {answer.get('message', answer)}")
        self.status = status
        self.reason = answer.get("reason")


class Api:
    """Plain calls, as whoever a kubeconfig is for."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        known = yaml.safe_load(kubeconfig.read_text())
        server, user = known["clusters"][0]["cluster"], known["users"][0]["user"]
        self.url = server["server"]
        self._headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        self._pool = urllib3.PoolManager(
            ca_certs=server["certificate-authority"],
            cert_file=user.get("client-certificate"),
            key_file=user.get("client-key"),
            timeout=30,
            retries=False,
        )

    def call(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> Any:
        """The JSON of the answer. Raises ApiError for a refusal, OSError when nothing answers."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": kind, "Accept": "application/json"}
        try:
            answer = self._pool.request(method, f"{self.url}{path}", body=data, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(str(error)) from error
        found = json.loads(answer.data) if answer.data[:1] == b"{" else {"message": answer.data.decode()}
        if answer.status >= 300:
            raise ApiError(answer.status, found)
        return found

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def items(self, path: str) -> list[Any]:
        return self.get(path)["items"]

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self.call("POST", path, body)

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        """A JSON merge patch: null takes a field away."""
        return self.call("PATCH", path, body, kind="application/merge-patch+json")

    def delete(self, path: str, **options: Any) -> Any:
        return self.call("DELETE", path, options or None)

    def exists(self, path: str) -> bool:
        try:
            self.get(path)
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def close(self) -> None:
        self._pool.clear()


class Kube:
    """The control plane. `api` and `kubeconfig` are the administrator's; the daemons may be stopped and started by a test."""

    def __init__(self, directory: Path) -> None:
        self.home = kube_home()
        if not self.home.exists():
            missing("Kubernetes", "make services builds it from its Go modules")
        self.directory = directory
        self.port = free_port()
        self.authority = Authority(directory)
        self.kubeconfig = self._certified("admin", "admin", "system:masters")
        self._make_daemons()

    # Life

    def start(self) -> None:
        self.etcd.start()
        self.apiserver.start()
        self.api = Api(self.kubeconfig)
        for daemon in (self.controllers, self.scheduler, self.kwok):
            daemon.start()
        self.api.post(
            "/apis/storage.k8s.io/v1/storageclasses",
            {
                "metadata": {"name": STORAGE_CLASS},
                "provisioner": "kubernetes.io/no-provisioner",
                "allowVolumeExpansion": True,
            },
        )
        self._await_account("default")

    def stop(self) -> None:
        for daemon in (self.kwok, self.scheduler, self.controllers, self.apiserver, self.etcd):
            daemon.stop()
        if hasattr(self, "api"):
            self.api.close()

    def _make_daemons(self) -> None:
        here, store, ca = self.directory, free_port(), self.authority.ca
        etcd_url = f"http://127.0.0.1:{store}"
        self.etcd = self._daemon("etcd", lambda: answers(f"{etcd_url}/health"), self._etcd_flags(etcd_url))
        hosts = ("localhost", "127.0.0.1", "::1", "kubernetes.default.svc")
        server, server_key = self.authority.issue("server", "kube-apiserver", hosts=hosts)
        signing, public = key_pair(here, "accounts")
        flags = {
            "etcd-servers": etcd_url,
            "bind-address": "127.0.0.1",
            "advertise-address": "127.0.0.1",
            "secure-port": self.port,
            "endpoint-reconciler-type": "none",  # a loopback address may not be published
            "authorization-mode": "Node,RBAC",
            "client-ca-file": ca,
            "tls-cert-file": server,
            "tls-private-key-file": server_key,
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": public,
            "service-account-signing-key-file": signing,
            "service-cluster-ip-range": "10.96.0.0/16",
        }
        self.apiserver = self._daemon("apiserver", self._api_ready, flags)
        client = {
            "kubeconfig": self._certified("controllers", "system:kube-controller-manager", "system:masters"),
            "leader-elect": "false",
            "secure-port": 0,
        }
        flags = {**client, "service-account-private-key-file": signing, "root-ca-file": ca}
        # Half of the usual patience with a silent node, and twice as often a sign of life from each.
        flags |= {"kube-api-qps": 500, "kube-api-burst": 500, "node-monitor-grace-period": "25s"}
        self.controllers = self._daemon("controller-manager", lambda: True, flags)
        flags = {**client, "kubeconfig": self._certified("scheduler", "system:kube-scheduler", "system:masters")}
        self.scheduler = self._daemon("scheduler", lambda: True, flags)
        selector = ",".join(f"{key}={value}" for key, value in MANAGED.items())
        flags = {
            "kubeconfig": self._certified("kwok", "kwok", "system:masters"),
            "config": STAGES,
            "manage-nodes-with-label-selector": selector,
            "node-lease-duration-seconds": 20,
            "cidr": "10.244.0.0/16",
            "node-ip": "10.0.0.1",
        }
        self.kwok = self._daemon("kwok", lambda: True, flags)

    def _etcd_flags(self, client: str) -> dict[str, object]:
        peer = f"http://127.0.0.1:{free_port()}"
        return {
            "data-dir": self.directory / "etcd",
            "unsafe-no-fsync": "true",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "log-level": "warn",
        }

    def _daemon(self, name: str, ready: Any, flags: Mapping[str, object]) -> Daemon:
        command = [self.home / "kube", name, *(f"--{key}={value}" for key, value in flags.items())]
        return Daemon(name, command, ready, log=self.directory / f"{name}.log", seconds=120)

    def _api_ready(self) -> bool:
        api = Api(self.kubeconfig)
        try:
            return api.call("GET", "/readyz")["message"] == "ok"
        except ApiError:
            return False
        finally:
            api.close()

    # Who may do what

    def service_account(
        self,
        namespace: str,
        rules: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        *,
        cluster: Sequence[Mapping[str, Any]] = (),
        name: str = "ops",
    ) -> Path:
        """A kubeconfig for a new service account that may do just that by now: `rules` by namespace, `cluster` everywhere.

        A rule is one of RBAC: `{"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get"]}`.
        """
        accounts = f"{CORE}/namespaces/{namespace}/serviceaccounts"
        self.api.post(accounts, {"metadata": {"name": name}})
        subject = {"kind": "ServiceAccount", "namespace": namespace, "name": name}
        full = f"{namespace}-{name}"
        for where, wanted in (rules or {}).items():
            self._grant(f"{RBAC}/namespaces/{where}", "Role", full, wanted, subject)
        if cluster:
            self._grant(RBAC, "ClusterRole", full, cluster, subject)
        answer = self.api.post(f"{accounts}/{name}/token", {"spec": {"expirationSeconds": 7200}})
        made = self._kubeconfig(full, {"token": answer["status"]["token"]})
        # The server's authorizer hears of a new role a moment after it was made.
        granted = [({"namespace": where}, rule) for where, wanted in (rules or {}).items() for rule in wanted]
        granted += [({}, rule) for rule in cluster]
        with closing(Api(made)) as api:
            for where, rule in granted:
                for group, resource, verb in product(rule["apiGroups"], rule["resources"], rule["verbs"]):
                    kind, _, part = resource.partition("/")
                    asked = {"group": group, "resource": kind, "subresource": part, "verb": verb, **where}
                    eventually(lambda asked=asked: self._may(api, asked), why=f"{full} may not {asked}")
        return made

    def _may(self, api: Api, asked: Mapping[str, str]) -> bool:
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        return api.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)["status"]["allowed"]

    def _grant(
        self, path: str, kind: str, name: str, rules: Sequence[Mapping[str, Any]], subject: Mapping[str, str]
    ) -> None:
        self.api.post(f"{path}/{kind.lower()}s", {"metadata": {"name": name}, "rules": list(rules)})
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}
        binding = {"metadata": {"name": name}, "roleRef": reference, "subjects": [dict(subject)]}
        self.api.post(f"{path}/{kind.lower()}bindings", binding)

    def _certified(self, name: str, subject: str, organization: str) -> Path:
        chain, key = self.authority.issue(name, subject, organizations=[organization])
        return self._kubeconfig(name, {"client-certificate": str(chain), "client-key": str(key)})

    def _kubeconfig(self, name: str, user: Mapping[str, str]) -> Path:
        server = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.authority.ca)}
        file = self.directory / f"{name}.kubeconfig"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": server}],
            "users": [{"name": name, "user": dict(user)}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": name}}],
            "current-context": "tests",
        }
        file.touch(0o600)
        file.write_text(yaml.safe_dump(content))
        return file

    # What runs in it

    def namespace(self, prefix: str = "test") -> str:
        """A new one, in which pods can be made."""
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.api.post(f"{CORE}/namespaces", {"metadata": {"name": name}})
        self._await_account(name)
        return name

    def _await_account(self, namespace: str) -> None:
        path = f"{CORE}/namespaces/{namespace}/serviceaccounts/default"
        eventually(lambda: self.api.exists(path), why=lambda: f"{self.controllers}")

    def node(self, *, labels: Mapping[str, str] | None = None, pods: int = 110, cpu: str = "8") -> str:
        """A new node, when it is ready and takes pods."""
        name = f"node-{uuid.uuid4().hex[:8]}"
        room = {"cpu": cpu, "memory": "32Gi", "pods": str(pods)}
        body = {
            "metadata": {
                "name": name,
                "labels": {"kubernetes.io/hostname": name, **MANAGED, **(labels or {})},
            },
            "status": {"capacity": room, "allocatable": room},
        }
        self.api.post(f"{CORE}/nodes", body)
        eventually(lambda: self._takes_pods(name), why=lambda: f"{self.kwok}")
        return name

    def silence_node(self, name: str) -> None:
        """Nobody plays its kubelet any more; after half a minute it is not ready, and its pods neither run nor go."""
        self.api.patch(f"{CORE}/nodes/{name}", {"metadata": {"labels": dict.fromkeys(MANAGED)}})

    def _takes_pods(self, name: str) -> bool:
        node = self.api.get(f"{CORE}/nodes/{name}")
        return _condition(node, "Ready") and not node["spec"].get("taints")

    def deployment(
        self,
        namespace: str,
        name: str = "shop",
        *,
        replicas: int = 2,
        image: str = "shop:1",
        behaviour: str | None = None,
        template: Mapping[str, Any] | None = None,
        wait: bool = True,
        **spec: Any,
    ) -> str:
        """Its path in the API, when its pods are ready. Pods have the label app=NAME; `template` is merged over their spec."""
        body = {
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "template": pod(name, image=image, behaviour=behaviour, spec=template),
                **spec,
            },
        }
        self.api.post(f"{APPS}/namespaces/{namespace}/deployments", body)
        path = f"{APPS}/namespaces/{namespace}/deployments/{name}"
        if wait:
            self.wait_rolled_out(path)
        return path

    def wait_rolled_out(self, path: str) -> None:
        """As `kubectl rollout status` has it: the last revision alone, with all its pods available."""
        eventually(lambda: self._rolled_out(path), why=lambda: json.dumps(self.api.get(path)["status"]))

    def _rolled_out(self, path: str) -> bool:
        found = self.api.get(path)
        status, wanted = found["status"], found["spec"]["replicas"]
        counts = (status.get(key, 0) for key in ("updatedReplicas", "replicas", "availableReplicas"))
        return status.get("observedGeneration") == found["metadata"]["generation"] and set(counts) == {wanted}

    def pods(self, namespace: str, app: str | None = None) -> list[Any]:
        query = f"?labelSelector=app%3D{app}" if app else ""
        return self.api.items(f"{CORE}/namespaces/{namespace}/pods{query}")

    def disruption_budget(self, namespace: str, app: str = "shop", **spec: Any) -> None:
        """`minAvailable=` or `maxUnavailable=`; returns when the controller has counted."""
        path = f"{DISRUPTION}/namespaces/{namespace}/poddisruptionbudgets"
        selector = {"matchLabels": {"app": app}}
        self.api.post(path, {"metadata": {"name": app}, "spec": {"selector": selector, **spec}})
        eventually(lambda: self.api.get(f"{path}/{app}").get("status", {}).get("observedGeneration") == 1)

    def evict(self, namespace: str, name: str) -> None:
        """Raises ApiError with status 429 when a disruption budget forbids it."""
        self.api.post(f"{CORE}/namespaces/{namespace}/pods/{name}/eviction", {"metadata": {"name": name}})

    def claim(self, namespace: str, name: str = "data", size: str = "1Gi") -> str:
        """A bound volume claim whose class allows growth: what it then asks for, it gets. Its path in the API."""
        volume = f"{namespace}-{name}"
        common = {"accessModes": ["ReadWriteOnce"], "storageClassName": STORAGE_CLASS}
        reference = {"namespace": namespace, "name": name}
        spec = {**common, "capacity": {"storage": size}, "claimRef": reference, "hostPath": {"path": "/nowhere"}}
        self.api.post(f"{CORE}/persistentvolumes", {"metadata": {"name": volume}, "spec": spec})
        wanted = {**common, "volumeName": volume, "resources": {"requests": {"storage": size}}}
        claims = f"{CORE}/namespaces/{namespace}/persistentvolumeclaims"
        self.api.post(claims, {"metadata": {"name": name}, "spec": wanted})
        path = f"{claims}/{name}"
        eventually(lambda: self.api.get(path)["status"].get("phase") == "Bound", why=lambda: f"{self.controllers}")
        return path

    def argo_rollouts(self, *kinds: str) -> None:
        """Custom resources of Argo Rollouts, served when this returns: `rollout`, or others as their files are called.

        Its controller is not here: a test plays it. Each costs the API server seconds.
        """
        for kind in kinds or ("rollout",):
            file = self.home / "crds" / f"{kind}-crd.yaml"
            self.custom_resource(yaml.load(file.read_text(), Loader=yaml.CSafeLoader))

    def custom_resource(self, definition: Mapping[str, Any]) -> None:
        """Make it unless it is there, and wait until it is served."""
        name = definition["metadata"]["name"]
        if not self.api.exists(f"{CRDS}/{name}"):
            self.api.post(CRDS, definition)
        eventually(lambda: _condition(self.api.get(f"{CRDS}/{name}"), "Established"))
        spec = definition["spec"]
        served = next(version["name"] for version in spec["versions"] if version["served"])
        eventually(lambda: self._serves(f"/apis/{spec['group']}/{served}/{spec['names']['plural']}"))

    def _serves(self, path: str) -> bool:
        try:
            return self.api.exists(path)
        except ApiError as error:
            if error.status != 429:  # its storage is being made
                raise
            return False


def pod(
    app: str,
    *,
    image: str = "shop:1",
    behaviour: str | None = None,
    spec: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The template of a pod; `behaviour` as in kube_stages.yaml."""
    annotations = {BEHAVIOUR: behaviour} if behaviour else {}
    containers = [{"name": "main", "image": image}]
    return {
        "metadata": {"labels": {"app": app}, "annotations": annotations},
        "spec": {"terminationGracePeriodSeconds": 5, "containers": containers, **(spec or {})},
    }


def inline(file: Path) -> str:
    """The kubeconfig with its files in it, as one secret."""
    found = yaml.safe_load(file.read_text())
    cluster, user = found["clusters"][0]["cluster"], found["users"][0]["user"]
    for holder, name in ((cluster, "certificate-authority"), (user, "client-certificate"), (user, "client-key")):
        if name in holder:
            holder[f"{name}-data"] = base64.b64encode(Path(holder.pop(name)).read_bytes()).decode()
    return yaml.safe_dump(found)


def _condition(found: Mapping[str, Any], kind: str) -> bool:
    conditions = found.get("status", {}).get("conditions") or []
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


@contextmanager
def control_plane() -> Iterator[Kube]:
    with folder("ops-kube-") as directory:
        made = Kube(directory)
        try:
            made.start()
            yield made
        finally:
            made.stop()
