"""The gateway's observability: metrics, the log line of a request, and traces."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
from pathlib import Path

import pytest
from fakes.collector import collecting
from prometheus_client.parser import text_string_to_metric_families
from tritonlm.observability import logs, tracing
from tritonlm.serving.restart_counts import RestartCounts, read_restart_counts

from .conftest import Gateway, running_gateway

LM = "fake"


def metrics(gateway: Gateway) -> dict[str, float]:
    """Every series by its name and labels."""
    text = gateway.http.get("/metrics").text
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def settled_metrics(gateway: Gateway) -> dict[str, float]:
    """The metrics after the last request has ended, which may be after its reader has read all of it."""
    gateway.wait_until(lambda: metrics(gateway)["tritonlm_running_requests"] == 0)
    return metrics(gateway)


def test_a_stream_is_counted_and_timed(gateway: Gateway) -> None:
    before = metrics(gateway)
    # Greedy: with random sampling the fake sends the text in a single piece now and then.
    gateway.post("/v1/completions", model=LM, prompt="a", max_tokens=6, stream=True, temperature=0).read()
    after = settled_metrics(gateway)

    def increase(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert increase("tritonlm_first_token_seconds_count model=fake") == 1
    assert increase("tritonlm_inter_token_seconds_count model=fake") >= 1
    assert increase("tritonlm_sequences_total finish_reason=length model=fake") == 1
    assert increase("tritonlm_admission_seconds_count") == 1
    assert after["tritonlm_requests_limit"] > 0
    assert after["tritonlm_waiting_requests"] == 0
    assert any(name.startswith("tritonlm_build_info") for name in after)
    assert after["process_resident_memory_bytes"] > 0


def test_errors_retries_and_repairs_are_counted(tmp_path: Path) -> None:
    repairs = RestartCounts(tmp_path / "repairs.json")
    with running_gateway(repairs=tmp_path / "repairs.json") as gateway:
        before = metrics(gateway)
        repairs.add("fable-generate")
        gateway.http.post("/v1/completions", json={"model": LM}, headers={"x-stainless-retry-count": "1"})
        after = metrics(gateway)
    assert (
        after["tritonlm_errors_total code=invalid_value"]
        == before.get("tritonlm_errors_total code=invalid_value", 0) + 1
    )
    assert after["tritonlm_retried_requests_total"] == before["tritonlm_retried_requests_total"] + 1
    assert after["tritonlm_repairs_total part=fable-generate"] == 1


def test_a_request_that_is_refused_before_its_route_is_counted_there() -> None:
    with running_gateway(api_key="a-secret-key") as gateway:
        gateway.http.post("/v1/completions", json={"model": LM})
        gateway.http.get("/v1/models/a/b")
        gateway.http.get("/nowhere")
        preflight = {"origin": "http://page.example", "access-control-request-method": "POST"}
        gateway.http.options("/v1/embeddings", headers=preflight)
        gateway.http.headers["authorization"] = "Bearer a-secret-key"
        counted = metrics(gateway)
    routes = ["/v1/completions", "/v1/models/{name:model_name}", "other"]
    assert all(counted[f"tritonlm_requests_total model= route={route} status=401"] >= 1 for route in routes)
    assert "tritonlm_requests_total model= route=/v1/embeddings status=200" not in counted


def test_an_unreadable_restart_count_is_empty(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("[1", encoding="utf-8")
    assert read_restart_counts(broken) == read_restart_counts(tmp_path / "missing") == read_restart_counts(None) == {}


def test_the_log_line_of_a_request_has_its_fields(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tritonlm.access"):
        headers = {"x-request-id": "mine"}
        gateway.http.post("/v1/completions", json={"model": LM, "prompt": "a", "max_tokens": 3}, headers=headers)
        gateway.wait_until(lambda: any(record.name == "tritonlm.access" for record in caplog.records))
    (record,) = [record for record in caplog.records if record.name == "tritonlm.access"]
    assert "✓ Generated 3 tokens in" in record.getMessage()
    assert "tok/s)" in record.getMessage()
    assert (record.request_id, record.status, record.model, record.completion_tokens) == ("mine", 200, LM, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("log_format", "is_json"), [("json", True), ("text", False), ("auto", True)])
def test_the_log_format(log_format: str, is_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr("sys.stderr", output)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        root.handlers[:] = []
        logs.configure(log_format)
        logging.getLogger("tritonlm.access").info("message", extra={"status": 200})
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    line = output.getvalue()
    if is_json:
        entry = json.loads(line)
        fields = {name: entry[name] for name in ("message", "status", "level", "logger")}
        assert fields == {"message": "message", "status": 200, "level": "INFO", "logger": "tritonlm.access"}
    else:
        assert line.endswith("INFO message\n")


def test_a_request_has_a_span_in_its_callers_trace() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with collecting() as (endpoint, spans), running_gateway(otlp_endpoint=endpoint) as gateway:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        gateway.http.post("/v1/completions", json={"model": LM, "prompt": "a"}, headers=headers)
        (call,) = gateway.transport.calls
        gateway.wait_until(lambda: any(span.name == "POST /v1/completions" for span in spans))
        (span,) = [span for span in spans if span.name == "POST /v1/completions"]
    assert (span.trace, span.parent) == (trace, "b7ad6b7169203331")
    assert call.traceparent == f"00-{trace}-{span.id}-01"


def test_a_collector_that_does_not_answer_delays_nothing() -> None:
    """Neither a request nor the shutdown; the socket accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        traces = tracing.Tracing(f"http://127.0.0.1:{silent.getsockname()[1]}", "test")
        traces.add("span", "", 1.0, 2.0)
        ended = threading.Thread(target=traces.close, daemon=True)
        ended.start()
        # The library itself would wait for the response and then retry.
        ended.join(tracing.CLOSE_SECONDS + 5)
        assert not ended.is_alive()
