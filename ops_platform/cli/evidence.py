"""`ops evidence`."""

from __future__ import annotations

from pathlib import Path

import click

from ops_platform.cli.common import Commands, actor, emit, json_option, opened, parse_moment, table
from ops_platform.counting import count_of


@click.group(cls=Commands)
def evidence() -> None:
    """What auditors ask for, cut from the ledger so that it can be verified without us."""


@evidence.command()
@click.option("--control", "number", required=True, metavar="ID", help="The control, such as CC7.4 or A.8.13.")
@click.option("--framework", help="Its framework, where several have a control of that number.")
@click.option("--from", "since", required=True, metavar="TIME", help="From this moment on, with its zone.")
@click.option("--to", "until", required=True, metavar="TIME", help="Up to this moment, with its zone.")
@click.option(
    "--only-matching",
    is_flag=True,
    help="Disclose the fitting entries alone. The pack then cannot show that none of them is missing.",
)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), metavar="FILE", help="Where to; a name of its own by default."
)
@json_option
def export(
    number: str, framework: str | None, since: str, until: str, only_matching: bool, output: str | None, as_json: bool
) -> None:
    """Write an evidence pack: entries, proofs, checkpoints, public keys, and a cover to read and print.

    `ops ledger verify --offline PACK --key FILE` verifies it anywhere.
    """
    from ops_platform.cli.outputs import PackWritten
    from ops_platform.evidence import chosen
    from ops_platform.evidence import export as write

    begins, ends = parse_moment(since, option="--from"), parse_moment(until, option="--to")
    with opened() as access:
        control = chosen(access, number, framework)
        path = Path(output or f"evidence-{control.id}-{begins:%Y%m%d}-{ends:%Y%m%d}.zip")
        cover = write(access, control, begins, ends, path, whole=not only_matching, made_by=actor())
    if as_json:
        emit(PackWritten, PackWritten.of(path, cover))
        return
    click.echo(
        f"{path}: {count_of(cover.evidence, 'entry', 'entries')} for {control.framework} {control.id}, {control.title}"
    )
    if cover.whole:
        click.echo(f"all {cover.entries} entries from {cover.first} to {cover.last} are in it")
    click.echo(f"verify it: ops ledger verify --offline {path} --key FILE")


@evidence.command()
@json_option
def controls(as_json: bool) -> None:
    """The controls that evidence can be exported for, and which entries count for each."""
    from ops_platform.inventory.evidence import Control
    from ops_platform.inventory.evidence import controls as known

    with opened() as access:
        found = known(access.inventory.evidence)
    if as_json:
        emit(list[Control], found)
        return
    table([[c.framework, c.id, c.title, ", ".join(c.kinds)] for c in found], ["framework", "control", "title", "kinds"])
