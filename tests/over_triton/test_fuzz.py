"""Tensors of any name, type, shape and content for each model: a response or an error, never a crash or a hang."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonlm.contract import Chunk, NotOffered, tensors
from tritonlm.contract.errors import from_wire
from tritonlm.contract.tensors import TensorSpec

from .servers import LM, Server

pytestmark = pytest.mark.triton

SECONDS = 20.0
LM_INPUTS = (
    tensors.TEXT_INPUT, tensors.INPUT_IDS, tensors.MESSAGES, tensors.STREAM, tensors.SAMPLING_PARAMETERS,
    tensors.EXCLUDE_INPUT,
)  # fmt: skip
INPUTS: dict[str, tuple[TensorSpec, ...]] = {
    LM: LM_INPUTS, "tokenize": LM_INPUTS, "generate": (tensors.PROMPT_IDS, tensors.REQUEST, tensors.CONTROL),
    "detokenize": (tensors.CHUNK,),
}  # fmt: skip
NUMBERS = {"INT32": 4, "INT64": 8, "BOOL": 1, "FP32": 4}
# Some of them are almost valid.
TEXTS = st.sampled_from(
    [
        b"", b"Once", b"{}", b"[]", b"[[]]", b'{"max_tokens": 3}', b'{"max_tokens": 1e999}', b'{"stop": []}', b"null",
        b'{"command": "ping"}', b'{"command": "find"}', b'{"command": "cancel", "id": []}', b'{"parameters": {}}',
        b'{"command": "known", "ids": 1}', b'[{"role": "user", "content": {}}]', b"\xff\xfe", b"[" * 5000, b"9" * 5000,
        Chunk(0, [1], 1, 0, 0).to_json().encode(), Chunk(0, [-1], -1, 5, -5, token_ids=[-1]).to_json().encode(),
    ]
) | st.binary(max_size=60)  # fmt: skip


@st.composite
def tensor(draw: st.DrawFn, spec: TensorSpec) -> tuple[str, str, list[int], bytes]:
    """A tensor of this name, mostly of its own type, with arbitrary content."""
    kinds = [*NUMBERS, "BYTES"]
    kind = "BYTES" if spec.dtype == "STRING" else spec.dtype
    kind = draw(st.sampled_from([kind, kind, kind, draw(st.sampled_from(kinds))]))
    count = draw(st.sampled_from([0, 1, 1, 1, 2, 3, 4, 17]))
    if kind == "BYTES":
        texts = [draw(TEXTS) for _ in range(count)]
        data = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    else:
        small = draw(st.booleans())
        size = NUMBERS[kind]
        numbers = st.integers(0, 3) if small or kind == "BOOL" else st.integers(0, 256**size - 1)
        data = b"".join(draw(numbers).to_bytes(size, "little") for _ in range(count))
    shape = draw(st.sampled_from([[1, count], [1, count], [1, count], [count, 1], [count], [1, 1, count]]))
    return spec.name, kind, shape, data


@pytest.mark.parametrize("model", INPUTS)
def test_arbitrary_tensors_get_a_response_or_an_error(server: Server, model: str) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(data=st.data())
        def fuzz(data: st.DataObject) -> None:
            specs = data.draw(st.lists(st.sampled_from(INPUTS[model]), min_size=1, unique=True))
            request = service_pb2.ModelInferRequest(model_name=model, id="fuzz")
            for name, kind, shape, content in [data.draw(tensor(spec)) for spec in specs]:
                request.inputs.add(name=name, datatype=kind, shape=shape)
                request.raw_input_contents.append(content)
            for message in errors_of(stub, request):
                assert "Traceback" not in message
                # An internal error would be the server's fault.
                assert "the server's log" not in message, message
                status = from_wire(message).http_status
                assert status < 500 or status == NotOffered.http_status or not message.endswith("]"), message

        fuzz()
    assert server.holds_nothing()
    assert server.generate(text_input="Once", max_tokens=2).status_code == 200


def errors_of(stub: Any, request: Any) -> list[str]:
    try:
        return [
            response.error_message
            for response in stub.ModelStreamInfer(iter([request]), timeout=SECONDS)
            if response.error_message
        ]
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            pytest.fail("the model hangs")
        return [error.details() or ""]
