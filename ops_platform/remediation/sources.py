"""Where signals come from and where verification looks: the worker's eyes on the real systems, and the polls of the sensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from ops_platform.clients.prometheus import Measured
from ops_platform.errors import ConflictError, OpsError, UsageError
from ops_platform.inventory.remediation import MetricCheck
from ops_platform.inventory.systems import AlertmanagerSystem, PrometheusSystem
from ops_platform.remediation.intake import ACTOR, Taken, take
from ops_platform.remediation.model import Incident, Signal
from ops_platform.remediation.rules import remediation_of
from ops_platform.remediation.store import Store

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.events.publisher import Published


class Sources:
    """The worker's eyes."""

    def __init__(self, access: Access, store: Store) -> None:
        self._access, self._store = access, store

    def look(self, incident: Incident) -> Signal | None:
        """The alert as its Alertmanagers have it now. An event does not end; a watchdog's absence ends when it is seen again.

        Nothing is kept from one look to the next: a silence may be set between the plan and each of its changes.
        """
        signal = incident.signal
        if signal.source == "watchdog":
            seen = self._store.last_seen(signal.fingerprint)
            return signal if seen is None or seen <= signal.starts_at else None
        if signal.source != "alertmanager":
            return signal
        systems = alertmanagers(self._access)
        if not systems:
            raise UsageError("the inventory names no Alertmanager any more", remedy="remediation.alertmanagers")
        return self._listed(systems, signal.labels)

    def _listed(self, systems: Sequence[AlertmanagerSystem], labels: Mapping[str, str]) -> Signal | None:
        from ops_platform.clients.alertmanager import NoWatchdogError

        looked: list[Signal] = []
        doubt: NoWatchdogError | None = None
        for system in systems:
            try:
                found = self._access.alertmanager(system).look(labels)
            except NoWatchdogError as error:
                doubt = error  # this cluster answered, and what another one lists fires
                continue
            looked += [found] if found is not None else []
        if doubt is not None and not looked:
            raise doubt
        return next(iter(_of_several(looked)), None)

    def measure(self, check: MetricCheck, incident: Incident) -> tuple[Measured, str]:
        try:
            prometheus = self._access.prometheus(self._access.inventory.system(check.prometheus, PrometheusSystem))
        except OpsError as error:
            return Measured.UNKNOWN, str(error)
        return prometheus.check(check, incident.subject, incident.signal.labels)


def alertmanagers(access: Access) -> list[AlertmanagerSystem]:
    names = remediation_of(access.inventory).alertmanagers
    return [access.inventory.system(name, AlertmanagerSystem) for name in names]


@dataclass(frozen=True)
class Polls:
    """A tick over all Alertmanagers. `failed`: those that did not give their alerts, each with its reason.

    `doubts`: those whose watchdog does not vouch for an end, each with its reason.
    """

    taken: tuple[Taken, ...]
    failed: tuple[str, ...]
    doubts: tuple[str, ...] = ()

    @property
    def opened(self) -> list[Incident]:
        return [incident for taken in self.taken for incident in taken.opened]

    @property
    def left(self) -> int:
        return sum(taken.left for taken in self.taken)

    @property
    def problems(self) -> list[str]:
        return [problem for taken in self.taken for problem in taken.problems]


def poll_alerts(access: Access, store: Store, *, budget: float) -> Polls:
    """Poll each cluster of Alertmanagers, open and end incidents, keep an eye on the watchdogs.

    A cluster that does not answer ends nothing and hides nothing: its watchdog's time runs, and the failure is in the result.
    """
    systems = alertmanagers(access)
    signals: list[Signal] = []
    watched: list[Taken] = []
    failed: list[str] = []
    doubts: list[str] = []
    complete = bool(systems)
    for system in systems:
        share = budget / len(systems)
        try:
            polled = access.alertmanager(system).poll(share)
        except OpsError as error:
            failed.append(f"{system.id}: {error}")
            complete = False
            watched += _watchdog(access, store, system, None)
            continue
        signals += polled.signals
        complete = complete and polled.complete
        doubts += [f"{system.id}: {polled.doubt}"] if polled.doubt is not None else []
        watched += _watchdog(access, store, system, polled)
    # An alert has no mark of the cluster that it came from: only all of them together say what has ended.
    return Polls(
        (take(store, access.inventory, _of_several(signals), complete=complete), *watched), tuple(failed), tuple(doubts)
    )


