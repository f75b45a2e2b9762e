"""Kubernetes: every object that somebody made, cleaned of what the server fills in, created again in an empty API server and compared.

What a controller makes of other objects (pods, replica sets, endpoints) is not kept: it makes them again. Data in volumes is no object.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ops_platform.clients.kubernetes_objects import Resource
from ops_platform.errors import CorruptionError, CouldNotVerifyError
from ops_platform.stores.kind import FAILED, PASSED, Check, Dumped, Finding, Parts, Saved
from ops_platform.stores.servers import find_program, handed_out, need_own_network, socket_path

if TYPE_CHECKING:
    import requests

    from ops_platform.clients.access import Access
    from ops_platform.inventory.systems import KubernetesSystem, StoreTarget

Json = dict[str, Any]
# Made by controllers of what is kept, or true of the moment alone.
_LEFT_OUT = frozenset(
    ("Event", "Endpoints", "EndpointSlice", "Lease", "Node", "Pod", "ControllerRevision", "CSINode", "CSIStorageCapacity",
     "VolumeAttachment", "ReplicaSet", "CertificateSigningRequest", "IPAddress", "StorageVersion")
)  # fmt: skip
# Those come first, in this order, because others need them; webhooks come last, because they would rule on the rest.
_FIRST = ("CustomResourceDefinition", "Namespace", "PriorityClass", "StorageClass", "ServiceAccount", "Secret", "ConfigMap",
          "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "PersistentVolume", "PersistentVolumeClaim", "Service")  # fmt: skip
_LAST = ("APIService", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "MutatingWebhookConfiguration",
         "ValidatingWebhookConfiguration")  # fmt: skip
_FILLED_IN = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "selfLink", "ownerReferences",
              "deletionTimestamp", "deletionGracePeriodSeconds")  # fmt: skip
_NOTED = (
    "deployment.kubernetes.io/revision",
    "kubectl.kubernetes.io/last-applied-configuration",
    "deprecated.daemonset.template.generation",
)
_NOTED_BY = ("pv.kubernetes.io/", "volume.kubernetes.io/", "volume.beta.kubernetes.io/", "batch.kubernetes.io/")
_PORT = 6443


def open_store(access: Access, target: StoreTarget) -> KubernetesStore:
    return KubernetesStore(access, target, cast("KubernetesSystem", target.system))


@dataclass(frozen=True)
class KubernetesStore:
    """`stores.kind.Kind` over one cluster."""

    access: Access
    target: StoreTarget
    system: KubernetesSystem

    # Dump

    def look(self) -> str:
        cluster = self.access.kubernetes(self.system)
        return f"Kubernetes {cluster.version()}, {len(list(cluster.resources()))} kinds of objects"

    def dump(self, parts: Parts) -> Dumped:
        cluster = self.access.kubernetes(self.system)
        counted: dict[str, int] = {}
        with parts.part("objects") as write:
            for resource in ordered(cluster.resources()):
                kept = 0
                for found in cluster.list(resource):
                    if self._is_kept(resource, found):
                        write(_line(resource, clean(resource.kind, found)))
                        kept += 1
                if kept:
                    counted[_named(resource)] = kept
        return Dumped(source=cluster.name, server=f"Kubernetes {cluster.version()}", facts={"counts": counted})

    def _is_kept(self, resource: Resource, found: Json) -> bool:
        namespace = found["metadata"].get("namespace")
        name = found["metadata"]["name"] if resource.kind == "Namespace" else namespace
        wanted = self.system.namespaces
        if name is not None and wanted and not any(fnmatchcase(name, pattern) for pattern in wanted):
            return False
        return not is_made_by_the_server(resource.kind, found)

    # Level 1

    def files(self, saved: Saved) -> Iterator[Check]:
        def ask() -> Finding:
            counted: dict[str, int] = {}
            for resource, _ in read_objects(saved.part("objects")):
                counted[_named(resource)] = counted.get(_named(resource), 0) + 1
            same = counted == saved.facts["counts"]
            return Finding(PASSED if same else FAILED, f"{sum(counted.values())} objects of {len(counted)} kinds")

        yield Check("objects", "Every object can be read", "JSON, counted by kind", ask)

    # Level 2

    def need_programs(self) -> None:
        need_own_network("what is restored there could reach the world")
        self._programs()

    def _programs(self) -> tuple[str, str]:
        programs = self.target.sandbox.programs
        return find_program("etcd", programs, "etcd"), find_program("kube-apiserver", programs, "kube-apiserver")

    @contextmanager
    def restore(self, saved: Saved, home: Path) -> Generator[RestoredKubernetes]:
        etcd, apiserver = self._programs()
        place = home / "kubernetes"
        place.mkdir(mode=0o700)
        token, listening = secrets.token_hex(24), socket_path(place, "s")
        commands = [_etcd(etcd, place), _apiserver(apiserver, place, token)]
        api = _Api(listening, token)
        server = handed_out(
            "kube-apiserver", commands, place, listening, api.ready, port=_PORT, tls=True, clock=self.access.clock
        )
        try:
            with server:
                failed = self._create_all(api, saved, server.wait)
                yield RestoredKubernetes(saved, api, failed, f"Kubernetes {api.get('/version')[1].get('gitVersion')}")
        finally:
            api.close()

    def _create_all(self, api: _Api, saved: Saved, wait: Callable[[Callable[[], bool], str], None]) -> dict[str, str]:
        """What it refused, and why."""
        failed: dict[str, str] = {}
        definitions: list[str] = []
        waited = False
        for resource, found in read_objects(saved.part("objects")):
            if resource.kind != "CustomResourceDefinition" and not waited:
                wait(lambda: all(api.is_established(path) for path in definitions), "serve the custom resources")
                waited = True
            status, answer = api.post(resource.path(found["metadata"].get("namespace")), found)
            path = resource.path(found["metadata"].get("namespace"), found["metadata"]["name"])
            if status == 409:
                status, answer = api.replace(path, found)  # the server made one of that name itself
            if status >= 300:
                failed[_object(resource, found)] = f"{status} {str(answer.get('message', ''))[:200]}"
            elif resource.kind == "CustomResourceDefinition":
                definitions.append(path)
        return failed


@dataclass(frozen=True)
class RestoredKubernetes:
    saved: Saved
    api: _Api
    failed: Mapping[str, str]
    server: str

    def checks(self) -> Iterator[Check]:
        yield Check(
            "created",
            "An empty API server takes every object",
            "POST of each, in the order of re-creation",
            self._created,
        )
        yield Check(
            "compared", "Every object is the source's", "GET of each, cleaned, against what was kept", self._compared
        )

    def _created(self) -> Finding:
        if self.failed:
            some = "; ".join(f"{name}: {why}" for name, why in list(self.failed.items())[:5])
            return Finding(FAILED, f"{len(self.failed)} were refused: {some}")
        return Finding(PASSED, f"{sum(self.saved.facts['counts'].values())} objects")

    def _compared(self) -> Finding:
        wrong: list[str] = []
        compared = 0
        for resource, known in read_objects(self.saved.part("objects")):
            path = resource.path(known["metadata"].get("namespace"), known["metadata"]["name"])
            status, here = self.api.get(path)
            compared += 1
            if status != 200:
                wrong.append(f"{_object(resource, known)}: {status}")
            elif differs := differences(known, clean(resource.kind, here)):
                wrong.append(f"{_object(resource, known)}: {', '.join(differs[:3])}")
        if wrong:
            return Finding(FAILED, f"{len(wrong)} of {compared} differ: {'; '.join(wrong[:10])}")
        return Finding(PASSED, f"{compared} objects are the same")


# Objects


def is_made_by_the_server(kind: str, found: Json) -> bool:
    """What comes back by itself: of a controller, of the server's own start, of an account's token."""
    metadata = found["metadata"]
    if any(owner.get("controller") for owner in metadata.get("ownerReferences", ())):
        return True
    labels, notes = metadata.get("labels") or {}, metadata.get("annotations") or {}
    if labels.get("kubernetes.io/bootstrapping") or "apf.kubernetes.io/autoupdate-spec" in notes:
        return True
    if "kube-aggregator.kubernetes.io/automanaged" in labels or metadata.get("deletionTimestamp"):
        return True
    name, namespace = metadata["name"], metadata.get("namespace")
    return (
        (kind == "ConfigMap" and name == "kube-root-ca.crt")
        or (kind == "ServiceAccount" and name == "default" and not found.get("imagePullSecrets"))
        or (kind == "Secret" and found.get("type") == "kubernetes.io/service-account-token")
        or (kind == "Namespace" and name in ("default", "kube-system", "kube-public", "kube-node-lease"))
        or (kind == "Service" and namespace == "default" and name == "kubernetes")
        or (kind == "PriorityClass" and name.startswith("system-"))
        or (kind == "ServiceCIDR" and name == "kubernetes")
        or namespace == "kube-node-lease"
        or (namespace == "kube-system" and kind in ("ServiceAccount", "ConfigMap") and "extension-apiserver" in name)
    )


def clean(kind: str, found: Json) -> Json:
    """As somebody would have written it: without status, identity, and what the server chose."""
    out = {key: value for key, value in found.items() if key != "status"}
    metadata = {key: value for key, value in found["metadata"].items() if key not in _FILLED_IN}
    notes = {key: value for key, value in (metadata.pop("annotations", None) or {}).items() if not _is_noted(key)}
    if notes:
        metadata["annotations"] = notes
    metadata.pop("finalizers", None)  # a controller that is not there would never take them off
    if kind == "Namespace":
        metadata["labels"] = {
            k: v for k, v in (metadata.get("labels") or {}).items() if k != "kubernetes.io/metadata.name"
        }
        out.pop("spec", None)
    out["metadata"] = metadata
    spec = out.get("spec")
    if isinstance(spec, dict):
        out["spec"] = _clean_spec(kind, cast("Json", spec))
    if kind == "ServiceAccount":
        out.pop("secrets", None)
    if kind == "CustomResourceDefinition":
        out["spec"].setdefault("conversion", {"strategy": "None"})
    return out


def _clean_spec(kind: str, spec: Json) -> Json:
    spec = dict(spec)
    if kind == "Service" and spec.get("clusterIP") != "None":
        for name in ("clusterIP", "clusterIPs", "healthCheckNodePort"):
            spec.pop(name, None)
        spec["ports"] = [{k: v for k, v in port.items() if k != "nodePort"} for port in spec.get("ports", ())]
    if kind == "PersistentVolume" and isinstance(spec.get("claimRef"), dict):
        spec["claimRef"] = {k: v for k, v in spec["claimRef"].items() if k not in ("uid", "resourceVersion")}
    if kind == "Job" and not spec.get("manualSelector"):
        spec.pop("selector", None)
        template = json.loads(json.dumps(spec.get("template", {})))
        labels = template.get("metadata", {}).get("labels", {})
        for name in (
            "controller-uid",
            "job-name",
            "batch.kubernetes.io/controller-uid",
            "batch.kubernetes.io/job-name",
        ):
            labels.pop(name, None)
        spec["template"] = template
    return spec


def _is_noted(name: str) -> bool:
    return name in _NOTED or name.startswith(_NOTED_BY)


def ordered(resources: Iterable[Resource]) -> list[Resource]:
    """In the order of re-creation, without what is left out; of a kind that two groups have the one that others refer to."""

    def place(resource: Resource) -> tuple[int, int, str, str]:
        if resource.kind in _FIRST:
            return 0, _FIRST.index(resource.kind), resource.group, resource.plural
        if resource.kind in _LAST:
            return 2, _LAST.index(resource.kind), resource.group, resource.plural
        return 1, 0, resource.group, resource.plural

    return sorted((one for one in resources if one.kind not in _LEFT_OUT), key=place)


def differences(known: Any, here: Any, at: str = "") -> list[str]:
    """The paths at which two objects are not the same. No value is shown: it may be a secret's."""
    if isinstance(known, dict) and isinstance(here, dict):
        left, right = cast("Json", known), cast("Json", here)
        return [
            path
            for key in sorted({*left, *right})
            for path in differences(left.get(key), right.get(key), f"{at}.{key}" if at else key)
        ]
    if (
        isinstance(known, list)
        and isinstance(here, list)
        and len(cast("list[Any]", known)) == len(cast("list[Any]", here))
    ):
        pairs = zip(cast("list[Any]", known), cast("list[Any]", here), strict=True)
        return [path for number, (a, b) in enumerate(pairs) for path in differences(a, b, f"{at}[{number}]")]
    same = known == here or (known in (None, {}, []) and here in (None, {}, []))
    return [] if same else [at]


