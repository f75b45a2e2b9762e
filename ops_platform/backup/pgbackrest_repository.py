"""A pgBackRest repository as its own program shows it: `info`, `repo-ls`, `repo-get`, `restore`. Nothing is ever written to it.

The program is asked for every byte, so each kind of store that it knows (S3, Azure, GCS, SFTP, another host) works as it is
configured for it, encrypted or not.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops_platform.backup.model import segment_start
from ops_platform.backup.wal import check_segment_head
from ops_platform.backup.walcommits import segment_size
from ops_platform.clients.postgres_binaries import run_as
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptionError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    UnreachableError,
    UsageError,
)

_QUIET = ("--log-level-console=off", "--log-level-stderr=error", "--log-level-file=off")
_TIMEOUT = 600.0

# pgBackRest's exit codes (src/build/error/error.yaml) by what they mean for us. Others stay plain errors.
_NOT_THERE = {55, 73}
_KINDS: dict[int, type[OpsError]] = {
    **dict.fromkeys((27, 31, 32, 37, 40, 72, 76, 78), UsageError),
    **dict.fromkeys((39, 49, 82, 101, 103), UnreachableError),
    **dict.fromkeys((105,), AccessDeniedError),
    **dict.fromkeys((38, 50), ConflictError),
    **dict.fromkeys((26, 28, 29, 75, 95), CorruptionError),
    **dict.fromkeys(_NOT_THERE, NotThereError),
}
# `info` exits 0 whatever it met and puts the error's name into the status of the repository.
_NAMES: dict[str, type[OpsError]] = {
    "HostConnectError": UnreachableError,
    "ProtocolError": UnreachableError,
    "ServiceError": UnreachableError,
    "AccessError": AccessDeniedError,
}


def kind_of(code: int, text: str) -> type[OpsError]:
    if "Permission denied" in text or "Access Denied" in text or "AccessDenied" in text:
        return AccessDeniedError
    return _KINDS.get(code, OpsError)


@dataclass(frozen=True)
class PgBackRest:
    """The program, for one stanza of one configuration file. As root it runs as the servers' user."""

    config: Path
    stanza: str

    def command(self, name: str, *words: str, log: Sequence[str] = _QUIET) -> list[str]:
        program = shutil.which("pgbackrest")
        if program is None:
            raise CouldNotVerifyError(
                "the program pgbackrest is needed here, and is not installed",
                where=f"stanza {self.stanza}",
                remedy="apt-get install pgbackrest (Debian, PGDG), in the version that takes the backups",
            )
        if not self.config.is_file():
            raise UsageError(
                "there is no such pgBackRest configuration file",
                where=str(self.config),
                remedy="name it in the target's repository.config, as an absolute path of this machine",
            )
        return [program, name, f"--config={self.config}", f"--stanza={self.stanza}", *log, *words]

    def run(self, name: str, *words: str) -> bytes:
        """Its standard output. Raises the OpsError that fits its exit code."""
        command = self.command(name, *words)
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False, **self.popen)
        except subprocess.TimeoutExpired:
            raise UnreachableError(
                f"pgbackrest {name} gave no answer within {_TIMEOUT:.0f} s", where=self.where
            ) from None
        if done.returncode:
            raise self.error(name, done.returncode, done.stderr)
        return done.stdout

    def error(self, name: str, code: int, said: bytes) -> OpsError:
        text = " ".join(said.decode(errors="replace").split())[-800:]
        return kind_of(code, text)(
            f"pgbackrest {name} failed ({code}): {text or 'it said nothing'}",
            where=self.where,
            remedy=f"as {run_as().name}: pgbackrest --config={self.config} --stanza={self.stanza} check",
        )

    @property
    def popen(self) -> dict[str, Any]:
        return {"stdin": subprocess.DEVNULL, "cwd": "/", "env": {**os.environ, "LC_ALL": "C.UTF-8"}, **run_as().popen}

    @property
    def where(self) -> str:
        return f"{self.config} [{self.stanza}]"

    # What it knows

    def info(self, *words: str) -> dict[str, Any]:
        """`info` of the stanza. Raises where a repository could not be asked, or has no such stanza: neither is an empty one."""
        raw = self.run("info", "--output=json", *words).decode(errors="replace")
        try:
            found: list[dict[str, Any]] = json.loads(raw, strict=False)
            stanza = next(item for item in found if item["name"] == self.stanza)
            statuses = {repo["key"]: (repo["status"]["code"], repo["status"]["message"]) for repo in stanza["repo"]}
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise OpsError(
                "pgbackrest info gave an answer that is not understood",
                where=self.where,
                remedy="pgBackRest 2.32 or later is needed",
            ) from error
        for key, (code, message) in statuses.items():
            if code not in (0, 1, 2, 6):
                raise self._status_error(key, message)
        if statuses and all(code == 1 for code, _ in statuses.values()):
            raise NotThereError(
                f"the repository has no stanza {self.stanza}",
                where=str(self.config),
                remedy="correct repository.stanza, or see whether the repository's path is mounted",
            )
        return stanza

    def _status_error(self, key: int, message: str) -> OpsError:
        text = " ".join(message.split())
        named = re.match(r"\[(\w+)\]", text)
        kind = AccessDeniedError if "Permission denied" in text else _NAMES.get(named[1] if named else "", OpsError)
        # Of an encrypted repository with the wrong key it quotes bytes.
        shown = "".join(letter if letter.isprintable() else "?" for letter in text[:400])
        return kind(
            f"repo{key} could not be read: {shown}",
            where=self.where,
            remedy=f"as {run_as().name}: pgbackrest --config={self.config} --stanza={self.stanza} info; "
            f"to go on without it, take repo{key} out of the file",
        )

    # Restoring

    def restore(self, words: Sequence[str], told: Callable[[float], None]) -> None:
        """Run `restore`; `told` hears the share that is done. Raises CorruptionError where stored files are missing or damaged."""
        command = self.command(
            "restore", *words, log=("--log-level-console=detail", "--log-level-stderr=off", "--log-level-file=off")
        )
        lines: list[bytes] = []
        with (
            tempfile.TemporaryFile() as stderr,
            subprocess.Popen[bytes](command, stdout=subprocess.PIPE, stderr=stderr, **self.popen) as running,
        ):
            assert running.stdout is not None  # noqa: S101 - a pipe
            try:
                for line in running.stdout:
                    if match := re.search(rb" restored? file .*, (\d+(?:\.\d+)?)%\)", line):
                        told(float(match[1]) / 100)
                    elif b" ERROR: " in line or (lines and line.startswith(b" ")):
                        lines.append(line.partition(b" ERROR: ")[2] or line)
            except BaseException:
                running.terminate()
                raise
            code = running.wait()
            if code:
                stderr.seek(0)
                error = self.error("restore", code, b" ".join(lines) or stderr.read())
                damaged = isinstance(error, NotThereError)  # the list of backups was read: it is a file of theirs
                raise CorruptionError(error.what, where=error.where, remedy=error.remedy) if damaged else error


