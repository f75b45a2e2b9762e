"""The verdict over a drill, its findings and its scorecard, from what stands in the platform's database.

FAIL: a look found something wrong, a step failed, an objective was missed, or something that was to go is still there. COULD_NOT_VERIFY:
it was broken off, or something could not be looked at or measured. PASS: all of it was tried, and held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from ops_platform import __version__
from ops_platform.clock import Clock
from ops_platform.counting import duration
from ops_platform.drills import forecast
from ops_platform.drills.availability import probe_card
from ops_platform.drills.model import (
    AnswerCard,
    CheckCard,
    Confidence,
    Drill,
    DrillCard,
    DrillState,
    Ending,
    FindingCard,
    Measured,
    ObjectiveCard,
    ResourceCard,
    StackPart,
    StepCard,
    StepRecord,
    StepState,
    finding_key,
)
from ops_platform.drills.runbook import AnyStep, Probe, Runbook, runbook_of
from ops_platform.drills.store import Store
from ops_platform.drills.store.findings import Wrong
from ops_platform.drills.workspace import drills_of
from ops_platform.recovery.model import Verdict

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

# Facts of steps that belong to the whole.
_VERSION, _BACKUP, _TARGET, _REACHED, _STACK = "versions", "backup", "recovery_target", "reached", "stack"


def judge(access: Access, store: Store, held: Drill, actor: str, clock: Clock) -> Drill:
    """Write findings and scorecard, and end the drill. Done twice it is done once."""
    book, records = runbook_of(held), store.steps(held.id)
    card = _card(access, store, held, book, records, clock)
    wrong, sound = _wrong(held, card), _sound(held, card)
    owner, due = _owner(access, held), clock.now() + _due(access, held)
    found = store.found(held, wrong, sound, owner=owner, due=due, actor=actor)
    findings = [
        FindingCard(id=f.id, title=f.title, detail=f.detail, owner=f.owner, due=f.due, new=new) for f, new in found
    ]
    card = card.model_copy(update={"findings": findings})
    store.ledger.append("drill.scorecard", held.subject, card.model_dump(mode="json"), actor=actor)
    return store.move(
        held,
        DrillState.ENDED,
        actor=actor,
        ended_at=card.ended_at,
        verdict=card.verdict,
        reason=card.reason,
        card=card.model_dump(mode="json"),
    )


def _card(
    access: Access, store: Store, held: Drill, book: Runbook, records: Mapping[str, StepRecord], clock: Clock
) -> DrillCard:
    order = book.steps_for(held.mode)
    measured = _measured(order, records)
    objectives = [
        _objective(name, held, measured, f"{asked.name}: {records[asked.id].said}")
        for name in ("rto", "rpo")
        if (asked := _asked(order, name)) is not None
    ]
    checks = [
        CheckCard(step=step.id, **check.model_dump()) for step in order for check in records[step.id].checks
    ]  # fmt: skip
    critical = _critical(order, book, held, records)
    steps = [_step(step, records[step.id], held, step.id in critical) for step in order]
    teardown = [
        ResourceCard(kind=r.kind, name=r.name, kept=r.keep, gone=r.gone_at is not None, left=r.left)
        for r in store.resources(held.id)
    ]
    probes = [
        probe_card(step, store.samples(held.id, step.id), held.started_at) for step in order if isinstance(step, Probe)
    ]
    verdict, reason = _verdict(held, steps, checks, objectives, teardown)
    facts = [records[step.id].facts for step in order]
    subject = access.inventory.subject(held.subject)
    return DrillCard(
        drill=held.id, plan=held.plan, runbook=held.runbook, runbook_sha256=held.body_sha256, title=book.title,
        scenario=held.scenario, mode=held.mode, trigger=held.trigger, operator=held.operator, approved_by=held.approved_by,
        target=held.subject, environment=held.environment, classification=subject.classification.value,
        parameters=dict(held.parameters), verdict=verdict.value, ending=held.ending.value if held.ending else "",
        reason=reason, started_at=held.started_at, ended_at=clock.now(),
        versions={"ops_platform": __version__} | {k: v for f in facts for k, v in f.get(_VERSION, {}).items()},
        backups=[f[_BACKUP] for f in facts if _BACKUP in f],
        recovery_target=next((f[_TARGET] for f in facts if _TARGET in f), None),
        reached=next((f[_REACHED] for f in facts if f.get(_REACHED)), None),
        objectives=objectives, measured=measured, steps=steps, probes=probes, checks=checks, teardown=teardown,
        answers=[
            AnswerCard(step=a.step, who=a.who, at=a.at, text=a.text, evidence=dict(a.evidence))
            for a in store.answers(held.id).values()
        ],
        findings=[], notes=_notes(held, book, records), forecast=forecast.checked(store, held, measured),
        stack=[StackPart.model_validate(part) for f in facts for part in f.get(_STACK, ())],
        plan_digest=held.digest, written_by=f"ops_platform {__version__}",
    )  # fmt: skip


def _measured(order: Sequence[AnyStep], records: Mapping[str, StepRecord]) -> list[Measured]:
    """What the steps measured; where several measured the same, each says which step it was."""
    found = [(step, m) for step in order for m in records[step.id].measured]
    times = Counter(m.name for _, m in found)
    return [m.model_copy(update={"how": f"{step.name}: {m.how}"}) if times[m.name] > 1 else m for step, m in found]


def _asked(order: Sequence[AnyStep], name: str) -> AnyStep | None:
    return next((step for step in order if step.kind == "measure" and step.is_ == name), None)


def _objective(name: str, held: Drill, measured: Sequence[Measured], unmeasured: str) -> ObjectiveCard:
    """Of several measures of one name the worst counts. `unmeasured`: what became of the step that was to measure it."""
    promised = held.objectives.get(name, 0.0)
    known = [m for m in measured if m.name == name and m.value is not None]
    if not known:
        why = next((m.how for m in measured if m.name == name), unmeasured)
        return ObjectiveCard(
            name=name, objective=promised, measured=None, met=None, confidence=Confidence.UNKNOWN, how=why
        )
    worst = max(known, key=lambda m: m.value or 0.0)
    value = worst.value or 0.0
    met = value <= promised if name in held.objectives else None
    # A bound that is kept is a kept promise; one that is not says nothing.
    if met is False and worst.confidence is Confidence.BOUND:
        met = None
    return ObjectiveCard(
        name=name, objective=promised, measured=value, met=met, confidence=worst.confidence.value, how=worst.how
    )


def _step(step: AnyStep, record: StepRecord, held: Drill, critical: bool) -> StepCard:
    seconds, objective = record.seconds, step.objective
    begun = None if record.started_at is None else (record.started_at - held.started_at).total_seconds()
    promised = objective.total_seconds() if objective else None
    return StepCard(
        id=step.id, kind=step.kind, title=step.name, does=step.does, state=record.state.value, attempts=record.attempts,
        started=None if begun is None else round(begun, 3), seconds=None if seconds is None else round(seconds, 3),
        objective_seconds=promised, met=None if promised is None or seconds is None else seconds <= promised,
        said=record.said, needs=sorted(step.needs), critical=critical,
    )  # fmt: skip


def _critical(
    order: Sequence[AnyStep], book: Runbook, held: Drill, records: Mapping[str, StepRecord]
) -> frozenset[str]:
    """The steps of the longest way through the graph: what to make faster, to be faster. Teardown does not count."""
    longest: dict[str, tuple[float, str | None]] = {}
    ids = [step for step in order if step.kind != "teardown"]
    for step in ids:
        before = max(
            ((longest[need][0], need) for need in book.needs_of(step, held.mode) if need in longest),
            default=(0.0, None),
        )
        longest[step.id] = (before[0] + (records[step.id].seconds or 0.0), before[1])
    here: str | None = max(longest, key=lambda name: longest[name][0], default=None)
    way: set[str] = set()
    while here is not None:
        way.add(here)
        here = longest[here][1]
    return frozenset(way)


def _verdict(
    held: Drill,
    steps: Sequence[StepCard],
    checks: Sequence[CheckCard],
    objectives: Sequence[ObjectiveCard],
    teardown: Sequence[ResourceCard],
) -> tuple[Verdict, str]:
    left = [f"{r.kind} {r.name} is still there: {r.left}" for r in teardown if not r.gone and not r.kept]
    undone = [f"{s.title}: {s.said}" for s in steps if s.kind == "teardown" and s.state != StepState.DONE]
    bad = [f"{c.title}: {c.result}" for c in checks if c.holds is False]
    missed = [
        f"{o.name.upper()} of {duration(o.measured or 0.0)}, {duration(o.objective)} at most were promised"
        for o in objectives
        if o.met is False
    ]
    if left or undone:
        return Verdict.FAIL, "the teardown failed: " + "; ".join(left + undone)
    if bad or missed:
        return Verdict.FAIL, "; ".join(bad + missed)
    if held.ending is Ending.FAILED:
        return Verdict.FAIL, held.reason
    if held.ending is not Ending.COMPLETED:
        return Verdict.COULD_NOT_VERIFY, held.reason
    open_ones = [f"{c.title}: {c.result}" for c in checks if c.holds is None]
    open_ones += [f"{o.name.upper()}: {o.how}" for o in objectives if o.met is None]
    if open_ones:
        return Verdict.COULD_NOT_VERIFY, "; ".join(open_ones)
    late = sum(step.met is False for step in steps)
    tail = f"; {late} steps took longer than they should" if late else ""
    good = sum(c.holds is True for c in checks)
    looks = {0: "every step is done; none looks at data or servers", 1: "1 look, a good one"}
    return Verdict.PASS, looks.get(good, f"{good} looks, all of them good") + tail


def _wrong(held: Drill, card: DrillCard) -> list[Wrong]:
    """What becomes a finding. Its key is what was looked at, so that a later drill can say that it is gone."""
    return [
        Wrong(finding_key(held.runbook, held.subject, what), title, detail) for what, title, detail in _troubles(card)
    ]


def _troubles(card: DrillCard) -> Iterator[tuple[str, str, str]]:
    for check in card.checks:
        if check.holds is not True:
            how = "does not hold" if check.holds is False else "could not be looked at"
            yield f"check/{check.step}/{check.title}", f"{check.title}: {how}", check.result
    for objective in card.objectives:
        if objective.met is False:
            text = f"{duration(objective.measured or 0.0)}, {duration(objective.objective)} at most were promised; {objective.how}"
            yield f"objective/{objective.name}", f"{objective.name.upper()} is missed", text
    if card.ending == Ending.FAILED:
        for step in card.steps:
            if step.state == StepState.FAILED and step.kind != "teardown" and not _has_check(card, step.id):
                yield f"step/{step.id}", f"{step.title}: it failed", step.said
    for step in card.steps:
        if step.met is False:
            text = f"it took {duration(step.seconds or 0.0)}, {duration(step.objective_seconds or 0.0)} are meant"
            yield f"slow/{step.id}", f"{step.title}: too slow", text
    left = [f"{r.kind} {r.name}: {r.left}" for r in card.teardown if not r.gone and not r.kept]
    left += [f"{s.title}: {s.said}" for s in card.steps if s.kind == "teardown" and s.state != StepState.DONE]
    if left:
        yield "teardown", "The teardown failed", "; ".join(left)


def _has_check(card: DrillCard, step: str) -> bool:
    return any(check.step == step and check.holds is not True for check in card.checks)


def _sound(held: Drill, card: DrillCard) -> list[str]:
    """Keys of what was looked at and held. What was not looked at stays open."""
    found = [f"check/{check.step}/{check.title}" for check in card.checks if check.holds is True]
    found += [f"objective/{o.name}" for o in card.objectives if o.met is True]
    found += [f"step/{s.id}" for s in card.steps if s.state == StepState.DONE]
    found += [f"slow/{s.id}" for s in card.steps if s.met is True]
    if all(r.gone or r.kept for r in card.teardown) and not any(
        s.kind == "teardown" and s.state != StepState.DONE for s in card.steps
    ):
        found.append("teardown")
    return [finding_key(held.runbook, held.subject, what) for what in found]


def _owner(access: Access, held: Drill) -> str:
    plan = next((p for p in drills_of(access).plan if p.id == held.plan), None)
    return (plan.owner if plan else None) or access.inventory.subject(held.subject).owner


def _due(access: Access, held: Drill) -> timedelta:
    plan = next((p for p in drills_of(access).plan if p.id == held.plan), None)
    return plan.findings_due if plan else timedelta(days=30)


def _notes(held: Drill, book: Runbook, records: Mapping[str, StepRecord]) -> list[str]:
    notes = [str(note) for record in records.values() for note in record.facts.get("notes", ())]
    again = [r.step for r in records.values() if r.attempts > 1 and book.step(r.step).kind != "human"]
    if again:
        notes.append(f"taken more than once, so their times hold the earlier attempts: {', '.join(again)}")
    return notes


def card_of(drill: Drill) -> DrillCard | None:
    return DrillCard.model_validate(drill.card) if drill.card is not None else None


def spent(store: Store, subject: str, since: datetime) -> list[tuple[datetime, float]]:
    """For how long each drill of a target since then kept users out, by its probes."""
    found: list[tuple[datetime, float]] = []
    for drill in store.list(subject=subject, since=since, ended=True):
        card = card_of(drill)
        if card is not None and drill.ended_at is not None:
            # Several probes see the same outage: the worst of them is what users had.
            seconds = max((p.unavailable_seconds for p in card.probes if p.counts), default=0.0)
            found.append((drill.ended_at, seconds))
    return found


def facts_of(records: Mapping[str, StepRecord], name: str) -> list[Any]:
    return [record.facts[name] for record in records.values() if name in record.facts]
