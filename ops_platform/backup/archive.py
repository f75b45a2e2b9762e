"""The WAL archive as it stands in the store: which ranges are there, which are missing, what can be restored.

Everything is computed from the listing and a few object headers; the database is asked for the slot and the lag alone, and where
it does not answer that is said.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from ops_platform.backup.copykeys import CopyKeys
from ops_platform.backup.model import (
    BackupInfo,
    Lsn,
    RecoveryWindow,
    WalGap,
    WalRange,
    segment_name,
    segment_start,
)
from ops_platform.backup.repository import Repository, WalObject
from ops_platform.backup.sealed import HEADER_PREFIX, Header, read_header
from ops_platform.backup.wal import (
    DEFAULT_SEGMENT_SIZE,
    SEGMENT_NAME,
    Span,
    Stock,
    StoredWal,
    floor,
    history_name,
    parse_history,
    stock,
    timeline_at,
)
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import CorruptionError, NotThereError, OpsError, UnreachableError, UsageError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target
    from ops_platform.inventory.model import Backed

_HEADERS_LOOKED_AT = 64


@dataclass(frozen=True)
class GapNote:
    """A loss as the receiver met it; stands in the store beside the WAL, so that every machine knows of it."""

    timeline: int
    first: str
    last: str
    cause: str
    noticed_at: datetime

    def names(self, segment_size: int) -> list[str]:
        begin, end = (segment_start(name, segment_size)[1] for name in (self.first, self.last))
        return [segment_name(self.timeline, at, segment_size) for at in range(begin, end + 1, segment_size)]


@dataclass(frozen=True)
class SlotState:
    """pg_replication_slots, of our slot. `retained`: bytes of WAL that it holds back; `server_lsn`: the server's position."""

    kind: str
    active_pid: int | None
    restart_lsn: Lsn | None
    wal_status: str | None
    retained: int | None


@dataclass(frozen=True)
class ArchiveStatus:
    """The archive of one target. Positions are bytes of WAL, times UTC by the server's clock.

    `until`: everything that the server had flushed at this time is stored. `slot_error`: why the server could not be asked; then
    `slot`, `server_lsn` and `lag_bytes` are None and mean "unknown", not "none".
    """

    target_id: str
    system_identifier: int | None
    other_clusters: list[int]
    segment_size: int
    segments: int
    stored_bytes: int
    ranges: list[WalRange]
    gaps: list[WalGap]
    notes: list[GapNote]
    newest: Lsn | None
    newest_timeline: int | None
    until: datetime | None
    slot_name: str
    slot: SlotState | None
    slot_error: str | None
    server_lsn: Lsn | None
    server_time: datetime | None
    lag_bytes: int | None

    @property
    def open_gaps(self) -> list[WalGap]:
        """Those behind which no backup begins anew: until one does, nothing after them can be restored."""
        return open_gaps(self.gaps)

    @property
    def continuous(self) -> bool:
        """Whether every moment from now on can be restored. A gap that a later backup mended costs the moments before that alone."""
        return bool(self.ranges) and not self.open_gaps


def open_gaps(found: Iterable[WalGap]) -> list[WalGap]:
    return [gap for gap in found if gap.recovery_again_from is None]


@dataclass(frozen=True)
class Archive:
    """What was read from the store about one cluster's WAL: the base of everything below."""

    system_identifier: int
    segment_size: int
    listing: list[WalObject]
    stocks: dict[int, Stock]
    lines: dict[int, list[Span]]
    ranges: list[WalRange]
    notes: list[GapNote]


def open_target_repository(access: Access, target: Backed) -> Repository:
    where = target.repository
    # Another engine's target may name store and keys, too: for its proofs.
    if where.engine != "native" or where.store is None or where.keys is None:
        raise UsageError(
            f"backups and WAL of {target.id} are kept by {where.engine}, not by us",
            remedy="its own tool takes and expires them; ours lists, restores and proves them",
        )
    return open_repository(access, where.store, where.keys, target)


def open_repository(access: Access, store_id: str, keys_id: str, target: Backed) -> Repository:
    """What of the target is kept in that store, under that key service."""
    store, keys = access.store(store_id), access.keys(keys_id)
    return Repository(store, CopyKeys(keys, store, target.id) if target.repository.is_copy else keys, target.id)


