"""Converts tensors to Triton's protobuf messages and back. It runs once per chunk, so it avoids numpy arrays.

Names and types come from the contract. It does not know connections.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from tritonclient.grpc import service_pb2

from tritonlm.client.types import Logprob, Piece, TopLogprob
from tritonlm.contract import tensors
from tritonlm.contract.tensors import TensorSpec
from tritonlm.observability.tracing import TRACEPARENT

_WIRE_TYPE = {"STRING": "BYTES"}
_FORMAT = {"INT32": "i", "BOOL": "?", "FP32": "f"}


def infer_request(
    model: str,
    inputs: Mapping[TensorSpec, object],
    outputs: Sequence[TensorSpec],
    request_id: str = "",
    traceparent: str = "",
) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for spec, value in inputs.items():
        count, data = _pack(spec, value)
        request.inputs.add(name=spec.name, datatype=_WIRE_TYPE.get(spec.dtype, spec.dtype), shape=[1, count])
        request.raw_input_contents.append(data)
    if traceparent:
        request.parameters[TRACEPARENT].string_param = traceparent
    for spec in outputs:
        request.outputs.add(name=spec.name)
    return request


def _pack(spec: TensorSpec, value: object) -> tuple[int, bytes]:
    """The number of elements, and their bytes."""
    if spec.dtype == "STRING":
        assert isinstance(value, str), spec.name
        data = value.encode()
        return 1, struct.pack("<I", len(data)) + data
    values = list(value) if isinstance(value, Sequence) else [value]
    return len(values), struct.pack(f"<{len(values)}{_FORMAT[spec.dtype]}", *values)


class Outputs:
    """A response's tensors, by name."""

    def __init__(self, response: Any) -> None:
        self._raw = dict(zip((output.name for output in response.outputs), response.raw_output_contents, strict=True))

    def text(self, spec: TensorSpec) -> str:
        raw: bytes | None = self._raw.get(spec.name)
        return raw[4:].decode() if raw else ""

    def numbers(self, spec: TensorSpec) -> list[int]:
        raw: bytes = self._raw.get(spec.name, b"")
        kind = _FORMAT[spec.dtype]
        return list(struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw))


def piece_of(response: Any) -> Piece:
    # The only output that was requested: its length, and its text.
    (data,) = response.raw_output_contents
    fields = json.loads(data[4:])
    prompt, completion, cached = fields[tensors.USAGE.name]
    return Piece(
        index=fields[tensors.CHUNK_INDEX.name],
        text=fields[tensors.TEXT_OUTPUT.name],
        finish_reason=fields[tensors.FINISH_REASON.name],
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        seed=fields[tensors.SEED.name],
        token_ids=fields[tensors.TOKEN_IDS.name],
        logprobs=_logprobs(fields[tensors.LOGPROBS.name]),
        stop=fields.get("stop", ""),
    )


def _logprobs(text: str) -> list[Logprob] | None:
    if not text:
        return None
    return [
        Logprob(
            row["id"],
            row["token"],
            row["logprob"],
            row["bytes"],
            row["offset"],
            tuple(
                TopLogprob.model_construct(token=top["token"], logprob=top["logprob"], bytes=top["bytes"])
                for top in row["top"]
            ),
        )
        for row in json.loads(text)
    ]
