"""Alertmanager: what fires, as signals, from all members of a cluster (https://github.com/prometheus/alertmanager, API v2).

Prometheus sends each alert to every member; the members tell each other of silences and notifications, and not of alerts. So a
member that has just restarted without its state lists less than it should until Prometheus has sent again, and one that Prometheus
does not reach lists less still. Hence the rule of a poll:

- What any member lists fires: the union counts. Of one fingerprint, `startsAt` is the earliest of all (as Alertmanager itself merges),
  annotations and link are those of the newest `updatedAt`, and silenced or inhibited holds where one member says so.
- A member lists what has not ended by its own clock; `endsAt` is only when it would give up without hearing again, and differs
  between members. So whatever is listed fires, and nothing else says that an alert has ended than a complete poll without it.
- A poll is complete when every member has answered well and one of them at least has been up for `SETTLED_AFTER`, and where a watchdog
  is declared, it says that Prometheus sends (`Heard`): an alert that is not sent again is dropped as one that has ended is.
- A member that is away, or whose answer is not what the API promises, is noted; where all are, the poll is an error.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar, cast

from ops_platform.clients.http import Answer, BadAnswerError, HttpApi
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import OpsError, UnreachableError
from ops_platform.inventory.matchers import AlertMatcher, all_match
from ops_platform.inventory.systems import AlertmanagerSystem, Watchdog
from ops_platform.remediation.model import Signal

T = TypeVar("T")

# Prometheus sends a firing alert again after a minute (--rules.alert.resend-delay) at the next evaluation of its rule.
SETTLED_AFTER = timedelta(minutes=5)
BUDGET = 10.0  # seconds
LARGEST = 64 << 20
ABSENT = "WatchdogAbsent"
# Each state is asked for, so that a silence that was set later is seen as such and not as an end.
_ALL = (("active", "true"), ("silenced", "true"), ("inhibited", "true"), ("unprocessed", "true"))
WATCHDOG_REMEDY = "look at Prometheus: its rules, and its way to this Alertmanager"
_NOBODY_KNOWS = "whether this alert still fires cannot be said"
_REMEDY = "check that `urls` are Alertmanagers (API v2), and what stands in front of them"


@dataclass(frozen=True)
class Member:
    """One Alertmanager as it answered. `alerts`: how many it listed. `up_for`: by its own clock; None where it did not say."""

    url: str
    alerts: int = 0
    up_for: timedelta | None = None
    failure: OpsError | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "alerts": self.alerts,
            "up_for_seconds": self.up_for.total_seconds() if self.up_for is not None else None,
            "error": self.failure.what if self.failure is not None else None,
        }


class NoWatchdogError(UnreachableError):
    """What is not listed may fire all the same: the watchdog does not say that Prometheus sends."""


@dataclass(frozen=True)
class Heard:
    """The watchdog by the clock of the member that lists it. `ago`: since it was sent, and `limit` is how long that may be.

    Of Prometheus's --rules.alert.resend-delay and the interval of a rule let L be the longer. What fires is sent again within 2 L (at
    the first evaluation that is more than the delay after the last time), and Alertmanager is to drop it after 4 L without that
    (`needsSending` and `sendAlerts` in Prometheus's rules/alerting.go). So when Prometheus has stopped nothing is dropped before 2 L
    have passed: a watchdog that was sent within 2 L vouches for all. That it is listed is too little, since others may have been
    sent up to 2 L before it, and are dropped by so much sooner. 2 L is half of what it was sent to last, whatever the delay is, and
    `fresh_for` bounds it: the watchdog's own rule may be evaluated less often than others are.
    """

    ago: timedelta
    limit: timedelta
    firing: timedelta

    @property
    def fresh(self) -> bool:
        # A date has whole seconds alone. What lies further ahead was noted before a clock was set back, and would be fresh for long.
        return timedelta(seconds=-1) <= self.ago <= self.limit


@dataclass(frozen=True)
class Polled:
    """What fires. `complete`: what is not among `signals` has ended; otherwise its absence says nothing.

    `watchdog`: where it is listed. `doubt`: why it does not vouch for an end; None where it does, or where none is declared.
    """

    signals: list[Signal]
    members: tuple[Member, ...]
    complete: bool
    watchdog: Heard | None = None
    doubt: str | None = None

    @property
    def sees_watchdog(self) -> bool:
        """It arrives, silenced or not."""
        return self.watchdog is not None and self.watchdog.fresh

    @property
    def away(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.failure is not None)


class _Listed(NamedTuple):
    """One alert of one member."""

    signal: Signal
    updated_at: datetime
    ends_at: datetime


class Alertmanager:
    """The members of one cluster. Safe for threads. Every method raises OpsError, and never takes no answer for an empty one."""

    def __init__(
        self,
        system_id: str,
        members: Sequence[HttpApi],
        *,
        largest: int = LARGEST,
        settled_after: timedelta = SETTLED_AFTER,
        watchdog: Watchdog | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.system_id = system_id
        self._members = tuple(members)
        self._largest = largest
        self._settled_after = settled_after
        self._watchdog = watchdog
        self._clock = clock

    def close(self) -> None:
        for member in self._members:
            member.close()

    def poll(self, budget: float = BUDGET) -> Polled:
        """All that fires, silenced and inhibited alerts too, within `budget` seconds."""
        polled = self._poll((), budget)
        doubt = self._doubt(polled.watchdog)
        return replace(polled, complete=polled.complete and doubt is None, doubt=doubt)

    def _poll(self, filters: Sequence[str], budget: float) -> Polled:
        """As far as the members go: `complete` does not know of the watchdog, which the filters may leave out."""
        now = self._clock.now()
        query = [*_ALL, *(("filter", one) for one in filters)]

        def ask(api: HttpApi, left: Callable[[], float]) -> tuple[dict[str, _Listed], timedelta | None, Heard | None]:
            answer = api.get("/api/v2/alerts", query, timeout=left(), largest=self._largest)
            listed = read_alerts(answer, now)
            return listed, self._up_for(api, left()), self._heard(listed, answer)

        asked = self._ask_all(ask, budget)
        members = tuple(
            Member(api.url, failure=found) if isinstance(found, OpsError) else Member(api.url, len(found[0]), found[1])
            for api, found in asked
        )
        lists = [found[0] for _, found in asked if not isinstance(found, OpsError)]
        settled = any(member.up_for is not None and member.up_for >= self._settled_after for member in members)
        complete = settled and all(member.failure is None for member in members)
        watchdogs = [found[2] for _, found in asked if not isinstance(found, OpsError)]
        return Polled(merge(lists, self.system_id), members, complete, _best(watchdogs))

    def _ask_all(
        self, ask: Callable[[HttpApi, Callable[[], float]], T], budget: float
    ) -> list[tuple[HttpApi, T | OpsError]]:
        """Every member at once, each in a thread that nobody waits for beyond the budget. Raises where none answered well."""
        until = self._clock.monotonic() + budget
        answers: queue.SimpleQueue[tuple[int, T | OpsError]] = queue.SimpleQueue()

        def left() -> float:
            return max(until - self._clock.monotonic(), 0.001)

        def one(number: int) -> None:
            try:
                answers.put((number, ask(self._members[number], left)))
            except OpsError as error:
                answers.put((number, error))
            except BaseException as error:  # noqa: BLE001 - a thread that dies in silence would read as "did not answer"
                answers.put(
                    (number, OpsError(f"{type(error).__name__} while it was asked", where=self._members[number].host))
                )

        for number in range(len(self._members)):
            threading.Thread(target=one, args=(number,), name=f"alertmanager-{number}", daemon=True).start()
        found: dict[int, T | OpsError] = {}
        while len(found) < len(self._members):
            try:
                number, answer = answers.get(timeout=left())
            except queue.Empty:
                break
            found[number] = answer
        late = [UnreachableError(f"no answer within {budget:g} s", where=api.host) for api in self._members]
        asked = [(api, found.get(number, late[number])) for number, api in enumerate(self._members)]
        failures = [answer for _, answer in asked if isinstance(answer, OpsError)]
        if len(failures) == len(asked):
            raise self._nobody(failures)
        return asked

    def _nobody(self, failures: Sequence[OpsError]) -> OpsError:
        said = "; ".join(f"{error.where}: {error.what}" if error.where else error.what for error in failures)
        kind = type(failures[0]) if all(type(error) is type(failures[0]) for error in failures) else OpsError
        return kind(
            f"no Alertmanager of {self.system_id} gives its alerts: {said}", remedy=failures[0].remedy or _REMEDY
        )

    def _up_for(self, api: HttpApi, timeout: float) -> timedelta | None:
        """By the member's own clock, in which the answer is dated. Whoever does not say it is not taken for settled."""
        try:
            answer = api.get("/api/v2/status", timeout=timeout)
            started = datetime.fromisoformat(answer.json()["uptime"])
            return max(self._dated(answer) - started, timedelta(0))  # the date has whole seconds alone
        except (OpsError, KeyError, TypeError, ValueError):
            return None

    def _dated(self, answer: Answer) -> datetime:
        """By the member's own clock; by ours where it does not say. Raises BadAnswerError for what is no date."""
        text = answer.headers.get("date")
        if not text:
            return self._clock.now()
        try:
            dated = parsedate_to_datetime(text)
        except ValueError:
            raise BadAnswerError(f"{text[:100]} is no date", where=answer.where, remedy=_REMEDY) from None
        return dated if dated.tzinfo is not None else dated.replace(tzinfo=UTC)

    def _heard(self, listed: Mapping[str, _Listed], answer: Answer) -> Heard | None:
        return None if self._watchdog is None else heard(self._watchdog, listed.values(), self._dated(answer))

    def _doubt(self, watchdog: Heard | None) -> str | None:
        """Why what is not listed may fire all the same; None where the watchdog vouches that it does not, or none is declared."""
        if self._watchdog is None:
            return None
        name = f"the watchdog {_named(self._watchdog)}"
        if watchdog is None:
            return f"{name} is not listed"
        if not watchdog.fresh:
            return f"{name} was sent {_seconds(watchdog.ago)} ago, and {_seconds(watchdog.limit)} are the limit"
        if watchdog.firing < self._settled_after:
            # Of a Prometheus that has been away: it does not evaluate all of its rules at once, and some need it twice.
            return f"{name} fires since {_seconds(watchdog.firing)}, and others may be slower to come back"
        return None

    # For guards and verification

    def look(self, labels: Mapping[str, str], budget: float = BUDGET) -> Signal | None:
        """The alert of exactly these labels as it is now; None where it has ended.

        Raises UnreachableError where it is not listed and the poll was not complete: then nobody knows. NoWatchdogError is one of these.
        """
        wanted = dict(labels)
        polled = self._poll(_filters(wanted), budget)
        found = next((signal for signal in polled.signals if signal.labels == wanted), None)
        if found is None and not polled.complete:
            raise self._unknown(_NOBODY_KNOWS, polled.members)
        if found is None:
            self._need_watchdog(budget)
        return found

    def _need_watchdog(self, budget: float) -> None:
        """By a request of its own, since all filters of one have to fit. Raises NoWatchdogError."""
        if self._watchdog is None:
            return
        equal = {one.name: one.value for one in self._watchdog.match if one.operator == "=" and one.value}
        doubt = self._doubt(self._poll(_filters(equal), budget).watchdog)
        if doubt is not None:
            raise NoWatchdogError(f"{_NOBODY_KNOWS}: {doubt}", where=self.system_id, remedy=WATCHDOG_REMEDY)

    def is_silenced(self, labels: Mapping[str, str], budget: float = BUDGET) -> bool:
        """By Alertmanager's own word where an alert of these labels fires; otherwise by the silences that are in force.

        Raises UnreachableError where only members answered that have just started, which may have lost their silences.
        """
        wanted = dict(labels)
        polled = self._poll(_filters(wanted), budget)
        if any(signal.silenced for signal in polled.signals if signal.labels == wanted):
            return True
        if any(all_match(matchers, wanted) for matchers in self.silences(budget)):
            return True
        settled = any(member.up_for is not None and member.up_for >= self._settled_after for member in polled.members)
        if not settled:
            raise self._unknown("whether this is silenced cannot be said", polled.members)
        return False

    def silences(self, budget: float = BUDGET) -> list[tuple[AlertMatcher, ...]]:
        """The matchers of each silence in force, of all members that answer. Raises BadAnswerError for one that we cannot read."""

        def ask(api: HttpApi, left: Callable[[], float]) -> list[tuple[AlertMatcher, ...]]:
            answer = api.get("/api/v2/silences", timeout=left(), largest=self._largest)
            return read_silences(answer)

        asked = self._ask_all(ask, budget)
        lists = [found for _, found in asked if not isinstance(found, OpsError)]
        return list(dict.fromkeys(one for found in lists for one in found))

    def _unknown(self, what: str, members: Sequence[Member]) -> UnreachableError:
        said = "; ".join(f"{m.url}: {m.failure.what if m.failure else _age(m.up_for)}" for m in members)
        return UnreachableError(
            f"{what}: {said}",
            where=self.system_id,
            remedy="every member has to answer, and one to have been up for a while",
        )


def _age(up_for: timedelta | None) -> str:
    return "up for an unknown time" if up_for is None else f"up for {_seconds(up_for)}"


def _seconds(time: timedelta) -> str:
    return f"{int(time.total_seconds())} s"


def _filters(labels: Mapping[str, str]) -> list[str]:
    """Fewer alerts to read. Names of the classic form alone: older members do not parse others. The rest is compared by us."""
    return [
        f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in labels.items()
        if re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) and value.isprintable()
    ]


