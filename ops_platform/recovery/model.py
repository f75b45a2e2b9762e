"""The nouns of proof: gates, verdicts, the scorecard."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Verdict(StrEnum):
    PASS = "PASS"  # noqa: S105 - a verdict, not a password
    FAIL = "FAIL"
    COULD_NOT_VERIFY = "COULD_NOT_VERIFY"


class GateStatus(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    COULD_NOT_CHECK = "could_not_check"  # counts as COULD_NOT_VERIFY for the whole
    NOT_APPLICABLE = "not_applicable"  # with a reason: 17 has no such thing, the policy turns it off


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gate(Part):
    """One check: what was asked (SQL or command), what came back, what it means. `id` is stable, such as `canary`."""

    id: str
    title: str
    status: GateStatus
    query: str
    result: str
    detail: dict[str, Any] = {}
    seconds: float


class Step(Part):
    """A timed part of the verification: fetch, replay, checks … `started` seconds after the verification began."""

    name: str
    started: float
    seconds: float
    bytes: int | None = None


class Objective(Part):
    """A measured time against what was promised. `met` None: not measured."""

    name: str
    objective_seconds: float
    measured_seconds: float | None
    met: bool | None
    how: str

    @classmethod
    def judged(cls, name: str, promised: timedelta, measured: float | None, how: str) -> Self:
        seconds = promised.total_seconds()
        met = None if measured is None else measured <= seconds
        return cls(name=name, objective_seconds=seconds, measured_seconds=measured, met=met, how=how)


class Scorecard(Part):
    """The whole record of one verification. Times UTC. Contains no data of the target beyond counts and names of relations."""

    format: int = 1
    verification_id: str
    target_id: str
    environment: str
    classification: str
    engine: str
    verdict: Verdict
    reason: str
    started_at: datetime
    ended_at: datetime
    backup_id: str | None
    backup_kind: str | None
    backup_ended_at: datetime | None
    chain: list[str]
    picked: str
    turn: int | None = None  # the how-manieth proof whose backup was picked by turns; None where it was asked for
    recovery_target: str
    reached: str | None
    reached_lsn: str | None
    newest_commit: datetime | None
    server: str
    strength: str  # "canary" or "observed": without canary rows the proof is weaker
    objectives: list[Objective]  # rpo, rto, and rto-full: the estimate for the whole target
    steps: list[Step]
    gates: list[Gate]
    notes: list[str]
    backup_digest: str | None
    window_earliest: datetime | None
    window_latest: datetime | None
    written_by: str
