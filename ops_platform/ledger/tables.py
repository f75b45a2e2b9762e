"""A domain's own tables beside the ledger: what changes in them and the entry that says so are one transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import ClassVar, LiteralString

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.ledger.ledger import Ledger, LedgerTransaction

_SETUP = 1  # of each space of locks: held while the tables are made


class Tables:
    """Safe for threads and for several machines. Raises UnreachableError where PostgreSQL is away."""

    SCHEMA: ClassVar[LiteralString]  # makes what is not there
    LOCKS: ClassVar[int]  # the space of the domain's advisory locks; 1 in it is ours

    def __init__(self, ledger: Ledger, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.ledger = ledger
        self.clock = clock
        self._ready = False

    @contextlib.contextmanager
    def transaction(self) -> Generator[LedgerTransaction]:
        """Over tables that are there."""
        if not self._ready:
            with self.ledger.transaction() as t:
                t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [self.LOCKS, _SETUP])
                t.connection.execute(self.SCHEMA)
            self._ready = True
        with self.ledger.transaction() as t:
            yield t
