"""`ops report`."""

from __future__ import annotations

import click

from ops_platform.cli.common import Each, chosen_backed, complete_backed, emit, json_option, opened


@click.command()
@click.argument("targets", nargs=-1, shell_complete=complete_backed)
@json_option
@click.pass_context
def report(ctx: click.Context, targets: tuple[str, ...], as_json: bool) -> None:
    """Write the HTML report of each target (all by default) and the page over all of them, from the stores."""
    from ops_platform.proof import look_back, write_index, write_target_report

    pages: list[str] = []
    with opened() as access:
        each = Each(chosen_backed(access.inventory, targets, not targets))
        for target in each:
            with each.going_on(target):
                pages.append(str(write_target_report(access, target, look_back(access, target))))
        index = str(write_index(access))
    if as_json:
        emit(dict[str, list[str] | str], {"index": index, "pages": pages})
    else:
        click.echo("\n".join([*pages, index]))
    ctx.exit(each.code)
