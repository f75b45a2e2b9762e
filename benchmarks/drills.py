"""What a drill costs beyond what it measures, and how finely its probes see. Real servers, by the tests' rigs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from statistics import median, quantiles

from benchmarks.measure import Comparison, Goal
from ops_platform.drills.availability import gaps
from ops_platform.drills.model import Sample, StepRecord, StepState
from ops_platform.drills.scorecard import card_of
from tests import redis_rig
from tests.drill_rig import Bench, supervised
from tests.rig import Cluster, scratch

OVERHEAD, WHOLE = "the drill's own time", "the whole drill"
MEDIAN, P99 = "median of the spacing", "99th percentile of the spacing"
OFF = "error of an outage's length, the largest of a drill"
EVERY_MS, HUNG, TIMES = 50, 1.0, 4


# The drill's own time


def waits(records: Mapping[str, StepRecord]) -> list[tuple[datetime, datetime]]:
    """What the drill waited for and did not decide itself: the servers' own way through the loss.

    `before`: as long as it was asked to look. From the injection's moment to the one at which another server led, and to the first write
    that was acknowledged; then the second for which a write has to hold before the outage counts as over. `rejoined`, `whole`: until the
    old master follows.
    """
    found: list[tuple[datetime, datetime]] = []
    for step in ("before", "promoted", "outage", "rejoined", "whole"):
        record = records[step]
        if record.started_at is not None and record.ended_at is not None:
            found.append((record.started_at, record.ended_at))
    return found


def own_seconds(began: datetime, ended: datetime, records: Mapping[str, StepRecord]) -> dict[str, float]:
    """Seconds of the drill outside of what it waited for, by part, and in all."""
    marks = sorted(waits(records))
    parts = {"until the probes run": (records["before"].started_at or began) - began}
    for (_, end), (begin, _) in pairwise(marks):
        parts["between waits"] = parts.get("between waits", timedelta(0)) + max(timedelta(0), begin - end)
    parts["the end"] = ended - max(end for _, end in marks)
    seconds = {name: part.total_seconds() for name, part in parts.items()}
    return {**seconds, OVERHEAD: sum(seconds.values()), WHOLE: (ended - began).total_seconds()}


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A platform with drills and its database. Processes that a drill starts find their modules compiled, as in every installation in use."""
    home = scratch("ops-bench-drills-")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(home / "pycache")
    cluster = Cluster(18, home)
    try:
        with ExitStack() as stack:
            yield Bench(cluster, stack)
    finally:
        cluster.stop()


def declare(made: Bench, rig: redis_rig.Replicated, runbook: str) -> None:
    cache = {
        "id": "cache", "kind": "redis", "mode": "sentinel", "environment": "test", "owner": "team", "tls": False, "timeout": "1s",
        "hosts": [{"host": "127.0.0.1", "port": one.port} for one in rig.sentinels], "master": rig.NAME,
    }  # fmt: skip
    made.body["systems"].append(cache)
    budget = {"unavailability": {"most": "100m"}, "targets": ["cache"], "mode": "enforce"}
    made.body["drills"]["plan"].append({"id": "master", "runbook": runbook, **budget})


def overhead(rounds: int) -> Comparison:
    found = Comparison(
        "drill-overhead",
        "a failover drill's own time beyond what it measures and waits for",
        "seconds",
        "The shipped Redis drill under Sentinel: three servers, three sentinels, the master killed. Own is what lies outside of the steps that wait for "
        "the servers: `before` (2 s, as asked for), `promoted`, `outage` (until writes have held for a second), `rejoined` and `whole` (until the old "
        "master follows, which its supervisor starts). So the start of the two probes' processes, the looks before, the injection, the count of "
        "acknowledged writes, the teardown with its proof and the scorecard are own; what stands between two steps, too.",
        [Goal("< 2 s", OVERHEAD, most=2.0, if_missed=_OWN)],
    )  # fmt: skip
    with redis_rig.replicated(replicas=2, sentinels=3) as rig, bench() as made:
        declare(made, rig, "redis-failover-drill")
        _one_failover(made, rig)  # compiles them
        for _ in range(rounds):
            found.load.append(os.getloadavg()[0])
            for name, seconds in _one_failover(made, rig).items():
                found.add(name, seconds)
    return found


_OWN = "two probes are processes of their own, and each imports what it needs before it sees anything"


def _one_failover(made: Bench, rig: redis_rig.Replicated) -> dict[str, float]:
    old = rig.master

    def replaced() -> bool:
        return all(rig.seen_master(one) != old.port for one in rig.sentinels)

    with supervised([one.daemon for one in rig.servers], replaced):
        held = made.drill("master", seconds_before=2)
    card = card_of(held)
    if card is None or card.verdict != "PASS":
        raise RuntimeError(f"the drill did not pass: {card.reason if card else held.reason}")
    for replica in rig.replicas:
        replica.wait_in_sync()
    return own_seconds(held.started_at, card.ended_at, made.engine.store.steps(held.id))