def _line(resource: Resource, found: Json) -> bytes:
    found = {**found, "apiVersion": f"{resource.group}/{resource.version}".lstrip("/"), "kind": resource.kind}
    body = {"resource": asdict(resource), "object": found}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def read_objects(file: Path) -> Iterator[tuple[Resource, Json]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                body = json.loads(line)
                yield Resource(**body["resource"]), body["object"]
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptionError(f"line {number} of the objects cannot be read: {type(error).__name__}") from None


def _named(resource: Resource) -> str:
    return f"{resource.plural}.{resource.group}" if resource.group else resource.plural


def _object(resource: Resource, found: Json) -> str:
    namespace = found["metadata"].get("namespace")
    return f"{_named(resource)} {f'{namespace}/' if namespace else ''}{found['metadata']['name']}"


# The sandbox


def _etcd(program: str, place: Path) -> Sequence[str | Path]:
    return [
        program, f"--data-dir={place / 'etcd'}", "--unsafe-no-fsync=true", "--log-level=error",
        "--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=default=http://127.0.0.1:2380",
    ]  # fmt: skip


def _apiserver(program: str, place: Path, token: str) -> Sequence[str | Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    tokens, signing = place / "tokens", place / "signing.pem"
    for file in (tokens, signing):
        file.touch(mode=0o600)
    tokens.write_text(f"{token},sandbox,1,system:masters\n")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    signing.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    # Nothing but the server itself is to have a say on what is created: no webhook, no default, no quota.
    rulers = ("MutatingAdmissionWebhook", "ValidatingAdmissionWebhook", "ServiceAccount", "ResourceQuota", "LimitRanger",
              "DefaultStorageClass", "DefaultTolerationSeconds", "ValidatingAdmissionPolicy")  # fmt: skip
    return [
        program, "--etcd-servers=http://127.0.0.1:2379", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
        f"--secure-port={_PORT}", f"--cert-dir={place / 'certificates'}", f"--token-auth-file={tokens}",
        "--endpoint-reconciler-type=none", "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16",
        "--service-account-issuer=https://sandbox", f"--service-account-key-file={signing}",
        f"--service-account-signing-key-file={signing}", f"--disable-admission-plugins={','.join(rulers)}",
    ]  # fmt: skip


class _Api:
    """The API server of the sandbox, over its socket."""

    def __init__(self, listening: Path, token: str) -> None:
        from ops_platform.clients.unix_http import unix_session

        self._session: requests.Session = unix_session(listening, timeout=120)
        self._session.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        self._session.close()

    def ready(self) -> bool:
        import requests

        try:
            return self._session.get("http://localhost/readyz").status_code == 200
        except (requests.RequestException, OSError):
            return False

    def get(self, path: str) -> tuple[int, Json]:
        return self._ask("GET", path)

    def post(self, path: str, body: Json) -> tuple[int, Json]:
        return self._ask("POST", path, body)

    def replace(self, path: str, body: Json) -> tuple[int, Json]:
        _, there = self.get(path)
        version = {"resourceVersion": there.get("metadata", {}).get("resourceVersion")}
        return self._ask("PUT", path, {**body, "metadata": {**body["metadata"], **version}})

    def is_established(self, path: str) -> bool:
        conditions = self.get(path)[1].get("status", {}).get("conditions") or []
        return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)

    def _ask(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        import requests

        try:
            answer = self._session.request(method, f"http://localhost{path}", json=body)
            if "json" not in answer.headers.get("content-type", ""):
                return answer.status_code, {
                    "message": answer.text
                }  # of a kind that it does not know it says so in text
            return answer.status_code, answer.json()
        except (requests.RequestException, OSError) as error:
            raise CouldNotVerifyError(f"the sandbox's API server does not answer: {type(error).__name__}") from None
