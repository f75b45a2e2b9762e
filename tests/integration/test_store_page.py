"""The kind of store of the how-to, as it stands on the page, in a copy of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import ops_platform
from tests.integration.test_how_tos import blocks
from tests.rig import Platform
from tests.stores_rig import POLICY

(MODULE,) = blocks("add-a-kind-of-store.md", "python")
LINE, SYSTEM = blocks("add-a-kind-of-store.md", "py")
(ENTRY,) = blocks("add-a-kind-of-store.md", "yml")


def insert(file: Path, before: str, what: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, what + before))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of a package that knows the page's kind."""
    made = tmp_path / "ops_platform"
    shutil.copytree(Path(ops_platform.__file__).parent, made, ignore=shutil.ignore_patterns("__pycache__"))
    (made / "stores" / "text.py").write_text(MODULE)
    insert(made / "stores" / "kind.py", '    "vault": "ops_platform.stores.vault",\n', LINE)
    insert(made / "inventory" / "systems.py", "AnySystem = Annotated[", f"{SYSTEM}\n\n")
    insert(made / "inventory" / "systems.py", "    KubernetesSystem\n    | ", "    TextSystem\n    | ")
    return tmp_path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The file that is served at /text, and where."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        (tmp_path / "served").mkdir()
        yield tmp_path / "served" / "text", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_store_of_the_page_is_backed_up_and_proven(
    package: Path, served: tuple[Path, str], new_platform: Callable[..., Platform]
) -> None:
    platform, (text, url) = new_platform({}), served
    (entry,) = yaml.safe_load(ENTRY)["systems"]
    entry |= {
        "environment": "test",
        "owner": "team",
        "backup": POLICY,
        "repository": {"store": "s", "keys": "k"},
        "url": url,
    }
    inventory: dict[str, Any] = {**platform.body, "systems": [entry]}
    (platform.home / "with-text.yaml").write_text(yaml.safe_dump(inventory))

    def ops(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**platform.env, "OPS_INVENTORY": str(platform.home / "with-text.yaml")}
        command = [sys.executable, "-m", "ops_platform.cli.main", "backup", *words, "motto"]
        return subprocess.run(command, cwd=package, env=env, capture_output=True, text=True, check=False, timeout=120)

    text.write_text("hëllo")
    made = ops("run")
    assert (made.returncode, "text 1, 1 part, 6 B" in made.stdout) == (0, True), made.stderr
    proven = ops("verify")
    assert (proven.returncode, "all 5 checks passed (level 2)" in proven.stdout) == (0, True), proven.stderr
    assert "1 part, 6 bytes in 1 block" in proven.stdout
    text.write_bytes(b"\xff")
    assert ops("run").returncode == 0
    wrong = ops("verify")
    assert (wrong.returncode, "FAIL" in wrong.stdout, "It is text: 1 characters" in wrong.stdout) == (1, True, True)
    text.unlink()
    gone = ops("run")
    assert (gone.returncode, "text" in gone.stderr, "Traceback" in gone.stderr) == (1, True, False)
