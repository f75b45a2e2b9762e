"""What the tests of the ledger share: a database of its own with an owner who is no superuser, and checkpoints on the ground's servers."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from ops_platform.clients.s3 import Lock, S3Store
from ops_platform.clients.vault import TransitSigner, VaultSession
from ops_platform.inventory.model import VaultAuth
from ops_platform.inventory.values import Secret, SecretRef
from ops_platform.ledger import GENESIS, Entry, Ledger
from ops_platform.ledger.anchored import Anchored
from ops_platform.ledger.chain import digest, entry_text, moment
from ops_platform.ledger.checkpoint import CheckpointStore
from tests.rig import Cluster, Ground

BEGIN = datetime(2026, 2, 1, 3, 4, 5, 6, tzinfo=UTC)
TOLERANCE = timedelta(minutes=1)


class Ticking:
    """A clock that moves a second with each look."""

    def __init__(self) -> None:
        self.at = BEGIN

    def now(self) -> datetime:
        self.at += timedelta(seconds=1)
        return self.at

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        raise AssertionError("the ledger does not sleep")


class Database:
    """A database with an owner who is no superuser, as the platform has it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.name = f"ledger_{uuid.uuid4().hex[:10]}"
        cluster.sql(f"create role {self.name} login")
        cluster.sql(f"create database {self.name} owner {self.name}")
        # Defaults that somebody may have set, and that must not matter: a chain is read and extended in one transaction.
        cluster.sql(f"alter database {self.name} set default_transaction_isolation = 'serializable'")
        cluster.sql(f"alter database {self.name} set timezone = 'Asia/Kathmandu'")

    def superuser(self) -> psycopg.Connection[Any]:
        return self.cluster.server.connect(self.name)

    def connect(self) -> psycopg.Connection[Any]:
        return self.cluster.server.connect(self.name, self.name)

    def empty(self) -> None:
        with closing(self.superuser()) as connection:
            connection.execute("drop schema if exists ops_ledger cascade")

    def drop(self) -> None:
        self.cluster.sql(f"drop database {self.name} with (force)")
        self.cluster.sql(f"drop role {self.name}")

    def tamper(self, *statements: str) -> None:
        """As the table's owner, who takes the triggers away and puts them back."""
        with closing(self.connect()) as connection:
            for statement in ("alter table ops_ledger.entries disable trigger user", *statements):
                connection.execute(statement)
            for name in ("append_only", "extends_chain"):
                connection.execute(f"alter table ops_ledger.entries enable always trigger {name}")
            connection.execute("alter table ops_ledger.entries enable trigger noted_for_publication")

    def rewrite(self, entries: Iterable[Entry]) -> None:
        """The whole table anew, with digests that fit: nothing in the database shows it afterwards."""
        self.tamper("delete from ops_ledger.entries")
        with closing(self.connect()) as connection:
            prev = GENESIS
            for seq, entry in enumerate(entries, 1):
                sha256 = digest(
                    prev, entry_text(seq, moment(entry.at), entry.kind, entry.actor, entry.subject, entry.text)
                )
                row = [seq, entry.at, entry.kind, entry.actor, entry.subject, entry.text, prev, sha256]
                connection.execute("insert into ops_ledger.entries values (%s, %s, %s, %s, %s, %s, %s, %s)", row)
                prev = sha256

    def ledger(self, clock: Ticking | None = None) -> Ledger:
        return Ledger(self.connect, clock=clock or Ticking())


class Checkpoints:
    """A ledger of its own on the ground: a key in Vault, a place in a bucket where every object is locked for a day."""

    def __init__(self, ground: Ground, database: Database) -> None:
        ground.component("vault")
        self.ground, self.database = ground, database
        self.ledger_id = f"l{uuid.uuid4().hex[:12]}"
        self.key = f"sign-{self.ledger_id}"
        self.clock = Ticking()
        lock = Lock("GOVERNANCE", timedelta(days=1))
        self.s3 = ground.store("", bucket="tests-ledger", lock=lock)
        self.session = root_session(ground)
        self.vault("create_key", self.key, key_type="ed25519")
        self.signer = TransitSigner(self.session, key=self.key)
        self.store = CheckpointStore(self.s3, self.ledger_id)
        self.ledger = database.ledger(self.clock)

    def vault(self, method: str, *arguments: Any, **more: Any) -> Any:
        """A call of the Transit engine as Vault's administrator."""
        return self.session.call(lambda client: getattr(client.secrets.transit, method)(*arguments, **more), method)

    def anchored(self, pinned: Mapping[str, bytes] | None = None, signer: TransitSigner | None = None) -> Anchored:
        return Anchored(self.ledger, self.store, signer or self.signer, tolerance=TOLERANCE, pinned=pinned)

    def fill(self, count: int, kind: str = "test.entry") -> list[Entry]:
        return [self.ledger.append(kind, f"db-{n % 2}", {"number": n}, actor="tester") for n in range(1, count + 1)]

    def overwrite(self, number: int, raw: bytes) -> None:
        """As somebody who may write the bucket: Object Lock keeps the older version, and a reader gets this one."""
        self.s3.put(self.store.key(number), raw)

    def raw(self, number: int) -> bytes:
        return self.s3.get(self.store.key(number))

    def remove(self, number: int) -> None:
        """A delete without a version: the object is locked, and no longer to be seen."""
        S3Store.delete(unlocked(self.ground), self.store.key(number))

    def close(self) -> None:
        self.ledger.close()
        self.session.close()
        self.s3.close()


def unlocked(ground: Ground) -> S3Store:
    return ground.store("", bucket="tests-ledger")


def root_session(ground: Ground) -> VaultSession:
    ref = SecretRef.parse("env://UNUSED")
    auth = VaultAuth(method="token", token=ref)
    url = f"http://127.0.0.1:{ground.place.port('vault')}"
    return VaultSession(url, auth, lambda _ref: Secret(ground.place.secret("vault.root_token")))
