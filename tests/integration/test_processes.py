"""Child processes: known by pid and start time, so that a number that was given to somebody else is not taken for ours."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ops_platform.clients.processes import Process, identify, reap, spawn, stop

SLEEP = shutil.which("sleep") or "/bin/sleep"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([SLEEP, "300"])
    yield process
    process.kill()
    process.wait(10)


def test_a_process_is_itself_until_it_ends(child: subprocess.Popen[bytes]) -> None:
    found = identify(child.pid)
    assert found is not None
    assert found.alive
    assert identify(child.pid) == found
    child.kill()
    child.wait(10)
    assert not found.alive
    assert identify(child.pid) is None


def test_a_pid_that_another_program_has_is_neither_ours_nor_stopped_by_us(child: subprocess.Popen[bytes]) -> None:
    """What a state file says after a crash: the number lives, and began at another moment."""
    here = identify(child.pid)
    assert here is not None
    for started in (here.started - 1, here.started + 1, -1, 0):
        stranger = Process(child.pid, started)
        assert not stranger.alive
        assert stop(stranger, wait=0)
    assert child.poll() is None
    assert here.alive


def test_a_pid_given_again_by_the_kernel_is_another_process() -> None:
    """The same number, really given twice: the kernel is told where to go on counting, which takes root."""
    first = subprocess.Popen([SLEEP, "300"])
    ours = identify(first.pid)
    assert ours is not None
    first.kill()
    first.wait(10)
    _until(lambda: _clock_ticks() > ours.started + 1)  # no kernel gives a number again within a hundredth of a second
    second = _with_pid(first.pid)
    try:
        assert second.pid == ours.pid
        assert identify(second.pid) is not None
        assert not ours.alive
        assert stop(ours, wait=0)
        assert second.poll() is None
    finally:
        second.kill()
        second.wait(10)


def _with_pid(wanted: int) -> subprocess.Popen[bytes]:
    for _ in range(200):  # another process of the machine may be quicker
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(wanted - 1))
        except OSError as error:
            pytest.skip(f"the kernel's counter cannot be set here: {error.strerror}")
        process = subprocess.Popen([SLEEP, "300"])
        if process.pid == wanted:
            return process
        process.kill()
        process.wait(10)
    pytest.skip("the number was never free")


def test_a_process_that_ended_and_was_not_collected_is_not_alive(child: subprocess.Popen[bytes]) -> None:
    found = identify(child.pid)
    assert found is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: it has its pid and its start time still
    assert Path(f"/proc/{child.pid}").exists()
    assert not found.alive
    assert identify(child.pid) is None
    reap(child.pid)
    assert not Path(f"/proc/{child.pid}").exists()


@pytest.mark.parametrize("name", [") Z 1 1 (", "a b", "x) R 0", "((("])
def test_a_name_with_brackets_and_spaces_does_not_confuse(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    shutil.copy(SLEEP, program)
    process = subprocess.Popen([str(program), "300"])
    try:
        found = identify(process.pid)
        assert found is not None
        assert found.alive
        assert abs(found.started - _clock_ticks()) < 60 * os.sysconf("SC_CLK_TCK")
    finally:
        process.kill()
        process.wait(10)


def _clock_ticks() -> int:
    return int(float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK"))


def test_what_is_spawned_has_its_own_session_its_log_and_no_input(tmp_path: Path) -> None:
    log = tmp_path / "log"
    shown = "os.getsid(0) == os.getpid(), repr(sys.stdin.read()), os.environ['SAID'], os.getcwd()"
    text = f"import os, sys; print({shown}, flush=True); sys.stderr.write('err')"
    process = spawn([sys.executable, "-c", text], log, env={"SAID": "yes"})
    os.waitpid(process.pid, 0)
    assert log.read_text() == "True '' yes /\nerr"


def test_a_polite_process_is_asked_and_a_stubborn_one_is_killed(tmp_path: Path) -> None:
    polite, stubborn = tmp_path / "polite", tmp_path / "stubborn"
    program = "import signal, sys; signal.signal(signal.SIGINT, {}); print('ready', flush=True); signal.pause()"
    leave, stay = "lambda *_: (print('asked', flush=True), sys.exit(0))", "signal.SIG_IGN"
    for log, what in ((polite, leave), (stubborn, stay)):
        process = spawn([sys.executable, "-c", program.format(what)], log)
        _until(lambda log=log: "ready" in log.read_text())
        assert stop(process, signal.SIGINT, wait=30 if log is polite else 0.1)
        assert not process.alive
    assert polite.read_text() == "ready\nasked\n"
    assert stubborn.read_text() == "ready\n"


def test_a_process_that_is_not_our_child_can_be_stopped(tmp_path: Path) -> None:
    """The command that started it is gone: nobody of ours can wait for it."""
    report = tmp_path / "pid"
    program = f"import subprocess; open({str(report)!r}, 'w').write(str(subprocess.Popen([{SLEEP!r}, '300'], start_new_session=True).pid))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    process = identify(int(report.read_text()))
    assert process is not None
    assert stop(process)
    _until(lambda: not process.alive)


def test_stopping_what_is_gone_is_no_error(child: subprocess.Popen[bytes]) -> None:
    found = identify(child.pid)
    assert found is not None
    child.kill()
    child.wait(10)
    assert stop(found)
    reap(found.pid)


def _until(holds: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in 30 s"
        time.sleep(0.01)
