"""A PostgreSQL cluster that Patroni keeps: whether it is fit, its primary killed or frozen, a switchover, and what users had of it.

What is broken is broken on this machine: a process is found by the port on which it listens, so the drill runs where the primary does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from ops_platform.clients.postgres import asking
from ops_platform.clients.processes import Process, identify
from ops_platform.drills.availability import failing_since, first_success_after, gap_after
from ops_platform.drills.model import Checked, Confidence, Done, Measured, Sample
from ops_platform.drills.probing import TABLE
from ops_platform.drills.registry import Context, NothingGiven, Remover, does, removes
from ops_platform.drills.steps.basics import measure, moment_of
from ops_platform.errors import CouldNotVerifyError, OpsError, UnreachableError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Id, Size

_LEADS = ("leader", "standby_leader")
_FOLLOWS = ("replica", "sync_standby", "quorum_standby")
_RUNS = ("running", "streaming")  # Patroni 3 says running of a replica, later ones streaming
_DIES_WITHIN = 10.0


@dataclass(frozen=True)
class Cluster:
    """What Patroni says, by one of its members."""

    members: Sequence[Mapping[str, Any]]
    paused: bool

    @property
    def leader(self) -> Mapping[str, Any] | None:
        return next((m for m in self.members if m.get("role") in _LEADS and m.get("state") in _RUNS), None)

    @property
    def replicas(self) -> list[Mapping[str, Any]]:
        return [m for m in self.members if m.get("role") in _FOLLOWS]

    def said(self) -> str:
        return "; ".join(
            f"{m.get('name')}: {m.get('role')}, {m.get('state')}, timeline {m.get('timeline')}, lag {m.get('lag', 0)}"
            for m in self.members
        )


def cluster_of(context: Context, *, but: str = "") -> Cluster:
    """By the first member that answers, but for the one of this address. Raises UnreachableError where none does."""
    said: list[str] = []
    for api in context.access.patroni(context.target):
        if but and api.url == but:
            continue
        try:
            found = api.request("GET", "/cluster", timeout=2.0).json()
            return Cluster(tuple(found.get("members", ())), bool(found.get("pause")))
        except OpsError as error:
            said.append(error.what)
    raise UnreachableError(f"no Patroni of {context.target.id} answers: {'; '.join(said)}")


class Fit(Strict):
    """Of `patroni.fit`."""

    replicas: int = Field(default=1, ge=1, description="So many must be fit to take over.")
    most_lag: Size = Field(default=1 << 20, description="A replica that is further behind is not fit.")


@does("patroni.fit", "check", given=Fit)
def fit(context: Context, given: Fit) -> Done:
    """One leads, and enough replicas could take over: running, on its timeline, not behind, not kept from it by their tags."""
    try:
        found = cluster_of(context)
    except OpsError as error:
        return Done(error.what, checks=(_check("A replica is fit to take over", None, str(error)),))
    leader = found.leader
    unfit = {str(m.get("name")): why for m in found.replicas if (why := _unfit(m, leader, given.most_lag))}
    fine = [m for m in found.replicas if str(m.get("name")) not in unfit]
    checks = (
        _check("One member leads", leader is not None, found.said()),
        _check("Patroni is not paused", not found.paused, "paused" if found.paused else "not paused"),
        _check(
            "A replica is fit to take over", len(fine) >= given.replicas,
            f"{len(fine)} of {len(found.replicas)}; {'; '.join(f'{name}: {why}' for name, why in unfit.items()) or 'all are'}",
        ),
    )  # fmt: skip
    return Done(found.said(), {"members": [dict(m) for m in found.members]}, checks)


def _unfit(member: Mapping[str, Any], leader: Mapping[str, Any] | None, most_lag: int) -> str | None:
    """Why it could not take over. What is not known makes it unfit."""
    tags, lag = member.get("tags") or {}, member.get("lag")
    if member.get("state") not in _RUNS:
        return f"it is {member.get('state')}"
    if leader is None or member.get("timeline") != leader.get("timeline"):
        return f"it is on timeline {member.get('timeline')}"
    if tags.get("nofailover"):
        return "its tag nofailover keeps it from it"
    if not isinstance(lag, int) or lag > most_lag:
        return f"it is {lag} bytes behind"
    return None


def _check(title: str, holds: bool | None, result: str, query: str = "GET /cluster") -> Checked:
    return Checked(title=title, holds=holds, query=query, result=result)


# Breaking the primary


def _led(context: Context) -> Mapping[str, Any]:
    leader = cluster_of(context).leader
    if leader is None:
        raise CouldNotVerifyError("nobody leads the cluster, so there is no primary to break", where=context.target.id)
    return leader


def _where(member: Mapping[str, Any]) -> dict[str, Any]:
    """What later steps have to know of the old primary."""
    parts = urlsplit(str(member["api_url"]))
    url = f"{parts.scheme}://{parts.netloc}"
    return {"member": member["name"], "port": member["port"], "url": url, "timeline": member.get("timeline")}


@does("patroni.kill_primary", "inject", changes=lambda _given: "kill -9 of the primary's postmaster")
def kill_primary(context: Context, given: NothingGiven) -> Done:
    """kill -9 of the primary's postmaster, on this machine. Whether it died is looked at; that it follows again is the teardown's."""
    if (done := _done_before(context)) is not None:
        return done
    member = _led(context)
    process = _listens(int(member["port"]))
    facts = _note(context, member, process)
    os.kill(process.pid, signal.SIGKILL)
    facts |= {"at": context.clock.now().isoformat()}
    deadline = context.clock.monotonic() + _DIES_WITHIN
    while process.alive:
        if context.clock.monotonic() > deadline:
            raise CouldNotVerifyError(
                f"the primary did not die: process {process.pid} is alive", where=str(member["name"])
            )
        context.clock.sleep(0.01)
    return Done(f"{member['name']}: postmaster {process.pid} was killed", facts)


@does(
    "patroni.freeze_primary",
    "inject",
    changes=lambda _given: "SIGSTOP of the primary with its Patroni, as a host that hangs",
)
def freeze_primary(context: Context, given: NothingGiven) -> Done:
    """SIGSTOP of the primary, of all its processes and of its Patroni, on this machine: a host that hangs, and keeps its connections."""
    before = next((r for r in context.store.resources(context.held.id) if r.step == context.step.id), None)
    if before is not None:
        _freeze(before.detail["processes"])
        return Done("an interrupted attempt had done it", {k: v for k, v in before.detail.items() if k != "processes"})
    member = _led(context)
    facts = _where(member) | {"at": context.clock.now().isoformat()}
    patroni, postmaster = _listens(urlsplit(facts["url"]).port or 0), _listens(int(member["port"]))
    processes = [patroni, postmaster, *_children(postmaster.pid)]
    word = f"{member['name']} of {context.target.id}"
    context.register("frozen", word, facts, processes=[[p.pid, p.started] for p in processes])
    facts["at"] = context.clock.now().isoformat()
    # The postmaster stands still before its children are counted again: it makes none any more.
    _freeze([[p.pid, p.started] for p in processes])
    everything = [[p.pid, p.started] for p in (*processes, *_children(postmaster.pid))]
    context.register("frozen", word, facts, processes=everything)
    _freeze(everything)
    return Done(f"{member['name']} hangs", facts)


def _freeze(processes: Sequence[Sequence[int]]) -> None:
    for pid, started in processes:
        if Process(pid, started).alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)


def _note(context: Context, member: Mapping[str, Any], process: Process) -> dict[str, Any]:
    """Before it is killed: an interrupted attempt must not kill the next primary, too."""
    facts = {**_where(member), "at": context.clock.now().isoformat(), "pid": process.pid, "started": process.started}
    context.register("injected", str(member["name"]), facts)
    return facts


def _done_before(context: Context) -> Done | None:
    """What an attempt that was interrupted has done."""
    for resource in context.store.resources(context.held.id):
        if resource.step == context.step.id and resource.kind == "injected":
            process = Process(resource.detail["pid"], resource.detail["started"])
            with contextlib.suppress(ProcessLookupError):
                if process.alive:
                    os.kill(process.pid, signal.SIGKILL)
            return Done("an interrupted attempt had done it", dict(resource.detail))
    return None


def _listens(port: int) -> Process:
    """The process that listens on a port of this machine. Raises CouldNotVerifyError: it is elsewhere, or may not be seen."""
    inodes = set(_listening(port))
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for link in (entry / "fd").iterdir():
                target = str(link.readlink())
                if target.startswith("socket:[") and target[8:-1] in inodes:
                    found = _first_of(int(entry.name), inodes)
                    if found is not None:
                        return found
    raise CouldNotVerifyError(
        f"no process of this machine that we may see listens on port {port}",
        remedy="hold the drill on the primary's machine, as a user who may signal it",
    )


def _first_of(pid: int, inodes: set[str]) -> Process | None:
    """A server's children inherit its socket: the eldest that has it is the one."""
    while True:
        parent = _parent(pid)
        if parent is None or parent <= 1 or not _holds(parent, inodes):
            return identify(pid)
        pid = parent


