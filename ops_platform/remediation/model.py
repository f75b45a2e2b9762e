"""The nouns of remediation: signals, incidents and their states, peers, what a playbook is given. Plain data."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal


@dataclass(frozen=True)
class Signal:
    """One alert or event, whatever brought it.

    `fingerprint` identifies what it is about: Alertmanager's own for an alert (several instances merged have the same), and
    `topic@id/partition/offset` for an event; `@id` is the topic's own, where the broker gives one. `labels`: an alert's labels; of an
    event its attributes, and `data.a.b` for scalars of its data. `seen_at` is when we saw it.
    """

    source: Literal["alertmanager", "kafka", "watchdog", "person", "history"]
    fingerprint: str
    name: str
    labels: Mapping[str, str]
    starts_at: datetime
    seen_at: datetime
    ends_at: datetime | None = None  # None: it still fires (or is an event, which does not end)
    annotations: Mapping[str, str] = field(default_factory=dict[str, str])
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    silenced: bool = False
    inhibited: bool = False
    link: str | None = None

    @property
    def is_event(self) -> bool:
        return self.source == "kafka"

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "name": self.name,
            "labels": dict(self.labels),
            "annotations": dict(self.annotations),
            "data": dict(self.data),
            "starts_at": moment_text(self.starts_at),
            "seen_at": moment_text(self.seen_at),
            "ends_at": moment_text(self.ends_at) if self.ends_at else None,
            "silenced": self.silenced,
            "inhibited": self.inhibited,
            "link": self.link,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signal:
        times = ("starts_at", "seen_at", "ends_at")
        read = {name: datetime.fromisoformat(value[name]) if value[name] else None for name in times}
        whole: dict[str, Any] = {**value, **read}
        return cls(**whole)


def moment_text(moment: datetime) -> str:
    """A moment as it stands in a signal's JSON: the same text for the same moment."""
    return moment.astimezone(UTC).isoformat()


class State(StrEnum):
    """Where an incident stands. `machine.ALLOWED` says which may follow which."""

    OPEN = "open"  # to be looked at: preflight, plan, guards
    SUPPRESSED = "suppressed"  # a guard refused; looked at again at `retry_at`
    OBSERVED = "observed"  # mode observe: it was said what would be done
    WAITING = "waiting"  # for a person to approve the plan
    APPLYING = "applying"  # admitted: changes are being made
    VERIFYING = "verifying"  # applied; does it help?
    HELD = "held"  # it helped, and is to be undone at `undo_at`
    UNDOING = "undoing"
    ESCALATED = "escalated"  # people have it now
    CLOSED = "closed"


class Ending(StrEnum):
    """How a closed incident ended."""

    HELPED = "helped"
    CLEARED = "cleared"  # the signal ended, or there was nothing to do, before anything was changed
    UNDONE = "undone"
    OBSERVED = "observed"  # nothing was to be changed, and the signal ended
    REFUSED = "refused"  # by a person
    SUPPRESSED = "suppressed"  # the guards refused until the signal ended
    GAVE_UP = "gave up"
    BY_HAND = "by hand"  # escalated, and then the signal ended or a person closed it


_STANDS = ("begun", "applied", "failed")


@dataclass(frozen=True)
class Incident:
    """One row: one for each rule and fingerprint that is not closed.

    `version` grows with every change of the row and is the fencing token: whoever holds an older one changes nothing.
    `plan` is the newest plan's JSON; `outcomes` what became of its changes, `earlier` of those of the attempts before, oldest first.
    `attempts` counts admissions.
    """

    id: str
    rule: str
    fingerprint: str
    subject: str
    playbook: str
    state: State
    signal: Signal
    opened_at: datetime
    updated_at: datetime
    version: int = 1
    attempts: int = 0
    reason: str = ""
    plan: Mapping[str, Any] | None = None
    digest: str | None = None
    rulings: tuple[Mapping[str, Any], ...] = ()
    outcomes: tuple[Mapping[str, Any], ...] = ()
    earlier: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    retry_at: datetime | None = None  # SUPPRESSED: when it is looked at again; WAITING: when nobody decided in time
    deadline: datetime | None = None  # VERIFYING: good by then
    undo_at: datetime | None = None  # HELD: undone then
    signal_ended_at: datetime | None = None
    proposed_by: str = ""
    ending: Ending | None = None
    closed_at: datetime | None = None
    thread: str | None = None  # of the messages about it

    @property
    def is_open(self) -> bool:
        return self.state is not State.CLOSED

    @property
    def touched(self) -> bool:
        """Whether a change was begun: applied, failed in the middle, or begun by somebody who was killed."""
        return any(entry.get("outcome") in _STANDS for entry in self.outcomes)

    @property
    def can_be_undone(self) -> bool:
        """Whether something stands, or may stand, that its playbook calls reversible."""
        return any(entry["change"]["reversible"] for attempt in self.standing.values() for entry in attempt)

    @property
    def standing(self) -> dict[int, list[Mapping[str, Any]]]:
        """What stands, or may stand, of each attempt, the newest first, by its place in `earlier` and `outcomes`. Never empty lists."""
        found = {
            place: [one for one in entries if one.get("outcome") in _STANDS and not one.get("undone")]
            for place, entries in reversed(list(enumerate((*self.earlier, self.outcomes))))
        }
        return {place: entries for place, entries in found.items() if entries}


def incident_id(rule: str, fingerprint: str, starts_at: datetime, number: int = 0) -> str:
    """The same signal gives the same id, however often and by whomever it is read: `i-` and 13 letters and digits.

    `number`: how many incidents of this very signal were closed before.
    """
    text = json.dumps([rule, fingerprint, moment_text(starts_at), number])
    return "i-" + base64.b32encode(hashlib.sha256(text.encode()).digest()[:10]).decode().lower()[:13]


@dataclass(frozen=True)
class Peers:
    """How many of what stands beside the thing that is acted on are healthy, without it. `what`: such as `ready replicas`."""

    healthy: int
    total: int
    what: str


@dataclass(frozen=True)
class Opening:
    """A signal that a rule is about, to become an incident."""

    rule: str
    subject: str
    playbook: str
    signal: Signal
    proposed_by: str
    again_after: timedelta = timedelta(minutes=15)


@dataclass(frozen=True)
class Approval:
    """A person's decision on exactly one plan."""

    incident: str
    digest: str
    decision: str
    who: str
    via: str
    at: datetime
    expires_at: datetime


@dataclass(frozen=True)
class Pause:
    why: str
    who: str
    at: datetime


@dataclass(frozen=True)
class Message:
    """That an incident changed: what people are to be told."""

    id: int
    incident: str
    version: int
    state: State
    reason: str
    at: datetime


@dataclass(frozen=True)
class Figures:
    """For metrics. `open`: by state, how many and since when the oldest; `endings`: by rule; `actions`: by playbook and whether it helped."""

    open: Mapping[State, tuple[int, datetime]]
    endings: Mapping[tuple[str, str], int]
    actions: Mapping[tuple[str, str], int]
    unsent: int
    oldest_unsent: datetime | None
    seen: Mapping[str, datetime]
    paused: Pause | None
    lag: Mapping[tuple[str, str, int], int]
