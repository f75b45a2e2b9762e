"""When targets are due: cron in a named zone, daylight saving included, each target at its own fixed place in the spread.

Dagster asks every few minutes what was due since it asked last; the answer depends on nothing but the two moments, so that a
late, repeated or overlapping question gives the same due moments under the same keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from ops_platform.inventory.model import Schedule


@dataclass(frozen=True)
class Due:
    """`nominal`: the moment of the cron expression, which is the run's name; `at`: with the target's share of the spread. UTC."""

    target_id: str
    nominal: datetime
    at: datetime

    @property
    def key(self) -> str:
        return f"{self.target_id}/{self.nominal:%Y-%m-%dT%H:%MZ}"


def offset(target_id: str, spread: timedelta) -> timedelta:
    """A target's fixed place in the spread, by its id alone: evenly over all targets, the same every night."""
    share = int.from_bytes(hashlib.sha256(target_id.encode()).digest()[:8], "big") / 2**64
    return timedelta(seconds=int(spread.total_seconds() * share))


def due(schedules: Iterable[tuple[str, Schedule]], after: datetime, until: datetime) -> list[Due]:
    """What is due in (after, until], in the order of time."""
    # An expression is followed once for all targets that have it: a thousand mostly share a few.
    alike: dict[tuple[str, str], list[tuple[str, timedelta]]] = {}
    for target_id, schedule in schedules:
        shift = offset(target_id, schedule.spread)
        alike.setdefault((schedule.cron, schedule.timezone), []).append((target_id, shift))
    found: list[Due] = []
    for (cron, zone), shifted in alike.items():
        shifts = [shift for _, shift in shifted]
        nominals = list(fires(cron, zone, after - max(shifts), until - min(shifts)))
        for target_id, shift in shifted:
            found += [Due(target_id, one, one + shift) for one in nominals if after < one + shift <= until]
    return sorted(found, key=lambda item: (item.at, item.target_id))


def fires(cron: str, zone: str, after: datetime, until: datetime) -> Iterator[datetime]:
    """The moments of a cron expression in (after, until], UTC, in the order of time.

    A local time that daylight saving skips fires once when the clock has jumped over it; one that comes twice fires once, the
    first time, unless the expression runs by the hour: then each real hour has its own.
    """
    from croniter import croniter
    from croniter.croniter import CroniterBadDateError

    place = ZoneInfo(zone)
    by_the_hour = cron.split()[1].startswith("*")
    # Naive local time, from a little before: what daylight saving moves lies within a day.
    start = after.astimezone(place).replace(tzinfo=None) - timedelta(hours=3)
    end = until.astimezone(place).replace(tzinfo=None) + timedelta(hours=3)
    moments: set[datetime] = set()
    times = croniter(cron, start - timedelta(seconds=1))
    try:
        while (local := times.get_next(datetime)) <= end:
            moments.update(_moments(local, place, twice=by_the_hour))
    except CroniterBadDateError:  # there is no such day, or none in the next fifty years
        pass
    return iter(sorted(moment for moment in moments if after < moment <= until))


def _moments(local: datetime, place: ZoneInfo, *, twice: bool) -> Iterator[datetime]:
    """A local time as the moments when the clock shows it. One that is skipped is taken at the offset of before the jump."""
    first, second = (local.replace(tzinfo=place, fold=fold).astimezone(UTC) for fold in (0, 1))
    yield first
    # Of a skipped time the second reading lies before the first.
    if twice and second > first:
        yield second


def next_fire(cron: str, zone: str, after: datetime) -> datetime | None:
    """The next moment within five years; None for an expression that never fires (31 February)."""
    for days in (2, 40, 400, 366 * 5):
        found = next(fires(cron, zone, after, after + timedelta(days=days)), None)
        if found is not None:
            return found
    return None
