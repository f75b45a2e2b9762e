"""Where scorecards stand: sealed in the target's repository, so that they are read on any machine and made by none without the keys."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from ops_platform.backup.model import BackupInfo, Proof
from ops_platform.backup.opening import open_repository
from ops_platform.backup.repository import Repository
from ops_platform.errors import CorruptionError
from ops_platform.recovery.model import Scorecard, Verdict

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed


def repository_of(access: Access, target: Backed) -> Repository | None:
    """Of a native target its repository; of another engine's the store and keys that the inventory names for its proofs, or None."""
    where = target.repository
    if where.store is None or where.keys is None:
        return None
    return open_repository(access, where.store, where.keys, target)


def new_verification_id(began: datetime) -> str:
    """Sorts by time to the millisecond, so that of two verifications in one second the newer one counts; the rest is random."""
    return f"{began:%Y%m%dT%H%M%SZ}-{began.microsecond // 1000:03x}{secrets.token_hex(3)[:5]}"


def scorecard_key(target_id: str, verification_id: str) -> str:
    return f"{target_id}/scorecard/{verification_id}.json"


def keep(repository: Repository, card: Scorecard) -> Proof | None:
    """Store the scorecard and, where a backup was looked at, its proof beside the backup."""
    key = scorecard_key(card.target_id, card.verification_id)
    data_key = repository.keys.new_data_key()
    repository.put_record(key, card.model_dump_json().encode(), data_key)
    if card.backup_id is None:
        return None
    proof = Proof(
        target_id=card.target_id,
        backup_id=card.backup_id,
        verdict=card.verdict.value,
        verified_at=card.ended_at,
        recovery_target=card.recovery_target,
        proven_until=card.newest_commit if card.verdict is Verdict.PASS else None,
        rpo_seconds=measured(card, "rpo"),
        rto_seconds=measured(card, "rto"),
        scorecard=key,
    )
    repository.put_proof(proof, card.verification_id, data_key)
    return proof


def measured(card: Scorecard, name: str) -> float | None:
    return next((o.measured_seconds for o in card.objectives if o.name == name), None)


def scorecards(repository: Repository, *, newest: int | None = None) -> list[Scorecard]:
    """Oldest first; `newest` reads only so many. Raises CorruptionError naming one that cannot be read."""
    keys = sorted(info.key for info in repository.store.list(f"{repository.target_id}/scorecard/"))
    return [_scorecard(repository, key) for key in (keys[-newest:] if newest else keys)]


def _scorecard(repository: Repository, key: str) -> Scorecard:
    try:
        return Scorecard.model_validate_json(repository.read_record(key))
    except ValueError as error:
        raise CorruptionError("this scorecard cannot be read", where=key) from error


_LOOKED_BACK = 400  # scorecards, for the newest that were picked by turns


def next_turn(repository: Repository | None) -> int:
    """Of the proofs by turns. Those that were asked for, and those that follow each backup, are no turns: they would skip some.

    A turn that could not be verified is taken again, once: what never can be must not keep the others from their turns.
    """
    turns = _turns(repository) if repository is not None else iter(())
    last = next(turns, None)
    if last is None:
        return 0
    number, verdict = last
    if verdict is Verdict.COULD_NOT_VERIFY and next(turns, (None, None))[0] != number:
        return number
    return number + 1


def _turns(repository: Repository) -> Iterator[tuple[int, Verdict]]:
    """The proofs by turns among the newest few hundred, the newest first."""
    keys = sorted(info.key for info in repository.store.list(f"{repository.target_id}/scorecard/"))
    for card in (_scorecard(repository, key) for key in reversed(keys[-_LOOKED_BACK:])):
        if card.turn is not None:
            yield card.turn, card.verdict


def last_proof(proofs: Sequence[Proof]) -> Proof | None:
    """The newest PASS."""
    return max((p for p in proofs if p.verdict == "PASS"), key=lambda proof: proof.verified_at, default=None)


def with_proofs(backups: Sequence[BackupInfo], repository: Repository | None) -> list[BackupInfo]:
    """Backups of another engine with the proofs that we keep for it."""
    from dataclasses import replace

    if repository is None:
        return list(backups)
    proofs = {proof.backup_id: proof for proof in repository.proofs()}
    return [replace(b, proof=proofs.get(b.backup_id)) if b.proof is None else b for b in backups]
