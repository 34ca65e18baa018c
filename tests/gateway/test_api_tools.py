"""Tools, reasoning and structured texts through the Responses and the Messages API, with their SDKs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from fakes.chat_templates import QWEN, REASONING
from fakes.fake_transport import LM
from pydantic import BaseModel
from tritonlm.contract import InvalidRequest

from .conftest import Gateway
from .tool_calls import CALL, PARTS, SCHEMA, WEATHER, sent_chat, use

FUNCTION: Any = {"type": "function", **WEATHER}
CUSTOM: Any = {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}}
TOOL: Any = {"name": "weather", "description": "the weather", "input_schema": SCHEMA}
QUESTION: Any = [{"role": "user", "content": "Weather in Paris?"}]


class City(BaseModel):
    name: str


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    use(gateway, QWEN)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(gateway: Gateway) -> Iterator[anthropic.Anthropic]:
    use(gateway, QWEN)
    with anthropic.Anthropic(base_url=gateway.url, api_key="unused", max_retries=0) as client:
        yield client


class TestResponses:
    def test_calls_are_items_and_their_outputs_come_back(self, gateway: Gateway, sdk: openai.OpenAI) -> None:
        gateway.transport.answers = [[f"I look. {CALL}\n{CALL}"], ["It rains."]]
        first = sdk.responses.create(model=LM, input=QUESTION, tools=[FUNCTION, {"type": "web_search"}])
        assert [item.type for item in first.output] == ["message", "function_call", "function_call"]
        calls: Any = first.output[1:]
        assert [(call.name, call.arguments, call.status) for call in calls] == [
            ("weather", '{"city": "Paris"}', "completed")
        ] * 2
        assert "web_search" in first.warnings[0]  # type: ignore[attr-defined]
        outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
        items: Any = [*QUESTION, *(item.to_dict() for item in first.output), *outputs]
        second = sdk.responses.create(model=LM, input=items, tools=[FUNCTION])
        assert second.output_text == "It rains."
        chat = sent_chat(gateway)
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant", "tool", "tool"]
        assert chat["messages"][1]["content"].strip() == "I look."
        assert [call["id"] for call in chat["messages"][1]["tool_calls"]] == [call.call_id for call in calls]
        assert [tool["function"]["name"] for tool in chat["tools"]] == ["weather"]

    def test_a_streamed_call_has_the_events_of_the_sdk(self, gateway: Gateway, sdk: openai.OpenAI) -> None:
        gateway.transport.answers = [PARTS]
        with sdk.responses.stream(model=LM, input=QUESTION, tools=[FUNCTION]) as stream:
            events: list[Any] = list(stream)
            final = stream.get_final_response()
        kinds = [event.type.removeprefix("response.") for event in events]
        after = kinds[kinds.index("output_item.done") + 1 :]
        deltas = after.count("function_call_arguments.delta")
        assert after == [
            "output_item.added", *["function_call_arguments.delta"] * deltas, "function_call_arguments.done",
            "output_item.done", "completed",
        ]  # fmt: skip
        call: Any = final.output[-1]
        arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        assert arguments == call.arguments == '{"city": "Paris"}'

    def test_a_custom_tool_is_called_with_a_text(self, gateway: Gateway, sdk: openai.OpenAI) -> None:
        text = '<tool_call>\n{"name": "patch", "arguments": {"input": "line\\n"}}\n</tool_call>'
        gateway.transport.answers = [[text], [text], ["Done."]]
        whole = sdk.responses.create(model=LM, input=QUESTION, tools=[CUSTOM])
        call: Any = whole.output[0]
        assert (call.type, call.name, call.input) == ("custom_tool_call", "patch", "line\n")
        assert "grammar" in whole.warnings[0]  # type: ignore[attr-defined]
        events: list[Any] = list(sdk.responses.create(model=LM, input=QUESTION, tools=[CUSTOM], stream=True))
        assert [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"] == ["line\n"]
        output: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "applied"}
        sdk.responses.create(model=LM, input=[*QUESTION, call.to_dict(), output], tools=[CUSTOM])
        assert sent_chat(gateway)["messages"][-1]["content"] == "applied"

    def test_the_choice_of_tools_reaches_the_chat(self, gateway: Gateway, sdk: openai.OpenAI) -> None:
        other = {**FUNCTION, "name": "clock"}
        gateway.transport.answers = [[CALL]]
        choice: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
        sdk.responses.create(model=LM, input=QUESTION, tools=[FUNCTION, other], tool_choice=choice)
        assert [tool["function"]["name"] for tool in sent_chat(gateway)["tools"]] == ["weather"]
        with pytest.raises(openai.BadRequestError, match="not among the tools"):
            sdk.responses.create(
                model=LM, input=QUESTION, tools=[FUNCTION], tool_choice={"type": "function", "name": "clock"}
            )

    def test_reasoning_is_an_item_of_its_own_and_is_sent_back(self, gateway: Gateway, sdk: openai.OpenAI) -> None:
        use(gateway, REASONING)
        gateway.transport.answers = [["<think>", "Hm", "m.</think>", "Hello."], ["Bye."]]
        events: list[Any] = list(sdk.responses.create(model=LM, input="Hi", stream=True, reasoning={"effort": "low"}))
        thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        final = events[-1].response
        assert thought.strip() == "Hmm."
        assert [item.type for item in final.output] == ["reasoning", "message"]
        assert final.output[0].content[0].text == thought
        assert final.output_text == "Hello."
        assert sent_chat(gateway)["reasoning_effort"] == "low"
        items: Any = [{"role": "user", "content": "Hi"}, *(item.to_dict() for item in final.output)]
        sdk.responses.create(model=LM, input=[*items, {"role": "user", "content": "Bye"}])
        assert sent_chat(gateway)[1] == {"role": "assistant", "content": "Hello.", "reasoning_content": thought}

    def test_a_text_of_a_schema_is_parsed(self, gateway: Gateway, sdk: openai.OpenAI) -> None:
        gateway.transport.answers = [['{"name": "Paris"}'], ['{"na', 'me": "Paris"}']]
        parsed = sdk.responses.parse(model=LM, input="A city", text_format=City)
        assert parsed.output_parsed == City(name="Paris")
        schema = gateway.transport.calls[-1].parameters["structured_outputs"]
        assert "name" in json.dumps(schema)
        with sdk.responses.stream(model=LM, input="A city", text_format=City) as stream:
            assert stream.get_final_response().output_parsed == City(name="Paris")
        # The engine compiles the schema.
        gateway.transport.trouble = [InvalidRequest("structured_outputs.json: bad", "structured_outputs.json")]
        with pytest.raises(openai.BadRequestError, match=r"text\.format\.schema: bad") as refused:
            sdk.responses.parse(model=LM, input="A city", text_format=City)
        assert refused.value.param == "text.format.schema"


class TestMessages:
    def test_tool_uses_and_results(self, gateway: Gateway, claude: anthropic.Anthropic) -> None:
        gateway.transport.answers = [[f"I look. {CALL}"], ["It rains."]]
        tools: Any = [TOOL, {"type": "web_search_20250305", "name": "web_search"}]
        first = claude.messages.create(model=LM, max_tokens=99, messages=QUESTION, tools=tools)
        assert first.stop_reason == "tool_use"
        text, use_block = first.content
        assert (text.type, use_block.type) == ("text", "tool_use")
        assert (use_block.name, use_block.input) == ("weather", {"city": "Paris"})  # type: ignore[union-attr]
        result = {"type": "tool_result", "tool_use_id": use_block.id, "content": "rain", "is_error": True}  # type: ignore[union-attr]
        blocks: Any = [result, {"type": "text", "text": "So?"}]
        messages = [*QUESTION, first.to_param(), {"role": "user", "content": blocks}]
        second = claude.messages.create(model=LM, max_tokens=99, messages=messages, tools=[TOOL])
        assert second.content[0].text == "It rains."  # type: ignore[union-attr]
        roles = [message["role"] for message in sent_chat(gateway)["messages"]]
        assert roles == ["user", "assistant", "tool", "user"]
        assert sent_chat(gateway)["messages"][2]["content"] == "Error: rain"

    def test_a_streamed_tool_use(self, gateway: Gateway, claude: anthropic.Anthropic) -> None:
        gateway.transport.answers = [PARTS]
        with claude.messages.stream(model=LM, max_tokens=99, messages=QUESTION, tools=[TOOL]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
        assert "input_json" in kinds
        assert final.stop_reason == "tool_use"
        assert final.content[-1].input == {"city": "Paris"}  # type: ignore[union-attr]

    def test_the_choice_of_tools_reaches_the_chat(self, gateway: Gateway, claude: anthropic.Anthropic) -> None:
        gateway.transport.answers = [[CALL], [CALL]]
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}):
            claude.messages.create(model=LM, max_tokens=9, messages=QUESTION, tools=[TOOL], tool_choice=choice)  # type: ignore[arg-type]
            assert "structured_outputs" in gateway.transport.calls[-1].parameters

    def test_thinking_is_a_block_of_its_own(self, gateway: Gateway, claude: anthropic.Anthropic) -> None:
        use(gateway, REASONING)
        gateway.transport.answers = [["<think>Hmm.</think>Hello."]]
        message = claude.messages.create(
            model=LM, max_tokens=99, messages=QUESTION, thinking={"type": "enabled", "budget_tokens": 1024}
        )
        thought, text = message.content
        assert (thought.type, text.type) == ("thinking", "text")
        assert thought.thinking.strip() == "Hmm."  # type: ignore[union-attr]
        assert sent_chat(gateway)["reasoning_effort"] == "medium"

    def test_an_assistants_last_message_is_continued(self, gateway: Gateway, claude: anthropic.Anthropic) -> None:
        messages: Any = [*QUESTION, {"role": "assistant", "content": "It"}]
        claude.messages.create(model=LM, max_tokens=3, messages=messages)
        assert sent_chat(gateway)["continue_final_message"] is True

    def test_tools_count_as_a_part_of_the_prompt(self, claude: anthropic.Anthropic) -> None:
        assert claude.messages.count_tokens(model=LM, messages=QUESTION, tools=[TOOL]).input_tokens > 0

    def test_an_output_format_is_enforced(self, gateway: Gateway, claude: anthropic.Anthropic) -> None:
        gateway.transport.answers = [['{"city": "Paris"}']]
        claude.messages.create(
            model=LM, max_tokens=9, messages=QUESTION,
            output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        )  # fmt: skip
        assert "city" in json.dumps(gateway.transport.calls[-1].parameters["structured_outputs"])
