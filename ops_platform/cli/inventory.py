"""`ops inventory`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ops_platform.cli.common import Commands, complete_targets, emit, json_option, table
from ops_platform.counting import count_of

if TYPE_CHECKING:
    from ops_platform.inventory.model import Schedule


@click.group(cls=Commands)
def inventory() -> None:
    """Check and show platform.yaml; print its JSON Schema."""


@inventory.command()
@json_option
def check(as_json: bool) -> None:
    """Read the file, every suite it names, and the runbooks of its drills; mistakes with line, key and the nearest valid key."""
    from ops_platform.clients.access import Access
    from ops_platform.drills.begin import check_plans
    from ops_platform.inventory import load
    from ops_platform.recovery.expectations import load_suite

    loaded = load()
    suites = {
        loaded.path.parent / target.backup.verification.expectations.suite
        for target in loaded.inventory.targets
        if target.backup.verification.expectations is not None
    }
    for suite in sorted(suites):
        load_suite(suite)
    with Access(loaded) as access:
        drills = check_plans(access)
    if as_json:
        emit(
            dict[str, int | str],
            {
                "file": str(loaded.path),
                "targets": len(loaded.inventory.targets),
                "suites": len(suites),
                "drills": drills,
            },
        )
    else:
        counts = (
            count_of(len(loaded.inventory.targets), "target"),
            count_of(len(suites), "expectation suite"),
            count_of(drills, "drill"),
        )
        click.echo(f"{loaded.path}: good; {', '.join(counts)}")


@inventory.command()
@click.argument("target", required=False, shell_complete=complete_targets)
@json_option
def show(target: str | None, as_json: bool) -> None:
    """The targets; or one of them, with policies and defaults filled in."""
    from ops_platform.inventory import load
    from ops_platform.inventory.model import Target

    found = load().inventory
    if target is not None:
        emit(Target, found.target(target))
    elif as_json:
        emit(list[Target], found.targets)
    else:
        rows = [
            [
                t.id,
                t.environment,
                t.owner,
                t.classification.value,
                t.repository.engine,
                _when(t.backup.schedule),
                t.description,
            ]
            for t in found.targets
        ]
        table(rows, ["target", "environment", "owner", "class", "engine", "backup at", "description"])


@inventory.command()
def schema() -> None:
    """JSON Schema of platform.yaml, for editors."""
    from ops_platform.inventory import json_schema

    click.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def _when(schedule: Schedule) -> str:
    return f"{schedule.cron} {schedule.timezone}"
