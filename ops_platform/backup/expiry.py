"""Removes what nothing promises any more: backups, the WAL that only they needed, what dead runs left.

The decision is `expiry_rules.plan_expiry`; here the store is read, changed and read again. A backup goes manifest first, so that one
which was half removed when the power failed is no backup; the next run takes its rest for a dead run. WAL goes from the oldest end,
so that what is left has no hole.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from ops_platform.actions import (
    ActionResult,
    Applied,
    Approval,
    Change,
    Check,
    CountLimit,
    Guard,
    LegalHold,
    ModeGuard,
    Outcome,
    PercentLimit,
    Plan,
    Verification,
    run_action,
)
from ops_platform.backup.archive import read_archive
from ops_platform.backup.continuity import Archive
from ops_platform.backup.copykeys import CopyKeys, Needed
from ops_platform.backup.expiry_rules import (
    DEAD_AFTER,
    Cut,
    Decision,
    Pieces,
    Run,
    dead_runs,
    lost_moments,
    plan_expiry,
    restorable_moments,
    wal_needs,
)
from ops_platform.backup.model import AnyManifest, BackupInfo, BackupKind, Proof, segment_name, segment_start
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository, WalObject, info_of
from ops_platform.backup.running import backup_running
from ops_platform.clients.objectstore import DeleteOutcome, ObjectInfo
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, CorruptionError, OpsError, RefusedError, UsageError
from ops_platform.inventory.model import Backed, Mode
from ops_platform.ledger import Ledger

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

BACKUP, WAL, DEAD_RUN, UPLOAD, KEYS = "backup", "wal", "dead-run", "upload", "data-keys"
_RUN_ID = re.compile(r"(\d{8}T\d{6}Z)-[FI]-[0-9a-f]{8}")
_SEGMENT_KEY = re.compile(r"([0-9A-F]{24})(\.partial)?")
_GAP_KEY = re.compile(r"[0-9A-F]{24}-([0-9A-F]{24})\.json")
_WORKERS = 8
_CHUNK = 64


def expire(
    access: Access,
    target: Backed,
    *,
    mode: Literal["observe", "enforce"] | Mode | None = None,
    approve: str | None = None,
    alone: bool = False,
    actor: str,
    clock: Clock = SYSTEM_CLOCK,
) -> ActionResult:
    """Expire a target's backups by its policy. `mode` None: the policy's; `approve`: the digest of the plan that somebody read.

    `alone`: the database is not asked whether a backup is being taken, as at a copy; nothing that is unfinished is removed then.

    Enforcing is a decision of the inventory. Where that says observe, `mode` enforce needs the approval of exactly this plan.
    """
    policy = target.backup.expiry
    try:
        chosen = policy.mode if mode is None else Mode(mode)
    except ValueError:
        raise UsageError(f"{mode!r} is no mode", remedy="observe or enforce") from None
    overruled = chosen is Mode.ENFORCE and policy.mode is not Mode.ENFORCE
    # A maintenance window does not matter here: nothing is done to the database.
    guards: list[Guard] = [
        ModeGuard(chosen, "the policy" if mode is None else "the call"),
        LegalHold(target.legal_hold),
        CountLimit(policy.max_count, BACKUP),
        PercentLimit(policy.max_percent, BACKUP),
        Approval(overruled, "the policy of this target only observes"),
    ]
    repository = open_target_repository(access, target)
    running = None if alone else lambda: backup_running(access, target)
    action = ExpiryAction(repository, target, clock=clock, running=running)
    with contextlib.ExitStack() as stack:
        ledger = None
        if chosen is Mode.ENFORCE or access.inventory.platform.database is not None:
            ledger = stack.enter_context(Ledger(access.platform_db, clock=clock))
        return run_action(action, ledger=ledger, guards=guards, approve_digest=approve, actor=actor, clock=clock)


@dataclass
class _Seen:
    """The store as it was when the plan was made, and what was decided then."""

    infos: dict[str, BackupInfo]
    proof_keys: frozenset[str]
    archives: list[Archive]
    decision: Decision
    moments: dict[int, Pieces]
    cuts: dict[str, Cut] = field(default_factory=dict[str, Cut])
    uploads: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    keys: frozenset[str] = frozenset()


class ExpiryAction:
    """`actions.Action` over a native repository.

    `running` says who takes a backup now, None for nobody; it raises where that cannot be told. Without it nothing of a dead run is
    removed, because it may not be dead.
    """

    name = "backup.expire"

    def __init__(
        self,
        repository: Repository,
        target: Backed,
        *,
        clock: Clock = SYSTEM_CLOCK,
        running: Callable[[], str | None] | None = None,
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._target = target
        self._clock = clock
        self._running = running
        keys = repository.keys
        self._needed = Needed(repository, keys) if isinstance(keys, CopyKeys) else None
        self._seen: _Seen | None = None
        self._pinned: set[str] = set()

    @property
    def target_id(self) -> str:
        return self._target.id

    # Plan

    def plan(self) -> Plan:
        now = self._clock.now()
        infos = self._repository.infos()
        archives = self._archives()
        proof_keys = self._proof_keys()
        proofs, doubtful = self._proofs(proof_keys)
        decision = plan_expiry(infos, proofs, now, self._target.backup, archives=archives, doubtful=doubtful)
        moments = restorable_moments(infos, archives, decision.since)
        self._seen = seen = _Seen(
            {info.backup_id: info for info in infos}, frozenset(proof_keys), archives, decision, moments
        )
        notes = list(decision.notes)
        changes = [_backup_change(info, self._target) for info in decision.drop]
        changes += self._wal_changes(seen)
        changes += self._leftovers(infos, now, notes)
        changes += self._key_changes(seen, now, notes)
        return Plan(
            self.name,
            self.target_id,
            tuple(changes),
            now,
            population={BACKUP: len(infos)},
            facts={
                "since": decision.since.isoformat(),
                "restorable": [_span(piece) for pieces in moments.values() for piece in pieces],
                "last_proven": decision.last_proven,
                "kept": [{"backup": key, "why": list(why)} for key, why in decision.keep.items()],
                "unreadable": [info.backup_id for info in infos if info.error is not None],
                "notes": notes,
            },
        )

    def _archives(self) -> list[Archive]:
        prefix = self._repository.wal_prefix()
        known = [int(name) for name in self._store.list_folders(prefix) if name.isdigit()]
        return [archive for sysid in sorted(known) if (archive := read_archive(self._repository, sysid)) is not None]

    def _proof_keys(self) -> list[str]:
        return [info.key for info in self._store.list(f"{self.target_id}/proof/")]

    def _proofs(self, keys: Iterable[str]) -> tuple[list[Proof], set[str]]:
        """The verdicts, and the backups of which one cannot be read."""
        proofs: list[Proof] = []
        doubtful: set[str] = set()
        for key in keys:
            try:
                proofs.append(Proof.model_validate_json(self._repository.read_record(key)))
            except (CorruptionError, ValueError):
                doubtful.add(key.split("/")[2])
        return proofs, doubtful

    def _wal_changes(self, seen: _Seen) -> Iterable[Change]:
        archives = {archive.system_identifier: archive for archive in seen.archives}
        for cut in seen.decision.cuts:
            archive = archives[cut.system_identifier]
            change = _wal_change(cut, archive)
            seen.cuts[change.object] = cut
            yield change

    def _key_changes(self, seen: _Seen, now: datetime, notes: list[str]) -> Iterable[Change]:
        """At a copy: the data keys with which nothing was sealed that stays. A young one may be there for what is on its way."""
        if self._needed is None:
            return
        archives = {archive.system_identifier: archive for archive in seen.archives}
        cut = {item.info.key for c in seen.decision.cuts for item in _below(c, archives[c.system_identifier])}
        try:
            needed = self._needed.places(without={info.backup_id for info in seen.decision.drop} | cut)
        except CorruptionError as error:
            notes.append(f"no data key is removed while it cannot be read what needs it: {error}")
            return
        old = {info.key for info in self._needed.stored() if now - info.modified > DEAD_AFTER}
        seen.keys = frozenset(old - needed)
        if seen.keys:
            why = "nothing that stays was sealed with them"
            yield Change(KEYS, "keys", {"keys": len(seen.keys)}, None, False, {"why": why})

    def _leftovers(self, infos: Sequence[BackupInfo], now: datetime, notes: list[str]) -> Iterable[Change]:
        """Dead runs and uploads that nobody finished, where it is certain that nobody works on them."""
        runs = [run for backup_id in self._repository.unfinished() if (run := self._run(backup_id, notes))]
        dead = dead_runs(runs, infos, now, most=self._target.backup.expiry.max_count)
        uploads = [
            upload for upload in self._store.incomplete_uploads(f"{self.target_id}/") if now - upload[2] > DEAD_AFTER
        ]
        if not dead and not uploads:
            return
        if why := self._maybe_running():
            notes.append(f"{len(dead)} dead runs and {len(uploads)} unfinished uploads are left alone: {why}")
            return
        for run in dead:
            began = {"began": run.began.isoformat(), "objects": run.objects, "bytes": run.size}
            yield Change(DEAD_RUN, run.backup_id, began, None, False, {"why": "it has no manifest and never will"})
        for key, upload_id, begun in uploads:
            name = f"{key}?uploadId={upload_id}"
            if self._seen is not None:
                self._seen.uploads[name] = (key, upload_id)
            yield Change(UPLOAD, name, {"begun": begun.isoformat()}, None, False, {"why": "nobody finished it"})

    def _run(self, backup_id: str, notes: list[str]) -> Run | None:
        match = _RUN_ID.fullmatch(backup_id)
        began = None
        if match:
            with contextlib.suppress(ValueError):
                began = datetime.strptime(match[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if began is None:
            notes.append(f"{backup_id!r} is no backup of ours and is left alone")
            return None
        found = list(self._repository.objects_of(backup_id))
        if not found:
            return None  # some stores go on listing a folder for a while after its last object went
        newest = max(info.modified for info in found)
        return Run(backup_id, began, newest, len(found), sum(info.size for info in found))

    def _maybe_running(self) -> str | None:
        """Why it must be taken that a backup is running; None where it is certain that none is."""
        if self._running is None:
            return "whether a backup is running was not asked"
        try:
            who = self._running()
        except OpsError as error:
            return str(error)
        return f"a backup is running ({who})" if who else None

    # Check

    def check(self, change: Change) -> Applied | None:
        seen = self._need_seen()
        if change.kind == KEYS:
            return None  # which of them are still needed is looked at when they go
        if change.kind in (DEAD_RUN, UPLOAD):
            return self._check_leftover(change)
        return self._check_planned(change, seen)

    def _check_planned(self, change: Change, seen: _Seen) -> Applied | None:
        """A backup or WAL: whether what the plan was made from is still so."""
        finished = self._finished()
        kept = [b for b in seen.decision.keep if b not in finished]
        if kept:
            return Applied(Outcome.CONTENDED, f"{kept[0]}, which was to stay, is gone: make a new plan")
        if frozenset(self._proof_keys()) != seen.proof_keys:
            return Applied(Outcome.CONTENDED, "a verdict has come in since the plan was made: make a new plan")
        try:
            present = [self._info(backup_id) for backup_id in sorted(finished)]
        except CorruptionError as error:
            return Applied(Outcome.CONTENDED, f"a backup that has come in since the plan cannot be read: {error}")
        if change.kind == BACKUP:
            return self._check_backup(change.object, present)
        return self._check_wal(seen.cuts[change.object], present)

    def _check_leftover(self, change: Change) -> Applied | None:
        if why := self._maybe_running():
            return Applied(Outcome.CONTENDED, why)
        if change.kind == DEAD_RUN:
            if self._store.head(self._repository.manifest_key(change.object)) is not None:
                return Applied(Outcome.CONTENDED, "it has a manifest now")
            run = self._run(change.object, [])
            if run is not None and self._clock.now() - run.newest_put <= DEAD_AFTER:
                return Applied(Outcome.CONTENDED, f"something was put into it at {run.newest_put.isoformat()}")
        return None

    def _check_backup(self, backup_id: str, present: Sequence[BackupInfo]) -> Applied | None:
        children = [info.backup_id for info in present if info.parent_id == backup_id]
        if children:
            if pinned := self._pinned.issuperset(children):
                self._pinned.add(backup_id)
            why = f"{children[0]} builds on it and is still there"
            return Applied(Outcome.PINNED if pinned else Outcome.CONTENDED, why)
        if all(info.backup_id != backup_id for info in present) and not any(self._repository.objects_of(backup_id)):
            return Applied(Outcome.ALREADY_DONE, "it is not in the store any more")
        return None

    def _check_wal(self, cut: Cut, present: Sequence[BackupInfo]) -> Applied | None:
        """Every backup that is still there keeps its WAL, also one that was to go and is pinned."""
        mine = [info for info in present if info.system_identifier == cut.system_identifier]
        if cut.timeline is None:
            needing = mine
        else:
            archive = next(a for a in self._need_seen().archives if a.system_identifier == cut.system_identifier)
            size, lines = archive.segment_size, archive.lines
            needing = [info for info in mine if _needs_below(cut, wal_needs([info], lines, size))]
            if not mine:
                return Applied(Outcome.CONTENDED, "no backup of this cluster is left")
        if not needing:
            return None
        outcome = Outcome.PINNED if self._pinned.issuperset(i.backup_id for i in needing) else Outcome.CONTENDED
        return Applied(outcome, f"{needing[0].backup_id} is still there and needs it")

    def _finished(self) -> set[str]:
        ids = [backup_id for backup_id in self._repository.backup_ids() if _RUN_ID.fullmatch(backup_id)]

        def has_manifest(backup_id: str) -> bool:
            return self._store.head(self._repository.manifest_key(backup_id)) is not None

        with ThreadPoolExecutor(_WORKERS) as pool:
            return {backup_id for backup_id, found in zip(ids, pool.map(has_manifest, ids), strict=True) if found}

    def _info(self, backup_id: str) -> BackupInfo:
        """Manifests are written once, so one that was read need not be read again."""
        known = self._need_seen().infos
        if backup_id not in known:
            known[backup_id] = info_of(self._repository.any_manifest(backup_id), None)
        return known[backup_id]

    def _need_seen(self) -> _Seen:
        if self._seen is None:
            raise RefusedError("nothing is removed without a plan", where=self.target_id)
        return self._seen

    # Apply

    def apply(self, change: Change) -> Applied:
        if change.kind == BACKUP:
            return self._remove_backup(change.object)
        if change.kind == DEAD_RUN:
            return self._remove_objects(change.object)
        if change.kind == WAL:
            return self._remove_wal(self._need_seen().cuts[change.object])
        if change.kind == KEYS and self._needed is not None:
            return self._remove_keys(self._needed)
        key, upload_id = self._need_seen().uploads[change.object]
        self._store.abort_upload(key, upload_id)
        return Applied(Outcome.APPLIED, "aborted")

    def _remove_backup(self, backup_id: str) -> Applied:
        manifest = self._repository.manifest_key(backup_id)
        if self._store.delete(manifest) is DeleteOutcome.PINNED:
            self._pinned.add(backup_id)
            retention = self._store.retention(manifest)
            until = f" until {retention.until.isoformat()}" if retention else ""
            return Applied(Outcome.PINNED, f"the store's Object Lock keeps it{until}")
        return self._remove_objects(backup_id)

    def _remove_objects(self, backup_id: str) -> Applied:
        done = self._delete([info.key for info in self._repository.objects_of(backup_id)])
        if done[DeleteOutcome.PINNED]:
            return Applied(
                Outcome.PINNED,
                "it is no backup any more; some of its objects are kept by the store's Object Lock and go as a dead run",
                _counts(done),
            )
        return Applied(Outcome.APPLIED, "removed", _counts(done))

    def _remove_wal(self, cut: Cut) -> Applied:
        keys, done = self._wal_keys(cut), Counter[DeleteOutcome]()
        for begin in range(0, len(keys), _CHUNK):
            done += self._delete(keys[begin : begin + _CHUNK])
            if done[DeleteOutcome.PINNED]:
                # What is locked longest stands at the end; going on would leave holes behind it.
                left = len(keys) - begin - _CHUNK
                return Applied(
                    Outcome.PINNED, "the store's Object Lock keeps the rest", _counts(done) | {"left": max(0, left)}
                )
        return Applied(Outcome.APPLIED, "removed", _counts(done))

    def _remove_keys(self, needed: Needed) -> Applied:
        """The planned ones that nothing needs by now. What came in while they went, and needs one, gets it back; where that
        cannot be told, all of them come back."""
        planned = self._need_seen().keys
        bodies = {key: self._store.get(key) for key in sorted(planned - needed.places())}
        again = set(bodies)
        try:
            done = self._delete(list(bodies))
            again &= needed.places()
        finally:
            for key in again:
                with contextlib.suppress(ConflictError):  # whoever needs it was quicker
                    self._store.put(key, bodies[key], if_absent=True, retain=True)
        stay = len(planned) - len(bodies)
        said = f"removed; {stay} are needed again and stay" if stay else "removed"
        return Applied(Outcome.PINNED if done[DeleteOutcome.PINNED] else Outcome.APPLIED, said, _counts(done))

    def _wal_keys(self, cut: Cut) -> list[str]:
        """The oldest first; the notes of gaps that lie wholly below come last."""
        prefix = self._repository.wal_prefix(cut.system_identifier)
        if cut.timeline is None:
            return [info.key for info in self._store.list(prefix)]
        archive = next(a for a in self._need_seen().archives if a.system_identifier == cut.system_identifier)

        def below(name: str) -> bool:
            timeline, start = segment_start(name, archive.segment_size)
            return cut.holds(timeline, start // archive.segment_size)

        def names(folder: str, pattern: re.Pattern[str]) -> Iterable[tuple[str, ObjectInfo]]:
            for info in self._store.list(folder):
                if match := pattern.fullmatch(info.key.removeprefix(folder)):
                    yield match[1], info

        segments = names(f"{prefix}{cut.timeline:08X}/", _SEGMENT_KEY)
        notes = names(f"{prefix}gaps/", _GAP_KEY)
        return [info.key for found in (segments, notes) for name, info in found if below(name)]

    def _delete(self, keys: Sequence[str]) -> Counter[DeleteOutcome]:
        with ThreadPoolExecutor(_WORKERS) as pool:
            return Counter(pool.map(self._store.delete, keys))

    # Verify

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By listing the store again and reading every manifest again."""
        seen = self._need_seen()
        infos, wrong = self._look_again(seen)
        archives = self._archives()
        removed = [
            change.object
            for change in plan.changes
            if change.kind in (BACKUP, DEAD_RUN) and outcomes[change.object].outcome is Outcome.APPLIED
        ]
        whole = "; ".join(wrong[:10]) or f"{len(seen.decision.keep)} are whole, as the store lists them"
        return Verification(
            (
                self._check_gone(removed),
                Check("kept backups", not wrong, whole),
                _check_promise(seen, infos, archives),
                self._check_redundancy(seen, infos),
                _check_proven(seen, infos),
            )
        )

    def _look_again(self, seen: _Seen) -> tuple[dict[str, BackupInfo], list[str]]:
        """What can be read now, and what is wrong with a kept backup: each object that its manifest names, at its size."""
        infos: dict[str, BackupInfo] = {}
        wrong, unreadable = list[str](), set[str]()
        for backup_id in sorted(self._finished()):
            kept = backup_id in seen.decision.keep
            try:
                manifest = self._repository.any_manifest(backup_id)
            except CorruptionError as error:
                if kept and seen.infos[backup_id].error is None:
                    wrong.append(str(error))
                unreadable.add(backup_id)
                continue
            infos[backup_id] = info_of(manifest, None)
            if kept:
                wrong += self._missing_objects(manifest)
        readable = [backup_id for backup_id in seen.decision.keep if seen.infos[backup_id].error is None]
        wrong += [
            f"{backup_id}: its manifest is gone" for backup_id in readable if backup_id not in {*infos, *unreadable}
        ]
        for backup_id in readable:
            parent = seen.infos[backup_id].parent_id
            if parent in seen.infos and parent not in infos and seen.infos[parent].error is None:
                wrong.append(f"{backup_id}: {parent}, on which it builds, is gone")
        return infos, wrong

    def _missing_objects(self, manifest: AnyManifest) -> list[str]:
        listed = {info.key: info.size for info in self._repository.objects_of(manifest.backup_id)}
        wrong = [item.key for item in manifest.named if listed.get(item.key) != item.stored]
        if not wrong:
            return []
        return [f"{manifest.backup_id}: {len(wrong)} objects are not there as they were written, the first: {wrong[0]}"]

    def _check_gone(self, removed: Sequence[str]) -> Check:
        left = [backup_id for backup_id in removed if any(self._repository.objects_of(backup_id))]
        if left:
            return Check("removed", False, f"of {', '.join(left)} something is still there")
        return Check("removed", True, f"nothing is left of {len(removed)} backups and dead runs")

    def _check_redundancy(self, seen: _Seen, infos: Mapping[str, BackupInfo]) -> Check:
        wanted = self._target.backup.minimum_redundancy
        before, after = _fulls(seen.infos.values()), _fulls(infos.values())
        said = f"{after} full backups are there, {wanted} are wanted"
        return Check("redundancy", after >= min(wanted, before), said)


