"""Promises that cannot be broken by a real server on demand: clocks that are wrong, answers that are half there."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from assets.postgres import check_result
from ops_platform import promises
from ops_platform.backup import archive
from ops_platform.backup.model import WalGap
from ops_platform.errors import CorruptionError, UnreachableError
from ops_platform.promises import PROMISES, Kept, judge
from tests.unit.test_definitions import an_inventory

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
LSN = "0/3000000"


class At:
    """A clock that stands."""

    def now(self) -> datetime:
        return NOW


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What engine, archive and records answer; everything is well to begin with. An exception is raised."""
    facts = SimpleNamespace(
        backups=[backup(hours=3)],
        proofs=[proof(hours=5)],
        card=card(rpo=20.0, rto=90.0, **{"rto-full": 900.0}),
        status=status(),
    )

    def answer(name: str) -> Any:
        found = getattr(facts, name)
        if isinstance(found, Exception):
            raise found
        return found

    repository = SimpleNamespace(proofs=lambda: answer("proofs"))
    monkeypatch.setattr(promises, "infos_of", lambda access, target: answer("backups"))
    monkeypatch.setattr(promises.records, "repository_of", lambda access, target: repository)
    monkeypatch.setattr(promises.records, "scorecards", lambda repository, newest: [c] if (c := answer("card")) else [])
    monkeypatch.setattr(archive, "archive_status", lambda access, target: answer("status"))
    return facts


def backup(hours: float, error: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(backup_id=f"B{hours:g}", ended_at=NOW - timedelta(hours=hours), error=error)


def proof(hours: float, verdict: str = "PASS") -> SimpleNamespace:
    return SimpleNamespace(backup_id="B", verified_at=NOW - timedelta(hours=hours), verdict=verdict)


def card(**measured: float | None) -> SimpleNamespace:
    return SimpleNamespace(objectives=[SimpleNamespace(name=n, measured_seconds=s) for n, s in measured.items()])


def status(**changed: Any) -> SimpleNamespace:
    found: dict[str, Any] = {
        "continuous": True, "gaps": [], "segments": 9, "slot_error": None, "lag_bytes": 0, "slot_name": "ops_wal",
        "slot": SimpleNamespace(active_pid=7), "server_time": NOW, "until": NOW, "newest": LSN,
    }  # fmt: skip
    return SimpleNamespace(**(found | changed))


def look(name: str) -> Kept:
    return judge(name, None, an_inventory("db").inventory.target("db"), At())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROMISES)
def test_when_all_is_well_every_promise_is_kept(world: SimpleNamespace, name: str) -> None:
    kept = look(name)
    assert (kept.kept, kept.known) == (True, True), kept.text


def known_broken(name: str, says: str) -> None:
    kept = look(name)
    assert (kept.kept, kept.known) == (False, True), kept.text
    assert says in kept.text


def unknown(name: str, says: str) -> None:
    kept = look(name)
    assert (kept.kept, kept.known) == (False, False), kept.text
    assert says in kept.text


