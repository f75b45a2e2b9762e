"""What may go and what must stay: tables for the rules, and random histories for what must never happen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_platform.backup.continuity import Archive, ranges, recovery_window
from ops_platform.backup.expiry_rules import Cut, Decision, Run, dead_runs, plan_expiry, ranges_after
from ops_platform.backup.model import BackupInfo, BackupKind, Lsn, Proof, segment_name
from ops_platform.backup.repository import WalObject
from ops_platform.backup.wal import Span, parse_history, stock
from ops_platform.clients.objectstore import ObjectInfo
from ops_platform.inventory.model import BackupPolicy

SIZE = 16 << 20
DAY = timedelta(days=1)
ZERO = datetime(2026, 1, 1, tzinfo=UTC)
PER_DAY = 4  # segments


def day(number: float) -> datetime:
    return ZERO + number * DAY


def policy(window: float = 7, redundancy: int = 1) -> BackupPolicy:
    return BackupPolicy.model_validate(
        {
            "schedule": {"cron": "15 2 * * *"},
            "recovery_window": timedelta(days=window),
            "minimum_redundancy": redundancy,
        }
    )


def backup(
    name: str, on: float, parent: str | None = None, timeline: int = 1, cluster: int = 7, **more: Any
) -> BackupInfo:
    """A backup that begins with the day and takes a tenth of it."""
    return BackupInfo(
        backup_id=name,
        target_id="app-db",
        engine="native",
        kind=BackupKind.INCREMENTAL if name.startswith("I") else BackupKind.FULL,
        parent_id=parent,
        started_at=day(on),
        ended_at=day(on + 0.1),
        timeline=timeline,
        start=Lsn(int(on * PER_DAY * SIZE) + 40),
        end=Lsn(int((on + 0.1) * PER_DAY * SIZE)),
        server_version=180000,
        system_identifier=cluster,
        raw=1,
        stored=1,
        **more,
    )


def parsed(text: str) -> list[BackupInfo]:
    """`F0 I1<F0 F7`: kind and day are the name, `<` names the parent, `?` says that it cannot be read, `@2` its timeline."""
    found: list[BackupInfo] = []
    for word in text.split():
        name, _, parent = word.partition("<")
        name, unreadable = name.rstrip("?"), name.endswith("?")
        name, _, timeline = name.partition("@")
        info = backup(name, float(name[1:]), parent or None, int(timeline or 1))
        found.append(replace(info, error="changed", parent_id=None, timeline=0) if unreadable else info)
    return found


def history(*left: tuple[int, int]) -> bytes:
    return "".join(f"{timeline}\t{Lsn(lsn)}\tno reason\n" for timeline, lsn in left).encode()


def archive(
    segments: dict[int, Iterable[int]], lines: dict[int, list[Span]] | None = None, cluster: int = 7
) -> Archive:
    """WAL by timeline and number; each segment was written and put in its quarter of a day."""
    known = {1: parse_history(1, None)} | (lines or {})
    listing: list[WalObject] = []
    for timeline in sorted(segments):
        for number in sorted(set(segments[timeline])):
            name = segment_name(timeline, number * SIZE, SIZE)
            info = ObjectInfo(name, 100, day((number + 1) / PER_DAY), "")
            listing.append(WalObject(cluster, timeline, name, False, False, info))
    until = {item.name: item.info.modified for item in listing}
    return Archive(cluster, SIZE, listing, stock(listing, SIZE), known, ranges(listing, SIZE, until=until), [])


def proof(backup_id: str, on: float, verdict: str = "PASS") -> Proof:
    return Proof.model_validate(
        {
            "target_id": "app-db",
            "backup_id": backup_id,
            "verdict": verdict,
            "verified_at": day(on),
            "recovery_target": "latest",
            "proven_until": None,
            "rpo_seconds": None,
            "rto_seconds": None,
            "scorecard": "x",
        }
    )


def dropped(decision: Decision) -> str:
    return " ".join(sorted((info.backup_id for info in decision.drop), key=lambda name: float(name[1:])))


# Tables


@pytest.mark.parametrize(
    ("backups", "now", "window", "redundancy", "gone"),
    [
        ("", 100, 7, 1, ""),
        ("F0", 100, 7, 1, ""),
        # The full backup before the window's start stays, because the window begins with it.
        ("F0 F7 F14 F21", 24, 7, 1, "F0 F7"),
        ("F0 F7 F14 F21", 21.2, 7, 1, "F0 F7"),
        ("F0 F7 F14 F21", 21.05, 7, 1, "F0"),  # F14 ended at 14.1, and the window begins at 14.05
        ("F0 F7 F14 F21", 20, 14, 1, ""),
        ("F0 F7 F14 F21", 400, 7, 1, "F0 F7 F14"),
        ("F0 F7 F14 F21", 400, 7, 3, "F0"),
        ("F0 F7 F14 F21", 400, 7, 9, ""),
        ("F0 F7 F14 F21", 24, 0, 1, "F0 F7 F14"),
        # Chains stay and go as a whole.
        ("F0 I1<F0 I2<I1 F7 I8<F7 I9<I8", 9.5, 2, 1, "F0 I1 I2"),
        ("F0 I1<F0 I2<I1 F7 I8<F7 I9<I8", 9.05, 2, 1, ""),
        ("F0 I1<F0 I2<I1 F7 I8<F7 I9<I8", 100, 2, 1, "F0 I1 I2"),
        ("F0 I1<F0 I2<I1 F7 I8<F7 I9<I8", 100, 2, 2, "I1 I2"),
        # An incremental in the window on top of an older chain than the window's first full one.
        ("F0 I1<F0 F5 I6<I1", 20, 14.5, 1, ""),
        # What is younger than now, by another machine's clock, stays.
        ("F0 F7 F14 F21", 15, 0.5, 1, "F0 F7"),
        # What cannot be read stays, and so does what it may build on.
        ("F0? F7 F14 F21", 24, 7, 1, "F7"),
        ("F0 F7 I8<F7 I9? F14 F21", 24, 7, 1, "F0"),
        ("F0 F7 F14? F21", 24, 7, 1, "F0"),  # it may be no backup at all, so the window cannot begin with it
        ("F0 I1<F0 I2? F14 F21", 24, 7, 1, ""),
        # One whose parent is gone restores nothing, and ends with its time.
        ("F0 I1<F-1 F7 F14", 30, 7, 1, "F0 I1 F7"),
        ("F0 F7 I13<F-1 F14", 20, 7, 1, "F0"),
    ],
)
def test_the_window_redundancy_and_chains(backups: str, now: float, window: float, redundancy: int, gone: str) -> None:
    decision = plan_expiry(parsed(backups), [], day(now), policy(window, redundancy))
    assert dropped(decision) == gone
    assert decision.since == day(now - window)


@pytest.mark.parametrize(
    ("proofs", "gone"),
    [
        ([], "F0 I1 F7 I8 F14"),
        ([proof("F7", 8)], "F0 I1 I8 F14"),
        ([proof("I8", 9)], "F0 I1 F14"),  # its chain
        ([proof("F0", 50), proof("F7", 9)], "F0 I1 I8 F14"),  # the newest backup, whenever it was verified
        ([proof("F7", 8), proof("F7", 9, "FAIL"), proof("F0", 5)], "I1 F7 I8 F14"),  # a later verdict counts
        ([proof("F7", 8), proof("F7", 9, "COULD_NOT_VERIFY")], "F0 I1 I8 F14"),  # and this one is none
        ([proof("F7", 9, "FAIL"), proof("F7", 8)], "F0 I1 F7 I8 F14"),  # later by its time, not by its place
        ([proof("F7", 8, "FAIL")], "F0 I1 F7 I8 F14"),
        ([proof("F7", 8, "COULD_NOT_VERIFY")], "F0 I1 F7 I8 F14"),
        ([proof("F999", 8)], "F0 I1 F7 I8 F14"),
        ([proof("F21", 22)], "F0 I1 F7 I8 F14"),
    ],
)
def test_the_last_proven_backup_and_its_chain_stay(proofs: list[Proof], gone: str) -> None:
    decision = plan_expiry(parsed("F0 I1<F0 F7 I8<F7 F14 F21"), proofs, day(100), policy())
    assert dropped(decision) == gone


def test_a_proven_backup_that_cannot_be_restored_any_more_does_not_stand_for_one_that_can() -> None:
    backups = parsed("F0 F7 I8<F-1 F21")
    decision = plan_expiry(backups, [proof("F0", 1), proof("I8", 9)], day(100), policy())
    assert decision.last_proven == "F0"
    assert dropped(decision) == "F7 I8"


def test_a_backup_with_a_proof_that_cannot_be_read_stays() -> None:
    decision = plan_expiry(parsed("F0 F7 F14 F21"), [], day(100), policy(), doubtful={"F7", "F999"})
    assert dropped(decision) == "F0 F14"
    assert any("F7" in note for note in decision.notes)


def test_every_kept_backup_says_why_and_the_unreadable_are_named() -> None:
    decision = plan_expiry(parsed("F0? F7 I8<F7 F14 F21"), [proof("I8", 9)], day(24), policy())
    assert decision.keep == {
        "F0": ("its manifest cannot be read",),
        "F14": ("the recovery window begins with it",),
        "F21": ("one of the 1 newest full backups", "in the recovery window"),
        "F7": ("I8 builds on it",),
        "I8": ("the last proven backup",),
    }
    assert decision.last_proven == "I8"
    assert "F0 cannot be read and is left alone: changed" in decision.notes


def test_what_builds_on_another_goes_before_it() -> None:
    # I1b was started by a machine whose clock is behind: its time says that it came before its parent.
    backups = [*parsed("F0 I1<F0 I2<I1 F20 F21"), replace(backup("I0.5", 0.5), parent_id="I2")]
    decision = plan_expiry(backups, [], day(100), policy())
    assert [info.backup_id for info in decision.drop] == ["I0.5", "I2", "I1", "F20", "F0"]


# WAL


def cuts(decision: Decision) -> dict[int | None, int | None]:
    return {cut.timeline: cut.below for cut in decision.cuts}


FORK = {1: parse_history(1, None), 2: parse_history(2, history((1, 40 * SIZE + 100)))}  # on day 10


@pytest.mark.parametrize(
    ("backups", "segments", "lines", "expected"),
    [
        # F14 begins in segment 56.
        ("F0 F7 F14 F21", {1: range(96)}, {}, {1: 56}),
        ("F14 F21", {1: range(56, 96)}, {}, {}),  # nothing is left to do
        ("F14 F21", {1: range(55, 96)}, {}, {1: 56}),
        # A failover on day 10. Nothing before the kept ones' timeline is needed by them.
        ("F0 F7 F14@2 F21@2", {1: range(41), 2: range(40, 96)}, FORK, {1: None, 2: 56}),
        # The kept one stands before the failover: its timeline from its start, and the whole of the next.
        ("F0 F9 F21@2", {1: range(41), 2: range(40, 96)}, FORK, {1: 36}),
        # Nobody knows where timeline 3 comes from: it stays, and so does all that is not older than the kept ones.
        ("F0 F9 F21", {1: range(96), 3: range(2)}, {}, {1: 36}),
        # A timeline that was left before the kept ones' start, and is newer than theirs: it may be the living one.
        ("F0 F14 F21", {1: range(96), 2: range(40, 96)}, FORK, {1: 56}),
        # An abandoned branch that is older than every kept one.
        (
            "F14@3 F21@3",
            {1: range(41), 2: range(40, 45), 3: range(42, 96)},
            FORK | {3: parse_history(3, history((1, 42 * SIZE)))},
            {1: None, 2: None, 3: 56},
        ),
        # What cannot be read may need any of it.
        ("F0? F7 F14 F21", {1: range(96)}, {}, {}),
    ],
)
def test_wal_stays_as_far_as_a_kept_backup_needs_it(
    backups: str, segments: dict[int, Iterable[int]], lines: dict[int, list[Span]], expected: dict[int, int | None]
) -> None:
    decision = plan_expiry(parsed(backups), [], day(24), policy(), archives=[archive(segments, lines)])
    assert cuts(decision) == expected


def test_the_wal_of_a_cluster_without_a_backup_stays_while_it_may_be_the_living_one() -> None:
    decision = plan_expiry([], [], day(100), policy(), archives=[archive({1: range(40)})])
    assert decision.cuts == ()


def test_another_clusters_wal_goes_when_no_backup_of_it_is_left() -> None:
    """Upgraded on day 10: the old cluster's backups and WAL stay as long as the window reaches back to it."""
    old = [backup("F0", 0, cluster=7), backup("F7", 7, cluster=7)]
    new = [backup("F11", 11, cluster=9), backup("F18", 18, cluster=9)]
    wal = [archive({1: range(42)}, cluster=7), archive({1: range(40, 200)}, cluster=9)]

    def decide(now: float, redundancy: int = 1, proofs: Sequence[Proof] = ()) -> Decision:
        return plan_expiry([*old, *new], proofs, day(now), policy(7, redundancy), archives=wal)

    early = decide(16)
    assert dropped(early) == "F0"
    assert early.cuts == (Cut(7, 1, 28), Cut(9, 1, 44))
    late = decide(19)
    assert dropped(late) == "F0 F7"
    assert late.cuts == (Cut(7, None, None), Cut(9, 1, 44))
    assert decide(19, redundancy=3).cuts == (Cut(7, 1, 28), Cut(9, 1, 44))
    assert decide(19, proofs=[proof("F0", 1)]).cuts == (Cut(9, 1, 44),)


