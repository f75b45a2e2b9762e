"""A PostgreSQL cluster that Patroni keeps: whether it is fit, its primary killed, frozen or cut off, a switchover, and what users had of it.

What is broken is broken on this machine (see `injection`), so the drill runs where the primary does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from ops_platform.clients.http import HttpApi
from ops_platform.clients.listeners import listens
from ops_platform.clients.postgres import asking
from ops_platform.clients.processes import Process
from ops_platform.clients.wires import wires_of
from ops_platform.drills.askers import TABLE
from ops_platform.drills.model import Checked, Done
from ops_platform.drills.registry import Context, NothingGiven, does
from ops_platform.drills.steps.basics import moment_of
from ops_platform.drills.steps.clocks import clocks_agree
from ops_platform.drills.steps.injection import (
    After,
    Server,
    children,
    cut_server,
    freeze,
    frozen_before,
    kill_server,
    noted,
    thaw,
    waited,
)
from ops_platform.drills.steps.leaders import TwoLeaders
from ops_platform.drills.steps.writes import Lost, attempted, lost_of
from ops_platform.errors import CouldNotVerifyError, OpsError, UnreachableError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Duration, Id, Size

_LEADS = ("leader", "standby_leader")
_SYNCHRONOUS = ("sync_standby", "quorum_standby")
_FOLLOWS = ("replica", *_SYNCHRONOUS)
_RUNS = ("running", "streaming")  # Patroni 3 says running of a replica, later ones streaming


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
            said.append(f"{api.host}: {_why_not(api, error)}")
    raise UnreachableError(f"no Patroni of {context.target.id} says who leads: {'; '.join(said)}")


def _why_not(api: HttpApi, error: OpsError) -> str:
    """It asks its store for the cluster, and nobody for its own state."""
    try:
        _word(api)
    except OpsError:
        return error.what
    return "it answers, and does not reach its store (etcd, Consul, ...), which may have lost its quorum"


class Fit(Strict):
    """Of `patroni.fit`."""

    replicas: int = Field(default=1, ge=1, description="So many must be fit to take over.")
    most_lag: Size = Field(default=1 << 20, description="A replica that is further behind is not fit.")
    most_skew: Duration = Field(
        default=timedelta(seconds=5),
        description="A server whose clock is further from ours is named, and refuses the drill.",
    )


@does("patroni.fit", "check", given=Fit)
def fit(context: Context, given: Fit) -> Done:
    """One leads, and enough replicas could take over: running, on its timeline, not behind, not kept from it by their tags, synchronous where one has to be."""
    try:
        found, synchronous = cluster_of(context), _is_synchronous(context)
    except OpsError as error:
        return Done(error.what, checks=(_check("A replica is fit to take over", None, error.line),))
    leader, words = found.leader, _words(context)
    unfit = {str(m.get("name")): why for m in found.replicas if (why := _unfit(m, leader, given.most_lag, synchronous))}
    fine = [m for m in found.replicas if str(m.get("name")) not in unfit]
    checks = (
        _check("One member leads", leader is not None, found.said()),
        _check("One member says itself that it leads", len(words.leaders) == 1, _by_itself(words), "GET /patroni"),
        _check("Patroni is not paused", not found.paused, "paused" if found.paused else "not paused"),
        _check(
            "A replica is fit to take over", len(fine) >= given.replicas,
            f"{len(fine)} of {len(found.replicas)}; {'; '.join(f'{name}: {why}' for name, why in unfit.items()) or 'all are'}",
        ),
        clocks_agree(context, given.most_skew),
    )  # fmt: skip
    return Done(found.said(), {"members": [dict(m) for m in found.members]}, checks)


def _by_itself(words: Words) -> str:
    if words.leaders:
        return words.said
    return f"none does, so what its store says is old: it may have lost its quorum ({words.said})"


def _unfit(member: Mapping[str, Any], leader: Mapping[str, Any] | None, most_lag: int, synchronous: bool) -> str | None:
    """Why it could not take over. What is not known makes it unfit. After a change of leaders Patroni takes a while to choose who is synchronous."""
    tags, lag = member.get("tags") or {}, member.get("lag")
    if member.get("state") not in _RUNS:
        return f"it is {member.get('state')}"
    if leader is None or member.get("timeline") != leader.get("timeline"):
        return f"it is on timeline {member.get('timeline')}"
    if tags.get("nofailover"):
        return "its tag nofailover keeps it from it"
    if not isinstance(lag, int) or lag > most_lag:
        return f"it is {lag} bytes behind"
    if synchronous and member.get("role") not in _SYNCHRONOUS:
        return "it is not synchronous, and Patroni lets no other take over"
    return None


def _check(title: str, holds: bool | None, result: str, query: str = "GET /cluster") -> Checked:
    return Checked(title=title, holds=holds, query=query, result=result)


# Breaking the primary


def _led(context: Context) -> Mapping[str, Any]:
    leader, words = cluster_of(context).leader, _words(context)
    if leader is None:
        raise CouldNotVerifyError("nobody leads the cluster, so there is no primary to break", where=context.target.id)
    if len(words.leaders) != 1:
        raise CouldNotVerifyError(
            f"not one alone says itself that it leads: {_by_itself(words)}", where=context.target.id
        )
    return leader


def _where(member: Mapping[str, Any]) -> dict[str, Any]:
    """What later steps have to know of the old primary."""
    parts = urlsplit(str(member["api_url"]))
    url = f"{parts.scheme}://{parts.netloc}"
    place = {"host": member["host"], "port": member["port"]}
    return {"member": member["name"], **place, "url": url, "timeline": member.get("timeline")}


def primary(context: Context) -> Server:
    """Raises CouldNotVerifyError where not one alone leads, and UnreachableError."""
    member = _led(context)
    return Server(str(member["name"]), str(member["host"]), int(member["port"]), _where(member))


def _processes(where: Mapping[str, Any]) -> tuple[Process, Process]:
    """Its Patroni and its postmaster. Raises what `listens` raises."""
    api = urlsplit(where["url"])
    return listens(api.hostname or "", api.port or (443 if api.scheme == "https" else 80)), listens(
        str(where["host"]), int(where["port"])
    )


class Breakable(Strict):
    """Of `patroni.breakable`."""

    how: Literal["kill", "freeze", "cut"] = Field(description="What is going to be done to it.")


@does("patroni.breakable", "check", given=Breakable)
def breakable(context: Context, given: Breakable) -> Done:
    """The primary runs on this machine, where it can be killed, frozen with its Patroni, or cut off from the network alone."""
    title, query = "The primary can be broken from here", "/proc of this machine"
    try:
        server = primary(context)
        found = list(_processes(server.facts)) if given.how == "freeze" else [listens(server.host, server.port)]
        wires = wires_of(found[-1].pid) if given.how == "cut" else []
    except OpsError as error:
        return Done(error.what, checks=(_check(title, None, error.line, query),))
    said = f"{server.name}: {', '.join(f'process {one.pid}' for one in found)}"
    said += f" behind {', '.join(wire.name for wire in wires)}" if wires else ""
    return Done(said, checks=(_check(title, True, said, query),))


@does("patroni.kill_primary", "inject", changes=lambda _given: "kill -9 of the primary's postmaster")
def kill_primary(context: Context, given: NothingGiven) -> Done:
    """kill -9 of the primary's postmaster, on this machine. Whether it died is looked at; that it follows again is the teardown's."""

    def killable() -> Server:
        server = primary(context)
        return replace(server, facts={**server.facts, "began": _began(context, server.facts["url"])[1]})

    return kill_server(context, killable)


@does(
    "patroni.freeze_primary",
    "inject",
    changes=lambda _given: "SIGSTOP of the primary with its Patroni, as a host that hangs",
)
def freeze_primary(context: Context, given: NothingGiven) -> Done:
    """SIGSTOP of the primary, of all its processes and of its Patroni, on this machine: a host that hangs, and keeps its connections."""
    if (done := frozen_before(context)) is not None:
        return done
    member = _led(context)
    facts = _where(member) | {"at": context.clock.now().isoformat()}
    patroni, postmaster = _processes(facts)
    processes = [patroni, postmaster, *children(postmaster.pid)]
    word = f"{member['name']} of {context.target.id}"
    context.register("frozen", word, facts, processes=[[p.pid, p.started] for p in processes])
    facts["at"] = context.clock.now().isoformat()
    # The postmaster stands still before its children are counted again: it makes none any more.
    freeze([[p.pid, p.started] for p in processes])
    everything = [[p.pid, p.started] for p in (*processes, *children(postmaster.pid))]
    context.register("frozen", word, facts, processes=everything)
    freeze(everything)
    return Done(f"{member['name']} hangs", facts)


@does("patroni.cut_primary", "inject", changes=lambda _given: "the primary's own network is unplugged")
def cut_primary(context: Context, given: NothingGiven) -> Done:
    """The network namespace of the primary, on this machine, is unplugged: it goes on, and reaches nobody, and nobody reaches it."""
    return cut_server(context, lambda: primary(context))


# What comes after


@does("patroni.new_primary", "wait_until", given=After)
def new_primary(context: Context, given: After) -> Done:
    """Until another member leads, by the word of those that were not broken. When the old one was missed, and when the new one led.

    Raises CouldNotVerifyError where the old one, killed, was started again in its place.
    """
    old, url = context.fact(given.injected, "member"), context.fact(given.injected, "url")
    seen: dict[str, Any] = {}

    def led() -> tuple[bool, str]:
        try:
            found = cluster_of(context, but=url)
        except UnreachableError as error:
            return False, error.what
        now = context.clock.now().isoformat()
        if found.leader is not None and found.leader.get("name") == old:
            _still_dead(context, context.results[given.injected].facts)
        if found.leader is None or found.leader.get("name") != old:
            seen.setdefault("missed_at", now)
        if found.leader is not None and found.leader.get("name") != old:
            seen.update(promoted_at=now, member=found.leader["name"])
        return "member" in seen, found.said()

    waited(context, led, every=0.05)
    return Done(f"{seen['member']} leads", seen)


def _still_dead(context: Context, injected: Mapping[str, Any]) -> None:
    """Asked of a server that was killed alone: one that hangs would not answer, and keep us."""
    if injected.get("began") is None:
        return
    leads, began = _began(context, injected["url"])
    if leads and began not in (None, injected["began"]):
        raise CouldNotVerifyError(
            "the primary that was killed leads again, and nobody took over: Patroni started it in its place",
            where=str(injected["member"]), remedy="primary_start_timeout: 0 makes Patroni fail over at once",
        )  # fmt: skip


def _began(context: Context, url: str) -> tuple[bool, str | None]:
    """Whether it leads, and since when its server runs, by its own word: a moment of its clock, so it is compared with others of it alone."""
    api = next((a for a in context.access.patroni(context.target) if a.url == url), None)
    if api is not None:
        with contextlib.suppress(UnreachableError):
            said = _word(api)
            leads = said.get("role") in ("primary", "master") and said.get("state") == "running"
            return leads, said.get("postmaster_start_time")
    return False, None


@does("postgres.lost_writes", "check", given=Lost)
def lost_writes(context: Context, given: Lost) -> Done:
    """Every number that was acknowledged stands in the table of whoever leads now. One that stands there unacknowledged is no loss."""
    tried = attempted(context, given)
    target, query = context.target, f"select n from {TABLE} where drill = %s"
    with asking(context.access.postgres(target, role="primary"), target.id) as connection:
        there = [row[0] for row in connection.execute(query, [context.held.id]).fetchall()]
    return lost_of(tried, there, given, query)


class Rejoined(After):
    """Of `patroni.rejoined`."""

    promoted: Id = Field(description="The step that waited for the new primary.")
    full_copy: bool = Field(default=False, description="Whether the old primary may come back by a copy of everything.")
    most_two_leaders: Duration = Field(
        default=timedelta(0), description="For how long two may lead at once, once the old primary is back."
    )


@does("patroni.rejoined", "wait_until", given=Rejoined)
def rejoined(context: Context, given: Rejoined) -> Done:
    """What hung goes on, and what was cut off is plugged in; then until one member leads and every other one follows it, on its timeline. Looked
    at are who leads, for how long two did, and how the old primary came back: by pg_rewind, by a copy of everything, or as it was."""
    old, new = context.fact(given.injected, "member"), context.fact(given.promoted, "member")
    two = TwoLeaders(context, lambda: [str(state["api"]) for state in _words(context).leaders])
    thaw(context)

    def whole() -> tuple[bool, str]:
        two.look()
        return _all_follow(context)

    said = waited(context, whole, every=0.05)
    leader = cluster_of(context).leader
    leads = Checked(
        title="The old primary follows", holds=None if leader is None else leader["name"] != old, query="GET /cluster",
        result=f"{leader['name'] if leader else 'nobody'} leads; {new} had taken over from {old}",
    )  # fmt: skip
    checks = (leads, two.check(given.most_two_leaders), _how_it_came(context, given))
    return Done(said, checks=checks, measured=(two.measured(),))


def _how_it_came(context: Context, given: Rejoined) -> Checked:
    """By the label of a backup that its recovery began from: pg_rewind and pg_basebackup both write one, and a start renames it."""
    title, query = "The old primary came back without a copy of everything", "backup_label.old in its data directory"
    since = moment_of(context.fact(given.injected, "at")).timestamp()
    try:
        postmaster = listens(str(context.fact(given.injected, "host")), int(context.fact(given.injected, "port")))
        label = Path(f"/proc/{postmaster.pid}/cwd/backup_label.old")  # a postmaster stands in its data directory
        made = label.exists() and label.stat().st_mtime >= since
        lines = dict(line.split(": ", 1) for line in label.read_text().splitlines() if ": " in line) if made else {}
    except (OpsError, OSError) as error:
        result = error.line if isinstance(error, OpsError) else str(error)
        return Checked(title=title, holds=None, query=query, result=result)
    method, begin = lines.get("BACKUP METHOD"), lines.get("START WAL LOCATION", "").partition(" ")[0]
    match method:
        case None:
            holds, said = True, "as it was: it had nothing that the new timeline does not have"
        case "pg_rewind":
            holds, said = True, f"by pg_rewind, with the WAL of the new timeline from {begin} on"
        case _:
            holds, said = given.full_copy, f"by a copy of everything ({method}), from {begin} on"
    return Checked(title=title, holds=holds, query=query, result=said)


@does("patroni.whole", "teardown")
def whole(context: Context, given: NothingGiven) -> Done:
    """Until one member leads and every other one follows it, with a synchronous one among them where commits wait for one."""
    thaw(context)
    return Done(waited(context, lambda: _is_whole(context)))


def _is_whole(context: Context) -> tuple[bool, str]:
    follow, said = _all_follow(context)
    try:
        chosen = any(m.get("role") in _SYNCHRONOUS for m in cluster_of(context).replicas) or not _is_synchronous(
            context
        )
    except OpsError as error:
        return False, f"{said}; {error}"
    return follow and chosen, said if chosen else f"{said}; no replica is synchronous yet"


@dataclass(frozen=True)
class Words:
    """Each member's own word, and the leader's of who streams from it: what Patroni's store says of one that hung is old."""

    states: Sequence[Mapping[str, Any]]

    @property
    def leaders(self) -> list[Mapping[str, Any]]:
        return [s for s in self.states if s.get("role") in ("primary", "master") and s.get("state") in _RUNS]

    def missed(self, names: Collection[str]) -> list[str]:
        """The members to which nobody streams: neither the leader nor (the tag replicatefrom) another one.

        Patroni gives each member's connection the member's name, and by it they are told apart: a WAL receiver of ours, Debezium and
        pg_receivewal stand among the senders, too. PostgreSQL cuts the name off at 63 bytes.
        """
        senders = [r for s in self.states for r in s.get("replication", ())]
        streams = {r.get("application_name") for r in senders if r.get("state") == "streaming"}
        return [name for name in names if name[:63] not in streams]

    def all_follow(self, names: Collection[str]) -> bool:
        """`names`: every member but the leader, as Patroni's store lists them: it may not know one yet that comes back."""
        if len(self.leaders) != 1:
            return False
        (leader,), others = self.leaders, [s for s in self.states if s is not self.leaders[0]]
        follow = all(s.get("state") in _RUNS and s.get("timeline") == leader.get("timeline") for s in others)
        return follow and len(names) >= len(others) and not self.missed(names)

    @property
    def said(self) -> str:
        return "; ".join(
            f"{s['api']}: {s.get('role')}, {s.get('state')}, timeline {s.get('timeline')}" for s in self.states
        )


