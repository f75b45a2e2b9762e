"""The HTML pages: one for each target, and the index over all of them.

A page is one file: no script, no request to anywhere (its own policy forbids both), readable in print, in light and in dark.
Every text goes through the template engine's escaping; what a page says is decided in `standing` and `charts`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import quote

from ops_platform.backup.model import BackupInfo, RecoveryWindow
from ops_platform.counting import count_of, duration, size
from ops_platform.errors import OpsError, UsageError
from ops_platform.inventory.model import Backed
from ops_platform.recovery.model import Gate, GateStatus, Objective, Scorecard, Verdict
from ops_platform.reports import charts
from ops_platform.reports.chains import listed
from ops_platform.reports.standing import (
    Standing,
    age,
    contradiction,
    gate_counts,
    in_order,
    measured,
    objective,
    proven_moment,
    shown,
    standing,
    story,
    tone_of,
    verdict_words,
)
from ops_platform.reports.words import capital, moment, plain, shortened, utc, who

if TYPE_CHECKING:
    import jinja2

# Points of a plot: more would run into each other, and the records hold them all.
HISTORY = 60

# Where a gate's detail names the Great Expectations pages.
DATA_DOCS = "data_docs"

T = TypeVar("T")

GATE_WORDS = {
    GateStatus.PASSED: ("good", "Passed"),
    GateStatus.FAILED: ("bad", "Failed"),
    GateStatus.COULD_NOT_CHECK: ("warn", "Could not check"),
    GateStatus.NOT_APPLICABLE: ("none", "Not applicable"),
}


@dataclass(frozen=True)
class Row:
    """A target on the index. `window` None: it could not be determined; `problem` says why."""

    target: Backed
    latest: Scorecard | None
    window: RecoveryWindow | None
    problem: str | None = None


@dataclass(frozen=True)
class Figure:
    """A measured time beside its promise."""

    title: str
    abbreviation: str
    value: str
    promise: str
    tone: str
    state: str
    share: float | None  # of the promise that is used up, percent
    how: str


def target_report(
    target: Backed,
    latest: Scorecard | None,
    history: Sequence[Scorecard],
    window: RecoveryWindow | None,
    backups: Sequence[BackupInfo],
    *,
    generated_at: datetime,
) -> str:
    """The page of one target. `latest` None: never verified; `window` None: it could not be determined."""
    now = utc(generated_at)
    cards = in_order(latest, history)
    proven_within = target.backup.verification.proven_within
    promised = target.backup.recovery_window
    return render(
        "target.html.j2",
        target=target,
        card=latest,
        now=now,
        standing=standing(latest, window, proven_within, now),
        story=story(target.id, latest, history, window, proven_within, now),
        figures=figures_of(target, latest),
        counts=gate_counts(latest) if latest else {},
        troubles=_troubles(latest),
        gantt=charts.gantt(latest.steps) if latest else None,
        plots=plots_of(target, cards[-HISTORY:]) if len(cards) > 1 else [],
        cards=cards[-HISTORY:][::-1],
        window=window,
        coverage=charts.coverage(window, backups, cards, promised, now) if window else None,
        backups=listed(backups),
    )


def index_report(rows: Sequence[Row], generated_at: datetime, *, drills: bool = False) -> str:
    """One page over all targets, worst first. `drills`: their page lies beside it."""
    now = utc(generated_at)
    judged = [(_row_standing(row, now), row) for row in rows]
    judged.sort(key=lambda pair: (pair[0].rank, _ended(pair[1]), pair[1].target.id))
    counts = [(each, sum(found is each for found, _ in judged)) for each in Standing]
    return render(
        "index.html.j2",
        rows=[(found, row, figures_of(row.target, row.latest), _why(found, row)) for found, row in judged],
        counts=[(each, number) for each, number in counts if number],
        proven=sum(found is Standing.PROVEN for found, _ in judged),
        drills=drills,
        now=now,
    )


def _row_standing(row: Row, now: datetime) -> Standing:
    found = standing(row.latest, row.window, row.target.backup.verification.proven_within, now)
    # What could not be looked at is neither proven nor known to be without proof.
    return Standing.UNKNOWN if row.problem and found.tone != "bad" else found


def _why(found: Standing, row: Row) -> str:
    """What stands beside a verdict that is not a PASS."""
    if row.problem:
        return row.problem
    if found is Standing.LOST:
        return "the store holds no usable backup with its WAL"
    if found is Standing.STALE:
        return f"promised within {duration(row.target.backup.verification.proven_within)}"
    if row.latest is None or found is Standing.PROVEN:
        return ""
    return contradiction(row.latest) or row.latest.reason


def _ended(row: Row) -> float:
    return utc(row.latest.ended_at).timestamp() if row.latest else 0.0


def page_name(target_id: str | None) -> str:
    """File name of a target's page; None: the index. No id holds an underscore, so a target called index keeps its own."""
    if target_id is None:
        return "index.html"
    if not target_id or target_id != Path(target_id).name or target_id.startswith("."):
        raise UsageError(f"{target_id!r} cannot be the name of a report")
    return "index_.html" if target_id == "index" else f"{target_id}.html"


def write_report(directory: Path, target_id: str | None, html: str) -> Path:
    """Write a page whole or not at all: whoever reads at that moment has the old one or the new one. None: the index."""
    path = directory / page_name(target_id)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(path, html.encode())
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "see that the folder of platform.reports can be written and has room"
        raise OpsError(f"the report cannot be written: {reason}", where=str(path), remedy=remedy) from error
    return path


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


