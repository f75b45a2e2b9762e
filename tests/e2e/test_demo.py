"""`ops demo` as a new user meets it: an empty folder, an ordinary user, twice in a row, and interrupted in between."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.wal_rig import eventually
from tests.rig import scratch

ROOT = Path(__file__).parents[2]
NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("demo"), pytest.mark.timeout(1500)]


@dataclass
class Newcomer:
    """Somebody with a home of their own and nothing in it. `switch` is the prefix that makes a command theirs."""

    home: Path
    switch: list[str]

    @property
    def state(self) -> Path:
        return self.home / "state"

    def start(self, *words: str) -> subprocess.Popen[str]:
        """In a session of its own, so that a signal can be sent to all that a Ctrl-C would reach."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OPS_", "DAGSTER_", "PYTEST_"))}
        env |= {"HOME": str(self.home), "OPS_STATE_DIR": str(self.state), "TMPDIR": str(self.home / "tmp")}
        command = [*self.switch, sys.executable, "-m", "ops_platform.cli.main", *words]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str) -> str:
        process = self.start(*words)
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


def _switch() -> list[str]:
    """To nobody, where this is root and its Python can be run by others; it is not when it lies below a closed home."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return []
    # A shell in between: the right to pass everywhere ends with the first program that the other user starts.
    attempt = [*AS_NOBODY, "sh", "-c", 'exec "$0" -c "import ops_platform.cli.main"', sys.executable]
    able = subprocess.run(attempt, cwd=ROOT, check=False, capture_output=True).returncode == 0
    return AS_NOBODY if able else []


@pytest.fixture
def newcomer() -> Iterator[Newcomer]:
    switch = _switch()
    made = Newcomer(scratch("ops-demo-test-"), switch)
    (made.home / "tmp").mkdir()
    if switch:
        for path in (made.home, made.home / "tmp"):
            os.chown(path, NOBODY, NOBODY)
    try:
        yield made
    finally:
        made.start("local", "down").communicate()
        shutil.rmtree(made.home)


def payments_before(out: str) -> int:
    return int(re.findall(r"(\d+) payments were there at", out)[0])


def check(out: str, newcomer: Newcomer) -> None:
    """What the reader is promised: two proofs passed, the payments back to the row, a report, the way on."""
    assert out.count("PASS") >= 2
    assert "FAIL" not in out
    assert "COULD_NOT_VERIFY" not in out
    assert out.count("dagster job execute") == 2
    back = re.findall(r"all (\d+) payments are back, to the cent: [\d.]+", out)
    assert [int(count) for count in back] == [payments_before(out)]
    assert payments_before(out) > 40000
    report = Path(re.findall(r"^report: +(.+)$", out, re.MULTILINE)[0])
    assert report.is_relative_to(newcomer.state)
    assert "app-db" in report.read_text()
    assert re.search(r"^web UI: +make ui$", out, re.MULTILINE)
    assert "Traceback" not in out


def interrupt_after_the_damage(newcomer: Newcomer) -> None:
    """Ctrl-C once the loss has been told: for everything in the foreground, as a terminal sends it."""
    process = newcomer.start("demo")
    assert process.stdout is not None
    told: list[str] = []
    for line in process.stdout:
        told.append(line)
        if "are there now" in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=300)
    assert "are there now" in told[-1], "".join(told)[-6000:]
    assert process.returncode == 130, "".join(told)[-3000:] + rest
    assert "interrupted" in rest
    assert "payments are back" not in rest


def test_the_demo_twice_interrupted_and_again(newcomer: Newcomer) -> None:
    first = newcomer.run("demo")
    check(first, newcomer)
    ready = [line.split()[0] for line in first.splitlines() if " ready (" in line]
    assert ready == ["vault", "s3", "platform-db", "app-db", "wal-receiver"]

    interrupt_after_the_damage(newcomer)
    noted = json.loads((newcomer.state / "demo-loss.json").read_text())

    second = newcomer.run("demo")
    check(second, newcomer)
    assert "the payments are brought back first" in second
    assert payments_before(second) > noted["before"], "what was paid before the interrupted damage is there again"
    assert not (newcomer.state / "demo-loss.json").exists()

    ledger = newcomer.run("ledger", "verify")
    assert int(re.findall(r"(\d+) entries, unbroken", ledger)[0]) >= 6, "each of the runs left its entries"
    assert "NOT PROTECTED" not in ledger
    assert all(item["ready"] for item in json.loads(newcomer.run("local", "status", "--json")))
    newcomer.run("local", "down")
    eventually(lambda: not newcomer.processes(), why=newcomer.processes)
    assert list((newcomer.home / "tmp").iterdir()) == [], "a sandbox or a dump was left"
