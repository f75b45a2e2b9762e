"""What a metric says of an action, and how a signal's labels get into PromQL."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.clients.http import BadAnswerError, HttpApi
from ops_platform.clients.prometheus import MOST_POINTS, Measured, Prometheus, Sample, fill, judge
from ops_platform.errors import OpsError, UnreachableError, UsageError
from ops_platform.inventory.remediation import MetricCheck
from tests.integration.http_faults import FaultyProxy, never_answer, reply

NOW = datetime(2026, 11, 1, tzinfo=UTC)


def check(holds: str = "< 0.9", **more: Any) -> MetricCheck:
    return MetricCheck(prometheus="p", query="x", holds=holds, **more)


def samples(*values: float) -> list[Sample]:
    return [Sample({"n": str(number)}, value, NOW) for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("asked", "values", "measured"),
    [
        (check(), [0.5], Measured.GOOD),
        (check(), [0.5, 0.89], Measured.GOOD),
        (check(), [0.5, 0.9], Measured.NOT_YET),
        (check(), [], Measured.NOT_YET),
        (check(empty_is_good=True), [], Measured.GOOD),
        (check(empty_is_good=True), [1.0], Measured.NOT_YET),
        (check(), [math.nan], Measured.UNKNOWN),
        (check(), [0.1, math.nan], Measured.UNKNOWN),
        (check("!= 3"), [math.nan], Measured.UNKNOWN),
        (check(), [-math.inf], Measured.GOOD),
        (check(), [math.inf], Measured.NOT_YET),
        (check(worse="> 0.95"), [0.93], Measured.NOT_YET),
        (check(worse="> 0.95"), [0.1, 0.96], Measured.WORSE),
        (check(worse="> 0.95"), [math.inf], Measured.WORSE),
        (check(worse="> 0.95"), [math.nan, 0.96], Measured.WORSE),
        (check(worse="> 0.95"), [math.nan], Measured.UNKNOWN),
        (check("== 0"), [0.0], Measured.GOOD),
        (check("!= 0"), [0.0], Measured.NOT_YET),
        (check(">= -1e3"), [-1000.0], Measured.GOOD),
        (check("<= 5"), [5.0], Measured.GOOD),
        (check("> 5"), [5.0], Measured.NOT_YET),
    ],
)
def test_what_values_say(asked: MetricCheck, values: list[float], measured: Measured) -> None:
    assert judge(asked, samples(*values))[0] is measured


# Filling in


@pytest.mark.parametrize(
    ("promql", "filled"),
    [
        ('up{job="$target"}', 'up{job="app-db"}'),
        ("up{job='$target'}", "up{job='app-db'}"),
        ('up{i="$label_instance"}', 'up{i="db\\u00221\\u0022\\u005c\\u000a"}'),
        ('up{i=~"$label_instance"}', 'up{i=~"db\\u00221\\u0022\\u005c\\u005c\\u000a"}'),
        ('up{i=~"$label_dots"}', 'up{i=~"a\\u005c.b\\u005c.\\u005c\\u002a"}'),
        ('up{i!~ "x|$label_dots"}', 'up{i!~ "x|a\\u005c.b\\u005c.\\u005c\\u002a"}'),
        ('up{i="$label_dots"}', 'up{i="a.b.\\u002a"}'),
        ('up{i="$label_data_disk_name"}', 'up{i="sda"}'),
        ('up{i=~"foo$"} # about $target', 'up{i=~"foo$"} # about $target'),
        ('up{i="it\'s $target"}', 'up{i="it\'s app-db"}'),
        ('up{i="\\"$target"}', 'up{i="\\"app-db"}'),
        ('up{i="# $target"}', 'up{i="# app-db"}'),
        ("up{i='x'} # it's\n + up{j=\"$target\"}", "up{i='x'} # it's\n + up{j=\"app-db\"}"),
        ('up{i="$targets"}', 'up{i="$targets"}'),
    ],
)
def test_labels_are_filled_in_as_content_of_strings(promql: str, filled: str) -> None:
    labels = {"instance": 'db"1"\\\n', "dots": "a.b.*", "data.disk.name": "sda"}
    assert fill(promql, "app-db", labels) == filled


@pytest.mark.parametrize(
    ("promql", "said"),
    [
        ("up{job=$target}", "outside of a quoted string"),
        ("$target > 3", "outside of a quoted string"),
        ("up{job=`$target`}", "outside of a quoted string"),
        ("up{job='a'} + $label_instance", "outside of a quoted string"),
        ('up{job="$label_nothing"}', "no label nothing"),
        ('up{job="$label_a_b"}', "no label a_b"),
    ],
)
def test_what_cannot_be_filled_in_safely_is_refused(promql: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fill(promql, "app-db", {"instance": "x", "a.b": "1", "a/b": "2"})


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_filled_in_text_never_leaves_its_string(text: str) -> None:
    filled = fill('x{a="$label_a"}', "t", {"a": text})
    assert filled.startswith('x{a="')
    inside = filled.removeprefix('x{a="').removesuffix('"}')
    assert re.fullmatch(r"(?:[A-Za-z0-9_./:@ \-]|\\u[0-9a-f]{4}|\\U[0-9a-f]{8})*", inside)
    assert re.sub(r"\\[uU]([0-9a-f]{8}|[0-9a-f]{4})", lambda found: chr(int(found[1], 16)), inside) == text


# Answers


def ask(answer: Any) -> Any:
    with FaultyProxy(None) as proxy:
        proxy.always = answer if callable(answer) else reply(200, json.dumps(answer).encode())
        return Prometheus(HttpApi(proxy.url, "Prometheus", timeout=2)).query("up")


def success(kind: str, result: Any, **more: Any) -> dict[str, Any]:
    return {"status": "success", "data": {"resultType": kind, "result": result}, **more}


def test_special_values_are_read() -> None:
    result = [{"metric": {"n": text}, "value": [1.5, text]} for text in ("NaN", "+Inf", "-Inf", "1e3")]
    found = ask(success("vector", result))
    assert math.isnan(found[0].value)
    assert [one.value for one in found[1:]] == [math.inf, -math.inf, 1000.0]
    assert found[3].at == datetime.fromtimestamp(1.5, UTC)
    assert ask(success("scalar", [1, "2"]))[0].value == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (success("vector", [], warnings=["half of it is missing"]), "partial: half of it"),
        (success("matrix", []), "a matrix, and a vector is needed"),
        (success("vector", {}), "list is missing"),
        (success("vector", [{"metric": {}}]), "'value' is missing"),
        (success("vector", [{"metric": {}, "value": [1, 2]}]), "a moment and a text"),
        (success("vector", [{"metric": {}, "value": [1, "2", 3]}]), "no answer of Prometheus"),
        (success("vector", [{"metric": {}, "value": [1, "many"]}]), "no answer of Prometheus"),
        (success("vector", [{"metric": {"a": 1}, "value": [1, "2"]}]), "no texts"),
        ({"status": "success"}, "'data' is missing"),
        ({"status": "fine", "data": {}}, "'fine'"),
        ([], "no answer of Prometheus"),
        ("ok", "no answer of Prometheus"),
        (reply(200, b"<html>"), "no JSON"),
        (reply(200, b'{"status": "suc'), "no JSON"),
        (reply(503, b'{"status": "success", "data": {"resultType": "vector", "result": []}}'), "status 503"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_as_documented_is_an_error(answer: Any, said: str) -> None:
    with pytest.raises(BadAnswerError, match=said):
        ask(answer)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (reply(400, b'{"status":"error","errorType":"bad_data","error":"parse error"}'), UsageError),
        (reply(422, b'{"status":"error","errorType":"execution","error":"many-to-many"}'), UsageError),
        (reply(503, b'{"status":"error","errorType":"timeout","error":"query timed out"}'), UnreachableError),
        (reply(500, b"oops"), UnreachableError),
        (never_answer, UnreachableError),
    ],
)
def test_an_error_of_prometheus_is_an_error_and_in_a_check_unknown(answer: Any, kind: type[OpsError]) -> None:
    with pytest.raises(kind):
        ask(answer)
    with FaultyProxy(None) as proxy:
        proxy.always = answer
        prometheus = Prometheus(HttpApi(proxy.url, "Prometheus", timeout=1))
        assert prometheus.check(check(empty_is_good=True), "t", {})[0] is Measured.UNKNOWN


def test_a_check_whose_label_is_missing_is_unknown_and_asks_nothing() -> None:
    with FaultyProxy(None) as proxy:
        prometheus = Prometheus(HttpApi(proxy.url, "Prometheus"))
        asked = MetricCheck(prometheus="p", query='x{a="$label_a"}', holds="< 1", empty_is_good=True)
        assert prometheus.check(asked, "t", {})[0] is Measured.UNKNOWN
        assert proxy.seen == []


def test_a_long_range_is_asked_in_pieces_that_neither_overlap_nor_leave_a_hole() -> None:
    with FaultyProxy(None) as proxy:
        proxy.always = reply(200, json.dumps(success("matrix", [])).encode())
        prometheus = Prometheus(HttpApi(proxy.url, "Prometheus"))
        step, end = timedelta(seconds=30), NOW + timedelta(seconds=30) * (MOST_POINTS + 5)
        assert prometheus.query_range("up", NOW, end, step) == []
        asked = [dict(part.split("=") for part in request.body.decode().split("&")) for request in proxy.seen]
        assert len(asked) == 2
        assert float(asked[1]["start"]) - float(asked[0]["end"]) == 30
        assert float(asked[1]["end"]) == end.timestamp()


def test_a_range_ends_after_it_starts() -> None:
    prometheus = Prometheus(HttpApi("http://127.0.0.1:1", "Prometheus"))
    with pytest.raises(UsageError):
        prometheus.query_range("up", NOW, NOW - timedelta(seconds=1), timedelta(seconds=1))
