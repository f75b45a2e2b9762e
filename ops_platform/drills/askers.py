"""How a probe asks its target, by kind: one attempt at a time, a write that is acknowledged or a read that is answered.

Connections are kept; when none is left every server of the target is tried at once, as often, and the first that fits is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ops_platform.clients.processes import Process
from ops_platform.clients.wires import network_kept, within_network
from ops_platform.errors import CouldNotVerifyError
from ops_platform.inventory.systems import KafkaSystem, RedisSystem

if TYPE_CHECKING:
    import psycopg
    from psycopg.pq.abc import PGconn

    from ops_platform.clients.access import Access
    from ops_platform.clients.kafka import Kafka
    from ops_platform.drills.model import Drill
    from ops_platform.drills.runbook import Probe
    from ops_platform.drills.store import Store

TABLE = "ops_canary.drill_writes"
_WAITS = "SyncRepWaitForLSN"  # PostgreSQL's routine that warns of a wait for replicas that was cancelled, in whatever language
_EVERY = 0.05  # seconds between two tries of one server, while an attempt waits for a connection
_JOINS_WITHIN = 20.0  # seconds for a consumer to have its partition
_LATE = "no answer in time"
_AT_ONCE = 40  # attempts under way

C = TypeVar("C")


class Asker(Protocol):
    """`numbers`: attempts write their number. `at_once`: so many may be under way. `why`: what keeps all of them from an answer, where that is known."""

    numbers: bool
    at_once: int

    @property
    def why(self) -> str | None: ...

    async def attempt(self, n: int) -> None:
        """Raises whatever keeps it from a good answer within the time."""
        ...

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        """What goes on beside the attempts."""
        ...

    def close(self) -> None: ...


def asker_of(access: Access, store: Store, held: Drill, step: Probe, given: Any) -> Asker:
    """The one that a probe's step asks for. `given`: what the step is given."""
    seconds = given.timeout_ms / 1000
    match step.does:
        case "redis.write" | "redis.read":
            return RedisAsker(access, held, key_of(store, held), given, writes=step.does == "redis.write")
        case "kafka.write":
            return KafkaWriter(_kafka(access, held), topic_of(held), seconds)
        case "kafka.read":
            return KafkaReader(_kafka(access, held), topic_of(held), seconds)
        case "patroni.wrong_side_write":
            return WrongSideAsker(access, held, wrong_side_of(store, held, step.id), seconds)
        case _:
            writes = held.id if step.does == "postgres.write" else None
            role = "primary" if writes else given.role
            return PostgresAsker(access, held, writes=writes, role=role, timeout=seconds)


def named(error: BaseException) -> str:
    """A word or two, without what a message may quote."""
    if isinstance(error, TimeoutError):
        return _LATE
    if isinstance(error, Refused):
        return str(error)
    state = getattr(error, "sqlstate", None)
    return f"{type(error).__name__}{f' {state}' if state else ''}"


class Refused(Exception):
    """In a word or two."""


class Pool(ABC, Generic[C]):
    """Connections that were found to fit. An attempt that fails throws its own away."""

    numbers = False
    at_once = _AT_ONCE
    patient = False  # whether it waits for an answer for as long as its connection lasts

    def __init__(self, places: Sequence[tuple[str, int]], timeout: float) -> None:
        self.places, self.timeout = places, timeout
        self.free: asyncio.Queue[C] = asyncio.Queue()
        self.waiting = 0
        self.last_error = "no server answered"

    @property
    def why(self) -> str | None:
        return self.last_error if self.waiting and self.free.empty() else None

    async def attempt(self, n: int) -> None:
        connection = None
        try:
            async with asyncio.timeout(self.timeout) as limit:
                connection = await self._connection()
                if self.patient:
                    limit.reschedule(None)
                await self.ask(connection, n)
        except BaseException:
            if connection is not None:
                self.drop(connection)
            raise
        self.free.put_nowait(connection)

    async def _connection(self) -> C:
        while not self.free.empty():
            found = self.free.get_nowait()
            if self.usable(found):
                return found
        self.waiting += 1
        try:
            return await self.free.get()
        finally:
            self.waiting -= 1

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self.keep_looking(host, port) for host, port in self.places]

    async def keep_looking(self, host: str, port: int) -> None:
        """Opens connections by way of one server while attempts wait for one."""
        while True:
            if not self.waiting or not self.free.empty():
                await asyncio.sleep(0.01)
                continue
            began = time.monotonic()
            try:
                async with asyncio.timeout(self.timeout):
                    if (found := await self.open(host, port)) is not None:
                        self.free.put_nowait(found)
            except Exception as error:  # noqa: BLE001 - whatever it is, the server is tried again
                self.last_error = named(error)
            await asyncio.sleep(max(0.0, _EVERY - (time.monotonic() - began)))

    def close(self) -> None:
        """The process ends after it."""

    @abstractmethod
    async def open(self, host: str, port: int) -> C | None:
        """None: this server does not fit."""

    @abstractmethod
    async def ask(self, connection: C, n: int) -> None:
        """Raises whatever keeps it from a good answer."""

    def usable(self, connection: C) -> bool:
        return True

    @abstractmethod
    def drop(self, connection: C) -> None:
        """One that failed, without waiting for it."""


