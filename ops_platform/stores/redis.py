"""Redis 7: an RDB of each shard over the replication protocol, loaded into servers that are alone, and looked at.

A shard's RDB is its state at one position of its replication stream. Between shards there is no common moment, as there is none in Redis
itself. What is not in an RDB is not in the backup: ACL users, the server's configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import subprocess
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ops_platform.clients.redis import SLOTS, Member, Redis, RedisSession, slot_ranges
from ops_platform.clients.redis_errors import redis_error
from ops_platform.counting import count_of
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptionError,
    CouldNotVerifyError,
    OpsError,
    UnreachableError,
)
from ops_platform.stores.kind import FAILED, NOT_APPLICABLE, PASSED, UNCHECKED, Check, Dumped, Finding, Parts, Saved
from ops_platform.stores.servers import Server, find_program, socket_path

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.systems import RedisSystem, StoreTarget

_SAMPLE = 200  # keys of each shard
_ELEMENTS = 1000  # of a sampled key whose whole value is compared; of a larger one its length is
_SMALLEST_WRITE = 14  # bytes of the replication stream: more changes than its growth by this there were not


def open_store(access: Access, target: StoreTarget) -> RedisStore:
    return RedisStore(access, target, cast("RedisSystem", target.system))


@dataclass(frozen=True)
class RedisStore:
    """`stores.kind.Kind` over one deployment."""

    access: Access
    target: StoreTarget
    system: RedisSystem

    # Dump

    def look(self) -> str:
        return _said(self._shards(self.access.redis(self.system)))

    def dump(self, parts: Parts) -> Dumped:
        redis = self.access.redis(self.system)
        before = self._shards(redis)
        salt = secrets.token_hex(16)
        shards = [self._dump_shard(redis, parts, shard, number, salt) for number, shard in enumerate(before)]
        if (after := self._shards(redis)) != before:
            raise ConflictError(
                f"the servers changed during the dump: {_said(before)}; now {_said(after)}",
                where=self.system.id,
                remedy="a failover, or slots that move: take it again when it is over",
            )
        return Dumped(
            source=", ".join(shard.address for shard in before),
            server=f"Redis {shards[0]['version']}",
            # A single server is dumped only where it said that it is no node of a cluster; a proof believes no backup that does not say so.
            facts={"mode": self.system.mode, "alone": self.system.mode != "cluster", "salt": salt, "shards": shards},
        )

    def _shards(self, redis: Redis) -> list[Shard]:
        """The masters with what they hold. Raises ConflictError where a slot is served by nobody, or on its way, and for `_need_whole`'s reasons."""
        if self.system.mode != "cluster":
            return [self._shard(redis, self._one(redis), ())]
        masters = [member for member in redis.members() if member.role == "master"]
        slots = slot_ranges(str(redis.seen("CLUSTER", "NODES")))
        serving = [member for member in masters if slots.get(member.node_id)]
        held = [range_ for member in serving for range_ in slots[member.node_id]]
        if missing := missing_slots(held):
            raise ConflictError(
                f"nobody serves {_ranges(missing)} of the {SLOTS} slots: a backup without them is none",
                where=self.system.id,
                remedy="redis-cli --cluster check names the node that is away; bring it back first",
            )
        return [self._shard(redis, member, tuple(slots[member.node_id])) for member in serving]

    def _one(self, redis: Redis) -> Member:
        """The server of a deployment that is no cluster. Of Sentinel's it is the master, on which more than half of the sentinels agree."""
        if self.system.mode == "sentinel":
            master = redis.agreed_master()
            self._need_whole(redis, [master])
            return Member(master, "master")
        self._need_whole(redis, redis.hosts)  # before `members`, whose refusals do not say what is needed
        members = redis.members()
        # Where all follow another one, the first is copied as it is: the inventory says so.
        return next((member for member in members if member.role == "master"), members[0])

    def _need_whole(self, redis: Redis, addresses: Sequence[str]) -> None:
        """One of these servers is dumped: it has to hold everything. Raises ConflictError where it does not, AccessDeniedError where it does not say."""
        held: dict[str, list[str]] = {}  # by replication history, which a replica shares with its master
        for address in addresses:
            with redis.at(address) as session:
                if _is_node(session):
                    raise ConflictError(
                        "it is a node of a cluster, and the inventory has it as a single server: what the other nodes hold would be in no backup",
                        where=address,
                        remedy=f"set `mode: cluster` at the system {self.system.id} in platform.yaml, and name some of the nodes in `hosts`",
                    )
                found = session.info("replication")
            held.setdefault(found["master_replid"], []).append(f"{address} ({found['role']})")
        if len(held) > 1:
            raise ConflictError(
                f"`hosts` names servers of which none has the other's data: {'; '.join(' and '.join(one) for one in held.values())}",
                where=self.system.id,
                remedy="declare a system for each master in platform.yaml; if one is a replica that is about to follow, wait until it does",
            )

    def _shard(self, redis: Redis, member: Member, slots: tuple[tuple[int, int], ...]) -> Shard:
        with redis.at(member.address) as session:
            found = session.info("replication")
            return Shard(member.address, session.info("server")["run_id"], found["role"], slots)

    def _dump_shard(self, redis: Redis, parts: Parts, shard: Shard, number: int, salt: str) -> dict[str, Any]:
        with redis.at(shard.address) as session:
            before, sampled = _state(session), _sample(session, salt)
        with redis.rdb(shard.address) as stream, parts.part(f"shard-{number}") as write:
            begun = b""
            for piece in stream.pieces():
                begun = begun or bytes(piece[:9])
                write(piece)
            if not begun.startswith(b"REDIS"):
                raise CorruptionError("what the server sent is no RDB", where=shard.address)
        with redis.at(shard.address) as session:
            after, again = _state(session), {key: _describe(session, *_named(key), salt) for key in sampled}
            server = session.info("server")
            policy = _persistence(session)
        return {
            "address": shard.address,
            "slots": [list(range_) for range_ in shard.slots],
            "replication_id": stream.replication_id,
            "offset": stream.offset,
            "version": server["redis_version"],
            "databases": _databases(policy, max(before["highest"], after["highest"])),
            "keys": [before["keys"], after["keys"]],
            "written": max(0, after["offset"] - before["offset"]),
            # What changed while it was dumped may be there in either form.
            "sample": {key: value for key, value in sampled.items() if value == again[key]},
            "changed": sum(1 for key, value in sampled.items() if value != again[key]),
            "persistence": policy,
        }

    # Level 1

    def files(self, saved: Saved) -> Iterator[Check]:
        program = self._checker()
        for name in saved.parts:
            yield Check(
                f"rdb-{name}", f"The RDB of {name} is whole", "redis-check-rdb FILE (its CRC-64, every object)",
                lambda name=name: _check_rdb(program, saved.part(name)),
            )  # fmt: skip
        if saved.facts["mode"] == "cluster":
            held = [(first, last) for shard in saved.facts["shards"] for first, last in shard["slots"]]
            missing = missing_slots(held)
            text = (
                f"{_ranges(missing)} are missing" if missing else f"all {SLOTS} in {len(saved.facts['shards'])} shards"
            )
            found = Finding(FAILED if missing else PASSED, text)
            yield Check("slots", "Every slot is in a shard", "CLUSTER NODES at the time of the dump", lambda: found)
        else:
            yield Check(
                "alone", "The server is no node of a cluster", "INFO cluster at the time of the dump",
                lambda: _alone(saved),
            )  # fmt: skip
        yield Check(
            "persistence", "The source keeps what it acknowledged", "INFO persistence, CONFIG GET appendfsync, save",
            lambda: self._persistence(saved), of_backup=False,
        )  # fmt: skip

    def _persistence(self, saved: Saved) -> Finding:
        wanted = self.system.persistence
        deciding = [name for name in _KEEPING if _KEEPING[name] in (wanted, None)]
        wrong: list[str] = []
        unread: list[str] = []
        said: list[str] = []
        for shard in saved.facts["shards"]:
            at = shard["address"]
            found = {name: shard["persistence"].get(name, _UNKNOWN) for name in _KEEPING}
            unread += [f"{at}: {name} could not be read" for name in deciding if found[name] == _UNKNOWN]
            aof = found["aof_enabled"] == "1"
            said.append(f"{at}: {'AOF, fsync ' + found['appendfsync'] if aof else 'no AOF'}")
            wrong += [f"{at}: {name} is {found[name]}" for name in _STATUSES if found[name] not in ("ok", _UNKNOWN)]
            if wanted == "aof" and found["aof_enabled"] not in ("1", _UNKNOWN):
                wrong.append(f"{at}: appendonly is no")
            if wanted == "aof" and aof and found["appendfsync"] == "no":
                wrong.append(f"{at}: appendfsync is no")
            if wanted == "rdb" and not found["save"]:
                wrong.append(f"{at}: save is empty")
        if unread and not wrong:
            return Finding(UNCHECKED, f"{'; '.join(unread)}; what to do: the user needs +info and +config|get")
        return Finding(FAILED if wrong else PASSED, "; ".join([*wrong, *unread] or said))

    # Level 2

    def need_programs(self) -> None:
        self._program()

    def _checker(self) -> str | None:
        """None: it is not here."""
        with contextlib.suppress(CouldNotVerifyError):
            return find_program("redis-check-rdb", self.target.sandbox.programs, "redis-tools")
        return None

    def _program(self) -> str:
        return find_program("redis-server", self.target.sandbox.programs, "redis-server")

    @contextmanager
    def restore(self, saved: Saved, home: Path) -> Generator[RestoredRedis]:
        program = self._program()
        with ExitStack() as stack:
            loaded = [
                stack.enter_context(self._serve(program, saved, home, name, shard))
                for name, shard in zip(saved.parts, saved.facts["shards"], strict=True)
            ]
            yield RestoredRedis(saved, loaded)

    @contextmanager
    def _serve(
        self, program: str, saved: Saved, home: Path, name: str, shard: Mapping[str, Any]
    ) -> Generator[RedisSession]:
        place = home / name
        place.mkdir(mode=0o700)
        (place / "dump.rdb").symlink_to(saved.part(name))
        listening = socket_path(place, "s")
        settings = {
            "port": "0",
            "unixsocket": str(listening),
            "unixsocketperm": "700",
            "dir": str(place),
            "dbfilename": "dump.rdb",
            "save": '""',
            "appendonly": "no",
            "databases": str(shard["databases"]),
        }
        file = place / "redis.conf"
        file.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        server = Server(name, [program, file], place, lambda: _loaded(listening), clock=self.access.clock)
        try:
            stack = ExitStack()
            stack.enter_context(server)
        except CouldNotVerifyError:
            raise
        except OpsError as error:
            raise self._why(error, saved, name, server) from None
        with stack, _session(listening) as session:
            yield session

    def _why(self, error: OpsError, saved: Saved, name: str, server: Server) -> OpsError:
        """Whose fault it is that it does not load. Redis has the same words, a short read, for an RDB that is cut off and for too little memory:
        its own tool, which loads nothing, tells which."""
        log = server.log.read_text(errors="replace")
        if _NEWER in log:
            return CouldNotVerifyError(
                f"the sandbox's Redis is older than the source ({saved.server}): {server.tail(20)}",
                remedy="name a program of the same version under sandbox.programs",
            )
        broken = _BROKEN.search(log)
        whole = _check_rdb(self._checker(), saved.part(name)).status if broken else PASSED
        if _NO_MEMORY.search(log) or (broken and whole is PASSED):
            return CouldNotVerifyError(
                "there is not enough memory to load the RDB here",
                where=error.where,
                remedy="verify where there is more",
            )
        if broken and whole is FAILED:
            return CorruptionError(f"the RDB does not load: {server.tail(20)}", where=saved.backup_id)
        return CouldNotVerifyError(error.what, where=error.where)


