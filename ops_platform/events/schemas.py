"""What the data of an event must look like: JSON Schema for each type of event, and schemas of a registry in Confluent's wire format.

Wire format: a byte 0, the schema's id in four bytes, big-endian, then the data in JSON or Avro
(https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format). JSON never begins
with a byte 0, so the two are told apart. A schema has one id for ever: it is asked for once.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote
from uuid import UUID

from ops_platform.clients.http import BadAnswerError, HttpApi
from ops_platform.errors import NotThereError, UsageError
from ops_platform.events.cloudevents import CloudEvent, NotAnEventError, parse_json
from ops_platform.inventory.remediation import EventSchema

_FRAMED, _HEADER = 0, 5
_NO_SUCH_SCHEMA = 40403  # the registry's own word, unlike the 404 of an address that is no registry
_REMEDY = "check the address of the schema registry, and what stands in front of it"
Decode = Callable[[bytes], Any]


class Schemas:
    """How values are read and checked. Safe for one thread."""

    def __init__(
        self, schemas: Sequence[EventSchema], locate: Callable[[str], Path], registry: HttpApi | None = None
    ) -> None:
        """Reads and compiles the files. Raises UsageError for one that is missing, no JSON, or no JSON Schema."""
        self._by_type = {one.type: _file_schema(locate(one.json_schema)) for one in schemas}
        self._registry = Registry(registry) if registry is not None else None

    def content(self, value: bytes | None) -> Any:
        """A message's value as JSON has it. Raises NotAnEventError; UnreachableError and others where the registry is needed and away."""
        if not value or value[0] != _FRAMED:
            return parse_json(value)
        if len(value) < _HEADER:
            raise NotAnEventError("it begins as Confluent's wire format does, and ends before its schema's id")
        if self._registry is None:
            raise NotAnEventError("it is in Confluent's wire format, and the inventory names no schema registry")
        return self._registry.decoder(int.from_bytes(value[1:_HEADER], "big"))(value[_HEADER:])

    @property
    def any(self) -> bool:
        """Whether there is anything for `check` to do."""
        return bool(self._by_type)

    def check(self, event: CloudEvent) -> None:
        """Raises NotAnEventError naming the place in the data, and never what stands there."""
        validator = self._by_type.get(event.attributes["type"])
        if validator is not None and not validator.is_valid(event.data):
            raise NotAnEventError(f"its data is not as the schema of {event.type} says: {_why(validator, event.data)}")


def _why(validator: Any, data: Any) -> str:
    for error in validator.iter_errors(data):
        place = ".".join(map(str, error.instance_path)) or "the whole"
        return f"{place}, {'.'.join(map(str, error.schema_path))}"
    return "unknown"


def _file_schema(file: Path) -> Any:
    try:
        return _compile(json.loads(file.read_bytes()))
    except OSError as error:
        raise UsageError(f"this schema cannot be read: {error.strerror}", where=str(file)) from None
    except ValueError as error:
        raise UsageError(f"this is no JSON Schema: {' '.join(str(error).split())[:200]}", where=str(file)) from None


def _compile(schema: Any, known: Mapping[str, Any] | None = None, *, dialect: str = "2020-12") -> Any:
    """Raises ValueError. Nothing is fetched from anywhere."""
    import jsonschema_rs

    def retrieve(uri: str) -> Any:
        for name, found in (known or {}).items():
            if uri == name or uri.endswith(f"/{name}"):
                return found
        raise ValueError(f"{uri} is nowhere, and nothing is fetched")

    make = jsonschema_rs.Draft202012Validator if dialect == "2020-12" else jsonschema_rs.validator_for
    try:
        return make(schema, retriever=retrieve)
    except jsonschema_rs.ValidationError as error:
        raise ValueError(error.message) from None


# Confluent's registry


class Registry:
    """Schemas by id."""

    def __init__(self, api: HttpApi) -> None:
        self._api = api
        self._decoders: dict[int, Decode] = {}

    def decoder(self, schema_id: int) -> Decode:
        """Raises NotAnEventError where the registry has no such schema, or none that we can use; whatever `HttpApi` raises else."""
        if schema_id not in self._decoders:
            found = self._get(f"/schemas/ids/{schema_id}", schema_id)
            kind = found.get("schemaType") or "AVRO"
            try:
                self._decoders[schema_id] = self._make(kind, found)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                said = " ".join(str(error).split())[:200]
                raise NotAnEventError(f"schema {schema_id} of the registry cannot be used: {said}") from None
        return self._decoders[schema_id]

    def _get(self, path: str, schema_id: int | None = None) -> dict[str, Any]:
        answer = self._api.get(path, good=(200, 404))
        value = answer.json()
        if not isinstance(value, dict):
            raise BadAnswerError("the answer is no schema", where=answer.where, remedy=_REMEDY)
        found = cast("dict[str, Any]", value)
        if answer.status == 404 and found.get("error_code") == _NO_SUCH_SCHEMA and schema_id is not None:
            raise NotAnEventError(f"the registry has no schema {schema_id}")
        if answer.status == 404:
            raise NotThereError("the schema registry has nothing there", where=answer.where, remedy=_REMEDY)
        if not isinstance(found.get("schema"), str):
            raise BadAnswerError("the answer holds no schema", where=answer.where, remedy=_REMEDY)
        return found

    def _make(self, kind: str, found: Mapping[str, Any]) -> Decode:
        if kind == "JSON":
            references = {name: json.loads(schema) for name, schema in self._references(found)}
            validator = _compile(json.loads(found["schema"]), references, dialect="its own")
            return lambda value: _json(value, validator)
        if kind == "AVRO":
            return _avro(found["schema"], [schema for _, schema in self._references(found)])
        raise ValueError(f"its type is {kind}, and JSON and AVRO are read")

    def _references(self, found: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What it refers to, the innermost first."""
        out: list[tuple[str, str]] = []
        for one in found.get("references") or ():
            subject, version = quote(one["subject"], safe=""), int(one["version"])
            inner = self._get(f"/subjects/{subject}/versions/{version}")
            out += [*self._references(inner), (one["name"], inner["schema"])]
        return list(dict.fromkeys(out))


def _json(value: bytes, validator: Any) -> Any:
    found = parse_json(value)
    if not validator.is_valid(found):
        raise NotAnEventError(f"it is not as its schema says: {_why(validator, found)}")
    return found


def _avro(schema: str, references: Sequence[str]) -> Decode:
    import fastavro
    from fastavro.schema import SchemaParseException, UnknownType

    named: dict[str, Any] = {}
    try:
        for one in references:
            fastavro.parse_schema(json.loads(one), named_schemas=named)
        parsed = fastavro.parse_schema(json.loads(schema), named_schemas=named)
    except (SchemaParseException, UnknownType) as error:
        raise ValueError(str(error)) from None

    def decode(value: bytes) -> Any:
        stream = BytesIO(value)
        try:
            found = fastavro.schemaless_reader(stream, parsed, None)
        except Exception as error:  # noqa: BLE001 - whatever garbage makes it raise, it is no Avro of this schema
            raise NotAnEventError(f"it is no Avro of its schema ({type(error).__name__})") from None
        if stream.read(1):
            raise NotAnEventError("something follows its data in Avro")
        return _plain(found)

    return decode


def _plain(value: Any) -> Any:
    """What JSON has no word for becomes a text: as the field's JSON encodings write it."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in cast("Sequence[Any]", value)]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | UUID) else value
