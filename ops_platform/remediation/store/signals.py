"""Signals as they were seen: for replay, for what must always be there, and what a topic still holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from ops_platform.remediation.model import Signal
from ops_platform.remediation.store.tables import Tables

_FIRING = """
with recursive prints as (
  (select fingerprint from ops_remediation.signals where source = %(source)s order by fingerprint limit 1)
  union all
  select (select s.fingerprint from ops_remediation.signals s
          where s.source = %(source)s and s.fingerprint > prints.fingerprint order by s.fingerprint limit 1)
  from prints where prints.fingerprint is not null
)
select newest.signal from prints, lateral (
  select s.signal from ops_remediation.signals s
  where s.source = %(source)s and s.fingerprint = prints.fingerprint order by s.id desc limit 1
) newest
where newest.signal ->> 'ends_at' is null order by prints.fingerprint
"""


class Signals(Tables):
    """They hold labels, which people may ask to be erased: none of this stands in the ledger."""

    def saw(self, signals: Sequence[Signal]) -> int:
        """Keep what began, changed or ended since it was last kept; how many that were."""
        if not signals:
            return 0
        with self.transaction() as t:
            last: dict[tuple[str, str], dict[str, Any]] = {
                (row[0], row[1]): row[2]
                for row in t.connection.execute(
                    "select asked.source, asked.fingerprint, newest.signal"
                    " from (select distinct * from unnest(%s::text[], %s::text[])) asked (source, fingerprint), lateral"
                    " (select signal from ops_remediation.signals s where s.source = asked.source"
                    " and s.fingerprint = asked.fingerprint order by s.id desc limit 1) newest",
                    [[signal.source for signal in signals], [signal.fingerprint for signal in signals]],
                )
            }
            news = [s for s in signals if _essence(s.as_json()) != _essence(last.get((s.source, s.fingerprint)))]
            with t.connection.cursor() as cursor:
                cursor.executemany(
                    "insert into ops_remediation.signals (at, source, fingerprint, signal) values (%s, %s, %s, %s)",
                    [(s.seen_at, s.source, s.fingerprint, Jsonb(s.as_json())) for s in news],
                )
        return len(news)

    def firing(self, source: str) -> list[Signal]:
        """What was kept last as not ended. From one fingerprint to the next over the index: the history of each is not read."""
        with self.transaction() as t:
            rows = t.connection.execute(_FIRING, {"source": source}).fetchall()
        return [Signal.from_json(row[0]) for row in rows]

    def history(self, since: datetime, until: datetime) -> list[tuple[datetime, Signal]]:
        """What was kept, in the order in which it was seen."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select at, signal from ops_remediation.signals where at >= %s and at < %s order by at, id",
                [since, until],
            ).fetchall()
        return [(row[0], Signal.from_json(row[1])) for row in rows]

    def forget_signals(self, before: datetime) -> int:
        """Delete what is older, but for alerts that still fire; how many that were."""
        with self.transaction() as t:
            return t.connection.execute(
                "delete from ops_remediation.signals s where at < %s and (source = 'kafka' or signal ->> 'ends_at' is not null"
                " or exists (select from ops_remediation.signals n"
                " where n.source = s.source and n.fingerprint = s.fingerprint and n.id > s.id))",
                [before],
            ).rowcount

    def mark_seen(self, name: str, at: datetime) -> None:
        with self.transaction() as t:
            t.connection.execute(
                "insert into ops_remediation.seen values (%s, %s) on conflict (name) do update set at = excluded.at"
                " where ops_remediation.seen.at < excluded.at",
                [name, at],
            )

    def last_seen(self, name: str) -> datetime | None:
        with self.transaction() as t:
            row = t.connection.execute("select at from ops_remediation.seen where name = %s", [name]).fetchone()
        return row[0] if row else None

    def keep_lag(self, system: str, lag: Sequence[tuple[str, int, int]]) -> None:
        """Topic, partition, messages that wait: as the newest tick left them, for metrics."""
        now = self.clock.now()
        with self.transaction() as t, t.connection.cursor() as cursor:
            cursor.executemany(
                "insert into ops_remediation.lag values (%s, %s, %s, %s, %s) on conflict (system, topic, part)"
                " do update set messages = excluded.messages, at = excluded.at",
                [(system, topic, part, messages, now) for topic, part, messages in lag],
            )


def _essence(signal: Mapping[str, Any] | None) -> object:
    """What makes a signal another one than it was."""
    return signal and [signal[key] for key in ("starts_at", "ends_at", "silenced", "inhibited")]
