"""Reads platform.yaml: every mistake at once, each with file, line, key path and the nearest valid key.

Policies and environment defaults are expanded here, so that the model that everybody else sees is whole.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ops_platform.errors import InventoryError
from ops_platform.inventory.model import Inventory

KeyPath = tuple[str | int, ...]
_MAX_BYTES = 64 << 20


class _Loader(yaml.CSafeLoader):
    """YAML 1.1 without its traps: `no` is a word, `22:00` is a text, dates are texts."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False", "tfTF"),
    ("null", r"~|null|Null|", "~nN"),
    ("int", r"[-+]?\d+", "-+0123456789"),
    ("float", r"[-+]?\d+\.\d*", "-+0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _tag == "null" else [])]
    )
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong: `where` is file:line, `key` the path in it."""

    where: str
    key: str
    what: str
    remedy: str | None = None

    def __str__(self) -> str:
        text = f"{self.where}: {self.key}: {self.what}" if self.key else f"{self.where}: {self.what}"
        return f"{text}; {self.remedy}" if self.remedy else text


class InventoryMistakes(InventoryError):
    """All mistakes of a file."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        count = f"{len(mistakes)} mistakes in the inventory:\n" if len(mistakes) > 1 else ""
        super().__init__(count + "\n".join(str(mistake) for mistake in mistakes))


@dataclass(frozen=True)
class LoadedInventory:
    """The inventory, and where it was read from."""

    inventory: Inventory
    path: Path


def find(path: Path | None = None) -> Path:
    """The named file, else `OPS_INVENTORY`, else the nearest platform.yaml from here upwards."""
    if path is None and (named := os.environ.get("OPS_INVENTORY")):
        path = Path(named)
    if path is not None:
        return path.absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "platform.yaml").is_file():
            return folder / "platform.yaml"
    raise InventoryError(
        "there is no platform.yaml here or above", where=str(here), remedy="ops init writes one; --inventory names one"
    )