def test_a_damaged_backup_does_not_stand_for_the_window() -> None:
    """F14's own WAL has a hole: without F7 nothing before F21 could be restored any more."""
    wal = archive({1: [n for n in range(24 * PER_DAY) if n != 14 * PER_DAY]})
    longer = archive({1: range(24 * PER_DAY)})
    assert dropped(plan_expiry(parsed("F0 F7 F14 F21"), [], day(24), policy(), archives=[longer])) == "F0 F7"
    # Nothing in the window can be restored over the hole either way: F7 would help nobody.
    assert dropped(plan_expiry(parsed("F0 F7 F14 F21"), [], day(24), policy(), archives=[wal])) == "F0 F7"
    # Here the older one does reach into the window, on the timeline that F14 is not on.
    lines = {2: parse_history(2, history((1, 50 * SIZE)))}
    branch = archive({1: range(51), 2: [n for n in range(50, 96) if n != 85]}, lines)
    decision = plan_expiry(parsed("F0 F7 F14 F21@2"), [], day(24), policy(), archives=[branch])
    assert dropped(decision) == "F0"
    assert "the recovery window begins with it" in decision.keep["F7"]


def test_redundancy_counts_only_what_can_be_restored() -> None:
    wal = archive({1: [n for n in range(24 * PER_DAY) if n != 21 * PER_DAY]})
    decision = plan_expiry(parsed("F0 F7 F14 F21"), [], day(100), policy(7, 2), archives=[wal])
    assert dropped(decision) == "F0"


