"""A server in Java is exactly the jars of its list, is there whole or not at all, and says why when it cannot be had."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
from pathlib import Path

import pytest

from tests.services import maven
from tests.services.outcome import State

JARS = {"broker-1.0.jar": b"broker", "library-2.0.jar": b"library"}
POM = '<project xmlns="http://maven.apache.org/POM/4.0.0"><version>1.0</version></project>'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> maven.Server:
    """A server of two jars, a `java` of version 17, and a `mvn` that copies what lies in `served`."""
    folder = tmp_path / "java" / "broker"
    folder.mkdir(parents=True)
    (folder / "pom.xml").write_text(POM)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in JARS.items()]
    (folder / "jars.sha256").write_text("".join(lines))
    served = tmp_path / "served"
    served.mkdir()
    for name, content in JARS.items():
        (served / name).write_bytes(content)
    program(tmp_path / "bin" / "java", "echo 'openjdk version \"17.0.15\" 2025-04-15' >&2")
    program(tmp_path / "bin" / "mvn", f'for last; do :; done\ncp {served}/* "${{last#-DoutputDirectory=}}"')
    monkeypatch.setattr(maven, "JAVA", tmp_path / "java")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("OPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return maven.Server("Broker", "broker")


def program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_jars_are_fetched_once_and_readable_for_every_user(server: maven.Server, tmp_path: Path) -> None:
    assert maven.ensure(server).state is State.INSTALLED
    (tmp_path / "bin" / "mvn").unlink()
    assert maven.ensure(server).state is State.FOUND
    assert server.path() == f"{server.home()}/broker-1.0.jar:{server.home()}/library-2.0.jar"
    assert {stat.S_IMODE(file.stat().st_mode) for file in server.home().iterdir()} == {0o644}
    assert stat.S_IMODE(server.home().stat().st_mode) == 0o755
    assert [path.name for path in server.home().parent.iterdir()] == [server.home().name]


def test_another_list_is_another_folder(server: maven.Server) -> None:
    maven.ensure(server)
    first = server.home()
    with (server.folder / "jars.sha256").open("a") as out:
        out.write(f"{hashlib.sha256(b'').hexdigest()}  third.jar\n")
    assert server.home() != first
    assert "third.jar did not come" in maven.ensure(server).text


def test_an_archive_is_unpacked_for_every_user(server: maven.Server, tmp_path: Path) -> None:
    (tmp_path / "lib.jar").write_bytes(b"library")
    (tmp_path / "lib.jar").chmod(0o600)
    archive = tmp_path / "served" / "whole.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "lib.jar", "lib/lib.jar")
    with (server.folder / "jars.sha256").open("a") as out:
        out.write(f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  whole.tar.gz\n")
    assert maven.ensure(server).state is State.INSTALLED
    assert (server.home() / "lib" / "lib.jar").read_bytes() == b"library"
    assert stat.S_IMODE((server.home() / "lib" / "lib.jar").stat().st_mode) == 0o644
    assert not (server.home() / "whole.tar.gz").exists()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("broker-1.0.jar", b"another", "broker-1.0.jar is not the jar that is expected"),
        ("more-3.0.jar", b"more", "more-3.0.jar stands not in jars.sha256"),
    ],
)
def test_other_jars_than_those_of_the_list_leave_nothing(
    server: maven.Server, tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    (tmp_path / "served" / name).write_bytes(content)
    outcome = maven.ensure(server)
    assert (outcome.state, why in outcome.text) == (State.SKIPPED, True), outcome
    assert list(server.home().parent.iterdir()) == []


def test_what_maven_says_is_the_reason(server: maven.Server, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "mvn", "echo '[ERROR] Could not resolve broker:1.0'; exit 1")
    assert "mvn failed: Could not resolve broker:1.0" in maven.ensure(server).text
    assert list(server.home().parent.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "enough"), [("1.8.0_402", False), ("11.0.2", False), ("17", True), ("25.0.1", True)]
)
def test_an_old_java_is_none(server: maven.Server, tmp_path: Path, version: str, enough: bool) -> None:
    program(tmp_path / "bin" / "java", f"echo 'openjdk version \"{version}\"' >&2")
    assert (maven.java() is not None) is enough
    assert (maven.ensure(server).state is State.INSTALLED) is enough


def test_without_maven_or_java_it_is_skipped_with_the_reason(
    server: maven.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = shutil.which
    monkeypatch.setattr(maven.shutil, "which", lambda name: None if name == "mvn" else found(name))
    assert "no mvn" in maven.ensure(server).text
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    outcome = maven.ensure(server)
    assert (outcome.state, "Java 17" in outcome.text) == (State.SKIPPED, True)


@pytest.mark.parametrize("known", maven.SERVERS, ids=lambda known: known.name)
def test_every_server_that_is_wanted_is_pinned_to_the_byte(known: maven.Server) -> None:
    assert known.version
    assert known.jars
    assert all(len(digest) == 64 and name.endswith((".jar", ".tar.gz")) for name, digest in known.jars.items())
    assert any(known.version in name for name in known.jars)
