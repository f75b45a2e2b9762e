"""What was promised for a target, judged from the store: fresh, continuous, proven, RPO, RTO, copied.

Never from what the scheduler believes: a backup that a scheduler calls done and that is not in the store does not exist. An
answer that cannot be had is no kept promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from ops_platform.backup.engine import infos_of, open_engine
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.counting import against, duration
from ops_platform.errors import OpsError
from ops_platform.recovery import records

if TYPE_CHECKING:
    from ops_platform.backup.model import WalGap
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed


@dataclass(frozen=True)
class Kept:
    """Whether a promise is kept. `known` False: it could not be judged, which is never kept."""

    target_id: str
    kept: bool
    text: str
    numbers: dict[str, float] = field(default_factory=dict[str, float])
    known: bool = True


Promise = Callable[["Access", "Backed", datetime], Kept]
CLOCKS_APART = timedelta(minutes=5)


def _young(target: Backed, what: str, moment: datetime, allowed: timedelta, now: datetime, name: str) -> Kept:
    """Whether what happened at `moment` is young enough. From the future it comes by a wrong clock, and would stay young for ever."""
    age = now - moment
    numbers = {name: age.total_seconds()}
    if age < -CLOCKS_APART:
        text = f"{what} at {moment:%Y-%m-%d %H:%M} UTC, which lies in the future: a machine's clock is wrong"
        return Kept(target.id, False, text, numbers, known=False)
    text = f"{what} {_hours(age)} ago, {_hours(allowed)} are allowed"
    return Kept(target.id, age <= allowed, text, numbers)


def _hours(time: timedelta) -> str:
    hours = max(0.0, time.total_seconds() / 3600)
    return f"{hours:.1f}".removesuffix(".0") + " h"


def backup_fresh(access: Access, target: Backed, now: datetime) -> Kept:
    """The newest backup is not older than `backup.max_age`."""
    backups = [b for b in infos_of(access, target) if b.error is None]
    if not backups:
        return Kept(target.id, False, "there is no backup")
    newest = backups[-1]
    kept = _young(
        target, f"{newest.backup_id} ended", newest.ended_at, target.backup.max_age, now, "backup_age_seconds"
    )
    return replace(kept, numbers=kept.numbers | {"backups": float(len(backups))})


def wal_continuous(access: Access, target: Any, now: datetime) -> Kept:
    """Every moment from now on can be restored, and the archive is not further behind than `wal.max_lag`.

    A gap behind which a backup stands is named for as long as the archive shows it, because the moments in it cannot be restored;
    it keeps no later backup from its proof. Of PostgreSQL alone: see `promises_of`.
    """
    from ops_platform.backup.archive import archive_status
    from ops_platform.backup.continuity import open_gaps

    if target.repository.engine != "native":
        window = open_engine(access, target).window()
        holes = open_gaps(window.gaps)
        good = window.latest is not None and not holes
        text = f"restorable until {window.latest}{_mended(window.gaps)}" if good else "nothing can be restored"
        return Kept(target.id, good, _missing(holes) if holes else text, {"gaps": float(len(window.gaps))})
    status = archive_status(access, target)
    numbers = {"gaps": float(len(status.gaps)), "segments": float(status.segments)}
    if not status.continuous:
        return Kept(target.id, False, _missing(open_gaps(status.gaps)) or "no WAL is archived", numbers)
    if status.slot_error is not None or status.lag_bytes is None:
        return Kept(target.id, False, f"the server could not be asked: {status.slot_error}", numbers, known=False)
    numbers["lag_bytes"] = float(status.lag_bytes)
    if status.slot is None or status.slot.active_pid is None:
        return Kept(target.id, False, f"nobody receives WAL (slot {status.slot_name})", numbers)
    if status.lag_bytes and (status.server_time is None or status.until is None):
        return Kept(target.id, False, f"{status.lag_bytes} bytes behind, of unknown age", numbers, known=False)
    behind = (
        (status.server_time - status.until).total_seconds()
        if status.server_time and status.until and status.lag_bytes
        else 0.0
    )
    allowed = target.wal.max_lag.total_seconds()
    return Kept(
        target.id,
        behind <= allowed,
        f"whole up to {status.newest}, {duration(behind)} behind{_mended(status.gaps)}",
        numbers | {"lag_seconds": behind},
    )


def _missing(gaps: Sequence[WalGap]) -> str:
    holes = "; ".join(f"{gap.first} to {gap.last}" for gap in gaps)
    return f"WAL is missing: {holes}; take a full backup" if holes else ""


def _mended(gaps: Sequence[WalGap]) -> str:
    return "".join(
        f"; the moments of {gap.first} to {gap.last} are lost, whole again from {gap.recovery_again_from}"
        for gap in gaps
        if gap.recovery_again_from is not None
    )


def proven(access: Access, target: Backed, now: datetime) -> Kept:
    """A backup was restored and its data checked within `verification.proven_within`."""
    repository = records.repository_of(access, target)
    if repository is None:
        return Kept(target.id, False, "the target names no store for proofs", known=False)
    last = records.last_proof(repository.proofs())
    if last is None:
        return Kept(target.id, False, "no backup has ever been proven")
    allowed = target.backup.verification.proven_within
    return _young(target, f"{last.backup_id} was proven", last.verified_at, allowed, now, "proof_age_seconds")


def rpo_met(access: Access, target: Backed, now: datetime) -> Kept:
    """The newest verification measured less loss than the objective."""
    return _objective(access, target, "rpo", target.objectives.rpo.total_seconds())


def rto_met(access: Access, target: Backed, now: datetime) -> Kept:
    """The newest verification was faster than the objective, and so is the estimate for the worst moment."""
    measured = _objective(access, target, "rto", target.objectives.rto.total_seconds())
    estimated = _objective(access, target, "rto-full", target.objectives.rto.total_seconds(), needed=False)
    return Kept(
        target.id, measured.kept and estimated.kept, f"{measured.text}; estimate for the whole: {estimated.text}",
        measured.numbers | estimated.numbers, measured.known and estimated.known,
    )  # fmt: skip


def _objective(access: Access, target: Backed, name: str, allowed: float, *, needed: bool = True) -> Kept:
    repository = records.repository_of(access, target)
    cards = records.scorecards(repository, newest=1) if repository is not None else []
    if not cards:
        return Kept(target.id, False, "never measured", known=False)
    value = records.measured(cards[-1], name)
    if value is None:
        return Kept(target.id, not needed, "not measured by the newest verification", known=not needed)
    return Kept(target.id, value <= allowed, against(value, allowed), {f"{name}_seconds": value})


def copied(access: Access, target: Backed, now: datetime) -> Kept:
    """What each copy can restore is not older than its `max_lag`, judged from the copy alone.

    Without an archive that goes on between backups there is nothing younger than the newest backup, whose age is another promise.
    """
    from ops_platform.backup.replicate import standing

    found: list[Kept] = []
    between = timedelta() if target.kind == "postgresql" else target.backup.max_age
    for copy in target.repository.copies:
        until = standing(access, target, copy.id)
        if until is None:
            found.append(Kept(target.id, False, f"nothing can be restored from {copy.id}"))
        else:
            found.append(
                _young(target, f"{copy.id} holds all", until, copy.max_lag + between, now, f"{copy.id}_age_seconds")
            )
    numbers = {name: value for kept in found for name, value in kept.numbers.items()}
    text = "; ".join(kept.text for kept in found) or "no copy is declared"
    return Kept(target.id, all(kept.kept for kept in found), text, numbers, all(kept.known for kept in found))


PROMISES: dict[str, Promise] = {
    "backup_fresh": backup_fresh,
    "wal_continuous": wal_continuous,
    "proven": proven,
    "rpo_met": rpo_met,
    "rto_met": rto_met,
    "copied": copied,
}


STORE_PROMISES = ("backup_fresh", "proven", "rpo_met", "rto_met", "copied")
"""What is promised of a store that is not PostgreSQL: it has no archive between its backups that could have a gap."""


def promises_of(target: Backed) -> tuple[str, ...]:
    return tuple(PROMISES) if target.kind == "postgresql" else STORE_PROMISES


def judge(name: str, access: Access, target: Backed, clock: Clock = SYSTEM_CLOCK) -> Kept:
    """Never raises for what could not be asked: that is a promise of which nothing is known."""
    try:
        return PROMISES[name](access, target, clock.now())
    except OpsError as error:
        return Kept(target.id, False, str(error), known=False)
