"""Numbers of things, of bytes and of seconds, in words."""

from __future__ import annotations

from datetime import timedelta

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def count_of(number: int, one: str, many: str | None = None) -> str:
    """`1 table`, `2 tables`, `2 indices`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def size(count: float) -> str:
    """`512 B`, `3.1 GiB`, `245 MiB`: three digits at most."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 99.95 else f"{value:.1f} {_UNITS[unit]}"


def no_room(needed: float, free: float) -> str | None:
    """What is said of a disk where less is free than is needed; None where it is enough."""
    if needed <= free:
        return None
    return f"{size(needed)} are needed and {size(free)} are free: {size(needed - free)} too few"


def duration(seconds: float | timedelta) -> str:
    """`4 min 12 s`, `1.8 s`, `14 d 6 h`: the two largest units, rounded first, so that there is never `60 s`."""
    value = seconds.total_seconds() if isinstance(seconds, timedelta) else float(seconds)
    sign, value = ("-", -value) if value < 0 else ("", value)
    if value < 0.9995:
        milliseconds = round(value * 1000)
        return f"{sign}{milliseconds} ms" if milliseconds else "0 s"
    if value < 9.95:
        return f"{sign}{value:.1f}".removesuffix(".0") + " s"
    if value < 3599.5:
        minutes, rest = divmod(round(value), 60)
        return sign + _two((minutes, "min"), (rest, "s"))
    if value < 172770:
        hours, rest = divmod(round(value / 60), 60)
        return sign + _two((hours, "h"), (rest, "min"))
    days, rest = divmod(round(value / 3600), 24)
    return sign + _two((days, "d"), (rest, "h"))


def against(seconds: float, most: float) -> str:
    """`4 min 12 s, 5 min are allowed`; and by how much it is too long, which two units may not show."""
    said = f"{duration(seconds)}, {duration(most)} are allowed"
    return f"{said}: {duration(seconds - most)} too long" if seconds > most else said


def _two(large: tuple[int, str], small: tuple[int, str]) -> str:
    return " ".join(f"{number} {unit}" for number, unit in (large, small) if number) or f"0 {small[1]}"
