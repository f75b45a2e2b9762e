"""What Kubernetes refuses, as errors of ours: the status and its reason, with the rule, the budget or the quota that it names.

403 alone has three meanings, and 429 two; the client's own exceptions, those of TLS and of cut connections are named here as well.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, cast

from ops_platform.clients.kubernetes_objects import Json, Resource, Right
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    NotThereError,
    OpsError,
    RefusedError,
    UnreachableError,
)

_LONGEST_PAUSE = 15.0  # seconds of one Retry-After that are honoured


class QuotaError(RefusedError):
    """A ResourceQuota has no room for it."""


class DisruptionBudgetError(ConflictError):
    """An eviction would leave fewer pods than a PodDisruptionBudget asks for. `budget`: its name, where the server said it."""

    def __init__(self, what: str, *, budget: str | None, where: str) -> None:
        super().__init__(what, where=where, remedy="wait until more of its pods are healthy, or look why they are not")
        self.budget = budget


class GoneError(OpsError):
    """Status 410: the version to go on from is too old."""


class BusyError(UnreachableError):
    """Status 429: the server did nothing and asks to come back after `pause` seconds."""

    def __init__(self, what: str, *, where: str, pause: float) -> None:
        super().__init__(what, where=where, remedy="look at the API server's load and its priority levels")
        self.pause = pause


@dataclass(frozen=True)
class Asked:
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


# From an answer to its error

_FORBIDDEN = re.compile(
    r'(?:User "(?P<user>[^"]*)" )?cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_BUDGET = re.compile(r"[Tt]he disruption budget (\S+) ")


def is_transport(error: Exception) -> bool:
    import urllib3.exceptions

    return isinstance(error, urllib3.exceptions.HTTPError | OSError)


def translate(error: Exception, asked: Asked) -> OpsError:
    from kubernetes.client.exceptions import ApiException

    if isinstance(error, OpsError):
        return error
    if isinstance(error, AttributeError) and isinstance(error.__context__, ApiException):
        error = error.__context__  # the client stumbles over the missing body of what it raises when TLS fails
    if isinstance(error, ApiException):
        return _of_status(error, asked) if error.status else _of_tls(str(error.reason), asked)
    if is_transport(error):
        return UnreachableError(
            f"the API server does not answer: {type(error).__name__}",
            where=asked.where,
            remedy="check address, network and whether it runs",
        )
    return OpsError(f"{type(error).__name__} in the client", where=asked.where)


def _of_tls(reason: str, asked: Asked) -> OpsError:
    return UnreachableError(
        f"TLS with the API server failed: {reason.splitlines()[-1][:200] if reason else 'no reason given'}",
        where=asked.where,
        remedy="check certificate-authority-data of the kubeconfig, and the server's name",
    )


def _of_status(error: Any, asked: Asked) -> OpsError:  # noqa: PLR0911 - a table of cases
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
        return GoneError(text, where=where)
    causes = (status.get("details") or {}).get("causes") or []
    budget = next((cause for cause in causes if cause.get("reason") == "DisruptionBudget"), None)
    if budget or (asked.sub == "eviction" and "PodDisruptionBudget" in text):
        named = _BUDGET.search(str((budget or {}).get("message", "")))
        detail = (budget or {}).get("message")
        return DisruptionBudgetError(
            f"{text} {detail}" if detail else text, budget=named[1] if named else None, where=where
        )
    if code == 429:
        return BusyError(f"the API server is overloaded: {text}", where=where, pause=_pause(error.headers))
    if code >= 500:
        return UnreachableError(
            f"the API server cannot answer ({code}): {text}", where=where, remedy="look at the API server's own log"
        )
    return RefusedError(f"the API server refuses ({code}): {text}", where=where)


def _forbidden(text: str, asked: Asked) -> OpsError:
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


def _not_there(status: Json, asked: Asked) -> OpsError:
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
