"""Which backup a recovery begins with, over archives with forks and gaps: one from which PostgreSQL really gets there."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import SimpleNamespace

import pytest

from ops_platform.backup import engine as room
from ops_platform.backup.continuity import Archive, ranges
from ops_platform.backup.engine import NativeEngine
from ops_platform.backup.model import BackupInfo, Lsn, RecoveryTarget, segment_start
from ops_platform.backup.wal import Span, parse_history, stock
from ops_platform.errors import UsageError
from tests.unit.test_continuity import FORKED, LINE, at, backup
from tests.unit.test_definitions import an_inventory
from tests.unit.test_wal import SIZE, Item, history, listing


def engine(
    monkeypatch: pytest.MonkeyPatch,
    backups: list[BackupInfo],
    items: list[Item],
    lines: Mapping[int, list[Span]] = LINE,
) -> NativeEngine:
    """Over an archive of the cluster 7 in which each segment has its minute. It is long after all of them."""
    until = {item.name: at(segment_start(item.name, SIZE)[1] // SIZE + 1) for item in items}
    archive = Archive(7, SIZE, [], stock(items, SIZE), dict(lines), ranges(items, SIZE, until=until), [])
    monkeypatch.setattr(room, "read_archive", lambda _: archive if items else None)
    clock = SimpleNamespace(now=lambda: at(10_000))
    target = an_inventory("app-db").inventory.target("app-db")
    return NativeEngine(SimpleNamespace(infos=lambda: backups), target, clock=clock)  # type: ignore[arg-type]


def lsn(number: float) -> str:
    return str(Lsn(int(number * SIZE)))


TWO = [backup("a", 1, 2), backup("b", 6, 7)]


def test_the_newest_backup_before_the_target_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = engine(monkeypatch, TWO, listing(1, list(range(1, 12)))).choose
    assert chosen(RecoveryTarget("time", at(7))).backup_id == "b"
    assert chosen(RecoveryTarget("time", at(6.9))).backup_id == "a"
    assert chosen(RecoveryTarget("lsn", lsn(7))).backup_id == "b"
    assert chosen(RecoveryTarget("lsn", lsn(6.9))).backup_id == "a"
    assert chosen(RecoveryTarget("latest")).backup_id == "b"
    assert chosen(RecoveryTarget("name", "before the release")).backup_id == "a"


def test_a_moment_after_the_newest_archived_wal_is_refused_and_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = engine(monkeypatch, TWO, listing(1, list(range(1, 12)))).choose
    with pytest.raises(UsageError, match="outside") as refused:
        chosen(RecoveryTarget("time", at(12.1)))
    assert "newer moments follow" in str(refused.value.remedy)
    with pytest.raises(UsageError, match="outside") as refused:
        chosen(RecoveryTarget("time", at(1.5)))
    assert "newer moments" not in str(refused.value.remedy)


# Forks


ON_THE_LEFT_BRANCH = [backup("a", 1, 2), backup("left", 12, 13)]
ITEMS = [*listing(1, list(range(1, 15))), *listing(2, list(range(10, 30)))]


@pytest.mark.parametrize("wanted", [RecoveryTarget("time", at(20)), RecoveryTarget("time", at(14)), RecoveryTarget("lsn", lsn(20)),
                                    RecoveryTarget("latest"), RecoveryTarget("xid", "700")], ids=str)  # fmt: skip
def test_a_backup_of_the_branch_that_was_left_is_not_the_way_to_the_newest_timeline(
    monkeypatch: pytest.MonkeyPatch, wanted: RecoveryTarget
) -> None:
    """PostgreSQL refuses it: the requested timeline is not a child of this server's history."""
    assert engine(monkeypatch, ON_THE_LEFT_BRANCH, ITEMS, FORKED).choose(wanted).backup_id == "a"


@pytest.mark.parametrize("timeline", [1, "current"])
def test_asked_for_the_left_branch_is_reached_from_its_own_backup(
    monkeypatch: pytest.MonkeyPatch, timeline: int | str
) -> None:
    chosen = engine(monkeypatch, ON_THE_LEFT_BRANCH, ITEMS, FORKED).choose
    wanted = RecoveryTarget("time", at(14), timeline=timeline)  # type: ignore[arg-type]
    assert chosen(wanted).backup_id == "left"


