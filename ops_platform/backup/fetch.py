"""Brings a base backup back to disk: blocks in any order, several at a time, resumable after a kill -9.

While a restore is unfinished its directory holds `.ops_restore`, a journal of the blocks that were written. It cannot be taken for
a whole one: PostgreSQL's control file is kept aside and renamed into place when everything else is on disk, and no server
starts without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from ops_platform.backup.model import Manifest, Progress, no_progress
from ops_platform.backup.repository import Repository
from ops_platform.backup.tarindex import Entry
from ops_platform.counting import no_room
from ops_platform.errors import CorruptionError, NotThereError, OpsError, UsageError

JOURNAL = ".ops_restore"
_CONTROL = "global/pg_control"
_CONTROL_ASIDE = f"{JOURNAL}.pg_control"


@dataclass(frozen=True)
class Owner:
    """Who the restored files belong to, when this program runs as root."""

    uid: int
    gid: int


@dataclass(frozen=True)
class _Piece:
    """Bytes of one file inside one block."""

    entry: Entry
    file_offset: int
    block_offset: int
    length: int


class FileIndex:
    """Where each file of a backup stands in its archives."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries

    @classmethod
    def read(cls, repository: Repository, manifest: Manifest) -> FileIndex:
        if manifest.index is None:
            raise UsageError(f"{manifest.backup_id} was compressed at the server and has no file index")
        text, raw = repository.read_part(manifest.index), [archive.raw for archive in manifest.archives]
        try:
            entries = [Entry(**json.loads(line)) for line in text.decode().splitlines()]
            fits = all(
                0 <= entry.archive < len(raw) and 0 <= entry.offset <= entry.offset + entry.size <= raw[entry.archive]
                for entry in entries
            )
        except (ValueError, TypeError) as error:
            raise CorruptionError(f"the file index cannot be read: {error}", where=manifest.index.key) from error
        if not fits:
            raise CorruptionError("the file index names bytes that the backup does not have", where=manifest.index.key)
        return cls(entries)

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries)

    def find(self, archive: int, path: str) -> Entry:
        for entry in self.entries:
            if entry.path == path and entry.archive == archive:
                return entry
        raise NotThereError(f"the backup has no file {path!r}")

    def pieces(self, block_size: int) -> dict[tuple[int, int], list[_Piece]]:
        """For each (archive, block) the parts of files that it holds."""
        found: dict[tuple[int, int], list[_Piece]] = {}
        for entry in self.entries:
            done = 0
            while done < entry.size:
                block, inside = divmod(entry.offset + done, block_size)
                length = min(entry.size - done, block_size - inside)
                found.setdefault((entry.archive, block), []).append(_Piece(entry, done, inside, length))
                done += length
        return found


def fetch_file(repository: Repository, manifest: Manifest, path: str) -> bytes:
    """One file of the data directory, from the blocks that hold it and no others."""
    index = FileIndex.read(repository, manifest)
    data = next(number for number, archive in enumerate(manifest.archives) if archive.oid is None)
    entry, content = index.find(data, path), b""
    pieces = FileIndex([entry]).pieces(manifest.block_size)
    for (archive, block), parts in sorted(pieces.items()):
        raw = repository.read_block(manifest, archive, block)
        content += b"".join(raw[part.block_offset : part.block_offset + part.length] for part in parts)
    return content


