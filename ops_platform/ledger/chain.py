"""What an entry is, how its digest is made, and whether a chain of them is unbroken: pure functions, no database.

The digest covers the predecessor's digest and the canonical JSON of the entry, so that no entry can be changed, taken out or
put in without every later digest saying so. The format is docs/reference/ledger.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, cast

import orjson

from ops_platform.errors import UsageError
from ops_platform.inventory.values import Secret

GENESIS = "0" * 64
"""What the first entry names as its predecessor's digest."""

Row = tuple[int, str, str, str, str, str, str, str]
"""seq, at (as `moment` writes it), kind, actor, subject, body, prev_sha256, sha256."""


@dataclass(frozen=True)
class Entry:
    """One entry. `text` is the body's canonical JSON exactly as it stands in the table and in the digest."""

    seq: int
    at: datetime
    kind: str
    actor: str
    subject: str
    text: str
    prev_sha256: str
    sha256: str

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.text)


@dataclass(frozen=True)
class Break:
    """Where the chain is broken for the first time, and how."""

    seq: int
    how: Literal["changed", "missing", "reordered", "wrong predecessor"]
    what: str


@dataclass(frozen=True)
class Finding:
    """Something that is wrong beside the chain itself, or (`grave` false) that a person should know and may have a good reason."""

    kind: FindingKind
    where: str
    what: str
    grave: bool = True


FindingKind = Literal[
    "rewritten", "truncated", "back-dated", "post-dated", "clock stepped back",
    "checkpoint missing", "checkpoint swapped", "checkpoint forged", "checkpoint unreadable", "checkpoint out of line",
    "not anchored", "pack altered", "pack incomplete", "not proven",
]  # fmt: skip


@dataclass(frozen=True)
class LedgerCheck:
    """`entries` were found good up to `head_seq`; nothing is said of what stands behind a break.

    `unprotected`: what no longer keeps the table append-only (a trigger that is disabled or gone). `checkpoints`: how many of them
    the entries were compared with and fit; `anchored_seq`: up to which entry they do. `findings`: what else was found.
    """

    entries: int
    head_seq: int
    head_sha256: str
    broken: Break | None
    unprotected: tuple[str, ...] = ()
    seconds: float = 0.0
    checkpoints: int = 0
    anchored_seq: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return self.broken is None and not self.unprotected and not any(found.grave for found in self.findings)


# Canonical JSON


def canonical(value: object) -> str:
    """JSON with sorted keys, no spaces and no escapes beyond the necessary: what digests are made of.

    Raises UsageError, naming the place, for a secret and for whatever is not plain JSON: nothing is converted by guessing.
    """
    if _is_plain(value):
        try:
            return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
        except orjson.JSONEncodeError:
            pass  # an integer beyond 64 bits
    else:
        _check(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _is_plain(value: object) -> bool:
    """Whether nothing in it can be wrong, as nearly always: exact types, ASCII alone. False says nothing: then `_check` looks."""
    kind = type(value)
    if kind is str:
        text = cast("str", value)
        return text.isascii() and "\0" not in text
    if kind is dict:
        for key, inner in cast("dict[object, object]", value).items():  # noqa: SIM110 - a generator takes twice as long
            if type(key) is not str or not _is_plain(key) or not _is_plain(inner):
                return False
        return True
    if kind is list or kind is tuple:
        for inner in cast("Sequence[object]", value):  # noqa: SIM110
            if not _is_plain(inner):
                return False
        return True
    return kind is int or kind is bool or value is None


def _check(value: object, place: str) -> None:
    if isinstance(value, Secret):
        # As a string it would read `***`; but whoever passes one here may pass its value the next time.
        raise UsageError(
            "a secret does not go into the ledger",
            where=place,
            remedy="record its reference, such as vault://mount/path#field",
        )
    if isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, Mapping):
        for key, inner in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str) or isinstance(key, Secret):
                raise UsageError(f"a key of type {type(key).__name__} is not plain JSON", where=place)
            _check_text(key, place)
            _check(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(cast("Sequence[object]", value)):
            _check(inner, f"{place}[{number}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{value} is not a JSON number", where=place)
    elif value is not None and not isinstance(value, int):
        raise UsageError(
            f"a value of type {type(value).__name__} is not plain JSON",
            where=place,
            remedy="write it as text or a number",
        )


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("this text holds half of a character, which is no Unicode", where=place) from None
    if "\0" in text:
        raise UsageError("this text holds a NUL, which PostgreSQL does not store", where=place)


def moment(at: datetime) -> str:
    """UTC to the microsecond, `2026-02-01T03:04:05.000006Z`: always of the same length."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# The chain


@lru_cache(maxsize=4096)  # the same few actors, kinds and targets come again and again
def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def entry_text(seq: int, at: str, kind: str, actor: str, subject: str, body: str) -> str:
    """The canonical JSON of an entry: keys in order, the body as it stands."""
    return (
        f'{{"actor":{_quoted(actor)},"at":"{at}","body":{body},"kind":{_quoted(kind)},"seq":{seq},'
        f'"subject":{_quoted(subject)}}}'
    )


def digest(prev_sha256: str, text: str) -> str:
    return hashlib.sha256(bytes.fromhex(prev_sha256) + text.encode()).hexdigest()


def follow(rows: Iterable[Row], seq: int = 0, prev: str = GENESIS) -> Iterator[tuple[int, str, bytes]]:
    """Number, moment and digest of each entry that continues the chain behind entry `seq`, whose digest is `prev`.

    Raises BrokenChainError at the first one that does not.
    """
    sha256, before = hashlib.sha256, bytes.fromhex(prev)
    for row in rows:
        found, at, kind, actor, subject, body, named, noted = row
        made = sha256(before + entry_text(found, at, kind, actor, subject, body).encode("utf-8", "surrogatepass"))
        if found != seq + 1 or named != prev or made.hexdigest() != noted:
            raise BrokenChainError(_break(row, seq, prev))
        seq, prev, before = found, noted, made.digest()
        yield seq, at, before


class BrokenChainError(Exception):
    """Control flow of this package: it never leaves it."""

    def __init__(self, broken: Break) -> None:
        super().__init__(broken.what)
        self.broken = broken


_FAR = 10_000  # so many places an entry is looked for in, around the one where it stands


def _break(row: Row, seq: int, prev: str) -> Break:
    """Why this row does not continue the chain behind entry `seq`."""
    found, at, kind, actor, subject, body, named, noted = row
    if found != seq + 1:
        return _out_of_order(seq + 1, found)
    if _recomputed(named, entry_text(found, at, kind, actor, subject, body)) != noted:
        for other in range(max(1, found - _FAR), found + _FAR):
            if _recomputed(named, entry_text(other, at, kind, actor, subject, body)) == noted:
                return Break(found, "reordered", f"entry {other} stands in the place of entry {found}")
        return Break(found, "changed", "its content does not give its digest: it was changed after it was written")
    return Break(found, "wrong predecessor", f"it was written after {named[:12]}…, and {prev[:12]}… stands before it")


def _recomputed(prev_sha256: str, text: str) -> str | None:
    try:
        return digest(prev_sha256, text)
    except ValueError:  # what should be a digest is no hexadecimal, or the text is no Unicode
        return None


def _out_of_order(wanted: int, found: int) -> Break:
    if found < wanted:
        return Break(found, "wrong predecessor", f"entry {found} stands twice")
    last = "" if found == wanted + 1 else f" to {found - 1}"
    return Break(wanted, "missing", f"entry {wanted}{last} is gone; the next is {found}")
