"""The client library with a real Triton: sync and async, cancellation, concurrent mixed calls."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tritonlm import AsyncClient, Client
from tritonlm.client.stream import AsyncStream
from tritonlm.client.sync import Stream
from tritonlm.client.types import ChatCompletion, Completion
from tritonlm.contract import ContextLengthExceeded, InvalidRequest, ModelNotFound, NotOffered, TimedOut, Unavailable

from .servers import LM, Server, copy_repository, running, wait_until

pytestmark = pytest.mark.triton


def as_completion(response: object) -> Completion:
    assert isinstance(response, Completion)
    return response


def as_chat(response: object) -> ChatCompletion:
    assert isinstance(response, ChatCompletion)
    return response


def test_completions_whole_and_streamed(server: Server) -> None:
    with Client(server.grpc) as client:
        options: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 30, "logprobs": 1, "return_token_ids": True}
        completion = as_completion(client.completions.create(LM, ["Once upon", "Two"], **options))
        stream = client.completions.create(LM, ["Once upon", "Two"], **options, stream=True)
        assert isinstance(stream, Stream)
        chunks = list(stream)
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
        for choice in completion.choices:
            parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            assert [token for part in parts for token in part.token_ids or []] == choice.token_ids
            assert choice.logprobs is not None
            assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(choice.token_ids or [])


def test_echo_scores_the_prompt(server: Server) -> None:
    with Client(server.grpc) as client:
        completion = as_completion(client.completions.create(LM, "Once upon a", max_tokens=0, echo=True, logprobs=0))
        choice = completion.choices[0]
        assert choice.text == "Once upon a"
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.tokens) == len(client.tokenize(LM, "Once upon a"))


def test_tokenize_and_detokenize_are_inverse(server: Server) -> None:
    with Client(server.grpc) as client:
        for text in ("Once upon a time", "naïve 猫 👍🏽\n", " "):
            assert client.detokenize(LM, client.tokenize(LM, text)) == text


@pytest.mark.parametrize(
    ("arguments", "error", "param"),
    [
        ({"model": "nope", "prompt": "a"}, ModelNotFound, "model"),
        ({"prompt": [99999]}, InvalidRequest, "prompt"),
        ({"prompt": "a", "max_tokens": 600}, ContextLengthExceeded, "prompt"),
        ({"prompt": "a", "stop_token_ids": [99999]}, InvalidRequest, "stop_token_ids"),
        ({"prompt": "a", "max_tokens": 400, "ignore_eos": True, "timeout": 0.05}, TimedOut, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_error_has_its_class(
    server: Server, arguments: dict[str, Any], error: type[Exception], param: str | None, stream: bool
) -> None:
    def send(client: Client) -> None:
        list(client.completions.create(**{"model": LM, **arguments}, stream=stream))

    with Client(server.grpc) as client, pytest.raises(error) as error_info:
        send(client)
    assert getattr(error_info.value, "param", None) == param


def test_chats_use_the_template(small_server: Server, server: Server) -> None:
    chat = [{"role": "user", "content": "Once"}]
    with Client(small_server.grpc) as client:
        reply = client.chat.completions.create(LM, chat, max_tokens=5, temperature=0)
        same = as_completion(client.completions.create(LM, "user: Once\nassistant:", max_tokens=5, temperature=0))
        assert reply.choices[0].message.content == same.choices[0].text  # type: ignore[union-attr]
    with Client(server.grpc) as client, pytest.raises(NotOffered):
        client.chat.completions.create(LM, chat)


def test_a_tiny_model_calls_tools(small_server: Server) -> None:
    """Random weights and a template without tools: the grammar alone makes the calls valid."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rome"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "sun", "parameters": schema}}]
    chat = [{"role": "user", "content": "Sun?"}]
    options: dict[str, Any] = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "seed": 5}
    with Client(small_server.grpc) as client:
        prompt = client.chat.completions.apply_template(LM, chat, tools=tools)
        assert prompt.startswith("system: You may call functions")
        assert prompt.endswith("user: Sun?\nassistant:")
        (choice,) = as_chat(client.chat.completions.create(LM, chat, **options)).choices
        assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
        (call,) = choice.message.tool_calls or []
        assert call.function.name == "sun"
        assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
        stream = client.chat.completions.create(LM, chat, **options, stream=True)
        assert isinstance(stream, Stream)
        deltas = [part for chunk in stream for part in chunk.choices[0].delta.tool_calls or ()]
        assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
        results = [
            {"role": "assistant", "tool_calls": [call.to_dict()]},
            {"role": "tool", "tool_call_id": call.id, "content": "9"},
        ]
        answer = as_chat(client.chat.completions.create(LM, [*chat, *results], max_tokens=3)).choices[0]
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_call_frees_its_slots(small_server: Server, stream: bool) -> None:
    async def start_and_cancel() -> None:
        async with AsyncClient(small_server.grpc) as client:
            options: dict[str, Any] = {"n": 4, "max_tokens": 480, "ignore_eos": True, "stream": stream}
            task = asyncio.create_task(client.completions.create(LM, "Once", **options))
            while (await client.status(LM))["running"] < 4:
                assert stream or not task.done()
                await asyncio.sleep(0.005)
            if stream:
                completion = await task
                assert isinstance(completion, AsyncStream)
                await completion.close()
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    before = small_server.status()["cancelled"]
    asyncio.run(asyncio.wait_for(start_and_cancel(), 60))
    wait_until(small_server.holds_nothing, "slots and blocks are free")
    assert small_server.status()["cancelled"] - before == 4


