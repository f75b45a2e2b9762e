"""`ops backup`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops_platform.cli.common import (
    Commands,
    Each,
    action_exit_code,
    actor,
    ago,
    at,
    chosen_backed,
    complete_backed,
    console,
    copy_option,
    emit,
    json_option,
    opened,
    parse_moment,
    show_action,
    stamp,
    table,
)
from ops_platform.counting import count_of, duration, size
from ops_platform.errors import UsageError

if TYPE_CHECKING:
    from ops_platform.actions import ActionResult
    from ops_platform.backup.model import BackupInfo, RecoveryWindow
    from ops_platform.backup.replicate import Inspected, Replicated
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed

_SHOWN = (
    "backup_id",
    "kind",
    "why",
    "source",
    "source_role",
    "timeline",
    "start_lsn",
    "end_lsn",
    "compression",
    "compress_at",
    "written_by",
)
_SHOWN_OF_A_STORE = ("backup_id", "store", "source", "server", "compression", "written_by")
target_argument = click.argument("target", shell_complete=complete_backed)


@click.group(cls=Commands)
def backup() -> None:
    """Take, list, prove and expire backups."""


@backup.command()
@click.argument("targets", nargs=-1, shell_complete=complete_backed)
@click.option("--all", "everything", is_flag=True, help="Every target and every other store of the inventory.")
@click.option("--full", "kind", flag_value="full", help="A full backup, whatever the policy says.")
@click.option("--incremental", "kind", flag_value="incremental", help="On top of the newest one (PostgreSQL 17+).")
@json_option
@click.pass_context
def run(ctx: click.Context, targets: tuple[str, ...], everything: bool, kind: str | None, as_json: bool) -> None:
    """Take a backup of a target or another store; of PostgreSQL full or incremental by the policy."""
    from ops_platform.backup.model import AnyManifest, Manifest
    from ops_platform.proof import back_up
    from ops_platform.reports.terminal import progress_bar

    taken: list[AnyManifest] = []
    with opened() as access:
        each = Each(chosen_backed(access.inventory, targets, everything))
        for target in each:
            with each.going_on(target), progress_bar(target.id) as progress:
                manifest = back_up(access, target, kind=kind or "auto", actor=actor(), progress=progress)  # type: ignore[arg-type]
                taken.append(manifest)
                if not as_json:
                    amount = f"{size(manifest.raw)} as {size(manifest.stored)} in {duration(manifest.seconds)}"
                    what = (
                        f"{manifest.kind.value} ({manifest.why})"
                        if isinstance(manifest, Manifest)
                        else f"{manifest.server}, {count_of(len(manifest.parts), 'part')}"
                    )
                    click.echo(f"{target.id}: {manifest.backup_id}, {what}, {amount}")
    if as_json:
        emit(list[AnyManifest], taken)
    ctx.exit(each.code)


@backup.command(name="list")
@click.argument("targets", nargs=-1, shell_complete=complete_backed)
@copy_option
@json_option
@click.pass_context
def list_(ctx: click.Context, targets: tuple[str, ...], copy_id: str | None, as_json: bool) -> None:
    """The backups and the recovery window, read from the store alone."""
    from ops_platform.cli.outputs import BackupList

    found: list[BackupList] = []
    with opened() as access:
        each = Each(chosen_backed(access.inventory, targets, not targets))
        for target in each:
            with each.going_on(target):
                infos, window = _catalog(access, at(target, copy_id))
                found.append(BackupList(target.id, infos, window))
    if as_json:
        emit(list[BackupList], found)
    else:
        for item in found:
            _show_list(item.target_id, item.backups, item.window)
    ctx.exit(each.code)


@backup.command()
@click.argument("systems", nargs=-1)
@json_option
@click.pass_context
def drift(ctx: click.Context, systems: tuple[str, ...], as_json: bool) -> None:
    """Compare Kubernetes clusters with their manifests in Git (all that have some by default). 1: they differ."""
    from ops_platform.inventory.systems import KubernetesSystem
    from ops_platform.stores.drift import Drift, find_drift, with_manifests

    found: list[Drift] = []
    with opened() as access:
        chosen = [access.inventory.system(name, KubernetesSystem) for name in systems] or with_manifests(
            access.inventory
        )
        each = Each(chosen)
        for system in each:
            with each.going_on(system):
                found.append(find_drift(access, system))
    if as_json:
        emit(list[Drift], found)
    else:
        for one in found:
            click.echo("\n".join(one.lines()))
    ctx.exit(each.code or int(any(not one.none for one in found)))


def _catalog(access: Access, target: Backed) -> tuple[list[BackupInfo], RecoveryWindow]:
    from ops_platform.backup.engine import catalog
    from ops_platform.recovery import records

    infos, window = catalog(access, target)
    return records.with_proofs(infos, records.repository_of(access, target)), window


def _show_list(target_id: str, infos: list[BackupInfo], window: RecoveryWindow) -> None:
    click.secho(target_id, bold=True)
    rows = [
        [
            info.backup_id,
            info.kind.value,
            stamp(info.ended_at),
            size(info.raw),
            size(info.stored),
            info.server or str(info.server_version // 10000 or "-"),
            info.error or (f"{info.proof.verdict} {ago(info.proof.verified_at)}" if info.proof else "not yet proven"),
        ]
        for info in infos
    ]
    if rows:
        table(rows, ["backup", "kind", "ended", "size", "stored", "server", "proof"])
    else:
        click.echo(f"no backups; take one: ops backup run {target_id}")
    moments = [begin for begin, end in window.pieces if begin == end]
    if moments:
        several = f"{len(moments)} moments, from {stamp(moments[0])} to {stamp(moments[-1])}"
        click.echo(f"restorable: {several if len(moments) > 1 else f'the moment {stamp(moments[0])}'}")
    for begin, end in window.pieces:
        if begin == end:
            continue
        click.echo(f"restorable: every moment from {stamp(begin)} to {stamp(end)}")
    for gap in window.gaps:
        again = f"again from {gap.recovery_again_from}" if gap.recovery_again_from else "take a new backup"
        click.secho(f"gap: WAL {gap.first} to {gap.last} is missing; {again}", fg="red")
    if not window.pieces:
        click.secho("restorable: nothing", fg="red")


@backup.command()
@target_argument
@click.argument("backup_id")
@copy_option
@json_option
def show(target: str, backup_id: str, copy_id: str | None, as_json: bool) -> None:
    """One backup: its manifest, chain and proofs."""
    from ops_platform.backup.model import Manifest
    from ops_platform.backup.opening import open_target_repository
    from ops_platform.cli.outputs import BackupDetail

    with opened() as access:
        repository = open_target_repository(access, at(access.inventory.backed(target), copy_id))
        repository.need_backup(backup_id)
        manifest = repository.any_manifest(backup_id)
        chain = repository.chain(backup_id) if isinstance(manifest, Manifest) else [manifest]
        detail = BackupDetail(manifest, [part.backup_id for part in chain], repository.proofs(backup_id))
    if as_json:
        emit(BackupDetail, detail)
        return
    for name in _SHOWN if isinstance(manifest, Manifest) else _SHOWN_OF_A_STORE:
        click.echo(f"{name.replace('_', ' '):14} {getattr(manifest, name)}")
    click.echo(
        f"{'taken':14} {stamp(manifest.started_at)} to {stamp(manifest.ended_at)} ({duration(manifest.seconds)})"
    )
    click.echo(
        f"{'size':14} {size(manifest.raw)}, stored {size(manifest.stored)} in {count_of(len(manifest.named), 'object')}"
    )
    if isinstance(manifest, Manifest):
        click.echo(f"{'chain':14} {' > '.join(detail.chain)}")
    else:
        click.echo(f"{'parts':14} {', '.join(f'{part.name} ({size(part.raw)})' for part in manifest.parts)}")
    for proof in detail.proofs:
        click.echo(f"{'proof':14} {proof.verdict} at {stamp(proof.verified_at)}, restored to {proof.recovery_target}")


@backup.command(name="hand-out")
@click.argument("system", shell_complete=complete_backed)
@click.option("--backup", "backup_id", help="This backup; the newest by default.")
@click.option(
    "--into", required=True, type=click.Path(path_type=Path, file_okay=False), help="An empty or a new directory."
)
@copy_option
@json_option
def hand_out_(system: str, backup_id: str | None, into: Path, copy_id: str | None, as_json: bool) -> None:
    """Write a store's backup, opened, as files that its own programs read. Of PostgreSQL: `ops restore`."""
    from ops_platform.inventory.model import Target
    from ops_platform.reports.terminal import progress_bar
    from ops_platform.stores.hand_out import HandedOut, hand_out

    with opened() as access:
        target = access.inventory.backed(system)
        if isinstance(target, Target):
            raise UsageError(f"{system} is a PostgreSQL", remedy=f"ops restore {system} --latest --into {into}")
        with progress_bar(system) as progress:
            done = hand_out(access, at(target, copy_id), into, backup_id=backup_id, progress=progress)
    if as_json:
        emit(HandedOut, done)
        return
    click.echo(f"{system}: {done.backup_id} of {stamp(done.moment)} ({done.server}) is in {done.into}")
    for name, bytes_ in done.files.items():
        click.echo(f"  {name:20} {size(bytes_)}")
    click.echo("what is in them, and how the store takes them back: docs/how-to/back-up-other-stores.md")


