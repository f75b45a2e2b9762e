"""A restored server that can hurt nobody: no network, no archiving, no replication, our own configuration.

The data directory's own configuration files are not read. `postgresql.auto.conf`, which PostgreSQL always reads, is moved
aside; `release` puts it back for a directory that is handed out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ops_platform.backup.model import Lsn, RecoveryTarget
from ops_platform.clients.postgres_binaries import PgInstall, PostgresServer, run_as, run_tool
from ops_platform.clients.processes import Process, identify, stop
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, CouldNotVerifyError, OpsError

if TYPE_CHECKING:
    from ops_platform.inventory.model import Backed

# Must not be smaller than on the primary, or recovery stops (PostgreSQL documentation, "Hot Standby").
_NOT_SMALLER = (
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
)
_DEFAULTS = dict(zip(_NOT_SMALLER, (40, 8, 10, 0, 64), strict=True))
# Libraries that act on their own: they would run jobs, connect to peers or write elsewhere.
_ACTING = frozenset(
    [
        "pg_cron",
        "pglogical",
        "bdr",
        "spock",
        "repmgr",
        "pg_squeeze",
        "pg_partman_bgw",
        "pgaudit",
        "auto_explain",
        "pg_net",
        "wal2json",
    ]
)
_STOPPING = 120.0
_ENDS_WITHIN = 10.0  # seconds
_MADE_WITHIN = 3600.0  # seconds in which whoever makes a directory has said so in it
# What may have been hung on a database or a role, and would hide damage or refuse what a check has to make.
_PLAIN = {
    "statement_timeout": "0",
    "search_path": "pg_catalog",
    "zero_damaged_pages": "off",
    "ignore_checksum_failure": "off",
    "default_transaction_read_only": "off",
    "session_preload_libraries": "",
}
_PREFIX = re.compile(r"^\d{4}-\S+ \S+ \S+ \[\d+\] \w{5} ")
_LOWER = re.compile(r"(\w+) = -?\d+ is a lower setting than on the primary server, where its value was (\d+)")


@functools.cache
def network_namespace() -> tuple[str, ...]:
    """The words that put a program into a network namespace of its own, as the servers' user; empty where the machine forbids it."""
    words = ("unshare", "--user", "--map-current-user", "--net", "--")
    if shutil.which("unshare") is None:
        return ()
    try:
        tried = subprocess.run([*words, "true"], capture_output=True, check=False, timeout=10, **run_as().popen)
    except (OSError, subprocess.SubprocessError):
        return ()
    return words if tried.returncode == 0 else ()


@functools.cache
def dies_with_us() -> tuple[str, ...]:
    """The words that end a program when the thread that started it ends, so that a kill -9 of ours leaves no server behind."""
    return ("setpriv", "--pdeathsig", "INT", "--") if shutil.which("setpriv") else ()


def temporary_home(
    target: Backed, kind: Literal["verify", "tables"], *, elsewhere: Callable[[Path], None] | None = None
) -> Path:
    """A new directory below `sandbox.directory` of the target. Those of programs that were killed go, see `clear_dead`.

    Raises CouldNotVerifyError where it cannot be made.
    """
    base = _base(target)
    clear_dead(target, elsewhere=elsewhere)
    try:
        home = Path(tempfile.mkdtemp(prefix=f"ops-{kind}-{target.id}-", dir=base))
        me = identify(os.getpid())
        (home / "owner").write_text(f"{me.pid} {me.started}" if me else "0 0")
    except OSError as error:
        raise CouldNotVerifyError(
            f"the sandbox cannot be made: {error.strerror}",
            where=str(base),
            remedy="correct sandbox.directory of the target",
        ) from None
    return home


def take_away(home: Path) -> None:
    """Remove such a directory. Whoever is interrupted meanwhile removes the rest before the interruption goes on."""
    try:
        shutil.rmtree(home, ignore_errors=True)
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def clear_dead(target: Backed, *, elsewhere: Callable[[Path], None] | None = None) -> None:
    """Take away the directories of programs that were killed, once their servers, which were told to end with them, have.

    `elsewhere` takes away first what such a program had made outside of its directory. Raises what that raises: then the directory stays,
    which says what there is.
    """
    for home, owner in _homes(target):
        if not owner.alive:
            if elsewhere is not None:
                elsewhere(home)
            _end_servers(home)
            shutil.rmtree(home, ignore_errors=True)


