"""What the probes of a drill saw."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from ops_platform.drills.model import Sample
from ops_platform.drills.store.tables import Tables


class Samples(Tables):
    """One attempt each; they stand in no ledger."""

    def saw(self, drill_id: str, probe: str, samples: Sequence[Sample]) -> None:
        with self.transaction() as t, t.connection.cursor() as cursor, cursor.copy(
            "copy ops_drills.samples (drill, probe, at, ok, ms, n, error) from stdin"
        ) as copy:  # fmt: skip
            for sample in samples:
                copy.write_row((drill_id, probe, sample.at, sample.ok, sample.ms, sample.n, sample.error))

    def samples(self, drill_id: str, probe: str, *, since: datetime | None = None) -> list[Sample]:
        """In the order in which the attempts began."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select at, ok, ms, n, error from ops_drills.samples where drill = %s and probe = %s"
                " and (%s::timestamptz is null or at >= %s) order by at, id",
                [drill_id, probe, since, since],
            ).fetchall()
        return [Sample(*row) for row in rows]

    def forget_samples(self, before: datetime) -> int:
        """Of drills that ended before that moment; their scorecards keep what was made of them. How many were forgotten."""
        with self.transaction() as t:
            return t.connection.execute(
                "delete from ops_drills.samples s using ops_drills.drills d where d.id = s.drill and d.ended_at < %s",
                [before],
            ).rowcount
