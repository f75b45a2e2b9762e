"""`python -m benchmarks [--quick] [--only NAME ...] [--rounds N] [--out FILE]`."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.comparisons import COMPARISONS
from benchmarks.ground import World, facts
from benchmarks.measure import Comparison, document, merged, report
from benchmarks.sizes import QUICK, Sizes

_PREFACE = """# Benchmarks

Written by `make bench` (`python -m benchmarks`). Each comparison runs ours and the peer in turn within one run, so that both meet
the same machine; ratios say more than seconds. Shown are minimum, median and maximum over the rounds, the ratio of the medians, and
the spread of the ratios of each round. Server, tools and object store share the cores: a ratio here is one of CPU more than of network.
A goal that was missed stays in the table with its figure.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure beside the peers.")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: shows that it runs, not how fast")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--noise-gib", type=float, help="size of the incompressible cluster")
    parser.add_argument(
        "--out",
        type=Path,
        help="write the tables as Markdown; comparisons that stand there and are not measured now stay",
    )
    asked = parser.parse_args()
    if asked.quick and asked.out:
        parser.error("--quick shows that it runs, and gives no figures to be kept: leave --out away")
    if shutil.which("pgbackrest") is None:
        print("pgBackRest is not here; make services installs it", file=sys.stderr)
        return 3
    sizes = QUICK if asked.quick else Sizes()
    sizes = replace(sizes, rounds=asked.rounds or sizes.rounds)
    if asked.noise_gib:
        sizes = replace(sizes, noise=int(asked.noise_gib * (1 << 30)))
    gc.freeze()  # as the code location has before its first tick
    results = _measure([name for name in COMPARISONS if name in (asked.only or COMPARISONS)], sizes)
    if asked.out:
        at = {
            "measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "load average at the end": f"{os.getloadavg()[0]:.1f}",
        }
        known = facts() | at
        there = asked.out.read_text() if asked.out.exists() else None
        asked.out.write_text(
            document(results, known, _PREFACE) if there is None else merged(there, results, known, list(COMPARISONS))
        )
        print(f"written: {asked.out}")
    return 0


def _measure(names: list[str], sizes: Sizes) -> list[Comparison]:
    world, results = World(), list[Comparison]()
    try:
        for name in names:
            began = time.monotonic()
            print(f"{name} …", flush=True)
            results.append(COMPARISONS[name](world, sizes))
            print(report(results[-1]), f"  ({time.monotonic() - began:.0f} s)", sep="\n", flush=True)
    finally:
        world.close()
    return results


if __name__ == "__main__":
    sys.exit(main())
