"""Playbooks for Redis: give memory back, end clients that cannot keep up, hand a shard over to a replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

from pydantic import Field, model_validator

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.redis import SLOTS, Member, Redis
from ops_platform.clock import wait_until
from ops_platform.errors import ConflictError, NotThereError, OpsError, RefusedError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.systems import RedisSystem
from ops_platform.inventory.values import PositiveDuration, Size
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Done, Playbook

T = TypeVar("T")
NODE, CLIENT, SHARD = "node", "client", "shard"
_SETTLES = 10.0  # seconds until what was done shows
_MOVED = {Outcome.APPLIED, Outcome.ALREADY_DONE}
_TOPOLOGY = ("in a cluster also +cluster|nodes", "on sentinels +sentinel|get-master-addr-by-name +sentinel|replicas")


def _redis(context: Context[Any]) -> Redis:
    return context.access.redis(context.access.inventory.system(context.subject.id, RedisSystem))


def _serving(members: Sequence[Member]) -> list[Member]:
    """Whom to ask. What the others hold for down is not asked; what is not and does not answer is an error."""
    up = [member for member in members if not member.down]
    return sorted(up, key=lambda member: (member.role == "master", member.address))  # replicas first


def _down(members: Sequence[Member]) -> list[str]:
    return [member.address for member in members if member.down]


# Memory


class Memory(Strict):
    at_least: Size = Field(
        default=64 << 20, description="Only where the allocator keeps this many bytes that nothing uses."
    )


@dataclass
class PurgeMemory:
    """`actions.Action`: MEMORY PURGE, one server after the other. What it can give back is jemalloc's resident, inactive pages."""

    context: Context[Memory]
    name = "redis.purge_memory"

    def __post_init__(self) -> None:
        self._redis = _redis(self.context)
        self._seen: dict[str, int] = {}

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def plan(self) -> Plan:
        members = self._redis.members()
        servers = _serving(members)
        self._seen = {member.address: self._kept(member.address) for member in servers}
        least = self.context.parameters.at_least
        changes = [
            Change(NODE, address, f"keeps {least} bytes or more that nothing uses", "gives them back", reversible=False)
            for address, kept in self._seen.items()
            if kept >= least
        ]
        facts = {"kept_bytes": dict(self._seen), "down": _down(members)}
        return Plan(
            self.name,
            self.target_id,
            tuple(changes),
            self.context.clock.now(),
            population={NODE: len(servers)},
            facts=facts,
        )

    def check(self, change: Change) -> Applied | None:
        kept = self._kept(change.object)
        self._seen[change.object] = kept
        if kept < self.context.parameters.at_least:
            return Applied(Outcome.ALREADY_DONE, f"it keeps {kept} bytes by now")
        return None

    def apply(self, change: Change) -> Applied:
        with self._redis.at(change.object) as session:
            session.call("MEMORY", "PURGE")
        return Applied(Outcome.APPLIED, "purged")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By INFO memory, which the server brings up to date ten times a second."""
        checks = [
            self._gave(change.object) for change in plan.changes if outcomes[change.object].outcome is Outcome.APPLIED
        ]
        return Verification(tuple(checks) or (Check("memory", True, "nothing was purged"),))

    def _gave(self, address: str) -> Check:
        before, seconds = self._seen[address], _SETTLES
        gave = wait_until(lambda: self._kept(address) < before, clock=self.context.clock, seconds=seconds)
        return Check(f"memory of {address}", gave, f"kept {before} bytes, and {self._kept(address)} afterwards")

    def _kept(self, address: str) -> int:
        with self._redis.at(address) as session:
            memory = session.info("memory")
        if not memory.get("mem_allocator", "").startswith("jemalloc"):
            raise RefusedError(
                f"its allocator is {memory.get('mem_allocator', 'not known')}: a purge does nothing there",
                where=address,
            )
        return max(0, int(memory["allocator_resident"]) - int(memory["allocator_active"]))


class PurgeMemoryPlaybook(Playbook[Memory]):
    name = "redis.purge_memory"
    title = "Purge Redis's memory"
    kinds = frozenset({"redis"})
    what = (
        "Has the allocator give back to the operating system what it keeps and nothing uses, with MEMORY PURGE: replicas first, "
        "one server after the other, only where there is enough of it."
    )
    why_safe = "No data is touched; only memory that is in no use goes back."
    blast_radius = "A server answers nobody while it purges: milliseconds, up to a few hundred with many gigabytes."
    rights = ("+info +memory|purge", *_TOPOLOGY)
    Parameters = Memory

    def action(self, context: Context[Memory]) -> Action:
        return PurgeMemory(context)


# Clients


class SlowClients(Strict):
    output: Size | None = Field(
        default=64 << 20, description="A client whose unread answers take up more bytes than this."
    )
    idle: PositiveDuration | None = Field(
        default=None, description="Or one that has asked nothing for longer than this."
    )
    pubsub: bool = Field(
        default=False, description="Whether subscribers are ended too: what they miss meanwhile is lost."
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.output is None and self.idle is None:
            raise ValueError("give output, idle or both")
        return self


@dataclass
class EvictClients:
    """`actions.Action`: CLIENT KILL by id and address. Replicas and links to masters are never among them."""

    context: Context[SlowClients]
    name = "redis.evict_slow_clients"

    def __post_init__(self) -> None:
        self._redis = _redis(self.context)

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def plan(self) -> Plan:
        members = self._redis.members()
        changes: list[Change] = []
        sizes: dict[str, str] = {}
        population = 0
        for member in _serving(members):
            with self._redis.at(member.address) as session:
                own = str(session.call("CLIENT", "ID"))
                clients = [one for one in session.clients() if one["id"] != own and self._is_client(one)]
            population += len(clients)
            for one in clients:
                if self._is_slow(one):
                    change = self._change(member.address, one)
                    changes.append(change)
                    sizes[change.object] = f"{one['omem']} bytes unread, idle {one['idle']} s"
        facts = {"clients": sizes, "down": _down(members)}
        return Plan(
            self.name,
            self.target_id,
            tuple(changes),
            self.context.clock.now(),
            population={CLIENT: population},
            facts=facts,
        )

    def check(self, change: Change) -> Applied | None:
        found = self._look(change)
        if found is None:
            return Applied(Outcome.ALREADY_DONE, "it has gone")
        if not self._is_client(found) or not self._is_slow(found):
            return Applied(Outcome.CONTENDED, "it is not slow any more")
        return None

    def apply(self, change: Change) -> Applied:
        server, number = change.object.split(" client ")
        kind = "PUBSUB" if change.detail["subscriber"] else "NORMAL"
        with self._redis.at(server) as session:
            killed = session.call(
                "CLIENT", "KILL", "ID", number, "ADDR", change.before["address"], "TYPE", kind, "SKIPME", "YES"
            )
        return (
            Applied(Outcome.APPLIED, "its connection is closed")
            if killed
            else Applied(Outcome.ALREADY_DONE, "it has gone")
        )

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        checks = [self._gone(change) for change in plan.changes if outcomes[change.object].outcome in _MOVED]
        return Verification(tuple(checks) or (Check("clients", True, "none was ended"),))

    def _gone(self, change: Change) -> Check:
        gone = wait_until(lambda: self._look(change) is None, clock=self.context.clock, seconds=_SETTLES)
        return Check(change.object, gone, "the server does not list it" if gone else "the server still lists it")

    def _look(self, change: Change) -> dict[str, str] | None:
        """Another connection than the planned one never has both its id and its address."""
        server, number = change.object.split(" client ")
        with self._redis.at(server) as session:
            found = [one for one in session.clients("ID", number) if one["addr"] == change.before["address"]]
        return found[0] if found else None

    def _is_client(self, one: Mapping[str, str]) -> bool:
        """S: a replica, M: a master's link; P: a subscriber, which does not ask and is not idle for that."""
        flags = set(one["flags"])
        return not flags & {"S", "M"} and ("P" not in flags or self.context.parameters.pubsub)

    def _is_slow(self, one: Mapping[str, str]) -> bool:
        given, flags = self.context.parameters, set(one["flags"])
        if given.output is not None and int(one["omem"]) > given.output:
            return True
        # b: it waits in a blocking command, P and O: it listens. That is no idleness.
        waits = bool(flags & {"b", "P", "O"})
        return given.idle is not None and not waits and int(one["idle"]) > given.idle.total_seconds()

    def _change(self, server: str, one: Mapping[str, str]) -> Change:
        before = {"address": one["addr"], "user": one.get("user", "")}
        detail = {"subscriber": "P" in one["flags"]}
        return Change(CLIENT, f"{server} client {one['id']}", before, None, reversible=False, detail=detail)


