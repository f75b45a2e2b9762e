"""Everything that something depends on, restored from its newest backups in the order of the dependencies that the inventory declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from ops_platform.drills.model import Checked, Confidence, Done, Resource
from ops_platform.drills.registry import Context, Remover, does, removes
from ops_platform.drills.stack import advice, critical_path, needed_by
from ops_platform.drills.steps.basics import measure
from ops_platform.errors import CouldNotVerifyError, OpsError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Id
from ops_platform.recovery.model import Scorecard, Verdict

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed

T = TypeVar("T")
_HOLDS = {Verdict.PASS: True, Verdict.FAIL: False, Verdict.COULD_NOT_VERIFY: None}


class Stack(Strict):
    """Of steps that are about all that the subject depends on."""

    without: str = Field(default="", description="Ids that are left out, with a comma between; the record names them.")

    @property
    def left_out(self) -> frozenset[str]:
        return frozenset(one.strip() for one in self.without.split(",") if one.strip())


@dataclass(frozen=True)
class _Order:
    """`kept`: what is restored, in order; `needs`: what each needs of it; `skipped`: what is not, and why."""

    kept: list[str]
    needs: dict[str, list[str]]
    skipped: dict[str, str]


def _order(context: Context, given: Stack) -> _Order:
    """What is skipped hands on what it needs itself."""
    inventory = context.access.inventory
    needs = {one.id: list(one.depends_on) for one in (*inventory.targets, *inventory.systems)}
    whole = needed_by(context.subject.id, needs)
    skipped = {name: "left out by whoever holds the drill" for name in whole if name in given.left_out}
    for name in whole:
        if name not in skipped and (why := _lacking(context.access, name)):
            skipped[name] = why
    kept = [name for name in whole if name not in skipped]
    through = {name: needed_by(name, needs)[:-1] for name in whole}
    return _Order(kept, {name: [need for need in through[name] if need in kept] for name in whole}, skipped)


def _lacking(access: Access, name: str) -> str | None:
    """What this machine lacks to restore it; None where it can be tried."""
    from ops_platform.backup.engine import open_engine
    from ops_platform.clients.postgres_binaries import need_postgres
    from ops_platform.inventory.model import Target
    from ops_platform.stores.kind import open_kind

    try:
        target = access.inventory.backed(name)
        major = open_engine(access, target).list()[-1].server_version // 10_000 if isinstance(target, Target) else 0
    except (OpsError, IndexError):
        return None  # whether there is a backup is looked at elsewhere
    try:
        if isinstance(target, Target):
            need_postgres(major, target.sandbox.postgres.values())
        else:
            open_kind(access, target).need_programs()
    except CouldNotVerifyError as error:
        return error.what
    return None


@does("stack.order", "check", given=Stack)
def order(context: Context, given: Stack) -> Done:
    """Everything that the subject depends on has a backup, and is in an order in which it can be restored. What this machine lacks the program
    for is skipped, and the record says so; the subject itself may not be."""
    found = _order(context, given)
    checks = [_has_backup(context.access, name) for name in found.kept]
    if (why := found.skipped.get(context.subject.id)) is not None:
        title = f"{context.subject.id} itself is restored"
        checks.append(Checked(title=title, holds=None, query="sandbox of the subject", result=f"skipped: {why}"))
    notes = [f"skipped, so nothing is proven of it: {name} ({why})" for name, why in found.skipped.items()]
    return Done("; ".join([" → ".join(found.kept), *notes]), {"order": found.kept, "notes": notes}, tuple(checks))


def _has_backup(access: Access, name: str) -> Checked:
    from ops_platform.backup.opening import open_target_repository

    title, query = f"{name} has a backup", f"ops backup list {name}"
    try:
        found = open_target_repository(access, access.inventory.backed(name)).finished()
    except OpsError as error:
        return Checked(title=title, holds=None, query=query, result=error.line)
    return Checked(title=title, holds=bool(found), query=query, result=found[-1] if found else "none")


class Restoring(Stack):
    """Of `stack.restore`."""

    at_once: int = Field(default=1, ge=1, le=16, description="How many are restored side by side at most.")


@does(
    "stack.restore", "act", given=Restoring,
    changes=lambda given: f"sandboxes, {given.at_once} at a time at most, which go again",
)  # fmt: skip
def restore(context: Context, given: Restoring) -> Done:
    """The newest backup of each into its sandbox, looked at as in a verification, once all that it needs has been; side by side where nothing
    depends on one another, as many as may be at once. One that cannot be restored does not keep the others from their turn."""
    found = _order(context, given)
    inventory = context.access.inventory
    began = context.clock.monotonic()
    kept = {name: found.needs[name] for name in found.kept}
    ended = in_turn(kept, given.at_once, lambda name: _restored(context, name, found.needs[name], began))
    parts = [ended[name][0] for name in found.kept]
    checks = [ended[name][1] for name in found.kept]
    good = sum(check.holds is True for check in checks)
    said = f"{good} of {len(parts)} were restored and looked at, in {context.clock.monotonic() - began:.1f} s"
    said += f" with up to {given.at_once} side by side" if given.at_once > 1 else ""
    said += f"; skipped, and not proven: {', '.join(found.skipped)}" if found.skipped else ""
    skipped = [
        {"target": name, "kind": inventory.subject(name).kind, "needs": found.needs[name], "verdict": "SKIPPED", "seconds": None, "said": why}
        for name, why in found.skipped.items()
    ]  # fmt: skip
    facts = {"parts": parts, "skipped": skipped, "versions": {part["target"]: part["server"] for part in parts}}
    return Done(said, facts, tuple(checks))


def in_turn(needs: Mapping[str, Sequence[str]], at_once: int, work: Callable[[str], T]) -> dict[str, T]:
    """Each when all that it needs has ended. Where one raises, those that have begun come to their end, and no other begins."""
    turns = TopologicalSorter(needs)
    turns.prepare()
    outcomes: Queue[tuple[dict[str, T], str, Exception | None]] = Queue()
    ready, running, ended = list[str](), set[str](), dict[str, T]()
    failed: Exception | None = None

    def run(name: str) -> None:
        try:
            outcomes.put(({name: work(name)}, name, None))
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            outcomes.put(({}, name, error))

    while running or (failed is None and turns.is_active()):
        ready += turns.get_ready()
        while failed is None and ready and len(running) < at_once:
            running.add(name := ready.pop(0))
            Thread(target=run, args=[name], name=f"restore {name}", daemon=True).start()
        found, name, error = outcomes.get()
        running.remove(name)
        ended |= found
        failed = failed or error
        turns.done(name)
    if failed is not None:
        raise failed
    return ended


def _restored(context: Context, name: str, needs: list[str], since: float) -> tuple[dict[str, Any], Checked]:
    """`began`: seconds after the first of all."""
    began = context.clock.monotonic()
    context.alive()
    target = context.access.inventory.backed(name)
    register_sandbox(context, target)
    card = _verified(context.access, target)
    took = context.clock.monotonic() - began
    return {**part_of(target, card, needs, took), "began": round(began - since, 3)}, look_of(name, card, took)


def _served(card: Scorecard) -> float | None:
    return next((o.measured_seconds for o in card.objectives if o.name == "rto"), None)


def part_of(target: Backed, card: Scorecard, needs: list[str], took: float) -> dict[str, Any]:
    """What the critical path is made of. `seconds`: until it served; `took`: with everything that was looked at."""
    served = _served(card)
    return {
        "target": target.id, "kind": target.kind, "needs": needs, "verdict": card.verdict.value,
        "seconds": None if served is None else round(served, 3), "took": round(took, 3), "said": card.reason,
        "backup": card.backup_id, "server": card.server,
    }  # fmt: skip


def look_of(name: str, card: Scorecard, took: float) -> Checked:
    served = _served(card)
    serving = "it never served" if served is None else f"serving after {served:.1f} s"
    said = f"{card.reason}; {card.backup_id or 'no backup'}; {serving}, looked at after {took:.1f} s"
    title = f"{name} is restored and looked at"
    return Checked(title=title, holds=_HOLDS[card.verdict], query=f"ops backup verify {name}", result=said)


def register_sandbox(context: Context, target: Backed) -> None:
    """Before its backup is restored: a worker that is killed leaves the sandbox's directory, and what was restored elsewhere."""
    context.register("sandbox", target.id)


