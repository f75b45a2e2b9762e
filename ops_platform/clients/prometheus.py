"""Prometheus and what speaks its HTTP API: queries, checks by metric, and the history of alerts.

Source: https://prometheus.io/docs/prometheus/latest/querying/api/. An answer with warnings is a partial one, and refused: half of the
series may be good.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, cast

from ops_platform.clients.http import BadAnswerError, HttpApi
from ops_platform.errors import OpsError, UnreachableError, UsageError
from ops_platform.inventory.remediation import MetricCheck
from ops_platform.remediation.model import Signal

MOST_POINTS = 10_000  # of one series in one answer; Prometheus itself refuses more than 11,000
_LARGEST = 64 << 20
_REMEDY = "check that the address is a Prometheus, and what stands in front of it"
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


class Measured(StrEnum):
    """What a metric says of an action."""

    GOOD = "good"
    NOT_YET = "not yet"
    WORSE = "worse"
    UNKNOWN = "unknown"  # no answer, or one that says nothing: never good


@dataclass(frozen=True)
class Sample:
    """One value of an instant query. It may be NaN or an infinity."""

    labels: Mapping[str, str]
    value: float
    at: datetime


@dataclass(frozen=True)
class Series:
    """The values of one series over time, oldest first."""

    labels: Mapping[str, str]
    points: tuple[tuple[datetime, float], ...]


class Prometheus:
    """Raises what `HttpApi` raises; BadAnswerError for what is not as documented; UsageError for a query that it refuses."""

    def __init__(self, api: HttpApi) -> None:
        self._api = api

    def close(self) -> None:
        self._api.close()

    def query(self, promql: str, at: datetime | None = None, *, timeout: float | None = None) -> list[Sample]:
        """A vector, or a scalar as one sample without labels. `at`: now by the server's clock where it is not given."""
        form = {"query": promql} | ({"time": str(at.timestamp())} if at is not None else {})
        kind, result, where = self._ask("/api/v1/query", form, timeout)
        with _Reading(where):
            if kind == "scalar":
                return [Sample({}, *_swapped(_point(result)))]
            if kind != "vector":
                raise ValueError(f"the query gives a {kind}, and a vector is needed")
            return [Sample(_labels(item["metric"]), *_swapped(_point(item["value"]))) for item in _list(result)]

    def query_range(
        self, promql: str, start: datetime, end: datetime, step: timedelta, *, timeout: float | None = None
    ) -> list[Series]:
        """Every series from `start` to `end`, both included, one value for each step; long times in several questions."""
        if end < start or step <= timedelta(0):
            raise UsageError("a range ends after it starts, and its step is longer than nothing")
        points: dict[tuple[tuple[str, str], ...], list[tuple[datetime, float]]] = {}
        begin = start
        while begin <= end:
            last = min(end, begin + step * (MOST_POINTS - 1))
            for labels, found in self._range(promql, begin, last, step, timeout):
                points.setdefault(tuple(sorted(labels.items())), []).extend(found)
            begin = begin + step * MOST_POINTS
        return [Series(dict(labels), tuple(found)) for labels, found in sorted(points.items())]

    def _range(
        self, promql: str, start: datetime, end: datetime, step: timedelta, timeout: float | None
    ) -> list[tuple[dict[str, str], list[tuple[datetime, float]]]]:
        form = {
            "query": promql,
            "start": str(start.timestamp()),
            "end": str(end.timestamp()),
            "step": str(step.total_seconds()),
        }
        kind, result, where = self._ask("/api/v1/query_range", form, timeout)
        with _Reading(where):
            if kind != "matrix":
                raise ValueError(f"the query gives a {kind}, and a matrix is needed")
            return [(_labels(item["metric"]), [_point(one) for one in _list(item["values"])]) for item in _list(result)]

    def _ask(self, path: str, form: Mapping[str, str], timeout: float | None) -> tuple[str, Any, str]:
        answer = self._api.request(
            "POST", path, form=form, timeout=timeout, largest=_LARGEST, good=(200, 400, 422, 503)
        )
        value = answer.json()
        with _Reading(answer.where):
            if value["status"] == "error":
                raise _refused(str(value["errorType"]), str(value["error"]), answer.where)
            if answer.status != 200 or value["status"] != "success":
                raise ValueError(f"status {answer.status}, and {value['status']!r}")
            if value.get("warnings"):
                raise BadAnswerError(
                    f"the answer is partial: {'; '.join(map(str, value['warnings']))[:300]}",
                    where=answer.where,
                    remedy="look at what it reads from",
                )
            return str(value["data"]["resultType"]), value["data"]["result"], answer.where

    def check(self, check: MetricCheck, subject_id: str, labels: Mapping[str, str]) -> tuple[Measured, str]:
        """What the metric says, and a sentence about it. Never raises: what cannot be asked or read is unknown."""
        try:
            return judge(check, self.query(fill(check.query, subject_id, labels)))
        except OpsError as error:
            return Measured.UNKNOWN, error.what


