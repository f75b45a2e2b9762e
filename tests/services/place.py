"""A folder of the cache that is made in one step: whoever looks there sees all of it or nothing."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from tests.services.outcome import NotInstalledError


def make_passable(place: Path) -> None:
    """The servers' user has to reach the programs, whatever the umask here."""
    for folder in (place.parent, place):
        if not folder.exists():
            folder.mkdir(parents=True)
            folder.chmod(0o755)


@contextlib.contextmanager
def beside(place: Path) -> Generator[Path]:
    """A folder to work in, on the same file system; gone afterwards. What is made as `new` in it, `put` moves in place."""
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=place))
    work.chmod(0o755)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put(work: Path, home: Path, there: Callable[[], bool]) -> None:
    """`work`/new becomes `home`; another version, or a leftover, goes. `there` says whether `home` is what is wanted."""
    if home.exists() and not there():
        home.rename(work / "old")
    try:
        (work / "new").rename(home)
    except OSError as error:
        if not there():  # else another process was faster
            raise NotInstalledError(f"{home} cannot be put in place: {error.strerror}") from error
