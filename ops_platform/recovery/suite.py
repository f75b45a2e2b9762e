"""The suite of a target: what its owners expect of the data, in YAML beside platform.yaml.

Great Expectations takes seconds to import. The file is therefore checked against the JSON schemas that it ships: which
expectations there are and which arguments each takes. Its own models judge the values, in the process that evaluates them.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ops_platform.errors import CouldNotVerifyError, InventoryError
from ops_platform.inventory import InventoryMistakes, parse_duration
from ops_platform.inventory.document import Document, KeyPath
from ops_platform.inventory.loader import Mistake, dotted, in_our_words, unknown_key

# Arguments of GX that say how it works and not what is expected. `severity` would let a failure look like a lesser one.
_NOT_EXPECTED = frozenset(
    [
        "id",
        "meta",
        "severity",
        "result_format",
        "catch_exceptions",
        "rendered_content",
        "windows",
        "batch_id",
        "metadata",
    ]
)
# It compares with a second data source, and there is none.
_NOT_HERE = frozenset(["expect_query_results_to_match_comparison"])
_SQL_ARGUMENTS = frozenset(["unexpected_rows_query"])

_PARAMETER = re.compile(r"\{\s*recovery_target\s*(?:(?P<sign>[+-])\s*(?P<span>\w+)\s*)?\}")
_BRACED = re.compile(r"\{\s*(?P<word>[^\W\d]\w*)[^{}]*\}?")
_NAME = re.compile(r'"(?P<quoted>(?:[^"\0]|"")+)"|(?P<plain>[^\W\d][\w$]*)')


class Check(BaseModel):
    """One expectation of a suite. `number` is its place in the file, from 0; `table` and `query` stand as they were written."""

    model_config = ConfigDict(frozen=True)

    number: int
    kind: str
    arguments: dict[str, Any]
    table: str | None = None
    query: str | None = None
    may_be_empty: bool = False

    @property
    def column(self) -> str | None:
        """The columns that it looks at."""
        named = [self.arguments.get(key) for key in ("column", "column_A", "column_B")]
        listed = self.arguments.get("column_list", [])
        return ", ".join(str(name) for name in [*named, *listed] if name is not None) or None

    @property
    def title(self) -> str:
        if "description" in self.arguments:
            return str(self.arguments["description"])
        of = f" of {self.column}" if self.column else ""
        return f"{self.table or 'query'}: {self.kind.removeprefix('expect_').replace('_', ' ')}{of}"


@dataclass(frozen=True)
class Suite:
    """A suite file that was read and is good as far as its keys and parameters go."""

    file: Path
    checks: tuple[Check, ...]
    document: Document

    @property
    def name(self) -> str:
        return self.file.name

    def mistake(self, number: int, key: str, what: str) -> Mistake:
        return _at(self.document, ("expectations", number, key), what)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    expectations: Annotated[list[dict[str | int, Any]], Field(min_length=1)]


class _Entry(BaseModel):
    """What is not one of these keys is an argument of the expectation."""

    model_config = ConfigDict(extra="allow", strict=True)

    expect: str
    table: str | None = None
    query: str | None = None
    may_be_empty: bool = False


@dataclass(frozen=True)
class Kind:
    """A type of expectation: its name with `expect_`, the arguments that it takes and those that it needs."""

    name: str
    arguments: tuple[str, ...]
    required: tuple[str, ...]


def load_suite(file: Path) -> Suite:
    """Read and check. Raises InventoryError (InventoryMistakes with all of them)."""
    try:
        document = Document(file.read_bytes(), file.name)
    except OSError as error:
        raise InventoryError(
            f"the suite of expectations cannot be read: {error.strerror}",
            where=str(file),
            remedy="write it, or correct verification.expectations.suite; the path is relative to platform.yaml",
        ) from None
    if not isinstance(document.value, dict):
        raise document.fail("a suite is a mapping that begins with `version: 1`", 1)
    mistakes = {_at(document, path, "this key stands here twice", line=line) for path, line in document.duplicates}
    checks: list[Check] = []
    try:
        entries = _File.model_validate(document.value).expectations
    except ValidationError as error:
        mistakes |= {_refused(document, item, (), list(_File.model_fields)) for item in error.errors(include_url=False)}
        entries = []
    for number, entry in enumerate(entries):
        found = _check(document, number, entry)
        if isinstance(found, Check):
            checks.append(found)
        else:
            mistakes.update(found)
    if mistakes:
        raise InventoryMistakes(
            sorted(mistakes, key=lambda one: (int(one.where.rpartition(":")[2]), one.key, one.what))
        )
    return Suite(file, tuple(checks), document)


def _check(document: Document, number: int, entry: dict[str | int, Any]) -> Check | list[Mistake]:
    here: KeyPath = ("expectations", number)
    try:
        written = _Entry.model_validate(entry)
    except ValidationError as error:
        return [_refused(document, item, here, list(_Entry.model_fields)) for item in error.errors(include_url=False)]
    arguments = written.model_extra or {}
    mistakes = [_at(document, (*here, *path), what, remedy) for path, what, remedy in _wrong(written, arguments)]
    if mistakes:
        return mistakes
    return Check(
        number=number,
        kind=_kind(written.expect).name,
        arguments=arguments,
        table=written.table,
        query=written.query,
        may_be_empty=written.may_be_empty,
    )


# Each thing that is wrong: its path below the entry, what it is, what to do


def _wrong(written: _Entry, arguments: dict[str, Any]) -> Iterator[tuple[KeyPath, str, str | None]]:
    if (written.table is None) == (written.query is None):
        yield (), "an expectation is about either a table or a query", "give one of the keys `table` and `query`"
    if written.table is not None and not names(written.table):
        yield (
            ("table",),
            f"{written.table!r} is not the name of a table",
            (
                "write schema.table; names with capitals, spaces or signs stand in double quotes, as in SQL: 'shop.\"My Table\"'"
            ),
        )
    if written.query is not None:
        yield from ((("query",), what, remedy) for what, remedy in _wrong_parameters(written.query, sql=True))
    try:
        kind = _kind(written.expect)
    except KeyError:
        yield ("expect",), f"there is no expectation {written.expect!r}", _nearest_kinds(written.expect)
        return
    for key in arguments:
        if key not in kind.arguments:
            valid = [*kind.arguments, *_Entry.model_fields]
            yield (key,), *unknown_key(key, valid)
    for key in kind.required:
        if key not in arguments:
            yield (), f"{written.expect} needs the key {key!r}", None
    yield from _wrong_values(arguments)


def _wrong_values(arguments: dict[str, Any]) -> Iterator[tuple[KeyPath, str, str | None]]:
    for key, value in arguments.items():
        if value is None:
            yield (key,), "nothing stands here", "give a value, or leave the key out"
        for path, text in _texts(value, (key,)):
            yield from ((path, what, remedy) for what, remedy in _wrong_parameters(text, sql=key in _SQL_ARGUMENTS))


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, (*path, key))


def _wrong_parameters(text: str, *, sql: bool) -> Iterator[tuple[str, str | None]]:
    for braced in _BRACED.finditer(text):
        parameter = _PARAMETER.fullmatch(braced[0])
        if parameter is None:
            if get_close_matches(braced["word"].lower(), ["recovery_target"], cutoff=0.5):
                yield (
                    f"{braced[0]!r} is not a parameter",
                    "write {recovery_target}, {recovery_target - 10m} or {recovery_target + 5s}",
                )
        elif not sql and parameter[0] != text.strip():
            yield f"the parameter {parameter[0]!r} stands alone: the value becomes a time", None
        elif parameter["span"]:
            try:
                parse_duration(parameter["span"])
            except ValueError as error:
                yield str(error), None


# Parameters


def expand(value: Any, target: datetime) -> Any:
    """A value with its parameters filled in: aware times in UTC, in lists and mappings as well."""
    if isinstance(value, dict):
        return {key: expand(item, target) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, target) for item in value]
    found = _PARAMETER.fullmatch(value.strip()) if isinstance(value, str) else None
    return _moment(found, target) if found else value


def expand_sql(text: str, target: datetime) -> str:
    """SQL with its parameters as literals of type timestamptz."""
    return _PARAMETER.sub(lambda found: f"timestamptz '{_moment(found, target).isoformat()}'", text)


def expanded(check: Check, target: datetime) -> dict[str, Any]:
    """The arguments of a check at a recovery target."""
    return {
        key: expand_sql(value, target) if key in _SQL_ARGUMENTS and isinstance(value, str) else expand(value, target)
        for key, value in check.arguments.items()
    }


def _moment(found: re.Match[str], target: datetime) -> datetime:
    span = parse_duration(found["span"]) if found["span"] else timedelta(0)
    return target.astimezone(UTC) + (-span if found["sign"] == "-" else span)


def names(table: str) -> tuple[str, ...]:
    """`schema.table` or `table` as PostgreSQL reads it, unquoted and folded; empty for what is neither."""
    parts: list[str] = []
    rest = table
    while found := _NAME.match(rest):
        plain = found["plain"]
        # Like the server: in UTF-8 only the letters of ASCII are folded.
        parts.append(re.sub("[A-Z]+", lambda m: m[0].lower(), plain) if plain else found["quoted"].replace('""', '"'))
        if found.end() == len(rest):
            return tuple(parts) if len(parts) <= 2 else ()
        if rest[found.end()] != ".":
            break
        rest = rest[found.end() + 1 :]
    return ()


# What Great Expectations knows


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every expectation that can be named, read from the JSON schemas of its models."""
    found = importlib.util.find_spec("great_expectations")
    places = list(found.submodule_search_locations or []) if found else []
    files = [file for place in places for file in Path(place, "expectations/core/schemas").glob("*.json")]
    known: dict[str, Kind] = {}
    for file in files:
        schema = json.loads(file.read_bytes())
        properties = schema.get("properties", {})
        if "metadata" in properties:
            name = properties["metadata"]["properties"]["expectation_type"]["const"]
            arguments = tuple(key for key in properties if key not in _NOT_EXPECTED)
            known[name] = Kind(name, arguments, tuple(schema.get("required", ())))
    if not known:
        raise CouldNotVerifyError(
            "great_expectations is not installed, or not as it was published", remedy="install ops_platform again"
        )
    return {name: known[name] for name in sorted(known) if name not in _NOT_HERE}


def _kind(name: str) -> Kind:
    known = kinds()
    return known[name] if name in known else known[f"expect_{name}"]


def _nearest_kinds(name: str) -> str:
    short = [known.removeprefix("expect_") for known in kinds()]
    near = get_close_matches(name.removeprefix("expect_"), short, n=3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(near)}?" if near else "such as column_values_to_not_be_null; the manual lists them"
    )


# Saying what is wrong


def _refused(document: Document, item: Any, here: KeyPath, valid: list[str]) -> Mistake:
    path: KeyPath = tuple(step for step in item["loc"] if step != "[key]")
    if item["type"] == "extra_forbidden":
        return _at(document, (*here, *path), *unknown_key(path[-1], valid))
    if item["type"] == "missing":
        return _at(document, (*here, *path), f"the key {str(path[-1])!r} is missing")
    if item["type"] == "too_short":
        return _at(
            document, (*here, *path), "a suite without expectations proves nothing", "write one, or remove the suite"
        )
    return _at(document, (*here, *path), in_our_words(item))


def _at(document: Document, path: KeyPath, what: str, remedy: str | None = None, *, line: int | None = None) -> Mistake:
    return Mistake(f"{document.name}:{line or document.line(path)}", dotted(path), what, remedy)
