"""What the three `model.py` share: Triton's requests turned into arrays and parameters, answers turned back.

Triton's module `triton_python_backend_utils` exists only inside a model's process, so it comes in as the argument
`pb_utils`. This file knows its classes, and nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from .errors import CheckpointError, InvalidRequest, TritonLMError
from .tensors import Array, TensorSpec

# Of the trace that a request belongs to (W3C); whoever makes no traces passes over it.
_TRACEPARENT = "traceparent"
# What is among a request's parameters and not for sampling: what Triton puts there itself.
_NOT_OURS = ("id", "sequence_id", "sequence_start", "sequence_end", "binary_data_output", _TRACEPARENT)
_TRITONS_PREFIX = "triton_"


def inputs_of(request: Any) -> dict[str, Array]:
    """The inputs that were sent, by name: copies, so that they outlive the request."""
    arrays = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
    for name, array in arrays.items():
        if array.ndim == 0 or array.shape[0] != 1:
            rows = array.shape[0] if array.ndim else 0
            raise InvalidRequest(f"{name} must have a batch size of 1 (got {rows}); send a request per prompt", name)
    return arrays


def text_of(spec: TensorSpec, arrays: Mapping[str, Array]) -> str | None:
    """The one string of an optional STRING input that a caller sent; None: not sent."""
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
    """The request's parameters without those of Triton's own."""
    parameters: dict[str, Any] = json.loads(request.parameters() or "{}")
    return {
        name: value
        for name, value in parameters.items()
        if name not in _NOT_OURS and not name.startswith(_TRITONS_PREFIX)
    }


def trace_of(request: Any) -> str:
    """What names the trace that the request belongs to; empty where there is none."""
    return str(json.loads(request.parameters() or "{}").get(_TRACEPARENT, ""))


def response(pb_utils: Any, arrays: Mapping[TensorSpec, Array], wanted: Collection[str]) -> Any:
    """A response with those of the outputs that the caller wants: Triton 24.10 miscounts references to the others."""
    outputs = [pb_utils.Tensor(spec.name, array) for spec, array in arrays.items() if spec.name in wanted]
    return pb_utils.InferenceResponse(output_tensors=outputs)


def error_response(pb_utils: Any, error: BaseException) -> Any:
    """A response that carries an error. One that is not meant for callers goes to the log, and they learn no more."""
    if not isinstance(error, TritonLMError):
        log_failure(pb_utils, error)
        error = TritonLMError("internal error; the server's log has the details")
    # A lone surrogate, quoted from the caller's JSON, would not survive the way into Triton.
    text = error.to_wire().encode("utf-8", "replace").decode()
    code = getattr(pb_utils.TritonError, error.triton_code)
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(text, code))


def log_failure(pb_utils: Any, error: BaseException) -> None:
    pb_utils.Logger.log_error("".join(traceback.format_exception(error)).encode("utf-8", "replace").decode())


def model_parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The `parameters` of a model's config.pbtxt, from the arguments of its `initialize`."""
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return {name: value["string_value"] for name, value in parameters.items()}


def named_checkpoint(args: Mapping[str, str]) -> str:
    """The checkpoint as a model's config.pbtxt names it (see `tritonlm.checkpoints.hub`)."""
    named = model_parameters(args).get("checkpoint")
    if not named:
        raise CheckpointError('config.pbtxt names no checkpoint; add the parameter "checkpoint", such as ../abacus/1')
    return named
