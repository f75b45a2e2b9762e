"""The native repository behind the `BackupEngine` protocol."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ops_platform.backup.archive import read_archive
from ops_platform.backup.continuity import Archive, Reach, gaps, reach, recovery_window
from ops_platform.backup.fetch import Owner, check_empty, combine, fetch_backup
from ops_platform.backup.model import (
    BackupEngine,
    BackupInfo,
    Lsn,
    Manifest,
    Progress,
    RecoveryTarget,
    RecoveryWindow,
    RestoredBase,
    no_progress,
)
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository
from ops_platform.backup.wal import floor
from ops_platform.backup.walfetch import WalFetchAhead
from ops_platform.clients.postgres_binaries import need_postgres, run_as
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import CouldNotVerifyError, UsageError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target
    from ops_platform.inventory.model import Backed


def open_engine(access: Access, target: Target, *, clock: Clock = SYSTEM_CLOCK) -> BackupEngine:
    """The engine that the inventory names for the target."""
    if target.repository.engine == "pgbackrest":
        from ops_platform.backup.pgbackrest import PgBackRestEngine

        return PgBackRestEngine(target, clock=clock)
    return NativeEngine(open_target_repository(access, target), target, clock=clock)


def infos_of(access: Access, target: Backed) -> list[BackupInfo]:
    """Every backup of a target or another store, oldest first. Raises where the store cannot be asked."""
    from ops_platform.inventory.model import Target

    if isinstance(target, Target):
        return open_engine(access, target).list()
    return open_target_repository(access, target).infos()


def catalog(access: Access, target: Backed, *, clock: Clock = SYSTEM_CLOCK) -> tuple[list[BackupInfo], RecoveryWindow]:
    """The same with the moments that can be restored: of a store that is not PostgreSQL those of its backups."""
    from ops_platform.inventory.model import Target

    infos = infos_of(access, target)
    if isinstance(target, Target):
        return infos, open_engine(access, target, clock=clock).window()
    moments = [info.started_at for info in infos if info.error is None]
    if not moments:
        return infos, RecoveryWindow(None, None, [], [])
    return infos, RecoveryWindow(moments[0], moments[-1], [(moment, moment) for moment in moments], [])


def span(moments: tuple[datetime, datetime]) -> str:
    return f"{moments[0]:%Y-%m-%d %H:%M:%S} to {moments[1]:%Y-%m-%d %H:%M:%S} UTC"


def _holes(window: RecoveryWindow) -> str:
    return "".join(
        f"; missing WAL {gap.first} to {gap.last}, "
        + (f"whole again from {gap.recovery_again_from}" if gap.recovery_again_from else "no backup begins after it")
        for gap in window.gaps
    )


def _reaches(
    archive: Archive, backups: Sequence[BackupInfo], timeline: int | Literal["latest", "current"]
) -> list[tuple[BackupInfo, Reach]]:
    """The backups of the archive's cluster from which that timeline can be followed, and how far each comes."""
    mine = [backup for backup in backups if backup.system_identifier == archive.system_identifier]
    return [(backup, found) for backup in mine if (found := reach(archive, backup, timeline)) is not None]


