"""Reads platform.yaml: every mistake at once, each with file, line, key path and the nearest valid key.

Policies and environment defaults are expanded here, so that the model that everybody else sees is whole. What is wrong in
an expanded value is reported where it was written: in the policy, in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ops_platform.errors import InventoryError
from ops_platform.inventory.document import Document, KeyPath
from ops_platform.inventory.model import BackupPolicy, Inventory, Target
from ops_platform.inventory.remediation import A_LABEL, AN_ID
from ops_platform.inventory.systems import AnySystem, System

_SHOWN = 50
# What a system takes of its environment's defaults beside what every system does, where it is backed up. Whether it is, it says itself.
_OF_A_STORE = frozenset(("repository", "objectives", "sandbox"))


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
    """All mistakes of a file, in the order of its lines."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        count = f"{len(mistakes)} mistakes in the inventory:\n" if len(mistakes) > 1 else ""
        more = f"\n… and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
        super().__init__(count + "\n".join(str(mistake) for mistake in mistakes[:_SHOWN]) + more)


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
    try:
        document = Document(file.read_bytes(), file.name)
    except OSError as error:
        remedy = "ops init writes one" if isinstance(error, FileNotFoundError) else "make it a file that you may read"
        raise InventoryError(
            f"the inventory cannot be read: {error.strerror}", where=str(file), remedy=remedy
        ) from None
    if not isinstance(document.value, dict):
        raise document.fail("the inventory is a mapping that begins with `version: 1`", 1)
    if document.value and not document.value.keys() & Inventory.model_fields.keys():
        # Some other file was named. Nothing of it is quoted: it may be one of secrets.
        raise document.fail("this is no inventory: it has none of an inventory's keys", 1, "name a platform.yaml")
    written = _Written.expand(document)
    mistakes = {written.mistake(path, "this key stands here twice", line=line) for path, line in document.duplicates}
    mistakes |= set(_broken_references(written))
    inventory = None
    try:
        inventory = Inventory.model_validate(written.value)
    except ValidationError as error:
        found = (_mistake(item, written) for item in error.errors(include_url=False))
        mistakes |= {mistake for mistake in found if mistake is not None}
    if mistakes or inventory is None:
        raise InventoryMistakes(sorted(mistakes, key=_line_of))
    return LoadedInventory(inventory, file)


# Expanding


