"""A target with a real server and an archive in a real store, for the tests of WAL reception; faults are injected here.

`python -m tests.integration.wal_rig JSON` runs a receiver or a fetcher as a process of its own, which a test can kill.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

from psycopg import pq

from ops_platform.backup.archive import read_archive
from ops_platform.backup.continuity import missing as missing_wal
from ops_platform.backup.durable import holds
from ops_platform.backup.model import Lsn
from ops_platform.backup.receiver import Receiver
from ops_platform.backup.reception import TargetState
from ops_platform.backup.repository import Repository
from ops_platform.clients.access import choose_member
from ops_platform.clients.keys import DataKey
from ops_platform.clients.objectstore import ObjectStore
from ops_platform.clients.postgres import Login, Member, ask_member
from ops_platform.clients.postgres_binaries import PostgresServer, find_postgres, free_port, run_as, run_tool
from ops_platform.clients.s3 import S3Store
from ops_platform.errors import AccessDeniedError, UnreachableError
from ops_platform.inventory.model import Target
from ops_platform.local.components import Place, s3_settings
from tests.rig import eventually, missing, scratch

SETTINGS = {
    "wal_level": "replica",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "wal_keep_size": "0",
    "fsync": "off",
    "max_wal_size": "64MB",
    "min_wal_size": "32MB",
    "autovacuum": "off",
    "hot_standby": "on",
}
HBA = "local all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n"


# Servers

_made: list[PostgresServer] = []


@contextlib.contextmanager
def removing_servers() -> Iterator[None]:
    """Every server that is made within is stopped and removed at the end, wherever the test broke off."""
    before = len(_made)
    try:
        yield
    finally:
        while len(_made) > before:
            remove(_made.pop())


def new_server(major: int = 18, settings: Mapping[str, str] | None = None, *, segment_mb: int = 1) -> PostgresServer:
    """A running cluster in a folder of its own. Small segments, so that a few megabytes fill many."""
    server = bare_server(scratch("ops-wal-"), major)
    server.initdb(options=(f"--wal-segsize={segment_mb}",))
    server.configure({**SETTINGS, **(settings or {})}, hba=HBA)
    server.start()
    return server


def bare_server(home: Path, major: int = 18) -> PostgresServer:
    install = find_postgres(major)
    if install is None:
        missing(f"PostgreSQL {major}", "make services installs it")
    assert install is not None
    run_as().own(home)
    _made.append(PostgresServer(install, home / "data", port=free_port()))
    return _made[-1]


def copied(server: PostgresServer, *, standby: bool = False) -> PostgresServer:
    """A base backup of a running server by PostgreSQL's own tool; as a standby it is started and streams."""
    made = bare_server(scratch("ops-wal-"), server.install.major)
    tool = server.install.tool("pg_basebackup")
    assert tool is not None
    command: list[str | Path] = [
        tool,
        "-D",
        made.directory,
        "-h",
        "127.0.0.1",
        "-p",
        str(server.port),
        "-U",
        "postgres",
    ]
    done = run_tool([*command, "-c", "fast", "--no-sync", "-X", *(["stream", "-R"] if standby else ["none"])])
    assert done.returncode == 0, done.stderr
    if standby:
        made.start()
    return made


def remove(server: PostgresServer) -> None:
    server.stop("immediate")
    shutil.rmtree(server.directory.parent, ignore_errors=True)


def crash(server: PostgresServer) -> None:
    """kill -9 of the postmaster; its children leave when they notice."""
    server.kill9()
    eventually(lambda: not _answers(server.port), why="the port of a killed server is still open")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Faults


