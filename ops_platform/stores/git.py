"""Configuration in Git: each repository as a bundle, and what GitHub's API says of its protection. Verified by a clone and fsck.

A bundle is Git's own format: what `git clone FILE` makes a repository of, with every branch and tag. API: GitHub REST, version 2022-11-28.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from ops_platform.errors import (
    AccessDeniedError,
    CorruptionError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    UnreachableError,
)
from ops_platform.stores.kind import FAILED, PASSED, Check, Dumped, Finding, Parts, Saved

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.clients.http import HttpApi
    from ops_platform.inventory.systems import GitRepository, GitSystem, StoreTarget

SETTINGS = "settings"
_PIECE = 1 << 20
_PAGE = 100
_HOURS = 6 * 3600.0
_HEADERS = {"accept": "application/vnd.github+json", "x-github-api-version": "2022-11-28", "user-agent": "ops_platform"}
# A bundle of nothing cannot be made: of an empty repository this stands there.
_EMPTY = b"# an empty repository\n"


def open_store(access: Access, target: StoreTarget) -> GitStore:
    return GitStore(access, target, cast("GitSystem", target.system))


@dataclass(frozen=True)
class GitStore:
    """`stores.kind.Kind` over the repositories of one system."""

    access: Access
    target: StoreTarget
    system: GitSystem

    # Dump

    def look(self) -> str:
        token = self.access.secret(self.system.token).reveal() if self.system.token else None
        for repository in self.system.repositories:
            _head(repository.url, token)
        return f"{len(self.system.repositories)} repositories"

    def dump(self, parts: Parts) -> Dumped:
        token = self.access.secret(self.system.token).reveal() if self.system.token else None
        found: list[dict[str, Any]] = []
        for number, repository in enumerate(self.system.repositories):
            with tempfile.TemporaryDirectory(prefix="ops-git-", dir=self.target.sandbox.directory) as folder:
                mirror = Path(folder) / "mirror"
                _git(["clone", "--quiet", "--mirror", "--", repository.url, str(mirror)], repository.url, token=token)
                _git(["fsck", "--full", "--no-progress"], repository.url, at=mirror)
                refs = _refs(mirror, repository.url)
                with parts.part(f"repository-{number}") as write:
                    if not refs:
                        write(_EMPTY)
                    for piece in _output(["bundle", "create", "-q", "-", "--all"], mirror) if refs else ():
                        write(piece)
            head = _head(repository.url, token)
            found.append({"name": repository.name, "url": repository.url, "refs": refs, "head": head})
        settings = [self._settings(repository) for repository in self.system.repositories if repository.github]
        with parts.part(SETTINGS) as write:
            write(json.dumps(settings, indent=1, sort_keys=True).encode())
        return Dumped(
            source=f"{len(found)} repositories",
            server=_version(),
            facts={"repositories": found, "settings": len(settings)},
        )

    def _settings(self, repository: GitRepository) -> dict[str, Any]:
        """Everything about one repository at GitHub. What may not be read raises: a part of it is not taken for the whole."""
        api, base = self.access.github(self.system), f"/repos/{repository.github}"
        known = _get(api, base)
        branches = [branch["name"] for branch in _pages(api, f"{base}/branches", {"protected": "true"})]
        rulesets = [_get(api, f"{base}/rulesets/{found['id']}") for found in _pages(api, f"{base}/rulesets", {})]
        return {
            "repository": repository.github,
            "default_branch": known["default_branch"],
            "visibility": known.get("visibility"),
            "protection": {name: _get(api, f"{base}/branches/{quote(name, safe='')}/protection") for name in branches},
            "rulesets": rulesets,
            "actions": _get(api, f"{base}/actions/permissions"),
            "workflow": _get(api, f"{base}/actions/permissions/workflow"),
        }

    # Level 1

    def files(self, saved: Saved) -> Iterator[Check]:
        def settings() -> Finding:
            found = json.loads(saved.part(SETTINGS).read_bytes())
            protected = sum(len(one["protection"]) for one in found)
            complete = len(found) == saved.facts["settings"]
            text = f"{protected} protected branches and {sum(len(one['rulesets']) for one in found)} rulesets of {len(found)} repositories"
            return Finding(PASSED if complete else FAILED, text)

        yield Check("settings", "Branch protection and workflow settings are there", "the part `settings`", settings)

    # Level 2

    def need_programs(self) -> None:
        _run(["--version"])

    @contextmanager
    def restore(self, saved: Saved, home: Path) -> Generator[RestoredGit]:
        place = home / "git"
        place.mkdir(mode=0o700)
        clones: list[Path | None] = []
        for number, known in enumerate(saved.facts["repositories"]):
            bundle = saved.part(f"repository-{number}")
            if not known["refs"]:
                clones.append(None)
                continue
            clone = place / str(number)
            try:
                _git(["clone", "--quiet", "--mirror", "--", str(bundle), str(clone)], known["name"])
            except OpsError as error:
                raise CorruptionError(f"the bundle cannot be cloned: {error.what}", where=known["name"]) from None
            clones.append(clone)
        try:
            yield RestoredGit(saved, clones, _version())
        finally:
            shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True)
class RestoredGit:
    saved: Saved
    clones: Sequence[Path | None]
    server: str

    def checks(self) -> Iterator[Check]:
        for number, known in enumerate(self.saved.facts["repositories"]):
            clone, name = self.clones[number], known["name"]
            yield Check(
                f"fsck-{name}", f"Every object of {name} is sound", "git fsck --full --strict",
                lambda clone=clone, name=name: _fsck(clone, name),
            )  # fmt: skip
            yield Check(
                f"refs-{name}", f"Branches and tags of {name} are the source's", "git for-each-ref",
                lambda clone=clone, known=known: _same_refs(clone, known),
            )  # fmt: skip


def _fsck(clone: Path | None, name: str) -> Finding:
    if clone is None:
        return Finding(PASSED, "the repository was empty")
    done = _run(["fsck", "--full", "--no-progress"], at=clone)
    said = (done.stdout + done.stderr).strip()
    counted = _run(["count-objects", "-v"], at=clone).stdout.split()
    packed = counted[counted.index("in-pack:") + 1] if "in-pack:" in counted else "?"
    if done.returncode != 0:
        return Finding(FAILED, f"{name}: {said[-1000:]}")
    return Finding(PASSED, f"{packed} objects")


def _same_refs(clone: Path | None, known: Mapping[str, Any]) -> Finding:
    here = _refs(clone, known["name"]) if clone is not None else {}
    wrong = sorted(name for name in {*here, *known["refs"]} if here.get(name) != known["refs"].get(name))
    head = known["head"]
    if head is not None and known["refs"] and head not in here:
        wrong.append(f"HEAD ({head})")
    text = f"differ: {', '.join(wrong[:10])}" if wrong else f"{len(here)} refs are the same, HEAD is {head}"
    return Finding(FAILED if wrong else PASSED, text)


# Git


def _run(words: Sequence[str], *, at: Path | None = None, token: str | None = None) -> subprocess.CompletedProcess[str]:
    where = ["-C", str(at)] if at else []
    try:
        return subprocess.run(
            ["git", *where, *words], capture_output=True, text=True, errors="replace", check=False, timeout=_HOURS,
            env=_environment(token), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise CouldNotVerifyError("git is not here", remedy="install git") from None
    except subprocess.TimeoutExpired:
        raise UnreachableError(
            f"git {words[0]} did not end within {_HOURS / 3600:.0f} h", where=str(at or "")
        ) from None


def _environment(token: str | None) -> dict[str, str]:
    """Of the machine's and the user's own settings none counts: they could run programs. A token is never an argument."""
    kept = {name: os.environ[name] for name in ("PATH", "SSH_AUTH_SOCK", "HTTPS_PROXY", "TMPDIR") if name in os.environ}
    settings = {"safe.directory": "*", "core.hooksPath": "/dev/null", "credential.helper": ""}
    if token is not None:
        basic = base64.b64encode(f"x-access-token:{token}".encode()).decode()
        settings["http.extraHeader"] = f"Authorization: Basic {basic}"
    numbered = {f"GIT_CONFIG_KEY_{n}": key for n, key in enumerate(settings)}
    numbered |= {f"GIT_CONFIG_VALUE_{n}": value for n, value in enumerate(settings.values())}
    plain = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    return kept | plain | {"GIT_CONFIG_COUNT": str(len(settings)), "GIT_ALLOW_PROTOCOL": "https:ssh:file"} | numbered


def _git(words: Sequence[str], where: str, *, at: Path | None = None, token: str | None = None) -> str:
    """Raises what its refusal means; what it said is shown, and never holds the token, which only its environment knew."""
    done = _run(words, at=at, token=token)
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split())[-500:]
    if words[0] == "fsck":
        raise CorruptionError(
            f"the source itself is damaged: {said}", where=where, remedy="repair it before it is backed up"
        )
    if "uthentication failed" in said or "returned error: 403" in said or "could not read Username" in said:
        raise AccessDeniedError(f"git {words[0]}: {said}", where=where, remedy="check `token` and what it may read")
    if "not found" in said or "does not exist" in said or "does not appear to be a git repository" in said:
        raise NotThereError(f"git {words[0]}: {said}", where=where, remedy="correct its url")
    if words[0] in ("clone", "ls-remote"):
        raise UnreachableError(f"git {words[0]}: {said}", where=where, remedy="check the address and the network")
    raise OpsError(f"git {words[0]}: {said}", where=where)


def checkout(url: str, ref: str, into: Path, token: str | None) -> str:
    """The files of a ref below `into`, which must not exist; its commit. Raises NotThereError where there is no such ref."""
    _git(["clone", "--quiet", "--no-checkout", "--", url, str(into)], url, token=token)
    names = [ref] if ref == "HEAD" else [f"refs/remotes/origin/{ref}", f"refs/tags/{ref}", ref]
    for name in names:
        found = _run(["rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"], at=into)
        if found.returncode == 0:
            _git(["checkout", "--quiet", "--detach", found.stdout.strip()], url, at=into)
            return found.stdout.strip()
    raise NotThereError(f"there is no branch, tag or commit {ref}", where=url, remedy="correct `ref` in the inventory")


def _output(words: Sequence[str], at: Path) -> Iterator[bytes]:
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            ["git", "-C", str(at), *words],
            stdout=subprocess.PIPE,
            stderr=said,
            env=_environment(None),
            stdin=subprocess.DEVNULL,
        ) as child,
    ):
        assert child.stdout is not None  # noqa: S101 - it is a pipe
        while piece := child.stdout.read(_PIECE):
            yield piece
        if child.wait() != 0:
            said.seek(0)
            raise OpsError(f"git {words[0]}: {said.read().decode(errors='replace').strip()[-500:]}", where=str(at))


def _refs(at: Path, where: str) -> dict[str, str]:
    lines = _git(["for-each-ref", "--format=%(objectname) %(refname)"], where, at=at).splitlines()
    return {name: found for found, _, name in (line.partition(" ") for line in lines)}


def _head(url: str, token: str | None) -> str | None:
    """The branch that HEAD names, where the server says so."""
    lines = _git(["ls-remote", "--symref", "--", url, "HEAD"], url, token=token).splitlines()
    return next((line.split()[1] for line in lines if line.startswith("ref: ")), None)


def _version() -> str:
    return _run(["--version"]).stdout.strip() or "git"


# GitHub


def _get(api: HttpApi, path: str, query: Mapping[str, str] | None = None) -> Any:
    return api.get(path, query or {}, headers=_HEADERS).json()


def _pages(api: HttpApi, path: str, query: Mapping[str, str]) -> Iterator[Any]:
    page = 1
    while True:
        found = _get(api, path, {**query, "per_page": str(_PAGE), "page": str(page)})
        yield from found
        if len(found) < _PAGE:
            return
        page += 1
