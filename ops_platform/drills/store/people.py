"""What people decide and do in a drill: approvals of exactly one plan, and answers to the steps that wait for somebody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from psycopg.types.json import Jsonb

from ops_platform.drills.model import Drill, StepState
from ops_platform.drills.store.tables import Tables
from ops_platform.errors import ConflictError


@dataclass(frozen=True)
class Approval:
    """A person's decision on exactly one plan."""

    digest: str
    who: str
    at: datetime
    expires_at: datetime


@dataclass(frozen=True)
class Answer:
    """What a person did. `evidence`: names of files and their SHA-256."""

    step: str
    who: str
    at: datetime
    text: str
    evidence: Mapping[str, str]


class People(Tables):
    """Each with the ledger's entry that names who it was."""

    def approve(self, digest: str, subject: str, *, who: str, valid_for: timedelta) -> Approval:
        now = self.clock.now()
        made = Approval(digest, who, now, now + valid_for)
        with self.transaction() as t:
            t.connection.execute(
                "insert into ops_drills.approvals (digest, who, at, expires_at) values (%s, %s, %s, %s)",
                [digest, who, made.at, made.expires_at],
            )
            t.append("drill.approve", subject, {"digest": digest}, actor=who)
        return made

    def approvals(self, digest: str) -> list[Approval]:
        """Those of exactly this plan that still count."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select digest, who, at, expires_at from ops_drills.approvals where digest = %s and expires_at > %s order by id",
                [digest, self.clock.now()],
            ).fetchall()
        return [Approval(*row) for row in rows]

    def answer(self, drill: Drill, step: str, text: str, evidence: Mapping[str, str], *, who: str) -> Answer:
        """What a person did. Raises ConflictError where the drill is not waiting for it."""
        made = Answer(step, who, self.clock.now(), text, evidence)
        with self.transaction() as t:
            row = t.connection.execute(
                "select s.state from ops_drills.steps s join ops_drills.drills d on d.id = s.drill"
                " where s.drill = %s and s.step = %s and d.state <> 'ended' for update of s",
                [drill.id, step],
            ).fetchone()
            if row is None or row[0] != StepState.WAITING:
                raise ConflictError(
                    f"the drill is not waiting for the step {step!r}", where=drill.id,
                    remedy=f"ops drill show {drill.id} says what it waits for",
                )  # fmt: skip
            t.connection.execute(
                "insert into ops_drills.answers (drill, step, who, at, text, evidence) values (%s, %s, %s, %s, %s, %s)"
                " on conflict do nothing",
                [drill.id, step, who, made.at, text, Jsonb(dict(evidence))],
            )
            body = {"drill": drill.id, "step": step, "evidence": dict(evidence)}
            t.append("drill.answer", drill.subject, body, actor=who)
        return made

    def answers(self, drill_id: str) -> dict[str, Answer]:
        with self.transaction() as t:
            rows = t.connection.execute(
                "select step, who, at, text, evidence from ops_drills.answers where drill = %s order by at", [drill_id]
            ).fetchall()
        return {row[0]: Answer(*row) for row in rows}
