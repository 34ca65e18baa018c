"""The Triton adapter of `tokenize`: a request in, the prompt's ids and the validated request out.

It knows tensors only. `prompt` interprets the request.
"""

from __future__ import annotations

import os
from typing import Any

import triton_python_backend_utils as pb_utils
from tritonlm.checkpoints.resolve import checkpoint_folder
from tritonlm.contract import Checkpoint, tool_formats
from tritonlm.contract.priority import lower_thread_priority
from tritonlm.contract.tensors import PROMPT_IDS, RENDERED_PROMPT, REQUEST
from tritonlm.contract.triton_requests import (
    error_response,
    flat_parameters,
    inputs_of,
    model_parameters,
    response,
)

from .limits import Limits
from .prompt import RequestReader


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        checkpoint = Checkpoint(checkpoint_folder(args))
        checkpoint.check(weights=False)
        lower_thread_priority()
        settings = model_parameters(args)
        tool_format = settings.get(tool_formats.SETTING) or os.environ.get(tool_formats.VARIABLE)
        self._reader = RequestReader(checkpoint, Limits.of(checkpoint, settings), tool_format)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        # An error of one request must not affect the others of the batch, which may belong to other callers.
        try:
            inputs, flat, outputs = inputs_of(request), flat_parameters(request), request.requested_output_names()
            if RENDERED_PROMPT.name in outputs and PROMPT_IDS.name not in outputs:
                return response(pb_utils, {RENDERED_PROMPT: RENDERED_PROMPT.pack(self._reader.render(inputs))}, outputs)
            if REQUEST.name not in outputs:
                return response(pb_utils, {PROMPT_IDS: PROMPT_IDS.pack(self._reader.read_ids(inputs, flat))}, outputs)
            prompt_ids, generation = self._reader.read(inputs, flat)
            arrays = {PROMPT_IDS: PROMPT_IDS.pack(prompt_ids), REQUEST: REQUEST.pack(generation.to_json())}
            return response(pb_utils, arrays, outputs)
        except Exception as error:
            return error_response(pb_utils, error)
