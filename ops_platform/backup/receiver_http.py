"""The receiver seen from outside: Prometheus metrics, health, readiness. No secrets, no data.

What is not known of a target has no sample: a distance to a server that cannot be asked is not 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ops_platform.backup.reception import TargetState
from ops_platform.clock import SYSTEM_CLOCK
from ops_platform.serving import Handler, Page, Server, listen, metrics_page

if TYPE_CHECKING:
    from ops_platform.backup.receiver import Receiver

STUCK_AFTER = 180.0  # seconds without a sign of life of a target's thread

# name: (what it is, counter or gauge, how it is read from the state; None where it is not known)
METRICS: dict[str, tuple[str, str, Callable[[TargetState], float | None]]] = {
    "ops_wal_streaming": ("1 while WAL is being received.", "gauge", lambda s: s.phase == "streaming"),
    "ops_wal_lag_bytes": ("WAL of the server that is not yet durable in the store; absent while the server cannot be asked.", "gauge", lambda s: s.lag_bytes),
    "ops_wal_lag_seconds": (
        "Age of the oldest received bytes that are not yet durable; time since the stream ended, or was first tried, while there is none.",
        "gauge", lambda s: s.lag_seconds(SYSTEM_CLOCK.monotonic()),
    ),
    "ops_wal_received_lsn_bytes": ("Position received.", "gauge", lambda s: s.received or None),
    "ops_wal_durable_lsn_bytes": ("Position durable in the store.", "gauge", lambda s: s.durable or None),
    "ops_wal_timeline": ("Timeline being received.", "gauge", lambda s: s.timeline),
    "ops_wal_slot_retained_bytes": ("WAL that the slot holds back on the server.", "gauge", lambda s: s.slot_retained),
    "ops_wal_slot_lost": ("1 when the slot is missing or lost its WAL.", "gauge", lambda s: s.slot_status in ("lost", "missing") if s.slot_status else None),
    "ops_wal_segments": ("Whole segments stored.", "counter", lambda s: s.segments),
    "ops_wal_partials": ("Unfinished segments stored.", "counter", lambda s: s.partials),
    "ops_wal_raw_bytes": ("Bytes of WAL stored in whole segments, before compression.", "counter", lambda s: s.raw_bytes),
    "ops_wal_gaps": ("Gaps that stand in the store: WAL that the server no longer had. Fewer when they expire.", "gauge", lambda s: s.gaps),
    "ops_wal_reconnects": ("Connections begun anew.", "counter", lambda s: s.reconnects),
}  # fmt: skip


class _Collector:
    """Reads the states when it is asked, so that nothing has to be kept up to date."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, (what, kind, read) in METRICS.items():
            family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, what, labels=["target"])
            for state in self._receiver.states:
                value = read(state)
                if value is not None:
                    family.add_metric([state.target_id], float(value))
            yield family


def health(receiver: Receiver, now: float) -> tuple[bool, dict[str, str]]:
    """Whether every target's thread is alive. A target that waits for its server is healthy: a restart would not help it."""
    dead = dict.fromkeys(receiver.dead(), "ended")
    stuck = {
        s.target_id: f"no sign of life for {now - s.alive_at:.0f} s"
        for s in receiver.states
        if s.phase == "streaming" and s.alive_at and now - s.alive_at > STUCK_AFTER
    }
    return not dead and not stuck, stuck | dead


def readiness(receiver: Receiver) -> tuple[bool, dict[str, str]]:
    """Ready when no target is still starting and at least one is streaming."""
    phases = {state.target_id: _phase(state) for state in receiver.states}
    states = [state.phase for state in receiver.states]
    return "starting" not in states and "streaming" in states, phases


def _phase(state: TargetState) -> str:
    return f"{state.phase}: {state.last_error}" if state.last_error else state.phase


def serve(receiver: Receiver, host: str, port: int) -> Server:
    """Serve in a thread of its own until `shutdown`. Raises UsageError for an address that cannot be had."""

    def said(good: bool, detail: dict[str, str]) -> tuple[int, bytes, str]:
        return 200 if good else 503, json.dumps(detail, indent=1).encode(), "application/json"

    class OfReceiver(Handler):
        pages: ClassVar[Mapping[str, Page]] = {
            "/metrics": metrics_page(_Collector(receiver)),
            "/healthz": lambda: said(*health(receiver, SYSTEM_CLOCK.monotonic())),
            "/readyz": lambda: said(*readiness(receiver)),
        }

    return listen(OfReceiver, host, port)