def _refused(kind: str, said: str, where: str) -> OpsError:
    if kind in ("bad_data", "execution"):
        return UsageError(f"Prometheus refuses the query: {said[:300]}", where=where, remedy="try it in its own page")
    return UnreachableError(
        f"Prometheus cannot answer ({kind}): {said[:300]}", where=where, remedy="look at its own log"
    )


class _Reading:
    """Whatever does not fit on the way through an answer is one kind of error."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | AttributeError | OverflowError):
            why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)[:200]
            raise BadAnswerError(f"this is no answer of Prometheus: {why}", where=self._where, remedy=_REMEDY) from None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("a list is missing")
    return cast("list[Any]", value)


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in cast("dict[str, Any]", value).values()):
        raise TypeError("the labels of a series are no texts")
    return cast("dict[str, str]", value)


_NUMBERS = {"NaN": math.nan, "+Inf": math.inf, "-Inf": -math.inf}


def _point(value: Any) -> tuple[datetime, float]:
    at, text = _list(value)
    if not isinstance(text, str) or isinstance(at, bool) or not isinstance(at, int | float):
        raise TypeError("a value is a moment and a text")
    return datetime.fromtimestamp(at, UTC), _NUMBERS[text] if text in _NUMBERS else float(text)


def _swapped(point: tuple[datetime, float]) -> tuple[float, datetime]:
    return point[1], point[0]


# Checks


def judge(check: MetricCheck, samples: Sequence[Sample]) -> tuple[Measured, str]:
    """Worse where one value is worse; good where all hold; NaN says nothing, so with one of them it is not good.

    Raises UsageError for a condition that is none.
    """
    if not samples:
        return (Measured.GOOD if check.empty_is_good else Measured.NOT_YET), "the answer is empty"
    values = [sample.value for sample in samples]
    worse = _condition(check.worse) if check.worse is not None else None
    for sample in samples:
        if worse is not None and not math.isnan(sample.value) and worse(sample.value):
            return Measured.WORSE, f"{_shown(sample)} is {check.worse}"
    if any(math.isnan(value) for value in values):
        return Measured.UNKNOWN, f"{_shown(next(one for one in samples if math.isnan(one.value)))} says nothing"
    holds = _condition(check.holds)
    failing = [sample for sample in samples if not holds(sample.value)]
    if failing:
        return Measured.NOT_YET, f"{len(failing)} of {len(samples)} not {check.holds}: {_shown(failing[0])}"
    return (
        Measured.GOOD,
        f"{_shown(samples[0])}{f' and {len(samples) - 1} more' if len(samples) > 1 else ''} {check.holds}",
    )


def _condition(text: str) -> Callable[[float], bool]:
    """`< 0.9` as a function. Raises UsageError."""
    found = re.fullmatch(r"(<=|>=|==|!=|<|>) *(.+)", text)
    try:
        if found is None:
            raise ValueError(text)
        compare, limit = _COMPARE[found[1]], float(found[2])
    except ValueError:
        raise UsageError(f"{text!r} compares with no number") from None
    return lambda value: compare(value, limit)


def _shown(sample: Sample) -> str:
    labels = ", ".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "__name__")
    return f"{sample.value:g}" + (f" ({labels})" if labels else "")


# Filling in

_PLACE = re.compile(r"\$(?:target(?![A-Za-z0-9_])|label_([A-Za-z0-9_]+))")
_SAFE = re.compile(r"[^A-Za-z0-9_./:@ \-]")


def fill(promql: str, subject_id: str, labels: Mapping[str, str]) -> str:
    """`$target` and `$label_NAME` as content of the string in which they stand; after `=~` and `!~` every character means itself.

    A character of a name that is neither letter nor digit is written `_`: `$label_data_disk` is data.disk. Raises UsageError where a
    place is outside of a string or between backticks, where nothing can be escaped, and where the label is absent: an empty text would
    ask about something else.
    """
    out: list[str] = []
    at = 0
    for found in _PLACE.finditer(promql):
        quote, is_regex = _context(promql, found.start())
        if quote is None and _in_comment(promql, found.start()):
            continue
        if quote not in ('"', "'"):
            raise UsageError(
                f"{found[0]} stands outside of a quoted string",
                where=f"query {promql!r}",
                remedy=f'write it in double quotes, such as {{instance="{found[0]}"}}',
            )
        value = subject_id if found[1] is None else _label(found[1], labels, promql)
        out += [promql[at : found.start()], _escaped(_quoted_meta(value) if is_regex else value)]
        at = found.end()
    return "".join([*out, promql[at:]])


def _label(name: str, labels: Mapping[str, str], promql: str) -> str:
    if name in labels:
        return labels[name]
    same = [key for key in labels if re.sub("[^A-Za-z0-9_]", "_", key) == name]
    if len(same) != 1:
        raise UsageError(f"the signal has no label {name}", where=f"query {promql!r}")
    return labels[same[0]]


def _escaped(text: str) -> str:
    """Escapes of Go that hold in either kind of quotes."""

    def one(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"

    return _SAFE.sub(one, text)


def _quoted_meta(text: str) -> str:
    """As Go's regexp.QuoteMeta: RE2 knows fewer escapes than Python's re.escape writes."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text)


