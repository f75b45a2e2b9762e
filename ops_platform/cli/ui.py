"""`ops ui`."""

from __future__ import annotations

import click

from ops_platform.errors import UsageError


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="A free one from 3000 on by default.")
@click.option("--host", default="127.0.0.1", show_default=True)
def ui(port: int | None, host: str) -> None:
    """Dagster's web UI and daemon over the local stack, until Ctrl-C."""
    import sys

    from ops_platform.local import dagster_home, told_web_ui
    from ops_platform.local.parts import inventory_file

    env = dagster_home.prepare()
    chosen = port or _free(host)
    code = ["-m", "ops_platform.definitions"]
    url = f"http://{f'[{host}]' if ':' in host else host}:{chosen}"
    click.echo(f"{url}  (ready in some seconds; Ctrl-C ends it; the local stack stays up)", err=True)
    commands = [
        [sys.executable, "-m", "dagster_webserver", *code, "-h", host, "-p", str(chosen)],
        [sys.executable, "-m", "dagster._daemon", "run", *code],
    ]
    with told_web_ui(url, inventory_file()):
        raise SystemExit(_together(commands, env))


def _together(commands: list[list[str]], env: dict[str, str]) -> int:
    """Run them until one ends or we are told to; none outlives the others."""
    import contextlib
    import os
    import signal
    import subprocess
    import threading

    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: told.set())
    # Sessions of their own: Ctrl-C reaches us alone, and we end them in order.
    children = [subprocess.Popen[bytes](command, env=env, start_new_session=True) for command in commands]
    try:
        while all(child.poll() is None for child in children):
            if told.wait(0.3):
                click.echo("the web UI ends, as ops local down or somebody else told it to", err=True)
                return 0
        return max(abs(child.poll() or 0) for child in children)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # its code servers, where it left them


def _free(host: str) -> int:
    import socket

    for port in range(3000, 3100):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise UsageError("no free port between 3000 and 3099", remedy="name one with --port")
