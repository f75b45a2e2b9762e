"""Probes of a PostgreSQL target: a writer with numbered commits, a reader; and what they tell of an outage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ops_platform.clients.postgres import asking
from ops_platform.clients.processes import spawn
from ops_platform.drills.model import Done, Resource
from ops_platform.drills.probing import TABLE, command, word_of
from ops_platform.drills.registry import Context, Remover, does, removes
from ops_platform.drills.steps.basics import processes_with
from ops_platform.errors import CouldNotVerifyError
from ops_platform.inventory.base import Strict

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

_STARTS_WITHIN = 30.0


class Write(Strict):
    """Of `postgres.write`."""

    timeout_ms: int = Field(
        default=1000, ge=50, le=60_000, description="An attempt without an answer by then has failed."
    )


class Read(Strict):
    """Of `postgres.read`."""

    timeout_ms: int = Field(
        default=1000, ge=50, le=60_000, description="An attempt without an answer by then has failed."
    )
    role: str = Field(default="any", pattern="^(any|primary)$", description="Which server it asks.")


@does("postgres.write", "probe", given=Write, changes=lambda given: f"rows in {TABLE}, which go at the end")
def write(context: Context, given: Write) -> Done:
    """A writer: numbered rows, each its own transaction. A number is acknowledged when its commit was answered."""
    target = context.target
    context.register("rows", f"{TABLE} of {target.id}", target=target.id)
    with asking(context.access.postgres(target, role="primary"), target.id) as connection:
        make_table(connection)
    return _probe(context)


@does("postgres.read", "probe", given=Read)
def read(context: Context, given: Read) -> Done:
    """A reader: `select 1` on a server of the target."""
    return _probe(context)


def make_table(connection: Any) -> None:
    if connection.execute(f"select to_regclass('{TABLE}')").fetchone()[0] is None:
        if connection.execute("select to_regnamespace('ops_canary')").fetchone()[0] is None:
            connection.execute("create schema ops_canary")
        connection.execute(
            f"create table if not exists {TABLE} (drill text not null, n bigint not null, at timestamptz not null"
            " default clock_timestamp(), lsn pg_lsn not null default pg_current_wal_insert_lsn(), primary key (drill, n))"
        )


def _probe(context: Context) -> Done:
    """Its own process, which goes on when ours is killed, and ends when the drill has. Begun once it has seen the target well."""
    word = word_of(context.held.id, context.step.id)
    context.register("process", word, word=word, signal="TERM")
    log = context.workspace / f"{context.step.id}.log"
    context.register("directory", str(context.workspace), path=str(context.workspace))
    context.workspace.mkdir(mode=0o711, parents=True, exist_ok=True)
    if not any(processes_with(word)):
        spawn(command(word), log, env={"OPS_INVENTORY": str(context.access.loaded.path)})
    began = context.clock.monotonic()

    def seen() -> bool:
        if context.clock.monotonic() - began > _STARTS_WITHIN:
            said = _last_error(context) or log.read_text(errors="replace")[-400:].strip() or "it says nothing"
            raise CouldNotVerifyError(
                f"the probe has not seen the target well: {said}", where=f"step {context.step.id}"
            )
        return any(sample.ok for sample in context.samples(context.step.id)[-20:])

    context.wait(seen)
    return Done("it runs and reaches the target")


def _last_error(context: Context) -> str | None:
    errors = [sample.error for sample in context.samples(context.step.id) if sample.error]
    return errors[-1] if errors else None


def _delete_rows(access: Access, resource: Resource) -> None:
    target = access.inventory.target(resource.detail["target"])
    with asking(access.postgres(target, role="primary"), target.id) as connection:
        if connection.execute(f"select to_regclass('{TABLE}')").fetchone()[0] is None:  # pyright: ignore[reportOptionalSubscript]
            return
        connection.execute(f"delete from {TABLE} where drill = %s", [resource.drill])  # pyright: ignore[reportArgumentType]


def _rows(access: Access, resource: Resource) -> str | None:
    target = access.inventory.target(resource.detail["target"])
    with asking(access.postgres(target, role="primary"), target.id) as connection:
        if connection.execute(f"select to_regclass('{TABLE}')").fetchone()[0] is None:  # pyright: ignore[reportOptionalSubscript]
            return None
        row = connection.execute(f"select count(*) from {TABLE} where drill = %s", [resource.drill]).fetchone()  # pyright: ignore[reportArgumentType]
    return f"{row[0]} rows" if row and row[0] else None


removes("rows", Remover(_delete_rows, _rows, local=False))
