"""Where reading stands: what the brokers may say of a topic, and what follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.clients.kafka import Topic
from ops_platform.errors import ConflictError, UsageError
from ops_platform.events.cursor import Cursor, Gap, Range, TopicCursor, Watermarks, begin, check_topic, share
from ops_platform.events.reset import GOES_ON, NOT_BEGUN, STANDS, _state
from ops_platform.inventory.remediation import EventSource

KNOWN = Cursor({"t": TopicCursor({0: 5, 1: 7}, "an id")})


def test_a_cursor_is_written_as_documented_and_read_back() -> None:
    assert str(KNOWN) == '{"v":1,"topics":{"t":{"id":"an id","next":{"0":5,"1":7}}}}'
    assert Cursor.parse(str(KNOWN)) == KNOWN
    assert Cursor.parse(None) == Cursor.parse("") == Cursor()


@pytest.mark.parametrize(
    "text",
    [
        "x", "[]", "{}", '{"v":2,"topics":{}}', '{"v":1}', '{"v":1,"topics":{"t":{"id":null,"next":{"0":-1}}}}',
        '{"v":1,"topics":{"t":{"id":null,"next":{"0":true}}}}', '{"v":1,"topics":{"t":{"id":null,"next":{"x":1}}}}',
        '{"v":1,"topics":{"t":{"id":5,"next":{}}}}', '{"v":1,"topics":{"t":{"next":{}}}}', '{"v":1,"topics":{"t":{"id":null,"next":{"0":"1"}}}}',
    ],
)  # fmt: skip
def test_what_we_did_not_write_is_no_cursor(text: str) -> None:
    with pytest.raises(UsageError, match="this cursor cannot be read"):
        Cursor.parse(text)


@pytest.mark.parametrize(
    ("partition", "marks", "at", "gap"),
    [
        (0, Watermarks(0, 5), 5, None),
        (0, Watermarks(0, 9), 5, None),
        (0, Watermarks(5, 9), 5, None),
        (0, Watermarks(6, 9), 6, Gap("t", 0, 5, 5)),
        (0, Watermarks(9, 9), 9, Gap("t", 0, 5, 8)),
        (2, Watermarks(0, 9), 0, None),
        (2, Watermarks(3, 9), 3, Gap("t", 2, 0, 2)),
    ],
)
def test_a_known_partition_goes_on_and_names_what_it_lost(
    partition: int, marks: Watermarks, at: int, gap: Gap | None
) -> None:
    for start in ("earliest", "latest"):
        assert begin("t", partition, KNOWN, marks, start) == (at, gap)


def test_a_topic_that_was_never_read_begins_where_it_is_asked_to_without_a_gap() -> None:
    assert begin("new", 0, KNOWN, Watermarks(3, 9), "earliest") == (3, None)
    assert begin("new", 0, KNOWN, Watermarks(3, 9), "latest") == (9, None)


def test_a_cursor_behind_the_end_is_of_another_topic() -> None:
    with pytest.raises(ConflictError, match="made anew or cut off"):
        begin("t", 0, KNOWN, Watermarks(0, 4), "earliest")


def test_a_topic_is_known_by_its_id_and_by_its_partitions() -> None:
    check_topic("t", KNOWN, "an id", (0, 1, 2))
    check_topic("t", KNOWN, None, (0, 1))
    check_topic("new", KNOWN, "whatever", (0,))
    with pytest.raises(ConflictError, match="deleted and made anew"):
        check_topic("t", KNOWN, "another id", (0, 1))
    with pytest.raises(ConflictError, match=r"lost partitions \(1\)"):
        check_topic("t", KNOWN, "an id", (0,))


def test_a_person_can_have_a_topic_forgotten_or_set() -> None:
    assert KNOWN.without("t") == Cursor()
    assert KNOWN.at("t", {1: 9}).topics["t"] == TopicCursor({0: 5, 1: 9}, "an id")


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.integers(1, 2000))
def test_a_tick_shares_its_offsets_evenly_and_wastes_none(lengths: list[int], limit: int) -> None:
    ranges = [Range("t", number, 10, 10 + length) for number, length in enumerate(lengths)]
    shared = share(ranges, limit)
    taken = {one.partition: one.end - one.start for one in shared}
    assert sum(taken.values()) == min(limit, sum(lengths))
    assert all(0 < taken[number] <= lengths[number] for number in taken)
    # Nobody gets less than another one who could do with less.
    cut = [taken.get(number, 0) for number, length in enumerate(lengths) if taken.get(number, 0) < length]
    assert all(most <= min(cut) + 1 for most in taken.values()) if cut else True
    assert shared == share(list(reversed(ranges)), limit)
    assert shared == sorted(shared, key=lambda one: (one.topic, one.partition))


@pytest.mark.parametrize(("topic_id", "high", "why"), [("another id", 20, "was deleted"), (None, 3, "it ends at 3")])
def test_what_is_shown_of_a_topic_made_anew_is_what_the_next_tick_does(
    topic_id: str | None, high: int, why: str
) -> None:
    topic, marks = Topic("t", topic_id, (0, 1)), {0: Watermarks(0, high), 1: Watermarks(0, high)}
    stands = EventSource(kafka="bus", topics=["t"], dead_letter="d", start="earliest")
    begins = stands.model_copy(update={"made_anew": "begin"})
    assert _state(KNOWN, topic, marks, stands)[0] == STANDS
    state, said = _state(KNOWN, topic, marks, begins)
    assert state == NOT_BEGUN
    assert why in (said or "")
    assert "it begins at its earliest offset" in (said or "")
    # The same topic with another end: whoever says so may have hung, and beginning again would repeat or lose what was read.
    assert _state(KNOWN, Topic("t", "an id", (0, 1)), {0: Watermarks(0, 3)}, begins)[0] == STANDS
    assert _state(KNOWN, Topic("t", "an id", (0,)), {0: Watermarks(0, 20)}, begins)[0] == STANDS
    same = {0: Watermarks(0, 20), 1: Watermarks(0, 20)}
    assert _state(KNOWN, Topic("t", "an id", (0, 1)), same, begins) == (GOES_ON, None)