def _context(promql: str, place: int) -> tuple[str | None, bool]:
    """The quote of the string around this place, if any, and whether that string is a regular expression."""
    quote: str | None = None
    before, at = "", 0
    while at < place:
        sign = promql[at]
        if quote is None:
            if sign in "\"'`":
                quote = sign
            elif sign == "#":
                end = promql.find("\n", at)
                at = place if end < 0 else end
            elif not sign.isspace():
                before = sign
        elif sign == "\\" and quote != "`":
            at += 1
        elif sign == quote:
            quote, before = None, sign
        at += 1
    return quote, before == "~"


def _in_comment(promql: str, place: int) -> bool:
    """Asked of a place outside of strings."""
    line = promql.rfind("\n", 0, place) + 1
    return any(
        sign == "#" and _context(promql, line + number)[0] is None for number, sign in enumerate(promql[line:place])
    )


# The history of alerts


def alert_history(
    prometheus: Prometheus, start: datetime, end: datetime, step: timedelta, *, timeout: float | None = None
) -> list[Signal]:
    """Each time that an alert fired between the two moments, as a signal with its end, in the order of their beginnings.

    From the series `ALERTS`: to the step, without annotations, and without the labels that Prometheus adds when it sends (external
    labels, relabelling), so that a fingerprint is Alertmanager's only where there are none. What fires at `end` has no end.
    """
    found: list[Signal] = []
    for series in prometheus.query_range('ALERTS{alertstate="firing"}', start, end, step, timeout=timeout):
        labels = {name: text for name, text in series.labels.items() if name not in ("__name__", "alertstate")}
        for begun, last in _stretches([at for at, _ in series.points], step):
            found.append(
                Signal(
                    "history",
                    fingerprint(labels),
                    labels.get("alertname", ""),
                    labels,
                    begun,
                    begun,
                    ends_at=None if last + step > end else last + step,
                )
            )
    return sorted(found, key=lambda signal: (signal.starts_at, signal.fingerprint))


def _stretches(moments: Sequence[datetime], step: timedelta) -> list[tuple[datetime, datetime]]:
    """Runs of moments without a hole between them: first and last of each."""
    runs: list[tuple[datetime, datetime]] = []
    for at in moments:
        if runs and at - runs[-1][1] <= step * 1.5:
            runs[-1] = (runs[-1][0], at)
        else:
            runs.append((at, at))
    return runs


def fingerprint(labels: Mapping[str, str]) -> str:
    """As Alertmanager makes it: FNV-1a of 64 bits over the names in order and their values, each followed by the byte 255."""
    value = 0xCBF29CE484222325
    for name, text in sorted(labels.items()):
        for byte in name.encode() + b"\xff" + text.encode() + b"\xff":
            value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"
