"""Python's garbage collector while many events are read: put off, and left as it was found."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from ops_platform.events import reader

MANY = reader._MANY + 10_000  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.unfreeze()
    if frozen:
        gc.freeze()


def read(count: int) -> list[list[int]]:
    with reader._no_search_for_cycles():  # pyright: ignore[reportPrivateUsage]
        assert not gc.isenabled()
        return [[] for _ in range(count)]


def test_where_nothing_is_frozen_nothing_is_afterwards() -> None:
    made = read(MANY)
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
    assert len(made) == MANY


def test_where_the_process_has_frozen_what_it_loaded_that_stays_and_many_events_go_when_they_are_done() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    few = read(100)
    assert gc.get_freeze_count() <= before, "for a few it is left alone"
    made = read(MANY)
    assert gc.get_freeze_count() > before + MANY
    del made, few
    assert gc.get_freeze_count() < before + 10_000


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), reader._no_search_for_cycles():  # pyright: ignore[reportPrivateUsage]
        raise ZeroDivisionError
    assert gc.isenabled()
