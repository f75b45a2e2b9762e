"""Timelines, segments and their holes, and what the server's refusals mean: judged against plain restatements of PostgreSQL's rules."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ops_platform.backup.model import Lsn, segment_name
from ops_platform.backup.reception import gap_pieces
from ops_platform.backup.wal import (
    Span,
    Start,
    Stock,
    check_segment_head,
    history_name,
    parse_history,
    plan_start,
    stock,
    timeline_at,
)
from ops_platform.backup.walsegments import backoff
from ops_platform.backup.walstream import (
    SlotActiveError,
    SlotLostError,
    WalRemovedError,
    replication_error,
)
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptionError,
    NotThereError,
    OpsError,
    UnreachableError,
)

SIZE = 1 << 20


@dataclass(frozen=True)
class Item:
    """An object of a listing."""

    timeline: int
    name: str
    partial: bool = False
    history: bool = False


def listing(timeline: int, whole: list[int], partial: list[int] | None = None) -> list[Item]:
    return [Item(timeline, segment_name(timeline, n * SIZE, SIZE)) for n in whole] + [
        Item(timeline, segment_name(timeline, n * SIZE, SIZE), partial=True) for n in partial or []
    ]


def stocks(**timelines: tuple[list[int], list[int]]) -> dict[int, Stock]:
    return {int(t[1:]): Stock(int(t[1:]), set(whole), set(partial)) for t, (whole, partial) in timelines.items()}


# History files


def history(*left: tuple[int, int]) -> bytes:
    """As PostgreSQL writes it."""
    return (
        "\n\n".join(f"{timeline}\t{Lsn(lsn)}\tno recovery target specified" for timeline, lsn in left).encode() + b"\n"
    )


def timeline_of_postgres(timeline: int, left: list[tuple[int, int]], lsn: int) -> int:
    """tliOfPointInHistory in timeline.c: entries newest first, each from the end of the one before it."""
    entries, begin = [], 0
    for ancestor, end in left:
        entries.insert(0, (ancestor, begin, end))
        begin = end
    entries.insert(0, (timeline, begin, 0))
    return next(t for t, begin, end in entries if (not begin or begin <= lsn) and (not end or lsn < end))


histories = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda pairs: [(1 + sum(step for step, _ in pairs[:number]), lsn) for number, (_, lsn) in enumerate(pairs)]
)


@given(histories, st.integers(0, 60))
def test_the_timeline_of_a_position_is_the_one_that_postgres_reads_it_from(
    left: list[tuple[int, int]], lsn: int
) -> None:
    timeline = left[-1][0] + 1
    line = parse_history(timeline, history(*left))
    assert timeline_at(line, lsn) == timeline_of_postgres(timeline, left, lsn)


@given(histories)
def test_a_line_of_descent_has_neither_holes_nor_overlaps(left: list[tuple[int, int]]) -> None:
    line = parse_history(left[-1][0] + 3, history(*left))
    assert line[0].begin == 0
    assert line[-1] == Span(left[-1][0] + 3, line[-1].begin, None)
    for span, child in pairwise(line):
        assert span.begin < (span.end or 0) == child.begin
        assert span.timeline < child.timeline


def test_a_parent_that_was_left_before_it_began_contributes_nothing() -> None:
    # Failed over at 0/5000000, then restored to 0/4000000 following the newest timeline: PostgreSQL names 2 as the parent.
    line = parse_history(3, history((1, 0x5000000), (2, 0x4000000)))
    assert line == [Span(1, Lsn(0), Lsn(0x4000000)), Span(3, Lsn(0x4000000), None)]


def test_timeline_1_has_no_history() -> None:
    assert parse_history(1, None) == [Span(1, Lsn(0), None)]


def test_comments_and_empty_lines_of_a_history_are_passed_over() -> None:
    assert parse_history(2, b"# by hand\n\n  1\t0/3000000\t\n") == [
        Span(1, Lsn(0), Lsn(0x3000000)),
        Span(2, Lsn(0x3000000), None),
    ]


@pytest.mark.parametrize(
    ("timeline", "content"),
    [
        (2, b""),
        (2, None),
        (2, b"# nothing else\n"),
        (2, b"<Error><Code>AccessDenied</Code></Error>"),
        (2, b"1\t3000000\n"),
        (2, b"1\t0/3000000x\n"),
        (2, b"1\t0/123456789\n"),
        (2, b"0\t0/3000000\n"),
        (2, b"2\t0/3000000\n"),
        (3, b"2\t0/3000000\n1\t0/4000000\n"),
        (3, b"1\t0/3000000\n1\t0/4000000\n"),
        (3, b"9\t0/3000000\n"),
        (2, b"99999999999999999999\t0/3000000\n"),
    ],
)
def test_what_is_no_history_is_refused(timeline: int, content: bytes | None) -> None:
    with pytest.raises(CorruptionError) as caught:
        parse_history(timeline, content)
    assert caught.value.where == history_name(timeline)


@given(
    st.integers(1, 2**32 - 1),
    st.binary(max_size=200) | st.text("0123456789/\t\n# ABCDEFabcdef", max_size=80).map(str.encode),
)
def test_any_bytes_are_a_history_or_refused(timeline: int, content: bytes) -> None:
    try:
        line = parse_history(timeline, content)
    except CorruptionError:
        return
    assert line[-1].timeline == timeline


# Heads of segments


def head(start: int, sysid: int = 7, magic: int = 0xD118) -> bytes:
    return struct.pack("<HHIQI4xQII", magic, 2, 1, start, 0, sysid, 16 << 20, 8192) + bytes(100)


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1))
def test_a_head_of_this_cluster_at_this_position_passes(start: int, sysid: int) -> None:
    check_segment_head(head(start, sysid), start, sysid, "here")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (head(0x2000000), "belongs at 0/2000000"),
        (head(0x1000000, sysid=8), "cluster 8, not 7"),
        (bytes(8192), "begins with zeros"),
    ],
)
def test_a_segment_from_elsewhere_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(CorruptionError, match=said) as caught:
        check_segment_head(data, 0x1000000, 7, "here")
    assert caught.value.where == "here"


@given(st.binary(max_size=64))
def test_any_bytes_pass_as_a_head_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(CorruptionError):
        check_segment_head(data, 0, 7, "here")


# What is stored

numbers = st.sets(st.integers(0, 30), max_size=15)


@given(numbers, numbers)
def test_runs_and_holes_of_a_stock_cover_it_without_overlap(whole: set[int], partial: set[int]) -> None:
    entry = stock(listing(1, sorted(whole), sorted(partial)), SIZE).get(1, Stock(1))
    stored = {n for first, last in entry.runs() for n in range(first, last + 1)}
    missing = {n for first, last in entry.holes() for n in range(first, last + 1)}
    assert stored == whole
    assert not missing & whole
    unfinished = {entry.last_partial} - {None}
    assert unfinished <= partial - whole
    if whole:
        assert stored | missing | unfinished == set(range(min(whole), max(whole | unfinished) + 1))


def test_a_leftover_beside_or_before_whole_segments_counts_for_nothing() -> None:
    entry = stock(listing(1, [4, 5, 6], [2, 5, 6]), SIZE)[1]
    assert (entry.last_partial, entry.newest, entry.holes()) == (None, 6, [])


def test_histories_are_no_segments() -> None:
    assert stock([Item(2, "00000002.history", history=True)], SIZE) == {}


# Where reception begins


def first_lacking(stored: Mapping[int, Stock], line: list[Span], lost: set[str]) -> tuple[int, int] | None:
    """Plainly: walk every segment of the line from the oldest stored one on, and stop at the first that is not there."""
    begun = False
    for number, span in enumerate(line):
        entry = stored.get(span.timeline)
        if not begun and entry is None:
            continue
        begin = span.begin // SIZE
        if not begun and entry is not None:
            begin = max(begin, min(entry.whole, default=entry.newest))
        begun = True
        child = line[number + 1].timeline if span.end is not None else None
        end = 100 if span.end is None else span.end // SIZE + (span.end % SIZE > 0 and child not in stored)
        for at in range(begin, end):
            if (entry is None or at not in entry.whole) and segment_name(span.timeline, at * SIZE, SIZE) not in lost:
                return span.timeline, at
    return None


# In the middle of segments, and where one ends.
forks = st.lists(
    st.integers(SIZE // 4, 30 * SIZE) | st.integers(1, 30).map(lambda number: number * SIZE), max_size=3, unique=True
).map(sorted)


@st.composite
def archives(draw: st.DrawFn) -> tuple[dict[int, Stock], list[Span]]:
    ends = draw(forks)
    line = parse_history(len(ends) + 1, history(*enumerate(ends, 1)) if ends else None)
    found = {span.timeline: Stock(span.timeline, draw(numbers), draw(numbers)) for span in line}
    return {t: entry for t, entry in found.items() if entry.whole or entry.partial}, line


@given(archives(), st.sets(st.integers(0, 30), max_size=10))
def test_reception_begins_at_the_first_segment_that_is_neither_stored_nor_lost(
    archive: tuple[dict[int, Stock], list[Span]], gone: set[int]
) -> None:
    stored, line = archive
    assume(stored)
    lost = {segment_name(span.timeline, n * SIZE, SIZE) for span in line for n in gone}
    start = plan_start(stored, line, Lsn(0), SIZE, lost)
    assert start is not None
    assert (start.timeline, start.lsn // SIZE) == first_lacking(stored, line, lost)
    span = next(span for span in line if span.timeline == start.timeline)
    assert start.lsn % SIZE == 0
    assert span.end is None or start.lsn < span.end, "the server would refuse a position beyond the fork"


@given(st.integers(0, 30 * SIZE))
def test_an_empty_archive_begins_where_the_slot_holds_wal(restart: int) -> None:
    line = parse_history(2, history((1, 10 * SIZE + 5)))
    start = plan_start({}, line, Lsn(restart), SIZE)
    assert start == Start(1 if restart < 11 * SIZE else 2, Lsn(restart // SIZE * SIZE))


def test_without_slot_and_archive_there_is_no_start() -> None:
    assert plan_start({}, parse_history(1, None), None, SIZE) is None


def test_a_hole_on_the_branch_that_was_left_is_not_asked_for() -> None:
    # Restored to segment 10 and promoted; the archive of the old branch has a hole at 15.
    stored = stocks(t1=([*range(1, 15), 16], []))
    line = parse_history(2, history((1, 10 * SIZE + 100)))
    assert plan_start(stored, line, None, SIZE) == Start(2, Lsn(10 * SIZE))


def test_an_old_primary_that_came_back_is_refused() -> None:
    with pytest.raises(ConflictError, match="timeline 2, the server on 1") as caught:
        plan_start(stocks(t1=([1], []), t2=([2], [])), parse_history(1, None), Lsn(0), SIZE)
    assert "pg_rewind" in (caught.value.remedy or "")


def test_a_branch_that_the_server_left_aside_does_not_stop_it() -> None:
    line = parse_history(3, history((1, 5 * SIZE)))
    assert plan_start(stocks(t1=([1, 2, 3, 4, 5, 6], []), t2=([6], [])), line, None, SIZE) == Start(3, Lsn(5 * SIZE))


# Losses


def test_a_loss_across_a_fork_is_named_on_each_timeline() -> None:
    line = parse_history(2, history((1, 10 * SIZE + 5)))
    now = datetime(2026, 1, 1, tzinfo=UTC)
    notes = gap_pieces(line, Start(1, Lsn(7 * SIZE)), Lsn(12 * SIZE), SIZE, "removed", now)
    assert [(note.timeline, note.first[-2:], note.last[-2:]) for note in notes] == [(1, "07", "0A"), (2, "0A", "0B")]
    assert notes[0].names(SIZE) == [segment_name(1, n * SIZE, SIZE) for n in (7, 8, 9, 10)]


@given(archives(), st.integers(0, 40))
def test_what_is_noted_as_lost_is_not_asked_for_again(archive: tuple[dict[int, Stock], list[Span]], again: int) -> None:
    # Or the receiver would meet the same refusal for ever.
    stored, line = archive
    assume(stored)
    start = plan_start(stored, line, Lsn(0), SIZE)
    assert start is not None
    notes = gap_pieces(line, start, Lsn(again * SIZE), SIZE, "removed", datetime(2026, 1, 1, tzinfo=UTC))
    following = plan_start(stored, line, Lsn(0), SIZE, {name for note in notes for name in note.names(SIZE)})
    assert following is not None
    assert following.lsn >= max(start.lsn, again * SIZE)


# What the server says


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("requested WAL segment 000000010000000000000003 has already been removed", WalRemovedError),
        ("requested WAL segment pg_wal/000000010000000000000003 has already been removed", WalRemovedError),
        (
            'can no longer access replication slot "ops_wal" This replication slot has been invalidated due to "wal_removed".',
            SlotLostError,
        ),
        (
            'cannot read from replication slot "ops_wal" This slot has been invalidated because it exceeded the maximum reserved size.',
            SlotLostError,
        ),
        ('replication slot "ops_wal" does not exist', NotThereError),
        ("number of requested standby connections exceeds max_wal_senders (currently 2)", UnreachableError),
        ("sorry, too many clients already", UnreachableError),
        ("remaining connection slots are reserved for roles with the SUPERUSER attribute", UnreachableError),
        ("all replication slots are in use", OpsError),
        ("must be superuser or replication role to start walsender", AccessDeniedError),
        ("permission denied to start WAL sender", AccessDeniedError),
        ("permission denied to use replication slots", AccessDeniedError),
        ("the stars are wrong", OpsError),
    ],
)
def test_a_refusal_of_the_server_gets_its_kind(message: str, kind: type[OpsError]) -> None:
    error = replication_error(f"FATAL:  {message}\n", "db:5432")
    assert type(error) is kind
    assert error.where == "db:5432"


def test_a_slot_in_use_names_the_servers_process() -> None:
    error = replication_error('ERROR:  replication slot "ops_wal" is active for PID 4711', "db:5432")
    assert isinstance(error, SlotActiveError)
    assert error.pid == 4711


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(1, 60))
def test_the_wait_before_another_try_grows_and_is_bounded(attempt: int, chance: float, most: float) -> None:
    wait = backoff(attempt, lambda: chance, most=most)
    assert 0 < wait <= most
    assert wait <= backoff(attempt + 1, lambda: chance, most=most)
