"""Label matchers as Alertmanager writes them: `severity=~"page|ticket"`.

Operators `=`, `!=`, `=~`, `!~`; regular expressions are anchored at both ends; a label that is absent counts as empty, as in
Alertmanager (https://prometheus.io/docs/alerting/latest/configuration/#matcher). The quotes may be left out where the value has no
space, comma, brace or quote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

Operator = Literal["=", "!=", "=~", "!~"]
# The name as Prometheus allows it, dots and slashes too: attributes of events have them.
_MATCHER = re.compile(
    r"""\s*(?P<name>[A-Za-z_][A-Za-z0-9_./-]*)\s*(?P<operator>=~|!~|!=|=)\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s"',{}]*))\s*"""
)


@dataclass(frozen=True)
class AlertMatcher:
    """One condition on one label. `parse` raises ValueError."""

    name: str
    operator: Operator
    value: str
    _pattern: re.Pattern[str] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> AlertMatcher:
        found = _MATCHER.fullmatch(text)
        if found is None:
            raise ValueError(
                f'{text!r} is not a matcher; write NAME, then =, !=, =~ or !~, then a value, such as severity=~"page|ticket"'
            )
        operator: Operator = found["operator"]  # pyright: ignore[reportAssignmentType]
        value = re.sub(r"\\(.)", _unescaped, found["quoted"]) if found["quoted"] is not None else found["bare"]
        pattern = None
        if operator in ("=~", "!~"):
            try:
                pattern = re.compile(value)
            except re.error as error:
                raise ValueError(f"{text!r}: the regular expression is wrong: {error}") from None
        return cls(found["name"], operator, value, pattern)

    def matches(self, labels: Mapping[str, str]) -> bool:
        there = labels.get(self.name, "")
        if self._pattern is not None:
            return (self._pattern.fullmatch(there) is not None) == (self.operator == "=~")
        return (there == self.value) == (self.operator == "=")

    def __str__(self) -> str:
        escaped = self.value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'{self.name}{self.operator}"{escaped}"'

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: Any) -> AlertMatcher:
            if isinstance(value, AlertMatcher):
                return value
            if not isinstance(value, str):
                raise ValueError('a matcher is a text such as severity=~"page|ticket"')
            return cls.parse(value)

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "examples": ['alertname="DiskFull"', 'severity=~"page|ticket"']}


def _unescaped(found: re.Match[str]) -> str:
    return {"n": "\n"}.get(found[1], found[1])


def all_match(matchers: Iterable[AlertMatcher], labels: Mapping[str, str]) -> bool:
    for matcher in matchers:  # noqa: SIM110 - every rule meets every alert, and a generator takes longer than what it asks for
        if not matcher.matches(labels):
            return False
    return True
