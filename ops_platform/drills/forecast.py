"""How long a restore of a target will take, from the throughputs that its drills have measured, with an interval.

A restore is a part that does not grow (choosing, starting, looking), plus the bytes of the backup by the rate at which they were fetched,
plus the bytes of WAL by the rate at which they were replayed. Each drill gives one rate of each; the expectation is the median, and the
interval is that of a further draw from as few: mean ± t · s · √(1 + 1/n) on the logarithm of the rates (the prediction interval of a
normal sample), at 90 %. With fewer than three drills it is a factor of three to both sides, which is said to be a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from ops_platform.counting import count_of
from ops_platform.drills.model import Drill, Measured, Prediction

if TYPE_CHECKING:
    from ops_platform.drills.store import Store

# Two-sided 90 % quantiles of Student's t by degrees of freedom; beyond, the normal's.
_T = {
    2: 2.920,
    3: 2.353,
    4: 2.132,
    5: 2.015,
    6: 1.943,
    7: 1.895,
    8: 1.860,
    9: 1.833,
    10: 1.812,
    15: 1.753,
    20: 1.725,
    30: 1.697,
}
_GUESS = 3.0
_ENOUGH = 3
_LOOKED_BACK = 24  # drills


@dataclass(frozen=True)
class Throughput:
    """What one restore measured. `fixed`: seconds of it that were neither fetching nor replaying."""

    at: datetime
    bytes: int
    fetch_seconds: float
    wal_bytes: int
    replay_seconds: float
    fixed: float

    @property
    def total(self) -> float:
        return self.fetch_seconds + self.replay_seconds + self.fixed


@dataclass(frozen=True)
class Forecast:
    """Seconds. `low` and `high`: 90 % of restores lie between, if they go on as they did."""

    expected: float
    low: float
    high: float
    from_drills: int
    how: str

    def misses(self, objective: float) -> bool | None:
        """Whether it will be missed; None where the interval leaves it open."""
        if self.low > objective:
            return True
        return False if self.high <= objective else None


@dataclass(frozen=True)
class Growth:
    """By a straight line through the sizes that drills have met. `bytes_a_day` may be negative."""

    newest: int
    bytes_a_day: float

    def after(self, time: timedelta) -> int:
        return max(0, round(self.newest + self.bytes_a_day * time.total_seconds() / 86400))


def predict(seen: Sequence[Throughput], size: int, wal: int) -> Forecast | None:
    """For so many bytes of backup and of WAL. None where nothing was measured."""
    if not seen:
        return None
    fetch = [max(t.fetch_seconds, 1e-3) / max(t.bytes, 1) for t in seen]
    replay = [max(t.replay_seconds, 1e-3) / max(t.wal_bytes, 1) for t in seen if t.wal_bytes >= 1 << 20]
    fixed = median(t.fixed for t in seen)
    # WAL that was too little to have a rate: its replay was a start of a server and nothing else.
    idle = median(t.replay_seconds for t in seen)
    replaying = max(median(replay) * wal, idle) if replay else idle
    expected = fixed + median(fetch) * size + replaying
    down, up = _spread([_ratio(t, seen) for t in seen])
    how = f"from {count_of(len(seen), 'restore')}: fetch at {1 / median(fetch) / 2**20:.0f} MiB/s"
    if len(seen) < _ENOUGH:
        how += ", too few to know how they vary: a factor of three to both sides"
    return Forecast(expected, expected * down, expected * up, len(seen), how)


def _ratio(one: Throughput, seen: Sequence[Throughput]) -> float:
    """How much slower it was than the median's rates would have it."""
    fetch = median(max(t.fetch_seconds, 1e-3) / max(t.bytes, 1) for t in seen) * one.bytes
    replay = median(t.replay_seconds for t in seen)
    return one.total / max(fetch + replay + median(t.fixed for t in seen), 1e-3)