class NativeEngine:
    def __init__(self, repository: Repository, target: Target, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.repository = repository
        self.target = target
        self._clock = clock

    @property
    def name(self) -> str:
        return "native"

    def list(self) -> list[BackupInfo]:
        return self.repository.infos()

    def window(self) -> RecoveryWindow:
        return self._window(self.list(), read_archive(self.repository))

    def _window(self, backups: list[BackupInfo], archive: Archive | None) -> RecoveryWindow:
        if archive is None:
            return RecoveryWindow(None, None, [], [])
        mine = [backup for backup in backups if backup.system_identifier == archive.system_identifier]
        return recovery_window(mine, archive.ranges, archive.lines, archive.segment_size, gaps(archive))

    def choose(self, target: RecoveryTarget) -> BackupInfo:
        archive = read_archive(self.repository)
        backups = [backup for backup in self.list() if backup.error is None]
        window = self._window(backups, archive)
        if archive is None or window.earliest is None:
            raise UsageError(
                f"nothing of {self.target.id} can be restored: "
                + ("the WAL of no backup is whole" if backups else "there is no backup"),
                remedy=f"ops backup run {self.target.id}; ops wal status {self.target.id}",
            )
        reaches = _reaches(archive, backups, target.timeline)
        if target.kind == "time" and isinstance(target.value, datetime):
            moment = target.value
            found = [b for b, far in reaches if b.ended_at <= moment <= max(b.ended_at, far.until)]
            return found[-1] if found else self._no_such_time(archive, backups, window, moment)
        if not reaches:
            raise UsageError(
                f"no backup of {self.target.id} lies on timeline {target.timeline}",
                remedy=f"name one of these with --timeline: {', '.join(map(str, sorted(archive.lines)))}",
            )
        end = max(far.end for _, far in reaches)
        if target.kind == "lsn":
            wanted = Lsn.parse(str(target.value))
            found = [b for b, far in reaches if b.end <= wanted <= far.end]
            return found[-1] if found else self._no_such_position(wanted, [b for b, _ in reaches], window, end)
        if target.kind in ("xid", "name"):
            # It may lie anywhere: of the backups whose WAL leads to the end without a hole, the oldest has the most of it behind.
            return next(b for b, far in reaches if far.end == end)
        return reaches[-1][0]

    def carried_until(self, backup: BackupInfo, target: RecoveryTarget) -> datetime | None:
        way = self._way(backup, target)
        return max(backup.ended_at, way[1].until) if way else None

    def last_segment(self, backup: BackupInfo, target: RecoveryTarget) -> Lsn | None:
        if target.kind not in ("time", "lsn"):
            return None  # and the archive is not listed for it: a restore to the latest moment is in a hurry
        way = self._way(backup, target)
        return floor(way[1].end - 1, way[0].segment_size) if way else None

    def _way(self, backup: BackupInfo, target: RecoveryTarget) -> tuple[Archive, Reach] | None:
        archive = read_archive(self.repository)
        reaches = _reaches(archive, [backup], target.timeline) if archive else []
        return (archive, reaches[0][1]) if archive and reaches else None

    def _no_such_time(
        self, archive: Archive, backups: list[BackupInfo], window: RecoveryWindow, moment: datetime
    ) -> BackupInfo:
        """Raises the UsageError that says what there is instead."""
        if moment > self._clock.now():
            raise UsageError(
                f"{moment.isoformat()} lies in the future", remedy=f"the window: {'; '.join(map(span, window.pieces))}"
            )
        elsewhere = [
            number
            for number in sorted(archive.lines)
            if any(b.ended_at <= moment <= far.until for b, far in _reaches(archive, backups, number))
        ]
        if elsewhere:
            raise UsageError(
                f"{moment.isoformat()} does not lie on the timeline that is followed",
                where=self.target.id,
                remedy=f"it lies on timeline {', '.join(map(str, elsewhere))}: name one with --timeline",
            )
        newer = window.latest is not None and moment > window.latest
        soon = "; newer moments follow when the WAL after them is archived" if newer else ""
        raise UsageError(
            f"{moment.isoformat()} lies outside of what can be restored",
            where=self.target.id,
            remedy=f"the recovery window: {'; '.join(map(span, window.pieces))}{_holes(window)}{soon}",
        )

    def _no_such_position(self, wanted: Lsn, backups: list[BackupInfo], window: RecoveryWindow, end: Lsn) -> BackupInfo:
        before = f"{wanted} lies before the end of the oldest backup ({backups[0].end})"
        beyond = f"{wanted} cannot be reached: the archive is whole up to {end}"
        raise UsageError(
            before if wanted < backups[0].end else beyond,
            where=self.target.id,
            remedy=f"the recovery window: {'; '.join(map(span, window.pieces))}{_holes(window)}",
        )

    def fetch_base(
        self,
        backup: BackupInfo,
        into: Path,
        *,
        tablespaces: dict[str, Path] | None = None,
        progress: Progress = no_progress,
    ) -> RestoredBase:
        began, user = time.monotonic(), run_as()
        owner = Owner(user.uid, user.gid) if user.popen else None
        chain = self.repository.chain(backup.backup_id)
        if len(chain) == 1:
            spaces = fetch_backup(
                self.repository, chain[0], into, tablespaces=tablespaces, owner=owner, progress=progress
            )
        else:
            spaces = self._fetch_chain(chain, into, tablespaces or {}, owner, progress)
        return RestoredBase(into, spaces, sum(manifest.raw for manifest in chain), time.monotonic() - began)

    def _fetch_chain(
        self, chain: list[Manifest], into: Path, tablespaces: dict[str, Path], owner: Owner | None, progress: Progress
    ) -> dict[int, Path]:
        """Each backup of the chain beside the target directory, then combined, and moved there as a whole."""
        locations = {a.oid: a.location or "" for a in chain[-1].archives if a.oid is not None}
        final = {oid: tablespaces.get(location) or Path(location) for oid, location in locations.items()}
        parts = into.with_name(f".{into.name}.parts")
        combining = parts / "combining"
        check_empty(into, into)  # before all else: once it stands there, nothing of it is cleared away
        if not _clear_unfinished(combining, chain[-1].backup_id, final):
            for root in final.values():
                check_empty(into, root)
        install = need_postgres(chain[-1].major, self.target.sandbox.postgres.values())
        program = install.tool("pg_combinebackup")
        if program is None:
            raise CouldNotVerifyError(
                f"the PostgreSQL {chain[-1].major} found at {install.bindir} has no pg_combinebackup",
                remedy=f"install postgresql-client-{chain[-1].major}, or name its bin directory under sandbox.postgres",
            )
        parts.mkdir(parents=True, exist_ok=True)
        parts.chmod(0o755)
        places: list[dict[int, Path]] = []
        for manifest in chain:
            mapped = {
                a.location or "": parts / f"{manifest.backup_id}.ts{a.oid}"
                for a in manifest.archives
                if a.oid is not None
            }
            if (parts / manifest.backup_id / "PG_VERSION").exists() and not (
                parts / manifest.backup_id / ".ops_restore"
            ).exists():
                places.append({a.oid: mapped[a.location or ""] for a in manifest.archives if a.oid is not None})
                continue
            places.append(
                fetch_backup(
                    self.repository,
                    manifest,
                    parts / manifest.backup_id,
                    tablespaces=mapped,
                    owner=owner,
                    progress=progress,
                    sync=False,
                )
            )
        progress("combining the chain", 0, None)
        combining.write_text(_unfinished(chain[-1].backup_id, final))
        for root in (parts / "combined", *final.values()):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            run_as().own(root)
        combine(
            program,
            [parts / manifest.backup_id for manifest in chain],
            parts / "combined",
            {places[-1][oid]: place for oid, place in final.items()},
            dict(run_as().popen),
        )
        if into.exists():
            into.rmdir()
        (parts / "combined").rename(into)
        shutil.rmtree(parts)
        return final

    def wal_fetcher(self, backup: BackupInfo, spool: Path) -> WalFetchAhead:
        size = self.repository.manifest(backup.backup_id).wal_segment_size
        return WalFetchAhead(self.repository, backup.system_identifier, spool, segment_size=size)

    def expire(self) -> Callable[..., object] | None:
        from ops_platform.backup.expiry import ExpiryAction

        return ExpiryAction


def _unfinished(backup_id: str, spaces: dict[int, Path]) -> str:
    return json.dumps([backup_id, *(str(place.absolute()) for place in spaces.values())])


def _clear_unfinished(combining: Path, backup_id: str, spaces: dict[int, Path]) -> bool:
    """What a kill in the middle of pg_combinebackup left: removed, where this very restore had begun it."""
    if not combining.exists():
        return False
    if combining.read_text() != _unfinished(backup_id, spaces):
        raise UsageError(
            "another unfinished restore stands here", where=str(combining.parent), remedy="remove it first"
        )
    for place in (combining.with_name("combined"), *spaces.values()):
        shutil.rmtree(place, ignore_errors=True)
    combining.unlink()
    return True
