"""`generate` as Triton calls it, with a real engine and a tiny random-weight LM: FINAL exactly once on every path."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.runners.loading import import_torch
from fakes.fake_pb_utils import InferenceRequest, InferenceResponse, MetricFamily, TritonError, TritonModelException
from fakes.models import load_module, start_model
from fakes.tiny_lm import make_checkpoint
from tritonlm.contract import (
    Checkpoint,
    Chunk,
    ContextLengthExceeded,
    GenerationRequest,
    InvalidRequest,
    QueueFull,
    SamplingParameters,
    TritonLMError,
)
from tritonlm.contract.errors import from_wire
from tritonlm.contract.tensors import CHUNK, CONTROL, PROMPT_IDS, REPORT, REQUEST

FINAL = 1
WAIT_SECONDS = 20.0


class Sender:
    """Records the responses of one request, in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[InferenceResponse, int]] = []

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        self.sent.append((response, flags))

    def wait(self) -> list[InferenceResponse]:
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.sent or self.sent[-1][1] != FINAL:
            assert time.monotonic() < deadline, "no FINAL response"
            time.sleep(0.005)
        assert [flags for _, flags in self.sent[:-1]] == [0] * (len(self.sent) - 1)
        return [response for response, _ in self.sent]

    def chunks(self) -> list[Chunk]:
        responses = self.wait()
        assert [response.error() for response in responses] == [None] * len(responses)
        tensors = [tensor for response in responses for tensor in response.output_tensors()]
        assert [tensor.name() for tensor in tensors] == [CHUNK.name] * len(responses)
        return [Chunk.from_json(CHUNK.text(tensor.as_numpy())) for tensor in tensors]

    def error(self) -> TritonLMError:
        (response,) = self.wait()
        error = response.error()
        assert error is not None
        return from_wire(error.message())

    def report(self) -> dict[str, Any]:
        (response,) = self.wait()
        (tensor,) = response.output_tensors()
        report: dict[str, Any] = json.loads(REPORT.text(tensor.as_numpy()))
        return report


class DecoupledRequest(InferenceRequest):
    def __init__(self, inputs: dict[str, Any], request_id: str = "", timeout: int = 0) -> None:
        super().__init__(inputs, [CHUNK.name, REPORT.name], request_id=request_id)
        self.sender, self._timeout = Sender(), timeout

    def get_response_sender(self) -> Sender:
        return self.sender

    def timeout(self) -> int:
        return self._timeout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lm") / "tiny")


@pytest.fixture
def model(checkpoint: Path) -> Iterator[Any]:
    started = start_model("generate", checkpoint, device="cpu", max_sequences="2")
    yield started
    started.finalize()


def make_request(
    prompt: list[int], stream: bool = False, request_id: str = "", timeout: int = 0, **parameters: Any
) -> Any:
    params = SamplingParameters.from_mapping({"max_tokens": 5, "temperature": 0, "seed": 1, **parameters})
    request = GenerationRequest(params, stream).to_json()
    inputs = {PROMPT_IDS.name: PROMPT_IDS.pack(prompt), REQUEST.name: REQUEST.pack(request)}
    return DecoupledRequest(inputs, request_id, timeout)


def command(name: str, request_id: str = "") -> DecoupledRequest:
    return DecoupledRequest({CONTROL.name: CONTROL.pack(json.dumps({"command": name, "id": request_id}))})


def report_of(model: Any, name: str) -> dict[str, Any]:
    request = command(name)
    model.execute([request])
    return dict(request.sender.report())


def test_streamed_and_whole_responses_have_the_same_tokens(model: Any) -> None:
    whole, streamed = (
        make_request([5, 6, 7], return_token_ids=True),
        make_request([5, 6, 7], stream=True, return_token_ids=True),
    )
    model.execute([whole, streamed])
    (only,) = whole.sender.chunks()
    chunks = streamed.sender.chunks()
    assert [token for chunk in chunks for token in chunk.token_ids] == only.token_ids
    assert len(only.token_ids) == only.usage.completion == 5
    assert [chunk.finish_reason for chunk in chunks] == [""] * (len(chunks) - 1) + ["length"]


def test_commands_run_beside_requests(model: Any) -> None:
    long, waiting = make_request([5], max_tokens=400, ignore_eos=True, request_id="long"), command("ping")
    model.execute([long, waiting])
    assert waiting.sender.report()["slots"] == 2
    cancel = command("cancel", "long")
    model.execute([cancel])
    assert cancel.sender.report() == {"cancelled": 1}
    assert long.sender.chunks()[-1].finish_reason == "cancelled"
    status = command("status")
    model.execute([status])
    report = status.sender.report()
    assert (report["running"], report["waiting"], report["blocks_used"]) == (0, 0, 0)
    assert report["places"] == report["slots"], "the former name"