class PostgresAsker(Pool["psycopg.AsyncConnection[Any]"]):
    """A row with its number, each its own transaction; or `select 1`."""

    def __init__(self, access: Access, held: Drill, *, writes: str | None, role: str, timeout: float) -> None:
        self.access, self.target, self.writes, self.role = access, access.inventory.target(held.subject), writes, role
        self.numbers = writes is not None
        super().__init__([access.address(place.host, place.port) for place in self.target.connection.hosts], timeout)

    async def ask(self, connection: psycopg.AsyncConnection[Any], n: int) -> None:
        if self.writes is None:
            await connection.execute("select 1")
            return
        warned: list[str | None] = []
        connection.add_notice_handler(note := lambda said: warned.append(said.source_function))
        await connection.execute(f"insert into {TABLE} (drill, n) values (%s, %s)", [self.writes, n])
        connection.remove_notice_handler(note)
        if _WAITS in warned:
            raise Refused("committed, and whether a replica has it was not waited for")

    def usable(self, connection: psycopg.AsyncConnection[Any]) -> bool:
        return not connection.closed

    def drop(self, connection: psycopg.AsyncConnection[Any]) -> None:
        connection.pgconn.finish()

    async def open(self, host: str, port: int) -> psycopg.AsyncConnection[Any] | None:
        connection = await self.connect(host, port)
        if self.role == "primary":
            # Whoever has warnings kept from it would take a commit that a cancel let go for one that the replicas have.
            asked = "select pg_is_in_recovery(), set_config('client_min_messages', 'warning', false)"
            row = await (await connection.execute(asked)).fetchone()
            if row is None or row[0]:
                await connection.close()
                return None
        return connection

    async def connect(self, host: str, port: int) -> psycopg.AsyncConnection[Any]:
        import psycopg

        return await psycopg.AsyncConnection.connect(self.conninfo(host, port), autocommit=True)

    def conninfo(self, host: str, port: int, **more: str) -> str:
        from psycopg.conninfo import make_conninfo

        login = self.access.login(self.target.connection)
        return make_conninfo("", **login.parameters(host, port, application_name="ops drill probe", **more))


def wrong_side_of(store: Store, held: Drill, step: str) -> Mapping[str, Any]:
    """Where its writer stands, which its step has registered."""
    return next(r.detail for r in store.resources(held.id) if r.kind == "rows" and r.step == step)


class WrongSideAsker(PostgresAsker):
    """A client that stays with one server when that is cut off: its connections are made in the network of that server's process.

    One commit at a time, and for as long as its connection lasts: a late acknowledgement is one, and each that hangs keeps a backend.
    """

    at_once = 1
    patient = True

    def __init__(self, access: Access, held: Drill, where: Mapping[str, Any], timeout: float) -> None:
        super().__init__(access, held, writes=where["writer"], role="primary", timeout=timeout)
        self.places, self.address = [(where["host"], where["port"])], where["address"]
        self.process = Process(where["pid"], where["started"])
        self.network: int | None = None

    async def attempt(self, n: int) -> None:
        try:
            await super().attempt(n)
        except TimeoutError:  # for a connection: for an answer it waits
            raise Refused(self.last_error) from None

    async def connect(self, host: str, port: int) -> psycopg.AsyncConnection[Any]:
        import psycopg

        # Nobody answers for names in there. A server that hangs keeps a thread for so long.
        conninfo = self.conninfo(host, port, hostaddr=self.address, connect_timeout="2")
        pgconn = await asyncio.to_thread(self._inside, conninfo.encode())
        if pgconn.status != psycopg.pq.ConnStatus.OK:
            pgconn.finish()
            raise psycopg.OperationalError
        pgconn.nonblocking = 1
        connection = psycopg.AsyncConnection[Any](pgconn)
        await connection.set_autocommit(True)
        return connection

    def _inside(self, conninfo: bytes) -> PGconn:
        from psycopg.pq import PGconn

        try:
            if self.network is None:
                self.network = network_kept(self.process)
            return within_network(self.network, lambda: PGconn.connect(conninfo))
        except CouldNotVerifyError as error:
            raise Refused(error.what) from None


# Redis


def key_of(store: Store, held: Drill) -> str:
    """The writer's key, which its step has registered."""
    return next(r.name for r in store.resources(held.id) if r.kind == "redis key")


