"""Traces by OpenTelemetry, where somebody has named a collector; without one nothing is done and nothing imported.

It knows spans and how one process tells the next which trace it works for (W3C's traceparent), not what they are for.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

TRACEPARENT = "traceparent"
ENDPOINT_VARIABLE = "TRITONLM_OTLP_ENDPOINT"
# Which trace the calls of this task belong to.
current: ContextVar[str] = ContextVar(TRACEPARENT, default="")

CLOSE_SECONDS = 2.0

Attributes = Mapping[str, str | int | float]


def is_possible() -> bool:
    """Whether the library is here."""
    return importlib.util.find_spec("opentelemetry") is not None


class Tracing:
    """Spans of one service, on their way to a collector; sent by a thread of the library's own."""

    def __init__(self, endpoint: str, service: str) -> None:
        """`endpoint`: an OTLP collector over HTTP, such as http://127.0.0.1:4318."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        self._provider: TracerProvider = TracerProvider(
            resource=Resource({"service.name": service}), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("tritonlm")

    def begin(self, name: str, parent: str) -> Span:
        """A span that begins now, in the trace that the parent names, or in a new one."""
        return self._tracer.start_span(name, _context(parent))

    def add(self, name: str, parent: str, start: float, end: float, attributes: Attributes | None = None) -> str:
        """A span that is over: from one moment to another, in seconds since 1970. Returns what names it as a parent."""
        span = self._tracer.start_span(name, _context(parent), attributes=attributes, start_time=round(start * 1e9))
        span.end(round(end * 1e9))
        return name_of(span)

    def close(self) -> None:
        """Send what is left; a collector that does not answer is not waited for."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(CLOSE_SECONDS)


def name_of(span: Span) -> str:
    """A span as its children's processes are told of it."""
    found = span.get_span_context()
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def _context(parent: str):  # type: ignore[no-untyped-def]
    from opentelemetry.context import Context  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    return TraceContextTextMapPropagator().extract({TRACEPARENT: parent}, Context())
