"""Actions: what each guard keeps from happening, in which order things happen, and what the ledger holds afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from ops_platform.actions import (
    Applied,
    Approval,
    Case,
    Change,
    Check,
    CountLimit,
    Guard,
    LegalHold,
    MaintenanceWindow,
    ModeGuard,
    Outcome,
    PercentLimit,
    Plan,
    Ruling,
    Status,
    Verification,
    next_opening,
    run_action,
)
from ops_platform.errors import OpsError, RefusedError, UnreachableError, UsageError
from ops_platform.inventory.model import Mode, Weekly
from ops_platform.inventory.values import Secret
from ops_platform.ledger import Ledger
from tests.rig import Cluster

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)  # a Monday
ENFORCE = ModeGuard(Mode.ENFORCE)


class At:
    def __init__(self, now: datetime = NOW) -> None:
        self.at = now

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing waits")


def remove(name: str, **more: Any) -> Change:
    return Change("jar", name, {"full": True}, None, reversible=False, **more)


@dataclass
class Shelf:
    """An action that takes jars off a shelf: as small as one can be, with a place for every fault."""

    jars: list[str]
    unwanted: list[str]
    name: str = "shelf.clear"
    target_id: str = "kitchen"
    touched: list[str] = field(default_factory=list[str])
    checks: dict[str, Applied] = field(default_factory=dict[str, Applied])
    faults: dict[str, Exception] = field(default_factory=dict[str, Exception])
    before_each: Callable[[str], None] = lambda name: None
    verifying: Callable[[], Verification] | None = None

    def plan(self) -> Plan:
        changes = tuple(remove(jar) for jar in self.jars if jar in self.unwanted)
        return Plan(self.name, self.target_id, changes, NOW, {"jar": len(self.jars)}, {"note": "shown"})

    def check(self, change: Change) -> Applied | None:
        return self.checks.get(change.object)

    def apply(self, change: Change) -> Applied:
        self.before_each(change.object)
        self.touched.append(change.object)
        if change.object in self.faults:
            raise self.faults[change.object]
        self.jars.remove(change.object)
        return Applied(Outcome.APPLIED, "taken off")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if self.verifying is not None:
            return self.verifying()
        gone = [name for name, applied in outcomes.items() if applied.outcome is Outcome.APPLIED]
        return Verification((Check("gone", not set(gone) & set(self.jars), "looked at the shelf"),))


def shelf(**more: Any) -> Shelf:
    return Shelf(["plum", "fig", "pear", "quince"], ["plum", "fig", "pear"], **more)


@dataclass
class Book:
    """A ledger in a real database, whose server can be taken away."""

    cluster: Cluster
    away: bool = False

    def __post_init__(self) -> None:
        with closing(self.cluster.server.connect()) as connection:
            connection.execute("drop schema if exists ops_ledger cascade")
        self.ledger = Ledger(self._connect, clock=At())

    def _connect(self) -> psycopg.Connection[Any]:
        if self.away:
            raise UnreachableError("PostgreSQL does not answer", where="127.0.0.1:5432")
        return self.cluster.server.connect()

    def lose(self) -> None:
        self.ledger.close()
        self.away = True

    def written(self) -> list[tuple[str, Any]]:
        self.away = False
        return [(entry.kind, entry.body) for entry in self.ledger.entries()]


@pytest.fixture
def book(shared_cluster: Cluster) -> Iterator[Book]:
    made = Book(shared_cluster)
    yield made
    made.ledger.close()


def run(action: Shelf, book: Book, *guards: Guard, approve: str | None = None) -> Any:
    return run_action(action, ledger=book.ledger, guards=guards, approve_digest=approve, actor="tester", clock=At())


# Order and record


def test_enforcing_applies_verifies_and_records_each_step(book: Book) -> None:
    action = shelf()
    result = run(action, book, ENFORCE)
    assert (result.status, result.ok, action.jars) == (Status.DONE, True, ["quince"])
    assert result.counts == {"applied": 3}
    kinds = [kind for kind, _ in book.written()]
    assert kinds == ["action.plan", "action.outcome", "action.outcome", "action.outcome", "action.verification"]
    planned, outcome, ending = (body for _, body in (book.written()[number] for number in (0, 1, 4)))
    assert planned["plan"]["digest"] == result.plan.digest
    assert [change["object"] for change in planned["plan"]["changes"]] == ["plum", "fig", "pear"]
    assert planned["rulings"] == [{"guard": "mode", "allows": True, "reason": "the inventory says enforce"}]
    assert (outcome["object"], outcome["outcome"]) == ("plum", "applied")
    assert (ending["status"], ending["verification"]["holds"]) == ("done", True)
    assert {planned["run"], outcome["run"], ending["run"]} == {result.run_id}
    assert result.recorded == (1, 2, 3, 4, 5)
    entries = book.ledger.entries(subject="kitchen")
    assert {entry.actor for entry in entries} == {"tester"}
    assert book.ledger.verify().ok


def test_the_plan_stands_in_the_ledger_before_the_first_change(book: Book) -> None:
    seen: list[list[str]] = []
    action = shelf(before_each=lambda name: seen.append([kind for kind, _ in book.written()]))
    run(action, book, ENFORCE)
    assert seen[0] == ["action.plan"]
    assert seen[2] == ["action.plan", "action.outcome", "action.outcome"]


def test_a_second_run_finds_nothing_to_do_and_says_so(book: Book) -> None:
    action = shelf()
    run(action, book, ENFORCE)
    again = run(action, book, ENFORCE)
    assert (again.status, again.ok) == (Status.NOTHING, True)
    assert book.written()[-1][1]["verdict"] == "nothing to do"


def test_without_a_mode_guard_it_observes(book: Book) -> None:
    action = shelf()
    result = run(action, book, LegalHold(False))
    assert (result.status, result.ok, action.touched) == (Status.OBSERVED, True, [])
    ((kind, body),) = book.written()
    assert (kind, body["verdict"]) == ("action.plan", "observed")


def test_a_preview_shows_what_would_refuse_and_is_not_blocked(book: Book) -> None:
    result = run(shelf(), book, ModeGuard(Mode.OBSERVE), CountLimit(1, "jar"), LegalHold(True))
    assert (result.status, result.ok) == (Status.OBSERVED, True)
    assert [ruling.guard for ruling in result.refusals] == ["count of jar", "legal hold"]
    assert len(result.plan.changes) == 3


def test_observing_needs_no_ledger_and_applying_does() -> None:
    action = shelf()
    assert run_action(action, ledger=None, guards=[], actor="tester").status is Status.OBSERVED
    with pytest.raises(RefusedError, match="no ledger"):
        run_action(action, ledger=None, guards=[ENFORCE], actor="tester")
    assert action.touched == []


# Guards: each of these runs applies without its guard, and applies nothing with it

REFUSING: dict[str, Guard] = {
    "mode": ModeGuard(Mode.OBSERVE),
    "count": CountLimit(2, "jar"),
    "percent": PercentLimit(74.9, "jar"),
    "legal hold": LegalHold(True),
    "window": MaintenanceWindow([Weekly(days=["mon"], start="13:00", length=timedelta(hours=2), timezone="UTC")]),
    "approval": Approval(required=True),
}
LETTING: dict[str, Guard] = {
    "mode": ENFORCE,
    "count": CountLimit(3, "jar"),
    "percent": PercentLimit(75, "jar"),
    "legal hold": LegalHold(False),
    "window": MaintenanceWindow([Weekly(days=["mon"], start="11:00", length=timedelta(hours=2), timezone="UTC")]),
    "approval": Approval(required=False),
}


@pytest.mark.parametrize("name", list(REFUSING))
def test_a_guard_that_refuses_keeps_the_whole_plan_from_being_applied(book: Book, name: str) -> None:
    mode = [] if name == "mode" else [ENFORCE]
    refused = shelf()
    result = run(refused, book, *mode, REFUSING[name])
    assert result.status is (Status.OBSERVED if name == "mode" else Status.REFUSED)
    assert refused.touched == []
    assert book.written()[-1][1]["verdict"] == result.status.value
    assert any(not ruling["allows"] for ruling in book.written()[-1][1]["rulings"])
    let = shelf()
    assert run(let, book, *mode, LETTING[name]).status is Status.DONE
    assert let.touched == ["plum", "fig", "pear"]


class Broken:
    name = "broken"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def rule(self, case: Case) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [UnreachableError("Alertmanager does not answer"), ValueError("oops"), None, True, Ruling("broken", "yes", "")],  # type: ignore[arg-type]
)
def test_a_guard_that_cannot_decide_refuses(book: Book, answer: Any) -> None:
    action = shelf()
    result = run(action, book, ENFORCE, Broken(answer))
    assert (result.status, action.touched) == (Status.REFUSED, [])
    (refusal,) = result.refusals
    assert refusal.guard == "broken"
    assert "could not decide" in refusal.reason
    assert run(shelf(), book, ENFORCE, Broken(Ruling("broken", True, "fine"))).status is Status.DONE


def test_a_mode_guard_that_breaks_does_not_enforce(book: Book) -> None:
    action = shelf()
    broken = Broken(ValueError("oops"))
    broken.name = "mode"
    assert run(action, book, broken).status is Status.OBSERVED
    assert run(action, book, ENFORCE, broken).status is Status.OBSERVED
    assert action.touched == []


@pytest.mark.parametrize(
    ("population", "allows"), [({"jar": 10}, True), ({"jar": 0}, False), ({}, False), ({"jar": 2}, False)]
)
def test_a_share_of_an_unknown_number_is_refused(population: dict[str, int], allows: bool) -> None:
    plan = replace(shelf().plan(), population=population)
    assert PercentLimit(50, "jar").rule(Case(plan, None, NOW)).allows is allows


def test_limits_count_one_kind_alone() -> None:
    plan = shelf().plan()
    assert CountLimit(0, "bottle").rule(Case(plan, None, NOW)).allows
    assert PercentLimit(1, "bottle").rule(Case(plan, None, NOW)).allows


# Approval


def test_exactly_the_approved_plan_is_applied(book: Book) -> None:
    action = shelf()
    digest = action.plan().digest
    result = run(action, book, ENFORCE, Approval(required=True), approve=digest)
    assert result.status is Status.DONE
    assert book.written()[0][1]["rulings"][1]["reason"] == f"the plan {digest[:12]} is approved"


@pytest.mark.parametrize("guards", [(), (Approval(required=False),), (Approval(required=True),)])
def test_an_approval_of_another_plan_refuses_even_where_none_is_needed(book: Book, guards: tuple[Guard, ...]) -> None:
    action = shelf()
    digest = action.plan().digest
    action.unwanted.remove("fig")  # what was approved is not what would be done now
    result = run(action, book, ENFORCE, *guards, approve=digest)
    assert (result.status, action.touched) == (Status.REFUSED, [])


def test_the_digest_is_of_what_changes_and_of_nothing_else() -> None:
    plan = shelf().plan()
    digest = plan.digest
    assert len(digest) == 64
    assert replace(plan, created_at=NOW + timedelta(days=1), population={"jar": 99}, facts={}).digest == digest
    others = [
        replace(plan, action="shelf.paint"),
        replace(plan, target_id="cellar"),
        replace(plan, changes=plan.changes[:2]),
        replace(plan, changes=(plan.changes[1], plan.changes[0], plan.changes[2])),
        replace(plan, changes=(replace(plan.changes[0], before={"full": False}), *plan.changes[1:])),
        replace(plan, changes=(replace(plan.changes[0], detail={"why": "mould"}), *plan.changes[1:])),
    ]
    assert len({digest, *(other.digest for other in others)}) == 7


# Faults


def test_nothing_is_applied_when_the_plan_cannot_be_recorded(book: Book) -> None:
    action = shelf()
    book.lose()
    with pytest.raises(UnreachableError):
        run(action, book, ENFORCE)
    assert action.touched == []


def test_a_preview_is_shown_although_the_ledger_is_away_and_says_so(book: Book) -> None:
    book.lose()
    result = run(shelf(), book)
    assert (result.status, result.ok) == (Status.OBSERVED, False)
    assert "does not answer" in (result.unrecorded or "")


def test_nothing_more_is_applied_once_the_ledger_is_lost(book: Book) -> None:
    action = shelf(before_each=lambda name: book.lose() if name == "fig" else None)
    result = run(action, book, ENFORCE)
    assert action.touched == ["plum", "fig"]
    assert [applied.outcome for _, applied in result.outcomes] == [Outcome.APPLIED, Outcome.APPLIED, Outcome.REFUSED]
    assert not result.ok
    assert "does not answer" in (result.unrecorded or "")
    assert [kind for kind, _ in book.written()] == ["action.plan", "action.outcome"]


def test_a_secret_in_a_plan_is_refused_before_anything_happens(book: Book) -> None:
    action = shelf()
    action.jars[0] = Secret("hunter2")
    action.unwanted[0] = Secret("hunter2")
    with pytest.raises(UsageError, match="secret"):
        run(action, book, ENFORCE)
    assert (action.touched, book.written()) == ([], [])


def test_a_precondition_that_fails_leaves_the_change_alone(book: Book) -> None:
    action = shelf(checks={"fig": Applied(Outcome.CONTENDED, "somebody eats it")})
    result = run(action, book, ENFORCE)
    assert (result.status, result.ok, action.touched) == (Status.INCOMPLETE, False, ["plum", "pear"])
    assert book.written()[2][1]["reason"] == "somebody eats it"


def test_what_is_pinned_or_done_already_is_no_failure(book: Book) -> None:
    pinned = {"fig": Applied(Outcome.PINNED, "until May"), "plum": Applied(Outcome.ALREADY_DONE, "")}
    result = run(shelf(checks=pinned), book, ENFORCE)
    assert (result.status, result.counts) == (Status.DONE, {"already_done": 1, "pinned": 1, "applied": 1})


def test_one_failed_change_does_not_keep_the_others_back(book: Book) -> None:
    action = shelf(faults={"fig": OpsError("it sticks", where="shelf", remedy="pull")})
    result = run(action, book, ENFORCE)
    assert (result.status, result.ok) == (Status.FAILED, False)
    assert [applied.outcome for _, applied in result.outcomes] == [Outcome.APPLIED, Outcome.FAILED, Outcome.APPLIED]
    assert "what to do: pull" in book.written()[2][1]["reason"]


def test_a_system_that_stopped_answering_is_not_asked_for_each_change(book: Book) -> None:
    action = shelf(faults={"plum": UnreachableError("the shelf is gone")})
    result = run(action, book, ENFORCE)
    assert action.touched == ["plum"]
    assert [applied.outcome for _, applied in result.outcomes] == [Outcome.FAILED, Outcome.REFUSED, Outcome.REFUSED]
    assert book.written()[2][1]["objects"] == ["fig", "pear"]


def test_a_mistake_of_ours_is_put_down_and_stops_everything(book: Book) -> None:
    action = shelf(faults={"fig": ZeroDivisionError("division by zero")})
    with pytest.raises(ZeroDivisionError):
        run(action, book, ENFORCE)
    assert action.touched == ["plum", "fig"]
    assert book.written()[-1][1]["reason"] == "unexpected ZeroDivisionError: division by zero"


def _cannot_look() -> Verification:
    raise UnreachableError("the shelf is gone")


@pytest.mark.parametrize(
    ("verifying", "status"),
    [
        (lambda: Verification((Check("gone", True, ""), Check("kept", False, "quince is gone"))), Status.FAILED),
        (lambda: Verification((Check("gone", True, ""), Check("kept", None, "no light"))), Status.UNVERIFIED),
        (lambda: Verification(()), Status.UNVERIFIED),
        (_cannot_look, Status.UNVERIFIED),
    ],
)
def test_what_was_not_seen_to_hold_is_not_done(
    book: Book, verifying: Callable[[], Verification], status: Status
) -> None:
    result = run(shelf(verifying=verifying), book, ENFORCE)
    assert (result.status, result.ok) == (status, False)
    assert book.written()[-1][1]["status"] == status.value


def test_two_runs_at_once_do_not_both_apply(book: Book) -> None:
    action = shelf()
    with book.ledger.claim("shelf.clear/kitchen"):
        result = run(action, book, ENFORCE)
    assert (result.status, result.counts, action.touched) == (Status.INCOMPLETE, {"contended": 3}, [])
    assert run(action, book, ENFORCE).status is Status.DONE


# Maintenance windows


def window(start: str, hours: float, zone: str = "UTC", days: list[Any] | None = None) -> Weekly:
    given = {"days": days} if days else {}
    return Weekly(start=start, length=timedelta(hours=hours), timezone=zone, **given)


@pytest.mark.parametrize(
    ("weekly", "moment", "is_open"),
    [
        (window("11:00", 2, days=["mon"]), "2026-03-02T11:00:00Z", True),
        (window("11:00", 2, days=["mon"]), "2026-03-02T10:59:59Z", False),
        (window("11:00", 2, days=["mon"]), "2026-03-02T13:00:00Z", False),
        (window("11:00", 2, days=["mon"]), "2026-03-03T12:00:00Z", False),
        # Over midnight, and from Sunday into Monday: the day is that on which it opens.
        (window("23:00", 4, days=["sun"]), "2026-03-02T02:59:00Z", True),
        (window("23:00", 4, days=["mon"]), "2026-03-02T02:59:00Z", False),
        # The zone's day, not UTC's.
        (window("01:00", 2, "Pacific/Auckland", days=["tue"]), "2026-03-02T12:30:00Z", True),
        (window("22:00", 2, "America/Los_Angeles", days=["sun"]), "2026-03-02T06:30:00Z", True),
        # Longer than a day, and than a week.
        (window("00:00", 60, days=["sat"]), "2026-03-02T11:59:00Z", True),
        (window("00:00", 60, days=["sat"]), "2026-03-02T12:00:00Z", False),
        (window("00:00", 24 * 8, days=["sat"]), "2026-03-02T12:00:00Z", True),
        # Berlin: 02:00 is 01:00 UTC in winter and 00:00 UTC in summer.
        (window("02:00", 1, "Europe/Berlin"), "2026-03-02T01:30:00Z", True),
        (window("02:00", 1, "Europe/Berlin"), "2026-07-02T01:30:00Z", False),
        (window("02:00", 1, "Europe/Berlin"), "2026-07-02T00:30:00Z", True),
        # The night in which 02:00 to 03:00 does not exist: it opens as if it did, and stays open for its length.
        (window("02:30", 1, "Europe/Berlin"), "2026-03-29T01:29:00Z", False),
        (window("02:30", 1, "Europe/Berlin"), "2026-03-29T01:45:00Z", True),
        # A window over the change is as long as it says, by real time.
        (window("01:00", 3, "Europe/Berlin"), "2026-03-29T02:59:00Z", True),
        (window("01:00", 3, "Europe/Berlin"), "2026-03-29T03:00:00Z", False),
        # The night in which 02:30 comes twice: the first one.
        (window("02:30", 0.5, "Europe/Berlin"), "2026-10-25T00:45:00Z", True),
        (window("02:30", 0.5, "Europe/Berlin"), "2026-10-25T01:45:00Z", False),
    ],
)
def test_a_window_is_open(weekly: Weekly, moment: str, is_open: bool) -> None:
    ruling = MaintenanceWindow([weekly]).rule(Case(shelf().plan(), None, datetime.fromisoformat(moment)))
    assert ruling.allows is is_open, ruling.reason


def test_a_closed_window_says_when_it_opens() -> None:
    windows = [window("03:00", 1, days=["wed"]), window("02:00", 1, "Europe/Berlin", days=["tue"])]
    ruling = MaintenanceWindow(windows).rule(Case(shelf().plan(), None, NOW))
    assert ruling.reason == "closed until 2026-03-03 01:00 UTC"
    assert next_opening(windows, NOW) == datetime(2026, 3, 3, 1, 0, tzinfo=UTC)
    assert next_opening([window("12:00", 1, days=["mon"])], NOW) == NOW + timedelta(days=7)
    assert next_opening([], NOW) is None


def test_a_target_without_windows_is_not_restricted() -> None:
    assert MaintenanceWindow([]).rule(Case(shelf().plan(), None, NOW)).allows
