"""`chat.completions.parse`: the schema that is sent, the instances that come back, and the ends that have none."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from fakes.chat_templates import QWEN
from fakes.fake_transport import ABOUT_LM, LM, FakeTransport
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tritonlm import Client
from tritonlm.client.parsing import AnswerCutOff
from tritonlm.contract import InvalidRequest

CHAT = [{"role": "user", "content": "Which animal?"}]


class Home(BaseModel):
    default: str


class Animal(BaseModel):
    name: str
    legs: int = Field(4, ge=0)
    homes: list[Home] = []
    kind: Literal["pet", "wild"] = "wild"

    @field_validator("name")
    @classmethod
    def _is_an_animal(cls, name: str) -> str:
        assert name != "stone", "a stone is no animal"
        return name


class Free(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str


def transport_of(*answers: str) -> FakeTransport:
    transport = FakeTransport()
    transport.answers = [[answer] for answer in answers]
    return transport


def sent_schema(transport: FakeTransport) -> dict[str, Any]:
    schema: dict[str, Any] = transport.calls[-1].parameters["structured_outputs"]["json"]
    return schema


def test_an_answer_is_an_instance_of_the_model() -> None:
    transport = transport_of('{"name": "fox", "homes": [{"default": "den"}]}')
    with Client(transports=[transport]) as client:
        completion = client.chat.completions.parse(LM, CHAT, response_format=Animal, max_tokens=50)
    message = completion.choices[0].message
    assert message.parsed == Animal(name="fox", homes=[Home(default="den")])
    assert json.loads(message.content or "")["name"] == "fox"
    assert (message.refusal, completion.choices[0].finish_reason) == (None, "stop")
    dumped = completion.to_dict()
    assert dumped["choices"][0]["message"]["parsed"]["homes"] == [{"default": "den"}]
    assert set(dumped) == {"id", "object", "created", "model", "choices", "usage"}


def test_the_schema_allows_no_fields_beside_the_models() -> None:
    transport = transport_of('{"name": "fox"}', '{"name": "fox", "age": 3}')
    with Client(transports=[transport]) as client:
        client.chat.completions.parse(LM, CHAT, response_format=Animal)
        schema = sent_schema(transport)
        assert schema["additionalProperties"] is schema["$defs"]["Home"]["additionalProperties"] is False
        assert schema["required"] == ["name"]
        free = client.chat.completions.parse(LM, CHAT, response_format=Free).choices[0].message.parsed
    assert sent_schema(transport)["additionalProperties"] is True
    assert free is not None
    assert free.model_extra == {"age": 3}


def test_an_answer_that_is_cut_off_says_so_and_has_its_text() -> None:
    with Client(transports=[FakeTransport()]) as client, pytest.raises(AnswerCutOff) as cut:
        client.chat.completions.parse(LM, CHAT, response_format=Animal, max_tokens=3)
    assert cut.value.param == "max_tokens"
    assert "by length after 3 tokens" in cut.value.message
    assert cut.value.completion.choices[0].message.content


def test_calls_of_tools_take_the_place_of_the_instance() -> None:
    transport = transport_of('<tool_call>\n{"name": "noop", "arguments": {}}\n</tool_call>')
    transport.about = {**ABOUT_LM, "chat_template": QWEN}
    tools = [{"type": "function", "function": {"name": "noop"}}]
    with Client(transports=[transport]) as client:
        message = client.chat.completions.parse(LM, CHAT, response_format=Animal, tools=tools).choices[0].message
    assert message.parsed is None
    assert [call.function.name for call in message.tool_calls or ()] == ["noop"]


def test_each_choice_is_parsed() -> None:
    transport = transport_of('{"name": "fox"}', '{"name": "owl", "legs": 2}')
    with Client(transports=[transport]) as client:
        completion = client.chat.completions.parse(LM, CHAT, response_format=Animal, n=2)
    assert {choice.message.parsed.name for choice in completion.choices if choice.message.parsed} == {"fox", "owl"}


def test_what_the_models_own_validators_refuse_is_pydantics_error() -> None:
    transport = transport_of('{"name": "stone"}')
    with Client(transports=[transport]) as client, pytest.raises(ValidationError, match="no animal"):
        client.chat.completions.parse(LM, CHAT, response_format=Animal)


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": Animal, "stream": True}, "stream"),
        ({"response_format": Animal, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": Animal, "temperature": 7}, "temperature"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], param: str) -> None:
    transport = FakeTransport()
    with Client(transports=[transport]) as client, pytest.raises(InvalidRequest) as refusal:
        client.chat.completions.parse(LM, CHAT, **arguments)
    assert refusal.value.param == param
    assert transport.calls == []
