"""Redis: one server, a master under Sentinel, or a cluster; its errors in our words.

A connection is opened for each use and closed after it, so that a look afterwards is never answered by what was looked at before.
The password is resolved for each connection and stands nowhere else.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ops_platform.clients.redis_errors import redis_error
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    UnreachableError,
)
from ops_platform.inventory.values import Secret

SLOTS = 16384
Role = Literal["master", "replica"]


@dataclass(frozen=True)
class Member:
    """A server as the deployment itself sees it. `address`: host:port. `down`: the others say that it does not answer."""

    address: str
    role: Role
    master: str | None = None  # the address of a replica's master
    node_id: str = ""  # in a cluster
    slots: int = 0
    down: bool = False


@dataclass(frozen=True)
class Replication:
    """What a server says of its own replication. `offset`: bytes of the stream that it has written or taken in."""

    role: Role
    offset: int
    master: str | None = None
    link_up: bool = False
    priority: int = 100  # 0: never to become master


@dataclass(frozen=True)
class _Vote:
    """What a sentinel says: whom it takes for master, and the other sentinels that it knows, by id with their addresses."""

    at: str
    id: str
    master: str
    others: dict[str, str]


def pairs(answer: Any) -> dict[str, Any]:
    """Names and values: one after the other in a list, or a map where the client library has made one of them."""
    return answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))


class RedisSession:
    """A connection to one server."""

    def __init__(self, client: Any, address: str, user: str) -> None:
        self.address = address
        self._client = client
        self._user = user

    def call(self, *words: str | int | bytes) -> Any:
        """The server's answer, texts decoded. Raises the OpsError that fits."""
        return self._ask(*words)

    def raw(self, *words: str | int | bytes) -> Any:
        """The same, with texts as the bytes that they are."""
        return self._ask(*words, NEVER_DECODE=True)

    def _ask(self, *words: str | int | bytes, **options: Any) -> Any:
        try:
            return self._client.execute_command(*words, **options)
        except Exception as error:  # noqa: BLE001 - redis and socket raise many kinds; `redis_error` names them
            raise redis_error(error, self.address, self._user) from None

    def info(self, section: str) -> dict[str, str]:
        return {name: str(value) for name, value in self.call("INFO", section).items()}

    def keyspace(self) -> dict[int, dict[str, int]]:
        """Of each database that has any: its keys, and those of them with a time to live (`expires`)."""
        return {
            int(name.removeprefix("db")): {"keys": int(found["keys"]), "expires": int(found["expires"])}
            for name, found in self.call("INFO", "keyspace").items()
        }

    def config(self, setting: str) -> str:
        """One setting. Raises NotThereError for one that this server does not have."""
        found = pairs(self.call("CONFIG", "GET", setting))
        if setting not in found:
            raise NotThereError(f"this Redis has no setting {setting}", where=self.address)
        return str(found[setting])

    def replication(self) -> Replication:
        found = self.info("replication")
        if found.get("role") == "master":
            return Replication("master", int(found["master_repl_offset"]))
        return Replication(
            "replica",
            int(found.get("slave_repl_offset", -1)),
            f"{found['master_host']}:{found['master_port']}",
            found.get("master_link_status") == "up",
            int(found.get("slave_priority", 100)),
        )

    def cluster(self) -> dict[str, str]:
        """CLUSTER INFO."""
        lines = str(self.call("CLUSTER", "INFO")).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def clients(self, *which: str | int) -> list[dict[str, str]]:
        """CLIENT LIST, a dictionary for each."""
        lines = str(self.call("CLIENT", "LIST", *which)).splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line]


