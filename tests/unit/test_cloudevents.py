"""CloudEvents over Kafka: what the specification allows and forbids, and the same as its own SDK reads and writes."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from cloudevents.core.bindings import kafka as sdk
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent as SdkEvent
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.events.cloudevents import (
    CloudEvent,
    EventLabels,
    NotAnEventError,
    of_json,
    of_message,
    parse_json,
    signal_of_event,
    signal_of_message,
    to_json,
)
from ops_platform.remediation.model import Signal

STRUCTURED = [("content-type", b"application/cloudevents+json")]
NOW = datetime(2026, 11, 1, tzinfo=UTC)
# As in the examples of the specification (JSON event format 1.0.2, section 4).
EXAMPLE: dict[str, Any] = {
    "specversion": "1.0",
    "type": "com.github.pull_request.opened",
    "source": "https://github.com/cloudevents/spec/pull",
    "subject": "123",
    "id": "A234-1234-1234",
    "time": "2018-04-05T17:31:00Z",
    "comexampleextension1": "value",
    "comexampleothervalue": 5,
    "unsetextension": None,
    "datacontenttype": "application/json",
    "data": {"appinfoA": "abc", "appinfoB": 123, "appinfoC": True},
}


def example(**more: Any) -> dict[str, Any]:
    return {**EXAMPLE, **more}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in EXAMPLE.items() if key != name}


def binary(value: dict[str, Any]) -> list[tuple[str, bytes | None]]:
    kind = value.get("datacontenttype")
    headers = [("content-type", kind.encode())] if kind else []
    return [*headers, *((f"ce_{k}", str(v).encode()) for k, v in value.items() if k not in ("data", "datacontenttype") and v is not None)]  # fmt: skip


# What the specification allows


def test_the_example_of_the_specification_is_read_in_both_modes() -> None:
    structured = of_message(json.dumps(EXAMPLE).encode(), STRUCTURED)
    assert structured.attributes == {
        "specversion": "1.0", "type": "com.github.pull_request.opened", "source": "https://github.com/cloudevents/spec/pull",
        "subject": "123", "id": "A234-1234-1234", "time": "2018-04-05T17:31:00Z", "comexampleextension1": "value",
        "comexampleothervalue": "5", "datacontenttype": "application/json",
    }  # fmt: skip
    assert structured.data == EXAMPLE["data"]
    assert structured.time == datetime(2018, 4, 5, 17, 31, tzinfo=UTC)
    found = of_message(json.dumps(EXAMPLE["data"]).encode(), binary(EXAMPLE))
    assert (found.attributes, found.data, found.time) == (structured.attributes, structured.data, structured.time)


@pytest.mark.parametrize(
    "headers",
    [
        [("content-type", b"application/cloudevents+json; charset=UTF-8")],
        [("content-type", b"Application/CloudEvents+JSON")],
        [("other", b"x"), ("content-type", b"application/cloudevents+json"), ("other", b"y")],
        [],
        None,
    ],
)
def test_an_event_in_structured_mode_is_known_by_its_content_type_or_its_version(headers: Any) -> None:
    assert of_message(json.dumps(EXAMPLE).encode(), headers).type == EXAMPLE["type"]


@pytest.mark.parametrize(
    ("more", "name", "text"),
    [
        ({"flag": True}, "flag", "true"),
        ({"number": -(2**31)}, "number", str(-(2**31))),
        ({"text": "ünïcode ☃"}, "text", "ünïcode ☃"),
        ({"text": ""}, "text", ""),
        ({"source": "urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66"}, "source", "urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66"),
        ({"source": "mailto:x@example.com"}, "source", "mailto:x@example.com"),
        ({"source": "/ünder/%20"}, "source", "/ünder/%20"),
        ({"dataschema": "https://example.com/s#1"}, "dataschema", "https://example.com/s#1"),
    ],
)  # fmt: skip
def test_attributes_become_texts(more: dict[str, Any], name: str, text: str) -> None:
    assert of_json(example(**more)).attributes[name] == text


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-01T10:00:00Z", datetime(2026, 11, 1, 10, tzinfo=UTC)),
        ("2026-11-01t10:00:00z", datetime(2026, 11, 1, 10, tzinfo=UTC)),
        ("2026-11-01T10:00:00.123456789+05:30", datetime(2026, 11, 1, 10, 0, 0, 123456, timezone(timedelta(hours=5, minutes=30)))),
        ("2026-11-01T10:00:00-00:00", datetime(2026, 11, 1, 10, tzinfo=UTC)),
        ("2016-12-31T23:59:60Z", datetime(2017, 1, 1, tzinfo=UTC)),
    ],
)  # fmt: skip
def test_times_are_those_of_rfc_3339(text: str, moment: datetime) -> None:
    assert of_json(example(time=text)).time == moment


@pytest.mark.parametrize("data", [None, 1, 1.5, "text", True, [], [1, {"a": 2}], {}, {"a": None}])
def test_data_is_any_json(data: Any) -> None:
    assert of_json(example(data=data)).data == data


# What it forbids


@pytest.mark.parametrize(
    ("event", "said"),
    [
        *((without(name), f"{name} is missing") for name in ("id", "source", "type")),
        *((example(**{name: ""}), f"{name} is missing or empty") for name in ("id", "source", "type")),
        (without("specversion"), "specversion"),
        (example(specversion="0.3"), "specversion"),
        (example(specversion=1.0), "specversion"),
        (example(subject=""), "subject is empty"),
        (example(source="not a uri"), "source is no URI"),
        (example(source="%zz"), "source is no URI"),
        (example(dataschema="relative"), "dataschema is no URI"),
        (example(dataschema=""), "dataschema is no URI"),
        (example(id=5), "id is no text"),
        (example(type=True), "type is no text"),
        (example(other=1.5), "neither a text"),
        (example(other=2**31), "more than 32 bits"),
        (example(other=[1]), "neither a text"),
        (example(other={"a": 1}), "neither a text"),
        (example(Other="x"), "name has other"),
        (example(my_name="x"), "name has other"),
        (example(id="a\x01b"), "control character"),
        (example(other="a\x85b"), "control character"),
        (example(other="a\ufffeb"), "control character"),
        (example(data_base64="YQ=="), "data and data_base64"),
        ({**without("data"), "data_base64": "%%%"}, "no base64"),
        ({**without("data"), "data_base64": 5}, "no base64"),
        *((example(time=text), "time is") for text in (
            "2026-11-01", "2026-11-01T10:00:00", "2026-11-01 10:00:00Z", "2026-11-01T10:00Z", "2026-13-01T10:00:00Z", "yesterday",
            "2026-11-01T10:00:00+0100", "20261101T100000Z", "2026-W44-7T10:00:00Z", "2026-11-01T10:00:00,5Z", "2026-11-01T25:00:00Z",
        )),
        ([EXAMPLE], "a JSON object"),
        ("text", "a JSON object"),
        (None, "a JSON object"),
    ],
)  # fmt: skip
def test_what_is_no_event_is_refused_and_not_quoted(event: Any, said: str) -> None:
    with pytest.raises(NotAnEventError, match=said) as caught:
        of_message(json.dumps(event).encode(), STRUCTURED)
    assert "yesterday" not in caught.value.what


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ([*binary(EXAMPLE), ("ce_id", b"other")], "twice"),
        ([*binary(EXAMPLE), ("ce_Other", b"x")], "name has other"),
        ([*binary(EXAMPLE), ("ce_", b"x")], "name has other"),
        ([*binary(EXAMPLE), ("ce_other", b"\xff")], "UTF-8"),
        ([*binary(EXAMPLE), ("ce_other", b"a\x07")], "control character"),
        ([("content-type", b"text/plain"), *binary(without("datacontenttype"))], "only JSON"),
        (binary(without("id")), "id is missing"),
        ([("content-type", b"application/cloudevents+avro")], "is not application/cloudevents"),
        ([("content-type", b"application/json")], "neither"),
    ],
)
def test_what_is_no_event_in_binary_mode_is_refused(headers: Any, said: str) -> None:
    with pytest.raises(NotAnEventError, match=said):
        of_message(b"{}", headers)


def test_what_later_work_could_not_bear_is_refused() -> None:
    deep = b'{"data": ' + b"[" * 401 + b"]" * 401 + b"}"
    wide = json.dumps({"data": [[] for _ in range(1000)], "text": "\\u0000"}).encode()
    with pytest.raises(NotAnEventError, match="deep"):
        parse_json(deep)
    with pytest.raises(NotAnEventError, match="NUL"):
        parse_json(b'{"a": [{"b\\u0000": 1}]}')
    assert parse_json(wide)["text"] == "\\u0000"


HEADERS = st.lists(
    st.tuples(st.sampled_from(["content-type", "ce_id", "ce_x", "other"]), st.none() | st.binary(max_size=30)),
    max_size=4,
)


@given(st.binary(max_size=200), HEADERS)
def test_garbage_is_refused_and_never_an_accident(value: bytes, headers: Any) -> None:
    with pytest.raises(NotAnEventError):
        of_message(value, headers)


# As the SDK


TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Zl", "Zp", "Co"]), min_size=1, max_size=20)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex("[a-z][a-z0-9]{0,18}", fullmatch=True).filter(
    lambda name: name not in {"id", "source", "type", "specversion", "time", "subject", "data", "datacontenttype", "dataschema"}
)  # fmt: skip
EVENTS = st.builds(
    lambda required, more, subject, at, data: SdkEvent(
        {**more, **required, **({"subject": subject} if subject else {}), "time": at, "datacontenttype": "application/json"}, data
    ),
    st.fixed_dictionaries({"id": TEXT, "source": st.just("/s") | st.just("urn:x:y"), "type": TEXT, "specversion": st.just("1.0")}),
    st.dictionaries(NAMES, TEXT, max_size=3),
    st.none() | TEXT,
    st.datetimes(timezones=st.just(UTC)),
    st.dictionaries(TEXT, JSON, max_size=4),
)  # fmt: skip


def texts(event: SdkEvent) -> dict[str, str]:
    return {name: value for name, value in event.get_attributes().items() if isinstance(value, str)}


@given(EVENTS, st.booleans())
def test_what_the_sdk_writes_we_read(event: SdkEvent, structured: bool) -> None:
    message = (sdk.to_structured if structured else sdk.to_binary)(event, JSONFormat())
    found = of_message(message.value, list(message.headers.items()))
    assert {name: text for name, text in found.attributes.items() if name != "time"} == texts(event)
    assert found.time == event.get_time()
    assert found.data == event.get_data()


@given(EVENTS)
def test_what_we_write_the_sdk_reads(event: SdkEvent) -> None:
    attributes = {**texts(event), "time": "2026-11-01T10:00:00.000000Z"}
    value = to_json(attributes, json.dumps(event.get_data()))
    message = sdk.KafkaMessage({"content-type": b"application/cloudevents+json; charset=UTF-8"}, None, value)
    found = sdk.from_structured(message, JSONFormat())
    assert texts(found) == texts(event)
    assert found.get_time() == datetime(2026, 11, 1, 10, tzinfo=UTC)
    assert found.get_data() == event.get_data()


# Signals


def test_a_signal_has_every_field_that_its_own_constructor_sets() -> None:
    """It is made past the constructor, for speed."""
    made = signal_of_event(EXAMPLE, fingerprint="t/0/1", seen_at=NOW)
    assert set(vars(made)) == {field.name for field in fields(Signal)}
    assert made == Signal("kafka", "t/0/1", EXAMPLE["type"], made.labels, made.starts_at, NOW, data=EXAMPLE["data"])
    assert Signal.from_json(json.loads(json.dumps(made.as_json()))) == made


def test_labels_are_the_attributes_and_the_scalars_of_the_data() -> None:
    data = {"a": {"b": {"c": 1}}, "f": 0.1, "t": True, "n": None, "l": [1, 2], "s": "x", "big": 2**60, "d.e": "dot"}
    labels = signal_of_event(example(data=data), fingerprint="t/0/1", seen_at=NOW).labels
    assert {name: text for name, text in labels.items() if name.startswith("data.")} == {
        "data.a.b.c": "1", "data.f": "0.1", "data.t": "true", "data.s": "x", "data.big": str(2**60), "data.d.e": "dot",
    }  # fmt: skip
    assert labels["comexampleothervalue"] == "5"


@pytest.mark.parametrize(
    ("data", "label", "kept"),
    [("x", "x", {"data": "x"}), (5, "5", {"data": 5}), ([1], None, {"data": [1]}), (None, None, {})],
)  # fmt: skip
def test_data_that_is_no_object_is_kept_as_data(data: Any, label: str | None, kept: Any) -> None:
    signal = signal_of_event(example(data=data), fingerprint="t/0/1", seen_at=NOW)
    assert signal.labels.get("data") == label
    assert signal.data == kept


def test_binary_data_is_kept_in_base64() -> None:
    signal = signal_of_event({**without("data"), "data_base64": "YWJj"}, fingerprint="t/0/1", seen_at=NOW)
    assert signal.data == {"data_base64": "YWJj"}


def test_an_event_begins_at_its_time_else_its_messages_else_when_it_was_seen() -> None:
    at = NOW - timedelta(hours=1)
    assert signal_of_event(EXAMPLE, fingerprint="f", seen_at=NOW, at=at).starts_at == datetime(
        2018, 4, 5, 17, 31, tzinfo=UTC
    )
    assert signal_of_event(without("time"), fingerprint="f", seen_at=NOW, at=at).starts_at == at
    assert signal_of_event(without("time"), fingerprint="f", seen_at=NOW).starts_at == NOW


@given(EVENTS, st.booleans())
def test_a_message_that_is_opened_later_says_what_it_said_at_once(event: SdkEvent, structured: bool) -> None:
    message = (sdk.to_structured if structured else sdk.to_binary)(event, JSONFormat())
    headers: list[tuple[str, bytes | None]] = list(message.headers.items())
    found: CloudEvent = of_message(message.value, headers)
    at_once = signal_of_event(found, fingerprint="f", seen_at=NOW)
    later = EventLabels(found, message.value, parse_json)
    signal = signal_of_message("f", found, later, NOW, None)
    assert later["type"] == later.get("type") == at_once.labels["type"]
    assert later.get("source") == later["source"] == at_once.labels["source"]
    assert later.get("no such label", "x") == "x"
    assert signal == at_once
    assert dict(signal.labels) == at_once.labels
    assert dict(signal.data) == at_once.data
    assert len(later) == len(at_once.labels)
    assert signal.as_json() == at_once.as_json()


@pytest.mark.parametrize("text", ["", "|", "a|b", "a b", "non\u00a0breaking|", "\u4e8b\u4ef6", "%00"])
def test_an_attribute_in_a_header_is_any_text(text: str) -> None:
    value = json.dumps(EXAMPLE["data"]).encode()
    found = of_message(value, [*binary(EXAMPLE), ("ce_other", text.encode())])
    assert found.attributes == {**of_message(value, binary(EXAMPLE)).attributes, "other": text}
    assert EventLabels(found, value, parse_json)["other"] == text


def test_an_attribute_of_its_own_does_not_stand_in_for_the_content_type() -> None:
    value = json.dumps(EXAMPLE["data"]).encode()
    found = of_message(value, [*binary(EXAMPLE), ("ce_datacontenttype", b"text/plain")])
    assert found.attributes["datacontenttype"] == of_message(value, binary(EXAMPLE)).attributes["datacontenttype"]


def test_a_header_without_a_value_is_an_empty_attribute() -> None:
    value = json.dumps(EXAMPLE["data"]).encode()
    assert of_message(value, [*binary(EXAMPLE), ("ce_other", None)]).attributes["other"] == ""
