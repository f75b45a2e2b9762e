"""One pass over the entries: is the chain whole, are they what each checkpoint was made of, do their times fit. No database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ops_platform.ledger.chain import (
    GENESIS,
    Break,
    BrokenChainError,
    Finding,
    FindingKind,
    LedgerCheck,
    Row,
    follow,
    moment,
)
from ops_platform.ledger.merkle import Frontier

TOLERANCE = timedelta(minutes=1)
"""By which the clocks of the machines that write may differ before it is told."""

_MOST = 10  # findings of one kind; more are counted


@dataclass(frozen=True)
class Mark:
    """What a checkpoint says of the first `size` entries."""

    number: int
    size: int
    root: str
    head: str
    at: datetime


def check_chain(
    rows: Iterable[Row],
    *,
    anchor: tuple[int, str] | None = None,
    marks: Sequence[Mark] = (),
    tolerance: timedelta = TOLERANCE,
    start: Mark | None = None,
    frontier: Frontier | None = None,
) -> LedgerCheck:
    """Follow the chain to its first break or its end, and compare it with the marks, which go by ascending size.

    A chain that lost its newest entries is still a chain, and so is one that was written anew as a whole. `anchor` is number and
    digest of an entry that was noted elsewhere, and must still be there; a mark says it of all entries up to its size.
    `start` with its `frontier`: the rows go on behind that mark.
    """
    return _Pass(anchor, marks, tolerance, start, frontier).over(rows)


class _Pass:
    def __init__(
        self, anchor: tuple[int, str] | None, marks: Sequence[Mark], tolerance: timedelta, start: Mark | None,
        frontier: Frontier | None,
    ) -> None:  # fmt: skip
        self._anchor, self._marks, self._tolerance = anchor, list(marks), tolerance
        self._frontier = frontier or Frontier()
        self._times = _Times(tolerance)
        self._findings: list[Finding] = []
        self._fits = 0
        self._first = start.size if start else 0
        self.seq, self.sha256 = self._first, bytes.fromhex(start.head if start else GENESIS)
        self._anchored = self._first
        if start is not None:
            self._times.passed(start)

    def over(self, rows: Iterable[Row]) -> LedgerCheck:
        broken = None
        try:
            self._follow(rows)
            broken = self._ends_early()
        except BrokenChainError as error:
            broken = error.broken
        findings = (*self._findings, *self._times.findings())
        return LedgerCheck(
            self.seq - self._first, self.seq, self.sha256.hex(), broken,
            checkpoints=self._fits, anchored_seq=self._anchored, findings=findings,
        )  # fmt: skip

    def _follow(self, rows: Iterable[Row]) -> None:
        # Names of their own, looked up once: this loop is a million entries long.
        append, times, waiting = self._frontier.append, self._times, list(reversed(self._marks))
        anchor, anchored = self._anchor or (0, ""), bool(self._marks)
        stop = waiting[-1].size if waiting else 0
        latest, floor = "", times.floor
        for seq, at, digest in follow(rows, self.seq, self.sha256.hex()):
            if seq == anchor[0] and digest.hex() != anchor[1]:
                why = f"its digest was noted as {anchor[1][:12]}…: the chain was written anew"
                raise BrokenChainError(Break(seq, "changed", why))
            self.seq, self.sha256 = seq, digest
            if at < latest or at < floor:
                times.early(seq, at, latest)
            latest = at
            if at > times.highest[0]:
                times.highest = (at, seq)
            if anchored:
                append(digest)
                if seq == stop:
                    self._compare(waiting.pop())
                    stop = waiting[-1].size if waiting else 0
                    floor = times.floor

    def _compare(self, mark: Mark) -> None:
        if any(found.kind == "rewritten" for found in self._findings):
            return
        if self._frontier.root().hex() == mark.root and self.sha256.hex() == mark.head:
            self._fits += 1
            self._anchored = mark.size
            self._times.passed(mark)
            return
        first = self._anchored + 1
        whole = "the whole ledger up to here" if first == 1 else f"something from entry {first} on"
        self._findings.append(
            Finding(
                "rewritten",
                f"entries {first} to {mark.size}",
                f"they are not those that checkpoint {mark.number} was made of on {moment(mark.at)}: {whole} was written anew",
            )
        )

    def _ends_early(self) -> Break | None:
        if self._marks and self.seq < (last := self._marks[-1]).size:
            self._findings.append(
                Finding(
                    "truncated",
                    f"entries {self.seq + 1} to {last.size}",
                    f"the ledger ends at {self.seq}, and checkpoint {last.number} was made of {last.size} entries",
                )
            )
        if self._anchor is not None and self.seq < self._anchor[0]:
            return Break(
                self.seq + 1,
                "missing",
                f"entries up to {self._anchor[0]} were noted, and the ledger ends at {self.seq}",
            )
        return None


class _Times:
    """Whether each entry is as old as it says. Moments are texts here: of one length, they sort as the moments do."""

    def __init__(self, tolerance: timedelta) -> None:
        self._tolerance = tolerance
        self._mark: Mark | None = None
        self.floor = ""  # no honest entry is earlier
        self.highest = ("", 0)  # since the last mark
        self._found: dict[FindingKind, list[Finding]] = {}

    def early(self, seq: int, at: str, latest: str) -> None:
        if at < self.floor and self._mark is not None:
            text = f"it says {at}, and it came behind checkpoint {self._mark.number} of {moment(self._mark.at)}"
            self._note(Finding("back-dated", f"entry {seq}", text))
        elif (step := datetime.fromisoformat(latest) - datetime.fromisoformat(at)) > self._tolerance:
            text = f"it says {at}, {step.total_seconds():.0f} s before the entry that stands before it"
            self._note(Finding("clock stepped back", f"entry {seq}", text, grave=False))

    def passed(self, mark: Mark) -> None:
        at, seq = self.highest
        if at > moment(mark.at + self._tolerance):
            text = f"it says {at}, and checkpoint {mark.number} covers it since {moment(mark.at)}"
            self._note(Finding("post-dated", f"entry {seq}", text, grave=False))
        self._mark, self.floor, self.highest = mark, moment(mark.at - self._tolerance), ("", 0)

    def _note(self, found: Finding) -> None:
        self._found.setdefault(found.kind, []).append(found)

    def findings(self) -> list[Finding]:
        listed: list[Finding] = []
        for kind, found in self._found.items():
            listed += found[:_MOST]
            if len(found) > _MOST:
                listed.append(Finding(kind, f"{len(found) - _MOST} more entries", "as above", found[0].grave))
        return listed