def test_where_nothing_can_be_restored_the_newest_stay_all_the_same() -> None:
    decision = plan_expiry(parsed("F0 F7 F14 F21"), [], day(100), policy(7, 2), archives=[archive({1: [95]})])
    assert dropped(decision) == "F0 F7"


# Dead runs


def run(name: str, began: float, newest: float) -> Run:
    return Run(name, day(began), day(newest), 3, 300)


@pytest.mark.parametrize(
    ("runs", "gone"),
    [
        ([run("a", 5, 5.1)], ["a"]),
        ([run("a", 8.5, 8.6)], []),  # less than a day old
        ([run("a", 5, 9.9)], []),  # it has been at work for days, and still is
        ([run("a", 9.6, 9.7)], []),
        ([run("a", 8.6, 5)], []),  # its machine's clock is right and the store's is not
        ([run("c", 3, 3.1), run("a", 1, 1.1), run("b", 2, 2.1)], ["a", "b"]),  # the oldest, as many as one run may
    ],
)
def test_runs_that_died(runs: list[Run], gone: list[str]) -> None:
    backups = [backup("F0", 0), backup("F9", 9)]
    assert [found.backup_id for found in dead_runs(runs, backups, day(9.5), most=2)] == gone


@pytest.mark.parametrize("backups", [[], parsed("F0"), parsed("F9?")])
def test_without_a_later_backup_that_can_be_read_nothing_is_taken_for_dead(backups: list[BackupInfo]) -> None:
    """Were every manifest hidden, every backup would look like a dead run."""
    assert dead_runs([run("a", 5, 5.1)], backups, day(20), most=10) == []


