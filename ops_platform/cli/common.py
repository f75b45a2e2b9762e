"""What the commands share: opening the inventory, JSON beside human output, tables, moments."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from ops_platform.counting import duration
from ops_platform.errors import OpsError, RefusedError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from ops_platform.actions import ActionResult
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed, Inventory, Target
    from ops_platform.inventory.systems import System

F = TypeVar("F", bound=Callable[..., Any])
B = TypeVar("B", bound="Backed")
S = TypeVar("S", bound="Backed | System")


class Commands(click.Group):
    """A group that knows what was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = get_close_matches(args[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{ctx.command_path} --help lists them"
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


def json_option(function: F) -> F:
    return click.option(
        "--json", "as_json", is_flag=True, help="JSON; its schema is in docs/reference/json-output.md."
    )(function)


def copy_option(function: F) -> F:
    return click.option(
        "--copy", "copy_id", metavar="COPY", help="From this copy of the backups, with nothing but its store and keys."
    )(function)


def at(target: B, copy_id: str | None) -> B:
    """The target with its own backups, or with those of a copy."""
    from ops_platform.inventory.model import at_copy

    return target if copy_id is None else at_copy(target, copy_id)


@contextmanager
def opened() -> Generator[Access]:
    """The inventory and everything that it names, closed at the end."""
    import logging

    from ops_platform.clients.access import Access
    from ops_platform.inventory import load

    # What the driver logs of a session that broke off says nothing that our own error does not, and Ctrl-C breaks off many.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    with Access(load()) as access:
        yield access


def chosen(inventory: Inventory, ids: tuple[str, ...], everything: bool) -> list[Target]:
    """The targets named, or all. Raises UsageError for neither and for both."""
    if bool(ids) == everything:
        raise UsageError("name targets, or give --all", remedy="ops inventory show lists the targets")
    return list(inventory.targets) if everything else [inventory.target(name) for name in ids]


def chosen_backed(inventory: Inventory, ids: tuple[str, ...], everything: bool) -> list[Backed]:
    """The same of everything that has backups: targets, and the other stores."""
    if bool(ids) == everything:
        raise UsageError("name targets, or give --all", remedy="ops inventory show lists the targets")
    return inventory.all_backed() if everything else [inventory.backed(name) for name in ids]


class Each(Generic[S]):
    """Works on targets one after the other: one that fails is said at once, and does not keep the others from their turn.

    A single target's error is simply raised. `code` is the worst exit code so far: 1 before 2 before 3.
    """

    def __init__(self, targets: Sequence[S]) -> None:
        self._targets = targets
        self._codes: set[int] = set()

    def __iter__(self) -> Iterator[S]:
        return iter(self._targets)

    @contextmanager
    def going_on(self, target: S) -> Generator[None]:
        try:
            yield
        except OpsError as error:
            if len(self._targets) == 1:
                raise
            click.echo(f"{click.style('error:', fg='red', bold=True)} {target.id}: {error}", err=True)
            self.add(error.exit_code)

    def add(self, code: int) -> None:
        self._codes |= {code} - {0}

    @property
    def code(self) -> int:
        return min(self._codes, default=0)


def emit(kind: Any, value: Any) -> None:
    """Print `value` as JSON of the type `kind`, which is what docs/reference/json-output.md documents."""
    from pydantic import TypeAdapter

    click.echo(TypeAdapter(kind).dump_json(value, indent=2).decode())


def console(*, err: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=err, highlight=False, soft_wrap=False)


def complete_backed(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The same of everything that has backups."""
    from ops_platform.inventory import load

    try:
        inventory = load().inventory
        return [t.id for t in inventory.all_backed() if t.id.startswith(incomplete)]
    except OpsError:
        return []


def complete_targets(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: an inventory that cannot be read completes nothing and says nothing."""
    from ops_platform.inventory import load

    try:
        return [target.id for target in load().inventory.targets if target.id.startswith(incomplete)]
    except OpsError:
        return []


def parse_moment(text: str, *, option: str) -> datetime:
    """An ISO 8601 time with its zone. Raises UsageError with an example for one without."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UsageError(
            f"{option}: {text!r} is not a time", remedy=f"write it like {option} '2026-11-23 02:59:59.5+01:00'"
        ) from None
    if moment.tzinfo is None:
        raise UsageError(
            f"{option}: {text!r} has no zone, and nobody agrees on one at 3 a.m.",
            remedy=f"write {option} '{text.strip()}+00:00' for UTC, or with the offset that you mean, such as +01:00",
        )
    return moment.astimezone(UTC)


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    remedy = "write 127.0.0.1:9187 or [::1]:9187"
    if not host or not port.isdecimal():
        raise UsageError(f"--listen: {text!r} is not HOST:PORT", remedy=remedy)
    if len(port) > 5 or not 0 < int(port) < 65536:
        raise UsageError(f"--listen: the port of {text!r} is not one: ports are 1 to 65535", remedy=remedy)
    return host.strip("[]"), int(port)


class Seconds(click.ParamType[float]):
    """From one second to a day."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            found = float(value)
        except ValueError:
            found = 0.0
        if not 1 <= found <= 86400:  # nor is NaN
            self.fail(f"{value!r} is given; seconds are expected, a number from 1 to 86400, such as 60", param, ctx)
        return found


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    return "never" if moment is None else f"{duration((now or datetime.now(UTC)) - moment)} ago"


def stamp(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def table(rows: list[list[str]], header: list[str]) -> None:
    """Columns as wide as they need to be; the last one is not cut when the output is no terminal."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*row)
    if sys.stdout.isatty():
        console().print(made)
    else:
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        for line in [header, *rows]:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def confirm(question: str, *, otherwise: str) -> None:
    """Ask on the terminal. Raises RefusedError for a no, UsageError where nobody can be asked: then `otherwise` is the option to give."""
    try:
        if not click.confirm(question):
            raise RefusedError("you said no, and nothing was changed")
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):
            raise UsageError("there is nobody to ask", remedy=f"give {otherwise}") from None
        raise


def actor() -> str:
    """Who is asking, for the ledger: a login name, not a credential."""
    import getpass

    try:
        return os.environ.get("OPS_ACTOR") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def action_exit_code(result: ActionResult) -> int:
    from ops_platform.actions import Status

    if result.ok:
        return 0
    return 3 if result.status is Status.UNVERIFIED and result.unrecorded is None else 1


def show_action(subject: str, result: ActionResult) -> None:
    from ops_platform.actions.words import lines

    click.secho(f"{subject}: {result.plan.action}, plan {result.plan.digest}", bold=True)
    for line in lines(result):
        click.echo(f"  {line}")
