"""Kubernetes' API over the official client: objects as the JSON that the server speaks, errors as ours, writes that cannot be lost.

Objects are plain mappings and not the client's models: a field that a newer server knows passes through unharmed, and what stands in
a plan is what the server said. Every write carries the `resourceVersion` of the read before it where an object is changed.

The official client's own reader of kubeconfig files writes certificates and keys to /tmp, where a killed process leaves them; here they
go from memory into the TLS context. A kubeconfig that starts a program (`exec`) or does not check the server is refused.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import logging
import os
import re
import ssl
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast
from urllib.parse import quote, urlsplit

from ops_platform.clock import SYSTEM_CLOCK, Clock
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

Json = dict[str, Any]
Patch = Literal["merge", "json"]

FIELD_MANAGER = "ops-platform"
_TRIES = 4
_PAGE = 500
_LONGEST_PAUSE = 15.0  # seconds of one Retry-After that are honoured …
_PATIENCE = 60.0  # … and of all pauses of one request
_LONGEST_WATCH = 10.0  # then it is looked again: not everything that counts is watched
_PATCH_TYPES = {"merge": "application/merge-patch+json", "json": "application/json-patch+json"}


# What there is


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


@dataclass(frozen=True)
class _Address(Resource):
    """What is asked of the server itself, by its path."""

    def __init__(self, path: str) -> None:
        super().__init__("", "", path.rpartition("/")[2], path)

    def path(self, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
        return self.kind


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


class QuotaError(RefusedError):
    """A ResourceQuota has no room for it."""


class DisruptionBudgetError(ConflictError):
    """An eviction would leave fewer pods than a PodDisruptionBudget asks for. `budget`: its name, where the server said it."""

    def __init__(self, what: str, *, budget: str | None, where: str) -> None:
        super().__init__(what, where=where, remedy="wait until more of its pods are healthy, or look why they are not")
        self.budget = budget


class _GoneError(OpsError):
    """Status 410: the version to go on from is too old."""


class _BusyError(UnreachableError):
    """Status 429: the server did nothing and asks to come back after `pause` seconds."""

    def __init__(self, what: str, *, where: str, pause: float) -> None:
        super().__init__(what, where=where, remedy="look at the API server's load and its priority levels")
        self.pause = pause


@dataclass(frozen=True)
class _Asked:
    """What one request wanted, for the text of its error."""

    verb: str
    resource: Resource
    namespace: str | None
    name: str | None
    sub: str | None
    place: str

    @property
    def thing(self) -> str:
        plural = f"{self.resource.plural}/{self.sub}" if self.sub else self.resource.plural
        name = f" {self.name}" if self.name else ""
        return f"{plural}{name} in {self.namespace}" if self.namespace else f"{plural}{name}"

    @property
    def where(self) -> str:
        return f"{self.place}: {self.verb} {self.thing}"


# The session


class Kubernetes:
    """One cluster's API. Safe for threads.

    Every method raises AccessDeniedError (401, 403: with the rule that is missing), NotThereError (404), ConflictError (409: it is
    not any more what was read), QuotaError, RefusedError (admission, 422) and UnreachableError (5xx, cut connections, timeouts).
    Reads are asked again when no answer comes. So is any request that the server put off (429) for as long as its Retry-After says,
    within a minute. A write without an answer may have been made: `change` finds out, everything else raises.
    """

    def __init__(
        self, make: Callable[[], Any], name: str, *, timeout: float = 15.0, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self.name = name
        self._make = make
        self._timeout = timeout
        self._clock = clock
        self._api: Any = make()

    def again(self) -> Kubernetes:
        """The same cluster over a connection and a login of its own, for whoever checks what this one wrote. The caller closes it."""
        return Kubernetes(self._make, self.name, timeout=self._timeout, clock=self._clock)

    def close(self) -> None:
        self._api.rest_client.pool_manager.clear()
        self._api.close()

    # Reading

    def get(self, resource: Resource, name: str, namespace: str | None = None, sub: str | None = None) -> Json:
        return self._call("get", "GET", resource, namespace, name, sub)

    def find(self, resource: Resource, name: str, namespace: str | None = None) -> Json | None:
        """None where there is no such object, or no such kind of object."""
        try:
            return self.get(resource, name, namespace)
        except NotThereError:
            return None

    def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str | None = None, fields: str | None = None
    ) -> list[Json]:
        """All of them, page by page; from the beginning where the server has forgotten how it went on."""
        for _ in range(_TRIES):
            try:
                return [item for page in self._pages(resource, namespace, labels, fields) for item in page["items"]]
            except _GoneError:
                continue
        raise UnreachableError(
            "the list changed faster than it could be read", where=f"{self.name}: list {resource.plural}"
        )

    def _pages(
        self, resource: Resource, namespace: str | None, labels: str | None, fields: str | None
    ) -> Iterator[Json]:
        query = _query(limit=_PAGE, labelSelector=labels, fieldSelector=fields)
        token = ""
        while True:
            more = [("continue", token)] if token else []
            page = self._call("list", "GET", resource, namespace, query=[*query, *more])
            yield page
            token = page["metadata"].get("continue") or ""
            if not token:
                return

    def resources(self) -> list[Resource]:
        """Every kind of object that can be listed and created, each in the version that the server prefers.

        Raises UnreachableError where a group does not say what it has, such as that of an aggregated server that is away.
        """
        found = self._resources_of("", "v1")
        for group in self._call("get", "GET", _Address("/apis"))["groups"]:
            found += self._resources_of(*group["preferredVersion"]["groupVersion"].split("/"))
        return found

    def _resources_of(self, group: str, version: str) -> list[Resource]:
        listed = self._call("get", "GET", _Address(f"/apis/{group}/{version}" if group else f"/api/{version}"))
        return [
            Resource(group, version, one["name"], one["kind"], one["namespaced"])
            for one in listed["resources"]
            if "/" not in one["name"] and {"list", "create"} <= set(one["verbs"])
        ]

    def version(self) -> str:
        return str(self._call("get", "GET", _Address("/version"))["gitVersion"])

    def count(self, resource: Resource, namespace: str | None = None) -> int:
        """How many there are, at the price of one of them."""
        page = self._call("list", "GET", resource, namespace, query=_query(limit=1))
        return len(page["items"]) + int(page["metadata"].get("remainingItemCount") or 0)

    # Writing

    def create(
        self,
        resource: Resource,
        body: Json,
        namespace: str | None = None,
        name: str | None = None,
        sub: str | None = None,
    ) -> Json:
        """`name` and `sub` for what is created below an object, such as an eviction."""
        return self._call(
            "create", "POST", resource, namespace, name, sub, query=_query(fieldManager=FIELD_MANAGER), body=body
        )

    def patch(
        self,
        resource: Resource,
        name: str,
        body: Json | list[Json],
        namespace: str | None = None,
        sub: str | None = None,
        *,
        kind: Patch = "merge",
    ) -> Json:
        return self._call(
            "patch", "PATCH", resource, namespace, name, sub,
            query=_query(fieldManager=FIELD_MANAGER), body=body, content=_PATCH_TYPES[kind],
        )  # fmt: skip

    def change(
        self,
        resource: Resource,
        name: str,
        decide: Callable[[Json], Json | list[Json] | None],
        namespace: str | None = None,
        sub: str | None = None,
    ) -> bool:
        """Read, let `decide` say the patch, and write it if nobody was faster; else read and decide again.

        A mapping is a merge patch, a list a JSON patch.
        `decide` gives None where nothing is to be done any more, and raises where the object is not what was meant. So an answer
        that got lost does no harm: the next look finds what was written. False: nothing had to be written. `sub`: the subresource
        that takes the patch.
        """
        last: OpsError = ConflictError("it changes all the time", where=f"{self.name}: {resource.kind} {name}")
        for attempt in range(_TRIES):
            found = self.get(resource, name, namespace)
            patch = decide(found)
            if patch is None:
                return attempt > 0
            body, kind = _only_if(found["metadata"]["resourceVersion"], patch)
            try:
                self.patch(resource, name, body, namespace, sub, kind=kind)
            except (ConflictError, UnreachableError) as error:
                last = error
                self._clock.sleep(0.1 * 2**attempt)
            else:
                return True
        raise last

    def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        uid: str,
        version: str | None = None,
        grace: int | None = None,
    ) -> None:
        """Delete exactly the object that was read: another of the same name (`uid`), or a newer state (`version`), is a conflict."""
        must = _given(uid=uid, resourceVersion=version)
        options = {
            "kind": "DeleteOptions", "apiVersion": "v1", "preconditions": must, "propagationPolicy": "Background",
            **_given(gracePeriodSeconds=grace),
        }  # fmt: skip
        self._call("delete", "DELETE", resource, namespace, name, body=options)

    def evict(self, name: str, namespace: str, *, uid: str) -> None:
        """Ask for a pod's eviction. Raises DisruptionBudgetError where its budget forbids it now."""
        eviction = {
            "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace},
            "deleteOptions": {"preconditions": {"uid": uid}},
        }  # fmt: skip
        self.create(PODS, eviction, namespace, name, "eviction")

    # Waiting

    def wait(
        self,
        look: Callable[[], bool],
        resource: Resource,
        namespace: str | None = None,
        *,
        labels: str | None = None,
        fields: str | None = None,
        seconds: float,
    ) -> bool:
        """Whether `look` came true in time: it looks now and again after each change of what is watched.

        A watch only wakes: what counts is what `look` reads. So a watch that was cut, or whose version got too old, is taken up
        again without anything being missed.
        """
        deadline = self._clock.monotonic() + seconds
        query = _query(labelSelector=labels, fieldSelector=fields)
        version: str | None = None
        while True:
            if version is None:
                page = self._call("list", "GET", resource, namespace, query=[*query, ("limit", 1)])
                version = str(page["metadata"]["resourceVersion"])
            if look():
                return True
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return False
            version = self._next_change(resource, namespace, query, version, left)

    def _next_change(
        self, resource: Resource, namespace: str | None, query: list[tuple[str, Any]], version: str, left: float
    ) -> str | None:
        """The version after the next change or after a while; None where the watch has to begin anew."""
        seconds = max(1, int(min(left, _LONGEST_WATCH)))
        whole = [
            *query, ("watch", "true"), ("allowWatchBookmarks", "true"), ("resourceVersion", version), ("timeoutSeconds", seconds)
        ]  # fmt: skip
        asked = _Asked("watch", resource, namespace, None, None, self.name)
        try:
            with closing(self._send(asked, "GET", whole, None, None, read=seconds + self._timeout)) as answer:
                for line in _lines(answer):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        return None
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        return version
        except _GoneError:
            return None
        except _BusyError as busy:
            self._clock.sleep(busy.pause)
        except (UnreachableError, ValueError, OSError):
            self._clock.sleep(0.5)  # cut: the caller looks, and goes on from the last version
        except Exception as error:  # what urllib3 raises in the middle of a stream
            if not _is_transport(error):
                raise
            self._clock.sleep(0.5)
        return version

    # Requests

    def _call(
        self,
        verb: str,
        method: str,
        resource: Resource,
        namespace: str | None = None,
        name: str | None = None,
        sub: str | None = None,
        *,
        query: list[tuple[str, Any]] | None = None,
        body: Any = None,
        content: str | None = None,
    ) -> Json:
        asked = _Asked(verb, resource, namespace, name, sub, self.name)
        waited, failures = 0.0, 0
        while True:
            try:
                with closing(self._send(asked, method, query or [], body, content, read=self._timeout)) as answer:
                    return _parsed(answer, asked)
            except _BusyError as busy:
                waited += busy.pause
                if waited > _PATIENCE:
                    raise
                self._clock.sleep(busy.pause)
            except UnreachableError:
                failures += 1
                if method != "GET" or failures == _TRIES:
                    raise
                self._clock.sleep(0.2 * 2**failures)

    def _send(
        self, asked: _Asked, method: str, query: list[tuple[str, Any]], body: Any, content: str | None, *, read: float
    ) -> Any:
        """One request; the answer's head has come, and its status is good."""
        path = asked.resource.path(asked.namespace, asked.name, asked.sub)
        headers = {"Accept": "application/json", **_given(**{"Content-Type": content})}
        try:
            # Without preloading: the client would write what it loads, Secrets too, into the debug log.
            return self._api.call_api(
                path, method, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"],
                _preload_content=False, _request_timeout=(self._timeout, read),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the client and urllib3 raise many kinds; `_translate` names them
            raise _translate(error, asked) from None


def _only_if(version: str, patch: Json | list[Json]) -> tuple[Json | list[Json], Patch]:
    """The same patch, for the state that was read alone: any other is a conflict."""
    if isinstance(patch, list):
        return [*patch, {"op": "replace", "path": "/metadata/resourceVersion", "value": version}], "json"
    return {**patch, "metadata": {**patch.get("metadata", {}), "resourceVersion": version}}, "merge"


def _given(**values: Any) -> Json:
    return {name: value for name, value in values.items() if value is not None}


def _query(**values: Any) -> list[tuple[str, Any]]:
    return list(_given(**values).items())


def _lines(answer: Any) -> Iterator[bytes]:
    """Lines of a stream as they come, whether or not somebody on the way has taken its chunks apart."""
    rest = b""
    while piece := answer.read1(1 << 16):
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line for line in whole if line)


