"""The archive lost its thread: the receiver's slot is gone or lost, so WAL is missing for good.

What is lost stays lost. What can be done is to hold on to the WAL from now on, and to take a full backup that needs none of what is
missing, so that restoring works again from its end. A receiver that runs takes the new slot up by itself, and notes the gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.backup.archive import ArchiveStatus, archive_status, slot_state
from ops_platform.backup.durable import holds
from ops_platform.backup.model import BackupKind, Lsn
from ops_platform.backup.opening import open_target_repository
from ops_platform.errors import AccessDeniedError, ConflictError, UnreachableError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Size
from ops_platform.remediation.playbook import Context
from ops_platform.remediation.playbooks.postgres.common import PostgresAction, PostgresPlaybook, need_roles, refused
from ops_platform.remediation.playbooks.postgres.slots import OURSELVES, not_replicating

BACKUP = "full backup"


class RebuildArchiveParameters(Strict):
    """Of `postgres.rebuild_wal_archive`."""

    give_up_lag_above: Size | None = Field(
        default=None,
        description="Also give up a slot that is whole, that nobody reads from, and that keeps more WAL than this: the disk is "
        "saved, and what was not archived is lost. Never where not given.",
    )


@dataclass(frozen=True)
class _Found:
    """The archive, what is wrong with the slot (None: nothing), and whether nothing can be restored from behind a gap."""

    status: ArchiveStatus
    slot_fault: str | None
    needs_backup: bool
    newest_backup: str | None


class RebuildArchiveAction(PostgresAction[RebuildArchiveParameters]):
    name = "postgres.rebuild_wal_archive"

    def plan(self) -> Plan:
        missing = self._rights()
        found = self._look()
        slot, status = found.status.slot, found.status
        changes: list[Change] = []
        if found.slot_fault is not None:
            before = None if slot is None else {"restart_lsn": _text(slot.restart_lsn), "wal_status": slot.wal_status}
            changes.append(
                Change("slot", f"slot {status.slot_name}", before, {"holds": "WAL from now on"}, reversible=False)
            )
        if found.needs_backup or found.slot_fault is not None:
            changes.append(
                Change("backup", BACKUP, {"newest": found.newest_backup}, {"kind": "full"}, reversible=False)
            )
        facts: dict[str, Any] = {
            "slot": found.slot_fault or "whole",
            "archived_until": _text(status.newest),
            "archived_until_time": status.until.isoformat() if status.until else None,
            "server_at": _text(status.server_lsn),
            "lag_bytes": status.lag_bytes,
            "retained_bytes": slot.retained if slot else None,
            "gaps": [f"timeline {g.timeline}: {g.first} to {g.last}" for g in status.gaps],
        }
        if changes:
            facts["lost"] = (
                f"no moment between {facts['archived_until_time'] or 'the beginning'} and the end of the new backup can be restored"
            )
        if missing is not None:
            facts["missing_right"] = missing.what
        return self.planned(changes, {"slot": 1, "backup": 1}, facts)

    def check(self, change: Change) -> Applied | None:
        if (missing := self._rights()) is not None:
            raise missing
        found = self._look()
        if change.kind == "backup":
            if found.slot_fault is not None:
                return Applied(Outcome.REFUSED, f"the slot is not whole: {found.slot_fault}")
            return (
                None
                if found.needs_backup
                else Applied(Outcome.ALREADY_DONE, f"{found.newest_backup} is behind every gap")
            )
        slot = found.status.slot
        if found.slot_fault is None:
            return Applied(Outcome.ALREADY_DONE, "it is whole, or somebody reads from it")
        before = None if slot is None else {"restart_lsn": _text(slot.restart_lsn), "wal_status": slot.wal_status}
        return Applied(Outcome.CONTENDED, "it is not any more what was planned") if before != change.before else None

    def apply(self, change: Change) -> Applied:
        return self._make_slot(change) if change.kind == "slot" else self._take_backup()

    def _make_slot(self, change: Change) -> Applied:
        """Drop and make in one statement: a client that is killed in between does not leave it half done."""
        from psycopg import errors

        name = self.target.wal.slot
        query = "select pg_create_physical_replication_slot(%s, true)"
        values: list[Any] = [name]
        if change.before is not None:
            query = (
                "select pg_drop_replication_slot(slot_name), pg_create_physical_replication_slot(slot_name, true)"
                " from pg_replication_slots where slot_name = %s and active_pid is null and restart_lsn is not distinct from %s::pg_lsn"
            )
            values.append(change.before["restart_lsn"])
        with self.session() as connection:
            connection.execute(OURSELVES)
            try:
                row = connection.execute(query.encode(), values).fetchone()
            except (errors.ObjectInUse, errors.DuplicateObject):
                row = None
        if row is None:
            return Applied(Outcome.CONTENDED, "a receiver took it up in this very moment")
        return Applied(Outcome.APPLIED, "made anew: the server keeps its WAL from now on")

    def _take_backup(self) -> Applied:
        from ops_platform.backup.basebackup import run_backup

        try:
            manifest = run_backup(self.context.access, self.target, kind="full", clock=self.context.clock)
        except ConflictError as error:
            return Applied(Outcome.CONTENDED, str(error))
        return Applied(
            Outcome.APPLIED,
            f"{manifest.backup_id} was taken: restoring works again from its end on",
            {"backup_id": manifest.backup_id, "start_lsn": manifest.start_lsn, "end_lsn": manifest.end_lsn},
        )

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """The server is asked for the slot, the store for the backup, its WAL, and for what is behind every gap."""
        done = {name for name, a in outcomes.items() if a.outcome in (Outcome.APPLIED, Outcome.ALREADY_DONE)}
        checks: list[Check] = []
        if any(change.kind == "slot" and change.object in done for change in plan.changes):
            checks.append(self._slot_stands())
        if BACKUP in done:
            if backup_id := outcomes[BACKUP].detail.get("backup_id"):
                checks.append(self._backup_stands(backup_id))
            checks.append(self._nothing_is_behind_a_gap())
        return Verification(tuple(checks) or (Check("archive", True, "nothing was changed"),))

    def _slot_stands(self) -> Check:
        slot = slot_state(self.context.access, self.target)
        if slot is None or slot.restart_lsn is None:
            return Check("slot", False, "it is not there, or holds nothing")
        streaming = (
            f"process {slot.active_pid} streams from it" if slot.active_pid else "no receiver is connected to it"
        )
        return Check(
            "slot",
            slot.wal_status in ("reserved", "extended"),
            f"{slot.wal_status}, from {slot.restart_lsn}; {streaming}",
        )

    def _backup_stands(self, backup_id: str) -> Check:
        repository = open_target_repository(self.context.access, self.target)
        manifest = repository.manifest(backup_id)
        whole = holds(
            repository, manifest.end, manifest.system_identifier, since=manifest.start, timeline=manifest.timeline
        )
        detail = f"{backup_id}, its WAL {manifest.start_lsn} to {manifest.end_lsn} {'is archived' if whole else 'is NOT archived'}"
        return Check("backup", whole and manifest.kind is BackupKind.FULL, detail)

    def _nothing_is_behind_a_gap(self) -> Check:
        found = self._look()
        said = "; ".join(f"{g.first} to {g.last}: again from {g.recovery_again_from}" for g in found.status.gaps)
        return Check("gaps", not found.needs_backup, said or "none")

    # Looking

    def _look(self) -> _Found:
        status = archive_status(self.context.access, self.target)
        if status.slot_error is not None:
            raise UnreachableError(
                f"the server cannot be asked for its slot: {status.slot_error}", where=self.target_id
            )
        if status.slot is not None and status.slot.kind != "physical":
            raise refused(
                f"the slot {status.slot_name} is a {status.slot.kind} one: somebody else's",
                self.target, f"name another under targets.{self.target_id}.wal.slot",
            )  # fmt: skip
        backups = [
            backup
            for backup in open_target_repository(self.context.access, self.target).infos()
            if backup.error is None and backup.system_identifier == self._system_identifier()
        ]
        again = self._again_from(status)
        reaching = [backup for backup in backups if again is None or backup.end >= again]
        needs = not reaching or any(gap.recovery_again_from is None for gap in status.gaps)
        newest = max(backups, key=lambda backup: backup.ended_at, default=None)
        return _Found(status, self._slot_fault(status), needs, newest.backup_id if newest else None)

    def _slot_fault(self, status: ArchiveStatus) -> str | None:
        slot, limit = status.slot, self.parameters.give_up_lag_above
        if slot is None:
            return "missing"
        if slot.active_pid is not None:
            return None
        if slot.wal_status == "lost" or slot.restart_lsn is None:
            return "lost: the server removed WAL that was not archived"
        if limit is not None and (slot.retained or 0) > limit:
            return f"it keeps {slot.retained} bytes of WAL, and nobody reads from it"
        return None

    def _again_from(self, status: ArchiveStatus) -> Lsn | None:
        """Where the slot begins, if that is behind what is archived: what lies between nobody keeps."""
        slot = status.slot
        if slot is None or slot.restart_lsn is None:
            return None
        begin = Lsn(slot.restart_lsn - slot.restart_lsn % status.segment_size)
        return begin if status.newest is None or begin > status.newest else None

    def _system_identifier(self) -> int | None:
        return self.context.access.member(self.target, "primary").system_identifier

    def _rights(self) -> AccessDeniedError | None:
        with self.session() as connection:
            need_roles(connection, {"pg_monitor": "to see slots and receivers"})
            return not_replicating(connection, self.target.connection.made_by)


def _text(lsn: Lsn | None) -> str | None:
    return None if lsn is None else str(lsn)


class RebuildWalArchive(PostgresPlaybook[RebuildArchiveParameters]):
    name = "postgres.rebuild_wal_archive"
    title = "Rebuild the WAL archive after a loss"
    what = (
        "Makes the receiver's slot anew where it is missing or lost (or, where the rule says so, keeps too much WAL), and takes a full "
        "backup, so that restoring works again from its end on. The plan names what cannot be restored any more. "
        "With a whole slot and a backup behind every gap it does nothing."
    )
    why_safe = "A slot that anybody reads from is never touched, and a backup only reads; what is lost was lost before."
    blast_radius = (
        "Reading of the whole cluster and one WAL sender while the backup is taken. With `give_up_lag_above` the WAL that was not "
        "archived yet is lost."
    )
    rights = ("CONNECT to the database of the inventory", "pg_monitor", "REPLICATION, and a line for it in pg_hba.conf")
    Parameters = RebuildArchiveParameters

    def action(self, context: Context[RebuildArchiveParameters]) -> Action:
        return RebuildArchiveAction(context)
