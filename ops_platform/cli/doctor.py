"""`ops doctor`."""

from __future__ import annotations

import click

from ops_platform.cli.common import chosen, complete_targets, emit, json_option, opened

_MARKS = {"good": ("ok  ", "green"), "warn": ("warn", "yellow"), "bad": ("BAD ", "red"), "unknown": ("?   ", "yellow")}


@click.command()
@click.argument("targets", nargs=-1, shell_complete=complete_targets)
@json_option
@click.pass_context
def doctor(ctx: click.Context, targets: tuple[str, ...], as_json: bool) -> None:
    """Rights, settings, slots, versions, bucket, lock, keys: each with what to do. Exit 1 for what is bad, 3 for what is unknown."""
    from ops_platform.doctor import Examination, examine

    with opened() as access:
        found = [examine(access, target) for target in chosen(access.inventory, targets, not targets)]
    if as_json:
        emit(list[Examination], found)
    else:
        for examination in found:
            click.secho(examination.target_id, bold=True)
            for item in examination.findings:
                mark, colour = _MARKS[item.state]
                click.echo(f"  {click.style(mark, fg=colour)} {item.what}: {item.found}")
                if item.remedy and item.state != "good":
                    click.echo(f"         what to do: {item.remedy}")
    states = {item.state for examination in found for item in examination.findings}
    ctx.exit(1 if "bad" in states else 3 if "unknown" in states else 0)
