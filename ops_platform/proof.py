"""A backup or a verification with everything that follows from it: the ledger's entry, the report. Used by `ops` and by Dagster alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ops_platform.backup.engine import catalog
from ops_platform.backup.model import AnyManifest, Manifest, Progress, RecoveryWindow, no_progress
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import CouldNotVerifyError, OpsError, UsageError
from ops_platform.recovery import records
from ops_platform.recovery.choosing import Pick
from ops_platform.recovery.model import Scorecard, Verdict
from ops_platform.recovery.verify import verify

if TYPE_CHECKING:
    from ops_platform.actions import ActionResult
    from ops_platform.backup.replicate import Replicated
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed

HISTORY = 400  # scorecards that a report looks back on


@dataclass(frozen=True)
class Proven:
    """`history`: what the report looked back on, this verification among it; this one alone where no report was written."""

    scorecard: Scorecard
    report: Path | None
    history: list[Scorecard]


def expire(
    access: Access,
    target: Backed,
    *,
    mode: Literal["observe", "enforce"] | None = None,
    approve: str | None = None,
    copy: bool = False,
    actor: str,
) -> list[ActionResult]:
    """Expire backups, and then what only they named outside of the repository. `copy`: the target is one at a copy.

    Raises what `backup.expiry.expire` raises; what a store says against it is the second result's, or raised.
    """
    from ops_platform.backup import expiry
    from ops_platform.inventory.model import Target
    from ops_platform.stores.kind import KeptElsewhere, open_kind

    done = [expiry.expire(access, target, mode=mode, approve=approve, alone=copy, actor=actor)]
    if isinstance(target, Target) or copy or not done[0].ok:
        return done
    if isinstance(kind := open_kind(access, target), KeptElsewhere):
        chosen = mode or target.backup.expiry.mode.value
        done.append(kind.expire(enforce=chosen == "enforce", actor=actor))
    return done


def prove(
    access: Access,
    target: Backed,
    *,
    pick: Pick | None = None,
    at: datetime | None = None,
    backup_id: str | None = None,
    full: bool = False,
    alone: bool = False,
    report: bool = True,
    actor: str,
    progress: Progress = no_progress,
    clock: Clock = SYSTEM_CLOCK,
) -> Proven:
    """Verify, record, report. The ledger's entry needs no key, so that a sealed Vault leaves a record, too.

    Raises what `verify` raises, and OpsError where the record cannot be written: CouldNotVerifyError where nothing was proven either.
    """
    from ops_platform.inventory.model import Target

    directory = reports_directory(access)
    if isinstance(target, Target):
        card = verify(
            access, target, pick=pick, at=at, backup_id=backup_id, full=full, alone=alone,
            data_docs=directory / target.id / "data-docs" if report else None, progress=progress, clock=clock,
        )  # fmt: skip
    else:
        from ops_platform.stores.verify import verify as verify_store

        card = verify_store(access, target, pick=pick, at=at, backup_id=backup_id, progress=progress, clock=clock)
    proven = card.verdict is not Verdict.COULD_NOT_VERIFY
    try:
        record(access, card, actor)
    except OpsError as error:
        if proven:
            raise
        raise CouldNotVerifyError(
            f"{card.reason}; nor can the ledger be written: {error.what}", where=error.where, remedy=error.remedy
        ) from error
    if not report:
        return Proven(card, None, [card])
    try:
        history = look_back(access, target)
        return Proven(card, write_target_report(access, target, history, clock=clock), history or [card])
    except OpsError:
        if proven:
            raise
        return Proven(card, None, [card])  # what kept the proof from being made keeps the history from being read, too


def record(access: Access, card: Scorecard, actor: str) -> None:
    """The verdict in the ledger, where the platform has one."""
    if access.inventory.platform.database is None:
        return
    import hashlib

    from ops_platform.ledger import Ledger

    body = {
        "verification_id": card.verification_id,
        "verdict": card.verdict.value,
        # In our own words alone: what a check of the data found stays in the scorecard, which can be erased.
        "why": [gate.result for gate in card.gates if gate.id in ("run", "record")],
        "backup_id": card.backup_id,
        "backup_digest": card.backup_digest,
        "recovery_target": card.recovery_target,
        "objectives": {o.name: o.measured_seconds for o in card.objectives},
        "gates": {gate.id: gate.status.value for gate in card.gates},
        "scorecard_sha256": hashlib.sha256(card.model_dump_json().encode()).hexdigest(),
    }
    with Ledger(access.platform_db) as ledger:
        ledger.append("backup.verification", card.target_id, body, actor=actor)


def back_up(
    access: Access,
    target: Backed,
    *,
    kind: Literal["auto", "full", "incremental"] = "auto",
    actor: str,
    progress: Progress = no_progress,
) -> AnyManifest:
    """Take a backup, and say so in the ledger where the platform has one. It counts when it was proven.

    Raises what `run_backup` raises, and OpsError where the record cannot be written; the backup exists then all the same.
    """
    from ops_platform.ledger import Ledger

    manifest = _take(access, target, kind, progress)
    if access.inventory.platform.database is None:
        return manifest
    body: dict[str, object] = {
        "backup_id": manifest.backup_id,
        "bytes": manifest.raw,
        "stored_bytes": manifest.stored,
        "ended_at": manifest.ended_at.isoformat(),
    }
    if isinstance(manifest, Manifest):
        more = {"kind": manifest.kind.value, "why": manifest.why, "source_role": manifest.source_role}
        body |= {**more, "timeline": manifest.timeline}
    else:
        body |= {"kind": "full", "store": manifest.store, "parts": len(manifest.parts)}
    with Ledger(access.platform_db) as ledger:
        ledger.append("backup.taken", manifest.target_id, body, actor=actor)
    return manifest


def _take(
    access: Access, target: Backed, kind: Literal["auto", "full", "incremental"], progress: Progress
) -> AnyManifest:
    from ops_platform.inventory.model import Target

    if isinstance(target, Target):
        from ops_platform.backup.basebackup import run_backup

        return run_backup(access, target, kind=kind, progress=progress)
    from ops_platform.stores.dump import run_backup as run_dump

    if kind == "incremental":
        raise UsageError(f"there are no incremental backups of {target.kind}", remedy="leave --incremental away")
    return run_dump(access, target, progress=progress)


def copy_over(
    access: Access, target: Backed, copy_id: str, *, actor: str, progress: Progress = no_progress
) -> Replicated:
    """Bring a copy of the target's repository up to date, and say so in the ledger where anything was copied or is wrong.

    Raises what `replicate` raises, and OpsError where the record cannot be written.
    """
    from ops_platform.backup.replicate import replicate
    from ops_platform.inventory.model import copy_named
    from ops_platform.ledger import Ledger

    done = replicate(access, target, copy_id, progress=progress)
    if access.inventory.platform.database is None or not (done.objects or done.wrong):
        return done
    body = {
        "copy": copy_id,
        "store": access.store(copy_named(target, copy_id).store).name,
        "objects": done.objects,
        "bytes": done.bytes,
        "backups": done.backups,
        "wrong": done.wrong[:100],
        "until": done.until.isoformat() if done.until else None,
    }
    with Ledger(access.platform_db) as ledger:
        ledger.append("backup.copied", target.id, body, actor=actor)
    return done


def reports_directory(access: Access) -> Path:
    return access.path(access.inventory.platform.reports)


@dataclass(frozen=True)
class Glance:
    """What the page over all targets says of one. Kept beside the target's page, so that the index costs no look into every store."""

    card: Scorecard | None
    window: RecoveryWindow