def _parsed(answer: Any, asked: _Asked) -> Json:
    try:
        found = json.loads(answer.data)
    except ValueError:
        found = None
    except Exception as error:  # noqa: BLE001 - the body broke off
        raise _translate(error, asked) from None
    if not isinstance(found, dict):
        raise UnreachableError(
            "the answer is no object in JSON", where=asked.where, remedy="check whether the address is the API server's"
        )
    return cast("Json", found)


# Errors

_FORBIDDEN = re.compile(
    r'(?:User "(?P<user>[^"]*)" )?cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_BUDGET = re.compile(r"[Tt]he disruption budget (\S+) ")


def _is_transport(error: Exception) -> bool:
    import urllib3.exceptions

    return isinstance(error, urllib3.exceptions.HTTPError | OSError)


def _translate(error: Exception, asked: _Asked) -> OpsError:
    from kubernetes.client.exceptions import ApiException

    if isinstance(error, OpsError):
        return error
    if isinstance(error, AttributeError) and isinstance(error.__context__, ApiException):
        error = error.__context__  # the client stumbles over the missing body of what it raises when TLS fails
    if isinstance(error, ApiException):
        return _of_status(error, asked) if error.status else _of_tls(str(error.reason), asked)
    if _is_transport(error):
        return UnreachableError(
            f"the API server does not answer: {type(error).__name__}",
            where=asked.where,
            remedy="check address, network and whether it runs",
        )
    return OpsError(f"{type(error).__name__} in the client", where=asked.where)


def _of_tls(reason: str, asked: _Asked) -> OpsError:
    return UnreachableError(
        f"TLS with the API server failed: {reason.splitlines()[-1][:200] if reason else 'no reason given'}",
        where=asked.where,
        remedy="check certificate-authority-data of the kubeconfig, and the server's name",
    )


def _of_status(error: Any, asked: _Asked) -> OpsError:  # noqa: PLR0911 - a table of cases
    try:
        said = json.loads(error.body)
    except (TypeError, ValueError):
        said = None
    status: Json = cast("Json", said) if isinstance(said, dict) else {}
    text = " ".join(str(status.get("message") or error.reason or "no reason given").split())[:500]
    code, where = int(error.status), asked.where
    if code == 401:
        return AccessDeniedError(
            "the API server does not know who we are", where=where, remedy="renew the token or client certificate"
        )
    if code == 403:
        return _forbidden(text, asked)
    if code == 404:
        return _not_there(status, asked)
    if code == 409:
        return ConflictError(text, where=where)
    if code == 410:
        return _GoneError(text, where=where)
    causes = (status.get("details") or {}).get("causes") or []
    budget = next((cause for cause in causes if cause.get("reason") == "DisruptionBudget"), None)
    if budget or (asked.sub == "eviction" and "PodDisruptionBudget" in text):
        named = _BUDGET.search(str((budget or {}).get("message", "")))
        detail = (budget or {}).get("message")
        return DisruptionBudgetError(
            f"{text} {detail}" if detail else text, budget=named[1] if named else None, where=where
        )
    if code == 429:
        return _BusyError(f"the API server is overloaded: {text}", where=where, pause=_pause(error.headers))
    if code >= 500:
        return UnreachableError(
            f"the API server cannot answer ({code}): {text}", where=where, remedy="look at the API server's own log"
        )
    return RefusedError(f"the API server refuses ({code}): {text}", where=where)


def _forbidden(text: str, asked: _Asked) -> OpsError:
    """403 has three meanings: RBAC lacks a rule, a quota is used up, admission says no."""
    if found := _FORBIDDEN.search(text):
        namespace = found["namespace"]
        right = Right(found["group"], found["resource"], (found["verb"],), cluster=namespace is None)
        who = found["user"] or "our login"
        place = f"in namespace {namespace}" if namespace else "in the whole cluster"
        return AccessDeniedError(
            f"{who} may not {found['verb']} {found['resource']} {place}",
            where=asked.where,
            remedy=f"give it the rule '{right}' {place}",
        )
    if "exceeded quota" in text:
        return QuotaError(text, where=asked.where, remedy="raise the quota, or free what uses it")
    return RefusedError(f"the API server refuses: {text}", where=asked.where)


def _not_there(status: Json, asked: _Asked) -> OpsError:
    resource = asked.resource
    if status.get("reason") != "NotFound" or not (status.get("details") or {}).get("name"):
        return NotThereError(
            f"the cluster has no {resource.plural} ({resource.group or 'core'}/{resource.version})",
            where=asked.where,
            remedy="install what brings them, or correct the playbook's parameters",
        )
    return NotThereError(f"there is no {resource.kind} {asked.name}", where=asked.where)


def _pause(headers: Any) -> float:
    """Seconds of Retry-After; a second where it says none."""
    given = (headers or {}).get("Retry-After") or ""
    return min(float(given), _LONGEST_PAUSE) if given.isdecimal() else 1.0


# Logging in


@dataclass(frozen=True)
class _Login:
    """What a kubeconfig's context comes to."""

    server: str
    ca: bytes | None
    server_name: str | None
    proxy: str | None
    certificate: bytes | None
    key: bytes | None
    authorization: Callable[[], str] | None


def open_kubernetes(
    system: KubernetesSystem, resolve: Callable[[SecretRef], Secret], *, clock: Clock = SYSTEM_CLOCK
) -> Kubernetes:
    """Raises NotThereError and UsageError where there is no usable login; no request is made yet."""
    reference = system.kubeconfig

    def make() -> Any:
        if reference is None:
            return _in_cluster(system.id)
        return _api(_read_kubeconfig(resolve(reference), system.context, f"{system.id} kubeconfig {reference}"))

    return Kubernetes(make, system.id, timeout=system.timeout.total_seconds(), clock=clock)


def _in_cluster(system_id: str) -> Any:
    """By the pod's service account; its token is read again each minute, as it is rotated."""
    from kubernetes import client, config

    configuration = _configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise NotThereError(
            f"this is no pod of a cluster: {error}",
            where=system_id,
            remedy="name a kubeconfig for the system, or run where a service account is mounted",
        ) from None
    return _named(client.ApiClient(configuration))


def _configuration(server: str | None = None) -> Any:
    """The client's own, which asks nothing twice by itself and leaves the logs of the whole process as they are."""
    from kubernetes import client

    # Its constructor sets the levels of these, and who looks into urllib3's log for secrets would see nothing any more.
    levels = {name: logging.getLogger(name).level for name in ("client", "urllib3")}
    configuration: Any = client.Configuration(host=server)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    configuration.retries = False  # asking again is decided in `Kubernetes`, with its clock
    return configuration


def _api(login: _Login) -> Any:
    from kubernetes import client

    configuration = _configuration(login.server)
    configuration.tls_server_name = login.server_name
    configuration.proxy = login.proxy or configuration.proxy
    if login.authorization:
        read = login.authorization

        def refresh(into: Any) -> None:
            into.api_key["authorization"] = read()

        refresh(configuration)
        configuration.refresh_api_key_hook = refresh
    api = _named(client.ApiClient(configuration))
    if login.server.startswith("https://"):
        api.rest_client.pool_manager.connection_pool_kw["ssl_context"] = _tls(login)
    return api


def _named(api: Any) -> Any:
    from ops_platform import __version__

    api.user_agent = f"{FIELD_MANAGER}/{__version__}"
    return api


def _tls(login: _Login) -> ssl.SSLContext:
    """Always checks the server. The client's key passes through a file without a name, as OpenSSL reads files alone."""
    try:
        context = ssl.create_default_context(cadata=login.ca.decode("ascii") if login.ca else None)
        if login.certificate and login.key:
            with ExitStack() as held:
                certificate, key = (held.enter_context(_nameless(part)) for part in (login.certificate, login.key))
                context.load_cert_chain(f"/dev/fd/{certificate.fileno()}", f"/dev/fd/{key.fileno()}")
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"a certificate or key of the kubeconfig cannot be used: {getattr(error, 'reason', None) or type(error).__name__}",
            where=login.server,
            remedy="check that they are PEM and belong together",
        ) from None
    return context


