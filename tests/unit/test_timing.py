"""Due moments: each exactly once, whatever daylight saving, the scheduler's windows and its clock do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_platform.inventory.model import Schedule
from ops_platform.timing import Due, due, fires, next_fire, offset

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]
CRONS = ["15 2 * * *", "30 * * * *", "*/20 * * * *", "15 */2 * * *", "45 1 * * 0", "0 1,2,3 * * *", "0 12 1 * *"]
# Around the clock changes of all of these zones, and an ordinary summer's week.
BEGINNINGS = [datetime(2026, month, day, tzinfo=UTC) for month, day in ((3, 6), (3, 27), (4, 3), (7, 1), (10, 2), (10, 23), (10, 30))]  # fmt: skip


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def shown(cron: str, zone: str, after: str, until: str) -> list[str]:
    """The moments as the clocks of the place show them, with the offset that tells a doubled hour apart."""
    return [f"{m.astimezone(ZoneInfo(zone)):%d %H:%M %z}" for m in fires(cron, zone, at(after), at(until))]


def schedule(cron: str, zone: str = "UTC", spread: timedelta = timedelta()) -> Schedule:
    return Schedule(cron=cron, timezone=zone, spread=spread)


schedules = st.builds(
    schedule, st.sampled_from(CRONS), st.sampled_from(ZONES), st.timedeltas(timedelta(), timedelta(hours=4))
)
targets = st.lists(schedules, min_size=1, max_size=4).map(lambda found: [(f"db-{i}", s) for i, s in enumerate(found)])
cuts = st.lists(st.integers(0, 4 * 24 * 3600 * 1000), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(targets, st.sampled_from(BEGINNINGS), cuts)
def test_however_the_time_is_cut_each_moment_is_due_exactly_once(
    targets: list[tuple[str, Schedule]], begin: datetime, cuts: list[int]
) -> None:
    end = begin + timedelta(days=4)
    edges = sorted({begin, end, *(begin + timedelta(milliseconds=cut) for cut in cuts)})
    parts = [item for after, until in pairwise(edges) for item in due(targets, after, until)]
    assert parts == due(targets, begin, end)
    assert len({item.key for item in parts}) == len(parts)


@settings(max_examples=25, deadline=None)
@given(targets, st.sampled_from(BEGINNINGS), cuts, st.timedeltas(timedelta(), timedelta(hours=3)))
def test_questions_that_overlap_are_answered_with_the_same_keys(
    targets: list[tuple[str, Schedule]], begin: datetime, cuts: list[int], back: timedelta
) -> None:
    end = begin + timedelta(days=4)
    edges = sorted({begin, end, *(begin + timedelta(milliseconds=cut) for cut in cuts)})
    asked = {item.key for after, until in pairwise(edges) for item in due(targets, max(begin, after - back), until)}
    assert asked == {item.key for item in due(targets, begin, end)}


def test_a_clock_that_is_set_forth_and_back_makes_no_new_keys() -> None:
    """The machine that schedules is an hour ahead, is put right, and goes on: nothing is due under a second name, nothing is lost."""
    targets = [(f"db-{i}", schedule("*/10 * * * *", "Europe/Berlin", timedelta(minutes=30))) for i in range(5)]
    told = [0, 5, 10, 70, 75, 80, 15, 20, 25, 30, *range(30, 125, 5), 60, 120]  # minutes that the clock shows
    begin = at("2026-10-24T22:00")
    keys: list[str] = []
    for minute in told:
        until = begin + timedelta(minutes=minute)
        keys += [item.key for item in due(targets, until - timedelta(minutes=30), until)]
    straight = due(targets, begin - timedelta(minutes=30), begin + timedelta(minutes=120))
    assert set(keys) == {item.key for item in straight}
    assert len(keys) > len(set(keys))


def test_the_key_names_target_and_moment_and_not_the_place_in_the_spread() -> None:
    (found,) = due([("db", schedule("15 2 * * *", "Europe/Berlin", timedelta(hours=2)))], at("2026-07-01"), at("2026-07-02"))  # fmt: skip
    assert found == Due("db", at("2026-07-01T00:15"), at("2026-07-01T00:15") + offset("db", timedelta(hours=2)))
    assert found.key == "db/2026-07-01T00:15Z"


# Daylight saving

SPRING = [
    ("Europe/Berlin", "30 2 * * *", "2026-03-28T12:00", "2026-03-30T12:00", ["29 03:30 +0200", "30 02:30 +0200"]),
    ("America/New_York", "30 2 * * *", "2026-03-07T17:00", "2026-03-09T17:00", ["08 03:30 -0400", "09 02:30 -0400"]),
    ("Australia/Lord_Howe", "15 2 * * *", "2026-10-03T06:00", "2026-10-05T06:00", ["04 02:45 +1100", "05 02:15 +1100"]),
    ("Asia/Kathmandu", "30 2 * * *", "2026-03-28T12:00", "2026-03-30T12:00", ["29 02:30 +0545", "30 02:30 +0545"]),
]
AUTUMN = [
    ("Europe/Berlin", "30 2 * * *", "2026-10-24T12:00", "2026-10-26T12:00", ["25 02:30 +0200", "26 02:30 +0100"]),
    ("America/New_York", "30 1 * * *", "2026-10-31T17:00", "2026-11-02T17:00", ["01 01:30 -0400", "02 01:30 -0500"]),
    ("Australia/Lord_Howe", "45 1 * * *", "2026-04-04T06:00", "2026-04-06T06:00", ["05 01:45 +1100", "06 01:45 +1030"]),
    ("Asia/Kathmandu", "30 1 * * *", "2026-10-24T12:00", "2026-10-26T12:00", ["25 01:30 +0545", "26 01:30 +0545"]),
]


@pytest.mark.parametrize(("zone", "cron", "after", "until", "expected"), SPRING)
def test_a_time_that_is_skipped_comes_once_after_the_jump(
    zone: str, cron: str, after: str, until: str, expected: list[str]
) -> None:
    assert shown(cron, zone, after, until) == expected


@pytest.mark.parametrize(("zone", "cron", "after", "until", "expected"), AUTUMN)
def test_a_time_that_comes_twice_fires_the_first_time(
    zone: str, cron: str, after: str, until: str, expected: list[str]
) -> None:
    assert shown(cron, zone, after, until) == expected


@pytest.mark.parametrize("cron", ["0 * * * *", "30 * * * *"])
@pytest.mark.parametrize(("after", "hours"), [("2026-03-28T22:45", 4), ("2026-10-24T22:45", 4)])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "Asia/Kathmandu"])
def test_what_runs_by_the_hour_runs_in_each_real_hour(zone: str, cron: str, after: str, hours: int) -> None:
    found = list(fires(cron, zone, at(after), at(after) + timedelta(hours=hours)))
    assert len(found) == hours
    assert {later - earlier for earlier, later in pairwise(found)} == {timedelta(hours=1)}


def test_a_skipped_time_of_an_expression_by_the_hour_fires_once_too() -> None:
    assert shown("15 */2 * * *", "Europe/Berlin", "2026-03-28T22:00", "2026-03-29T03:00") == [
        "29 00:15 +0100", "29 03:15 +0200", "29 04:15 +0200",
    ]  # fmt: skip
    half_an_hour = shown("15 * * * *", "Australia/Lord_Howe", "2026-10-03T14:00", "2026-10-03T16:30")
    assert half_an_hour == ["04 01:15 +1030", "04 02:45 +1100", "04 03:15 +1100"]


def test_moments_come_in_the_order_of_time_when_the_hour_is_doubled() -> None:
    found = list(fires("*/20 * * * *", "Europe/Berlin", at("2026-10-24T23:50"), at("2026-10-25T02:00")))
    assert found == [at("2026-10-25T00:00") + timedelta(minutes=20 * i) for i in range(7)]
    assert next_fire("*/20 * * * *", "Europe/Berlin", at("2026-10-25T00:00")) == at("2026-10-25T00:20")


# The spread


def test_the_place_in_the_spread_is_fixed_within_it_and_even() -> None:
    spread = timedelta(hours=4)
    places = [offset(f"shop-{i}", spread) for i in range(1000)]
    assert places == [offset(f"shop-{i}", spread) for i in range(1000)]
    assert all(timedelta() <= place < spread for place in places)
    quarters = [sum(1 for place in places if place // timedelta(minutes=15) == q) for q in range(16)]
    # 62.5 each on average, with a deviation of 7.7: four of them on either side.
    assert min(quarters) > 31
    assert max(quarters) < 94
    assert offset("shop-1", timedelta()) == timedelta()


def test_a_thousand_targets_do_not_start_at_once() -> None:
    targets = [(f"shop-{i}", schedule("0 2 * * *", "Europe/Berlin", timedelta(hours=4))) for i in range(1000)]
    begin = at("2026-07-01T00:00") - timedelta(seconds=1)
    assert len(due(targets, begin, begin + timedelta(hours=4))) == 1000
    slots = [due(targets, begin + i * timedelta(minutes=5), begin + (i + 1) * timedelta(minutes=5)) for i in range(48)]
    assert max(len(slot) for slot in slots) < 48


# Expressions that hardly ever fire, or never


def test_an_expression_that_never_fires_has_no_next_moment() -> None:
    assert next_fire("0 2 31 2 *", "Europe/Berlin", at("2026-01-01")) is None
    assert list(fires("0 2 31 2 *", "UTC", at("2026-01-01"), at("2027-01-01"))) == []


def test_a_leap_day_is_found() -> None:
    assert next_fire("0 2 29 2 *", "Europe/Berlin", at("2026-03-01")) == at("2028-02-29T01:00")


def test_an_edge_belongs_to_the_window_that_ends_with_it() -> None:
    moment = at("2026-07-01T02:00")
    assert list(fires("0 2 * * *", "UTC", moment - timedelta(hours=1), moment)) == [moment]
    assert list(fires("0 2 * * *", "UTC", moment, moment + timedelta(hours=1))) == []
