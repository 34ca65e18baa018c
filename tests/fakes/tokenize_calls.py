"""Calls the model `tokenize`: inputs in, ids and request (or the error) out."""

from __future__ import annotations

from typing import Any

import numpy as np
from tritonlm.contract import GenerationRequest, TritonLMError
from tritonlm.contract.errors import from_wire
from tritonlm.contract.tensors import LM_INPUTS, PROMPT_IDS, REQUEST, TOKENIZE_OUTPUTS, Array

from fakes.fake_pb_utils import InferenceRequest

SPECS = {spec.name: spec for spec in LM_INPUTS}
OUTPUTS = [spec.name for spec in TOKENIZE_OUTPUTS]


def request_of(parameters: dict[str, object] | None = None, **inputs: Any) -> InferenceRequest:
    arrays = {
        name: value if isinstance(value, np.ndarray) else SPECS[name].pack(value) for name, value in inputs.items()
    }
    return InferenceRequest(arrays, OUTPUTS, parameters)


def call(model: Any, *requests: InferenceRequest) -> list[tuple[list[int], GenerationRequest] | TritonLMError]:
    results: list[tuple[list[int], GenerationRequest] | TritonLMError] = []
    for response in model.execute(list(requests)):
        if response.error() is not None:
            results.append(from_wire(response.error().message()))
            continue
        arrays: dict[str, Array] = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        ids = [int(token_id) for token_id in arrays[PROMPT_IDS.name].reshape(-1)]
        assert arrays[PROMPT_IDS.name].dtype == np.int32
        results.append((ids, GenerationRequest.from_json(REQUEST.text(arrays[REQUEST.name]))))
    return results


def ids_of(model: Any, parameters: dict[str, object] | None = None, **inputs: Any) -> list[int]:
    """Request the output prompt_ids only."""
    arrays = {name: SPECS[name].pack(value) for name, value in inputs.items()}
    (response,) = model.execute([InferenceRequest(arrays, [PROMPT_IDS.name], parameters)])
    assert response.error() is None, response.error().message()
    (tensor,) = response.output_tensors()
    return [int(token_id) for token_id in tensor.as_numpy().reshape(-1)]


def accepted(
    model: Any, parameters: dict[str, object] | None = None, **inputs: Any
) -> tuple[list[int], GenerationRequest]:
    (result,) = call(model, request_of(parameters, **inputs))
    assert isinstance(result, tuple), f"refused: {result}"
    return result


def refused(model: Any, parameters: dict[str, object] | None = None, **inputs: Any) -> TritonLMError:
    (result,) = call(model, request_of(parameters, **inputs))
    assert isinstance(result, TritonLMError), "accepted"
    return result
