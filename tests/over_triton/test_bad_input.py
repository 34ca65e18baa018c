"""Invalid input of every kind: one clear error, the end of the stream, and an idle engine afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonlm.contract import ContextLengthExceeded, InvalidRequest, NotOffered, TritonLMError
from tritonlm.contract.errors import from_wire

from .caller import WAIT_SECONDS, Call
from .servers import ENGINE, LM, Server

pytestmark = pytest.mark.triton

OVER_LONG = (
    "This model's maximum context length is 512 tokens, however you requested 602 tokens (601 in your prompt; 1 for "
    "the completion). Please reduce your prompt; or completion length."
)
TOO_MUCH = (
    "This model's maximum context length is 512 tokens, however you requested 601 tokens (1 in your prompt; 600 for "
    "the completion). Please reduce your prompt; or completion length."
)
CHAT = json.dumps([{"role": "user", "content": "Who are you?"}])
BAD: dict[str, tuple[dict[str, object], type[TritonLMError], str, str]] = {
    "value out of range": (
        {"text_input": "a", "temperature": 3}, InvalidRequest, "temperature", "temperature must be a number from 0 to 2"
    ),
    "unknown parameter": ({"text_input": "a", "heat": 1}, InvalidRequest, "heat", "unknown parameter 'heat'"),
    "parameter in both places": (
        {"text_input": "a", "top_k": 5, "sampling_parameters": '{"top_k": 5}'},
        InvalidRequest, "top_k", "'top_k' is given twice",
    ),
    "prompt over the context": ({"input_ids": [5] * 601}, ContextLengthExceeded, "prompt", OVER_LONG),
    "completion over the context": (
        {"text_input": "a", "max_tokens": 600}, ContextLengthExceeded, "prompt", TOO_MUCH
    ),
    "id above the vocabulary": (
        {"input_ids": [5, 99999]},
        InvalidRequest, "input_ids", "token id 99999, which is outside this model's vocabulary",
    ),
    "id below the vocabulary": ({"input_ids": [-1]}, InvalidRequest, "input_ids", "outside this model's vocabulary"),
    "parameters are no JSON": (
        {"text_input": "a", "sampling_parameters": '{"top_k": '},
        InvalidRequest, "sampling_parameters", "sampling_parameters is not valid JSON",
    ),
    "parameters are no object": (
        {"text_input": "a", "sampling_parameters": "[1]"}, InvalidRequest, "sampling_parameters", "a JSON object"
    ),
    "chat without a template": ({"messages": CHAT}, NotOffered, "messages", "no chat template"),
    "no prompt": ({"sampling_parameters": "{}"}, InvalidRequest, "text_input", "exactly one of"),
    "two prompts": ({"text_input": "a", "input_ids": [1]}, InvalidRequest, "text_input", "exactly one of"),
    "too many stops": (
        {"text_input": "a", "sampling_parameters": json.dumps({"stop": ["x"] * 17})},
        InvalidRequest, "stop", "1 to 16 strings",
    ),
    "nothing to generate": ({"text_input": "a", "max_tokens": 0}, InvalidRequest, "max_tokens", "only with echo"),
    "resume without a seed": (
        {"text_input": "a", "sampling_parameters": '{"resume_token_ids": [1]}'},
        InvalidRequest, "seed", "needs the seed",
    ),
}  # fmt: skip


def check(error: TritonLMError, kind: type[TritonLMError], param: str, text: str) -> None:
    assert type(error) is kind, error
    assert error.param == param
    assert text in error.message
    assert "Traceback" not in error.message


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_over_http_is_refused(server: Server, case: str) -> None:
    body, kind, param, text = BAD[case]
    whole = server.generate(**body)
    assert whole.status_code == httpx.codes.BAD_REQUEST
    check(from_wire(whole.json()["error"]), kind, param, text)
    streamed = server.http.post(f"/v2/models/{LM}/generate_stream", json={**body, "stream": True})
    assert streamed.status_code == httpx.codes.BAD_REQUEST
    (line,) = [line for line in streamed.text.splitlines() if line]
    check(from_wire(json.loads(line.removeprefix("data: "))["error"]), kind, param, text)


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_over_grpc_is_refused_and_ends_the_request(server: Server, case: str) -> None:
    body, kind, param, text = BAD[case]
    tensors = {name: value for name, value in body.items() if name in ("text_input", "input_ids", "messages")}
    tensors |= {"sampling_parameters": body["sampling_parameters"]} if "sampling_parameters" in body else {}
    parameters = {name: value for name, value in body.items() if name not in tensors}
    with Call(server.grpc, tensors, "bad", parameters) as call:
        with pytest.raises(TritonLMError) as error_info:
            call.read_all()
        assert call.is_over()
    check(error_info.value, kind, param, text)


def test_the_error_response_is_marked_final(server: Server) -> None:
    """Uses the raw protocol: tritonclient does not expose this flag."""
    request = service_pb2.ModelInferRequest(model_name=LM, id="bad")
    prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    prompt.contents.bytes_contents.append(b"a")
    request.parameters["temperature"].double_param = 3.0
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (response,) = stub.ModelStreamInfer(iter([request]), timeout=WAIT_SECONDS)
    assert "temperature must be" in response.error_message
    assert response.infer_response.id == "bad"
    assert response.infer_response.parameters["triton_final_response"].bool_param


STRINGS: dict[str, tuple[Mapping[str, object], str]] = {
    "two prompts in a batch": ({"text_input": np.array([[b"a"], [b"b"]], dtype=object)}, "batch-size must be <= 1"),
    "two prompts in a row": ({"text_input": np.array([[b"a", b"b"]], dtype=object)}, "Expected [-1,1], got [1,2]"),
    "no UTF-8": ({"text_input": np.array([[b"\xff\xfe"]], dtype=object)}, "text_input is not valid UTF-8"),
    "no UTF-8 in the parameters": (
        {"text_input": "a", "sampling_parameters": np.array([[b"\xff"]], dtype=object)},
        "sampling_parameters is not valid UTF-8",
    ),
    "no ids": ({"input_ids": np.zeros((1, 0), dtype=np.int32)}, "input_ids is empty"),
}


@pytest.mark.parametrize("case", STRINGS)
def test_invalid_grpc_tensors_are_refused(server: Server, case: str) -> None:
    inputs, text = STRINGS[case]
    with Call(server.grpc, inputs, "bad") as call:
        with pytest.raises(TritonLMError) as error_info:
            call.read_all()
        assert call.is_over()
    assert text in error_info.value.message


def test_an_empty_request_is_refused(server: Server) -> None:
    response = server.generate()
    assert response.status_code == httpx.codes.BAD_REQUEST
    assert response.json()["error"]


CONTROLS = {
    '{"command": "fly"}': "unknown command 'fly'",
    '{"command": ': "control must be a JSON object",
    '"ping"': "control must be a JSON object",
    '{"command": "cancel"}': "cancel needs the request's id",
}


@pytest.mark.parametrize("control", CONTROLS)
def test_invalid_commands_are_refused(server: Server, control: str) -> None:
    response = server.http.post(f"/v2/models/{ENGINE}/generate", json={"control": control})
    assert response.status_code == httpx.codes.BAD_REQUEST
    check(from_wire(response.json()["error"]), InvalidRequest, "control", CONTROLS[control])


def test_the_engine_refuses_requests_outside_the_ensemble(server: Server) -> None:
    response = server.http.post(f"/v2/models/{ENGINE}/generate", json={"prompt_ids": [1]})
    assert response.status_code == httpx.codes.BAD_REQUEST
    check(from_wire(response.json()["error"]), InvalidRequest, "prompt_ids", "generate needs prompt_ids and request")


CHATS = {
    "[": "messages is not valid JSON",
    "[]": "messages must be a JSON list of at least one",
    '[{"role": "user"}]': "messages[0]",
    '[{"role": "user", "content": 5}]': "messages[0]",
}


@pytest.mark.parametrize("messages", CHATS)
def test_invalid_chats_are_refused(small_server: Server, messages: str) -> None:
    response = small_server.generate(messages=messages)
    assert response.status_code == httpx.codes.BAD_REQUEST
    error = from_wire(response.json()["error"])
    assert isinstance(error, InvalidRequest)
    assert CHATS[messages] in error.message


def test_valid_chats_are_answered(small_server: Server) -> None:
    answer = small_server.generate(messages=CHAT, temperature=0, max_tokens=5).raise_for_status().json()
    assert answer["text_output"].startswith("user: Who are you?\nassistant:")
