"""Where a target stands, in one word and in the sentences that a manager reads. Pure functions over the records.

Only a fresh PASS whose own gates bear it out, over a store from which something can be restored, is shown as PASS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import pairwise

from ops_platform.backup.model import RecoveryWindow
from ops_platform.counting import count_of, duration
from ops_platform.recovery.model import GateStatus, Objective, Scorecard, Verdict
from ops_platform.reports.words import long_moment, sentence, shortened, utc

# A proof dated this far ahead of the page's clock is a clock that is off, and its age is worth nothing.
CLOCK_SLACK = timedelta(minutes=5)

_ISO = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d(:?\d\d)?| UTC)")


class Standing(StrEnum):
    """Worst first: the order of the index."""

    LOST = "NOTHING TO RESTORE"
    FAILED = "FAIL"
    UNKNOWN = "COULD NOT VERIFY"
    NEVER = "NEVER PROVEN"
    STALE = "PROOF OUT OF DATE"
    PROVEN = "PASS"

    @property
    def tone(self) -> str:
        return {Standing.LOST: "bad", Standing.FAILED: "bad", Standing.PROVEN: "good"}.get(self, "warn")

    @property
    def rank(self) -> int:
        return list(Standing).index(self)


def contradiction(scorecard: Scorecard) -> str | None:
    """Why a PASS is not borne out by its own gates; None where it is, and for the other verdicts."""
    if scorecard.verdict is not Verdict.PASS:
        return None
    bad = [g.id for g in scorecard.gates if g.status in (GateStatus.FAILED, GateStatus.COULD_NOT_CHECK)]
    if bad:
        return f"the record says PASS, but its own gates do not: {', '.join(bad)}"
    if not any(gate.status is GateStatus.PASSED for gate in scorecard.gates):
        return "the record says PASS, but not one gate passed"
    return None


def shown(scorecard: Scorecard) -> Verdict:
    """The verdict to show: a PASS that contradicts its own gates proves nothing."""
    return Verdict.COULD_NOT_VERIFY if contradiction(scorecard) else scorecard.verdict


def verdict_words(verdict: Verdict | str) -> str:
    return str(verdict).replace("_", " ")


def tone_of(verdict: Verdict) -> str:
    return {Verdict.PASS: "good", Verdict.FAIL: "bad", Verdict.COULD_NOT_VERIFY: "warn"}[verdict]


def standing(
    latest: Scorecard | None, window: RecoveryWindow | None, proven_within: timedelta, now: datetime
) -> Standing:
    """`window` None: it could not be determined, which takes nothing away from a proof."""
    if window is not None and window.latest is None:
        return Standing.LOST
    if latest is None:
        return Standing.NEVER
    verdict = shown(latest)
    if verdict is not Verdict.PASS:
        return Standing.FAILED if verdict is Verdict.FAIL else Standing.UNKNOWN
    return Standing.PROVEN if -CLOCK_SLACK <= now - utc(latest.ended_at) <= proven_within else Standing.STALE


def age(when: datetime, now: datetime) -> str:
    passed = now - utc(when)
    if passed < -CLOCK_SLACK:
        return f"dated {duration(-passed)} in the future"
    return f"{duration(max(passed, timedelta(0)))} old"


def proven_moment(scorecard: Scorecard) -> datetime | None:
    """The moment to which the verification recovered: its target where that is a time, or the newest commit it found."""
    found = _ISO.search(scorecard.recovery_target)
    if found:
        return utc(datetime.fromisoformat(found[0].replace(" UTC", "Z")))
    return None if scorecard.newest_commit is None else utc(scorecard.newest_commit)


def objective(scorecard: Scorecard | None, name: str) -> Objective | None:
    return None if scorecard is None else next((o for o in scorecard.objectives if o.name == name), None)


def measured(scorecard: Scorecard, name: str) -> float | None:
    found = objective(scorecard, name)
    return None if found is None else found.measured_seconds


def gate_counts(scorecard: Scorecard) -> dict[GateStatus, int]:
    return {status: sum(gate.status is status for gate in scorecard.gates) for status in GateStatus}


def in_order(latest: Scorecard | None, history: Iterable[Scorecard]) -> list[Scorecard]:
    """Every verification once, oldest first, the latest among them."""
    known = {card.verification_id: card for card in [*history, *([latest] if latest else [])]}
    return sorted(known.values(), key=lambda card: (utc(card.ended_at), card.verification_id))


def reach(name: str, window: RecoveryWindow | None, *, proven: bool) -> str:
    """Which moments can be restored, as a sentence. Without proof it claims no more than what the store holds."""
    if window is None:
        return f"Which moments of {name} can be restored could not be determined."
    if window.earliest is None or window.latest is None:
        return f"Nothing of {name} can be restored: the store holds no usable backup with its WAL."
    claim = "can be restored to" if proven else "has backups and WAL for"
    short = window.latest - window.earliest < timedelta(days=1)
    begin, end = (long_moment(at, seconds=short) for at in (window.earliest, window.latest))
    text = f"{name} {claim} any moment from {begin} to {end}"
    holes = holes_of(window)
    if holes:
        lost = sum((end - begin for begin, end in holes), timedelta(0))
        text += f", except for {count_of(len(holes), 'gap')} of {duration(lost)}" + (
            " in all" if len(holes) > 1 else ""
        )
    return f"{text}."


def holes_of(window: RecoveryWindow) -> list[tuple[datetime, datetime]]:
    """The times between the pieces: what lies inside the window and cannot be restored."""
    pieces = sorted((utc(begin), utc(end)) for begin, end in window.pieces)
    return [(left[1], right[0]) for left, right in pairwise(pieces) if right[0] > left[1]]


def found_words(scorecard: Scorecard) -> str:
    """What the checks of a passed verification found."""
    counts = gate_counts(scorecard)
    text = f"found nothing wrong in {count_of(counts[GateStatus.PASSED], 'check')}"
    skipped = counts[GateStatus.NOT_APPLICABLE]
    return text + (f" ({skipped} more did not apply)" if skipped else "")


def proof_words(scorecard: Scorecard) -> str:
    """`restored it to … in 4 min 12 s and found nothing wrong in 14 checks`."""
    to, took = proven_moment(scorecard), measured(scorecard, "rto")
    text = "restored it" + (f" to {long_moment(to, seconds=True)}" if to else "")
    return text + (f" in {duration(took)}" if took is not None else "") + f" and {found_words(scorecard)}"


def story(
    name: str,
    latest: Scorecard | None,
    history: Sequence[Scorecard],
    window: RecoveryWindow | None,
    proven_within: timedelta,
    now: datetime,
) -> list[str]:
    """The sentences at the top of a target's page. The first carries the news."""
    now = utc(now)
    where = standing(latest, window, proven_within, now)
    can = reach(name, window, proven=where is Standing.PROVEN)
    if latest is None:
        never = f"No verification of {name} is on record; until one backup was restored and checked, nothing is proven."
        return [can, never] if where is Standing.LOST else [never, can]
    fresh = timedelta(0) <= now - utc(latest.ended_at) < timedelta(minutes=1)
    when = "just before this page was written" if fresh else f"{age(latest.ended_at, now)} when this page was written"
    dated = f"{long_moment(latest.ended_at)} ({when})"
    verdict = shown(latest)
    if verdict is Verdict.FAIL:
        news = [f"The last verification of {name}, of {dated}, failed{_why_failed(latest)}"]
    elif verdict is Verdict.COULD_NOT_VERIFY:
        reason = contradiction(latest) or _why_unknown(latest)
        news = [
            f"The last verification of {name}, of {dated}, could not come to a verdict: {sentence(reason)}",
            "That proves nothing, neither good nor bad.",
        ]
    elif where is Standing.STALE:
        news = [
            f"The last proof of {name} is of {dated}; it was promised to be renewed within {duration(proven_within)}.",
            f"It {proof_words(latest)}.",
        ]
    else:
        news = [f"The last proof, of {dated}, {proof_words(latest)}."]
    if verdict is not Verdict.PASS:
        news.append(_last_good(latest, history))
    news += _missed(latest)
    return [can, *news] if where in (Standing.LOST, Standing.PROVEN) else [*news, can]


