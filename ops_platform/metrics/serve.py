"""The HTTP side: /metrics and /healthz. Quick sources are read when Prometheus asks, slow ones by threads of their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import OpsError
from ops_platform.metrics.collect import METRICS, Reader, Sample, need_known, readers
from ops_platform.remediation.store import Store
from ops_platform.serving import Handler, Page, Server, listen, metrics_page

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

EVERY = 60.0  # seconds between two readings of a slow source
HANGS_AFTER = 900.0  # seconds that a reading of a slow source may take
_LOG = logging.getLogger("ops_platform.metrics")


class Collector:
    """What prometheus_client asks. Safe for threads."""

    def __init__(self, access: Access, store: Store, *, every: float = EVERY, clock: Clock = SYSTEM_CLOCK) -> None:
        self._quick, self._slow = readers(access, store)
        self._clock = clock
        # A reading that never ends is a source that cannot be read: what it said before is not told for ever.
        self._old_after = every + HANGS_AFTER
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._kept: dict[str, list[Sample] | None] = dict.fromkeys(self._slow)
        self._read_at: dict[str, float] = {}
        self._problems: dict[str, str] = {}

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
        except Exception as error:  # noqa: BLE001 - whatever it is, the other sources go on, and this one is not told
            self._complain(source, str(error) if isinstance(error, OpsError) else type(error).__name__)
            return None
        with self._lock:
            self._problems.pop(source, None)
            self._read_at[source] = self._clock.now().timestamp()
        return samples

    def _complain(self, source: str, why: str) -> None:
        """Once, until it is something else."""
        with self._lock:
            known = self._problems.get(source)
            self._problems[source] = why
        if known != why:
            _LOG.warning("%s cannot be read: %s", source, why)

    def samples(self) -> list[Sample]:
        with self._turn:  # two Prometheus servers may ask at once, and a refusal is counted once
            found = {name: self._try(name, reader) for name, reader in self._quick.items()}
        with self._lock:
            read_at = dict(self._read_at)
            old = self._clock.now().timestamp() - self._old_after
            found |= {name: kept if read_at.get(name, old) > old else None for name, kept in self._kept.items()}
        flat = [sample for samples in found.values() for sample in samples or ()]
        flat += [("ops_source_up", (name,), float(samples is not None)) for name, samples in found.items()]
        return flat + [("ops_source_read_timestamp_seconds", (name,), at) for name, at in read_at.items()]

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


def serve(access: Access, store: Store, host: str, port: int, *, every: float = EVERY) -> Server:
    """Serve in a thread of its own until `shutdown`. Raises UsageError for an address that cannot be had."""
    collector = Collector(access, store, every=every)

    class OfPlatform(Handler):
        pages: ClassVar[Mapping[str, Page]] = {
            "/metrics": metrics_page(collector),
            "/healthz": lambda: (200, b"ok\n", "text/plain"),
        }

    server = listen(OfPlatform, host, port)

    def keep_reading(source: str) -> None:
        while not server.stopped.is_set():
            collector.read(source)
            server.stopped.wait(every)

    for source in collector.slow:
        threading.Thread(target=keep_reading, args=(source,), name=f"read-{source}", daemon=True).start()
    return server
