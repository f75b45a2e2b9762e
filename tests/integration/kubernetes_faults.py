"""What the tests of Kubernetes share: kubeconfigs, and a proxy before the API server that says what a bad day says."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from typing import Any

from tests.integration import http_faults as faults
from tests.kube_rig import Kube


def config(server: str, *, cluster: Mapping[str, Any] | None = None, **user: Any) -> dict[str, Any]:
    """A kubeconfig."""
    return {
        "clusters": [{"name": "c", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "here",
    }


def as_admin(kube: Kube) -> ssl.SSLContext:
    """How a proxy speaks to the API server."""
    context = ssl.create_default_context(cafile=str(kube.authority.ca))
    context.load_cert_chain(*(str(kube.directory / f"admin.{end}") for end in ("pem", "key")))
    return context


def refusal(code: int, message: str = "said the test", **headers: str) -> faults.Fault:
    """A Status instead of an answer."""
    body = {"kind": "Status", "status": "Failure", "message": message, "code": code}
    return faults.reply(code, json.dumps(body).encode(), content_type="application/json", **headers)
