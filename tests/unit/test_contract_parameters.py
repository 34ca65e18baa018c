"""Parameters survive the conversion to JSON, and every bad value is refused by name."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonlm.contract import GenerationRequest, InvalidRequest, SamplingParameters
from tritonlm.contract.control import COMMANDS, Command

ids = st.lists(st.integers(0, 10**6), max_size=5).map(tuple)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.none() | st.integers(20, 10**6),
    "min_tokens": st.integers(0, 20),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(-1, 10**6),
    "top_p": st.floats(0, 1, exclude_min=True),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 10),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100), max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "choice": st.integers(0, 1023),
    "stop": st.lists(st.text(min_size=1, max_size=256), min_size=1, max_size=16).map(tuple),
    "stop_token_ids": ids,
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "logprobs": st.none() | st.integers(0, 20),
    "echo": st.booleans(),
    "logprobs_start": st.integers(0, 10**6),
    "truncate_prompt_tokens": st.none() | st.integers(1, 10**6),
    "add_special_tokens": st.booleans(),
    "structured_outputs": st.sampled_from(({}, {"json": {"type": "object"}}, {"regex": "a+"}, {"choice": ["a", "é"]})),
    "adapter": st.from_regex(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})?", fullmatch=True),
    "cache_salt": st.text(max_size=256),
    "return_token_ids": st.booleans(),
    "as_piece": st.booleans(),
    "resume_token_ids": ids,
    "priority": st.integers(1, 3),
    "timeout": st.none() | st.floats(0, 86_400, exclude_min=True),
}
valid = st.builds(SamplingParameters, **{**VALID, "logprobs_start": st.just(0)}) | st.builds(
    SamplingParameters, **{**VALID, "echo": st.just(True), "logprobs": st.integers(0, 20)}
)
# Every name, each with values just outside its range and of other types.
REFUSED: dict[str, list[Any]] = {
    "max_tokens": [-1, 0, 1.5, "5", True, [5], 10**7],
    "min_tokens": [-1, 2.5, "1", 10**7],
    "temperature": [-0.1, 2.1, "warm", True, float("nan"), float("inf"), 10**400],
    "top_k": [-2, 0.5, "all"],
    "top_p": [0, -1, 1.01, "1", float("nan")],
    "min_p": [-0.1, 1.1, [0.5]],
    "repetition_penalty": [0, 1e-39, -1, 10.5, {}],
    "presence_penalty": [-2.1, 2.1, "0"],
    "frequency_penalty": [-2.1, 2.1, False],
    "logit_bias": [{"x": 1}, {"5": 101}, {"5": "1"}, {"-1": 1}, {"9" * 5000: 1}, {"٣": 1}, [5], "5", 5],
    "seed": [2**63, -(2**63) - 1, 1.5, "1", True],
    "choice": [-1, 1024, "0"],
    "stop": [[], "", [""], ["a"] * 17, [5], 5, "x" * 257, {"a": 1}],
    "stop_token_ids": [[-1], ["5"], [True], [1.0], 5, [1] * 1025],
    "ignore_eos": [1, "true", []],
    "skip_special_tokens": [0, "false"],
    "logprobs": [-1, 21, True, "5"],
    "echo": ["yes", 1],
    "logprobs_start": [-1, 1.5, "2", 10**7],
    "truncate_prompt_tokens": [0, -5, 1.5, "all"],
    "add_special_tokens": [1, "true"],
    "structured_outputs": [[], 5, {}, {"xml": "a"}, {"json": {}, "regex": "a"}],
    "adapter": [5, ["a"], ".a", "-a", "a/b", "a b", "a\n", "é", "a" * 65, {}],
    "cache_salt": [5, ["a"], "a" * 257, True],
    "return_token_ids": [1, "true"],
    "as_piece": [1, "true"],
    "resume_token_ids": [[-1], "5", [[1]]],
    "priority": [0, 4, "high"],
    "timeout": [0, -1, 86_401, "10", float("inf")],
}


def test_the_test_data_covers_every_parameter() -> None:
    names = {spec.name for spec in fields(SamplingParameters)}
    assert names == set(VALID) == set(REFUSED)


@settings(deadline=None)
@given(valid)
def test_parameters_survive_the_conversion_to_json(parameters: SamplingParameters) -> None:
    sent = json.dumps(parameters.to_mapping())
    assert SamplingParameters.from_json(sent, {}) == parameters


@given(valid, st.booleans(), st.booleans())
@settings(deadline=None)
def test_the_request_survives_the_conversion_to_json(
    parameters: SamplingParameters, stream: bool, include: bool
) -> None:
    request = GenerationRequest(parameters, stream, include)
    assert GenerationRequest.from_json(request.to_json()) == request


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParameters.from_mapping({name: value})
    assert refusal.value.param == name
    assert name in refusal.value.message
    assert len(refusal.value.message) < 300


@pytest.mark.parametrize("name", sorted(VALID))
def test_null_means_not_sent(name: str) -> None:
    assert SamplingParameters.from_mapping({name: None}) == SamplingParameters()


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), st.lists), st.data())
@settings(deadline=None)
def test_any_value_is_accepted_or_refused_with_a_short_message(value: object, data: st.DataObject) -> None:
    check_refusal(data.draw(st.sampled_from(sorted(VALID)) | st.text()), value)


def test_a_long_name_of_wide_characters_is_refused_with_a_short_message() -> None:
    check_refusal("\x80" * 40 + "\uf8ff" * 40, None)


def check_refusal(name: str, value: object) -> None:
    refusal = None
    try:
        SamplingParameters.from_mapping({name: value})
    except InvalidRequest as error:
        refusal = error
    assert refusal is None or len(refusal.to_wire()) < 1000


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"resume_token_ids": [1]}, "seed"),
        ({"logprobs_start": 1, "echo": True}, "logprobs_start"),
        ({"logprobs_start": 1, "logprobs": 0}, "logprobs_start"),
        ({"max_tokns": 5}, "max_tokns"),
        ({"n" * 1000: 5}, "n" * 64),
        # The last character does not fit.
        ({"\x80" + "€" * 1000: 5}, "\x80" + "€" * 20),
    ],
)
def test_inconsistent_values_are_refused(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParameters.from_mapping(values)
    assert refusal.value.param == param
    assert len(refusal.value.message) < 600


def test_max_tokens_may_be_0_with_echo() -> None:
    assert SamplingParameters.from_mapping({"max_tokens": 0, "echo": True}).max_tokens == 0


@pytest.mark.parametrize("text", ["{", "[]", "5", '"x"', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"])
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParameters.from_json(text, {})
    assert refusal.value.param == "sampling_parameters"


def test_json_and_flat_parameters_are_merged_without_duplicates() -> None:
    both = SamplingParameters.from_json('{"top_k": 5}', {"max_tokens": 3})
    assert (both.top_k, both.max_tokens) == (5, 3)
    with pytest.raises(InvalidRequest, match="twice") as refusal:
        SamplingParameters.from_json('{"top_k": 5}', {"top_k": 5})
    assert refusal.value.param == "top_k"


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_survive_the_conversion_to_json(name: str) -> None:
    command = Command(name, "request-1")
    assert Command.from_json(command.to_json()) == command


@pytest.mark.parametrize(
    "text",
    ["", "5", "[]", "{}", '{"command": "stop"}', '{"command": "cancel"}', '{"command": "ping", "id": 5}', "[" * 10**5],
)
def test_bad_commands_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        Command.from_json(text)
    assert refusal.value.param == "control"
