"""What users had of an outage, by a probe that writes numbers: the time without a write, and what was acknowledged and is lost."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import Field

from ops_platform.drills.availability import failing_since, first_success_after, gap_after
from ops_platform.drills.model import Checked, Confidence, Done, Measured, Sample
from ops_platform.drills.registry import Context, does
from ops_platform.drills.steps.basics import measure, moment_of
from ops_platform.drills.steps.injection import After
from ops_platform.inventory.values import Id

_TOLD = 20  # runs of numbers that are named in a sentence; the check's detail has all


class Outage(After):
    """Of `writes.outage`."""

    writer: Id = Field(description="The probe that wrote.")
    promoted: Id | None = Field(default=None, description="The step that waited for another one to take over.")


@does("writes.outage", "measure", given=Outage)
def outage(context: Context, given: Outage) -> Done:
    """From the injection to the first write that was acknowledged after it; and detection, promotion and the errors in between."""
    at = moment_of(context.fact(given.injected, "at"))
    samples = after_recovery(context, given.writer, at)
    gap = gap_after(samples, at)
    if gap is None:
        how = "no attempt failed after the injection"
        return Done(how, {"errors": 0}, measured=(measure(context, 0.0, how),))
    first = first_success_after(samples, gap.began)
    back = None if first is None else (first - at).total_seconds()
    failed = sum(not sample.ok for sample in samples if sample.at >= at - timedelta(seconds=1))
    found = [measure(context, back, "from the injection to the first acknowledged write after the outage")]
    found.append(
        _named("first_error", (gap.began - at).total_seconds(), "from the injection to the first attempt that failed")
    )
    found.append(_named("write_gap", gap.seconds, "the outage as the writer had it"))
    found.append(count("errors", failed, "attempts that failed"))
    if given.promoted is not None:
        facts = context.results[given.promoted].facts
        for name, key in (("detection", "missed_at"), ("promotion", "promoted_at")):
            if key in facts:
                seconds = (moment_of(facts[key]) - at).total_seconds()
                found.append(_named(name, seconds, "by the other servers, asked every 50 ms", Confidence.BOUND))
    return Done(
        f"{back:.2f} s without a write" if back is not None else "writes never came back", measured=tuple(found)
    )


def _named(name: str, seconds: float, how: str, confidence: Confidence = Confidence.MEASURED) -> Measured:
    return Measured(name=name, value=round(max(0.0, seconds), 3), how=how, confidence=confidence)


def after_recovery(context: Context, writer: str, at: datetime) -> Sequence[Sample]:
    """The probe's samples once it has written again for a second, so that what hung is known, too."""
    until = time.monotonic() + 60

    def settled() -> bool:
        samples = context.samples(writer)
        good = [s for s in samples if s.ok and s.at > at + timedelta(seconds=1)]
        return (len(good) >= 10 and failing_since(samples) is None) or time.monotonic() > until

    context.wait(settled, every=0.2)
    return context.samples(writer)


class Lost(After):
    """Of checks for lost writes."""

    writer: Id = Field(description="The probe that wrote.")
    most: int = Field(
        default=0, ge=0, description="Acknowledged writes that may be lost: 0 with synchronous replication."
    )


@dataclass(frozen=True)
class Attempted:
    """What a writer tried. `acknowledged`: by number, when the attempt began. `unanswered`: the numbers of those that failed: whether they
    were written nobody knows before it is looked."""

    acknowledged: Mapping[int, datetime]
    unanswered: frozenset[int]


def attempted(context: Context, given: Lost) -> Attempted:
    """Once the probe writes again."""
    at = moment_of(context.fact(given.injected, "at"))
    samples = [s for s in after_recovery(context, given.writer, at) if s.n is not None]
    return Attempted(
        {s.n: s.at for s in samples if s.ok and s.n is not None},
        frozenset(s.n for s in samples if not s.ok and s.n is not None),
    )


def lost_of(tried: Attempted, there: Collection[int], given: Lost, query: str) -> Done:
    """The check, and as rpo the time from the first to the last write that is lost. Ask what is there after what was tried.

    A write without an answer is no loss, whether it is there or not: nobody was told that it is.
    """
    acknowledged, held = tried.acknowledged, set(there)
    lost, unsure = sorted(acknowledged.keys() - held), sorted(tried.unanswered & held)
    said = f"{len(lost)} of {len(acknowledged)} acknowledged writes are lost{f': {ranges_told(lost)}' if lost else ''}"
    if tried.unanswered:
        said += f"; of {len(tried.unanswered)} without an answer {len(unsure)} are there"
    seconds = (max(acknowledged[n] for n in lost) - min(acknowledged[n] for n in lost)).total_seconds() if lost else 0.0
    numbers = (
        Measured(name="rpo", value=round(seconds, 3), how=f"{len(lost)} acknowledged writes were lost"),
        count("lost", len(lost), "acknowledged writes that are not there"),
        count("unknown", len(unsure), "writes that are there, and whose acknowledgement never came"),
    )
    check = Checked(
        title="Acknowledged writes are there", holds=len(lost) <= given.most, query=query, result=said,
        detail={"lost": ranges(lost)},
    )  # fmt: skip
    facts = {"acknowledged": len(acknowledged), "lost": len(lost), "unsure": len(unsure)}
    return Done(said, facts, (check,), numbers)


def ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run without a hole. `numbers` in their order."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        first = found.pop()[0] if found and found[-1][1] == n - 1 else n
        found.append((first, n))
    return found


def ranges_told(numbers: Sequence[int]) -> str:
    runs = ranges(numbers)
    said = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_TOLD]]
    return ", ".join(said + ([f"and {len(runs) - _TOLD} more runs"] if len(runs) > _TOLD else []))


def count(name: str, value: int, how: str) -> Measured:
    return Measured(name=name, value=float(value), unit="", how=how)