def read_wal_header(
    repository: Repository, system_identifier: int, name: str, *, partial: bool = False
) -> Header | None:
    """The header of a stored WAL file; None where the store said that it is not there."""
    key = repository.wal_key(system_identifier, name, partial=partial)
    try:
        return read_header(repository.store.get(key, start=0, length=HEADER_PREFIX), place=key)
    except NotThereError:
        return None


# Gaps that were noted


def _gap_prefix(repository: Repository, system_identifier: int) -> str:
    return f"{repository.wal_prefix(system_identifier)}gaps/"


def put_gap(repository: Repository, system_identifier: int, note: GapNote) -> None:
    body = asdict(note) | {"noticed_at": note.noticed_at.isoformat()}
    key = f"{_gap_prefix(repository, system_identifier)}{note.first}-{note.last}.json"
    repository.store.put(key, json.dumps(body, indent=1).encode())


def gap_notes(repository: Repository, system_identifier: int) -> list[GapNote]:
    found: list[GapNote] = []
    for info in repository.store.list(_gap_prefix(repository, system_identifier)):
        try:
            found.append(_gap_note(json.loads(repository.store.get(info.key))))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"this note of a gap cannot be read: {error}", where=info.key) from error
    return found


def _gap_note(body: Any) -> GapNote:
    body["noticed_at"] = datetime.fromisoformat(body["noticed_at"])
    note = GapNote(**body)
    if not all(SEGMENT_NAME.fullmatch(name) and int(name[:8], 16) == note.timeline for name in (note.first, note.last)):
        raise ValueError(f"{note.first} to {note.last} are no segments of timeline {note.timeline}")
    return note


# Pure functions over a listing


def ranges(
    listing: Iterable[StoredWal],
    segment_size: int,
    *,
    partial_ends: Mapping[str, Lsn] | None = None,
    until: Mapping[str, datetime] | None = None,
) -> list[WalRange]:
    """Stored WAL without a hole, by timeline and position.

    `partial_ends`: how far each unfinished segment reaches, by segment name (an unknown one counts as empty). `until`: the server's
    time for the newest segment of each range, by segment name.
    """
    found: list[WalRange] = []
    for timeline, entry in sorted(stock(listing, segment_size).items()):
        runs = [(first, last, Lsn((last + 1) * segment_size)) for first, last in entry.runs()]
        unfinished = entry.last_partial
        if unfinished is not None:
            name = segment_name(timeline, unfinished * segment_size, segment_size)
            end = (partial_ends or {}).get(name, Lsn(unfinished * segment_size))
            if runs and runs[-1][1] == unfinished - 1:
                runs[-1] = (runs[-1][0], unfinished, end)
            else:
                runs.append((unfinished, unfinished, end))
        for first, last, end in runs:
            names = [segment_name(timeline, number * segment_size, segment_size) for number in (first, last)]
            found.append(WalRange(timeline, names[0], names[1], end, (until or {}).get(names[1])))
    return found


def missing(
    stocks: Mapping[int, Stock], lines: Mapping[int, list[Span]], segment_size: int
) -> list[tuple[int, str, str]]:
    """Holes as (timeline, first, last): between stored segments, and where one timeline should lead to the next and does not."""
    return _named(_holes(stocks, lines, segment_size), segment_size)