@backup.command()
@click.argument("targets", nargs=-1, shell_complete=complete_backed)
@click.option("--all", "everything", is_flag=True, help="Every target and every other store of the inventory.")
@click.option(
    "--pick",
    type=click.Choice(["newest", "oldest", "chain", "random"]),
    help="Else by turns through the policy's list.",
)
@click.option("--backup", "backup_id", help="This backup.")
@click.option("--to", "moment", metavar="TIME", help="This moment, with its zone.")
@click.option("--full", is_flag=True, help="Check every table and index, not a sample.")
@click.option("--no-report", is_flag=True, help="Do not write the HTML report.")
@copy_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    targets: tuple[str, ...],
    everything: bool,
    pick: str | None,
    backup_id: str | None,
    moment: str | None,
    full: bool,
    no_report: bool,
    copy_id: str | None,
    as_json: bool,
) -> None:
    """Restore into a sandbox and look at the data. Exit 0 proven, 1 failed, 3 could not verify."""
    from ops_platform.proof import prove
    from ops_platform.recovery.model import Scorecard
    from ops_platform.reports.terminal import print_scorecard, progress_bar

    wanted: datetime | None = parse_moment(moment, option="--to") if moment else None
    cards: list[Scorecard] = []
    with opened() as access:
        each = Each(chosen_backed(access.inventory, targets, everything))
        for target in each:
            with each.going_on(target), progress_bar(target.id) as progress:
                proof = prove(
                    access,
                    at(target, copy_id),
                    pick=pick,  # type: ignore[arg-type]
                    at=wanted,
                    backup_id=backup_id,
                    full=full,
                    alone=copy_id is not None,
                    report=copy_id is None and not no_report,
                    progress=progress,
                    actor=actor(),
                )
                cards.append(proof.scorecard)
                each.add(_VERDICT_CODES[proof.scorecard.verdict.value])
                if not as_json:
                    print_scorecard(proof.scorecard, console())
                    if proof.report is not None:
                        click.echo(f"report: {proof.report}")
    if as_json:
        emit(list[Scorecard], cards)
    ctx.exit(each.code)


