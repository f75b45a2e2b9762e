"""What WAL files, timelines and their holes are: pure functions, no server and no store.

Sources: PostgreSQL documentation "Continuous Archiving and Point-in-Time Recovery" (timelines) and the page header in
`access/xlog_internal.h`. A segment is named by timeline and position; a timeline's history names its ancestors and
where each was left.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from ops_platform.backup.model import Lsn, segment_name, segment_start
from ops_platform.errors import ConflictError, CorruptionError

DEFAULT_SEGMENT_SIZE = 16 << 20
SEGMENT_NAME = re.compile(r"[0-9A-F]{24}")
HISTORY_NAME = re.compile(r"[0-9A-F]{8}\.history")

# XLogLongPageHeaderData: magic, info, timeline, address, remaining length, padding, system identifier, segment size, page size.
_LONG_HEADER = struct.Struct("<HHIQI4xQII")


@dataclass(frozen=True)
class Span:
    """What a timeline contributes to a line of history: from `begin` up to `end` (None: it is the newest)."""

    timeline: int
    begin: Lsn
    end: Lsn | None


def floor(lsn: int, segment_size: int) -> Lsn:
    """The start of the segment that holds `lsn`."""
    return Lsn(lsn - lsn % segment_size)


def history_name(timeline: int) -> str:
    return f"{timeline:08X}.history"


def parse_history(timeline: int, content: bytes | None) -> list[Span]:
    """The line of descent that ends in `timeline`, oldest first. Timeline 1 has no history file.

    A server that was recovered to a moment before a fork, and yet followed the newest timeline, names a parent that was left before
    it began (1 until 0/5000000, 2 until 0/4000000): such a parent contributes nothing and is left out, its own parent ends earlier.
    Raises CorruptionError for a file that is no history: guessing here would graft WAL onto the wrong branch.
    """
    left: list[tuple[int, Lsn]] = []
    for raw in (content or b"").decode("utf-8", "replace").splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = re.match(r"([0-9]{1,10})\s+([0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8})(\s|$)", line)
        if not match or not (left[-1][0] if left else 0) < int(match[1]) < timeline:
            raise CorruptionError(f"not a timeline history: {line[:80]!r}", where=history_name(timeline))
        left.append((int(match[1]), Lsn.parse(match[2])))
    if timeline > 1 and not left:
        raise CorruptionError("an empty timeline history", where=history_name(timeline))
    spans: list[Span] = []
    begin = Lsn(0)
    for number, (ancestor, _) in enumerate(left):
        end = min(lsn for _, lsn in left[number:])
        if end > begin:
            spans.append(Span(ancestor, begin, end))
            begin = end
    return [*spans, Span(timeline, begin, None)]


def timeline_at(line: Iterable[Span], lsn: int) -> int:
    """The timeline on which the byte at `lsn` was written."""
    spans = list(line)
    return next((span.timeline for span in spans if span.end is None or lsn < span.end), spans[-1].timeline)


def check_segment_head(data: bytes | bytearray | memoryview, start: int, system_identifier: int, where: str) -> None:
    """That a segment's first page belongs to this cluster and this position. Raises CorruptionError.

    Servers of the other byte order are left unchecked: their magic number does not read as one.
    """
    if len(data) < _LONG_HEADER.size:
        return
    magic, _, _, address, _, sysid, _, _ = _LONG_HEADER.unpack_from(data)
    if magic >> 8 != 0xD1:
        if magic == 0:
            raise CorruptionError("the segment begins with zeros, not with a WAL page", where=where)
        return
    if address != start:
        raise CorruptionError(f"the segment's first page says that it belongs at {Lsn(address)}", where=where)
    if sysid != system_identifier:
        raise CorruptionError(
            f"the segment's first page comes from the cluster {sysid}, not {system_identifier}", where=where
        )


class StoredWal(Protocol):
    """What `Repository.wal_listing` gives for each object."""

    @property
    def timeline(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def partial(self) -> bool: ...
    @property
    def history(self) -> bool: ...


@dataclass
class Stock:
    """The stored segments of one timeline, by segment number (position divided by segment size)."""

    timeline: int
    whole: set[int] = field(default_factory=set[int])
    partial: set[int] = field(default_factory=set[int])

    @property
    def newest(self) -> int:
        """The highest segment number of which anything is stored; -1 for none."""
        return max(max(self.whole, default=-1), max(self.partial, default=-1))

    @property
    def last_partial(self) -> int | None:
        """The number of the unfinished segment, where it is the newest. Older leftovers count for nothing."""
        return self.newest if self.newest in self.partial and self.newest not in self.whole else None

    def runs(self) -> list[tuple[int, int]]:
        """Whole segments without a hole, as (first, last), ascending."""
        found: list[tuple[int, int]] = []
        for number in sorted(self.whole):
            if found and number == found[-1][1] + 1:
                found[-1] = (found[-1][0], number)
            else:
                found.append((number, number))
        return found

    def holes(self) -> list[tuple[int, int]]:
        """Missing segments between stored ones, as (first, last): a trailing partial counts as stored."""
        runs = self.runs()
        found = [(left[1] + 1, right[0] - 1) for left, right in pairwise(runs)]
        unfinished = self.last_partial
        if runs and unfinished is not None and unfinished > runs[-1][1] + 1:
            found.append((runs[-1][1] + 1, unfinished - 1))
        return found


def stock(listing: Iterable[StoredWal], segment_size: int) -> dict[int, Stock]:
    """The stored segments by timeline."""
    found: dict[int, Stock] = {}
    for item in listing:
        if item.history:
            continue
        timeline, start = segment_start(item.name, segment_size)
        entry = found.setdefault(timeline, Stock(timeline))
        (entry.partial if item.partial else entry.whole).add(start // segment_size)
    return found


@dataclass(frozen=True)
class Start:
    """Where reception begins: always the first byte of a segment."""

    timeline: int
    lsn: Lsn


def plan_start(
    stocks: Mapping[int, Stock],
    line: list[Span],
    restart: Lsn | None,
    segment_size: int,
    given_up: Collection[str] = (),
) -> Start | None:
    """The first segment that the archive still needs, on the line of the server's timeline.

    Segments are put side by side, so a crash can leave a later one stored and an earlier one not: the start is the first hole,
    not the end. Holes that were recorded as lost (`given_up`: names of segments) are passed over. Nothing stored yet:
    the slot's position, or None where there is no slot. Raises ConflictError where the archive is on a timeline that this
    server does not know: an old primary that came back must not be archived.
    """
    ours = {span.timeline: span for span in line}
    newer = [timeline for timeline in stocks if timeline not in ours and timeline > line[-1].timeline]
    if newer:
        raise ConflictError(
            f"the archive is already on timeline {max(newer)}, the server on {line[-1].timeline}: "
            "an old primary that came back, or a restored copy",
            remedy="shut the old primary down, or rejoin it with pg_rewind; a restored copy needs a target id of its own",
        )
    lost = set(given_up)

    def wanted(timeline: int, first: int, last: int | None) -> Start | None:
        number = first
        while last is None or number <= last:
            name = segment_name(timeline, number * segment_size, segment_size)
            if name not in lost:
                return Start(timeline, Lsn(number * segment_size))
            number += 1
        return None

    known = [span for span in line if span.timeline in stocks]
    if not known:
        if restart is None:
            return None
        begin = floor(restart, segment_size)
        return Start(timeline_at(line, begin), begin)
    for span in line[line.index(known[0]) :]:
        for first, last in _needed(stocks, line, span, segment_size, oldest=span is known[0]):
            if (start := wanted(span.timeline, first, last)) is not None:
                return start
    return None


def _needed(
    stocks: Mapping[int, Stock], line: list[Span], span: Span, segment_size: int, *, oldest: bool
) -> list[tuple[int, int | None]]:
    """The segment numbers of `span` that are not stored whole, as (first, last); None: all that come."""
    entry = stocks.get(span.timeline)
    begin, limit = span.begin // segment_size, None
    if span.end is not None:
        # The segment in which the timeline was left belongs to the next one, which begins by repeating it.
        repeated = span.end % segment_size == 0 or line[line.index(span) + 1].timeline in stocks
        limit = span.end // segment_size - repeated
    if entry is None:
        found: list[tuple[int, int | None]] = [(begin, limit)]
    else:
        lowest = min(entry.whole, default=entry.newest)
        found = [] if oldest else [(begin, lowest - 1)]
        found += [*entry.holes(), (max(entry.whole, default=entry.newest - 1) + 1, limit)]
    # What lies before its beginning or beyond the fork is another branch, of which this server knows nothing.
    clipped = [
        (max(first, begin), min((n for n in (last, limit) if n is not None), default=None)) for first, last in found
    ]
    return [(first, last) for first, last in clipped if last is None or first <= last]
