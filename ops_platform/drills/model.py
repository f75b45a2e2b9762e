"""The nouns of a drill: its states, its steps, what it made, what its probes saw, what it found, its scorecard. Plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class DrillState(StrEnum):
    RUNNING = "running"
    WAITING = "waiting"  # for a person; the clock runs on
    ENDING = "ending"  # what was made is taken away, what was broken is put back
    ENDED = "ended"


class Ending(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"  # a step failed
    ABORTED = "aborted"  # a person, or a condition of the runbook
    LOST = "lost"  # whoever held it was killed


class StepState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


ENDED_IN_IT = "the drill ended in it"  # said of a step that was under way when its drill was broken off


class Confidence(StrEnum):
    """How much a measured time is worth."""

    MEASURED = "measured"
    BOUND = "bound"  # at most this much; the truth may be better
    UNKNOWN = "unknown"


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Checked(Part):
    """One look: what was asked, what came back, whether it holds. `holds` None: it could not be looked at, which is never a pass."""

    title: str
    holds: bool | None
    query: str
    result: str
    detail: dict[str, Any] = {}


class Measured(Part):
    """A time, or a number. `name` is rto, rpo or the runbook's own word; `unit` s or, for counts, empty."""

    name: str
    value: float | None
    unit: str = "s"
    how: str
    confidence: Confidence = Confidence.MEASURED


@dataclass(frozen=True)
class Done:
    """What a step leaves behind. `facts` are JSON, and what later steps and the scorecard read."""

    said: str
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    checks: tuple[Checked, ...] = ()
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class StepRecord:
    """How far a step is. `started_at`: of its first attempt; `attempts` counts those that were interrupted, too."""

    step: str
    state: StepState
    attempts: int = 0
    started_at: datetime | None = None
    ended_at: datetime | None = None
    said: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    checks: tuple[Checked, ...] = ()
    measured: tuple[Measured, ...] = ()

    @property
    def seconds(self) -> float | None:
        if self.started_at is None or self.ended_at is None:
            return None
        return (self.ended_at - self.started_at).total_seconds()

    @property
    def settled(self) -> bool:
        return self.state in (StepState.DONE, StepState.FAILED, StepState.SKIPPED)


@dataclass(frozen=True)
class Resource:
    """Something that a drill is about to make, or to break: written down before it is done, so that it is found after any kill.

    `keep`: the product of a recovery in earnest, which stays. `left`: what the last look still found of it.
    """

    id: int
    drill: str
    step: str
    kind: str
    name: str
    host: str
    detail: Mapping[str, Any]
    keep: bool
    made_at: datetime
    gone_at: datetime | None = None
    left: str | None = None


@dataclass(frozen=True)
class Sample:
    """One attempt of a probe. `n`: the number that a writer wrote; `ms`: how long the answer took."""

    at: datetime
    ok: bool
    ms: float
    n: int | None = None
    error: str | None = None


def abort_told(abort: Mapping[str, Any]) -> str:
    """Who asked for a drill's end, and why."""
    return f"aborted by {abort['who']}: {abort['why']}"


@dataclass(frozen=True)
class Drill:
    """One drill. `version` is the fencing token: every write asks for the one that its author holds."""

    id: str
    plan: str  # the id in the inventory's drills; empty for a recovery in earnest
    runbook: str
    body: Mapping[str, Any]  # the runbook as it was when the drill began
    body_sha256: str
    subject: str
    domain: str
    environment: str
    scenario: str
    mode: str
    parameters: Mapping[str, Any]
    objectives: Mapping[str, float]  # seconds
    operator: str
    trigger: str
    approved_by: str | None
    digest: str
    state: DrillState
    started_at: datetime
    updated_at: datetime
    version: int = 1
    ending: Ending | None = None
    reason: str = ""
    abort: Mapping[str, Any] | None = None  # who, why, at: `abort_told`
    ended_at: datetime | None = None
    verdict: str | None = None
    card: Mapping[str, Any] | None = None

    @property
    def real(self) -> bool:
        return self.mode == "real"


class FindingState(StrEnum):
    OPEN = "open"
    GONE = "gone"  # a later drill looked at the same thing, and it held


