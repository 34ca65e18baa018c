"""OpenAI's Python SDK against the gateway: its requests are accepted, and its types can parse the responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fakes.fake_transport import LM

from .conftest import Gateway


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_completions_complete_and_streamed(sdk: openai.OpenAI) -> None:
    complete = sdk.completions.create(model=LM, prompt="Once upon", max_tokens=9, seed=1, n=2, logprobs=1)
    stream = sdk.completions.create(
        model=LM, prompt="Once upon", max_tokens=9, seed=1, n=2, logprobs=1, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == complete.usage
    for choice in complete.choices:
        parts = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason == "length"
    assert complete.choices[0].logprobs is not None
    assert complete.id.startswith("cmpl-")
    assert complete._request_id


def test_chats_complete_and_streamed(sdk: openai.OpenAI) -> None:
    chat = [{"role": "user", "content": "hello"}]
    complete = sdk.chat.completions.create(model=LM, messages=chat, seed=2, logprobs=True, top_logprobs=2)  # type: ignore[call-overload]
    stream = sdk.chat.completions.create(model=LM, messages=chat, seed=2, stream=True)  # type: ignore[call-overload]
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content for delta in deltas) == complete.choices[0].message.content
    assert len(complete.choices[0].logprobs.content[0].top_logprobs) == 2


def test_extensions_are_sent_as_extra_body(sdk: openai.OpenAI) -> None:
    completion = sdk.completions.create(
        model=LM, prompt="a", extra_body={"top_k": 5, "min_p": 0.1, "return_token_ids": True, "ignore_eos": True}
    )
    assert len(completion.choices[0].token_ids) == 16  # type: ignore[attr-defined]


def test_the_stop_string_that_ended_a_text_is_named(sdk: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": LM, "prompt": "a", "max_tokens": 60, "seed": 1, "stop": ["never", "."]}
    assert sdk.completions.create(**arguments).choices[0].stop_reason == "."
    assert list(sdk.completions.create(**arguments, stream=True))[-1].choices[0].stop_reason == "."


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [LM]
    assert sdk.models.retrieve(LM).owned_by == "tritonlm"


def test_embeddings_in_both_encodings(sdk: openai.OpenAI) -> None:
    embeddings = sdk.embeddings.create(model=LM, input=["a b", "abc"])
    assert [item.embedding for item in embeddings.data] == [[3.0, 0.5], [3.0, 0.5]]
    assert embeddings.usage.prompt_tokens == 3
    numbers = sdk.embeddings.create(model=LM, input="abcd", encoding_format="float")
    assert numbers.data[0].embedding == [4.0, 0.5]
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.embeddings.create(model=LM, input="a", dimensions=8)
    assert refused.value.param == "dimensions"


def test_errors_have_the_sdks_classes(gateway: Gateway, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.completions.create(model=LM, prompt="a", temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.completions.create(model="nope", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("a/b")
    gateway.transport.has_embeddings = False
    with pytest.raises(openai.InternalServerError) as refused:
        sdk.embeddings.create(model=LM, input="a")
    assert refused.value.status_code == 501
    assert refused.value.request_id
    with pytest.raises(openai.BadRequestError):
        sdk.completions.create(model=LM, prompt="a", temperature=3, stream=True)
