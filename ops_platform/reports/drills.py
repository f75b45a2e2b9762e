"""The pages of drills: one for each drill, and the index with coverage, trends, forecast and findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from ops_platform.counting import count_of, duration
from ops_platform.drills.forecast import Forecast
from ops_platform.drills.model import ENDED_IN_IT, DrillCard, Ending, Finding, StepCard, StepState
from ops_platform.drills.overdue import Standing
from ops_platform.recovery.model import Step, Verdict
from ops_platform.reports import charts
from ops_platform.reports.html import render
from ops_platform.reports.standing import tone_of, verdict_words
from ops_platform.reports.words import capital, utc

HISTORY = 60  # points of a trend


@dataclass(frozen=True)
class Bar:
    """Of an availability strip, in percent of its width."""

    left: float
    width: float
    title: str


@dataclass(frozen=True)
class Strip:
    """What one probe saw, and when it looked at all."""

    name: str
    seen: Bar
    outages: list[Bar]
    summary: str


@dataclass(frozen=True)
class Cell:
    """A target and a scenario: how its last drill ended, and when. `drill` None: there was none."""

    tone: str
    words: str
    when: str = ""
    drill: str | None = None


@dataclass(frozen=True)
class Outlook:
    """What the forecast says of one target: at its size today, and in six months."""

    target: str
    objective: float
    today: Forecast
    later: Forecast
    missed_at: datetime | None


def drill_report(card: DrillCard, generated_at: datetime) -> str:
    """The page of one drill."""
    timeline = timeline_of(card)
    return render(
        "drill.html.j2",
        card=card,
        now=utc(generated_at),
        tone=_tone(card.verdict),
        words=_words(card.verdict),
        gantt=timeline,
        strips=[_strip(card, number, timeline.total) for number in range(len(card.probes))],
        stack=_stack(card),
        total=(card.ended_at - card.started_at).total_seconds(),
        step_state=_step_state,
    )


def timeline_of(card: DrillCard) -> charts.Gantt:
    """The steps that were taken. Dark are those of the longest way, which decide how long the drill takes."""
    taken = [
        (step, Step(name=step.title, started=step.started, seconds=step.seconds))
        for step in card.steps
        if step.started is not None and step.seconds is not None
    ]
    drawn = charts.gantt([bar for _, bar in taken], (card.ended_at - card.started_at).total_seconds())
    bars = [
        replace(bar, longest=step.critical, failed=_step_state(card, step)[0] == "bad")
        for (step, _), bar in zip(taken, drawn.bars, strict=True)
    ]
    return replace(drawn, bars=bars)


def _step_state(card: DrillCard, step: StepCard) -> tuple[str, str]:
    """A step in a word. One in which the drill was broken off has not failed."""
    if step.state == StepState.FAILED and step.said == ENDED_IN_IT and card.ending in (Ending.ABORTED, Ending.LOST):
        return "warn", "Broken off"
    return ("bad" if step.state == StepState.FAILED else "none"), capital(step.state)


def _stack(card: DrillCard) -> charts.Gantt:
    """What was restored, each as early as all that it needs served."""
    steps = [Step(name=part.target, started=part.starts, seconds=part.seconds or 0.0) for part in card.stack]
    drawn = charts.gantt(steps)
    bars = [replace(bar, longest=part.critical) for part, bar in zip(card.stack, drawn.bars, strict=True)]
    return replace(drawn, bars=bars)


def _tone(verdict: str) -> str:
    return tone_of(Verdict(verdict))


def _words(verdict: str) -> str:
    return verdict_words(Verdict(verdict))


def _strip(card: DrillCard, number: int, total: float) -> Strip:
    probe = card.probes[number]
    left, right = max(0.0, probe.began or 0.0), min(total, total if probe.ended is None else probe.ended)
    seen = Bar(100 * left / total, 100 * (right - left) / total, f"from {duration(left)} to {duration(right)}")
    bars = [
        Bar(
            100 * max(0.0, o.began) / total,
            max(100 * ((o.ended if o.ended is not None else right) - o.began) / total, 0.15),
            f"no answer from {duration(o.began)} to {duration(o.ended) if o.ended is not None else 'the end'}",
        )
        for o in probe.outages
    ]
    many = f"{count_of(probe.attempts, 'attempt')}, {probe.failed} failed; unavailable for {duration(probe.unavailable_seconds)}"
    resolution = f"; one attempt every {probe.resolution_ms:.0f} ms (99th percentile)" if probe.resolution_ms else ""
    return Strip(probe.step, seen, bars, many + resolution)


def drills_report(
    standings: Sequence[Standing],
    cards: Sequence[DrillCard],
    findings: Sequence[Finding],
    outlooks: Sequence[Outlook],
    generated_at: datetime,
) -> str:
    """The index. `cards`: oldest first."""
    now = utc(generated_at)
    return render(
        "drills.html.j2",
        now=now,
        scenarios=(scenarios := sorted({s.scenario for s in standings} | {c.scenario for c in cards})),
        targets=(targets := sorted({s.target for s in standings} | {c.target for c in cards})),
        cells=_cells(standings, cards, targets, scenarios, now),
        overdue=sum(s.overdue for s in standings),
        plots=_plots(cards),
        findings=findings,
        late=sum(f.due < now for f in findings),
        outlooks=outlooks,
        cards=cards[-HISTORY:][::-1],
        tone=_tone,
        words=_words,
        outlook_tone=_outlook_tone,
    )


def _cells(
    standings: Sequence[Standing],
    cards: Sequence[DrillCard],
    targets: Sequence[str],
    scenarios: Sequence[str],
    now: datetime,
) -> dict[tuple[str, str], Cell]:
    declared = {(s.target, s.scenario): s for s in standings}
    held: Mapping[tuple[str, str], DrillCard] = {(c.target, c.scenario): c for c in cards}
    found: dict[tuple[str, str], Cell] = {}
    for target in targets:
        for scenario in scenarios:
            key = (target, scenario)
            standing, last = declared.get(key), held.get(key)
            if last is None:
                found[key] = Cell("warn", "never drilled") if standing else Cell("none", "not planned")
                continue
            ago, overdue = f"{duration(now - last.ended_at)} ago", standing is not None and standing.overdue
            tone, words = _tone(last.verdict), _words(last.verdict)
            if overdue and last.verdict == Verdict.PASS:
                tone, words = "warn", "proven once"
            found[key] = Cell(tone, words, f"{ago}, overdue" if overdue else ago, last.drill)
    return found


def _plots(cards: Sequence[DrillCard]) -> list[tuple[str, charts.Plot]]:
    """RTO and RPO over time, for each target and scenario that has been drilled more than once."""
    found: list[tuple[str, charts.Plot]] = []
    for key in sorted({(c.target, c.scenario) for c in cards}):
        mine = [c for c in cards if (c.target, c.scenario) == key][-HISTORY:]
        for name in ("rto", "rpo"):
            points = [
                charts.Point(c.ended_at, o.measured, _tone(c.verdict), _words(c.verdict))
                for c in mine
                for o in c.objectives
                if o.name == name
            ]
            promised = [o.objective for c in mine for o in c.objectives if o.name == name and o.objective]
            if len(points) > 1 and promised:
                lane = any(point.value is None for point in points)
                title = f"{key[0]}, {key[1]}: {name.upper()}"
                found.append((title, charts.points_plot(points, name, promised[-1], lane=lane, many="drills")))
    return found


def _outlook_tone(one: Outlook) -> tuple[str, str]:
    """Whether the objective will be missed, in a word."""
    if one.missed_at is None:
        return {True: ("bad", "will be missed"), False: ("good", "kept"), None: ("warn", "not certain")}[
            one.later.misses(one.objective)
        ]
    soon = one.today.misses(one.objective)
    return ("bad", "missed today" if soon else f"missed from {utc(one.missed_at):%Y-%m-%d} on")


SIX_MONTHS = timedelta(days=182)
