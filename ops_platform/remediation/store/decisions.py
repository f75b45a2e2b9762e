"""What people decide: approvals of exactly one plan, and the switch that stops everything."""

from __future__ import annotations

from datetime import timedelta

from ops_platform.errors import ConflictError
from ops_platform.remediation.model import Approval, Incident, Pause, State
from ops_platform.remediation.store.tables import Tables, pause_of


class Decisions(Tables):
    """Approvals and the pause."""

    def decide(
        self, incident: Incident, digest: str, decision: str, *, who: str, via: str, valid_for: timedelta, why: str = ""
    ) -> Approval:
        """Approve or refuse exactly this plan; `why` stands in the ledger. Raises ConflictError where the incident is not waiting for it any more."""
        now = self.clock.now()
        with self.transaction() as t:
            row = t.connection.execute(
                "select state, digest from ops_remediation.incidents where id = %s for update", [incident.id]
            ).fetchone()
            if row is None or row[0] != State.WAITING:
                raise ConflictError(f"the incident is {row[0] if row else 'gone'}, and not waiting", where=incident.id)
            if row[1] != digest:
                raise ConflictError(
                    f"the plan is {str(row[1])[:12]} by now, and not {digest[:12]}", where=incident.id,
                    remedy=f"look again: ops incidents show {incident.id}",
                )  # fmt: skip
            t.connection.execute(
                "insert into ops_remediation.approvals (incident, digest, decision, who, via, at, expires_at)"
                " values (%s, %s, %s, %s, %s, %s, %s)",
                [incident.id, digest, decision, who, via, now, now + valid_for],
            )
            body = {"incident": incident.id, "digest": digest, "decision": decision, "via": via}
            if why:
                body["reason"] = why
            t.append(f"incident.{decision}", incident.subject, body, actor=who)
        return Approval(incident.id, digest, decision, who, via, now, now + valid_for)

    def decision(self, incident: Incident) -> Approval | None:
        """The newest decision on the plan that the incident waits with; None where it counts no more."""
        with self.transaction() as t:
            row = t.connection.execute(
                "select incident, digest, decision, who, via, at, expires_at from ops_remediation.approvals"
                " where incident = %s and digest = %s order by id desc limit 1",
                [incident.id, incident.digest],
            ).fetchone()
        found = Approval(*row) if row else None
        return found if found is not None and found.expires_at > self.clock.now() else None

    def void(self, incident: Incident) -> None:
        """Decisions on its plan that a guard did not accept count no more: another one is waited for."""
        with self.transaction() as t:
            now = self.clock.now()
            t.connection.execute(
                "update ops_remediation.approvals set expires_at = %s where incident = %s and digest = %s and expires_at > %s",
                [now, incident.id, incident.digest, now],
            )

    def pause(self, why: str, *, who: str) -> Pause:
        """Nothing is applied from now on. Idempotent."""
        with self.transaction() as t:
            if there := pause_of(t):
                return there
            pause = Pause(why, who, self.clock.now())
            t.connection.execute(
                "insert into ops_remediation.pauses (why, who, at) values (%s, %s, %s)", [why, who, pause.at]
            )
            t.append("remediation.pause", "remediation", {"why": why}, actor=who)
            return pause

    def resume(self, *, who: str) -> bool:
        """Whether there was a pause to be ended."""
        with self.transaction() as t:
            done = t.connection.execute(
                "update ops_remediation.pauses set ended_at = %s, ended_by = %s where ended_at is null",
                [self.clock.now(), who],
            )
            if done.rowcount:
                t.append("remediation.resume", "remediation", {}, actor=who)
            return done.rowcount > 0

    def paused(self) -> Pause | None:
        with self.transaction() as t:
            return pause_of(t)
