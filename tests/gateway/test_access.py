"""Every route except two health checks needs a key, and the request rate is limited."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from fakes.fake_transport import LM

from .conftest import Gateway, running_gateway

KEY = "a-long-enough-key"


@pytest.fixture(scope="module")
def locked() -> Iterator[Gateway]:
    with running_gateway(api_key=KEY) as running:
        yield running


def routes(gateway: Gateway) -> list[tuple[str, str]]:
    paths = gateway.http.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()["paths"]
    documented = [(method.upper(), path.replace("{", "").replace("}", "")) for path in paths for method in paths[path]]
    return [*documented, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere")]


@pytest.mark.parametrize("header", [None, "Bearer wrong-key", f"Basic {KEY}", KEY, "Bearer", f"Bearer {KEY}x"])
def test_without_the_key_nothing_is_told_but_life(locked: Gateway, header: str | None) -> None:
    headers = {"Authorization": header} if header else {}
    checked = routes(locked)
    assert len(checked) > 20
    for method, path in checked:
        response = locked.http.request(method, path, headers=headers)
        if path in ("/health/live", "/health/ready"):
            assert response.status_code == 200
            continue
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (401, "invalid_api_key"), path
        assert response.headers["x-request-id"]
        assert KEY not in response.text
    assert locked.transport.calls == []


def test_the_sdk_works_with_the_key(locked: Gateway) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY) as sdk:
        assert sdk.completions.create(model=LM, prompt="a").choices[0].text
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong") as sdk, pytest.raises(openai.AuthenticationError):
        sdk.models.list()


def test_a_caller_over_its_request_rate_gets_429_with_retry_after() -> None:
    with running_gateway(requests_per_minute=3) as gateway:
        answers = [gateway.post("/v1/completions", model=LM, prompt="a", max_tokens=1) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:3]] == ["2", "1", "0"]
        refused = answers[-1]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_exceeded"
        # Listing models is not limited, and an unchecked key does not make a different caller.
        assert gateway.http.get("/v1/models").status_code == 200
        other = {"Authorization": "Bearer somebody-else"}
        body = {"model": LM, "prompt": "a", "max_tokens": 1}
        assert gateway.http.post("/v1/completions", json=body, headers=other).status_code == 429
