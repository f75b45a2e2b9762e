"""The model of a runbook: a graph of typed steps, with time limits, conditions under which it is broken off, and its teardown.

Strict as the inventory is. What a step does is a name (`does`) under which Python code is registered, see `registry`; `loader` reads
the file and names file, line and key of every mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ops_platform.drills.model import Drill
from ops_platform.errors import InventoryError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.document import Document
from ops_platform.inventory.values import Duration, Id, PositiveDuration


class Parameter(Strict):
    """Something that whoever holds the drill may choose."""

    description: str = Field(description="For people.")
    default: str | int | float | bool | None = Field(
        default=None, description="Its value where none is given; none: it has to be given."
    )


class Step(Strict):
    """What every step has."""

    id: Id = Field(description="Its name in the record.")
    title: str = Field(default="", description="For people; the id where not given.")
    does: str = Field(description="The name under which its code is registered.")
    with_: dict[str, Any] = Field(
        default={}, alias="with", description="What the code is given; `{parameter: NAME}` is filled in."
    )
    needs: list[Id] = Field(default=[], description="Steps that come before it.")
    within: PositiveDuration = Field(default=timedelta(minutes=10), description="It has failed when it takes longer.")
    objective: PositiveDuration | None = Field(default=None, description="How long it should take at most.")
    retries: Annotated[int, Field(ge=0, le=10)] = Field(default=0, description="Further attempts when it fails.")
    retry_after: Duration = Field(default=timedelta(seconds=5), description="How long is waited between two.")
    only: Literal["drill", "real"] | None = Field(default=None, description="In this mode alone.")
    on_failure: Literal["abort", "go_on"] = Field(
        default="abort", description="go_on: the others have their turn all the same; it has failed in any case."
    )

    @property
    def name(self) -> str:
        return self.title or self.id


class Probe(Step):
    """Something that is tried over and over in the background until the drill has ended."""

    kind: Literal["probe"]
    every_ms: Annotated[int, Field(ge=10, le=60_000)] = Field(
        default=50, description="Milliseconds between two attempts."
    )
    counts: bool = Field(
        default=True, description="Whether what it cannot reach is unavailable to users, and counts against the budget."
    )


class Inject(Step):
    """Breaks something. Never in earnest."""

    kind: Literal["inject"]


class Act(Step):
    """Changes something."""

    kind: Literal["act"]


class WaitUntil(Step):
    """Waits for something to come true."""

    kind: Literal["wait_until"]


class Measure(Step):
    """Takes a time or a number from what has happened."""

    kind: Literal["measure"]
    is_: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = Field(
        alias="is", description="What it measures: rto, rpo, or a word of your own."
    )


class CheckStep(Step):
    """Looks at something and says whether it holds. Changes nothing."""

    kind: Literal["check"]
    preflight: bool = Field(
        default=False, description="Looked at before anything begins, too; where it does not hold the drill is refused."
    )


class Human(Step):
    """Something that a person does, and says when it is done."""

    kind: Literal["human"]
    does: str = Field(default="human.answer", description="What is asked of the answer.")
    asks: str = Field(description="What is to be done.")
    who: str = Field(default="", description="Who does it: a role or a name, for people.")
    evidence: bool = Field(default=False, description="Whether a file has to be attached.")


class Teardown(Step):
    """Takes away or puts back. It runs however the drill went, after everything else, and it is looked whether it worked."""

    kind: Literal["teardown"]
    does: str = Field(default="drill.remove_what_was_made", description="What is done.")


AnyStep = Annotated[
    Probe | Inject | Act | WaitUntil | Measure | CheckStep | Human | Teardown, Field(discriminator="kind")
]


class AbortWhen(Strict):
    """A condition under which the drill is broken off, and everything put back."""

    probe: Id = Field(description="The probe that is watched.")
    unavailable_for: PositiveDuration = Field(description="Nothing but failures for this long.")


class Runbook(Strict):
    """A recovery, tried out or in earnest."""

    version: Literal[1] = Field(description="Of this format.")
    id: Id = Field(description="Its name.")
    title: str = Field(description="For people.")
    description: str = Field(default="", description="For people: what it proves, and what it does not.")
    scenario: Id = Field(description="The loss that is tried: coverage is counted by it.")
    kinds: Annotated[list[str], Field(min_length=1)] = Field(description="Of targets and systems that it is for.")
    modes: Annotated[list[Literal["drill", "real"]], Field(min_length=1)] = Field(
        default=["drill"], description="Whether it serves in earnest, too."
    )
    parameters: dict[str, Parameter] = Field(default={}, description="What whoever holds it may choose.")
    unavailable: Duration = Field(
        default=timedelta(0), description="For how long users are expected to be without the target."
    )
    abort_when: list[AbortWhen] = Field(default=[], description="When it is broken off.")
    steps: Annotated[list[AnyStep], Field(min_length=1)] = Field(description="In any order: `needs` says which first.")

    @model_validator(mode="after")
    def _mode(self) -> Self:
        if "real" not in self.modes and any(step.only == "real" for step in self.steps):
            raise ValueError("a step is for earnest alone, and the runbook is not meant for it")
        return self

    def step(self, step_id: str) -> AnyStep:
        return next(step for step in self.steps if step.id == step_id)

    def names(self, step_ids: Iterable[str]) -> str:
        """As people know them, in the order of the file."""
        wanted = set(step_ids)
        return ", ".join(f'"{step.name}"' for step in self.steps if step.id in wanted)

    def steps_for(self, mode: str) -> list[AnyStep]:
        """Those that run in this mode, each after what it needs; of those that could be next, the first in the file."""
        wanted = [step for step in self.steps if _runs(step, mode)]
        needs = {step.id: self.needs_of(step, mode) for step in wanted}
        order: list[AnyStep] = []
        rest = [step for step in wanted if step.kind != "teardown"]
        rest += [step for step in wanted if step.kind == "teardown"]
        while rest:
            placed = {step.id for step in order}
            following = next((step for step in rest if needs[step.id] <= placed), None)
            if following is None:
                raise ValueError(f"these steps wait for one another: {', '.join(step.id for step in rest)}")
            order.append(following)
            rest.remove(following)
        return order

    def needs_of(self, step: AnyStep, mode: str) -> set[str]:
        """What it waits for in this mode: for a step that does not run, what that one would have waited for."""
        found: set[str] = set()
        seen: set[str] = set()
        ahead = list(step.needs)
        while ahead:
            name = ahead.pop()
            if name in seen:
                continue
            seen.add(name)
            other = self.step(name)
            if _runs(other, mode):
                found.add(name)
            else:
                ahead += other.needs
        return found


def _runs(step: AnyStep, mode: str) -> bool:
    return (step.only is None or step.only == mode) and not (mode == "real" and step.kind == "inject")


def parameters_named(value: Any) -> Iterator[str]:
    """Each NAME of a `{parameter: NAME}` in what a step is given."""
    if isinstance(value, dict):
        if set(value) == {"parameter"} and isinstance(value["parameter"], str):
            yield value["parameter"]
        else:
            for inner in value.values():
                yield from parameters_named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from parameters_named(inner)


def filled_in(value: Any, parameters: dict[str, Any]) -> Any:
    """What a step is given, with every `{parameter: NAME}` in its place."""
    if isinstance(value, dict):
        if set(value) == {"parameter"} and isinstance(value["parameter"], str):
            return parameters[value["parameter"]]
        return {key: filled_in(inner, parameters) for key, inner in value.items()}
    return [filled_in(inner, parameters) for inner in value] if isinstance(value, list) else value


def shapes(folder: Path | None) -> dict[str, Runbook]:
    """The shipped runbooks and those of a folder, by id, for whoever wants to know their graphs alone: what their steps do is not looked
    up, and one that cannot be read is left out. `loader.runbooks` names its mistakes."""
    shipped = resources.files("ops_platform.drills").joinpath("runbooks").iterdir()
    own = folder.glob("*.yaml") if folder is not None else ()
    found: dict[str, Runbook] = {}
    for file in sorted([*shipped, *own], key=lambda one: one.name):
        try:
            if file.name.endswith(".yaml"):
                book = Runbook.model_validate(Document(file.read_bytes(), file.name).value)
                book.steps_for("drill")
                found[book.id] = book
        except (InventoryError, ValidationError, ValueError, OSError):
            continue
    return found


def runbook_of(drill: Drill) -> Runbook:
    """As it was when the drill began, whatever the file says now."""
    return Runbook.model_validate(drill.body)
