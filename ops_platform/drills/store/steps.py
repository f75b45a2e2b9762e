"""The steps of a drill: begun, ended, with what they said, checked and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from ops_platform.drills.model import Checked, Drill, Measured, StepRecord, StepState
from ops_platform.drills.store.drills import Drills
from ops_platform.errors import ConflictError

_STEP: LiteralString = "step, state, attempts, started_at, ended_at, said, facts, checks, measured"


class Steps(Drills):
    """Every change asks whether the drill is still its author's."""

    def steps(self, drill_id: str) -> dict[str, StepRecord]:
        with self.transaction() as t:
            rows = t.connection.execute(f"select {_STEP} from ops_drills.steps where drill = %s", [drill_id]).fetchall()
        return {row[0]: _step(row) for row in rows}

    def begin_step(self, drill: Drill, step: str, state: StepState = StepState.RUNNING) -> StepRecord:
        """An attempt begins; the step's clock runs from its first one. Raises ConflictError, AbortedError."""
        self.still_mine(drill)
        with self.transaction() as t:
            self._fenced(t, drill, "version = version")
            row = t.connection.execute(
                "update ops_drills.steps set state = %s, attempts = attempts + 1, started_at = coalesce(started_at, %s)"
                f" where drill = %s and step = %s and state in ('pending', 'running', 'waiting', 'failed') returning {_STEP}",
                [state, self.clock.now(), drill.id, step],
            ).fetchone()
        if row is None:
            raise ConflictError(f"the step {step} has ended already", where=drill.id)
        return _step(row)

    def end_step(
        self,
        drill: Drill,
        step: str,
        state: StepState,
        said: str,
        *,
        actor: str,
        facts: Mapping[str, Any] | None = None,
        checks: Sequence[Checked] = (),
        measured: Sequence[Measured] = (),
    ) -> None:
        """With the ledger's entry. Raises ConflictError where somebody else went on with the drill."""
        looked, took = [c.model_dump(mode="json") for c in checks], [m.model_dump(mode="json") for m in measured]
        with self.transaction() as t:
            self._fenced(t, drill, "version = version")
            t.connection.execute(
                "update ops_drills.steps set state = %s, ended_at = %s, said = %s, facts = %s, checks = %s, measured = %s"
                " where drill = %s and step = %s",
                [state, self.clock.now(), said, Jsonb(dict(facts or {})), Jsonb(looked), Jsonb(took), drill.id, step],
            )  # fmt: skip
            body = {"drill": drill.id, "step": step, "state": state.value, "said": said, "measured": took}
            t.append("drill.step", drill.subject, body, actor=actor)


def _step(row: Sequence[Any]) -> StepRecord:
    step, state, attempts, started, ended, said, facts, checks, measured = row
    return StepRecord(
        step, StepState(state), attempts, started, ended, said, facts,
        tuple(Checked.model_validate(c) for c in checks), tuple(Measured.model_validate(m) for m in measured),
    )  # fmt: skip
