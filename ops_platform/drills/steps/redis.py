"""Redis under Sentinel or in a cluster: whether a shard is fit to lose its master, the master broken, and what users had of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ops_platform.clients.redis import SLOTS, Member, Redis, pairs
from ops_platform.drills.askers import key_of
from ops_platform.drills.model import Checked, Done, Resource
from ops_platform.drills.registry import Context, NothingGiven, Remover, does, removes
from ops_platform.drills.steps.injection import After, Break, Server, at, break_server, breakable, thaw, waited
from ops_platform.drills.steps.probes import Attempts, start_probe
from ops_platform.drills.steps.writes import Lost, attempted, lost_of
from ops_platform.errors import CouldNotVerifyError, OpsError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.systems import RedisSystem
from ops_platform.inventory.values import Size

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

_MANY_KEYS = 10_000


def _redis(access: Access, subject_id: str) -> Redis:
    return access.redis(access.inventory.system(subject_id, RedisSystem))


def _master(redis: Redis, shard: str) -> Member:
    """Of the shard whose master it names, or of the first. Raises CouldNotVerifyError."""
    if redis.mode == "single":
        raise CouldNotVerifyError(
            "a single server has nobody who takes over by itself", where=redis.system_id,
            remedy="run it under Sentinel or as a cluster, and say so in the inventory (mode)",
        )  # fmt: skip
    masters = [m for m in redis.members() if m.role == "master" and shard in ("", m.address, m.node_id)]
    if not masters:
        raise CouldNotVerifyError(f"there is no master {shard}", where=redis.system_id)
    return masters[0]


class Shard(Strict):
    """Which master."""

    shard: str = Field(default="", description="Its master, host:port or node id; the first by address where empty.")


class Fit(Shard):
    """Of `redis.fit`."""

    replicas: int = Field(default=1, ge=1, description="So many must be fit to take over.")
    most_lag: Size = Field(default=1 << 20, description="A replica that is further behind is not fit.")


@does("redis.fit", "check", given=Fit)
def fit(context: Context, given: Fit) -> Done:
    """Enough replicas of the shard could take over: linked, not behind, not kept from it by their priority; and those who decide are enough."""
    title = "A replica is fit to take over"
    try:
        redis = _redis(context.access, context.subject.id)
        master = _master(redis, given.shard)
        # The replicas are asked before the master: a lag is never taken for less than it is.
        said = {m.address: _said(redis, m) for m in redis.members() if m.master == master.address}
        with redis.at(master.address) as session:
            version, now = session.info("server")["redis_version"], session.replication()
        unfit = {address: why for address, one in said.items() if (why := _unfit(one, now.offset, given.most_lag))}
        decide = _deciders(redis)
    except OpsError as error:
        return Done(error.what, checks=(Checked(title=title, holds=None, query="INFO replication", result=error.line),))
    fine = f"{len(said) - len(unfit)} of {len(said)} replicas of {master.address}"
    why = "; ".join(f"{address}: {one}" for address, one in unfit.items()) or ("all are" if said else "there is none")
    leads = Checked(
        title="The master leads", holds=now.role == "master", query="INFO replication",
        result=f"{master.address} is {now.role}",
    )  # fmt: skip
    check = Checked(
        title=title, holds=len(said) - len(unfit) >= given.replicas, query="INFO replication", result=f"{fine}; {why}"
    )
    return Done(f"{fine}; {why}", {"master": master.address, "versions": {"redis": version}}, (leads, check, decide))


def _said(redis: Redis, member: Member) -> Any:
    """By its own word; the error where it has none."""
    try:
        with redis.at(member.address) as session:
            return session.replication()
    except OpsError as error:
        return error


def _reason(error: OpsError) -> str:
    """With its remedy, and without the server, which is named before it."""
    return OpsError(error.what, remedy=error.remedy).line


def _unfit(said: Any, offset: int, most_lag: int) -> str | None:
    """Why it could not take over. What is not known makes it unfit."""
    if isinstance(said, OpsError):
        return _reason(said)
    if said.role != "replica" or not said.link_up:
        return "it has no link to its master"
    if said.priority == 0:
        return "its priority keeps it from it"
    lag = max(0, offset - said.offset)
    return f"it is {lag} bytes behind" if lag > most_lag else None


def _deciders(redis: Redis) -> Checked:
    """Sentinels that can agree, and do, or a cluster that is whole."""
    if redis.mode == "sentinel":
        try:
            said, holds = f"{redis.sentinel('CKQUORUM', redis.master)}; they name {redis.agreed_master()}", True
        except OpsError as error:
            said, holds = error.line, False
        return Checked(title="The sentinels can agree", holds=holds, query="SENTINEL CKQUORUM", result=said)
    whole, said = _whole_cluster(redis)
    return Checked(title="The cluster is whole", holds=whole, query="CLUSTER INFO", result=said)


def _whole_cluster(redis: Redis) -> tuple[bool, str]:
    state = redis.cluster()
    said = f"state {state['cluster_state']}, {state['cluster_slots_ok']} of {SLOTS} slots served"
    return state["cluster_state"] == "ok" and int(state["cluster_slots_ok"]) == SLOTS, said


# Probes


class Write(Attempts, Shard):
    """Of `redis.write`."""

    copies: int = Field(
        default=0, ge=0, description="Replicas that must have it before it counts as acknowledged (WAIT)."
    )


class Read(Attempts):
    """Of `redis.read`."""

    role: str = Field(default="any", pattern="^(any|master)$", description="Which server of the shard it asks.")


@does("redis.write", "probe", given=Write, changes=lambda _given: "a key ops-drill:…, which goes at the end")
def write(context: Context, given: Write) -> Done:
    """A writer: numbers into a set, in a key of the shard. A number is acknowledged when SADD, and WAIT where it is asked for, was answered."""
    mine = [r.name for r in context.store.resources(context.held.id) if r.kind == "redis key"]
    if not mine:
        redis = _redis(context.access, context.subject.id)
        key = _key_on(redis, _master(redis, given.shard).address, context.held.id)
        context.register("redis key", key, subject=context.subject.id)
    return start_probe(context)


def _key_on(redis: Redis, master: str, drill: str) -> str:
    """A key that this master has."""
    for number in range(_MANY_KEYS):
        key = f"ops-drill:{drill}:{number}"
        if redis.holder(key) == master:
            return key
    raise CouldNotVerifyError(f"no key falls to {master}", where=redis.system_id)


@does("redis.read", "probe", given=Read)
def read(context: Context, given: Read) -> Done:
    """A reader: asks a server of the shard for the size of the writer's set."""
    return start_probe(context)