def load(path: Path | None = None) -> LoadedInventory:
    """Read and check. Raises InventoryError (InventoryMistakes with all of them)."""
    file = find(path)
    node = _compose(file)
    name = file.name
    duplicates = [
        Mistake(f"{name}:{line}", _dotted(key), "this key stands here twice") for key, line in _duplicates(node)
    ]
    if duplicates:
        raise InventoryMistakes(duplicates)
    raw = _construct(node, file)
    origin = _expand(raw)
    try:
        inventory = Inventory.model_validate(raw)
    except ValidationError as error:
        raise InventoryMistakes(
            sorted({_mistake(item, node, name, origin) for item in error.errors()}, key=_line_of)
        ) from None
    mistakes = list(_broken_references(inventory, node, name))
    if mistakes:
        raise InventoryMistakes(sorted(mistakes, key=_line_of))
    return LoadedInventory(inventory, file)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the file as it is written: with policies by name and with environment defaults."""
    schema = Inventory.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "platform.yaml"
    target = schema["$defs"]["Target"]
    target["properties"]["backup"] = {
        "description": "The id of a policy, or {policy: id} with what differs from it.",
        "anyOf": [{"type": "string"}, {"type": "object", "properties": {"policy": {"type": "string"}}}],
    }
    # Whatever an environment's defaults may give is not required of the target itself.
    target["required"] = ["id"]
    return schema


# Reading


def _compose(file: Path) -> yaml.MappingNode:
    where = str(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InventoryError(
            f"the inventory cannot be read: {error.strerror}", where=where, remedy="ops init writes one"
        ) from None
    if len(data) > _MAX_BYTES:
        raise InventoryError("the inventory is larger than 64 MiB", where=where)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InventoryError(
            "this is not UTF-8", where=f"{file.name}:{line}", remedy="save the file as UTF-8"
        ) from None
    try:
        node: Any = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise InventoryError(
            f"this is not YAML: {problem}", where=f"{file.name}:{mark.line + 1 if mark else 1}"
        ) from None
    if not isinstance(node, yaml.MappingNode):
        raise InventoryError("the inventory is a mapping that begins with `version: 1`", where=f"{file.name}:1")
    return node


def _construct(node: yaml.MappingNode, file: Path) -> dict[str, Any]:
    loader = _Loader("")
    try:
        return _plain(loader.construct_document(node), [0])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise InventoryError(str(problem), where=f"{file.name}:{mark.line + 1 if mark else 1}") from None
    except _TooLargeError:
        raise InventoryError("aliases in this file unfold to more than a million values", where=file.name) from None
    finally:
        loader.dispose()


class _TooLargeError(Exception):
    pass


def _plain(value: Any, count: list[int]) -> Any:
    """A copy without shared parts (expanding writes into it), refused when aliases multiply without end."""
    count[0] += 1
    if count[0] > 1_000_000:
        raise _TooLargeError
    if isinstance(value, dict):
        return {key: _plain(item, count) for key, item in value.items()}
    return [_plain(item, count) for item in value] if isinstance(value, list) else value


def _duplicates(node: yaml.Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        seen = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, value in node.value:
            here = (*path, str(key.value))
            if seen[key.value] > 1 and key.value != "<<":
                seen[key.value] = 0
                yield here, max(k.start_mark.line for k, _ in node.value if k.value == key.value) + 1
            yield from _duplicates(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _duplicates(value, (*path, number))


# Expanding


def _expand(raw: dict[str, Any]) -> dict[KeyPath, KeyPath]:
    """Defaults under targets, policies into targets. Returns where each expanded part really stands in the file."""
    origin: dict[KeyPath, KeyPath] = {}
    environments, policies, targets = (raw.get(key) for key in ("environments", "backup_policies", "targets"))
    if not isinstance(targets, list):
        return origin
    for number, target in enumerate(targets):
        if not isinstance(target, dict):
            continue
        named = environments.get(target.get("environment")) if isinstance(environments, dict) else None
        defaults = named.get("defaults") if isinstance(named, dict) else None
        if isinstance(defaults, dict):
            base: KeyPath = ("environments", target["environment"], "defaults")
            for key in defaults:
                if key not in target:
                    origin["targets", number, key] = (*base, key)
            targets[number] = _merge(defaults, target)
        _expand_policy(targets[number], policies, number, origin)
    return origin


def _expand_policy(target: dict[str, Any], policies: Any, number: int, origin: dict[KeyPath, KeyPath]) -> None:
    backup = target.get("backup")
    name = backup if isinstance(backup, str) else backup.get("policy") if isinstance(backup, dict) else None
    policy = policies.get(name) if isinstance(policies, dict) and isinstance(name, str) else None
    if not isinstance(policy, dict):
        return  # what is wrong is said by the validation
    overrides = {key: value for key, value in backup.items() if key != "policy"} if isinstance(backup, dict) else {}
    for key in policy:
        if key not in overrides:
            origin["targets", number, "backup", key] = ("backup_policies", str(name), key)
    target["backup"] = _merge(policy, overrides)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


# Saying what is wrong


def _mistake(item: Any, node: yaml.Node, file: str, origin: Mapping[KeyPath, KeyPath]) -> Mistake:
    path: KeyPath = tuple(item["loc"])
    real = _origin_of(path, origin)
    where = f"{file}:{_line(node, real)}"
    kind, given = item["type"], item.get("input")
    remedy = None
    if kind == "extra_forbidden":
        valid = _valid_keys(path[:-1])
        near = get_close_matches(str(path[-1]), valid, n=1, cutoff=0.5)
        what = f"there is no key {str(path[-1])!r} here"
        remedy = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
    elif kind == "missing":
        what, remedy = f"the key {str(path[-1])!r} is missing", None
    else:
        what = item["msg"].removeprefix("Value error, ")
        if path[-1:] == ("backup",) and isinstance(given, str):
            what = f"there is no backup policy {given!r}"
        elif kind.endswith("_type") or kind.endswith("_parsing"):
            what = f"{what}, not {_shown(given)}"
    return Mistake(where, _dotted(real), what, remedy)


def _shown(value: Any) -> str:
    # A value that stands where a structure belongs is named by its kind: it may be a secret that was pasted here.
    return type(value).__name__ if not isinstance(value, bool | int | float) else repr(value)


def _origin_of(path: KeyPath, origin: Mapping[KeyPath, KeyPath]) -> KeyPath:
    for length in range(len(path), 0, -1):
        if path[:length] in origin:
            return (*origin[path[:length]], *path[length:])
    return path


def _line(node: yaml.Node, path: KeyPath) -> int:
    """The line of the deepest part of `path` that is there."""
    line = node.start_mark.line + 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if str(key.value) == str(step)), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _line_of(mistake: Mistake) -> tuple[int, str]:
    return int(mistake.where.rpartition(":")[2]), mistake.key


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def _valid_keys(path: KeyPath) -> list[str]:
    """The keys that the model allows at a path."""
    kind: Any = Inventory
    for step in path:
        kind = _inner(kind.model_fields[step].annotation if _is_model(kind) and step in kind.model_fields else kind)
    kind = _inner(kind)
    return sorted(kind.model_fields) if _is_model(kind) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _inner(kind: Any) -> Any:
    """The model inside list[…], dict[…, …], … | None and Annotated[…]."""
    while not _is_model(kind):
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            kind = arguments[0]
        elif origin in (Union, UnionType):
            kind = next((argument for argument in arguments if argument is not type(None)), None)
        elif origin in (list, dict) and arguments:
            kind = arguments[-1]
        else:
            return kind
    return kind


def _broken_references(inventory: Inventory, node: yaml.Node, file: str) -> Iterator[Mistake]:
    def check(path: KeyPath, name: str | None, table: Mapping[str, object], kind: str) -> Iterator[Mistake]:
        if name is not None and name not in table:
            near = get_close_matches(name, list(table), n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"declared: {', '.join(table) or 'none'}"
            yield Mistake(f"{file}:{_line(node, path)}", _dotted(path), f"there is no {kind} {name!r}", remedy)

    for name, service in inventory.key_services.items():
        yield from check(("key_services", name, "vault"), service.vault, inventory.vaults, "vault")
    seen: dict[str, int] = {}
    for number, target in enumerate(inventory.targets):
        here: KeyPath = ("targets", number)
        if target.id in seen:
            path = (*here, "id")
            yield Mistake(
                f"{file}:{_line(node, path)}",
                _dotted(path),
                f"the id {target.id!r} belongs to target {seen[target.id]} already",
            )
        seen.setdefault(target.id, number)
        yield from check((*here, "owner"), target.owner, inventory.owners, "owner")
        yield from check((*here, "environment"), target.environment, inventory.environments, "environment")
        yield from check((*here, "repository", "store"), target.repository.store, inventory.stores, "store")
        yield from check((*here, "repository", "keys"), target.repository.keys, inventory.key_services, "key service")
