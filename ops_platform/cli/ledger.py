"""`ops ledger`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ops_platform.cli.common import Commands, emit, json_option, opened, parse_moment, stamp, table
from ops_platform.counting import count_of
from ops_platform.errors import OpsError, UsageError

if TYPE_CHECKING:
    from ops_platform.ledger import LedgerCheck
    from ops_platform.ledger.anchored import Anchored
    from ops_platform.ledger.checkpoint import Checkpoint


@click.group(cls=Commands)
def ledger() -> None:
    """The tamper-evident record of every plan, refusal, change and proof."""


@ledger.command()
@click.option(
    "--anchor",
    metavar="SEQ:SHA256",
    help="An entry as it was noted elsewhere: without it, and without checkpoints, a chain that was rewritten as a whole looks good.",
)
@click.option(
    "--offline",
    "pack",
    metavar="PACK",
    type=click.Path(dir_okay=False),
    help="Verify a pack of `ops evidence export` instead.",
)
@click.option(
    "--key",
    "key_files",
    metavar="FILE",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="A public key in PEM that is trusted, instead of those that Vault or the pack names.",
)
@click.option("--no-checkpoint", is_flag=True, help="Write no checkpoint of what was found good.")
@json_option
@click.pass_context
def verify(
    ctx: click.Context, anchor: str | None, pack: str | None, key_files: tuple[str, ...], no_checkpoint: bool, as_json: bool
) -> None:  # fmt: skip
    """Recompute the whole chain, and compare it with every checkpoint.

    Exit 1 where something is wrong: an entry was changed, dropped, put in, moved or back-dated, the ledger was rewritten or cut off, or a
    checkpoint is missing or not ours. Exit 3 where it cannot be told; for a pack also where its keys are not pinned by --key, or where it
    is not covered to the end of its period.
    """
    if pack is not None:
        if anchor is not None:
            raise UsageError("--anchor is for the ledger itself, not for a pack")
        ctx.exit(_verify_pack(pack, key_files, as_json))
    from ops_platform.ledger import Ledger, LedgerCheck
    from ops_platform.ledger.anchored import open_anchored

    held = _anchor(anchor) if anchor is not None else None
    with opened() as access:
        if access.inventory.platform.ledger is None:
            with Ledger(access.platform_db) as book:
                found = book.verify(anchor=held)
            written = None
        else:
            with open_anchored(access, pinned=_pinned(key_files)) as anchored:
                found = anchored.verify(anchor=held)
                written = _checkpoint_of(anchored) if found.ok and not no_checkpoint else None
    if as_json:
        emit(LedgerCheck, found)
    else:
        _say(found)
    _complain(found)
    if written:
        click.echo(written, err=True)
    ctx.exit(0 if found.ok else 1)


def _say(found: LedgerCheck) -> None:
    if found.broken is None:
        click.echo(
            f"{count_of(found.entries, 'entry', 'entries')}, unbroken ({found.seconds:.2f} s); the head is {found.head_sha256}"
        )
    if found.checkpoints:
        rest = found.head_seq - found.anchored_seq
        behind = f", {count_of(rest, 'entry', 'entries')} behind it" if rest > 0 else ""
        click.echo(
            f"{count_of(found.checkpoints, 'checkpoint fits', 'checkpoints fit')}, the newest covers entry {found.anchored_seq}{behind}"
        )


def _complain(found: LedgerCheck) -> None:
    if found.broken is not None:
        click.secho(f"BROKEN at entry {found.broken.seq} ({found.broken.how}): {found.broken.what}", fg="red", err=True)
    for what in found.unprotected:
        click.secho(f"NOT PROTECTED: {what}", fg="red", err=True)
    for each in found.findings:
        text = f"{each.kind.upper()}, {each.where}: {each.what}"
        click.secho(text, fg="red" if each.grave else "yellow", err=True)


def _checkpoint_of(anchored: Anchored) -> str:
    """What became of the checkpoint: the verification stands without it."""
    try:
        made, new = anchored.write()
    except OpsError as error:
        return f"no checkpoint was written: {error}"
    return _told(made, new)


def _told(made: Checkpoint | None, new: bool) -> str:
    if made is None:
        return "the ledger is empty: there is nothing to sign"
    what = "written" if new else "stands, nothing is new"
    return f"checkpoint {made.number} {what}: {count_of(made.size, 'entry', 'entries')}, root {made.root}, {stamp(made.at)}"


def _pinned(files: tuple[str, ...]) -> dict[str, bytes] | None:
    from ops_platform.ledger.dsse import from_pem

    return {name: from_pem(_read(name), name) for name in files} if files else None


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"this file cannot be read: {error.strerror}", where=name) from None


def _verify_pack(pack: str, key_files: tuple[str, ...], as_json: bool) -> int:
    from ops_platform.ledger.pack import PackCheck, verify_pack

    found = verify_pack(Path(pack), pinned=_pinned(key_files))
    if as_json:
        emit(PackCheck, found)
    else:
        for line in found.lines():
            click.echo(line)
    for each in found.findings:
        click.secho(f"{each.kind.upper()}, {each.where}: {each.what}", fg="red" if each.grave else "yellow", err=True)
    if found.verdict == "unpinned":
        click.secho(
            "The pack is consistent in itself. Whether its keys are the platform's, nothing in it can say: ask for their fingerprints "
            "by another way, or hand the public keys over with --key.",
            fg="yellow",
            err=True,
        )
    if found.verdict == "incomplete":
        click.secho(
            "What is in the pack is proven. The end of its period is not: export it again once the period is over and the ledger has a "
            "checkpoint from after it.",
            fg="yellow",
            err=True,
        )
    return {"good": 0, "bad": 1, "unpinned": 3, "incomplete": 3}[found.verdict]


@ledger.command()
@json_option
def checkpoint(as_json: bool) -> None:
    """Sign what came since the last checkpoint, and put it into the store."""
    from ops_platform.cli.outputs import CheckpointWritten
    from ops_platform.ledger.anchored import open_anchored

    with opened() as access, open_anchored(access) as anchored:
        made, new = anchored.write()
    if as_json:
        emit(CheckpointWritten, CheckpointWritten.of(made, new))
    else:
        click.echo(_told(made, new))


@ledger.command()
@click.argument("seq", type=click.IntRange(1))
@json_option
def prove(seq: int, as_json: bool) -> None:
    """Prove that an entry is in the newest checkpoint: its audit path in the Merkle tree."""
    from ops_platform.ledger.anchored import Inclusion, open_anchored

    with opened() as access, open_anchored(access) as anchored:
        found = anchored.prove(seq)
    if as_json:
        emit(Inclusion, found)
        return
    click.echo(
        f"entry {seq} ({found.entry.kind}, {found.entry.subject}, {stamp(found.entry.at)}) is in checkpoint {found.checkpoint}"
    )
    click.echo(f"leaf {found.index} of {found.size}: {found.entry.sha256}")
    for node in found.proof:
        click.echo(f"  {node}")
    click.echo(f"root {found.root}")


@ledger.command()
@json_option
def keys(as_json: bool) -> None:
    """The public keys that sign checkpoints, for whoever verifies them elsewhere. Hand them over by another way than a pack."""
    from ops_platform.cli.outputs import PublicKey
    from ops_platform.ledger.anchored import open_anchored

    with opened() as access, open_anchored(access) as anchored:
        found = [PublicKey.of(name, public) for name, public in anchored.signer.public_keys().items()]
    if as_json:
        emit(list[PublicKey], found)
        return
    for each in found:
        click.echo(f"{each.keyid}, SHA-256 {each.fingerprint}\n{each.pem}", nl=False)


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
