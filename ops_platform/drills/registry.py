"""What a step may do: functions, each registered under a name with the kind of step that it is for and the model of what it is given.

A step's function is called again after a kill, so whatever it does it finds half done: it is written down before it is made
(`Context.register`), it looks first, and doing it twice is doing it once. How to write one: docs/how-to/write-a-runbook.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ops_platform.clock import Clock
from ops_platform.drills.model import Done, Drill, Resource, Sample, StepRecord
from ops_platform.drills.runbook import AnyStep
from ops_platform.errors import CouldNotVerifyError, UsageError
from ops_platform.inventory.base import Strict

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.drills.store import Store
    from ops_platform.inventory.model import Target
    from ops_platform.inventory.systems import AnySystem

MODULES = (
    "basics",
    "injection",
    "kafka",
    "patroni",
    "postgres",
    "redis",
    "restore",
    "stack",
    "vault",
    "writes",
    "wrong_side",
)


class NothingGiven(Strict):
    """For a step that takes nothing."""


W = TypeVar("W", bound=Strict)


@dataclass(frozen=True)
class Context:
    """What a step is given. `held`: the drill with the version that its worker holds."""

    access: Access
    store: Store
    held: Drill
    step: AnyStep
    subject: Target | AnySystem
    results: Mapping[str, StepRecord]
    clock: Clock
    deadline: float  # of `clock.monotonic()`

    @property
    def target(self) -> Target:
        """The subject, where the runbook is for PostgreSQL alone; with the backups of a copy where the drill names one."""
        from ops_platform.inventory.model import at_copy

        target, copy = self.access.inventory.target(self.subject.id), self.held.parameters.get("copy")
        return at_copy(target, str(copy)) if copy else target

    @property
    def workspace(self) -> Path:
        """The drill's own folder, which whoever makes something in it registers first."""
        from ops_platform.drills.workspace import workspace_of

        return workspace_of(self.access, self.held.id)

    def register(
        self, kind: str, name: str, more: Mapping[str, Any] | None = None, *, keep: bool = False, **detail: Any
    ) -> Resource:
        """Before it is made, with what its removal has to know. Raises ConflictError where the drill is not ours any more, and UsageError
        where nobody knows how to take it away: then it must not be made."""
        if kind not in _REMOVERS:
            raise UsageError(
                f"nobody knows how to take away a {kind!r}",
                where=f"step {self.step.id}",
                remedy=f"removes({kind!r}, Remover(…)) beside the step that makes it",
            )
        return self.store.register(self.held, self.step.id, kind, name, {**(more or {}), **detail}, keep=keep)

    def fact(self, step: str, name: str) -> Any:
        """What an earlier step has found. Raises CouldNotVerifyError where it has not."""
        record = self.results.get(step)
        if record is None or name not in record.facts:
            raise CouldNotVerifyError(f"the step {step!r} has left no {name!r}")
        return record.facts[name]

    def alive(self) -> None:
        """While waiting: raises AbortedError, ConflictError where somebody else went on with it, TimedOutError."""
        self.store.still_mine(self.held)
        if self.clock.monotonic() > self.deadline:
            raise TimedOutError(f"not within {self.step.within / timedelta(seconds=1):.0f} s")

    def wait(self, holds: Callable[[], bool], *, every: float = 0.05) -> None:
        """Until it holds. Raises what `alive` raises."""
        looked = self.clock.monotonic()
        while not holds():
            if self.clock.monotonic() - looked > 0.5:
                self.alive()
                looked = self.clock.monotonic()
            self.clock.sleep(every)

    def samples(self, probe: str) -> Sequence[Sample]:
        return self.store.samples(self.held.id, probe)


class TimedOutError(CouldNotVerifyError):
    """A step took longer than it may."""


@dataclass(frozen=True)
class Doing(Generic[W]):
    """`changes`: in a plan's words what it would do to a live system; None: nothing."""

    name: str
    kinds: frozenset[str]
    given: type[W]
    run: Callable[[Context, W], Done]
    changes: Callable[[W], str] | None = None

    @property
    def what(self) -> str:
        return cleandoc(self.run.__doc__ or "")


_DOINGS: dict[str, Doing[Any]] = {}


def does(
    name: str, *kinds: str, given: type[W] = NothingGiven, changes: Callable[[W], str] | None = None
) -> Callable[[Callable[[Context, W], Done]], Callable[[Context, W], Done]]:
    """Register a function under a name, for steps of these kinds."""

    def register(run: Callable[[Context, W], Done]) -> Callable[[Context, W], Done]:
        _DOINGS[name] = Doing(name, frozenset(kinds), given, run, changes)
        return run

    return register


def doings() -> Mapping[str, Doing[Any]]:
    """All of them by name, in order."""
    for module in MODULES:
        import_module(f"ops_platform.drills.steps.{module}")
    return dict(sorted(_DOINGS.items()))


def doing(name: str) -> Doing[Any]:
    """Raises UsageError that names the nearest ones."""
    from difflib import get_close_matches

    if found := doings().get(name):
        return found
    near = get_close_matches(name, list(doings()), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "docs/reference/runbooks.md lists them"
    raise UsageError(f"nothing is registered under {name!r}", remedy=hint)


# What is made


@dataclass(frozen=True)
class Remover:
    """`remove` takes it away or puts it back, and may be called for what was never made; `left` looks, by another way, what there
    still is of it (None: nothing). Both may raise OpsError: then it is not gone. `local`: it is on the machine that made it."""

    remove: Callable[[Access, Resource], None]
    left: Callable[[Access, Resource], str | None]
    local: bool = True


_REMOVERS: dict[str, Remover] = {}


def removes(kind: str, remover: Remover) -> None:
    _REMOVERS[kind] = remover


def remover(kind: str) -> Remover:
    """Raises UsageError: a resource of a kind that this version does not know."""
    doings()
    if found := _REMOVERS.get(kind):
        return found
    raise UsageError(
        f"nobody knows how to take away a {kind!r}", remedy="it was registered by another version; remove it by hand"
    )
