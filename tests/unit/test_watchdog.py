"""An alert that always fires: seen, missed, not yet known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ops_platform.clients.alertmanager import Polled, sees_watchdog, watchdog_signal
from ops_platform.inventory.systems import AlertmanagerSystem
from ops_platform.remediation.model import Signal

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


def polled(*names: str, complete: bool = True, silenced: bool = False) -> Polled:
    return Polled(
        [Signal("alertmanager", name, name, {"alertname": name}, NOW, NOW, silenced=silenced) for name in names],
        (),
        complete,
    )


def ago(minutes: float) -> datetime:
    return NOW - timedelta(minutes=minutes)


def test_while_it_arrives_all_is_well() -> None:
    assert sees_watchdog(SYSTEM, polled("Other", "Watchdog"))
    assert watchdog_signal(SYSTEM, polled("Watchdog"), ago(60), NOW) is None


def test_a_silenced_watchdog_arrives() -> None:
    assert sees_watchdog(SYSTEM, polled("Watchdog", silenced=True))


def test_absent_for_a_short_time_is_no_incident() -> None:
    assert watchdog_signal(SYSTEM, polled("Other"), ago(5), NOW) is None


def test_absent_for_longer_is_one_incident_from_the_moment_it_was_last_seen() -> None:
    first = watchdog_signal(SYSTEM, polled("Other"), ago(6), NOW)
    assert first is not None
    assert (first.source, first.name, first.starts_at) == ("watchdog", "WatchdogAbsent", ago(6))
    assert first.labels == {"alertname": "WatchdogAbsent", "alertmanager": "am", "environment": "e"}
    later = watchdog_signal(SYSTEM, polled("Other"), ago(6), NOW + timedelta(minutes=3))
    assert later is not None
    assert (later.fingerprint, later.starts_at) == (first.fingerprint, first.starts_at)


def test_absent_from_an_incomplete_poll_counts_too() -> None:
    """It has to arrive at every member; one that is away is no reason not to have seen it elsewhere."""
    assert watchdog_signal(SYSTEM, polled(complete=False), ago(6), NOW) is not None


def test_a_failed_poll_is_neither_seen_nor_absent_until_it_lasts() -> None:
    assert watchdog_signal(SYSTEM, None, ago(5), NOW) is None
    lasting = watchdog_signal(SYSTEM, None, ago(6), NOW)
    assert lasting is not None
    assert "no Alertmanager of am" in lasting.annotations["description"]


def test_without_a_watchdog_in_the_inventory_nothing_is_missed() -> None:
    system = SYSTEM.model_copy(update={"watchdog": None})
    assert watchdog_signal(system, polled(), ago(1000), NOW) is None
    assert not sees_watchdog(system, polled("Watchdog"))