@dataclass(frozen=True)
class Shard:
    """One server that is dumped: who it is, and what it serves. Two that differ in anything are not the same.

    The id of its replication history is no part of it: a server takes a new one when it meets its first replica, which may be us.
    """

    address: str
    run_id: str
    role: str
    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RestoredRedis:
    saved: Saved
    sessions: Sequence[RedisSession]

    @property
    def server(self) -> str:
        return f"Redis {self.sessions[0].info('server')['redis_version']}, {count_of(len(self.sessions), 'server')}"

    def checks(self) -> Iterator[Check]:
        for name, session, shard in zip(self.saved.parts, self.sessions, self.saved.facts["shards"], strict=True):
            yield Check(
                f"keys-{name}", f"The keys of {name} are the source's", "INFO keyspace, against the source's before and after",
                lambda session=session, shard=shard, name=name: self._keys(session, shard, name),
            )  # fmt: skip
            yield Check(
                f"sample-{name}", f"Sampled keys of {name} are the source's",
                "TYPE, PEXPIRETIME and a salted SHA-256 of the value, of keys that did not change during the dump",
                lambda session=session, shard=shard: self._sample(session, shard),
            )  # fmt: skip

    def _keys(self, session: RedisSession, shard: Mapping[str, Any], name: str) -> Finding:
        before, after = shard["keys"]
        here = _state(session)["keys"]
        low, high = min(before["keys"], after["keys"]), max(before["keys"], after["keys"])
        changes = shard["written"] // _SMALLEST_WRITE
        # A key whose time has come is not loaded any more.
        lost = max(before["expires"], after["expires"])
        good = low - changes - lost <= here["keys"] <= high + changes
        text = f"{here['keys']} keys; the source had {before['keys']} before and {after['keys']} after, {count_of(changes, 'change')} at most between"
        return Finding(PASSED if good else FAILED, text + (f", {lost} of them with a time to live" if lost else ""))

    def _sample(self, session: RedisSession, shard: Mapping[str, Any]) -> Finding:
        sampled, salt = shard["sample"], self.saved.facts["salt"]
        now = int(session.call("TIME")[0]) * 1000
        wrong: list[str] = []
        gone = 0
        for key, known in sampled.items():
            if 0 < known["expires"] <= now:
                gone += 1
                continue
            here = _describe(session, *_named(key), salt)
            if here != known:
                differs = [name for name in known if here.get(name) != known[name]]
                wrong.append(f"{hashlib.sha256(key.encode()).hexdigest()[:12]}: {', '.join(differs)}")
        if wrong:
            return Finding(
                FAILED, f"{len(wrong)} of {len(sampled)} differ (by the SHA-256 of the key): {'; '.join(wrong[:10])}"
            )
        compared = len(sampled) - gone
        if not compared:
            empty = shard["keys"][0]["keys"] == 0
            reason = "the source is empty" if empty else f"all {shard['changed'] + gone} changed or ended since"
            return Finding(NOT_APPLICABLE if empty else UNCHECKED, reason)
        types = sorted({known["type"] for known in sampled.values()})
        return Finding(
            PASSED, f"{compared} keys ({', '.join(types)}) are the same; {shard['changed']} changed during the dump"
        )


