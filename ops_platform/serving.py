"""Small HTTP servers of ours: pages for Prometheus and for whoever asks after health, and what Slack sends.

Known to all rooms, and knowing none: a domain says what stands on its pages, this says how they are served.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from ops_platform.errors import UsageError

Page = Callable[[], tuple[int, bytes, str]]
"""Status, body, content type."""


class Handler(BaseHTTPRequestHandler):
    """GET gives `pages`, by their exact paths; everything else is answered with what there is."""

    pages: ClassVar[Mapping[str, Page]] = {}
    timeout = 30  # seconds: whoever says no more keeps no thread

    def do_GET(self) -> None:
        page = self.pages.get(self.path)
        self.answer(*(page() if page else (404, f"{', '.join(self.pages)}\n".encode(), "text/plain")))

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news, and what was decided stands in the ledger."""


class Server(ThreadingHTTPServer):
    """`stopped` is set when it is told to shut down, for the threads that work for its pages."""

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.stopped = threading.Event()
        super().__init__((host, port), handler)

    def shutdown(self) -> None:
        self.stopped.set()
        super().shutdown()


def listen(handler: type[Handler], host: str, port: int) -> Server:
    """Serve in a thread of its own until `shutdown`. Raises UsageError for an address that cannot be had."""
    try:
        server = Server(host, port, handler)
    except OSError as error:
        raise UsageError(
            f"--listen: {error.strerror}",
            where=f"{host}:{port}",
            remedy="another program has this port, or the address is not ours",
        ) from None
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def metrics_page(collector: Any) -> Page:
    """What a collector of prometheus_client has to tell, asked at each scrape."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(collector)
    return lambda: (200, generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8")
