"""An alert that always fires: seen, missed, not yet known, and what it vouches for."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ops_platform.clients.alertmanager import Heard, Polled, heard, read_alerts, watchdog_signal
from ops_platform.clients.http import Answer
from ops_platform.inventory.systems import AlertmanagerSystem, Watchdog

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
SYSTEM = AlertmanagerSystem.model_validate(
    {
        "id": "am",
        "kind": "alertmanager",
        "environment": "e",
        "owner": "o",
        "urls": ["http://a"],
        "watchdog": {"absent_for": "5m"},
    }
)


SECOND = timedelta(seconds=1)


def polled(sent: timedelta | None = None) -> Polled:
    """`sent`: how long ago the watchdog was; None where it is not listed."""
    watchdog = None if sent is None else Heard(sent, limit=120 * SECOND, firing=timedelta(days=1))
    return Polled([], (), complete=True, watchdog=watchdog)


def ago(minutes: float) -> datetime:
    return NOW - timedelta(minutes=minutes)


def test_while_it_arrives_all_is_well() -> None:
    assert polled(sent=SECOND).sees_watchdog
    assert watchdog_signal(SYSTEM, polled(sent=SECOND), ago(60), NOW) is None


def test_that_it_is_still_listed_is_no_arrival() -> None:
    assert not polled(sent=121 * SECOND).sees_watchdog
    assert watchdog_signal(SYSTEM, polled(sent=121 * SECOND), ago(6), NOW) is not None


def test_absent_for_a_short_time_is_no_incident() -> None:
    assert watchdog_signal(SYSTEM, polled(), ago(5), NOW) is None


def test_absent_for_longer_is_one_incident_from_the_moment_it_was_last_seen() -> None:
    first = watchdog_signal(SYSTEM, polled(), ago(6), NOW)
    assert first is not None
    assert (first.source, first.name, first.starts_at) == ("watchdog", "WatchdogAbsent", ago(6))
    assert first.labels == {"alertname": "WatchdogAbsent", "alertmanager": "am", "environment": "e"}
    later = watchdog_signal(SYSTEM, polled(), ago(6), NOW + timedelta(minutes=3))
    assert later is not None
    assert (later.fingerprint, later.starts_at) == (first.fingerprint, first.starts_at)


def test_absent_from_an_incomplete_poll_counts_too() -> None:
    """It has to arrive at every member; one that is away is no reason not to have seen it elsewhere."""
    assert watchdog_signal(SYSTEM, replace(polled(), complete=False), ago(6), NOW) is not None


def test_a_failed_poll_is_neither_seen_nor_absent_until_it_lasts() -> None:
    assert watchdog_signal(SYSTEM, None, ago(5), NOW) is None
    lasting = watchdog_signal(SYSTEM, None, ago(6), NOW)
    assert lasting is not None
    assert "no Alertmanager of am" in lasting.annotations["description"]


def test_without_a_watchdog_in_the_inventory_nothing_is_missed() -> None:
    system = SYSTEM.model_copy(update={"watchdog": None})
    assert watchdog_signal(system, polled(), ago(1000), NOW) is None


# How it is read from one member's list


def listed(
    name: str = "Watchdog", *, sent: float, lasts: float = 240, fires: float = 3600, **more: str
) -> dict[str, Any]:
    """So many seconds before NOW."""
    return {
        "labels": {"alertname": name, **more}, "annotations": {}, "fingerprint": f"{name} {more}",
        "startsAt": (NOW - fires * SECOND).isoformat(),
        "updatedAt": (NOW - sent * SECOND).isoformat(),
        "endsAt": (NOW - (sent - lasts) * SECOND).isoformat(),
        "status": {"state": "active", "silencedBy": ["somebody"], "inhibitedBy": []},
    }  # fmt: skip


def read(*alerts: dict[str, Any], **watchdog: Any) -> Heard | None:
    found = read_alerts(Answer(200, {}, json.dumps(alerts).encode(), "am"), NOW)
    return heard(Watchdog.model_validate(watchdog), found.values(), NOW)


@pytest.mark.parametrize(
    ("sent", "lasts", "fresh_for", "fresh"),
    [
        (119, 240, "2m", True),
        (121, 240, "2m", False),
        (29, 60, "2m", True),
        (31, 60, "2m", False),  # of a Prometheus that sends more often, others end 30 s after it has stopped
        (119, 1200, "2m", True),
        (121, 1200, "2m", False),  # its rule is evaluated every 5 minutes, and others may be each minute
        (599, 1200, "10m", True),
        (601, 1200, "1h", False),
        (-0.9, 240, "2m", True),
        (-60, 240, "2m", False),  # noted before the member's clock was set back
    ],
)
def test_it_is_fresh_within_half_of_what_it_lasts_and_within_what_the_inventory_says(
    sent: float, lasts: float, fresh_for: str, fresh: bool
) -> None:
    found = read(listed(sent=sent, lasts=lasts), listed("Other", sent=1), fresh_for=fresh_for)
    assert found is not None
    assert found.fresh is fresh


def test_it_is_found_by_all_of_its_matchers() -> None:
    assert read(listed("Other", sent=1)) is None
    match = ["alertname=~Watch.*", 'cluster="a"']
    assert read(listed(sent=1), listed(sent=1, cluster="b"), match=match) is None
    assert read(listed(sent=1, cluster="a"), match=match) is not None


def test_of_several_the_one_counts_that_is_fresh_and_has_fired_for_the_longest_time() -> None:
    stale = listed(sent=130, fires=9000)
    found = read(stale, listed(sent=1, fires=60, n="1"), listed(sent=5, fires=600, n="2"))
    assert found is not None
    assert (found.fresh, found.firing) == (True, 600 * SECOND)
    assert read(stale) == Heard(130 * SECOND, 120 * SECOND, 9000 * SECOND)
