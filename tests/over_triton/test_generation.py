"""Generation over gRPC and HTTP: streamed and whole, alone and concurrent, and resumed streams."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonlm.contract.tensors import LM_OUTPUTS, PIECE

from .caller import Answer, call, complete
from .servers import LM, WAIT_SECONDS, Server

pytestmark = pytest.mark.triton

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 40, "ignore_eos": True}
BOTH = pytest.mark.parametrize("parameters", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def check_order(answer: Answer) -> None:
    """Chunk indexes have no gaps, and only the last response has a finish reason."""
    responses = answer.responses
    last = len(responses) - 1
    assert [response.index for response in responses] == list(range(len(responses)))
    assert [number for number, response in enumerate(responses) if response.final] == [last]
    assert [number for number, response in enumerate(responses) if response.finish_reason] == [last]


@BOTH
def test_a_grpc_stream_equals_the_whole_response(server: Server, parameters: dict[str, Any]) -> None:
    # Long enough for many chunks, even when the path to the test is slower than the engine.
    parameters = {**parameters, "max_tokens": 400}
    streamed = complete(server.grpc, PROMPT, return_token_ids=True, **parameters)
    whole = complete(server.grpc, PROMPT, stream=False, return_token_ids=True, **parameters)
    check_order(streamed)
    check_order(whole)
    assert len(streamed.responses) > 5
    assert len(whole.responses) == 1
    assert streamed.text == whole.text != ""
    assert streamed.token_ids == whole.token_ids
    assert streamed.last.finish_reason == whole.last.finish_reason == "length"
    assert streamed.last.usage.completion == whole.last.usage.completion == len(whole.token_ids) == 400
    assert streamed.last.usage.prompt == whole.last.usage.prompt > 0
    assert len({response.seed for response in [*streamed.responses, *whole.responses]}) == (
        1 if "seed" in parameters else 2
    )


def test_a_random_seed_is_reported_and_reproduces_the_text(server: Server) -> None:
    first = complete(server.grpc, PROMPT, max_tokens=30)
    again = complete(server.grpc, PROMPT, max_tokens=30, seed=first.last.seed)
    assert len({response.seed for response in first.responses}) == 1
    assert again.text == first.text


@BOTH
def test_an_http_stream_equals_the_whole_response(server: Server, parameters: dict[str, Any]) -> None:
    body = {"text_input": PROMPT, **parameters}
    streamed = events(server, **body, stream=True)
    alone = events(server, **body)
    whole = server.generate(**body).raise_for_status().json()
    assert [event["chunk_index"] for event in streamed] == list(range(len(streamed)))
    assert [event["finish_reason"] for event in streamed] == [""] * (len(streamed) - 1) + ["length"]
    assert streamed[-1]["usage"][1] == whole["usage"][1] == 40
    # Without `stream` there is one response; only a stream excludes the prompt by default.
    assert [event["text_output"] for event in alone] == [whole["text_output"]]
    assert whole["text_output"] == PROMPT + "".join(event["text_output"] for event in streamed)
    assert alone[0]["finish_reason"] == whole["finish_reason"] == "length"


def test_a_piece_contains_the_other_outputs(server: Server) -> None:
    body = {"text_input": PROMPT, "logprobs": 2, "return_token_ids": True, **GREEDY, "seed": 3}
    apart = server.generate(**body).raise_for_status().json()
    together = server.generate(**body, as_piece=True).raise_for_status().json()
    outputs = {spec.name for spec in LM_OUTPUTS} - {PIECE.name}
    assert outputs <= apart.keys()
    assert PIECE.name not in apart
    assert not outputs & together.keys()
    assert json.loads(together[PIECE.name]) == {name: apart[name] for name in outputs}


@pytest.mark.parametrize("as_piece", [True, False])
def test_requested_outputs_that_are_not_produced_are_left_out(server: Server, as_piece: bool) -> None:
    request = service_pb2.ModelInferRequest(model_name=LM)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"Once")
    request.outputs.add(name="text_output" if as_piece else PIECE.name)
    request.parameters["as_piece"].bool_param = as_piece
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (response,) = stub.ModelStreamInfer(iter([request]), timeout=WAIT_SECONDS)
    assert (response.error_message, list(response.infer_response.outputs)) == ("", [])


def events(server: Server, **body: object) -> list[dict[str, Any]]:
    response = server.http.post(f"/v2/models/{LM}/generate_stream", json=body).raise_for_status()
    lines = [line for line in response.text.splitlines() if line.strip()]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_64_concurrent_streams_receive_their_own_responses_in_order(server: Server) -> None:
    # Long requests with log-probabilities, so that the first still runs when the last begins.
    long = {"max_tokens": 500, "ignore_eos": True, "logprobs": 5}
    parameter_sets: list[dict[str, Any]] = [
        *({"prompt": f"{PROMPT}, {number} birds", "temperature": 0.0, **long} for number in range(4)),
        *({"prompt": f"{PROMPT}, {number} birds", "seed": number, **long} for number in range(4)),
    ]
    references = [complete(server.grpc, **parameters).text for parameters in parameter_sets]
    assert len(set(references)) == len(references)
    with contextlib.ExitStack() as stack:
        # Opened first and sent together: opening all streams takes longer than one request runs.
        calls = [stack.enter_context(call(server.grpc, **each, send_now=False)) for each in parameter_sets * 8]
        for request in calls:
            request.send()
        answers = [request.read_all() for request in calls]
    assert most_at_once(answers) > 32
    for answer in answers:
        check_order(answer)
    assert [answer.text for answer in answers] == references * 8


def most_at_once(answers: list[Answer]) -> int:
    """How many answers had begun and not ended at one time, by the arrival of their first and last responses."""
    changes = [(answer.responses[0].arrived_at, 1) for answer in answers]
    changes += [(answer.last.arrived_at, -1) for answer in answers]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


@BOTH
def test_a_stream_resumes_after_any_chunk(server: Server, parameters: dict[str, Any]) -> None:
    undisturbed = complete(server.grpc, PROMPT, return_token_ids=True, **parameters)
    for cut in range(1, len(undisturbed.responses)):
        before = Answer(undisturbed.responses[:cut])
        after = complete(server.grpc, PROMPT, return_token_ids=True, resume_token_ids=before.token_ids, **parameters)
        check_order(after)
        assert before.text + after.text == undisturbed.text, f"cut after {cut} chunks"
        assert before.token_ids + after.token_ids == undisturbed.token_ids
        assert after.last.usage.completion == 40
        assert after.last.finish_reason == "length"
