"""The client library against a real Triton: both twins, cancels seen in the engine's counters, a mixed crowd."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tritonlm import AsyncClient, Client
from tritonlm.client.stream import AsyncStream
from tritonlm.client.sync import Stream
from tritonlm.client.types import Completion
from tritonlm.contract import ContextLengthExceeded, InvalidRequest, ModelNotFound, NotOffered, TimedOut, Unavailable

from .servers import LM, Server, copy_repository, running, wait_until

pytestmark = pytest.mark.triton


def whole(found: object) -> Completion:
    assert isinstance(found, Completion)
    return found


def test_completions_whole_and_streamed(server: Server) -> None:
    with Client(server.grpc) as client:
        wanted: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 30, "logprobs": 1, "return_token_ids": True}
        found = whole(client.completions.create(LM, ["Once upon", "Two"], **wanted))
        stream = client.completions.create(LM, ["Once upon", "Two"], **wanted, stream=True)
        assert isinstance(stream, Stream)
        chunks = list(stream)
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        for choice in found.choices:
            parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            assert [token for part in parts for token in part.token_ids or []] == choice.token_ids
            assert choice.logprobs is not None
            assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(choice.token_ids or [])


def test_echo_scores_the_prompt(server: Server) -> None:
    with Client(server.grpc) as client:
        found = whole(client.completions.create(LM, "Once upon a", max_tokens=0, echo=True, logprobs=0)).choices[0]
        assert found.text == "Once upon a"
        assert found.logprobs is not None
        assert found.logprobs.token_logprobs[0] is None
        assert len(found.logprobs.tokens) == len(client.tokenize(LM, "Once upon a"))


def test_text_and_ids_turn_into_each_other(server: Server) -> None:
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
def test_errors_have_their_class(
    server: Server, arguments: dict[str, Any], error: type[Exception], param: str | None, stream: bool
) -> None:
    def ask(client: Client) -> None:
        list(client.completions.create(**{"model": LM, **arguments}, stream=stream))

    with Client(server.grpc) as client, pytest.raises(error) as caught:
        ask(client)
    assert getattr(caught.value, "param", None) == param


def test_chats_go_through_the_template(small_server: Server, server: Server) -> None:
    chat = [{"role": "user", "content": "Once"}]
    with Client(small_server.grpc) as client:
        answered = client.chat.completions.create(LM, chat, max_tokens=5, temperature=0)
        same = whole(client.completions.create(LM, "user: Once\nassistant:", max_tokens=5, temperature=0))
        assert answered.choices[0].message.content == same.choices[0].text  # type: ignore[union-attr]
    with Client(server.grpc) as client, pytest.raises(NotOffered):
        client.chat.completions.create(LM, chat)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_engines_places(small_server: Server, stream: bool) -> None:
    async def leave() -> None:
        async with AsyncClient(small_server.grpc) as client:
            wanted: dict[str, Any] = {"n": 4, "max_tokens": 480, "ignore_eos": True, "stream": stream}
            task = asyncio.create_task(client.completions.create(LM, "Once", **wanted))
            while (await client.status(LM))["running"] < 4:
                assert stream or not task.done()
                await asyncio.sleep(0.005)
            if stream:
                found = await task
                assert isinstance(found, AsyncStream)
                await found.close()
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    before = small_server.status()["cancelled"]
    asyncio.run(asyncio.wait_for(leave(), 60))
    wait_until(small_server.holds_nothing, "places and blocks are free")
    assert small_server.status()["cancelled"] - before == 4


def test_a_queued_request_is_cancelled_when_its_caller_leaves(small_server: Server) -> None:
    async def leave() -> None:
        async with AsyncClient(small_server.grpc) as client:
            wanted: dict[str, Any] = {"max_tokens": 480, "ignore_eos": True}
            running = [asyncio.create_task(client.completions.create(LM, "Once", **wanted)) for _ in range(5)]
            while (await client.status(LM))["waiting"] < 1:
                await asyncio.sleep(0.005)
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    asyncio.run(asyncio.wait_for(leave(), 60))
    wait_until(small_server.holds_nothing, "places, queue and blocks are free")


def test_64_mixed_calls_at_once_get_what_they_get_alone(server: Server) -> None:
    wanted: list[dict[str, Any]] = [
        {"prompt": f"{number} birds", "max_tokens": 5 + number, "seed": number, "temperature": number % 2}
        for number in range(16)
    ]

    async def crowd() -> list[Completion]:
        async with AsyncClient(server.grpc) as client:
            calls = [client.completions.create(LM, **arguments) for arguments in wanted * 4]
            return [whole(found) for found in await asyncio.gather(*calls)]

    with Client(server.grpc) as client:
        alone = [whole(client.completions.create(LM, **arguments)).choices[0].text for arguments in wanted]
    together = [found.choices[0].text for found in asyncio.run(asyncio.wait_for(crowd(), 60))]
    assert together == alone * 4


def test_embeddings_are_off_until_they_are_switched_on(server: Server, tmp_path: Path) -> None:
    with Client(server.grpc) as client, pytest.raises(NotOffered, match="TRITONLM_ENABLE_EMBEDDINGS"):
        client.embeddings.create(LM, "a")
    with running(copy_repository(tmp_path), enable_embeddings=True) as switched_on, Client(switched_on.grpc) as client:
        found = client.embeddings.create(LM, ["Once upon", "Once upon", "Two"])
        first, same, other = (item.embedding for item in found.data)
        assert first == same != other
        assert isinstance(first, list)
        assert len(first) == 64
        assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
        with pytest.raises(InvalidRequest) as refused:
            client.embeddings.create(LM, [99999])
        assert refused.value.param == "input"
        assert switched_on.holds_nothing()


def test_models_are_listed_with_what_their_engines_tell(server: Server) -> None:
    with Client(server.grpc) as client:
        (model,) = client.models.list().data
        assert (model.id, model.state, model.max_model_len, model.device) == (LM, "ready", 512, "cpu")
        health = client.health()
        assert (health.live, health.ready, health.models) == (True, True, [LM])


def test_where_no_triton_is_that_is_told() -> None:
    with Client("127.0.0.1:9", max_retries=0) as client:
        assert not client.health().live
        with pytest.raises(Unavailable, match=r"no Triton answers at 127\.0\.0\.1:9"):
            client.completions.create(LM, "a")


def test_an_unloaded_model_is_told_and_loads_again(small_server: Server) -> None:
    with Client(small_server.grpc, max_retries=0) as client:
        assert client.models.unload(LM).state == "unavailable"
        with pytest.raises((Unavailable, ModelNotFound)):
            client.completions.create(LM, "a")
        assert client.models.load(LM).state == "ready"
        assert whole(client.completions.create(LM, "a", max_tokens=2)).usage is not None