class EvictSlowClients(Playbook[SlowClients]):
    name = "redis.evict_slow_clients"
    title = "Evict slow clients of Redis"
    kinds = frozenset({"redis"})
    what = (
        "Closes the connections of clients that do not read their answers, whose buffers take the memory of the data, and where the "
        "rule says so of those that have long asked nothing."
    )
    why_safe = "Replicas are never touched, subscribers only where the rule says so; a client library connects again by itself."
    blast_radius = "The clients that are named lose their connection and whatever they had asked and not read."
    rights = ("+info +client|id +client|list +client|kill", *_TOPOLOGY)
    Parameters = SlowClients

    def action(self, context: Context[SlowClients]) -> Action:
        return EvictClients(context)


# A shard


class Shard(Strict):
    master: str = Field(description="The master that hands over: host:port, or its node id in a cluster.")
    to: str | None = Field(default=None, description="cluster: the replica, host:port, that takes over.")
    max_lag: Size = Field(
        default=1 << 20, description="A replica that is behind by more bytes than this does not take over."
    )
    within: PositiveDuration = Field(default=timedelta(seconds=30), description="It has taken over by then.")


@dataclass(frozen=True)
class _Stand:
    """A shard as it is now. `lags`: of each replica, in bytes; None where it is not linked to the master, or does not answer."""

    master: Member
    lags: Mapping[str, int | None]

    def ready(self, most: int) -> list[str]:
        return sorted(address for address, lag in self.lags.items() if lag is not None and lag <= most)