def _backup_change(info: BackupInfo, target: Backed) -> Change:
    before = {
        "kind": info.kind.value,
        "parent": info.parent_id,
        "started_at": info.started_at.isoformat(),
        "ended_at": info.ended_at.isoformat(),
        "bytes": info.stored,
    }
    from ops_platform.inventory import format_duration

    promised = format_duration(target.backup.recovery_window)
    return Change(BACKUP, info.backup_id, before, None, False, {"why": f"no moment of the last {promised} needs it"})


def _below(cut: Cut, archive: Archive) -> list[WalObject]:
    """What is cut."""
    size = archive.segment_size

    def number(item: WalObject) -> int:
        return segment_start(item.name, size)[1] // size

    return [
        item
        for item in archive.listing
        if (cut.timeline is None if item.history else cut.holds(item.timeline, number(item)))
    ]


def _wal_change(cut: Cut, archive: Archive) -> Change:
    size, gone = archive.segment_size, _below(cut, archive)
    segments = [item for item in gone if not item.history]
    before = {
        "first": min((item.name for item in segments), default=None),
        "last": max((item.name for item in segments), default=None),
        "files": len(gone),
        "bytes": sum(item.info.size for item in gone),
    }
    if cut.timeline is None:
        detail = {"why": "no backup of this cluster is left"}
        return Change(WAL, f"wal/{cut.system_identifier}", before, None, False, detail)
    below = None if cut.below is None else segment_name(cut.timeline, cut.below * size, size)
    why = "the oldest kept backup begins behind it" if below else "no kept backup is on this timeline or before it"
    place = f"wal/{cut.system_identifier}/{cut.timeline:08X}"
    return Change(WAL, place, before, {"first": below}, False, {"why": why})


