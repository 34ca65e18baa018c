"""An OpenTelemetry collector for tests: receives spans over HTTP, as protobuf or JSON, and stores them."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    name: str
    trace: str
    id: str
    parent: str


class Collector(http.server.BaseHTTPRequestHandler):
    spans: ClassVar[list[Span]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        is_json = "json" in self.headers["content-type"]
        self.spans.extend(_of_json(body) if is_json else _of_protobuf(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""


def _of_json(body: bytes) -> list[Span]:
    return [
        Span(span["name"], span["traceId"], span["spanId"], span.get("parentSpanId", ""))
        for resource in json.loads(body)["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def _of_protobuf(body: bytes) -> list[Span]:
    return [
        Span(span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


@contextlib.contextmanager
def collecting() -> Iterator[tuple[str, list[Span]]]:
    """The address of the collector, and the spans received so far."""
    spans: list[Span] = []
    handler = type("Handler", (Collector,), {"spans": spans})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", spans
        finally:
            server.shutdown()
            thread.join()
