"""Triton's requests to arrays and back, with a fake of Triton's module."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fakes import fake_pb_utils
from fakes.fake_pb_utils import InferenceRequest, Logger, TritonError
from tritonlm.checkpoints.resolve import checkpoint_folder
from tritonlm.contract import CheckpointError, ContextLengthExceeded, InvalidRequest, NotOffered, TritonLMError
from tritonlm.contract.errors import ERRORS, from_wire
from tritonlm.contract.tensors import INPUT_IDS, SEED, STREAM, TEXT_INPUT, TEXT_OUTPUT, Array
from tritonlm.contract.triton_requests import (
    checkpoint_reference,
    error_response,
    flat_parameters,
    inputs_of,
    model_parameters,
    response,
    text_of,
)


def request_of(parameters: dict[str, object] | None = None, **inputs: Array) -> InferenceRequest:
    return InferenceRequest(inputs, [], parameters)


def test_inputs_are_copies_by_name() -> None:
    sent = INPUT_IDS.pack([1, 2, 3])
    received = inputs_of(request_of(input_ids=sent, stream=STREAM.pack(True)))
    assert sorted(received) == ["input_ids", "stream"]
    sent[0, 0] = 99
    assert received["input_ids"].tolist() == [[1, 2, 3]]


def test_a_batch_of_prompts_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="batch size") as refusal:
        inputs_of(request_of(input_ids=np.zeros((2, 3), np.int32)))
    assert refusal.value.param == "input_ids"


def test_text_is_decoded_strictly() -> None:
    assert text_of(TEXT_INPUT, {}) is None
    assert text_of(TEXT_INPUT, {"text_input": TEXT_INPUT.pack("naïve 猫")}) == "naïve 猫"
    for bad, message in (
        (np.array([[b"a\xff"]], dtype=object), "UTF-8"),
        (np.array([[b"a", b"b"]], dtype=object), "one"),
    ):
        with pytest.raises(InvalidRequest, match=message) as refusal:
            text_of(TEXT_INPUT, {"text_input": bad})
        assert refusal.value.param == "text_input"


def test_tritons_own_parameters_are_left_out() -> None:
    triton_parameters = {"id": "r1", "sequence_id": 0, "sequence_start": True, "sequence_end": False}
    triton_parameters |= {"binary_data_output": True, "triton_enable_empty_final_response": True}
    sampling_parameters = {"temperature": 0.5, "stop": "x", "unknown": 1}
    assert flat_parameters(request_of({**triton_parameters, **sampling_parameters})) == sampling_parameters
    assert flat_parameters(request_of({})) == {}


def test_a_response_holds_the_requested_outputs() -> None:
    arrays = {TEXT_OUTPUT: TEXT_OUTPUT.pack("hello"), SEED: SEED.pack(7)}
    result = response(fake_pb_utils, arrays, ["seed"])
    assert [(tensor.name(), tensor.as_numpy().tolist()) for tensor in result.output_tensors()] == [("seed", [[7]])]


@pytest.mark.parametrize("kind", [TritonLMError, *ERRORS])
def test_every_error_has_a_triton_code_and_survives_the_wire(kind: type[TritonLMError]) -> None:
    error = error_response(fake_pb_utils, kind("Sorry.", "stop")).error()
    assert error.code() == getattr(TritonError, kind.triton_code)
    received = from_wire(error.message())
    assert (type(received), received.message, received.param) == (kind, "Sorry.", "stop")


def test_codes_that_callers_rely_on() -> None:
    def code(error: Exception) -> int:
        result: int = error_response(fake_pb_utils, error).error().code()
        return result

    assert code(ContextLengthExceeded.for_lengths(1, 2, 3)) == TritonError.INVALID_ARG
    assert code(NotOffered("no")) == TritonError.INVALID_ARG
    assert code(ValueError("x")) == TritonError.INTERNAL


def test_an_internal_error_is_only_logged() -> None:
    Logger.errors.clear()
    try:
        raise KeyError("secret/path")
    except KeyError as caught:
        error = error_response(fake_pb_utils, caught).error()
    assert "secret" not in error.message()
    assert "Traceback" not in error.message()
    assert "internal error" in error.message()
    assert "Traceback" in Logger.errors[0]
    assert "secret/path" in Logger.errors[0]


def test_an_error_with_a_lone_surrogate_can_be_sent() -> None:
    assert "?" in error_response(fake_pb_utils, InvalidRequest("got \ud800")).error().message()


def test_the_models_parameters_and_its_checkpoint(tmp_path: Path) -> None:
    def args(parameters: dict[str, object]) -> dict[str, str]:
        (tmp_path / "generate").mkdir(exist_ok=True)
        return {"model_config": json.dumps(parameters), "model_repository": str(tmp_path / "generate")}

    arguments = args({"parameters": {"checkpoint": {"string_value": "../tiny/1"}, "threads": {"string_value": "2"}}})
    assert model_parameters(arguments) == {"checkpoint": "../tiny/1", "threads": "2"}
    assert checkpoint_reference(arguments) == "../tiny/1"
    (tmp_path / "tiny" / "1").mkdir(parents=True)
    assert checkpoint_folder(arguments) == (tmp_path / "tiny" / "1").resolve()
    nothing_named: list[dict[str, object]] = [
        {},
        {"parameters": {}},
        {"parameters": {"checkpoint": {"string_value": ""}}},
    ]
    for parameters in nothing_named:
        with pytest.raises(CheckpointError, match="names no checkpoint"):
            checkpoint_reference(args(parameters))