@dataclass
class Failover:
    """`actions.Action`: one master hands over to one of its replicas, while both live.

    In a cluster the two agree on the moment, and no write is lost. Sentinel makes the switch without the old master, and chooses the
    replica itself: `to` is then a condition. A master that is dead is no matter of this: cluster and sentinels elect by themselves.
    """

    context: Context[Shard]
    master: str
    to: str | None = None
    name = "redis.failover_shard"

    def __post_init__(self) -> None:
        self._redis = _redis(self.context)

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def plan(self) -> Plan:
        members = self._members()
        master = _find(members, self.master)
        population = {SHARD: sum(member.role == "master" for member in members)}
        if master.role != "master":
            return Plan(self.name, self.target_id, (), self.context.clock.now(), population)
        self._need_whole()
        stand = self._stand(members, master)
        to = self._choose(stand)
        change = Change(SHARD, master.address, {"master": master.address}, {"master": to}, reversible=True)
        facts = {"lag_bytes": dict(stand.lags), "down": _down(members)}
        return Plan(self.name, self.target_id, (change,), self.context.clock.now(), population, facts)

    def check(self, change: Change) -> Applied | None:
        members = self._members()
        master = _find(members, change.object)
        if master.role != "master":
            now = {member.address for member in members if member.role == "master"}
            if now & set(change.after["master"]):
                return Applied(Outcome.ALREADY_DONE, "another one is master already")
            return Applied(Outcome.CONTENDED, "it is not master any more, and none that was planned is")
        self._need_whole()
        ready = self._stand(members, master).ready(self.context.parameters.max_lag)
        if not set(ready) & set(change.after["master"]):
            return Applied(Outcome.REFUSED, "no replica that was planned is near enough any more")
        return None

    def apply(self, change: Change) -> Applied:
        to, seconds = change.after["master"], self.context.parameters.within.total_seconds()
        if self._redis.mode == "sentinel":
            self._tell_sentinel(change.object, seconds)
            done = wait_until(lambda: self._now_master(change.object) in to, clock=self.context.clock, seconds=seconds)
        else:
            with self._redis.at(to[0]) as session:
                session.call("CLUSTER", "FAILOVER")
            done = wait_until(lambda: self._is_master(to[0]), clock=self.context.clock, seconds=seconds)
        if not done:
            return Applied(Outcome.FAILED, f"no replica took over within {seconds:g} s; the old master goes on")
        # The old one learns of it a moment later, and until then says of itself that it is master still.
        wait_until(lambda: self._now_master(change.object) in to, clock=self.context.clock, seconds=seconds)
        return Applied(Outcome.APPLIED, f"{self._now_master(change.object)} has taken over")

    def _tell_sentinel(self, old: str, seconds: float) -> None:
        """It asks each server every ten seconds: of a replica that has just become fit it may not have heard yet.

        Told to, it asks no other sentinel before it makes another master: whether they still agree is looked at each time.
        """
        refused: list[ConflictError] = []

        def told() -> bool:
            self._need_whole()
            if (now := self._redis.agreed_master()) != old:
                raise ConflictError(f"{now} is master by now", where=old)
            try:
                self._redis.sentinel("FAILOVER", self._redis.master)
            except ConflictError as error:
                if "NOGOODSLAVE" not in error.what:
                    raise
                refused.append(error)
                return False
            return True

        if not wait_until(told, clock=self.context.clock, seconds=seconds):
            raise refused[-1]

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By what the others say: the sentinels, or every node of the cluster that is up; and by what both servers say of themselves."""
        moved = [change for change in plan.changes if outcomes[change.object].outcome in _MOVED]
        seconds = self.context.parameters.within.total_seconds()
        checks: list[Check] = []
        for change in moved:

            def good(change: Change = change) -> bool:
                checks[:] = self._looks(change)
                return all(check.holds for check in checks)

            wait_until(good, clock=self.context.clock, seconds=seconds)
        return Verification(tuple(checks) or (Check("shard", True, "nothing was switched"),))

    # Looking

    def _members(self) -> list[Member]:
        if self._redis.mode == "single":
            raise RefusedError(
                "a single server has nobody who could take over by itself", where=self.target_id,
                remedy="run it under Sentinel or as a cluster, and say so in the inventory (mode)",
            )  # fmt: skip
        members = self._redis.members()
        if self._redis.mode == "sentinel" and (agreed := self._redis.agreed_master()) != members[0].address:
            raise ConflictError(
                f"a sentinel named {members[0].address} as master, and all name {agreed} by now",
                where=self.target_id, remedy="a failover was on its way: try again",
            )  # fmt: skip
        return members

    def _need_whole(self) -> None:
        """Raises RefusedError where whoever decides cannot: too few sentinels, or a cluster without some of its slots."""
        if self._redis.mode == "sentinel":
            try:
                self._redis.sentinel("CKQUORUM", self._redis.master)
            except ConflictError as error:
                raise RefusedError(
                    f"the sentinels cannot agree: {error.what}", where=error.where, remedy=error.remedy
                ) from None
            return
        state = self._redis.cluster()
        if state["cluster_state"] != "ok" or int(state["cluster_slots_ok"]) != SLOTS:
            raise RefusedError(
                f"the cluster is not whole: state {state['cluster_state']}, {state['cluster_slots_ok']} of {SLOTS} slots served",
                where=self.target_id, remedy="let it come to rest, or look at the nodes that failed",
            )  # fmt: skip

    def _stand(self, members: Sequence[Member], master: Member) -> _Stand:
        """The replicas are asked before the master: a lag is never taken for less than it is."""
        offsets: dict[str, int | None] = {}
        for member in members:
            if member.role == "replica" and member.master == master.address:
                offsets[member.address] = self._offset(member.address)
        with self._redis.at(master.address) as session:
            said = session.replication()
        if said.role != "master":
            raise RefusedError(
                "it does not say itself that it is master", where=master.address, remedy="wait until it is settled"
            )
        return _Stand(
            master, {address: None if at is None else max(0, said.offset - at) for address, at in offsets.items()}
        )

    def _offset(self, address: str) -> int | None:
        """By its own word: for some seconds after a failover the others may still hold it for down."""
        try:
            with self._redis.at(address) as session:
                said = session.replication()
        except OpsError:
            return None
        return said.offset if said.role == "replica" and said.link_up and said.priority > 0 else None

    def _choose(self, stand: _Stand) -> list[str]:
        """Who takes over: the first by address that is near enough, so that a plan stays the same while the lags move.

        Under Sentinel any replica may, and those are named.
        """
        ready = stand.ready(self.context.parameters.max_lag)
        if self._redis.mode == "sentinel" and self.to is not None and set(stand.lags) != {self.to}:
            raise RefusedError(
                f"Sentinel would choose among {', '.join(sorted(stand.lags))}, and {self.to} is wanted",
                where=self.target_id,
            )
        wanted = [address for address in ready if self.to in (None, address)]
        if not wanted:
            lags = ", ".join(
                f"{address}: {'no link' if lag is None else f'{lag} bytes'}" for address, lag in stand.lags.items()
            )
            raise RefusedError(
                f"no replica is near enough to take over ({lags or 'there is none'})", where=stand.master.address,
                remedy="wait until a replica is in sync, or raise max_lag if that loss is worth it",
            )  # fmt: skip
        return sorted(stand.lags) if self._redis.mode == "sentinel" else wanted[:1]

    def peers(self) -> Peers:
        members = self._members()
        stand = self._stand(members, _find(members, self.master))
        return Peers(len(stand.ready(self.context.parameters.max_lag)), len(stand.lags), "replicas in sync")

    def _is_master(self, address: str) -> bool:
        with self._redis.at(address) as session:
            return session.replication().role == "master"

    def _now_master(self, old: str) -> str:
        """Who has what the old one had: in a cluster its own master, now that it follows."""
        if self._redis.mode == "sentinel":
            return self._redis.members()[0].address
        return _find(self._redis.members(), old).master or "nobody that it knows"

    def _looks(self, change: Change) -> list[Check]:
        return [*self._look_from_outside(change), self._look_at_old(change)]

    def _look_from_outside(self, change: Change) -> list[Check]:
        if self._redis.mode == "sentinel":
            agreed = _or_error(self._redis.agreed_master)
            if isinstance(agreed, OpsError):
                return [Check("sentinels agree", False if isinstance(agreed, ConflictError) else None, str(agreed))]
            holds = agreed in change.after["master"]
            return [Check("sentinels agree", holds, f"they name {agreed}"), self._look_at_new(agreed)]
        new, views = change.after["master"][0], dict[str, bool | OpsError]()
        for member in self._redis.members():
            if not member.down:
                views[member.address] = _or_error(lambda at=member.address: self._sees(at, new, change.object))
        odd = [f"{address}: {view}" for address, view in views.items() if view is not True]
        holds = True if not odd else False if False in views.values() else None
        said = f"{len(views)} nodes see {new} as master of all its slots" if holds else "; ".join(odd)
        return [Check("the cluster agrees", holds, said), self._look_at_new(new)]

    def _sees(self, at: str, new: str, old: str) -> bool:
        seen = {member.address: member for member in self._redis.seen_by(at)}
        if new not in seen or old not in seen:
            return False
        with self._redis.at(at) as session:
            state = session.cluster()
        whole = state["cluster_state"] == "ok" and int(state["cluster_slots_ok"]) == SLOTS
        return whole and seen[new].role == "master" and seen[new].slots > 0 and seen[old].master == new

    def _look_at_new(self, new: str) -> Check:
        return _check("the new master answers", new, lambda: self._is_master(new))

    def _look_at_old(self, change: Change) -> Check:
        def follows() -> bool:
            with self._redis.at(change.object) as session:
                said = session.replication()
            return said.role == "replica" and said.link_up and said.master in change.after["master"]

        return _check("the old master follows", change.object, follows)


def _check(name: str, address: str, holds: Callable[[], bool]) -> Check:
    found = _or_error(holds)
    if isinstance(found, OpsError):
        return Check(name, None, str(found))
    return Check(name, found, f"{address} says that it {'does' if found else 'does not'}")


def _or_error(ask: Callable[[], T]) -> T | OpsError:
    try:
        return ask()
    except OpsError as error:
        return error


def _find(members: Sequence[Member], name: str) -> Member:
    for member in members:
        if name in (member.address, member.node_id):
            return member
    known = ", ".join(member.address for member in members if member.role == "master")
    raise NotThereError(f"there is no server {name}", remedy=f"the masters are {known}")


class FailoverShard(Playbook[Shard]):
    name = "redis.failover_shard"
    title = "Fail a Redis shard over"
    kinds = frozenset({"redis"})
    what = (
        "Has a living master hand over to a replica that is near enough: by CLUSTER FAILOVER, in which both agree on the moment, or by "
        "SENTINEL FAILOVER. A single server is refused."
    )
    why_safe = (
        "Only to a replica that is linked and near enough, in a cluster that is whole, or where more than half of the sentinels answer and "
        "all agree who is master; the old master stays as a replica."
    )
    blast_radius = "Writes to the shard wait for about a second. Under Sentinel, writes of the last moment that the replica had not got are lost."
    rights = (
        "+info",
        "in a cluster also +cluster|nodes +cluster|info +cluster|failover",
        "on sentinels +sentinel|get-master-addr-by-name +sentinel|replicas +sentinel|failover +sentinel|myid +sentinel|sentinels "
        "+sentinel|ckquorum",
    )
    undo_text = (
        "Hands back to the old master once it is near enough; under Sentinel only where there is no third to choose."
    )
    Parameters = Shard

    def action(self, context: Context[Shard]) -> Action:
        return Failover(context, context.parameters.master, context.parameters.to)

    def undo(self, context: Context[Shard], done: Sequence[Done]) -> Action | None:
        return HandBack(context, done[0].change.object) if done else None

    def peers(self, context: Context[Shard]) -> Peers | None:
        return Failover(context, context.parameters.master).peers()

    def min_healthy(self, context: Context[Shard]) -> int:
        return 1


class HandBack(Failover):
    """The old master gets its shard again, from whoever has it now."""

    name = "redis.failover_shard.undo"

    def __init__(self, context: Context[Shard], old: str) -> None:
        super().__init__(context, "", old)
        self._old = old

    def plan(self) -> Plan:
        old = _find(self._members(), self._old)
        self.master = old.master or old.address
        if old.role == "master":
            self._need_whole()  # by the word of who is split off together with it, it always was
            return Plan(self.name, self.target_id, (), self.context.clock.now())
        return super().plan()


PLAYBOOKS: tuple[Playbook[Any], ...] = (EvictSlowClients(), FailoverShard(), PurgeMemoryPlaybook())
