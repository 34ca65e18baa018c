"""Tools and reasoning in chats through HTTP, with OpenAI's SDK and its streaming helper."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from fakes.chat_templates import LLAMA, MISTRAL, QWEN, REASONING
from fakes.fake_transport import LM
from pydantic import BaseModel
from tritonlm.contract import InvalidRequest

from .conftest import Gateway
from .tool_calls import CALL, PARTS, WEATHER, sent_chat, use

CHAT: Any = [{"role": "user", "content": "Weather in Paris?"}]
TOOLS: Any = [{"type": "function", "function": WEATHER}]


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    use(gateway, QWEN)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def sent_grammar(gateway: Gateway) -> str:
    grammar: str = gateway.transport.calls[-1].parameters["structured_outputs"]["grammar"]
    return grammar


def test_a_call_comes_back_with_its_arguments(gateway: Gateway, sdk: openai.OpenAI) -> None:
    gateway.transport.answers = [[f"{CALL}\n{CALL}"]]
    answer = sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls: Any = choice.message.tool_calls
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", "weather", '{"city": "Paris"}')
    ] * 2
    assert len({call.id for call in calls}) == 2
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call.id) for call in calls)
    assert sent_chat(gateway) == {"messages": CHAT, "tools": TOOLS}
    assert "%json" in sent_grammar(gateway)


def test_the_answer_and_its_result_can_be_sent_back(gateway: Gateway, sdk: openai.OpenAI) -> None:
    gateway.transport.answers = [[CALL], ["It rains."]]
    message = sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS).choices[0].message
    assert message.tool_calls
    history = [
        *CHAT,
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
    ]
    answer = sdk.chat.completions.create(model=LM, messages=history, tools=TOOLS).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == ("It rains.", None, "stop")


@pytest.mark.parametrize(
    ("cut", "arguments"),
    [
        (CALL.split('ty"')[0], '{"ci'),
        (CALL.split('{"city"')[0], ""),
        # Python's parser gives up on it in another way.
        (CALL.split('"Paris"')[0] + "[" * 5000, '{"city": ' + "[" * 5000),
    ],
    ids=["in a name", "before the arguments", "in deep lists"],
)
def test_a_call_that_a_stop_string_cuts_is_none_to_run(
    gateway: Gateway, sdk: openai.OpenAI, cut: str, arguments: str
) -> None:
    gateway.transport.answers = [[f"{CALL}\n{cut}"]] * 2
    whole = sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS, stop=["Par"]).choices[0]
    chunks = list(sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS, stop=["Par"], stream=True))
    assert whole.finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    calls: Any = whole.message.tool_calls
    assert [call.function.arguments for call in calls] == ['{"city": "Paris"}', arguments]


def test_the_sdks_streaming_helper_gets_arguments_as_they_arrive(gateway: Gateway, sdk: openai.OpenAI) -> None:
    class Weather(BaseModel):
        city: str
        unit: Literal["c", "f"] | None = None

    gateway.transport.answers = [PARTS]
    tool: Any = openai.pydantic_function_tool(Weather, name="weather")
    with sdk.chat.completions.stream(model=LM, messages=CHAT, tools=[tool]) as stream:
        deltas = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(deltas) == '{"city": "Paris"}'
    assert sum(map(bool, deltas)) == 3
    assert (final.message.content, final.finish_reason) == ("I look.", "tool_calls")
    assert final.message.tool_calls
    assert final.message.tool_calls[0].function.parsed_arguments == Weather(city="Paris")
    # The helper's tool is strict.
    assert '"lenient": false' in sent_grammar(gateway)


def test_a_stream_and_a_whole_answer_are_the_same(gateway: Gateway, sdk: openai.OpenAI) -> None:
    gateway.transport.answers = [PARTS, PARTS, PARTS, PARTS]
    whole = sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS, n=2)
    chunks = list(sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS, n=2, stream=True))
    for choice in whole.choices:
        parts = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content == "I look."
        calls: Any = [call for part in parts for call in part.delta.tool_calls or ()]
        assert calls[0].id
        assert all(call.id is None and call.function.name is None for call in calls[1:])
        arguments = "".join(call.function.arguments for call in calls)
        assert choice.message.tool_calls is not None
        assert arguments == choice.message.tool_calls[0].function.arguments  # type: ignore[union-attr]
        assert parts[-1].finish_reason == choice.finish_reason == "tool_calls"
        # A piece that is a part of a marker only is not sent.
        assert all(part.delta.model_dump(exclude_none=True) or part.finish_reason for part in parts)


@pytest.mark.parametrize(
    ("choice", "free", "calls"),
    [
        ("auto", True, True), (None, True, True), ("required", False, True),
        ({"type": "function", "function": {"name": "weather"}}, False, True), ("none", True, False),
    ],
)  # fmt: skip
def test_tool_choice(gateway: Gateway, sdk: openai.OpenAI, choice: Any, free: bool, calls: bool) -> None:
    gateway.transport.answers = [["text"]]
    body = {"tool_choice": choice} if choice else {}
    assert sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS, **body).choices[0].finish_reason == "stop"
    if calls:
        assert ("answer: TEXT" in sent_grammar(gateway)) == free
        assert "tools" in sent_chat(gateway)
    else:
        assert "structured_outputs" not in gateway.transport.calls[-1].parameters
        assert sent_chat(gateway) == CHAT


@pytest.mark.parametrize("stream", [False, True])
def test_hosted_tools_are_left_out_and_named(gateway: Gateway, sdk: openai.OpenAI, stream: bool) -> None:
    gateway.transport.answers = [["a", "b"], ["a", "b"]]
    hosted = [{"type": "web_search_preview_2025_03_11"}, {"type": "code_interpreter", "container": {"type": "auto"}}]
    warnings = [
        "the tool web_search_preview_2025_03_11 is left out: this server hosts no tools",
        "the tool code_interpreter is left out: this server hosts no tools",
    ]
    body = {"model": LM, "messages": CHAT, "tools": [*TOOLS, *hosted], "stream": stream}
    response = gateway.post("/v1/chat/completions", **body)
    assert response.headers["x-tritonlm-ignored"] == "; ".join(warnings)
    first = response.text.split("\n")[0].removeprefix("data: ")
    assert json.loads(first)["warnings"] == warnings
    assert response.text.count("left out") == len(warnings)
    assert sent_chat(gateway)["tools"] == TOOLS
    only_hosted = gateway.post("/v1/chat/completions", **{**body, "tools": hosted})
    assert only_hosted.status_code == 200
    assert "x-tritonlm-ignored" in only_hosted.headers
    assert sent_chat(gateway) == CHAT


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0]"), ({"tools": [{"type": "fuction", "function": {}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "function", "function": {"name": "a", "schema": {}}}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": TOOLS * 2}, "tools[1].function.name"), ({"tools": [{}] * 129}, "tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"separate_reasoning": "no"}, "separate_reasoning"), ({"chat_template_kwargs": 1}, "chat_template_kwargs"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(gateway: Gateway, body: dict[str, Any], param: str) -> None:
    response = gateway.post("/v1/chat/completions", **{"model": LM, "messages": CHAT, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_an_error_of_the_grammar_names_the_tools(gateway: Gateway) -> None:
    use(gateway, QWEN)
    name = "structured_outputs.grammar"
    gateway.transport.trouble = [InvalidRequest(f"{name}: uniqueItems is not supported; leave it out", name)]
    response = gateway.post("/v1/chat/completions", model=LM, messages=CHAT, tools=TOOLS)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert "uniqueItems" in response.json()["error"]["message"]


def test_markers_that_are_special_tokens_are_shown_to_the_parser(gateway: Gateway, sdk: openai.OpenAI) -> None:
    tokens = {"[TOOL_CALLS]": [5, True], "</s>": [2, True]}
    use(gateway, MISTRAL, chat_tokens=tokens)
    gateway.transport.answers = [
        ['[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]', "</s>"],
        ["a</s>"],
    ]
    answer = sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS).choices[0].message
    assert gateway.transport.calls[-1].parameters["skip_special_tokens"] is False
    assert answer.content is None
    assert answer.tool_calls
    # Its template demands ids of this form.
    assert re.fullmatch(r"[A-Za-z0-9]{9}", answer.tool_calls[0].id)
    assert "<[5]>" in sent_grammar(gateway)
    plain = sdk.chat.completions.create(model=LM, messages=CHAT).choices[0].message
    assert plain.content == "a</s>"
    assert "skip_special_tokens" not in gateway.transport.calls[-1].parameters


def test_a_template_of_single_calls_gets_single_calls(gateway: Gateway, sdk: openai.OpenAI) -> None:
    use(gateway, LLAMA)
    gateway.transport.answers = [["a"]]
    sdk.chat.completions.create(model=LM, messages=CHAT, tools=TOOLS)
    assert "{0,15}" not in sent_grammar(gateway)


def reasoning_of(message: Any) -> Any:
    return getattr(message, "reasoning_content", None)


def test_reasoning_is_apart_from_the_content(gateway: Gateway, sdk: openai.OpenAI) -> None:
    parts = ["<thi", "nk>\nRain", " or sun?\n</thi", "nk>\n", "\nSun."]
    gateway.transport.answers = [parts, parts, parts]
    message = sdk.chat.completions.create(model=LM, messages=CHAT).choices[0].message
    assert (message.content, reasoning_of(message)) == ("Sun.", "Rain or sun?")
    deltas = [chunk.choices[0].delta for chunk in sdk.chat.completions.create(model=LM, messages=CHAT, stream=True)]
    assert [reasoning_of(delta) for delta in deltas if reasoning_of(delta)] == ["Rain", " or sun?"]
    assert "".join(delta.content or "" for delta in deltas) == "Sun."
    raw = sdk.chat.completions.create(model=LM, messages=CHAT, extra_body={"separate_reasoning": False}).choices[0]
    assert (raw.message.content, reasoning_of(raw.message)) == ("".join(parts), None)


def test_an_answer_may_begin_inside_reasoning(gateway: Gateway, sdk: openai.OpenAI) -> None:
    use(gateway, REASONING)
    gateway.transport.generation_prompt = "<assistant><think>\n"
    gateway.transport.answers = [["Sun?</think>Sun."]]
    message = sdk.chat.completions.create(model=LM, messages=CHAT).choices[0].message
    assert (message.content, reasoning_of(message)) == ("Sun.", "Sun?")


def test_a_chat_as_text(gateway: Gateway) -> None:
    rendered = gateway.post("/apply-template", messages=CHAT, tools=TOOLS, add_generation_prompt=True)
    assert rendered.json() == {"prompt": "Weather in Paris?\nassistant:"}
    wrong = gateway.post("/apply-template", messages=CHAT, temperature=1)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "temperature")
    gateway.transport.has_chats = False
    assert gateway.post("/apply-template", messages=CHAT).status_code == 501


def test_the_options_of_the_prompt_reach_the_template(gateway: Gateway) -> None:
    options = {
        "documents": [{"text": "a"}], "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "none",
        "add_generation_prompt": False, "continue_final_message": True,
    }  # fmt: skip
    gateway.transport.answers = [["more"]]
    chat = [*CHAT, {"role": "assistant", "content": "It "}]
    response = gateway.post("/v1/chat/completions", model=LM, messages=chat, **options)
    assert response.json()["choices"][0]["message"]["content"] == "more"
    assert sent_chat(gateway) == {"messages": chat, **options}


@pytest.mark.parametrize(("template", "warnings"), [(QWEN, 0), (MISTRAL, 1)])
def test_an_effort_that_the_template_does_not_take_is_named(gateway: Gateway, template: str, warnings: int) -> None:
    use(gateway, template)
    body = {"model": LM, "messages": CHAT, "reasoning_effort": "low"}
    response = gateway.post("/v1/chat/completions", **body)
    assert response.status_code == 200, response.text
    named = response.json().get("warnings") or []
    assert [warning.split()[0] for warning in named] == ["reasoning_effort"] * warnings
    assert ("x-tritonlm-ignored" in response.headers) == bool(warnings)
    assert sent_chat(gateway)["reasoning_effort"] == "low"
    rendered = gateway.post("/apply-template", messages=CHAT, reasoning_effort="low")
    assert rendered.status_code == 200, rendered.text
