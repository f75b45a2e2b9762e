"""How much data and WAL each comparison has, and how often it is measured."""

from __future__ import annotations

from dataclasses import dataclass

MB, GB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Sizes:
    """Bytes of data and of WAL."""

    large: int = int(3.0 * GB)
    small: int = 1 * GB
    huge: int = 10 * GB
    noise: int = int(3.0 * GB)
    wal: int = 1 * GB
    rounds: int = 3
    events: int = 100_000
    alerts: int = 10_000
    entries: int = 1_000_000
    reactions: int = 6
    ticks: int = 10_000
    redis: int = 700 * MB
    records: int = 1_000_000
    objects: int = 10_000
    copied: int = 1 * GB


QUICK = Sizes(
    large=48 * MB, small=24 * MB, huge=96 * MB, noise=24 * MB, wal=48 * MB, rounds=1, events=5_000, alerts=1_000, entries=4_000,
    reactions=1, ticks=60, redis=8 * MB, records=5_000, objects=300, copied=64 * MB,
)  # fmt: skip


def gib(size: int) -> str:
    return f"{size / GB:.0f} GiB" if size >= GB else f"{size / MB:.0f} MiB"