# What the templates are given


def figures_of(target: Backed, card: Scorecard | None) -> list[Figure]:
    promises = target.objectives
    return [
        _figure(card, "rpo", "Data that would be lost", "RPO", promises.rpo),
        _figure(card, "rto", "Time of this restore", "RTO", promises.rto),
        _figure(card, "rto-full", "Full recovery, estimated", "RTO of the whole target", promises.rto),
    ]


def _figure(card: Scorecard | None, name: str, title: str, abbreviation: str, promise: timedelta) -> Figure:
    found = objective(card, name)
    # The promise at the time of the verification is what it was measured against.
    promised = promise.total_seconds() if found is None else found.objective_seconds
    if found is None or found.measured_seconds is None:
        how = found.how if found else ("" if card else "No verification is on record.")
        return Figure(title, abbreviation, "not measured", duration(promised), "warn", "not judged", None, how)
    tone, state = _kept(found)
    share = 100 * found.measured_seconds / promised if promised else None
    return Figure(
        title, abbreviation, duration(found.measured_seconds), duration(promised), tone, state, share, found.how
    )


def _kept(found: Objective) -> tuple[str, str]:
    return {True: ("good", "kept"), False: ("bad", "missed"), None: ("warn", "not judged")}[found.met]


def plots_of(target: Backed, cards: Sequence[Scorecard]) -> list[tuple[str, charts.Plot]]:
    promises = {"rpo": target.objectives.rpo.total_seconds(), "rto": target.objectives.rto.total_seconds()}
    # Both have the lane, or the two would stand at different heights.
    lane = any(measured(card, name) is None for card in cards for name in promises)
    titles = {"rpo": "Data that would be lost (RPO)", "rto": "Time to restore (RTO)"}
    return [(titles[name], charts.history_plot(cards, name, promises[name], lane=lane)) for name in promises]


def _troubles(card: Scorecard | None) -> list[Gate]:
    bad = (GateStatus.FAILED, GateStatus.COULD_NOT_CHECK)
    return sorted((g for g in card.gates if g.status in bad), key=lambda g: bad.index(g.status)) if card else []


def detail_items(gate: Gate, most: int = 40) -> list[tuple[str, str]]:
    """A gate's further findings by name; a list has a line for each of its items, what is nested deeper stays JSON."""
    items = [(name, _detail_text(value, most)) for name, value in gate.detail.items() if name != DATA_DOCS]
    return _cut(items, most, ("…", "more in the record"))


def _detail_text(value: object, most: int) -> str:
    if isinstance(value, list):
        return "\n".join(_cut([_detail_text(item, most) for item in cast("list[object]", value)], most, "…"))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(items: list[T], most: int, sign: T) -> list[T]:
    return items if len(items) <= most else [*items[:most], sign]


def data_docs(target: Backed, gate: Gate) -> str | None:
    """The Data Docs of the expectations beside this page, as `proof` places them."""
    path = str(gate.detail.get(DATA_DOCS) or "")
    at = path.find(f"/{target.id}/data-docs/")
    return quote(path[at + 1 :]) if at >= 0 else None


def server_version(number: int) -> str:
    return f"{number // 10000}.{number % 10000}" if number else "unknown"


def _safe(value: object) -> object:
    """Plain strings lose what could turn the direction of text; what the templates made stays as it is."""
    return plain(value) if type(value) is str else value


_NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=(?:ms|s|min|h|d|B|KiB|MiB|GiB|TiB|PiB|UTC)\b)")


def _kept_together(text: str) -> str:
    """A number does not part from its unit at the end of a line."""
    return _NUMBER_AND_UNIT.sub("\u00a0", text)


def _duration(value: float | timedelta) -> str:
    return duration(value).replace(" ", "\u00a0")


def _size(count: int) -> str:
    return size(count).replace(" ", "\u00a0")


def _iso(when: datetime) -> str:
    return utc(when).isoformat(timespec="seconds")


def _percent(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


_FILTERS: dict[str, Callable[..., str]] = {
    "duration": _duration,
    "size": _size,
    "moment": moment,
    "iso": _iso,
    "percent": _percent,
    "together": _kept_together,
    "capital": capital,
    "shortened": shortened,
    "verdict": verdict_words,
    "who": who,
}
_NAMES: dict[str, object] = {
    "Verdict": Verdict,
    "age": age,
    "count_of": count_of,
    "data_docs": data_docs,
    "detail_items": detail_items,
    "gate_words": GATE_WORDS,
    "measured": measured,
    "page_name": page_name,
    "proven_moment": proven_moment,
    "server_version": server_version,
    "shown": shown,
    "tone_of": tone_of,
}


@cache
def _environment() -> jinja2.Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Escaping is on for every template, whatever its name ends in.
    made = Environment(
        loader=PackageLoader("ops_platform.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_safe,
    )
    made.filters |= _FILTERS  # pyright: ignore[reportAttributeAccessIssue]
    made.globals |= _NAMES  # pyright: ignore[reportAttributeAccessIssue]
    return made


def render(template: str, **what: Any) -> str:
    from markupsafe import Markup

    css = resources.files("ops_platform.reports").joinpath("report.css").read_text("utf-8")
    # Our own file, and the only text that is let through as it is.
    return _environment().get_template(template).render(css=Markup(css), **what)  # noqa: S704
