"""What drills found wrong: opened, counted while it stays, gone when a drill shows that it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from ops_platform.drills.model import Drill, Finding, FindingState, finding_id
from ops_platform.drills.store.tables import Tables
from ops_platform.errors import NotThereError
from ops_platform.ledger import LedgerTransaction

_FINDING: LiteralString = "id, key, drill, plan, subject, runbook, title, detail, owner, due, state, opened_at, seen, last_drill, note, closed_at, closed_by"


@dataclass(frozen=True)
class Wrong:
    """Something that a drill found wrong, before it is a finding."""

    key: str
    title: str
    detail: str


class Findings(Tables):
    """One open finding for each key."""

    def found(
        self, drill: Drill, wrong: Sequence[Wrong], sound: Sequence[str], *, owner: str, due: datetime, actor: str
    ) -> list[tuple[Finding, bool]]:
        """Open a finding for each that is wrong, or count it where it is open already; those whose key was sound are gone.

        The findings that are open because of this drill, with whether each is new.
        """
        now, made = self.clock.now(), list[tuple[Finding, bool]]()
        with self.transaction() as t:
            for one in wrong:
                row = t.connection.execute(
                    f"update ops_drills.findings set seen = seen + (last_drill <> %s)::int, last_drill = %s, detail = %s"
                    f" where key = %s and state = 'open' returning {_FINDING}",
                    [drill.id, drill.id, one.detail, one.key],
                ).fetchone()
                if row is not None:
                    made.append((_finding(row), False))
                    continue
                finding = Finding(
                    finding_id(one.key, drill.id), one.key, drill.id, drill.plan, drill.subject, drill.runbook, one.title, one.detail,
                    owner, due, FindingState.OPEN, now, 1, drill.id,
                )  # fmt: skip
                columns = _FINDING.split(", ")
                places = ", ".join(f"%({column})s" for column in columns)
                t.connection.execute(
                    f"insert into ops_drills.findings ({_FINDING}) values ({places})", finding.__dict__
                )  # pyright: ignore[reportArgumentType] - our own columns
                self._told(t, "drill.finding", finding, actor)
                made.append((finding, True))
            rows = t.connection.execute(
                "update ops_drills.findings set state = 'gone', closed_at = %s, closed_by = %s where key = any(%s) and state = 'open'"
                f" returning {_FINDING}",
                [now, drill.id, list(sound)],
            ).fetchall()
            for row in rows:
                self._told(t, "drill.finding_gone", _finding(row), actor)
        return made

    def _told(self, t: LedgerTransaction, kind: str, finding: Finding, actor: str) -> None:
        body = {
            "finding": finding.id,
            "drill": finding.last_drill,
            "title": finding.title,
            "owner": finding.owner,
            "due": finding.due.isoformat(),
            "closed_by": finding.closed_by,
        }
        t.append(kind, finding.subject, body, actor=actor)

    def findings(self, *, all_: bool = False, subject: str | None = None) -> list[Finding]:
        """The open ones, the most urgent first; or all."""
        with self.transaction() as t:
            rows = t.connection.execute(
                f"select {_FINDING} from ops_drills.findings where (%s or state = 'open') and (%s::text is null or subject = %s)"
                " order by state, due, id",
                [all_, subject, subject],
            ).fetchall()
        return [_finding(row) for row in rows]

    def assign(self, finding: str, *, owner: str | None, due: datetime | None, note: str | None, actor: str) -> Finding:
        """Change who deals with it and until when. Raises NotThereError. It goes only when a drill shows that it is gone."""
        with self.transaction() as t:
            row = t.connection.execute(
                "update ops_drills.findings set owner = coalesce(%s, owner), due = coalesce(%s, due), note = coalesce(%s, note)"
                f" where id = %s returning {_FINDING}",
                [owner, due, note, finding],
            ).fetchone()
            if row is None:
                raise NotThereError(f"there is no finding {finding!r}", remedy="ops drill findings --all shows them")
            found = _finding(row)
            self._told(t, "drill.finding_assigned", found, actor)
        return found


def _finding(row: Sequence[Any]) -> Finding:
    values: dict[str, Any] = dict(zip(_FINDING.split(", "), row, strict=True))
    values["state"] = FindingState(values["state"])
    return Finding(**values)
