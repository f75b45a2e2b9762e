"""Kubernetes' API over the official client: objects as the JSON that the server speaks, errors as ours, writes that cannot be lost.

Objects are plain mappings and not the client's models: a field that a newer server knows passes through unharmed, and what stands in
a plan is what the server said. Every write carries the `resourceVersion` of the read before it where an object is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, cast

from ops_platform.clients.kubernetes_errors import Asked, BusyError, GoneError, is_transport, translate
from ops_platform.clients.kubernetes_login import api_client, in_cluster, read_kubeconfig
from ops_platform.clients.kubernetes_objects import PODS, Json, Resource
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, NotThereError, OpsError, UnreachableError
from ops_platform.inventory.systems import KubernetesSystem
from ops_platform.inventory.values import Secret, SecretRef

Patch = Literal["merge", "json"]

FIELD_MANAGER = "ops-platform"
_TRIES = 4
_PAGE = 500
_PATIENCE = 60.0  # seconds of all pauses of one request that are honoured
_LONGEST_WATCH = 10.0  # then it is looked again: not everything that counts is watched
_PATCH_TYPES = {"merge": "application/merge-patch+json", "json": "application/json-patch+json"}


def open_kubernetes(
    system: KubernetesSystem, resolve: Callable[[SecretRef], Secret], *, clock: Clock = SYSTEM_CLOCK
) -> Kubernetes:
    """Raises NotThereError and UsageError where there is no usable login; no request is made yet."""
    reference = system.kubeconfig

    def make() -> Any:
        if reference is None:
            return in_cluster(system.id)
        return api_client(read_kubeconfig(resolve(reference), system.context, f"{system.id} kubeconfig {reference}"))

    return Kubernetes(make, system.id, timeout=system.timeout.total_seconds(), clock=clock)


@dataclass(frozen=True)
class _Address(Resource):
    """What is asked of the server itself, by its path."""

    def __init__(self, path: str) -> None:
        super().__init__("", "", path.rpartition("/")[2], path)

    def path(self, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
        return self.kind


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
            except GoneError:
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
        asked = Asked("watch", resource, namespace, None, None, self.name)
        try:
            with closing(self._send(asked, "GET", whole, None, None, read=seconds + self._timeout)) as answer:
                for line in _lines(answer):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        return None
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        return version
        except GoneError:
            return None
        except BusyError as busy:
            self._clock.sleep(busy.pause)
        except (UnreachableError, ValueError, OSError):
            self._clock.sleep(0.5)  # cut: the caller looks, and goes on from the last version
        except Exception as error:  # what urllib3 raises in the middle of a stream
            if not is_transport(error):
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
        asked = Asked(verb, resource, namespace, name, sub, self.name)
        waited, failures = 0.0, 0
        while True:
            try:
                with closing(self._send(asked, method, query or [], body, content, read=self._timeout)) as answer:
                    return _parsed(answer, asked)
            except BusyError as busy:
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
        self, asked: Asked, method: str, query: list[tuple[str, Any]], body: Any, content: str | None, *, read: float
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
        except Exception as error:  # noqa: BLE001 - the client and urllib3 raise many kinds; `translate` names them
            raise translate(error, asked) from None


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


def _parsed(answer: Any, asked: Asked) -> Json:
    try:
        found = json.loads(answer.data)
    except ValueError:
        found = None
    except Exception as error:  # noqa: BLE001 - the body broke off
        raise translate(error, asked) from None
    if not isinstance(found, dict):
        raise UnreachableError(
            "the answer is no object in JSON", where=asked.where, remedy="check whether the address is the API server's"
        )
    return cast("Json", found)