def _holes(
    stocks: Mapping[int, Stock], lines: Mapping[int, list[Span]], segment_size: int
) -> list[tuple[int, int, int]]:
    holes = [(t, *hole) for t, entry in stocks.items() for hole in entry.holes()]
    for timeline, line in lines.items():
        if timeline not in stocks:
            continue
        oldest = next(number for number, span in enumerate(line) if span.timeline in stocks)
        for span, child in pairwise(line[oldest:]):
            # The segment of the fork stands on the child, which begins by repeating it.
            begin, fork = span.begin // segment_size, child.begin // segment_size
            entry, below = stocks.get(span.timeline), stocks.get(child.timeline)
            have = begin - 1 if entry is None else max(entry.whole, default=entry.newest - 1)
            holes.append((span.timeline, have + 1, fork - 1))
            if below is not None:
                lowest = min(below.whole, default=below.newest)
                holes.append(
                    (child.timeline, fork, min(lowest, (child.end or lowest * segment_size) // segment_size) - 1)
                )
    return holes


def gaps(archive: Archive) -> list[tuple[int, str, str]]:
    """Every hole: what is missing between stored segments, and what was noted as lost and did not come after all."""
    size = archive.segment_size
    holes = _holes(archive.stocks, archive.lines, size)
    for note in archive.notes:
        entry = archive.stocks.get(note.timeline, Stock(note.timeline))
        first, last = (segment_start(name, size)[1] // size for name in (note.first, note.last))
        holes += [(note.timeline, n, n) for n in range(first, last + 1) if n not in entry.whole]
    return _named(holes, size)


def _named(holes: Iterable[tuple[int, int, int]], segment_size: int) -> list[tuple[int, str, str]]:
    def name(timeline: int, number: int) -> str:
        return segment_name(timeline, number * segment_size, segment_size)

    return [(t, name(t, first), name(t, last)) for t, first, last in _merged(holes)]


def _merged(holes: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Ascending, empty ones left out, overlapping ones put together: several lines of history may tell of one hole."""
    found: list[tuple[int, int, int]] = []
    for timeline, first, last in sorted(hole for hole in holes if hole[1] <= hole[2]):
        if found and found[-1][0] == timeline and first <= found[-1][2] + 1:
            found[-1] = (timeline, found[-1][1], max(found[-1][2], last))
        else:
            found.append((timeline, first, last))
    return found


def recovery_window(
    backups: Sequence[BackupInfo],
    stored: Sequence[WalRange],
    lines: Mapping[int, list[Span]],
    segment_size: int,
    holes: Sequence[tuple[int, str, str]] = (),
) -> RecoveryWindow:
    """Which moments can be restored. `lines`: the line of descent of each timeline whose history is stored.

    From each readable backup the WAL is followed, without a hole, along the newest timeline that descends from its end. A backup
    whose own WAL is not whole restores nothing.
    """
    pieces: list[tuple[datetime, datetime]] = []
    for backup in backups:
        if backup.error is None and (reached := _reach(backup, stored, lines, segment_size)) is not None:
            pieces.append((backup.ended_at, max(backup.ended_at, reached.until)))
    merged: list[tuple[datetime, datetime]] = []
    for begin, end in sorted(pieces):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    gaps = [WalGap(t, first, last, _again_from(backups, t, last, segment_size)) for t, first, last in holes]
    return RecoveryWindow(
        earliest=merged[0][0] if merged else None,
        latest=merged[-1][1] if merged else None,
        pieces=merged,
        gaps=gaps,
    )


def _again_from(backups: Sequence[BackupInfo], timeline: int, last: str, segment_size: int) -> str | None:
    after = segment_start(last, segment_size)[1] + segment_size
    usable = [b for b in backups if b.error is None and b.timeline >= timeline and b.start >= after]
    return min(usable, key=lambda b: (b.start, b.ended_at)).backup_id if usable else None


@dataclass(frozen=True)
class Reach:
    """How far the stored WAL carries a backup without a hole: the last moment (UTC) and the position behind its last byte."""

    until: datetime
    end: Lsn


def reach(
    archive: Archive, backup: BackupInfo, timeline: int | Literal["latest", "current"] = "latest"
) -> Reach | None:
    """How far a recovery from `backup` comes that follows that timeline, as PostgreSQL follows it.

    None where its own WAL is not whole, or where it was left behind: beyond a fork, on the branch that nobody went on with,
    PostgreSQL refuses to follow the newest timeline.
    """
    number = backup.timeline if timeline == "current" else max(archive.lines) if timeline == "latest" else timeline
    line = archive.lines.get(number) or ([Span(number, Lsn(0), None)] if number == backup.timeline else [])
    if backup.error is not None or not any(_lies_on(span, backup) for span in line):
        return None
    return _reach(backup, archive.ranges, {number: line}, archive.segment_size)


def _lies_on(span: Span, backup: BackupInfo) -> bool:
    return span.timeline == backup.timeline and (span.end is None or span.end >= backup.end)


def _reach(
    backup: BackupInfo, stored: Sequence[WalRange], lines: Mapping[int, list[Span]], segment_size: int
) -> Reach | None:
    """Along the newest of these lines that the backup lies on; None where its own WAL is not whole."""

    def holding(timeline: int, begin: int, end: int) -> WalRange | None:
        for item in stored:
            if item.timeline == timeline and segment_start(item.first, segment_size)[1] <= begin and end <= item.end:
                return item
        return None

    current = holding(backup.timeline, floor(backup.start, segment_size), backup.end)
    if current is None:
        return None
    reached = current.until or backup.ended_at
    descend = [line for line in lines.values() for span in line if _lies_on(span, backup)]
    line = max(descend, key=lambda spans: spans[-1].timeline, default=[])
    following = False
    for span in line:
        if not following:
            following = span.timeline == backup.timeline
        else:
            # The child repeats the segment in which its parent was left.
            if current.end < floor(span.begin, segment_size):
                return Reach(reached, current.end)
            child = holding(span.timeline, floor(span.begin, segment_size), span.begin)
            if child is None:
                return Reach(reached, current.end)
            current, reached = child, max(reached, child.until or reached)
    return Reach(reached, current.end)


# Reading


def read_archive(repository: Repository, system_identifier: int | None = None) -> Archive | None:
    """What the store holds of a cluster's WAL (of the newest one, unless named). None: nothing at all."""
    if system_identifier is None:
        system_identifier = newest_cluster(repository)
        if system_identifier is None:
            return None
    listing = repository.wal_listing(system_identifier)
    size = segment_size_of(repository, listing)
    stocks = stock(listing, size)
    lines: dict[int, list[Span]] = {1: parse_history(1, None)}
    for item in listing:
        if item.history and (sealed := repository.get_wal(system_identifier, item.name)) is not None:
            lines[item.timeline] = parse_history(item.timeline, sealed.plain)
    partial_ends: dict[str, Lsn] = {}
    for item in listing:
        if item.partial and (entry := stocks[item.timeline]).last_partial is not None:
            start = segment_start(item.name, size)[1]
            if start // size != entry.last_partial:
                continue
            header = read_wal_header(repository, system_identifier, item.name, partial=True)
            partial_ends[item.name] = Lsn(start + (header.raw if header else 0))
    bare = ranges(listing, size, partial_ends=partial_ends)
    times = {item.last: when for item in bare if (when := _complete_until(repository, system_identifier, item, size))}
    return Archive(
        system_identifier=system_identifier,
        segment_size=size,
        listing=listing,
        stocks=stocks,
        lines=lines,
        ranges=ranges(listing, size, partial_ends=partial_ends, until=times),
        notes=gap_notes(repository, system_identifier),
    )


def newest_cluster(repository: Repository) -> int | None:
    """The system identifier under which WAL was stored last; identifiers begin with the time of initdb."""
    known = [int(name) for name in repository.store.list_folders(repository.wal_prefix()) if name.isdigit()]
    return max(known, default=None)


def segment_size_of(repository: Repository, listing: Sequence[WalObject]) -> int:
    for item in reversed(listing):
        if not item.history:
            header = read_wal_header(repository, item.system_identifier, item.name, partial=item.partial)
            if header is not None:
                return _segment_size(header)
    return DEFAULT_SEGMENT_SIZE


def _segment_size(header: Header) -> int:
    """As the writer noted it. Raises CorruptionError for a size that PostgreSQL does not have."""
    size = header.meta.get("segment_size")
    if not isinstance(size, int) or size.bit_count() != 1 or not 1 << 20 <= size <= 1 << 30:
        raise CorruptionError(f"its header names {size!r} as the size of a WAL segment", where=header.place)
    return size


def _complete_until(
    repository: Repository, system_identifier: int, item: WalRange, segment_size: int
) -> datetime | None:
    """The newest `complete_at` in a range. Segments that were sent as a backlog have none, so it may stand some way back."""
    first = segment_start(item.first, segment_size)[1]
    at = segment_start(item.last, segment_size)[1]
    for _ in range(_HEADERS_LOOKED_AT):
        name = segment_name(item.timeline, at, segment_size)
        header = read_wal_header(repository, system_identifier, name) or read_wal_header(
            repository, system_identifier, name, partial=True
        )
        if header is not None and (when := header.meta.get("complete_at")):
            try:
                return datetime.fromisoformat(when)
            except (TypeError, ValueError) as error:
                raise CorruptionError(f"its header names {when!r} as a time", where=header.place) from error
        if at <= first:
            return None
        at = Lsn(at - segment_size)
    return None


def slot_state(access: Access, target: Target) -> SlotState | None:
    """None where the server says that there is no such slot."""
    from ops_platform.clients.postgres import asking

    with asking(access.postgres(target, role="primary"), target.id) as conn:
        row = conn.execute(
            "SELECT slot_type, active_pid, restart_lsn::text, wal_status,"
            " pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint"
            " FROM pg_replication_slots WHERE slot_name = %s",
            [target.wal.slot],
        ).fetchone()
    if row is None:
        return None
    return SlotState(row[0], row[1], Lsn.parse(row[2]) if row[2] else None, row[3], row[4])


def slot_holder(access: Access, target: Target, pid: int) -> str:
    """Who streams from the slot, as far as our rights show it."""
    from ops_platform.clients.postgres import asking

    with contextlib.suppress(OpsError), asking(access.postgres(target, role="primary"), target.id) as conn:
        row = conn.execute(
            "SELECT application_name, coalesce(host(client_addr), 'a local socket'), usename"
            " FROM pg_stat_activity WHERE pid = %s",
            [pid],
        ).fetchone()
        if row and row[0] is not None:
            return f"{row[0] or 'unnamed'} from {row[1]} as {row[2]}"
    return "not shown to our role"


def archive_status(access: Access, target: Target, *, ask_server: bool = True) -> ArchiveStatus:
    """The archive and, where it answers, the server's side of it. Raises where the store cannot be asked."""
    repository = open_target_repository(access, target)
    archive = read_archive(repository)
    known = [int(name) for name in repository.store.list_folders(repository.wal_prefix()) if name.isdigit()]
    holes = gaps(archive) if archive else []
    backups = repository.infos() if holes else []
    newest = newest_range(archive)
    server: dict[str, Any] = _ask_server(access, target) if ask_server else {"slot_error": "not asked"}
    server_lsn: Lsn | None = server.get("server_lsn")
    return ArchiveStatus(
        target_id=target.id,
        system_identifier=archive.system_identifier if archive else None,
        other_clusters=[sysid for sysid in known if archive is None or sysid != archive.system_identifier],
        segment_size=archive.segment_size if archive else DEFAULT_SEGMENT_SIZE,
        segments=sum(len(entry.whole) for entry in archive.stocks.values()) if archive else 0,
        stored_bytes=sum(item.info.size for item in archive.listing) if archive else 0,
        ranges=archive.ranges if archive else [],
        gaps=[WalGap(t, a, b, _again_from(backups, t, b, archive.segment_size)) for t, a, b in holes]
        if archive
        else [],
        notes=archive.notes if archive else [],
        newest=newest.end if newest else None,
        newest_timeline=newest.timeline if newest else None,
        until=newest.until if newest else None,
        slot_name=target.wal.slot,
        slot=server.get("slot"),
        slot_error=server.get("slot_error"),
        server_lsn=server_lsn,
        server_time=server.get("server_time"),
        lag_bytes=_lag(newest, server_lsn, server.get("server_timeline")),
    )


def newest_range(archive: Archive | None) -> WalRange | None:
    """The one that reaches furthest, on the newest timeline."""
    return max(archive.ranges, key=lambda item: (item.timeline, item.end), default=None) if archive else None


def _lag(newest: WalRange | None, server_lsn: Lsn | None, server_timeline: int | None) -> int | None:
    if newest is None or server_lsn is None:
        return None
    lag = max(0, server_lsn - newest.end)
    # Of another timeline the archive has nothing, however far it reaches on the old one: never to be shown as no lag.
    return lag if newest.timeline == server_timeline else max(1, lag)


def _ask_server(access: Access, target: Target) -> dict[str, Any]:
    from ops_platform.clients.postgres import asking

    try:
        with asking(access.postgres(target, role="primary"), target.id) as conn:
            row = conn.execute(
                "SELECT pg_current_wal_flush_lsn()::text, clock_timestamp(), left(pg_walfile_name(pg_current_wal_lsn()), 8)"
            ).fetchone()
        slot = slot_state(access, target)
    except OpsError as error:
        return {"slot_error": str(error)}
    if row is None:
        return {"slot_error": "the server gave no answer"}
    return {
        "slot": slot,
        "server_lsn": Lsn.parse(row[0]),
        "server_time": row[1],
        "server_timeline": int(row[2], 16),
    }


def wait_durable(
    access: Access,
    target: Target,
    lsn: int,
    *,
    since: int | None = None,
    timeline: int | None = None,
    timeout: float = 60.0,
    clock: Clock = SYSTEM_CLOCK,
) -> float:
    """Wait until the archive holds every byte from `since` up to `lsn`, as `holds` judges it; the seconds that it took.

    Raises UnreachableError after `timeout` seconds, and at once where the store cannot be asked.
    """
    repository = open_target_repository(access, target)
    began = clock.monotonic()
    while True:
        if holds(repository, lsn, since=since, timeline=timeline):
            return clock.monotonic() - began
        if clock.monotonic() - began > timeout:
            raise UnreachableError(
                f"the archive does not hold the WAL up to {Lsn(lsn)} after {timeout:.0f} s",
                where=target.id,
                remedy=f"is the receiver running? ops wal status {target.id}",
            )
        clock.sleep(0.1)


def holds(
    repository: Repository,
    lsn: int,
    system_identifier: int | None = None,
    *,
    since: int | None = None,
    timeline: int | None = None,
) -> bool:
    """Whether the newest cluster's archive holds the WAL from `since` (unless given: of the few segments before) up to `lsn`.

    `timeline`: the one on which the WAL before `lsn` was written; a position alone means another thing on each branch. Unless given
    it is looked for on the line of the newest timeline that is stored. Cheap enough to poll.
    """
    if lsn == since:
        return True  # no byte is asked for, and the segment before may be from before the archive's beginning
    sysid = newest_cluster(repository) if system_identifier is None else system_identifier
    if sysid is None:
        return False
    if timeline is None:
        folders = repository.store.list_folders(repository.wal_prefix(sysid))
        newest = max((int(name, 16) for name in folders if re.fullmatch("[0-9A-F]{8}", name)), default=1)
        history = repository.get_wal(sysid, history_name(newest)) if newest > 1 else None
        if newest > 1 and history is None:
            return False
        timeline = timeline_at(parse_history(newest, history.plain if history else None), max(0, lsn - 1))
    return _timeline_holds(repository, sysid, timeline, since, lsn)


def _timeline_holds(repository: Repository, sysid: int, timeline: int, since: int | None, lsn: int) -> bool:
    prefix = f"{repository.wal_prefix(sysid)}{timeline:08X}/"
    sample = next((key for info in repository.store.list(prefix) if (key := _segment_key(prefix, info.key))), None)
    if sample is None:
        return False
    header = read_wal_header(repository, sysid, sample[0], partial=sample[1])
    if header is None:
        return False  # a `.partial` that has become whole: the next look finds it
    size = _segment_size(header)
    last = max(0, lsn - 1) // size
    # Segments are put side by side, so those before must be there too.
    first = max(0, last - 8) if since is None else since // size
    whole: set[int] = set()
    unfinished = False
    before = prefix + segment_name(timeline, (first - 1) * size, size) if first else ""
    for info in repository.store.list(prefix, start_after=before):
        if (found := _segment_key(prefix, info.key)) is None:
            continue
        number = segment_start(found[0], size)[1] // size
        if number > last:
            break
        if not found[1]:
            whole.add(number)
        elif number == last:
            unfinished = True
    if last not in whole and not (unfinished and _reaches(repository, sysid, timeline, lsn, size)):
        return False
    needed = first if since is not None else min(whole, default=last)
    return whole | {last} >= set(range(max(first, needed), last + 1))


def _reaches(repository: Repository, sysid: int, timeline: int, lsn: int, size: int) -> bool:
    """Whether the segment that was seen unfinished reaches `lsn`; it may have become whole in this very moment."""
    begin = floor(lsn - 1, size)
    name = segment_name(timeline, begin, size)
    partial = read_wal_header(repository, sysid, name, partial=True)
    if partial is not None:
        return begin + partial.raw >= lsn
    return read_wal_header(repository, sysid, name) is not None


def _segment_key(prefix: str, key: str) -> tuple[str, bool] | None:
    """Name of the segment, and whether it is the unfinished one; None for a key that is no segment's."""
    name = key.removeprefix(prefix)
    whole = name.removesuffix(".partial")
    return (whole, whole != name) if SEGMENT_NAME.fullmatch(whole) else None


__all__ = [
    "Archive",
    "ArchiveStatus",
    "GapNote",
    "SlotState",
    "archive_status",
    "gap_notes",
    "gaps",
    "history_name",
    "holds",
    "missing",
    "newest_range",
    "open_gaps",
    "open_repository",
    "put_gap",
    "ranges",
    "reach",
    "read_archive",
    "recovery_window",
    "slot_state",
    "wait_durable",
]