def look_back(access: Access, target: Backed) -> list[Scorecard]:
    """The newest verifications of the target that the store keeps, oldest first."""
    repository = records.repository_of(access, target)
    return records.scorecards(repository, newest=HISTORY) if repository is not None else []


def write_target_report(
    access: Access, target: Backed, cards: Sequence[Scorecard], *, clock: Clock = SYSTEM_CLOCK
) -> Path:
    """The target's page over these verifications, and the page over all targets, of which the others are read as their pages were."""
    from pydantic import TypeAdapter

    from ops_platform.reports.html import target_report, write_report

    infos, window = catalog(access, target, clock=clock)
    backups = records.with_proofs(infos, records.repository_of(access, target))
    newest = cards[-1] if cards else None
    html = target_report(target, newest, cards, window, backups, generated_at=clock.now())
    page = write_report(reports_directory(access), target.id, html)
    body = TypeAdapter(Glance).dump_json(Glance(newest, window))
    fresh = _glance_file(access, target).with_suffix(f".{os.getpid()}")
    fresh.write_bytes(body)
    fresh.replace(_glance_file(access, target))
    write_index(access, clock=clock)
    return page


def write_index(access: Access, *, clock: Clock = SYSTEM_CLOCK) -> Path:
    """One line for each target, worst first. One without a page, or with one that cannot be read, stands there with the reason."""
    from pydantic import TypeAdapter

    from ops_platform.reports.html import Row, index_report, write_report

    rows: list[Row] = []
    for target in access.inventory.all_backed():
        try:
            seen = TypeAdapter(Glance).validate_json(_glance_file(access, target).read_bytes())
            rows.append(Row(target, seen.card, seen.window))
        except FileNotFoundError:
            rows.append(Row(target, None, None, f"no report was written here yet: ops report {target.id}"))
        except (OSError, ValueError) as error:
            rows.append(
                Row(target, None, None, f"its summary cannot be read ({type(error).__name__}): ops report {target.id}")
            )
    drills = (reports_directory(access) / "drills" / "index.html").is_file()
    return write_report(reports_directory(access), None, index_report(rows, clock.now(), drills=drills))


def _glance_file(access: Access, target: Backed) -> Path:
    return reports_directory(access) / f".{target.id}.json"
