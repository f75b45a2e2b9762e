"""What every component of the local stack is made of, and the place in which it lives."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ops_platform.clients.postgres_binaries import RunAs, free_port, run_as
from ops_platform.clients.processes import Process, stop
from ops_platform.errors import OpsError

HOST = "127.0.0.1"


@dataclass
class Place:
    """The state directory and what is decided in it: ports, secrets, logs."""

    directory: Path
    ports: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def user(self) -> RunAs:
        return run_as()

    def sub(self, name: str, *, private: bool = True) -> Path:
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700 if private else 0o755)
        return path

    def log(self, name: str) -> Path:
        return self.sub("logs", private=False) / f"{name}.log"

    def secret_file(self, name: str) -> Path:
        return self.sub("secrets") / name

    def secret(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
        """The secret of that name, made at the first call; readable by the owner alone."""
        file = self.secret_file(name)
        if not file.exists():
            self.write_secret(name, make())
        return file.read_text()

    def write_secret(self, name: str, value: str) -> None:
        file = self.secret_file(name)
        fresh = file.with_suffix(f"{file.suffix}.new")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:  # noqa: PTH123 - the mode counts
            out.write(value)
        fresh.rename(file)

    def port(self, name: str) -> int:
        if name not in self.ports:
            self.ports[name] = self.new_port()
        return self.ports[name]

    def new_port(self) -> int:
        """A free one that is meant for no other component: those that are not running do not hold theirs."""
        while (port := free_port()) in self.ports.values():
            pass
        return port


@dataclass(frozen=True)
class Component:
    """`start` starts it (it is not running); `ready` asks it; `finish` makes it usable once it is ready.

    `mark` is an argument that only this component of this state directory is called with: by it a process is found again
    whose number nobody had the time to write down.
    """

    name: str
    kind: str
    url: Callable[[Place], str]
    start: Callable[[Place], Process]
    ready: Callable[[Place], bool]
    finish: Callable[[Place], None]
    mark: Callable[[Place], str]
    stop_signal: signal.Signals = signal.SIGTERM
    port_names: tuple[str, ...] = ()
    hopeless: Callable[[Place], bool] = lambda place: False
    """Whether it runs and can never become ready: it is stopped then, and started anew."""
    lacking: Callable[[], str] = lambda: ""
    """Why it is left out on this machine; empty where it is not."""
    patience: float = 20.0
    """Seconds in which it has to end by itself; it is killed then."""

    def stop(self, process: Process) -> bool:
        """True when it is gone."""
        return stop(process, self.stop_signal, wait=self.patience)


def inventory_file() -> Path:
    """The inventory that the stack's receiver serves: OPS_INVENTORY, or the nearest platform.yaml."""
    if named := os.environ.get("OPS_INVENTORY"):
        return Path(named).absolute()
    here = Path.cwd()
    return next(
        (f / "platform.yaml" for f in (here, *here.parents) if (f / "platform.yaml").is_file()), here / "platform.yaml"
    )


def nothing(place: Place) -> None:
    """There is nothing to set up."""


def program(name: str, package: str) -> Path:
    beside = Path(sys.executable).parent / name
    found = beside if beside.exists() else shutil.which(name)
    if not found:
        raise OpsError(f"the program {name} is missing", remedy=f"install the package {package} (make install does)")
    return Path(found)


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    import urllib3

    try:
        return urllib3.request("GET", url, timeout=2, retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False
