"""The Messages API with Anthropic's SDK: texts, streams, errors in Anthropic's form, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from fakes.fake_transport import CONTEXT, LM
from tritonlm.access.keys import KeyFile, Limits
from tritonlm.contract import EngineFailure

from .conftest import Gateway, running_gateway

ANSWERED = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
RESULT = {"type": "tool_result", "tool_use_id": "t"}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="unused", max_retries=0) as client:
        yield client


def sent_messages(gateway: Gateway) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = json.loads(gateway.transport.calls[-1].prompt.messages or "")
    return messages


def test_a_message(sdk: anthropic.Anthropic) -> None:
    message = sdk.messages.create(model=LM, max_tokens=7, messages=HELLO, extra_body={"temperature": 0.5, "seed": 1})
    (block,) = message.content
    assert block.type == "text"
    assert block.text
    assert (message.stop_reason, message.stop_sequence, message.role) == ("max_tokens", None, "assistant")
    assert message.usage.output_tokens == 7
    assert message.usage.input_tokens == 1
    assert message.id.startswith("msg_")
    assert message._request_id


def test_a_stop_sequence_is_named(sdk: anthropic.Anthropic) -> None:
    arguments: dict[str, Any] = {
        "model": LM, "max_tokens": 60, "messages": HELLO, "stop_sequences": ["never", "."], "extra_body": {"seed": 1},
    }  # fmt: skip
    message = sdk.messages.create(**arguments)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ".")
    with sdk.messages.stream(**arguments) as stream:
        assert "".join(stream.text_stream) == message.content[0].text  # type: ignore[union-attr]
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence, final.usage) == ("stop_sequence", ".", message.usage)


def test_a_stream_has_anthropics_events_in_order(gateway: Gateway, sdk: anthropic.Anthropic) -> None:
    events = list(sdk.messages.create(model=LM, max_tokens=12, messages=HELLO, stream=True, extra_body={"seed": 3}))
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 1
    assert kinds == [
        "message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0].message.usage.input_tokens == 1  # type: ignore[union-attr]
    with gateway.http.stream(
        "POST", "/v1/messages", json={"model": LM, "max_tokens": 2, "messages": HELLO, "stream": True}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[2:4] == ["event: ping", 'data: {"type": "ping"}']
    assert lines[-1] == 'data: {"type": "message_stop"}'


def test_blocks_become_the_messages_of_a_chat(gateway: Gateway, sdk: anthropic.Anthropic) -> None:
    cached: Any = {"cache_control": {"type": "ephemeral"}}
    sdk.messages.create(
        model=LM, max_tokens=3,
        system=[{"type": "text", "text": "Be brief.", **cached}, {"type": "text", "text": "Be kind."}],
        messages=[
            {"role": "user", "content": "One"},
            {"role": "user", "content": [{"type": "text", "text": "Two", **cached}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Three"}]},
            {"role": "user", "content": [
                {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
            ]},
        ],
    )  # fmt: skip
    assert sent_messages(gateway) == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "One\nTwo"},
        {"role": "assistant", "content": "Three"},
        {"role": "user", "content": "T\nD"},
    ]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "tool_use_id"),
        ({"messages": [*HELLO, ANSWERED]}, "messages must end with the results"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": ["any"]}}, "tool_choice.type"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": "no"}}, "disable_parallel_tool_use"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0]: unknown field 'name'"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]}, "messages[0].content[0]"),
        ({"messages": [*HELLO, ANSWERED, {"role": "user", "content": [{**RESULT, "is_error": 1}]}]}, "is_error"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"container": "c"}, "container"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"frequency_penalty": 5}, "frequency_penalty"),
        ({"nonsense": 5}, "nonsense"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_change_the_answer_is_refused_by_name(
    gateway: Gateway, sdk: anthropic.Anthropic, fields: dict[str, Any], place: str
) -> None:
    arguments = {"model": LM, "max_tokens": 3, "messages": HELLO, **fields}
    with pytest.raises(anthropic.BadRequestError) as refused:
        sdk.post("/v1/messages", body=arguments, cast_to=object)
    body: Any = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert place in body["error"]["message"]
    assert gateway.transport.calls == []


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, "high"),
        ({"thinking": {"type": "adaptive"}}, "medium"), ({"output_config": {"effort": "max"}}, "max"),
    ],
)  # fmt: skip
def test_thinking_and_the_effort_are_one_word_of_the_chat(
    gateway: Gateway, fields: dict[str, Any], effort: str
) -> None:
    answer = gateway.post("/v1/messages", model=LM, max_tokens=3, messages=HELLO, **fields)
    assert answer.status_code == 200, answer.text
    assert json.loads(gateway.transport.calls[-1].prompt.messages or "")["reasoning_effort"] == effort


def test_fields_without_an_effect_are_accepted(gateway: Gateway) -> None:
    answer = gateway.post(
        "/v1/messages", model=LM, max_tokens=3, messages=HELLO, metadata={"user_id": "u"}, service_tier="auto",
        cache_control={"type": "ephemeral"}, thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low"}, context_management={"edits": []}, speed="fast",
        tools=[{"type": "web_search_20250305", "name": "web_search"}], tool_choice={"type": "auto"},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert [warning.split()[0] for warning in answer.json()["warnings"]] == [
        "tools[0]:", "thinking", "output_config.effort", "context_management",
    ]  # fmt: skip
    assert "web_search_20250305" in answer.headers["x-tritonlm-ignored"]
    assert gateway.transport.calls[-1].parameters["priority"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_names_with_control_characters_do_not_break_the_header(gateway: Gateway, stream: bool) -> None:
    block = {"type": "text", "text": "T", "a\x00b\x7f\u0085c": 1}
    answer = gateway.post(
        "/v1/messages", model=LM, max_tokens=3, stream=stream, messages=[{"role": "user", "content": [block]}]
    )
    assert answer.status_code == 200
    assert answer.headers["x-tritonlm-ignored"] == "a b ?c of text blocks has no effect"


def test_fields_of_blocks_without_an_effect_are_named_once(gateway: Gateway) -> None:
    document = {"type": "document", "context": "From a letter.", "source": {"type": "text", "data": "D"}}
    text = {"type": "text", "text": "T", "citations": None, "cache_control": {"type": "ephemeral"}}
    answer = gateway.post(
        "/v1/messages", model=LM, max_tokens=3, tools=[{"name": "f", "input_schema": {"type": "object"}}],
        tool_choice={"type": "auto", "disable_parallel_tool_use": None},
        messages=[
            {"role": "user", "content": [{**document, "citations": {"enabled": True}}, {**text, "tone": "calm"}]},
            ANSWERED,
            {"role": "user", "content": [{**RESULT, "content": [{**text, "tone": "calm"}], "is_error": None}]},
        ],
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == [
        "citations of document blocks has no effect", "tone of text blocks has no effect",
    ]  # fmt: skip
    chat: Any = sent_messages(gateway)
    user, _, result = chat["messages"]
    assert (user["content"], result["content"]) == ("From a letter.\nD\nT", "T")


def test_errors_have_anthropics_form(gateway: Gateway, sdk: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        sdk.messages.create(model="nope", max_tokens=3, messages=HELLO)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        sdk.messages.create(model=LM, max_tokens=CONTEXT + 1, messages=HELLO)
    gateway.transport.breaks_after = (1, EngineFailure("a step failed"))
    with pytest.raises(anthropic.APIStatusError, match="a step failed"):
        list(sdk.messages.create(model=LM, max_tokens=9, messages=HELLO, stream=True))
    gateway.transport.has_chats = False
    with pytest.raises(anthropic.APIStatusError, match="no chat template"):
        sdk.messages.create(model=LM, max_tokens=3, messages=HELLO)
    assert gateway.http.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"


def test_a_prompt_is_counted(sdk: anthropic.Anthropic) -> None:
    assert sdk.messages.count_tokens(model=LM, messages=HELLO, system="Be").input_tokens == len("BeHello\nassistant:")


def test_the_key_may_come_in_anthropics_header(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    secret = file.create("agent", [], Limits())
    with running_gateway(keys=file.path) as gateway:
        with anthropic.Anthropic(base_url=gateway.url, api_key=secret, max_retries=0) as sdk:
            assert sdk.messages.create(model=LM, max_tokens=3, messages=HELLO).content
        with (
            anthropic.Anthropic(base_url=gateway.url, api_key="wrong", max_retries=0) as sdk,
            pytest.raises(anthropic.AuthenticationError) as refused,
        ):
            sdk.messages.create(model=LM, max_tokens=3, messages=HELLO)
        assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
