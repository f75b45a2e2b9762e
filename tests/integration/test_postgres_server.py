"""The folder of a server's socket: made as it starts, so that whoever is stopped before that leaves nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops_platform.clients.postgres_binaries import PostgresServer, need_postgres, run_as
from ops_platform.errors import OpsError
from tests.rig import missing, scratch


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    home = scratch("ops-pg-test-")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch("ops-tmp-")))
    made = PostgresServer(need_postgres(18), home / "data")
    yield made
    made.stop("immediate")
    for folder in (home, Path(tempfile.gettempdir())):
        shutil.rmtree(folder)


def test_a_server_that_is_only_named_has_no_folder(server: PostgresServer) -> None:
    assert not server.sockets.exists()
    server.initdb()
    server.stop()
    assert not any(Path(tempfile.gettempdir()).iterdir())


def test_its_folder_comes_and_goes_with_it_under_one_name(server: PostgresServer) -> None:
    server.initdb()
    before = server.sockets
    for _ in range(2):
        server.start()
        assert (server.sockets, server.sockets.stat().st_mode & 0o777) == (before, 0o700)
        assert server.connect().execute("select 1").fetchone() == (1,)
        server.stop()
        assert not before.exists()


@pytest.mark.parametrize("whose", ["another user's", "a link"])
def test_a_folder_that_somebody_else_has_put_there_is_refused(server: PostgresServer, whose: str) -> None:
    """Whoever can replace the socket can answer in the server's place."""
    if not run_as().popen:
        missing("another user's folder", "giving one away takes root")
    server.initdb()
    if whose == "a link":
        server.sockets.symlink_to(server.directory.parent)
    else:
        server.sockets.mkdir()
        shutil.chown(server.sockets, "daemon")
    with pytest.raises(OpsError, match="belongs to somebody else"):
        server.start()
    server.sockets.unlink() if whose == "a link" else server.sockets.rmdir()
