"""Web pages: those of the allowed origins may call with any SDK, others cause nothing, and the playground may call.

A page whose host resolves to this machine is none of the gateway's own, unless a key is needed anyway.
"""

from __future__ import annotations

from typing import Any

import pytest
from fakes.fake_transport import LM

from .conftest import Gateway, running_gateway

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
        {"host": "page.example", "origin": "https://page.example"},
        {"host": "127.0.0.1:8080", "origin": "https://chat.example", "sec-fetch-site": "same-origin"},
        {"host": "localhost:8080", "origin": "null", "sec-fetch-site": "same-origin"},
        {"origin": ALLOWED, "sec-fetch-site": "cross-site"},
        {},
    ],
    ids=["proxy", "proxy that changes the host", "no referrer", "allowed", "not a browser"],
)
def test_own_and_allowed_pages_and_programs_may_call(gateway: Gateway, headers: dict[str, str]) -> None:
    body = {"model": LM, "prompt": "a", "max_tokens": 1}
    assert gateway.http.post("/v1/completions", json=body, headers=headers).status_code == 200


REBOUND = "evil.example:8080"
KEY = "a-secret-key"


@pytest.mark.parametrize(
    "host", [REBOUND, "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "page.example.evil"]
)
def test_a_host_that_anybody_may_name_is_refused_without_a_key(gateway: Gateway, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    body = {"model": LM, "prompt": "a"}
    for response in (
        gateway.http.get("/v1/models", headers={"host": host}),
        gateway.http.get("/health/ready", headers={"host": host}),
        gateway.http.post("/v1/completions", json=body, headers=headers),
        gateway.http.post(f"/api/models/{LM}/unload", headers=headers),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"]) == (403, "permission_error", "host_not_allowed")
        assert host in error["message"]
        assert "tritonlm keys create" in error["message"]
        assert "--cors-allow-origins" in error["message"]
    assert gateway.transport.loaded
    assert not gateway.transport.calls


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:1", "[::1]:8080", "192.0.2.7", "localhost", "LOCALHOST.:8080", "chat.localhost:80", "page.example", ""],
)
def test_addresses_localhost_and_allowed_hosts_are_served_without_a_key(gateway: Gateway, host: str) -> None:
    assert gateway.http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "settings",
    [{"host": "0.0.0.0", "allow_anonymous": True}, {"api_key": KEY}, {"cors_allow_origins": ["*"]}],
    ids=["beyond this machine", "key", "all origins"],
)
def test_any_host_is_served_where_anybody_may_call_or_a_key_is_needed(settings: dict[str, Any]) -> None:
    with running_gateway(**settings) as gateway:
        headers = {"host": REBOUND, "authorization": f"Bearer {KEY}"}
        assert gateway.http.get("/v1/models", headers=headers).status_code == 200