def _delete_key(access: Access, resource: Resource) -> None:
    redis = _redis(access, _subject_of(resource))
    with redis.at(redis.holder(resource.name)) as session:
        session.call("DEL", resource.name)


def _key_left(access: Access, resource: Resource) -> str | None:
    redis = _redis(access, _subject_of(resource))
    with redis.at(redis.holder(resource.name)) as session:
        return "it exists" if session.call("EXISTS", resource.name) else None


def _subject_of(resource: Resource) -> str:
    return str(resource.detail["subject"])


removes("redis key", Remover(_delete_key, _key_left, local=False))


# Breaking the master, and what comes after


@does("redis.breakable", "check", given=Shard)
def master_breakable(context: Context, given: Shard) -> Done:
    """The shard's master runs on this machine, where alone it can be killed or frozen."""

    def which() -> list[Server]:
        master = _master(_redis(context.access, context.subject.id), given.shard).address
        return [at(master, master)]

    return breakable("The master can be broken from here", which)


@does("redis.break_master", "inject", given=Break, changes=lambda given: f"the shard's master breaks: {given.how}")
def break_master(context: Context, given: Break) -> Done:
    """The master of the writer's shard is killed or frozen, on this machine. Whoever supervises it has to start it again."""

    def which() -> Server:
        redis, key = _redis(context.access, context.subject.id), key_of(context.store, context.held)
        master = redis.holder(key)
        node = next((m.node_id for m in redis.members() if m.address == master), "")
        return at(master, master, member=master, key=key, node=node)

    return break_server(context, given.how, which)


