"""pgBackRest's repositories behind the `BackupEngine` protocol, read-only: a company keeps its backups and gets the proof.

How far an archive reaches is judged carefully. pgBackRest archives whole segments and does not say which moments they hold, so
the newest archived segments are read: the window ends just before the newest commit found in them, because PostgreSQL stops at a
moment only when it meets a later commit. A backup's times are pgBackRest's, in whole seconds by the clock of the host on which it
ran; its end is rounded up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops_platform.backup.continuity import missing, ranges, recovery_window
from ops_platform.backup.model import (
    BackupInfo,
    BackupKind,
    Lsn,
    Progress,
    RecoveryTarget,
    RecoveryWindow,
    RestoredBase,
    WalRange,
    no_progress,
    segment_name,
    segment_start,
)
from ops_platform.backup.pgbackrest_repository import ArchivedWal, PgBackRest, PgBackRestWal
from ops_platform.backup.wal import DEFAULT_SEGMENT_SIZE, Span, parse_history, stock
from ops_platform.backup.walcommits import newest_end, segment_size
from ops_platform.backup.walfetch import WalFetchAhead
from ops_platform.clients.postgres_binaries import run_as
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import NotThereError, UsageError

if TYPE_CHECKING:
    from ops_platform.inventory import Target

# On a quiet database segments are archived in which no transaction ended: so many are looked at, the newest first.
_SEGMENTS_LOOKED_AT = 32
_UNFINISHED = "backup.manifest"  # stands in a data directory for as long as pgBackRest restores it


@dataclass(frozen=True)
class _Archive:
    """What the archive of one cluster holds."""

    size: int
    ranges: list[WalRange]
    lines: dict[int, list[Span]]
    holes: list[tuple[int, str, str]]

    def window(self, backups: Sequence[BackupInfo]) -> RecoveryWindow:
        return recovery_window(backups, self.ranges, self.lines, self.size, self.holes)


class PgBackRestEngine:
    def __init__(self, target: Target, *, clock: Clock = SYSTEM_CLOCK) -> None:
        if target.repository.stanza is None or target.repository.config is None:
            raise UsageError(
                f"{target.id} is not kept by pgBackRest", remedy="give repository.stanza and repository.config"
            )
        self.target = target
        self._program = PgBackRest(Path(target.repository.config), target.repository.stanza)
        self._clock = clock
        self._ends: dict[str, datetime | None] = {}  # by path: what is archived does not change

    @property
    def name(self) -> str:
        return "pgbackrest"

    # What is there

    def list(self) -> list[BackupInfo]:
        return self._backups(self._program.info())

    def _backups(self, stanza: Mapping[str, Any]) -> list[BackupInfo]:
        systems = {(db["repo-key"], db["id"]): db for db in stanza["db"]}
        found = [_backup_info(self.target.id, entry, systems) for entry in stanza["backup"]]
        # Where a repository is a copy of another, a backup stands in both.
        once = {backup.backup_id: backup for backup in reversed(found)}
        return sorted(once.values(), key=lambda backup: (backup.ended_at, backup.backup_id))

    def window(self) -> RecoveryWindow:
        backups, archive = self._state()
        return RecoveryWindow(None, None, [], []) if archive is None else archive.window(backups)

    def _state(self) -> tuple[list[BackupInfo], _Archive | None]:
        """The backups of the newest cluster that has one, with its archive; others belong to a server of before an upgrade."""
        stanza = self._program.info()
        readable = [backup for backup in self._backups(stanza) if backup.error is None]
        if not readable:
            return [], None
        system = readable[-1].system_identifier
        return [b for b in readable if b.system_identifier == system], self._archive(self._wal(stanza, system), system)

    def _wal(self, stanza: Mapping[str, Any], system: int) -> PgBackRestWal:
        places = [(db["repo-key"], f"{db['version']}-{db['id']}") for db in stanza["db"] if db["system-id"] == system]
        return PgBackRestWal(self._program, places)

    def _archive(self, wal: PgBackRestWal, system: int) -> _Archive:
        listing = wal.wal_listing()
        size = self._segment_size(wal, system, listing)
        lines: dict[int, list[Span]] = {1: parse_history(1, None)}
        for item in listing:
            if item.history and (file := wal.get_wal(system, item.name)) is not None:
                lines[item.timeline] = parse_history(item.timeline, file.plain)
        until: dict[str, datetime] = {}
        for held in ranges(listing, size):
            if when := self._newest_end(wal, system, held, size, {item.name: item for item in listing}):
                # PostgreSQL has to meet a later commit to stop at a moment: the newest one itself is out of reach.
                until[held.last] = when - timedelta(microseconds=1)
        return _Archive(size, ranges(listing, size, until=until), lines, missing(stock(listing, size), lines, size))

    def _segment_size(self, wal: PgBackRestWal, system: int, listing: Sequence[ArchivedWal]) -> int:
        for item in reversed(listing):
            if not item.history and (file := wal.get_wal(system, item.name)) is not None:
                return segment_size(file.plain) or DEFAULT_SEGMENT_SIZE
        return DEFAULT_SEGMENT_SIZE

    def _newest_end(
        self, wal: PgBackRestWal, system: int, held: WalRange, size: int, listed: Mapping[str, ArchivedWal]
    ) -> datetime | None:
        at, first = segment_start(held.last, size)[1], segment_start(held.first, size)[1]
        for start in range(at, max(first, at - _SEGMENTS_LOOKED_AT * size + size) - 1, -size):
            name = segment_name(held.timeline, start, size)
            path = listed[name].path
            if path not in self._ends:
                file = wal.get_wal(system, name)
                self._ends[path] = newest_end(file.plain) if file else None
            if self._ends[path] is not None:
                return self._ends[path]
        return None

    # Choosing

    def choose(self, target: RecoveryTarget) -> BackupInfo:
        backups, archive = self._state()
        reach = {b.backup_id: archive.window([b]) for b in backups} if archive else {}
        usable = [b for b in backups if reach[b.backup_id].pieces]
        if not usable:
            raise UsageError(
                f"nothing of {self.target.id} can be restored: "
                + ("the WAL of no backup is whole" if backups else "there is no backup"),
                remedy=f"as {run_as().name}: pgbackrest --config={self.target.repository.config} info",
            )
        if target.kind == "time" and isinstance(target.value, datetime):
            moment = target.value
            found = [b for b in usable if reach[b.backup_id].holds(moment)]
            return found[-1] if found else self._outside(moment, archive.window(backups) if archive else None)
        if target.kind == "lsn":
            wanted = Lsn.parse(str(target.value))
            found = [b for b in usable if b.end <= wanted]
            if not found:
                raise UsageError(f"{wanted} lies before the end of the oldest backup ({usable[0].end})")
            return found[-1]
        # A transaction or a restore point may lie anywhere: the oldest backup reaches every one that is still there.
        return usable[0] if target.kind in ("xid", "name") else usable[-1]

    def carried_until(self, backup: BackupInfo, target: RecoveryTarget) -> datetime | None:
        _, archive = self._state()
        return archive.window([backup]).latest if archive else None

    def last_segment(self, backup: BackupInfo, target: RecoveryTarget) -> Lsn | None:
        return None

    def _outside(self, moment: datetime, window: RecoveryWindow | None) -> BackupInfo:
        pieces = window.pieces if window else []
        text = "; ".join(f"{begin:%Y-%m-%d %H:%M:%S} to {end:%Y-%m-%d %H:%M:%S} UTC" for begin, end in pieces)
        gaps = "".join(f"; missing WAL {gap.first} to {gap.last}" for gap in window.gaps) if window else ""
        future = moment > self._clock.now()
        raise UsageError(
            f"{moment.isoformat()} lies " + ("in the future" if future else "outside of what can be restored"),
            where=self.target.id,
            remedy=f"the recovery window: {text}{gaps}; newer moments follow when their WAL segment is archived",
        )

    # Restoring

    def tablespaces(self, backup: BackupInfo) -> dict[int, str]:
        """Where each tablespace stood on the source, by oid."""
        return {int(space["oid"]): str(space["destination"]) for space in self._entry(backup).get("tablespace") or []}

    def _entry(self, backup: BackupInfo) -> dict[str, Any]:
        entries: list[dict[str, Any]] = self._program.info(f"--set={backup.backup_id}")["backup"]
        if not entries:
            raise NotThereError(f"the repository has no backup {backup.backup_id}", where=self._program.where)
        return entries[0]

    def fetch_base(
        self,
        backup: BackupInfo,
        into: Path,
        *,
        tablespaces: dict[str, Path] | None = None,
        progress: Progress = no_progress,
    ) -> RestoredBase:
        """pgBackRest restores with what the backup builds on, and compares the SHA-1 of each file. An unfinished restore is resumed."""
        began, entry = time.monotonic(), self._entry(backup)
        spaces = {
            int(space["oid"]): (tablespaces or {}).get(space["destination"]) or Path(space["destination"])
            for space in entry.get("tablespace") or []
        }
        resume = (into / _UNFINISHED).is_file()
        for place in (into, *spaces.values()):
            _prepare(place, resume=resume)
        total = int(entry["info"]["size"])
        self._program.restore(
            [
                f"--repo={entry['database']['repo-key']}",
                f"--set={backup.backup_id}",
                f"--pg1-path={into.absolute()}",
                # What the file says of the live host, of links and of partial restores is not for here.
                "--reset-pg1-host",
                "--no-link-all",
                "--reset-link-map",
                "--reset-db-include",
                "--reset-recovery-option",
                "--reset-tablespace-map-all",
                "--delta" if resume else "--no-delta",
                "--type=none",
                *(f"--tablespace-map={oid}={place.absolute()}" for oid, place in spaces.items()),
            ],
            lambda share: progress("restore", int(share * total), total),
        )
        return RestoredBase(into, spaces, total, time.monotonic() - began)

    def wal_fetcher(self, backup: BackupInfo, spool: Path) -> WalFetchAhead:
        """Fetched ahead by us, several at a time, through pgBackRest's `repo-get`.

        Not by `archive-get` as the server's restore_command: that would need the network where a sandbox has none, does not
        compare checksums, and takes a gap in the archive for its end.
        """
        system = backup.system_identifier
        wal = self._wal(self._program.info(), system)
        size = self._segment_size(wal, system, wal.wal_listing())
        return WalFetchAhead(wal, system, spool, segment_size=size)

    def expire(self) -> Callable[..., object] | None:
        """None: what pgBackRest took, pgBackRest expires."""
        return None


def _backup_info(
    target_id: str, entry: Mapping[str, Any], systems: Mapping[tuple[int, int], Mapping[str, Any]]
) -> BackupInfo:
    """`raw` and `stored` are what the backup adds, as everywhere; for a full one that is all of it."""
    db = systems[entry["database"]["repo-key"], entry["database"]["id"]]
    first, last = entry["archive"]["start"], entry["archive"]["stop"]
    error = "pages whose checksum did not fit were found when it was taken" if entry.get("error") else None
    if first is None or last is None:
        error = "it was taken without an archive (offline): nothing says which WAL it needs"
    lsn = entry.get("lsn") or {}
    return BackupInfo(
        backup_id=entry["label"],
        target_id=target_id,
        engine="pgbackrest",
        kind=BackupKind.FULL if entry["type"] == "full" else BackupKind.INCREMENTAL,
        parent_id=entry["prior"],
        started_at=datetime.fromtimestamp(entry["timestamp"]["start"], UTC),
        ended_at=datetime.fromtimestamp(entry["timestamp"]["stop"] + 1, UTC),
        timeline=int(first[:8], 16) if first else 0,
        start=Lsn.parse(lsn["start"]) if lsn.get("start") else Lsn(0),
        end=Lsn.parse(lsn["stop"]) if lsn.get("stop") else Lsn(0),
        server_version=_version(db["version"]),
        system_identifier=int(db["system-id"]),
        raw=int(entry["info"]["delta"]),
        stored=int(entry["info"]["repository"]["delta"]),
        error=error
        if error or lsn
        else "taken by a pgBackRest before 2.36, which did not note its positions in the WAL",
    )


def _version(text: str) -> int:
    """ "15" and "9.6" as PostgreSQL's server_version_num; pgBackRest does not keep the minor version."""
    major, _, minor = text.partition(".")
    return int(major) * 10000 + int(minor or 0) * 100


def _prepare(place: Path, *, resume: bool) -> None:
    """A directory of the servers' user, empty unless pgBackRest left it in the middle."""
    if place.exists() and any(place.iterdir()) and not resume:
        raise UsageError(
            "the directory is not empty", where=str(place), remedy="name another one; nothing is restored over files"
        )
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_as().own(place)
    except OSError as error:
        raise UsageError(f"the directory cannot be made: {os.strerror(error.errno or 0)}", where=str(place)) from None
