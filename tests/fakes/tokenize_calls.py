"""Calls to the model `tokenize` as a caller would make them: inputs in, ids and request (or the error) out."""

from __future__ import annotations

from typing import Any

import numpy as np
from tritonlm.contract import GenerationRequest, TritonLMError
from tritonlm.contract.errors import from_wire
from tritonlm.contract.tensors import LM_INPUTS, PROMPT_IDS, REQUEST, TOKENIZE_OUTPUTS, Array

from fakes.fake_pb_utils import InferenceRequest

SPECS = {spec.name: spec for spec in LM_INPUTS}
WANTED = [spec.name for spec in TOKENIZE_OUTPUTS]


def request_of(parameters: dict[str, object] | None = None, **inputs: Any) -> InferenceRequest:
    arrays = {
        name: value if isinstance(value, np.ndarray) else SPECS[name].pack(value) for name, value in inputs.items()
    }
    return InferenceRequest(arrays, WANTED, parameters)


def answers(model: Any, *requests: InferenceRequest) -> list[tuple[list[int], GenerationRequest] | TritonLMError]:
    found: list[tuple[list[int], GenerationRequest] | TritonLMError] = []
    for answer in model.execute(list(requests)):
        if answer.error() is not None:
            found.append(from_wire(answer.error().message()))
            continue
        arrays: dict[str, Array] = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
        ids = [int(token_id) for token_id in arrays[PROMPT_IDS.name].reshape(-1)]
        assert arrays[PROMPT_IDS.name].dtype == np.int32
        found.append((ids, GenerationRequest.from_json(REQUEST.text(arrays[REQUEST.name]))))
    return found


def ids_of(model: Any, parameters: dict[str, object] | None = None, **inputs: Any) -> list[int]:
    """As a caller that wants the output prompt_ids alone."""
    arrays = {name: SPECS[name].pack(value) for name, value in inputs.items()}
    (answer,) = model.execute([InferenceRequest(arrays, [PROMPT_IDS.name], parameters)])
    assert answer.error() is None, answer.error().message()
    (tensor,) = answer.output_tensors()
    return [int(token_id) for token_id in tensor.as_numpy().reshape(-1)]


def accepted(
    model: Any, parameters: dict[str, object] | None = None, **inputs: Any
) -> tuple[list[int], GenerationRequest]:
    (found,) = answers(model, request_of(parameters, **inputs))
    assert isinstance(found, tuple), f"refused: {found}"
    return found


def refused(model: Any, parameters: dict[str, object] | None = None, **inputs: Any) -> TritonLMError:
    (found,) = answers(model, request_of(parameters, **inputs))
    assert isinstance(found, TritonLMError), "accepted"
    return found
