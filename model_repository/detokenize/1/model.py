"""The Triton adapter of `detokenize`: a chunk in, its text and the other outputs of the ensemble out.

It never fails on a chunk of `generate`: an error within a stream would leave responses in the ensemble that are never
released. If a chunk cannot be decoded, its text is empty and the error is logged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils
from tritonlm.checkpoints.resolve import checkpoint_folder
from tritonlm.contract import Checkpoint, Chunk, tensors
from tritonlm.contract.priority import lower_thread_priority
from tritonlm.contract.triton_requests import error_response, inputs_of, log_failure, response, text_of

from .detokenizer import Detokenizer


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        checkpoint = Checkpoint(checkpoint_folder(args))
        checkpoint.check(weights=False)
        lower_thread_priority()
        self._detokenizer = Detokenizer(checkpoint)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            chunk = Chunk.from_json(text_of(tensors.CHUNK, inputs_of(request)) or "")
        except Exception as error:
            # The input is not a chunk of `generate`, so it does not come from an ensemble.
            return error_response(pb_utils, error)
        text = _or_empty(lambda: self._detokenizer.text(chunk))
        values: dict[tensors.TensorSpec, object] = {
            tensors.TEXT_OUTPUT: text,
            tensors.CHUNK_INDEX: chunk.index,
            tensors.FINISH_REASON: chunk.finish_reason,
            tensors.USAGE: (chunk.usage.prompt, chunk.usage.completion, chunk.usage.cached),
            tensors.TOKEN_IDS: chunk.token_ids,
            tensors.SEED: chunk.seed,
            tensors.LOGPROBS: _or_empty(lambda: self._detokenizer.logprobs(chunk, text)),
        }
        if chunk.as_piece:
            piece = {spec.name: value for spec, value in values.items()}
            values = {tensors.PIECE: json.dumps({**piece, "stop": chunk.stop} if chunk.stop else piece)}
        # In an ensemble Triton requests all outputs, whatever the caller requested. Outputs left out here are not sent.
        outputs = request.requested_output_names()
        return response(
            pb_utils, {spec: spec.pack(value) for spec, value in values.items() if spec.name in outputs}, outputs
        )


def _or_empty(make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:
        log_failure(pb_utils, error)
        return ""
