"""`ops metrics`."""

from __future__ import annotations

import click

from ops_platform.cli.common import Commands, Seconds, address, opened


@click.group(cls=Commands)
def metrics() -> None:
    """The platform's own metrics for Prometheus: incidents, ledger, promises, schedules and sensors."""


@metrics.command()
@click.option("--listen", required=True, metavar="HOST:PORT", help="Serve /metrics and /healthz; [::1]:9188 for IPv6.")
@click.option(
    "--every",
    default=60.0,
    show_default=True,
    type=Seconds(),
    help="Seconds between two looks at the promises and at Dagster.",
)
def serve(listen: str, every: float) -> None:
    """Serve until told to stop (SIGTERM, Ctrl-C)."""
    import signal
    import threading

    from ops_platform.ledger import Ledger
    from ops_platform.metrics import serve as run
    from ops_platform.remediation.store import Store

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ended.set())
    with opened() as access, Ledger(access.platform_db) as ledger:
        server = run(access, Store(ledger), *address(listen), every=every)
        click.echo(f"http://{listen}/metrics", err=True)
        ended.wait()
        server.shutdown()
