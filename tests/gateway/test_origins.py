"""Web pages: those of the allowed origins may call with any SDK, others cause nothing, and the playground may call."""

from __future__ import annotations

from typing import Any

import pytest
from fakes.fake_transport import LM

from .conftest import Gateway

ALLOWED, OTHER = "http://page.example", "https://other.example"
# Of the SDKs for JavaScript.
SDK_HEADERS = "authorization,content-type,x-stainless-os,anthropic-dangerous-direct-browser-access,anthropic-beta"


def test_pages_of_allowed_origins_may_call_with_an_sdks_headers(gateway: Gateway) -> None:
    preflight = {"origin": ALLOWED, "access-control-request-method": "POST",
                 "access-control-request-headers": SDK_HEADERS}  # fmt: skip
    allowed = gateway.http.options("/v1/completions", headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ALLOWED)
    assert set(SDK_HEADERS.split(",")) <= set(allowed.headers["access-control-allow-headers"].lower().split(","))
    refused = gateway.http.options("/v1/completions", headers={**preflight, "origin": OTHER})
    assert "access-control-allow-origin" not in refused.headers


def test_an_allowed_page_reads_the_headers_that_an_sdk_needs(gateway: Gateway) -> None:
    response = gateway.http.get("/v1/models", headers={"origin": ALLOWED})
    exposed = response.headers["access-control-expose-headers"].lower().split(", ")
    retry = {"retry-after", "x-should-retry", "x-ratelimit-remaining-requests", "x-ratelimit-reset-tokens"}
    assert {"x-request-id", "request-id", "x-tritonlm-ignored", *retry} <= set(exposed)
    assert "access-control-allow-origin" not in gateway.http.get("/v1/models", headers={"origin": OTHER}).headers


# What a browser sends for any page without a preflight.
WITHOUT_PREFLIGHT: list[tuple[str, dict[str, Any]]] = [
    (f"/api/models/{LM}/unload", {"content": "", "headers": {"content-type": "text/plain"}}),
    ("/v1/files", {"files": {"file": ("in.jsonl", b"{}")}, "data": {"purpose": "batch"}}),
    ("/v1/batches/batch_1/cancel", {}),
    ("/api/jobs/1/cancel", {}),
    ("/v1/completions", {"data": {"model": LM, "prompt": "a"}}),
]


@pytest.mark.parametrize("origin", [OTHER, "null", "file://"])
@pytest.mark.parametrize(("path", "request_"), WITHOUT_PREFLIGHT, ids=[path for path, _ in WITHOUT_PREFLIGHT])
def test_pages_of_other_origins_cause_nothing(
    gateway: Gateway, path: str, request_: dict[str, Any], origin: str
) -> None:
    headers = {**request_.get("headers", {}), "origin": origin, "sec-fetch-site": "cross-site"}
    response = gateway.http.post(path, **{**request_, "headers": headers})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (403, "permission_error", "origin_not_allowed")
    assert origin in error["message"]
    assert "--cors-allow-origins" in error["message"]
    assert response.headers["x-request-id"]
    assert gateway.transport.loaded
    assert not gateway.transport.calls


def test_a_page_of_another_port_or_without_a_host_is_of_another_origin(gateway: Gateway) -> None:
    for origin in (gateway.url + "0", "null", ""):
        for host in (gateway.url.removeprefix("http://"), ""):
            response = gateway.http.post(f"/api/models/{LM}/unload", headers={"origin": origin, "host": host})
            assert response.status_code == 403
    assert gateway.transport.loaded


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "chat.example", "origin": "https://chat.example"},
        {"host": "127.0.0.1:8080", "origin": "https://chat.example", "sec-fetch-site": "same-origin"},
        {"host": "chat.example", "origin": "null", "sec-fetch-site": "same-origin"},
        {"origin": ALLOWED, "sec-fetch-site": "cross-site"},
        {},
    ],
    ids=["proxy", "proxy that changes the host", "no referrer", "allowed", "not a browser"],
)
def test_own_and_allowed_pages_and_programs_may_call(gateway: Gateway, headers: dict[str, str]) -> None:
    body = {"model": LM, "prompt": "a", "max_tokens": 1}
    assert gateway.http.post("/v1/completions", json=body, headers=headers).status_code == 200
