"""What comes from Debian's packages: PostgreSQL 15 with all its tools, pgBackRest, a browser, Redis, Prometheus, Alertmanager."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.services.outcome import Outcome, found, installed, skipped

CREATECLUSTER = Path("/etc/postgresql-common/createcluster.conf")
POLICY = Path("/usr/sbin/policy-rc.d")
_KEEP = (
    "-o",
    "Dpkg::Options::=--force-confold",
    "-o",
    "Dpkg::Options::=--force-confdef",
    "-o",
    "DPkg::Lock::Timeout=300",
)


@dataclass(frozen=True)
class Wanted:
    """`programs`: each of them shows, by itself, that the thing is here; a path, or a name to be looked for.

    `units`: the services that its packages would run on this machine, which nobody asked for.
    """

    thing: str
    packages: tuple[str, ...]
    programs: tuple[str, ...]
    units: tuple[str, ...] = ()

    def where(self) -> str | None:
        return next((path for name in self.programs if (path := shutil.which(name))), None)


WANTED = (
    Wanted("Patroni", ("patroni",), ("patroni",), ("patroni.service",)),
    Wanted("libfaketime", ("faketime",), ("faketime",)),
    Wanted("etcd", ("etcd-server",), ("etcd",), ("etcd.service",)),
    Wanted(
        "PostgreSQL tools",
        ("postgresql-15", "postgresql-contrib"),
        ("/usr/lib/postgresql/15/bin/pg_verifybackup",),
    ),
    Wanted("pgBackRest", ("pgbackrest",), ("pgbackrest",)),
    Wanted("Chromium", ("chromium",), ("chromium", "chromium-browser", "google-chrome")),
    Wanted("Redis", ("redis-server",), ("redis-server",), ("redis-server.service",)),
    Wanted("Prometheus", ("prometheus",), ("prometheus",), ("prometheus.service",)),
    Wanted(
        "Alertmanager",
        ("prometheus-alertmanager",),
        ("prometheus-alertmanager",),
        ("prometheus-alertmanager.service",),
    ),
)


def ensure(wanted: Sequence[Wanted] = WANTED) -> list[Outcome]:
    lacking = [item for item in wanted if item.where() is None]
    why = _cannot_install() if lacking else None
    if lacking and why is None:
        _apt("update")  # what an image was built with may be gone from the archive
    return [_ensure(item, item in lacking, why) for item in wanted]


def _ensure(item: Wanted, lacking: bool, why: str | None) -> Outcome:
    if not lacking:
        return found(item.thing, item.where() or "")
    names = " ".join(item.packages)
    if why is not None:
        return skipped(item.thing, f"{why}; the package is {names}")
    if any(name.startswith("postgresql") for name in item.packages):
        no_main_cluster(CREATECLUSTER)
    with no_services(POLICY):
        error = _apt("install", "--yes", "--no-install-recommends", *_KEEP, *item.packages)
    _disable(item.units)
    path = item.where()
    if error or path is None:
        return skipped(item.thing, f"apt-get install {names} failed: {error or 'it brings none of its programs'}")
    return installed(item.thing, path)


def _cannot_install() -> str | None:
    if shutil.which("apt-get") is None:
        return "this machine has no apt-get"
    return None if os.geteuid() == 0 else "installing it takes root"


def _apt(*words: str) -> str | None:
    """None, or why it failed."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "UCF_FORCE_CONFFOLD": "1"}
    try:
        done = subprocess.run(
            ["apt-get", "-q", *words], capture_output=True, text=True, timeout=1800, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return "no end within 1800 s"
    return " ".join(done.stderr.split())[-300:] if done.returncode else None


@contextlib.contextmanager
def no_services(policy: Path) -> Generator[None]:
    """Debian's packages start their services unless this program forbids it; one that is there already is left alone."""
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink(missing_ok=True)


def _disable(units: Sequence[str]) -> None:
    """What was not started now would be at the next boot. Where there is no systemd there is nothing to be said to it."""
    if units and shutil.which("systemctl"):
        subprocess.run(["systemctl", "disable", *units], capture_output=True, timeout=120, check=False)


def no_main_cluster(file: Path) -> None:
    """Debian's server package makes and starts a cluster at once unless this file says that it should not."""
    text = file.read_text() if file.exists() else ""
    line = "create_main_cluster = false"
    said = re.compile(r"(?m)^[ \t]*create_main_cluster\b.*$")
    text = said.sub(line, text) if said.search(text) else f"{text.rstrip()}\n\n{line}\n".lstrip()
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.rename(file)