def test_metrics_are_exported_by_name_and_model(model: Any, checkpoint: Path) -> None:
    request = make_request([5, 6, 7])
    model.execute([request])
    request.sender.chunks()
    # The last step is counted after its chunk has been sent.
    deadline = time.monotonic() + WAIT_SECONDS
    while report_of(model, "status")["steps"] < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    model._metrics_exporter.export()
    metrics = {name: family.metrics[0] for name, family in MetricFamily.families.items()}
    assert {metric.labels["model"] for metric in metrics.values()} == {checkpoint.name}
    counted = {name: metrics[f"tritonlm_engine_{name}_total"].value for name in ("requests", "finished", "steps")}
    assert counted == {"requests": 1, "finished": 1, "steps": 5}
    assert (metrics["tritonlm_engine_slots"].value, metrics["tritonlm_engine_running"].value) == (2, 0)
    for name in ("queue", "prefill", "decode"):
        (seconds,) = metrics[f"tritonlm_engine_{name}_seconds"].observed
        assert 0 <= seconds < WAIT_SECONDS
    assert 0 < metrics["tritonlm_engine_step_seconds_total"].value < WAIT_SECONDS


def test_a_retired_model_exports_gauges_of_zero(model: Any) -> None:
    model._metrics_exporter.export()
    retire = command("retire")
    model.execute([retire])
    retire.sender.report()
    assert MetricFamily.families["tritonlm_engine_slots"].metrics[0].value == 0
    assert MetricFamily.families["tritonlm_engine_kv_blocks"].metrics[0].value == 0


