"""Answers over gRPC and HTTP: streamed and whole, the same alone and among others, and resumed."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonlm.contract.tensors import LM_OUTPUTS, PIECE

from .caller import Answer, ask, call
from .servers import LM, WAIT_SECONDS, Server, wait_until

pytestmark = pytest.mark.triton

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 40, "ignore_eos": True}
BOTH = pytest.mark.parametrize("wanted", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def check_order(answer: Answer) -> None:
    """Indexes without a gap, and one end: the last response, which alone has a finish reason."""
    responses = answer.responses
    last = len(responses) - 1
    assert [response.index for response in responses] == list(range(len(responses)))
    assert [number for number, response in enumerate(responses) if response.final] == [last]
    assert [number for number, response in enumerate(responses) if response.finish_reason] == [last]


@BOTH
def test_over_grpc_the_stream_is_the_whole_text_in_pieces(server: Server, wanted: dict[str, Any]) -> None:
    # So long that it comes in many pieces, also where the way to here is slower than the engine.
    wanted = {**wanted, "max_tokens": 400}
    streamed = ask(server.grpc, PROMPT, return_token_ids=True, **wanted)
    whole = ask(server.grpc, PROMPT, stream=False, return_token_ids=True, **wanted)
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
        1 if "seed" in wanted else 2
    )


def test_a_seed_that_was_drawn_is_reported_and_gives_the_same_text_again(server: Server) -> None:
    first = ask(server.grpc, PROMPT, max_tokens=30)
    again = ask(server.grpc, PROMPT, max_tokens=30, seed=first.last.seed)
    assert len({response.seed for response in first.responses}) == 1
    assert again.text == first.text


@BOTH
def test_over_http_the_stream_is_the_whole_text_in_pieces(server: Server, wanted: dict[str, Any]) -> None:
    body = {"text_input": PROMPT, **wanted}
    streamed = events(server, **body, stream=True)
    alone = events(server, **body)
    whole = server.generate(**body).raise_for_status().json()
    assert [event["chunk_index"] for event in streamed] == list(range(len(streamed)))
    assert [event["finish_reason"] for event in streamed] == [""] * (len(streamed) - 1) + ["length"]
    assert streamed[-1]["usage"][1] == whole["usage"][1] == 40
    # Without `stream` there is one response; only a stream leaves the prompt out by itself.
    assert [event["text_output"] for event in alone] == [whole["text_output"]]
    assert whole["text_output"] == PROMPT + "".join(event["text_output"] for event in streamed)
    assert alone[0]["finish_reason"] == whole["finish_reason"] == "length"


def test_a_piece_holds_what_the_other_outputs_would(server: Server) -> None:
    body = {"text_input": PROMPT, "logprobs": 2, "return_token_ids": True, **GREEDY, "seed": 3}
    apart = server.generate(**body).raise_for_status().json()
    together = server.generate(**body, as_piece=True).raise_for_status().json()
    outputs = {spec.name for spec in LM_OUTPUTS} - {PIECE.name}
    assert outputs <= apart.keys()
    assert PIECE.name not in apart
    assert not outputs & together.keys()
    assert json.loads(together[PIECE.name]) == {name: apart[name] for name in outputs}


@pytest.mark.parametrize("as_piece", [True, False])
def test_whoever_asks_for_outputs_that_nobody_makes_gets_an_answer_without_them(server: Server, as_piece: bool) -> None:
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


def test_every_response_of_64_concurrent_streams_goes_to_its_own_caller_in_order(server: Server) -> None:
    # So long, and with so much to tell of each token, that the first has not ended when the last begins.
    long = {"max_tokens": 500, "ignore_eos": True, "logprobs": 5}
    wanted: list[dict[str, Any]] = [
        *({"prompt": f"{PROMPT}, {number} birds", "temperature": 0.0, **long} for number in range(4)),
        *({"prompt": f"{PROMPT}, {number} birds", "seed": number, **long} for number in range(4)),
    ]
    references = [ask(server.grpc, **asked).text for asked in wanted]
    assert len(set(references)) == len(references)
    with contextlib.ExitStack() as stack:
        # To open them takes longer than the first of them would run.
        calls = [stack.enter_context(call(server.grpc, **asked, at_once=False)) for asked in wanted * 8]
        for made in calls:
            made.send()
        wait_until(lambda: server.status()["running"] > 32, "most of them run together")
        answers = [made.answer() for made in calls]
    for answer in answers:
        check_order(answer)
    assert [answer.text for answer in answers] == references * 8


@BOTH
def test_a_stream_cut_at_any_chunk_goes_on_where_it_was(server: Server, wanted: dict[str, Any]) -> None:
    undisturbed = ask(server.grpc, PROMPT, return_token_ids=True, **wanted)
    for cut in range(1, len(undisturbed.responses)):
        before = Answer(undisturbed.responses[:cut])
        after = ask(server.grpc, PROMPT, return_token_ids=True, resume_token_ids=before.token_ids, **wanted)
        check_order(after)
        assert before.text + after.text == undisturbed.text, f"cut after {cut} chunks"
        assert before.token_ids + after.token_ids == undisturbed.token_ids
        assert after.last.usage.completion == 40
        assert after.last.finish_reason == "length"
