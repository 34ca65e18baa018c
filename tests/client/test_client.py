"""Life of a call: leaving early cancels, trouble is retried where that is safe, and the twins do the same."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm import AsyncClient, Client
from tritonlm.client.stream import AsyncStream
from tritonlm.client.sync import Stream
from tritonlm.client.types import Completion
from tritonlm.contract import (
    Cancelled,
    Draining,
    EngineFailure,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    TritonLMError,
    Unavailable,
)

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 20))


async def stream_of(client: AsyncClient, prompt: Any = "a b c", **arguments: Any) -> AsyncStream[Completion]:
    found = await client.completions.create(LM, prompt, stream=True, max_tokens=40, seed=1, **arguments)
    assert isinstance(found, AsyncStream)
    return found


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_cancels_every_sequence_of_it(n: int) -> None:
    async def leave() -> None:
        transport = FakeTransport(pause=0.001)
        async with AsyncClient(transports=[transport]) as client:
            async with await stream_of(client, n=n) as stream:
                await stream.__anext__()
            assert not transport.running
            assert len(set(transport.cancelled)) == n
            with pytest.raises(StopAsyncIteration):
                await stream.__anext__()

    run(leave())


@pytest.mark.parametrize("n", [1, 2])
def test_a_caller_that_is_cancelled_while_it_waits_cancels_its_request(n: int) -> None:
    async def leave() -> None:
        transport = FakeTransport(pause=5)
        async with AsyncClient(transports=[transport]) as client:
            waiting = asyncio.create_task(client.completions.create(LM, "a", n=n))
            while len(transport.running) < n:
                await asyncio.sleep(0.001)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert not transport.running
            assert len(transport.cancelled) == n

    run(leave())


def test_a_call_is_cancelled_by_its_id_from_elsewhere() -> None:
    async def cancel() -> None:
        transport = FakeTransport(pause=0.01)
        async with AsyncClient(transports=[transport]) as client:
            stream = await stream_of(client, n=2, request_id="mine")
            assert stream.request_id == "cmpl-mine"
            assert await client.cancel(stream.request_id) == 2
            with pytest.raises(Cancelled):
                async for _ in stream:
                    pass
            assert await client.cancel(stream.request_id) == 0

    run(cancel())


def test_an_error_of_one_answer_ends_the_others() -> None:
    async def fail() -> None:
        transport = FakeTransport(pause=0.001)
        async with AsyncClient(transports=[transport]) as client:
            transport.breaks_after = (0, EngineFailure("broken"))
            with pytest.raises(EngineFailure):
                await client.completions.create(LM, ["a", "b"], max_tokens=40)
            transport.breaks_after = (2, EngineFailure("broken"))
            stream = await stream_of(client, ["a", "b"])
            with pytest.raises(EngineFailure):
                async for _ in stream:
                    pass
            assert not transport.running

    run(fail())


@pytest.mark.parametrize("error", [Unavailable("gone"), Draining("ends"), QueueFull("full")])
def test_what_has_not_begun_is_asked_again_and_elsewhere(error: TritonLMError) -> None:
    async def ask() -> None:
        first, second = FakeTransport("fake:1"), FakeTransport("fake:2")
        first.trouble = [error]
        async with AsyncClient(transports=[first, second]) as client:
            for _ in range(4):
                await client.completions.create(LM, "a", max_tokens=2)
        assert not first.trouble
        assert len(first.calls) + len(second.calls) == 5

    run(ask())


def test_a_triton_that_does_not_answer_is_left_alone_for_a_while() -> None:
    async def ask() -> None:
        first, second = FakeTransport("fake:1"), FakeTransport("fake:2")
        first.trouble = [Unavailable("gone")]
        async with AsyncClient(transports=[first, second]) as client:
            for _ in range(6):
                await client.completions.create(LM, "a", max_tokens=2)
        assert len(first.calls) == 1
        assert len(second.calls) == 6

    run(ask())


def test_tries_are_bounded_and_other_errors_are_not_tried_again() -> None:
    async def ask(trouble: list[TritonLMError]) -> int:
        transport = FakeTransport()
        transport.trouble = trouble
        async with AsyncClient(transports=[transport], max_retries=2) as client:
            with pytest.raises(type(trouble[0])):
                await client.completions.create(LM, "a", max_tokens=2)
        return len(transport.calls)

    assert run(ask([Unavailable("gone")] * 5)) == 3
    assert run(ask([EngineFailure("broken")] * 5)) == 1
    assert run(ask([InvalidRequest("bad", "stop")] * 5)) == 1


def test_triton_names_are_told_as_the_callers() -> None:
    async def ask() -> None:
        transport = FakeTransport()
        transport.trouble = [InvalidRequest("input_ids holds the token id 9", "input_ids")]
        async with AsyncClient(transports=[transport]) as client:
            await client.completions.create(LM, [9])

    with pytest.raises(InvalidRequest, match=r"^prompt holds") as error:
        run(ask())
    assert error.value.param == "prompt"


def test_models_and_health_tell_what_is_there() -> None:
    async def ask() -> None:
        transport = FakeTransport()
        async with AsyncClient(transports=[transport]) as client:
            assert (await client.models.list()).data[0].max_model_len == 512
            assert (await client.models.unload(LM)).state == "unavailable"
            assert not (await client.health()).ready
            assert (await client.models.load(LM)).state == "ready"
            assert (await client.health()).models == [LM]
            with pytest.raises(ModelNotFound):
                await client.models.retrieve("nope")
            assert await client.detokenize(LM, await client.tokenize(LM, "héllo")) == "héllo"

    run(ask())


def test_a_triton_that_is_down_does_not_hide_what_the_others_serve() -> None:
    async def ask() -> None:
        up, down = FakeTransport("up:1"), FakeTransport("down:1")
        down.down = True
        async with AsyncClient(transports=[down, up]) as client:
            assert [model.id for model in (await client.models.list()).data] == [LM]
            assert (await client.models.retrieve(LM)).state == "ready"
            up.down = True
            with pytest.raises(Unavailable):
                await client.models.list()

    run(ask())


def test_a_stream_that_is_dropped_ends_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    async def drop() -> None:
        transport = FakeTransport(pause=0.001)
        async with AsyncClient(transports=[transport]) as client:
            stream = await stream_of(client, n=3)
            await stream.__anext__()
            del stream
            gc.collect()
            while transport.running:
                await asyncio.sleep(0.001)
            gc.collect()

    run(drop())
    assert caplog.records == []


CALLS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda client: client.completions.create(LM, ["a", "b"], n=2, seed=1, logprobs=1),
    "stream": lambda client: client.completions.create(LM, "a", seed=1, stream=True, max_tokens=30),
    "chat": lambda client: client.chat.completions.create(LM, [{"role": "user", "content": "x"}], seed=1),
    "chat stream": lambda client: client.chat.completions.create(
        LM, [{"role": "user", "content": "x"}], seed=1, stream=True
    ),
    "generate": lambda client: client.generate(LM, "a", seed=1, max_tokens=20),
    "models": lambda client: client.models.list(),
    "retrieve": lambda client: client.models.retrieve(LM),
    "status": lambda client: client.status(LM),
    "health": lambda client: client.health(),
    "embeddings": lambda client: client.embeddings.create(LM, ["a", "b c"]),
    "tokenize": lambda client: client.tokenize(LM, "abc"),
    "refusal": lambda client: client.completions.create(LM, "a", top_p=2),
    "unknown": lambda client: client.models.retrieve("nope"),
}


def comparable(found: Any) -> Any:
    """Without ids and times."""
    if isinstance(found, list):
        return [comparable(item) for item in found]
    return found.model_copy(update={"id": "", "created": 0}) if hasattr(found, "choices") else found


@pytest.mark.parametrize("name", CALLS)
def test_the_twins_do_the_same(name: str) -> None:
    async def asynchronous() -> Any:
        async with AsyncClient(transports=[FakeTransport()]) as client:
            try:
                found = await CALLS[name](client)
            except TritonLMError as error:
                return type(error), error.message
            return [item async for item in found] if isinstance(found, AsyncStream) else found

    def blocking() -> Any:
        with Client(transports=[FakeTransport()]) as client:
            try:
                found = CALLS[name](client)
            except TritonLMError as error:
                return type(error), error.message
            return list(found) if isinstance(found, Stream) else found

    assert comparable(blocking()) == comparable(run(asynchronous()))


def test_the_twins_offer_the_same() -> None:
    def offered(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert offered(Client) == offered(AsyncClient)


def test_a_blocking_stream_that_is_left_cancels() -> None:
    transport = FakeTransport(pause=0.001)
    with Client(transports=[transport]) as client:
        with client.completions.create(LM, "a", stream=True, max_tokens=40) as stream:  # type: ignore[union-attr]
            next(stream)
        assert not transport.running
        assert len(transport.cancelled) == 1


def test_importing_the_contract_imports_nothing_else_and_the_client_no_torch() -> None:
    code = (
        "import sys, tritonlm.contract; assert not {'pydantic', 'grpc', 'tritonlm.client'} & set(sys.modules);"
        "from tritonlm import Client, AsyncClient; import tritonlm.transport.grpc_transport;"
        "assert not {'torch', 'transformers', 'fastapi', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
