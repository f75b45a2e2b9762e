"""Numbers of things, in words."""

from __future__ import annotations


def count_of(number: int, one: str, many: str | None = None) -> str:
    """`1 table`, `2 tables`, `2 indices`."""
    return f"{number} {one if number == 1 else many or one + 's'}"
