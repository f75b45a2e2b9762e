"""Checkpoints: a signed statement of how many entries there are and of the Merkle root over them, each naming the one before.

A chain alone does not stop whoever may rewrite all of it. A checkpoint stands outside of the database, where Object Lock keeps it,
under a signature whose key never leaves Vault. The format is docs/reference/ledger.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ops_platform.clients.objectstore import ObjectStore
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, CorruptionError, NotThereError
from ops_platform.ledger.chain import GENESIS, BrokenChainError, Finding, follow, moment
from ops_platform.ledger.dsse import Envelope, Signer, signed
from ops_platform.ledger.ledger import Ledger, Reading
from ops_platform.ledger.merkle import Frontier

PREDICATE = "https://ops-platform.dev/ledger/checkpoint/v1"
_READERS = 8


@dataclass(frozen=True)
class Checkpoint:
    """The first `size` entries: `root` over their digests, `head` the digest of the last of them, `peaks` the right edge of the tree.

    `number` counts from 1. `previous` is the SHA-256 of the payload of the checkpoint before, and `keys` are the public keys that
    were known when it was signed: a key that came later is vouched for by whoever trusts an earlier one.
    """

    ledger: str
    number: int
    size: int
    root: str
    head: str
    peaks: tuple[str, ...]
    at: datetime
    previous: str | None
    keys: Mapping[str, str]
    envelope: Envelope = field(repr=False, compare=False)

    @property
    def sha256(self) -> str:
        return self.envelope.sha256

    def frontier(self) -> Frontier:
        return Frontier(self.size, [bytes.fromhex(peak) for peak in self.peaks])

    @property
    def public_keys(self) -> dict[str, bytes]:
        return {name: bytes.fromhex(text) for name, text in self.keys.items()}

    @classmethod
    def parse(cls, raw: bytes) -> Checkpoint:
        """Raises CorruptionError for what is no checkpoint, or contradicts itself. Says nothing of its signatures."""
        envelope = Envelope.parse(raw)
        statement = envelope.statement
        if statement.get("predicateType") != PREDICATE:
            raise CorruptionError(f"it states {statement.get('predicateType')!r}, which is no checkpoint")
        try:
            said = statement["predicate"]
            found = cls(
                said["ledger"], said["number"], said["size"], said["root"], said["head"], tuple(said["peaks"]),
                datetime.fromisoformat(said["at"]), said["previous"], dict(said["keys"]), envelope,
            )  # fmt: skip
            fits = found.frontier().root().hex() == found.root and statement["subject"] == _subject(
                found.ledger, found.root
            )
            fits = (
                fits and found.number > 0 and found.size > 0 and found.at.tzinfo is not None and len(found.head) == 64
            )
            found.public_keys  # noqa: B018 - that they are hexadecimal
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptionError(f"this checkpoint cannot be read: {type(error).__name__}: {error}") from None
        if not fits:
            raise CorruptionError("this checkpoint contradicts itself: its peaks do not give its root")
        return found


def _subject(ledger: str, root: str) -> list[dict[str, Any]]:
    return [{"name": f"ledger:{ledger}", "digest": {"rfc6962-sha256": root}}]


# The store


@dataclass(frozen=True)
class Stored:
    """An object as it was found, whatever is in it."""

    key: str
    raw: bytes


class CheckpointStore:
    """The checkpoints of one ledger in an object store: `ledger/ID/checkpoints/0000000001.json`, in the order of their sizes.

    The number is the key, and a key is written once: two writers cannot put two successors behind one checkpoint.
    """

    def __init__(self, store: ObjectStore, ledger_id: str) -> None:
        self._store = store
        self.ledger_id = ledger_id
        self.prefix = f"ledger/{ledger_id}/checkpoints/"

    @property
    def name(self) -> str:
        return f"{self._store.name}: {self.prefix}"

    def key(self, number: int) -> str:
        return f"{self.prefix}{number:010d}.json"

    def all(self) -> list[Stored]:
        keys = [info.key for info in self._store.list(self.prefix)]
        with ThreadPoolExecutor(_READERS) as readers:
            return [Stored(key, raw) for key, raw in zip(keys, readers.map(self._store.get, keys), strict=True)]

    def newest(self, at_least: int = 0) -> Checkpoint | None:
        """The last one. `at_least`: the number of one that was put there; without it NotThereError says that it is gone."""
        after = self.key(at_least - 1) if at_least > 1 else ""
        keys = [info.key for info in self._store.list(self.prefix, start_after=after)]
        if at_least and self.key(at_least) not in keys:
            # A busy store's listing may lag behind what was put; asked for the object itself it may not.
            if self._store.head(self.key(at_least)) is None:
                raise NotThereError(
                    f"checkpoint {at_least} was put here, and is gone",
                    where=self.name,
                    remedy="ops ledger verify says what else is; with versions kept, the store's older version brings it back",
                )
            keys = sorted([*keys, self.key(at_least)])
        return Checkpoint.parse(self._store.get(keys[-1])) if keys else None

    def put(self, checkpoint: Checkpoint) -> None:
        """Raises ConflictError where another one of this number stands already."""
        raw = checkpoint.envelope.to_bytes()
        try:
            self._store.put(self.key(checkpoint.number), raw, if_absent=True, retain=True)
        except ConflictError:
            there = Checkpoint.parse(self._store.get(self.key(checkpoint.number)))
            if there.sha256 != checkpoint.sha256:
                raise ConflictError(
                    f"another process wrote checkpoint {checkpoint.number} at the same time",
                    where=self.name,
                    remedy="nothing is lost: the next one goes on from it",
                ) from None


# Writing


class Checkpointer:
    """Writes checkpoints. Each goes on from the one before: only entries since then are read, and their chain is checked."""

    def __init__(self, ledger: Ledger, store: CheckpointStore, signer: Signer, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._ledger, self._store, self._signer, self._clock = ledger, store, signer, clock

    def write(self) -> tuple[Checkpoint | None, bool]:
        """The newest checkpoint, and whether it was written now: without new entries there is no new one; None for an empty ledger.

        Raises ConflictError where another process writes one, CorruptionError where the ledger does not go on from the newest
        checkpoint (then nothing is signed), and whatever Vault and the store raise. It is there whole or not at all.
        """
        with self._ledger.claim(f"ledger.checkpoint/{self._store.ledger_id}") as ours:
            if not ours:
                raise ConflictError(
                    "another process writes a checkpoint", where=self._store.name, remedy="wait for it to end"
                )
            return self._write()

    def _write(self) -> tuple[Checkpoint | None, bool]:
        with self._ledger.reading() as reading:
            last = self._last(reading)
            frontier, head = self._grown(reading, last)
        if frontier.size == (last.size if last else 0):
            return last, False
        keys = self._known_keys(last)
        made = self._signed(last, frontier, head, keys)
        self._store.put(made)
        self._ledger.note_checkpoint(made.number, made.size, made.root, made.sha256, made.at)
        return made, True

    def _last(self, reading: Reading) -> Checkpoint | None:
        last = self._store.newest(max(reading.noted_checkpoints(), default=0))
        if last is None:
            return None
        if last.ledger != self._store.ledger_id or last.envelope.verified_by(self._signer.public_keys()) is None:
            raise CorruptionError(
                f"checkpoint {last.number} is not signed by our key", where=self._store.name, remedy="ops ledger verify"
            )
        self._ledger.note_checkpoint(last.number, last.size, last.root, last.sha256, last.at)
        return last

    def _grown(self, reading: Reading, last: Checkpoint | None) -> tuple[Frontier, str]:
        frontier, head = (last.frontier(), last.head) if last else (Frontier(), GENESIS)
        if last is not None and reading.digest_of(last.size) != last.head:
            raise CorruptionError(
                f"entry {last.size} is not the one that checkpoint {last.number} was made of: nothing is signed",
                where="the ledger",
                remedy="ops ledger verify says what happened to it",
            )
        digest = bytes.fromhex(head)
        try:
            for _, _, digest in follow(reading.rows(after=frontier.size), frontier.size, head):
                frontier.append(digest)
        except BrokenChainError as error:
            raise CorruptionError(
                f"the chain is broken at entry {error.broken.seq}, nothing is signed: {error.broken.what}",
                where="the ledger",
            ) from None
        return frontier, digest.hex()

    def _known_keys(self, last: Checkpoint | None) -> dict[str, bytes]:
        """Those of the last checkpoint stay known when Vault has archived them."""
        before, now = last.public_keys if last else {}, dict(self._signer.public_keys())
        for name in before.keys() & now.keys():
            if before[name] != now[name]:
                raise CorruptionError(
                    f"the key {name} is another one than it was: it was deleted and made anew",
                    where=self._store.name,
                    remedy="restore Vault from its backup, or give the inventory another key name",
                )
        return before | now

    def _signed(self, last: Checkpoint | None, frontier: Frontier, head: str, keys: Mapping[str, bytes]) -> Checkpoint:
        newest = list(self._signer.public_keys())[-1]
        # After a rotation the older key signs once more: who trusts it learns from it which one is next.
        before = list(last.envelope.signatures)[-1:] if last else []
        signers = [*(name for name in before if name != newest), newest]
        root = frontier.root().hex()
        predicate: dict[str, Any] = {
            "ledger": self._store.ledger_id,
            "number": last.number + 1 if last else 1,
            "size": frontier.size,
            "root": root,
            "head": head,
            "peaks": [peak.hex() for peak in frontier.peaks],
            "at": moment(self._clock.now()),
            "previous": last.sha256 if last else None,
            "keys": {name: public.hex() for name, public in keys.items()},
        }
        statement = {
            "subject": _subject(self._store.ledger_id, root),
            "predicateType": PREDICATE,
            "predicate": predicate,
        }
        return Checkpoint.parse(signed(statement, self._signer, signers).to_bytes())


# Judging


@dataclass(frozen=True)
class Judged:
    """`good`: the checkpoints that are signed by who is trusted and stand in one line, oldest first. `keys`: all trusted keys."""

    good: tuple[Checkpoint, ...]
    findings: tuple[Finding, ...]
    keys: Mapping[str, bytes]


def judge(
    stored: Sequence[Stored],
    trusted: Mapping[str, bytes],
    ledger_id: str,
    *,
    expected: Iterable[int] = (),
    gaps: bool = False,
) -> Judged:
    """What the checkpoints in a store are worth. `expected`: numbers that are known to have been put there.

    `gaps`: only some of a ledger's checkpoints are given, as in a pack. A signature counts by a key in `trusted`, or by one that
    a checkpoint names which is itself signed by such a key: so that trust in the first key leads over every rotation.
    """
    findings: list[Finding] = []
    read: dict[str, Checkpoint] = {}
    for each in stored:
        try:
            found = Checkpoint.parse(each.raw)
        except CorruptionError as error:
            findings.append(Finding("checkpoint unreadable", each.key, error.what))
            continue
        named = int(digits) if (digits := each.key.rpartition("/")[2].removesuffix(".json")).isdigit() else 0
        if found.ledger != ledger_id:
            findings.append(Finding("checkpoint swapped", each.key, f"it is of the ledger {found.ledger!r}"))
        elif named != found.number:
            findings.append(Finding("checkpoint swapped", each.key, f"checkpoint {found.number} stands in this place"))
            read.setdefault(each.key, found)
        else:
            read[each.key] = found
    good, keys = _trusted(read, trusted)
    findings += [
        Finding("checkpoint forged", key, _why_not(found, keys)) for key, found in read.items() if key not in good
    ]
    line = sorted({found.number: found for found in good.values()}.values(), key=lambda found: found.number)
    findings += _out_of_line(line, set(expected), gaps)
    return Judged(tuple(line), tuple(findings), keys)


def _trusted(
    read: Mapping[str, Checkpoint], trusted: Mapping[str, bytes]
) -> tuple[dict[str, Checkpoint], dict[str, bytes]]:
    """Those that a trusted key has signed. Newest first: the newest knows every key, and few rounds are needed."""
    keys, good, open_ = dict(trusted), dict[str, Checkpoint](), sorted(read, reverse=True)
    while True:
        signed_now = [key for key in open_ if read[key].envelope.verified_by(keys) is not None]
        for key in signed_now:
            good[key] = read[key]
            # What is known stays as it is: no checkpoint gives a trusted name to another key.
            keys = read[key].public_keys | keys
        open_ = [key for key in open_ if key not in good]
        if not signed_now or not open_:
            return good, keys


def _why_not(found: Checkpoint, keys: Mapping[str, bytes]) -> str:
    names = ", ".join(found.envelope.signatures) or "nobody"
    known = [name for name in found.envelope.signatures if name in keys]
    if known:
        return f"checkpoint {found.number} says that {', '.join(known)} has signed it, and that key has not"
    return f"checkpoint {found.number} is signed by {names}, whom nobody vouches for"


def _out_of_line(line: Sequence[Checkpoint], expected: set[int], gaps: bool) -> Iterator[Finding]:
    there = {found.number for found in line}
    newest = max([*there, *expected], default=0)
    if not gaps:
        for first, last in _ranges(sorted(set(range(1, newest + 1)) - there)):
            which = f"checkpoint {first}" if first == last else f"checkpoints {first} to {last}"
            yield Finding("checkpoint missing", which, "it was written, and no valid one stands there now")
    for before, found in itertools.pairwise(line):
        where = f"checkpoint {found.number}"
        if found.number == before.number + 1 and found.previous != before.sha256:
            yield Finding(
                "checkpoint out of line", where, f"it was written after another checkpoint {before.number} than this"
            )
        if found.size <= before.size:
            yield Finding("checkpoint out of line", where, f"{found.size} entries are not more than {before.size}")
        if found.at < before.at:
            text = f"it is of {moment(found.at)}, and the one before of {moment(before.at)}"
            yield Finding("clock stepped back", where, text, grave=False)


def _ranges(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = None
    for at, number in enumerate(numbers):
        first = number if first is None else first
        if at + 1 == len(numbers) or numbers[at + 1] != number + 1:
            yield first, number
            first = None