def _end_servers(home: Path) -> None:
    """A server that is still ending would write into the directory again."""
    deadline = time.monotonic() + _ENDS_WITHIN
    while (left := list(_naming(home))) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        stop(process, signal.SIGKILL)


def _naming(home: Path) -> Iterator[Process]:
    """Processes whose command line names something in it."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{home}/".encode() in (entry / "cmdline").read_bytes() and (found := identify(int(entry.name))):
                yield found


def homes_left(target: Backed) -> list[Path]:
    """Directories of programs that were killed, and of this one."""
    return [home for home, owner in _homes(target) if not owner.alive or owner.pid == os.getpid()]


def _homes(target: Backed) -> Iterator[tuple[Path, Process]]:
    """With whoever made each. One that is being made at this moment is not ours to judge."""
    for kind in ("verify", "tables"):
        for home in _base(target).glob(f"ops-{kind}-{target.id}-*"):
            with contextlib.suppress(OSError, ValueError):
                if (owner := home / "owner").exists():
                    pid, started = (int(word) for word in owner.read_text().split())
                    yield home, Process(pid, started)
                elif time.time() - home.stat().st_mtime > _MADE_WITHIN:
                    yield home, Process(0, 0)


def _base(target: Backed) -> Path:
    return Path(target.sandbox.directory or tempfile.gettempdir())


class Sandbox:
    """Over a restored data directory. `work` holds its configuration, socket spool and log, beside the data.

    `server`: the one that runs over it already.
    """

    def __init__(
        self, install: PgInstall, data: Path, work: Path, *, isolate: bool = True, server: PostgresServer | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:  # fmt: skip
        self.install, self.data, self.work, self.clock = install, data, work, clock
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.user = run_as()
        self.user.own(work)
        alone = network_namespace() if isolate else ()
        self.isolated = bool(alone)
        wrapper = [*alone, *dies_with_us()]
        self.server = server or PostgresServer(install, data, near=work, log=work / "server.log", wrapper=wrapper)
        self.notes: list[str] = []
        self._superuser: str | None = None
        self._wanted = dict(_DEFAULTS)
        self._to_end = False

    # Preparing

    def prepare(self, recovery: RecoveryTarget, restore_command: str, *, action: str = "pause") -> None:
        """Write the configuration. Raises OpsError for a directory that would reach outside of itself."""
        self._check_links()
        self._set_aside()
        self._wanted |= self._from_control_file()
        (self.data / "recovery.signal").touch()
        self.user.own(self.data / "recovery.signal")
        # Reading ahead would ask for WAL behind the target, which may never have been archived.
        ahead = {"recovery_prefetch": "off"} if recovery.kind == "immediate" and self.install.major >= 15 else {}
        self._recovery = ahead | {
            "restore_command": restore_command,
            "recovery_target_action": action,
            **recovery.settings(),
        }
        self._write(self.work / "pg_hba.conf", "local all all trust\n")
        self._write(self.work / "pg_ident.conf", "")
        self._configure()

    def recover_to_end(self, since: Lsn) -> bool:
        """Whether there is no more WAL than was read; then the next start stops behind its last record. Else nothing changes.

        PostgreSQL stops at a moment (or position) only once it reads what comes after it, and calls WAL that ends before that an
        error. Where all that is stored was read, which reaches further than the moment, its end is the state of that moment.
        `since`: where the last stored segment begins. By the last record, not without a target: more may be stored meanwhile.
        """
        ended = re.search(
            r"(?s).* redo done at ([0-9A-F]+/[0-9A-F]+).* FATAL:  recovery ended before configured", self.log()
        )
        if ended is None or Lsn.parse(ended[1]) < since or self.circumstance() is not None:
            return False
        kept = {name: value for name, value in self._recovery.items() if not name.startswith("recovery_target")}
        followed = {name: self._recovery[name] for name in ("recovery_target_action", "recovery_target_timeline")}
        self._recovery = {**kept, **followed, "recovery_target_lsn": ended[1]}
        self._to_end = True
        self._configure()
        return True

    def _configure(self) -> None:
        lines = {**self._settings(), **self._recovery, **{name: str(value) for name, value in self._wanted.items()}}
        text = "".join(f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in lines.items())
        self._write(self.work / "postgresql.conf", text)

    def _settings(self) -> dict[str, str]:
        settings = {
            "hba_file": str(self.work / "pg_hba.conf"),
            "ident_file": str(self.work / "pg_ident.conf"),
            "listen_addresses": "",
            "ssl": "off",
            "archive_mode": "off",
            "hot_standby": "on",
            "primary_conninfo": "",
            "primary_slot_name": "",
            "max_logical_replication_workers": "0",
            "shared_preload_libraries": ",".join(self._libraries()),
            "autovacuum": "off",
            # What is proven is thrown away, and what is kept is synced when it is handed out.
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "128MB",
            "maintenance_work_mem": "128MB",
            "log_line_prefix": "%m [%p] %e ",
            "lc_messages": "C",
            "log_statement": "none",
            "jit": "off",
        }
        return settings | ({"event_triggers": "off"} if self.install.major >= 17 else {})

    def _check_links(self) -> None:
        """A tablespace's link must lead where this restore put it, never to the live server's place."""
        for link in (self.data / "pg_tblspc").glob("*"):
            place = link.resolve()
            if not place.is_dir() or (place.stat().st_uid != self.user.uid):
                raise OpsError("a tablespace link leads to a place that is not part of this restore", where=str(link))
        if (self.data / "pg_wal").is_symlink():
            raise OpsError("pg_wal is a link that leads out of this restore", where=str(self.data / "pg_wal"))

    def _set_aside(self) -> None:
        auto = self.data / "postgresql.auto.conf"
        if auto.exists() and not (self.work / "postgresql.auto.conf").exists():
            shutil.move(auto, self.work / "postgresql.auto.conf")
        self._write(auto, "")
        self.wait_gone()
        for name in ("standby.signal", "postmaster.pid", "postmaster.opts"):
            (self.data / name).unlink(missing_ok=True)

    def wait_gone(self) -> None:
        """A killed program's server ends by itself; two of them over one directory would ruin it."""
        began = self.clock.monotonic()
        while not self.server.gone():
            if self.clock.monotonic() - began > _STOPPING:
                raise ConflictError(
                    "a server runs over this directory", where=str(self.data), remedy="stop it: pg_ctl stop -D …"
                )
            self.clock.sleep(0.05)

    def _libraries(self) -> list[str]:
        """Of the libraries that the source preloads, those that are here and do nothing by themselves."""
        named: list[str] = []
        for file in (self.data / "postgresql.conf", self.work / "postgresql.auto.conf"):
            if file.exists():
                found = re.findall(
                    r"(?m)^\s*shared_preload_libraries\s*=\s*'([^']*)'", file.read_text(errors="replace")
                )
                named = [name.strip().strip('"') for name in found[-1].split(",") if name.strip()] if found else named
        kept: list[str] = []
        for name in named:
            if name in _ACTING or self._library(name) is None:
                why = "it acts on its own" if name in _ACTING else "not installed here"
                note = f"shared_preload_libraries: {name} is left out of the sandbox ({why})"
                if note not in self.notes:
                    self.notes.append(note)
            else:
                kept.append(name)
        return kept

    def _library(self, name: str) -> Path | None:
        base = self.install.bindir.parent
        return next(
            (path for folder in ("lib", "lib/postgresql") if (path := base / folder / f"{name}.so").exists()), None
        )

    def _from_control_file(self) -> dict[str, int]:
        """The primary's parameters from pg_control, where the tool of this major is here; otherwise the log tells them."""
        tool = self.install.tool("pg_controldata")
        if tool is None:
            return {}
        out = run_tool([tool, "-D", self.data]).stdout
        found = dict(re.findall(r"(?m)^(\w+) setting:\s+(\d+)$", out))
        names = {"max_prepared_xacts": "max_prepared_transactions", "max_locks_per_xact": "max_locks_per_transaction"}
        values = {names.get(name, name): int(value) for name, value in found.items()}
        return {name: max(values[name], _DEFAULTS[name]) for name in _NOT_SMALLER if name in values}

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o600)
        self.user.own(path)

    # Running

    def start(self) -> None:
        """Start recovery. Raises OpsError with the log's end, CouldNotVerifyError where only our parameters were in the way."""
        for _ in range(len(_NOT_SMALLER) + 1):
            try:
                self.server.start({"config_file": str(self.work / "postgresql.conf")}, wait=600)
                return
            except OpsError:
                lower = {name: int(value) for name, value in _LOWER.findall(self.log())}
                if all(self._wanted.get(name, 0) >= value for name, value in lower.items()):
                    raise
                self._wanted |= lower
                self._configure()
        raise CouldNotVerifyError("the sandbox does not start with the primary's parameters", where=str(self.data))

    def wait_paused(
        self,
        *,
        timeout: float,
        alive: Callable[[], None] = lambda: None,
        progress: Callable[[Lsn], None] = lambda lsn: None,
    ) -> tuple[Lsn, datetime | None]:
        """Until recovery has reached its target and pauses: position, time of the last commit replayed.

        `alive` may raise what stops the waiting. Raises OpsError where the server ended, or promoted itself.
        """
        import psycopg

        began = self.clock.monotonic()
        while True:
            alive()
            if self.server.pid is None:
                raise OpsError(f"recovery ended before its target: {self.why()}", where=str(self.data))
            with contextlib.suppress(psycopg.OperationalError), self.connect() as connection:
                row = connection.execute(
                    "select pg_is_in_recovery(), case when pg_is_in_recovery() then pg_get_wal_replay_pause_state() end,"
                    " case when pg_is_in_recovery() then pg_last_wal_replay_lsn()::text end, pg_last_xact_replay_timestamp()"
                ).fetchone()
                if not row[0]:
                    raise OpsError("the server left recovery without being told to", where=str(self.data))
                if row[2]:
                    progress(Lsn.parse(row[2]))
                if row[1] == "paused":
                    return Lsn.parse(row[2]), row[3]
            if self.clock.monotonic() - began > timeout:
                raise CouldNotVerifyError(
                    f"recovery did not reach its target within {timeout:.0f} s", where=str(self.data)
                )
            self.clock.sleep(0.05)

    def wait_ended(
        self, *, timeout: float, progress: Callable[[Lsn], None] = lambda lsn: None
    ) -> tuple[Lsn, datetime | None]:
        """Until the WAL has ended and the server serves: position and time of the last commit replayed."""
        import psycopg

        began = self.clock.monotonic()
        newest: datetime | None = None
        while True:
            if self.server.pid is None:
                raise OpsError(f"recovery ended: {self.why()}", where=str(self.data))
            with contextlib.suppress(psycopg.OperationalError), self.connect() as connection:
                row = connection.execute(
                    "select pg_is_in_recovery(), pg_last_wal_replay_lsn()::text, pg_last_xact_replay_timestamp()"
                ).fetchone()
                newest = row[2] or newest
                if row[1]:
                    progress(Lsn.parse(row[1]))
                if not row[0]:
                    return Lsn.parse(row[1] or "0/0"), newest
            if self.clock.monotonic() - began > timeout:
                raise CouldNotVerifyError(f"recovery did not end within {timeout:.0f} s", where=str(self.data))
            self.clock.sleep(0.05)

    def serve(self) -> None:
        """Start a directory that has left recovery already, as closed to the world as during it."""
        self._check_links()
        self._set_aside()
        self._recovery: dict[str, str] = {}
        self._write(self.work / "pg_hba.conf", "local all all trust\n")
        self._write(self.work / "pg_ident.conf", "")
        self._configure()
        self.start()

    def promote(self) -> int:
        """End recovery; the new timeline."""
        with self.connect() as connection:
            row = connection.execute("select not pg_is_in_recovery() or pg_promote(true, 300)").fetchone()
            if not row[0]:
                raise OpsError("the server did not leave recovery within 300 s", where=str(self.data))
            return connection.execute(
                "select ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int"
            ).fetchone()[0]

    def connect(self, dbname: str = "postgres", **more: Any) -> Any:
        """As the bootstrap superuser, whatever the source called it; without the settings that were hung on role or database."""
        options = " ".join(f"-c {name}={value}" for name, value in _PLAIN.items())
        return self.server.connect(dbname, self.superuser, options=options, **more)

    @property
    def superuser(self) -> str:
        return self._superuser or "postgres"

    def find_superuser(self, known: Mapping[str, str | None]) -> None:
        """Ask for the role with oid 10, as any role that can log in. `known`: role to database."""
        import psycopg

        began = self.clock.monotonic()
        while True:
            errors: list[str] = []
            for role, dbname in known.items():
                try:
                    with self.server.connect(dbname or "postgres", role) as connection:
                        self._superuser = connection.execute("select rolname from pg_roles where oid = 10").fetchone()[
                            0
                        ]
                        return
                except psycopg.OperationalError as error:
                    errors.append(str(error).strip())
            if self.server.pid is None:
                raise OpsError(f"recovery ended before its target: {self.why()}", where=str(self.data))
            # A server that is ending refuses by its words, or has no ear any more; only an answer is a refusal.
            ending = any("FATAL:" not in said or "shutting down" in said for said in errors)
            if not ending or self.clock.monotonic() - began > _STOPPING:
                raise CouldNotVerifyError(
                    f"no role can log in to the restored server: {'; '.join(errors)}", where=str(self.data)
                )
            self.clock.sleep(0.05)

    def log(self) -> str:
        return self.server.log.read_text(errors="replace") if self.server.log.exists() else ""

    def why(self) -> str:
        """The lines of the log that say why recovery ended."""
        telling = [
            line
            for line in self.log().splitlines()
            if re.search(r"FATAL|PANIC|ERROR|restore_command", line)
            and "is starting up" not in line  # to our own asking
        ]
        return " | ".join(_PREFIX.sub("", line) for line in telling[-4:]) or self.server.log_tail(400)

    def circumstance(self) -> str | None:
        """What ended the server and says nothing about the data: no room, no memory, somebody's signal, nobody to ask for WAL."""
        log = self.log()
        found = re.search(r"\] (53100|53200|58030) (?:FATAL|PANIC): +(.*)", log) or re.search(
            r"(was terminated by signal (?:9|15))\b()", log
        )
        if found:
            return f"{found[1]} {found[2]}".strip()
        # The script's own words: what the fetcher knows, it tells with its reason.
        said = re.search(r"restore_command: (.*)", log)
        return said[1] if said else None

    def stopped_because(self) -> str | None:
        """PostgreSQL's own line on where it stopped, such as `recovery stopping before commit of transaction 789, time …`."""
        found = [line for line in self.log().splitlines() if "recovery stopping" in line]
        if not found:
            return None
        end = (
            ", the last record of the stored WAL: nothing was committed between it and the moment"
            if self._to_end
            else ""
        )
        return found[-1].split("LOG:", 1)[-1].strip() + end

    # Ending

    def stop(self, mode: str = "fast") -> None:
        self.server.stop(mode)

    def release(self) -> None:
        """Give the directory its own configuration back; what is ours goes."""
        aside = self.work / "postgresql.auto.conf"
        if aside.exists():
            shutil.move(aside, self.data / "postgresql.auto.conf")
            self.user.own(self.data / "postgresql.auto.conf")
        for name in ("recovery.signal", "postmaster.opts"):
            (self.data / name).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def remains(self) -> list[str]:
        """What is left after the teardown: processes that name the directories, and the directories. Empty when all is gone."""
        left = [str(path) for path in (self.data, self.work, self.server.sockets) if path.exists()]
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                # Our own command line names no directory; a server's names its data, its children's titles name its socket.
                if entry.name != str(os.getpid()) and str(self.data) in words and "postgres" in words:
                    left.append(f"process {entry.name}: {words[:80]}")
        return left
