"""Chats with tools in the client library: what it asks the model for, and what it sends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fakes.chat_templates import QWEN, REASONING
from fakes.fake_transport import ABOUT_LM, LM, FakeTransport
from tritonlm import AsyncClient
from tritonlm.client.chat_parsing.tools import read_tools
from tritonlm.client.chats import with_argument_name
from tritonlm.client.transport import Prompt
from tritonlm.client.types import ChatCompletion
from tritonlm.contract import InvalidRequest, Unavailable
from tritonlm.contract.control import ABOUT, Command

CHAT = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "noop"}}]


class CountingTransport(FakeTransport):
    """Counts what is asked beside the answers."""

    def __init__(self, template: str) -> None:
        super().__init__()
        self.about = {**ABOUT_LM, "chat_template": template}
        self.abouts = self.renders = 0
        self.about_trouble: list[Exception] = []

    async def command(self, model: str, command: Command) -> dict[str, Any]:
        if command.name == ABOUT:
            self.abouts += 1
            if self.about_trouble:
                raise self.about_trouble.pop(0)
        return await super().command(model, command)

    async def render(self, model: str, prompt: Prompt) -> str:
        self.renders += 1
        return await super().render(model, prompt)


def ask(transport: FakeTransport, **arguments: Any) -> ChatCompletion:
    async def answer() -> ChatCompletion:
        async with AsyncClient(transports=[transport]) as client:
            completion = await client.chat.completions.create(LM, **{"messages": CHAT, **arguments})
            assert isinstance(completion, ChatCompletion)
            return completion

    return asyncio.run(answer())


def test_a_model_is_described_once_for_many_chats() -> None:
    transport = CountingTransport(QWEN)

    async def run() -> None:
        async with AsyncClient(transports=[transport]) as client:
            for _ in range(3):
                await client.chat.completions.create(LM, CHAT)

    asyncio.run(run())
    assert (transport.abouts, transport.renders) == (1, 0)


def test_the_prompt_is_rendered_only_where_answers_may_begin_in_it() -> None:
    continued = {"messages": [*CHAT, {"role": "assistant", "content": "I"}], "continue_final_message": True}
    for template, arguments, renders in (
        (QWEN, {}, 0), (QWEN, {"tools": TOOLS}, 0), (QWEN, continued, 1), (REASONING, {}, 1),
        ("no reasoning", continued, 0),
    ):  # fmt: skip
        transport = CountingTransport(template)
        transport.answers = [["a"]]
        ask(transport, **arguments)
        assert transport.renders == renders


def test_a_description_that_fails_is_asked_for_again() -> None:
    transport = CountingTransport(QWEN)
    transport.about_trouble = [Unavailable("gone")]
    transport.answers = [["a"]]
    assert ask(transport).choices[0].message.content == "a"
    assert transport.abouts == 2


def test_a_schema_for_answers_is_a_part_of_the_grammar_of_tools() -> None:
    transport = CountingTransport(QWEN)
    described = {"name": "a", "schema": {"type": "object", "title": "Answer"}}
    for response_format, part in (
        ({"type": "json_schema", "json_schema": described}, '"title": "Answer"'),
        ({"type": "json_object"}, "SPACE content"), ({"type": "text"}, "answer: TEXT"),
    ):  # fmt: skip
        transport.answers = [["a"]]
        ask(transport, tools=TOOLS, response_format=response_format)
        assert part in transport.calls[-1].parameters["structured_outputs"]["grammar"]


def test_a_schema_holds_after_reasoning() -> None:
    schema = {"type": "object", "title": "Answer"}
    for template, arguments, grammar in (
        (QWEN, {"guided_json": schema}, "start: answer | SPACE"),
        (REASONING, {"response_format": {"type": "json_object"}}, "start: reasoning answer"),
        (QWEN, {"guided_json": schema, "separate_reasoning": False}, None), (QWEN, {"guided_regex": "a+"}, None),
        ("plain", {"guided_json": schema}, None),
    ):  # fmt: skip
        transport = CountingTransport(template)
        transport.generation_prompt = "<think>\n" if template is REASONING else ""
        transport.answers = [["Hm.</think>{}" if template is REASONING else "{}"]]
        message = ask(transport, **arguments).choices[0].message
        assert message.content == "{}"
        sent = transport.calls[-1].parameters["structured_outputs"]
        if grammar is None:
            assert "grammar" not in sent
        else:
            assert grammar in sent["grammar"]
            assert "answer: SPACE content" in sent["grammar"]


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"), ({"guided_json": 5}, "guided_json"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"), ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}]}}},
            "tool_choice.allowed_tools.tools[0]",
        ),
        ({"documents": {1, 2}}, "messages"),
    ],
)  # fmt: skip
def test_what_excludes_tools_is_refused_by_name(arguments: dict[str, Any], param: str) -> None:
    transport = CountingTransport(QWEN)
    with pytest.raises(InvalidRequest) as error:
        ask(transport, tools=TOOLS, **arguments)
    assert error.value.param == param
    assert transport.calls == []


def test_allowed_tools_limit_the_calls_and_not_the_prompt() -> None:
    transport = CountingTransport(QWEN)
    transport.answers = [["a"]]
    tools = [*TOOLS, {"type": "function", "function": {"name": "other"}}]
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "other"}}]}
    ask(transport, tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    call = transport.calls[-1]
    grammar = call.parameters["structured_outputs"]["grammar"]
    assert "other" in grammar
    assert "noop" not in grammar
    assert len(json.loads(call.prompt.messages or "")["tools"]) == 2


def schema_in(*properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": schema for index, schema in enumerate(properties)}}


@pytest.mark.parametrize(
    ("reason", "param", "message"),
    [
        (": not, if is not supported; leave it out", "tools[1].function.parameters", "it out (at /properties/p0/not)"),
        (": the format isbn is not supported", "tools[1].function.parameters", "supported (at /properties/p1/format)"),
        (": contains is not supported", "tools", "the parameters of a tool cannot be enforced: contains is not"),
        (" is too large", "tools", "the parameters of a tool cannot be enforced: is too large"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_named_by_its_tool_and_place(reason: str, param: str, message: str) -> None:
    first, second = schema_in({"enum": ["not"]}), schema_in({"not": {}}, {"format": "isbn"})
    first["properties"]["not"] = {"format": "date"}
    tools = read_tools(
        [
            {"type": "function", "function": {"name": name, "parameters": parameters}}
            for name, parameters in (("f", first), ("g", second))
        ]
    )
    error = InvalidRequest(f"structured_outputs.grammar{reason}", "structured_outputs.grammar")
    named = with_argument_name(error, {}, tools)
    assert named.param == param
    assert message in named.message
    assert "structured_outputs" not in named.message


def test_parameters_of_tools_have_bounds() -> None:
    schema: dict[str, Any] = {}
    for _ in range(200):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="96 levels") as error:
        read_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    assert error.value.param == "tools[0].function.parameters"
