"""WAL for a recovering server: fetched ahead by one long-lived process, handed over by a rename.

`restore_command` is a shell script that starts no Python: it takes a segment that is ready out of the spool, or asks and waits.
Files in the spool (all written elsewhere and renamed, so that they are whole when they appear):

    ready/NAME     the segment or history file, plain, at its full size: `mv` takes it (and makes room)
    ask/NAME       the server waits for this one
    absent/NAME    the store said that it has no such file: exit 1, which PostgreSQL takes for the end of WAL
    failed/NAME    could not be had, with the reason: exit 126, on which PostgreSQL stops the recovery
    pulse          counts up twice a second as long as we live; a script that sees it stand still exits with 126

The difference between the last two is what keeps a recovery from ending early without anybody noticing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self

from ops_platform.backup.model import Lsn, segment_name, segment_start
from ops_platform.backup.wal import (
    HISTORY_NAME,
    SEGMENT_NAME,
    Span,
    Stock,
    StoredWal,
    check_segment_head,
    history_name,
    parse_history,
    stock,
)
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import CorruptionError, OpsError

_SCRIPT = """#!/bin/sh
# Written for one recovery. Exit 0: there; 1: the store has none, the end of WAL; 126: could not ask, recovery must stop.
spool={spool}
name=$1 to=$2 decided=
# A shell that fails leaves with 1 or 2, which PostgreSQL would take for the end of WAL.
trap '[ "$decided" ] || exit 126' EXIT
leave() {{ decided=$1; exit "$1"; }}
fail() {{ echo "restore_command: $*" >&2; leave 126; }}
ask() {{ true > "$spool/ask/$name" || fail "cannot ask for $name: $spool is not writable"; }}
# Comes back where it is gone by now: what the server has passed is cleared away, and it may come back to it just then.
take() {{
    rm -f "$spool/ask/$name"
    why=$(mv "$spool/ready/$name" "$to" 2>&1) && leave 0
    [ -e "$spool/ready/$name" ] && fail "cannot move $name to $to: $why"
}}
[ -e "$spool/ready/$name" ] && take
rm -f "$spool/absent/$name" "$spool/failed/$name" # answers to a question whose asker was killed
ask
last= still=0
while true; do
    [ -e "$spool/ready/$name" ] && {{ take; ask; }}
    [ -e "$spool/absent/$name" ] && {{ rm -f "$spool/absent/$name"; leave 1; }}
    [ -e "$spool/failed/$name" ] && {{ why=$(cat "$spool/failed/$name"); rm -f "$spool/failed/$name"; fail "$why"; }}
    [ -d /proc/self ] && [ ! -d /proc/{pid} ] && fail "the fetcher (process {pid}) is gone"
    pulse=
    [ -e "$spool/pulse" ] && read -r pulse < "$spool/pulse"
    if [ "$pulse" = "$last" ]; then still=$((still + 1)); else still=0 last=$pulse; fi
    [ "$still" -gt {patience} ] && fail "the fetcher (process {pid}) does not answer"
    sleep 0.02 2>/dev/null || sleep 1
done
"""
_FOLDERS = ("ready", "ask", "absent", "failed", "new")
_PULSE_EVERY = 0.5
# Looks of the script (0.02 s each) without a beat of the pulse, after which it gives up: about a minute on a busy machine.
_PATIENCE = 1500
_RELIST_AFTER = 30.0


class WalFile(Protocol):
    @property
    def plain(self) -> bytes: ...


class WalSource(Protocol):
    """What is asked of an archive: `repository.Repository` answers, and what reads another tool's archive."""

    def wal_listing(self, system_identifier: int | None = None) -> Sequence[StoredWal]: ...

    def get_wal(self, system_identifier: int, name: str, *, partial: bool = False) -> WalFile | None:
        """None only where the store said that it has no such file."""
        ...

    def wal_key(self, system_identifier: int, name: str, *, partial: bool = False) -> str:
        """What errors call the file."""
        ...


