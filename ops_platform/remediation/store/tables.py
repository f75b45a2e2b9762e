"""What every room of the store has: the ledger, the clock, a transaction over tables that are there."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.ledger import Ledger, LedgerTransaction
from ops_platform.remediation.model import Pause
from ops_platform.remediation.store.schema import SCHEMA, SETUP, SPACE


class Tables:
    """Safe for threads and for several machines. Raises UnreachableError where PostgreSQL is away."""

    def __init__(self, ledger: Ledger, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.ledger = ledger
        self.clock = clock
        self._ready = False

    @contextlib.contextmanager
    def transaction(self) -> Generator[LedgerTransaction]:
        if not self._ready:
            with self.ledger.transaction() as t:
                t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [SPACE, SETUP])
                t.connection.execute(SCHEMA)
            self._ready = True
        with self.ledger.transaction() as t:
            yield t


def pause_of(t: LedgerTransaction) -> Pause | None:
    row = t.connection.execute("select why, who, at from ops_remediation.pauses where ended_at is null").fetchone()
    return Pause(*row) if row else None
