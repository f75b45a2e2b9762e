"""Replication slots that nobody reads from any more, and that keep the server's WAL until its disk is full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.errors import AccessDeniedError, OpsError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import PositiveDuration, Size, format_duration
from ops_platform.remediation.playbook import Context
from ops_platform.remediation.playbooks.postgres.common import (
    PostgresAction,
    PostgresPlaybook,
    fits,
    need_roles,
    one,
    utc,
)

if TYPE_CHECKING:
    import psycopg


class DropSlotParameters(Strict):
    """Of `postgres.drop_inactive_slot`."""

    slots: Annotated[list[str], Field(min_length=1)] = Field(
        description="Patterns of slots that may be dropped at all, such as `debezium_*`."
    )
    never: list[str] = Field(default=[], description="Patterns of slots that are never dropped.")
    inactive_for: PositiveDuration = Field(
        default=timedelta(hours=24), description="Only slots that nobody has been connected to for at least this long."
    )
    retained_above: Size = Field(default=10 << 30, description="Only slots that keep more WAL than this.")
    before_17: Literal["refuse", "by_wal_age"] = Field(
        default="refuse",
        description="PostgreSQL up to 16 does not say since when a slot is inactive. by_wal_age takes the age of the WAL file at its "
        "position instead: for so long nobody has confirmed anything, which somebody who is connected and stuck does not either.",
    )
    at_most: Annotated[int, Field(ge=1, le=20)] = Field(
        default=1, description="So many in one plan, the largest first."
    )


@dataclass(frozen=True)
class Slot:
    """pg_replication_slots with what it keeps. `inactive`: seconds without a connection, None where nobody can say."""

    name: str
    kind: str
    plugin: str | None
    database: str | None
    active_pid: int | None
    temporary: bool
    restart_lsn: str | None
    confirmed_lsn: str | None
    wal_status: str | None
    retained: int | None
    inactive: float | None
    since: datetime | None
    synced: bool


# The age of a WAL file is that of its last byte. A file that is recycled in advance has a later name, so it is no danger.
_WAL_AGE = """(
  select extract(epoch from clock_timestamp() - w.modification)::float8 from pg_ls_waldir() w
  where w.name = pg_walfile_name(s.restart_lsn))"""
_SLOTS = """
select s.slot_name, s.slot_type, s.plugin, s.database, s.active_pid, s.temporary, s.restart_lsn::text, s.confirmed_flush_lsn::text,
  s.wal_status, pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint, {inactive}, {since}, {synced}
from pg_replication_slots s
"""


# No group hands REPLICATION on: what needs it is done as the role that logged in, also where that one sets another.
OURSELVES = "set role none"
_DROP = """
select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = %(name)s and active_pid is null
  and restart_lsn is not distinct from %(restart_lsn)s::pg_lsn
  and confirmed_flush_lsn is not distinct from %(confirmed_flush_lsn)s::pg_lsn