_VERDICT_CODES = {"PASS": 0, "FAIL": 1, "COULD_NOT_VERIFY": 3}


@backup.command()
@click.argument("targets", nargs=-1, shell_complete=complete_backed)
@click.option("--all", "everything", is_flag=True, help="Every target and every other store of the inventory.")
@click.option(
    "--enforce",
    "mode",
    flag_value="enforce",
    help="Do it. Where the policy says observe it also needs --approve DIGEST, the plan that an earlier call printed.",
)
@click.option("--dry-run", "mode", flag_value="observe", help="Only say what would be done.")
@click.option("--approve", metavar="DIGEST", help="Exactly this plan, as an earlier call printed it.")
@copy_option
@json_option
@click.pass_context
def expire(
    ctx: click.Context,
    targets: tuple[str, ...],
    everything: bool,
    mode: str | None,
    approve: str | None,
    copy_id: str | None,
    as_json: bool,
) -> None:
    """Delete what no promise needs any more; observes unless the policy or --enforce says otherwise.

    Exit 1 where it was refused, failed or left something out, 3 where nobody could look whether what was done holds.
    """
    from ops_platform.proof import expire as run_expiry

    results: list[ActionResult] = []
    with opened() as access:
        each = Each(chosen_backed(access.inventory, targets, everything))
        for target in each:
            with each.going_on(target):
                done = run_expiry(
                    access, at(target, copy_id), mode=mode, approve=approve, copy=copy_id is not None, actor=actor(),  # type: ignore[arg-type]
                )  # fmt: skip
                for result in done:
                    results.append(result)
                    each.add(action_exit_code(result))
                    if not as_json:
                        show_action(target.id, result)
    if as_json:
        emit(list[dict[str, Any]], [result.as_json() for result in results])
    ctx.exit(each.code)


