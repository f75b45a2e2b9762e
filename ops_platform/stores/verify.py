"""Proves a store's backup: fetched, its own sums checked, restored into a sandbox that serves, looked at, and the sandbox gone.

The same verdicts, scorecard and proof as of PostgreSQL (`recovery.verify`). Level 1 is what the bytes alone tell: digests, the store's
own sums, age. Level 2 is reached when the restored store answered every check.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ops_platform import __version__
from ops_platform.backup.model import BackupInfo, Progress, StoreManifest, no_progress
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.counting import count_of
from ops_platform.errors import CorruptionError, CouldNotVerifyError, OpsError, UsageError
from ops_platform.recovery import records
from ops_platform.recovery.choosing import Pick
from ops_platform.recovery.findings import FAILED, PASSED, UNCHECKED, Finding, Record
from ops_platform.recovery.model import GateStatus, Objective, Scorecard
from ops_platform.recovery.room import lacking, reserved
from ops_platform.recovery.sandbox import take_away, temporary_home
from ops_platform.recovery.steps import Steps
from ops_platform.recovery.verdict import NOT_RESTORED, stored, verdict_of
from ops_platform.stores.fetch import fetch_backup
from ops_platform.stores.kind import NOT_APPLICABLE, Check, Kind, MadeElsewhere, Saved, open_kind

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.systems import StoreTarget

LEVELS = {
    0: "level 0: nothing of the backup could be read",
    1: "level 1: the bytes, their sums and their age; the data itself was not looked at",
    2: "level 2: restored, serving, and looked at",
}
_ROOM = 2.5  # of the bytes of a backup: the parts themselves, and the store that is made of them


class StoreVerification:
    """One verification from beginning to end. Use `verify`."""

    def __init__(
        self,
        access: Access,
        target: StoreTarget,
        kind: Kind,
        *,
        pick: Pick | None,
        backup_id: str | None,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self.access, self.target, self.kind, self.clock, self.progress = access, target, kind, clock, progress
        self.pick, self.backup_id = pick, backup_id
        self._repository: Repository | None = None
        self.started_at = clock.now()
        self.id = records.new_verification_id(self.started_at)
        self.record = Record(lambda title: progress(title, 0, None))
        self.steps = Steps()
        self.notes: list[str] = []
        self.infos: list[BackupInfo] = []
        self.manifest: StoreManifest | None = None
        self.picked = "nothing"
        self.turn: int | None = None
        self.server = "none"
        self.level = 0
        self.rto_seconds: float | None = None

    def run(self) -> Scorecard:
        home: Path | None = None
        try:
            self.manifest = self._choose()
            home = self._home(self.manifest)
            with reserved([home], self.manifest.raw * _ROOM):
                self._prove(self.manifest, home)
        except UsageError as error:
            if self.backup_id is not None and self.manifest is None:
                raise  # what was asked for does not exist: that is no verdict on anything
            self.record.broken_off(UNCHECKED, error)
        except CorruptionError as error:
            self.record.broken_off(FAILED, error)
        except OpsError as error:
            self.record.broken_off(UNCHECKED, error)
        finally:
            if home is not None:
                take_away(home)
        if home is not None:
            self.record.check("teardown", "The sandbox is gone", _GONE, lambda at=home: _gone(at))
        return self._scorecard()

    @property
    def repository(self) -> Repository:
        """Opened when it is needed: a key service that is away is a verdict."""
        if self._repository is None:
            self._repository = open_target_repository(self.access, self.target)
        return self._repository

    # The choice

    def _choose(self) -> StoreManifest:
        found = self.repository.infos()
        self.notes += [f"{info.backup_id} cannot be read: {info.error}" for info in found if info.error]
        self.infos = [info for info in found if info.error is None]
        if self.backup_id is not None:
            if all(info.backup_id != self.backup_id for info in found):
                raise UsageError(f"there is no backup {self.backup_id}", remedy=f"ops backup list {self.target.id}")
            self.picked = "asked for"
            return self.repository.store_manifest(self.backup_id)
        if not self.infos:
            raise CouldNotVerifyError(
                f"there is no backup of {self.target.id} that can be read", remedy=f"ops backup run {self.target.id}"
            )
        how = self.pick or self._turn()
        if how == "oldest" and len(self.infos) > 1:
            self.picked, chosen = "the oldest backup that is still promised", self.infos[0]
        elif how == "random":
            self.picked, chosen = "a backup by chance", random.Random(self.id).choice(self.infos)  # noqa: S311 - no secret
        else:
            self.picked, chosen = "the newest backup", self.infos[-1]
        return self.repository.store_manifest(chosen.backup_id)

    def _turn(self) -> Pick:
        """The next of the policy's list, as for PostgreSQL."""
        self.turn = records.next_turn(self.repository)
        choices = self.target.backup.verification.pick
        return choices[self.turn % len(choices)]

    # The sandbox

    def _home(self, manifest: StoreManifest) -> Path:
        home = temporary_home(self.target, "verify", elsewhere=elsewhere(self.kind))
        home.chmod(0o700)
        if problem := lacking(home, manifest.raw * _ROOM):
            shutil.rmtree(home)
            raise CouldNotVerifyError(
                f"no room for the sandbox: {problem}",
                where=str(home.parent),
                remedy="free space, or set sandbox.directory",
            )
        return home

    def _prove(self, manifest: StoreManifest, home: Path) -> None:
        began = time.monotonic()
        saved = self._fetch(manifest, home)
        self.record.check("age", "It is as young as the policy asks", "", lambda: self._age(manifest))
        if FAILED in self._ask(self.kind.files(saved)):
            self.notes.append("it was not restored: what stands in the backup is not whole")
            return
        self.level = 1
        with contextlib.ExitStack() as stack:
            with self.steps.timed("restore"):
                restored = stack.enter_context(self.kind.restore(saved, home))
            self.rto_seconds = round(time.monotonic() - began, 3)
            self.server = restored.server
            with self.steps.timed("checks"):
                found = self._ask(restored.checks())
            if PASSED in found and UNCHECKED not in found:
                self.level = 2

    def _fetch(self, manifest: StoreManifest, home: Path) -> Saved:
        saved: list[Saved] = []

        def ask() -> Finding:
            saved.append(fetch_backup(self.repository, manifest, home / "parts", progress=self.progress))
            parts = count_of(len(manifest.parts), "part")
            blocks = count_of(sum(len(part.blocks) for part in manifest.parts), "block")
            return Finding(PASSED, f"{parts}, {count_of(manifest.raw, 'byte')} in {blocks}")

        with self.steps.timed("fetch") as moved:
            moved.bytes = manifest.raw
            found = self.record.check(
                "whole", "Every byte is as it was stored", "SHA-256 and seal of each block, SHA-256 of each part", ask
            )
        if not saved:
            kind = CorruptionError if found.status is FAILED else CouldNotVerifyError
            raise kind("the backup could not be fetched whole", where=manifest.backup_id)
        return saved[0]

    def _age(self, manifest: StoreManifest) -> Finding:
        allowed = self.target.backup.max_age
        age = self.clock.now() - manifest.moment
        text = f"taken at {manifest.moment:%Y-%m-%d %H:%M:%SZ}, {age.total_seconds() / 3600:.1f} h old, {allowed.total_seconds() / 3600:.0f} h are allowed"
        if not self.infos or manifest.backup_id != self.infos[-1].backup_id:
            return Finding(NOT_APPLICABLE, f"it is not the newest one; {text}")
        return Finding(PASSED if age <= allowed else FAILED, text)

    def _ask(self, checks: Iterable[Check]) -> list[GateStatus]:
        """What was found of the backup itself. What is the source's own is in the record, and in a note where it does not hold."""
        found: list[GateStatus] = []
        for check in checks:
            status = self.record.check(check.id, check.title, check.query, check.ask).status
            if check.of_backup:
                found.append(status)
            elif status in (FAILED, UNCHECKED):
                self.notes.append(f"the check {check.id} is about the source: it keeps the backup from nothing")
        return found

    # The scorecard

    def _scorecard(self) -> Scorecard:
        verdict, reason = verdict_of(self.record.gates)
        manifest, moments = self.manifest, [info.started_at for info in self.infos]
        return Scorecard(
            verification_id=self.id,
            target_id=self.target.id,
            environment=self.target.environment,
            classification=self.target.classification.value,
            engine=self.target.kind,
            verdict=verdict,
            reason=f"{reason} ({LEVELS[self.level].partition(':')[0]})",
            started_at=self.started_at,
            ended_at=self.clock.now(),
            backup_id=manifest.backup_id if manifest else None,
            backup_kind="full" if manifest else None,
            backup_ended_at=manifest.ended_at if manifest else None,
            chain=[],
            picked=self.picked,
            turn=self.turn,
            recovery_target="the backup itself",
            reached=f"what {manifest.source} held at {manifest.moment:%Y-%m-%d %H:%M:%SZ}" if manifest else None,
            reached_lsn=None,
            newest_commit=manifest.moment if manifest else None,
            server=self.server,
            strength=LEVELS[self.level],
            objectives=self._objectives(moments[-1] if moments else None),
            steps=self.steps.taken,
            gates=self.record.gates,
            notes=list(dict.fromkeys(self.notes)),
            backup_digest=self._digest(),
            window_earliest=moments[0] if moments else None,
            window_latest=moments[-1] if moments else None,
            written_by=f"ops_platform {__version__}",
        )

    def _objectives(self, newest: datetime | None) -> list[Objective]:
        promised = self.target.objectives
        lost = None if newest is None else max(0.0, round((self.started_at - newest).total_seconds(), 3))
        aged = "age of the newest backup: what came after it would be lost"
        served = (
            "fetch and restore of this backup, until the store served" if self.rto_seconds is not None else NOT_RESTORED
        )
        return [
            Objective.judged("rpo", promised.rpo, lost, aged),
            Objective.judged("rto", promised.rto, self.rto_seconds, served),
        ]

    def _digest(self) -> str | None:
        if self.manifest is None:
            return None
        with contextlib.suppress(OpsError):  # the store is away: the verdict says so
            return self.repository.manifest_digest(self.manifest.backup_id)
        return None


