"""`ops demo` as a new user meets it: an empty folder, an ordinary user, interrupted and held again; and `make demo` in a clone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ops_platform.clients.s3 import S3Store
from ops_platform.local import closed_folder
from ops_platform.local.components import admin, s3_settings
from ops_platform.local.stack import Stack
from tests.integration.wal_rig import eventually
from tests.rig import missing, scratch

ROOT = Path(__file__).parents[2]
NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("demo"), pytest.mark.timeout(1500)]


@dataclass
class Newcomer:
    """Somebody with a home of their own and nothing in it. `switch` is the prefix that makes a command theirs."""

    home: Path
    checkout: Path
    python: Path
    switch: list[str]

    @property
    def state(self) -> Path:
        return self.home / "state"

    def start(self, *words: str) -> subprocess.Popen[str]:
        return self.start_python("-m", "ops_platform.cli.main", *words)

    def start_python(self, *words: str) -> subprocess.Popen[str]:
        """In a session of its own, so that a signal can be sent to all that a Ctrl-C would reach."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OPS_", "DAGSTER_", "PYTEST_"))}
        env |= {"HOME": str(self.home), "OPS_STATE_DIR": str(self.state), "TMPDIR": str(self.home / "tmp")}
        return subprocess.Popen(
            [*self.switch, self.python, *words],
            cwd=self.checkout,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str) -> str:
        return self._whole(self.start(*words))

    def run_python(self, code: str) -> str:
        return self._whole(self.start_python("-c", code))

    def _whole(self, process: subprocess.Popen[str]) -> str:
        out, _ = process.communicate(timeout=700)
        assert process.returncode == 0, out[-6000:]
        return out

    def processes(self) -> list[str]:
        """Whatever has this home in its arguments, its folder or its environment."""
        found: list[str] = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if os.fsencode(self.home) in told + os.fsencode((entry / "cwd").readlink()):
                    found.append(f"{entry.name} {(entry / 'cmdline').read_bytes().decode(errors='replace')}")
        return found


def _ordinary(home: Path) -> Newcomer:
    """As root somebody else: nobody, with an interpreter and a checkout that everybody can reach."""
    if os.geteuid() != 0:
        return Newcomer(home, ROOT, Path(sys.executable), [])
    if not shutil.which("setpriv"):
        missing("setpriv", "install util-linux")
    newcomer = Newcomer(home, _reachable(ROOT, home), home / "venv" / "bin" / "python", AS_NOBODY)
    _same_packages(newcomer)
    # A shell in between: the right to pass everywhere ends with the first program that the other user starts.
    words = [*AS_NOBODY, "sh", "-c", 'exec "$0" -c "import ops_platform.cli.main, psycopg, dagster"', newcomer.python]
    able = subprocess.run(words, cwd=newcomer.checkout, check=False, capture_output=True, text=True)
    assert able.returncode == 0, able.stderr
    for path in (home, home / "tmp"):
        os.chown(path, NOBODY, NOBODY)
    return newcomer


def _same_packages(newcomer: Newcomer) -> None:
    """A virtual environment of an interpreter that everybody may run, with the packages of this one and its programs."""
    subprocess.run([_interpreter(), "-m", "venv", "--without-pip", newcomer.home / "venv"], check=True)
    packages = _reachable(Path(sysconfig.get_path("purelib")), newcomer.home)
    purelib = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    lines = f"{newcomer.checkout}\nimport site; site.addsitedir({str(packages)!r})\n"
    (newcomer.home / "venv" / purelib / "tests.pth").write_text(lines)
    for name in ("bao", "weed"):
        program = (Path(sys.executable).parent / name).read_bytes()
        copy = newcomer.python.with_name(name)
        if program.startswith(b"#!"):  # of this interpreter
            program = b"#!" + os.fsencode(newcomer.python) + program[program.index(b"\n") :]
        copy.write_bytes(program)
        copy.chmod(0o755)


