"""OpenTelemetry traces. Without a configured collector nothing is traced and the library is not imported.

This module creates spans and passes the trace between processes (W3C traceparent). It does not know what they measure.
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
# The trace that the current task's calls belong to.
current: ContextVar[str] = ContextVar(TRACEPARENT, default="")

CLOSE_SECONDS = 2.0

Attributes = Mapping[str, str | int | float]


def is_available() -> bool:
    """Whether the OpenTelemetry library is installed."""
    return importlib.util.find_spec("opentelemetry") is not None


class Tracing:
    """Creates the spans of one service. A thread of the library sends them to the collector."""

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
        """A span that starts now, in the parent's trace, or in a new trace if the parent is empty."""
        return self._tracer.start_span(name, _context(parent))

    def add(self, name: str, parent: str, start: float, end: float, attributes: Attributes | None = None) -> str:
        """Record a finished span; times are in seconds since 1970. Returns its traceparent, for child spans."""
        span = self._tracer.start_span(name, _context(parent), attributes=attributes, start_time=round(start * 1e9))
        span.end(round(end * 1e9))
        return traceparent_of(span)

    def close(self) -> None:
        """Send the remaining spans, waiting at most `CLOSE_SECONDS` for the collector."""
        shutdown = threading.Thread(target=self._provider.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(CLOSE_SECONDS)


def traceparent_of(span: Span) -> str:
    """The W3C traceparent that makes other spans children of this one."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _context(parent: str):  # type: ignore[no-untyped-def]
    from opentelemetry.context import Context  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    return TraceContextTextMapPropagator().extract({TRACEPARENT: parent}, Context())
