"""Servers that are built from their Go modules: the control plane of Kubernetes with kwok, and beside it Argo Rollouts' CRDs.

What is built is pinned by `go.sum` in tests/services/go/kube and by the digest below; Go's own configuration says where
modules come from. The result is kept by the digest of those files, so that it is built once on a machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from ops_platform.clients.postgres_binaries import cache_directory
from tests.services.outcome import NotInstalledError, Outcome, found, installed, skipped
from tests.services.place import beside, make_passable, put

THING = "Kubernetes"
KUBE = Path(__file__).parent / "go" / "kube"
SOURCES = ("go.mod", "go.sum", "main.go")
# Of this module only files are wanted, and no package: it stands in no go.mod, so its digest (as in a go.sum) stands here.
ROLLOUTS = "github.com/argoproj/argo-rollouts@v1.10.0"
ROLLOUTS_SUM = "h1:1/DTeu/eGzJzcz8FxMBFzr0jlNQia/lnctkw83AUph0="
BUILD_SECONDS = 3000


def kube_home() -> Path:
    """`kube`, the program, and `crds`, a folder of manifests; whole when it exists."""
    digest = hashlib.sha256(f"{ROLLOUTS_SUM} {linker_flags()}".encode())
    for name in SOURCES:
        digest.update((KUBE / name).read_bytes())
    return cache_directory() / "kube" / digest.hexdigest()[:16]


def ensure() -> Outcome:
    home = kube_home()
    if home.exists():
        return found(THING, f"{home}")
    go = shutil.which("go")
    if go is None:
        return skipped(THING, "it is built from its Go modules, and there is no go here")
    try:
        make_passable(home.parent)
        # A build takes minutes and both cores: whoever comes second waits for the first.
        with (home.parent / ".lock").open("w") as lock, beside(home.parent) as work:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if home.exists():
                return found(THING, f"{home}")
            _make(go, work)
            put(work, home, home.exists)
    except NotInstalledError as error:
        return skipped(THING, str(error))
    except OSError as error:
        return skipped(THING, f"{error.strerror or error}: {error.filename or home}")
    return installed(THING, f"built in {home}")


def _make(go: str, work: Path) -> None:
    new = work / "new"
    new.mkdir(mode=0o755)
    build(go, copied(KUBE, work), new / "kube")
    crds = Path(download(go, ROLLOUTS, ROLLOUTS_SUM, work)) / "manifests" / "crds"
    (new / "crds").mkdir(mode=0o755)
    for file in sorted(crds.glob("*-crd.yaml")):
        shutil.copyfile(file, new / "crds" / file.name)
    if not (new / "crds" / "rollout-crd.yaml").is_file():
        raise NotInstalledError(f"{ROLLOUTS} has no manifests/crds/rollout-crd.yaml")


def copied(module: Path, work: Path) -> Path:
    """A checkout may change its branch while this goes on for minutes."""
    sources = work / "sources"
    sources.mkdir()
    for name in SOURCES:
        shutil.copyfile(module / name, sources / name)
    return sources


def build(go: str, module: Path, program: Path) -> None:
    """What the compiler keeps for a next build is gigabytes, and there is none: it goes with the folder of the sources."""
    command: list[str | Path] = ["build", "-mod=readonly", "-buildvcs=false", "-trimpath", f"-ldflags={linker_flags()}"]
    kept = {"GOCACHE": str(module / "kept"), "CGO_ENABLED": "0"}
    done = _go(go, [*command, "-o", program, "."], module, BUILD_SECONDS, **kept)
    if done.returncode:
        raise NotInstalledError(f"go build failed: {' '.join(done.stderr.split())[-600:]}")


def linker_flags() -> str:
    """No debugging information, which nobody reads here; and the version, which a build of Kubernetes does not know itself."""
    major, minor = version().removeprefix("v").split(".")[:2]
    said = {"gitVersion": version(), "gitMajor": major, "gitMinor": minor}
    return " ".join(["-s", "-w", *(f"-X k8s.io/component-base/version.{key}={value}" for key, value in said.items())])


def version() -> str:
    """Of Kubernetes, as it is pinned."""
    found = re.search(r"(?m)^\tk8s\.io/kubernetes (v\S+)$", (KUBE / "go.mod").read_text())
    assert found, "go.mod does not name k8s.io/kubernetes"
    return found[1]


def download(go: str, module: str, wanted: str, work: Path) -> str:
    """The folder of a module whose digest is the one that is expected."""
    done = _go(go, ["mod", "download", "-json", module], work, 600)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"Error": done.stderr}
    if done.returncode or "Dir" not in answer:
        raise NotInstalledError(f"{module} cannot be had: {' '.join(str(answer.get('Error')).split())[-300:]}")
    if answer["Sum"] != wanted:
        raise NotInstalledError(f"{module} is not the module that is expected (its digest differs)")
    return answer["Dir"]


def _go(
    go: str, command: list[str | Path], folder: Path, seconds: float, **env: str
) -> subprocess.CompletedProcess[str]:
    """With the lowest priority: a person works on this machine, too."""
    words = ["nice", "-n", "19", go, *command]
    environment = {**os.environ, "GOWORK": "off", **env}
    try:
        return subprocess.run(
            words, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise NotInstalledError(f"go {command[0]}: no end within {seconds:.0f} s") from None