def test_a_moment_that_only_the_left_branch_has_is_refused_with_its_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = engine(monkeypatch, [backup("left", 12, 13)], ITEMS, FORKED).choose
    with pytest.raises(UsageError, match="timeline that is followed") as refused:
        chosen(RecoveryTarget("time", at(14)))
    assert "it lies on timeline 1" in str(refused.value.remedy)
    with pytest.raises(UsageError, match="lies on timeline latest"):
        chosen(RecoveryTarget("latest"))


def test_a_timeline_of_which_nothing_is_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="lies on timeline 9") as refused:
        engine(monkeypatch, TWO, ITEMS, FORKED).choose(RecoveryTarget("latest", timeline=9))
    assert "1, 2" in str(refused.value.remedy)


# Gaps

AFTER = [backup("a", 1, 2), backup("b", 7, 8), backup("c", 10, 11)]
TORN = listing(1, [1, 2, 3, 6, 7, 8, 9, 10, 11, 12])  # 4 and 5 are lost


@pytest.mark.parametrize("kind", ["name", "xid"])
def test_what_may_lie_anywhere_is_looked_for_behind_the_newest_gap(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """From the oldest backup of all, recovery would stop at the gap."""
    wanted = RecoveryTarget(kind, "700")  # type: ignore[arg-type]
    assert engine(monkeypatch, AFTER, TORN).choose(wanted).backup_id == "b"


def test_a_position_or_a_moment_in_or_behind_a_gap_is_reached_from_the_right_side_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = engine(monkeypatch, AFTER, TORN).choose
    assert chosen(RecoveryTarget("lsn", lsn(3.5))).backup_id == "a"
    assert chosen(RecoveryTarget("lsn", lsn(12))).backup_id == "c"
    for wanted in (RecoveryTarget("lsn", lsn(5)), RecoveryTarget("time", at(5)), RecoveryTarget("lsn", lsn(20))):
        with pytest.raises(UsageError) as refused:
            chosen(wanted)
        assert "whole again from b" in str(refused.value.remedy)
    with pytest.raises(UsageError, match="before the end of the oldest backup"):
        chosen(RecoveryTarget("lsn", lsn(1.5)))


def test_a_backup_whose_own_wal_is_not_whole_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = engine(monkeypatch, [backup("a", 1, 2), backup("torn", 3, 6)], TORN).choose
    assert chosen(RecoveryTarget("time", at(3.5))).backup_id == "a"
    assert chosen(RecoveryTarget("latest")).backup_id == "a"


# Clusters


def test_a_backup_of_another_cluster_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restore as a new cluster, or an upgrade, the old one's backups stand in the same repository."""
    from dataclasses import replace

    other = replace(backup("old", 1, 2), system_identifier=6)
    backups = [other, backup("new", 6, 7), replace(backup("older upgrade", 8, 9), system_identifier=6)]
    chosen = engine(monkeypatch, backups, listing(1, list(range(1, 12)))).choose
    for wanted in (RecoveryTarget("name", "x"), RecoveryTarget("latest"), RecoveryTarget("lsn", lsn(10)),
                   RecoveryTarget("time", at(10))):  # fmt: skip
        assert chosen(wanted).backup_id == "new"
    with pytest.raises(UsageError, match="outside"):
        chosen(RecoveryTarget("time", at(3)))


def test_nothing_that_can_be_restored_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there is no backup"):
        engine(monkeypatch, [], listing(1, [1, 2])).choose(RecoveryTarget("latest"))
    with pytest.raises(UsageError, match="WAL of no backup is whole"):
        engine(monkeypatch, [backup("a", 1, 2)], []).choose(RecoveryTarget("latest"))
    future = RecoveryTarget("time", at(10_000) + timedelta(hours=1))
    with pytest.raises(UsageError, match="in the future"):
        engine(monkeypatch, TWO, listing(1, list(range(1, 12)))).choose(future)


def test_three_timelines_are_followed_to_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = FORKED | {3: parse_history(3, history((1, 5 * SIZE + 1)))}
    items = [*listing(1, list(range(1, 12))), *listing(2, [10, 11, 12, 13]), *listing(3, [5, 6, 7, 8])]
    chosen = engine(monkeypatch, TWO, items, lines).choose
    assert chosen(RecoveryTarget("latest")).backup_id == "a"
    assert chosen(RecoveryTarget("latest", timeline=2)).backup_id == "b"