@backup.command()
@click.argument("targets", nargs=-1, shell_complete=complete_backed)
@click.option("--all", "everything", is_flag=True, help="Everything that has a copy.")
@click.option("--copy", "copy_id", metavar="COPY", help="To this copy alone; else to all that the target has.")
@click.option("--check", is_flag=True, help="Copy nothing: read the whole copy with its own store and keys alone.")
@json_option
@click.pass_context
def replicate(
    ctx: click.Context, targets: tuple[str, ...], everything: bool, copy_id: str | None, check: bool, as_json: bool
) -> None:
    """Bring the copies at other sites up to date, or read one to its last byte. Exit 1 where an object is damaged or missing."""
    from ops_platform.backup.replicate import Inspected, Replicated, inspect
    from ops_platform.inventory.model import copy_named
    from ops_platform.proof import copy_over
    from ops_platform.reports.terminal import progress_bar

    done: list[Replicated] = []
    read: list[Inspected] = []
    with opened() as access:
        wanted = chosen_backed(access.inventory, targets, everything)
        each = Each([target for target in wanted if not everything or target.repository.copies])
        for target in each:
            copies = [copy_named(target, copy_id)] if copy_id else target.repository.copies
            if not copies:
                raise UsageError(f"{target.id} has no copy", remedy="declare one under repository.copies")
            for copy in copies:
                with each.going_on(target), progress_bar(f"{target.id} to {copy.id}") as progress:
                    if check:
                        read.append(inspect(access, target, copy.id, progress=progress))
                    else:
                        done.append(copy_over(access, target, copy.id, actor=actor(), progress=progress))
                    result = (read if check else done)[-1]
                    each.add(0 if result.whole else 1)
                    if not as_json:
                        _show_copy(result)
    if as_json:
        emit(list[Inspected], read) if check else emit(list[Replicated], done)
    ctx.exit(each.code)


def _show_copy(result: Replicated | Inspected) -> None:
    from ops_platform.backup.replicate import Replicated

    where = f"{result.target_id} at {result.copy_id}"
    amount = f"{count_of(result.objects, 'object')}, {size(result.bytes)} in {duration(result.seconds)}"
    if isinstance(result, Replicated):
        new = f", new: {', '.join(result.backups)}" if result.backups else ""
        click.echo(f"{where}: {amount} copied{new}; restorable there until {stamp(result.until)}")
    else:
        click.echo(f"{where}: {amount} read, {'all as written' if result.whole else f'{len(result.wrong)} wrong'}")
    for line in result.wrong:
        click.secho(f"  wrong: {line}", fg="red")
