"""The embedded stack: real servers on this machine, no containers. For trying, testing and demonstrating; not for earnest.

This face is light: it reads the state that `stack` writes, so that `local://NAME` in an inventory becomes an address.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ops_platform.errors import UnreachableError

STATE_FILE = "stack.json"


@dataclass(frozen=True)
class Endpoint:
    """Where a component listens. `url` is empty for those that speak no HTTP."""

    host: str
    port: int
    url: str


def state_dir() -> Path:
    """`OPS_STATE_DIR`, else `.state/local` in the folder that holds platform.yaml, else in this one."""
    if named := os.environ.get("OPS_STATE_DIR"):
        return Path(named).absolute()
    inventory = os.environ.get("OPS_INVENTORY")
    base = Path(inventory).absolute().parent if inventory else Path.cwd()
    home = next((folder for folder in (base, *base.parents) if (folder / "platform.yaml").is_file()), base)
    return home / ".state" / "local"


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
