"""Completions and chats with a fake transport: OpenAI's semantics, errors that name the argument, streams."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from fakes.fake_transport import LM, FakeTransport
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonlm import AsyncClient
from tritonlm.client.stream import AsyncStream
from tritonlm.client.types import ChatCompletion, Completion
from tritonlm.contract import InvalidRequest, ModelNotFound, NotOffered

T = TypeVar("T")
CHAT = [{"role": "user", "content": "tell me"}]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 20))


async def complete(prompt: Any = "Once upon", **arguments: Any) -> Completion:
    async with AsyncClient(transports=[FakeTransport()]) as client:
        completion = await client.completions.create(LM, prompt, **arguments)
        assert isinstance(completion, Completion)
        return completion


async def streamed(prompt: Any = "Once upon", **arguments: Any) -> list[Completion]:
    async with AsyncClient(transports=[FakeTransport()]) as client:
        stream = await client.completions.create(LM, prompt, stream=True, **arguments)
        assert isinstance(stream, AsyncStream)
        return [chunk async for chunk in stream]


def test_a_completion_has_openais_fields() -> None:
    completion = run(complete(seed=3, max_tokens=5))
    assert completion.id.startswith("cmpl-")
    assert completion.to_dict()["object"] == "text_completion"
    assert [choice.finish_reason for choice in completion.choices] == ["length"]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens) == (
        2,
        5,
        7,
    )
    assert completion.choices[0].seed == 3


@pytest.mark.parametrize("prompt", ["a b", ["a b", "c"], [65, 66], [[65], [66, 67]]])
def test_every_kind_of_prompt_is_accepted(prompt: Any) -> None:
    completion = run(complete(prompt, n=2, max_tokens=3))
    prompts = 2 if isinstance(prompt[0], (list, str)) and isinstance(prompt, list) else 1
    assert [choice.index for choice in completion.choices] == list(range(2 * prompts))
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 3 * 2 * prompts


def test_choices_share_the_seed_and_differ_by_their_number() -> None:
    completion = run(complete(n=3, max_tokens=12))
    assert len({choice.text for choice in completion.choices}) == 3
    assert len({choice.seed for choice in completion.choices}) == 1
    again = run(complete(n=3, max_tokens=12, seed=completion.choices[0].seed))
    assert [choice.text for choice in again.choices] == [choice.text for choice in completion.choices]


def test_equal_prompts_get_different_answers_unless_a_seed_is_given() -> None:
    first, second = run(complete(["same", "same"], max_tokens=12)).choices
    assert first.text != second.text
    first, second = run(complete(["same", "same"], max_tokens=12, seed=1)).choices
    assert first.text == second.text


def test_best_of_with_echo_ranks_by_generated_tokens_only() -> None:
    plain = run(complete(n=1, best_of=5, seed=5, max_tokens=6)).choices[0].text
    echoed = run(complete("Once upon", n=1, best_of=5, seed=5, max_tokens=6, echo=True)).choices[0].text
    assert echoed == "Once upon" + plain


def test_usage_counts_a_prompt_once() -> None:
    completion = run(complete("one two three", n=4, max_tokens=2))
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 8)


def test_best_of_returns_the_likeliest_choices_without_logprobs() -> None:
    def mean(choice: Any) -> float:
        values = choice.logprobs.token_logprobs
        return float(sum(values) / len(values))

    every = run(complete(n=6, seed=5, logprobs=0, max_tokens=6)).choices
    best = run(complete(n=2, best_of=6, seed=5, max_tokens=6)).choices
    assert [choice.text for choice in best] == [c.text for c in sorted(every, key=mean, reverse=True)[:2]]
    assert [choice.index for choice in best] == [0, 1]
    assert [choice.logprobs for choice in best] == [None, None]


def test_logprobs_hold_the_token_itself_and_its_alternatives() -> None:
    choice = run(complete(logprobs=2, max_tokens=4, echo=True)).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert "".join(logprobs.tokens) == choice.text
    for token, own, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[1:]:
        assert top is not None
        assert top[token] == own
        assert len(top) == 3
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty list": ({"prompt": []}, "prompt"),
    "mixed list": ({"prompt": ["a", 1]}, "prompt"),
    "a list within": ({"prompt": [[1], []]}, "prompt"),
    "true is no id": ({"prompt": [True]}, "prompt"),
    "a negative id": ({"prompt": [-1]}, "prompt"),
    "no prompt": ({"prompt": None}, "prompt"),
    "too many choices": ({"n": 129}, "n"),
    "no choice": ({"n": 0}, "n"),
    "n as text": ({"n": "2"}, "n"),
    "prompts times choices": ({"prompt": ["a"] * 65, "n": 2}, "n"),
    "fewer best than n": ({"n": 3, "best_of": 2}, "best_of"),
    "streamed best": ({"best_of": 2, "stream": True}, "best_of"),
    "suffix": ({"suffix": "end"}, "suffix"),
    "options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "unknown option": ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    "obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    "option of a wrong type": (
        {"stream": True, "stream_options": {"include_usage": 1.5}},
        "stream_options.include_usage",
    ),
    "unknown parameter": ({"heat": 1}, "heat"),
    "out of range": ({"temperature": 3}, "temperature"),
    "reserved parameter": ({"choice": 1}, "choice"),
    "timeout": ({"timeout": 0}, "timeout"),
    "user": ({"user": 7}, "user"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name_before_a_request_is_sent(case: str) -> None:
    arguments, param = BAD[case]
    transport = FakeTransport()

    async def ask() -> None:
        async with AsyncClient(transports=[transport]) as client:
            await client.completions.create(LM, **{"prompt": "a", **arguments})

    with pytest.raises(InvalidRequest) as error:
        run(ask())
    assert error.value.param == param
    assert not transport.calls


def test_none_means_not_sent() -> None:
    unsent = dict.fromkeys(
        ("n", "best_of", "suffix", "stop", "logprobs", "temperature", "stream", "stream_options", "user")
    )
    assert run(complete(seed=1, **unsent)).choices == run(complete(seed=1)).choices


def test_an_unknown_model_raises_model_not_found() -> None:
    async def ask() -> None:
        async with AsyncClient(transports=[FakeTransport()]) as client:
            await client.completions.create("nope", "a")

    with pytest.raises(ModelNotFound):
        run(ask())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=12), min_size=1, max_size=3),
    st.integers(1, 3),
    st.lists(st.sampled_from([" fox", "a", "ï", "👍"]), max_size=2),
    st.one_of(st.none(), st.integers(0, 2)),
    st.booleans(),
    st.integers(1, 12),
)
def test_a_stream_has_the_same_content_as_a_complete_result(
    prompts: list[str], n: int, stops: list[str], logprobs: int | None, echo: bool, max_tokens: int
) -> None:
    arguments = {"n": n, "stop": stops or None, "logprobs": logprobs, "echo": echo, "max_tokens": max_tokens, "seed": 4}
    complete_result = run(complete(prompts, **arguments))
    chunks = run(streamed(prompts, **arguments, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage == complete_result.usage
    for choice in complete_result.choices:
        parts = [piece.choices[0] for piece in pieces if piece.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        if choice.logprobs is not None:
            entries = [part.logprobs for part in parts if part.logprobs is not None]
            assert [offset for entry in entries for offset in entry.text_offset] == choice.logprobs.text_offset
            assert [token for entry in entries for token in entry.tokens] == choice.logprobs.tokens
    assert all(piece.usage is None for piece in pieces)


def test_a_chat_has_openais_fields_streamed_and_complete() -> None:
    async def both() -> tuple[ChatCompletion, list[Any]]:
        async with AsyncClient(transports=[FakeTransport()]) as client:
            arguments: dict[str, Any] = {"seed": 2, "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 1}
            complete_result = await client.chat.completions.create(LM, CHAT, **arguments)
            stream = await client.chat.completions.create(LM, CHAT, **arguments, stream=True)
            assert isinstance(complete_result, ChatCompletion)
            assert isinstance(stream, AsyncStream)
            return complete_result, [chunk async for chunk in stream]

    complete_result, chunks = run(both())
    assert complete_result.id.startswith("chatcmpl-")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == complete_result.choices[0].message.content
    logprobs = complete_result.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.content) == 6
    assert len(logprobs.content[0].top_logprobs) == 1


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": "hello"}, "messages"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logprobs": 5}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"), ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{}]}, "tools[0]"), ({"tools": {}}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ],
)  # fmt: skip
def test_bad_chats_are_refused_by_name(arguments: dict[str, Any], param: str) -> None:
    async def ask() -> None:
        async with AsyncClient(transports=[FakeTransport()]) as client:
            await client.chat.completions.create(LM, **{"messages": CHAT, **arguments})

    with pytest.raises(InvalidRequest) as error:
        run(ask())
    assert error.value.param == param


def test_a_chat_without_a_template_is_not_offered() -> None:
    async def ask() -> None:
        transport = FakeTransport()
        transport.has_chats = False
        async with AsyncClient(transports=[transport]) as client:
            await client.chat.completions.create(LM, CHAT)

    with pytest.raises(NotOffered):
        run(ask())


def test_a_lost_chunk_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, lost = run(streamed("a b c", seed=1, max_tokens=40)), []
    original = FakeTransport.generate

    async def lossy(self: FakeTransport, call: Any) -> Any:
        async for piece in original(self, call):
            if piece.index != 1 or lost:
                yield piece
            else:
                lost.append(piece)

    monkeypatch.setattr(FakeTransport, "generate", lossy)
    received = run(streamed("a b c", seed=1, max_tokens=40))
    assert lost
    assert [chunk.choices[0].text for chunk in received] == [chunk.choices[0].text for chunk in expected]


NUMBER = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "sent", "shown"),
    [
        ("response_format", NUMBER, {"json": {"not": {}}}, "response_format.json_schema.schema"),
        ("guided_choice", ["a", "b"], {"choice": ["a", "b"]}, "guided_choice"),
        ("structured_outputs", {"regex": "a"}, {"regex": "a"}, "structured_outputs.regex"),
    ],
)
def test_a_constraint_is_sent_under_one_name_and_refused_under_the_callers(
    chat: bool, stream: bool, name: str, value: Any, sent: Any, shown: str
) -> None:
    async def refused() -> InvalidRequest:
        transport = FakeTransport()
        kind = next(iter(sent))
        error = InvalidRequest(f"structured_outputs.{kind}: it is wrong", f"structured_outputs.{kind}")
        transport.trouble = [error]
        async with AsyncClient(transports=[transport]) as client:
            calls: Any = client.chat.completions if chat else client.completions
            with pytest.raises(InvalidRequest) as refusal:
                await calls.create(LM, CHAT if chat else "Once", stream=stream, **{name: value})
            assert [call.parameters["structured_outputs"] for call in transport.calls] == [sent]
            return refusal.value

    error = run(refused())
    assert (error.message, error.param) == (f"{shown}: it is wrong", shown)
