"""Triton's side of `detokenize`: a chunk in, its text out, the rest passed on as it came.

It answers whatever happens: an error in the middle of a stream would leave the ensemble with responses that it never
releases. What cannot be turned into text becomes an empty text and a line in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils
from tritonlm.contract import Checkpoint, Chunk
from tritonlm.contract.adapter import error_response, inputs_of, log_failure, response
from tritonlm.contract.priority import step_back
from tritonlm.contract.tensors import LOGPROBS, PASSED_ON, TEXT_OUTPUT, Array, TensorSpec
from tritonlm.hub import checkpoint_folder

from .detokenizer import Detokenizer


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        checkpoint = Checkpoint(checkpoint_folder(args))
        checkpoint.check(weights=False)
        step_back()
        self._detokenizer = Detokenizer(checkpoint)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = inputs_of(request)
        except Exception as error:
            # Not a chunk of ours: the ensemble's batches hold one row.
            return error_response(pb_utils, error)
        wanted = request.requested_output_names()
        text = _or_empty(lambda: self._detokenizer.text(Chunk.from_arrays(inputs)))
        logprobs = ""
        if LOGPROBS.name in wanted:
            logprobs = _or_empty(lambda: self._detokenizer.logprobs(Chunk.from_arrays(inputs), text))
        arrays: dict[TensorSpec, Array] = {TEXT_OUTPUT: TEXT_OUTPUT.pack(text), LOGPROBS: LOGPROBS.pack(logprobs)}
        arrays |= {spec: inputs[spec.name] for spec in PASSED_ON if spec.name in inputs}
        return response(pb_utils, arrays, wanted)


def _or_empty(make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:
        log_failure(pb_utils, error)
        return ""