# Random histories


@dataclass
class World:
    """A target's life: backups, failovers, upgrades, lost WAL, unreadable manifests, verdicts."""

    backups: list[BackupInfo] = field(default_factory=list[BackupInfo])
    wal: dict[int, dict[int, set[int]]] = field(default_factory=dict[int, dict[int, set[int]]])
    lines: dict[int, dict[int, list[Span]]] = field(default_factory=dict[int, dict[int, list[Span]]])
    proofs: list[Proof] = field(default_factory=list[Proof])
    now: float = 0
    cluster: int = 7
    timeline: int = 1
    left: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def step(self, what: str, pick: int) -> None:
        number = int(self.now * PER_DAY)
        mine = [b for b in self.backups if b.system_identifier == self.cluster and b.error is None]
        if what == "upgrade":
            self.cluster, self.timeline, self.left = self.cluster + 1, 1, []
        elif what == "failover":
            self.left = [*self.left, (self.timeline, number * SIZE + 100)]
            self.timeline += 1
            known = parse_history(self.timeline, history(*self.left))
            self.lines.setdefault(self.cluster, {})[self.timeline] = known
        elif what == "full" or (what == "incremental" and not mine):
            self.backups.append(backup(f"F{self.now:g}", self.now, None, self.timeline, self.cluster))
        elif what == "incremental":
            parent = mine[-1 - pick % min(2, len(mine))].backup_id
            self.backups.append(backup(f"I{self.now:g}", self.now, parent, self.timeline, self.cluster))
        elif what in ("PASS", "FAIL", "COULD_NOT_VERIFY") and self.backups:
            self.proofs.append(proof(self.backups[pick % len(self.backups)].backup_id, self.now, what))
        elif what == "spoil" and self.backups:
            at = pick % len(self.backups)
            self.backups[at] = replace(self.backups[at], error="changed", parent_id=None)
        if what != "lose":
            stored = self.wal.setdefault(self.cluster, {}).setdefault(self.timeline, set())
            stored |= set(range(number, number + PER_DAY + 1))
        self.now += 1

    def archives(self, without: Sequence[Cut] = ()) -> list[Archive]:
        found: list[Archive] = []
        for cluster, timelines in self.wal.items():
            mine = [cut for cut in without if cut.system_identifier == cluster]
            left = {t: {n for n in numbers if not any(c.holds(t, n) for c in mine)} for t, numbers in timelines.items()}
            if any(left.values()):
                kept = {t: numbers for t, numbers in left.items() if numbers}
                found.append(archive(kept, self.lines.get(cluster), cluster))
        return found


