"""`ops rules`."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops_platform.cli.common import Commands, emit, json_option, opened, parse_moment, stamp, table
from ops_platform.counting import count_of
from ops_platform.errors import UsageError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.remediation.model import Signal


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
        click.echo(
            f"{count_of(count, 'rule')}, {len(found)} of them wrong"
            if found
            else f"{count_of(count, 'rule')}, all good"
        )
    ctx.exit(2 if found else 0)


@rules.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--offline", is_flag=True, help="Ask no system: which rules and parameters alone.")
@json_option
def explain(file: Path, offline: bool, as_json: bool) -> None:
    """Which rule would do what about the alert or event in FILE, and which guard would refuse, and why. Changes nothing.

    FILE holds an alert as Alertmanager's API and webhooks write it, a list of them, or a CloudEvent in JSON.
    """
    from ops_platform.remediation.explain import Explained, explain_signal, read_signals

    try:
        value: Any = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"this file cannot be read: {error.strerror}", where=str(file)) from None
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


@rules.command()
@click.option("--from", "since", required=True, metavar="TIME", help="From this moment on, with its zone.")
@click.option("--to", "until", metavar="TIME", help="Until this moment; now by default.")
@click.option(
    "--rules",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Another platform.yaml, whose rules are tried.",
)
@click.option(
    "--prometheus",
    "system",
    metavar="ID",
    help="Take the history of ALERTS from this Prometheus, and not what was recorded.",
)
@json_option
def replay(since: str, until: str | None, file: Path | None, system: str | None, as_json: bool) -> None:
    """Run the alerts and events of the past through the rules, in virtual time: what would have been done, suppressed, escalated.

    Nothing is asked but the record, and nothing is changed.
    """
    from ops_platform.clock import SYSTEM_CLOCK
    from ops_platform.inventory import load
    from ops_platform.remediation.replay import Report
    from ops_platform.remediation.replay import replay as run

    begin = parse_moment(since, option="--from")
    end = parse_moment(until, option="--to") if until else SYSTEM_CLOCK.now()
    if end <= begin:
        raise UsageError("--to lies before --from")
    with opened() as access:
        inventory = load(file).inventory if file else access.inventory
        report = run(inventory, _past(access, system, begin, end), begin, end)
    if as_json:
        emit(Report, report)
        return
    click.echo(
        f"{count_of(report.signals, 'signal')}, {report.unmatched} of them without a rule;"
        f" {count_of(len(report.incidents), 'incident')}, {count_of(report.actions, 'action')}"
    )
    sums = [
        [rule, would, str(number)]
        for rule, found in sorted(report.by_rule().items())
        for would, number in sorted(found.items())
    ]
    table(sums, ["rule", "would have been", "times"])
    rows = [
        [stamp(one.began_at), one.rule, one.target, one.would.value, _short(one.why)] for one in report.incidents[-40:]
    ]
    click.echo()
    table(rows, ["began", "rule", "target", "would have been", "why"])


def _past(access: Access, system: str | None, since: datetime, until: datetime) -> list[Signal]:
    from ops_platform.clock import SYSTEM_CLOCK
    from ops_platform.inventory.systems import PrometheusSystem
    from ops_platform.ledger import Ledger
    from ops_platform.remediation.replay import spans, step_of
    from ops_platform.remediation.rules import remediation_of
    from ops_platform.remediation.store import Store

    if system is not None:
        from ops_platform.clients.prometheus import alert_history

        prometheus = access.prometheus(access.inventory.system(system, PrometheusSystem))
        return alert_history(prometheus, since, until, step_of(since, until))
    with Ledger(access.platform_db) as ledger:
        kept_since = SYSTEM_CLOCK.now() - remediation_of(access.inventory).signals_kept
        if since < kept_since:
            click.echo(f"signals from before {stamp(kept_since)} are forgotten (remediation.signals_kept)", err=True)
        return spans(Store(ledger).history(since, until))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"
