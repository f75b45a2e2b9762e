"""`ops ledger`."""

from __future__ import annotations

import json

import click

from ops_platform.cli.common import emit, json_option, opened, parse_moment, stamp, table


@click.group()
def ledger() -> None:
    """The tamper-evident record of every plan, refusal, change and proof."""


@ledger.command()
@json_option
@click.pass_context
def verify(ctx: click.Context, as_json: bool) -> None:
    """Recompute the whole chain. Exit 1 where an entry was changed, dropped or put in."""
    from ops_platform.ledger import LedgerCheck, open_ledger

    with opened() as access:
        found = open_ledger(access).verify()
    if as_json:
        emit(LedgerCheck, found)
    elif found.good:
        click.echo(f"{found.entries} entries, unbroken; the last digest is {found.head}")
    else:
        click.secho(f"BROKEN at entry {found.broken_seq}: {found.problem}", fg="red", err=True)
    ctx.exit(0 if found.good else 1)


@ledger.command(name="list")
@click.option("--target", "subject", help="Of this target.")
@click.option("--kind", help="Of this kind: verification, plan, refusal, outcome …")
@click.option("--since", metavar="TIME", help="From this moment on, with its zone.")
@click.option("-n", "--limit", default=50, show_default=True, type=click.IntRange(1), help="The newest so many.")
@json_option
def list_(subject: str | None, kind: str | None, since: str | None, limit: int, as_json: bool) -> None:
    """The entries, oldest first."""
    from ops_platform.ledger import Entry, open_ledger

    at = parse_moment(since, option="--since") if since else None
    with opened() as access:
        entries = open_ledger(access).newest(subject=subject, kind=kind, since=at, limit=limit)
    if as_json:
        emit(list[Entry], entries)
        return
    rows = [[str(e.seq), stamp(e.at), e.kind, e.subject, e.actor, _short(e.body)] for e in entries]
    table(rows, ["seq", "at", "kind", "subject", "actor", "what"])


def _short(body: object) -> str:
    text = json.dumps(body, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 100 else f"{text[:99]}…"
