"""The plots of the page as pictures of their own, for places that show images in Markdown and no pages, such as Dagster's metadata."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from ops_platform.counting import duration
from ops_platform.drills.model import DrillCard
from ops_platform.inventory.model import Backed
from ops_platform.recovery.model import Scorecard
from ops_platform.reports import charts
from ops_platform.reports.drills import timeline_of
from ops_platform.reports.html import figures_of, plots_of, render
from ops_platform.reports.standing import in_order
from ops_platform.reports.words import shortened

WIDTH = 660
LOOKED_BACK = 60  # verifications: a picture this small shows no more, and it is stored with each run
_ROW, _MARGIN = 24.0, 10.0


@dataclass(frozen=True)
class _Row:
    """A bar with its name before and its figure behind it; `tone` for what is measured against a promise, `width` None where it is not."""

    y: float
    name: str
    left: float
    width: float | None
    said: str
    longest: bool = False
    tone: str = ""
    ticks: Sequence[charts.Tick] = ()


def proof_picture(target: Backed, card: Scorecard) -> str:
    """How the restore went, step by step, and how much of each promise it used up. SVG."""
    timeline = charts.gantt(card.steps)
    rows = [
        _Row(_MARGIN + n * _ROW, bar.name, bar.left, bar.width, _took(bar), bar.longest, ticks=timeline.ticks)
        for n, bar in enumerate(timeline.bars)
    ]
    below = _MARGIN * 2 + len(rows) * _ROW
    for n, figure in enumerate(figures_of(target, card)):
        share = None if figure.share is None else min(figure.share, 100.0)
        said = f"{figure.value} of {figure.promise}, {figure.state}" if figure.share is not None else figure.value
        rows.append(_Row(below + n * _ROW, _SHORT[n], 0.0, share, said, tone=figure.tone))
    return _drawn(f"Restore of {target.id}, step by step, against its promises", rows[-1].y + _ROW + _MARGIN, rows=rows)


def drill_picture(card: DrillCard) -> str:
    """How a drill went, step by step, and how much of each promise it used up. SVG."""
    timeline = timeline_of(card)
    rows = [
        _Row(
            _MARGIN + n * _ROW,
            shortened(bar.name, 20),
            bar.left,
            bar.width,
            _took(bar),
            bar.longest,
            ticks=timeline.ticks,
        )
        for n, bar in enumerate(timeline.bars)
    ]
    below = _MARGIN * 2 + len(rows) * _ROW
    for n, one in enumerate(card.objectives):
        tone, state = {True: ("good", "kept"), False: ("bad", "missed"), None: ("warn", "not judged")}[one.met]
        share = 100 * min(1.0, one.measured / one.objective) if one.measured is not None and one.objective else None
        value = "not measured" if one.measured is None else duration(one.measured)
        said = f"{value} of {duration(one.objective)}, {state}"
        rows.append(_Row(below + n * _ROW, one.name.upper(), 0.0, share, said, tone=tone))
    return _drawn(
        f"{card.title}, step by step, against its promises", below + len(card.objectives) * _ROW + _MARGIN, rows=rows
    )


_SHORT = ("RPO", "RTO, this restore", "RTO, whole target")


def _took(bar: charts.Bar) -> str:
    return duration(bar.seconds) + (f", {bar.note}" if bar.note else "")


def history_picture(target: Backed, cards: Sequence[Scorecard]) -> str:
    """RPO and RTO of past verifications against their objectives. SVG. `cards`: at least one, in any order."""
    plots: list[tuple[str, float, charts.Plot]] = []
    y = _MARGIN
    for caption, plot in plots_of(target, in_order(None, cards)[-LOOKED_BACK:]):
        plots.append((caption, y, plot))
        y += 18 + plot.height + _MARGIN
    return _drawn(" ".join(plot.summary for _, _, plot in plots), y, plots=plots)


def _drawn(title: str, height: float, *, rows: Sequence[_Row] = (), plots: Sequence[object] = ()) -> str:
    return render("picture.svg.j2", title=title, width=WIDTH, height=round(height), rows=rows, plots=plots)


def as_markdown(svg: str, words: str) -> str:
    """The picture within the text; `words` stand where it cannot be shown."""
    return f"![{words}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"