# How finely its probes see

_RUNBOOK = [
    {"id": "writer", "kind": "probe", "does": "redis.write", "every_ms": EVERY_MS, "with": {"timeout_ms": 100}},
    {"id": "reader", "kind": "probe", "does": "redis.read", "every_ms": EVERY_MS, "counts": False, "needs": ["writer"]},
    {"id": "seen", "kind": "wait_until", "does": "drill.let_it_run", "with": {"seconds": 12.0}, "needs": ["writer", "reader"]},
]  # fmt: skip


@dataclass(frozen=True)
class Hang:
    """A server that was stopped (SIGSTOP) and went on (SIGCONT)."""

    began: datetime
    ended: datetime

    def seconds(self) -> float:
        return (self.ended - self.began).total_seconds()


def spacing(samples: Sequence[Sample]) -> tuple[float, float]:
    """Median and 99th percentile of the milliseconds between the beginnings of two attempts."""
    apart = [(after.at - before.at).total_seconds() * 1000 for before, after in pairwise(samples)]
    return median(apart), quantiles(apart, n=100)[98]


def largest_error(samples: Sequence[Sample], hangs: Sequence[Hang]) -> tuple[float, int]:
    """Milliseconds by which the probe's outages differ from what they were, and how many it saw that were none. Raises where one was not seen."""
    seen, errors = gaps(samples), list[float]()
    for hang in hangs:
        met = [gap for gap in seen if gap.began < hang.ended and (gap.ended or gap.last) > hang.began]
        if not met:
            raise RuntimeError(f"nobody saw the hang at {hang.began}")
        errors.append(abs(sum(gap.seconds for gap in met) - hang.seconds()) * 1000)
        seen = [gap for gap in seen if gap not in met]
    return max(errors), len(seen)


def resolution(rounds: int) -> Comparison:
    found = Comparison(
        "probe-resolution",
        f"what a drill's probes see at {EVERY_MS} ms, and how exactly they measure an outage",
        "milliseconds",
        f"A writer (which waits 100 ms for an answer) and a reader of a Redis under Sentinel, {TIMES} times in a drill of 12 s its master hangs (SIGSTOP) for "
        f"{HUNG:.0f} s. Spacing is that of the beginnings of the writer's attempts, hangs and all. An outage lasts from the beginning of the first attempt "
        "that failed to the answer of the next one that succeeded; its length is compared with the time between SIGSTOP and SIGCONT.",
        [Goal(f"an attempt every {EVERY_MS} ms", MEDIAN, most=EVERY_MS * 1.02),
         Goal(f"99 of 100 within {EVERY_MS * 1.2:.0f} ms", P99, most=EVERY_MS * 1.2),
         Goal(f"an outage's length is right to within two attempts, {2 * EVERY_MS} ms", OFF, most=2.0 * EVERY_MS, if_missed=_LATE)],
    )  # fmt: skip
    others = 0
    with redis_rig.replicated(replicas=1, sentinels=3) as rig, bench() as made:
        made.runbook("seeing", _RUNBOOK, kinds=["redis"])
        declare(made, rig, "seeing")
        for _ in range(rounds):
            found.load.append(os.getloadavg()[0])
            hangs: list[Hang] = []
            with _hanging(made, rig.master, hangs):
                held = made.drill("master")
            card = card_of(held)
            if card is None or card.verdict != "PASS":
                raise RuntimeError(f"the drill did not pass: {card.reason if card else held.reason}")
            samples = made.engine.store.samples(held.id, "writer")
            middle, late = spacing(samples)
            error, wrong = largest_error(samples, hangs)
            for name, value in ((MEDIAN, middle), (P99, late), (OFF, error)):
                found.add(name, value)
            others += wrong
    found.notes.append(f"Outages that a probe saw beside those: {others}.")
    return found


_LATE = (
    "an attempt that begins while the server hangs holds its connection for 100 ms, and a new one is tried every 50 ms"
)


@contextlib.contextmanager
def _hanging(made: Bench, server: redis_rig.Redis, hangs: list[Hang]) -> Iterator[None]:
    """Lets the server hang while the drill's step `seen` runs."""
    over = threading.Event()

    def hang() -> None:
        store = made.open("the one who looks").store
        while not over.wait(0.1):
            running = store.list(ended=False)
            if running and store.steps(running[-1].id)["seen"].state is StepState.RUNNING:
                break
        for _ in range(TIMES):
            if over.wait(1.5):
                return
            began = datetime.now(UTC)
            server.daemon.pause()
            try:
                time.sleep(HUNG)
            finally:
                ended = datetime.now(UTC)
                server.daemon.resume()
            hangs.append(Hang(began, ended))

    thread = threading.Thread(target=hang)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)
