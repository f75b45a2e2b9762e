"""Whether the store holds a stretch of WAL: asked by whoever has to know that a backup, a row or a switch is safe."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ops_platform.backup.archive import newest_cluster, noted_segment_size, read_wal_header
from ops_platform.backup.model import Lsn, segment_name, segment_start
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository
from ops_platform.backup.wal import SEGMENT_NAME, floor, history_name, parse_history, timeline_at
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import UnreachableError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target


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
    size = noted_segment_size(header)
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