class RedisAsker(Pool[Any]):
    """SADD of its number to the drill's key, with WAIT where acknowledgement of replicas is asked for; or a read of the key."""

    def __init__(self, access: Access, held: Drill, key: str, given: Any, *, writes: bool) -> None:
        self.redis = access.redis(access.inventory.system(held.subject, RedisSystem))
        self.key, self.numbers = key, writes
        self.copies: int = given.copies if writes else 0
        self.of_master: bool = writes or given.role == "master"
        # A client of Sentinel asks any of them, one of a cluster any node.
        places = [(host, int(port)) for host, _, port in (one.rpartition(":") for one in self.redis.hosts)]
        super().__init__(places, given.timeout_ms / 1000)

    async def ask(self, connection: Any, n: int) -> None:
        if not self.numbers:
            await connection.execute_command("SCARD", self.key)
            return
        await connection.execute_command("SADD", self.key, n)
        if self.copies:
            got = await connection.execute_command("WAIT", self.copies, round(self.timeout * 900))
            if got < self.copies:
                raise Refused(f"{got} of {self.copies} replicas have it")

    def drop(self, connection: Any) -> None:
        # Not awaited: a server that hangs would keep us.
        asyncio.get_running_loop().create_task(_hung_up(connection))

    async def open(self, host: str, port: int) -> Any:
        place = f"{host}:{port}"
        addresses = await asyncio.to_thread(self._addresses, place)
        for address in addresses:
            connection = self.redis.for_asyncio(address, self.timeout)
            await connection.initialize()
            if await self._fits(connection):
                return connection
            self.drop(connection)
        return None

    def _addresses(self, place: str) -> list[str]:
        """By the word of one sentinel or node."""
        master = self.redis.holder(self.key, at=place)
        if self.of_master or self.redis.mode == "single":
            return [master]
        return [m.address for m in self.redis.seen_by(place) if m.master == master and not m.down] or [master]

    async def _fits(self, connection: Any) -> bool:
        role = (await connection.execute_command("ROLE"))[0]
        if not self.of_master and self.redis.mode == "cluster" and role == "slave":
            await connection.execute_command("READONLY")
        return not self.of_master or role == "master"


async def _hung_up(connection: Any) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(1):
            await connection.aclose()


# Kafka


def topic_of(held: Drill) -> str:
    return f"ops-drill-{held.id.lower()}"


def _kafka(access: Access, held: Drill) -> Kafka:
    return access.kafka(access.inventory.system(held.subject, KafkaSystem))


class KafkaWriter:
    """A record with its number, acknowledged by all replicas in sync (acks=all)."""

    numbers = True
    at_once = _AT_ONCE
    why = None

    def __init__(self, kafka: Kafka, topic: str, timeout: float) -> None:
        from ops_platform.clients.kafka import Said

        self.topic, self.timeout = topic, timeout
        self.producer = kafka.producer(
            Said(), message_timeout_ms=round(timeout * 1000), linger_ms=0, topic_metadata_refresh_interval_ms=1000
        )
        self.ended = threading.Event()
        self.poller = threading.Thread(target=self._poll, daemon=True)
        self.poller.start()

    def _poll(self) -> None:
        while not self.ended.is_set():
            self.producer.poll(0.05)

    async def attempt(self, n: int) -> None:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[str | None] = loop.create_future()

        def note(error: Any, _message: object) -> None:
            loop.call_soon_threadsafe(_settle, told, error.name() if error is not None else None)

        self.producer.produce(self.topic, str(n).encode(), on_delivery=note)
        async with asyncio.timeout(self.timeout + 0.5):
            if (error := await told) is not None:
                raise Refused(error)

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return []

    def close(self) -> None:
        self.ended.set()
        self.poller.join(2)
        self.producer.purge()
        self.producer.flush(0.1)


def _settle(told: asyncio.Future[str | None], error: str | None) -> None:
    if not told.done():
        told.set_result(error)


class KafkaReader:
    """A consumer group that reads what the writer writes: good when a record comes within the time."""

    numbers = False
    at_once = _AT_ONCE
    why = None

    def __init__(self, kafka: Kafka, topic: str, timeout: float) -> None:
        from ops_platform.clients.kafka import Said

        self.timeout = timeout
        self.consumer = kafka.consumer(
            Said(), group_id=topic, auto_offset_reset="latest", enable_auto_commit=True, session_timeout_ms=6000
        )
        self.consumer.subscribe([topic])
        # Until it has joined its group it reads nothing, which is no outage.
        until = time.monotonic() + _JOINS_WITHIN
        while not self.consumer.assignment() and time.monotonic() < until:
            self.consumer.poll(0.1)
        self.came = time.monotonic() - 3600
        self.ended = threading.Event()
        self.poller = threading.Thread(target=self._poll, daemon=True)
        self.poller.start()

    def _poll(self) -> None:
        while not self.ended.is_set():
            message = self.consumer.poll(0.05)
            if message is not None and message.error() is None:
                self.came = time.monotonic()
        # Whoever leaves the group says so: it could not be deleted while a member is waited for.
        self.consumer.close()

    async def attempt(self, n: int) -> None:
        began = time.monotonic()
        async with asyncio.timeout(self.timeout):
            while self.came < began:  # noqa: ASYNC110 - a thread of librdkafka's says so
                await asyncio.sleep(0.01)

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return []

    def close(self) -> None:
        self.ended.set()
        self.poller.join(8)
