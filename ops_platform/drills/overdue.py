"""Which drill is next: what was proven when, what never was, and what is most overdue. Pure, over the drills that ended.

Risk is classification × age × change: how bad a loss would be, for how many of its own periods nothing was proven, and how much has
changed since. What was never drilled is as old as ten periods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ops_platform.drills.model import Drill
from ops_platform.inventory.base import Classification
from ops_platform.inventory.drills import Drills
from ops_platform.recovery.model import Verdict

WEIGHT = {
    Classification.PUBLIC: 1.0,
    Classification.INTERNAL: 2.0,
    Classification.CONFIDENTIAL: 4.0,
    Classification.RESTRICTED: 8.0,
}
NEVER = 10.0  # periods


@dataclass(frozen=True)
class Standing:
    """One drill on one target. `proven`: its newest PASS; `last`: the newest of any verdict. `risk` orders what is next."""

    plan: str
    runbook: str
    scenario: str
    target: str
    every: timedelta
    proven: datetime | None
    proven_by: str | None
    last: datetime | None
    last_drill: str | None
    last_verdict: str | None
    overdue: bool
    risk: float


def standings(
    declared: Drills,
    scenarios: Mapping[str, str],
    classes: Mapping[str, Classification],
    ended: Sequence[Drill],
    now: datetime,
) -> list[Standing]:
    """The riskiest first. `scenarios`: of each runbook; `classes`: of each target. `ended`: oldest first."""
    found: list[Standing] = []
    for plan in declared.plan:
        scenario = scenarios.get(plan.runbook, "")
        for target in plan.targets:
            # Whoever held it: a scenario that was proven on a target is proven there.
            mine = [d for d in ended if d.subject == target and d.scenario == scenario and d.mode == "drill"]
            good = [d for d in mine if d.verdict == Verdict.PASS]
            proven, last = good[-1] if good else None, mine[-1] if mine else None
            age = NEVER if proven is None else (now - (proven.ended_at or now)) / plan.every
            changed = 1.0 if proven is None else change_since(proven, ended)
            found.append(
                Standing(
                    plan.id, plan.runbook, scenario, target, plan.every, proven.ended_at if proven else None,
                    proven.id if proven else None, last.ended_at if last else None, last.id if last else None,
                    last.verdict if last else None, age > 1, round(WEIGHT[classes[target]] * max(age, 0.0) * changed, 3),
                )
            )  # fmt: skip
    return sorted(found, key=lambda one: (-one.risk, one.plan, one.target))


def change_since(proven: Drill, ended: Sequence[Drill]) -> float:
    """From 1 on: a drill that failed since doubles it, another size of the backup adds its share, and another version of PostgreSQL a half."""
    after = [d for d in ended if d.subject == proven.subject and d.started_at > proven.started_at]
    factor = 2.0 if any(d.verdict == Verdict.FAIL for d in after) else 1.0
    seen = [d for d in (proven, *after) if d.card]
    sizes = [b["bytes"] for d in seen for b in (d.card or {}).get("backups", ()) if b.get("bytes")]
    if len(sizes) > 1:
        factor += abs(sizes[-1] - sizes[0]) / sizes[0]
    versions = {(d.card or {}).get("versions", {}).get("postgresql") for d in seen} - {None}
    return factor + (0.5 if len(versions) > 1 else 0.0)


def most_overdue(found: Sequence[Standing]) -> Standing | None:
    """The riskiest of those that are overdue; None where none is."""
    return next((one for one in found if one.overdue), None)
