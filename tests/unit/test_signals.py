"""Whoever stops a command stops it, whatever code the signal met; and nobody who cleans up is disturbed."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap

import pytest

HEAD = """
import contextlib, os, signal, sys, time
from ops_platform.cli import main, signals

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
    done = subprocess.run(
        [sys.executable, "-c", program(command), number], capture_output=True, text=True, check=False, timeout=60
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