def _needs_below(cut: Cut, needs: Mapping[int, int]) -> bool:
    """Whether something of what is cut is needed."""
    return any(cut.holds(timeline, number) for timeline, number in needs.items())


def _counts(done: Counter[DeleteOutcome]) -> dict[str, int]:
    return {outcome.value: count for outcome, count in sorted(done.items())}


def _fulls(infos: Iterable[BackupInfo]) -> int:
    return sum(1 for info in infos if info.error is None and info.kind is BackupKind.FULL)


def _span(piece: tuple[datetime, datetime]) -> list[str]:
    return [moment.astimezone(UTC).isoformat() for moment in piece]


def _check_promise(seen: _Seen, infos: Mapping[str, BackupInfo], archives: Sequence[Archive]) -> Check:
    """What could be restored before, from the window's start on, can be restored now."""
    after = restorable_moments(list(infos.values()), archives, seen.decision.since)
    lost = [piece for sysid, pieces in seen.moments.items() for piece in lost_moments(pieces, after.get(sysid, []))]
    if lost:
        return Check("recovery window", False, "lost: " + "; ".join(" to ".join(_span(piece)) for piece in lost))
    kept = [" to ".join(_span(piece)) for pieces in after.values() for piece in pieces]
    return Check("recovery window", True, "; ".join(kept) or "nothing could be restored before either")


def _check_proven(seen: _Seen, infos: Mapping[str, BackupInfo]) -> Check:
    proven = seen.decision.last_proven
    if proven is None:
        return Check("last proven backup", True, "there was none")
    there = proven in infos
    return Check("last proven backup", there, proven if there else f"{proven} is gone")