# The archive


@dataclass(frozen=True)
class ArchivedWal:
    """A file of the archive as `repo-ls` lists it. `wal.StoredWal`; unfinished segments are not archived."""

    timeline: int
    name: str
    history: bool
    repo: int
    path: str
    sha1: str | None = None
    suffix: str | None = None
    partial: bool = False


@dataclass(frozen=True)
class Plain:
    plain: bytes


_ARCHIVED = re.compile(
    r"(?:[0-9A-F]{16}/)?(?:(?P<segment>[0-9A-F]{24})-(?P<sha1>[0-9a-f]{40})(?:\.(?P<suffix>\w+))?|(?P<history>[0-9A-F]{8}\.history))"
)


class PgBackRestWal:
    """The WAL of one cluster in the archive. `walfetch.WalSource`. `places`: repository number and archive id, such as (1, "15-1")."""

    def __init__(self, program: PgBackRest, places: Sequence[tuple[int, str]]) -> None:
        self._program = program
        self._places = places
        self._known: dict[str, ArchivedWal] = {}

    def wal_key(self, system_identifier: int, name: str, *, partial: bool = False) -> str:
        known = self._known.get(name)
        return f"repo{known.repo}:{known.path}" if known else f"{self._program.where} {name}"

    def wal_listing(self, system_identifier: int | None = None) -> list[ArchivedWal]:
        """Every archived segment and history file. A segment that stands there twice with different content counts as missing."""
        found = [item for repo, archive in self._places for item in self._list(repo, archive, "", "--recurse")]
        self._known = {item.name: item for item in reversed(found)}
        return sorted(self._known.values(), key=lambda item: (item.timeline, item.name))

    def _list(self, repo: int, archive: str, below: str, *words: str) -> list[ArchivedWal]:
        base = f"archive/{self._program.stanza}/{archive}"
        path = f"{base}/{below}" if below else base
        raw = self._program.run("repo-ls", f"--repo={repo}", "--output=json", *words, path)
        try:
            names = [name for name, about in json.loads(raw).items() if about["type"] == "file"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OpsError("pgbackrest repo-ls gave an answer that is not understood", where=path) from error
        items = [item for name in names if (item := _archived(repo, path, name))]
        times = Counter(item.name for item in items)
        return [item for item in items if times[item.name] == 1]

    def get_wal(self, system_identifier: int, name: str, *, partial: bool = False) -> Plain | None:
        """A file's content, its SHA-1 compared. None only where the repository said that it has none."""
        if partial:
            return None
        for again in (False, True):
            item = None if again else self._known.get(name)
            item = item or self._look_for(name)
            if item is None:
                return None
            try:
                stored = self._program.run("repo-get", f"--repo={item.repo}", item.path)
            except NotThereError:  # expired since it was listed
                self._known.pop(name, None)
                continue
            return Plain(self._checked(system_identifier, item, _decompressed(item, stored)))
        return None

    def _look_for(self, name: str) -> ArchivedWal | None:
        """A file that was archived since the last listing."""
        below = "" if name.endswith(".history") else name[:16]
        for repo, archive in self._places:
            for item in self._list(repo, archive, below):
                self._known.setdefault(item.name, item)
        return self._known.get(name)

    def _checked(self, system_identifier: int, item: ArchivedWal, plain: bytes) -> bytes:
        if item.history:
            return plain
        if hashlib.sha1(plain, usedforsecurity=False).hexdigest() != item.sha1:
            raise CorruptionError("the WAL is not what was archived (SHA-1 differs)", where=item.path)
        if size := segment_size(plain):
            check_segment_head(plain, segment_start(item.name, size)[1], system_identifier, item.path)
        return plain


def _archived(repo: int, folder: str, name: str) -> ArchivedWal | None:
    match = _ARCHIVED.fullmatch(name)
    if match is None:  # backup history files, unfinished segments of an old timeline
        return None
    file = match["segment"] or match["history"]
    return ArchivedWal(
        int(file[:8], 16), file, match["segment"] is None, repo, f"{folder}/{name}", match["sha1"], match["suffix"]
    )


def _decompressed(item: ArchivedWal, stored: bytes) -> bytes:
    """By the suffix that pgBackRest gives the file. Raises CorruptionError for bytes that do not open."""
    import lz4.frame
    import zstandard

    opened: dict[str, Callable[[bytes], bytes]] = {
        "gz": lambda data: zlib.decompress(data, wbits=31),
        "bz2": bz2.decompress,
        "lz4": lz4.frame.decompress,
        "zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    }
    if item.suffix is None:
        return stored
    if item.suffix not in opened:
        raise OpsError(f"archived in a compression that is not known here: {item.suffix}", where=item.path)
    try:
        return opened[item.suffix](stored)
    except (zlib.error, OSError, RuntimeError, EOFError, ValueError, zstandard.ZstdError) as error:
        raise CorruptionError(f"the archived file does not open: {error}", where=item.path) from error
