"""What every room of the store has: a transaction over the tables of drills."""

from __future__ import annotations

from ops_platform import ledger
from ops_platform.drills.store.schema import SCHEMA, SPACE


class Tables(ledger.Tables):
    SCHEMA = SCHEMA
    LOCKS = SPACE
