"""`ops local up`, killed with SIGKILL at one named moment: run as `python -m tests.integration.killed_up MOMENT`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ops_platform.clients import postgres_binaries
from ops_platform.local import components, parts, shop, sources, stack


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def replace(owner: Any, name: str, when: Callable[..., bool], *, after: bool = False) -> None:
    """Die before (or right after) that function runs with arguments for which `when` holds."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        if when(*args) and not after:
            die()
        result = real(*args, **more)
        if when(*args):
            die()
        return result

    setattr(owner, name, wrapped)


def orphan_initdb(command: list[str | Path], **_: Any) -> None:
    """initdb goes on by itself when whoever called it is killed."""
    log = subprocess.DEVNULL
    subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, **postgres_binaries.run_as().popen)
    die()


def arm(moment: str) -> None:
    logged = lambda name: lambda command, log, **more: log.name == f"{name}.log"  # noqa: E731
    if moment == "before the first state":
        replace(stack.Stack, "save", lambda *_: True)
    elif moment == "before the unseal key is written":
        replace(parts.Place, "write_secret", lambda self, name, value: name == "vault.unseal_key")
    elif moment == "while initdb is at work":
        postgres_binaries.run_tool = orphan_initdb  # type: ignore[assignment]
    elif moment == "before the cluster is configured":
        replace(postgres_binaries.PostgresServer, "configure", lambda self, *_: True)
    elif moment == "when the database shop is made":
        replace(shop, "ensure_database", lambda *_: True, after=True)
    elif moment.startswith("started: "):
        name = moment.removeprefix("started: ")
        for module in (components, postgres_binaries, sources, stack):
            replace(module, "spawn", logged(name), after=True)
    else:
        raise SystemExit(f"unknown moment: {moment}")


if __name__ == "__main__":
    arm(sys.argv[1])
    stack.up()
    raise SystemExit("it was not killed")
