"""Starting: the code location and the inventory beside bare Dagster, and the command line. Needs no server."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ground import World, timed
from benchmarks.measure import Comparison, Goal, measured
from benchmarks.sizes import Sizes


def startup(world: World, sizes: Sizes) -> Comparison:
    """Needs no server: `world` is left as it is."""
    location, load, helping, bare = "code location", "inventory", "ops --help", "import dagster"
    found = Comparison(
        "startup",
        "starting: the code location and the inventory with 1,000 targets, and the command line",
        "seconds",
        "From the start of a fresh interpreter to its end, with compiled modules. The code location is imported and its repository built, as"
        " Dagster's code server does; the inventory is read and checked; the bare side does nothing but `import dagster`.",
        [
            Goal("code location ≤ 1.5 × bare import dagster", location, bare, most=1.5),
            Goal("inventory ≤ 1 s", load, most=1.0),
            Goal("ops --help ≤ 0.3 s", helping, most=0.3),
        ],
    )
    with tempfile.TemporaryDirectory(prefix="ops-bench-startup-") as folder:
        file = Path(folder) / "platform.yaml"
        file.write_text(yaml.safe_dump(inventory_of(1000), sort_keys=False))

        def python(code: str) -> Callable[[], float]:
            return lambda: timed(["env", f"OPS_INVENTORY={file}", sys.executable, "-c", code]).seconds

        sides = {
            location: python("from ops_platform.definitions import defs; defs.get_repository_def()"),
            load: python("from ops_platform.inventory import load; assert len(load().inventory.targets) == 1000"),
            helping: lambda: timed([str(Path(sys.executable).with_name("ops")), "--help"]).seconds,
            bare: python("import dagster"),
        }
        for side in sides.values():
            side()  # compiles the modules, and brings them into the cache
        measured(found, max(sizes.rounds, 3) * 3, sides)
    return found


def inventory_of(count: int) -> dict[str, Any]:
    """platform.yaml with so many targets of one kind."""
    target = {
        "environment": "production",
        "owner": "team",
        "classification": "internal",
        "objectives": {},
        "connection": {"user": "ops_backup", "password": "env://PGPASSWORD"},
        "repository": {"store": "s", "keys": "k"},
        "backup": {"schedule": {"cron": "15 2 * * *", "timezone": "Europe/Berlin", "spread": "4h"}},
    }
    secrets = {"access_key": "env://S3_ACCESS_KEY", "secret_key": "env://S3_SECRET_KEY"}
    return {
        "version": 1,
        "platform": {"name": "benchmark"},
        "owners": {"team": {"name": "Team"}},
        "environments": {"production": {}},
        "key_services": {"k": {"kind": "file", "path": "key"}},
        "stores": {"s": {"endpoint": "https://store.invalid", "bucket": "b", **secrets}},
        "targets": [
            {
                "id": f"db-{number:04}",
                **target,
                "connection": {**target["connection"], "hosts": [{"host": f"db-{number:04}.invalid"}]},
            }
            for number in range(count)
        ],
    }
