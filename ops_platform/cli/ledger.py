"""`ops ledger`."""

from __future__ import annotations

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
    from ops_platform.ledger import Ledger, LedgerCheck

    with opened() as access, Ledger(access.platform_db) as book:
        found = book.verify()
    if as_json:
        emit(LedgerCheck, found)
    elif found.broken is None:
        click.echo(f"{found.entries} entries, unbroken ({found.seconds:.2f} s); the head is {found.head_sha256}")
    if found.broken is not None:
        click.secho(f"BROKEN at entry {found.broken.seq} ({found.broken.how}): {found.broken.what}", fg="red", err=True)
    for what in found.unprotected:
        click.secho(f"NOT PROTECTED: {what}", fg="red", err=True)
    ctx.exit(0 if found.ok else 1)


@ledger.command(name="list")
@click.option("--target", "subject", help="Of this target.")
@click.option("--kind", help="Of this kind; ending in a dot: every kind below it (backup.).")
@click.option("--since", metavar="TIME", help="From this moment on, with its zone.")
@click.option("-n", "--limit", default=50, show_default=True, type=click.IntRange(1), help="The newest so many.")
@json_option
def list_(subject: str | None, kind: str | None, since: str | None, limit: int, as_json: bool) -> None:
    """The entries, oldest first."""
    from ops_platform.ledger import Entry, Ledger

    at = parse_moment(since, option="--since") if since else None
    with opened() as access, Ledger(access.platform_db) as book:
        entries = book.entries(subject=subject, kind=kind, since=at, limit=limit, newest_first=True)[::-1]
    if as_json:
        emit(list[Entry], entries)
        return
    rows = [[str(e.seq), stamp(e.at), e.kind, e.subject, e.actor, _short(e.text)] for e in entries]
    table(rows, ["seq", "at", "kind", "subject", "actor", "what"])


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"
