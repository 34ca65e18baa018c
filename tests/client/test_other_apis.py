"""`client.responses` and `client.messages`: the same objects and events as over HTTP, in both clients."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fakes.chat_templates import QWEN
from fakes.fake_transport import ABOUT_LM, LM, FakeTransport
from tritonlm import AsyncClient, Client
from tritonlm.client.messages_api.types import MessageObject, TextBlock, ToolUseBlock
from tritonlm.client.responses_api.types import FunctionCall, OutputMessage, ResponseObject
from tritonlm.client.transport import Call
from tritonlm.client.types import Logprob, Piece
from tritonlm.contract import Cancelled, EngineFailure, InvalidRequest

HELLO = [{"role": "user", "content": "Hello"}]
CALL = '<tool_call>\n{"name": "find", "arguments": {"city": "Oslo"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}


def calling_transport() -> FakeTransport:
    """It answers with a call of a tool."""
    transport = FakeTransport()
    transport.about = {**ABOUT_LM, "chat_template": QWEN}
    transport.answers = [[CALL]]
    return transport


def sent_messages(transport: FakeTransport) -> list[dict[str, Any]]:
    chat = json.loads(transport.calls[-1].prompt.messages or "")
    messages: list[dict[str, Any]] = chat["messages"] if isinstance(chat, dict) else chat
    return messages


def test_a_response_has_items_and_usage() -> None:
    transport = FakeTransport()
    with Client(transports=[transport]) as client:
        response = client.responses.create(LM, "Once", instructions="Be brief.", max_output_tokens=5, seed=1)
        assert isinstance(response, ResponseObject)
        assert (response.status, response.incomplete_details) == ("incomplete", {"reason": "max_output_tokens"})
        (message,) = response.output
        assert isinstance(message, OutputMessage)
        assert response.output_text == message.content[0].text != ""
        assert response.usage is not None
        assert response.usage.output_tokens == 5
        # Items of an answer are the next request's input.
        client.responses.create(LM, [*HELLO, *response.output, {"role": "user", "content": "More"}])
    assert [message["role"] for message in sent_messages(transport)] == ["user", "assistant", "user"]
    assert sent_messages(transport)[1]["content"] == response.output_text


class WithLogprobs(FakeTransport):
    """Answers with one text; each of its words, with the space before it, is a token. Streamed, a piece is two."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.about = {**ABOUT_LM, "chat_template": QWEN}
        self._tokens = re.findall(r"\s*[^\s<]+|\s*<[^>]*>|\s+", answer)

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        self.calls.append(call)
        size = 2 if call.stream else len(self._tokens)
        cuts = range(0, len(self._tokens), size)
        for index, first in enumerate(cuts):
            tokens = self._tokens[first : first + size]
            entries = [Logprob(1, token, -1.0, list(token.encode()), 0, ()) for token in tokens]
            reason = "stop" if index + 1 == len(cuts) else ""
            yield Piece(index, "".join(tokens), reason, 3, first + len(tokens), 0, 1, [], entries)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ("<think>there</think>\nHi there", ["\nHi", " there"]),
        ("<think>a b c</think>\nHi  there. You \n", ["\nHi", "  there.", " You", " \n"]),
        (f"<think>a</think>\nOslo it is.\n{CALL}", ["\nOslo", " it", " is."]),
        ("Oslo it is.", ["Oslo", " it", " is."]),
        (CALL, []),
    ],
)
def test_a_texts_logprobs_are_those_of_its_own_tokens(answer: str, tokens: list[str], stream: bool) -> None:
    async def run() -> ResponseObject:
        async with AsyncClient(transports=[WithLogprobs(answer)]) as client:
            arguments = {"tools": [{"type": "function", "name": "find", "parameters": PARAMETERS}]}
            created = await client.responses.create(
                LM, "Where?", include=["message.output_text.logprobs"], stream=stream, **arguments
            )
            if isinstance(created, ResponseObject):
                return created
            events = [event async for event in created]
            deltas = [event for event in events if event.type == "response.output_text.delta"]
            assert [entry["token"] for delta in deltas for entry in delta.logprobs] == tokens
            return await created.final()

    response = asyncio.run(run())
    parts = [part for item in response.output if isinstance(item, OutputMessage) for part in item.content]
    assert [entry["token"] for part in parts for entry in part.logprobs] == tokens


