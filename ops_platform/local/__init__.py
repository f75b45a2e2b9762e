"""The embedded stack: real servers on this machine, no containers. For trying, testing and demonstrating; not for earnest.

This face is light: it reads the state that `stack` writes, so that `local://NAME` in an inventory becomes an address.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from ops_platform.errors import UnreachableError

STATE_FILE = "stack.json"
UI_FILE = "ui.json"


@dataclass(frozen=True)
class Endpoint:
    """Where a component listens. `url` is empty for those that speak no HTTP."""

    host: str
    port: int
    url: str


@contextlib.contextmanager
def told_web_ui(url: str, inventory: Path) -> Generator[None]:
    """For as long as Dagster's web server runs at `url` over this inventory: commands find it there."""
    from ops_platform.clients.processes import identify

    file, me = state_dir() / UI_FILE, identify(os.getpid())
    said = {"url": url, "inventory": str(inventory.resolve())}
    file.write_text(json.dumps(said | ({"pid": me.pid, "started": me.started} if me else {})))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def web_ui(inventory: Path) -> str | None:
    """The address of the web server that `ops ui` runs over this inventory; None where it runs over none, or another one."""
    try:
        found = json.loads((state_dir() / UI_FILE).read_text())
        return str(found["url"]) if found["inventory"] == str(inventory.resolve()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


SHARED = Path("/var/lib/ops_platform")


def state_dir() -> Path:
    """`OPS_STATE_DIR`, else `.state/local` in the folder that holds platform.yaml, else in this one.

    As root, whose servers run as another user: where that one cannot pass through the folders above (a clone in root's own home),
    a folder below /var/lib/ops_platform that belongs to this checkout alone.
    """
    if named := os.environ.get("OPS_STATE_DIR"):
        return Path(named).absolute()
    inventory = os.environ.get("OPS_INVENTORY")
    base = Path(inventory).absolute().parent if inventory else Path.cwd()
    home = next((folder for folder in (base, *base.parents) if (folder / "platform.yaml").is_file()), base)
    if os.geteuid() == 0 and (closed_folder(home / ".state") is not None):
        import hashlib

        return SHARED / hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    return home / ".state" / "local"


def closed_folder(place: Path) -> Path | None:
    """The first folder above `place` through which others cannot pass; what does not exist yet will be passable."""
    return next((f for f in place.parents if f.exists() and not f.stat().st_mode & 0o001), None)


def endpoint(name: str, directory: Path | None = None) -> Endpoint:
    """The address of a component. Raises UnreachableError where the stack was never started here."""
    file = (directory or state_dir()) / STATE_FILE
    try:
        found = json.loads(file.read_text())["components"][name]
        return Endpoint(found["host"], found["port"], found["url"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreachableError(
            f"the local stack has no component {name!r} here", where=str(file), remedy="start it: ops local up"
        ) from error
