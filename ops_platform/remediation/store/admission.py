"""The right to apply: what bounds actions is claimed here, one claim at a time over all incidents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from ops_platform.actions import Ruling
from ops_platform.remediation.claims import Claim
from ops_platform.remediation.model import Incident, State
from ops_platform.remediation.store.incidents import Incidents
from ops_platform.remediation.store.schema import ADMISSION, SPACE
from ops_platform.remediation.store.tables import pause_of


class Admission(Incidents):
    """Claims of cooldown, budgets, circuit breaker and failure domains; `claims` in the room above judges them."""

    def admit(
        self, incident: Incident, claim: Claim, rule_on: Callable[[Sequence[Claim], datetime], list[Ruling]],
        *, since: datetime, actor: str, **fields: Any,
    ) -> tuple[list[Ruling], Incident | None]:  # fmt: skip
        """Claim the right to apply, atomically over all incidents: `rule_on` judges by all claims since `since` and all that go on.

        With the claim the incident is APPLYING. A claim that this very attempt holds already counts as held.
        """
        with self.transaction() as t:
            t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [SPACE, ADMISSION])
            if pause := pause_of(t):
                return [Ruling("pause", False, f"everything is paused by {pause.who}: {pause.why}")], None
            rows = t.connection.execute(
                "select incident, attempt, rule, subject, domain, playbook, at, ended_at, helped from ops_remediation.claims"
                " where (at >= %s or ended_at is null) and (incident, attempt) <> (%s, %s) order by at",
                [since, claim.incident, claim.attempt],
            ).fetchall()
            rulings = rule_on([Claim(*row) for row in rows], claim.at)
            if not all(ruling.allows for ruling in rulings):
                return rulings, None
            t.connection.execute(
                "insert into ops_remediation.claims (incident, attempt, rule, subject, domain, playbook, at)"
                " values (%s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
                [claim.incident, claim.attempt, claim.rule, claim.subject, claim.domain, claim.playbook, claim.at],
            )
            reason = f"attempt {claim.attempt} of {claim.playbook}"
            # What an attempt left standing is undone with the newest one's, if it comes to that.
            earlier = (*incident.earlier, incident.outcomes) if incident.outcomes else incident.earlier
            moved = self._move(
                t, incident, State.APPLYING, reason, actor=actor, attempts=claim.attempt, outcomes=[], earlier=earlier,
                **fields,
            )  # fmt: skip
            return rulings, moved

    def claims(self, since: datetime) -> list[Claim]:
        """For looking: those since `since`, and those that go on."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select incident, attempt, rule, subject, domain, playbook, at, ended_at, helped from ops_remediation.claims"
                " where at >= %s or ended_at is null order by at",
                [since],
            ).fetchall()
        return [Claim(*row) for row in rows]

    def end_claim(self, incident: Incident, *, helped: bool | None, free: bool = True) -> None:
        """`helped` None: it is not known, or nothing was tried. Without `free` the failure domain is kept, for the undo."""
        with self.transaction() as t:
            t.connection.execute(
                "update ops_remediation.claims set ended_at = %s, helped = %s where incident = %s and ended_at is null",
                [self.clock.now() if free else None, helped, incident.id],
            )

    def claim_again(self, incident: Incident) -> bool:
        """For an undo: whether the failure domain of what was applied is ours again. It ends with the incident, as every claim does."""
        with self.transaction() as t:
            t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [SPACE, ADMISSION])
            busy = t.connection.execute(
                "select from ops_remediation.claims mine join ops_remediation.claims other using (domain)"
                " where mine.incident = %s and other.incident <> mine.incident and other.ended_at is null limit 1",
                [incident.id],
            ).fetchone()
            if busy is None:
                t.connection.execute(
                    "update ops_remediation.claims set ended_at = null where incident = %s and attempt = %s",
                    [incident.id, incident.attempts],
                )
            return busy is None
