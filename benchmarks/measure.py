"""Samples, their statistics, and the table that docs/benchmarks.md shows. Nothing here starts anything."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product


@dataclass(frozen=True)
class Goal:
    """`ours` in proportion to `peer` (None: as it is) is at most `most`, or at least `least`."""

    text: str
    ours: str
    peer: str | None = None
    most: float | None = None
    least: float | None = None
    if_missed: str = ""

    def reached(self, value: float) -> bool:
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


@dataclass(frozen=True)
class Spread:
    """Three numbers say more than a mean: a loaded machine has no symmetric errors."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("no rounds, no spread")
        return cls(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} [{_short(self.low)}–{_short(self.high)}]"


@dataclass
class Comparison:
    """The rounds of one comparison: by side, a number for each round in the order in which they were measured."""

    name: str
    title: str
    unit: str
    how: str
    goals: Sequence[Goal] = ()
    rounds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    notes: list[str] = field(default_factory=list[str])
    load: list[float] = field(default_factory=list[float])  # of the machine, as each round began

    def add(self, side: str, value: float) -> None:
        self.rounds.setdefault(side, []).append(value)

    def spread(self, side: str) -> Spread:
        return Spread.of(self.rounds[side])

    def ratio(self, ours: str, peer: str) -> tuple[float, Spread]:
        """The ratio of the medians, and the spread of the ratios round by round: what both sides met alike cancels out there."""
        pairs = zip(self.rounds[ours], self.rounds[peer], strict=True)
        return self.spread(ours).median / self.spread(peer).median, Spread.of([mine / theirs for mine, theirs in pairs])

    def measured(self, goal: Goal) -> float | None:
        """The number that the goal is about; None where a side was not measured."""
        if goal.ours not in self.rounds or (goal.peer is not None and goal.peer not in self.rounds):
            return None
        if goal.peer is None:
            return self.spread(goal.ours).median
        return self.ratio(goal.ours, goal.peer)[0]


def interleaved(rounds: int, sides: Mapping[str, Callable[[], None]]) -> None:
    """Every side once in each round; the order turns with each round, so that none is always the one that finds a warm cache."""
    names = list(sides)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            sides[name]()


def measured(found: Comparison, rounds: int, sides: Mapping[str, Callable[[], float]]) -> None:
    """In turn, with the machine's load as each round began."""
    first = next(iter(sides))

    def one(side: str) -> None:
        if side == first:
            found.load.append(os.getloadavg()[0])
        found.add(side, sides[side]())

    interleaved(rounds, {side: lambda side=side: one(side) for side in sides})


# What people read


def report(found: Comparison) -> str:
    """For the terminal."""
    lines = [f"{found.name}: {found.title} ({found.unit})"]
    lines += [f"  {side:<34} {found.spread(side)}" for side in found.rounds]
    for ours, peer in _pairs(found):
        ratio, spread = found.ratio(ours, peer)
        lines.append(f"  {ours} / {peer}: {ratio:.2f}, by round {spread.low:.2f}–{spread.high:.2f}")
    lines += [f"  goal {verdict(found, goal)}" for goal in found.goals]
    return "\n".join(lines + [f"  {note}" for note in found.notes])


def _pairs(found: Comparison) -> list[tuple[str, str]]:
    ours = [side for side in found.rounds if side.startswith("ours")]
    peers = [side for side in found.rounds if not side.startswith("ours")]
    return [(a, b) for a, b in product(ours, peers) if len(found.rounds[a]) == len(found.rounds[b])]


def verdict(found: Comparison, goal: Goal) -> str:
    value = found.measured(goal)
    if value is None:
        return f"{goal.text}: not measured"
    if goal.reached(value):
        return f"{goal.text}: {_short(value)}, reached"
    return f"{goal.text}: {_short(value)}, missed" + (f"; {goal.if_missed}" if goal.if_missed else "")


def document(results: Sequence[Comparison], facts: Mapping[str, str], preface: str) -> str:
    """docs/benchmarks.md."""
    rows = {found.name: _goal_rows(found) for found in results}
    sections = {found.name: _section(found) for found in results}
    return _written(preface.strip().splitlines(), _facts(facts), rows, sections)


