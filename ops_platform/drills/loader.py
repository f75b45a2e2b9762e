"""Reads runbooks: every mistake at once, each with file, line, key path and the nearest valid key, as the inventory's are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from ops_platform.drills.registry import doings
from ops_platform.drills.runbook import AnyStep, Runbook, filled_in, parameters_named
from ops_platform.errors import InventoryError, UsageError
from ops_platform.inventory.document import Document, KeyPath
from ops_platform.inventory.loader import InventoryMistakes, Mistake, dotted, in_our_words, unknown_key

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

STEP_KINDS: dict[str, type[BaseModel]] = {
    get_args(member.model_fields["kind"].annotation)[0]: member for member in get_args(get_args(AnyStep)[0])
}


def read(data: bytes, name: str) -> Runbook:
    """Raises InventoryError (InventoryMistakes with all of them)."""
    document = Document(data, name)
    if not isinstance(document.value, dict):
        raise document.fail("a runbook is a mapping that begins with `version: 1`", 1)
    mistakes = [_at(document, path, "this key stands here twice", line=line) for path, line in document.duplicates]
    runbook = None
    try:
        runbook = Runbook.model_validate(document.value)
    except ValidationError as error:
        mistakes += [_mistake(item, document) for item in error.errors(include_url=False)]
    mistakes += _what_a_schema_cannot_say(document, runbook)
    if mistakes or runbook is None:
        raise InventoryMistakes(sorted(set(mistakes), key=lambda m: (int(m.where.rpartition(":")[2]), m.key, m.what)))
    return runbook


def _at(document: Document, path: KeyPath, what: str, remedy: str | None = None, *, line: int | None = None) -> Mistake:
    return Mistake(f"{document.name}:{line or document.line(path)}", dotted(path), what, remedy)


def _mistake(item: Any, document: Document) -> Mistake:
    path: KeyPath = tuple(step for step in item["loc"] if step != "[key]")
    root: type[BaseModel] = Runbook
    inside: KeyPath = path[:-1]
    if path[:1] == ("steps",) and len(path) > 2 and path[2] in STEP_KINDS:
        root, path = STEP_KINDS[str(path[2])], (*path[:2], *path[3:])  # pydantic names the kind in between
        inside = path[2:-1]
    kind, last = item["type"], item["loc"][-1] if item["loc"] else ""
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_kind(document, path)
    if kind == "extra_forbidden":
        valid = sorted(field.alias or key for key, field in _fields(root, inside).items())
        return _at(document, path, *unknown_key(last, valid))
    if kind == "missing":
        return _at(document, path, f"the key {str(last)!r} is missing")
    return _at(document, path, in_our_words(item))


def _fields(root: type[BaseModel], inside: KeyPath) -> Mapping[str, Any]:
    """The fields of the model at a place; runbooks are shallow: a list or a table of models, or the root."""
    here: Any = root
    for step in inside:
        if isinstance(step, str) and isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[step].annotation if step in here.model_fields else None
        if arguments := get_args(here):
            here = arguments[-1]
    return here.model_fields if isinstance(here, type) and issubclass(here, BaseModel) else {}


def _unknown_kind(document: Document, path: KeyPath) -> Mistake:
    step = document.value["steps"][path[1]]
    known = sorted(STEP_KINDS)
    if "kind" not in step:
        return _at(document, path, "the key 'kind' is missing", f"one of {', '.join(known)}")
    near = get_close_matches(str(step["kind"]), known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}"
    return _at(document, (*path, "kind"), "there is no such kind of step", remedy)


# What a schema cannot say


def _what_a_schema_cannot_say(document: Document, runbook: Runbook | None) -> Iterator[Mistake]:
    """On the file as it is written, so that these mistakes stand beside those of the types."""
    raw = document.value.get("steps")
    steps = [step if isinstance(step, dict) else {} for step in raw] if isinstance(raw, list) else []
    ids = [step.get("id") for step in steps]
    known = [name for name in ids if isinstance(name, str)]
    for number, step in enumerate(steps):
        here: KeyPath = ("steps", number)
        if isinstance(name := step.get("id"), str) and ids.index(name) < number:
            yield _at(document, (*here, "id"), f"the id {name!r} belongs to another step already")
        needs = step.get("needs")
        for place, need in enumerate(needs if isinstance(needs, list) else []):
            if isinstance(need, str) and need not in known:
                yield _at(document, (*here, "needs", place), f"there is no step {need!r}", *_near(need, known))
        yield from _doing(document, here, step)
    probes = [step.get("id") for step in steps if step.get("kind") == "probe"]
    conditions = document.value.get("abort_when")
    for number, condition in enumerate(conditions if isinstance(conditions, list) else []):
        named = condition.get("probe") if isinstance(condition, dict) else None
        if isinstance(named, str) and named not in probes:
            yield _at(document, ("abort_when", number, "probe"), f"there is no probe {named!r}", *_near(named, probes))
    if runbook is not None and all(need in known for step in runbook.steps for need in step.needs):
        yield from _whole(document, runbook)


def _near(name: str, known: list[Any]) -> tuple[str]:
    near = get_close_matches(name, [str(one) for one in known], n=1)
    return (f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(map(str, known)) or 'none'}",)


def _doing(document: Document, here: KeyPath, step: dict[Any, Any]) -> Iterator[Mistake]:
    """What it does: registered, for such a step, and given what it takes."""
    name, kind = step.get("does"), step.get("kind")
    if not isinstance(name, str) or kind not in STEP_KINDS:
        return
    found = doings().get(name)
    if found is None:
        yield _at(document, (*here, "does"), f"nothing is registered under {name!r}", *_near(name, list(doings())))
        return
    if kind not in found.kinds:
        kinds = ", ".join(sorted(found.kinds))
        yield _at(document, (*here, "does"), f"{name} is for steps of kind {kinds}, and this is one of kind {kind}")
        return
    given = step.get("with", {})
    declared = document.value.get("parameters")
    declared = declared if isinstance(declared, dict) else {}
    for named in parameters_named(given):
        if named not in declared:
            yield _at(document, (*here, "with"), f"there is no parameter {named!r}", *_near(named, list(declared)))
            return
    if not isinstance(given, dict):
        return
    values = {key: body.get("default") for key, body in declared.items() if isinstance(body, dict)}
    open_ones = {key for key, value in given.items() if any(values.get(n) is None for n in parameters_named(value))}
    try:
        found.given.model_validate(filled_in(given, values))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["loc"] and item["loc"][0] in open_ones:
                continue  # it is given when the drill is held, and looked at then
            path: KeyPath = (*here, "with", *item["loc"])
            if item["type"] == "extra_forbidden":
                yield _at(document, path, *unknown_key(item["loc"][-1], sorted(found.given.model_fields)))
            elif item["type"] == "missing":
                yield _at(document, path, f"the key {str(item['loc'][-1])!r} is missing; {name} needs it")
            else:
                yield _at(document, path, in_our_words(item))


def _whole(document: Document, runbook: Runbook) -> Iterator[Mistake]:
    """The graph, and that what is broken is put back."""
    try:
        for mode in runbook.modes:
            runbook.steps_for(mode)
    except ValueError as error:
        yield _at(document, ("steps",), str(error), "take one of the needs away")
        return
    for number, step in enumerate(runbook.steps):
        if step.kind == "teardown":
            continue
        after = [need for need in step.needs if runbook.step(need).kind == "teardown"]
        if after:
            yield _at(document, ("steps", number, "needs"), f"{step.id} comes after the teardown {after[0]}")
    if any(step.kind in ("inject", "act") for step in runbook.steps):
        teardown = [step for step in runbook.steps if step.kind == "teardown" and step.only in (None, "drill")]
        if not teardown:
            yield _at(document, ("steps",), "it changes something, and no step of kind teardown puts it back")


# Where they stand


@cache
def shipped() -> Mapping[str, Runbook]:
    """Those that come with the platform, by id."""
    folder = resources.files("ops_platform.drills").joinpath("runbooks")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {(made := read(file.read_bytes(), file.name)).id: made for file in files}


def runbooks(access: Access) -> Mapping[str, Runbook]:
    """The shipped ones and a company's own. Raises InventoryError; an own one may not take the id of a shipped one."""
    found = dict(shipped())
    declared = access.inventory.drills.runbooks if access.inventory.drills else None
    for file in _files(access.path(declared)) if declared else ():
        made = read(file.read_bytes(), file.name)
        if made.id in found:
            raise InventoryError(
                f"the id {made.id!r} belongs to another runbook already", where=str(file), remedy="choose another id"
            )
        found[made.id] = made
    return found


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InventoryError("there is no such folder", where=str(folder), remedy="correct drills.runbooks")
    return sorted(folder.glob("*.yaml"))


def runbook_named(access: Access, name: str) -> Runbook:
    """Raises UsageError that names the nearest ones."""
    known = runbooks(access)
    if found := known.get(name):
        return found
    raise UsageError(f"there is no runbook {name!r}", remedy=_near(name, list(known))[0])
