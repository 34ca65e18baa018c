"""A stub of `generate` for `scripts/bench gateway`: sends one token per chunk at once, without a model."""

from __future__ import annotations

import json
import queue
import threading
from typing import Any

import triton_python_backend_utils as pb_utils
from tritonlm.contract import Chunk, GenerationRequest, Usage
from tritonlm.contract.tensors import CONTROL, PROMPT_IDS, REPORT, REQUEST
from tritonlm.contract.triton_requests import inputs_of, response, text_of

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
SENDERS = 4


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(SENDERS):
            threading.Thread(target=self._send, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            names = list(request.requested_output_names())
            self._requests.put((inputs_of(request), request.get_response_sender(), names))

    def _send(self) -> None:
        while True:
            arrays, sender, outputs = self._requests.get()
            if text_of(CONTROL, arrays) is not None:
                report = {REPORT: REPORT.pack(json.dumps({"cancelled": 0, "running": 0, "waiting": 0}))}
                sender.send(response(pb_utils, report, outputs), flags=FINAL)
                continue
            request = GenerationRequest.from_json(text_of(REQUEST, arrays) or "")
            prompt = arrays[PROMPT_IDS.name].size
            count = request.parameters.max_tokens or 1
            for index in range(count):
                last = index == count - 1
                chunk = Chunk(
                    index, [5], 1, 0, 0, finish_reason="length" if last else "", usage=Usage(prompt, index + 1, 0),
                    token_ids=[5], as_piece=request.parameters.as_piece,
                )  # fmt: skip
                sender.send(response(pb_utils, chunk.to_arrays(), outputs), flags=FINAL if last else 0)
