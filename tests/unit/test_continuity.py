"""What can be restored, computed from a listing: judged against plain restatements."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ops_platform.backup.continuity import Archive, gaps, missing, ranges, recovery_window
from ops_platform.backup.gapnotes import GapNote
from ops_platform.backup.model import BackupInfo, BackupKind, Lsn, RecoveryWindow, segment_name, segment_start
from ops_platform.backup.wal import Span, Stock, parse_history, stock
from tests.unit.test_wal import SIZE, Item, archives, history, listing, numbers

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LINE = {1: parse_history(1, None)}
# Failed over in the middle of segment 10.
FORKED = LINE | {2: parse_history(2, history((1, 10 * SIZE + 100)))}


def at(number: float) -> datetime:
    """The moment at which the segment of that number was written: one a minute."""
    return NOON + timedelta(minutes=number)


def backup(name: str, start: float, end: float, timeline: int = 1, **more: Any) -> BackupInfo:
    """From `start` to `end`, in segments."""
    return BackupInfo(
        backup_id=name,
        target_id="app-db",
        engine="native",
        kind=BackupKind.FULL,
        parent_id=None,
        started_at=at(start),
        ended_at=at(end),
        timeline=timeline,
        start=Lsn(int(start * SIZE)),
        end=Lsn(int(end * SIZE)),
        server_version=180000,
        system_identifier=7,
        raw=1,
        stored=1,
        **more,
    )


def window(backups: list[BackupInfo], items: list[Item], lines: Mapping[int, list[Span]]) -> RecoveryWindow:
    """With the ends and times that `read_archive` finds: an unfinished segment is half full, each has its own minute."""
    ends, until = dict[str, Lsn](), dict[str, datetime]()
    for item in items:
        start = segment_start(item.name, SIZE)[1]
        until.setdefault(item.name, at(start // SIZE + (0.5 if item.partial else 1)))
        if item.partial:
            ends[item.name] = Lsn(start + SIZE // 2)
    stored = ranges(items, SIZE, partial_ends=ends, until=until)
    return recovery_window(backups, stored, lines, SIZE, missing(stock(items, SIZE), lines, SIZE))


# Ranges


@given(numbers, numbers)
def test_ranges_hold_exactly_what_is_stored(whole: set[int], partial: set[int]) -> None:
    found = ranges(listing(1, sorted(whole), sorted(partial)), SIZE)
    held = {n for item in found for n in range(segment_start(item.first, SIZE)[1] // SIZE, item.end // SIZE)}
    assert held == whole, "a segment of which nobody knows the length counts as empty"


def test_an_unfinished_segment_reaches_as_far_as_it_was_stored() -> None:
    (found,) = ranges(listing(1, [3, 4], [5]), SIZE, partial_ends={segment_name(1, 5 * SIZE, SIZE): Lsn(5 * SIZE + 77)})
    assert (found.first[-2:], found.last[-2:], found.end) == ("03", "05", 5 * SIZE + 77)


def test_an_unfinished_segment_after_a_hole_is_a_range_of_its_own() -> None:
    found = ranges(listing(1, [3], [5]), SIZE, partial_ends={segment_name(1, 5 * SIZE, SIZE): Lsn(5 * SIZE + 77)})
    assert [(item.first[-2:], item.end) for item in found] == [("03", 4 * SIZE), ("05", 5 * SIZE + 77)]


# Holes


def lacking(stored: Mapping[int, Stock], line: list[Span]) -> set[tuple[int, int]]:
    """Plainly: walk the line from the oldest stored segment to the newest, and note what is not there."""
    found: set[tuple[int, int]] = set()
    tail = [span for n, span in enumerate(line) if any(before.timeline in stored for before in line[: n + 1])]
    for span in tail:
        entry = stored.get(span.timeline, Stock(span.timeline))
        have = entry.whole | ({entry.last_partial} - {None})
        begin = min(have) if span is tail[0] else span.begin // SIZE
        # The fork's segment is the child's; of the newest timeline nobody knows how far it should reach.
        end = span.end // SIZE if span.end is not None else max(have)
        found |= {(span.timeline, n) for n in range(begin, end) if n not in entry.whole}
    return found


@given(archives())
def test_holes_are_what_lies_between_the_oldest_and_the_newest_and_is_not_there(
    archive: tuple[dict[int, Stock], list[Span]],
) -> None:
    stored, line = archive
    # An archive as the receiver makes it: of each timeline only what belongs to it.
    for span in line:
        if entry := stored.get(span.timeline):
            last = span.end // SIZE if span.end is not None else 99
            entry.whole = {n for n in entry.whole if span.begin // SIZE <= n <= last}
            entry.partial = {n for n in entry.partial if span.begin // SIZE <= n <= last}
    stored = {t: entry for t, entry in stored.items() if entry.whole or entry.partial}
    assume(line[-1].timeline in stored)
    found = set[tuple[int, int]]()
    for timeline, first, last in missing(stored, {line[-1].timeline: line}, SIZE):
        begin, end = (segment_start(name, SIZE)[1] // SIZE for name in (first, last))
        assert begin <= end
        piece = {(timeline, n) for n in range(begin, end + 1)}
        assert not piece & found, "one hole is told of twice"
        found |= piece
    assert found == lacking(stored, line)


def test_a_timeline_of_which_nothing_is_stored_is_a_hole() -> None:
    lines = {3: parse_history(3, history((1, 10 * SIZE + 100), (2, 20 * SIZE + 100)))}
    stored = stock([*listing(1, list(range(1, 11))), *listing(3, [20, 21])], SIZE)
    assert missing(stored, lines, SIZE) == [(2, segment_name(2, 10 * SIZE, SIZE), segment_name(2, 19 * SIZE, SIZE))]


def test_a_leftover_at_the_fork_does_not_hide_the_hole_behind_it() -> None:
    stored = stock([*listing(1, list(range(1, 10))), *listing(2, [12, 13], [10])], SIZE)
    assert missing(stored, FORKED, SIZE) == [(2, segment_name(2, 10 * SIZE, SIZE), segment_name(2, 11 * SIZE, SIZE))]


def test_a_hole_of_which_two_histories_tell_is_named_once() -> None:
    lines = {2: parse_history(2, history((1, 10 * SIZE))), 3: parse_history(3, history((1, 8 * SIZE)))}
    stored = stock([*listing(1, [1, 2, 3]), *listing(2, [10]), *listing(3, [8])], SIZE)
    assert missing(stored, lines, SIZE) == [(1, segment_name(1, 4 * SIZE, SIZE), segment_name(1, 9 * SIZE, SIZE))]


def noted(*notes: tuple[int, int, int]) -> list[GapNote]:
    return [
        GapNote(t, segment_name(t, a * SIZE, SIZE), segment_name(t, b * SIZE, SIZE), "removed", NOON)
        for t, a, b in notes
    ]


def test_what_was_noted_as_lost_is_a_gap_before_anything_comes_after_it() -> None:
    items = listing(1, [1, 2, 3])
    archive = Archive(7, SIZE, [], stock(items, SIZE), dict(LINE), ranges(items, SIZE), noted((1, 4, 6)))
    assert missing(archive.stocks, LINE, SIZE) == []
    assert gaps(archive) == [(1, segment_name(1, 4 * SIZE, SIZE), segment_name(1, 6 * SIZE, SIZE))]


def test_what_was_noted_as_lost_and_came_after_all_is_no_gap() -> None:
    items = listing(1, [1, 2, 3, 5, 6, 9])
    archive = Archive(7, SIZE, [], stock(items, SIZE), dict(LINE), ranges(items, SIZE), noted((1, 4, 6), (1, 6, 8)))
    named = [(first[-2:], last[-2:]) for _, first, last in gaps(archive)]
    assert named == [("04", "04"), ("07", "08")]


# The recovery window


def test_a_window_begins_at_the_end_of_the_oldest_backup_and_ends_with_the_wal() -> None:
    found = window([backup("a", 3, 4.5), backup("b", 7, 8)], listing(1, list(range(3, 10)), [10]), LINE)
    assert (found.earliest, found.latest, found.gaps) == (at(4.5), at(10.5), [])
    assert found.pieces == [(at(4.5), at(10.5))]


def test_a_backup_whose_own_wal_is_not_whole_restores_nothing() -> None:
    for whole in ([4, 5, 6], [3, 4]):  # its beginning, its end
        assert window([backup("a", 3, 5.5)], listing(1, whole), LINE).earliest is None


def test_a_backup_that_cannot_be_read_restores_nothing() -> None:
    assert window([backup("a", 3, 4, error="its manifest is damaged")], listing(1, [3, 4, 5]), LINE).earliest is None


def test_a_gap_cuts_the_window_and_names_the_backup_after_it() -> None:
    backups = [backup("a", 1, 2), backup("b", 6, 6.5), backup("c", 8, 8.5), backup("d", 9, 9.5)]
    found = window(backups, listing(1, [1, 2, 3, 7, 8, 9]), LINE)
    assert found.pieces == [(at(2), at(4)), (at(8.5), at(10))]
    (gap,) = found.gaps
    assert (gap.first[-2:], gap.last[-2:], gap.recovery_again_from) == ("04", "06", "c")


def test_a_gap_without_a_backup_after_it_says_so() -> None:
    (gap,) = window([backup("a", 1, 2)], listing(1, [1, 2, 5]), LINE).gaps
    assert gap.recovery_again_from is None


def test_the_window_goes_on_across_a_fork() -> None:
    items = [*listing(1, list(range(1, 10)), [10]), *listing(2, [10, 11], [12])]
    assert window([backup("a", 1, 2)], items, FORKED).pieces == [(at(2), at(12.5))]


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], [10, 11]),  # the parent's last segment
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12]),  # the child's first one
    ],
)
def test_a_gap_at_the_fork_ends_the_window(parent: list[int], child: list[int]) -> None:
    found = window([backup("a", 1, 2)], [*listing(1, parent), *listing(2, child)], FORKED)
    assert found.pieces == [(at(2), at(max(parent) + 1))]
    assert len(found.gaps) == 1


def test_a_backup_of_the_branch_that_was_left_beyond_the_fork_stays_on_it() -> None:
    items = [*listing(1, list(range(1, 15))), *listing(2, list(range(10, 30)))]
    assert window([backup("a", 12, 13)], items, FORKED).pieces == [(at(13), at(15))]


def test_the_newest_branch_that_descends_from_a_backup_is_followed() -> None:
    # Restored twice: to segment 10 (timeline 2), then to segment 5 (timeline 3).
    lines = FORKED | {3: parse_history(3, history((1, 5 * SIZE + 1)))}
    items = [*listing(1, list(range(1, 12))), *listing(2, [10, 11, 12, 13]), *listing(3, [5, 6, 7, 8])]
    assert window([backup("a", 1, 2)], items, lines).latest == at(12)
    assert window([backup("b", 7, 8)], items, lines).latest == at(14)


@given(st.sets(st.integers(0, 20)), st.lists(st.tuples(st.integers(0, 18), st.integers(0, 4)), max_size=4))
def test_every_moment_of_a_window_has_its_backup_and_its_wal(whole: set[int], taken: list[tuple[int, int]]) -> None:
    backups = [backup(str(n), start + 0.25, start + 0.5 + length) for n, (start, length) in enumerate(taken)]
    found = window(backups, listing(1, sorted(whole)), LINE)

    def restorable(moment: float) -> bool:
        """A backup ended before, and every segment from its beginning to that moment is there."""
        return any(
            end <= moment and set(range(int(start), -int(-moment // 1))) <= whole
            for start, end in ((s + 0.25, s + 0.5 + length) for s, length in taken)
        )

    for tenth in range(5, 240, 7):
        assert found.holds(at(tenth / 10)) == restorable(tenth / 10), tenth / 10
    assert found.pieces == sorted(found.pieces)
    assert (found.earliest, found.latest) == (
        (found.pieces[0][0], found.pieces[-1][1]) if found.pieces else (None, None)
    )