class WalFetchAhead:
    """Serves one cluster's WAL to one recovering server for as long as it is entered. `backup.model.WalFetcher`.

    `spool` should be on the file system of the data directory, so that handing over is a rename; it holds at most `ahead`
    segments. `retry_for`: seconds for which an answer of the store is waited for before the recovery is stopped.
    """

    def __init__(
        self,
        repository: WalSource,
        system_identifier: int,
        spool: Path,
        *,
        segment_size: int = 16 << 20,
        ahead: int = 12,
        workers: int = 4,
        retry_for: float = 60.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._repository = repository
        self._sysid = system_identifier
        self._spool = spool
        self._size = segment_size
        self._ahead = ahead
        self._workers = workers
        self._retry_for = retry_for
        self._clock = clock
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bytes = 0
        self._segments = 0
        self._stocks: dict[int, Stock] = {}
        self._histories: set[int] = set()
        self._lines: dict[int, list[Span]] = {}
        self._listed_at = 0.0
        self._line: list[Span] = []
        self._flying: dict[str, Future[bool]] = {}
        self._failed: set[str] = set()  # could not be fetched ahead: left until the server asks for them
        self._waiting: set[str] = set()
        self._offered: set[str] = set()
        self._cursor: tuple[int, int] | None = None  # timeline and segment number that the server asked for last
        self._thread: threading.Thread | None = None
        self._owner: os.stat_result | None = None
        self._pool: ThreadPoolExecutor | None = None
        self.failure: BaseException | None = None

    # Protocol

    def __enter__(self) -> Self:
        self._spool.mkdir(parents=True, exist_ok=True)
        self._owner = self._spool.stat()
        for name in _FOLDERS:
            shutil.rmtree(self._spool / name, ignore_errors=True)
            folder = self._spool / name
            folder.mkdir(mode=0o700)
            self._own(folder)
        script = self._spool / "restore.sh"
        script.write_text(_SCRIPT.format(spool=_quote(str(self._spool.resolve())), pid=os.getpid(), patience=_PATIENCE))
        script.chmod(0o755)
        self._beat(0)
        self._relist()
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="wal-get")
        self._thread = threading.Thread(target=self._serve, name="wal-fetch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for name in _FOLDERS:
            shutil.rmtree(self._spool / name, ignore_errors=True)

    @property
    def restore_command(self) -> str:
        """For postgresql.conf, without quotes of its own around it. `%` in the path is doubled, as PostgreSQL wants it.

        Whatever is neither 0 nor 1 becomes 126: a shell that cannot read the script, because the spool is gone, leaves with 2.
        """
        script = _quote(str(self._spool.resolve() / "restore.sh")).replace("%", "%%")
        return f'sh {script} "%f" "%p" || {{ [ $? -eq 1 ] && exit 1; exit 126; }}'

    @property
    def fetched_bytes(self) -> int:
        return self._bytes

    @property
    def fetched_segments(self) -> int:
        return self._segments

    # The one thread that answers. Its own heartbeat is the pulse: should it die, the script does not wait for ever.

    def _beat(self, count: int) -> None:
        self._write(self._spool / "pulse", f"{count}\n".encode())

    def _serve(self) -> None:
        beats, beat_at = 0, 0.0
        while not self._stop.is_set():
            try:
                if self._clock.monotonic() - beat_at > _PULSE_EVERY:
                    beats, beat_at = beats + 1, self._clock.monotonic()
                    self._beat(beats)
                self._turn()
            except OSError as error:  # a full disk: say so to whoever asks, and go on
                for name in self._names("ask"):
                    with contextlib.suppress(OSError):
                        self._fail(name, error)
            self._stop.wait(0.01)

    def _turn(self) -> None:
        for name in [name for name, future in self._flying.items() if future.done()]:
            self._landed(name, self._flying.pop(name))
        for name in self._names("ask"):
            with contextlib.suppress(FileNotFoundError):
                (self._spool / "ask" / name).unlink()
            self._asked_for(name)
        self._fill()

    def _landed(self, name: str, future: Future[bool]) -> None:
        waited_for = name in self._waiting
        self._waiting.discard(name)
        if (error := future.exception()) is not None:
            self._fail(name, error)
        elif not future.result():
            self._failed.add(name)
            if waited_for:
                self._submit(name)
        elif waited_for and not any((self._spool / kind / name).exists() for kind in ("ready", "absent", "failed")):
            self._submit(name)  # an earlier question has taken the answer

    def _names(self, folder: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self._spool / folder))  # noqa: PTH208 - names alone, a hundred times a second
        return []

    # Answers

    def _asked_for(self, name: str) -> None:
        """Have it fetched first, or answer."""
        if SEGMENT_NAME.fullmatch(name):
            timeline, start = segment_start(name, self._size)
            self._cursor = (timeline, start // self._size)
        elif not HISTORY_NAME.fullmatch(name):
            self._answer("absent", name)
            return
        if name in self._flying:
            self._waiting.add(name)  # being fetched ahead: only a failure needs another try
        else:
            self._submit(name)

    def _submit(self, name: str) -> None:
        assert self._pool is not None  # noqa: S101 - entered
        self._failed.discard(name)
        self._flying[name] = self._pool.submit(self._fetch_asked, name)

    def _fetch_asked(self, name: str) -> bool:
        try:
            plain = self._retrying(name)
        except OpsError as error:
            self._fail(name, error)
            return True
        if plain is None:
            self._answer("absent", name)
        else:
            self._ready(name, plain)
            if HISTORY_NAME.fullmatch(name):
                self._follow(name, plain)
            else:
                self._relist_where_new(name)
        return True

    def _fail(self, name: str, error: BaseException) -> None:
        self.failure = error
        self._answer("failed", name, str(error) if isinstance(error, OpsError) else f"{name}: {error}")

    def _answer(self, kind: str, name: str, text: str = "") -> None:
        self._write(self._spool / kind / name, text.encode())

    def _retrying(self, name: str) -> bytes | None:
        """None where the store said that there is none, and nothing after it says that there should be."""
        began = self._clock.monotonic()
        while True:
            try:
                return self._history(name) if HISTORY_NAME.fullmatch(name) else self._segment(name)
            except CorruptionError:
                raise
            except OpsError:
                if self._stop.is_set() or self._clock.monotonic() - began > self._retry_for:
                    raise
                self._stop.wait(0.5)

    def _history(self, name: str) -> bytes | None:
        sealed = self._repository.get_wal(self._sysid, name)
        return None if sealed is None else sealed.plain

    def _segment(self, name: str) -> bytes | None:
        sealed = self._repository.get_wal(self._sysid, name)
        if sealed is not None:
            return self._checked(name, sealed.plain, whole=True)
        self._relist()
        timeline, start = segment_start(name, self._size)
        number = start // self._size
        self._refuse_gap(name, timeline, number)
        entry = self._stocks.get(timeline)
        if entry is None or number not in entry.partial:
            return None
        unfinished = self._repository.get_wal(self._sysid, name, partial=True)
        if unfinished is None:  # it became whole in this very moment
            sealed = self._repository.get_wal(self._sysid, name)
            return None if sealed is None else self._checked(name, sealed.plain, whole=True)
        return self._checked(name, unfinished.plain, whole=False).ljust(self._size, b"\0")

    def _checked(self, name: str, plain: bytes, *, whole: bool) -> bytes:
        where = self._repository.wal_key(self._sysid, name, partial=not whole)
        if len(plain) > self._size or (whole and len(plain) != self._size):
            raise CorruptionError(f"{len(plain)} bytes where a segment has {self._size}", where=where)
        check_segment_head(plain, segment_start(name, self._size)[1], self._sysid, where)
        return plain

    def _refuse_gap(self, name: str, timeline: int, number: int) -> None:
        """A missing segment is the end of WAL only when nothing that is stored says that more was written after it."""
        for item in self._histories - self._lines.keys():
            sealed = self._repository.get_wal(self._sysid, history_name(item))
            self._lines[item] = parse_history(item, sealed.plain if sealed else None)
        if timeline in self._lines and number < self._lines[timeline][-1].begin // self._size:
            return  # before the fork: the server asks each timeline in turn
        entry = self._stocks.get(timeline)
        later = [n for n in entry.whole | entry.partial if n > number] if entry else []
        # A child that was forked off later proves that this one went on until there, and repeats the segment of the fork.
        spans = [span for line in self._lines.values() for span in line if span.timeline == timeline]
        later += [at for span in spans if span.end is not None and (at := span.end // self._size) > number]
        if later:
            raise CorruptionError(
                f"the archive has a gap: {name} is missing, and WAL went on until at least {Lsn(max(later) * self._size)}",
                where=self._repository.wal_key(self._sysid, name),
                remedy="recover to a moment before the gap, or from a backup after it: ops wal status",
            )

    # Fetching ahead

    def _relist(self) -> None:
        self._listed_at = self._clock.monotonic()
        listing = self._repository.wal_listing(self._sysid)
        self._histories = {item.timeline for item in listing if item.history}
        self._stocks = stock(listing, self._size)

    def _relist_where_new(self, name: str) -> None:
        """The archive grew while the recovery ran: what came after the last look is fetched ahead, too."""
        timeline, start = segment_start(name, self._size)
        entry = self._stocks.get(timeline)
        known = entry is not None and start // self._size in entry.whole
        if not known and self._clock.monotonic() - self._listed_at > _RELIST_AFTER:
            with contextlib.suppress(OpsError):  # the next one may succeed; nothing depends on it
                self._relist()

    def _follow(self, name: str, content: bytes) -> None:
        """The server reads history files up to the newest: that line is the one that it will replay."""
        timeline = int(name[:8], 16)
        with contextlib.suppress(CorruptionError):
            line = parse_history(timeline, content)
            if not self._line or timeline >= self._line[-1].timeline:
                self._line = line

    def _fill(self) -> None:
        """Keep the next segments in the spool or on their way."""
        if self._cursor is None or self._pool is None:
            return
        with self._lock:
            offered = set(self._offered)  # before the look: what is put there meanwhile was not taken
        ready = set(self._names("ready"))
        for name in offered - ready:  # taken
            self._offered.discard(name)
            timeline, start = segment_start(name, self._size)
            self._cursor = max(self._cursor, (timeline, start // self._size), key=lambda place: place[1])
        wanted = self._next(self._cursor)
        for name in ready - set(wanted):
            if SEGMENT_NAME.fullmatch(name) and self._passed(name):
                with contextlib.suppress(FileNotFoundError):
                    (self._spool / "ready" / name).unlink()
        for name in wanted:
            if name in ready or name in self._flying or name in self._failed or name in self._offered:
                continue
            if len(self._flying) + len(ready) >= self._ahead:
                return
            self._flying[name] = self._pool.submit(self._fetch_ahead, name)

    def _passed(self, name: str) -> bool:
        return self._cursor is not None and segment_start(name, self._size)[1] // self._size < self._cursor[1]

    def _next(self, cursor: tuple[int, int]) -> list[str]:
        """The names that the server will ask for after `cursor`, along its line of timelines."""
        timeline, number = cursor
        found: list[str] = []
        for at in range(number + 1, number + 1 + self._ahead):
            on = timeline
            for span in self._line:
                if span.timeline >= timeline and span.begin // self._size <= at:
                    on = span.timeline
            entry = self._stocks.get(on)
            if entry is None or at not in entry.whole:
                break
            found.append(segment_name(on, at * self._size, self._size))
        return found

    def _fetch_ahead(self, name: str) -> bool:
        """False: not to be had now. The server's question, when it comes, is the one that is answered."""
        try:
            sealed = self._repository.get_wal(self._sysid, name)
            if sealed is None:
                return False
            self._ready(name, self._checked(name, sealed.plain, whole=True))
        except OpsError:
            return False
        return True

    def _ready(self, name: str, plain: bytes) -> None:
        self._write(self._spool / "ready" / name, plain)
        with self._lock:
            self._bytes += len(plain)
            if SEGMENT_NAME.fullmatch(name):
                self._segments += 1
                self._offered.add(name)

    # Files

    def _write(self, path: Path, body: bytes) -> None:
        fresh = self._spool / "new" / f"{path.parent.name}-{path.name}-{threading.get_ident()}"
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:  # noqa: PTH123 - the mode
                out.write(body)
            self._own(fresh)
            fresh.rename(path)
        except OSError:  # on a full disk the piece would take the room that an answer needs
            fresh.unlink(missing_ok=True)
            raise

    def _own(self, path: Path) -> None:
        # As root the server is another user: the spool's owner is the one who has to rename out of it.
        if self._owner is not None and os.geteuid() == 0 and self._owner.st_uid != 0:
            os.chown(path, self._owner.st_uid, self._owner.st_gid)


def _quote(text: str) -> str:
    import shlex

    return shlex.quote(text)
