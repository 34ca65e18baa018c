"""Client libraries and agent frameworks as their users call them, unchanged, with a trained model behind the gateway.

Calls are required and answers have a stated type, so the grammar makes even a small model call and answer as it must.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field

from .conftest import LM
from .sdk_packages import Unavailable, sdk_folder

pytestmark = pytest.mark.triton

PROGRAMS = Path(__file__).with_name("sdk_programs")
ASKED: list[Any] = [{"role": "user", "content": "Anna is a baker of 31 years, and she is at sea."}]
GREEDY: dict[str, Any] = {"model": LM, "temperature": 0}
# Anthropic's SDK has no parameter for the temperature any more.
CLAUDE: dict[str, Any] = {"model": LM, "messages": ASKED, "extra_body": {"temperature": 0}}


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    kind: Literal["sailor", "baker"]


SCHEMA = {**Person.model_json_schema(), "additionalProperties": False}
RESPONSES_TOOL: Any = {"type": "function", "name": "keep", "parameters": SCHEMA, "strict": True}
ANTHROPIC_TOOL: Any = {"name": "keep", "description": "Keeps a person.", "input_schema": SCHEMA}


def tool() -> Any:
    return openai.pydantic_function_tool(Person, name="keep")


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def test_openai_parses_chats(sdk: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {**GREEDY, "messages": ASKED, "response_format": Person, "max_completion_tokens": 80}
    parsed = sdk.chat.completions.parse(**arguments).choices[0].message.parsed
    assert isinstance(parsed, Person)
    with sdk.chat.completions.stream(**arguments) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.parsed == parsed
    with pytest.raises(openai.LengthFinishReasonError):
        sdk.chat.completions.parse(**{**arguments, "max_completion_tokens": 3})


def test_openai_calls_tools_in_chats(sdk: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        **GREEDY, "messages": ASKED, "tools": [tool()], "tool_choice": "required", "parallel_tool_calls": False,
        "max_completion_tokens": 120,
    }  # fmt: skip
    choice = sdk.chat.completions.parse(**arguments).choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Person)
    with sdk.chat.completions.stream(**arguments) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert "".join(delta.arguments_delta for delta in deltas) == call.function.arguments
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    history = [
        *ASKED,
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "kept"},
    ]
    answer = sdk.chat.completions.create(**GREEDY, messages=history, tools=[tool()], tool_choice="none", max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_openai_responses(sdk: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {**GREEDY, "input": ASKED, "max_output_tokens": 12}
    text = sdk.responses.create(**arguments).output_text
    events = list(sdk.responses.create(**arguments, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text != ""
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == text
    arguments["max_output_tokens"] = 120
    parsed = sdk.responses.parse(**arguments, text_format=Person).output_parsed
    assert isinstance(parsed, Person)
    with sdk.responses.stream(**arguments, text_format=Person) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == parsed


def test_openai_calls_tools_in_responses(sdk: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {**GREEDY, "input": ASKED, "tools": [RESPONSES_TOOL], "max_output_tokens": 120}
    required = {"tool_choice": "required", "parallel_tool_calls": False}
    [call] = [item for item in sdk.responses.create(**arguments, **required).output if item.type == "function_call"]
    Person.model_validate_json(call.arguments)
    events = list(sdk.responses.create(**arguments, **required, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "kept"}
    answer = sdk.responses.create(**{**arguments, "input": [*ASKED, call, output]}, tool_choice="none")
    assert answer.output_text


def test_openai_decides(sdk: openai.OpenAI) -> None:
    question: Any = {"type": "predicate", "instructions": "Is Anna a baker?"}
    [answer] = sdk.decisions.create(model=LM, input=ASKED[0]["content"], questions=[question]).answers
    again = sdk.decisions.create(model=LM, input=ASKED[0]["content"], questions=[question, question]).answers
    assert [one.to_dict() for one in again] == [answer.to_dict()] * 2


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    arguments: dict[str, Any] = {**CLAUDE, "max_tokens": 12}
    message = claude.messages.create(**arguments)
    with claude.messages.stream(**arguments) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.text for block in message.content] == [text] == [block.text for block in final.content]  # type: ignore[union-attr]
    assert message.usage.output_tokens == final.usage.output_tokens == 12
    counted = claude.messages.count_tokens(model=LM, messages=ASKED).input_tokens
    assert counted == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    assert claude.messages.count_tokens(model=LM, messages=ASKED, tools=[ANTHROPIC_TOOL]).input_tokens > counted
    parsed = claude.messages.parse(**{**arguments, "max_tokens": 120}, output_format=Person)
    assert isinstance(parsed.parsed_output, Person)


def test_anthropic_calls_tools(claude: anthropic.Anthropic) -> None:
    arguments: dict[str, Any] = {**CLAUDE, "max_tokens": 120, "tools": [ANTHROPIC_TOOL]}
    required = {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    message = claude.messages.create(**arguments, **required)
    assert message.stop_reason == "tool_use"
    [call] = [block for block in message.content if block.type == "tool_use"]
    Person.model_validate(call.input)
    with claude.messages.stream(**arguments, **required) as stream:
        final = stream.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [call.input]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "kept"}]}
    history = [*ASKED, {"role": "assistant", "content": message.content}, result]
    answer = claude.messages.create(**{**arguments, "messages": history}, tool_choice={"type": "none"})
    assert [block.type for block in answer.content] == ["text"]


def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise litellm downloads its list of prices.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm  # noqa: PLC0415 (slow to import)

    common: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "unused", "num_retries": 0, "temperature": 0}
    chat: dict[str, Any] = {"model": f"openai/{LM}", "messages": ASKED, **common}
    text = litellm.completion(**chat, response_format=Person, max_tokens=120).choices[0].message.content
    Person.model_validate_json(text)
    required: dict[str, Any] = {**chat, "tools": [tool()], "tool_choice": "required", "max_tokens": 120}
    required["parallel_tool_calls"] = False
    [call] = litellm.completion(**required).choices[0].message.tool_calls
    Person.model_validate_json(call.function.arguments)
    whole = litellm.stream_chunk_builder(list(litellm.completion(**required, stream=True)))
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    response = litellm.responses(model=f"openai/{LM}", input="Who is Anna?", max_output_tokens=8, **common)
    assert response.output[0].content[0].text
    claude: dict[str, Any] = {"model": f"anthropic/{LM}", "messages": ASKED, **common, "api_base": url}
    message = litellm.completion(**claude, tools=[tool()], tool_choice="required", max_tokens=120).choices[0].message
    Person.model_validate(json.loads(message.tool_calls[0].function.arguments))


@pytest.mark.parametrize(
    ("program", "packages"),
    [("openai_agents", "agents"), ("langchain_agents", "agents"), ("instructor_models", "instructor")],
)
def test_a_framework_of_agents(url: str, program: str, packages: str, tmp_path: Path) -> None:
    """In a process of its own: it has packages that do not fit beside those of the other tests."""
    try:
        folder = sdk_folder(packages)
    except Unavailable as error:
        pytest.skip(str(error))
    result = subprocess.run(
        [sys.executable, str(PROGRAMS / f"{program}.py"), f"{url}/v1", LM],
        env={**os.environ, "PYTHONPATH": str(folder), "OPENAI_API_KEY": "unused", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
