"""Whatever happens to topic and reader in whatever order: each event is handed over once, or named in a gap, or a dead letter."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ops_platform.clients.kafka import Kafka
from ops_platform.events.reader import Batch, EventReader
from ops_platform.events.schemas import Schemas
from ops_platform.inventory.remediation import EventSource
from tests import kafka_rig
from tests.integration.test_events import STRUCTURED, connected, event
from tests.rig import eventually

Place = tuple[int, int]  # partition, offset


class Reading(RuleBasedStateMachine):
    """`written`: what a reader must account for. `stored`: what the caller has kept, together with the cursor."""

    cluster: kafka_rig.Kafka
    kafka: Kafka

    @initialize()
    def begin(self) -> None:
        self.topic, self.dead = self.cluster.create_topic(partitions=2), self.cluster.create_topic()
        self.partitions = 2
        self.written: dict[Place, str] = {}
        self.expired: set[Place] = set()
        self.stored: list[Place] = []
        self.gaps: list[Place] = []
        self.letters: list[Place] = []
        self.cursor: str | None = None
        self.readers: list[EventReader] = []
        self.restart()

    @rule()
    def restart(self) -> None:
        """Another process goes on with the cursor that was stored."""
        from pathlib import Path

        for reader in self.readers:
            reader.close()
        source = EventSource(kafka="k", topics=[self.topic], dead_letter=self.dead, start="earliest", group=self.topic)
        self.readers = [EventReader(self.kafka, source, Schemas([], Path))]

    # What others do

    @rule(part=st.integers(0, 3), count=st.integers(1, 6))
    def produce(self, part: int, count: int) -> None:
        part %= self.partitions
        values = [event(len(self.written) + n) for n in range(count)]
        for value, offset in zip(
            values, self.cluster.produce(self.topic, *values, partition=part, headers=STRUCTURED), strict=True
        ):
            self.written[part, offset] = json.loads(value)["id"]

    @rule(part=st.integers(0, 3))
    def produce_poison(self, part: int) -> None:
        part %= self.partitions
        (offset,) = self.cluster.produce(self.topic, "garbage", partition=part, headers=STRUCTURED)
        self.written[part, offset] = "poison"

    @rule(part=st.integers(0, 3), abort=st.booleans())
    def transaction(self, part: int, abort: bool) -> None:
        part %= self.partitions
        found: list[Place] = []
        with self.cluster.transaction(abort=abort) as producer:
            for _ in range(2):
                producer.produce(self.topic, event("tx"), partition=part, headers=STRUCTURED,
                                 on_delivery=lambda _error, message: found.append((message.partition(), message.offset())))  # fmt: skip
        if not abort:
            self.written |= dict.fromkeys(found, "tx")

    @rule(part=st.integers(0, 3), share=st.floats(0, 1))
    def expire(self, part: int, share: float) -> None:
        part %= self.partitions
        low, high = self.cluster.watermarks(self.topic, part)
        before = low + int((high - low) * share)
        if before > low:
            self.cluster.expire(self.topic, before, part)
            self.expired |= {(part, offset) for offset in range(low, before)}

    @precondition(lambda self: self.partitions < 4)
    @rule()
    def grow(self) -> None:
        if self.cursor is None:
            return  # of a topic that was never read a new partition is no news
        self.partitions += 1
        self.cluster.grow_topic(self.topic, self.partitions)

    # What we do

    @rule(limit=st.integers(1, 9))
    def tick(self, limit: int) -> None:
        self._store(self.readers[0].read(self.cursor, limit=limit))

    @rule(limit=st.integers(1, 9))
    def tick_that_is_killed_before_anything_is_stored(self, limit: int) -> None:
        before = self._now()
        lost, again = (self.readers[0].read(self.cursor, limit=limit) for _ in range(2))
        assert self._now() == before
        assert [one.fingerprint for one in lost.signals] == [one.fingerprint for one in again.signals]
        assert str(lost.cursor) == str(again.cursor)

    def _now(self) -> dict[Place, str]:
        return dict(self.written)

    def _store(self, batch: Batch) -> None:
        for signal in batch.signals:
            _, part, offset = signal.fingerprint.split("/")
            self.stored.append((int(part), int(offset)))
            assert signal.labels["id"] == self.written[int(part), int(offset)]
        self.gaps += [(gap.partition, offset) for gap in batch.gaps for offset in range(gap.first, gap.last + 1)]
        self.letters += [(letter.partition, letter.offset) for letter in batch.dead_letters]
        self.cursor = str(batch.cursor)

    # What must hold

    @invariant()
    def nothing_is_accounted_for_twice(self) -> None:
        accounted = [*self.stored, *self.gaps, *self.letters]
        assert len(accounted) == len(set(accounted))
        assert set(self.gaps) <= self.expired
        assert all(self.written[place] == "poison" for place in self.letters)
        assert all(self.written[place] != "poison" for place in self.stored)

    def teardown(self) -> None:
        if not hasattr(self, "readers"):
            return
        begun_at_low = self.cursor is None  # what expired before the first tick was never ours

        def drained() -> bool:
            batch = self.readers[0].read(self.cursor)
            self._store(batch)
            return not batch.more and len(batch.lag) == self.partitions

        eventually(drained)
        self.nothing_is_accounted_for_twice()
        accounted = {*self.stored, *self.gaps, *self.letters}
        missing = {place for place in self.written if place not in accounted}
        assert missing <= self.expired
        if not begun_at_low:
            # After the first tick an expiry shows as a gap; before it, it may have taken what the topic began with.
            assert all(self._before_first(place) for place in missing)
        written = {dict(record.headers)["ops-dead-letter-offset"] for record in self.cluster.read(self.dead)}
        assert {str(offset).encode() for _, offset in self.letters} == written
        for reader in self.readers:
            reader.close()

    def _before_first(self, place: Place) -> bool:
        seen = [offset for part, offset in [*self.stored, *self.gaps, *self.letters] if part == place[0]]
        return not seen or place[1] < min(seen)


def test_every_event_once_or_in_a_gap_or_in_the_dead_letters(kafka: kafka_rig.Kafka) -> None:
    Reading.cluster, Reading.kafka = kafka, connected(kafka)
    made: Any = settings(
        max_examples=8,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=[Phase.generate],  # against real brokers a failure is shown as it was: a second run of it is another one
    )
    run_state_machine_as_test(Reading, settings=made)
