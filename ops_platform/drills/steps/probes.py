"""How a probe is started: a process of its own, see `drills.probing`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from ops_platform.clients.processes import spawn
from ops_platform.drills.model import Done, StepState
from ops_platform.drills.probing import command, word_of
from ops_platform.drills.registry import Context
from ops_platform.drills.runbook import AnyStep, runbook_of
from ops_platform.drills.steps.basics import processes_with
from ops_platform.errors import CouldNotVerifyError
from ops_platform.inventory.base import Strict

_STARTS_WITHIN = 30.0
_READERS = ("postgres.read", "redis.read")  # they make nothing of their own that would have to be registered first


class Attempts(Strict):
    """Of probes: how long one attempt may take."""

    timeout_ms: int = Field(
        default=1000, ge=50, le=60_000, description="An attempt without an answer by then has failed."
    )


def start_probe(context: Context) -> Done:
    """Its own process, which goes on when ours is killed, and ends when the drill has. Begun once it has seen the target well."""
    log = _start(context, context.step)
    for other in _beside(context):
        _start(context, other)
    began = context.clock.monotonic()

    def seen() -> bool:
        if context.clock.monotonic() - began > _STARTS_WITHIN:
            said = _last_error(context) or log.read_text(errors="replace")[-400:].strip() or "it says nothing"
            raise CouldNotVerifyError(f"the probe has not seen the target well: {said}")
        return any(sample.ok for sample in context.samples(context.step.id)[-20:])

    context.wait(seen)
    return Done("it runs and reaches the target")


def _start(context: Context, step: AnyStep) -> Path:
    """Unless it runs already. Returns where it writes what it has to say."""
    word = word_of(context.held.id, step.id)
    context.store.register(context.held, step.id, "process", word, {"word": word, "signal": "TERM"})
    log = context.workspace / f"{step.id}.log"
    context.register("directory", str(context.workspace), path=str(context.workspace))
    context.workspace.mkdir(mode=0o711, parents=True, exist_ok=True)
    if not any(processes_with(word)):
        spawn(command(word), log, env={"OPS_INVENTORY": str(context.access.loaded.path)})
    return log


def _beside(context: Context) -> Iterator[AnyStep]:
    """The readers that come right after this step and need nothing else: they start up meanwhile, which takes a second each."""
    book, mode = runbook_of(context.held), context.held.mode
    order = book.steps_for(mode)
    known = {name for name, record in context.results.items() if record.state is StepState.DONE} | {context.step.id}
    for step in order[order.index(context.step) + 1 :]:
        if step.does not in _READERS or not book.needs_of(step, mode) <= known:
            return
        yield step


def _last_error(context: Context) -> str | None:
    errors = [sample.error for sample in context.samples(context.step.id) if sample.error]
    return errors[-1] if errors else None
