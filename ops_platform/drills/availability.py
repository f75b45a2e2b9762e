"""From a probe's attempts to what users had: outages, availability, detection, the first write. Pure.

An outage begins when the first attempt that failed began, and ends when the next one that succeeded had its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import median, quantiles

from ops_platform.drills.model import Outage, ProbeCard, Sample
from ops_platform.drills.runbook import Probe


@dataclass(frozen=True)
class Gap:
    """`ended` None: it went on when the probe ended. `failed`: attempts in it."""

    began: datetime
    ended: datetime | None
    failed: int
    last: datetime  # the end of the last attempt in it

    @property
    def seconds(self) -> float:
        return ((self.ended or self.last) - self.began).total_seconds()


def gaps(samples: Iterable[Sample]) -> list[Gap]:
    """The outages, in the order of time. `samples` in the order in which the attempts began."""
    found: list[Gap] = []
    began: datetime | None = None
    last: datetime | None = None
    failed = 0
    for sample in samples:
        answered = sample.at + timedelta(milliseconds=sample.ms)
        if sample.ok and began is not None:
            found.append(Gap(began, answered, failed, max(last or answered, answered)))
            began = None
        elif not sample.ok:
            if began is None:
                began, failed, last = sample.at, 0, answered
            failed, last = failed + 1, max(last or answered, answered)
    if began is not None and last is not None:
        found.append(Gap(began, None, failed, last))
    return found


def unavailable_seconds(samples: Sequence[Sample]) -> float:
    return sum(gap.seconds for gap in gaps(samples))


def failing_since(samples: Sequence[Sample]) -> datetime | None:
    """Since when nothing but failures was seen; None where the last attempt succeeded."""
    found = gaps(samples)
    return found[-1].began if found and found[-1].ended is None else None


def gap_after(samples: Sequence[Sample], moment: datetime) -> Gap | None:
    """The longest outage that began after the moment, or went on then."""
    after = [gap for gap in gaps(samples) if (gap.ended or gap.last) >= moment]
    return max(after, key=lambda gap: gap.seconds, default=None)


def first_success_after(samples: Sequence[Sample], moment: datetime) -> datetime | None:
    """When the first attempt that began at the moment or later had a good answer."""
    answered = [s.at + timedelta(milliseconds=s.ms) for s in samples if s.ok and s.at >= moment]
    return min(answered, default=None)


def resolution_ms(samples: Sequence[Sample]) -> float | None:
    """The 99th percentile of the time between the beginnings of two attempts."""
    apart = [(b.at - a.at).total_seconds() * 1000 for a, b in pairwise(samples)]
    if len(apart) < 2:
        return apart[0] if apart else None
    return round(quantiles(apart, n=100)[98], 1)


def watched(samples: Sequence[Sample]) -> Sequence[Sample]:
    """From the first good answer on. Before it the probe itself was starting, which the drill waits for: users had no outage then.

    Where there was none, all of it: nobody saw the target well.
    """
    return samples[next((number for number, sample in enumerate(samples) if sample.ok), 0) :]


def probe_card(step: Probe, attempts: Sequence[Sample], began: datetime) -> ProbeCard:
    samples = watched(attempts)
    found = gaps(samples)
    good = [sample.ms for sample in samples if sample.ok]
    return ProbeCard(
        step=step.id,
        does=step.does,
        counts=step.counts,
        attempts=len(samples),
        failed=sum(not sample.ok for sample in samples),
        unavailable_seconds=round(sum(gap.seconds for gap in found), 3),
        longest_seconds=round(max((gap.seconds for gap in found), default=0.0), 3),
        resolution_ms=resolution_ms(samples),
        median_ms=round(median(good), 2) if good else None,
        outages=[
            Outage(began=_after(gap.began, began), ended=_after(gap.ended, began) if gap.ended else None)
            for gap in found
        ],
        errors=dict(Counter(sample.error or "unknown" for sample in samples if not sample.ok)),
        began=_after(samples[0].at, began) if samples else None,
        ended=_after(max(s.at + timedelta(milliseconds=s.ms) for s in samples), began) if samples else None,
    )


def _after(moment: datetime, began: datetime) -> float:
    return round((moment - began).total_seconds(), 3)
