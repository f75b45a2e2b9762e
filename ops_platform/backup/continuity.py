"""What a listing of WAL says: where it is whole, what is missing, which moments can be restored from which backup.

Pure functions, for whoever archived the WAL: nothing here asks a store or a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Literal

from ops_platform.backup.gapnotes import GapNote
from ops_platform.backup.model import BackupInfo, Lsn, RecoveryWindow, WalGap, WalRange, segment_name, segment_start
from ops_platform.backup.repository import WalObject
from ops_platform.backup.wal import Span, Stock, StoredWal, floor, stock


@dataclass(frozen=True)
class Archive:
    """What was read from the store about one cluster's WAL: the base of everything below."""

    system_identifier: int
    segment_size: int
    listing: list[WalObject]
    stocks: dict[int, Stock]
    lines: dict[int, list[Span]]
    ranges: list[WalRange]
    notes: list[GapNote]


def ranges(
    listing: Iterable[StoredWal],
    segment_size: int,
    *,
    partial_ends: Mapping[str, Lsn] | None = None,
    until: Mapping[str, datetime] | None = None,
) -> list[WalRange]:
    """Stored WAL without a hole, by timeline and position.

    `partial_ends`: how far each unfinished segment reaches, by segment name (an unknown one counts as empty). `until`: the server's
    time for the newest segment of each range, by segment name.
    """
    found: list[WalRange] = []
    for timeline, entry in sorted(stock(listing, segment_size).items()):
        runs = [(first, last, Lsn((last + 1) * segment_size)) for first, last in entry.runs()]
        unfinished = entry.last_partial
        if unfinished is not None:
            name = segment_name(timeline, unfinished * segment_size, segment_size)
            end = (partial_ends or {}).get(name, Lsn(unfinished * segment_size))
            if runs and runs[-1][1] == unfinished - 1:
                runs[-1] = (runs[-1][0], unfinished, end)
            else:
                runs.append((unfinished, unfinished, end))
        for first, last, end in runs:
            names = [segment_name(timeline, number * segment_size, segment_size) for number in (first, last)]
            found.append(WalRange(timeline, names[0], names[1], end, (until or {}).get(names[1])))
    return found


def missing(
    stocks: Mapping[int, Stock], lines: Mapping[int, list[Span]], segment_size: int
) -> list[tuple[int, str, str]]:
    """Holes as (timeline, first, last): between stored segments, and where one timeline should lead to the next and does not."""
    return _named(_holes(stocks, lines, segment_size), segment_size)


