"""Waiting for a cluster: until it is done, with growing pauses, and not for ever."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import pytest

from ops_platform.errors import CouldNotVerifyError
from ops_platform.stores.elasticsearch_snapshots import awaited


class Hands:
    """A clock that its sleepers move."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Cluster:
    where = "https://es"


CLUSTER = cast("Any", Cluster())


def test_it_is_asked_until_it_is_done_with_growing_pauses() -> None:
    clock, answers = Hands(), iter([None] * 20 + [{}])  # nothing that failed is an answer, too
    assert awaited(lambda: next(answers), "it", CLUSTER, clock=clock, seconds=1000) == {}
    assert clock.slept == sorted(clock.slept)
    assert clock.slept[0] < 1 < clock.slept[-1] == 5


def test_what_does_not_end_is_not_waited_for_for_ever() -> None:
    clock = Hands()
    with pytest.raises(CouldNotVerifyError, match="it did not come to an end") as caught:
        awaited(lambda: None, "it", CLUSTER, clock=clock, seconds=60)
    assert caught.value.where == "https://es"
    assert 60 < clock.monotonic() <= 65
