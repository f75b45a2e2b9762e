"""Drills: admitted, taken over, moved from state to state with the ledger's entry, and whether one is still ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, LiteralString

from psycopg.errors import UniqueViolation
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from ops_platform.actions import Ruling
from ops_platform.drills.model import Drill, DrillState, Ending, abort_told
from ops_platform.drills.store.schema import ADMISSION, SPACE
from ops_platform.drills.store.tables import Tables
from ops_platform.errors import ConflictError, NotThereError, OpsError
from ops_platform.ledger import LedgerTransaction

_DRILL: LiteralString = (
    "id, plan, runbook, body, body_sha256, subject, domain, environment, scenario, mode, parameters, objectives, operator, trigger,"
    " approved_by, digest, state, started_at, updated_at, version, ending, reason, abort, ended_at, verdict, card"
)
_SETTABLE = frozenset({"ending", "reason", "ended_at", "verdict", "card"})


class AbortedError(OpsError):
    """Somebody asked for the drill's end, or a condition of its runbook did."""


class Drills(Tables):
    """Every change asks for the version that its author holds: whoever was killed, or is late, changes nothing."""

    def admit(
        self, drill: Drill, steps: Sequence[str], rule_on: Callable[[Sequence[Drill]], list[Ruling]]
    ) -> list[Ruling]:
        """Claim the target and begin, atomically over all drills: `rule_on` judges by those that go on. Begun where all allow."""
        with self.transaction() as t:
            t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [SPACE, ADMISSION])
            rulings = rule_on(self._select(t, "state <> 'ended'"))
            if not all(ruling.allows for ruling in rulings):
                return rulings
            values = {
                **drill.__dict__,
                **{name: Jsonb(getattr(drill, name)) for name in ("body", "parameters", "objectives")},
                "abort": None, "card": None, "ending": None,
            }  # fmt: skip
            columns = _DRILL.split(", ")
            places = ", ".join(f"%({column})s" for column in columns)
            try:
                t.connection.execute(f"insert into ops_drills.drills ({_DRILL}) values ({places})", values)  # pyright: ignore[reportArgumentType] - our own columns
            except UniqueViolation:
                raise ConflictError(
                    "another drill holds this target or its failure domain", where=drill.subject
                ) from None
            with t.connection.cursor() as cursor:
                cursor.executemany(
                    "insert into ops_drills.steps (drill, step, state) values (%s, %s, 'pending')",
                    [(drill.id, step) for step in steps],
                )
            self._record(t, drill, "drill.begun", actor=drill.operator)
        return rulings

    def get(self, drill: str) -> Drill:
        """Raises NotThereError; a beginning that fits one alone is enough."""
        with self.transaction() as t:
            found = self._select(t, "starts_with(id, %s)", drill)
        exact = [one for one in found if one.id == drill]
        if len(found) > 1 and not exact:
            raise ConflictError(f"several drills begin with {drill!r}", remedy="write more of the id")
        if not found:
            raise NotThereError(f"there is no drill {drill!r}", remedy="ops drill list shows them")
        return (exact or found)[0]

    def list(
        self, *, subject: str | None = None, since: datetime | None = None, ended: bool | None = None, limit: int = 1000
    ) -> list[Drill]:
        """Oldest first; the newest `limit` of them."""
        with self.transaction() as t:
            found = self._select(
                t,
                "(%s::text is null or subject = %s) and (%s::timestamptz is null or started_at >= %s)"
                " and (%s::boolean is null or (state = 'ended') = %s)",
                subject, subject, since, since, ended, ended,
                order="started_at desc, id", limit=limit,
            )  # fmt: skip
        return found[::-1]

    def dead(self, *, lost_after: timedelta = timedelta(minutes=2)) -> list[Drill]:
        """Those that go on by their record, and on which nobody is at work: their workers were killed. One that waits for a person is not."""
        now = self.clock.now()
        with self.transaction() as t:
            held = self.ledger.claimed("'drill/' || d.id")
            rows = t.connection.execute(
                f"select d.id from ops_drills.drills d where d.state in ('running', 'ending') and not {held} and d.updated_at <= %s order by d.id",  # pyright: ignore[reportArgumentType] - constants alone
                [now - lost_after],
            ).fetchall()
            return [self._select(t, "id = %s", row[0])[0] for row in rows]

    def with_remains(self) -> list[Drill]:
        """Those that have ended, and left something that was to go."""
        with self.transaction() as t:
            return self._select(
                t,
                "state = 'ended' and exists (select from ops_drills.resources r where r.drill = ops_drills.drills.id"
                " and r.gone_at is null and not r.keep)",
            )

    def work_on(self, drill_id: str) -> contextlib.AbstractContextManager[bool]:
        """Whether this drill is ours alone, across machines, until the context ends."""
        return self.ledger.claim(f"drill/{drill_id}")

    def take_over(self, drill: Drill, *, actor: str) -> Drill:
        """Go on with it: from now on whoever still works on the older version changes nothing and makes nothing."""
        with self.transaction() as t:
            self._fenced(t, drill, "version = version + 1")
            t.append("drill.taken_over", drill.subject, {"drill": drill.id, "version": drill.version + 1}, actor=actor)
        return replace(drill, version=drill.version + 1)

    def move(self, drill: Drill, to: DrillState, *, actor: str, **fields: Any) -> Drill:
        """Change its state, with the ledger's entry. Raises ConflictError where somebody else went on with it."""
        if unknown := fields.keys() - _SETTABLE:
            raise TypeError(f"no such fields: {unknown}")
        moved = replace(drill, state=to, **fields)
        with self.transaction() as t:
            sets = "".join(f", {name} = %({name})s" for name in fields)
            values = {**fields, "card": Jsonb(fields["card"])} if fields.get("card") is not None else fields
            self._fenced(t, drill, f"state = %(to)s{sets}", {**values, "to": to})
            self._record(t, moved, f"drill.{to.value}", actor=actor)
        return moved

    def still_mine(self, drill: Drill) -> None:
        """Says that its worker lives. Raises ConflictError where somebody else went on with it, AbortedError where it is to end."""
        with self.transaction() as t:
            row = t.connection.execute(
                "update ops_drills.drills set updated_at = %s where id = %s and version = %s returning abort, state",
                [self.clock.now(), drill.id, drill.version],
            ).fetchone()
        if row is None:
            raise _moved_on(drill)
        if row[0] is not None and row[1] != DrillState.ENDING:
            raise AbortedError(abort_told(row[0]), where=drill.id)

    def abort(self, drill: Drill, why: str, *, who: str) -> bool:
        """Ask for its end; whoever works on it puts back what was broken. False: it ends or has ended already."""
        with self.transaction() as t:
            body = {"who": who, "why": why, "at": self.clock.now().isoformat()}
            done = t.connection.execute(
                "update ops_drills.drills set abort = %s where id = %s and abort is null and state in ('running', 'waiting')",
                [Jsonb(body), drill.id],
            )
            if done.rowcount:
                t.append("drill.abort", drill.subject, {"drill": drill.id, "why": why}, actor=who)
            return done.rowcount > 0

    def _fenced(self, t: LedgerTransaction, drill: Drill, sets: str, values: Mapping[str, Any] | None = None) -> None:
        done = t.connection.execute(
            f"update ops_drills.drills set {sets}, updated_at = %(now)s where id = %(id)s and version = %(held)s",  # pyright: ignore[reportArgumentType] - names of our own columns
            {**(values or {}), "now": self.clock.now(), "id": drill.id, "held": drill.version},
        )
        if done.rowcount != 1:
            raise _moved_on(drill)

    def _select(
        self, t: LedgerTransaction, where: LiteralString, *values: Any, order: LiteralString = "id", limit: int = 1000
    ) -> list[Drill]:
        with t.connection.cursor(row_factory=dict_row) as cursor:
            query = f"select {_DRILL} from ops_drills.drills where {where} order by {order} limit {int(limit)}"
            cursor.execute(query, values)  # pyright: ignore[reportArgumentType] - a number is put in
            return [_drill(row) for row in cursor]

    def _record(self, t: LedgerTransaction, drill: Drill, kind: str, *, actor: str) -> None:
        body: dict[str, Any] = {
            "drill": drill.id,
            "plan": drill.plan,
            "runbook": drill.runbook,
            "runbook_sha256": drill.body_sha256,
            "mode": drill.mode,
            "scenario": drill.scenario,
            "trigger": drill.trigger,
            "digest": drill.digest,
            "approved_by": drill.approved_by,
            "version": drill.version,
            "ending": drill.ending.value if drill.ending else None,
            "reason": drill.reason,
            "verdict": drill.verdict,
        }
        t.append(kind, drill.subject, body, actor=actor)


def _moved_on(drill: Drill) -> ConflictError:
    return ConflictError(
        f"the drill is not any more at version {drill.version}: somebody else went on with it", where=drill.id
    )


def _drill(row: Mapping[str, Any]) -> Drill:
    values: dict[str, Any] = {
        **row,
        "state": DrillState(row["state"]),
        "ending": Ending(row["ending"]) if row["ending"] else None,
    }
    return Drill(**values)
