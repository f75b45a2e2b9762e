"""Room on a disk onto which several restores write side by side: what the others still have to write is not free.

Who is about to write notes how much, in a file that is locked for as long as it works: the system frees the lock of one that was killed.
The notes of a user count for that user's programs, on every file system of this machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ops_platform.counting import no_room, size
from ops_platform.errors import OpsError


def lacking(place: Path, needed: float) -> str | None:
    """What to say where `place` has too little room for so many bytes more; None where it has enough."""
    with _notes() as notes:
        return _lacking(place, needed, notes)


@contextmanager
def reserved(places: Sequence[Path], needed: float, *, begun: bool = False) -> Generator[None]:
    """Room for so many bytes in all in these directories of one file system. Raises OpsError where there is too little.

    `begun`: some of them stand there already. Then it is not judged: whoever fetches looks at exactly what is left.
    """
    place = existing(places[0])
    with _notes() as notes:
        if not begun and (problem := _lacking(place, needed, notes)):
            raise OpsError(problem, where=str(places[0]), remedy="free space, or restore onto another disk")
        note = _noted(notes, places, needed)
    try:
        yield
    finally:
        if note is not None:
            Path(note.name).unlink(missing_ok=True)
            note.close()


def existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _lacking(place: Path, needed: float, notes: Path | None) -> str | None:
    others = sum(map(_left, notes.glob(f"{place.stat().st_dev}-*"))) if notes is not None else 0
    problem = no_room(needed + others, shutil.disk_usage(place).free)
    return f"{problem}; {size(others)} of it for restores that are under way" if problem and others else problem


@contextmanager
def _notes() -> Generator[Path | None]:
    """The folder of the notes, for one program at a time; None where none can be kept: then each counts for itself alone.

    A restore in earnest is not to fail for a full /tmp. A folder that somebody else has made there beforehand is not touched: what lies in it
    may be a link to any file of ours.
    """
    kept: Path | None = None
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = Path(tempfile.gettempdir()) / f"ops-room-{os.geteuid()}"  # it raises where every disk is full
            folder.mkdir(mode=0o700, exist_ok=True)
            made = folder.lstat()
            if stat.S_ISDIR(made.st_mode) and made.st_uid == os.geteuid():
                fcntl.flock(stack.enter_context((folder / "lock").open("w")), fcntl.LOCK_EX)
                kept = folder
        yield kept


def _noted(notes: Path | None, places: Sequence[Path], needed: float) -> IO[str] | None:
    """The note, locked until it is closed."""
    if notes is None:
        return None
    # What could not be written is tried once more as the file is closed, and raises there as well.
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        path = notes / f"{existing(places[0]).stat().st_dev}-{secrets.token_hex(8)}"
        note = stack.enter_context(path.open("x"))
        fcntl.flock(note, fcntl.LOCK_EX)
        json.dump({"needed": needed, "places": [str(each) for each in places]}, note)
        note.flush()
        stack.pop_all()
        return note
    return None


def _left(path: Path) -> float:
    """What a restore still has to write; the note of one that died goes."""
    with contextlib.suppress(FileNotFoundError), path.open() as note:  # one that ends now takes its note with it
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = json.load(note)
            return max(0.0, said["needed"] - _written([Path(place) for place in said["places"]]))
        path.unlink()
    return 0.0


def _written(places: Sequence[Path]) -> int:
    """Bytes on disk below these directories, as far as they are there."""
    found = 0
    for place in places:
        for folder, _, names in os.walk(place):
            for name in names:
                with contextlib.suppress(OSError):
                    found += os.lstat(os.path.join(folder, name)).st_blocks * 512  # noqa: PTH118 - of thousands of files
    return found