def merged(written: str, results: Sequence[Comparison], facts: Mapping[str, str], order: Sequence[str]) -> str:
    """The document with the results in place of those of the same names, and everything else as it was.

    Each result says when it was measured, where the facts say it; the machine's facts stay, as far as `facts` has no newer ones.
    Comparisons stand in `order`. Raises ValueError for what `document` did not write.
    """
    preface, machine, goals, sections = _read(written)
    when = facts.get("measured")
    for found in results:
        goals[found.name], sections[found.name] = _goal_rows(found), _section(found)
        if when:
            sections[found.name] += ["", f"Measured {when}."]
    names = [name for name in order if name in sections] + [name for name in sections if name not in order]
    known = {**machine, **{row.split("|")[1].strip(): row for row in _facts(facts) if not row.startswith(_WHEN)}}
    return _written(
        preface, list(known.values()), {name: goals.get(name, []) for name in names}, {name: sections[name] for name in names}
    )  # fmt: skip


_MACHINE, _GOALS = "## Machine", "## Goals"
_WHEN = ("| measured |", "| load average")  # of one run, and not of the machine


def _facts(facts: Mapping[str, str]) -> list[str]:
    return [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items()]


def _written(
    preface: Sequence[str], facts: Sequence[str], goals: Mapping[str, list[str]], sections: Mapping[str, list[str]]
) -> str:
    parts = [*preface, "", _MACHINE, "", "| | |", "|---|---|", *facts]
    parts += ["", _GOALS, "", "| comparison | goal | measured | |", "|---|---|---|---|"]
    parts += [row for rows in goals.values() for row in rows]
    for lines in sections.values():
        parts += ["", *lines]
    return "\n".join(parts) + "\n"


def _read(written: str) -> tuple[list[str], dict[str, str], dict[str, list[str]], dict[str, list[str]]]:
    """What `_written` was given: preface, facts by name, and by comparison the rows of its goals and the lines of its section."""
    blocks: list[list[str]] = [[]]
    for line in written.splitlines():
        if line.startswith("## "):
            blocks.append([])
        blocks[-1].append(line)
    preface, *rest = [_stripped(block) for block in blocks]
    if len(rest) < 2 or (rest[0][0], rest[1][0]) != (_MACHINE, _GOALS):
        raise ValueError("this is no document of benchmarks: it does not begin with the machine and the goals")
    facts = {row.split("|")[1].strip(): row for row in rest[0] if row.startswith("| ") and row != "| | |"}
    goals: dict[str, list[str]] = {}
    for row in rest[1][4:]:
        goals.setdefault(row.split("|")[1].strip(), []).append(row)
    return preface, facts, goals, {lines[0][3:].partition(":")[0]: lines for lines in rest[2:]}


def _stripped(lines: Sequence[str]) -> list[str]:
    return "\n".join(lines).strip().splitlines()


def _goal_rows(found: Comparison) -> list[str]:
    rows: list[str] = []
    for goal in found.goals:
        value = found.measured(goal)
        said = "not measured" if value is None else "reached" if goal.reached(value) else "**missed**"
        if value is not None and not goal.reached(value) and goal.if_missed:
            said += f": {goal.if_missed}"
        shown = "–" if value is None else _short(value)
        rows.append(f"| {found.name} | {_cell(goal.text)} | {shown} | {_cell(said)} |")
    return rows


def _section(found: Comparison) -> list[str]:
    lines = [f"## {found.name}: {found.title}", "", found.how.strip(), ""]
    count = len(next(iter(found.rounds.values()), []))
    lines += [f"| {found.unit} | min | median | max | rounds |", "|---|---|---|---|---|"]
    for side, values in found.rounds.items():
        spread = Spread.of(values)
        shown = " | ".join(_short(value) for value in (spread.low, spread.median, spread.high))
        lines.append(f"| {_cell(side)} | {shown} | {len(values)} |")
    if pairs := _pairs(found):
        lines += ["", "| ratio | of medians | by round |", "|---|---|---|"]
        for ours, peer in pairs:
            ratio, spread = found.ratio(ours, peer)
            lines.append(f"| {_cell(ours)} / {_cell(peer)} | {ratio:.2f} | {spread.low:.2f}–{spread.high:.2f} |")
    if found.load:
        low, high = min(found.load), max(found.load)
        lines += ["", f"Load average as the {count} rounds began: {low:.1f} to {high:.1f}."]
    for note in found.notes:
        lines += ["", note]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _short(value: float) -> str:
    """Three digits that count, and no more than that."""
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
