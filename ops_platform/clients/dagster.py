"""Dagster's GraphQL API, as its web server speaks it (https://docs.dagster.io/api/graphql, Dagster 1.13)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ops_platform.clients.http import BadAnswerError, HttpApi
from ops_platform.errors import AccessDeniedError, NotThereError, OpsError

_MISSING = ("RunNotFoundError", "PipelineNotFoundError", "SensorNotFoundError")


def ask(api: HttpApi, query: str, variables: Mapping[str, Any], field: str, good: str) -> Any:
    """The value of one field, of the type that means success. Raises the OpsError that fits for every other."""
    answer = api.request("POST", "/graphql", body={"query": query, "variables": variables}, good=(200, 400))
    whole = answer.json()
    try:
        if errors := whole.get("errors"):
            raise OpsError(f"Dagster refuses the query: {errors[0]['message'][:300]}", where=api.host)
        found = whole["data"][field]
        kind = found["__typename"]
    except (AttributeError, KeyError, TypeError, IndexError):
        raise BadAnswerError("the answer is not one of Dagster's GraphQL API", where=api.host) from None
    if kind == good:
        return found
    said = "; ".join(error["message"] for error in found.get("errors", [])) or found.get("message") or kind
    # The message of an error in Python goes on with a stack that helps nobody here.
    said = f"{kind}: {said.strip().splitlines()[0][:300]}" if said != kind else kind
    if kind == "UnauthorizedError":
        raise AccessDeniedError(said, where=api.host, remedy="the web server must not run with --read-only")
    if kind in _MISSING:
        raise NotThereError(said, where=api.host)
    raise OpsError(f"Dagster refuses: {said}", where=api.host)
