"""`ops init`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ops_platform.counting import size
from ops_platform.errors import OpsError, UsageError

if TYPE_CHECKING:
    from ops_platform.inventory.template import Described
    from ops_platform.inventory.values import Secret, SecretRef

# A database that our role may not enter has no size for us, unless it has pg_monitor.
_ABOUT = """
select sum(case when seen then pg_database_size(oid) end)::bigint, count(*) filter (where not seen),
  coalesce(current_setting('summarize_wal', true), '') = 'on', current_setting('server_version')
from (select oid, has_database_privilege(oid, 'connect') or pg_has_role('pg_read_all_stats', 'usage') as seen
      from pg_database where datallowconn) d
"""
_STANDBYS = "select distinct host(client_addr) from pg_stat_replication where client_addr is not null order by 1"


@click.command()
@click.option("--host", required=True, help="A member of the cluster: name, address, or socket directory.")
@click.option("--port", default=5432, show_default=True, type=click.IntRange(1, 65535))
@click.option("--user", default="ops_backup", show_default=True, help="The role that takes backups.")
@click.option("--dbname", default="postgres", show_default=True)
@click.option(
    "--password",
    metavar="REFERENCE",
    help="env://NAME or file://PATH for now and for the file; or vault://… to be resolved later.",
)
@click.option(
    "--tls",
    default="verify-full",
    show_default=True,
    type=click.Choice(["disable", "require", "verify-ca", "verify-full"]),
)
@click.option("--ca", help="PEM file of the server's certificate authority.")
@click.option("--id", "target_id", help="The target's id; made from the host by default.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("platform.yaml"), show_default=True
)
def init(
    host: str,
    port: int,
    user: str,
    dbname: str,
    password: str | None,
    tls: str,
    ca: str | None,
    target_id: str | None,
    out: Path,
) -> None:
    """Write a commented platform.yaml by asking a live database for its version, size and settings."""
    from ops_platform.inventory.template import render

    if os.path.exists(out):  # noqa: PTH110 - Path.exists raises where we may not look; opening it then says so
        raise UsageError(
            "this file exists", where=str(out), remedy="name another one with --out; nothing is overwritten"
        )
    _check(host)
    found = _ask(host, port, user, dbname, password, tls, ca, target_id)
    try:
        with out.open("x") as file:
            file.write(render(found))
    except OSError as error:
        raise OpsError(
            f"the file cannot be written: {error.strerror}", where=str(out), remedy="name another place with --out"
        ) from None
    click.echo(f"wrote {out}: PostgreSQL {found.version}, {size(found.size)}")
    for note in found.notes:
        click.echo(f"note: {note}")
    click.echo("next: fill in store and key service, then: ops inventory check && ops doctor")


def _check(host: str) -> None:
    """Raises UsageError for what is no host, with what was probably meant."""
    from ops_platform.inventory.values import is_host

    if is_host(host):
        return
    meant = re.fullmatch(r"\[?(.+?)\]?(?::([0-9]+))?", host)
    remedy = "write a name, an address, or a socket directory; the port has an option of its own, --port"
    if meant is not None and is_host(meant[1]):
        remedy = f"write --host {meant[1]}" + (f" --port {meant[2]}" if meant[2] else "")
    raise UsageError("this is not a host", where="--host", remedy=remedy)  # not repeated: a password may stand in it


def _ask(
    host: str, port: int, user: str, dbname: str, password: str | None, tls: str, ca: str | None, target_id: str | None
) -> Described:
    from ops_platform.clients.postgres import Login, ask_member, asking, connect
    from ops_platform.inventory.template import Described, target_id_of
    from ops_platform.inventory.values import SecretRef

    try:
        reference = SecretRef.parse(password) if password else None
    except ValueError as error:
        raise UsageError(f"--password: {error}") from None
    login = Login(dbname, user, _secret(reference), "disable" if host.startswith("/") else tls, ca)
    member = ask_member(login, host, port)
    if member.error is not None:
        connect(login, host, port).close()  # raises with its remedy
        raise OpsError(member.error, where=f"{host}:{port}")
    with asking(connect(login, host, port), f"{host}:{port}") as connection:
        row = connection.execute(_ABOUT).fetchone()
        standbys = [r[0] for r in connection.execute(_STANDBYS).fetchall()]
    assert row is not None  # noqa: S101 - a select without a table has a row
    size, hidden, summarizes, version = row
    notes = [f"{address} replicates from here: if it is a standby, add it to connection.hosts" for address in standbys]
    if hidden:
        notes.append(f"{hidden} databases are not counted in the size: {user} may not enter them and lacks pg_monitor")
    if member.in_recovery:
        notes.append("this is a standby: add its primary to connection.hosts")
    return Described(
        target_id or target_id_of(host),
        [(host, port)],
        user,
        dbname,
        reference,
        tls,
        ca,
        str(version),
        int(size or 0),
        bool(summarizes),
        notes,
    )


def _secret(reference: SecretRef | None) -> Secret | None:
    from ops_platform.inventory.values import Secret

    if reference is None:
        return None
    if reference.scheme == "env":
        value = os.environ.get(reference.path)
        if not value:
            raise UsageError(
                f"the environment variable {reference.path} is not set",
                where="--password",
                remedy=f"export {reference.path}=…, or name a file that holds the password: --password file://PATH",
            )
        return Secret(value)
    if reference.scheme == "file":
        try:
            return Secret(Path(reference.path).read_text().rstrip("\n"))
        except OSError as error:
            raise UsageError(
                f"the password's file cannot be read: {error.strerror}",
                where=reference.path,
                remedy="file:// takes the path of a file that holds the password alone and that you may read",
            ) from None
    raise UsageError(
        "a vault:// reference cannot be resolved before there is an inventory",
        remedy="ask with env:// or file:// now, and put the vault:// reference into the file afterwards",
    )
