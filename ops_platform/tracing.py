"""Traces for an OpenTelemetry collector, over OTLP and HTTP; off unless `platform.tracing` names one.

Each incident is one trace, whichever runs worked on it: its trace id is made from the incident's id, and so is the id of the span
from the alert to the end, under which all others stand. No label, reason, name of an object or secret goes into an attribute.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ops_platform.clock import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

TIMEOUT = 5  # seconds that a collector may keep the end of a run
Set = Callable[[str, str | int | bool], object]


def ids_of(incident: str) -> tuple[int, int]:
    """The trace's id and that of its outermost span."""
    digest = hashlib.sha256(incident.encode()).digest()
    return int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big")


class Traces:
    """Of one incident. Without a provider nothing is traced."""

    def __init__(self, incident: str = "", provider: Any = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self._incident, self._clock = incident, clock
        self._tracer = provider.get_tracer("ops_platform") if provider is not None else None

    @contextlib.contextmanager
    def span(self, name: str, **attributes: str | int) -> Generator[Set]:
        """A step, below the one that it is in. What is raised ends it as failed, without its text."""
        if self._tracer is None:
            yield lambda _name, _value: None
            return
        from opentelemetry import trace

        span = self._tracer.start_span(name, context=self._above(), attributes=attributes, start_time=self._now())
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield span.set_attribute
        except BaseException as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            span.end(end_time=self._now())

    def whole(self, since: datetime, until: datetime, **attributes: str | int) -> None:
        """The outermost span, once it is over."""
        if self._tracer is not None:
            from opentelemetry.context import Context

            self._tracer.id_generator.fixed = ids_of(self._incident)
            span = self._tracer.start_span("incident", context=Context(), attributes=attributes, start_time=_ns(since))
            span.end(end_time=_ns(until))

    def _above(self) -> Any:
        from opentelemetry import trace

        number, whole = ids_of(self._incident)
        if trace.get_current_span().get_span_context().trace_id == number:
            return None
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        outermost = trace.SpanContext(number, whole, is_remote=True, trace_flags=flags)
        return trace.set_span_in_context(trace.NonRecordingSpan(outermost))

    def _now(self) -> int:
        return _ns(self._clock.now())


def _ns(moment: datetime) -> int:
    return int(moment.timestamp() * 1e9)


@contextlib.contextmanager
def traces_of(access: Access, incident: str, clock: Clock = SYSTEM_CLOCK) -> Generator[Traces]:
    """What was traced is sent when the context ends. A collector that does not answer is logged, and keeps nobody from acting."""
    wanted = access.inventory.platform.tracing
    if wanted is None:
        yield Traces()
        return
    provider = _provider(access.url(wanted.endpoint), access.inventory.platform.name)
    try:
        yield Traces(incident, provider, clock)
    finally:
        provider.shutdown()


def _provider(endpoint: str, platform: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    class Ids(RandomIdGenerator):
        """By chance, but for the one span whose ids are known before."""

        fixed: tuple[int, int] | None = None

        def generate_trace_id(self) -> int:
            return self.fixed[0] if self.fixed else super().generate_trace_id()

        def generate_span_id(self) -> int:
            fixed, self.fixed = self.fixed, None
            return fixed[1] if fixed else super().generate_span_id()

    resource = Resource({"service.name": "ops_platform", "service.namespace": platform})
    made = TracerProvider(
        sampler=ALWAYS_ON, resource=resource, id_generator=Ids(), shutdown_on_exit=False,
    )  # fmt: skip
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=TIMEOUT)
    made.add_span_processor(BatchSpanProcessor(exporter))
    return made
