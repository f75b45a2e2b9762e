"""The process of one probe: `python -m ops_platform.drills.probing DRILL/STEP`, started by a step and ended by the teardown.

An attempt begins every so many milliseconds whatever became of the one before, so that what hangs is seen as finely as what refuses.
How a target is asked stands in `askers`.
It is a process of its own, so that it goes on when the drill's worker is killed; it ends when the drill has, or does not want it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ops_platform.drills.askers import asker_of, named
from ops_platform.drills.availability import failing_since
from ops_platform.drills.model import Sample
from ops_platform.errors import OpsError, UnreachableError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.drills.runbook import Probe
    from ops_platform.drills.store import Store

_FLUSH = 0.5  # seconds
_SOON = 0.05  # the same until it has seen the target well, which whoever began the drill waits for
_ASK = 2.0  # seconds between two looks whether it is still wanted
_ALONE = 120.0  # seconds without the platform's database, after which it ends by itself
_KEPT = 100_000  # samples while the database is away


def word_of(drill: str, step: str) -> str:
    """What the process is known by on its machine."""
    return f"{drill}/{step}"


def command(word: str) -> list[str]:
    return [sys.executable, "-m", "ops_platform.drills.probing", word]


class Probing:
    """Attempts, and their samples on the way to the platform's database."""

    def __init__(self, access: Access, store: Store, drill: str, step: Probe, limits: list[tuple[float, str]]) -> None:
        from ops_platform.drills.registry import doing
        from ops_platform.drills.runbook import filled_in

        held = store.get(drill)
        given: Any = doing(step.does).given.model_validate(filled_in(step.with_, dict(held.parameters)))
        self.store, self.drill, self.step, self.limits = store, held, step, limits
        self.asker = asker_of(access, store, held, step, given)
        before = store.samples(drill, step.id)
        self.number = max((s.n or 0 for s in before), default=0)
        self.answered = any(s.ok for s in before)
        self.done: deque[Sample] = deque(maxlen=_KEPT)
        self.lately: deque[Sample] = deque(maxlen=20_000)
        self.running: set[asyncio.Task[None]] = set()
        self.ended = asyncio.Event()

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._leave)
        lookers = [asyncio.create_task(work) for work in self.asker.work()]
        teller = asyncio.create_task(self._tell())
        every = self.step.every_ms / 1000
        following = time.monotonic()
        while not self.ended.is_set():
            if len(self.running) < self.asker.at_once:
                self.number += 1
                task = asyncio.create_task(self._attempt(self.number))
                self.running.add(task)
                task.add_done_callback(self.running.discard)
            following = max(following + every, time.monotonic() - every)
            await asyncio.sleep(max(0.0, following - time.monotonic()))
        await teller
        for looker in lookers:
            looker.cancel()
        await asyncio.to_thread(self.asker.close)

    def _leave(self) -> None:
        self.ended.set()

    async def _attempt(self, n: int) -> None:
        at, began = datetime.now(UTC), time.monotonic()
        error = None
        try:
            await self.asker.attempt(n)
        except Exception as failure:  # noqa: BLE001 - whatever it is, it is what users had
            error = self.asker.why or named(failure)
        ms = (time.monotonic() - began) * 1000
        self.done.append(Sample(at, error is None, ms, n if self.asker.numbers else None, error))

    async def _tell(self) -> None:
        """Samples in their order to the database, conditions judged, and whether this is still wanted."""
        asked = heard = time.monotonic()
        pause = _SOON
        while not self.ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self.ended.wait()
            batch = [self.done.popleft() for _ in range(len(self.done))]
            try:
                if batch:
                    await asyncio.to_thread(self.store.saw, self.drill.id, self.step.id, batch)
                    self.lately.extend(batch)
                    self.answered = self.answered or any(sample.ok for sample in batch)
                    pause = _FLUSH if pause == _FLUSH or any(sample.ok for sample in batch) else _SOON
                await asyncio.to_thread(self._judge)
                if time.monotonic() - asked > _ASK:
                    asked = time.monotonic()
                    if not await asyncio.to_thread(self._wanted):
                        self.ended.set()
                heard = time.monotonic()
            except OpsError:
                self.done.extendleft(reversed(batch))
                if time.monotonic() - heard > _ALONE:
                    self.ended.set()

    def _wanted(self) -> bool:
        return self.store.wanted(self.drill.id, "process", word_of(self.drill.id, self.step.id))

    def _judge(self) -> None:
        """A condition under which the drill is broken off does not wait for whoever holds it to look.

        Before its first good answer it is the probe that is starting, for which its step waits.
        """
        since = failing_since(sorted(self.lately, key=lambda sample: sample.at)) if self.answered else None
        if since is None:
            return
        lasted = datetime.now(UTC) - since
        for seconds, why in self.limits:
            if lasted > timedelta(seconds=seconds):
                self.store.abort(
                    self.drill, f"{self.step.id} failed for {lasted.total_seconds():.1f} s: {why}", who="its probe"
                )


def probe(word: str, opened: Callable[[], Access]) -> None:
    from ops_platform.drills.runbook import runbook_of
    from ops_platform.drills.store import Store
    from ops_platform.ledger import Ledger

    drill, _, step_id = word.rpartition("/")
    with opened() as access, Ledger(access.platform_db) as ledger:
        store = Store(ledger)
        held = store.get(drill)
        book = runbook_of(held)
        step: Any = book.step(step_id)
        limits = [
            (c.unavailable_for.total_seconds(), "the runbook's limit") for c in book.abort_when if c.probe == step_id
        ]
        if step.counts and "unavailable" in held.objectives:
            limits.append((held.objectives["unavailable"], "the budget of unavailability is used up"))
        running = Probing(access, store, drill, step, limits)
        if not running._wanted():  # pyright: ignore[reportPrivateUsage]
            return
        asyncio.run(running.run())


def main() -> None:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import load

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        probe(sys.argv[1], lambda: Access(load()))
    except UnreachableError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
