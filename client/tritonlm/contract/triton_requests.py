"""Shared by the three `model.py`: converts Triton requests to arrays and parameters, and results to responses.

Triton's module `triton_python_backend_utils` exists only inside a model's process, so it is passed as the argument
`pb_utils`. This module knows its classes, and nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Collection, Mapping
from typing import Any

from .errors import CheckpointError, InvalidRequest, TritonLMError
from .tensors import Array, TensorSpec

# The request's trace (W3C); ignored when tracing is off.
_TRACEPARENT = "traceparent"
# Request parameters that Triton itself adds; they are not sampling parameters.
_TRITON_PARAMETERS = ("id", "sequence_id", "sequence_start", "sequence_end", "binary_data_output", _TRACEPARENT)
_TRITON_PREFIX = "triton_"


def inputs_of(request: Any) -> dict[str, Array]:
    """The request's inputs by name, copied so that they outlive the request."""
    arrays = {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}
    for name, array in arrays.items():
        if array.ndim == 0 or array.shape[0] != 1:
            rows = array.shape[0] if array.ndim else 0
            raise InvalidRequest(f"{name} must have a batch size of 1 (got {rows}); send a request per prompt", name)
    return arrays


def text_of(spec: TensorSpec, arrays: Mapping[str, Array]) -> str | None:
    """The string of an optional STRING input; None if it was not sent."""
    if spec.name not in arrays:
        return None
    array = arrays[spec.name]
    if array.size != 1:
        raise InvalidRequest(f"{spec.name} must be one string (got {array.size})", spec.name)
    try:
        return spec.text(array)
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{spec.name} is not valid UTF-8 ({error.reason} at byte {error.start})", spec.name
        ) from None


def flat_parameters(request: Any) -> dict[str, Any]:
    """The request's parameters without Triton's own."""
    parameters: dict[str, Any] = json.loads(request.parameters() or "{}")
    return {
        name: value
        for name, value in parameters.items()
        if name not in _TRITON_PARAMETERS and not name.startswith(_TRITON_PREFIX)
    }


def trace_of(request: Any) -> str:
    """The request's W3C traceparent; empty if it has none."""
    return str(json.loads(request.parameters() or "{}").get(_TRACEPARENT, ""))


def response(pb_utils: Any, arrays: Mapping[TensorSpec, Array], requested: Collection[str]) -> Any:
    """A response with the requested outputs only: Triton 24.10 miscounts references to the others."""
    outputs = [pb_utils.Tensor(spec.name, array) for spec, array in arrays.items() if spec.name in requested]
    return pb_utils.InferenceResponse(output_tensors=outputs)


def error_response(pb_utils: Any, error: BaseException) -> Any:
    """An error response. An internal error is logged, and the caller gets a general message."""
    if not isinstance(error, TritonLMError):
        log_failure(pb_utils, error)
        error = TritonLMError("internal error; the server's log has the details")
    # Triton rejects a lone surrogate, which the caller's JSON may contain.
    text = error.to_wire().encode("utf-8", "replace").decode()
    code = getattr(pb_utils.TritonError, error.triton_code)
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(text, code))


def log_failure(pb_utils: Any, error: BaseException) -> None:
    pb_utils.Logger.log_error("".join(traceback.format_exception(error)).encode("utf-8", "replace").decode())


def model_parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The `parameters` of a model's config.pbtxt, from the arguments of its `initialize`."""
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return {name: value["string_value"] for name, value in parameters.items()}


def checkpoint_reference(args: Mapping[str, str]) -> str:
    """The parameter `checkpoint` of a model's config.pbtxt: a folder or a Hub reference (`checkpoints.hub`)."""
    reference = model_parameters(args).get("checkpoint")
    if not reference:
        raise CheckpointError('config.pbtxt names no checkpoint; add the parameter "checkpoint", such as ../abacus/1')
    return reference
