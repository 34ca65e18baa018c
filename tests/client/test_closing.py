"""Clients and streams that are closed while they are used: by their own thread, by another task, by another thread."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm import AsyncClient, Client
from tritonlm.client.stream import AsyncStream
from tritonlm.contract import TritonLMError

MESSAGE = "the client is closed"


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_that_another_task_closes_ends_and_is_cancelled(n: int) -> None:
    async def close() -> None:
        transport = FakeTransport(pause=0.02)
        transport.answers = [["a"] * 400 for _ in range(n)]
        async with AsyncClient(transports=[transport]) as client:
            stream = await client.completions.create(LM, "a b c", stream=True, n=n)
            assert isinstance(stream, AsyncStream)

            async def read() -> int:
                return len([chunk async for chunk in stream])

            reader = asyncio.create_task(read())
            await asyncio.sleep(0.05)
            await stream.close()
            assert await reader > 0
            assert not transport.running
            assert len(set(transport.cancelled)) == n

    asyncio.run(asyncio.wait_for(close(), 5))


def test_a_closed_client_cancels_the_streams_that_are_open() -> None:
    transport = FakeTransport(pause=0.001)
    transport.answers = [["a"] * 400 for _ in range(3)]
    client = Client(transports=[transport])
    streams: list[Any] = [client.completions.create(LM, "a", stream=True, n=n) for n in (1, 2)]
    for stream in streams:
        next(stream)
    client.close()
    assert len(set(transport.cancelled)) == 3
    for stream in streams:
        stream.close()
        with pytest.raises(RuntimeError, match=MESSAGE):
            next(stream)


@pytest.mark.filterwarnings("error")
def test_a_client_may_be_closed_twice_and_names_what_is_wrong_afterwards() -> None:
    with Client(transports=[FakeTransport()]) as client:
        client.close()
    with pytest.raises(RuntimeError, match=MESSAGE):
        client.completions.create(LM, "a")


def test_a_thread_whose_client_is_closed_does_not_wait_for_ever() -> None:
    transport = FakeTransport(pause=60)
    client = Client(transports=[transport])
    errors: list[BaseException] = []

    def call() -> None:
        try:
            client.completions.create(LM, "a")
        except TritonLMError as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while not transport.running:
        time.sleep(0.001)
    client.close()
    thread.join(5)
    assert [str(error) for error in errors] == ["the client was closed during this call"]


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda client: client.completions.create(LM, "\ud800"), "prompt"),
        (lambda client: client.completions.create(LM, ["a", "\ud800"]), "prompt"),
        (lambda client: client.embeddings.create(LM, "\ud800"), "input"),
        (lambda client: client.completions.create(LM, "a", request_id="\ud800"), "request_id"),
        (lambda client: client.tokenize(LM, "\ud800"), "text"),
        (lambda client: client.status("\ud800"), "model"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_the_arguments_name(call: Any, param: str) -> None:
    with (
        Client(transports=[FakeTransport()]) as client,
        pytest.raises(TritonLMError, match="unpaired surrogate") as refused,
    ):
        call(client)
    assert refused.value.param == param