def _word(api: HttpApi) -> Mapping[str, Any]:
    """Of one member about itself."""
    return api.request("GET", "/patroni", timeout=2.0, good=(200, 503)).json()


def _words(context: Context) -> Words:
    states: list[Mapping[str, Any]] = []
    for api in context.access.patroni(context.target):
        try:
            states.append({**_word(api), "api": api.host})
        except OpsError as error:
            states.append({"api": api.host, "state": error.what})
    return Words(tuple(states))


def _all_follow(context: Context) -> tuple[bool, str]:
    words = _words(context)
    try:
        names = [str(m.get("name")) for m in cluster_of(context).members if m.get("role") not in _LEADS]
    except UnreachableError as error:
        return False, f"{words.said}; {error.what}"
    missed = words.missed(names)
    return words.all_follow(names), f"{words.said}; nobody streams to {', '.join(missed)}" if missed else words.said


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
    before = noted(context)
    if before is None:
        leader = _led(context)
        wanted = _fittest(context, leader, wanted)
        context.register(
            "injected", f"{context.step.id}: {leader['name']} to {wanted}", **_where(leader), at=context.clock.now().isoformat(),
            to=wanted,
        )  # fmt: skip
        before = noted(context)
        assert before is not None  # noqa: S101 - registered above
    old, new, at = before.detail["member"], before.detail["to"], before.detail["at"]
    if (leader := cluster_of(context).leader) is not None and leader["name"] == old:
        apis = context.access.patroni(context.target)
        api = next((a for a in apis if a.url == before.detail["url"]), apis[0])  # any member takes it
        body = {"leader": old, "candidate": new}
        with contextlib.suppress(UnreachableError):  # it answers when it is done, which may be later than we listen
            api.request("POST", "/switchover", body=body, good=(200, 202))

    def led() -> bool:
        with contextlib.suppress(UnreachableError):
            found = cluster_of(context)
            return found.leader is not None and found.leader["name"] == new and _all_follow(context)[0]
        return False

    context.wait(led, every=0.1)
    return Done(f"{new} leads in place of {old}", {**before.detail, "from": old, "to": new, "at": at})


def _fittest(context: Context, leader: Mapping[str, Any], wanted: str) -> str:
    """The one that is wanted, where it may. Raises what `alive` raises while Patroni, with synchronous replication, has chosen none."""
    synchronous = _is_synchronous(context)
    fine = _fine(context, leader, synchronous)

    def chosen() -> bool:
        fine[:] = _fine(context, leader, synchronous)
        return bool(fine)

    if synchronous:
        context.wait(chosen, every=0.2)
    if not fine:
        raise CouldNotVerifyError("no replica is fit to lead", where=context.target.id)
    return str(min(fine, key=lambda m: (m["name"] != wanted, m.get("lag", 0)))["name"])


def _fine(context: Context, leader: Mapping[str, Any], synchronous: bool) -> list[Mapping[str, Any]]:
    return [m for m in cluster_of(context).replicas if _unfit(m, leader, 1 << 20, synchronous) is None]


def _is_synchronous(context: Context) -> bool:
    """By the first member that answers. Raises UnreachableError where none does."""
    for api in context.access.patroni(context.target):
        with contextlib.suppress(UnreachableError):
            return bool(api.request("GET", "/config", timeout=2.0).json().get("synchronous_mode"))
    raise UnreachableError(f"no Patroni of {context.target.id} answers")
