"""Whoever stops a command stops it, whatever code the signal met; and nobody who cleans up is disturbed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ops_platform.recovery.sandbox import take_away

HEAD = """
import contextlib, os, signal, sys, time
from ops_platform.cli import main

def told():
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    time.sleep(0)

def command():
    {command}
    return 0

main.cli.main = lambda **_: command()
main.run()
"""
SWALLOWED = """
    try:
        told()
    except:
        pass
    for _ in range(400):
        time.sleep(0.05)
    print("went on to its end")
"""
IN_A_FINALIZER = """
    class Finalized:
        def __del__(self):
            told()
    Finalized()
    for _ in range(400):
        time.sleep(0.05)
    print("went on to its end")
"""
IN_A_RESPONSE_THAT_NOBODY_HOLDS = """
    import io
    class Response(io.BufferedIOBase):
        def flush(self):
            told()
    Response()
    for _ in range(400):
        time.sleep(0.05)
    print("went on to its end")
"""
CLEANING = """
    @contextlib.contextmanager
    def cleaned():
        try:
            yield
        finally:
            try:
                open("/no/such/file")
            except OSError:
                time.sleep(1.2)
            print("cleaned up")
    with cleaned():
        try:
            told()
        finally:
            time.sleep(1.2)
            print("first")
"""
TURNED_INTO_ANOTHER = """
    from ops_platform.errors import OpsError
    try:
        told()
    except BaseException:
        try:
            time.sleep(1.2)
            raise OpsError("half done")
        finally:
            time.sleep(1.2)
"""
OF_A_GENERATOR = """
    def rows():
        try:
            yield 1
        finally:
            time.sleep(1.2)
            print("closed")
    def read():
        opened = rows()
        next(opened)
        told()
    read()
"""


def program(command: str) -> str:
    return HEAD.replace("    {command}", textwrap.indent(textwrap.dedent(command), "    "))


def run(command: str, number: str) -> tuple[int, str, str]:
    return python(program(command), number)


def python(program: str, number: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", program, number], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("command", [SWALLOWED, IN_A_FINALIZER, IN_A_RESPONSE_THAT_NOBODY_HOLDS])
def test_a_signal_that_was_swallowed_is_raised_again(command: str, number: str, code: int) -> None:
    ended, out, _ = run(command, number)
    assert (ended, out) == (code, "")


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_who_cleans_up_is_not_disturbed(number: str, code: int) -> None:
    assert run(CLEANING, number)[:2] == (code, "first\ncleaned up\n")
    assert run(OF_A_GENERATOR, number)[:2] == (code, "closed\n")


def test_an_error_that_came_of_it_is_said() -> None:
    ended, _, err = run(TURNED_INTO_ANOTHER, "SIGINT")
    assert (ended, err) == (1, "error: half done\n")


def test_it_is_not_raised_into_the_end_of_the_program() -> None:
    """Python waits for its threads when everything has been said."""
    command = """
    import threading
    threading.Thread(target=lambda: time.sleep(1.5)).start()
    told()
    """
    ended, _, err = run(command, "SIGINT")
    assert (ended, err.splitlines()) == (130, ["error: interrupted; what was started has been cleaned up"])


def test_what_a_shell_put_into_the_background_is_not_interrupted() -> None:
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(program('told()'))} SIGINT & wait $!"
    assert subprocess.run(["sh", "-c", script], check=False, timeout=60).returncode == 0


RUN = """
import io, os, signal, sys, time
import dagster as dg
from ops_platform import resources
from ops_platform.errors import OpsError

class Access:
    def __init__(self, _loaded): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass

resources.Access, resources.load = Access, lambda _path: None

class Response(io.BufferedIOBase):
    def flush(self):
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
        time.sleep(0)

@dg.op(out=dg.Out(dg.Nothing))
def first(platform: resources.PlatformResource):
    with platform.access():
        {work}

@dg.op(ins={{"after": dg.In(dg.Nothing)}})
def second():
    print("went on")

@dg.job(resource_defs={{"platform": resources.PlatformResource()}})
def both():
    second(first())

try:
    both.execute_in_process(instance=dg.DagsterInstance.ephemeral())
except dg.DagsterExecutionInterruptedError:
    print("interrupted")
for number in (signal.SIGINT, signal.SIGTERM):
    assert signal.getsignal(number) is signal.default_int_handler, signal.getsignal(number)
assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
"""
GOES_ON_FOR_LONG = """
        Response()
        for _ in range(400):
            time.sleep(0.05)
"""
HAS_ALMOST_ENDED = """
        Response()
"""
BECOMES_ANOTHER_ERROR = """
        try:
            os.kill(os.getpid(), signal.Signals[sys.argv[1]])
            time.sleep(1)
        finally:
            raise OpsError("half done")
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("work", [GOES_ON_FOR_LONG, HAS_ALMOST_ENDED, BECOMES_ANOTHER_ERROR])
def test_a_run_of_dagster_ends_as_well(work: str, number: str) -> None:
    ended, out, err = python(RUN.format(work=work.strip()), number)
    assert (ended, out) == (0, "interrupted\n"), err[-3000:]


def test_a_sandbox_goes_also_where_its_going_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, real, told = tmp_path / "ops-verify-app-db-x", os.rmdir, list[str]()
    for number in range(3):
        (home / "data" / str(number)).mkdir(parents=True)
        (home / "data" / str(number) / "file").write_text("somebody's rows")

    def rmdir(path: Any, **more: Any) -> None:
        real(path, **more)
        told.append(str(path))
        if len(told) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(KeyboardInterrupt):
        take_away(home)
    assert len(told) == 5
    assert list(tmp_path.iterdir()) == []
