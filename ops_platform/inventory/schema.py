"""JSON Schema of platform.yaml for editors: of the file as it is written, before defaults and policies are filled in."""

from __future__ import annotations

import copy
import json
from typing import Any, get_args

from ops_platform.inventory.model import Inventory
from ops_platform.inventory.systems import AnySystem

_REF = "#/$defs/"
_BY_ENVIRONMENT = ("id", "environment")


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12). What an environment's defaults or a policy may give is not required of the target itself."""
    schema = Inventory.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "platform.yaml"
    definitions: dict[str, Any] = schema["$defs"]
    target = _partial("Target", definitions)
    policy = _partial("BackupPolicy", definitions)
    policy["properties"] = {"policy": {"type": "string", "description": "The id of a policy."}} | policy["properties"]
    backup: dict[str, Any] = {
        "description": "The id of a policy, or {policy: id} with what differs from it.",
        "anyOf": [{"type": "string"}, {"$ref": f"{_REF}PartialBackupPolicy"}],
    }
    target["properties"]["backup"] = backup
    # The defaults of an environment are a target without its own id; a target is the rest.
    defaults = copy.deepcopy(target)
    defaults["properties"] = {k: v for k, v in target["properties"].items() if k not in _BY_ENVIRONMENT}
    description = definitions["Environment"]["properties"]["defaults"]["description"]
    definitions["Environment"]["properties"]["defaults"] = defaults | {"description": description}
    definitions["Target"] = target | {"required": list(_BY_ENVIRONMENT)}
    for system in get_args(get_args(AnySystem)[0]):
        # An environment may give it, as to a target.
        definitions[system.__name__]["required"].remove("owner")
        if "backup" in definitions[system.__name__]["properties"]:
            definitions[system.__name__]["properties"]["backup"] = backup
    for table in schema["properties"].values():
        if patterns := table.pop("patternProperties", None):
            # As pydantic says it a key that fits no pattern may hold anything.
            ((pattern, table["additionalProperties"]),) = patterns.items()
            table["propertyNames"]["pattern"] = pattern
    _prune(schema)
    return schema


def _partial(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """A copy in which nothing is required, down through the mappings, which are merged. Items of lists stay whole."""
    known = f"Partial{name}"
    if known not in definitions:
        made = definitions[known] = copy.deepcopy(definitions[name])
        made.pop("required", None)
        for entry in made.get("properties", {}).values():
            for place in (entry, *entry.get("anyOf", ())):
                below = place.get("$ref", "").removeprefix(_REF)
                if "properties" in definitions.get(below, {}):
                    _partial(below, definitions)
                    place["$ref"] = f"{_REF}Partial{below}"
    return definitions[known]


def _prune(schema: dict[str, Any]) -> None:
    """Without the definitions that nothing refers to any more."""
    while True:
        text = json.dumps(schema)
        unused = [name for name in schema["$defs"] if f'"{_REF}{name}"' not in text]
        if not unused:
            return
        for name in unused:
            del schema["$defs"][name]
