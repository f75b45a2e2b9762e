"""`ops rules`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ops_platform.cli.common import Commands, emit, json_option, opened
from ops_platform.errors import UsageError


@click.group(cls=Commands)
def rules() -> None:
    """Which alerts and events lead to which action, and which guard would refuse it."""


@rules.command()
@json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Look at every rule: playbooks, parameters, kinds of targets. Exit 2 where one is wrong."""
    from ops_platform.remediation.rules import problems, remediation_of

    with opened() as access:
        found = problems(access.inventory)
        count = len(remediation_of(access.inventory).rules)
    if as_json:
        emit(list[str], found)
    else:
        for text in found:
            click.secho(text, fg="red", err=True)
        click.echo(f"{count} rules, {len(found)} of them wrong" if found else f"{count} rules, all good")
    ctx.exit(2 if found else 0)


@rules.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--offline", is_flag=True, help="Ask no system: which rules and parameters alone.")
@json_option
def explain(file: Path, offline: bool, as_json: bool) -> None:
    """Which rule would do what about the alert or event in FILE, and which guard would refuse, and why. Changes nothing.

    FILE holds an alert as Alertmanager's API and webhooks write it, a list of them, or a CloudEvent in JSON.
    """
    from ops_platform.remediation.explain import Explained, explain_signal, read_signals

    try:
        value: Any = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"this is not JSON: {error}", where=str(file)) from None
    with opened() as access:
        found = [
            one for signal in read_signals(value, str(file)) for one in explain_signal(access, signal, offline=offline)
        ]
    if as_json:
        emit(list[Explained], found)
        return
    if not found:
        click.echo("no rule is about it")
    for one in found:
        click.echo("\n".join(one.lines()))