def _interpreter() -> str:
    """Of the same version, because of the packages: this one where others may run it, which it is not below a closed home."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (f"{sys.base_prefix}/bin/{name}", f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        words = [*AS_NOBODY, "sh", "-c", 'exec "$0" -c pass', path]
        if Path(path).exists() and not subprocess.run(words, check=False, capture_output=True).returncode:
            return path
    missing(f"a {name} that every user may run", f"install Debian's {name}")
    raise AssertionError


def _reachable(folder: Path, home: Path) -> Path:
    """The folder itself, or a copy where one above it is closed to others."""
    if closed_folder(folder / "inside") is None:
        return folder
    left_out = shutil.ignore_patterns(".git", ".venv", ".state")
    return Path(shutil.copytree(folder, home / "copies" / folder.name, symlinks=True, ignore=left_out))


@pytest.fixture
def newcomer() -> Iterator[Newcomer]:
    home = scratch("ops-demo-test-")
    (home / "tmp").mkdir()
    made: Newcomer | None = None
    try:
        made = _ordinary(home)
        yield made
    finally:
        if made is not None:
            made.start("local", "down").communicate()
        shutil.rmtree(home)


def payments_before(out: str) -> int:
    return int(re.findall(r"(\d+) payments were there at", out)[0])


def check(out: str, state: Path) -> None:
    """What the reader is promised: two proofs and a drill passed, the payments back to the row, two pages, the way on."""
    assert out.count("PASS") >= 3
    assert "FAIL" not in out
    assert "COULD_NOT_VERIFY" not in out
    assert out.count("dagster job execute") == 2
    back = re.findall(r"all (\d+) payments are back, to the cent: [\d.]+", out)
    assert [int(count) for count in back] == [payments_before(out)]
    assert payments_before(out) > 40000
    assert re.search(r"\d+ objects? \(.+\) copied, under another key", out)
    assert re.search(r"^PASS  Restore the database from its copy at a second site$", out, re.MULTILINE)
    assert re.search(r"^RTO .+ kept .+\nRPO .+ kept ", out, re.MULTILINE)
    for page in ("report", "drill"):
        (path,) = re.findall(rf"^{page}: +(.+)$", out, re.MULTILINE)
        assert Path(path).is_relative_to(state)
        assert "app-db" in Path(path).read_text()
    assert re.search(r"^web UI: +make ui$", out, re.MULTILINE)
    assert "Traceback" not in out


def interrupt_in_the_proof(newcomer: Newcomer) -> None:
    """Ctrl-C while the main job restores: for everything in the foreground, as a terminal sends it."""
    log = newcomer.state / "logs" / "demo-nightly_backup.log"
    log.unlink()  # of the demo before
    process = newcomer.start("demo")
    eventually(
        lambda: (log.exists() and "postgres__pitr_verification - STEP_START" in log.read_text()) or process.poll(),
        seconds=300,
        why=lambda: log.read_text() if log.exists() else "no log",
    )
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out[-3000:]
    assert "interrupted" in out
    assert "Traceback" not in out
    assert "delete from" not in out


def damage(newcomer: Newcomer) -> int:
    """As a demo leaves it that is interrupted after its damage. The number of payments that were there."""
    newcomer.run_python("from ops_platform.local import demo; demo.damage(print)")
    return json.loads((newcomer.state / "demo-loss.json").read_text())["before"]


def secrets_of(state: Path) -> dict[str, str]:
    """By the name of its file. Of a private key a line from the middle, of a file that holds several the others have them."""
    found = {file.name: file.read_text().strip() for file in (state / "secrets").iterdir()}
    public = {"s3.crt", "s3-ca.pem", "s3.json", "vault.role_id", "s3.access_key"}
    secrets = {
        name: text.splitlines()[1] if "-----" in text else text for name, text in found.items() if name not in public
    }
    assert all(len(value) >= 20 for value in secrets.values())
    assert {"vault.unseal_key", "s3.secret_key", "s3.key", "platform-db.password", "app-db.ops_backup.password"} <= set(
        secrets
    )
    return secrets


def everything_that_is_told(newcomer: Newcomer) -> Iterator[tuple[str, bytes]]:
    """Whatever somebody may see who may not see the secrets: where it stands, and what stands there."""
    for pid, arguments in ((entry.partition(" "))[::2] for entry in newcomer.processes()):
        yield f"arguments of process {pid}", arguments.encode()
    for file in newcomer.state.rglob("*"):
        inside = file.relative_to(newcomer.state).parts
        # The servers' own data is looked at through the servers.
        if file.is_file() and inside[0] not in {"secrets", "app-db", "platform-db", "vault", "s3"}:
            yield str(file), file.read_bytes()
    place = Stack.load(newcomer.state).place
    # Dagster's runs with their config and tags, its events with their metadata, schedules and ticks; and the ledger.
    for dbname, least in (("dagster", {"runs", "event_logs", "run_tags"}), ("ops", {"entries"})):
        with admin(place, "platform-db", dbname) as connection:
            tables = connection.execute(
                "select schemaname, tablename from pg_tables where schemaname not in ('pg_catalog', 'information_schema')"
            ).fetchall()
            assert least <= {table for _, table in tables}
            for schema, table in tables:
                rows = connection.execute(f'select t::text from "{schema}"."{table}" t').fetchall()
                assert rows or table not in least, table
                yield f"{dbname}: {table}", "\n".join(row[0] for row in rows).encode()
    with contextlib.closing(S3Store(s3_settings(place))) as store:
        objects = list(store.list(""))
        assert objects
        for info in objects:
            yield f"object {info.key}", info.key.encode() + bytes(store.get(info.key))


def assert_no_secret_is_told(newcomer: Newcomer) -> None:
    secrets = secrets_of(newcomer.state)
    shown = list[tuple[str, str]]()
    places = 0
    for where, told in everything_that_is_told(newcomer):
        places += 1
        shown += [(name, where) for name, value in secrets.items() if value.encode() in told]
    assert shown == []
    assert places > 50
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    for name in filter(None, tracked.stdout.split(b"\0")):
        file = ROOT / os.fsdecode(name)
        if file.is_file():
            content = file.read_bytes()
            assert not [known for known, value in secrets.items() if value.encode() in content], file


def test_the_demo_twice_in_a_row_for_an_ordinary_user_and_interrupted_between(newcomer: Newcomer) -> None:
    first = newcomer.run("demo")
    check(first, newcomer.state)
    ready = [line.split()[0] for line in first.splitlines() if " ready (" in line]
    assert ready[:7] == ["vault", "s3", "platform-db", "app-db", "wal-receiver", "metrics", "kafka"]
    interrupt_in_the_proof(newcomer)
    lost = damage(newcomer)
    newcomer.run("local", "down")  # with the broker end the topics that the cursor knows

    again = newcomer.run("demo")
    check(again, newcomer.state)
    assert "the payments are brought back first" in again
    assert payments_before(again) > lost > payments_before(first), "what was paid before each damage is there again"
    assert not (newcomer.state / "demo-loss.json").exists()
    assert_no_secret_is_told(newcomer)

    # The interrupted one took a backup and proved nothing.
    ledger = newcomer.run("ledger", "verify")
    entries = json.loads(newcomer.run("ledger", "list", "-n", "1000", "--json"))
    kinds = [entry["kind"] for entry in entries]
    whole = ["backup.taken", "backup.verification", "backup.verification"]
    # The demo's daemon evaluates schedules, too: at night it may add a backup and a proof of its own.
    told = iter(kinds)
    assert all(kind in told for kind in [*whole, "backup.taken", *whole]), kinds
    assert re.findall(r"(\d+) entries, unbroken", ledger) == [str(len(entries))]
    assert {entry["subject"] for entry in entries} == {"app-db"}
    verdicts = [json.loads(entry["text"])["verdict"] for entry in entries if entry["kind"] == "backup.verification"]
    assert len(verdicts) >= 4
    assert set(verdicts) == {"PASS"}
    for kind in ("incident.closed", "incident.applying", "drill.ended"):
        assert kinds.count(kind) == 2, kind
    assert "NOT PROTECTED" not in ledger
    assert all(item["ready"] or item["skipped"] for item in json.loads(newcomer.run("local", "status", "--json")))
    newcomer.run("local", "down")
    eventually(lambda: not newcomer.processes(), why=newcomer.processes)
    left = [path.name for path in (newcomer.home / "tmp").iterdir() if not path.name.startswith("ops-room-")]
    assert left == [], "a sandbox or a dump was left"


def test_make_demo_in_a_fresh_clone_in_roots_own_home() -> None:
    """By the README alone: a clone, `make demo`, nothing else. Root's home is closed, and PostgreSQL runs as another user."""
    if os.geteuid() != 0:
        missing("a closed home of root", "run the tests as root")
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, check=False, capture_output=True).returncode:
        missing("a git checkout", "run the tests in a clone")
    home = scratch("ops-root-home-", disk=True)
    home.chmod(0o700)
    clone = home / "ops_platform"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OPS_", "DAGSTER_", "PYTEST_"))}
    env.pop("VIRTUAL_ENV", None)

    def make(goal: str) -> str:
        command = ["make", goal, f"PYTHON={sys.base_prefix}/bin/python3"]
        done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, check=False, timeout=1200)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    try:
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True, env=env)
        out = make("demo")
        state = Path(re.findall(r"^report: +(.+)$", out, re.MULTILINE)[0]).parents[1]
        assert not state.is_relative_to(home), "the servers' user could not have come there"
        check(out, state)
        assert (
            subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, check=True).stdout == b""
        )
        make("clean")
        assert not state.exists()
        assert not (clone / ".venv").exists()
    finally:
        if (clone / ".venv").exists():
            subprocess.run(
                [clone / ".venv" / "bin" / "ops", "local", "reset", "--yes"], cwd=clone, env=env, check=False
            )
        shutil.rmtree(home)
