"""Real servers for the tests, and inventories that name them.

`Ground` starts an S3 server and a Vault-compatible one once for each test process; `Platform` is one inventory with its targets,
secrets and an `Access`, in a folder of its own, against those servers and PostgreSQL clusters that the test holds.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository
from ops_platform.clients.access import Access
from ops_platform.clients.postgres_binaries import PostgresServer, find_postgres, free_port, run_as, run_tool
from ops_platform.clients.s3 import S3Store
from ops_platform.inventory import load
from ops_platform.inventory.model import Target
from ops_platform.local.components import COMPONENTS, Place, s3_settings
from ops_platform.local.parts import program
from ops_platform.local.stack import Stack, stop

_IN_MEMORY = Path("/dev/shm")
REQUIRED = os.environ.get("OPS_REQUIRE_SERVICES") == "1"

SETTINGS = {
    "wal_level": "replica",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "fsync": "off",
    "shared_buffers": "32MB",
    "max_wal_size": "256MB",
    "autovacuum": "off",
    "log_line_prefix": "%m [%p] %a ",
}
HBA = (
    "local all all trust\nlocal replication all trust\n"
    "host all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 scram-sha-256\n"
)
PASSWORD = "correct horse 'battery' \\staple"


def missing(what: str, remedy: str) -> None:
    """A server that the machine does not have: a failure where everything is required, a skip with its reason elsewhere."""
    text = f"{what} is not here; {remedy}"
    if REQUIRED:
        pytest.fail(text)
    pytest.skip(text)


def scratch(prefix: str = "ops-test-", *, disk: bool = False) -> Path:
    """A folder that the servers' user can pass through, which pytest's own is not.

    In memory where the machine has plenty: a cluster is a thousand files, and there are hundreds of clusters. `disk` for what is
    itself about a disk, or too large.
    """
    path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp" if disk or not _memory_to_spare() else _IN_MEMORY))
    path.chmod(0o755)
    return path


def _memory_to_spare() -> bool:
    if not _IN_MEMORY.is_dir() or os.statvfs(_IN_MEMORY).f_flag & os.ST_NOEXEC:
        return False
    available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return shutil.disk_usage(_IN_MEMORY).free > 6 << 30 and available is not None and int(available[1]) > 8 << 20


def eventually(what: Callable[[], Any], *, seconds: float = 60, why: str | Callable[[], object] = "") -> Any:
    """Poll until `what` is true (its value), or fail: nothing here waits by sleeping for a guessed time."""
    deadline = time.monotonic() + seconds
    while True:
        if value := what():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {seconds} s: {why() if callable(why) else why}")
        time.sleep(0.02)


def typed(command: str, vault: Any, home: Path) -> None:
    """A page's command line, as a person types it in bash who is logged in to that Vault (an hvac client) and whose password is `typed`."""
    programs = home / "programs"
    if not programs.exists():
        programs.mkdir()
        (programs / "vault").symlink_to(program("bao", "openbao"))
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(home),
        "VAULT_ADDR": vault.url,
        "VAULT_TOKEN": vault.token,
    }
    words = ["bash", "-eo", "pipefail", "-c", command]
    done = subprocess.run(words, input="typed\n", env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


class Ground:
    """The S3 server and the key service, shared by all tests of one process."""

    def __init__(self) -> None:
        self.directory = scratch()
        self.stack = Stack(Place(self.directory), {})

    def component(self, name: str) -> None:
        if self.stack.alive(name) is None:
            found = next(component for component in COMPONENTS if component.name == name)
            self.stack.ensure(found, lambda _text: None)

    @property
    def place(self) -> Place:
        return self.stack.place

    def store(self, prefix: str, bucket: str = "tests", **settings: Any) -> S3Store:
        self.component("s3")
        store = S3Store(replace(s3_settings(self.place, bucket), prefix=prefix, timeout=30.0, retries=5, **settings))
        store.create_bucket(object_lock=settings.get("lock") is not None)
        return store

    def close(self) -> None:
        for name, process in self.stack.running.items():
            # Asked politely the store takes a quarter of a minute; what it holds is thrown away here.
            assert stop(process, signal.SIGKILL), f"{name} did not stop"
        shutil.rmtree(self.directory)


class Cluster:
    """A PostgreSQL cluster of a test: superuser over the socket, and the role `ops_backup` over TCP with a password."""

    def __init__(
        self, major: int, directory: Path, settings: Mapping[str, str] | None = None, initdb: tuple[str, ...] = ()
    ) -> None:
        install = find_postgres(major)
        if install is None:
            missing(f"PostgreSQL {major}", "make services installs it")
        assert install is not None
        run_as().own(directory)
        self.server = PostgresServer(install, directory / "data", port=free_port())
        self.server.initdb(options=initdb)
        extra = {"summarize_wal": "on"} if major >= 17 else {}
        self.server.configure({**SETTINGS, **extra, **(settings or {})}, hba=HBA)
        self.server.start()
        checkpoint = ", pg_checkpoint" if major >= 15 else ""
        self.sql(f"""
            create role ops_backup login replication password '{PASSWORD.replace("'", "''")}';
            grant pg_monitor{", pg_read_all_data" if major >= 14 else ""}{checkpoint} to ops_backup;
            grant execute on function pg_create_restore_point(text), pg_switch_wal() to ops_backup;
            create schema ops_canary authorization ops_backup;
        """)

    @property
    def port(self) -> int:
        return self.server.port

    def sql(self, text: str, dbname: str = "postgres", *params: Any) -> Any:
        """Run it as superuser; the first column of the first row, where there is one."""
        with self.server.connect(dbname) as connection:
            cursor = connection.execute(text, params or None)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None

    def stop(self) -> None:
        self.server.stop("immediate")


def copy_of(server: PostgresServer) -> PostgresServer:
    """A standby that streams from it once it is started. It stands beside it, and goes with its folder; who starts it stops it."""
    tool = server.install.tool("pg_basebackup")
    assert tool is not None
    directory = server.directory.parent / f"copy-{secrets.token_hex(3)}"
    command: list[str | Path] = [tool, "-h", server.sockets, "-p", str(server.socket_port), "-U", "postgres"]
    done = run_tool([*command, "-D", directory, "-R", "-X", "stream", "-c", "fast"])
    assert done.returncode == 0, done.stderr
    return PostgresServer(server.install, directory, port=free_port())


@contextlib.contextmanager
def small_disk(size: str, *, mode: str = "755") -> Iterator[Path]:
    """A file system of so many bytes (`12m`)."""
    place = scratch("ops-disk-")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode={mode}", "tmpfs", place],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        place.rmdir()
        missing(f"a small disk ({done.stderr.strip()})", "mounting one takes root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


class Platform:
    """platform.yaml over the ground, written for one test. `target` is the first one; `extra` is merged over its entry."""

    def __init__(
        self,
        ground: Ground,
        clusters: Mapping[str, list[Cluster]],
        *,
        extra: Mapping[str, Any] | None = None,
        store: Mapping[str, Any] | None = None,
        keys: Mapping[str, Any] | None = None,
        platform: Mapping[str, Any] | None = None,
    ) -> None:
        ground.component("s3")
        ground.component("vault")
        self.ground = ground
        self.home = scratch("ops-home-")
        self.prefix = uuid.uuid4().hex[:12]
        (self.home / "password").write_text(PASSWORD)
        (self.home / "password").chmod(0o600)
        secrets = ground.place.directory / "secrets"
        self.body: dict[str, Any] = {
            "version": 1,
            "platform": {"name": "tests", "reports": "reports", **(platform or {})},
            "owners": {"team": {"name": "Team"}},
            "environments": {"test": {}},
            "vaults": {
                "v": {
                    "url": f"http://127.0.0.1:{ground.place.port('vault')}",
                    "auth": {
                        "method": "approle",
                        "role_id": f"file://{secrets}/vault.role_id",
                        "secret_id": f"file://{secrets}/vault.secret_id",
                    },
                }
            },
            "key_services": {
                "k": {"kind": "vault-transit", "vault": "v", "key": "ops-backup"} if keys is None else dict(keys)
            },
            "stores": {
                "s": {
                    "endpoint": f"https://127.0.0.1:{ground.place.port('s3')}",
                    "bucket": "tests",
                    "prefix": self.prefix,
                    "access_key": f"file://{secrets}/s3.access_key",
                    "secret_key": f"file://{secrets}/s3.secret_key",
                    "ca": f"{secrets}/s3-ca.pem",
                    **(store or {}),
                }
            },
            "targets": [self._target(name, members, extra or {}) for name, members in clusters.items()],
        }
        ground.store("").close()  # makes the bucket
        self.reload()

    def _target(self, name: str, members: list[Cluster], extra: Mapping[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "id": name,
            "environment": "test",
            "owner": "team",
            "classification": "internal",
            "objectives": {},
            "connection": {
                "hosts": [{"host": "127.0.0.1", "port": member.port} for member in members],
                "user": "ops_backup",
                "password": f"file://{self.home}/password",
                "tls": {"mode": "disable"},
            },
            "repository": {"store": "s", "keys": "k"},
            "wal": {"partial_every": "1s"},
            "backup": {"schedule": {"cron": "15 2 * * *"}, "transfer": {"block_size": "1MiB"}},
            "sandbox": {"directory": str(self.home)},
        }
        return _merged(entry, extra)

    def reload(self) -> None:
        """Write the file again from `body` and open it."""
        if hasattr(self, "access"):
            self.access.close()
        self.file = self.home / "platform.yaml"
        self.file.write_text(yaml.safe_dump(self.body, sort_keys=False))
        self.access = Access(load(self.file))

    @property
    def target(self) -> Target:
        return self.access.inventory.targets[0]

    @property
    def repository(self) -> Repository:
        return open_target_repository(self.access, self.target)

    @property
    def env(self) -> dict[str, str]:
        """For a subprocess that works on this inventory."""
        return {**os.environ, "OPS_INVENTORY": str(self.file), "OPS_STATE_DIR": str(self.home / "state")}

    def close(self) -> None:
        self.access.close()
        shutil.rmtree(self.home, ignore_errors=True)


def _merged(entry: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(entry)
    for key, value in extra.items():
        out[key] = _merged(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), dict) else value
    return out