# Reading


def read_alerts(answer: Answer, seen_at: datetime) -> dict[str, _Listed]:
    """The alerts by fingerprint. Raises BadAnswerError for anything but a list of well-formed alerts."""
    items = _items(answer, "alerts")
    found: dict[str, _Listed] = {}
    try:
        for item in items:
            listed = _listed(item, seen_at)
            found[listed.signal.fingerprint] = listed
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(
            f"alert {len(found) + 1} of {len(items)} is not well-formed: {_why(error)}",
            where=answer.where,
            remedy=_REMEDY,
        ) from None
    return found


def _items(answer: Answer, what: str) -> list[Any]:
    items = answer.json()
    if not isinstance(items, list):
        raise BadAnswerError(f"the answer is no list of {what}", where=answer.where, remedy=_REMEDY)
    return cast("list[Any]", items)


def _listed(item: dict[str, Any], seen_at: datetime) -> _Listed:
    labels, annotations, status = item["labels"], item["annotations"], item["status"]
    fingerprint, link = item["fingerprint"], item.get("generatorURL")
    silenced, inhibited = status["silencedBy"], status["inhibitedBy"]
    ends_at = _moment(item["endsAt"])
    if not (
        labels and type(labels) is type(annotations) is dict and type(silenced) is type(inhibited) is list
        and _texts(labels) and _texts(annotations) and type(fingerprint) is str and fingerprint
        and (link is None or type(link) is str) and status["state"] in _STATES
    ):  # fmt: skip
        raise ValueError(_wrong(item))
    signal = Signal(
        "alertmanager",
        fingerprint,
        labels.get("alertname", ""),
        labels,
        _moment(item["startsAt"]),
        seen_at,
        annotations=annotations,
        silenced=bool(silenced),
        inhibited=bool(inhibited),
        link=link or None,
    )
    return _Listed(signal, _moment(item["updatedAt"]), ends_at)


