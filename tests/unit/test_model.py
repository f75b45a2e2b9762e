"""Positions in the WAL, names of segments, and the settings of a recovery target."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.backup.model import Lsn, RecoveryTarget, RecoveryWindow, segment_name, segment_start
from ops_platform.recovery.records import new_verification_id

SIZES = [1 << bits for bits in range(20, 31)]
positions = st.integers(0, 2**64 - 1)


@given(positions)
def test_a_position_reads_back_as_it_was_written(position: int) -> None:
    assert Lsn.parse(str(Lsn(position))) == position


@pytest.mark.parametrize(
    "text", ["", "16", "16/", "/16", "0/123456789", "123456789/0", "0x1/2", "1/2 ", "1/2/3", "-1/2"]
)
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a WAL position"):
        Lsn.parse(text)


def test_a_position_is_written_as_postgres_writes_it() -> None:
    assert str(Lsn.parse("00000016/b374d848")) == "16/B374D848"
    assert repr(Lsn(0x1_0000_0001)) == "Lsn(1/1)"


@given(st.integers(1, 2**32 - 1), positions, st.sampled_from(SIZES))
def test_a_segments_name_gives_back_its_timeline_and_first_position(timeline: int, lsn: int, size: int) -> None:
    name = segment_name(timeline, lsn, size)
    assert re.fullmatch("[0-9A-F]{24}", name)
    assert segment_start(name, size) == (timeline, lsn - lsn % size)


@given(positions, positions, st.sampled_from(SIZES))
def test_names_sort_as_positions_do(left: int, right: int, size: int) -> None:
    names = [segment_name(1, lsn, size) for lsn in (left, right)]
    assert (names[0] < names[1]) == (left // size < right // size)


@pytest.mark.parametrize(
    ("lsn", "size", "name"),
    [  # select pg_walfile_name(lsn) on servers with --wal-segsize=16, 1, 64 and 1024
        ("16/B374D848", 16 << 20, "0000000700000016000000B3"),
        ("16/B374D848", 1 << 20, "000000070000001600000B37"),
        ("16/B374D848", 64 << 20, "00000007000000160000002C"),
        ("16/B374D848", 1 << 30, "000000070000001600000002"),
        ("0/1", 16 << 20, "000000070000000000000000"),
        ("1/0", 16 << 20, "000000070000000100000000"),
    ],
)
def test_names_are_those_of_postgres(lsn: str, size: int, name: str) -> None:
    assert segment_name(7, Lsn.parse(lsn), size) == name


MOMENT = datetime(2026, 3, 29, 2, 30, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
ALWAYS = {"recovery_target_timeline": "latest", "recovery_target_inclusive": "on"}


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        (RecoveryTarget("latest"), {}),
        (RecoveryTarget("immediate"), {"recovery_target": "immediate"}),
        (RecoveryTarget("time", MOMENT), {"recovery_target_time": "2026-03-29 00:30:00.123456+00"}),
        (RecoveryTarget("lsn", "16/B374D848"), {"recovery_target_lsn": "16/B374D848"}),
        (RecoveryTarget("name", "before 'it'"), {"recovery_target_name": "before 'it'"}),
        (RecoveryTarget("xid", "1234"), {"recovery_target_xid": "1234"}),
        (RecoveryTarget("latest", timeline=3), {"recovery_target_timeline": "3"}),
        (RecoveryTarget("latest", timeline="current"), {"recovery_target_timeline": "current"}),
        (RecoveryTarget("xid", "7", inclusive=False), {"recovery_target_xid": "7", "recovery_target_inclusive": "off"}),
    ],
)
def test_a_target_becomes_postgres_settings(target: RecoveryTarget, settings: dict[str, str]) -> None:
    assert target.settings() == ALWAYS | settings


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("time", None),
        ("time", "2026-03-29 02:30"),
        ("time", MOMENT.replace(tzinfo=None)),  # whose noon would it be?
        ("lsn", None),
        ("name", ""),
        ("xid", 7),
    ],
)
def test_a_target_without_its_value_is_never_made_up(kind: Any, value: Any) -> None:
    with pytest.raises(TypeError):
        RecoveryTarget(kind, value).settings()


@given(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.timezones()))  # noqa: DTZ001 - bounds
def test_a_time_means_the_same_moment_to_postgres(moment: datetime) -> None:
    text = RecoveryTarget("time", moment).settings()["recovery_target_time"]
    assert datetime.strptime(text + "00", "%Y-%m-%d %H:%M:%S.%f%z").timestamp() == moment.timestamp()


def test_a_window_with_a_gap_does_not_hold_the_moments_between() -> None:
    day = [datetime(2026, 1, number, tzinfo=UTC) for number in range(1, 9)]
    window = RecoveryWindow(day[0], day[5], [(day[0], day[2]), (day[4], day[5])], [])
    assert [window.holds(moment) for moment in day] == [True, True, True, False, True, True, False, False]


def test_of_two_verifications_in_one_second_the_newer_one_sorts_last() -> None:
    began = datetime(2026, 11, 25, 20, 45, 16, 41_000, tzinfo=UTC)
    ids = [new_verification_id(began + timedelta(milliseconds=step)) for step in range(0, 950, 7)]
    assert ids == sorted(ids)
    assert ids[0].startswith("20261125T204516Z-029")
    assert {len(one) for one in ids} == {25}