def fetch_backup(
    repository: Repository,
    manifest: Manifest,
    into: Path,
    *,
    tablespaces: dict[str, Path] | None = None,
    workers: int = 4,
    owner: Owner | None = None,
    progress: Progress = no_progress,
    sync: bool = True,
) -> dict[int, Path]:
    """The files of one backup, as the server sent them, into a directory that is empty or its own unfinished restore.

    `sync` False: what is made of them is synced, and they are thrown away.
    Returns where each tablespace (by oid) was put. Raises CorruptionError, UsageError, OpsError (no space left).
    """
    roots = _roots(manifest, into, tablespaces or {})
    spaces = {archive.oid: root for archive, root in zip(manifest.archives, roots, strict=True) if archive.oid}
    try:
        with _Journal(into, manifest.backup_id, roots) as journal:
            if not (into / _CONTROL).exists():  # there it is whole: the last try was killed in its very last step
                _fetch_all(repository, manifest, _Tree(into, roots, owner), journal, workers, progress)
                _write_owned(into / "backup_manifest", repository.pg_manifest(manifest), owner)
                _link_tablespaces(into, spaces, owner)
                if sync:
                    progress("syncing to disk", 0, None)
                    for root in roots:
                        sync_file_system(root)
                (into / _CONTROL_ASIDE).rename(into / _CONTROL)
                if sync:
                    sync_file_system(into)
        (into / JOURNAL).unlink()
    except OSError as error:
        raise _disk_error(error, into) from error
    return spaces


def _roots(manifest: Manifest, into: Path, tablespaces: dict[str, Path]) -> list[Path]:
    """Where each archive goes."""
    return [
        into if archive.oid is None else tablespaces.get(archive.location or "") or Path(archive.location or "")
        for archive in manifest.archives
    ]


