"""`ops local`: the embedded stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ops_platform.cli.common import Commands, confirm, emit, json_option, table

if TYPE_CHECKING:
    from ops_platform.local.stack import Status


@click.group(cls=Commands)
def local() -> None:
    """The embedded stack: real servers as child processes on free loopback ports. For trying, not for earnest.

    It lives in .state/local beside platform.yaml (of root's checkouts in a closed home: below /var/lib/ops_platform); OPS_STATE_DIR moves it.
    """


@local.command()
@click.option("--no-supervisor", is_flag=True, help="Do not start the process that restarts what died.")
def up(no_supervisor: bool) -> None:
    """Start what is not running; again and again as you like."""
    from ops_platform.local import stack

    found = stack.up(say=lambda name, text: click.echo(f"{name:13} {text}", err=True), supervise=not no_supervisor)
    _show(found)


@local.command()
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Name, kind, url, pid and readiness of each server. Exit 1 unless all are ready that this machine can start."""
    from ops_platform.local import stack

    found = stack.status()
    if as_json:
        emit(list[stack.Status], found)
    else:
        _show(found)
    ctx.exit(0 if all(item.good for item in found) else 1)


@local.command()
@click.argument("name")
@click.option("-n", "--lines", default=40, show_default=True, help="How many of the last lines.")
@json_option
def logs(name: str, lines: int, as_json: bool) -> None:
    """The end of a server's log."""
    from ops_platform.errors import UsageError
    from ops_platform.local import stack, state_dir
    from ops_platform.local.components import COMPONENTS

    known = [component.name for component in COMPONENTS] + ["supervisor"]
    if name not in known:
        raise UsageError(f"there is no server {name!r} in the local stack", remedy=f"one of {', '.join(known)}")
    tail = stack.log_tail(state_dir() / "logs" / f"{name}.log", lines)
    if as_json:
        emit(list[str], tail.splitlines())
    else:
        click.echo(tail)


@local.command()
def down() -> None:
    """Stop everything, the web UI of `ops ui` first; the data stays."""
    from ops_platform.local import stack

    stopped = stack.down()
    click.echo(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running", err=True)


@local.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def reset(yes: bool) -> None:
    """Stop everything and remove the state directory with all data in it."""
    from ops_platform.local import stack, state_dir

    if not yes:
        confirm(f"remove {state_dir()} with the local databases, backups and keys?", otherwise="--yes")
    click.echo(f"removed {stack.reset()}", err=True)


def _show(found: Sequence[Status]) -> None:
    table(
        [
            [item.name, item.kind, item.url or "-", str(item.pid or "-"), _state(item.ready, item.skipped)]
            for item in found
        ],
        ["name", "kind", "url", "pid", "state"],
    )


def _state(ready: bool, skipped: str) -> str:
    if skipped:
        return f"skipped: {skipped}"
    return "ready" if ready else "not ready"
