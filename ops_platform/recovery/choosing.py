"""Which backup a verification restores, and to which moment: what was asked for, or what the policy's turn picks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal

from ops_platform.backup.engine import span
from ops_platform.backup.model import BackupEngine, BackupInfo, BackupKind, Lsn, RecoveryTarget, RecoveryWindow
from ops_platform.errors import CorruptionError, UsageError
from ops_platform.recovery import records
from ops_platform.recovery.canary import SourceMoment

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target

Pick = Literal["newest", "oldest", "chain", "random"]


@dataclass(frozen=True)
class Choice:
    """What is restored, to which moment, and why this one."""

    backup: BackupInfo
    recovery: RecoveryTarget
    moment: datetime
    picked: str
    newest: bool = False  # to the moment at which the source was looked at, so that it is known as it was then


class Choosing:
    """The choice of one verification. `moment`: the source as it was looked at, None where it could not be."""

    def __init__(
        self,
        access: Access,
        target: Target,
        engine: BackupEngine,
        verification_id: str,
        moment: SourceMoment | None,
        *,
        pick: Pick | None,
        at: datetime | None,
        backup_id: str | None,
        alone: bool,
        notes: list[str],
    ) -> None:
        self.access, self.target, self.engine, self.id, self.moment = access, target, engine, verification_id, moment
        self.pick, self.at, self.backup_id, self.alone, self.notes = pick, at, backup_id, alone, notes
        self.turn: int | None = None  # known as soon as it was taken, whatever becomes of it

    def decide(self, backups: list[BackupInfo], window: RecoveryWindow) -> Choice:
        if self.backup_id is not None or self.at is not None:
            return self._asked(backups, window)
        if self.moment is None:
            return self._all_there_is(backups[-1], window)
        return self._by_policy(backups, window, self.moment)

    def _asked(self, backups: list[BackupInfo], window: RecoveryWindow) -> Choice:
        if self.backup_id is None and self.at is not None:
            recovery = RecoveryTarget("time", self.at)
            return Choice(self.engine.choose(recovery), recovery, self.at, "a moment that was asked for")
        found = [b for b in backups if b.backup_id == self.backup_id]
        if not found:
            raise UsageError(f"there is no backup {self.backup_id}", remedy=f"ops backup list {self.target.id}")
        if self.at is not None:
            return self._asked_both(found[0], RecoveryTarget("time", self.at), self.at)
        return self._soon_after(found[0], window, "asked for")

    def _asked_both(self, backup: BackupInfo, recovery: RecoveryTarget, moment: datetime) -> Choice:
        """A moment that this backup cannot reach is no verdict on it: it is refused before anything is restored."""
        until = self.engine.carried_until(backup, recovery)
        if until is None or not backup.ended_at <= moment <= until:
            reaches = "none: its own WAL is not whole" if until is None else span((backup.ended_at, until))
            raise UsageError(
                f"{moment.isoformat()} cannot be reached from {backup.backup_id}",
                where=self.target.id,
                remedy=f"moments that can be reached from it: {reaches}; without --backup the right one is chosen",
            )
        return Choice(backup, recovery, moment, "asked for")

    def _by_policy(self, backups: list[BackupInfo], window: RecoveryWindow, seen: SourceMoment) -> Choice:
        how = self.pick or self._turn()
        if how == "chain":
            chains = [b for b in backups if b.kind is BackupKind.INCREMENTAL]
            if chains:
                return self._to_now(chains[-1], window, "the newest incremental, with its chain")
            self.notes.append("there is no incremental backup: the newest one is restored instead of a chain")
        if how == "oldest" and len(backups) > 1:
            return self._soon_after(backups[0], window, "the oldest backup that is still promised")
        if how == "random" and window.pieces and seen.canary is not None and window.pieces[-1][0] < seen.at:
            # Up to the canary: after each such moment there is a commit, its second row's, and PostgreSQL stops only before one.
            begin, end = window.pieces[-1]
            moment = _by_chance(begin, min(end, seen.at), self.id, 0.02, 0.98)
            recovery = RecoveryTarget("time", moment)
            return Choice(self.engine.choose(recovery), recovery, moment, "a moment by chance in the recovery window")
        return self._to_now(backups[-1], window, "the newest backup")

    def _turn(self) -> Pick:
        """The next of the policy's list; noted even where the proof fails, so that it does not come again and again."""
        self.turn = records.next_turn(records.repository_of(self.access, self.target))
        order = self.target.backup.verification.pick
        return order[self.turn % len(order)]

    def _to_now(self, backup: BackupInfo, window: RecoveryWindow, why: str) -> Choice:
        """That backup, to the moment at which the source was looked at."""
        moment = self.moment
        if moment is None or moment.at <= backup.ended_at:
            return self._soon_after(backup, window, why)
        if moment.recovery.kind == "lsn" and Lsn.parse(str(moment.recovery.value)) < backup.end:
            # Nothing was written since the backup: its own end is the newest moment that there is.
            return Choice(backup, RecoveryTarget("immediate"), moment.at, why, newest=True)
        return Choice(backup, moment.recovery, moment.at, why, newest=True)

    def _all_there_is(self, backup: BackupInfo, window: RecoveryWindow) -> Choice:
        """Without the source: as far as the archive reaches, which is what a recovery in earnest would do now."""
        until = window.latest or backup.ended_at
        why = "with nothing but the repository" if self.alone else "because the source is away"
        return Choice(backup, RecoveryTarget("latest"), until, f"the newest backup and all WAL, {why}")

    def _soon_after(self, backup: BackupInfo, window: RecoveryWindow, why: str) -> Choice:
        """A moment by chance in the hour after the backup's end; its very end where no more WAL is at hand."""
        piece = next((p for p in window.pieces if p[0] <= backup.ended_at <= p[1]), None)
        if piece is None:
            raise CorruptionError(
                f"the WAL that {backup.backup_id} needs is not whole",
                where=self.target.id,
                remedy=f"ops wal status {self.target.id} names what is missing; take a new backup",
            )
        # In a piece that ends at a gap or long ago, nothing promises a commit after the moment, and PostgreSQL stops at one only then.
        last = piece == window.pieces[-1] and not window.gaps
        seen = self.moment if last and self.moment is not None and self.moment.canary is not None else None
        # What is promised is the canary's second row alone: the piece ends a little after it.
        end = min(piece[1], backup.ended_at + timedelta(hours=1), seen.at) if seen else backup.ended_at
        if end <= backup.ended_at:
            return Choice(backup, RecoveryTarget("immediate"), backup.ended_at, f"{why}, to its own end")
        moment = _by_chance(backup.ended_at, end, self.id, 0.3, 0.9)
        return Choice(backup, RecoveryTarget("time", moment), moment, why)


def _by_chance(begin: datetime, end: datetime, seed: str, least: float, most: float) -> datetime:
    """Uniform between these shares of the way."""
    return begin + (end - begin) * random.Random(seed).uniform(least, most)  # noqa: S311 - a choice that can be repeated
