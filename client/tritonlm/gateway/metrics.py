"""The gateway's own metrics, in Prometheus format.

Labels are names that the server knows; text from callers never becomes a label.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

import tritonlm
from tritonlm.client.observer import Observer
from tritonlm.client.types import CompletionUsage

REGISTRY = CollectorRegistry()
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    return Counter(f"tritonlm_{name}", meaning, labels, registry=REGISTRY)


def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(f"tritonlm_{name}", meaning, labels, registry=REGISTRY)


def _histogram(name: str, meaning: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
    return Histogram(f"tritonlm_{name}", meaning, labels, buckets=buckets, registry=REGISTRY)


_requests = _counter("requests", "Requests by route, model and status", "route", "model", "status")
_duration = _histogram("request_seconds", "From the request to the last byte", "route")
_first_byte = _histogram("first_byte_seconds", "From the request to the first byte of the response", "route")
_tokens = _counter("tokens", "Tokens by model and kind (prompt, cached, completion)", "model", "kind")
_finished = _counter("sequences", "Sequences that ended, by model and finish reason", "model", "finish_reason")
_first_token = _histogram("first_token_seconds", "From the call to the first text of a stream", "model")
_inter_token = _histogram(
    "inter_token_seconds", "Time between two texts of a stream, per token of the later one", "model",
    buckets=_TOKEN_SECONDS,
)  # fmt: skip
_waited = _histogram("admission_seconds", "How long a request waited in the gateway's admission queue")
_errors = _counter("errors", "Error responses by code", "code")
_retries = _counter("retries", "Retries of a sequence on Triton, by the error of the last attempt", "error")
# The metric's name up to version 0.1; kept for existing dashboards.
_old_retries = _counter("tries_again", "Deprecated: the same as tritonlm_retries_total", "error")
_resumes = _counter("resumes", "Sequences that were resumed after a fault")
_retried = _counter("retried_requests", "Requests that the caller's library marked as a retry")
_loads = _counter("model_loads", "Loads of models, by model and outcome (loaded, failed)", "model", "outcome")
_key_requests = _counter("key_requests", "Requests by key and outcome (served, refused)", "key", "outcome")
_key_tokens = _counter("key_tokens", "Tokens by key and kind (prompt, completion)", "key", "kind")
_running = _gauge("running_requests", "Requests that are being served")
_waiting = _gauge("waiting_requests", "Requests that wait in the gateway's admission queue")
_limit = _gauge("requests_limit", "Limit of requests that run or wait at once")
_jobs = _gauge("training_jobs", "Training jobs by state", "state")
_batches = _gauge("batches", "Batches by status", "status")
_repairs = _counter("repairs", "Processes that the supervisor restarted because they had died or hung", "part")
Info("tritonlm_build", "Versions of tritonlm and Python", registry=REGISTRY).info(
    {"version": tritonlm.__version__, "python": platform.python_version()}
)
ProcessCollector(registry=REGISTRY)
_last_repairs: dict[str, int] = {}


def record(
    route: str, model: str, status: int, seconds: float, first_byte: float | None, usage: CompletionUsage | None
) -> None:
    _requests.labels(route, model, str(status)).inc()
    _duration.labels(route).observe(seconds)
    if first_byte is not None:
        _first_byte.labels(route).observe(first_byte)
    if usage is not None:
        _tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        _tokens.labels(model, "cached").inc(usage.prompt_tokens_details.cached_tokens)
        _tokens.labels(model, "completion").inc(usage.completion_tokens)


def record_error(code: str) -> None:
    _errors.labels(code).inc()


def record_retried() -> None:
    _retried.inc()


def record_wait(seconds: float) -> None:
    _waited.observe(seconds)


def record_load(model: str, loaded: bool) -> None:
    _loads.labels(model, "loaded" if loaded else "failed").inc()


def record_key(key: str, outcome: str) -> None:
    _key_requests.labels(key, outcome).inc()


def record_key_tokens(key: str, usage: CompletionUsage) -> None:
    _key_tokens.labels(key, "prompt").inc(usage.prompt_tokens)
    _key_tokens.labels(key, "completion").inc(usage.completion_tokens)


class MetricsObserver(Observer):
    """Counts the events of the client's sequences."""

    def first_piece(self, model: str, seconds: float) -> None:
        _first_token.labels(model).observe(seconds)

    def next_piece(self, model: str, seconds: float, tokens: int) -> None:
        _inter_token.labels(model).observe(seconds / tokens)

    def ended(self, model: str, reason: str) -> None:
        _finished.labels(model, reason).inc()

    def retried(self, error: str, resumes: bool) -> None:
        _retries.labels(error).inc()
        _old_retries.labels(error).inc()
        if resumes:
            _resumes.inc()


@dataclass
class LiveValues:
    """Functions that return current values; they are called when the metrics are requested."""

    running: Callable[[], float]
    waiting: Callable[[], float]
    limit: float
    jobs: Callable[[], Mapping[str, int]]
    batches: Callable[[], Mapping[str, int]]
    repairs: Callable[[], Mapping[str, int]]


def exposition(live: LiveValues) -> bytes:
    _running.set(live.running())
    _waiting.set(live.waiting())
    _limit.set(live.limit)
    for state, count in live.jobs().items():
        _jobs.labels(state).set(count)
    for state, count in live.batches().items():
        _batches.labels(state).set(count)
    for part, count in live.repairs().items():
        # The supervisor counts these; its count starts at zero when it is restarted.
        _repairs.labels(part).inc(max(0, count - _last_repairs.get(part, 0)))
        _last_repairs[part] = count
    return generate_latest(REGISTRY)
