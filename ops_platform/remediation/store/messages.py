"""What people are to be told, and which of their answers were taken already."""

from __future__ import annotations

from datetime import timedelta

from ops_platform.remediation.model import Message, State
from ops_platform.remediation.store.tables import Tables


class Messages(Tables):
    """The outbox of messages, and the requests of buttons."""

    def unsent(self, limit: int = 100) -> list[Message]:
        with self.transaction() as t:
            rows = t.connection.execute(
                "select id, incident, version, state, reason, at from ops_remediation.messages where sent_at is null"
                " order by id limit %s",
                [limit],
            ).fetchall()
        return [Message(row[0], row[1], row[2], State(row[3]), row[4], row[5]) for row in rows]

    def pass_over_unsent(self) -> None:
        """Nobody is to hear of them."""
        with self.transaction() as t:
            t.connection.execute(
                "update ops_remediation.messages set sent_at = %s where sent_at is null", [self.clock.now()]
            )

    def sent(self, message: Message, *, thread: str | None = None) -> None:
        """`thread`: of the first message about the incident; later ones are put below it."""
        with self.transaction() as t:
            t.connection.execute(
                "update ops_remediation.messages set sent_at = %s where id = %s", [self.clock.now(), message.id]
            )
            if thread is not None:
                t.connection.execute(
                    "update ops_remediation.incidents set thread = coalesce(thread, %s) where id = %s",
                    [thread, message.incident],
                )

    def first_time(self, signature: str, *, keep: timedelta = timedelta(hours=1)) -> bool:
        """Whether this request was never taken before; from now on it was."""
        now = self.clock.now()
        with self.transaction() as t:
            t.connection.execute("delete from ops_remediation.requests where at < %s", [now - keep])
            done = t.connection.execute(
                "insert into ops_remediation.requests values (%s, %s) on conflict do nothing", [signature, now]
            )
            return done.rowcount == 1
