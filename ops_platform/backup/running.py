"""One backup of a target at a time: whoever takes one holds a lock, and here it is asked who does.

Of PostgreSQL it is an advisory lock in the server itself; of a store a claim in the platform's database.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ops_platform.errors import ConflictError, UnreachableError
from ops_platform.inventory.model import Backed, Target
from ops_platform.ledger import Ledger

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

_LOCK_SPACE = 0x6F7073  # "ops": advisory locks of ours


@contextmanager
def backup_lock(access: Access, target: Target) -> Generator[None]:
    """One backup of a target at a time, across machines, held by a session of the primary: the server drops it with the connection."""
    import psycopg

    from ops_platform.clients.postgres import asking, connect

    at = access.member(target)
    where = at.address
    with asking(connect(access.login(target.connection), at.host, at.port), where) as connection:
        connection.execute(
            "select set_config('application_name', %s, false)", [f"ops_platform backup of {target.id}"[:63]]
        )
        row = connection.execute("select pg_try_advisory_lock(%s, hashtext(%s))", [_LOCK_SPACE, target.id]).fetchone()
        if row is None or not row[0]:
            raise ConflictError(
                f"another backup of {target.id} is running: {_holder(connection, target)}",
                where=where,
                remedy="wait until it ends; the lock goes with its session",
            )
        yield
        # With its connection it goes a moment after we left: a backup that begins right then would be refused.
        with suppress(psycopg.Error):
            connection.execute("select pg_advisory_unlock(%s, hashtext(%s))", [_LOCK_SPACE, target.id])


def _holder(connection: object, target: Target) -> str:
    row = connection.execute(  # type: ignore[attr-defined]
        "select a.pid, a.client_addr, a.backend_start from pg_locks l join pg_stat_activity a using (pid)"
        " where l.locktype = 'advisory' and l.classid = %s and l.objid = (hashtext(%s)::bigint & 4294967295)::oid",
        [_LOCK_SPACE, target.id],
    ).fetchone()
    return (
        f"pid {row[0]} from {row[1] or 'a local socket'} since {row[2]:%Y-%m-%d %H:%M:%SZ}"
        if row
        else "its session ended just now"
    )


def backup_running(access: Access, target: Backed) -> str | None:
    """Who takes a backup of the target now; None where nobody does. Raises where a member cannot be asked: then nobody knows."""
    from ops_platform.clients.postgres import asking

    if not isinstance(target, Target):
        with Ledger(access.platform_db) as ledger, ledger.claim(claim_of(target)) as ours:
            return None if ours else "another session has its claim"

    for member in access.members(target):
        if member.error is not None:
            raise UnreachableError(f"whether a backup is running cannot be told: {member.error}", where=member.address)
        with asking(access.postgres(target, member=member), member.address) as connection:
            row = connection.execute(
                "select l.pid from pg_locks l where l.locktype = 'advisory' and l.granted and l.classid = %s"
                " and l.objid = (hashtext(%s)::bigint & 4294967295)::oid and l.objsubid = 2",
                [_LOCK_SPACE, target.id],
            ).fetchone()
        if row is not None:
            return f"pid {row[0]} on {member.address}"
    return None


def claim_of(target: Backed) -> str:
    """What whoever backs up a store claims in the platform's database: of PostgreSQL it is a lock in the server itself."""
    return f"backup/{target.id}"
