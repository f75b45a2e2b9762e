"""What ten thousand alerts at once cost us before anything is asked or written: signals, the rules' decisions, the guards' rulings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from benchmarks.measure import Comparison, Goal
from ops_platform.actions import Case, Change, Plan
from ops_platform.actions.guards import rule_all
from ops_platform.clients.access import Access
from ops_platform.clients.alertmanager import merge, read_alerts
from ops_platform.clients.http import Answer
from ops_platform.clients.prometheus import Measured
from ops_platform.inventory import LoadedInventory
from ops_platform.inventory.model import Inventory
from ops_platform.inventory.remediation import MetricCheck
from ops_platform.remediation.claims import Claim, rule_on
from ops_platform.remediation.intake import decide
from ops_platform.remediation.model import Incident, Signal, State, incident_id
from ops_platform.remediation.rules import Decision, Unresolved, bounds, failure_domain
from ops_platform.remediation.store import Store
from ops_platform.remediation.worker import Worker, proposer

SIGNALS, RULES, GUARDS = "read, checked, merged", "decided by the rules", "ruled on by the guards"
_ONE_BY_ONE = "each guard rules on each alert by itself, and a tick lets only a hundred incidents come so far"
TICK, WHOLE = "the first two: a tick", "all three"
RULE_COUNT, SYSTEMS = 20, 500


def alerts(count: int) -> bytes:
    """As Alertmanager writes them: of so many kinds as there are rules, about so many systems as there are."""
    listed = [
        {
            "annotations": {"summary": f"memory of cache-{n} fills", "runbook_url": "https://runbooks.example.com/memory"},
            "endsAt": "2026-11-25T15:45:47.668Z",
            "fingerprint": f"{n:016x}",
            "receivers": [{"name": "team"}],
            "startsAt": "2026-11-25T14:45:47.668Z",
            "status": {"inhibitedBy": [], "mutedBy": [], "silencedBy": [], "state": "active"},
            "updatedAt": "2026-11-25T14:50:47.668Z",
            "generatorURL": "http://prometheus.example.com/graph?g0.expr=memory+%3E+0.9&g0.tab=1",
            "labels": {"alertname": f"MemoryFilling{n % RULE_COUNT}", "instance": f"node-{n}:9121", "job": "redis", "severity": "page",
                       "service": f"cache-{n % SYSTEMS}", "cluster": "eu-1", "team": "shop"},
        }
        for n in range(count)
    ]  # fmt: skip
    return json.dumps(listed).encode()


def fleet(systems: int = SYSTEMS) -> dict[str, Any]:
    """platform.yaml of a larger company: each alert is about one rule, which names its system by a label."""
    rule = {
        "target": {"label": "service"}, "playbook": "redis.purge_memory", "mode": "enforce", "firing_for": "1m",
        "parameters": {"at_least": "64MiB"}, "budget": {"count": 5, "per": "1d"},
    }  # fmt: skip
    return {
        "version": 1,
        "platform": {"name": "benchmark"},
        "owners": {"team": {"name": "Team"}},
        "environments": {"production": {}},
        "systems": [
            {"id": f"cache-{n}", "kind": "redis", "environment": "production", "owner": "team",
             "hosts": [{"host": f"cache-{n}.invalid", "port": 6379}]}
            for n in range(systems)
        ],
        "remediation": {
            "rules": [
                {**rule, "id": f"memory-{n}", "alert": [f"alertname=MemoryFilling{n}", "severity=~page|ticket"]} for n in range(RULE_COUNT)
            ],
            "freezes": [{"starts": "2026-12-23T00:00:00Z", "ends": "2027-01-02T00:00:00Z", "why": "Christmas"}],
        },
    }  # fmt: skip


@dataclass
class Nothing:
    """A store and eyes that answer at once: what is measured is our own time."""

    signal: Signal | None = None

    def paused(self) -> None:
        return None

    def clock_offset(self) -> timedelta:
        return timedelta(0)

    def look(self, incident: Incident) -> Signal | None:
        return incident.signal

    def measure(self, check: MetricCheck, incident: Incident) -> tuple[Measured, str]:
        return Measured.UNKNOWN, "not measured"


def rule_all_on(inventory: Inventory, decisions: Sequence[Decision | Unresolved], now: datetime) -> tuple[int, int]:
    """How many would be applied, and how many are refused: every guard of the worker, and what bounds actions over all of them."""
    access = Access(LoadedInventory(inventory, Path("/platform.yaml")))
    nothing = Nothing()
    worker = Worker(access, cast("Store", nothing), nothing, "benchmark")
    claims: list[Claim] = []
    for one in decisions:
        if isinstance(one, Unresolved):
            raise TypeError(one.problem)
        rule, signal, subject = one.rule, one.signal, one.subject
        incident = Incident(
            incident_id(rule.id, signal.fingerprint, signal.starts_at), rule.id, signal.fingerprint, subject.id, rule.playbook,
            State.OPEN, signal, now, now, proposed_by=proposer(rule),
        )  # fmt: skip
        change = Change("redis.memory", subject.id, "9 GiB", "8 GiB", reversible=False)
        plan = Plan(rule.playbook, subject.id, (change,), now)
        rulings = list(rule_all(worker.guards(incident, one, None), Case(plan, None, now)))
        claim = Claim(incident.id, 1, rule.id, subject.id, failure_domain(subject), rule.playbook, now)
        rulings += rule_on(claim, claims, bounds(inventory, rule), now)
        if all(ruling.allows for ruling in rulings):
            claims.append(claim)
    return len(claims), len(decisions) - len(claims)


def alerts_to_signals(count: int, rounds: int) -> Comparison:
    body, inventory = alerts(count), Inventory.model_validate(fleet())
    found = Comparison(
        "alerts-to-signals",
        f"{count:,} alerts of two Alertmanagers ({len(body) / 2**20:.1f} MiB each) become decisions",
        "seconds",
        f"Our own time from the two answers' bytes to a ruling on each alert, with {RULE_COUNT} rules and {SYSTEMS} systems; without the network, "
        "Alertmanager and the platform's database. Read: one list of signals. Rules: target, playbook, parameters. Guards: each guard of a "
        "run, over a plan of one change, and cooldown, budgets, circuit breaker and failure domain beside what was admitted before.",
        [Goal("signals, rules and guards < 1 s", WHOLE, most=1.0, if_missed=_ONE_BY_ONE), Goal("what a tick of the sensor decides < 1 s", TICK, most=1.0)],
    )  # fmt: skip
    answer = Answer(200, {}, body, "here")
    for _ in range(rounds):
        found.load.append(os.getloadavg()[0])
        times = [time.perf_counter()]
        now = datetime.now(UTC)
        signals = merge([read_alerts(answer, now), read_alerts(answer, now)], "here")
        times.append(time.perf_counter())
        decided, _unmatched = decide(inventory, signals, now)
        times.append(time.perf_counter())
        admitted, refused = rule_all_on(inventory, decided, now)
        times.append(time.perf_counter())
        assert len(signals) == len(decided) == admitted + refused == count
        assert admitted == inventory.remediation.budget.count  # type: ignore[union-attr]
        for side, began, ended in zip((SIGNALS, RULES, GUARDS), times, times[1:], strict=False):
            found.add(side, ended - began)
        found.add(TICK, times[2] - times[0])
        found.add(WHOLE, times[3] - times[0])
    return found
