"""`ops wal`: the receiver and the state of the archive."""

from __future__ import annotations

import signal

import click

from ops_platform.cli.common import (
    Commands,
    Each,
    address,
    chosen,
    complete_targets,
    emit,
    json_option,
    opened,
    stamp,
)
from ops_platform.counting import count_of, size
from ops_platform.errors import OpsError, UsageError


@click.group(cls=Commands)
def wal() -> None:
    """Receive WAL into the repository; the state of the archive."""


@wal.command()
@click.argument("targets", nargs=-1, shell_complete=complete_targets)
@click.option("--all", "everything", is_flag=True, help="Every target of the inventory that the native engine keeps.")
@click.option(
    "--listen", metavar="HOST:PORT", help="Serve /metrics (Prometheus), /healthz and /readyz; [::1]:9187 for IPv6."
)
@click.option(
    "--accept-cluster",
    type=int,
    metavar="SYSTEM_IDENTIFIER",
    help="Go on under this cluster although the archive holds another one: after a restore as a new cluster.",
)
def receive(targets: tuple[str, ...], everything: bool, listen: str | None, accept_cluster: int | None) -> None:
    """Stream the WAL of targets into their repositories until told to stop (SIGTERM, Ctrl-C).

    Only what is durable in the store is confirmed to the server, so a crash at any moment loses nothing.
    """
    from datetime import UTC, datetime

    from ops_platform.backup.receiver import Receiver
    from ops_platform.backup.receiver_http import serve

    def say(target_id: str, text: str) -> None:
        click.echo(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {target_id}: {text}", err=True)

    with opened() as access:
        wanted = [t for t in chosen(access.inventory, targets, everything) if t.repository.engine == "native"]
        if not wanted:
            raise UsageError("none of these targets is kept by the native engine", where=str(access.loaded.path))
        receiver = Receiver(access, wanted, accept_cluster=accept_cluster, log=say)
        server = serve(receiver, *address(listen)) if listen else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: receiver.stop())
        receiver.start()
        try:
            while not receiver.join(1.0):
                if dead := receiver.dead():
                    receiver.stop()
                    receiver.join(30)
                    raise OpsError(
                        f"reception ended without being asked to: {', '.join(dead)}", remedy="read the log above"
                    )
        finally:
            if server is not None:
                server.shutdown()


@wal.command()
@click.argument("targets", nargs=-1, shell_complete=complete_targets)
@json_option
@click.pass_context
def status(ctx: click.Context, targets: tuple[str, ...], as_json: bool) -> None:
    """What the archive holds, its gaps, its distance to the server. Exit 1 for a gap that no later backup mends or too much lag, 3 where it is unknown."""
    from ops_platform.backup.archive import ArchiveStatus, archive_status

    found: list[ArchiveStatus] = []
    with opened() as access:
        wanted = chosen(access.inventory, targets, not targets)
        each = Each([target for target in wanted if target.repository.engine == "native"])
        for target in each:
            with each.going_on(target):
                found.append(archive_status(access, target))
                each.add(_code(target, found[-1]))
    if as_json:
        emit(list[ArchiveStatus], found)
    else:
        for status in found:
            _show(status)
    ctx.exit(each.code)


def _code(target: object, status: object) -> int:
    from ops_platform.backup.archive import ArchiveStatus
    from ops_platform.inventory.model import Target

    assert isinstance(status, ArchiveStatus) and isinstance(target, Target)  # noqa: S101, PT018 - for the type checker
    late = status.server_time is not None and status.until is not None and bool(status.lag_bytes)
    if not status.continuous or (late and status.server_time - status.until > target.wal.max_lag):  # type: ignore[operator]
        return 1
    return 0 if status.slot_error is None else 3


def _show(status: object) -> None:
    from ops_platform.backup.archive import ArchiveStatus

    assert isinstance(status, ArchiveStatus)  # noqa: S101 - for the type checker
    click.secho(status.target_id, bold=True)
    position = f"up to {status.newest or 'nothing'} on timeline {status.newest_timeline or '-'}"
    click.echo(
        f"  archive   {count_of(status.segments, 'segment')}, {size(status.stored_bytes)}, {position}, whole until {stamp(status.until)}"
    )
    for item in status.ranges:
        click.echo(f"  range     {item.first} … {item.last}")
    for gap in status.gaps:
        again = (
            f"recovery is possible again from {gap.recovery_again_from}"
            if gap.recovery_again_from
            else "take a full backup"
        )
        click.secho(f"  GAP       {gap.first} … {gap.last} are missing; {again}", fg="red")
    for note in status.notes:
        click.echo(f"  noted     {stamp(note.noticed_at)} {note.first} … {note.last}: {note.cause}")
    if status.slot_error:
        click.secho(f"  server    unknown: {status.slot_error}", fg="yellow")
    elif status.slot is None:
        text = "does not exist: the receiver has not run yet, or somebody dropped it"
        click.secho(f"  slot      {status.slot_name} {text}", fg="yellow")
    else:
        held = "unknown" if status.slot.retained is None else size(status.slot.retained)
        reader = f"read by process {status.slot.active_pid}" if status.slot.active_pid else "nobody reads it"
        click.echo(f"  slot      {status.slot_name}: {status.slot.wal_status}, {reader}, holds back {held}")
        lag = "unknown" if status.lag_bytes is None else size(status.lag_bytes)
        click.echo(f"  lag       {lag} behind the server at {status.server_lsn}")
