"""What was damaged in the store, and what goes wrong while a backup is taken or restored: found, named, never taken for good."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import io
import json
import random
import shutil
import socket
import struct
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import NativeEngine
from ops_platform.backup.fetch import FileIndex, fetch_backup, fetch_file
from ops_platform.backup.model import Archive, BackupInfo, BackupKind, Block, Manifest, Proof, RecoveryTarget
from ops_platform.backup.repository import Repository
from ops_platform.backup.tarindex import Entry
from ops_platform.clients.keys import DataKey
from ops_platform.clients.objectstore import ObjectInfo, ObjectStore
from ops_platform.clients.postgres_binaries import find_postgres, run_as, run_tool
from ops_platform.clock import SystemClock
from ops_platform.errors import CorruptionError, OpsError, UnreachableError, UsageError
from ops_platform.local.components import COMPONENTS
from tests.integration.wal_rig import FaultyStore, eventually
from tests.rig import Cluster, Ground, Platform, scratch, small_disk

CONTROL = "global/pg_control"


class Impatient(SystemClock):
    """Waits for nothing: back-off is counted elsewhere."""

    def sleep(self, seconds: float) -> None:
        return


class Wrapped:
    """`Access` with another store in front of the real one."""

    def __init__(self, access: Any, store: Any) -> None:
        self._access, self._store = access, store

    def store(self, _id: str) -> Any:
        return self._store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._access, name)


# Damage in the store


@dataclass
class Rig:
    """A cluster with a tablespace; a full backup, an incremental on top, and a backup of another target."""

    cluster: Cluster
    platform: Platform
    full: Manifest
    incremental: Manifest
    other: Manifest

    @property
    def repository(self) -> Repository:
        return self.platform.repository

    @property
    def engine(self) -> NativeEngine:
        return NativeEngine(self.repository, self.platform.target)

    def info(self, manifest: Manifest) -> BackupInfo:
        return next(info for info in self.engine.list() if info.backup_id == manifest.backup_id)

    def restore(self, manifest: Manifest, into: Path) -> None:
        self.engine.fetch_base(self.info(manifest), into, tablespaces={self.space: into.with_name("space")})

    @property
    def space(self) -> str:
        return next(archive.location or "" for archive in self.full.archives if archive.oid)

    @contextlib.contextmanager
    def stored(self, changes: Mapping[str, bytes | None]) -> Iterator[None]:
        """The store with these objects replaced, or taken away; as it was, afterwards."""
        store = self.repository.store
        before = {key: store.get(key) for key in changes}
        for key, body in changes.items():
            store.delete(key) if body is None else store.put(key, body)
        try:
            yield
        finally:
            for key, body in before.items():
                store.put(key, body)


@pytest.fixture(scope="module")
def rig(ground: Ground) -> Iterator[Rig]:
    home = scratch("ops-pg-test-")
    cluster = Cluster(18, home)
    (home / "space").mkdir()
    run_as().own(home / "space")
    platform = Platform(ground, {"app-db": [cluster], "other": [cluster]})
    try:
        cluster.sql(f"create tablespace aside location '{home}/space'")
        cluster.sql("create table t tablespace aside as select i, md5(i::text) from generate_series(1, 20000) i")
        access, inventory = platform.access, platform.access.inventory
        other = run_backup(access, inventory.target("other"))
        full = run_backup(access, inventory.target("app-db"))
        cluster.sql("insert into t select i, 'later' from generate_series(1, 5000) i")
        yield Rig(cluster, platform, full, run_backup(access, inventory.target("app-db")), other)
    finally:
        platform.close()
        cluster.stop()
        shutil.rmtree(home)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = scratch("ops-restore-")
    run_as().own(made)
    yield made
    shutil.rmtree(made)


def flipped(body: bytes, at: int, bits: int = 1) -> bytes:
    changed = bytearray(body)
    changed[at] ^= bits
    return bytes(changed)


def data(manifest: Manifest) -> list[Block]:
    """The blocks of the data directory: PostgreSQL sends the tablespaces first."""
    return next(archive.blocks for archive in manifest.archives if archive.oid is None)


def _exchange(rig: Rig, one: str, two: str) -> dict[str, bytes | None]:
    store = rig.repository.store
    return {one: store.get(two), two: store.get(one)}


def _flip(part: Callable[[Rig], str], where: float) -> Callable[[Rig], dict[str, bytes | None]]:
    def damage(rig: Rig) -> dict[str, bytes | None]:
        key = part(rig)
        body = rig.repository.store.get(key)
        return {key: flipped(body, int(where * (len(body) - 1)))}

    return damage


def _cut(part: Callable[[Rig], str], keep: Callable[[int], int]) -> Callable[[Rig], dict[str, bytes | None]]:
    def damage(rig: Rig) -> dict[str, bytes | None]:
        key = part(rig)
        body = rig.repository.store.get(key)
        return {key: body[: keep(len(body))]}

    return damage


def block(rig: Rig) -> str:
    return data(rig.full)[3].key


def last_block(rig: Rig) -> str:
    return data(rig.full)[-1].key


def space_block(rig: Rig) -> str:
    return next(archive.blocks for archive in rig.full.archives if archive.oid)[0].key


def file_index(rig: Rig) -> str:
    assert rig.full.index is not None
    return rig.full.index.key


def pg_manifest(rig: Rig) -> str:
    return rig.full.pg_manifest.key


def manifest(rig: Rig) -> str:
    return rig.repository.manifest_key(rig.full.backup_id)


DAMAGE: dict[str, Callable[[Rig], dict[str, bytes | None]]] = {
    "a bit of a block's first byte": _flip(block, 0),
    "a bit in the middle of a block": _flip(block, 0.5),
    "a bit of a block's last byte": _flip(block, 1),
    "a bit of the last block": _flip(last_block, 0.5),
    "a bit in a tablespace": _flip(space_block, 0.5),
    "a bit of the index": _flip(file_index, 0.5),
    "a bit of PostgreSQL's manifest": _flip(pg_manifest, 0.5),
    "a bit of the manifest": _flip(manifest, 0.5),
    "no block": lambda rig: {block(rig): None},
    "no last block": lambda rig: {last_block(rig): None},
    "no index": lambda rig: {file_index(rig): None},
    "no manifest of PostgreSQL": lambda rig: {pg_manifest(rig): None},
    "two blocks exchanged": lambda rig: _exchange(rig, block(rig), data(rig.full)[4].key),
    "blocks of two backups exchanged": lambda rig: _exchange(rig, block(rig), data(rig.incremental)[3].key),
    "blocks of two targets exchanged": lambda rig: _exchange(rig, block(rig), data(rig.other)[3].key),
    "half a block": _cut(block, lambda size: size // 2),
    "a block without its last byte": _cut(block, lambda size: size - 1),
    "an empty block": _cut(block, lambda size: 0),
    "half a manifest": _cut(manifest, lambda size: size // 2),
    "an empty manifest": _cut(manifest, lambda size: 0),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_looks_whole(damage: str, rig: Rig, folder: Path) -> None:
    changes = DAMAGE[damage](rig)
    with rig.stored(changes):
        with pytest.raises(CorruptionError) as caught:
            rig.restore(rig.full, folder / "data")
        assert any(key in str(caught.value) for key in changes)
        assert not (folder / "data" / CONTROL).exists()


def test_once_an_object_is_back_the_same_call_goes_on(rig: Rig, folder: Path) -> None:
    with rig.stored({last_block(rig): None}), pytest.raises(CorruptionError):
        rig.restore(rig.full, folder / "data")
    rig.restore(rig.full, folder / "data")
    assert (folder / "data" / CONTROL).exists()
    assert not (folder / "data" / ".ops_restore").exists()
    verify(18, folder / "data")


def verify(major: int, directory: Path) -> None:
    """PostgreSQL's own look at what was restored."""
    program = find_postgres(major).tool("pg_verifybackup")  # type: ignore[union-attr]
    assert program is not None
    done = run_tool([program, "-n", "--ignore=tablespace_map", directory])
    assert done.returncode == 0, done.stderr