"""


class DropSlotAction(PostgresAction[DropSlotParameters]):
    name = "postgres.drop_inactive_slot"

    def plan(self) -> Plan:
        with self.session() as connection:
            need_roles(connection, {"pg_monitor": "to see the age of WAL files and which slots the standbys use"})
            slots, missing = self._look(connection), not_replicating(connection, self.target.connection.made_by)
        used, silent = self._used_by_standbys()
        reasons = {slot.name: self._why_not(slot, used, silent) for slot in slots}
        left = sorted((s for s in slots if reasons[s.name] is None), key=lambda s: (-(s.retained or 0), s.name))
        chosen = left[: self.parameters.at_most]
        facts: dict[str, Any] = {
            "slots": [_told(slot) for slot in chosen],
            "retained_bytes": sum(slot.retained or 0 for slot in chosen),
            "left_alone": {name: why for name, why in reasons.items() if why is not None}
            | {slot.name: "beyond at_most" for slot in left[self.parameters.at_most :]},
        }
        if missing is not None:
            facts["missing_right"] = missing.what
        return self.planned((_change(slot) for slot in chosen), {"slot": len(slots)}, facts)

    def check(self, change: Change) -> Applied | None:
        with self.session() as connection:
            need_roles(connection, {"pg_monitor": "to see the age of WAL files and which slots the standbys use"})
            if (missing := not_replicating(connection, self.target.connection.made_by)) is not None:
                raise missing
            slots = [slot for slot in self._look(connection) if slot.name == change.object]
        if not slots:
            return Applied(Outcome.ALREADY_DONE, "it is gone")
        used, silent = self._used_by_standbys()
        if why := self._why_not(slots[0], used, silent):
            return Applied(Outcome.CONTENDED, f"it is not any more what was planned: {why}")
        if _change(slots[0]) != change:
            return Applied(Outcome.CONTENDED, "it has moved, or is another one of the same name")
        return None

    def apply(self, change: Change) -> Applied:
        from psycopg import errors

        same, values = _DROP, {"name": change.object, **change.before}
        if change.before["inactive_since"] is not None:
            same += " and inactive_since = %(inactive_since)s"
        with self.session() as connection:
            connection.execute(OURSELVES)
            try:
                row = connection.execute(same.encode(), values).fetchone()
            except errors.ObjectInUse:
                row = None
            except errors.UndefinedObject:
                return Applied(Outcome.ALREADY_DONE, "it is gone")
        if row is None:
            return Applied(Outcome.CONTENDED, "somebody connected to it, or it moved, in this very moment")
        return Applied(Outcome.APPLIED, "dropped; the server removes the WAL at its next checkpoints")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        gone = [
            c
            for c in plan.changes
            if (a := outcomes.get(c.object)) and a.outcome in (Outcome.APPLIED, Outcome.ALREADY_DONE)
        ]
        with self.session() as connection:
            now = self._look(connection)
        same = [_change(slot) for slot in now]
        still = [change.object for change in gone if change in same]
        kept = max((slot.retained or 0 for slot in now), default=0)
        detail = "; ".join([f"{len(gone) - len(still)} of {len(gone)} gone", *(f"still there: {s}" for s in still)])
        return Verification(
            (Check("slots dropped", not still, f"{detail}; of the others the largest keeps {kept} bytes"),)
        )

    def _why_not(self, slot: Slot, used: set[str], silent: list[str]) -> str | None:
        """Why it is left alone; None where it may be dropped."""
        wanted = self.parameters
        cases: tuple[tuple[bool, str], ...] = (
            (slot.name == self.target.wal.slot, "the receiver's own"),
            (not fits(slot.name, wanted.slots) or fits(slot.name, wanted.never), "the rule does not allow it"),
            (slot.active_pid is not None, "somebody is connected to it"),
            (slot.temporary or slot.synced, "it belongs to a session, or is kept up by another server"),
            (slot.name in used, "a standby of the inventory is set to use it"),
            (
                slot.kind == "physical" and bool(silent),
                f"{', '.join(silent)} does not answer: it may be that standby's",
            ),
            (
                slot.retained is None or slot.retained <= wanted.retained_above,
                f"it keeps {slot.retained or 0} bytes of WAL",
            ),
            (slot.inactive is None, "nobody can say since when it is inactive (PostgreSQL 17 can; see before_17)"),
            (
                (slot.inactive or 0) < wanted.inactive_for.total_seconds(),
                f"inactive for {format_duration(timedelta(seconds=round(slot.inactive or 0)))}",
            ),
        )
        return next((why for applies, why in cases if applies), None)

    def _look(self, connection: psycopg.Connection[Any]) -> list[Slot]:
        if connection.info.server_version >= 170000:
            more = {
                "inactive": "extract(epoch from clock_timestamp() - s.inactive_since)::float8",
                "synced": "s.synced",
                "since": "s.inactive_since",
            }
        else:
            inactive = _WAL_AGE if self.parameters.before_17 == "by_wal_age" else "null"
            more = {"inactive": inactive, "synced": "false", "since": "null::timestamptz"}
        return [Slot(*row) for row in connection.execute(_SLOTS.format(**more).encode()).fetchall()]

    def _used_by_standbys(self) -> tuple[set[str], list[str]]:
        """The slots that standbys of the inventory are set to stream from, and the members that did not say."""
        used: set[str] = set()
        silent: list[str] = []
        for member in self.context.access.members(self.target):
            if member.error is None and not member.in_recovery:
                continue
            try:
                if member.error is not None:
                    silent.append(member.address)
                    continue
                with self.session(member=member) as connection:
                    need_roles(connection, {"pg_read_all_settings": "to see which slot a standby uses"})
                    used.add(one(connection, "select current_setting('primary_slot_name')"))
            except AccessDeniedError:
                raise
            except OpsError:
                silent.append(member.address)
        return used, silent


def not_replicating(connection: psycopg.Connection[Any], made_by: str | None) -> AccessDeniedError | None:
    """What keeps us from making and dropping slots once the session is `OURSELVES`. `made_by` as in `clients.postgres.Login`."""
    from ops_platform.clients.postgres import give_attribute

    if one(connection, "select rolreplication or rolsuper from pg_roles where rolname = session_user"):
        return None
    ours = one(connection, "select quote_ident(session_user)")
    return AccessDeniedError(
        f"the role {ours} is without REPLICATION, which is needed to make or drop a slot",
        remedy=give_attribute("REPLICATION", ours, made_by),
    )


def _change(slot: Slot) -> Change:
    before = {
        "type": slot.kind,
        "plugin": slot.plugin,
        "database": slot.database,
        "restart_lsn": slot.restart_lsn,
        "confirmed_flush_lsn": slot.confirmed_lsn,
        "inactive_since": utc(slot.since),
    }
    return Change("slot", slot.name, before, None, reversible=False)


def _told(slot: Slot) -> dict[str, Any]:
    return {
        "object": slot.name,
        "type": slot.kind,
        "database": slot.database,
        "retained_bytes": slot.retained,
        "wal_status": slot.wal_status,
        "inactive_seconds": None if slot.inactive is None else round(slot.inactive),
    }


class DropInactiveSlot(PostgresPlaybook[DropSlotParameters]):
    name = "postgres.drop_inactive_slot"
    title = "Drop an abandoned replication slot"
    what = (
        "Drops replication slots that the rule names by pattern, that nobody has been connected to for long, and that keep more WAL "
        "than they may. Never a slot somebody is connected to, the receiver's own, one that a standby of the inventory is set to use; "
        "while a member of the inventory does not answer, no physical slot at all."
    )
    why_safe = "Only a slot that the rule allows, that nobody reads, and that has not moved since the plan is dropped; PostgreSQL refuses an active one."
    blast_radius = (
        "Whoever owned the slot cannot go on where it was: a logical consumer needs a new snapshot, a standby a new base backup. "
        "At most `at_most` slots."
    )
    rights = ("CONNECT to the database of the inventory", "pg_monitor", "REPLICATION")
    Parameters = DropSlotParameters

    def action(self, context: Context[DropSlotParameters]) -> Action:
        return DropSlotAction(context)
