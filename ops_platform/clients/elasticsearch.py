"""Elasticsearch over its HTTP API: whichever of its nodes answers first, and refusals that name the privilege that is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ops_platform.clients.http import BadAnswerError
from ops_platform.errors import AccessDeniedError, UnreachableError

if TYPE_CHECKING:
    from ops_platform.clients.http import HttpApi

_LARGEST = 256 << 20
_GOOD = (200, 201, 202)  # a snapshot that goes on in the background is accepted


class Elasticsearch:
    """Calls to one cluster."""

    def __init__(self, apis: Sequence[HttpApi]) -> None:
        self._apis = tuple(apis)

    @property
    def where(self) -> str:
        """The address of the first node that the inventory names."""
        return self._apis[0].url

    def ask(
        self, right: str, method: str, path: str, query: Mapping[str, str] | None = None, body: Any = None
    ) -> dict[str, Any]:
        """The JSON object of the answer. `right`: what our role needs for it. Raises as HttpApi does; UnreachableError where no node answers."""
        found = self.ask_any(right, method, path, query, body)
        if not isinstance(found, dict):
            raise BadAnswerError("the answer is no JSON object", where=f"{self._apis[0].host}{path}")
        return found  # pyright: ignore[reportUnknownVariableType] - JSON

    def ask_any(
        self, right: str, method: str, path: str, query: Mapping[str, str] | None = None, body: Any = None
    ) -> Any:
        """The same, of an answer that may be a list."""
        failures: list[UnreachableError] = []
        for api in self._apis:
            try:
                return api.request(method, path, query or {}, body=body, largest=_LARGEST, good=_GOOD).json()
            except UnreachableError as error:
                failures.append(error)
            except AccessDeniedError as error:
                if " 403 " not in f"{error.what} ":  # 401: then it is the login that is refused
                    raise
                raise AccessDeniedError(error.what, where=error.where, remedy=f"give our role {right}") from None
        said = "; ".join(f"{failure.where}: {failure.what}" for failure in failures)
        raise UnreachableError(f"no node answers: {said}", remedy=failures[0].remedy)