def test_a_responses_stream_ends_with_the_same_response() -> None:
    async def run() -> tuple[list[Any], ResponseObject]:
        async with AsyncClient(transports=[FakeTransport()]) as client:
            async with await client.responses.stream(LM, "Once", max_output_tokens=5, seed=1) as stream:
                events = [event async for event in stream]
            return events, await stream.final()

    events, response = asyncio.run(run())
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    # An event keeps what it had when it was written.
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    assert events[-1].response == response
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == response.output_text
    with (
        Client(transports=[FakeTransport()]) as client,
        client.responses.stream(LM, "Once", max_output_tokens=5, seed=1) as blocking,
    ):
        assert [event.type for event in blocking] == kinds
        assert blocking.final().output_text == response.output_text


def test_a_message_has_blocks_and_usage() -> None:
    with Client(transports=[FakeTransport()]) as client:
        message = client.messages.create(LM, HELLO, max_tokens=5, seed=1)
        assert isinstance(message, MessageObject)
        (block,) = message.content
        assert isinstance(block, TextBlock)
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 5)
        with client.messages.stream(LM, HELLO, max_tokens=5, seed=1) as stream:
            events = list(stream)
        assert [event.type for event in events[:3]] == ["message_start", "ping", "content_block_start"]
        assert events[-1].type == "message_stop"
        assert stream.final().content == message.content
        count = client.messages.count_tokens(LM, HELLO, system="Be brief.").input_tokens
        assert count > client.messages.count_tokens(LM, HELLO).input_tokens > 0


def test_tools_are_called_in_both_apis() -> None:
    with Client(transports=[calling_transport()]) as client:
        response = client.responses.create(
            LM, "Hi", tools=[{"type": "function", "name": "find", "parameters": PARAMETERS}]
        )
        (call,) = response.output  # type: ignore[union-attr]
        assert isinstance(call, FunctionCall)
        assert (call.name, json.loads(call.arguments)) == ("find", {"city": "Oslo"})
    with Client(transports=[calling_transport()]) as client:
        tools = [{"name": "find", "input_schema": PARAMETERS}, {"type": "web_search_20250305", "name": "web_search"}]
        message = client.messages.create(LM, HELLO, max_tokens=50, tools=tools)
        (block,) = message.content  # type: ignore[union-attr]
        assert isinstance(block, ToolUseBlock)
        assert (block.name, block.input) == ("find", {"city": "Oslo"})
        assert "web_search" in message.warnings[0]  # type: ignore[union-attr]


def test_leaving_a_stream_cancels_it_and_it_has_no_result() -> None:
    transport = FakeTransport(pause=0.001)
    with Client(transports=[transport]) as client:
        with client.messages.stream(LM, HELLO, max_tokens=400) as stream:
            next(stream)
        assert not transport.running
        with pytest.raises(Cancelled):
            stream.final()


def test_a_failure_in_a_stream_is_raised() -> None:
    transport = FakeTransport()
    transport.breaks_after = (1, EngineFailure("broken"))
    with Client(transports=[transport], max_retries=0) as client:
        stream = client.responses.stream(LM, "Once", seed=1)
        with pytest.raises(EngineFailure, match="broken"):
            list(stream)
        with pytest.raises(Cancelled):
            stream.final()


RESPONSES: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"max_output_token": 5}, "max_output_token"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": 7}, "temperature"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
]


@pytest.mark.parametrize(("fields", "param"), RESPONSES, ids=lambda value: str(value)[:40])
def test_a_wrong_field_of_a_response_is_named(fields: dict[str, Any], param: str) -> None:
    with Client(transports=[FakeTransport()]) as client, pytest.raises(InvalidRequest) as refusal:
        client.responses.create(LM, **{"input": "Hi", **fields})
    assert refusal.value.param == param


MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({}, "max_tokens"),
    ({"max_tokens": 5, "stop": ["a"]}, "stop"),
    ({"max_tokens": 5, "stop_sequences": [""]}, "stop_sequences[0]"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "tools": [{"name": "a"}]}, "tools[0].input_schema"),
    ({"max_tokens": 5, "messages": [{"role": "robot", "content": "a"}]}, "messages[0]"),
]


@pytest.mark.parametrize(("fields", "param"), MESSAGES, ids=lambda value: str(value)[:40])
def test_a_wrong_field_of_a_message_is_named(fields: dict[str, Any], param: str) -> None:
    with Client(transports=[FakeTransport()]) as client, pytest.raises(InvalidRequest) as refusal:
        client.messages.create(LM, **{"messages": HELLO, **fields})
    assert refusal.value.param == param
