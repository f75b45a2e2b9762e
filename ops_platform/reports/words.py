"""How moments and texts are written for people, the same in the terminal and on the pages."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

# What a terminal obeys or a reader is misled by: control characters and marks that turn the direction of text.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


_RUN = re.compile(r"(dagster run [0-9a-f]{8})-[0-9a-f-]{27}")


def who(actor: str) -> str:
    """Who did it. A run of Dagster by the eight digits by which Dagster's own pages name it."""
    return _RUN.sub(r"\1", actor)


def moment(when: datetime) -> str:
    """`2026-01-15 05:30:12 UTC`, for engineers."""
    return f"{utc(when):%Y-%m-%d %H:%M:%S} UTC"


def long_moment(when: datetime, *, seconds: bool = False) -> str:
    """`15 Jan 2026, 05:30 UTC`, for sentences. English whatever the machine's locale."""
    at = utc(when)
    return (
        f"{at.day} {_MONTHS[at.month - 1]} {at.year}, {at:%H:%M:%S} UTC"
        if seconds
        else f"{day(at)} {at.year}, {at:%H:%M} UTC"
    )


def day(when: datetime) -> str:
    at = utc(when)
    return f"{at.day} {_MONTHS[at.month - 1]}"


def utc(when: datetime) -> datetime:
    """The moment in UTC. A naive one is refused: to guess its zone would move the promise by hours."""
    if when.tzinfo is None:
        raise ValueError(f"{when.isoformat()} has no zone; every time of a record carries one")
    return when.astimezone(UTC)


def plain(text: str) -> str:
    """The text without what could steer a terminal or turn its direction; such characters are shown by their number."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def sentence(text: str) -> str:
    """A reason as the end of a sentence: one full stop, whatever its writer put."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