STEPS = ["full", "full", "incremental", "incremental", "failover", "upgrade", "lose", "idle", "spoil"]
STEPS += ["PASS", "PASS", "FAIL", "COULD_NOT_VERIFY"]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World()
    for what, pick in draw(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 20)), max_size=30)):
        world.step(what, pick)
    return world


def chain_is_whole(info: BackupInfo, by_id: dict[str, BackupInfo]) -> bool:
    while info.error is None and info.parent_id is not None:
        if info.parent_id not in by_id:
            return False
        info = by_id[info.parent_id]
    return info.error is None


def restorable(backups: Sequence[BackupInfo], archives: Sequence[Archive], moment: datetime) -> set[int]:
    """The clusters of which this moment can be restored."""
    by_id = {b.backup_id: b for b in backups}
    found: set[int] = set()
    for wal in archives:
        mine = [b for b in backups if b.system_identifier == wal.system_identifier and chain_is_whole(b, by_id)]
        if recovery_window(mine, wal.ranges, wal.lines, SIZE).holds(moment):
            found.add(wal.system_identifier)
    return found


def passed(proofs: Sequence[Proof]) -> set[str]:
    verdicts = {p.backup_id: p.verdict for p in proofs if p.verdict != "COULD_NOT_VERIFY"}
    return {backup_id for backup_id, verdict in verdicts.items() if verdict == "PASS"}