def _nameless(data: bytes) -> IO[bytes]:
    file = os.fdopen(os.memfd_create("key"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115 - the caller does
    file.write(data)
    file.flush()
    file.seek(0)
    return file


def _read_kubeconfig(content: Secret, context: str | None, where: str) -> _Login:
    """The login of one context. No part of the content ever stands in an error."""
    import yaml

    def wrong(
        what: str, remedy: str = "kubectl config view --minify --flatten --raw writes one that can be used"
    ) -> UsageError:
        return UsageError(what, where=where, remedy=remedy)

    try:
        config = yaml.safe_load(content.reveal())
    except yaml.YAMLError:
        raise wrong("the kubeconfig is no YAML") from None
    if not isinstance(config, dict):
        raise wrong("the kubeconfig is no mapping")

    def named(kind: str, name: Any) -> Mapping[str, Any]:
        entries = config.get(f"{kind}s")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get(kind), dict):
                return entry[kind]
        raise wrong(f"the kubeconfig has no {kind} {name!r}" if name else f"the kubeconfig names no {kind}")

    chosen = named("context", context or config.get("current-context"))
    cluster, user = named("cluster", chosen.get("cluster")), named("user", chosen.get("user"))
    if "exec" in user or "auth-provider" in user:
        raise wrong(
            "the kubeconfig starts a program to log in, which is refused",
            "use a service account's token or a client certificate",
        )
    if cluster.get("insecure-skip-tls-verify"):
        raise wrong("the kubeconfig does not check the server, which is refused", "give certificate-authority-data")
    server = str(cluster.get("server") or "").rstrip("/")
    if not server.startswith("https://") and not _is_loopback(server):
        raise wrong("the kubeconfig's server is no https:// address", "only a loopback address may do without TLS")
    certificate, key = (_bytes_of(user, name, wrong) for name in ("client-certificate", "client-key"))
    if (certificate is None) != (key is None):
        raise wrong("client-certificate and client-key go together")
    return _Login(
        server,
        _bytes_of(cluster, "certificate-authority", wrong),
        cluster.get("tls-server-name"),
        cluster.get("proxy-url"),
        certificate,
        key,
        _authorization(user, wrong),
    )


def _is_loopback(server: str) -> bool:
    parts = urlsplit(server)
    try:
        return parts.scheme == "http" and ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _bytes_of(entry: Mapping[str, Any], name: str, wrong: Callable[..., UsageError]) -> bytes | None:
    """`NAME-data` in base64, or the file that `NAME` names."""
    if data := entry.get(f"{name}-data"):
        try:
            return base64.b64decode(data, validate=True)
        except (TypeError, binascii.Error):
            raise wrong(f"{name}-data of the kubeconfig is no base64") from None
    if not (path := entry.get(name)):
        return None
    file = Path(str(path))
    if not file.is_absolute():
        raise wrong(f"{name} of the kubeconfig is a relative path")
    try:
        return file.read_bytes()
    except OSError as error:
        raise wrong(f"{name} of the kubeconfig cannot be read: {error.strerror}", f"check {file}") from None


def _authorization(user: Mapping[str, Any], wrong: Callable[..., UsageError]) -> Callable[[], str] | None:
    """What the header says; a token's file is read each time, as it is rotated."""
    if token := user.get("token"):
        return lambda: f"Bearer {token}"
    if path := user.get("tokenFile"):

        def read() -> str:
            try:
                return f"Bearer {Path(str(path)).read_text().strip()}"
            except OSError as error:
                raise wrong(f"tokenFile of the kubeconfig cannot be read: {error.strerror}", f"check {path}") from None

        return read
    if "username" in user and "password" in user:
        basic = base64.b64encode(f"{user['username']}:{user['password']}".encode()).decode()
        return lambda: f"Basic {basic}"
    return None
