"""What every runbook needs: suppose a loss, take the time between two steps, ask a person, take away what was made."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ops_platform.clients.processes import Process, identify, stop
from ops_platform.drills.model import Confidence, Done, Measured, Resource
from ops_platform.drills.registry import Context, NothingGiven, Remover, does, removes
from ops_platform.drills.runbook import runbook_of
from ops_platform.errors import CouldNotVerifyError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Id

if TYPE_CHECKING:
    from ops_platform.clients.access import Access


@does("drill.suppose", "inject")
def suppose(context: Context, given: NothingGiven) -> Done:
    """From this moment on the target counts as lost. Nothing is touched: whatever comes after does not ask it any more."""
    now = context.clock.now()
    return Done(f"lost at {now:%H:%M:%S} UTC", {"at": now.isoformat()})


class Run(Strict):
    """Of `drill.let_it_run`."""

    seconds: float = Field(gt=0, le=3600, description="For how long.")


@does("drill.let_it_run", "wait_until", given=Run)
def let_it_run(context: Context, given: Run) -> Done:
    """Probes see the target as it usually is, and the archive is as far behind as it usually is."""
    until = context.clock.now() + timedelta(seconds=given.seconds)
    context.wait(lambda: context.clock.now() >= until)
    return Done(f"{given.seconds:.0f} s")


class Between(Strict):
    """Of `clock.between`."""

    since: Id = Field(description="The step whose beginning counts; the drill's own where it does not run.")
    until: Id = Field(description="The step whose end counts.")


@does("clock.between", "measure", given=Between)
def between(context: Context, given: Between) -> Done:
    """The time from the beginning of one step to the end of another."""
    last = context.results[given.until].ended_at
    if last is None:
        raise CouldNotVerifyError(f"the step {given.until} has no end")
    begun = context.results[given.since].started_at if given.since in context.results else None
    seconds = (last - (begun or context.held.started_at)).total_seconds()
    book = runbook_of(context.held)
    since = book.names([given.since]) if begun else "the drill's beginning"
    how = f"from {since} to the end of {book.names([given.until])}"
    return Done(f"{seconds:.1f} s", measured=(measure(context, seconds, how),))


def measure(
    context: Context, value: float | None, how: str, confidence: Confidence = Confidence.MEASURED, unit: str = "s"
) -> Measured:
    """Under the name that the runbook gives to the step's figure."""
    name = context.step.is_ if context.step.kind == "measure" else context.step.id
    rounded = None if value is None else round(value, 3)
    return Measured(name=name, value=rounded, how=how, confidence=confidence, unit=unit)


@does("human.answer", "human")
def answer(context: Context, given: NothingGiven) -> Done:
    """A person says that it is done, with what shows it: `ops drill answer`."""
    raise CouldNotVerifyError("a person answers this step")


@does("drill.remove_what_was_made", "teardown")
def remove(context: Context, given: NothingGiven) -> Done:
    """Everything that steps have registered is taken away or put back, the newest first, and it is looked whether it is gone."""
    from ops_platform.drills.engine import remove_what_was_made

    left = remove_what_was_made(context.access, context.store, context.held)
    if left:
        said = "; ".join(f"{r.kind} {r.name}: {r.left}" for r in left)
        raise CouldNotVerifyError(f"still there: {said}")
    return Done(f"{len(context.store.resources(context.held.id))} things are gone")


# Processes: found by a word of their command line, because a pid is only known once it is too late to register it


def processes_with(word: str) -> Iterator[Process]:
    """Those of this machine that have exactly this word on their command line."""
    wanted = word.encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "cmdline").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found = identify(int(entry.name))
                if found is not None:
                    yield found


def _stop(access: Access, resource: Resource) -> None:
    how = signal.Signals[f"SIG{resource.detail.get('signal', 'TERM')}"]
    for process in processes_with(resource.detail["word"]):
        stop(process, how, wait=float(resource.detail.get("seconds", 20)))


def _running(access: Access, resource: Resource) -> str | None:
    left = [str(process.pid) for process in processes_with(resource.detail["word"])]
    return f"process {', '.join(left)} runs" if left else None


removes("process", Remover(_stop, _running))


def _remove_directory(access: Access, resource: Resource) -> None:
    shutil.rmtree(resource.detail["path"], ignore_errors=True)


def _directory(access: Access, resource: Resource) -> str | None:
    path = Path(resource.detail["path"])
    return f"{path} exists" if path.exists() else None


removes("directory", Remover(_remove_directory, _directory))


# What was stopped with SIGSTOP: the process is known by pid and start, and put back by going on


def _thaw(access: Access, resource: Resource) -> None:
    for pid, started in resource.detail["processes"]:
        process = Process(pid, started)
        if process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _frozen(access: Access, resource: Resource) -> str | None:
    still = [str(pid) for pid, started in resource.detail["processes"] if Process(pid, started).alive and _stopped(pid)]
    return f"process {', '.join(still)} is frozen" if still else None


def _stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


removes("frozen", Remover(_thaw, _frozen))


def moment_of(text: str) -> datetime:
    return datetime.fromisoformat(text)
