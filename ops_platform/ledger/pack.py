"""Evidence packs: entries for a control and a time, with all that proves them, in one ZIP file that is verified without any server.

A pack holds the whole stretch of the ledger between two checkpoints, so that nothing can be left out of it, or, when asked for, the
fitting entries alone, each with its audit path: then nothing else is disclosed, and nothing says that none is missing. The format is
docs/reference/ledger.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

from ops_platform.counting import count_of
from ops_platform.errors import CorruptionError, CouldNotVerifyError, NotThereError, OpsError
from ops_platform.inventory.evidence import Control
from ops_platform.ledger.anchored import Anchored
from ops_platform.ledger.audit import Mark, check_chain
from ops_platform.ledger.chain import Entry, Finding, Row, canonical, digest, entry_text, moment
from ops_platform.ledger.checkpoint import Checkpoint, Judged, Stored, judge
from ops_platform.ledger.dsse import Envelope, fingerprint, pem, signed
from ops_platform.ledger.ledger import Reading
from ops_platform.ledger.merkle import Tree, verify_consistency, verify_inclusion

PREDICATE = "https://ops-platform.dev/ledger/evidence-pack/v1"
MANIFEST, ENTRIES, CONSISTENCY, COVER = "manifest.dsse.json", "entries.jsonl", "consistency.json", "cover.html"
_SHOWN = 500
# What reading a damaged ZIP file raises: also for bits that ask for a password or for a compression that nobody knows.
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError)


@dataclass(frozen=True)
class Key:
    """A public key in a pack. `pinned`: whoever verifies has brought it along."""

    keyid: str
    fingerprint: str
    pinned: bool = False


@dataclass(frozen=True)
class Cover:
    """What a person reads on the cover. `shown` are the first of `evidence` entries; `first` to `last` is the stretch in the pack."""

    ledger: str
    control: Control
    since: datetime
    until: datetime
    whole: bool
    made_at: datetime
    made_by: str
    entries: int
    evidence: int
    first: int
    last: int
    kinds: Mapping[str, int]
    shown: Sequence[Entry]
    start: Checkpoint | None
    end: Checkpoint
    newest: Checkpoint
    keys: Sequence[Key]
    checkpoints: int


PackVerdict = Literal["good", "bad", "unpinned", "incomplete"]
_SAID: Mapping[PackVerdict, str] = {
    "good": "GOOD",
    "bad": "BAD",
    "unpinned": "CONSISTENT, KEYS NOT PINNED",
    "incomplete": "INCOMPLETE, NOT COVERED TO THE END OF ITS PERIOD",
}


@dataclass(frozen=True)
class PackCheck:
    """What a pack is worth. `verdict`: good; bad; unpinned: consistent in itself, and nobody vouches for its keys; incomplete: good as far
    as it goes, which is not to the end of its period.

    `evidence` entries of `entries` fit the control and the time. `whole`: it holds the whole stretch from `first` to `last`, so that
    none can be missing. `covered_until`: later than that the ledger is not covered.
    """

    verdict: PackVerdict
    ledger: str
    control: str
    framework: str
    title: str
    since: datetime
    until: datetime
    covered_until: datetime
    whole: bool
    entries: int
    evidence: int
    first: int
    last: int
    checkpoints: int
    size: int
    root: str
    made_at: datetime
    made_by: str
    keys: tuple[Key, ...]
    findings: tuple[Finding, ...]

    def lines(self) -> Iterator[str]:
        """For people."""
        yield _SAID[self.verdict]
        yield f"{self.framework} {self.control}, {self.title}: {moment(self.since)} to {moment(self.until)}"
        yield f"{self.evidence} entries are evidence for it"
        if self.whole:
            upto = f" until {moment(self.covered_until)}" if self.covered_until < self.until else ""
            yield f"nothing is left out{upto}: all {self.entries} entries from {self.first} to {self.last} are here"
        else:
            yield "the fitting entries alone are here; that none is missing cannot be told from this pack"
        yield f"ledger {self.ledger}, {count_of(self.checkpoints, 'checkpoint')}, the newest of {self.size} entries with the root {self.root}"
        yield f"made by {self.made_by} on {moment(self.made_at)}"
        for key in self.keys:
            yield f"key {key.keyid}, SHA-256 {key.fingerprint}{', pinned' if key.pinned else ''}"


# Writing


def write_pack(
    path: Path,
    anchored: Anchored,
    control: Control,
    since: datetime,
    until: datetime,
    *,
    whole: bool,
    made_by: str,
    cover: Callable[[Cover], str],
) -> Cover:
    """Write the pack; the file is there whole or not at all. Everything up to now is put under a checkpoint first.

    Raises CouldNotVerifyError where the ledger does not verify: no evidence is cut from a ledger that is broken.
    """
    anchored.write()
    judged = anchored.judged()
    if grave := [found for found in judged.findings if found.grave]:
        raise _no_evidence(f"{grave[0].where}: {grave[0].what}")
    if not judged.good:
        raise NotThereError("the ledger is empty: there is no evidence in it", where=anchored.store.name)
    with anchored.ledger.reading() as reading:
        newest = judged.good[-1]
        tree = Tree.of(reading.digests(newest.size))
        if tree.size != newest.size or tree.root().hex() != newest.root:
            raise _no_evidence(f"it is not what checkpoint {newest.number} was made of")
        start, end = stretch(judged.good, since, until, anchored.tolerance, reading.numbers(since, until))
        line = _thinned(judged.good, start, end)
        draft = Cover(
            ledger=anchored.store.ledger_id, control=control, since=since, until=until, whole=whole,
            made_at=anchored.ledger.clock.now(), made_by=made_by, entries=0, evidence=0,
            first=start.size + 1 if start else 1, last=end.size, kinds={}, shown=(), start=start, end=end, newest=newest,
            keys=[Key(name, fingerprint(public)) for name, public in judged.keys.items()], checkpoints=len(line),
        )  # fmt: skip
        fresh = path.with_name(f".{path.name}.new")
        try:
            with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as out:
                made = _Writer(out, draft, judged, tree).write(reading, line, cover, anchored)
            fresh.replace(path)
        except OSError as error:
            raise OpsError(f"the pack cannot be written: {error.strerror}", where=str(path)) from error
        finally:
            fresh.unlink(missing_ok=True)
    return made


def _no_evidence(why: str) -> CouldNotVerifyError:
    return CouldNotVerifyError(
        f"no evidence is cut from a ledger that does not verify: {why}", where="the ledger", remedy="ops ledger verify"
    )


def stretch(
    line: Sequence[Checkpoint], since: datetime, until: datetime, tolerance: timedelta, numbers: tuple[int, int] | None
) -> tuple[Checkpoint | None, Checkpoint]:
    """The checkpoints between which all entries of that time stand, by their own times and, with `numbers`, by what was found."""
    low, high = numbers or (line[-1].size + 1, 0)
    before = [each for each in line if each.at + tolerance <= since and each.size < low]
    behind = [each for each in line if each.at - tolerance >= until and each.size >= high]
    return (before[-1] if before else None), (behind[0] if behind else line[-1])


def _thinned(line: Sequence[Checkpoint], start: Checkpoint | None, end: Checkpoint) -> list[Checkpoint]:
    """One for each day of the stretch, its two ends, the newest of all, and each that leads from one key to the next."""
    low = start.number if start else 1
    inside = [each for each in line if low <= each.number <= end.number]
    by_day = {each.at.date(): each for each in inside}
    rotations = [each for each in line if len(each.envelope.signatures) > 1]
    kept = {each.number: each for each in (*rotations, *by_day.values(), *inside[:1], end, line[-1])}
    return [kept[number] for number in sorted(kept)]


class _Writer:
    def __init__(self, out: zipfile.ZipFile, draft: Cover, judged: Judged, tree: Tree) -> None:
        self._out, self._draft, self._judged, self._tree = out, draft, judged, tree
        self._digests: dict[str, str] = {}
        self._at = draft.made_at.timetuple()[:6]

    def write(
        self, reading: Reading, line: Sequence[Checkpoint], cover: Callable[[Cover], str], anchored: Anchored
    ) -> Cover:
        made = self._entries(reading)
        for each in line:
            self._file(f"checkpoints/{each.number:010d}.json", each.envelope.to_bytes())
        proofs = [
            {
                "from": low.number,
                "to": high.number,
                "proof": [node.hex() for node in self._tree.consistency(low.size, high.size)],
            }
            for low, high in pairwise(line)
        ]
        self._file(CONSISTENCY, json.dumps(proofs, indent=1).encode())
        for name, public in self._judged.keys.items():
            self._file(_key_file(name), pem(public).encode())
        self._file(COVER, cover(made).encode())
        self._manifest(made, anchored)
        return made

    def _entries(self, reading: Reading) -> Cover:
        draft, kinds = self._draft, Counter[str]()
        shown: list[Entry] = []
        sha256, count = hashlib.sha256(), 0
        with self._open(ENTRIES) as file:
            for row in reading.rows(after=draft.first - 1, upto=draft.last):
                fits = _is_evidence(draft.control, draft.since, draft.until, row)
                if fits:
                    kinds[row[2]] += 1
                    if len(shown) < _SHOWN:
                        shown.append(Entry(row[0], datetime.fromisoformat(row[1]), *row[2:]))
                if fits or draft.whole:
                    raw = f"{canonical(self._line(row))}\n".encode()
                    file.write(raw)
                    sha256.update(raw)
                    count += 1
        self._digests[ENTRIES] = sha256.hexdigest()
        return replace(draft, entries=count, evidence=kinds.total(), kinds=dict(kinds), shown=shown)

    def _line(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = dict(zip(_FIELDS, row, strict=True))
        if not self._draft.whole:
            path = self._tree.inclusion(row[0] - 1, self._draft.newest.size)
            found["proof"] = [node.hex() for node in path]
        return found

    def _manifest(self, made: Cover, anchored: Anchored) -> None:
        predicate = {
            "ledger": made.ledger,
            "control": made.control.model_dump(mode="json"),
            "since": moment(made.since),
            "until": moment(made.until),
            "whole": made.whole,
            "entries": made.entries,
            "evidence": made.evidence,
            "first": made.first,
            "last": made.last,
            "start": made.start.number if made.start else None,
            "end": made.end.number,
            "newest": made.newest.number,
            "made_at": moment(made.made_at),
            "made_by": made.made_by,
            "keys": {name: public.hex() for name, public in self._judged.keys.items()},
        }
        subject = [{"name": name, "digest": {"sha256": found}} for name, found in self._digests.items()]
        newest = list(anchored.signer.public_keys())[-1]
        statement = {"subject": subject, "predicateType": PREDICATE, "predicate": predicate}
        envelope = signed(statement, anchored.signer, [newest])
        with self._open(MANIFEST) as file:
            file.write(envelope.to_bytes())

    def _file(self, name: str, content: bytes) -> None:
        self._digests[name] = hashlib.sha256(content).hexdigest()
        with self._open(name) as file:
            file.write(content)

    def _open(self, name: str) -> IO[bytes]:
        info = zipfile.ZipInfo(name, self._at)
        info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
        return self._out.open(info, "w", force_zip64=True)


_FIELDS = ("seq", "at", "kind", "actor", "subject", "body", "prev_sha256", "sha256")


def _key_file(keyid: str) -> str:
    return f"keys/{keyid.replace(':', '_')}.pem"


def _is_evidence(control: Control, since: datetime, until: datetime, row: Row) -> bool:
    return control.holds(row[2], row[4]) and moment(since) <= row[1] < moment(until)


# Verifying


def verify_pack(path: Path, *, pinned: Mapping[str, bytes] | None = None) -> PackCheck:
    """What the pack is worth, from it alone. `pinned`: the public keys that are trusted; without them it is never good.

    Raises CorruptionError for what is no pack at all.
    """
    try:
        with zipfile.ZipFile(path) as pack:
            return _Check(pack, pinned).result()
    except FileNotFoundError:
        raise NotThereError("there is no such file", where=str(path)) from None
    except (OSError, *_BROKEN) as error:
        raise CorruptionError(f"this is no pack, or not all of it: {error}", where=str(path)) from error


@dataclass
class _Counts:
    entries: int = 0
    evidence: int = 0
    findings: list[Finding] = field(default_factory=list[Finding])


class _Check:
    """The parts of a pack, each held against the checkpoints. `said` is what the manifest states."""

    def __init__(self, pack: zipfile.ZipFile, pinned: Mapping[str, bytes] | None) -> None:
        self._pack, self._pinned = pack, pinned
        self._envelope = Envelope.parse(self._read(MANIFEST))
        try:
            self._statement = self._envelope.statement
            self._said = self._statement["predicate"]
            if self._statement["predicateType"] != PREDICATE:
                raise CorruptionError("its manifest is no evidence pack's")
            self._control = Control.model_validate(self._said["control"])
            self._since, self._until, self._made_at = (
                datetime.fromisoformat(self._said[name]) for name in ("since", "until", "made_at")
            )
            self._keys = {name: bytes.fromhex(text) for name, text in self._said["keys"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptionError(f"the manifest cannot be read: {type(error).__name__}: {error}") from None

    def _read(self, name: str) -> bytes:
        try:
            return self._pack.read(name)
        except (KeyError, *_BROKEN) as error:
            raise CorruptionError(f"the pack has no readable {name}: {error}", where=self._pack.filename) from None

    def result(self) -> PackCheck:
        said = self._said
        stored = [Stored(name, self._read(name)) for name in self._pack.namelist() if name.startswith("checkpoints/")]
        judged = judge(stored, self._pinned or self._keys, said["ledger"], gaps=True)
        line = {each.number: each for each in judged.good}
        findings = [*judged.findings, *self._files(), *self._signature(judged.keys), *self._consistency(judged.good)]
        ends = [line.get(said[name]) for name in ("end", "newest")]
        start = line.get(said["start"]) if said["start"] is not None else None
        counts = _Counts()
        if ends[0] is None or ends[1] is None or (said["start"] is not None and start is None):
            counts.findings.append(
                Finding("pack incomplete", "checkpoints", "those that the manifest names are not all here")
            )
        elif said["whole"]:
            self._whole(judged.good, start, ends[0], counts)
        else:
            self._each(ends[1], counts)
        if not counts.findings and (counts.entries, counts.evidence) != (said["entries"], said["evidence"]):
            text = f"{count_of(counts.entries, 'entry', 'entries')}, {counts.evidence} of them evidence;"
            text += f" the manifest says {said['entries']} and {said['evidence']}"
            counts.findings.append(Finding("pack altered", ENTRIES, text))
        findings += [*counts.findings, *self._period(start, ends[0])]
        keys = [
            Key(name, fingerprint(public), public in (self._pinned or {}).values())
            for name, public in self._keys.items()
        ]
        newest, end = ends[1], ends[0]
        return PackCheck(
            self._verdict(findings),
            str(said["ledger"]), self._control.id, self._control.framework, self._control.title, self._since, self._until,
            min(self._until, end.at) if end else self._since, said["whole"] is True, counts.entries, counts.evidence,
            said["first"], said["last"], len(judged.good), newest.size if newest else 0, newest.root if newest else "",
            self._made_at, str(said["made_by"]), tuple(keys), tuple(findings),
        )  # fmt: skip

    def _verdict(self, findings: Sequence[Finding]) -> PackVerdict:
        """The worst that is to be said of it."""
        if any(found.grave for found in findings):
            return "bad"
        if not self._pinned:
            return "unpinned"
        return "incomplete" if any(found.kind == "pack incomplete" for found in findings) else "good"

    def _files(self) -> Iterator[Finding]:
        """Each file is the one that the manifest was signed over, and there is no other."""
        stated = {each["name"]: each["digest"]["sha256"] for each in self._statement["subject"]}
        names = self._pack.namelist()
        for name in sorted({*stated, *names} - {MANIFEST}):
            if names.count(name) != 1 or name not in stated:
                how = (
                    "stands in the manifest and not here"
                    if name not in names
                    else "is not in the manifest, or is here twice"
                )
                yield Finding("pack altered", name, f"it {how}")
            elif self._sha256(name) != stated[name]:
                yield Finding("pack altered", name, "it is not the file that the manifest was signed over")
        for name, public in self._keys.items():
            if _key_file(name) not in names or self._read(_key_file(name)) != pem(public).encode():
                yield Finding("pack altered", _key_file(name), f"it is not the key {name}")

    def _sha256(self, name: str) -> str | None:
        found = hashlib.sha256()
        with contextlib.suppress(*_BROKEN), self._pack.open(name) as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
            return found.hexdigest()
        return None

    def _signature(self, trusted: Mapping[str, bytes]) -> Iterator[Finding]:
        if self._envelope.verified_by(trusted) is None:
            names = ", ".join(self._envelope.signatures)
            yield Finding("pack altered", MANIFEST, f"no trusted key has signed it; it says {names}")

    def _consistency(self, line: Sequence[Checkpoint]) -> Iterator[Finding]:
        """Every checkpoint is the beginning of the next one that is here."""
        try:
            found = json.loads(self._read(CONSISTENCY))
            proofs = {(each["from"], each["to"]): [bytes.fromhex(node) for node in each["proof"]] for each in found}
        except (CorruptionError, ValueError, KeyError, TypeError):
            yield Finding("pack altered", CONSISTENCY, "it cannot be read")
            return
        for low, high in pairwise(line):
            proof = proofs.get((low.number, high.number))
            roots = bytes.fromhex(low.root), bytes.fromhex(high.root)
            if proof is None or not verify_consistency(low.size, roots[0], high.size, roots[1], proof):
                text = f"nothing proves that checkpoint {low.number} is the beginning of checkpoint {high.number}"
                yield Finding("not proven", f"checkpoint {high.number}", text)

    def _whole(self, line: Sequence[Checkpoint], start: Checkpoint | None, end: Checkpoint, counts: _Counts) -> None:
        """The chain from the one checkpoint to the other, recomputed."""
        low = start.size if start else 0
        marks = [_mark(each) for each in line if low < each.size <= end.size]
        try:
            found = check_chain(
                self._rows(counts),
                marks=marks,
                start=_mark(start) if start else None,
                frontier=start.frontier() if start else None,
            )
        except CorruptionError as error:
            counts.findings.append(Finding("pack altered", ENTRIES, error.what))
            return
        if found.broken is not None:
            counts.findings.append(Finding("not proven", f"entry {found.broken.seq}", found.broken.what))
        elif found.head_seq > end.size:
            counts.findings.append(Finding("not proven", f"entry {end.size + 1}", "no checkpoint here covers it"))
        counts.findings += found.findings

    def _each(self, newest: Checkpoint, counts: _Counts) -> None:
        """Each entry's content gives its digest, and its audit path leads from that to the root."""
        last, root = 0, bytes.fromhex(newest.root)
        try:
            for row, proof in self._lines():
                counts.entries += 1
                seq, *parts, sha256 = row
                at, kind, actor, subject, body, prev = parts
                fits = digest(prev, entry_text(seq, at, kind, actor, subject, body)) == sha256
                if (
                    not fits
                    or seq <= last
                    or not verify_inclusion(bytes.fromhex(sha256), seq - 1, newest.size, proof, root)
                ):
                    counts.findings.append(
                        Finding("not proven", f"entry {seq}", "its audit path does not lead to the root")
                    )
                elif _is_evidence(self._control, self._since, self._until, row):
                    counts.evidence += 1
                else:
                    counts.findings.append(
                        Finding("pack altered", f"entry {seq}", "it is no evidence for this control and time")
                    )
                last = seq
        except (CorruptionError, ValueError) as error:
            counts.findings.append(Finding("pack altered", ENTRIES, str(error)))

    def _rows(self, counts: _Counts) -> Iterator[Row]:
        for row, _ in self._lines():
            counts.entries += 1
            counts.evidence += _is_evidence(self._control, self._since, self._until, row)
            yield row

    def _lines(self) -> Iterator[tuple[Row, list[bytes]]]:
        try:
            with self._pack.open(ENTRIES) as file:
                for raw in file:
                    found = json.loads(raw)
                    seq, *texts = (found[name] for name in _FIELDS)
                    if type(seq) is not int or not all(type(text) is str for text in texts):
                        raise TypeError("of another type")
                    yield (seq, *texts), [bytes.fromhex(node) for node in found.get("proof", ())]
        except (ValueError, KeyError, TypeError, *_BROKEN) as error:
            raise CorruptionError(f"it holds what is no entry: {type(error).__name__}: {error}") from None

    def _period(self, start: Checkpoint | None, end: Checkpoint | None) -> Iterator[Finding]:
        if not self._said["whole"]:
            return
        if start is not None and start.at > self._since:
            text = f"the stretch begins at checkpoint {start.number} of {moment(start.at)}: what is older is not here"
            yield Finding("pack incomplete", "the period", text)
        if end is not None and end.at < self._until:
            text = f"no checkpoint here is of its end: what came after {moment(end.at)} is not here"
            yield Finding("pack incomplete", "the period", text, grave=False)


def _mark(each: Checkpoint) -> Mark:
    return Mark(each.number, each.size, each.root, each.head, each.at)