class Wire:
    """TCP connections to a server through our hands: `broken` resets what is open and whatever comes, in mid-flight; `mute` lets nothing
    through that the server answers."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._to = host, port
        self.broken = self.mute = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                if self.broken:
                    _reset(client)
                else:  # whoever does not answer keeps nobody else waiting
                    threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._to, timeout=5)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        with self._lock:
            self._open |= {client, server}
        threading.Thread(target=self._carry, args=(server, client, True), daemon=True).start()
        self._carry(client, server, False)

    def _carry(self, one: socket.socket, other: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if self.broken:
                    break
                if not (answers and self.mute):
                    other.sendall(data)
        for end in (one, other):
            _reset(end)
            with self._lock:
                self._open.discard(end)

    def cut(self) -> None:
        """Reset everything now, and every new connection until `mend`."""
        self.broken = True
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.broken = False

    def close(self) -> None:
        self._listener.close()
        self.cut()


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
    end.close()


class Keys:
    """A key service whose being sealed the test decides."""

    name = "test keys"

    def __init__(self) -> None:
        self.sealed = False
        self._made = 0

    def new_data_key(self) -> DataKey:
        if self.sealed:
            raise UnreachableError("Vault is sealed", where="vault", remedy="unseal it")
        self._made += 1
        return DataKey(plain=self._made.to_bytes(32, "big"), wrapped=str(self._made))

    def unwrap(self, wrapped: str) -> bytes:
        if self.sealed:
            raise UnreachableError("Vault is sealed", where="vault", remedy="unseal it")
        return int(wrapped).to_bytes(32, "big")

    def check(self) -> dict[str, object]:
        return {}


class FaultyStore:
    """The real store, with faults in front of it: `fault(verb, key)` may raise."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.fault: Callable[[str, str], None] = lambda verb, key: None
        self.puts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in ("put", "get", "head", "list", "list_folders", "delete"):
            return method

        def call(key: str = "", *args: Any, **more: Any) -> Any:
            self.fault(name, key)
            result = method(key, *args, **more)
            if name == "put":
                self.puts.append(key)
            return result

        return call


class Access:
    """What the receiver needs of `clients.access.Access`, over servers that the test holds in its hand."""

    def __init__(self, servers: list[PostgresServer], store: Any, keys: Any) -> None:
        self.servers, self._store, self._keys = servers, store, keys

    def store(self, _id: str) -> Any:
        return self._store

    def keys(self, _id: str) -> Any:
        return self._keys

    def members(self, _target: Target) -> list[Member]:
        login = Login("postgres", "postgres", None, "disable", connect_timeout=30)
        return [ask_member(login, "127.0.0.1", server.port) for server in self.servers]

    def member(self, target: Target, role: Literal["primary", "standby", "any"] = "primary") -> Member:
        return choose_member(target.id, self.members(target), role)

    def postgres(
        self,
        target: Target,
        *,
        role: Literal["primary", "standby", "any"] = "primary",
        dbname: str | None = None,
        autocommit: bool = True,
    ) -> Any:
        port = self.member(target, role).port
        server = next(server for server in self.servers if server.port == port)
        return server.connect(dbname or "postgres", autocommit=autocommit)

    def replication(self, target: Target, member: Member | None = None) -> pq.PGconn:
        port = member.port if member else self.servers[0].port
        conn = pq.PGconn.connect(
            f"host=127.0.0.1 port={port} user=postgres replication=true application_name=ops-wal connect_timeout=30".encode()
        )
        if conn.status != pq.ConnStatus.OK:
            text = conn.get_error_message()
            kind = AccessDeniedError if "authentication" in text else UnreachableError
            raise kind(text.strip(), where=f"127.0.0.1:{port}")
        return conn


def target(target_id: str = "app-db", *, partial_every: float = 0.2, slot: str = "ops_wal") -> Target:
    made = Target.model_validate(
        {
            "id": target_id,
            "environment": "test",
            "owner": "platform",
            "classification": "internal",
            "objectives": {},
            "connection": {"hosts": [{"host": "127.0.0.1"}], "user": "postgres", "tls": {"mode": "disable"}},
            "repository": {"store": "s3", "keys": "keys"},
            "wal": {"slot": slot},
            "backup": {"schedule": {"cron": "15 2 * * *"}},
        }
    )
    # Shorter than an inventory may say, so that tests do not wait for it.
    wal = made.wal.model_copy(update={"partial_every": timedelta(seconds=partial_every)})
    return made.model_copy(update={"wal": wal})


