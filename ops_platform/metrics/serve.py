"""The HTTP side: /metrics and /healthz. Quick sources are read when Prometheus asks, slow ones by threads of their own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import OpsError, UsageError
from ops_platform.metrics.collect import METRICS, Reader, Sample, need_known, readers
from ops_platform.remediation.store import Store

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

EVERY = 60.0  # seconds between two readings of a slow source


class Collector:
    """What prometheus_client asks. Safe for threads."""

    def __init__(self, access: Access, store: Store, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._quick, self._slow = readers(access, store)
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[str, list[Sample] | None] = dict.fromkeys(self._slow)
        self._read_at: dict[str, float] = {}
        self.problems: dict[str, str] = {}

    @property
    def slow(self) -> list[str]:
        return list(self._slow)

    def read(self, source: str) -> None:
        """Read a slow source now. What could not be read has no values until it can."""
        samples = self._try(source, self._slow[source])
        with self._lock:
            self._kept[source] = samples

    def _try(self, source: str, reader: Reader) -> list[Sample] | None:
        try:
            samples = need_known(list(reader()))
        except OpsError as error:
            self.problems[source] = str(error)
            return None
        self.problems.pop(source, None)
        self._read_at[source] = self._clock.now().timestamp()
        return samples

    def samples(self) -> list[Sample]:
        found: dict[str, list[Sample] | None] = {name: self._try(name, reader) for name, reader in self._quick.items()}
        with self._lock:
            found |= self._kept
        flat = [sample for samples in found.values() for sample in samples or ()]
        flat += [("ops_source_up", (name,), float(samples is not None)) for name, samples in found.items()]
        return flat + [("ops_source_read_timestamp_seconds", (name,), at) for name, at in self._read_at.items()]

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        samples = self.samples()
        for name, metric in METRICS.items():
            family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
                name, metric.what, labels=metric.labels
            )
            for found, labels, value in samples:
                if found == name:
                    family.add_metric(list(labels), value)
            yield family


def serve(access: Access, store: Store, host: str, port: int, *, every: float = EVERY) -> ThreadingHTTPServer:
    """Serve in a thread of its own until `shutdown`. Raises UsageError for an address that cannot be had."""
    from prometheus_client import CollectorRegistry, generate_latest

    collector, registry = Collector(access, store), CollectorRegistry()
    registry.register(collector)  # type: ignore[arg-type]
    ended = threading.Event()

    def keep_reading(source: str) -> None:
        while not ended.is_set():
            collector.read(source)
            ended.wait(every)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8")
            elif self.path == "/healthz":
                self._answer(200, b"ok\n", "text/plain")
            else:
                self._answer(404, b"/metrics, /healthz\n", "text/plain")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A scrape every few seconds is no news."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

        def shutdown(self) -> None:
            ended.set()
            super().shutdown()

    try:
        server = Server((host, port), Handler)
    except OSError as error:
        raise UsageError(
            f"--listen: {error.strerror}",
            where=f"{host}:{port}",
            remedy="another program has this port, or the address is not ours",
        ) from None
    for source in collector.slow:
        threading.Thread(target=keep_reading, args=(source,), name=f"read-{source}", daemon=True).start()
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
