"""Probes of a PostgreSQL target: a writer with numbered commits, a reader; and what they tell of an outage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ops_platform.clients.postgres import asking
from ops_platform.drills.askers import TABLE
from ops_platform.drills.model import Done, Resource
from ops_platform.drills.registry import Context, Remover, does, removes
from ops_platform.drills.steps.probes import Attempts, start_probe

if TYPE_CHECKING:
    from ops_platform.clients.access import Access


class Read(Attempts):
    """Of `postgres.read`."""

    role: str = Field(default="any", pattern="^(any|primary)$", description="Which server it asks.")


@does("postgres.write", "probe", given=Attempts, changes=lambda given: f"rows in {TABLE}, which go at the end")
def write(context: Context, given: Attempts) -> Done:
    """A writer: numbered rows, each its own transaction. A number is acknowledged when its commit was answered."""
    begin_rows(context, f"{TABLE} of {context.target.id}")
    return start_probe(context)


@does("postgres.read", "probe", given=Read)
def read(context: Context, given: Read) -> Done:
    """A reader: `select 1` on a server of the target."""
    return start_probe(context)


def begin_rows(context: Context, name: str, **more: Any) -> None:
    """Before rows are written: `writer` stands in their first column, the drill where it is not given."""
    target = context.target
    context.register("rows", name, target=target.id, **more)
    with asking(context.access.postgres(target, role="primary"), target.id) as connection:
        make_table(connection)


def make_table(connection: Any) -> None:
    if connection.execute(f"select to_regclass('{TABLE}')").fetchone()[0] is None:
        if connection.execute("select to_regnamespace('ops_canary')").fetchone()[0] is None:
            connection.execute("create schema ops_canary")
        connection.execute(
            f"create table if not exists {TABLE} (drill text not null, n bigint not null, at timestamptz not null"
            " default clock_timestamp(), lsn pg_lsn not null default pg_current_wal_insert_lsn(), primary key (drill, n))"
        )


def _writer(resource: Resource) -> str:
    """As `begin_rows` was told."""
    return resource.detail.get("writer", resource.drill)


def _delete_rows(access: Access, resource: Resource) -> None:
    target = access.inventory.target(resource.detail["target"])
    with asking(access.postgres(target, role="primary"), target.id) as connection:
        if connection.execute(f"select to_regclass('{TABLE}')").fetchone()[0] is None:  # pyright: ignore[reportOptionalSubscript]
            return
        connection.execute(f"delete from {TABLE} where drill = %s", [_writer(resource)])  # pyright: ignore[reportArgumentType]


def _rows(access: Access, resource: Resource) -> str | None:
    target = access.inventory.target(resource.detail["target"])
    with asking(access.postgres(target, role="primary"), target.id) as connection:
        if connection.execute(f"select to_regclass('{TABLE}')").fetchone()[0] is None:  # pyright: ignore[reportOptionalSubscript]
            return None
        row = connection.execute(f"select count(*) from {TABLE} where drill = %s", [_writer(resource)]).fetchone()  # pyright: ignore[reportArgumentType]
    return f"{row[0]} rows" if row and row[0] else None


removes("rows", Remover(_delete_rows, _rows, local=False))