class _Written:
    """The expanded inventory, and where in the file each part of it really stands."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.value: dict[str, Any] = document.value
        self._origin: dict[KeyPath, KeyPath] = {}
        # Targets whose environment is not known: what they lack may be among its defaults.
        self.without_defaults: set[KeyPath] = set()

    @classmethod
    def expand(cls, document: Document) -> _Written:
        """Defaults under targets, policies into targets. The document itself stays as it is."""
        written = cls(document)
        if isinstance(targets := document.value.get("targets"), list):
            expanded = [written._target(target, ("targets", number)) for number, target in enumerate(targets)]
            written.value = {**written.value, "targets": expanded}
        if isinstance(systems := document.value.get("systems"), list):
            expanded = [written._system(system, ("systems", number)) for number, system in enumerate(systems)]
            written.value = {**written.value, "systems": expanded}
        return written

    def _system(self, system: Any, at: KeyPath) -> Any:
        """Of an environment's defaults a system takes what systems and targets have in common."""
        environments = _table(self.document.value.get("environments"))
        if not isinstance(system, dict):
            return system
        environment = system.get("environment")
        if not isinstance(environment, str) or environment not in environments:
            self.without_defaults.add(at)
            return self._with_policy(system, at)
        defaults = _table(_table(environments[environment]).get("defaults"))
        taken = System.model_fields.keys() | (_OF_A_STORE if "backup" in system else frozenset[str]())
        common = {key: value for key, value in defaults.items() if key in taken}
        return self._with_policy(self._merge(common, system, at, ("environments", environment, "defaults")), at)

    def _target(self, target: Any, at: KeyPath) -> Any:
        if not isinstance(target, dict):
            return target
        environments = _table(self.document.value.get("environments"))
        environment = target.get("environment")
        if not isinstance(environment, str) or environment not in environments:
            self.without_defaults.add(at)
        else:
            defaults = _table(_table(environments[environment]).get("defaults"))
            target = self._merge(defaults, target, at, ("environments", environment, "defaults"))
        return self._with_policy(target, at)

    def _with_policy(self, target: dict[Any, Any], at: KeyPath) -> dict[Any, Any]:
        """What `backup` names by its id, filled in."""
        policies, backup = _table(self.document.value.get("backup_policies")), target.get("backup")
        name = policy_of(backup)
        if name is None:
            return target
        if not isinstance(name, str) or not isinstance(policies.get(name), dict):
            # That is said once, where it stands; a stand-in keeps the validation from saying it in other words.
            return {**target, "backup": BackupPolicy.model_construct()}
        return {**target, "backup": self._policy(name, policies[name], backup, (*at, "backup"))}

    def _policy(self, name: str, policy: dict[Any, Any], backup: Any, at: KeyPath) -> dict[Any, Any]:
        base: KeyPath = ("backup_policies", name)
        overrides = {key: value for key, value in backup.items() if key != "policy"} if isinstance(backup, dict) else {}
        merged = self._merge(policy, overrides, at, base)
        for key in BackupPolicy.model_fields.keys() - merged.keys():
            self._origin[*at, key] = (*base, key)  # what is missing is missing in the policy
        return merged

    def _merge(self, base: Mapping[Any, Any], over: Mapping[Any, Any], at: KeyPath, stands: KeyPath) -> dict[Any, Any]:
        """Mappings are merged key by key, everything else is replaced. `stands` is where `base` was written."""
        merged = {**base, **over}
        for key in base:
            if key not in over:
                self._origin[*at, key] = (*stands, key)
            elif isinstance(base[key], dict) and isinstance(over[key], dict):
                merged[key] = self._merge(base[key], over[key], (*at, key), (*stands, key))
        return merged

    def origin(self, path: KeyPath) -> KeyPath:
        """The path at which a value was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._origin:
                return (*self._origin[path[:length]], *path[length:])
        return path

    def mistake(self, path: KeyPath, what: str, remedy: str | None = None, *, line: int | None = None) -> Mistake:
        real = self.origin(path)
        return Mistake(f"{self.document.name}:{line or self.document.line(real)}", dotted(real), what, remedy)


def policy_of(backup: Any) -> Any:
    """The id in `backup: ID` or `backup: {policy: ID, …}`; None where the whole policy is written out."""
    return backup if isinstance(backup, str) else _table(backup).get("policy")


def _table(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


# Saying what is wrong

SYSTEM_KINDS: dict[str, type[System]] = {
    get_args(member.model_fields["kind"].annotation)[0]: member for member in get_args(get_args(AnySystem)[0])
}

_KINDS = {
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}


def _mistake(item: Any, written: _Written) -> Mistake | None:
    """What pydantic found, in our words; None for what is only the echo of another mistake."""
    path: KeyPath = tuple(step for step in item["loc"] if step != "[key]")
    kind = item["type"]
    found_in = Inventory
    if path[:1] == ("systems",) and len(path) > 2 and path[2] in SYSTEM_KINDS:
        found_in, path = SYSTEM_KINDS[str(path[2])], (*path[:2], *path[3:])  # pydantic names the kind in between
    path = tuple(step for step in path if not _names_a_type(step))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_kind(written, path)
    if kind == "extra_forbidden":
        real = written.origin(path)
        if real[:1] == ("environments",) and len(path) == 3:
            return None  # said by `_useless_defaults`, once for all targets
        inside = path[:-1] if found_in is Inventory else path[2:-1]
        valid = _valid_keys(inside, in_policy=real[0] == "backup_policies", root=found_in)
        return written.mistake(path, *unknown_key(path[-1], valid))
    if kind == "missing":
        if path[:-1] in written.without_defaults and path[-1] != "environment":
            return None
        return written.mistake(path, f"the key {str(path[-1])!r} is missing")
    return written.mistake(path, in_our_words(item))


def _names_a_type(step: Any) -> bool:
    """Of a union pydantic names the member that it tried; in the file no such key stands."""
    return step in (AN_ID, A_LABEL)


def _unknown_kind(written: _Written, path: KeyPath) -> Mistake:
    system = written.value["systems"][path[1]]
    known = sorted(SYSTEM_KINDS)
    if "kind" not in system:
        return written.mistake(path, "the key 'kind' is missing", f"one of {', '.join(known)}")
    near = get_close_matches(str(system["kind"]), known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}"
    return written.mistake((*path, "kind"), "there is no such kind of system", remedy)


def in_our_words(item: Any) -> str:
    """What pydantic says of a wrong type or value."""
    if item["type"] in _KINDS:
        return f"this should be {_KINDS[item['type']]}, not {_named(item.get('input'))}"
    return item["msg"].removeprefix("Value error, ").replace("Input should be", "this should be")


def unknown_key(key: Any, valid: Sequence[str]) -> tuple[str, str]:
    near = get_close_matches(str(key), valid, n=1, cutoff=0.5)
    return (
        f"there is no key {str(key)!r} here",
        f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}",
    )


def _named(value: Any) -> str:
    """A text is never repeated: it may be a secret that was pasted into the wrong place."""
    if isinstance(value, bool | int | float):
        return repr(value).lower()
    return {"str": "a text", "dict": "a mapping", "list": "a list", "NoneType": "nothing"}.get(
        type(value).__name__, "that"
    )


def _line_of(mistake: Mistake) -> tuple[int, str, str]:
    return int(mistake.where.rpartition(":")[2]), mistake.key, mistake.what


def dotted(path: KeyPath) -> str:
    """`targets[3].backup.policy`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def _valid_keys(path: KeyPath, *, in_policy: bool, root: Any = Inventory) -> list[str]:
    """The keys that the model allows at a path; `backup` of a target takes `policy` beside those of a policy."""
    kind: Any = root
    for step in path:
        kind = _plain(kind)
        if _is_model(kind):
            kind = kind.model_fields[step].annotation if step in kind.model_fields else None
        else:
            kind = get_args(kind)[-1] if get_args(kind) else None  # the items of a list, the values of a table
    kind = _plain(kind)
    extra = ["policy"] if kind is BackupPolicy and not in_policy else []
    return sorted([*kind.model_fields, *extra]) if _is_model(kind) else []


