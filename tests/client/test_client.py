"""The client's calls: leaving early cancels, errors are retried if that is safe, and both clients behave the same."""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm import AsyncClient, Client
from tritonlm.client.stream import AsyncStream, MergedSources
from tritonlm.client.sync import Stream
from tritonlm.client.types import Completion, Piece
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


def piece(index: int, text: str) -> Piece:
    return Piece(index, text, "", 1, index + 1, 0, 0, [], None)


async def stream_of(client: AsyncClient, prompt: Any = "a b c", **arguments: Any) -> AsyncStream[Completion]:
    stream = await client.completions.create(LM, prompt, stream=True, max_tokens=40, seed=1, **arguments)
    assert isinstance(stream, AsyncStream)
    return stream


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_cancels_all_of_its_sequences(n: int) -> None:
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


@pytest.mark.parametrize(("pause", "start_seconds"), [(0.01, 0.05), (0.0, 1000.0)])
def test_a_stream_starts_while_one_of_its_choices_waits_for_a_slot(
    pause: float, start_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while, and when its buffer is full."""
    monkeypatch.setattr("tritonlm.client.stream._START_SECONDS", start_seconds)

    async def start() -> None:
        slot = asyncio.Event()

        async def endless() -> AsyncGenerator[Piece, None]:
            for index in itertools.count():
                yield piece(index, "a")
                await asyncio.sleep(pause)

        async def waiting() -> AsyncGenerator[Piece, None]:
            await slot.wait()
            yield piece(0, "b")

        merged = MergedSources([endless(), waiting()])
        await merged.start()
        assert await merged.next() == (0, piece(0, "a"))
        slot.set()
        while (item := await merged.next()) is not None and item[0] == 0:
            pass
        assert item == (1, piece(0, "b"))
        await merged.close()

    run(start())


@pytest.mark.parametrize("n", [1, 2])
def test_cancelling_the_callers_task_cancels_the_request(n: int) -> None:
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


def test_a_call_can_be_cancelled_by_its_id() -> None:
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


def test_an_error_of_one_sequence_ends_the_others() -> None:
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
def test_a_call_that_has_not_started_is_retried_on_another_triton(error: TritonLMError) -> None:
    async def ask() -> None:
        first, second = FakeTransport("fake:1"), FakeTransport("fake:2")
        first.trouble = [error]
        async with AsyncClient(transports=[first, second]) as client:
            for _ in range(4):
                await client.completions.create(LM, "a", max_tokens=2)
        assert not first.trouble
        assert len(first.calls) + len(second.calls) == 5

    run(ask())


def test_a_triton_that_does_not_answer_is_avoided_for_a_while() -> None:
    async def ask() -> None:
        first, second = FakeTransport("fake:1"), FakeTransport("fake:2")
        first.trouble = [Unavailable("gone")]
        async with AsyncClient(transports=[first, second]) as client:
            for _ in range(6):
                await client.completions.create(LM, "a", max_tokens=2)
        assert len(first.calls) == 1
        assert len(second.calls) == 6

    run(ask())


def test_a_triton_that_has_not_loaded_a_model_is_not_avoided() -> None:
    async def ask() -> None:
        transports = [FakeTransport("a:1"), FakeTransport("b:1")]
        transports[0].loaded = False
        async with AsyncClient(transports=transports) as client:
            for _ in transports:
                assert (await client.status(LM))["slots"]
            transports[0].loaded = True
            for _ in transports:
                await client.completions.create(LM, "a")
        assert [len(transport.calls) for transport in transports] == [1, 1]

    run(ask())


def test_retries_are_limited_and_other_errors_are_not_retried() -> None:
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


def test_errors_name_the_clients_argument_instead_of_tritons_input() -> None:
    async def ask() -> None:
        transport = FakeTransport()
        transport.trouble = [InvalidRequest("input_ids holds the token id 9", "input_ids")]
        async with AsyncClient(transports=[transport]) as client:
            await client.completions.create(LM, [9])

    with pytest.raises(InvalidRequest, match=r"^prompt holds") as error:
        run(ask())
    assert error.value.param == "prompt"


def test_models_and_health_report_the_loaded_models() -> None:
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


def test_a_triton_that_is_down_does_not_hide_the_models_of_the_others() -> None:
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


def test_a_dropped_stream_is_cancelled_without_log_output(caplog: pytest.LogCaptureFixture) -> None:
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
    "complete": lambda client: client.completions.create(LM, ["a", "b"], n=2, seed=1, logprobs=1),
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


def comparable(value: Any) -> Any:
    """Without ids and times."""
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value.model_copy(update={"id": "", "created": 0}) if hasattr(value, "choices") else value


@pytest.mark.parametrize("name", CALLS)
def test_both_clients_return_the_same(name: str) -> None:
    async def asynchronous() -> Any:
        async with AsyncClient(transports=[FakeTransport()]) as client:
            try:
                result = await CALLS[name](client)
            except TritonLMError as error:
                return type(error), error.message
            return [item async for item in result] if isinstance(result, AsyncStream) else result

    def blocking() -> Any:
        with Client(transports=[FakeTransport()]) as client:
            try:
                result = CALLS[name](client)
            except TritonLMError as error:
                return type(error), error.message
            return list(result) if isinstance(result, Stream) else result

    assert comparable(blocking()) == comparable(run(asynchronous()))


def test_both_clients_have_the_same_methods() -> None:
    def public_names(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public_names(Client) == public_names(AsyncClient)


def test_leaving_a_blocking_stream_cancels_it() -> None:
    transport = FakeTransport(pause=0.001)
    with Client(transports=[transport]) as client:
        with client.completions.create(LM, "a", stream=True, max_tokens=40) as stream:  # type: ignore[union-attr]
            next(stream)
        assert not transport.running
        assert len(transport.cancelled) == 1


def test_importing_the_contract_or_the_client_imports_no_heavy_libraries() -> None:
    code = (
        "import sys, tritonlm.contract; assert not {'pydantic', 'grpc', 'tritonlm.client'} & set(sys.modules);"
        "from tritonlm import Client, AsyncClient; import tritonlm.client.transport.grpc_transport;"
        "assert not {'torch', 'transformers', 'fastapi', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