def _holds(pid: int, inodes: set[str]) -> bool:
    with contextlib.suppress(OSError):
        return any(str(link.readlink())[8:-1] in inodes for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def _listening(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _children(pid: int) -> list[Process]:
    found = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _parent(int(entry.name)) == pid]
    return [process for one in found if (process := identify(one)) is not None]


# A note of what was begun stands among what is made, so that it is written before it is done; there is nothing to take away.
removes("injected", Remover(lambda _access, _resource: None, lambda _access, _resource: None, local=False))


# What comes after


class After(Strict):
    """Of steps that follow an injection."""

    injected: Id = Field(description="The step that broke the primary.")


@does("patroni.new_primary", "wait_until", given=After)
def new_primary(context: Context, given: After) -> Done:
    """Until another member leads, by the word of those that were not broken. When the old one was missed, and when the new one led."""
    old, url = context.fact(given.injected, "member"), context.fact(given.injected, "url")
    seen: dict[str, Any] = {}

    def led() -> bool:
        try:
            found = cluster_of(context, but=url)
        except UnreachableError:
            return False
        now = context.clock.now().isoformat()
        if found.leader is None or found.leader.get("name") != old:
            seen.setdefault("missed_at", now)
        if found.leader is not None and found.leader.get("name") != old:
            seen.update(promoted_at=now, member=found.leader["name"], timeline=found.leader.get("timeline"))
            return True
        return False

    context.wait(led)
    return Done(f"{seen['member']} leads, timeline {seen['timeline']}", seen)


class Outage(After):
    """Of `postgres.outage`."""

    writer: Id = Field(description="The probe that wrote.")
    promoted: Id | None = Field(default=None, description="The step that waited for the new primary.")


@does("postgres.outage", "measure", given=Outage)
def outage(context: Context, given: Outage) -> Done:
    """From the injection to the first write that was acknowledged after it; and detection, promotion and the errors in between."""
    at = moment_of(context.fact(given.injected, "at"))
    samples = _after_recovery(context, given.writer, at)
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
    found.append(Measured(name="errors", value=float(failed), unit="", how="attempts that failed"))
    if given.promoted is not None:
        facts = context.results[given.promoted].facts
        for name, key in (("detection", "missed_at"), ("promotion", "promoted_at")):
            if key in facts:
                seconds = (moment_of(facts[key]) - at).total_seconds()
                found.append(_named(name, seconds, "by the other members, asked every 50 ms", Confidence.BOUND))
    return Done(
        f"{back:.2f} s without a write" if back is not None else "writes never came back", measured=tuple(found)
    )


def _named(name: str, seconds: float, how: str, confidence: Confidence = Confidence.MEASURED) -> Measured:
    return Measured(name=name, value=round(max(0.0, seconds), 3), how=how, confidence=confidence)


def _after_recovery(context: Context, writer: str, at: datetime) -> Sequence[Sample]:
    """The probe's samples once it has written again for a second, so that what hung is known, too."""
    until = time.monotonic() + 60

    def settled() -> bool:
        samples = context.samples(writer)
        good = [s for s in samples if s.ok and s.at > at + timedelta(seconds=1)]
        return (len(good) >= 10 and failing_since(samples) is None) or time.monotonic() > until

    context.wait(settled, every=0.2)
    return context.samples(writer)


class LostWrites(After):
    """Of `postgres.lost_writes`."""

    writer: Id = Field(description="The probe that wrote.")
    most: int = Field(
        default=0, ge=0, description="Acknowledged writes that may be lost: 0 with synchronous replication."
    )


@does("postgres.lost_writes", "check", given=LostWrites)
def lost_writes(context: Context, given: LostWrites) -> Done:
    """Every number that was acknowledged stands in the table of whoever leads now. One that stands there unacknowledged is no loss."""
    at = moment_of(context.fact(given.injected, "at"))
    samples = [s for s in _after_recovery(context, given.writer, at) if s.n is not None]
    acknowledged = {s.n: s.at for s in samples if s.ok and s.n is not None}
    target, query = context.target, f"select n from {TABLE} where drill = %s"
    with asking(context.access.postgres(target, role="primary"), target.id) as connection:
        there = {row[0] for row in connection.execute(query, [context.held.id]).fetchall()}
    lost = sorted(acknowledged.keys() - there)
    unsure = sorted(there - acknowledged.keys())
    said = f"{len(lost)} of {len(acknowledged)} acknowledged writes are lost{f': {lost[:10]}' if lost else ''}"
    said += f"; {len(unsure)} came in whose acknowledgement was lost on the way"
    seconds = (max(acknowledged[n] for n in lost) - min(acknowledged[n] for n in lost)).total_seconds() if lost else 0.0
    rpo = Measured(name="rpo", value=round(seconds, 3), how=f"{len(lost)} acknowledged writes were lost")
    check = Checked(title="Acknowledged writes are there", holds=len(lost) <= given.most, query=query, result=said)
    return Done(said, {"acknowledged": len(acknowledged), "lost": len(lost), "unsure": len(unsure)}, (check,), (rpo,))


class Rejoined(After):
    """Of `patroni.rejoined`."""

    promoted: Id = Field(description="The step that waited for the new primary.")


@does("patroni.rejoined", "wait_until", given=Rejoined)
def rejoined(context: Context, given: Rejoined) -> Done:
    """Until the old primary follows the new one, on its timeline, and has thrown away what nobody else had."""
    old, url = context.fact(given.injected, "member"), context.fact(given.injected, "url")
    said = _waited(context)
    api = next(api for api in context.access.patroni(context.target) if api.url == url)
    role = api.request("GET", "/patroni", timeout=2.0, good=(200, 503)).json().get("role")
    if role in ("primary", "master"):
        raise CouldNotVerifyError(f"{old} leads again: {said}", where=str(old))
    return Done(f"{old} follows")


def _waited(context: Context) -> str:
    """Until one leads and all others follow. Raises what `alive` raises, with what was seen at last."""
    said = ["nothing was seen"]

    def follow() -> bool:
        whole, said[0] = _all_follow(context)
        return whole

    try:
        context.wait(follow, every=0.2)
    except CouldNotVerifyError as error:
        raise CouldNotVerifyError(f"{error.what}: {said[0]}", where=error.where) from None
    return said[0]


@does("patroni.whole", "teardown")
def whole(context: Context, given: NothingGiven) -> Done:
    """Until one member leads and every other one follows it."""
    # What was frozen has to go on first.
    from ops_platform.drills.engine import remove_what_was_made

    remove_what_was_made(context.access, context.store, context.held, kinds=("frozen",))
    return Done(_waited(context))


def _all_follow(context: Context) -> tuple[bool, str]:
    """By each member's own word, and the leader's of who streams from it: what Patroni's store says of one that hung is old."""
    states: list[Mapping[str, Any]] = []
    for api in context.access.patroni(context.target):
        try:
            states.append({"name": api.host, **api.request("GET", "/patroni", timeout=2.0, good=(200, 503)).json()})
        except OpsError as error:
            states.append({"name": api.host, "state": error.what})
    leaders = [s for s in states if s.get("role") in ("primary", "master")]
    others = [s for s in states if s not in leaders]
    said = "; ".join(f"{s['name']}: {s.get('role')}, {s.get('state')}, timeline {s.get('timeline')}" for s in states)
    if len(leaders) != 1 or leaders[0].get("state") != "running":
        return False, said
    streams = [r for r in leaders[0].get("replication", ()) if r.get("state") == "streaming"]
    follow = all(s.get("state") in _RUNS and s.get("timeline") == leaders[0].get("timeline") for s in others)
    return follow and len(streams) >= len(others), said


# Switchover


class Switch(Strict):
    """Of `patroni.switch_over`."""

    to: str = Field(default="", description="The member that is to lead; the fittest where not given.")
    back_from: Id | None = Field(
        default=None, description="An earlier switchover, whose old primary is to lead again if it may."
    )


@does("patroni.switch_over", "act", given=Switch, changes=lambda _given: "another member leads, as planned")
def switch_over(context: Context, given: Switch) -> Done:
    """Tell Patroni to hand over, and wait until the other one leads. Called again it looks first whether that is done."""
    wanted = context.fact(given.back_from, "from") if given.back_from else given.to
    noted = next((r for r in context.store.resources(context.held.id) if r.step == context.step.id), None)
    if noted is None:
        leader = _led(context)
        wanted = _fittest(context, leader, wanted)
        context.register(
            "injected", f"{context.step.id}: {leader['name']} to {wanted}", **_where(leader), at=context.clock.now().isoformat(),
            to=wanted,
        )  # fmt: skip
        noted = next(r for r in context.store.resources(context.held.id) if r.step == context.step.id)
    old, new, at = noted.detail["member"], noted.detail["to"], noted.detail["at"]
    if (leader := cluster_of(context).leader) is not None and leader["name"] == old:
        api = next(a for a in context.access.patroni(context.target) if a.url == noted.detail["url"])
        body = {"leader": old, "candidate": new}
        with contextlib.suppress(UnreachableError):  # it answers when it is done, which may be later than we listen
            api.request("POST", "/switchover", body=body, good=(200, 202))

    def led() -> bool:
        with contextlib.suppress(UnreachableError):
            found = cluster_of(context)
            return found.leader is not None and found.leader["name"] == new and _all_follow(context)[0]
        return False

    context.wait(led, every=0.1)
    return Done(f"{new} leads in place of {old}", {**noted.detail, "from": old, "to": new, "at": at})


def _fittest(context: Context, leader: Mapping[str, Any], wanted: str) -> str:
    """The one that is wanted, where it may: with synchronous replication Patroni hands over to a synchronous replica alone."""
    fine = [m for m in cluster_of(context).replicas if _unfit(m, leader, 1 << 20) is None]
    fine = [m for m in fine if m.get("role") == "sync_standby"] or fine
    if not fine:
        raise CouldNotVerifyError("no replica is fit to lead", where=context.target.id)
    return str(min(fine, key=lambda m: (m["name"] != wanted, m.get("lag", 0)))["name"])
