"""The gateway's HTTP interface: events, errors, headers, limits, and cancelling when the caller disconnects."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import httpx
import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm.client.transport import RepositoryModel
from tritonlm.contract import (
    ContextLengthExceeded,
    Draining,
    EngineFailure,
    NotOffered,
    QueueFull,
    QueueTimeout,
    TimedOut,
    TritonLMError,
    Unavailable,
)
from tritonlm.gateway.history import History

from .conftest import Gateway, running_gateway

CHAT = [{"role": "user", "content": "x"}]


def events(text: str) -> list[str]:
    """The data of all events; the text may hold only data and comments."""
    data = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            assert block.startswith("data: ")
            assert "\n" not in block
            data.append(block.removeprefix("data: "))
    return data


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def test_a_stream_is_one_json_line_per_event_and_done(gateway: Gateway) -> None:
    response = gateway.post("/v1/completions", model=LM, prompt="a", stream=True, seed=1)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    read = [json.loads(chunk) for chunk in chunks]
    assert all("usage" not in chunk for chunk in read)
    assert [chunk["choices"][0]["finish_reason"] for chunk in read] == [None] * (len(read) - 1) + ["length"]


@pytest.mark.parametrize("seed", range(8))
def test_events_are_not_split_at_unicode_line_breaks(gateway: Gateway, seed: int) -> None:
    body = {"model": LM, "prompt": "a", "seed": seed, "max_tokens": 40, "return_token_ids": True}
    complete = gateway.post("/v1/completions", **body).json()["choices"][0]["text"]
    text = ""
    with gateway.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            assert not line or line.startswith("data: ")
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert text == complete
    assert {"\u2028", "\x85"} & set(text)


def test_usage_is_null_until_the_last_chunk(gateway: Gateway) -> None:
    body = {"model": LM, "messages": CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, _ = [
        json.loads(event) if event != "[DONE]" else event
        for event in events(gateway.post("/v1/chat/completions", **body).text)
    ]
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] > 0
    assert "role" not in chunks[1]["choices"][0]["delta"]


def test_a_silent_stream_is_kept_alive_by_comments(gateway: Gateway) -> None:
    gateway.transport.pause = 0.7
    text = gateway.post("/v1/completions", model=LM, prompt="a", stream=True, seed=1, max_tokens=3).text
    assert ": ping" in text
    assert events(text)[-1] == "[DONE]"


def test_a_failure_during_a_stream_is_its_last_event(gateway: Gateway) -> None:
    gateway.transport.breaks_after = (1, EngineFailure("the engine failed"))
    response = gateway.post("/v1/completions", model=LM, prompt="a b c", stream=True, seed=1, max_tokens=40)
    assert response.status_code == 200
    assert json.loads(events(response.text)[-1])["error"]["code"] == "engine_failure"


FAILURES: list[tuple[TritonLMError, int, str, str]] = [
    (ContextLengthExceeded.for_lengths(1, 2, 3), 400, "invalid_request_error", "context_length_exceeded"),
    (QueueFull("full"), 429, "rate_limit_exceeded", "queue_full"),
    (QueueTimeout("late"), 503, "server_error", "queue_timeout"),
    (Draining("stops"), 503, "server_error", "draining"),
    (Unavailable("gone"), 503, "server_error", "unavailable"),
    (TimedOut("late"), 504, "server_error", "timeout"),
    (EngineFailure("broken"), 500, "server_error", "engine_failure"),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("failure", "status", "kind", "code"), FAILURES, ids=[row[3] for row in FAILURES])
def test_an_error_before_the_first_byte_has_its_http_status(
    gateway: Gateway, failure: TritonLMError, status: int, kind: str, code: str, stream: bool
) -> None:
    gateway.transport.trouble = [failure]
    response = gateway.post("/v1/completions", model=LM, prompt="a", stream=stream)
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (status, kind, code)
    assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize("stream", [True, False])
def test_an_internal_error_has_an_id_shows_no_details_and_keeps_the_connection(
    gateway: Gateway, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(History, "begin", fail)
    body, page = {"model": LM, "prompt": "a", "stream": stream}, "http://page.example"
    response = gateway.http.post("/v1/completions", json=body, headers={"origin": page})
    error = error_of(response)
    # A page of another origin can read it.
    assert response.headers["access-control-allow-origin"] == page
    assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in response.text
    logged = [record for record in caplog.records if record.exc_info and "a secret" in str(record.exc_info[1])]
    assert [response.headers["x-request-id"] in record.getMessage() for record in logged] == [True]
    used = response.extensions["network_stream"].get_extra_info("client_addr")
    after = gateway.http.get("/health/live").extensions["network_stream"].get_extra_info("client_addr")
    assert after == used


BAD: list[tuple[str, dict[str, Any], str | None]] = [
    ("/v1/completions", {"prompt": "a"}, "model"),
    ("/v1/completions", {"model": LM}, "prompt"),
    ("/v1/completions", {"model": LM, "prompt": 5}, "prompt"),
    ("/v1/completions", {"model": LM, "prompt": ["a", 1]}, "prompt"),
    ("/v1/completions", {"model": LM, "prompt": []}, "prompt"),
    ("/v1/completions", {"model": LM, "prompt": "a", "max_tokens": "5"}, "max_tokens"),
    ("/v1/completions", {"model": LM, "prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("/v1/completions", {"model": LM, "prompt": "a", "heat": 1}, "heat"),
    ("/v1/completions", {"model": LM, "prompt": "a", "suffix": "b"}, "suffix"),
    ("/v1/completions", {"model": LM, "prompt": "a", "logprobs": 21}, "logprobs"),
    ("/v1/completions", {"model": LM, "prompt": "a", "stream_options": {}}, "stream_options"),
    ("/v1/completions", {"model": LM, "prompt": "a", "timeout": 3}, "timeout"),
    ("/v1/completions", {"model": LM, "prompt": "a", "request_id": "x"}, "request_id"),
    ("/v1/chat/completions", {"model": LM, "messages": []}, "messages"),
    ("/v1/chat/completions", {"model": LM, "messages": CHAT, "tools": [{}]}, "tools[0]"),
    ("/v1/chat/completions", {"model": LM, "messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
    ("/detokenize", {"model": LM, "tokens": ["a"]}, "tokens[0]"),
    ("/detokenize", {"model": LM, "tokens": [5, 512]}, "tokens"),
    ("/tokenize", {"model": LM, "prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=[f"{path} {param}" for path, _, param in BAD])
def test_bad_bodies_are_refused_by_name(gateway: Gateway, path: str, body: dict[str, Any], param: str) -> None:
    response = gateway.post(path, **body)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert not gateway.transport.calls


@pytest.mark.parametrize("content", [b"{", b"[1]", b'"text"', b"\xff", b""])
def test_a_body_that_is_not_a_json_object_is_refused(gateway: Gateway, content: bytes) -> None:
    response = gateway.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content",
    [b'{"model": "\xff"}', b"[" * 10_000, b'{"seed": ' + b"9" * 5000 + b"}"],
    ids=["not UTF-8", "deep", "thousands of digits"],
)
def test_a_body_that_cannot_be_read_is_refused_like_one_that_is_no_json(gateway: Gateway, content: bytes) -> None:
    gateway.http.headers["content-type"] = "application/json"
    errors = [error_of(gateway.http.post("/v1/completions", content=body)) for body in (b"{", content)]
    assert [(error["type"], error["code"]) for error in errors] == [("invalid_request_error", "invalid_value")] * 2
    assert all("JSON" in error["message"] for error in errors)


def test_curls_content_type_is_accepted_except_from_a_browser_page(gateway: Gateway) -> None:
    content = json.dumps({"model": LM, "prompt": "a"})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert gateway.http.post("/v1/completions", content=content, headers=headers).status_code == 200
    headers["origin"] = gateway.url
    assert gateway.http.post("/v1/completions", content=content, headers=headers).status_code == 400


def test_null_means_not_sent(gateway: Gateway) -> None:
    body = {"model": LM, "prompt": "a", "seed": 1}
    nulls = dict.fromkeys(("stop", "n", "logprobs", "stream", "user", "best_of", "suffix", "max_tokens", "logit_bias"))
    plain, with_nulls = (gateway.post("/v1/completions", **body, **more).json() for more in ({}, nulls))
    assert with_nulls["choices"] == plain["choices"]


def test_unknown_urls_and_methods_get_404_and_405(gateway: Gateway) -> None:
    missing = gateway.http.get("/v2/nothing")
    assert (missing.status_code, error_of(missing)["type"]) == (404, "invalid_request_error")
    wrong = gateway.http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    error_of(wrong)


@pytest.mark.parametrize("name", ["a%0Ab", "fake%0A", "a/b%0A", "%E2%80%A8", "a%0D"])
def test_a_models_name_may_hold_any_character(gateway: Gateway, name: str) -> None:
    """A line break does not end the name, so that it names no other model and no other route."""
    missing = gateway.http.get(f"/v1/models/{name}")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large_is_not_read(gateway: Gateway, chunked: bool) -> None:
    body = json.dumps({"model": LM, "prompt": "x" * 30_000}).encode()
    headers = {"content-type": "application/json"}
    content: Any = (body[start : start + 1000] for start in range(0, len(body), 1000)) if chunked else body
    response = gateway.http.post("/v1/completions", content=content, headers=headers)
    assert (response.status_code, error_of(response)["type"]) == (413, "invalid_request_error")


@pytest.mark.parametrize(("sent", "kept"), [("abc-1:2", True), ("x" * 129, False), ("a b", False), ("", False)])
def test_a_valid_request_id_is_kept_and_any_other_replaced(gateway: Gateway, sent: str, kept: bool) -> None:
    for path in ("/health/live", "/nowhere"):
        returned = gateway.http.get(path, headers={"x-request-id": sent}).headers["x-request-id"]
        assert (returned == sent) == kept
        assert returned


def test_a_chat_without_a_template_gets_501_and_a_hint(gateway: Gateway) -> None:
    gateway.transport.has_chats = False
    response = gateway.post("/v1/chat/completions", model=LM, messages=CHAT)
    assert response.status_code == 501
    assert response.headers["x-should-retry"] == "false"
    assert "/v1/completions" in error_of(response)["message"]


CHATS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": CHAT, "max_tokens": 1},
}


@pytest.mark.parametrize("path", CHATS)
def test_what_a_chat_is_not_offered_is_named(gateway: Gateway, path: str) -> None:
    gateway.transport.trouble = [NotOffered("this LM has no adapters")]
    response = gateway.post(path, model=LM, **CHATS[path])
    assert (response.status_code, response.json()["error"]["message"]) == (501, "this LM has no adapters")


def test_a_request_that_reached_its_time_limit_is_not_to_be_sent_again() -> None:
    with running_gateway(request_seconds=1e-9) as gateway:
        response = gateway.post("/v1/completions", model=LM, prompt="a")
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
    assert response.headers["x-should-retry"] == "false"


def test_health_reports_the_models_that_answer(gateway: Gateway) -> None:
    for path in ("/health", "/healthz", "/health/ready"):
        report = gateway.http.get(path).json()
        assert (report["status"], report["ready"], report["models"]) == ("ok", True, [LM])
        assert report["queue"] == {"running": 0, "waiting": 0, "slots": 64, "places": 64, "slow": False}
    gateway.transport.loaded = False
    for path in ("/health", "/healthz", "/health/ready"):
        response = gateway.http.get(path)
        assert (response.status_code, response.json()["ready"]) == (503, False)
        assert response.headers["retry-after"]
    assert gateway.http.get("/health/live").status_code == 200


def test_health_and_queue_show_a_loaded_model_if_the_default_model_is_unloaded() -> None:
    class WithUnloaded(FakeTransport):
        async def models(self) -> list[RepositoryModel]:
            return [RepositoryModel("another", False), *await super().models()]

    with running_gateway(WithUnloaded(), default_model="another") as gateway:
        for path in ("/health", "/health/ready"):
            report = gateway.http.get(path)
            assert (report.status_code, report.json()["ready"], report.json()["model"]) == (200, True, LM)
        state = gateway.http.get("/queue")
        assert (state.status_code, state.json()["slots"]) == (200, 64)
        gateway.transport.loaded = False
        assert gateway.http.get("/queue").json()["error"]["code"] == "not_loaded"


def test_documentation_needs_no_network(gateway: Gateway) -> None:
    page = gateway.http.get("/docs").text
    assert "swagger-ui-bundle.js" in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert gateway.http.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200
    paths = gateway.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= set(paths)


def test_the_root_lists_the_endpoints(gateway: Gateway) -> None:
    overview = gateway.http.get("/").json()
    assert overview["models"] == [LM]
    for endpoint in overview["endpoints"]:
        method, path = endpoint.split()
        response = gateway.http.request(method, path)
        assert response.status_code in (200, 400), endpoint


def test_tokenize_and_detokenize_are_inverse(gateway: Gateway) -> None:
    tokens = gateway.post("/tokenize", model=LM, prompt="héllo").json()
    assert tokens["count"] == len(tokens["tokens"])
    plain = gateway.post("/tokenize", prompt="héllo", add_special_tokens=False).json()
    assert plain["tokens"] == tokens["tokens"][1:]
    assert gateway.post("/detokenize", model=LM, tokens=tokens["tokens"]).json() == {"prompt": "héllo"}


def test_metrics_have_labels_for_route_model_and_status_and_no_text_of_callers(gateway: Gateway) -> None:
    gateway.post("/v1/completions", model=LM, prompt="a", max_tokens=4)
    gateway.post("/v1/completions", model="stranger", prompt="a")
    gateway.http.get("/stranger")
    text = gateway.http.get("/metrics").text
    assert 'tritonlm_requests_total{model="fake",route="/v1/completions",status="200"}' in text
    assert 'tritonlm_tokens_total{kind="completion",model="fake"}' in text
    assert "stranger" not in text


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_cancelled_when_its_caller_disconnects(gateway: Gateway, stream: bool) -> None:
    gateway.transport.pause = 0.05
    body = json.dumps({"model": LM, "prompt": "a", "n": 3, "stream": stream, "max_tokens": 60}).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        raw.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        if stream:
            raw.recv(100)
        else:
            gateway.wait_until(lambda: len(gateway.transport.running) == 3)
    gateway.wait_until(lambda: not gateway.transport.running)
    assert len(set(gateway.transport.cancelled)) == 3