class Redis:
    """One deployment. Safe for threads. Raises UnreachableError, AccessDeniedError, NotThereError."""

    def __init__(
        self,
        system_id: str,
        mode: Literal["single", "sentinel", "cluster"],
        hosts: Sequence[tuple[str, int]],
        *,
        master: str | None = None,
        user: str | None = None,
        password: Callable[[], Secret] | None = None,
        tls: bool = True,
        ca: str | None = None,
        timeout: float = 5.0,
    ) -> None:
        self.system_id = system_id
        self.mode = mode
        self.hosts = [f"{host}:{port}" for host, port in hosts]
        self.master = master or ""
        self._user = user
        self._password = password
        self._tls = tls
        self._ca = ca
        self._timeout = timeout

    @contextlib.contextmanager
    def at(self, address: str) -> Generator[RedisSession]:
        client = self._connect(address)
        try:
            yield RedisSession(client, address, self._user or "default")
        finally:
            with contextlib.suppress(Exception):
                client.close()

    def members(self) -> list[Member]:
        """All servers that there are, masters before replicas, by address."""
        if self.mode == "single":
            return [self._alone(host) for host in self.hosts]
        read = self._of_cluster if self.mode == "cluster" else self._of_sentinel
        found = self._of_any(read)
        return sorted(found, key=lambda member: (member.role != "master", member.address))

    def seen_by(self, node: str) -> list[Member]:
        """The deployment in the eyes of this node, or of this sentinel."""
        with self.at(node) as session:
            return self._of_sentinel(session) if self.mode == "sentinel" else self._of_cluster(session)

    def cluster(self) -> dict[str, str]:
        """CLUSTER INFO of the first node that answers."""
        return self._of_any(lambda session: session.cluster())

    def seen(self, *words: str | int) -> Any:
        """What the first node that answers says."""
        return self._of_any(lambda session: session.call(*words))

    def sentinel(self, *words: str | int) -> Any:
        """What the first sentinel that answers says."""
        return self._of_any(lambda session: session.call("SENTINEL", *words))

    def seen_master(self, sentinel: str) -> str:
        """The master's address in the eyes of this sentinel."""
        with self.at(sentinel) as session:
            return self._named_by(session)

    def _named_by(self, session: RedisSession) -> str:
        found = session.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master)
        if not found:
            raise NotThereError(
                f"this sentinel watches no {self.master!r}",
                where=session.address,
                remedy="correct `master` in the inventory",
            )
        return f"{found[0]}:{found[1]}"

    def agreed_master(self) -> str:
        """The master's address, where more than half of the sentinels name it, none names another one, and it says itself that it is.

        A sentinel that is split off, or that was away, goes on to name the old master. All count that any of them knows, silent ones and
        those that the inventory does not name as well: more than half of these have to agree before a replica is promoted, so that at
        most one side of a split is believed. Raises ConflictError where they contradict each other, CouldNotVerifyError where too few answer.
        """
        votes, silent = self._votes()
        said = "; ".join(
            [
                *(f"{one.at} names {one.master}" for one in votes),
                *(f"{at}: {error.what}" for at, error in silent.items()),
            ]
        )
        if len({one.master for one in votes}) > 1:
            raise ConflictError(
                f"the sentinels do not agree who is master: {said}",
                where=self.system_id,
                remedy="a failover may be on its way: try again soon; else look at what separates them",
            )
        known = {one.id for one in votes}.union(*(one.others for one in votes))
        # A silent one of the inventory may be one that the others do not know.
        count = max(len(known), len(votes) + len(silent.keys() & set(self.hosts)))
        if 2 * len(votes) <= count:
            raise CouldNotVerifyError(
                f"{len(votes)} of {count} sentinels say who is master, and the others may have promoted another one: {said}",
                where=self.system_id,
                remedy="bring the others back, or name addresses in `hosts` at which they are reached from here",
            )
        with self.at(votes[0].master) as session:
            role = session.replication().role
        if role != "master":
            raise ConflictError(
                f"it says of itself that it is {role}; {said}", where=votes[0].master, remedy="wait until it is settled"
            )
        return votes[0].master

    def _votes(self) -> tuple[list[_Vote], dict[str, OpsError]]:
        """Each sentinel's, once however many addresses it has; and the addresses at which none says anything, with why."""
        votes, silent = dict[str, _Vote](), dict[str, OpsError]()
        asked, waiting = set[str](), [("", host) for host in self.hosts]
        while waiting:
            known_as, address = waiting.pop(0)
            if address in asked or known_as in votes:
                continue
            asked.add(address)
            try:
                with self.at(address) as session:
                    vote = self._vote(session)
            except OpsError as error:
                # Where only a sentinel says that there is another one, there may be anything by now.
                if address in self.hosts and not isinstance(error, UnreachableError):
                    raise
                silent[address] = error
                continue
            votes[vote.id] = vote
            waiting += vote.others.items()
        if not votes:
            raise self._nobody(list(silent.values()))
        return list(votes.values()), silent

    def _vote(self, session: RedisSession) -> _Vote:
        master = self._named_by(session)
        others = map(pairs, session.call("SENTINEL", "SENTINELS", self.master))
        known = {str(one["runid"]): f"{one['ip']}:{one['port']}" for one in others}
        return _Vote(session.address, str(session.call("SENTINEL", "MYID")), master, known)

    def holder(self, key: str, *, at: str = "", but: str = "") -> str:
        """The address of the master that has a key, by the word of one of `hosts` (the first that answers; `but` is not asked)."""
        hosts = [at] if at else [host for host in self.hosts if host != but]

        def ask(session: RedisSession) -> str:
            if self.mode == "sentinel":
                return self.seen_master(session.address)
            if self.mode == "single":
                return session.address
            return self._of_slot(session, int(session.call("CLUSTER", "KEYSLOT", key)))

        return self._of_any(ask, hosts)

    def _of_slot(self, session: RedisSession, slot: int) -> str:
        text = str(session.call("CLUSTER", "NODES"))
        names = {member.node_id: member.address for member in cluster_members(text, names=self._tls)}
        for node, ranges in slot_ranges(text).items():
            if node in names and any(first <= slot <= last for first, last in ranges):
                return names[node]
        raise NotThereError(f"nobody serves slot {slot}", where=session.address, remedy="look at CLUSTER NODES")

    def for_asyncio(self, address: str, seconds: float) -> Any:
        """A client of one server for asyncio, which whoever asked for it closes. `seconds`: a command takes at most this long."""
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        password = self._password().reveal() if self._password is not None else None
        times: dict[str, Any] = {"socket_timeout": seconds, "socket_connect_timeout": seconds}
        return redis.asyncio.Redis(**{**self._settings(address, password), **times}, retry=Retry(NoBackoff(), 0))

    @contextlib.contextmanager
    def rdb(self, address: str) -> Generator[RdbStream]:
        """The data of one server as a replica gets it, and nothing after it."""
        with self._socket(address) as raw:
            yield RdbStream(raw, address)

    @contextlib.contextmanager
    def _socket(self, address: str) -> Generator[socket.socket]:
        """Logged in, and without a client library between: the stream is no answer that one could parse."""
        host, _, port = address.rpartition(":")
        password = self._password().reveal() if self._password is not None else None
        try:
            raw = socket.create_connection((host.strip("[]"), int(port)), timeout=self._timeout)
        except OSError as error:
            raise redis_error(error, address, self._user or "default") from None
        with contextlib.closing(raw):
            if self._tls:
                try:
                    raw = ssl.create_default_context(cafile=self._ca).wrap_socket(raw, server_hostname=host.strip("[]"))
                except (OSError, ssl.SSLError) as error:
                    raise redis_error(error, address, self._user or "default") from None
            with contextlib.closing(raw):
                if password is not None:
                    words = ("AUTH", self._user, password) if self._user else ("AUTH", password)
                    _say(raw, address, *words)
                yield raw

    def _of_any(self, ask: Callable[[RedisSession], Any], hosts: Sequence[str] | None = None) -> Any:
        failures: list[OpsError] = []
        for host in self.hosts if hosts is None else hosts:
            try:
                with self.at(host) as session:
                    return ask(session)
            except UnreachableError as error:
                failures.append(error)
        raise self._nobody(failures)

    def _nobody(self, failures: Sequence[OpsError]) -> UnreachableError:
        said = "; ".join(f"{failure.where}: {failure.what}" for failure in failures)
        remedy = failures[0].remedy if failures else "name more of its servers in `hosts`"
        return UnreachableError(f"no server of {self.system_id} answers: {said}", remedy=remedy)

    def _alone(self, host: str) -> Member:
        with self.at(host) as session:
            found = session.replication()
        return Member(host, found.role, found.master)

    def _of_cluster(self, session: RedisSession) -> list[Member]:
        return cluster_members(str(session.call("CLUSTER", "NODES")), names=self._tls)

    def _of_sentinel(self, session: RedisSession) -> list[Member]:
        master = self._named_by(session)
        found = [Member(master, "master")]
        for one in map(pairs, session.call("SENTINEL", "REPLICAS", self.master)):
            down = bool({"s_down", "o_down"} & set(one["flags"].split(",")))
            found.append(Member(f"{one['ip']}:{one['port']}", "replica", master, down=down))
        return found

    def _connect(self, address: str) -> Any:
        password = self._password().reveal() if self._password is not None else None
        try:
            try:
                return self._client(address, password)
            except Exception as error:
                # Sentinels often have no password where their servers have one.
                if password is None or "without any password configured" not in str(error):
                    raise
                return self._client(address, None)
        except OpsError:
            raise
        except Exception as error:  # noqa: BLE001
            raise redis_error(error, address, self._user or "default") from None

    def _client(self, address: str, password: str | None) -> Any:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        # Whoever asks decides whether to ask again.
        return redis.Redis(**self._settings(address, password), retry=Retry(NoBackoff(), 0))

    def _settings(self, address: str, password: str | None) -> dict[str, Any]:
        host, _, port = address.rpartition(":")
        tls: dict[str, Any] = {"ssl": True, "ssl_ca_certs": self._ca} if self._tls else {}
        return {
            "host": host.strip("[]"),
            "port": int(port),
            "username": self._user if password is not None else None,
            "password": password,
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            "protocol": 2,
            "decode_responses": True,
            "encoding_errors": "replace",
            "client_name": None,
            "single_connection_client": True,
            **tls,
        }