class Rig:
    """One target with its servers, store, keys, and receivers that run in threads."""

    def __init__(self, servers: list[PostgresServer], store: ObjectStore, target_id: str = "app-db") -> None:
        self.servers = servers
        self.store = FaultyStore(store)
        self.keys = Keys()
        self.target = target(target_id)
        self.access = Access(servers, self.store, self.keys)
        self.repository = Repository(self.store, self.keys, target_id)  # type: ignore[arg-type]
        self.log: list[str] = []
        self._running: list[Receiver] = []

    @property
    def primary(self) -> PostgresServer:
        return self.servers[0]

    def receiver(self, **more: Any) -> Receiver:
        receiver = Receiver(
            self.access,  # type: ignore[arg-type]
            more.pop("targets", [self.target]),
            log=lambda target_id, text: self.log.append(text),
            most_backoff=0.5,
            **more,
        )
        receiver.start()
        self._running.append(receiver)
        return receiver

    def streaming(self, **more: Any) -> tuple[Receiver, TargetState]:
        receiver = self.receiver(**more)
        state = receiver.states[0]
        eventually(lambda: state.phase == "streaming", why=lambda: state.last_error)
        return receiver, state

    def sql(self, text: str, server: PostgresServer | None = None) -> Any:
        with (server or self.primary).connect() as conn:
            cursor = conn.execute(text)
            return cursor.fetchone()[0] if cursor.description else None

    def load(self, rows: int = 20000, server: PostgresServer | None = None) -> int:
        """Write about 250 bytes of WAL for each row; the position after it."""
        self.sql("create table if not exists load(id bigserial primary key, t text)", server)
        self.sql(
            f"insert into load(t) select md5(i::text) || repeat('x', 150) from generate_series(1, {rows}) i", server
        )
        return self.position(server)

    def position(self, server: PostgresServer | None = None) -> int:
        return int(self.sql("select pg_current_wal_flush_lsn() - '0/0'::pg_lsn", server))

    def segment_size(self, server: PostgresServer | None = None) -> int:
        return int(self.sql("select setting::bigint from pg_settings where name = 'wal_segment_size'", server))

    def switch(self, server: PostgresServer | None = None) -> int:
        """Finish the segment; the first position of the next."""
        at = int(self.sql("select pg_switch_wal() - '0/0'::pg_lsn", server))
        size = self.segment_size(server)
        return (at + size - 1) // size * size

    def slot(self, what: str, server: PostgresServer | None = None) -> Any:
        """A column of pg_replication_slots, of our slot; positions as numbers. None where there is no slot."""
        number = f"({what} - '0/0'::pg_lsn)::bigint" if what.endswith("_lsn") else what
        with (server or self.primary).connect() as conn:
            row = conn.execute(
                f"select {number} from pg_replication_slots where slot_name = %s", [self.target.wal.slot]
            ).fetchone()
        return row[0] if row else None

    def confirmed(self, server: PostgresServer | None = None) -> int:
        """How far we told the server that it may forget."""
        return int(self.slot("restart_lsn", server) or 0)

    def holds(self, lsn: int, **more: Any) -> bool:
        return holds(self.repository, lsn, **more)

    def await_archived(self, lsn: int, **more: Any) -> None:
        eventually(lambda: self.holds(lsn, **more), why=lambda: f"{Lsn(lsn)} is not archived; {self.log[-3:]}")

    def archived(self, *, partial: bool = False) -> dict[str, bytes]:
        """The stored segments, opened: the whole ones, or the unfinished ones that no whole one stands beside."""
        archive = read_archive(self.repository)
        if archive is None:
            return {}
        whole = {item.name for item in archive.listing if not item.partial}
        found: dict[str, bytes] = {}
        for item in archive.listing:
            if not item.history and item.partial is partial and not (partial and item.name in whole):
                sealed = self.repository.get_wal(archive.system_identifier, item.name, partial=partial)
                assert sealed is not None
                found[item.name] = sealed.plain
        return found

    def holes(self) -> list[tuple[int, str, str]]:
        archive = read_archive(self.repository)
        assert archive is not None
        return missing_wal(archive.stocks, archive.lines, archive.segment_size)

    def on_disk(self, server: PostgresServer | None = None) -> Iterator[tuple[str, bytes]]:
        for file in sorted((Path((server or self.primary).directory) / "pg_wal").iterdir()):
            if len(file.name) == 24:
                yield file.name, file.read_bytes()

    def assert_identical(self, server: PostgresServer | None = None, *, timeline: int = 1) -> int:
        """Every archived segment that the server still has is the same, byte for byte; how many were compared."""
        whole, partial = self.archived(), self.archived(partial=True)  # before the disk: the archive goes on growing
        disk = {name: content for name, content in self.on_disk(server) if int(name[:8], 16) == timeline}
        compared = 0
        for name, content in whole.items():
            if name in disk:
                assert content == disk[name], f"{name} differs"
                compared += 1
        for name, content in partial.items():
            if name in disk:
                assert content == disk[name][: len(content)], f"{name}.partial differs"
                compared += 1
        return compared

    def stop(self, receiver: Receiver) -> None:
        receiver.stop()
        assert receiver.join(30), "a receiver did not end"
        self._running.remove(receiver)

    def close(self) -> None:
        self.store.fault = lambda verb, key: None
        self.keys.sealed = False
        for receiver in self._running:
            receiver.stop()
            assert receiver.join(30), "a receiver did not end"


