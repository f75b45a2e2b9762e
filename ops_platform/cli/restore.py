"""`ops restore`."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

import click

from ops_platform.cli.common import (
    at,
    complete_targets,
    copy_option,
    emit,
    json_option,
    opened,
    parse_moment,
    stamp,
)
from ops_platform.counting import duration, size
from ops_platform.errors import UsageError

if TYPE_CHECKING:
    from ops_platform.backup.model import RecoveryTarget
    from ops_platform.recovery.restore import Restored, RestorePlan


@click.command()
@click.argument("target", shell_complete=complete_targets)
@click.option("--to", "moment", metavar="TIME", help="A moment with its zone: '2026-11-23 02:59:59.5+01:00'.")
@click.option("--lsn", metavar="LSN", help="A WAL position: 16/B374D848.")
@click.option("--name", metavar="POINT", help="A restore point made with pg_create_restore_point.")
@click.option("--xid", metavar="XID", help="A transaction.")
@click.option("--latest", is_flag=True, help="Everything that the archive holds.")
@click.option("--exclusive", is_flag=True, help="Stop just before the target instead of just after it.")
@click.option("--timeline", metavar="N", help="Follow this timeline; the newest by default.")
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), help="An empty directory.")
@click.option("--tablespace", "mapping", multiple=True, metavar="OLD=NEW", help="Where a tablespace goes.")
@click.option("--tables", metavar="A,B", help="Hand out these tables only; needs --as-dump.")
@click.option("--as-dump", type=click.Path(path_type=Path, dir_okay=False), help="File for pg_restore.")
@click.option("--database", help="With --tables: the database; the target's own by default.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and whether there is room.")
@copy_option
@json_option
@click.pass_context
def restore(
    ctx: click.Context,
    target: str,
    moment: str | None,
    lsn: str | None,
    name: str | None,
    xid: str | None,
    latest: bool,
    exclusive: bool,
    timeline: str | None,
    into: Path | None,
    mapping: tuple[str, ...],
    tables: str | None,
    as_dump: Path | None,
    database: str | None,
    dry_run: bool,
    copy_id: str | None,
    as_json: bool,
) -> None:
    """Restore TARGET to a moment, beside the live server, which is not touched.

    Killed, it goes on where it was when it is called again with the same options.
    """
    from ops_platform.recovery import restore as room
    from ops_platform.reports.terminal import progress_bar

    recovery = _recovery(moment, lsn, name, xid, latest, exclusive, timeline)
    if (tables is None) != (as_dump is None):
        raise UsageError("--tables and --as-dump belong together")
    if (into is None) == (as_dump is None):
        raise UsageError("name where it goes: --into DIRECTORY, or --tables A,B --as-dump FILE")
    if database is not None and tables is None:
        raise UsageError("--database belongs to --tables: a directory holds all databases")
    if mapping and into is None:
        raise UsageError("--tablespace belongs to --into: a dump holds no tablespaces")
    spaces, names = _mapping(mapping), _names(tables or "")
    with opened() as access:
        found = at(access.inventory.target(target), copy_id)
        if copy_id is None and (absent := room.not_there_now(access, found, names, database)):
            _warn(f"not there now: {', '.join(absent)}. Whether it was at that moment shows when all is restored")
        if dry_run:
            # A dump's restore stands in a new directory below this one.
            place = into or Path(found.sandbox.directory or gettempdir()) / f"ops-tables-{found.id}"
            plan = room.plan(access, found, recovery, place.absolute())
            emit(room.RestorePlan, plan) if as_json else _show_plan(plan)
            ctx.exit(1 if plan.problems else 0)
        with progress_bar(target) as progress:
            if as_dump is not None:
                done = room.dump_tables(
                    access, found, recovery, names, as_dump.absolute(), dbname=database, progress=progress
                )
            else:
                assert into is not None  # noqa: S101 - checked above
                done = room.restore(access, found, recovery, into, tablespaces=spaces, progress=progress)
    if as_json:
        emit(room.Restored, done)
    else:
        _show(done, as_dump)


def _recovery(
    moment: str | None,
    lsn: str | None,
    name: str | None,
    xid: str | None,
    latest: bool,
    exclusive: bool,
    timeline: str | None,
) -> RecoveryTarget:
    from ops_platform.backup.model import Lsn, RecoveryTarget

    if sum((moment is not None, lsn is not None, name is not None, xid is not None, latest)) != 1:
        raise UsageError("say to which moment: exactly one of --to, --lsn, --name, --xid, --latest")
    if timeline is not None and not timeline.isdigit():
        raise UsageError(f"--timeline: {timeline!r} is not a number")
    line = int(timeline) if timeline is not None else "latest"
    if exclusive and (name is not None or latest):
        raise UsageError("--exclusive belongs to --to, --lsn and --xid: a restore point and the end have no before")
    if moment is not None:
        return RecoveryTarget("time", parse_moment(moment, option="--to"), not exclusive, line)
    if lsn is not None:
        try:
            return RecoveryTarget("lsn", str(Lsn.parse(lsn)), not exclusive, line)
        except ValueError as error:
            raise UsageError(f"--lsn: {error}") from None
    if xid is not None:
        if not xid.isdigit():
            raise UsageError(f"--xid: {xid!r} is not a transaction's number")
        return RecoveryTarget("xid", xid, not exclusive, line)
    return RecoveryTarget("name", name, True, line) if name is not None else RecoveryTarget("latest", None, True, line)


def _names(text: str) -> list[str]:
    """Separated by commas, but for those within double quotes."""
    parts = re.findall(r'(?:[^,"]|"(?:[^"]|"")*"?)+', text)
    return [part.strip() for part in parts if part.strip()]


def _mapping(pairs: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for pair in pairs:
        old, mark, new = pair.partition("=")
        if not mark or not old.startswith("/") or not new.startswith("/"):
            raise UsageError(f"--tablespace: {pair!r} is not OLD=NEW with absolute paths")
        found[old] = Path(new)
    return found


def _warn(text: str) -> None:
    click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {text}", err=True)


def _show_plan(plan: RestorePlan) -> None:
    click.echo(f"target     {plan.target_id} to {plan.recovery_target}")
    click.echo(f"backup     {plan.backup.backup_id} ({plan.backup.kind.value}, ended {stamp(plan.backup.ended_at)})")
    for begin, end in plan.window.pieces:
        click.echo(f"window     {stamp(begin)} to {stamp(end)}")
    click.echo(f"room       {size(plan.needed_bytes)} needed, {size(plan.free_bytes)} free at {plan.into}")
    click.echo(f"server     {plan.server}")
    for problem in plan.problems:
        click.secho(f"problem    {problem}", fg="red")


def _show(done: Restored, dump: Path | None) -> None:
    newest = f", newest commit {done.newest_commit.isoformat()}" if done.newest_commit else ""
    click.echo(f"{done.target_id} as of {done.recovery_target}: reached {done.reached_lsn}{newest}")
    replayed = f"replayed {size(done.wal_bytes)} of WAL in {duration(done.replay_seconds)}"
    click.echo(f"fetched {size(done.bytes)} in {duration(done.fetch_seconds)}, {replayed}")
    if dump is not None:
        click.echo(f"dump: {dump}\nbring it back: pg_restore --data-only --dbname … {dump}")
        return
    click.echo(f"directory: {done.directory} (timeline {done.timeline}, at rest)")
    click.echo(f"start it: {done.bindir}/pg_ctl -D {done.directory} -o '-p 5433' start")