_STATES = frozenset({"active", "suppressed", "unprocessed"})


def _texts(value: dict[Any, Any]) -> bool:
    """By joining them: what is no text raises TypeError."""
    "".join(value.values())
    return True


def _wrong(item: Mapping[str, Any]) -> str:
    status = item["status"]
    kinds = {"labels": dict, "annotations": dict, "fingerprint": str, "silencedBy": list, "inhibitedBy": list}
    for name, kind in kinds.items():
        if type({**item, **status}[name]) is not kind or (name in ("labels", "fingerprint") and not item[name]):
            return name
    return "generatorURL" if status["state"] in _STATES else "state"


def _moment(text: Any) -> datetime:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text} has no zone")
    return at


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return f"{error}"[:100] if isinstance(error, ValueError) else "a value of the wrong type"


def read_silences(answer: Answer) -> list[tuple[AlertMatcher, ...]]:
    """Those in force. Raises BadAnswerError."""
    try:
        return [
            tuple(_matcher(one) for one in item["matchers"])
            for item in _items(answer, "silences")
            if item["status"]["state"] == "active"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(f"a silence cannot be read: {_why(error)}", where=answer.where, remedy=_REMEDY) from None


def _matcher(item: Mapping[str, Any]) -> AlertMatcher:
    name, value, regex, equal = item["name"], item["value"], item["isRegex"], item.get("isEqual", True)
    if not (isinstance(name, str) and isinstance(value, str) and isinstance(regex, bool) and isinstance(equal, bool)):
        raise ValueError("a matcher")
    if not regex:
        return AlertMatcher(name, "=" if equal else "!=", value)
    try:
        return AlertMatcher(name, "=~" if equal else "!~", value, re.compile(value))
    except re.error:
        raise ValueError(f"a regular expression that Python does not know, for {name}") from None


# Merging


def merge(lists: Sequence[Mapping[str, _Listed]], where: str) -> list[Signal]:
    """One signal for each fingerprint, in the order of fingerprints. Raises BadAnswerError where two mean different labels by one."""
    merged: dict[str, _Listed] = {}
    for listed in lists:
        for fingerprint, one in listed.items():
            there = merged.get(fingerprint)
            merged[fingerprint] = one if there is None else _merged(there, one, where)
    return [merged[fingerprint].signal for fingerprint in sorted(merged)]


def _merged(one: _Listed, other: _Listed, where: str) -> _Listed:
    a, b = one.signal, other.signal
    if a.labels != b.labels:
        raise BadAnswerError(
            f"two members mean different alerts by the fingerprint {a.fingerprint}", where=where, remedy=_REMEDY
        )
    newer = other if other.updated_at > one.updated_at else one
    if (a.starts_at, a.silenced, a.inhibited) == (b.starts_at, b.silenced, b.inhibited):
        return newer
    signal = replace(
        newer.signal,
        starts_at=min(a.starts_at, b.starts_at),
        silenced=a.silenced or b.silenced,
        inhibited=a.inhibited or b.inhibited,
    )
    return newer._replace(signal=signal)


# The watchdog


def heard(watchdog: Watchdog, listed: Iterable[_Listed], dated: datetime) -> Heard | None:
    """The watchdog in the list of one member, which it gave at `dated`."""
    return _best(
        Heard(
            ago=dated - one.updated_at,
            limit=min(watchdog.fresh_for, (one.ends_at - one.updated_at) / 2),
            firing=max(dated - one.signal.starts_at, timedelta(0)),  # a date has whole seconds alone
        )
        for one in listed
        if all_match(watchdog.match, one.signal.labels)
    )


def _best(found: Iterable[Heard | None]) -> Heard | None:
    """One that is fresh is enough: it is sent to every member, and its matchers may fit several alerts."""
    return max((one for one in found if one is not None), key=lambda one: (one.fresh, one.firing), default=None)


def _named(watchdog: Watchdog) -> str:
    return f"{{{', '.join(map(str, watchdog.match))}}}"


def watchdog_signal(
    system: AlertmanagerSystem, polled: Polled | None, last_seen: datetime, now: datetime
) -> Signal | None:
    """A signal where the alert that must always fire has not been seen for `absent_for`; None where all is well, or not yet known.

    `polled` is None for a poll that failed: the alert was neither seen nor missed then, and where no poll has got through for
    `absent_for`, that is such an incident too. The caller keeps `last_seen`: `now` whenever `Polled.sees_watchdog` says so, and at
    the first poll of all and the first one after a pause of its own, since from then on we look for it. The signal keeps one fingerprint, and
    one beginning for each absence: the moment when the alert was last seen.
    """
    if system.watchdog is None or (polled is not None and polled.sees_watchdog):
        return None
    if now - last_seen <= system.watchdog.absent_for:
        return None
    since = last_seen.astimezone(UTC).isoformat(timespec="seconds")
    why = (
        f"no Alertmanager of {system.id} has given its alerts since {since}"
        if polled is None
        else f"the alert {_named(system.watchdog)} has not arrived since {since}: Prometheus, its rules or the way from it are broken"
    )
    return Signal(
        "watchdog",
        f"watchdog/{system.id}",
        ABSENT,
        {"alertname": ABSENT, "alertmanager": system.id, "environment": system.environment},
        last_seen,
        now,
        annotations={"summary": "alerting itself is broken", "description": why},
    )