# A process of its own


class Child:
    """A receiver or a fetcher that can be killed."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "tests.integration.wal_rig", json.dumps(task)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill9()

    def line(self) -> str:
        """The next line that it says; blocks until then. Empty where it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def until(self, beginning: str) -> str:
        heard: list[str] = []
        while said := self.line():
            heard.append(said)
            if said.startswith(beginning):
                return said
        raise AssertionError(f"the child ended before it said {beginning!r}: {heard[-5:]}")

    def kill9(self) -> None:
        self._process.kill()
        self._process.wait(30)


def _store_task(place: Place, prefix: str) -> dict[str, Any]:
    return {"place": str(place.directory), "ports": place.ports, "prefix": prefix}


def receive_task(place: Place, prefix: str, server: PostgresServer) -> dict[str, Any]:
    return {
        "do": "receive",
        **_store_task(place, prefix),
        "data": str(server.directory),
        "major": server.install.major,
        "port": server.port,
        "sockets": str(server.sockets),
    }


def fetch_task(place: Place, prefix: str, cluster: int, spool: Path, segment_size: int, *, hold: str) -> dict[str, Any]:
    """A fetcher that says `held` when it is asked for the object whose key ends in `hold`, and never answers."""
    more = {"cluster": cluster, "spool": str(spool), "segment_size": segment_size, "hold": hold}
    return {"do": "fetch", **_store_task(place, prefix), **more}


def _child(task: Mapping[str, Any]) -> None:
    place = Place(Path(task["place"]), dict(task["ports"]))
    store = S3Store(replace(s3_settings(place, "tests"), prefix=task["prefix"], timeout=30, retries=5))
    if task["do"] == "receive":
        install = find_postgres(task["major"])
        assert install is not None
        server = PostgresServer(install, Path(task["data"]), port=task["port"], sockets=Path(task["sockets"]))
        rig = Rig([server], store)
        _, state = rig.streaming()
        print("streaming", state.durable, flush=True)
    else:
        from ops_platform.backup.walfetch import WalFetchAhead

        held = FaultyStore(store)
        repository = Repository(held, Keys(), "app-db")  # type: ignore[arg-type]

        def hold(verb: str, key: str) -> None:
            if verb == "get" and key.endswith(task["hold"]):
                print("held", flush=True)
                threading.Event().wait()

        held.fault = hold
        fetcher = WalFetchAhead(repository, task["cluster"], Path(task["spool"]), segment_size=task["segment_size"])
        fetcher.__enter__()
        print("serving", fetcher.restore_command, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
