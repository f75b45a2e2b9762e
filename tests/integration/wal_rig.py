"""A target with a real server and an archive in a real store, for the tests of WAL reception; faults are injected here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg import pq

from ops_platform.backup.archive import read_archive
from ops_platform.backup.receiver import Receiver, TargetState
from ops_platform.backup.repository import Repository
from ops_platform.clients.keys import DataKey
from ops_platform.clients.objectstore import ObjectStore
from ops_platform.clients.postgres_binaries import PostgresServer
from ops_platform.errors import AccessDeniedError, OpsError, UnreachableError
from ops_platform.inventory.model import Target

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


def eventually(what: Callable[[], Any], *, seconds: float = 60, why: str = "") -> Any:
    """Poll until `what` is true (its value), or fail: nothing here waits by sleeping for a guessed time."""
    deadline = time.monotonic() + seconds
    while True:
        if value := what():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {seconds} s: {why}")
        time.sleep(0.02)


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


class Member:
    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.in_recovery: bool | None = None
        self.timeline: int | None = None
        self.server_version: int | None = None
        self.system_identifier: int | None = None
        self.error: str | None = None


class Access:
    """What the receiver needs of `clients.access.Access`, over servers that the test holds in its hand."""

    def __init__(self, servers: list[PostgresServer], store: Any, keys: Any) -> None:
        self.servers, self._store, self._keys = servers, store, keys

    def store(self, _id: str) -> Any:
        return self._store

    def keys(self, _id: str) -> Any:
        return self._keys

    def members(self, _target: Target) -> list[Member]:
        found: list[Member] = []
        for server in self.servers:
            member = Member("127.0.0.1", server.port)
            try:
                with server.connect(timeout=3) as conn:
                    row = conn.execute(
                        "select pg_is_in_recovery(), (select timeline_id from pg_control_checkpoint()),"
                        " (select system_identifier from pg_control_system()), current_setting('server_version_num')::int"
                    ).fetchone()
                member.in_recovery, member.timeline, member.system_identifier, member.server_version = row
            except psycopg.OperationalError as error:
                member.error = str(error)
            found.append(member)
        return found

    def postgres(
        self, target: Target, *, role: str = "primary", dbname: str | None = None, autocommit: bool = True
    ) -> Any:
        for server, member in zip(self.servers, self.members(target), strict=True):
            if member.error is None and (role == "any" or member.in_recovery is (role == "standby")):
                return server.connect(dbname or "postgres", autocommit=autocommit)
        raise UnreachableError(f"no {role} answers", where=target.id)

    def replication(self, target: Target, member: Member | None = None) -> pq.PGconn:
        port = member.port if member else self.servers[0].port
        conn = pq.PGconn.connect(
            f"host=127.0.0.1 port={port} user=postgres replication=true application_name=ops-wal connect_timeout=5".encode()
        )
        if conn.status != pq.ConnStatus.OK:
            text = conn.get_error_message()
            kind = AccessDeniedError if "authentication" in text else UnreachableError
            raise kind(text.strip(), where=f"127.0.0.1:{port}")
        return conn


def target(target_id: str = "app-db", *, partial_every: str = "1s", slot: str = "ops_wal") -> Target:
    return Target.model_validate(
        {
            "id": target_id,
            "environment": "test",
            "owner": "platform",
            "classification": "internal",
            "objectives": {},
            "connection": {"hosts": [{"host": "127.0.0.1"}], "user": "postgres", "tls": {"mode": "disable"}},
            "repository": {"store": "s3", "keys": "keys"},
            "wal": {"slot": slot, "partial_every": partial_every},
            "backup": {"schedule": {"cron": "15 2 * * *"}},
        }
    )


class Rig:
    """One target with its servers, store, keys, and receivers that run in threads."""

    def __init__(self, servers: list[PostgresServer], store: ObjectStore, target_id: str) -> None:
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
            [self.target],
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
        eventually(lambda: state.phase == "streaming", why=str(state.last_error))
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

    def switch(self) -> int:
        """Finish the segment; the first position of the next."""
        at = int(self.sql("select pg_switch_wal() - '0/0'::pg_lsn"))
        return (at + (16 << 20) - 1) // (16 << 20) * (16 << 20)

    def archived(self) -> dict[str, bytes]:
        archive = read_archive(self.repository)
        if archive is None:
            return {}
        found: dict[str, bytes] = {}
        for item in archive.listing:
            if not item.history and not item.partial:
                sealed = self.repository.get_wal(archive.system_identifier, item.name)
                assert sealed is not None
                found[item.name] = sealed.plain
        return found

    def on_disk(self, server: PostgresServer | None = None) -> Iterator[tuple[str, bytes]]:
        for file in sorted((Path((server or self.primary).directory) / "pg_wal").iterdir()):
            if len(file.name) == 24:
                yield file.name, file.read_bytes()

    def close(self) -> None:
        self.store.fault = lambda verb, key: None
        self.keys.sealed = False
        for receiver in self._running:
            receiver.stop()
            assert receiver.join(30), "a receiver did not end"


def wait_for(event: threading.Event, seconds: float = 30) -> None:
    assert event.wait(seconds)


__all__ = ["HBA", "SETTINGS", "Access", "Keys", "OpsError", "Rig", "eventually", "target"]
