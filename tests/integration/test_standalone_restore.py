"""The repository outlives this package: the script in docs/ restores from it alone, and real servers start from what it made."""

from __future__ import annotations

import ast
import base64
import dataclasses
import hmac
import json
import os
import re
import runpy
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.durable import wait_durable
from ops_platform.backup.model import Archive, BackupKind, Block, Manifest, Proof, StoredPart
from ops_platform.backup.receiver import Receiver
from ops_platform.backup.repository import canonical
from ops_platform.backup.sealed import Header, seal
from ops_platform.backup.tarindex import Entry
from ops_platform.clients.postgres_binaries import PostgresServer, find_postgres, run_as, run_tool
from ops_platform.clients.vault import FileKeys
from tests.integration.wal_rig import eventually
from tests.rig import Cluster, Ground, Platform, scratch

SCRIPT = Path(__file__).parents[2] / "docs" / "standalone_restore.py"
FORMAT = SCRIPT.parent / "reference" / "repository-format.md"
ALLOWED = {"cryptography", "zstandard", "lz4", *sys.stdlib_module_names}


@pytest.fixture
def folder() -> Iterator[Path]:
    made = scratch("ops-alone-")
    yield made
    shutil.rmtree(made)


def call(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(SCRIPT), *(str(argument) for argument in arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | env)


def restored(*arguments: object, env: dict[str, str]) -> str:
    done = call(*arguments, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def hand_over(directory: Path) -> None:
    """What the script's last line says: chown."""
    for root in directory.parent.glob(f"{directory.name}*"):
        run_as().own(root, *root.rglob("*"))


def start(major: int, directory: Path) -> PostgresServer:
    hand_over(directory)
    install = find_postgres(major)
    assert install is not None
    server = PostgresServer(install, directory)
    server.start({"fsync": "off"})
    eventually(lambda: not value(server, "select pg_is_in_recovery()"), why="it did not end its recovery")
    return server


def value(server: PostgresServer, query: str) -> Any:
    with server.connect() as connection:
        return connection.execute(query).fetchone()[0]


def of_ground(ground: Ground) -> dict[str, str]:
    """The key service as the script's user would name it."""
    return {
        "VAULT_ADDR": f"http://127.0.0.1:{ground.place.port('vault')}",
        "VAULT_TOKEN": ground.place.secret("vault.root_token"),
        "PATH": f"{find_postgres(18).bindir}:{os.environ['PATH']}",  # type: ignore[union-attr]
    }


def sync(platform: Platform, folder: Path) -> None:
    """The repository in a folder, as any S3 client copies it."""
    store = platform.repository.store
    for info in store.list():
        file = folder / info.key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(store.get(info.key))


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.walk(ast.parse(SCRIPT.read_text()))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= ALLOWED


def test_the_examples_in_the_format_are_true(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "key").write_text(bytes(range(32)).hex())
    monkeypatch.setenv("OPS_KEY_FILE", str(folder / "key"))
    script, text = SimpleNamespace(**runpy.run_path(str(SCRIPT))), FORMAT.read_text()
    stored = base64.b64decode("".join(re.findall(r"```\n(T1BTU0VBTDE[^`]*)```", text)[0].split()))
    assert script.unseal(stored, "demo/wal/7711581906465923015/00000002.history") == (
        b"1\t0/3000000\tno recovery target specified\n"
    )
    (body, mac) = re.findall(r'the object `({"seconds".*})` has the code\n`(\w{64})`', text)[0]
    data_key = hmac.digest(bytes(range(100, 132)), b"ops_platform manifest", "sha256")
    assert hmac.digest(data_key, canonical(json.loads(body)), "sha256").hex() == mac


def test_the_format_names_every_field() -> None:
    text = FORMAT.read_text()
    models = (Manifest, Archive, Block, StoredPart, Proof)
    names = {f"`{name}`" for model in models for name in model.model_fields}
    names |= {f"`{field.name}`" for field in dataclasses.fields(Header) if field.name != "size"}
    names |= {f'"{field.name}":' for field in dataclasses.fields(Entry)}
    assert [name for name in sorted(names) if name not in text] == []


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_it_opens_what_we_seal(compression: Any, size: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "key").write_text(secrets.token_hex(32))
    (folder / "key").chmod(0o600)
    monkeypatch.setenv("OPS_KEY_FILE", str(folder / "key"))
    script, plain = SimpleNamespace(**runpy.run_path(str(SCRIPT))), secrets.token_bytes(size)
    sealed = seal(plain, place="a/b", data_key=FileKeys(folder / "key").new_data_key(), compression=compression)
    assert script.unseal(sealed, "a/b") == plain
    with pytest.raises(SystemExit, match="a/c: not what belongs here"):
        script.unseal(sealed, "a/c")


def test_with_vault_a_full_backup_and_a_chain(
    ground: Ground, new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform], folder: Path
) -> None:
    cluster = new_cluster(18)
    platform = new_platform({"app-db": [cluster]})
    receiver = Receiver(platform.access, [platform.target])
    receiver.start()
    try:
        cluster.sql("create table t as select i from generate_series(1, 1000) i")
        full = run_backup(platform.access, platform.target)
        cluster.sql("insert into t select i from generate_series(1001, 3000) i")
        cluster.sql("create table u as select md5(i::text) as x from generate_series(1, 5000) i")
        moment = cluster.sql("select clock_timestamp()::text")
        middle = run_backup(platform.access, platform.target)
        cluster.sql("insert into t select i from generate_series(3001, 3500) i")
        newest = run_backup(platform.access, platform.target)
        cluster.sql("insert into t values (4000)")
        end = cluster.sql("select pg_current_wal_flush_lsn() - '0/0'::pg_lsn")
        wait_durable(platform.access, platform.target, int(end), timeline=1)  # in an unfinished segment
    finally:
        receiver.stop()
        assert receiver.join(60)
    assert [m.kind for m in (full, middle, newest)] == [BackupKind.FULL] + [BackupKind.INCREMENTAL] * 2
    source, env = folder / "copy", of_ground(ground)
    sync(platform, source)

    listed = restored(source, "app-db", env=env).splitlines()
    assert [line.split()[0] for line in listed] == [m.backup_id for m in (full, middle, newest)]

    # The newest backup with its chain, to the end of what is stored.
    restored(source, "app-db", "--into", folder / "newest", env=env)
    assert not (folder / "newest.parts").exists()
    server = start(18, folder / "newest")
    try:
        assert value(server, "select count(*) || ' ' || max(i) from t") == "3501 4000"
        assert value(server, "select count(*) from u") == 5000
    finally:
        server.stop("immediate")

    # The full backup alone, to a moment.
    restored(source, "app-db", "--backup", full.backup_id, "--to", moment, "--into", folder / "moment", env=env)
    server = start(18, folder / "moment")
    try:
        assert value(server, "select max(i) from t") == 3000
    finally:
        server.stop("immediate")
    again = call(source, "app-db", "--into", folder / "moment", env=env)
    assert again.returncode != 0
    assert "File exists" in again.stderr


@pytest.fixture(scope="module")
def copied(ground: Ground) -> Iterator[SimpleNamespace]:
    """A repository that was copied to a folder: PostgreSQL 15, compressed at the server, a tablespace, keys from a file."""
    home = scratch("ops-alone-")
    cluster = Cluster(15, home)
    (home / "space").mkdir()
    run_as().own(home / "space")
    (home / "key").write_text(secrets.token_hex(32))
    (home / "key").chmod(0o600)
    platform = Platform(
        ground,
        {"app-db": [cluster]},
        keys={"kind": "file", "path": str(home / "key")},
        extra={"backup": {"transfer": {"compress_at": "server"}}},
    )
    try:
        cluster.sql(f"create tablespace aside location '{home}/space'")
        cluster.sql("create table t tablespace aside as select i, repeat('x', 100) from generate_series(1, 20000) i")
        manifest = run_backup(platform.access, platform.target)
        sync(platform, home / "copy")
        yield SimpleNamespace(
            manifest=manifest, folder=home / "copy", space=home / "space", env={"OPS_KEY_FILE": str(home / "key")}
        )
    finally:
        platform.close()
        cluster.stop()
        shutil.rmtree(home)


def test_from_a_folder_with_a_key_file_compressed_at_the_server_with_a_tablespace(
    copied: SimpleNamespace, folder: Path
) -> None:
    manifest: Manifest = copied.manifest
    assert (manifest.compress_at, len(manifest.archives)) == ("server", 2)
    restored(copied.folder, "app-db", "--into", folder / "data", env=copied.env)
    (oid,) = [archive.oid for archive in manifest.archives if archive.oid]
    assert (folder / "data" / "pg_tblspc" / str(oid)).readlink() == folder / f"data.{oid}"
    hand_over(folder / "data")
    ours = ("tablespace_map", "recovery.signal", "postgresql.auto.conf")
    verify = find_postgres(15).tool("pg_verifybackup")  # type: ignore[union-attr]
    if verify:
        done = run_tool([verify, "-n", *(f"--ignore={name}" for name in ours), folder / "data"])
        assert done.returncode == 0, done.stderr
    server = start(15, folder / "data")
    try:
        assert value(server, "select count(*) from t") == 20000
        assert value(server, "show archive_mode") == "off"
    finally:
        server.stop("immediate")


@pytest.mark.parametrize("damage", ["block", "manifest", "exchanged", "other target", "wal", "no key"])
def test_it_refuses_what_is_not_whole(damage: str, copied: SimpleNamespace, folder: Path) -> None:
    repository, env = folder / "copy", dict(copied.env)
    shutil.copytree(copied.folder, repository)
    backup = repository / "app-db" / "backup" / copied.manifest.backup_id
    blocks = sorted((backup / "data").rglob("0*"), key=str)
    files = [block for block in blocks if block.is_file()]
    said, target = "", "app-db"
    if damage == "block":
        flip(files[-1])
        said = f"{files[-1].relative_to(repository)}: other bytes than were written"
    elif damage == "exchanged":
        files[0].rename(folder / "held")
        files[1].rename(files[0])
        (folder / "held").rename(files[1])
        said = f"{files[0].relative_to(repository)}: other bytes than were written"
    elif damage == "manifest":
        text = (backup / "manifest.json").read_text()
        (backup / "manifest.json").write_text(text.replace('"timeline": 1', '"timeline": 2'))
        said = "manifest.json: it was changed"
    elif damage == "other target":
        shutil.copytree(repository / "app-db", repository / "other")
        said, target = "manifest.json: not its own", "other"
    elif damage == "wal":
        for file in (repository / "app-db" / "wal").rglob("0*"):
            if file.is_file():
                file.unlink()
        said = "which is not there"
    else:
        env["OPS_KEY_FILE"] = str(folder / "nothing")
        said = "No such file"
    done = call(repository, target, "--into", folder / "data", env=env)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (folder / "data" / "recovery.signal").exists()
    assert not (folder / "data" / "global" / "pg_control").exists()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)
