"""CloudEvents 1.0 over Kafka, structured and binary mode, with data in JSON; and an event as a signal.

Sources: CloudEvents 1.0.2, its JSON event format and its Kafka protocol binding (https://github.com/cloudevents/spec). Batches are not
part of the Kafka binding. Attributes become texts: what rules match on.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, cast

from orjson import loads as _loads

from ops_platform.errors import UsageError
from ops_platform.remediation.model import Signal

STRUCTURED = "application/cloudevents+json"
_REQUIRED = ("id", "source", "type")
_PREFIX = "ce_"
_DEEPEST = 400
Headers = Sequence[tuple[str, bytes | None]] | None
Packed = tuple[tuple[str, ...], str, str]
"""Attributes to be kept for long: their names, which many events share, what none of their texts holds, and the texts joined by it."""


class NotAnEventError(UsageError):
    """This message is no CloudEvent of version 1.0 that we can read: a dead letter. It never quotes data."""


@dataclass(slots=True)  # frozen would cost half a microsecond for each event
class CloudEvent:
    """`attributes` as texts, `specversion` among them; `data` as JSON has it. `time`: the attribute, None where it is absent."""

    attributes: dict[str, str]
    data: Any
    time: datetime | None
    packed: Packed | None = None  # the attributes once more, where they did not come in the value

    @property
    def type(self) -> str:
        return self.attributes["type"]


# Reading


def of_message(value: bytes | None, headers: Headers) -> CloudEvent:
    """A Kafka message as an event. Raises NotAnEventError."""
    return of_parts(parse_json(value), headers)


def parse_json(value: bytes | None) -> Any:
    """JSON in UTF-8; None for no value at all. Raises NotAnEventError, also for what PostgreSQL or a walk through it cannot bear."""
    if not value:
        return None
    try:
        found = _loads(value)
    except ValueError:
        raise NotAnEventError("the value is no JSON") from None
    # Each of these is cheap, and hardly ever leads to a look at everything.
    if (b"\\" in value and b"\\u0000" in value) or (
        len(value) >= 2 * _DEEPEST and value.count(b"{") + value.count(b"[") > _DEEPEST
    ):
        check_content(found)
    return found


def check_content(content: Any) -> None:
    """Raises NotAnEventError for a NUL in a text and for what is nested too deeply."""
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += cast("dict[str, Any]", one).values()
                below += cast("dict[str, Any]", one)
            elif isinstance(one, list):
                below += cast("list[Any]", one)
            elif isinstance(one, str) and "\0" in one:
                raise NotAnEventError("a text of it holds a NUL")
        if not below:
            return
        level = below
    raise NotAnEventError(f"it is nested more than {_DEEPEST} deep")


def of_parts(content: Any, headers: Headers) -> CloudEvent:
    """As `of_message`, with the value read already. Which mode it is, the content type says, then the headers."""
    names: _Names
    values: _Values
    names, values = zip(*headers, strict=False) if headers else ((), ())  # pyright: ignore[reportAssignmentType] - of pairs
    shape = _SHAPES.get(names) or _shape(names)
    content_type = (values[shape.content_type] or b"") if shape.content_type is not None else b""
    kind = _media_type(content_type)
    if kind == STRUCTURED:
        return of_json(content)
    if kind.startswith("application/cloudevents"):
        raise NotAnEventError(f"the content type {kind} is not {STRUCTURED}")
    if shape.places:
        return _binary(content, values, shape, content_type)
    # Nothing says what it is: some producers leave the header away, and the event itself has its version.
    if isinstance(content, dict) and "specversion" in content:
        return of_json(content)
    raise NotAnEventError("neither its content type nor its headers say that it is a CloudEvent")


_Names = tuple[str, ...]
_Values = tuple[bytes | None, ...]


class _Shape(NamedTuple):
    """Headers of certain names. `places`: which attribute stands where. `pick` takes the values of `names` out of those of the headers;
    None where these are not the names that nearly every event has: then each is looked at by itself."""

    content_type: int | None
    places: tuple[tuple[str, int], ...]
    names: _Names
    pick: Callable[[_Values], _Values] | None


_SHAPES: dict[_Names, _Shape] = {}  # messages of one producer have the same one
_MOST_SHAPES = 1024


def _shape(names: _Names) -> _Shape:
    content_type = names.index("content-type") if "content-type" in names else None
    places = tuple((name[len(_PREFIX) :], number) for number, name in enumerate(names) if name.startswith(_PREFIX))
    at = dict(places) if content_type is None else {**dict(places), "datacontenttype": content_type}
    plain = len(places) > 1 and len(at) == len(places) + (content_type is not None) and all(map(_is_name, at))
    found = _Shape(content_type, places, tuple(at), itemgetter(*at.values()) if plain else None)
    if len(_SHAPES) < _MOST_SHAPES:
        _SHAPES[names] = found
    return found


@lru_cache(maxsize=256)
def _media_type(text: bytes) -> str:
    return text.decode(errors="replace").partition(";")[0].strip().lower()


def of_json(content: Any) -> CloudEvent:
    """An event in the JSON format (structured mode), which becomes its attributes. Raises NotAnEventError."""
    if not isinstance(content, dict):
        raise NotAnEventError("a CloudEvent is a JSON object")
    found = cast("dict[str, Any]", content)
    data: Any = found.pop("data", None)
    if _all_plain(found):
        return _event(found, data)
    if (encoded := found.pop("data_base64", None)) is not None:
        data = _base64(encoded, both=data is not None)
    # null stands for an attribute that is not there.
    return _event({_name(k): _attribute(k, value) for k, value in found.items() if value is not None}, data)


def _all_plain(attributes: Mapping[str, Any]) -> bool:
    """As nearly every event is: texts alone, without control characters, under names that were looked at before."""
    try:
        return _GOOD_NAMES.issuperset(attributes) and "".join(attributes.values()).isprintable()
    except TypeError:
        return False


def _base64(value: Any, *, both: bool) -> Any:
    if both:
        raise NotAnEventError("it has data and data_base64")
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise NotAnEventError("data_base64 is no base64") from None
    return {"data_base64": value}


def _binary(content: Any, values: _Values, shape: _Shape, content_type: bytes) -> CloudEvent:
    if content_type and not _is_json(kind := _media_type(content_type)):
        raise NotAnEventError(f"its data is {kind}, and only JSON is read")
    if shape.pick is not None and (content_type or shape.content_type is None):
        # As nearly every event is: all at once, and what is not plain goes the long way.
        try:
            text = b"|".join(shape.pick(values)).decode()  # pyright: ignore[reportArgumentType] - None raises TypeError
        except (TypeError, UnicodeDecodeError):
            pass
        else:
            texts, names = text.split("|"), shape.names
            if len(texts) == len(names) and text.isprintable():
                return _event(dict(zip(names, texts, strict=False)), content, (names, "|", text))
    try:
        attributes = {name: (values[number] or b"").decode() for name, number in shape.places}
    except UnicodeDecodeError:
        raise NotAnEventError("an attribute is not in UTF-8") from None
    if len(attributes) != len(shape.places):
        raise NotAnEventError("an attribute stands there twice")
    if content_type:
        attributes["datacontenttype"] = content_type.decode(errors="replace")
    attributes = {_name(name): _attribute(name, text) for name, text in attributes.items()}
    return _event(attributes, content, (tuple(attributes), "\0", "\0".join(attributes.values())))


def _event(attributes: dict[str, str], data: Any, packed: Packed | None = None) -> CloudEvent:
    get = attributes.get
    if not (get("id") and get("source") and get("type")):
        missing = next(name for name in _REQUIRED if not get(name))
        raise NotAnEventError(f"the attribute {missing} is missing or empty")
    if get("specversion") != "1.0":
        raise NotAnEventError("specversion is not 1.0")
    if not _is_uri_reference(attributes["source"]):
        raise NotAnEventError("source is no URI reference")
    if "dataschema" in attributes and not _is_uri(attributes["dataschema"]):
        raise NotAnEventError("dataschema is no URI")
    if get("subject") == "":
        raise NotAnEventError("subject is empty")
    at = get("time")
    return CloudEvent(attributes, data, _time(at) if at is not None else None, packed)


# Attributes

_TEXTS = frozenset({"id", "source", "type", "specversion", "datacontenttype", "dataschema", "subject", "time"})
# Control characters, surrogates and noncharacters, which no attribute may hold.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


# Names that were looked at before: events of one kind have the same.
_GOOD_NAMES = set(_TEXTS)
_MOST_NAMES = 4096


def _is_name(name: str) -> bool:
    return re.fullmatch("[a-z0-9]+", name) is not None and name != "data"


def _name(name: str) -> str:
    if name not in _GOOD_NAMES:
        if not _is_name(name):
            raise NotAnEventError("an attribute's name has other characters than a-z and 0-9")
        if len(_GOOD_NAMES) < _MOST_NAMES:
            _GOOD_NAMES.add(name)
    return name


def _attribute(name: str, value: Any) -> str:
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int):
        if not -(1 << 31) <= value < 1 << 31:
            raise NotAnEventError(f"the attribute {name} is an integer of more than 32 bits")
        text = str(value)
    elif isinstance(value, str):
        text = value
    else:
        raise NotAnEventError(f"the attribute {name} is neither a text, an integer nor a boolean")
    if name in _TEXTS and not isinstance(value, str):
        raise NotAnEventError(f"the attribute {name} is no text")
    if not text.isprintable() and _FORBIDDEN.search(text):
        raise NotAnEventError(f"the attribute {name} holds a control character")
    return text


@lru_cache(maxsize=4096)
def _is_uri_reference(text: str) -> bool:
    return re.fullmatch(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2}|[^\x00-\x7f])+", text) is not None


@lru_cache(maxsize=1024)
def _is_uri(text: str) -> bool:
    return _is_uri_reference(text) and re.match("[A-Za-z][A-Za-z0-9+.-]*:", text) is not None


@lru_cache(maxsize=256)
def _is_json(kind: str) -> bool:
    return kind.endswith("+json") or kind.partition("/")[2] == "json"


_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:)(\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


def _time(text: str) -> datetime:
    """RFC 3339, which is less than `fromisoformat` takes, and with its leap second."""
    if text[4:19:3] == "--T::" and (text[-1] == "Z" or text[-6] in "+-") and "," not in text:
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            pass
    found = _RFC3339.fullmatch(text)
    if found is None:
        raise NotAnEventError("time is not as in RFC 3339")
    date, minutes, seconds, fraction, zone = found.groups(default="")
    leap = seconds == "60"
    try:
        at = datetime.fromisoformat(f"{date}T{minutes}{'59' if leap else seconds}{fraction}{zone.upper()}")
        return at + timedelta(seconds=1) if leap else at
    except (ValueError, OverflowError):
        raise NotAnEventError("time is no moment that there is") from None


# Writing


def to_json(attributes: Mapping[str, str], data: str) -> bytes:
    """An event in the JSON format, for structured mode. `data` is JSON already, and stands in it as it is."""
    from orjson import Fragment, dumps

    return dumps({"specversion": "1.0", **attributes, "datacontenttype": "application/json", "data": Fragment(data)})


# Signals


class EventLabels(Mapping[str, str]):
    """Attributes, and `data.a.b` for each text, number and boolean of the data: numbers as JSON writes them, null not at all.

    Of a message that was found good hardly more is kept than its bytes, which are read again when somebody asks for more than type and
    source. A tick reads many thousands, and most are told by their type to be of no interest: as dictionaries they would cost more
    than everything else.
    """

    __slots__ = ("_all", "_content", "_data", "_packed", "_source", "_type", "_value")

    def __init__(self, event: CloudEvent, value: bytes | None, content: Callable[[bytes | None], Any]) -> None:
        """`content` reads `value` once more, as it did before."""
        attributes = event.attributes
        self._type = attributes["type"]
        self._source = attributes["source"]
        self._packed = event.packed
        self._value = value
        self._content = content
        self._all: dict[str, str] | None = None
        self._data: Any = None

    def _whole(self) -> dict[str, str]:
        if self._all is None:
            content = self._content(self._value)
            event = of_json(content) if self._packed is None else CloudEvent(_unpacked(self._packed), content, None)
            self._data = event.data
            self._all = labels_of(event)
        return self._all

    def data(self) -> Any:
        self._whole()
        return self._data

    def __getitem__(self, name: str) -> str:
        if name == "type":
            return self._type
        return self._source if name == "source" else self._whole()[name]

    def get(self, name: str, default: Any = None) -> Any:
        if name == "type":
            return self._type
        return self._source if name == "source" else self._whole().get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def __repr__(self) -> str:
        return repr(self._whole())


class EventData(Mapping[str, Any]):
    """The data of the event whose labels are given, when it is asked for."""

    __slots__ = ("_labels",)

    def __init__(self, labels: EventLabels) -> None:
        self._labels = labels

    def _whole(self) -> Mapping[str, Any]:
        return _as_mapping(self._labels.data())

    def __getitem__(self, name: str) -> Any:
        return self._whole()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def __repr__(self) -> str:
        return repr(self._whole())


def _unpacked(packed: Packed) -> dict[str, str]:
    names, between, text = packed
    return dict(zip(names, text.split(between), strict=True))


def labels_of(event: CloudEvent) -> dict[str, str]:
    return {**event.attributes, **_flat(event.data)}


def _as_mapping(data: Any) -> Mapping[str, Any]:
    """Data that is no object is the value of `data`."""
    if data is None:
        return {}
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {"data": data}


def _flat(data: Any) -> dict[str, str]:
    labels: dict[str, str] = {}
    waiting = [("data", data)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}", inner) for key, inner in cast("dict[str, Any]", value).items()]
        elif isinstance(value, str):
            labels[name] = value
        elif isinstance(value, bool):
            labels[name] = "true" if value else "false"
        elif isinstance(value, int | float):
            labels[name] = repr(value)
    return labels


def signal_of_event(
    event: CloudEvent | Mapping[str, Any], *, fingerprint: str, seen_at: datetime, at: datetime | None = None
) -> Signal:
    """The signal of an event, or of its JSON. It begins at its `time`, else `at` (the message's), else when it was seen.

    Data that is no object is the value of `data`. Raises NotAnEventError.
    """
    found = event if isinstance(event, CloudEvent) else of_json(dict(event))
    return _signal(
        fingerprint, found.type, labels_of(found), found.time or at or seen_at, seen_at, _as_mapping(found.data)
    )


def signal_of_message(
    fingerprint: str, event: CloudEvent, labels: EventLabels, seen_at: datetime, at: datetime | None
) -> Signal:
    """As `signal_of_event`, of a message whose event was found good and is not kept."""
    return _signal(
        fingerprint, event.attributes["type"], labels, event.time or at or seen_at, seen_at, EventData(labels)
    )


def _signal(
    fingerprint: str,
    name: str,
    labels: Mapping[str, str],
    starts_at: datetime,
    seen_at: datetime,
    data: Mapping[str, Any],
) -> Signal:
    """What its own constructor does. A frozen dataclass sets field by field, which takes three times as long."""
    signal = _new(Signal)
    fields: dict[str, Any] = {
        "source": "kafka",
        "fingerprint": fingerprint,
        "name": name,
        "labels": labels,
        "starts_at": starts_at,
        "seen_at": seen_at,
        "ends_at": None,
        "annotations": _NOTHING,
        "data": data,
        "silenced": False,
        "inhibited": False,
        "link": None,
    }
    _set(signal, "__dict__", fields)
    return signal


_new, _set = object.__new__, object.__setattr__
_NOTHING: dict[str, str] = {}