def _plain(kind: Any) -> Any:
    """Without Annotated and without `| None`."""
    while get_origin(kind) in (Annotated, Union, UnionType):
        members = [argument for argument in get_args(kind) if argument is not type(None)]
        kind = members[0]
        if get_origin(kind) is Annotated and len(members) > 1:
            kind = next((member for member in members if _is_model(_plain(member))), kind)
    return kind


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


# What a schema cannot say: names that point at other parts of the file


def _broken_references(written: _Written) -> Iterator[Mistake]:
    """On the file as it is written, so that these mistakes stand beside those of the types."""
    for path, name, table, kind in _references(written.value):
        if isinstance(name, str) and name not in table:
            known = [str(key) for key in table]
            near = get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"declared: {', '.join(known) or 'none'}"
            yield written.mistake(path, f"there is no {kind} {name!r}", remedy)
    policies = _table(written.document.value.get("backup_policies"))
    yield from _broken_policies(written, [str(key) for key in policies])
    yield from _same_ids(written)
    yield from _useless_defaults(written)
    yield from _locked_in_themselves(written)
    yield from _in_circles(written)
    if not _table(written.value.get("vaults")):
        for path in _vault_references(written.document.value, ()):
            yield written.mistake(path, "this secret stands in a Vault, and none is declared", "add it under `vaults`")


def _references(raw: dict[Any, Any]) -> Iterator[tuple[KeyPath, Any, dict[Any, Any], str]]:
    owners, environments, vaults, stores, services = (
        _table(raw.get(key)) for key in ("owners", "environments", "vaults", "stores", "key_services")
    )
    for name, service in services.items():
        yield ("key_services", name, "vault"), _table(service).get("vault"), vaults, "vault"
    checkpoints = _table(_table(raw.get("platform")).get("ledger"))
    yield ("platform", "ledger", "store"), checkpoints.get("store"), stores, "store"
    yield ("platform", "ledger", "vault"), checkpoints.get("vault"), vaults, "vault"
    gits = {name: entry for name, entry in _by_id(raw, "systems").items() if entry.get("kind") == "git"}
    for number, system in enumerate(_list(raw.get("systems"))):
        here, entry = ("systems", number), _table(system)
        yield (*here, "owner"), entry.get("owner"), owners, "owner"
        yield (*here, "environment"), entry.get("environment"), environments, "environment"
        yield (*here, "vault"), entry.get("vault"), vaults, "vault"
        yield from _repository_references((*here, "repository"), entry.get("repository"), stores, services)
        for place, manifests in enumerate(_list(entry.get("manifests"))):
            yield (*here, "manifests", place, "git"), _table(manifests).get("git"), gits, "Git system"
    yield from _remediation_references(raw)
    yield from _drill_references(raw, owners)
    yield from _dependencies(raw)
    for number, target in enumerate(_list(raw.get("targets"))):
        here, entry = ("targets", number), _table(target)
        yield (*here, "owner"), entry.get("owner"), owners, "owner"
        yield (*here, "environment"), entry.get("environment"), environments, "environment"
        yield from _repository_references((*here, "repository"), entry.get("repository"), stores, services)


