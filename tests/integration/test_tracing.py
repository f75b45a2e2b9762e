"""Traces of incidents as a collector gets them: over HTTP, in protobuf, by whichever run they were made."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from ops_platform.remediation.model import State
from ops_platform.tracing import ids_of
from tests.remediation_rig import BEGIN, Engine, KilledError, a_rule, a_signal, new_engine

__all__ = ["new_engine"]
NewEngine = Callable[..., Engine]


class Collector:
    """Takes what an OTLP exporter posts to /v1/traces."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                good = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
                outer.bodies.append(body)
                self.send_response(outer.status if good else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        """By their begin."""
        found: list[Span] = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {each.key: each.value.string_value for each in resource.resource.attributes}
                assert named == {"service.name": "ops_platform", "service.namespace": "tests"}
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


def traced(new_engine: NewEngine, collector: Collector) -> Engine:
    return new_engine(platform={"tracing": {"endpoint": collector.url}})


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_an_incident_is_one_trace_from_the_alert_to_the_verification(
    new_engine: NewEngine, collector: Collector
) -> None:
    engine = traced(new_engine, collector)
    incident = engine.fire()
    engine.clock.slept = engine.end
    assert engine.work(incident).state is State.CLOSED
    spans = {span.name: span for span in collector.spans()}
    assert sorted(span.name for span in collector.spans()) == ["apply", "check", "incident", "look", "plan", "verify"]
    number, whole = ids_of(incident.id)
    assert {span.trace_id for span in spans.values()} == {number.to_bytes(16, "big")}
    root = spans["incident"]
    assert (root.span_id, root.parent_span_id) == (whole.to_bytes(8, "big"), b"")
    assert {spans[name].parent_span_id for name in ("look", "verify")} == {root.span_id}
    assert {spans[name].parent_span_id for name in ("plan", "apply", "check")} == {spans["look"].span_id}
    assert attributes(root) == {
        "incident": incident.id, "rule": "dark", "playbook": "toy.switch_off", "ending": "helped",
    }  # fmt: skip
    assert attributes(spans["look"]) == {"attempts": 0, "state": "verifying"}
    assert attributes(spans["apply"]) == {"kind": "lamp", "outcome": "applied"}
    assert root.start_time_unix_nano == int(BEGIN.timestamp() * 1e9)
    assert root.end_time_unix_nano == spans["verify"].end_time_unix_nano == int(engine.clock.now().timestamp() * 1e9)


def test_a_run_that_takes_over_and_the_undo_stand_in_the_same_trace(
    new_engine: NewEngine, collector: Collector
) -> None:
    engine = traced(new_engine, collector)
    incident = engine.fire()
    engine.lamps.kill_at = "applied"
    with pytest.raises(KilledError):
        engine.work(incident)
    engine.lamps.kill_at = None
    assert engine.work(incident).state is State.ESCALATED
    spans = collector.spans()
    assert {span.trace_id for span in spans} == {ids_of(incident.id)[0].to_bytes(16, "big")}
    assert {"resume", "verify", "undo"} <= {span.name for span in spans}
    killed = [span for span in spans if span.status.code]
    assert {(span.name, span.status.message) for span in killed} == {("apply", "KilledError"), ("look", "KilledError")}


def test_nothing_of_labels_errors_and_data_goes_into_a_trace(new_engine: NewEngine, collector: Collector) -> None:
    engine = traced(new_engine, collector)
    engine.lamps.fails = "no such user: eve@example.com"
    labels = {"alertname": "LampOn", "customer": "eve@example.com"}
    assert engine.work(engine.fire(a_signal(labels=labels))).state is State.ESCALATED
    assert "apply" in {span.name for span in collector.spans()}
    sent = b"".join(collector.bodies)
    for word in (b"eve", b"example", b"customer", b"Traceback"):
        assert word not in sent


def test_a_collector_that_refuses_or_is_away_keeps_nobody_from_acting(
    new_engine: NewEngine, collector: Collector
) -> None:
    engine = traced(new_engine, collector)
    collector.status = 400
    engine.clock.slept = engine.end
    assert engine.work(engine.fire()).state is State.CLOSED
    engine.change([a_rule()], platform={"tracing": {"endpoint": "http://127.0.0.1:1"}})
    engine.clock.at += timedelta(hours=1)
    engine.lamps.put("lamp", "on")
    assert engine.work(engine.fire(a_signal("f2", at=engine.clock.now()))).state is State.ESCALATED


def test_without_tracing_nothing_is_sent_and_nothing_of_it_is_loaded(new_engine: NewEngine) -> None:
    engine = new_engine()
    engine.clock.slept = engine.end
    assert engine.work(engine.fire()).state is State.CLOSED
    program = (
        "import ops_platform.remediation.worker, sys; sys.exit(any(m.startswith('opentelemetry') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