def _clear_sandbox(access: Access, resource: Resource) -> None:
    from ops_platform.inventory.model import Target
    from ops_platform.recovery.sandbox import clear_dead
    from ops_platform.stores.kind import open_kind
    from ops_platform.stores.verify import elsewhere

    target = access.inventory.backed(resource.name)
    clear_dead(target, elsewhere=None if isinstance(target, Target) else elsewhere(open_kind(access, target)))


def _sandbox_left(access: Access, resource: Resource) -> str | None:
    from ops_platform.recovery.sandbox import homes_left

    left = homes_left(access.inventory.backed(resource.name))
    return f"{', '.join(map(str, left))} exists" if left else None


removes("sandbox", Remover(_clear_sandbox, _sandbox_left))


def _verified(access: Access, target: Backed) -> Scorecard:
    """Without the live one, where its kind can be looked at alone."""
    from ops_platform.inventory.model import Target

    if isinstance(target, Target):
        from ops_platform.recovery.verify import verify

        return verify(access, target, pick="newest", alone=True)
    from ops_platform.stores.verify import verify as verify_store

    return verify_store(access, target, pick="newest")


class Path(Strict):
    """Of `stack.critical_path`."""

    restored: Id = Field(description="The step that restored everything.")


@does("stack.critical_path", "measure", given=Path)
def path(context: Context, given: Path) -> Done:
    """The longest way through the dependencies, with the time of each until it served: what to make faster, to be faster as a whole."""
    parts: list[dict[str, Any]] = context.fact(given.restored, "parts")
    needs = {part["target"]: part["needs"] for part in parts}
    seconds = {part["target"]: part["seconds"] for part in parts if part["seconds"] is not None}
    way = critical_path([part["target"] for part in parts], needs, seconds)
    whole = len(seconds) == len(parts)
    if whole:
        said = advice(way, context.held.objectives.get("rto"))
    else:
        said = f"it never served, so there is no time of the whole: {', '.join(sorted(needs.keys() - seconds.keys()))}"
    skipped: list[dict[str, Any]] = context.results[given.restored].facts.get("skipped", [])
    if skipped:
        said += f". Skipped, and not in it: {', '.join(part['target'] for part in skipped)}"
    stack = [_shown(part, way.starts, way.gains if whole else {}) for part in parts]
    stack += [_shown(part, {part["target"]: 0.0}, {}) for part in skipped]
    found = measure(context, way.seconds if whole else None, said, Confidence.MEASURED)
    return Done(said, {"stack": stack}, measured=(found,))


def _shown(part: Mapping[str, Any], starts: Mapping[str, float], gains: Mapping[str, float]) -> dict[str, Any]:
    name = part["target"]
    gain = round(gains[name], 3) if name in gains else None
    kept = {key: part[key] for key in ("target", "kind", "needs", "verdict", "seconds", "said")}
    return {**kept, "starts": round(starts[name], 3), "critical": name in gains, "gain": gain}