@settings(max_examples=300, deadline=None)
@given(worlds(), st.integers(0, 25), st.integers(1, 4), st.integers(0, 40))
def test_nothing_that_was_promised_is_lost(world: World, window: int, redundancy: int, later: int) -> None:
    now, rules = day(world.now + later), policy(window, redundancy)
    before = world.archives()
    decision = plan_expiry(world.backups, world.proofs, now, rules, archives=before)
    gone = {info.backup_id for info in decision.drop}
    kept = [b for b in world.backups if b.backup_id not in gone]
    after = world.archives(decision.cuts)
    by_id = {b.backup_id: b for b in kept}

    assert set(decision.keep) | gone == {b.backup_id for b in world.backups}
    assert not set(decision.keep) & gone

    # No kept backup loses the one that it builds on.
    for info in kept:
        assert info.parent_id not in gone

    # Every moment of the window that could be restored can be restored.
    moments = {now - timedelta(days=window), now}
    moments |= {day(n / PER_DAY) for n in range(int((world.now + 2) * PER_DAY))}
    for moment in moments:
        if now - timedelta(days=window) <= moment:
            lost = restorable(world.backups, before, moment) - restorable(kept, after, moment)
            assert not lost, f"{moment} of the clusters {lost}"

    # The last proven backup stays, and can still be restored where it could.
    readable = sorted((b for b in world.backups if b.error is None), key=lambda b: b.ended_at)
    proven = [b for b in readable if b.backup_id in passed(world.proofs)]
    if proven:
        assert {b.backup_id for b in proven} & set(by_id)
    whole = {b.backup_id: b for b in world.backups}
    good = [b for b in proven if chain_is_whole(b, whole) and restorable([*whole.values()], before, b.ended_at)]
    if good:
        assert good[-1].backup_id in by_id

    # Redundancy holds.
    fulls = [b for b in readable if b.kind is BackupKind.FULL]
    assert len([b for b in fulls if b.backup_id in by_id]) >= min(redundancy, len(fulls))

    # What cannot be read is left alone, and so is all WAL then.
    unreadable = {b.backup_id for b in world.backups if b.error is not None}
    assert not unreadable & gone
    if unreadable:
        assert decision.cuts == ()

    # A kept backup keeps its own WAL.
    for info in kept:
        wal = next((a for a in before if a.system_identifier == info.system_identifier), None)
        left = next((a for a in after if a.system_identifier == info.system_identifier), None)
        if info.error is None and wal and recovery_window([info], wal.ranges, wal.lines, SIZE).pieces:
            assert left is not None
            assert recovery_window([info], left.ranges, left.lines, SIZE).pieces

    # Children go before their parents.
    order = [info.backup_id for info in decision.drop]
    for info in decision.drop:
        if info.parent_id in gone:
            assert order.index(info.backup_id) < order.index(info.parent_id)


@settings(max_examples=100, deadline=None)
@given(worlds(), st.integers(0, 25), st.integers(1, 4))
def test_what_was_left_by_one_run_is_left_by_the_next(world: World, window: int, redundancy: int) -> None:
    """Otherwise a target would shrink with every run, although no time passes."""
    now, rules = day(world.now), policy(window, redundancy)
    decision = plan_expiry(world.backups, world.proofs, now, rules, archives=world.archives())
    kept = [b for b in world.backups if b.backup_id in decision.keep]
    again = plan_expiry(kept, world.proofs, now, rules, archives=world.archives(decision.cuts))
    assert again.drop == ()
    assert again.cuts == ()


@settings(max_examples=100, deadline=None)
@given(worlds(), st.integers(0, 25))
def test_the_ranges_without_what_is_cut_are_those_of_what_is_left(world: World, window: int) -> None:
    wals = world.archives()
    decision = plan_expiry(world.backups, [], day(world.now), policy(window), archives=wals)
    left = {wal.system_identifier: wal.ranges for wal in world.archives(decision.cuts)}
    for wal in wals:
        mine = [cut for cut in decision.cuts if cut.system_identifier == wal.system_identifier]
        assert ranges_after(wal, mine) == left.get(wal.system_identifier, [])
