"""Holds a drill: step by step, each one's state written down before and after, whatever kills whom in between.

Nothing of a drill lives in this process alone. What a step is about to make is registered first; a worker that was killed is found by its
claim, which went with its session, and whoever comes next takes the drill over, or ends it. Ending is one thing, however the drill went:
the teardown steps run, everything that was registered is taken away or put back, and it is looked whether that worked. A worker that is
interrupted (Ctrl-C, SIGTERM, Dagster's terminate) ends its drill as an abort does, before it goes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.drills.model import (
    ENDED_IN_IT,
    Done,
    Drill,
    DrillState,
    Ending,
    Resource,
    StepRecord,
    StepState,
    abort_told,
)
from ops_platform.drills.registry import Context, TimedOutError, doing, remover
from ops_platform.drills.runbook import AnyStep, filled_in, runbook_of
from ops_platform.drills.store import Store
from ops_platform.drills.store.drills import AbortedError
from ops_platform.drills.store.resources import this_host
from ops_platform.drills.workspace import drills_of
from ops_platform.errors import ConflictError, OpsError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

T = TypeVar("T")
_HEARTBEAT = 0.5  # seconds between two looks of a worker at its drill
_GRACE = 60.0  # seconds that a step has to end by itself when its drill is broken off
_TEARDOWN_TRIES = 3
LOST_AFTER = timedelta(minutes=2)
_INTERRUPTED = "its worker was interrupted"


class StepFailedError(OpsError):
    """A step failed, with every attempt that it has."""


class Engine:
    """Works on drills. `actor`: who it is, for the ledger."""

    def __init__(self, access: Access, store: Store, actor: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.access, self.store, self.actor, self.clock = access, store, actor, clock

    # The whole, in one process

    def run(self, drill_id: str, *, wait: bool = True) -> Drill:
        """Go on with a drill until it has ended; with `wait` false also until it waits for a person.

        Raises ConflictError where somebody else works on it. Never raises for what the drill meets: that is its verdict.
        """
        with self._holding(drill_id) as held, self._ended_by_interruption(held):
            if held.state is DrillState.ENDED:
                return held
            if held.state is DrillState.ENDING:
                return self._end(held, held.ending or Ending.LOST, held.reason)
            try:
                if not self._steps(held, wait=wait):
                    return self.store.get(drill_id)
                ending, reason = Ending.COMPLETED, "all steps were taken"
            except AbortedError as error:
                ending, reason = Ending.ABORTED, error.what
            except StepFailedError as error:
                ending, reason = Ending.FAILED, error.line
            return self._end(self._taken(self.store.get(drill_id)), ending, reason)

    def _steps(self, held: Drill, *, wait: bool) -> bool:
        """Every step but the teardown. False: it waits for a person, and nobody waits with it."""
        book = runbook_of(held)
        for step in book.steps_for(held.mode):
            if step.kind == "teardown":
                continue
            if not self._with_retries(held, step, wait=wait):
                return False
        failed = [r for r in self.store.steps(held.id).values() if r.state is StepState.FAILED]
        if failed:
            raise StepFailedError(failed[0].said, where=book.step(failed[0].step).name)
        return True

    def _with_retries(self, held: Drill, step: AnyStep, *, wait: bool) -> bool:
        for left in range(step.retries, -1, -1):
            try:
                return self._take(held, step, wait=wait)
            except StepFailedError:
                if not left:
                    if step.on_failure == "go_on":
                        return True
                    raise
                self.clock.sleep(step.retry_after.total_seconds())
        return True

    # One step at a time: what Dagster's ops call

    def step(self, drill_id: str, step_id: str) -> StepRecord:
        """One attempt of one step, waiting for a person where it is one's. Raises StepFailedError, AbortedError, ConflictError."""
        with self._holding(drill_id) as held, self._ended_by_interruption(held):
            if held.state not in (DrillState.RUNNING, DrillState.WAITING):
                raise ConflictError(f"the drill is {held.state.value}: nothing of it is tried again", where=drill_id)
            self._take(held, runbook_of(held).step(step_id), wait=True)
            return self.store.steps(drill_id)[step_id]

    def end(self, drill_id: str, ending: Ending, reason: str) -> Drill:
        """Tear down and judge, unless that is done already."""
        with self._holding(drill_id) as held:
            if held.state is DrillState.ENDED:
                return held
            if held.abort is not None and ending is not Ending.COMPLETED:
                ending, reason = Ending.ABORTED, abort_told(held.abort)
            if held.state is DrillState.ENDING:
                ending, reason = held.ending or ending, held.reason
            return self._end(held, ending, reason)

    # What dead drills have left

    def sweep(self, *, lost_after: timedelta = LOST_AFTER) -> list[Drill]:
        """End every drill whose worker is gone, and take away what ended ones could not. Those that were worked on. Old samples are forgotten.

        A recovery in earnest is not ended: it is gone on with, by whoever began it (`ops recover`).
        """
        done = [
            self.end(
                drill.id, Ending.LOST, "the worker that held it was killed, or lost its way to the platform's database"
            )
            for drill in self.store.dead(lost_after=lost_after)
            if not drill.real
        ]
        for drill in self.store.list(ended=False):
            if drill.state is DrillState.WAITING and self._waited_too_long(drill):
                done.append(self.end(drill.id, Ending.FAILED, "nobody answered in time"))
        for drill in self.store.with_remains():
            with self.store.work_on(drill.id) as ours:
                if ours:
                    self._remove_all(drill)
                    done.append(drill)
        self.store.forget_samples(self.clock.now() - drills_of(self.access).samples_kept)
        return done

    def _waited_too_long(self, drill: Drill) -> bool:
        book, now = runbook_of(drill), self.clock.now()
        waiting = [r for r in self.store.steps(drill.id).values() if r.state is StepState.WAITING and r.started_at]
        return any(now - (r.started_at or now) > book.step(r.step).within for r in waiting)

    # One attempt

    @contextlib.contextmanager
    def _holding(self, drill_id: str) -> Generator[Drill]:
        """The drill, at a version that is ours. Raises ConflictError where somebody else works on it."""
        with self.store.work_on(drill_id) as ours:
            if not ours:
                raise ConflictError("somebody else works on this drill", where=drill_id)
            yield self._taken(self.store.get(drill_id))

    @contextlib.contextmanager
    def _ended_by_interruption(self, held: Drill) -> Generator[None]:
        """What was broken is put back before an interruption goes on; a second one leaves that to the sweep."""
        try:
            yield
        except BaseException as error:
            if _interrupts(error) and self._broken_off(held):
                now = self._taken(self.store.get(held.id))
                self._end(now, Ending.ABORTED, abort_told(now.abort) if now.abort is not None else _INTERRUPTED)
            raise

    def _broken_off(self, held: Drill) -> bool:
        """Ask for its end, as a person does. False: it stands as it is.

        So does a recovery in earnest, and what waits for a person: whoever comes next goes on with it.
        """
        now = self.store.get(held.id)
        if now.real or now.state is not DrillState.RUNNING:
            return False
        self.store.abort(now, _INTERRUPTED, who=self.actor)
        return True

    def _taken(self, drill: Drill) -> Drill:
        if drill.state is DrillState.ENDED:
            return drill
        return self.store.take_over(drill, actor=self.actor)

    def _take(self, held: Drill, step: AnyStep, *, wait: bool) -> bool:
        """One attempt. False: a person has not answered yet, and nobody waits. Raises StepFailedError."""
        before = self.store.steps(held.id)
        if before[step.id].state in (StepState.DONE, StepState.SKIPPED):
            return True
        book = runbook_of(held)
        broken = [need for need in book.needs_of(step, held.mode) if before[need].state is not StepState.DONE]
        if broken:
            said = f"not tried: it needs {book.names(broken)}"
            self.store.end_step(held, step.id, StepState.SKIPPED, said, actor=self.actor)
            return True
        if step.kind == "human":
            return self._person(held, step, wait=wait)
        self.store.begin_step(held, step.id)
        try:
            done = self._in_time(held, step, before)
        except (AbortedError, ConflictError):
            raise
        except OpsError as error:
            self.store.end_step(held, step.id, StepState.FAILED, error.line, actor=self.actor)
            raise StepFailedError(error.line, where=step.name) from error
        except Exception as error:
            said = f"unexpected {type(error).__name__}: {error}"
            self.store.end_step(held, step.id, StepState.FAILED, said, actor=self.actor)
            raise StepFailedError(said, where=step.name) from error
        self._settle(held, step, done)
        return True

    def _settle(self, held: Drill, step: AnyStep, done: Done) -> None:
        bad = [check for check in done.checks if not check.holds]
        stops = bad and step.kind == "check" and step.on_failure == "abort"
        state = StepState.FAILED if stops else StepState.DONE
        said = "; ".join(f"{check.title}: {check.result}" for check in bad) if bad else done.said
        self.store.end_step(
            held, step.id, state, said, actor=self.actor, facts=done.facts, checks=done.checks, measured=done.measured
        )
        if stops:
            raise StepFailedError(said, where=step.name)

    def context(self, held: Drill, step: AnyStep, results: Mapping[str, StepRecord]) -> Context:
        subject = self.access.inventory.subject(held.subject)
        deadline = self.clock.monotonic() + step.within.total_seconds()
        return Context(self.access, self.store, held, step, subject, results, self.clock, deadline)

    def _in_time(self, held: Drill, step: AnyStep, results: Mapping[str, StepRecord]) -> Done:
        """The step's code beside us, so that one that hangs is not waited for: what it would do later is refused by its version."""
        found = doing(step.does)
        context = self.context(held, step, results)
        given = found.given.model_validate(filled_in(step.with_, dict(held.parameters)))
        return self._beside(context, lambda: found.run(context, given))

    def _beside(self, context: Context, work: Callable[[], T]) -> T:
        box: list[Any] = []
        failed: list[BaseException] = []
        ended = threading.Event()

        def run() -> None:
            try:
                box.append(work())
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
                failed.append(error)
            finally:
                ended.set()

        threading.Thread(target=run, name=f"step {context.step.id}", daemon=True).start()
        try:
            while not ended.wait(_HEARTBEAT):
                context.alive()
        except BaseException as error:
            if isinstance(error, OpsError) or (_interrupts(error) and self._broken_off(context.held)):
                # It hears of it as well, if it asks; one that does not is left behind, with a version that counts no more.
                ended.wait(_GRACE)
            if not (failed and isinstance(error, TimedOutError)):
                raise  # otherwise it says what it saw at last
        if failed:
            raise failed[0]
        if self.clock.monotonic() > context.deadline:
            raise TimedOutError(f"it took longer than {context.step.within}")
        return box[0]

    def _person(self, held: Drill, step: AnyStep, *, wait: bool) -> bool:
        """A step that a person takes: its clock runs from when it was asked for."""
        record = self.store.begin_step(held, step.id, StepState.WAITING)
        held = replace(held, state=self.store.get(held.id).state)  # another person's step may have changed it
        while (answer := self.store.answers(held.id).get(step.id)) is None:
            asked = record.started_at or self.clock.now()
            if self.clock.now() - asked > step.within:
                said = f"nobody answered within {step.within}"
                self.store.end_step(held, step.id, StepState.FAILED, said, actor=self.actor)
                raise StepFailedError(said, where=step.name)
            if held.state is not DrillState.WAITING:
                held = self.store.move(held, DrillState.WAITING, actor=self.actor)
            if not wait:
                return False
            self.store.still_mine(held)
            self.clock.sleep(_HEARTBEAT)
        if held.state is DrillState.WAITING:
            self.store.move(held, DrillState.RUNNING, actor=self.actor)
        facts = {"who": answer.who, "at": answer.at.isoformat(), "evidence": dict(answer.evidence)}
        self.store.end_step(held, step.id, StepState.DONE, answer.text, actor=answer.who, facts=facts)
        return True

    # The end

    def _end(self, held: Drill, ending: Ending, reason: str) -> Drill:
        """Teardown, scorecard, findings. Killed anywhere, it is done again from what it finds."""
        from ops_platform.drills.scorecard import judge

        if held.state is not DrillState.ENDING:
            held = self.store.move(held, DrillState.ENDING, actor=self.actor, ending=ending, reason=reason)
        for step in runbook_of(held).steps_for(held.mode):
            record = self.store.steps(held.id)[step.id]
            if step.kind == "teardown":
                self._tear_down(held, step)
            elif record.state in (StepState.RUNNING, StepState.WAITING):
                self.store.end_step(held, step.id, StepState.FAILED, ENDED_IN_IT, actor=self.actor)
            elif record.state is StepState.PENDING:
                said = "the drill had ended before"
                self.store.end_step(held, step.id, StepState.SKIPPED, said, actor=self.actor)
        self._remove_all(held)
        return judge(self.access, self.store, held, self.actor, self.clock)

    def _tear_down(self, held: Drill, step: AnyStep) -> None:
        """One that fails does not keep the others from their turn; that it failed fails the drill."""
        if self.store.steps(held.id)[step.id].settled:
            return
        for left in range(max(step.retries, _TEARDOWN_TRIES - 1), -1, -1):
            self.store.begin_step(held, step.id)
            try:
                done = self._in_time(held, step, self.store.steps(held.id))
                bad = [check for check in done.checks if not check.holds]
                if bad:
                    raise StepFailedError("; ".join(f"{check.title}: {check.result}" for check in bad))
                self._settle(held, step, done)
                return
            except ConflictError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the rest is to be taken away all the same
                said = error.line if isinstance(error, OpsError) else f"unexpected {type(error).__name__}: {error}"
                self.store.end_step(held, step.id, StepState.FAILED, said, actor=self.actor)
                if left:
                    self.clock.sleep(1.0)

    def _remove_all(self, held: Drill) -> list[Resource]:
        """The newest first. What is still there afterwards."""
        return remove_what_was_made(self.access, self.store, held)


def _interrupts(error: BaseException) -> bool:
    """KeyboardInterrupt, SystemExit, and what Dagster raises."""
    return not isinstance(error, (Exception, GeneratorExit))


def remove_what_was_made(
    access: Access, store: Store, held: Drill, *, kinds: Collection[str] | None = None
) -> list[Resource]:
    """Take away or put back what the drill registered (of these kinds), the newest first, and look whether it is gone. What is left."""
    left: list[Resource] = []
    for resource in reversed(store.resources(held.id)):
        if resource.gone_at is not None or resource.keep or (kinds is not None and resource.kind not in kinds):
            continue
        found = _removed(access, resource)
        store.looked_at(resource, found)
        if found is not None:
            left.append(replace(resource, left=found))
    return left


def _removed(access: Access, resource: Resource) -> str | None:
    """None: it is gone."""
    try:
        found = remover(resource.kind)
        if found.local and resource.host != this_host():
            return f"it is on {resource.host}, and this is {this_host()}: run `ops drill sweep` there"
        found.remove(access, resource)
        return found.left(access, resource)
    except OpsError as error:
        return error.line
    except Exception as error:  # noqa: BLE001 - what could not be taken away is there
        return f"unexpected {type(error).__name__}: {error}"