def elsewhere(kind: Kind) -> Callable[[Path], None] | None:
    """What takes away what a restore that was killed had made outside of its directory; None where the kind makes nothing there."""
    return kind.clear if isinstance(kind, MadeElsewhere) else None


_ENDING = 10.0  # seconds
_GONE = "processes that name the directory, the directory"


def _gone(home: Path) -> Finding:
    deadline = time.monotonic() + _ENDING
    while (left := _left(home)) and time.monotonic() < deadline:
        time.sleep(0.05)  # a server that was killed takes its children with it, a moment later
    return Finding(FAILED if left else PASSED, f"left behind: {'; '.join(left)}" if left else "nothing is left")


def _left(home: Path) -> list[str]:
    left = [str(home)] if home.exists() else []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if entry.name != str(os.getpid()) and str(home) in words:
                left.append(f"process {entry.name}: {words[:80]}")
    return left


def verify(
    access: Access,
    target: StoreTarget,
    *,
    pick: Pick | None = None,
    at: datetime | None = None,
    backup_id: str | None = None,
    kind: Kind | None = None,
    progress: Progress = no_progress,
    clock: Clock = SYSTEM_CLOCK,
) -> Scorecard:
    """Prove a backup of a store: what the policy picks, or the one that is asked for.

    Never raises for what is wrong with the backup, the repository or the store: that is the verdict. Raises UsageError for a backup that
    does not exist, and for a moment, which no backup of a store can be brought to.
    """
    if at is not None:
        raise UsageError(
            f"a backup of {target.kind} is restored as it is, not to a moment", remedy="name one with --backup instead"
        )
    running = StoreVerification(
        access,
        target,
        kind or open_kind(access, target),
        pick=pick,
        backup_id=backup_id,
        progress=progress,
        clock=clock,
    )
    return stored(access, target, running.run())