def _repository_references(
    at: KeyPath, written: Any, stores: dict[Any, Any], services: dict[Any, Any]
) -> Iterator[tuple[KeyPath, Any, dict[Any, Any], str]]:
    repository = _table(written)
    copies = enumerate(_list(repository.get("copies")))
    for here, entry in [(at, repository), *(((*at, "copies", place), _table(copy)) for place, copy in copies)]:
        yield (*here, "store"), entry.get("store"), stores, "store"
        yield (*here, "keys"), entry.get("keys"), services, "key service"


def _remediation_references(raw: dict[Any, Any]) -> Iterator[tuple[KeyPath, Any, dict[Any, Any], str]]:
    """Rules, sources and sinks name targets and systems, and each of the kind that is needed there."""
    systems = {s["id"]: s.get("kind") for s in map(_table, _list(raw.get("systems"))) if isinstance(s.get("id"), str)}
    ids = [t["id"] for t in map(_table, _list(raw.get("targets"))) if isinstance(t.get("id"), str)]
    subjects: dict[Any, Any] = systems | dict.fromkeys(ids, "postgresql")

    def of(kind: str) -> dict[Any, Any]:
        return {name: found for name, found in systems.items() if found == kind}

    part = _table(raw.get("remediation"))
    for number, name in enumerate(_list(part.get("alertmanagers"))):
        yield ("remediation", "alertmanagers", number), name, of("alertmanager"), "Alertmanager"
    for number, source in enumerate(_list(part.get("events"))):
        yield ("remediation", "events", number, "kafka"), _table(source).get("kafka"), of("kafka"), "Kafka"
    yield ("remediation", "publish", "kafka"), _table(part.get("publish")).get("kafka"), of("kafka"), "Kafka"
    for number, rule in enumerate(_list(part.get("rules"))):
        here, entry = ("remediation", "rules", number), _table(rule)
        yield (*here, "target"), entry.get("target"), subjects, "target or system"
        metric = _table(_table(entry.get("verify")).get("metric"))
        at = (*here, "verify", "metric", "prometheus")
        yield at, metric.get("prometheus"), of("prometheus"), "Prometheus"
    environments = _table(raw.get("environments"))
    for number, freeze in enumerate(_list(part.get("freezes"))):
        for place, name in enumerate(_list(_table(freeze).get("environments"))):
            yield ("remediation", "freezes", number, "environments", place), name, environments, "environment"


def _drill_references(
    raw: dict[Any, Any], owners: dict[Any, Any]
) -> Iterator[tuple[KeyPath, Any, dict[Any, Any], str]]:
    subjects = _by_id(raw, "systems", "targets")
    for number, drill in enumerate(_list(_table(raw.get("drills")).get("plan"))):
        here, entry = ("drills", "plan", number), _table(drill)
        yield (*here, "owner"), entry.get("owner"), owners, "owner"
        for place, name in enumerate(_list(entry.get("targets"))):
            yield (*here, "targets", place), name, subjects, "target or system"


def _by_id(raw: dict[Any, Any], *tables: str) -> dict[Any, Any]:
    entries = (_table(entry) for table in tables for entry in _list(raw.get(table)))
    return {entry["id"]: entry for entry in entries if isinstance(entry.get("id"), str)}


def _dependencies(raw: dict[Any, Any]) -> Iterator[tuple[KeyPath, Any, dict[Any, Any], str]]:
    subjects = _by_id(raw, "systems", "targets")
    for table in ("targets", "systems"):
        for number, entry in enumerate(map(_table, _list(raw.get(table)))):
            for place, name in enumerate(_list(entry.get("depends_on"))):
                yield (table, number, "depends_on", place), name, subjects, "target or system"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _broken_policies(written: _Written, known: list[str]) -> Iterator[Mistake]:
    targets = written.document.value.get("targets")
    environments = _table(written.document.value.get("environments"))
    places: list[tuple[KeyPath, Any]] = [
        (("environments", name, "defaults"), _table(environment).get("defaults"))
        for name, environment in environments.items()
    ]
    places += [
        (("targets", number), target) for number, target in enumerate(targets if isinstance(targets, list) else [])
    ]
    places += [
        (("systems", number), system) for number, system in enumerate(_list(written.document.value.get("systems")))
    ]
    for path, holder in places:
        backup = _table(holder).get("backup")
        name = policy_of(backup)
        at = (*path, "backup") if isinstance(backup, str) else (*path, "backup", "policy")
        if name is not None and not isinstance(name, str):
            yield written.mistake(at, "this should be the id of a backup policy")
        elif name is not None and name not in known:
            near = get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"declared: {', '.join(known) or 'none'}"
            yield written.mistake(at, f"there is no backup policy {name!r}", remedy)


