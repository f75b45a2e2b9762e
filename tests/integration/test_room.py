"""Restores side by side: what one still has to write is no room for the others, and who was killed holds none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops_platform.errors import OpsError
from ops_platform.recovery.room import lacking, reserved

MIB = 1 << 20


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """100 MiB are free, and the notes are ours alone."""
    free = shutil.disk_usage("/")._replace(free=100 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    assert [path.name for path in tmp_path.glob("ops-room-*/*")] in ([], ["lock"]), "no note is left"


def test_what_others_still_have_to_write_is_not_free(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with reserved([first], 60 * MIB):
        assert lacking(tmp_path, 40 * MIB) is None
        said = (
            "101 MiB are needed and 100 MiB are free: 1.0 MiB too few; 60.0 MiB of it for restores that are under way"
        )
        assert lacking(tmp_path, 41 * MIB) == said
        with pytest.raises(OpsError) as refused, reserved([second], 41 * MIB):
            pass
        assert (refused.value.what, refused.value.where) == (said, str(second))
        with reserved([second], 41 * MIB, begun=True):
            assert lacking(tmp_path, 0) is not None, "it goes on, and counts for others"
        first.mkdir()
        (first / "data").write_bytes(b"x" * 20 * MIB)
        assert lacking(tmp_path, 60 * MIB) is None, "what was written is in the free space already"
    assert lacking(tmp_path, 100 * MIB) is None


def test_a_restore_on_another_file_system_takes_no_room_of_this_one(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system alone")
    with reserved([elsewhere / "nothing-is-written-here"], 60 * MIB):
        assert lacking(tmp_path, 100 * MIB) is None


def test_who_was_killed_holds_no_room(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from ops_platform.recovery.room import reserved
with reserved([Path(sys.argv[1])], 1 << 20):
    print("held", flush=True)
    time.sleep(600)
"""
    words = [sys.executable, "-c", script, str(tmp_path / "killed")]
    with subprocess.Popen[bytes](words, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            assert lacking(tmp_path, 100 * MIB) is not None
        finally:
            holder.kill()
    assert lacking(tmp_path, 100 * MIB) is None


def test_one_that_ends_just_now_holds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its note was listed, and is gone before it is read."""
    with monkeypatch.context() as listed:
        listed.setattr(Path, "glob", lambda folder, _pattern: iter([folder / "gone"]))
        assert lacking(tmp_path, 100 * MIB) is None


def test_where_nothing_can_be_noted_each_counts_for_itself(tmp_path: Path) -> None:
    (tmp_path / f"ops-room-{tmp_path.stat().st_uid}").write_text("in the way")
    with reserved([tmp_path / "first"], 60 * MIB):
        assert lacking(tmp_path, 100 * MIB) is None
        assert lacking(tmp_path, 101 * MIB) is not None


FULL = """
import resource, signal, sys, tempfile
from pathlib import Path
from ops_platform.recovery.room import lacking, reserved
if sys.argv[2] == "noted before":
    with reserved([Path(sys.argv[1])], 1):
        pass
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
with reserved([Path(sys.argv[1])], 1):
    assert lacking(Path(sys.argv[1]), 1) is None
"""


@pytest.mark.parametrize("when", ["noted before", "nothing can be written from the beginning"])
def test_a_restore_does_not_fail_for_a_full_tmp(tmp_path: Path, when: str) -> None:
    """No byte more can be written, which each program finds out in its own place."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), when], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert lacking(tmp_path, 100 * MIB) is None


def test_a_folder_that_somebody_else_made_is_not_touched(tmp_path: Path) -> None:
    """Everybody may write /tmp, and can foresee the folder's name."""
    if os.geteuid() != 0:
        pytest.skip("giving a folder away takes root")
    victim, folder = tmp_path / "victim", tmp_path / "ops-room-0"
    victim.write_text("ours")
    folder.mkdir()
    (folder / "lock").symlink_to(victim)
    os.chown(folder, 65534, 65534)
    with reserved([tmp_path / "first"], 60 * MIB):
        assert lacking(tmp_path, 100 * MIB) is None
    assert victim.read_text() == "ours"
