"""Incidents, approvals, claims and the pause switch in the platform's PostgreSQL, schema `ops_remediation`.

Every change of an incident and its entry in the ledger are one transaction, and asks for the version that its author holds: whoever is
late changes nothing. What bounds actions (cooldown, budgets, circuit breaker, failure domains) is claimed here, one claim at a time.
"""

from __future__ import annotations

from datetime import timedelta

from ops_platform.remediation.model import Figures, State
from ops_platform.remediation.store.admission import Admission
from ops_platform.remediation.store.decisions import Decisions
from ops_platform.remediation.store.messages import Messages
from ops_platform.remediation.store.signals import Signals
from ops_platform.remediation.store.tables import pause_of


class Store(Admission, Decisions, Signals, Messages):
    """The incidents of one platform, whole. Each room of it is a module beside this one."""

    def figures(self) -> Figures:
        """What there is of everything, in one look."""
        with self.transaction() as t:
            states = t.connection.execute(
                "select state, count(*), min(opened_at) from ops_remediation.incidents where state <> 'closed' group by state"
            ).fetchall()
            endings = t.connection.execute(
                "select rule, ending, count(*) from ops_remediation.incidents where state = 'closed' group by 1, 2"
            ).fetchall()
            actions = t.connection.execute(
                "select playbook, coalesce(helped::text, 'unknown'), count(*) from ops_remediation.claims group by 1, 2"
            ).fetchall()
            unsent = t.connection.execute(
                "select count(*), min(at) from ops_remediation.messages where sent_at is null"
            ).fetchone()
            seen = t.connection.execute("select name, at from ops_remediation.seen").fetchall()
            lag = t.connection.execute("select system, topic, part, messages from ops_remediation.lag").fetchall()
            paused = pause_of(t)
        count, oldest = unsent or (0, None)
        return Figures(
            {State(state): (number, since) for state, number, since in states},
            {(rule, ending): number for rule, ending, number in endings},
            {(book, helped): number for book, helped, number in actions},
            count, oldest, dict(seen), paused, {(row[0], row[1], row[2]): row[3] for row in lag},
        )  # fmt: skip

    def clock_offset(self) -> timedelta:
        """Our clock minus the database's."""
        with self.transaction() as t:
            row = t.connection.execute("select clock_timestamp()").fetchone()
        return self.clock.now() - (row or [self.clock.now()])[0]
