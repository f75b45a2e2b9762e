"""What a playbook is: an action with everything that a rule, a guard, a page of documentation and a tired person need to know of it.

A playbook is a subclass in one of the modules of `playbooks/`, and an instance in that module's `PLAYBOOKS`. It plans, checks, applies
and verifies through `actions.Action`, so that everything it does is guarded and recorded in one way. How to write one:
docs/how-to/write-a-playbook.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ops_platform.actions import Action, Applied, Change
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import UsageError
from ops_platform.inventory.base import Strict
from ops_platform.remediation.model import Peers

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Target
    from ops_platform.inventory.systems import AnySystem

MODULES = ("anything", "elasticsearch", "kafka", "kubernetes", "postgres", "redis", "vault")


class NoParameters(Strict):
    """A playbook that takes none."""


P = TypeVar("P", bound=Strict)


@dataclass(frozen=True)
class Context(Generic[P]):
    """What a playbook is given for one incident. `subject`: the target or system. `signal_at`: when the signal began."""

    access: Access
    subject: Target | AnySystem
    parameters: P
    incident_id: str
    signal_at: datetime
    clock: Clock = SYSTEM_CLOCK


@dataclass(frozen=True)
class Done:
    """A change that was applied, as the ledger and the incident hold it: all that an undo has to go by."""

    change: Change
    applied: Applied


class Playbook(ABC, Generic[P]):
    """One remedy. Class attributes are what the documentation's page, Slack and `ops rules explain` say of it."""

    name: ClassVar[str]  # such as postgres.end_idle_sessions
    title: ClassVar[str]  # imperative, such as `End sessions idle in transaction`
    kinds: ClassVar[frozenset[str]]  # of targets and systems that it acts on
    what: ClassVar[str]  # what it does, in a few sentences
    why_safe: ClassVar[str]  # one sentence for whoever is woken up
    blast_radius: ClassVar[str]  # what may be affected at worst
    rights: ClassVar[tuple[str, ...]]  # the least that its login needs
    undo_text: ClassVar[str | None] = None  # how its undo works; None: it cannot be undone
    Parameters: ClassVar[type[Strict]] = NoParameters

    @abstractmethod
    def action(self, context: Context[P]) -> Action:
        """The remedy as an action. Its `plan` raises RefusedError where a precondition of the whole does not hold."""

    def undo(self, context: Context[P], done: Sequence[Done]) -> Action | None:
        """The way back from what was applied; None where there is none."""
        return None

    def undo_after(self, context: Context[P]) -> timedelta | None:
        """For what is only meant for a time: when it is undone although it helped."""
        return None

    def peers(self, context: Context[P]) -> Peers | None:
        """What is healthy besides; None where the subject has no peers. Raises OpsError where it cannot be asked."""
        return None

    def min_healthy(self, context: Context[P]) -> int:
        """Peers that must be healthy where the rule says nothing."""
        return 0

    def read_parameters(self, given: Mapping[str, Any]) -> P:
        """Raises UsageError naming playbook and parameter."""
        from pydantic import ValidationError

        try:
            return self.Parameters.model_validate(dict(given))  # type: ignore[return-value]
        except ValidationError as error:
            raise self._wrong(error.errors(include_url=False)) from None

    def check_parameters(self, given: Mapping[str, Any], open_ones: Collection[str]) -> None:
        """As far as it can be said before a signal fills in `open_ones`. Raises UsageError as `read_parameters` does."""
        from pydantic import ValidationError

        try:
            self.Parameters.model_validate(dict(given))
        except ValidationError as error:
            wrong = [
                item
                for item in error.errors(include_url=False)
                if item["type"] == "extra_forbidden"
                or not open_ones
                or (item["loc"] and item["loc"][0] not in open_ones)
            ]
            if wrong:
                raise self._wrong(wrong) from None

    def _wrong(self, errors: Sequence[Any]) -> UsageError:
        """A parameter that does not exist is said before the one that is missing for it."""
        from ops_platform.inventory.loader import in_our_words

        first = min(errors, key=lambda item: item["type"] != "extra_forbidden")
        where = ".".join(str(step) for step in first["loc"])
        what = {"extra_forbidden": "there is no such parameter", "missing": "it is missing"}.get(first["type"])
        known = ", ".join(self.Parameters.model_fields) or "none"
        return UsageError(
            f"parameter {where!r}: {what or in_our_words(first)}",
            where=f"playbook {self.name}",
            remedy=f"its parameters: {known}",
        )


@cache
def playbooks() -> Mapping[str, Playbook[Any]]:
    """All of them by name, in order."""
    found: dict[str, Playbook[Any]] = {}
    for module in MODULES:
        for playbook in import_module(f"ops_platform.remediation.playbooks.{module}").PLAYBOOKS:
            found[playbook.name] = playbook
    return dict(sorted(found.items()))


def playbook(name: str) -> Playbook[Any]:
    """Raises UsageError that names the nearest ones."""
    from difflib import get_close_matches

    if found := playbooks().get(name):
        return found
    near = get_close_matches(name, list(playbooks()), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "docs/reference/playbooks.md lists them"
    raise UsageError(f"there is no playbook {name!r}", remedy=hint)