def _holes(
    stocks: Mapping[int, Stock], lines: Mapping[int, list[Span]], segment_size: int
) -> list[tuple[int, int, int]]:
    holes = [(t, *hole) for t, entry in stocks.items() for hole in entry.holes()]
    for timeline, line in lines.items():
        if timeline not in stocks:
            continue
        oldest = next(number for number, span in enumerate(line) if span.timeline in stocks)
        for span, child in pairwise(line[oldest:]):
            # The segment of the fork stands on the child, which begins by repeating it.
            begin, fork = span.begin // segment_size, child.begin // segment_size
            entry, below = stocks.get(span.timeline), stocks.get(child.timeline)
            have = begin - 1 if entry is None else max(entry.whole, default=entry.newest - 1)
            holes.append((span.timeline, have + 1, fork - 1))
            if below is not None:
                lowest = min(below.whole, default=below.newest)
                holes.append(
                    (child.timeline, fork, min(lowest, (child.end or lowest * segment_size) // segment_size) - 1)
                )
    return holes


def gaps(archive: Archive) -> list[tuple[int, str, str]]:
    """Every hole: what is missing between stored segments, and what was noted as lost and did not come after all."""
    size = archive.segment_size
    holes = _holes(archive.stocks, archive.lines, size)
    for note in archive.notes:
        entry = archive.stocks.get(note.timeline, Stock(note.timeline))
        first, last = (segment_start(name, size)[1] // size for name in (note.first, note.last))
        holes += [(note.timeline, n, n) for n in range(first, last + 1) if n not in entry.whole]
    return _named(holes, size)


def open_gaps(found: Iterable[WalGap]) -> list[WalGap]:
    return [gap for gap in found if gap.recovery_again_from is None]


def _named(holes: Iterable[tuple[int, int, int]], segment_size: int) -> list[tuple[int, str, str]]:
    def name(timeline: int, number: int) -> str:
        return segment_name(timeline, number * segment_size, segment_size)

    return [(t, name(t, first), name(t, last)) for t, first, last in _merged(holes)]


def _merged(holes: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Ascending, empty ones left out, overlapping ones put together: several lines of history may tell of one hole."""
    found: list[tuple[int, int, int]] = []
    for timeline, first, last in sorted(hole for hole in holes if hole[1] <= hole[2]):
        if found and found[-1][0] == timeline and first <= found[-1][2] + 1:
            found[-1] = (timeline, found[-1][1], max(found[-1][2], last))
        else:
            found.append((timeline, first, last))
    return found


def recovery_window(
    backups: Sequence[BackupInfo],
    stored: Sequence[WalRange],
    lines: Mapping[int, list[Span]],
    segment_size: int,
    holes: Sequence[tuple[int, str, str]] = (),
) -> RecoveryWindow:
    """Which moments can be restored. `lines`: the line of descent of each timeline whose history is stored.

    From each readable backup the WAL is followed, without a hole, along the newest timeline that descends from its end. A backup
    whose own WAL is not whole restores nothing.
    """
    pieces: list[tuple[datetime, datetime]] = []
    for backup in backups:
        if backup.error is None and (reached := _reach(backup, stored, lines, segment_size)) is not None:
            pieces.append((backup.ended_at, max(backup.ended_at, reached.until)))
    merged: list[tuple[datetime, datetime]] = []
    for begin, end in sorted(pieces):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    gaps = [WalGap(t, first, last, again_from(backups, t, last, segment_size)) for t, first, last in holes]
    return RecoveryWindow(
        earliest=merged[0][0] if merged else None,
        latest=merged[-1][1] if merged else None,
        pieces=merged,
        gaps=gaps,
    )


def again_from(backups: Sequence[BackupInfo], timeline: int, last: str, segment_size: int) -> str | None:
    after = segment_start(last, segment_size)[1] + segment_size
    usable = [b for b in backups if b.error is None and b.timeline >= timeline and b.start >= after]
    return min(usable, key=lambda b: (b.start, b.ended_at)).backup_id if usable else None


@dataclass(frozen=True)
class Reach:
    """How far the stored WAL carries a backup without a hole: the last moment (UTC) and the position behind its last byte."""

    until: datetime
    end: Lsn


def reach(
    archive: Archive, backup: BackupInfo, timeline: int | Literal["latest", "current"] = "latest"
) -> Reach | None:
    """How far a recovery from `backup` comes that follows that timeline, as PostgreSQL follows it.

    None where its own WAL is not whole, or where it was left behind: beyond a fork, on the branch that nobody went on with,
    PostgreSQL refuses to follow the newest timeline.
    """
    number = backup.timeline if timeline == "current" else max(archive.lines) if timeline == "latest" else timeline
    line = archive.lines.get(number) or ([Span(number, Lsn(0), None)] if number == backup.timeline else [])
    if backup.error is not None or not any(_lies_on(span, backup) for span in line):
        return None
    return _reach(backup, archive.ranges, {number: line}, archive.segment_size)


def _lies_on(span: Span, backup: BackupInfo) -> bool:
    return span.timeline == backup.timeline and (span.end is None or span.end >= backup.end)


def _reach(
    backup: BackupInfo, stored: Sequence[WalRange], lines: Mapping[int, list[Span]], segment_size: int
) -> Reach | None:
    """Along the newest of these lines that the backup lies on; None where its own WAL is not whole."""

    def holding(timeline: int, begin: int, end: int) -> WalRange | None:
        for item in stored:
            if item.timeline == timeline and segment_start(item.first, segment_size)[1] <= begin and end <= item.end:
                return item
        return None

    current = holding(backup.timeline, floor(backup.start, segment_size), backup.end)
    if current is None:
        return None
    reached = current.until or backup.ended_at
    descend = [line for line in lines.values() for span in line if _lies_on(span, backup)]
    line = max(descend, key=lambda spans: spans[-1].timeline, default=[])
    following = False
    for span in line:
        if not following:
            following = span.timeline == backup.timeline
        else:
            # The child repeats the segment in which its parent was left.
            if current.end < floor(span.begin, segment_size):
                return Reach(reached, current.end)
            child = holding(span.timeline, floor(span.begin, segment_size), span.begin)
            if child is None:
                return Reach(reached, current.end)
            current, reached = child, max(reached, child.until or reached)
    return Reach(reached, current.end)


def newest_range(archive: Archive | None) -> WalRange | None:
    """The one that reaches furthest, on the newest timeline."""
    return max(archive.ranges, key=lambda item: (item.timeline, item.end), default=None) if archive else None
