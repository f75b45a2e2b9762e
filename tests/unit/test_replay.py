"""The past through changed rules: what would have been, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from ops_platform.remediation import playbook as playbook_module
from ops_platform.remediation.model import Signal
from ops_platform.remediation.replay import Report, Would, replay, spans
from tests.remediation_rig import BEGIN, SwitchOff, SwitchOffForGood, a_rule, a_signal, inventory


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"toy.switch_off": SwitchOff(), "toy.switch_off_for_good": SwitchOffForGood()}
    monkeypatch.setattr(playbook_module, "playbooks", lambda: made)


def fired(minute: float, ends: float | None, name: str = "f", **more: Any) -> Signal:
    at = BEGIN + timedelta(minutes=minute)
    end = BEGIN + timedelta(minutes=ends) if ends is not None else None
    return a_signal(name, at=at, ends_at=end, **more)


def run(rule: dict[str, Any], *signals: Signal, **more: Any) -> Report:
    return replay(inventory([rule], **more), signals, BEGIN, BEGIN + timedelta(days=2))


def would(report: Report) -> list[Would]:
    return [one.would for one in report.incidents]


def test_what_ended_in_time_would_have_been_helped() -> None:
    report = run(a_rule(), fired(0, 1))
    assert would(report) == [Would.HELPED]

    assert report.incidents[0].applied_at == (BEGIN,)


def test_of_an_event_it_is_not_said_that_it_helped() -> None:
    rule = a_rule(event={"type": "com.example.dark"})
    del rule["alert"], rule["verify"]
    event = fired(0, None)
    event = replace(event, source="kafka", name="com.example.dark", labels={"type": "com.example.dark"})
    assert would(run(rule, event)) == [Would.APPLIED]


def test_what_went_on_would_have_called_people() -> None:
    assert would(run(a_rule(), fired(0, 60))) == [Would.TRIED]


def test_without_a_way_back_it_would_have_been_tried_again() -> None:
    report = run(a_rule(playbook="toy.switch_off_for_good"), fired(0, 60))
    assert would(report) == [Would.TRIED]
    assert report.actions == 2


def test_the_cooldown_suppresses_in_virtual_time() -> None:
    report = run(a_rule(cooldown="1h"), fired(0, 1), fired(10, 20, "g"), fired(90, 91, "h"))
    assert would(report) == [Would.HELPED, Would.SUPPRESSED, Would.HELPED]
    assert report.incidents[1].refused["cooldown"] > 1, "it was looked at again and again"


def test_the_budget_and_the_breaker_hold() -> None:
    many = [fired(n * 30, n * 30 + 1, f"f{n}") for n in range(5)]
    assert run(a_rule(cooldown="0s", budget={"count": 2, "per": "1d"}), *many).actions == 2
    bad = [fired(n * 30, n * 30 + 25, f"f{n}") for n in range(5)]
    report = run(a_rule(cooldown="0s"), *bad, breaker={"failures": 2, "within": "1d", "open_for": "1d"})
    assert would(report) == [Would.TRIED, Would.TRIED, Would.SUPPRESSED, Would.SUPPRESSED, Would.SUPPRESSED]
    assert "circuit breaker" in report.incidents[2].refused


def test_flapping_observing_waiting_and_freezes() -> None:
    assert would(run(a_rule(firing_for="5m"), fired(0, 2))) == [Would.CLEARED]
    assert would(run(a_rule(mode="observe"), fired(0, 2))) == [Would.OBSERVED]
    waited = run(a_rule(target="attic"), fired(0, 2))
    assert would(waited) == [Would.WAITED]
    assert waited.incidents[0].why == "attic is restricted"
    freeze = {"starts": "2026-03-01T00:00:00Z", "ends": "2026-03-01T06:00:00Z", "why": "sale"}
    assert would(run(a_rule(), fired(0, 60), freezes=[freeze])) == [Would.SUPPRESSED]
    assert would(run(a_rule(give_up_after="1h"), fired(0, None), freezes=[freeze])) == [Would.GAVE_UP]
    assert would(run(a_rule(target={"label": "nowhere"}), fired(0, 60))) == [Would.ESCALATED]


def test_what_no_rule_is_about_is_counted() -> None:
    report = run(a_rule(), fired(0, 1, labels={"alertname": "Other"}))
    assert (report.signals, report.unmatched, report.incidents) == (1, 1, ())


def test_a_change_of_a_rule_changes_what_would_have_been() -> None:
    past = [fired(n * 10, n * 10 + 1, f"f{n}") for n in range(6)]
    assert [run(a_rule(cooldown=c, budget={"count": 99, "per": "1d"}), *past).actions for c in ("0s", "15m", "1h")] == [
        6,
        3,
        1,
    ]


def test_beginnings_and_ends_that_were_kept_become_spans() -> None:
    def kept(minute: int, **more: Any) -> tuple[datetime, Signal]:
        at = BEGIN + timedelta(minutes=minute)
        return at, Signal("alertmanager", "f", "LampOn", {}, BEGIN, at, **more)

    (one,) = spans([kept(0, silenced=True), kept(5), kept(9, ends_at=BEGIN + timedelta(minutes=9))])
    assert one.ends_at == BEGIN + timedelta(minutes=9)
    assert (one.silenced, one.seen_at) == (False, BEGIN + timedelta(minutes=5))
