"""`ops report`."""

from __future__ import annotations

import click

from ops_platform.cli.common import chosen, complete_targets, emit, json_option, opened


@click.command()
@click.argument("targets", nargs=-1, shell_complete=complete_targets)
@json_option
def report(targets: tuple[str, ...], as_json: bool) -> None:
    """Write the HTML report of each target (all by default) and the page over all of them, from the stores."""
    from ops_platform.proof import write_index, write_target_report

    with opened() as access:
        pages = [str(write_target_report(access, t)) for t in chosen(access.inventory, targets, not targets)]
        index = str(write_index(access))
    if as_json:
        emit(dict[str, list[str] | str], {"index": index, "pages": pages})
        return
    for page in pages:
        click.echo(page)
    click.echo(index)
