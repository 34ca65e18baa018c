"""Loading on demand: concurrent first requests share one load, and all waits have a limit."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm import AsyncClient
from tritonlm.contract import Broken, CheckpointError, ModelNotFound, NotLoaded
from tritonlm.gateway.models.loading import Loader
from tritonlm.gateway.settings import GatewaySettings

from .conftest import Gateway, running_gateway


def ask(gateway: Gateway, count: int, **body: object) -> list[httpx.Response]:
    request = {"model": LM, "prompt": "a", "max_tokens": 3, **body}
    with ThreadPoolExecutor(count) as pool:
        return list(
            pool.map(lambda _: httpx.post(f"{gateway.url}/v1/completions", json=request, timeout=20), range(count))
        )


@pytest.mark.parametrize("stream", [True, False])
def test_fifty_first_requests_share_one_load_and_are_all_answered(gateway: Gateway, stream: bool) -> None:
    gateway.transport.loaded, gateway.transport.load_seconds = False, 0.5
    assert [response.status_code for response in ask(gateway, 50, stream=stream)] == [200] * 50
    assert gateway.transport.loads == 1


def test_a_model_is_listed_as_loading_during_its_load(gateway: Gateway) -> None:
    gateway.transport.loaded, gateway.transport.load_seconds = False, 1.0
    with ThreadPoolExecutor(1) as other:
        answer = other.submit(ask, gateway, 1)
        gateway.wait_until(lambda: gateway.transport.loads == 1)
        (model,) = gateway.http.get("/v1/models").json()["data"]
        assert model["state"] == gateway.http.get(f"/v1/models/{LM}").json()["state"] == "loading"
        assert answer.result()[0].status_code == 200
    assert gateway.http.get(f"/v1/models/{LM}").json()["state"] == "ready"


def test_a_failed_load_is_reported_to_all_waiting_requests_and_retried_by_the_next(gateway: Gateway) -> None:
    # Long enough for all requests to arrive before it fails, on a slow machine, too.
    gateway.transport.loaded, gateway.transport.load_seconds = False, 2.0
    gateway.transport.load_trouble = CheckpointError("checkpoint x has no config.json")
    for response in ask(gateway, 5):
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "checkpoint x has no config.json"
    assert gateway.transport.loads == 1
    gateway.transport.load_trouble, gateway.transport.load_seconds = None, 0.0
    assert ask(gateway, 1)[0].status_code == 200


def test_the_number_of_waiting_requests_is_limited() -> None:
    with running_gateway(max_loading_requests=3) as gateway:
        gateway.transport.loaded, gateway.transport.load_seconds = False, 1.0
        answers = ask(gateway, 8)
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 5
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)


def test_a_slow_load_times_out() -> None:
    with running_gateway(load_seconds=0.3) as gateway:
        gateway.transport.loaded, gateway.transport.load_seconds = False, 5.0
        (answer,) = ask(gateway, 1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        # The load goes on, and a retry may meet the loaded model.
        assert "x-should-retry" not in answer.headers


def test_a_caller_that_disconnects_does_not_cancel_the_load(gateway: Gateway) -> None:
    gateway.transport.loaded, gateway.transport.load_seconds = False, 1.0
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(httpx.ReadTimeout):
            gateway.http.post("/v1/completions", json={"model": LM, "prompt": "a"}, timeout=0.3)
        assert other.submit(ask, gateway, 1).result()[0].status_code == 200
    assert gateway.transport.loads == 1


def test_an_unknown_model_is_not_loaded(gateway: Gateway) -> None:
    (answer,) = ask(gateway, 1, model="nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert gateway.transport.loads == 0


def test_a_request_survives_a_triton_that_dies_during_a_load() -> None:
    """The repair time counts from the failure, not from the request."""

    class Dying(FakeTransport):
        async def load(self, model: str, timeout: float) -> None:
            await super().load(model, timeout)
            if self.loads == 1:
                self.loaded = False
                raise Broken("lost the connection to Triton")

    async def scenario() -> None:
        transport = Dying()
        transport.loaded, transport.load_seconds = False, 1.5
        settings = GatewaySettings(repair_seconds=1.0)
        loader = Loader(AsyncClient(transports=[transport], max_retries=0), settings)

        async def call() -> str:
            if not transport.loaded:
                raise NotLoaded("the model is not loaded")
            return "an answer"

        try:
            assert await loader.call(LM, call) == "an answer"
        finally:
            await loader.close()
        assert transport.loads == 2

    asyncio.run(scenario())


def test_unknown_model_names_are_not_kept() -> None:
    async def scenario() -> None:
        loader = Loader(AsyncClient(transports=[FakeTransport()], max_retries=0), GatewaySettings())
        for number in range(20):
            name = f"made up {number}"
            with pytest.raises(ModelNotFound):
                await loader.call(name, lambda name=name: loader._client.about(name))  # type: ignore[misc]
        assert not loader._claims
        assert not loader._loads

    asyncio.run(scenario())
