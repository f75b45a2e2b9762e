"""Git configuration: real repositories bundled, cloned back and checked; GitHub's settings over a fake of its published API."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from ops_platform.doctor import examine_store
from ops_platform.errors import AccessDeniedError, NotThereError, OpsError
from ops_platform.recovery.model import Verdict
from ops_platform.stores import git as stores_git
from ops_platform.stores.kind import Check, Saved
from tests import stores_rig
from tests.rig import Ground, Platform
from tests.stores_rig import dump, gate, gates, prove, with_store

TOKEN = "ghp_a_token_that_nobody_may_see"


class GitHubFake(BaseHTTPRequestHandler):
    """What api.github.com answers of one repository: https://docs.github.com/rest (2022-11-28)."""

    branches: ClassVar = [f"release/{number}" for number in range(101)] + ["main"]
    forbidden: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            return self._say(401, {"message": "Bad credentials", "documentation_url": "https://docs.github.com/rest"})
        path = unquote(parts.path).removeprefix("/repos/acme/infra")
        if path in self.forbidden:
            return self._say(403, {"message": "Resource not accessible by personal access token"})
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if path.startswith("/branches/") and path.endswith("/protection"):
            name = path.removeprefix("/branches/").removesuffix("/protection")
            if name not in self.branches or ("%2F" not in parts.path and "/" in name):
                return self._say(404, {"message": "Not Found"})
            return self._say(
                200, {"url": "…", "enforce_admins": {"enabled": True}, "required_linear_history": {"enabled": False}}
            )
        fixed: dict[str, Any] = {
            "": {"name": "infra", "default_branch": "main", "visibility": "private"},
            "/branches": [{"name": name, "commit": {"sha": "0" * 40}, "protected": True} for name in self.branches],
            "/rulesets": [{"id": 7, "name": "tags", "target": "tag", "enforcement": "active"}],
            "/rulesets/7": {"id": 7, "name": "tags", "rules": [{"type": "deletion"}]},
            "/actions/permissions": {"enabled": True, "allowed_actions": "selected"},
            "/actions/permissions/workflow": {"default_workflow_permissions": "read", "can_approve_pull_request_reviews": False},
        }  # fmt: skip
        if path not in fixed:
            return self._say(404, {"message": "Not Found"})
        answer = fixed[path]
        if isinstance(answer, list):
            size, page = min(100, int(query.get("per_page", 30))), int(query.get("page", 1))
            answer = answer[(page - 1) * size : page * size]
        return self._say(200, answer)

    def _say(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json; charset=utf-8")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def api() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), GitHubFake)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def platform(ground: Ground) -> Iterator[Platform]:
    made = Platform(ground, {})
    (made.home / "token").touch(mode=0o600)
    (made.home / "token").write_text(TOKEN)
    yield made
    made.close()


def git(at: Path, *words: str) -> str:
    who = {f"GIT_{role}_{what}": "x@example.com" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return subprocess.run(["git", "-C", str(at), *words], check=True, capture_output=True, text=True,
                          env={**os.environ, **who, "GIT_CONFIG_GLOBAL": "/dev/null"}).stdout.strip()  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    at = tmp_path / "infra"
    at.mkdir()
    git(at, "init", "-q", "-b", "main")
    for number in range(3):
        (at / "values.yaml").write_text(f"replicas: {number}\n")
        git(at, "add", ".")
        git(at, "commit", "-q", "-m", f"Change {number}")
    git(at, "tag", "-a", "v1", "-m", "One")
    git(at, "branch", "release/1")
    return at


def entry(source: Path, api: str, platform: Platform, **more: Any) -> dict[str, Any]:
    repositories = [{"name": "infra", "url": f"file://{source}", "github": "acme/infra"}]
    return {
        "id": "config", "kind": "git", "api": api, "token": f"file://{platform.home}/token", "repositories": repositories, **more,
    }  # fmt: skip


def test_repositories_are_bundled_cloned_back_and_checked_with_their_protection(
    platform: Platform, source: Path, api: str
) -> None:
    empty = source.parent / "empty.git"
    git(source.parent, "init", "-q", "--bare", str(empty))
    system = entry(source, api, platform)
    system["repositories"].append({"name": "empty", "url": f"file://{empty}"})
    manifest = dump(platform, system)
    assert [part.name for part in manifest.parts] == ["repository-0", "repository-1", "settings"]
    card = prove(platform, system)
    assert card.verdict is Verdict.PASS, card.reason
    assert gates(card) == {
        "whole": "passed", "age": "passed", "settings": "passed", "fsck-infra": "passed", "refs-infra": "passed",
        "fsck-empty": "passed", "refs-empty": "passed", "teardown": "passed",
    }  # fmt: skip
    assert "102 protected branches and 1 rulesets" in gate(card, "settings").result
    assert TOKEN not in card.model_dump_json() + manifest.model_dump_json()


def test_a_repository_that_lost_a_branch_is_not_the_source(platform: Platform, source: Path, api: str) -> None:
    system = entry(source, api, platform)
    dump(platform, system)

    class Lost(stores_git.GitStore):
        def files(self, saved: Saved) -> Iterator[Check]:
            saved.facts["repositories"][0]["refs"]["refs/heads/another"] = "0" * 40
            return super().files(saved)

    target = with_store(platform, system)
    card = prove(platform, system, kind=Lost(platform.access, target, target.system))  # type: ignore[arg-type]
    assert card.verdict is Verdict.FAIL
    assert "refs/heads/another" in gate(card, "refs-infra").result


def test_a_bundle_that_cannot_be_cloned_is_a_failure(platform: Platform, source: Path, api: str) -> None:
    system = entry(source, api, platform)
    dump(platform, system)

    class Cut(stores_git.GitStore):
        def restore(self, saved: Saved, home: Path) -> Any:
            bundle = saved.part("repository-0")
            bundle.write_bytes(bundle.read_bytes()[:-30])
            return super().restore(saved, home)

    target = with_store(platform, system)
    card = prove(platform, system, kind=Cut(platform.access, target, target.system))  # type: ignore[arg-type]
    assert card.verdict is Verdict.FAIL
    assert gates(card)["teardown"] == "passed"


def test_a_damaged_source_is_not_backed_up(platform: Platform, source: Path, api: str) -> None:
    tree = git(source, "rev-parse", "HEAD~1^{tree}")
    (source / ".git/objects" / tree[:2] / tree[2:]).unlink()
    before = len(stores_rig.repository(platform, entry(source, api, platform)).infos())
    with pytest.raises(OpsError):
        dump(platform, entry(source, api, platform))
    after = stores_rig.repository(platform, entry(source, api, platform)).infos()
    assert len(after) == before


def test_settings_that_may_not_be_read_are_an_error_and_no_backup_without_them(
    platform: Platform, source: Path, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GitHubFake, "forbidden", {"/actions/permissions"})
    with pytest.raises(AccessDeniedError) as caught:
        dump(platform, entry(source, api, platform))
    assert TOKEN not in str(caught.value)


def test_a_repository_that_is_not_there_is_named(platform: Platform, source: Path, api: str) -> None:
    with pytest.raises(NotThereError, match="nowhere-403"):  # the number in its path is no refusal
        dump(platform, entry(source.parent / "nowhere-403", api, platform))


def test_the_doctor_asks_every_repository_and_names_the_one_that_is_not_there(
    platform: Platform, source: Path, api: str
) -> None:
    system = entry(source, api, platform)
    assert looked_at(platform, system) == ("good", "1 repositories")
    system["repositories"].append({"name": "gone", "url": f"file://{source.parent}/nowhere"})
    state, found = looked_at(platform, system)
    assert state == "bad"
    assert "ls-remote" in found
    state, found = looked_at(platform, {**entry(source, api, platform), "token": f"file://{platform.home}/no-token"})
    assert state != "good"
    assert "no-token" in found


def looked_at(platform: Platform, system: dict[str, Any]) -> tuple[str, str]:
    """What `ops doctor` says of the server, for which it asks `look()`."""
    target = with_store(platform, system)
    found = examine_store(platform.access, target).findings[0]
    return found.state, found.found


def test_the_token_is_no_argument_and_settings_of_the_machine_do_not_count(tmp_path: Path) -> None:
    seen = stores_git._environment(TOKEN)
    assert TOKEN not in json.dumps({k: v for k, v in seen.items() if not k.startswith("GIT_CONFIG_VALUE_")})
    assert seen["GIT_CONFIG_GLOBAL"] == "/dev/null"
    assert "HOME" not in seen
