"""What every room of the store has: a transaction over the tables of remediation, and whether all is paused."""

from __future__ import annotations

from ops_platform import ledger
from ops_platform.ledger import LedgerTransaction
from ops_platform.remediation.model import Pause
from ops_platform.remediation.store.schema import SCHEMA, SPACE


class Tables(ledger.Tables):
    SCHEMA = SCHEMA
    LOCKS = SPACE


def pause_of(t: LedgerTransaction) -> Pause | None:
    row = t.connection.execute("select why, who, at from ops_remediation.pauses where ended_at is null").fetchone()
    return Pause(*row) if row else None