class _Journal:
    """One file: a line that says what is restored to where, then one for each block, appended after its files were written.

    After a crash of the machine the blocks are fetched again: what was written had perhaps not reached the disk.
    """

    def __init__(self, into: Path, backup_id: str, roots: list[Path]) -> None:
        self._path = into / JOURNAL
        self._lock = threading.Lock()
        self.done: set[tuple[int, int]] = set()
        head = {"backup": backup_id, "roots": [str(root) for root in roots], "boot": _boot()}
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        if lines:
            begun = json.loads(lines[0])
            _check_same(into, begun, head)
            if begun["boot"] == head["boot"]:
                marks = (line.split() for line in lines[1:] if line.endswith("."))  # a line that was cut off has no dot
                self.done = {(int(archive), int(block)) for archive, block, _ in marks}
        else:
            for root in roots:
                check_empty(into, root)
        into.mkdir(parents=True, exist_ok=True)
        into.chmod(0o700)
        if not self.done:
            self._path.write_text(json.dumps(head) + "\n")
        self._file = self._path.open("a")

    def add(self, archive: int, block: int) -> None:
        with self._lock:
            self._file.write(f"\n{archive} {block} .")
            self._file.flush()

    def bytes(self, manifest: Manifest) -> int:
        return sum(manifest.archives[a].blocks[b].raw for a, b in self.done)

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _check_same(into: Path, begun: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    if begun["backup"] != wanted["backup"]:
        raise UsageError(
            f"here stands an unfinished restore of {begun['backup']}", where=str(into), remedy="remove it first"
        )
    if begun["roots"] != wanted["roots"]:
        raise UsageError(
            f"this restore was begun with other tablespace directories: {begun['roots']}",
            where=str(into),
            remedy="call it as it was begun, or remove it first",
        )


def check_empty(into: Path, root: Path) -> None:
    """Raises UsageError for a directory, or a tablespace's, in which something stands."""
    if not root.exists() or not any(entry.name != JOURNAL for entry in root.iterdir()):
        return
    if root == into:
        raise UsageError(
            "the directory is not empty", where=str(into), remedy="name another one; nothing is restored over files"
        )
    raise UsageError(
        f"the tablespace directory {root} is not empty",
        where=str(into),
        remedy="give another one: --tablespace OLD=NEW",
    )


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class _Tree:
    """Makes directories and files below the archives' roots, and refuses every path that would leave them."""

    def __init__(self, into: Path, roots: list[Path], owner: Owner | None) -> None:
        self.into = into
        self.roots = roots
        self._owner = owner

    def path(self, entry: Entry) -> Path:
        parts = PurePosixPath(entry.path).parts
        if entry.path.startswith("/") or ".." in parts:
            raise CorruptionError(f"the backup names a path outside its directory: {entry.path!r}")
        root = self.roots[entry.archive]
        return root / _CONTROL_ASIDE if root == self.into and entry.path == _CONTROL else root.joinpath(*parts)

    def prepare(self, entries: list[Entry], *, keep: bool) -> None:
        """Every directory, and every file at its full size, so that its parts may be written in any order."""
        for root in self.roots:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.own(root)
        for entry in sorted(entries, key=lambda entry: entry.kind != "dir"):
            path = self.path(entry)
            if entry.kind == "dir":
                path.mkdir(mode=0o700, exist_ok=True, parents=True)
            elif entry.kind == "link":
                continue  # tablespaces are linked at the end, where they really are
            elif not (keep and path.exists()):
                path.parent.mkdir(mode=0o700, exist_ok=True, parents=True)
                with path.open("wb") as file:
                    file.truncate(entry.size)
                path.chmod(entry.mode or 0o600)
            self.own(path)

    def write(self, piece: _Piece, block: memoryview) -> None:
        descriptor = os.open(self.path(piece.entry), os.O_WRONLY)
        try:
            data, at = block[piece.block_offset : piece.block_offset + piece.length], piece.file_offset
            while data:
                written = os.pwrite(descriptor, data, at)
                data, at = data[written:], at + written
        finally:
            os.close(descriptor)

    def stream_in(self, member: tarfile.TarInfo, archive: int, content: IO[bytes] | None) -> None:
        path = self.path(Entry(archive, member.name, "file", 0, member.size, member.mode, int(member.mtime)))
        if member.isdir():
            path.mkdir(mode=0o700, exist_ok=True, parents=True)
        elif content is not None:
            path.parent.mkdir(mode=0o700, exist_ok=True, parents=True)
            with path.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            path.chmod(0o600)
        if path.exists():
            self.own(path)

    def own(self, path: Path) -> None:
        if self._owner:
            os.chown(path, self._owner.uid, self._owner.gid, follow_symlinks=False)


def _fetch_all(
    repository: Repository, manifest: Manifest, tree: _Tree, journal: _Journal, workers: int, progress: Progress
) -> None:
    if manifest.index is None:
        _check_space(tree.into, manifest.raw)
        _fetch_sequential(repository, manifest, tree, progress)
    else:
        index = FileIndex.read(repository, manifest)
        _check_space(tree.into, max(0, index.bytes - journal.bytes(manifest)))
        tree.prepare(index.entries, keep=bool(journal.done))
        _fetch_blocks(repository, manifest, index, tree, journal, workers, progress)


def _fetch_blocks(
    repository: Repository,
    manifest: Manifest,
    index: FileIndex,
    tree: _Tree,
    journal: _Journal,
    workers: int,
    progress: Progress,
) -> None:
    pieces = index.pieces(manifest.block_size)
    total = sum(archive.raw for archive in manifest.archives)
    done = journal.bytes(manifest)
    waiting = [key for key in sorted(pieces) if key not in journal.done]

    def fetch(key: tuple[int, int]) -> int:
        raw = memoryview(repository.read_block(manifest, *key))
        for piece in pieces[key]:
            tree.write(piece, raw)
        journal.add(*key)
        return len(raw)

    with ThreadPoolExecutor(workers, thread_name_prefix="fetch") as pool:
        running: set[Future[int]] = set()
        try:
            for key in waiting:
                if len(running) >= workers * 2:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    done += sum(future.result() for future in finished)
                    progress("restore", done, total)
                running.add(pool.submit(fetch, key))
            for future in running:
                done += future.result()
                progress("restore", done, total)
        finally:
            for future in running:
                future.cancel()


def _fetch_sequential(repository: Repository, manifest: Manifest, tree: _Tree, progress: Progress) -> None:
    """Archives that the server compressed: one stream each, from its first block to its last."""
    for root in tree.roots:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        tree.own(root)
        if not any(entry.name != JOURNAL for entry in root.iterdir()):
            continue
        for entry in root.iterdir():  # an earlier try: a stream cannot be resumed in its middle
            if entry.name != JOURNAL:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    try:
        for number in range(len(manifest.archives)):
            stream = _decompressed(manifest, _blocks(repository, manifest, number, progress))
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    if not member.issym():
                        tree.stream_in(member, number, tar.extractfile(member) if member.isreg() else None)
    except tarfile.TarError as error:
        raise CorruptionError(f"the archive cannot be read: {error}", where=manifest.backup_id) from error


def _blocks(repository: Repository, manifest: Manifest, archive: int, progress: Progress) -> Iterator[bytes]:
    """The blocks in order, the next ones fetched meanwhile."""
    count, done = len(manifest.archives[archive].blocks), 0
    with ThreadPoolExecutor(3, thread_name_prefix="fetch") as pool:
        coming: dict[int, Future[bytes]] = {}
        for number in range(count):
            for ahead in range(number, min(number + 4, count)):
                if ahead not in coming:
                    coming[ahead] = pool.submit(repository.read_block, manifest, archive, ahead)
            block = coming.pop(number).result()
            done += len(block)
            progress("restore", done, manifest.archives[archive].raw)
            yield block


class _Stream(io.RawIOBase):
    """A file object over pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _decompressed(manifest: Manifest, pieces: Iterator[bytes]) -> IO[bytes]:
    raw = io.BufferedReader(_Stream(pieces), 1 << 20)
    if manifest.compression == "zstd":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20)
    import lz4.frame

    return lz4.frame.LZ4FrameFile(raw, "rb")


def _write_owned(path: Path, content: bytes, owner: Owner | None) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    if owner:
        os.chown(path, owner.uid, owner.gid)


def _link_tablespaces(into: Path, spaces: dict[int, Path], owner: Owner | None) -> None:
    """Links under pg_tblspc to where the tablespaces are now. The server's own map names the old places, so it goes."""
    for oid, place in spaces.items():
        link = into / "pg_tblspc" / str(oid)
        link.unlink(missing_ok=True)
        link.symlink_to(place.absolute())
        if owner:
            os.chown(link, owner.uid, owner.gid, follow_symlinks=False)
    (into / "tablespace_map").unlink(missing_ok=True)


def combine(
    program: Path, chain: list[Path], into: Path, moved: dict[Path, Path], run: dict[str, object] | None = None
) -> None:
    """pg_combinebackup over restored backups, full first. `moved`: tablespace directory of the last backup to the final one.

    It does not check that the chain is whole: `Repository.chain` has.
    """
    mapping = [f"--tablespace-mapping={old}={new}" for old, new in moved.items()]
    # Without its own sync, which calls for each of thousands of files.
    command = [str(program), *(str(path) for path in chain), "--no-sync", "-o", str(into), *mapping]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **(run or {}))  # type: ignore[call-overload]
    if done.returncode:
        raise OpsError(f"pg_combinebackup failed: {done.stderr.strip()[-800:]}", where=str(into))
    for root in (into, *moved.values()):
        sync_file_system(root)


def _check_space(into: Path, needed: int) -> None:
    if problem := no_room(needed * 1.02, shutil.disk_usage(into).free):
        raise OpsError(problem, where=str(into), remedy="free space, or restore elsewhere")


def _disk_error(error: OSError, where: Path) -> OpsError:
    return OpsError(
        f"writing failed: {error.strerror or error}",
        where=str(error.filename or where),
        remedy="free space and call again: it goes on here",
    )


def sync_file_system(path: Path) -> None:
    """Everything of the file system that holds `path` is on disk: one call instead of one for each of thousands of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(AttributeError):
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) == 0:
                return
        os.sync()
    finally:
        os.close(descriptor)