_QUIET = 120.0  # seconds; while it forks, a server says at least a newline every ten
_PIECE = 1 << 20
_MARK = 40  # bytes of the mark that ends a diskless copy


class RdbStream:
    """PSYNC with `rdb-only`: a server's data as of one position of its replication stream.

    Protocol: the server answers `+FULLRESYNC ID OFFSET`, then newlines while it prepares, then `$LENGTH` or, diskless, `$EOF:` and a mark of
    40 bytes that also ends the data (replication.c of Redis 7). `rdb-only` (7.0) keeps it from queueing what is written meanwhile.
    """

    def __init__(self, raw: socket.socket, address: str) -> None:
        self._raw, self._where = raw, address
        self._room = memoryview(bytearray(_PIECE))
        self._left = b""
        self.replication_id = ""
        self.offset = -1

    def pieces(self) -> Generator[memoryview]:
        """The RDB, byte for byte. The next piece overwrites the one before. Raises UnreachableError where it does not come to its end."""
        for words in (("REPLCONF", "capa", "eof", "capa", "psync2"), ("REPLCONF", "rdb-only", "1")):
            _say(self._raw, self._where, *words)
        self._raw.settimeout(_QUIET)
        self._raw.sendall(_command("PSYNC", "?", "-1"))
        head = self._line()
        if not head.startswith("+FULLRESYNC ") or len(head.split()) != 3:
            raise _refusal(head, self._where)
        _, self.replication_id, offset = head.split()
        self.offset = int(offset)
        while not (head := self._line()):
            continue  # it is alive, and prepares
        if head.startswith("$EOF:"):
            yield from self._until(head[5:].encode())
        elif head.startswith("$") and head[1:].isdigit():
            yield from self._length(int(head[1:]))
        else:
            raise _refusal(head, self._where)

    def _length(self, size: int) -> Generator[memoryview]:
        if first := self._left[:size]:
            yield memoryview(first)
        size -= len(first)
        while size:
            count = self._more(self._room[:size])
            yield self._room[:count]
            size -= count

    def _until(self, mark: bytes) -> Generator[memoryview]:
        if len(mark) != _MARK:
            raise self._broken(f"its end mark is not {_MARK} bytes")
        room, held = self._room, len(self._left)
        room[:held] = self._left
        # The mark is random, and the last that comes: behind it there is nothing.
        while held < _MARK or bytes(room[held - _MARK : held]) != mark:
            done = max(0, held - _MARK)
            yield room[:done]
            room[: held - done] = bytes(room[done:held])
            held -= done
            held += self._more(room[held:])
        yield room[: held - _MARK]

    def _line(self) -> str:
        while b"\n" not in self._left:
            if len(self._left) > _PIECE // 2:
                raise self._broken("it sends what is no answer")
            # Little, so that hardly any of the data comes with it.
            self._left += self._room[: self._more(self._room[:4096])]
        line, _, self._left = self._left.partition(b"\n")
        return line.rstrip(b"\r").decode("utf-8", "replace")

    def _more(self, room: memoryview) -> int:
        try:
            count = self._raw.recv_into(room)
        except OSError as error:
            raise self._broken(type(error).__name__) from None
        if not count:
            raise self._broken("it closed the connection")
        return count

    def _broken(self, why: str) -> UnreachableError:
        return UnreachableError(
            f"the data did not come to its end: {why}",
            where=self._where,
            remedy="look at the server's own log (memory for the fork, client-output-buffer-limit replica); take it again",
        )


