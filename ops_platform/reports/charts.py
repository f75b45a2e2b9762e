"""The geometry of the pages' plots: plain data that the templates draw as inline SVG.

Horizontal places are percentages and vertical ones pixels, so that a plot fills any width while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Literal

from ops_platform.backup.model import BackupInfo, BackupKind, RecoveryWindow
from ops_platform.counting import duration, size
from ops_platform.recovery.model import Scorecard, Step, Verdict
from ops_platform.reports.standing import age, holes_of, measured, proven_moment, shown, tone_of, verdict_words
from ops_platform.reports.words import capital, day, long_moment, moment, utc

_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
_DAYS = (1, 2, 3, 7, 14, 30, 60, 91, 182, 365)
# Lines of a logarithmic plot of durations.
_DECADES = (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 86400, 864000, 8640000)

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str

    @property
    def anchor(self) -> Anchor:
        """Labels near an edge lean inwards."""
        return "start" if self.at < 6 else "end" if self.at > 94 else "middle"


def _nice_step(span: float, most: int) -> float:
    """The smallest round step of seconds of which at most `most` fit into `span`."""
    for step in (*_STEPS, *(days * 86400 for days in _DAYS)):
        if span / step <= most:
            return step
    return 365 * 86400 * math.ceil(span / most / (365 * 86400))


# The restore's timeline


@dataclass(frozen=True)
class Bar:
    name: str
    left: float
    width: float
    seconds: float
    note: str  # bytes and rate, where the step moved bytes
    longest: bool
    failed: bool = False


@dataclass(frozen=True)
class Gantt:
    bars: list[Bar]
    ticks: list[Tick]
    total: float


def gantt(steps: Sequence[Step], whole: float = 0.0) -> Gantt:
    """`whole`: the seconds that are drawn at least."""
    total = max((step.started + step.seconds for step in steps), default=0.0)
    total = max(total, whole)
    if total <= 0:
        return Gantt([_bar(step, 1.0, longest=False) for step in steps], [], 0.0)
    longest = max(steps, key=lambda step: step.seconds, default=None)
    every = _nice_step(total, 5)
    ticks = [Tick(100 * n * every / total, duration(n * every)) for n in range(int(total / every) + 1)]
    return Gantt([_bar(step, total, longest=step is longest) for step in steps], ticks, total)


def _bar(step: Step, total: float, *, longest: bool) -> Bar:
    note = ""
    if step.bytes is not None:
        note = size(step.bytes)
        if step.bytes and step.seconds >= 0.01:
            note += f", {size(step.bytes / step.seconds)}/s"
    return Bar(capital(step.name), 100 * step.started / total, 100 * step.seconds / total, step.seconds, note, longest)


# A measured time over past verifications


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    tone: str
    title: str


@dataclass(frozen=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Level:
    """A horizontal line with its label."""

    y: float
    label: str


@dataclass(frozen=True)
class Plot:
    name: str
    marks: list[Mark]
    lines: list[Line]
    levels: list[Level]
    objective: Level
    ticks: list[Tick]
    floor: float  # where the plot ends and the time axis begins
    unmeasured: float | None  # height of the lane for verifications without a figure
    height: float
    summary: str


_PLOT_TOP, _PLOT_FLOOR, _LANE, _AXIS = 22.0, 172.0, 24.0, 26.0
_APART = 16.0  # pixels between two labels at least


@dataclass(frozen=True)
class Point:
    """A figure of one day. `value` None: it was not measured. `words`: how that day ended."""

    at: datetime
    value: float | None
    tone: str
    words: str


def history_plot(cards: Sequence[Scorecard], name: str, objective: float, *, lane: bool) -> Plot:
    """The measured `name` of each verification on a logarithmic scale, with the objective as a line.

    `lane`: with a place below for verifications without a figure.
    """
    points = [
        Point(card.ended_at, measured(card, name), tone_of(shown(card)), verdict_words(shown(card))) for card in cards
    ]
    return points_plot(points, name, objective, lane=lane)


def points_plot(
    points: Sequence[Point], name: str, objective: float, *, lane: bool, many: str = "verifications"
) -> Plot:
    """As `history_plot`, of anything that is measured time and again."""
    values = [point.value for point in points]
    known = [value for value in values if value is not None]
    low, high = _log_span([*known, objective])

    def y(seconds: float) -> float:
        share = (math.log10(max(seconds, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return round(_PLOT_FLOOR - share * (_PLOT_FLOOR - _PLOT_TOP), 1)

    times = [utc(point.at) for point in points]
    # On the left the labels of the levels have their place.
    x = _TimeAxis.over(times, pad=0.02, left=13.0)
    below = _PLOT_FLOOR + _LANE if lane else None
    marks: list[Mark] = []
    for point, value, at in zip(points, values, times, strict=True):
        figure = "not measured" if value is None else duration(value)
        height = y(value) if value is not None else below or _PLOT_FLOOR
        marks.append(Mark(x(at), height, point.tone, f"{moment(at)}: {figure}, {point.words}"))
    # A verification without a figure breaks the line: nothing is known between its neighbours.
    lines = [
        Line(left.x, left.y, right.x, right.y)
        for (left, a), (right, b) in pairwise(zip(marks, values, strict=True))
        if a is not None and b is not None
    ]
    floor = below + 10 if below else _PLOT_FLOOR
    return Plot(
        name=name,
        marks=marks,
        lines=lines,
        levels=[
            Level(y(value), duration(value))
            for value in _DECADES
            if low * 1.01 < value < high * 0.99 and abs(y(value) - y(objective)) > _APART
        ],
        objective=Level(y(objective), duration(objective)),
        ticks=x.ticks(4),
        floor=floor,
        unmeasured=below,
        height=floor + _AXIS,
        summary=_plot_summary(name, len(points), known, objective, many),
    )


def _log_span(values: Sequence[float]) -> tuple[float, float]:
    positive = [value for value in values if value > 0] or [1.0]
    low = 10 ** math.floor(math.log10(max(min(positive), 0.001)) - 0.15)
    return low, max(max(positive) * 2.2, low * 100)


def _plot_summary(name: str, count: int, known: Sequence[float], objective: float, many: str) -> str:
    if not known:
        return f"{name.upper()}: not measured in any of {count} {many}."
    kept = sum(value <= objective for value in known)
    return (
        f"{name.upper()} of {count} {many}: from {duration(min(known))} to {duration(max(known))}; "
        f"the objective of {duration(objective)} was kept in {kept} of {len(known)} that were measured."
    )


# Coverage of the recovery window


@dataclass(frozen=True)
class _TimeAxis:
    begin: datetime
    end: datetime
    left: float = 0.0  # percent that stay free on the left

    @classmethod
    def over(cls, times: Sequence[datetime], pad: float, left: float = 0.0) -> _TimeAxis:
        first, last = min(times), max(times)
        spare = (last - first) * pad or timedelta(seconds=30)
        return cls(first - spare, last + spare, left)

    @property
    def seconds(self) -> float:
        return (self.end - self.begin).total_seconds()

    def __call__(self, at: datetime) -> float:
        share = (utc(at) - self.begin).total_seconds() / self.seconds
        return round(self.left + (100 - self.left) * min(max(share, 0.0), 1.0), 3)

    def ticks(self, most: int) -> list[Tick]:
        """Round moments; with the day where a day or more is shown, else with the time of day."""
        step = max(_nice_step(self.seconds, most), 1.0)
        # Whole days are counted from the epoch, which began at midnight UTC.
        first = math.ceil(self.begin.timestamp() / step) * step
        ticks: list[Tick] = []
        year = self.begin.year if self.begin.year == self.end.year else None
        for n in range(most + 1):
            at = datetime.fromtimestamp(first + n * step, UTC)
            if at > self.end:
                break
            # Where the axis begins in another year than it ends, the first one of each year says which.
            label = _tick_label(at, step)
            ticks.append(Tick(self(at), label if at.year == year or step < 86400 else f"{label} {at.year}"))
            year = at.year
        return ticks


def _tick_label(at: datetime, step: float) -> str:
    if step >= 86400:
        return day(at)
    if step < 60:
        return f"{at:%H:%M:%S}"
    return day(at) if at.hour == at.minute == 0 else f"{at:%H:%M}"


@dataclass(frozen=True)
class Piece:
    left: float
    width: float
    title: str


@dataclass(frozen=True)
class BackupTick:
    at: float
    full: bool
    broken: bool
    title: str


@dataclass(frozen=True)
class Coverage:
    pieces: list[Piece]
    gaps: list[Piece]
    backups: list[BackupTick]
    proofs: list[Mark]
    promised: float | None  # where the promised window begins, if it is on the strip
    now: float
    ticks: list[Tick]
    facts: list[str] = field(default_factory=list[str])


_STRIP_MARKS = 18.0  # the lane of the proofs above the strip


def coverage(
    window: RecoveryWindow,
    backups: Sequence[BackupInfo],
    cards: Sequence[Scorecard],
    promised: timedelta,
    now: datetime,
) -> Coverage | None:
    """None where there is nothing to draw."""
    now = utc(now)
    proofs = [(card, at) for card in cards if (at := proven_moment(card)) is not None]
    held = [utc(at) for piece in window.pieces for at in piece] + [utc(b.ended_at) for b in backups]
    if not held:
        return None
    first, last = min(held), max(*held, now)
    # A young target is drawn at its own size: against a promise of weeks its first hours would be a line.
    drawn = [first, last, *([now - promised] if last - first > promised / 4 else [])]
    x = _TimeAxis.over(drawn, pad=0.015)
    return Coverage(
        pieces=[_piece(x, utc(begin), utc(end), "restorable") for begin, end in window.pieces],
        gaps=[_piece(x, begin, end, "gap, cannot be restored") for begin, end in holes_of(window)],
        backups=[_backup_tick(x, backup) for backup in backups],
        proofs=[_proof_mark(x, card, at) for card, at in proofs if x.begin <= at <= x.end],
        promised=x(now - promised) if now - promised >= x.begin else None,
        now=x(now),
        ticks=x.ticks(5),
        facts=_facts(window, backups, proofs, promised, now),
    )


def _piece(x: _TimeAxis, begin: datetime, end: datetime, what: str) -> Piece:
    left = x(begin)
    return Piece(left, max(x(end) - left, 0.15), f"{what}: {moment(begin)} to {moment(end)} ({duration(end - begin)})")


def _backup_tick(x: _TimeAxis, backup: BackupInfo) -> BackupTick:
    state = "cannot be read" if backup.error else f"ended {moment(backup.ended_at)}, {size(backup.stored)} stored"
    title = f"{backup.kind} backup {backup.backup_id}, {state}"
    return BackupTick(x(backup.ended_at), backup.kind is BackupKind.FULL, backup.error is not None, title)


def _proof_mark(x: _TimeAxis, card: Scorecard, at: datetime) -> Mark:
    verdict = shown(card)
    title = f"{verdict_words(verdict)}: restored to {moment(at)}, verified {moment(card.ended_at)}"
    return Mark(x(at), _STRIP_MARKS, tone_of(verdict), title)


def _facts(
    window: RecoveryWindow,
    backups: Sequence[BackupInfo],
    proofs: Sequence[tuple[Scorecard, datetime]],
    promised: timedelta,
    now: datetime,
) -> list[str]:
    facts: list[str] = []
    if window.earliest is not None and window.latest is not None:
        back = now - utc(window.earliest)
        facts.append(
            f"Promised is every moment of the last {duration(promised)}; the store reaches back {duration(back)}"
            + (", as far as the oldest backup." if back < promised else ".")
        )
        facts.append(f"The newest restorable moment was {age(window.latest, now)} when this page was written.")
    good = {at for card, at in proofs if shown(card) is Verdict.PASS and window.holds(at)}
    if len(good) > 1:
        facts.append(f"{len(good)} moments of the window were proven, the newest {long_moment(max(good))}.")
    elif good:
        facts.append(f"One moment of the window was proven: {long_moment(max(good))}.")
    else:
        facts.append("No moment of the window is proven.")
    broken = sum(backup.error is not None for backup in backups)
    if broken:
        facts.append(f"{broken} of {len(backups)} backups cannot be read.")
    return facts
