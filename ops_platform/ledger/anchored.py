"""The ledger together with its checkpoints, as the inventory declares them: write one, verify against all, prove an entry."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ops_platform.errors import CouldNotVerifyError, NotThereError, OpsError, UsageError
from ops_platform.ledger.audit import Mark
from ops_platform.ledger.chain import Entry, Finding, LedgerCheck
from ops_platform.ledger.checkpoint import Checkpoint, Checkpointer, CheckpointStore, Judged, judge
from ops_platform.ledger.ledger import Ledger
from ops_platform.ledger.merkle import Tree, verify_inclusion

if TYPE_CHECKING:
    from datetime import timedelta

    from ops_platform.clients.access import Access
    from ops_platform.ledger.dsse import Signer


@dataclass(frozen=True)
class Inclusion:
    """That an entry is in the ledger as `checkpoint` signed it. `index` counts from 0; `proof` goes from the leaf to the root."""

    entry: Entry
    index: int
    size: int
    root: str
    proof: tuple[str, ...]
    checkpoint: int
    envelope: str

    @property
    def holds(self) -> bool:
        path = [bytes.fromhex(node) for node in self.proof]
        return verify_inclusion(bytes.fromhex(self.entry.sha256), self.index, self.size, path, bytes.fromhex(self.root))


class Anchored:
    """A ledger and its checkpoints. `pinned`: public keys that are trusted instead of asking Vault."""

    def __init__(
        self,
        ledger: Ledger,
        store: CheckpointStore,
        signer: Signer,
        *,
        tolerance: timedelta,
        pinned: Mapping[str, bytes] | None = None,
    ) -> None:
        self.ledger, self.store, self.signer = ledger, store, signer
        self.tolerance, self._pinned = tolerance, pinned

    def write(self) -> tuple[Checkpoint | None, bool]:
        """As `Checkpointer.write`."""
        return Checkpointer(self.ledger, self.store, self.signer, clock=self.ledger.clock).write()

    def judged(self) -> Judged:
        """Every checkpoint in the store, judged. Raises CouldNotVerifyError where the keys to judge by cannot be had."""
        return judge(self.store.all(), self._keys(), self.store.ledger_id, expected=self._noted())

    def _keys(self) -> Mapping[str, bytes]:
        if self._pinned is not None:
            return self._pinned
        try:
            return self.signer.public_keys()
        except OpsError as error:
            raise CouldNotVerifyError(
                f"no signature can be verified, because the public keys cannot be had: {error.what}",
                where=error.where,
                remedy=f"{error.remedy or 'look at Vault'}; or give the public keys with --key",
            ) from error

    def _noted(self) -> list[int]:
        with self.ledger.reading() as reading:
            return reading.noted_checkpoints()

    def verify(self, *, anchor: tuple[int, str] | None = None) -> LedgerCheck:
        """The chain from its first entry on, and that each checkpoint is signed, in line, and fits the entries.

        Raises CouldNotVerifyError, UnreachableError (store) and whatever the ledger raises.
        """
        began = time.monotonic()
        judged = self.judged()
        marks = [Mark(each.number, each.size, each.root, each.head, each.at) for each in _ascending(judged.good)]
        found = self.ledger.verify(anchor=anchor, marks=marks, tolerance=self.tolerance)
        findings = (*judged.findings, *found.findings)
        if found.head_seq > 0 and not marks and not findings:
            text = "there is no checkpoint yet: nothing outside of the database says what the ledger held"
            findings = (Finding("not anchored", "the ledger", text, grave=False),)
        return replace(found, findings=findings, seconds=round(time.monotonic() - began, 3))

    def prove(self, seq: int) -> Inclusion:
        """That entry `seq` is in the newest checkpoint. Raises NotThereError where there is no such entry, or none that covers it."""
        entry = self._entry(seq)
        newest = next(reversed(self.judged().good), None)
        if newest is None or newest.size < seq:
            raise NotThereError(
                f"no checkpoint covers entry {seq} yet" if newest else "there is no valid checkpoint",
                where=self.store.name,
                remedy="ops ledger checkpoint writes one",
            )
        with self.ledger.reading() as reading:
            tree = Tree.of(reading.digests(newest.size))
        if tree.size != newest.size or tree.root().hex() != newest.root:
            raise CouldNotVerifyError(
                f"the ledger is not what checkpoint {newest.number} was made of: nothing can be proven",
                where="the ledger",
                remedy="ops ledger verify says what happened to it",
            )
        proof = tuple(node.hex() for node in tree.inclusion(seq - 1, newest.size))
        envelope = newest.envelope.to_bytes().decode()
        return Inclusion(entry, seq - 1, newest.size, newest.root, proof, newest.number, envelope)

    def _entry(self, seq: int) -> Entry:
        if found := self.ledger.entries(after_seq=seq - 1, limit=1):
            if found[0].seq == seq:
                return found[0]
            raise NotThereError(
                f"there is no entry {seq}, and there are later ones", where="the ledger", remedy="ops ledger verify"
            )
        last = self.ledger.entries(newest_first=True, limit=1)
        what = f"the last is {last[0].seq}" if last else "the ledger is empty"
        raise NotThereError(f"there is no entry {seq}: {what}", where="the ledger", remedy="ops ledger list shows them")


def _ascending(good: tuple[Checkpoint, ...]) -> Iterator[Checkpoint]:
    """Only those that grow: one that does not is a finding already."""
    size = 0
    for each in good:
        if each.size > size:
            size = each.size
            yield each


@contextmanager
def open_anchored(access: Access, *, pinned: Mapping[str, bytes] | None = None) -> Generator[Anchored]:
    """The ledger of the inventory with its checkpoints. Raises UsageError where the inventory has none."""
    declared = access.inventory.platform.ledger
    if declared is None:
        raise UsageError(
            "the inventory declares no checkpoints of the ledger",
            where=str(access.loaded.path),
            remedy="declare platform.ledger with a store and a vault",
        )
    with Ledger(access.platform_db, clock=access.clock) as ledger:
        store = CheckpointStore(access.checkpoint_store(declared), declared.id)
        yield Anchored(ledger, store, access.signer(declared), tolerance=declared.tolerance, pinned=pinned)