def _command(*words: str) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def _say(raw: socket.socket, where: str, *words: str) -> None:
    """One command that is answered with `+…`. Raises what the refusal means; it shows the command's name alone."""
    answer = b""
    try:
        raw.sendall(_command(*words))
        while not answer.endswith(b"\n"):
            piece = raw.recv(1)
            if not piece:
                raise ConnectionError
            answer += piece
    except OSError as error:
        raise redis_error(error, where, "default") from None
    if not answer.startswith(b"+"):
        raise _refusal(answer.decode("utf-8", "replace").strip(), where, words[0])


def _refusal(answer: str, where: str, command: str = "PSYNC") -> OpsError:
    said = answer.removeprefix("-")[:200]
    if said.startswith(("NOAUTH", "NOPERM", "WRONGPASS", "ERR invalid username")):
        return AccessDeniedError(
            f"Redis refuses {command}: {said}",
            where=where,
            remedy="the user needs +psync +replconf +ping and its password",
        )
    if said.startswith(("LOADING", "MASTERDOWN", "NOMASTERLINK", "BUSY")):
        return UnreachableError(f"Redis cannot be copied now: {said}", where=where, remedy="look at its own log")
    return OpsError(f"Redis answers {command} with {said!r}", where=where, remedy="its version must be 7.0 or later")


