"""Which rules are about a signal, and what a plan's size may be: nothing here needs a server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.actions import Case, Change, Plan
from ops_platform.inventory.model import Inventory
from ops_platform.remediation.guards import Limits
from ops_platform.remediation.model import Signal
from ops_platform.remediation.rules import about, decisions

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
MATCHERS = st.sampled_from(
    ['alertname="A"', 'alertname="B"', 'alertname=""', 'alertname=~"A|B"', 'alertname!="A"', 'team="x"', 'alertname=""']
)
RULES = st.lists(st.lists(MATCHERS, min_size=1, max_size=3) | st.none(), max_size=6)


def inventory(rules: list[list[str] | None]) -> Inventory:
    """Rules by their matchers; None is a rule about events."""

    def source(matchers: list[str] | None) -> dict[str, Any]:
        return {"event": {"type": "a.b"}} if matchers is None else {"alert": matchers}

    listed = [
        {"id": f"rule-{number}", **source(matchers), "target": "nothing", "playbook": "redis.purge_memory"}
        for number, matchers in enumerate(rules)
    ]
    return Inventory.model_validate(
        {
            "version": 1,
            "platform": {"name": "rules"},
            "owners": {},
            "environments": {},
            "remediation": {"rules": listed},
        }
    )


@given(
    RULES,
    st.sampled_from(["alertmanager", "kafka"]),
    st.dictionaries(st.sampled_from(["alertname", "team", "type"]), st.sampled_from(["", "A", "B", "C", "x", "a.b"])),
)
def test_no_rule_is_passed_over_and_they_stay_in_the_order_of_the_file(
    rules: list[list[str] | None], source: Any, labels: dict[str, str]
) -> None:
    known, signal = inventory(rules), Signal(source, "f", "name", labels, NOW, NOW)
    assert known.remediation is not None
    asked_one_by_one = [rule.id for rule in known.remediation.rules if about(rule, signal)]
    assert [one.rule.id for one in decisions(known, signal)] == asked_one_by_one


@pytest.mark.parametrize(
    ("kinds", "population", "why"),
    [
        ("pppppp", {}, "6 changes planned, 5 allowed"),
        ("ppppp", {}, None),
        ("ppn", {"p": 3}, "share of p: 2 of 3 planned, 66.7%; 34% allowed"),
        ("pp", {"p": 6}, None),
        ("p", {"p": 1}, None),
        ("pp", {"n": 1}, None),
    ],
)
def test_a_plan_has_a_size(kinds: str, population: dict[str, int], why: str | None) -> None:
    changes = tuple(Change(kind, f"{kind}-{number}", 1, 0, reversible=True) for number, kind in enumerate(kinds))
    found = Limits(5, 34).rule(Case(Plan("act", "shop", changes, NOW, population), None, NOW))
    assert found.allows == (why is None)
    assert why is None or found.reason == why