def test_a_chain_is_refused_for_damage_in_its_full_backup(rig: Rig, folder: Path) -> None:
    rig.restore(rig.incremental, folder / "good" / "data")
    verify(18, folder / "good" / "data")
    body = rig.repository.store.get(block(rig))
    (folder / "bad").mkdir()
    with rig.stored({block(rig): flipped(body, 1000)}), pytest.raises(CorruptionError) as caught:
        rig.restore(rig.incremental, folder / "bad" / "data")
    assert block(rig) in str(caught.value)
    assert not (folder / "bad" / "data").exists()


def test_a_chain_without_its_parent_is_refused(rig: Rig, folder: Path) -> None:
    with rig.stored({manifest(rig): None}):
        with pytest.raises(CorruptionError, match=r"builds on .* not in the store") as caught:
            rig.restore(rig.incremental, folder / "data")
        assert manifest(rig) in str(caught.value)
        assert not (folder / "data").exists()
        assert [info.backup_id for info in rig.engine.list()] == [rig.incremental.backup_id]


@pytest.mark.parametrize("whose", ["another target", "another backup"])
def test_a_manifest_from_elsewhere_is_refused(whose: str, rig: Rig, folder: Path) -> None:
    key = "other" if whose == "another target" else "app-db"
    from_there = rig.other if whose == "another target" else rig.incremental
    body = rig.repository.store.get(f"{key}/backup/{from_there.backup_id}/manifest.json")
    with rig.stored({manifest(rig): body}), pytest.raises(CorruptionError, match="belongs to") as caught:
        rig.restore(rig.full, folder / "data")
    assert manifest(rig) in str(caught.value)
    assert f"{key}/{from_there.backup_id}" in str(caught.value)
    # Under the identifier that it says, a manifest of another target is still not ours.
    place = rig.repository.manifest_key(from_there.backup_id)
    if whose == "another target":
        rig.repository.store.put(place, body)
        try:
            assert [i.error is None for i in rig.engine.list() if i.backup_id == from_there.backup_id] == [False]
        finally:
            rig.repository.store.delete(place)