@does("redis.new_master", "wait_until", given=After)
def new_master(context: Context, given: After) -> Done:
    """Until another server has the shard, by the word of those that were not broken and by its own. When the old one was missed, and when it had it."""
    redis = _redis(context.access, context.subject.id)
    old, key = context.fact(given.injected, "member"), context.fact(given.injected, "key")
    seen: dict[str, Any] = {}

    def taken() -> bool:
        try:
            if "missed_at" not in seen and _missed(redis, old, context.fact(given.injected, "node")):
                seen["missed_at"] = context.clock.now().isoformat()
            found = redis.holder(key, but=old)
            if found == old:
                return False
            with redis.at(found) as session:
                if session.replication().role != "master":
                    return False
        except OpsError:
            return False
        now = context.clock.now().isoformat()
        seen.setdefault("missed_at", now)
        seen.update(promoted_at=now, member=found)
        return True

    waited(context, lambda: (taken(), f"{old} is still the one that others name"), every=0.05)
    return Done(f"{seen['member']} has taken over from {old}", seen)


def _missed(redis: Redis, old: str, node: str) -> bool:
    """Whether whoever decides holds it for down, or has replaced it."""
    if redis.mode == "sentinel":
        one = pairs(redis.sentinel("MASTER", redis.master))
        return f"{one['ip']}:{one['port']}" != old or bool({"s_down", "o_down"} & set(one["flags"].split(",")))
    with redis.at(next(host for host in redis.hosts if host != old)) as session:
        lines = [line.split() for line in str(session.call("CLUSTER", "NODES")).splitlines()]
    return any(words[0] == node and {"fail?", "fail", "slave"} & set(words[2].split(",")) for words in lines)


@does("redis.lost_writes", "check", given=Lost)
def lost_writes(context: Context, given: Lost) -> Done:
    """Every number that was acknowledged stands in the set of whoever has the shard now."""
    redis, key = _redis(context.access, context.subject.id), context.fact(given.injected, "key")
    tried = attempted(context, given)
    # Who hung and goes on may not have heard yet that it has the shard no longer.
    with redis.at(redis.holder(key, but=context.fact(given.injected, "member"))) as session:
        there = [int(member) for member in session.call("SMEMBERS", key)]
    return lost_of(tried, there, given, f"SMEMBERS {key}")


@does("redis.rejoined", "wait_until", given=After)
def rejoined(context: Context, given: After) -> Done:
    """Until the old master, which whoever supervises it has started again, follows the new one."""
    thaw(context)
    redis = _redis(context.access, context.subject.id)
    old, key = context.fact(given.injected, "member"), context.fact(given.injected, "key")

    def follows() -> tuple[bool, str]:
        try:
            new = redis.holder(key, but=old)
            with redis.at(old) as session:
                said = session.replication()
        except OpsError as error:
            return False, error.line
        return said.role == "replica" and said.link_up and said.master == new, f"{old}: {said}"

    waited(context, follows)
    return Done(f"{old} follows")


@does("redis.whole", "teardown", given=NothingGiven)
def whole(context: Context, given: NothingGiven) -> Done:
    """Until every server is up, by its own word, and every replica has its link."""
    thaw(context)
    redis = _redis(context.access, context.subject.id)
    return Done(waited(context, lambda: _all_there(redis)))


def _all_there(redis: Redis) -> tuple[bool, str]:
    try:
        members = redis.members()
        words = {member.address: _word(redis, member) for member in members}
        good, said = (True, "") if redis.mode != "cluster" else _whole_cluster(redis)
    except OpsError as error:
        return False, error.line
    bad = [f"{address}: {word}" for address, word in words.items() if word]
    return good and not bad, "; ".join([*([said] if said else []), *(bad or [f"{len(members)} servers are there"])])


def _word(redis: Redis, member: Member) -> str:
    """What is wrong with it; empty where nothing is."""
    said = _said(redis, member)
    if isinstance(said, OpsError):
        return _reason(said)
    if member.down:
        return "the others do not reach it"
    if said.role != member.role:
        return f"it says that it is {said.role}"
    return "" if said.role == "master" or said.link_up else "it has no link to its master"