@dataclass(frozen=True)
class Finding:
    """Something that a drill found wrong. `key`: what was looked at; the same key in a later drill is the same finding."""

    id: str
    key: str
    drill: str
    plan: str
    subject: str
    runbook: str
    title: str
    detail: str
    owner: str
    due: datetime
    state: FindingState
    opened_at: datetime
    seen: int
    last_drill: str
    note: str = ""
    closed_at: datetime | None = None
    closed_by: str | None = None


def finding_key(runbook: str, subject: str, what: str) -> str:
    return f"{runbook}/{subject}/{what}"


def finding_id(key: str, first_drill: str) -> str:
    return hashlib.sha256(f"{key} {first_drill}".encode()).hexdigest()[:10]


# The scorecard


class StepCard(Part):
    """A step as it went. `started`: seconds after the drill began."""

    id: str
    kind: str
    title: str
    does: str
    state: str
    attempts: int
    started: float | None
    seconds: float | None
    objective_seconds: float | None
    met: bool | None
    said: str
    needs: list[str]
    critical: bool = False


class ObjectiveCard(Part):
    """A measured time against its objective. `met` None: not measured, which is no kept promise."""

    name: str
    objective: float
    measured: float | None
    met: bool | None
    confidence: str
    how: str


class Outage(Part):
    """`began` and `ended` in seconds after the drill began; `ended` None: it had not ended when the probe did."""

    began: float
    ended: float | None


class ProbeCard(Part):
    """What a probe saw from its first good answer on. Resolution: the 99th percentile of the time between two attempts, in milliseconds."""

    step: str
    does: str
    counts: bool  # whether its outages are the target's unavailability
    attempts: int
    failed: int
    unavailable_seconds: float
    longest_seconds: float
    resolution_ms: float | None
    median_ms: float | None
    outages: list[Outage]
    errors: dict[str, int]
    began: float | None = None  # its first good answer (none: its first attempt), in seconds of the drill
    ended: float | None = None  # its last attempt


class CheckCard(Part):
    step: str
    title: str
    holds: bool | None
    query: str
    result: str
    detail: dict[str, Any] = {}


class ResourceCard(Part):
    """What the drill made or broke. `gone` False with `kept` False is a failed teardown."""

    kind: str
    name: str
    kept: bool
    gone: bool
    left: str | None


class FindingCard(Part):
    id: str
    title: str
    detail: str
    owner: str
    due: datetime
    new: bool


class AnswerCard(Part):
    """What a person did. `evidence`: names of files and their SHA-256."""

    step: str
    who: str
    at: datetime
    text: str
    evidence: dict[str, str]


class Prediction(Part):
    """What the forecast had said before the drill, in seconds. `held`: whether the measured time fell into the interval."""

    expected: float
    low: float
    high: float
    from_drills: int
    measured: float | None
    held: bool | None


class StackPart(Part):
    """One of the full stack. `starts` and `seconds`: when it could begin at the earliest, and until it served.

    `verdict` SKIPPED: it was not restored, so nothing is proven of it; `said` tells why.
    `critical`: on the critical path; `gain`: by how much the whole would be shorter at most if it took no time.
    """

    target: str
    kind: str
    needs: list[str]
    verdict: str
    seconds: float | None
    starts: float
    critical: bool
    gain: float | None
    said: str


class DrillCard(Part):
    """The whole record of one drill. Times UTC. Contains no data of the target beyond counts and names."""

    format: int = 1
    drill: str
    plan: str
    runbook: str
    runbook_sha256: str
    title: str
    scenario: str
    mode: str
    trigger: str
    operator: str
    approved_by: str | None
    target: str
    environment: str
    classification: str
    parameters: dict[str, Any]
    verdict: str
    ending: str
    reason: str
    started_at: datetime
    ended_at: datetime
    versions: dict[str, str]
    backups: list[dict[str, Any]]
    recovery_target: str | None
    reached: str | None
    objectives: list[ObjectiveCard]
    measured: list[Measured]
    steps: list[StepCard]
    probes: list[ProbeCard]
    checks: list[CheckCard]
    teardown: list[ResourceCard]
    answers: list[AnswerCard]
    findings: list[FindingCard]
    notes: list[str]
    forecast: Prediction | None
    stack: list[StackPart] = []
    plan_digest: str
    written_by: str