# What is asked of a server


def _state(session: RedisSession) -> dict[str, Any]:
    """Keys over all databases, those with a time to live among them, the highest database with any, and the position of the replication
    stream."""
    keys = expires = 0
    spaces = session.keyspace()
    for counted in spaces.values():
        keys, expires = keys + counted["keys"], expires + counted["expires"]
    replication = session.info("replication")
    offset = int(replication.get("master_repl_offset", 0))
    return {"keys": {"keys": keys, "expires": expires}, "offset": offset, "highest": max(spaces, default=0)}


def _sample(session: RedisSession, salt: str) -> dict[str, dict[str, Any]]:
    """By chance, shared out over the databases by their size."""
    spaces = session.keyspace()
    whole = sum(counted["keys"] for counted in spaces.values())
    found: dict[str, dict[str, Any]] = {}
    for number, counted in spaces.items():
        session.call("SELECT", number)
        for _ in range(max(1, _SAMPLE * counted["keys"] // max(1, whole))):
            key = session.raw("RANDOMKEY")
            if key is not None:
                name = f"{number}:{key.hex()}"
                if name not in found:
                    found[name] = _describe(session, number, key, salt)
    return found


def _named(name: str) -> tuple[int, bytes]:
    number, _, key = name.partition(":")
    return int(number), bytes.fromhex(key)


_LENGTHS = {"string": "STRLEN", "list": "LLEN", "set": "SCARD", "hash": "HLEN", "zset": "ZCARD", "stream": "XLEN"}
_VALUES: Mapping[str, tuple[str, tuple[str | int, ...]]] = {
    "string": ("GET", ()),
    "list": ("LRANGE", (0, -1)),
    "set": ("SMEMBERS", ()),
    "hash": ("HGETALL", ()),
    "zset": ("ZRANGE", (0, -1, "WITHSCORES")),
    "stream": ("XRANGE", ("-", "+")),
}


def _describe(session: RedisSession, number: int, key: bytes, salt: str) -> dict[str, Any]:
    """Type, length, moment at which it ends (ms since 1970; -1 never, -2 not there), and a digest of the value that no order matters to."""
    session.call("SELECT", number)
    kind = str(session.call("TYPE", key))
    found: dict[str, Any] = {"type": kind, "expires": int(session.call("PEXPIRETIME", key))}
    if kind not in _LENGTHS:
        return found  # not there, or of a module
    found["length"] = int(session.call(_LENGTHS[kind], key))
    if found["length"] > (_ELEMENTS if kind != "string" else 1 << 20):
        return found
    command, more = _VALUES[kind]
    value = session.raw(command, key, *more)
    if kind == "set":
        value = sorted(value)
    if kind == "hash":
        value = sorted(zip(value[::2], value[1::2], strict=True)) if isinstance(value, list) else sorted(value.items())
    found["digest"] = hashlib.sha256(salt.encode() + repr(value).encode()).hexdigest()
    return found


def _is_node(session: RedisSession) -> bool:
    """Whether the server is part of a cluster. Raises AccessDeniedError where it does not say: no answer is no "no"."""
    why, remedy = "INFO has no cluster_enabled", "let the user ask INFO (+info), by that name, of the server itself"
    try:
        said = session.info("cluster").get("cluster_enabled")
        if said in ("0", "1"):
            return said == "1"
    except UnreachableError:
        raise
    except OpsError as error:
        why, remedy = error.what, error.remedy or remedy
    raise AccessDeniedError(
        f"nobody can say whether this server is a node of a cluster: {why}", where=session.address, remedy=remedy
    )


_UNKNOWN = "unknown"
_STATUSES = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
# To the kind of persistence that it decides on; None: on any.
_KEEPING = {**dict.fromkeys(("aof_enabled", *_STATUSES)), "appendfsync": "aof", "save": "rdb"}


def _persistence(session: RedisSession) -> dict[str, str]:
    """What the server says of its own persistence; `_UNKNOWN` where CONFIG is not allowed."""
    found = session.info("persistence")
    out = {name: found[name] for name in ("aof_enabled", *_STATUSES) if name in found}
    for setting in ("appendfsync", "save", "databases"):
        try:
            out[setting] = str(session.config(setting))
        except OpsError:
            out[setting] = _UNKNOWN
    return out


def _databases(policy: Mapping[str, str], highest: int) -> int:
    """What the sandbox must have room for: where CONFIG is not allowed, as far as there are keys; 16 is Redis' own default."""
    return int(policy["databases"]) if policy["databases"].isdigit() else max(16, highest + 1)


# Whether it is all there is


def _alone(saved: Saved) -> Finding:
    """Backups from before this was asked do not say, and may be one node's."""
    if saved.facts.get("alone") is True:
        return Finding(PASSED, "cluster_enabled is 0")
    return Finding(
        UNCHECKED,
        f"the backup does not say so, and may hold one node's slots; what to do: take another one of {saved.server}",
    )


def missing_slots(held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges (both ends included) that none of the given ones covers."""
    missing: list[tuple[int, int]] = []
    reached = 0
    for first, last in sorted(held):
        if first > reached:
            missing.append((reached, first - 1))
        reached = max(reached, last + 1)
    return [*missing, (reached, SLOTS - 1)] if reached < SLOTS else missing


def _ranges(found: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first}-{last}" for first, last in found)


def _said(shards: Sequence[Shard]) -> str:
    return "; ".join(f"{shard.address} {shard.role} {_ranges(shard.slots)}".strip() for shard in shards)


# The sandbox


# Redis' own words. A server that was killed says none of them, and names the RDB all the same ("Loading RDB produced by version …").
_NEWER = "RDB format version"
_NO_MEMORY = re.compile(r"Out Of Memory|failed allocating|Cannot allocate memory")
_BROKEN = re.compile(r"Internal error in RDB|Short read|Wrong signature|Wrong RDB checksum|Unknown RDB|Bad data format")


def _check_rdb(program: str | None, file: Path) -> Finding:
    if program is None:
        return Finding(UNCHECKED, "redis-check-rdb is not here; install redis-tools, or name it under sandbox.programs")
    done = subprocess.run(
        [program, file], capture_output=True, text=True, errors="replace", check=False, timeout=24 * 3600
    )
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    told = [line.partition("] ")[2] or line for line in lines if "keys read" in line or "expires" in line]
    if done.returncode == 0 and any("RDB looks OK" in line for line in lines):
        return Finding(PASSED, ", ".join(told) or "it looks OK")
    said = " | ".join(lines[-4:])[-500:] or f"exit code {done.returncode}"
    if _NEWER in done.stdout:
        return Finding(UNCHECKED, f"redis-check-rdb is older than the source: {said}")
    if done.returncode < 0 or _NO_MEMORY.search(done.stdout + done.stderr):
        return Finding(UNCHECKED, f"redis-check-rdb did not come to its end: {said}")
    return Finding(FAILED, said)


@contextmanager
def _session(listening: Path) -> Generator[RedisSession]:
    import redis

    client = redis.Redis(
        unix_socket_path=str(listening), decode_responses=True, encoding_errors="replace", protocol=2,
        socket_timeout=600, single_connection_client=True,
    )  # fmt: skip
    try:
        yield RedisSession(client, str(listening), "default")
    finally:
        client.close()


def _loaded(listening: Path) -> bool:
    try:
        with _session(listening) as session:
            return session.call("PING") is True
    except Exception as error:  # noqa: BLE001 - no socket yet, or it is loading
        redis_error(error, str(listening), "default")
        return False
