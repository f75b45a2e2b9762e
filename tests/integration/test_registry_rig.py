"""The schema registry of the tests does what the tests of others rely on, and the platform reads by its schemas."""

from __future__ import annotations

import io
import json
import urllib.error
from pathlib import Path

import fastavro
import pytest

from ops_platform.clients.http import HttpApi
from ops_platform.events.cloudevents import NotAnEventError
from ops_platform.events.schemas import Schemas
from tests.registry_rig import Registry

AVRO = {"type": "record", "name": "Order", "fields": [{"name": "n", "type": "int"}]}
JSON = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0}},
    "required": ["n"],
}


def framed(schema_id: int, data: bytes) -> bytes:
    return b"\0" + schema_id.to_bytes(4, "big") + data


def test_a_schema_has_one_id_and_is_found_by_it(registry: Registry) -> None:
    number = registry.register("orders-value", AVRO)
    assert registry.register("orders-value", AVRO) == number
    assert json.loads(registry.call("GET", f"/schemas/ids/{number}")["schema"]) == AVRO
    assert json.loads(registry.call("GET", "/subjects/orders-value/versions/latest")["schema"]) == AVRO
    with pytest.raises(urllib.error.HTTPError) as unknown:
        registry.call("GET", "/schemas/ids/99999")
    assert unknown.value.code == 404
    assert json.loads(unknown.value.read())["error_code"] == 40403


def test_the_platform_reads_by_the_schemas_of_a_real_registry(registry: Registry) -> None:
    avro, plain = registry.register("a-value", AVRO), registry.register("b-value", JSON, "JSON")
    schemas = Schemas([], Path, HttpApi(registry.url, "the registry"))
    written = io.BytesIO()
    fastavro.schemaless_writer(written, fastavro.parse_schema(AVRO), {"n": 7})
    assert schemas.content(framed(avro, written.getvalue())) == {"n": 7}
    assert schemas.content(framed(plain, b'{"n": 8}')) == {"n": 8}
    for poison in (framed(plain, b'{"n": -1}'), framed(99999, b"{}")):
        with pytest.raises(NotAnEventError):
            schemas.content(poison)