def cluster_members(text: str, *, names: bool) -> list[Member]:
    """CLUSTER NODES: `ID IP:PORT@BUS[,NAME] FLAGS MASTER PING PONG EPOCH LINK SLOT…`. `names`: prefer announced names, as TLS needs."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    addresses = {words[0]: _address(words[1], names) for words in lines}
    found: list[Member] = []
    for node_id, _, flagged, master, _, _, _, link, *slots in lines:
        flags = set(flagged.split(","))
        if flags & {"handshake", "noaddr"}:
            continue
        down = "fail" in flags or ("myself" not in flags and link != "connected")
        role: Role = "master" if "master" in flags else "replica"
        of = addresses.get(master) if role == "replica" else None
        found.append(Member(addresses[node_id], role, of, node_id, sum(map(_slots, slots)), down))
    return found


def slot_ranges(text: str) -> dict[str, list[tuple[int, int]]]:
    """CLUSTER NODES: the slots of each master, first and last. Raises ConflictError while a slot is on its way to another one."""
    found: dict[str, list[tuple[int, int]]] = {}
    for words in (line.split() for line in text.splitlines() if line.strip()):
        if "master" not in words[2].split(",") or "fail" in words[2].split(","):
            continue
        for word in words[8:]:
            if word.startswith("["):
                raise ConflictError(
                    f"the slot {word.strip('[]').partition('-')[0]} is being moved",
                    where=words[1],
                    remedy="wait until the resharding is over: its keys are in two places",
                )
            first, _, last = word.partition("-")
            found.setdefault(words[0], []).append((int(first), int(last or first)))
    return found


def _address(text: str, names: bool) -> str:
    place, _, rest = text.partition("@")
    name = rest.partition(",")[2].partition(",")[0]
    return f"{name}:{place.rpartition(':')[2]}" if names and name not in ("", "?") else place


def _slots(word: str) -> int:
    """`5`, `5-9`, or `[5->-ID]` for one that is being moved, which is counted where it still is."""
    if word.startswith("["):
        return 0
    first, _, last = word.partition("-")
    return int(last or first) - int(first) + 1
