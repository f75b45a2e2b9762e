"""What a drill makes: registered before it is made, and looked at after its removal."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from ops_platform.drills.model import Drill, Resource
from ops_platform.drills.store.drills import Drills

_RESOURCE: LiteralString = "id, drill, step, kind, name, host, detail, keep, made_at, gone_at, leftover"


class Resources(Drills):
    """Nothing is registered for a drill that is not its author's any more."""

    def register(
        self, drill: Drill, step: str, kind: str, name: str, detail: Mapping[str, Any], *, keep: bool = False
    ) -> Resource:
        """Before it is made; the same again is the same one. Raises ConflictError where the drill is not ours any more."""
        with self.transaction() as t:
            self._fenced(t, drill, "version = version")
            row = t.connection.execute(
                "insert into ops_drills.resources (drill, step, kind, name, host, detail, keep, made_at)"
                " values (%s, %s, %s, %s, %s, %s, %s, %s) on conflict (drill, kind, name) do update"
                f" set detail = excluded.detail, gone_at = null, leftover = null returning {_RESOURCE}",
                [drill.id, step, kind, name, this_host(), Jsonb(dict(detail)), keep, self.clock.now()],
            ).fetchone()
        assert row is not None  # noqa: S101 - an insert returns its row
        return Resource(*row)

    def resources(self, drill_id: str) -> list[Resource]:
        """In the order in which they were registered."""
        with self.transaction() as t:
            rows = t.connection.execute(
                f"select {_RESOURCE} from ops_drills.resources where drill = %s order by id", [drill_id]
            ).fetchall()
        return [Resource(*row) for row in rows]

    def looked_at(self, resource: Resource, left: str | None) -> None:
        """What the look after its removal found; None: it is gone."""
        with self.transaction() as t:
            t.connection.execute(
                "update ops_drills.resources set gone_at = %s, leftover = %s where id = %s",
                [self.clock.now() if left is None else None, left, resource.id],
            )

    def wanted(self, drill_id: str, kind: str, name: str) -> bool:
        """Whether it is still to be there: what starts late asks this first, and ends where it is not."""
        with self.transaction() as t:
            row = t.connection.execute(
                "select 1 from ops_drills.resources r join ops_drills.drills d on d.id = r.drill where r.drill = %s and r.kind = %s"
                " and r.name = %s and r.gone_at is null and d.state <> 'ended'",
                [drill_id, kind, name],
            ).fetchone()
        return row is not None


def this_host() -> str:
    return socket.gethostname()
