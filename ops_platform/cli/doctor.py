"""`ops doctor`."""

from __future__ import annotations

import click

from ops_platform.cli.common import complete_backed, emit, json_option, opened

_MARKS = {"good": ("ok  ", "green"), "warn": ("warn", "yellow"), "bad": ("BAD ", "red"), "unknown": ("?   ", "yellow")}


@click.command()
@click.argument("targets", nargs=-1, shell_complete=complete_backed)
@click.option("--platform", "shared", is_flag=True, help="What the targets share, and no target that is not named.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, targets: tuple[str, ...], shared: bool, as_json: bool) -> None:
    """Rights, settings, slots, versions, bucket, lock, keys: each with what to do. Exit 1 for what is bad, 3 for what is unknown.

    A target is a database or a store of another kind. Without targets it looks at all of them and at what they share:
    the ledger, its checkpoints, Dagster, Alertmanagers, topics, Slack.
    """
    from ops_platform.doctor import Examination, examine, examine_store
    from ops_platform.doctor_platform import examine_platform
    from ops_platform.inventory.model import Target

    with opened() as access:
        everything = not targets and not shared
        asked = access.inventory.all_backed() if everything else [access.inventory.backed(name) for name in targets]
        found = [examine(access, one) if isinstance(one, Target) else examine_store(access, one) for one in asked]
        if shared or everything:
            found += [one for one in (examine_platform(access),) if one.findings]
    if as_json:
        emit(list[Examination], found)
    else:
        for examination in found:
            click.secho(examination.target_id, bold=True)
            for item in examination.findings:
                mark, colour = _MARKS[item.state]
                click.echo(f"  {click.style(mark, fg=colour)} {item.what}: {item.found}")
                if item.remedy:
                    click.echo(f"         what to do: {item.remedy}")
    states = {item.state for examination in found for item in examination.findings}
    ctx.exit(1 if "bad" in states else 3 if "unknown" in states else 0)