def _why_failed(card: Scorecard) -> str:
    """How many checks stand in the way; where none does, the record's own reason."""
    failed = gate_counts(card)[GateStatus.FAILED]
    if failed:
        return f" in {failed} of {count_of(len(card.gates), 'check')}."
    return f": {sentence(shortened(card.reason, 300))}"


def _why_unknown(card: Scorecard) -> str:
    unmade = gate_counts(card)[GateStatus.COULD_NOT_CHECK]
    if unmade:
        return f"{unmade} of {count_of(len(card.gates), 'check')} could not be made"
    return shortened(card.reason, 300)


def _missed(scorecard: Scorecard) -> list[str]:
    names = {"rpo": "the loss of data", "rto": "the time to restore", "rto-full": "the estimated full recovery"}
    found = [
        f"{names.get(each.name, each.name)} is {duration(each.measured_seconds)}"
        f" where {duration(each.objective_seconds)} at most were promised"
        for each in scorecard.objectives
        if each.met is False and each.measured_seconds is not None
    ]
    if not found:
        return []
    return [("A promise was missed: " if len(found) == 1 else "Promises were missed: ") + "; ".join(found) + "."]


def _last_good(latest: Scorecard, history: Sequence[Scorecard]) -> str:
    good = [
        card for card in in_order(None, history) if shown(card) is Verdict.PASS and card.ended_at <= latest.ended_at
    ]
    if not good:
        return "No earlier proof is on record."
    return f"The last good proof is of {long_moment(good[-1].ended_at)}; it {proof_words(good[-1])}."
