"""All names of structured outputs mean one parameter, as objects and as JSON strings; wrong forms are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tritonlm.contract import InvalidRequest, SamplingParameters
from tritonlm.contract.structured_outputs import MAX_CHARACTERS, MAX_CHOICES, MAX_DEPTH

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
SAME: list[tuple[str, Any, dict[str, Any]]] = [
    ("structured_outputs", {"json": SCHEMA}, {"json": SCHEMA}),
    ("structured_outputs", {"json": json.dumps(SCHEMA), "regex": None}, {"json": SCHEMA}),
    ("structured_outputs", {"json": True}, {"json": True}),
    ("structured_outputs", {"json_object": True}, {"json_object": True}),
    ("guided_json", SCHEMA, {"json": SCHEMA}),
    ("guided_regex", "[0-9]+", {"regex": "[0-9]+"}),
    ("guided_choice", ("yes", "no"), {"choice": ["yes", "no"]}),
    ("guided_grammar", 'start: "a"', {"grammar": 'start: "a"'}),
    ("response_format", {"type": "text"}, {}),
    ("response_format", {"type": "json_object"}, {"json_object": True}),
    (
        "response_format",
        {
            "type": "json_schema",
            "json_schema": {"name": "answer", "description": "d", "schema": SCHEMA, "strict": True},
        },
        {"json": SCHEMA},
    ),
]


@pytest.mark.parametrize(("name", "value", "expected"), SAME)
def test_every_name_means_the_same_parameter(name: str, value: Any, expected: dict[str, Any]) -> None:
    parameters = SamplingParameters.from_mapping({name: value})
    assert parameters.structured_outputs == expected
    # The order of a schema's properties is that of the text.
    assert json.dumps(parameters.to_mapping().get("structured_outputs", {})) == json.dumps(expected)
    # Triton's flat parameters hold no objects and lists.
    flat = value if isinstance(value, str) else json.dumps(value)
    assert SamplingParameters.from_json("", {name: flat}) == parameters


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice"),
    ({"structured_outputs": {"disable_fallback": True}}, "structured_outputs", "disable_fallback is not known"),
    ({"structured_outputs": {"": True}}, "structured_outputs", "is not known"),
    ({"response_format": {"type": "text", "": 1}}, "response_format", "is not known"),
    ({"structured_outputs": "nonsense"}, "structured_outputs", "not valid JSON"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "must be a JSON schema"),
    ({"structured_outputs": {"json": {"const": float("nan")}}}, "structured_outputs.json", "must be a JSON schema"),
    ({"structured_outputs": {"json": deep(MAX_DEPTH + 1)}}, "structured_outputs.json", f"{MAX_DEPTH} levels"),
    ({"structured_outputs": {"json": {"title": "x" * MAX_CHARACTERS}}}, "structured_outputs.json", "characters"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", "must be true"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "not empty"),
    ({"structured_outputs": {"regex": "x" * (MAX_CHARACTERS + 1)}}, "structured_outputs.regex", "characters"),
    ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex", "surrogate"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "a list of 1 to"),
    ({"structured_outputs": {"choice": ["a"] * (MAX_CHOICES + 1)}}, "structured_outputs.choice", "a list of 1 to"),
    ({"structured_outputs": {"grammar": ["start"]}}, "structured_outputs.grammar", "a string"),
    ({"guided_choice": ["a", 5]}, "guided_choice", "strings"),
    ({"guided_json": {}, "response_format": {"type": "text"}}, "guided_json", "response_format and guided_json"),
    ({"response_format": "json"}, "response_format", "not valid JSON"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "one of text, json_object, json_schema"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "schema is not known"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be an object such as"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}},
        "response_format.json_schema.strict", "true or false",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "mode": 1}}},
        "response_format.json_schema", "mode is not known",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "param", "message"), REFUSED)
def test_a_wrong_form_is_refused_by_name(values: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParameters.from_mapping(values)
    assert refusal.value.param == param
    assert message in refusal.value.message


def test_the_deepest_schema_is_accepted() -> None:
    schema = deep(MAX_DEPTH)
    assert SamplingParameters.from_mapping({"guided_json": schema}).structured_outputs == {"json": schema}