def _same_ids(written: _Written) -> Iterator[Mistake]:
    """Targets and systems share one space of names; rules have another, and so have drills."""
    value, seen = written.value, dict[tuple[str, str], KeyPath]()
    rules = _list(_table(value.get("remediation")).get("rules"))
    drills = _list(_table(value.get("drills")).get("plan"))
    places: list[tuple[str, KeyPath, Any]] = [
        ("target", ("targets", number), item) for number, item in enumerate(_list(value.get("targets")))
    ]
    places += [("target", ("systems", number), item) for number, item in enumerate(_list(value.get("systems")))]
    places += [("rule", ("remediation", "rules", number), item) for number, item in enumerate(rules)]
    places += [("drill", ("drills", "plan", number), item) for number, item in enumerate(drills)]
    for kind, place, item in places:
        path: KeyPath = (*place, "id")
        if not isinstance(name := _table(item).get("id"), str):
            continue
        if first := seen.get((kind, name)):
            line = written.document.line(written.origin(first))
            other = str(first[0]).removesuffix("s") if kind == "target" else kind
            yield written.mistake(path, f"the id {name!r} belongs to the {other} in line {line} already")
        seen.setdefault((kind, name), path)


def _in_circles(written: _Written) -> Iterator[Mistake]:
    """What depends on itself, by whatever way, could never be restored first. Each circle once, where its first member stands."""
    places: dict[str, tuple[KeyPath, list[str]]] = {}
    for table in ("targets", "systems"):
        for number, entry in enumerate(map(_table, _list(written.value.get(table)))):
            needs = [need for need in _list(entry.get("depends_on")) if isinstance(need, str)]
            if isinstance(name := entry.get("id"), str):
                places[name] = ((table, number, "depends_on"), needs)
    done: set[str] = set()
    for name in places:
        if circle := _circle(name, places, done):
            way = " → ".join([*circle, circle[0]])
            yield written.mistake(places[circle[0]][0], f"this goes round in a circle: {way}", "leave one of them out")


def _circle(name: str, places: Mapping[str, tuple[KeyPath, list[str]]], done: set[str]) -> list[str]:
    """The first one that is reached from here, empty where there is none; what was looked at is `done`."""
    way = {} if name in done else {name: iter(places[name][1])}
    while way:
        here, needs = next(reversed(way.items()))
        need = next(needs, None)
        if need is None:
            del way[here]
            done.add(here)
        elif need in way:
            done.update(way)
            names = list(way)
            return names[names.index(need) :]
        elif need in places and need not in done:
            way[need] = iter(places[need][1])
    return []


def _locked_in_themselves(written: _Written) -> Iterator[Mistake]:
    """The backup of a Vault whose data key only that Vault opens restores nothing once it is lost."""
    services = _table(written.value.get("key_services"))
    for number, system in enumerate(map(_table, _list(written.value.get("systems")))):
        keys = _table(system.get("repository")).get("keys")
        service = _table(services.get(keys)) if isinstance(keys, str) else {}
        transit = service.get("kind") == "vault-transit" and service.get("vault") == system.get("vault")
        if system.get("kind") == "vault" and "backup" in system and transit:
            yield written.mistake(
                ("systems", number, "repository", "keys"),
                "its backup would be locked with a key that stands in this very Vault",
                "name a key service of another Vault, or one of kind file",
            )


def _useless_defaults(written: _Written) -> Iterator[Mistake]:
    """Keys that no target has, also in an environment that no target is in yet."""
    valid = sorted(Target.model_fields.keys() - {"id", "environment"})
    for name, environment in _table(written.value.get("environments")).items():
        for key in _table(_table(environment).get("defaults")):
            if key not in valid:
                yield written.mistake(("environments", name, "defaults", key), *unknown_key(key, valid))


def _vault_references(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, str) and value.startswith("vault://"):
        yield path
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _vault_references(item, (*path, key))
