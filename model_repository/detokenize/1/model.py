"""Triton's side of `detokenize`: a chunk in, its text out, and what else a caller is told of it.

It answers every chunk that `generate` makes: an error in the middle of a stream would leave the ensemble with responses
that it never releases. What cannot be turned into text becomes an empty text and a line in the log.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils
from tritonlm.checkpoints.hub import checkpoint_folder
from tritonlm.contract import Checkpoint, Chunk, tensors
from tritonlm.contract.adapter import error_response, inputs_of, log_failure, response, text_of
from tritonlm.contract.priority import step_back

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
            chunk = Chunk.from_json(text_of(tensors.CHUNK, inputs_of(request)) or "")
        except Exception as error:
            # Not a chunk of ours, nor from an ensemble.
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
            values = {tensors.PIECE: json.dumps({spec.name: value for spec, value in values.items()})}
        # A step of an ensemble is asked for all outputs, whichever the caller wants; what it leaves out, nobody gets.
        wanted = request.requested_output_names()
        return response(
            pb_utils, {spec: spec.pack(value) for spec, value in values.items() if spec.name in wanted}, wanted
        )


def _or_empty(make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:
        log_failure(pb_utils, error)
        return ""