AWAY = [
    ("backup_fresh", "backups"), ("wal_continuous", "status"), ("proven", "proofs"), ("rpo_met", "card"), ("rto_met", "card"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fact"), AWAY)
@pytest.mark.parametrize("error", [UnreachableError("nobody answers"), CorruptionError("nobody answers")])
def test_what_cannot_be_asked_is_not_kept_and_not_known(
    world: SimpleNamespace, name: str, fact: str, error: Exception
) -> None:
    setattr(world, fact, error)
    unknown(name, "nobody answers")


# Fresh


def test_no_backup_is_not_fresh(world: SimpleNamespace) -> None:
    world.backups = []
    known_broken("backup_fresh", "there is no backup")


def test_what_cannot_be_read_as_a_backup_does_not_count(world: SimpleNamespace) -> None:
    world.backups = [backup(hours=30), backup(hours=1, error="no manifest")]
    known_broken("backup_fresh", "B30 ended 30 h ago, 26 h are allowed")


def test_the_age_that_is_allowed_is_still_fresh_and_a_second_more_is_not(world: SimpleNamespace) -> None:
    world.backups = [backup(hours=26)]
    assert look("backup_fresh").kept
    world.backups = [backup(hours=26 + 1 / 3600)]
    assert not look("backup_fresh").kept


@pytest.mark.parametrize(("name", "fact", "made"), [("backup_fresh", "backups", backup), ("proven", "proofs", proof)])
def test_what_a_wrong_clock_dated_into_the_future_does_not_stay_young_for_ever(
    world: SimpleNamespace, name: str, fact: str, made: Any
) -> None:
    setattr(world, fact, [made(hours=-0.05)])
    assert look(name).kept  # clocks of two machines differ a little
    setattr(world, fact, [made(hours=-8760)])
    unknown(name, "lies in the future")


# Continuous


def test_a_gap_is_named(world: SimpleNamespace) -> None:
    world.status = status(continuous=False, gaps=[WalGap(1, "…02", "…03", "B"), WalGap(1, "…07", "…09", None)])
    known_broken("wal_continuous", "WAL is missing: …07 to …09")


def test_a_gap_that_a_later_backup_mended_is_named_and_fails_no_night_after_it(world: SimpleNamespace) -> None:
    world.status = status(gaps=[WalGap(1, "…07", "…09", "B")])
    kept = look("wal_continuous")
    assert (kept.kept, kept.known) == (True, True)
    assert "the moments of …07 to …09 are lost, whole again from B" in kept.text
    assert kept.numbers["gaps"] == 1


def test_an_empty_archive_is_no_continuous_one(world: SimpleNamespace) -> None:
    world.status = status(continuous=False)
    known_broken("wal_continuous", "no WAL is archived")


def test_a_server_that_does_not_answer_leaves_the_lag_unknown(world: SimpleNamespace) -> None:
    world.status = status(slot_error="connection refused", slot=None, lag_bytes=None)
    unknown("wal_continuous", "connection refused")


@pytest.mark.parametrize("slot", [None, SimpleNamespace(active_pid=None)])
def test_an_archive_that_nobody_fills_is_not_kept_however_whole_it_is(world: SimpleNamespace, slot: Any) -> None:
    world.status = status(slot=slot)
    known_broken("wal_continuous", "nobody receives WAL")


def test_too_far_behind_is_not_kept_and_an_idle_server_is_not_behind(world: SimpleNamespace) -> None:
    early = NOW - timedelta(minutes=6)
    world.status = status(lag_bytes=1, until=early)
    known_broken("wal_continuous", "6 min behind")
    world.status = status(lag_bytes=0, until=early)
    assert look("wal_continuous").kept


@pytest.mark.parametrize("lacking", ["until", "server_time"])
def test_behind_by_an_unknown_time_is_unknown(world: SimpleNamespace, lacking: str) -> None:
    world.status = status(lag_bytes=1, **{lacking: None})
    unknown("wal_continuous", "of unknown age")


# Proven, and within the objectives


@pytest.mark.parametrize("proofs", [[], [proof(1, "FAIL"), proof(1, "COULD_NOT_VERIFY")]])
def test_only_a_pass_is_a_proof(world: SimpleNamespace, proofs: list[Any]) -> None:
    world.proofs = proofs
    known_broken("proven", "no backup has ever been proven")


def test_an_old_proof_is_not_enough_and_a_later_failure_does_not_hide_a_young_one(world: SimpleNamespace) -> None:
    world.proofs = [proof(49), proof(1, "FAIL")]
    known_broken("proven", "49 h ago, 48 h are allowed")
    world.proofs = [proof(40), proof(1, "FAIL")]
    assert look("proven").kept


def test_nowhere_to_keep_proofs_is_nothing_proven(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises.records, "repository_of", lambda access, target: None)
    for name in ("proven", "rpo_met", "rto_met"):
        assert (look(name).kept, look(name).known) == (False, False)


@pytest.mark.parametrize("name", ["rpo_met", "rto_met"])
def test_never_measured_is_not_met(world: SimpleNamespace, name: str) -> None:
    world.card = None
    unknown(name, "never measured")
    world.card = card(rpo=None, rto=None)
    unknown(name, "not measured")


def test_more_loss_or_time_than_promised_is_not_met(world: SimpleNamespace) -> None:
    world.card = card(rpo=3601.0, rto=14401.0)
    known_broken("rpo_met", "1 h are allowed")
    known_broken("rto_met", "4 h are allowed")


def test_a_fast_restore_does_not_hide_an_estimate_beyond_the_objective(world: SimpleNamespace) -> None:
    world.card = card(rto=10.0, **{"rto-full": 14401.0})
    known_broken("rto_met", "4 h, 4 h are allowed: 1 s too long")
    world.card = card(rto=10.0)
    assert look("rto_met").kept


# As a check


def test_a_check_says_what_was_judged_and_shows_its_figures() -> None:
    found = check_result(Kept("a", True, "good", {"lag_seconds": 1.5}))
    assert found.passed
    assert found.description == "good"
    assert found.metadata["lag_seconds"].value == 1.5


def test_what_could_not_be_judged_is_not_passed_and_says_so() -> None:
    found = check_result(Kept("a", False, "the store is away", known=False))
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert found.description == "could not be judged: the store is away"
