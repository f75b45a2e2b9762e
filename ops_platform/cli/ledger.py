"""`ops ledger`."""

from __future__ import annotations

import re

import click

from ops_platform.cli.common import Commands, emit, json_option, opened, parse_moment, stamp, table
from ops_platform.errors import UsageError


@click.group(cls=Commands)
def ledger() -> None:
    """The tamper-evident record of every plan, refusal, change and proof."""


@ledger.command()
@click.option(
    "--anchor",
    metavar="SEQ:SHA256",
    help="An entry as it was noted elsewhere: without one a chain that was rewritten as a whole looks good.",
)
@json_option
@click.pass_context
def verify(ctx: click.Context, anchor: str | None, as_json: bool) -> None:
    """Recompute the whole chain. Exit 1 where an entry was changed, dropped or put in."""
    from ops_platform.ledger import Ledger, LedgerCheck

    held = _anchor(anchor) if anchor is not None else None
    with opened() as access, Ledger(access.platform_db) as book:
        found = book.verify(anchor=held)
    if as_json:
        emit(LedgerCheck, found)
    elif found.broken is None:
        click.echo(f"{found.entries} entries, unbroken ({found.seconds:.2f} s); the head is {found.head_sha256}")
    if found.broken is not None:
        click.secho(f"BROKEN at entry {found.broken.seq} ({found.broken.how}): {found.broken.what}", fg="red", err=True)
    for what in found.unprotected:
        click.secho(f"NOT PROTECTED: {what}", fg="red", err=True)
    ctx.exit(0 if found.ok else 1)


def _anchor(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"([1-9][0-9]*):([0-9a-f]{64})", text.strip().lower())
    if match is None:
        raise UsageError(
            f"--anchor: {text!r} is not SEQ:SHA256",
            remedy="write it like 42: and 64 hex digits; ops ledger list --json shows both",
        )
    return int(match[1]), match[2]


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
