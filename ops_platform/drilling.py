"""Drills with everything that follows from them: held to their end, their page written. Used by `ops` and by Dagster alike."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.counting import against, duration
from ops_platform.drills import forecast
from ops_platform.drills.begin import Beginner, Request
from ops_platform.drills.engine import Engine
from ops_platform.drills.loader import runbooks
from ops_platform.drills.model import Drill
from ops_platform.drills.overdue import Standing, standings
from ops_platform.drills.scorecard import card_of
from ops_platform.drills.store import Store
from ops_platform.drills.workspace import drills_of
from ops_platform.errors import RefusedError
from ops_platform.inventory.values import format_duration
from ops_platform.ledger import Ledger
from ops_platform.recovery.model import Verdict
from ops_platform.reports.drills import SIX_MONTHS, Outlook, drill_report, drills_report
from ops_platform.reports.html import write_report

if TYPE_CHECKING:
    from ops_platform.clients.access import Access


@contextmanager
def open_store(access: Access, clock: Clock = SYSTEM_CLOCK) -> Generator[Store]:
    """Raises UsageError where the platform has no database: a drill that nobody can record is not held."""
    with Ledger(access.platform_db, clock=clock) as ledger:
        yield Store(ledger, clock=clock)


def begin(access: Access, store: Store, request: Request) -> Drill:
    """The drill, begun. Raises RefusedError with every guard's reason, and what to do where a second person is asked for."""
    begun = Beginner(access, store).begin(request)
    if begun.drill is not None:
        return begun.drill
    refused = [ruling for ruling in begun.result.rulings if not ruling.allows]
    asked = any(ruling.guard in ("approval", "second person") for ruling in refused)
    raise RefusedError(
        "; ".join(f"{ruling.guard}: {ruling.reason}" for ruling in refused) or begun.result.status.value,
        where=f"{request.book.id} on {request.subject.id}",
        remedy=f"as a second person: ops drill approve {begun.result.plan.digest}" if asked else None,
    )


def hold(access: Access, store: Store, drill_id: str, actor: str) -> tuple[Drill, Path]:
    """Go on with a drill that was begun, to its end and in this process. The drill, and the path of its page."""
    held = Engine(access, store, actor).run(drill_id)
    return held, write_reports(access, store, held)


def standing(access: Access, store: Store, clock: Clock = SYSTEM_CLOCK) -> list[Standing]:
    """Every declared drill on every target of its, the riskiest first."""
    inventory = access.inventory
    classes = {one.id: one.classification for one in (*inventory.targets, *inventory.systems)}
    scenarios = {name: book.scenario for name, book in runbooks(access).items()}
    return standings(drills_of(access), scenarios, classes, store.list(ended=True, limit=100_000), clock.now())


def outlooks(access: Access, ended: Sequence[Drill], now: datetime) -> list[Outlook]:
    """What the forecast says of each target that was restored by a drill."""
    found: list[Outlook] = []
    for target in access.inventory.targets:
        mine = [d for d in ended if d.subject == target.id and d.verdict == Verdict.PASS]
        seen = forecast.throughputs(mine)
        grown = forecast.growth(seen)
        if grown is None:
            continue
        wal = round(median(one.wal_bytes for one in seen))
        today, later = (forecast.predict(seen, grown.after(time), wal) for time in (timedelta(0), SIX_MONTHS))
        if today is None or later is None:
            continue
        promised = target.objectives.rto.total_seconds()
        missed = forecast.missed_at(seen, wal, promised, now, SIX_MONTHS)
        found.append(Outlook(target.id, promised, today, later, missed))
    return found


def reports_directory(access: Access) -> Path:
    return access.path(access.inventory.platform.reports) / "drills"


def write_reports(access: Access, store: Store, drill: Drill | None = None, clock: Clock = SYSTEM_CLOCK) -> Path:
    """The page of one drill (of every one, where none is named) and the index over all. The path of that page, or of the index."""
    ended, now = store.list(ended=True, limit=100_000), clock.now()
    cards = {d.id: card for d in ended if (card := card_of(d)) is not None}
    directory, page = reports_directory(access), None
    for drill_id in [drill.id] if drill is not None else cards:
        page = write_report(directory, drill_id, drill_report(cards[drill_id], now))
    html = drills_report(
        standing(access, store, clock), list(cards.values()), store.findings(), outlooks(access, ended, now), now
    )
    index = write_report(directory, None, html)
    return page if drill is not None and page is not None else index


@dataclass(frozen=True)
class Kept:
    """Whether a promise about a drill is kept. What was never drilled keeps none."""

    plan: str
    target: str
    name: str
    kept: bool
    text: str


def promises(access: Access, store: Store, clock: Clock = SYSTEM_CLOCK) -> list[Kept]:
    """drilled_within, rto_met and rpo_met of every declared drill on each of its targets."""
    found: list[Kept] = []
    for one in standing(access, store, clock):
        card = card_of(store.get(one.last_drill)) if one.last_drill else None
        proven = "never" if one.proven is None else f"{one.proven:%Y-%m-%d %H:%M} UTC, by {one.proven_by}"
        text = f"proven {proven}; every {format_duration(one.every)} is promised"
        found.append(Kept(one.plan, one.target, "drilled_within", not one.overdue, text))
        for name in ("rto", "rpo"):
            measured = next((o for o in card.objectives if o.name == name), None) if card else None
            if card is not None and measured is None:
                continue  # the runbook does not measure it
            text = "never measured"
            if measured is not None:
                seconds, most = measured.measured, measured.objective
                text = f"{text}, {duration(most)} are allowed" if seconds is None else against(seconds, most)
            kept = measured is not None and measured.met is True
            found.append(Kept(one.plan, one.target, f"{name}_met", kept, text))
    return found
