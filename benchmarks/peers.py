"""Tools of other projects that the tests do not need: made when a comparison asks for them, and kept in the tests' cache."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from ops_platform.clients.postgres_binaries import cache_directory
from tests.services import golang, maven
from tests.services.outcome import State
from tests.services.place import beside, make_passable, put

KUBECTL = Path(__file__).parent / "kubectl"


def kubectl() -> Path:
    """Built from its Go module, of the version that the tests' API server has. Raises RuntimeError where there is no Go."""
    digest = hashlib.sha256(b"".join((KUBECTL / name).read_bytes() for name in golang.SOURCES))
    home = cache_directory() / "kubectl" / digest.hexdigest()[:16]
    if not home.exists():
        if (go := shutil.which("go")) is None:
            raise RuntimeError("kubectl is built from its Go module, and there is no go here")
        make_passable(home.parent)
        with beside(home.parent) as work:
            (work / "new").mkdir(mode=0o755)
            golang.build(go, golang.copied(KUBECTL, work), work / "new" / "kubectl")
            put(work, home, home.exists)
    return home / "kubectl"


def kafka_tool(name: str) -> list[str]:
    """The beginning of a command: `java`, the classpath and the tool's class, with the memory that Kafka's own script gives it."""
    java, outcome = maven.java(), maven.ensure(maven.KAFKA_TOOLS)
    if java is None or outcome.state is State.SKIPPED:
        raise RuntimeError(f"Kafka's tools are not here: {outcome.text}")
    return [
        str(java),
        "-Xmx512M",
        "-cp",
        f"{maven.KAFKA_TOOLS.path()}:{maven.KAFKA.path()}",
        f"org.apache.kafka.tools.{name}",
    ]