def _of_several(signals: Sequence[Signal]) -> list[Signal]:
    """One for each fingerprint. What is silenced or inhibited in one cluster is so for us: somebody is at work on it."""
    found: dict[str, Signal] = {}
    for signal in signals:
        there = found.get(signal.fingerprint)
        found[signal.fingerprint] = (
            signal
            if there is None
            else replace(
                there,
                starts_at=min(there.starts_at, signal.starts_at),
                silenced=there.silenced or signal.silenced,
                inhibited=there.inhibited or signal.inhibited,
            )
        )
    return list(found.values())


def _watchdog(access: Access, store: Store, system: AlertmanagerSystem, polled: object) -> list[Taken]:
    from ops_platform.clients.alertmanager import Polled, watchdog_signal

    if system.watchdog is None:
        return []
    now, name = store.clock.now(), f"watchdog/{system.id}"
    known = polled if isinstance(polled, Polled) else None
    if known is not None and known.sees_watchdog:
        store.mark_seen(name, now)
        return [_seen_again(access, store, name, now)]
    last = store.last_seen(name)
    if last is None:
        store.mark_seen(name, now)  # from now on it is looked for
        return []
    signal = watchdog_signal(system, known, last, now)
    return [take(store, access.inventory, [signal], complete=False)] if signal is not None else []


def _seen_again(access: Access, store: Store, fingerprint: str, now: datetime) -> Taken:
    """The absence has ended."""
    ended = [
        replace(signal, ends_at=now, seen_at=now)
        for signal in store.firing("watchdog")
        if signal.fingerprint == fingerprint
    ]
    return take(store, access.inventory, ended, complete=False) if ended else Taken()


@dataclass(frozen=True)
class EventsRead:
    """A tick over the topics of one source. Whoever stores `cursor` has taken what was opened."""

    opened: tuple[Incident, ...]
    cursor: str
    notes: tuple[str, ...]


def read_events(access: Access, store: Store, number: int, *, cursor: str | None, budget: float) -> EventsRead:
    """Read on from the cursor and open an incident for each event that a rule is about.

    Opening is idempotent by topic, partition and offset, so a tick that dies before its cursor is stored is repeated without harm.
    Gaps and dead letters go into the ledger: what was lost or put aside is known afterwards.
    """
    from ops_platform.events.reader import open_reader

    source = remediation_of(access.inventory).events[number]
    with open_reader(access, source) as reader:
        batch = reader.read(cursor, budget=budget)
    for gap in batch.gaps:
        store.ledger.append("events.gap", source.kafka, gap.as_json(), actor=ACTOR)
    for letter in batch.dead_letters:
        store.ledger.append("events.dead_letter", source.kafka, letter.as_json(), actor=ACTOR)
    taken = take(store, access.inventory, batch.signals, complete=False, most=None)
    store.keep_lag(source.kafka, [(lag.topic, lag.partition, lag.messages) for lag in batch.lag])
    notes = [*map(str, batch.gaps), *map(str, batch.dead_letters), *batch.problems, *taken.problems]
    if batch.not_committed:
        notes.append(f"offsets could not be told to the group: {batch.not_committed}")
    return EventsRead(taken.opened, str(batch.cursor), tuple(notes))


def forget_old_signals(access: Access, store: Store) -> int:
    """By remediation.signals_kept. They hold labels, which people may ask to be erased. How many were forgotten."""
    return store.forget_signals(store.clock.now() - remediation_of(access.inventory).signals_kept)


# What the world may know of: backups, proofs, incidents, actions, and what was lost of events.
PUBLISHED = ("backup.", "incident.", "action.", "remediation.", "events.")


def publish_events(access: Access, store: Store, *, budget: float) -> Published:
    """Send the oldest entries of the outbox; one process at a time. Raises ConflictError where another one is at it.

    Where the inventory publishes nothing (any more), nothing is left to wait in the outbox: `dropped` says how many did.
    """
    from ops_platform.events.publisher import Published, open_publisher

    publisher = open_publisher(access)
    if publisher is None:
        return Published(0, 0, {}, dropped=store.ledger.publish_nothing(actor=ACTOR))
    with publisher, store.ledger.claim("publish") as ours:
        if not ours:
            raise ConflictError("another process publishes", where="the ledger's outbox")
        store.ledger.publish(PUBLISHED)
        return publisher.publish(store.ledger, budget=budget)
