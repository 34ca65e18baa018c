"""The gateway's own metrics, in Prometheus' format. It counts; it does not know why."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from tritonlm.types import CompletionUsage

REGISTRY = CollectorRegistry()
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

REQUESTS = Counter(
    "tritonlm_requests", "Requests by route, model and status", ("route", "model", "status"), registry=REGISTRY
)
DURATION = Histogram(
    "tritonlm_request_seconds", "From the request to the last byte", ("route",), buckets=_SECONDS, registry=REGISTRY
)
FIRST_BYTE = Histogram(
    "tritonlm_first_byte_seconds", "From the request to the first byte", ("route",), buckets=_SECONDS, registry=REGISTRY
)
TOKENS = Counter(
    "tritonlm_tokens", "Tokens by model and kind (prompt, cached, completion)", ("model", "kind"), registry=REGISTRY
)
KEY_REQUESTS = Counter(
    "tritonlm_key_requests", "Requests by key and what became of them (served, refused)", ("key", "outcome"),
    registry=REGISTRY,
)  # fmt: skip
KEY_TOKENS = Counter(
    "tritonlm_key_tokens", "Tokens by key and kind (prompt, completion)", ("key", "kind"), registry=REGISTRY
)


def record(
    route: str, model: str, status: int, seconds: float, first_byte: float | None, usage: CompletionUsage | None
) -> None:
    REQUESTS.labels(route, model, str(status)).inc()
    DURATION.labels(route).observe(seconds)
    if first_byte is not None:
        FIRST_BYTE.labels(route).observe(first_byte)
    if usage is not None:
        TOKENS.labels(model, "prompt").inc(usage.prompt_tokens)
        TOKENS.labels(model, "cached").inc(usage.prompt_tokens_details.cached_tokens)
        TOKENS.labels(model, "completion").inc(usage.completion_tokens)


def exposition() -> bytes:
    return generate_latest(REGISTRY)
