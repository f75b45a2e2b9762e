"""Notes of WAL that was lost, in the store beside it: every machine knows of a gap that the receiver met."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from ops_platform.backup.model import segment_name, segment_start
from ops_platform.backup.repository import Repository
from ops_platform.backup.wal import SEGMENT_NAME
from ops_platform.errors import CorruptionError


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