def test_a_cancelled_call_leaves_the_queue(small_server: Server) -> None:
    async def start_and_cancel() -> None:
        async with AsyncClient(small_server.grpc) as client:
            options: dict[str, Any] = {"max_tokens": 480, "ignore_eos": True}
            running = [asyncio.create_task(client.completions.create(LM, "Once", **options)) for _ in range(5)]
            while (await client.status(LM))["waiting"] < 1:
                await asyncio.sleep(0.005)
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    asyncio.run(asyncio.wait_for(start_and_cancel(), 60))
    wait_until(small_server.holds_nothing, "slots, queue and blocks are free")


def test_64_concurrent_mixed_calls_equal_sequential_ones(server: Server) -> None:
    argument_sets: list[dict[str, Any]] = [
        {"prompt": f"{number} birds", "max_tokens": 5 + number, "seed": number, "temperature": number % 2}
        for number in range(16)
    ]

    async def run_all() -> list[Completion]:
        async with AsyncClient(server.grpc) as client:
            calls = [client.completions.create(LM, **arguments) for arguments in argument_sets * 4]
            return [as_completion(completion) for completion in await asyncio.gather(*calls)]

    with Client(server.grpc) as client:
        completions = [as_completion(client.completions.create(LM, **arguments)) for arguments in argument_sets]
    alone = [completion.choices[0].text for completion in completions]
    concurrent = [completion.choices[0].text for completion in asyncio.run(asyncio.wait_for(run_all(), 60))]
    assert concurrent == alone * 4


def test_embeddings_must_be_enabled(server: Server, tmp_path: Path) -> None:
    with Client(server.grpc) as client, pytest.raises(NotOffered, match="TRITONLM_ENABLE_EMBEDDINGS"):
        client.embeddings.create(LM, "a")
    with running(copy_repository(tmp_path), enable_embeddings=True) as enabled, Client(enabled.grpc) as client:
        completion = client.embeddings.create(LM, ["Once upon", "Once upon", "Two"])
        first, same, other = (item.embedding for item in completion.data)
        assert first == same != other
        assert isinstance(first, list)
        assert len(first) == 64
        assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
        with pytest.raises(InvalidRequest) as error_info:
            client.embeddings.create(LM, [99999])
        assert error_info.value.param == "input"
        assert enabled.holds_nothing()


def test_models_are_listed_with_their_engines_status(server: Server) -> None:
    with Client(server.grpc) as client:
        (model,) = client.models.list().data
        assert (model.id, model.state, model.max_model_len, model.device) == (LM, "ready", 512, "cpu")
        health = client.health()
        assert (health.live, health.ready, health.models) == (True, True, [LM])


def test_an_unreachable_triton_is_an_error() -> None:
    with Client("127.0.0.1:9", max_retries=0) as client:
        assert not client.health().live
        with pytest.raises(Unavailable, match=r"no Triton answers at 127\.0\.0\.1:9"):
            client.completions.create(LM, "a")


def test_an_unloaded_model_is_an_error_until_it_is_loaded(small_server: Server) -> None:
    with Client(small_server.grpc, max_retries=0) as client:
        assert client.models.unload(LM).state == "unavailable"
        with pytest.raises((Unavailable, ModelNotFound)):
            client.completions.create(LM, "a")
        assert client.models.load(LM).state == "ready"
        assert as_completion(client.completions.create(LM, "a", max_tokens=2)).usage is not None
