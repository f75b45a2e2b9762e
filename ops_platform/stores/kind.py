"""What a kind of store is: how it is dumped, where it is restored to, what is looked at. All else is the same for each of them.

Docs: docs/how-to/add-a-kind-of-store.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ops_platform.recovery.findings import FAILED, PASSED, UNCHECKED, Finding
from ops_platform.recovery.model import GateStatus

if TYPE_CHECKING:
    from ops_platform.actions import ActionResult
    from ops_platform.clients.access import Access
    from ops_platform.inventory.systems import StoreTarget

__all__ = [
    "FAILED",
    "KINDS",
    "NOT_APPLICABLE",
    "PASSED",
    "UNCHECKED",
    "Check",
    "Dumped",
    "Finding",
    "Kind",
    "Need",
    "Needing",
    "Parts",
    "Restored",
    "Saved",
    "open_kind",
]


NOT_APPLICABLE = GateStatus.NOT_APPLICABLE


@dataclass(frozen=True)
class Dumped:
    """What a dump says of itself.

    `source`: which server was read; `server`: product and version; `facts`: what was seen there meanwhile, as JSON, for the checks
    after a restore; it is sealed, so that it may name what is in the store, and it never holds a secret.
    """

    source: str
    server: str
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Parts(Protocol):
    """Where a dump goes: named streams, one after the other, of any length. Nothing counts before the last one has ended."""

    def part(self, name: str) -> AbstractContextManager[Callable[[bytes | memoryview], None]]:
        """Begin a part: what is entered writes to it. Names are plain words: they stand readable in the manifest."""
        ...


@dataclass(frozen=True)
class Saved:
    """A backup fetched to disk: a file for each part, every byte of it checked, with the facts of its dump."""

    backup_id: str
    moment: datetime
    parts: Mapping[str, Path]
    facts: Mapping[str, Any]
    server: str

    def part(self, name: str) -> Path:
        """Raises CorruptionError where the backup has no such part."""
        from ops_platform.errors import CorruptionError

        if name not in self.parts:
            raise CorruptionError(f"the backup has no part {name!r}", where=self.backup_id)
        return self.parts[name]


@dataclass(frozen=True)
class Check:
    """One question to what was dumped or restored. `id` is stable; `query`: what is asked, for the record; `ask` may raise any OpsError.

    `of_backup` false: it is about the source, such as how it keeps its data. It counts for the verdict like any other, and keeps
    nothing from being restored.
    """

    id: str
    title: str
    query: str
    ask: Callable[[], Finding]
    of_backup: bool = True


class Restored(Protocol):
    """The sandbox in which the store serves again."""

    @property
    def server(self) -> str:
        """Product and version."""
        ...

    def checks(self) -> Iterable[Check]:
        """One after the other, in this order; each is asked before the next one is taken."""
        ...


class Kind(Protocol):
    """One store of a kind. Made by its module's `open_store(access, target)`, which asks nothing yet."""

    def look(self) -> str:
        """What a dump begins with, without the rest: who answers, in a few words. Raises OpsError for what would keep a dump from being taken."""
        ...

    def dump(self, parts: Parts) -> Dumped:
        """Read the store over its own protocol. Raises OpsError for whatever keeps it from being whole: half a dump is none."""
        ...

    def files(self, saved: Saved) -> Iterator[Check]:
        """What can be checked of the parts alone (level 1): their own sums, their form."""
        ...

    def need_programs(self) -> None:
        """Raises CouldNotVerifyError where this machine lacks what `restore` starts: a program, or a network of its own."""
        ...

    def restore(self, saved: Saved, home: Path) -> AbstractContextManager[Restored]:
        """A sandbox below `home`, serving until the context ends, with nothing left of it then.

        Raises CorruptionError where the backup is to blame, any other OpsError where it could not be tried.
        """
        ...


@runtime_checkable
class MadeElsewhere(Protocol):
    """A kind whose `restore` makes something that does not stand below `home`, and notes it there before."""

    def clear(self, home: Path) -> None:
        """Take away what a restore has made that was killed, by what it noted in its `home`. Raises OpsError where that fails."""
        ...


@runtime_checkable
class KeptElsewhere(Protocol):
    """A kind whose data does not stand in our repository, so that expiry has to be told to it."""

    def expire(self, *, enforce: bool, actor: str) -> ActionResult:
        """Remove what no backup names any more; with `enforce` false only say what would be removed. Raises OpsError."""
        ...


@dataclass(frozen=True)
class Need:
    """What a proof needs of people. `ask` says that it is there, None where the inventory names none: `remedy` is what to do then.

    `ask` raises UnreachableError where nobody can say, any other OpsError for what is missing, cannot be read, or is of no use.
    """

    what: str
    ask: Callable[[], str | None]
    remedy: str


@runtime_checkable
class Needing(Protocol):
    """A kind whose proof needs something that people have to write into the store or to keep for it."""

    def needs(self) -> Iterator[Need]:
        """For `ops doctor`, each asked for by itself."""
        ...


KINDS: Mapping[str, str] = {
    "elasticsearch": "ops_platform.stores.elasticsearch",
    "git": "ops_platform.stores.git",
    "kafka": "ops_platform.stores.kafka",
    "kubernetes": "ops_platform.stores.kubernetes",
    "redis": "ops_platform.stores.redis",
    "vault": "ops_platform.stores.vault",
}
"""The kind of the system in the inventory, and the module that knows it."""


def open_kind(access: Access, target: StoreTarget) -> Kind:
    return importlib.import_module(KINDS[target.kind]).open_store(access, target)