def test_the_list_goes_on_past_what_cannot_be_read(rig: Rig) -> None:
    body = rig.repository.store.get(manifest(rig))
    strange = rig.repository.manifest_key("99999999T999999Z-F-00000000")
    rig.repository.store.put(strange, b"{}")
    try:
        with rig.stored({manifest(rig): flipped(body, len(body) // 3)}):
            listed = {info.backup_id: info for info in rig.engine.list()}
            assert listed[rig.incremental.backup_id].error is None
            assert manifest(rig) in (listed[rig.full.backup_id].error or "")
            assert strange in (listed["99999999T999999Z-F-00000000"].error or "")
            assert rig.engine.choose(RecoveryTarget("latest")).backup_id == rig.incremental.backup_id
    finally:
        rig.repository.store.delete(strange)


def test_a_proof_that_was_changed_proves_nothing_and_hides_nothing(rig: Rig) -> None:
    repository, now = rig.repository, datetime.now(UTC)
    data_key = DataKey(repository.keys.unwrap(rig.full.key), rig.full.key)
    proof = Proof(
        target_id="app-db",
        backup_id=rig.full.backup_id,
        verdict="PASS",
        verified_at=now,
        recovery_target="latest",
        proven_until=now,
        rpo_seconds=1,
        rto_seconds=1,
        scorecard="none",
    )
    repository.put_proof(proof, "v1", data_key)
    (key,) = (info.key for info in repository.store.list("app-db/proof/"))
    try:
        assert rig.info(rig.full).proof == proof
        with rig.stored({key: flipped(repository.store.get(key), -1)}):
            assert rig.info(rig.full).proof is None
            assert rig.info(rig.full).error is None
            with pytest.raises(CorruptionError, match=key):
                repository.proofs()
    finally:
        repository.store.delete(key)


class Overlay:
    """The store with one object changed: for thousands of changes, where writing each would take minutes."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key, self.body = store, key, store.get(key)

    def get(self, key: str, **more: Any) -> bytes:
        return self.body if key == self._key else self._store.get(key, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_no_byte_of_a_manifest_can_be_changed(rig: Rig) -> None:
    overlay = Overlay(rig.repository.store, manifest(rig))
    whole, repository = overlay.body, Repository(overlay, rig.repository.keys, "app-db")  # type: ignore[arg-type]
    good = repository.manifest(rig.full.backup_id)
    for at in [*range(0, len(whole), 5), *range(whole.index(b'"key": "vault'), whole.index(b'"written_by"'))]:
        overlay.body = flipped(whole, at, 1 << random.randrange(8))
        read = reading(repository, rig.full.backup_id)
        if isinstance(read, CorruptionError):
            assert manifest(rig) in str(read)
        else:  # a letter of a time in its other case: the same manifest, read from other bytes
            assert read == good, whole[at - 20 : at + 20]


def reading(repository: Repository, backup_id: str) -> Manifest | CorruptionError:
    try:
        return repository.manifest(backup_id)
    except CorruptionError as error:
        return error


def test_no_byte_of_a_wal_segment_can_be_changed(rig: Rig) -> None:
    sysid = rig.full.system_identifier
    name = next(item.name for item in rig.repository.wal_listing(sysid) if not item.partial)
    key = rig.repository.wal_key(sysid, name)
    overlay = Overlay(rig.repository.store, key)
    whole, repository = overlay.body, Repository(overlay, rig.repository.keys, "app-db")  # type: ignore[arg-type]
    assert repository.get_wal(sysid, name) is not None
    header = 12 + int.from_bytes(whole[8:12], "big")
    for at in [*range(header), *range(header, len(whole), len(whole) // 100)]:
        overlay.body = flipped(whole, at, 1 << random.randrange(8))
        with pytest.raises(CorruptionError) as caught:
            repository.get_wal(sysid, name)
        assert key in str(caught.value)


# A repository that lies: only somebody with the data keys can make it


def _forged(rig: Rig, entries: list[Entry]) -> Manifest:
    """The full backup with another index, sealed and signed as it should be."""
    data_key = DataKey(rig.repository.keys.unwrap(rig.full.key), rig.full.key)
    text = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
    part = rig.repository.put_part(rig.full.backup_id, "forged", text.encode(), data_key)
    return rig.full.model_copy(update={"index": part})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "../outside"}, "outside its directory"),
        ({"path": "base/../../outside"}, "outside its directory"),
        ({"path": "/tmp/ops-outside"}, "outside its directory"),
        ({"archive": 7}, "bytes that the backup does not have"),
        ({"archive": -1}, "bytes that the backup does not have"),
        ({"offset": 1 << 40}, "bytes that the backup does not have"),
        ({"offset": -512}, "bytes that the backup does not have"),
        ({"size": 1 << 40}, "bytes that the backup does not have"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(change: dict[str, Any], said: str, rig: Rig, folder: Path) -> None:
    entries = FileIndex.read(rig.repository, rig.full).entries
    number = next(n for n, entry in enumerate(entries) if entry.kind == "file" and entry.size)
    forged = _forged(rig, [replace(e, **change) if n == number else e for n, e in enumerate(entries)])
    spaces = {rig.space: folder / "space"}
    with pytest.raises(CorruptionError, match=said):
        fetch_backup(rig.repository, forged, folder / "deep" / "data", tablespaces=spaces)
    assert not (folder / "deep" / "data" / CONTROL).exists()
    assert sorted(p.name for p in folder.iterdir()) in (["deep"], ["deep", "space"])
    assert [p.name for p in (folder / "deep").iterdir()] == ["data"]
    assert not Path("/tmp/ops-outside").exists()


def test_an_archive_that_points_elsewhere_is_refused(rig: Rig, folder: Path) -> None:
    """The same for archives that the server compressed: there the names stand in the tar alone."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        member = tarfile.TarInfo("../outside")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    packed = zstandard.ZstdCompressor().compress(raw.getvalue())
    data_key = DataKey(rig.repository.keys.unwrap(rig.full.key), rig.full.key)
    part = rig.repository.put_part(rig.full.backup_id, "forged", packed, data_key)
    only = Block(key=part.key, raw=len(packed), stored=part.stored, sha256=part.sha256)
    archive = Archive(oid=None, location=None, raw=len(packed), blocks=[only])
    forged = rig.full.model_copy(update={"index": None, "compress_at": "server", "archives": [archive]})
    with pytest.raises(CorruptionError, match="outside its directory"):
        fetch_backup(rig.repository, forged, folder / "data")
    assert [p.name for p in folder.iterdir()] == ["data"]


# Where a restore may go


def test_nothing_is_restored_over_files(rig: Rig, folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "mine").write_text("mine")
    for what in (rig.full, rig.incremental):
        with pytest.raises(UsageError, match="the directory is not empty"):
            rig.restore(what, folder / "data")
    assert [p.name for p in (folder / "data").iterdir()] == ["mine"]
    # Without a mapping the tablespace would go where the live one is.
    with pytest.raises(UsageError, match=f"tablespace directory {rig.space} is not empty"):
        rig.engine.fetch_base(rig.info(rig.full), folder / "fresh")
    assert not (folder / "fresh").exists()
    assert rig.cluster.sql("select count(*) from t") == 25000


def test_a_single_file_comes_from_its_own_blocks(rig: Rig) -> None:
    assert fetch_file(rig.repository, rig.full, "PG_VERSION") == b"18\n"
    label = fetch_file(rig.repository, rig.full, "backup_label").decode()
    assert f"LABEL: {rig.full.backup_id}" in label


def test_too_little_space_is_said_before_anything_is_written(rig: Rig) -> None:
    with small_disk("12m") as disk:
        with pytest.raises(OpsError, match=r"MiB are needed and .* MiB are free: .* MiB too few"):
            rig.restore(rig.full, disk / "data")
        assert [p.name for p in (disk / "data").iterdir()] == [".ops_restore"]


def test_a_disk_that_fills_up_stops_a_restore_which_then_goes_on(rig: Rig) -> None:
    with small_disk("48m") as disk:

        def fill(step: str, done: int, total: int | None) -> None:
            if not (disk / "filler").exists():
                with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as out:
                    while True:
                        out.write(bytes(1 << 16))

        spaces = {rig.space: disk / "space"}
        with pytest.raises(OpsError, match="No space left on device") as caught:
            fetch_backup(rig.repository, rig.full, disk / "data", tablespaces=spaces, workers=1, progress=fill)
        assert "free space and call again" in str(caught.value)
        assert not (disk / "data" / CONTROL).exists()
        (disk / "filler").unlink()
        fetch_backup(rig.repository, rig.full, disk / "data", tablespaces=spaces)
        subprocess.run(["chown", "-R", run_as().name, disk / "data", disk / "space"], check=True)
        verify(18, disk / "data")


# Faults while a backup is being taken


class Proxy:
    """Stands before the S3 server and spoils chosen uploads. `plan`: what happens to the n-th upload of a block, from 1.

    503: answered so, without asking the server · reset: cut in the middle of the body · lost answer: stored, then cut.
    """

    def __init__(self, port: int, plan: Mapping[int, str]) -> None:
        self.plan, self.uploads, self.done = dict(plan), 0, list[str]()
        self._lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                length, fault = int(self.headers.get("content-length") or 0), proxy.fault(self.command, self.path)
                if fault == "reset":
                    self.rfile.read(length // 2)
                    return self.cut()
                body = self.rfile.read(length)
                if fault == "503":
                    return self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    upstream.putheader(name, value)
                upstream.endheaders(body)
                response = upstream.getresponse()
                content, headers = response.read(), dict(response.getheaders())
                upstream.close()
                if fault == "lost answer":
                    return self.cut()
                return self.answer(response.status, headers, content)

            do_GET = do_PUT = do_HEAD = do_DELETE = handle_one

            def answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                        self.send_header(name, value)
                length = next((v for k, v in headers.items() if k.lower() == "content-length"), str(len(content)))
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def cut(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fault(self, method: str, path: str) -> str | None:
        if method != "PUT" or "/data/" not in path:
            return None
        with self._lock:
            self.uploads += 1
            fault = self.plan.get(self.uploads)
            if fault:
                self.done.append(fault)
            return fault

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def source(rig: Rig, ground: Ground) -> Iterator[Platform]:
    """A place of its own in the store for the same cluster; two tries more for each block."""
    platform = Platform(ground, {"app-db": [rig.cluster]}, extra={"backup": {"transfer": {"retries": 2}}})
    yield platform
    platform.close()


def faulty(platform: Platform) -> tuple[FaultyStore, Any]:
    store = FaultyStore(platform.access.store("s"))
    return store, Wrapped(platform.access, store)


def nothing_counts(platform: Platform) -> None:
    """No backup, the remains are known as such, and the next backup is taken at once."""
    engine = NativeEngine(platform.repository, platform.target)
    assert engine.list() == []
    assert len(platform.repository.unfinished()) == 1
    manifest = run_backup(platform.access, platform.target)
    assert [info.backup_id for info in engine.list()] == [manifest.backup_id]


def test_a_store_that_stumbles_costs_a_retry_and_no_backup(rig: Rig, ground: Ground, folder: Path) -> None:
    proxy = Proxy(ground.place.port("s3-http"), {2: "503", 5: "reset", 6: "503", 9: "lost answer", 12: "reset"})
    platform = Platform(
        ground, {"app-db": [rig.cluster]}, store={"endpoint": f"http://127.0.0.1:{proxy.port}", "ca": None}
    )
    try:
        made = run_backup(platform.access, platform.target)
        assert sorted(proxy.done) == ["503", "503", "lost answer", "reset", "reset"]
        fetch_backup(platform.repository, made, folder / "data", tablespaces={rig.space: folder / "space"})
        assert (folder / "data" / CONTROL).exists()
    finally:
        platform.close()
        proxy.close()


def test_a_store_that_stays_away_costs_the_backup(rig: Rig, source: Platform) -> None:
    store, access = faulty(source)
    tried: list[str] = []

    def fault(verb: str, key: str) -> None:
        if verb == "put" and key.endswith("000005"):
            tried.append(key)
        if tried and verb == "put":
            raise UnreachableError("the store refused 6 tries: 503 SlowDown", where=key)

    store.fault = fault
    with pytest.raises(UnreachableError, match="503 SlowDown"):
        run_backup(access, source.target, clock=Impatient())
    assert len(tried) >= 3  # the first try, and `retries`
    eventually(lambda: rig.cluster.sql("select count(*) from pg_stat_replication") == 0, why="a session was left")
    nothing_counts(source)


def _vault(ground: Ground) -> Any:
    import hvac

    place = ground.place
    return hvac.Client(url=f"http://127.0.0.1:{place.port('vault')}", token=place.secret("vault.root_token"))


def test_a_key_service_that_is_sealed_in_the_middle(source: Platform, ground: Ground) -> None:
    sealed: list[str] = []

    def seal(step: str, done: int, total: int | None) -> None:
        if step == "backup" and not sealed:
            _vault(ground).sys.seal()
            sealed.append(step)

    try:
        with pytest.raises(UnreachableError, match="sealed") as caught:
            run_backup(source.access, source.target, progress=seal)
        assert "unseal it" in str(caught.value)
    finally:
        component = next(component for component in COMPONENTS if component.name == "vault")
        eventually(lambda: component.ready(ground.place) and _vault(ground).sys.read_health_status(method="GET"))
        eventually(lambda: _works(source), why="the key service does not come back")
    nothing_counts(source)


def _works(platform: Platform) -> bool:
    with contextlib.suppress(OpsError):
        return bool(platform.access.keys("k").check())
    return False


class Losing(FaultyStore):
    """Confirms every upload; of one key it keeps what `keep` makes of it (None: nothing)."""

    def __init__(self, store: ObjectStore, ends: str, keep: Callable[[bytes], bytes | None]) -> None:
        super().__init__(store)
        self._ends, self._keep = ends, keep

    def put(self, key: str, body: bytes, **more: Any) -> ObjectInfo:
        kept = self._keep(bytes(body)) if key.endswith(self._ends) else body
        confirmed = self._store.put(key, body, **more)
        if kept is None:
            self._store.delete(key)
        elif kept is not body:
            self._store.put(key, kept)
        return confirmed


@pytest.mark.parametrize(
    ("ends", "fate"),
    [(f"data/001/00000{n}", fate) for n, fate in enumerate(("lost", "cut", "other bytes"))]
    + [("index", "lost"), ("index", "cut"), ("pg_manifest", "lost")],
)
def test_what_the_store_confirmed_and_does_not_have(ends: str, fate: str, source: Platform) -> None:
    keep: dict[str, Callable[[bytes], bytes | None]] = {
        "lost": lambda body: None,
        "cut": lambda body: body[:-1],
        "other bytes": lambda body: flipped(body, -1),
    }
    access = Wrapped(source.access, Losing(source.access.store("s"), ends, keep[fate]))
    with pytest.raises(CorruptionError, match=f"{ends} .*") as caught:
        run_backup(access, source.target)
    assert "1 of " in str(caught.value)
    assert NativeEngine(source.repository, source.target).list() == []
    assert len(source.repository.unfinished()) == 1


def test_each_backup_can_be_restored_without_a_receiver(rig: Rig, source: Platform) -> None:
    """Each brings the WAL that it needs, in whole segments: an unfinished one would be worth nothing behind the next backup's."""
    made = [run_backup(source.access, source.target, kind="full")]
    rig.cluster.sql("select pg_switch_wal()")
    made.append(run_backup(source.access, source.target, kind="full"))
    assert [m.kind for m in made] == [BackupKind.FULL] * 2
    window = NativeEngine(source.repository, source.target).window()
    assert all(window.holds(m.ended_at) for m in made)