def _spread(ratios: Sequence[float]) -> tuple[float, float]:
    if len(ratios) < _ENOUGH:
        return 1 / _GUESS, _GUESS
    logs = [math.log(max(ratio, 1e-6)) for ratio in ratios]
    n = len(logs)
    wide = _t(n - 1) * stdev(logs) * math.sqrt(1 + 1 / n)
    return math.exp(mean(logs) - wide), math.exp(mean(logs) + wide)


def _t(freedom: int) -> float:
    known = [degrees for degrees in _T if degrees <= freedom]
    return _T[max(known)] if freedom <= max(_T) else 1.645


def growth(seen: Sequence[Throughput]) -> Growth | None:
    """None where nothing was measured; with one size, or all on one day, it does not grow."""
    if not seen:
        return None
    newest = max(seen, key=lambda t: t.at)
    days = [(t.at - newest.at).total_seconds() / 86400 for t in seen]
    if max(days) - min(days) < 1:
        return Growth(newest.bytes, 0.0)
    middle, size = mean(days), mean(t.bytes for t in seen)
    square = sum((day - middle) ** 2 for day in days)
    slope = sum((day - middle) * (t.bytes - size) for day, t in zip(days, seen, strict=True)) / square
    return Growth(newest.bytes, slope)


def missed_at(
    seen: Sequence[Throughput], wal: int, objective: float, now: datetime, horizon: timedelta
) -> datetime | None:
    """The first week in which the expectation is above the objective; None where there is none within the horizon."""
    grown = growth(seen)
    if grown is None:
        return None
    for week in range(horizon.days // 7 + 1):
        found = predict(seen, grown.after(timedelta(weeks=week)), wal)
        if found is not None and found.expected > objective:
            return now + timedelta(weeks=week)
    return None


# From the record


def throughputs(drills: Sequence[Drill]) -> list[Throughput]:
    """Of the restores in these drills, oldest first."""
    found: list[Throughput] = []
    for drill in drills:
        for backup in (drill.card or {}).get("backups", ()):
            if (one := _throughput(drill, backup)) is not None:
                found.append(one)
    return found[-_LOOKED_BACK:]


def _throughput(drill: Drill, backup: Mapping[str, Any]) -> Throughput | None:
    needed = ("bytes", "fetch_seconds", "wal_bytes", "replay_seconds")
    if drill.ended_at is None or any(backup.get(name) is None for name in needed):
        return None
    total = _rto((drill.card or {}).get("measured", ()))
    moved = backup["fetch_seconds"] + backup["replay_seconds"]
    fixed = max(0.0, total - moved) if total is not None else 0.0
    return Throughput(
        drill.ended_at, backup["bytes"], backup["fetch_seconds"], backup["wal_bytes"], backup["replay_seconds"], fixed
    )


def _rto(measured: Sequence[Mapping[str, Any]]) -> float | None:
    return next((m["value"] for m in measured if m["name"] == "rto" and m["value"] is not None), None)


def checked(store: Store, held: Drill, measured: Sequence[Measured]) -> Prediction | None:
    """What would have been said before this drill of its RTO, beside what it measured."""
    before = [
        d for d in store.list(subject=held.subject, ended=True) if d.scenario == held.scenario and d.verdict == "PASS"
    ]
    seen = throughputs(before)
    facts = [r.facts["backup"] for r in store.steps(held.id).values() if "bytes" in r.facts.get("backup", {})]
    if not seen or not facts:
        return None
    found = predict(seen, facts[-1]["bytes"], facts[-1]["wal_bytes"])
    if found is None:
        return None
    value = next((m.value for m in measured if m.name == "rto"), None)
    held_it = None if value is None else found.low <= value <= found.high
    return Prediction(
        expected=round(found.expected, 3), low=round(found.low, 3), high=round(found.high, 3),
        from_drills=found.from_drills, measured=value, held=held_it,
    )  # fmt: skip
