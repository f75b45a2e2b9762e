"""The ledger: appends in batches, and the verification of a million entries with their checkpoints. Real servers, by the tests' rigs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from benchmarks.measure import Comparison, Goal
from ops_platform.clock import SYSTEM_CLOCK
from ops_platform.inventory.evidence import Control
from ops_platform.ledger import Draft, Ledger
from ops_platform.ledger.pack import verify_pack, write_pack
from tests.ledger_rig import Checkpoints, Database
from tests.rig import Cluster, Ground, scratch

ALONE, BATCH, OUTBOX, WRITERS = (
    "one by one",
    "batches of 1000",
    "batches of 1000, all to the outbox",
    "four writers, batches of 100",
)
CHAIN, ANCHORED, NEXT, PROOF, EXPORT, OFFLINE = (
    "the chain alone", "with its checkpoints", "the next checkpoint, 1000 entries on", "proof of one entry", "whole pack written",
    "whole pack verified offline",
)  # fmt: skip


def draft(number: int) -> Draft:
    """As actions write them: the outcome of one change."""
    body = {
        "run": f"{number:016x}",
        "digest": f"{number:064x}",
        "object": f"production/checkout-api-{number % 400}",
        "kind": "pod.restart",
        "outcome": "applied",
        "reason": "restarted, ready again after 12 s",
        "detail": {"revision": number % 90, "before": {"restarts": 4}, "after": {"restarts": 5}},
    }
    return Draft("action.outcome", f"system-{number % 50}", body)


class Servers:
    """PostgreSQL, and where they are needed the object store and OpenBao."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.stop()
        self.ground.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __init__(self) -> None:
        self.directory = scratch("ops-bench-ledger-")
        self.cluster = Cluster(18, self.directory, {"fsync": "on", "shared_buffers": "128MB", "max_wal_size": "2GB"})
        self.ground = Ground()

    @contextmanager
    def ledger(self) -> Iterator[Checkpoints]:
        self.ground.component("s3")
        database = Database(self.cluster)
        rig = Checkpoints(self.ground, database)
        rig.ledger = Ledger(database.connect, clock=SYSTEM_CLOCK)
        try:
            yield rig
        finally:
            rig.close()
            database.drop()


def appends(count: int, rounds: int) -> Comparison:
    found = Comparison(
        "ledger-appends",
        "entries written durably, of some 400 bytes each",
        "entries a second",
        "Each batch is one transaction and one round trip; each row meets both triggers. PostgreSQL has `fsync` and `synchronous_commit` on. "
        "The tables grow from round to round.",
        [Goal("≥ 2,000 a second in batches", BATCH, least=2000)],
    )
    with Servers() as servers, servers.ledger() as rig:
        for _ in range(rounds):
            found.load.append(os.getloadavg()[0])
            found.add(ALONE, _rate(count // 20, lambda n: rig.ledger.append(*draft(n), actor="dagster run")))
            found.add(
                BATCH, _rate(count, lambda n: rig.ledger.append_all(map(draft, range(n, n + 1000)), actor="x"), 1000)
            )
            rig.ledger.publish(["action."])
            found.add(
                OUTBOX, _rate(count, lambda n: rig.ledger.append_all(map(draft, range(n, n + 1000)), actor="x"), 1000)
            )
            rig.ledger.publish([])
            found.add(WRITERS, _at_once(rig, count))
    return found


def _rate(count: int, write: Callable[[int], object], step: int = 1) -> float:
    began = time.perf_counter()
    steps = range(0, count, step)
    for number in steps:
        write(number)
    return len(steps) * step / (time.perf_counter() - began)


def _at_once(rig: Checkpoints, count: int) -> float:
    from concurrent.futures import ThreadPoolExecutor

    def write(_: int) -> None:
        with Ledger(rig.database.connect) as ledger:
            for number in range(0, count // 4, 100):
                ledger.append_all(map(draft, range(number, number + 100)), actor="x")

    began = time.perf_counter()
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(write, range(4)))
    return count / (time.perf_counter() - began)


def verification(count: int, rounds: int) -> Comparison:
    checkpoints = min(100, count // 1000)
    found = Comparison(
        "ledger-verification",
        f"{count:,} entries with {checkpoints} signed checkpoints",
        "seconds",
        "Verification recomputes every digest from the first entry on; with checkpoints it also reads each of them from the store, verifies its "
        "signature with Vault's public key, and compares the Merkle root at its size. One process; PostgreSQL sends while it computes.",
        [Goal("1 M entries with checkpoints ≤ 10 s", ANCHORED, most=10.0)],
    )
    since = datetime.now(UTC) - timedelta(minutes=2)
    control = Control(id="CC7.4", framework="SOC 2", title="all", kinds=["action."])
    with Servers() as servers, servers.ledger() as rig, tempfile.TemporaryDirectory() as folder:
        for number in range(checkpoints):
            each = count // checkpoints
            rig.ledger.append_all(map(draft, range(number * each, (number + 1) * each)), actor="dagster run")
            rig.anchored().write()
        anchored, path = rig.anchored(), Path(folder) / "pack.zip"
        for _ in range(rounds):
            found.load.append(os.getloadavg()[0])
            found.add(CHAIN, _timed(lambda: rig.ledger.verify().ok))
            found.add(ANCHORED, _timed(lambda: anchored.verify().ok))
            rig.ledger.append_all(map(draft, range(1000)), actor="x")
            found.add(NEXT, _timed(lambda: anchored.write()[1]))
            found.add(PROOF, _timed(lambda: anchored.prove(count // 2).holds))
        until = datetime.now(UTC)
        found.add(EXPORT, _timed(lambda: write_pack(
            path, anchored, control, since, until, whole=True, made_by="x", cover=lambda _: "").entries > count))  # fmt: skip
        found.add(OFFLINE, _timed(lambda: verify_pack(path, pinned=rig.signer.public_keys()).verdict == "good"))
        found.notes.append(f"The pack of all entries has {path.stat().st_size / 2**20:.0f} MiB.")
    return found


def _timed(work: Callable[[], bool]) -> float:
    began = time.perf_counter()
    good = work()
    seconds = time.perf_counter() - began
    assert good
    return seconds
