"""What may go and what must stay: pure functions over what the store was seen to hold.

Whatever is in doubt stays: a manifest that cannot be read, a backup that it may build on, WAL that it may need, a timeline of which
nobody knows whether it is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from ops_platform.backup.continuity import Archive, recovery_window
from ops_platform.backup.model import BackupInfo, BackupKind, Proof, WalRange, segment_name, segment_start
from ops_platform.backup.wal import Span
from ops_platform.inventory.model import BackupPolicy

DEAD_AFTER = timedelta(hours=24)
Pieces = list[tuple[datetime, datetime]]


@dataclass(frozen=True)
class Cut:
    """WAL that may go: of one timeline every segment whose number is below `below` (None: every one).

    `timeline` None: all that is stored of a cluster of which no backup is left.
    """

    system_identifier: int
    timeline: int | None
    below: int | None

    def holds(self, timeline: int, number: int) -> bool:
        return self.timeline in (None, timeline) and (self.below is None or number < self.below)


@dataclass(frozen=True)
class Run:
    """A backup without a manifest, as the store lists it."""

    backup_id: str
    began: datetime
    newest_put: datetime
    objects: int
    size: int


@dataclass(frozen=True)
class Decision:
    """`keep`: why each backup stays. `drop`: in the order of removal, each before the one that it builds on.

    `since`: from here on every moment that can be restored stays restorable.
    """

    since: datetime
    keep: Mapping[str, tuple[str, ...]]
    drop: tuple[BackupInfo, ...]
    cuts: tuple[Cut, ...]
    last_proven: str | None
    notes: tuple[str, ...]


@dataclass
class _Stock:
    """The backups by what is asked of them."""

    backups: Sequence[BackupInfo]
    archives: Mapping[int, Archive]
    by_id: dict[str, BackupInfo] = field(init=False)
    readable: list[BackupInfo] = field(init=False)
    unreadable: list[BackupInfo] = field(init=False)

    def __post_init__(self) -> None:
        self.by_id = {backup.backup_id: backup for backup in self.backups}
        self.readable = sorted((b for b in self.backups if b.error is None), key=_end)
        self.unreadable = [b for b in self.backups if b.error is not None]

    @property
    def clusters(self) -> set[int]:
        return {b.system_identifier for b in self.readable} | set(self.archives)

    def of(self, system_identifier: int) -> list[BackupInfo]:
        return [b for b in self.readable if b.system_identifier == system_identifier]

    def fulls(self, system_identifier: int | None = None) -> list[BackupInfo]:
        """Newest first."""
        found = self.readable if system_identifier is None else self.of(system_identifier)
        return [b for b in reversed(found) if b.kind is BackupKind.FULL]

    def chain(self, backup: BackupInfo) -> list[BackupInfo] | None:
        """From the backup down to its full one; None where a link is missing or cannot be read."""
        chain = [backup]
        while (parent_id := chain[-1].parent_id) is not None:
            parent = self.by_id.get(parent_id)
            if parent is None or parent.error is not None or parent in chain:
                return None
            chain.append(parent)
        return chain

    def restorable(self, backup: BackupInfo) -> bool:
        """Whether its chain and its own WAL are whole. Of a cluster whose archive is not known, the chain alone is judged."""
        if backup.error is not None or self.chain(backup) is None:
            return False
        archive = self.archives.get(backup.system_identifier)
        return archive is None or bool(_window([backup], archive, archive.ranges))

    def lives(self, system_identifier: int, since: datetime) -> bool:
        """Whether anything of the cluster is as young as `since`: then it may hold moments that are promised."""
        if system_identifier == max(self.clusters):
            return True
        archive = self.archives.get(system_identifier)
        moments = [b.ended_at for b in self.of(system_identifier)]
        if archive is not None:
            moments += [item.info.modified for item in archive.listing]
        return any(moment >= since for moment in moments)


def _end(backup: BackupInfo) -> tuple[datetime, str]:
    return backup.ended_at, backup.backup_id


def plan_expiry(
    backups: Sequence[BackupInfo],
    proofs: Sequence[Proof],
    now: datetime,
    policy: BackupPolicy,
    *,
    archives: Sequence[Archive] = (),
    doubtful: Collection[str] = (),
) -> Decision:
    """Decide. `archives`: the WAL of each cluster; `doubtful`: backups with a proof that cannot be read.

    Kept are, each with its chain: the newest full backup older than the recovery window and everything after it, the newest
    `minimum_redundancy` full ones, the last proven one, whatever is in doubt. Where that would lose a promised moment (the WAL of
    the oldest is not whole, say), the next older full backup is kept too, until nothing is lost.
    """
    stock = _Stock(backups, {archive.system_identifier: archive for archive in archives})
    since = now - policy.recovery_window
    proven = last_proven(stock, proofs)
    always = _always_kept(stock, policy.minimum_redundancy, proven, doubtful)
    for reach in range(len(backups) + 1):
        keep = {key: list(why) for key, why in always.items()}
        for system_identifier in stock.clusters:
            if stock.lives(system_identifier, since):
                _keep_window(stock, system_identifier, since, reach, keep)
        _keep_chains(stock, keep)
        cuts = wal_cuts(stock, keep, since)
        if not _loses(stock, keep, cuts, since):
            break
    else:
        raise AssertionError("keeping every backup and the WAL that they need loses nothing")
    depth = {b.backup_id: len(stock.chain(b) or [b]) for b in stock.readable}
    drop = [b for b in stock.readable if b.backup_id not in keep]
    drop.sort(key=lambda b: (-depth[b.backup_id], -b.started_at.timestamp(), b.backup_id))
    return Decision(
        since=since,
        keep={key: tuple(keep[key]) for key in sorted(keep)},
        drop=tuple(drop),
        cuts=tuple(cuts),
        last_proven=proven.backup_id if proven else None,
        notes=tuple(_notes(stock, proven, doubtful)),
    )


# What stays


def last_proven(stock: _Stock, proofs: Sequence[Proof]) -> BackupInfo | None:
    """The newest backup whose last verdict is PASS. COULD_NOT_VERIFY says nothing and takes nothing back."""
    verdicts: dict[str, str] = {}
    for proof in sorted(proofs, key=lambda proof: proof.verified_at):
        if proof.verdict != "COULD_NOT_VERIFY":
            verdicts[proof.backup_id] = proof.verdict
    passed = [b for b in reversed(stock.readable) if verdicts.get(b.backup_id) == "PASS"]
    return next((b for b in passed if stock.restorable(b)), passed[0] if passed else None)


def _always_kept(
    stock: _Stock, redundancy: int, proven: BackupInfo | None, doubtful: Collection[str]
) -> dict[str, list[str]]:
    keep: dict[str, list[str]] = {}
    for backup in stock.unreadable:
        keep.setdefault(backup.backup_id, []).append("its manifest cannot be read")
        if backup.kind is BackupKind.INCREMENTAL:
            for other in _possible_chain(stock, backup):
                keep.setdefault(other.backup_id, []).append(
                    f"{backup.backup_id}, which cannot be read, may build on it"
                )
    # One that restores nothing does not count; neither is it a reason to take it away.
    fulls = stock.fulls()
    newest = [*fulls[:redundancy], *[b for b in fulls if stock.restorable(b)][:redundancy]]
    for backup_id in dict.fromkeys(b.backup_id for b in newest):
        keep.setdefault(backup_id, []).append(f"one of the {redundancy} newest full backups")
    if proven is not None:
        keep.setdefault(proven.backup_id, []).append("the last proven backup")
    for backup_id in sorted(set(doubtful) & set(stock.by_id)):
        keep.setdefault(backup_id, []).append("a proof of it cannot be read")
    return keep


def _possible_chain(stock: _Stock, unreadable: BackupInfo) -> Iterable[BackupInfo]:
    """An incremental builds on the newest backup of its cluster at that time: of each cluster, from the newest full one before."""
    for system_identifier in stock.clusters:
        before = [b for b in stock.of(system_identifier) if b.started_at <= unreadable.started_at]
        fulls = [b for b in before if b.kind is BackupKind.FULL]
        if fulls:
            newest = max(fulls, key=lambda b: b.started_at)
            yield from (b for b in before if b.started_at >= newest.started_at)


def _keep_window(
    stock: _Stock, system_identifier: int, since: datetime, reach: int, keep: dict[str, list[str]]
) -> None:
    """The newest full backup older than the window (`reach` steps further back) and everything after it."""
    older = [b for b in stock.fulls(system_identifier) if b.ended_at <= since]
    first = older[reach] if reach < len(older) else None
    for backup in stock.of(system_identifier):
        if first is None or _end(backup) > _end(first):
            keep.setdefault(backup.backup_id, []).append("in the recovery window")
        elif backup is first:
            keep.setdefault(backup.backup_id, []).append("the recovery window begins with it")


def _keep_chains(stock: _Stock, keep: dict[str, list[str]]) -> None:
    """Never a backup on which a kept one builds."""
    waiting = list(keep)
    while waiting:
        backup = stock.by_id[waiting.pop()]
        parent = stock.by_id.get(backup.parent_id or "")
        if parent is not None:
            why = f"{backup.backup_id} builds on it"
            if parent.backup_id not in keep:
                waiting.append(parent.backup_id)
            if why not in keep.setdefault(parent.backup_id, []):
                keep[parent.backup_id].append(why)


def _notes(stock: _Stock, proven: BackupInfo | None, doubtful: Collection[str]) -> Iterable[str]:
    if proven is None and stock.backups:
        yield "no backup of this target is proven: verify one"
    for backup in stock.unreadable:
        yield f"{backup.backup_id} cannot be read and is left alone: {backup.error}"
    if stock.unreadable:
        yield "no WAL is removed while a manifest cannot be read: nobody knows what it needs"
    for backup_id in sorted(doubtful):
        yield f"a proof of {backup_id} cannot be read: the backup is kept, and counts as unproven"
    for backup in stock.readable:
        if stock.chain(backup) is None:
            yield f"{backup.backup_id} cannot be restored: a backup on which it builds is missing or cannot be read"


# WAL


def wal_needs(backups: Iterable[BackupInfo], lines: Mapping[int, list[Span]], segment_size: int) -> dict[int, int]:
    """The lowest segment number that these backups of one cluster need, by timeline.

    A backup needs its own timeline from its start, and every later one to which a recorded history leads from there. (Also one that
    was left before its start: such a branch may be the living one.)
    """
    needs: dict[int, int] = {}

    def need(timeline: int, lsn: int) -> None:
        needs[timeline] = min(needs.get(timeline, lsn // segment_size), lsn // segment_size)

    for backup in backups:
        need(backup.timeline, backup.start)
        for line in lines.values():
            own = next((n for n, span in enumerate(line) if span.timeline == backup.timeline), None)
            for span in line[own + 1 :] if own is not None else []:
                need(span.timeline, span.begin)
    return needs


def wal_cuts(stock: _Stock, keep: Collection[str], since: datetime) -> list[Cut]:
    """What no kept backup needs. History files are small and tell where timelines lead: they stay as long as their cluster."""
    if stock.unreadable:
        return []
    cuts: list[Cut] = []
    for system_identifier, archive in sorted(stock.archives.items()):
        kept = [b for b in stock.of(system_identifier) if b.backup_id in keep]
        if kept:
            cuts += _cluster_cuts(archive, kept)
        elif not stock.lives(system_identifier, since):
            cuts.append(Cut(system_identifier, None, None))
    return cuts


def _cluster_cuts(archive: Archive, kept: Sequence[BackupInfo]) -> Iterable[Cut]:
    needs = wal_needs(kept, archive.lines, archive.segment_size)
    oldest = min(backup.timeline for backup in kept)
    for timeline, entry in sorted(archive.stocks.items()):
        # A timeline that none of them needs may be the newest, of which there is no backup yet: only one that is older than
        # all of them has certainly been left behind.
        if timeline not in needs and timeline >= oldest:
            continue
        cut = Cut(archive.system_identifier, timeline, needs.get(timeline))
        if any(cut.holds(timeline, number) for number in entry.whole | entry.partial):
            yield cut


# What is promised


def _window(backups: Sequence[BackupInfo], archive: Archive, ranges: Sequence[WalRange]) -> Pieces:
    return recovery_window(backups, ranges, archive.lines, archive.segment_size).pieces


def restorable_moments(
    backups: Sequence[BackupInfo], archives: Iterable[Archive], since: datetime
) -> dict[int, Pieces]:
    """Which moments from `since` on can be restored, by cluster."""
    known = {archive.system_identifier: archive for archive in archives}
    stock = _Stock(backups, known)
    return {sysid: _moments(stock, stock.of(sysid), archive, archive.ranges, since) for sysid, archive in known.items()}


def _moments(
    stock: _Stock, backups: Sequence[BackupInfo], archive: Archive, ranges: Sequence[WalRange], since: datetime
) -> Pieces:
    whole = [b for b in backups if stock.chain(b) is not None]
    return [(max(begin, since), end) for begin, end in _window(whole, archive, ranges) if end >= since]


def lost_moments(before: Pieces, after: Pieces) -> Pieces:
    """The pieces that could be restored before and cannot, as a whole, after. More at the end is no loss."""
    return [(a, b) for a, b in before if not any(c <= a and b <= d for c, d in after)]


def _loses(stock: _Stock, keep: Collection[str], cuts: Sequence[Cut], since: datetime) -> bool:
    for system_identifier, archive in stock.archives.items():
        kept = [b for b in stock.of(system_identifier) if b.backup_id in keep]
        mine = [cut for cut in cuts if cut.system_identifier == system_identifier]
        before = _moments(stock, stock.of(system_identifier), archive, archive.ranges, since)
        after = _moments(stock, kept, archive, ranges_after(archive, mine), since)
        if lost_moments(before, after):
            return True
    return False


def ranges_after(archive: Archive, cuts: Sequence[Cut]) -> list[WalRange]:
    """The stored ranges as they would be without what is cut."""
    size, found = archive.segment_size, list[WalRange]()
    for item in archive.ranges:
        first, last = (segment_start(name, size)[1] // size for name in (item.first, item.last))
        for cut in cuts:
            if cut.timeline in (None, item.timeline):
                first = last + 1 if cut.below is None else max(first, cut.below)
        if first <= last:
            found.append(replace(item, first=segment_name(item.timeline, first * size, size)))
    return found


# Dead runs


def dead_runs(runs: Sequence[Run], backups: Sequence[BackupInfo], now: datetime, *, most: int) -> list[Run]:
    """Backups without a manifest that will never have one, oldest first, `most` at a time.

    Nothing was put for a day, and a backup that began later was finished: without that the manifests may be what is missing.
    """
    newest = max((b.started_at for b in backups if b.error is None), default=None)
    dead = [
        run
        for run in runs
        if newest is not None
        and run.began < newest
        and now - run.began > DEAD_AFTER
        and now - run.newest_put > DEAD_AFTER
    ]
    return sorted(dead, key=lambda run: (run.began, run.backup_id))[:most]
