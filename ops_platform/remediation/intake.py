"""From signals to incidents: what a sensor's tick does, without Dagster. Idempotent: the same signals read again change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ops_platform.errors import ConflictError, OpsError
from ops_platform.inventory.base import Mode
from ops_platform.inventory.model import Inventory
from ops_platform.remediation.machine import ending_without_signal
from ops_platform.remediation.model import Incident, Opening, Signal, State
from ops_platform.remediation.rules import Decision, Unresolved, decisions, rule_named, subject_id
from ops_platform.remediation.store import Store
from ops_platform.remediation.worker import proposer

MOST = 100  # incidents opened, and runs asked for, in one tick: the rest has its turn in the next
ACTOR = "sensor"


@dataclass(frozen=True)
class Taken:
    """What a tick made of the signals. `left`: decisions that wait for the next tick."""

    opened: tuple[Incident, ...] = ()
    ended: tuple[Incident, ...] = ()
    left: int = 0
    unmatched: int = 0
    problems: tuple[str, ...] = field(default=())


def decide(inventory: Inventory, signals: Iterable[Signal], now: datetime) -> tuple[list[Decision | Unresolved], int]:
    """Which signals lead to an incident now, and how many no rule is about. Pure.

    What is silenced, inhibited, has ended, or has not been firing for long enough, leads to none.
    """
    found: list[Decision | Unresolved] = []
    unmatched = 0
    for signal in signals:
        if signal.silenced or signal.inhibited or signal.ends_at is not None:
            continue
        about = list(decisions(inventory, signal))
        unmatched += not about
        found += [one for one in about if now - signal.starts_at >= one.rule.firing_for or signal.is_event]
    return found, unmatched


def take(
    store: Store, inventory: Inventory, signals: Sequence[Signal], *, complete: bool, most: int | None = MOST
) -> Taken:
    """Keep the signals, open incidents, end those whose alert has ended.

    `most`: incidents that are opened at once; None for signals that do not come again. `complete`: `signals` is all that fires at this
    source now; only then what is not among them has ended. Events never end.
    """
    now = store.clock.now()
    wanted, unmatched = decide(inventory, signals, now)
    before = store.list()
    known = {(one.rule, one.fingerprint) for one in before}
    ended = _end(store, before, signals, now, complete=complete)
    store.saw([*signals, *_gone(store, signals, now)] if complete else signals)
    # Those that have one already cost nothing, so they do not use up the tick's share.
    fresh = [one for one in wanted if (one.rule.id, one.signal.fingerprint) not in known]
    _reopen(store, inventory, before)
    opened, left = store.open_all(
        [Opening(one.rule.id, subject_id(one), one.rule.playbook, one.signal, proposer(one.rule)) for one in fresh],
        most=most,
    )
    problems = tuple(
        dict.fromkeys(f"rule {one.rule.id}: {one.problem}" for one in wanted if isinstance(one, Unresolved))
    )
    return Taken(tuple(opened), tuple(ended), left, unmatched, problems)


def _end(
    store: Store, incidents: Sequence[Incident], signals: Sequence[Signal], now: datetime, *, complete: bool
) -> list[Incident]:
    """Incidents whose alert has ended: it says so itself, or it is not among all that fire."""
    by_print = {signal.fingerprint: signal for signal in signals}
    sources = {signal.source for signal in signals} | ({"alertmanager"} if complete else set[str]())
    ended: list[Incident] = []
    for incident in incidents:
        if incident.signal.is_event or incident.signal.source not in sources:
            continue
        if incident.signal_ended_at is not None and ending_without_signal(incident) is None:
            continue  # noted already; whoever brings it to its end knows
        there = by_print.get(incident.fingerprint)
        if there is not None and there.ends_at is None and there.starts_at > incident.signal.starts_at:
            gone = incident.signal_ended_at is not None  # it ended while it was worked on, and this one is another
        else:
            gone = (there is None and complete) or (there is not None and there.ends_at is not None)
        if gone:
            at = incident.signal_ended_at or (there.ends_at if there is not None and there.ends_at is not None else now)
            try:
                ended.append(store.end_signal(incident, at, actor=ACTOR))
            except ConflictError:
                continue  # a run went on with it meanwhile, and sees by itself that the alert has ended
    return ended


def _gone(store: Store, signals: Sequence[Signal], now: datetime) -> list[Signal]:
    """What was kept as firing and does not fire any more, with its end: for the history."""
    from dataclasses import replace

    there = {signal.fingerprint for signal in signals}
    return [
        replace(signal, ends_at=now, seen_at=now)
        for signal in store.firing("alertmanager")
        if signal.fingerprint not in there
    ]


def _reopen(store: Store, inventory: Inventory, incidents: Sequence[Incident]) -> None:
    """A rule that only observed and enforces now: what still fires is looked at anew."""
    for incident in incidents:
        if incident.state is State.OBSERVED and incident.signal_ended_at is None:
            try:
                enforces = rule_named(inventory, incident.rule).mode is Mode.ENFORCE
                if enforces:
                    store.move(incident, State.OPEN, "the rule enforces now", actor=ACTOR)
            except OpsError:
                continue  # its rule is gone, or somebody else was faster


def run_key(incident: Incident, now: datetime, period: float) -> str:
    """One run for each version of an incident; where that run is lost, another one after `period` seconds."""
    waited = max(0.0, (now - incident.updated_at).total_seconds())
    return f"{incident.id}/{incident.version}/{int(waited // period)}"
