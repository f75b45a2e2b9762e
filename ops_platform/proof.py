"""A verification with everything that follows from it: the ledger's entry and the report. Used by `ops` and by Dagster alike."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ops_platform.backup.engine import open_engine
from ops_platform.backup.model import Progress, no_progress
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.recovery import records
from ops_platform.recovery.model import Scorecard
from ops_platform.recovery.verify import Pick, verify

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target

HISTORY = 400  # scorecards that a report looks back on


@dataclass(frozen=True)
class Proven:
    scorecard: Scorecard
    report: Path | None


def prove(
    access: Access,
    target: Target,
    *,
    pick: Pick | None = None,
    at: datetime | None = None,
    backup_id: str | None = None,
    full: bool = False,
    report: bool = True,
    actor: str,
    progress: Progress = no_progress,
    clock: Clock = SYSTEM_CLOCK,
) -> Proven:
    """Verify, record, report. Raises what `verify` raises, and OpsError where the record cannot be written."""
    directory = reports_directory(access)
    card = verify(
        access, target, pick=pick, at=at, backup_id=backup_id, full=full, data_docs=directory / target.id / "data-docs" if report else None,
        progress=progress, clock=clock,
    )  # fmt: skip
    record(access, card, actor)
    return Proven(card, write_target_report(access, target, clock=clock) if report else None)


def record(access: Access, card: Scorecard, actor: str) -> None:
    """The verdict in the ledger, where the platform has one."""
    if access.inventory.platform.database is None:
        return
    import hashlib

    from ops_platform.ledger import Ledger

    body = {
        "verification_id": card.verification_id,
        "verdict": card.verdict.value,
        "backup_id": card.backup_id,
        "backup_digest": card.backup_digest,
        "recovery_target": card.recovery_target,
        "objectives": {o.name: o.measured_seconds for o in card.objectives},
        "gates": {gate.id: gate.status.value for gate in card.gates},
        "scorecard_sha256": hashlib.sha256(card.model_dump_json().encode()).hexdigest(),
    }
    with Ledger(access.platform_db) as ledger:
        ledger.append("backup.verification", card.target_id, body, actor=actor)


def reports_directory(access: Access) -> Path:
    return access.path(access.inventory.platform.reports)


def write_target_report(access: Access, target: Target, *, clock: Clock = SYSTEM_CLOCK) -> Path:
    """The target's page and the page over all targets, from what stands in the stores."""
    from ops_platform.reports.html import target_report, write_report

    cards = _cards(access, target)
    engine = open_engine(access, target, clock=clock)
    backups = records.with_proofs(engine.list(), records.repository_of(access, target))
    html = target_report(
        target, cards[-1] if cards else None, cards, engine.window(), backups, generated_at=clock.now()
    )
    page = write_report(reports_directory(access), target.id, html)
    write_index(access, clock=clock)
    return page


def write_index(access: Access, *, clock: Clock = SYSTEM_CLOCK) -> Path:
    """One line for each target, worst first. A target whose store cannot be read stands there with the reason."""
    from ops_platform.errors import OpsError
    from ops_platform.reports.html import Row, index_report, write_report

    rows: list[Row] = []
    for target in access.inventory.targets:
        try:
            cards = _cards(access, target, newest=1)
            window = open_engine(access, target, clock=clock).window()
            rows.append(Row(target, cards[-1] if cards else None, window))
        except OpsError as error:
            rows.append(Row(target, None, None, str(error)))
    return write_report(reports_directory(access), None, index_report(rows, clock.now()))


def _cards(access: Access, target: Target, newest: int = HISTORY) -> list[Scorecard]:
    repository = records.repository_of(access, target)
    return records.scorecards(repository, newest=newest) if repository is not None else []
