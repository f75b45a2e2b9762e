"""Servers in Java, as jars out of a Maven repository: Apache Kafka, Elasticsearch, a schema registry.

Each has a folder below tests/services/java with `pom.xml`, which pins what is wanted, and `jars.sha256`, which says byte by
byte what is accepted. Where the jars come from is the machine's business (Maven's settings). What lies in `src` of a server
stands in for small parts of it that no repository has; it is compiled into `more.jar`. All is kept by version, and by the
digest of those files, so that it is made once on a machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from ops_platform.clients.postgres_binaries import cache_directory
from tests.services.outcome import NotInstalledError, Outcome, found, installed, skipped
from tests.services.place import beside, make_passable, put

JAVA = Path(__file__).parent / "java"
OLDEST = 17
_SECONDS = 1500
_POM = "{http://maven.apache.org/POM/4.0.0}"


@dataclass(frozen=True)
class Server:
    """`name` is that of its folder below `java`."""

    thing: str
    name: str

    @property
    def folder(self) -> Path:
        return JAVA / self.name

    @property
    def version(self) -> str:
        """That of pom.xml."""
        version = ElementTree.parse(self.folder / "pom.xml").getroot().findtext(f"{_POM}version")
        assert version is not None
        return version

    @property
    def jars(self) -> dict[str, str]:
        """SHA-256 in hexadecimal of each jar that is wanted, by name; the list is as `sha256sum` writes it."""
        pairs = (line.split("  ") for line in (self.folder / "jars.sha256").read_text().splitlines())
        return {name: digest for digest, name in pairs}

    @property
    def sources(self) -> list[Path]:
        """Of `more.jar`, the manifest among them."""
        return sorted((self.folder / "src").glob("*"))

    def home(self) -> Path:
        """Its jars; whole when it exists."""
        digest = hashlib.sha256()
        for file in (self.folder / "jars.sha256", *self.sources):
            digest.update(file.read_bytes())
        return cache_directory() / "java" / f"{self.name}-{self.version}-{digest.hexdigest()[:12]}"

    def path(self, *without: str) -> str:
        """Of the jars in the cache, without those whose names begin so. In the order of their names: the same everywhere."""
        return ":".join(str(self.home() / name) for name in sorted(self.jars) if not name.startswith(without))


KAFKA = Server("Apache Kafka", "kafka")
ELASTICSEARCH = Server("Elasticsearch", "elasticsearch")
APICURIO = Server("Apicurio Registry", "apicurio")
KAFKA_TOOLS = Server("Kafka's command line tools", "kafka-tools")  # for the benchmarks, which ask for them
SERVERS = (KAFKA, ELASTICSEARCH, APICURIO)


def java() -> Path | None:
    """The `java` of JAVA_HOME, else the one on the path, if it is new enough."""
    home = os.environ.get("JAVA_HOME")
    named = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    return Path(named) if named and (_major(named) or 0) >= OLDEST else None


def _major(program: str) -> int | None:
    try:
        done = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = re.search(r'version "(?:1\.)?(\d+)', done.stderr)
    return int(said[1]) if said else None


def ensure(server: Server) -> Outcome:
    home = server.home()
    if java() is None:
        return skipped(
            server.thing, f"it takes Java {OLDEST} or newer: there is no such java on the path or in JAVA_HOME"
        )
    if home.exists():
        return found(server.thing, f"{home}")
    mvn = shutil.which("mvn")
    if mvn is None:
        return skipped(server.thing, "its jars come from a Maven repository, and there is no mvn here")
    try:
        make_passable(home.parent)
        with beside(home.parent) as work:
            fetch(mvn, server, work / "new")
            check(server, work / "new")
            unpack(work / "new")
            build(server, work)
            put(work, home, home.exists)
    except NotInstalledError as error:
        return skipped(server.thing, str(error))
    except OSError as error:
        return skipped(server.thing, f"{error.strerror or error}: {error.filename or home}")
    return installed(server.thing, f"{server.version} from Maven in {home}")


def fetch(mvn: str, server: Server, into: Path) -> None:
    """What pom.xml resolves to, copied; `into` must not exist."""
    into.mkdir(mode=0o755)
    command = [mvn, "--batch-mode", "--quiet", f"--file={server.folder / 'pom.xml'}"]
    command += ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={into}"]
    try:
        done = subprocess.run(command, cwd=into, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NotInstalledError(f"mvn did not come to an end within {_SECONDS} s") from None
    if done.returncode:
        raise NotInstalledError(f"mvn failed: {_first_error(done.stdout + done.stderr)}")


def _first_error(text: str) -> str:
    lines = [line.removeprefix("[ERROR] ") for line in text.splitlines() if line.strip()]
    return " ".join(" ".join(lines).split())[:400]


def check(server: Server, folder: Path) -> None:
    """Exactly the jars of the list, to the byte; readable for every user. Raises NotInstalledError."""
    wanted = server.jars
    have = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    if lacking := wanted.keys() - have.keys():
        raise NotInstalledError(f"{', '.join(sorted(lacking))} did not come")
    if surplus := have.keys() - wanted.keys():
        raise NotInstalledError(f"{', '.join(sorted(surplus))} stands not in jars.sha256")
    if other := sorted(name for name in wanted if wanted[name] != have[name]):
        raise NotInstalledError(f"{', '.join(other)} is not the jar that is expected (SHA-256 differs)")
    for file in folder.iterdir():
        file.chmod(0o644)


def unpack(folder: Path) -> None:
    """The archives in it, which go; for every user."""
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.unlink()
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


def build(server: Server, work: Path) -> None:
    """`new`/more.jar in `work`, from `src`; MANIFEST.MF there becomes its manifest."""
    if not server.sources:
        return
    program, classes = java(), work / "classes"
    assert program is not None
    javac = program.resolve().with_name("javac")
    if not javac.exists():
        raise NotInstalledError(f"it takes a JDK: there is no {javac}")
    command: list[str | Path] = [javac, "-d", classes, *(file for file in server.sources if file.suffix == ".java")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise NotInstalledError(f"javac failed: {' '.join(done.stderr.split())[:400]}")
    with zipfile.ZipFile(work / "new" / "more.jar", "w") as jar:
        jar.write(server.folder / "src" / "MANIFEST.MF", "META-INF/MANIFEST.MF")
        for file in sorted(classes.rglob("*.class")):
            jar.write(file, file.relative_to(classes))
    (work / "new" / "more.jar").chmod(0o644)