def test_a_triton_without_metrics_still_serves(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TritonModelException("metrics not supported")

    monkeypatch.setattr(MetricFamily, "__init__", refuse)
    started = start_model("generate", checkpoint, device="cpu")
    request = make_request([5, 6, 7])
    started.execute([request])
    assert request.sender.chunks()[-1].finish_reason == "length"
    started.finalize()


BAD: dict[str, tuple[dict[str, Any], type[TritonLMError]]] = {
    "nothing": ({}, InvalidRequest),
    "no request": ({PROMPT_IDS.name: PROMPT_IDS.pack([5])}, InvalidRequest),
    "no prompt": ({REQUEST.name: REQUEST.pack("{}")}, InvalidRequest),
    "request is no JSON": ({PROMPT_IDS.name: PROMPT_IDS.pack([5]), REQUEST.name: REQUEST.pack("{")}, InvalidRequest),
    "control is no JSON": ({CONTROL.name: CONTROL.pack("[")}, InvalidRequest),
    "unknown command": ({CONTROL.name: CONTROL.pack('{"command": "dance"}')}, InvalidRequest),
    "no UTF-8": ({CONTROL.name: np.array([[b"\xff"]], dtype=object)}, InvalidRequest),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_fails_alone(model: Any, case: str) -> None:
    inputs, kind = BAD[case]
    bad, good = DecoupledRequest(inputs), make_request([5])
    model.execute([bad, good])
    assert type(bad.sender.error()) is kind
    assert good.sender.chunks()[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "parameters", "kind"),
    [
        ([99999], {}, InvalidRequest),
        ([-1], {}, InvalidRequest),
        ([5], {"resume_token_ids": [2**70]}, InvalidRequest),
        ([5], {"max_tokens": 512}, ContextLengthExceeded),
    ],
)
def test_a_request_beyond_the_checkpoints_limits_is_refused(
    model: Any, prompt: list[int], parameters: dict[str, Any], kind: type[TritonLMError]
) -> None:
    bad = make_request(prompt, **parameters)
    model.execute([bad])
    assert type(bad.sender.error()) is kind
    (response,) = bad.sender.wait()
    assert response.error().code() == TritonError.INVALID_ARG  # type: ignore[union-attr]


def test_a_chat_fills_a_kv_cache_that_is_smaller_than_the_context(checkpoint: Path) -> None:
    settings = {"kv_cache_tokens": "50", "block_tokens": "16"}
    limits = load_module("tokenize", "limits").Limits.of(Checkpoint(checkpoint), settings, {})
    parameters = limits.complete(SamplingParameters(temperature=0, ignore_eos=True), 2, is_chat=True)
    model = start_model("generate", checkpoint, device="cpu", **settings)
    try:
        request = make_request([5, 6], **parameters.to_mapping())
        model.execute([request])
        assert request.sender.chunks()[-1].usage.completion == 48
    finally:
        model.finalize()


def test_the_queue_is_limited(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_MAX_QUEUE_SIZE", "2")
    model = start_model("generate", checkpoint, device="cpu", max_sequences="2")
    try:
        requests = [make_request([5], max_tokens=300, ignore_eos=True) for _ in range(6)]
        model.execute(requests)
        assert [type(request.sender.error()) for request in requests[4:]] == [QueueFull, QueueFull]
    finally:
        model.finalize()
    for request in requests[:4]:
        assert request.sender.chunks()[-1].finish_reason in ("length", "cancelled")


def test_tritons_own_timeout_limits_the_wait_for_a_slot(model: Any) -> None:
    running = [make_request([5], max_tokens=500, ignore_eos=True, request_id="r") for _ in range(2)]
    late = make_request([5], timeout=1000)
    model.execute([*running, late])
    assert late.sender.error().code == "queue_timeout"
    model.execute([command("cancel", "r")])


def test_finalize_leaves_a_runner_open_whose_step_does_not_end(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module("generate", "engine.engine"), "_JOIN_SECONDS", 0.01)
    model = start_model("generate", checkpoint, device="cpu")
    (engine,) = model._engines
    hangs, goes_on, forward, closed = threading.Event(), threading.Event(), engine.runner.forward, list[None]()

    def hanging(plan: Any) -> Any:
        hangs.set()
        assert goes_on.wait(WAIT_SECONDS)
        return forward(plan)

    monkeypatch.setattr(engine.runner, "forward", hanging)
    monkeypatch.setattr(engine.runner, "close", lambda: closed.append(None))
    model.execute([make_request([5])])
    assert hangs.wait(WAIT_SECONDS)
    model.finalize()
    assert not closed
    goes_on.set()
    engine._thread.join(WAIT_SECONDS)
    model.finalize()
    assert closed


def test_finalize_cancels_running_requests(checkpoint: Path) -> None:
    model = start_model("generate", checkpoint, device="cpu", max_sequences="2")
    requests = [make_request([5], max_tokens=500, ignore_eos=True) for _ in range(4)]
    model.execute(requests)
    model.finalize()
    assert [request.sender.chunks()[-1].finish_reason for request in requests] == ["cancelled"] * 4


class TestTwoDevices:
    """Two engines in one model, as with two GPUs; here both on the CPU."""

    @pytest.fixture
    def model(self, checkpoint: Path) -> Iterator[Any]:
        started = start_model("generate", checkpoint, device="cpu,cpu", max_sequences="2", max_queue_size="1")
        yield started
        started.finalize()

    def status(self, model: Any) -> dict[str, Any]:
        request = command("status")
        model.execute([request])
        return request.sender.report()

    def test_requests_are_distributed_with_equal_results(self, model: Any) -> None:
        requests = [make_request([5, 6, 7], return_token_ids=True, temperature=1) for _ in range(6)]
        model.execute(requests)
        texts = [request.sender.chunks()[0].token_ids for request in requests]
        assert texts == [texts[0]] * 6
        # Each engine had half of them.
        engines = model._engine._engines
        assert [engine.reports.status()["requests"] for engine in engines] == [3, 3]
        assert (self.status(model)["requests"], self.status(model)["slots"]) == (6, 4)
        assert self.status(model)["device"] == "cpu,cpu"

    def test_a_command_reaches_a_request_on_any_device(self, model: Any) -> None:
        requests = [make_request([5], max_tokens=400, ignore_eos=True, request_id=f"r{n}") for n in range(6)]
        model.execute(requests)
        refused = make_request([5])
        model.execute([refused])
        # Both queues are full.
        assert isinstance(refused.sender.error(), QueueFull)
        find = [command("find", f"r{n}") for n in range(6)]
        model.execute(find)
        assert [len(request.sender.report()["requests"]) for request in find] == [1] * 6
        cancels = [command("cancel", f"r{n}") for n in range(6)]
        model.execute(cancels)
        assert [cancel.sender.report() for cancel in cancels] == [{"cancelled": 1}] * 6
        # A cancel replies at once and takes effect before the next step.
        assert {request.sender.chunks()[-1].finish_reason for request in requests} == {"cancelled"}
        assert self.status(model)["running"] == 0
        retire = command("retire")
        model.execute([retire])
        assert retire.sender.report()["retired"] is True
        late = [make_request([5]), make_request([5])]
        model.execute(late)
        assert all("being unloaded" in request.sender.error().message for request in late)


def test_an_ended_request_is_freed_without_a_collection(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, kept = model._engine.submit, []

    def watched(request: Any) -> None:
        kept.append(weakref.ref(request))
        submit(request)

    monkeypatch.setattr(model._engine, "submit", watched)
    gc.disable()
    try:
        # The last one may still be in the hands of a thread. The third is refused at once, the fourth by its grammar.
        refused = {"structured_outputs": {"regex": "("}}
        for prompt, parameters in (([5, 6], {}), ([5], {}), ([5] * 5000, {}), ([5], refused), ([5], {})):
            request = make_request(prompt, stream=True, **parameters)
            model.execute([request])
            request.sender.wait()
        deadline = time.monotonic() + WAIT_SECONDS
        while any(reference() for reference in kept[:-1]) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert [reference() for reference in kept[:-1]] == [None] * 4
    finally:
        gc.enable()


def test_collections_leave_out_what_the_import_of_torch_made() -> None:
    gc.unfreeze()
    import_torch()
    assert gc.isenabled()
    # Its modules alone are some hundred thousand objects.
    assert gc.get_freeze_count() > 100_000
