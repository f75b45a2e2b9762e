"""Reads YAML into plain values and remembers the line of each, in one pass over the parser's events.

YAML without its traps: `no` is a word, `22:00` and dates are texts, `010` is no eight; tags are refused, keys are words,
and neither aliases that multiply nor lists a mile deep can hold the reader up.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ops_platform.errors import InventoryError

KeyPath = tuple[str | int, ...]

_MAX_BYTES = 64 << 20
_MAX_VALUES = 1_000_000
_MAX_DEPTH = 64
_WORDS = dict.fromkeys(("", "~", "null", "Null")) | {"true": True, "True": True, "false": False, "False": False}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?[0-9]{1,18}\.[0-9]*")


class Document:
    """`value` is the whole file; `duplicates` are the keys that stand twice in one mapping, with the later line."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self.duplicates: list[tuple[KeyPath, int]] = []
        self._first = 1
        self._lines: dict[int, dict[Any, int]] = {}  # by identity of the mapping or list: `value` keeps them alive
        self.value: Any = _Reader(self, _text(data, name)).read() if data else None

    def line(self, path: KeyPath) -> int:
        """The line of the deepest part of `path` that is there."""
        here, line = self.value, self._first
        for step in path:
            found = self._lines.get(id(here), {}).get(step)
            if found is None:
                break
            here, line = here[step], found
        return line

    def fail(self, what: str, line: int, remedy: str | None = None) -> InventoryError:
        return InventoryError(what, where=f"{self.name}:{line}", remedy=remedy)

    def note(self, container: Any, lines: dict[Any, int]) -> None:
        self._lines[id(container)] = lines

    def begins(self, line: int) -> None:
        self._first = line

    def lines_of(self, container: Any) -> dict[Any, int]:
        return self._lines[id(container)]


def _text(data: bytes, name: str) -> str:
    if len(data) > _MAX_BYTES:
        raise InventoryError("the inventory is larger than 64 MiB", where=name)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InventoryError("this is not UTF-8", where=f"{name}:{line}", remedy="save the file as UTF-8") from None


class _Reader:
    """Each value comes with its weight: how many values it unfolds to where aliases repeat it."""

    def __init__(self, document: Document, text: str) -> None:
        self._document = document
        self._text = text
        self._events: Any = yaml.parse(text, Loader=yaml.CSafeLoader)
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._path: list[str | int] = []

    def read(self) -> Any:
        try:
            next(self._events)  # the stream begins
            if isinstance(next(self._events), yaml.StreamEndEvent):
                return None
            event = next(self._events)
            self._document.begins(event.start_mark.line + 1)
            value, _ = self._value(event)
            next(self._events)  # the document ends
            after = next(self._events)
        except yaml.YAMLError as error:
            raise self._not_yaml(error) from None
        if not isinstance(after, yaml.StreamEndEvent):
            raise self._fail(after, "a second document begins here; an inventory is one")
        return value

    def _value(self, event: Any) -> tuple[Any, int]:
        if isinstance(event, yaml.AliasEvent):
            # An anchor is known when its value is whole: a value that holds itself cannot be written.
            if event.anchor not in self._anchors:
                raise self._fail(
                    event, "this alias (*…) has no anchor above it", "a text that begins with * needs quotes"
                )
            return self._anchors[event.anchor]
        if event.tag is not None:
            raise self._fail(event, "tags (!…) have no meaning here", "a text that begins with ! needs quotes")
        if isinstance(event, yaml.ScalarEvent):
            if event.anchor and not event.value:
                raise self._fail(event, "this anchor (&…) names nothing", "a text that begins with & needs quotes")
            found = _scalar(event), 1
        elif len(self._path) >= _MAX_DEPTH:
            raise self._fail(event, f"this is nested more than {_MAX_DEPTH} deep")
        else:
            found = self._mapping() if isinstance(event, yaml.MappingStartEvent) else self._sequence()
            if found[1] > _MAX_VALUES:
                raise self._fail(event, "aliases unfold this to more than a million values")
        if event.anchor:
            self._anchors[event.anchor] = found
        return found

    def _sequence(self) -> tuple[list[Any], int]:
        items: list[Any] = []
        lines: dict[Any, int] = {}
        weight = 1
        event: Any
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            lines[len(items)] = event.start_mark.line + 1
            self._path.append(len(items))
            value, more = self._value(event)
            self._path.pop()
            items.append(value)
            weight += more
        self._document.note(items, lines)
        return items, weight

    def _mapping(self) -> tuple[dict[Any, Any], int]:
        found: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        merged: list[tuple[Any, Any]] = []
        weight = 1
        event: Any
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key, line = self._key(event), event.start_mark.line + 1
            self._path.append(key)
            begin = next(self._events)
            value, more = self._value(begin)
            weight += more
            if key == "<<" and event.implicit[0]:
                merged.append((begin, value))
            elif key in found:
                self._document.duplicates.append((tuple(self._path), line))
            else:
                found[key], lines[key] = value, line
            self._path.pop()
        for begin, value in merged:
            self._merge(found, lines, begin, value)
        self._document.note(found, lines)
        return found, weight

    def _merge(self, found: dict[Any, Any], lines: dict[Any, int], begin: Any, value: Any) -> None:
        """`<<`: what is not said here comes from there, and keeps its line."""
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, dict):
                raise self._fail(begin, "<< takes a mapping or a list of mappings")
            for key, item in source.items():
                if key not in found:
                    found[key], lines[key] = item, self._document.lines_of(source)[key]

    def _key(self, event: Any) -> str | int:
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            raise self._fail(event, "a key is a word or a number, not a structure, an alias or a tag")
        number = _scalar(event)
        return number if isinstance(number, int) and not isinstance(number, bool) else event.value

    def _fail(self, event: Any, what: str, remedy: str | None = None) -> InventoryError:
        return self._document.fail(what, event.start_mark.line + 1, remedy)

    def _not_yaml(self, error: yaml.YAMLError) -> InventoryError:
        """The parser's words without the text that they are about: it may be a secret."""
        if isinstance(error, yaml.reader.ReaderError):
            line = self._text.encode()[: error.position].count(b"\n") + 1
            return self._document.fail(f"this is not YAML: {error.reason}", line, "remove the invisible character")
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it cannot be read"
        context = f" {words}" if (words := getattr(error, "context", None)) else ""
        line = mark.line + 1 if mark else 1
        rest = (self._text.splitlines() or [""])[line - 1 : line]
        tab = "indent with spaces, not with tabs" if rest and rest[0].lstrip(" ").startswith("\t") else None
        return self._document.fail(f"this is not YAML: {problem}{context}", line, tab)


def _scalar(event: Any) -> Any:
    text: str = event.value
    if not event.implicit[0]:
        return text  # it was quoted
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in "-+0123456789":
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
    return text
