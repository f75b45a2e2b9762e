"""The WAL archive of a target as it stands: read from the store, and beside it how far the server is.

What is stored is computed from the listing and a few object headers (`continuity` says what it means); the database is asked for the
slot and the lag alone, and where it does not answer that is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ops_platform.backup.continuity import Archive, again_from, gaps, newest_range, open_gaps, ranges
from ops_platform.backup.gapnotes import GapNote, gap_notes
from ops_platform.backup.model import Lsn, WalGap, WalRange, segment_name, segment_start
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository, WalObject
from ops_platform.backup.sealed import HEADER_PREFIX, Header, read_header
from ops_platform.backup.wal import DEFAULT_SEGMENT_SIZE, Span, parse_history, stock
from ops_platform.errors import CorruptionError, NotThereError, OpsError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target

_HEADERS_LOOKED_AT = 64


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


# What is stored


def read_wal_header(
    repository: Repository, system_identifier: int, name: str, *, partial: bool = False
) -> Header | None:
    """The header of a stored WAL file; None where the store said that it is not there."""
    key = repository.wal_key(system_identifier, name, partial=partial)
    try:
        return read_header(repository.store.get(key, start=0, length=HEADER_PREFIX), place=key)
    except NotThereError:
        return None


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
                return noted_segment_size(header)
    return DEFAULT_SEGMENT_SIZE


def noted_segment_size(header: Header) -> int:
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


# The server, and both together


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
        gaps=[WalGap(t, a, b, again_from(backups, t, b, archive.segment_size)) for t, a, b in holes] if archive else [],
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
