"""`ops ui`."""

from __future__ import annotations

import click

from ops_platform.errors import UsageError


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="A free one from 3000 on by default.")
@click.option("--host", default="127.0.0.1", show_default=True)
def ui(port: int | None, host: str) -> None:
    """Dagster's web UI and daemon over the local stack, until Ctrl-C."""
    import subprocess
    import sys

    from ops_platform.local import dagster_home

    env = dagster_home.prepare()
    chosen = port or _free(host)
    command = [sys.executable, "-m", "dagster", "dev", "-m", "ops_platform.definitions", "-h", host, "-p", str(chosen)]
    click.echo(
        f"http://{f'[{host}]' if ':' in host else host}:{chosen}  (Ctrl-C ends it; the local stack stays up)", err=True
    )
    child = subprocess.Popen[bytes](command, env=env)
    try:
        raise SystemExit(child.wait())
    except (KeyboardInterrupt, SystemExit):
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
        raise


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
