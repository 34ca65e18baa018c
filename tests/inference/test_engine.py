"""The behaviour of the engine beyond correct tokens: seeds, resume, limits, failures, refusals."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.engine import Engine
from engine.request import Request
from transformers import AutoConfig, AutoModelForCausalLM
from tritonlm.contract import (
    CheckpointError,
    ContextLengthExceeded,
    Draining,
    EngineFailure,
    GenerationRequest,
    InvalidRequest,
    NotOffered,
    QueueFull,
    SamplingParameters,
)
from tritonlm.contract.control import CANCEL, DRAIN, FIND, KNOWN, PING, Command
from tritonlm.contract.embedding import Embedding

from .harness import RUNNER, VOCABULARY, Collected, forward_methods, make_engine, run, save_model, step, submit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def engine(folder: Path) -> Engine:
    return make_engine(folder)


SEEDED = {"temperature": 1.0, "top_p": 0.95, "seed": 11, "max_tokens": 24, "presence_penalty": 0.5, "ignore_eos": True}


def submit_others(engine: Engine, count: int) -> list[Collected]:
    source = random.Random(2)
    return [
        submit(engine, [source.randrange(VOCABULARY) for _ in range(source.randint(1, 50))], temperature=1, seed=i)
        for i in range(count)
    ]


def test_a_seed_gives_the_same_text_alone_and_in_a_batch_of_32(engine: Engine) -> None:
    alone = submit(engine, [5, 6, 7], **SEEDED)
    run(engine)
    submit_others(engine, 16)
    among = submit(engine, [5, 6, 7], **SEEDED)
    submit_others(engine, 15)
    run(engine)
    assert among.token_ids == alone.token_ids
    assert among.final.seed == 11


@pytest.mark.parametrize("runner", list(dict.fromkeys([RUNNER, "reference"])))
def test_logits_do_not_depend_on_the_batch(folder: Path, runner: str) -> None:
    """Long contexts of many lengths, so that another order of summation changes at least one sample."""
    engine = make_engine(folder, runner=runner, max_sequences=64, prefill_tokens=2048)
    kept: dict[int, list[torch.Tensor]] = {}

    def watched(forward: Callable[..., Any], plan: Any, *ids: torch.Tensor) -> Any:
        computed = forward(plan, *ids)
        # All rows of an asynchronous step are sampled.
        for row, piece in enumerate(piece for piece in plan if ids or piece.samples):
            kept.setdefault(piece.request.number, []).append(computed.logits[row].clone())
        return computed

    for name, forward in forward_methods(engine).items():
        setattr(engine.runner, name, functools.partial(watched, forward))
    prompts = [[seed + 3, 7, 9] for seed in range(4)]
    for prompt in prompts:
        submit(engine, prompt, temperature=1, seed=1, max_tokens=200, ignore_eos=True)
        run(engine)
    alone = [kept.pop(number) for number in sorted(kept)]
    for prompt in prompts:
        submit(engine, prompt, temperature=1, seed=1, max_tokens=200, ignore_eos=True)
    submit_others(engine, 40)
    run(engine)
    among = [kept[number] for number in sorted(kept)][: len(prompts)]
    for one, other in zip(alone, among, strict=True):
        assert len(one) == len(other) == 200
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_choices_of_one_seed_differ(engine: Engine) -> None:
    first, second = (submit(engine, [5, 6, 7], **SEEDED, choice=choice) for choice in (0, 1))
    run(engine)
    assert first.token_ids != second.token_ids


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_resumed_request_continues_identically_at_every_cut(engine: Engine, temperature: int) -> None:
    params = {**SEEDED, "temperature": temperature, "stop": [" 9 ", " 13"], "logprobs": 1}
    whole = submit(engine, [5, 6, 7], **params)
    run(engine)
    ids, usage = whole.token_ids, whole.final.usage
    for cut in range(len(ids)):
        rest = submit(engine, [5, 6, 7], **params, resume_token_ids=ids[:cut])
        run(engine)
        assert ids[:cut] + rest.token_ids == ids
        assert rest.final.finish_reason == whole.final.finish_reason
        assert (rest.final.usage.prompt, rest.final.usage.completion) == (usage.prompt, usage.completion)
        for entry, expected in zip(rest.logprobs, whole.logprobs[cut:], strict=True):
            assert entry.token_id == expected.token_id
            assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_a_stream_has_a_chunk_per_token_and_the_same_tokens(engine: Engine) -> None:
    streamed = submit(engine, [5, 6, 7], stream=True, max_tokens=9)
    whole = submit(engine, [5, 6, 7], max_tokens=9)
    run(engine)
    assert len(whole.chunks) == 1
    assert len(streamed.chunks) >= 9
    assert streamed.token_ids == whole.token_ids
    assert [chunk.finish_reason for chunk in streamed.chunks[:-1]] == [""] * (len(streamed.chunks) - 1)
    assert streamed.final.finish_reason == "length"


def test_with_time_between_chunks_only_the_first_token_is_sent_at_once(folder: Path) -> None:
    engine = make_engine(folder, chunk_milliseconds=60_000.0)
    streamed = submit(engine, [5, 6, 7], stream=True, max_tokens=9)
    while not streamed.items:
        step(engine)
    assert streamed.ends == [False]
    run(engine)
    assert len(streamed.chunks) == 2
    assert streamed.final.finish_reason == "length"
    assert len(streamed.token_ids) == 9


def test_end_of_text_at_max_tokens_has_the_reason_stop(engine: Engine) -> None:
    free = submit(engine, [5, 6, 7], max_tokens=12)
    run(engine)
    ids = free.token_ids
    length = max(count for count in range(1, len(ids) + 1) if ids[count - 1] not in ids[: count - 1])
    ended = submit(engine, [5, 6, 7], max_tokens=length, stop_token_ids=[ids[length - 1]])
    run(engine)
    assert ended.token_ids == ids[:length]
    assert ended.final.finish_reason == "stop"
    assert ended.final.usage.completion == length > 1


def test_echo_without_tokens_returns_the_prompts_logprobs(engine: Engine) -> None:
    scored = submit(engine, [5, 6, 7, 8], max_tokens=0, echo=True, logprobs=0)
    plain = submit(engine, [5, 6, 7, 8], max_tokens=0, echo=True)
    run(engine)
    assert [entry.token_id for entry in scored.logprobs] == [5, 6, 7, 8]
    assert scored.final.usage.completion == plain.final.usage.completion == 0
    assert scored.final.finish_reason == plain.final.finish_reason == "length"


def test_a_request_beyond_slots_and_queue_is_refused(folder: Path) -> None:
    engine = make_engine(folder, max_sequences=4, max_queue_size=4)
    taken = [submit(engine, [5, 6, 7]) for _ in range(8)]
    with pytest.raises(QueueFull, match="Exceeds maximum queue size"):
        submit(engine, [5, 6, 7])
    run(engine)
    assert len({tuple(output.token_ids) for output in taken}) == 1
    submit(engine, [5, 6, 7])


def test_priority_goes_before_arrival(engine: Engine) -> None:
    for name, priority in (("third", 3), ("second", 2), ("also second", 2), ("first", 1)):
        submit(engine, [5, 6, 7], priority=priority, request_id=name)
    engine.process_inbox()
    assert [request.id for request in engine.scheduler.waiting] == ["first", "second", "also second", "third"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resume_token_ids", [5, VOCABULARY]),
        ("resume_token_ids", [2**70]),
        ("stop_token_ids", [VOCABULARY]),
        ("stop_token_ids", [2**70]),
        ("logit_bias", {str(VOCABULARY): 1.0}),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_by_name(engine: Engine, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} must be from 0 to {VOCABULARY - 1}") as refused:
        submit(engine, [5], **{name: value})
    assert refused.value.param == name
    assert engine.reports.status()["waiting"] == 0


@pytest.mark.parametrize(
    ("prompt", "parameters", "error"),
    [
        ([], {}, InvalidRequest),
        ([VOCABULARY], {}, InvalidRequest),
        ([5] * 250, {"max_tokens": 7}, ContextLengthExceeded),
        ([5], {"resume_token_ids": list(range(12))}, InvalidRequest),
    ],
)
def test_invalid_requests_are_refused_before_a_step(
    engine: Engine, prompt: list[int], parameters: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        submit(engine, prompt, **parameters)
    assert not step(engine)


def test_a_failed_step_fails_its_requests_and_not_later_ones(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = submit(engine, [5, 6, 7])
    run(engine)
    hurt = [submit(engine, [5, 6, 7], stream=True) for _ in range(3)]
    step(engine)

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("test error")

    with monkeypatch.context() as patched:
        for name in forward_methods(engine):
            patched.setattr(engine.runner, name, broken)
        assert engine.try_step()
        engine.deliver_now()
    for output in hurt:
        assert isinstance(output.error, EngineFailure)
        assert "RuntimeError" in output.error.message
    engine.pool.check()
    assert engine.pool.used == 0
    again = submit(engine, [5, 6, 7])
    run(engine)
    assert again.token_ids == expected.token_ids


def test_a_request_leaves_the_counts_before_its_adapter_is_released(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[tuple[int, int]] = []
    intake = engine._intake
    monkeypatch.setattr(
        intake._preparation, "release", lambda _: counts.append((engine.in_flight, len(intake._requests)))
    )
    submit(engine, [5, 6, 7])
    run(engine)
    assert counts == [(0, 0)]


def test_draining_refuses_new_requests_and_completes_running_ones(engine: Engine) -> None:
    running = submit(engine, [5, 6, 7])
    reports: list[dict[str, Any]] = []
    engine.command(Command(DRAIN), reports.append)
    with pytest.raises(Draining):
        submit(engine, [5, 6, 7])
    run(engine)
    assert running.final.finish_reason == "length"
    assert reports[0]["draining"]


def test_the_threads_serve_requests_and_commands_and_stop(
    engine: Engine, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    engine.start()
    output = submit(engine, [5, 6, 7], stream=True)
    reports: list[dict[str, Any]] = []
    engine.command(Command(PING), reports.append)
    wait_for(lambda: bool(reports) and any(output.ends))
    cut = [submit(engine, [5, 6, 7], max_tokens=200) for _ in range(40)]
    engine.close()
    assert output.final.finish_reason == "length"
    assert {output.final.finish_reason for output in cut} == {"cancelled"}
    for late in (lambda: submit(engine, [5, 6, 7]), lambda: engine.command(Command(PING), reports.append)):
        with pytest.raises(Draining):
            late()


def test_commands_run_during_a_long_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    stuck, free, compute = threading.Event(), threading.Event(), engine.runner.forward

    def forward(plan: Any) -> Any:
        stuck.set()
        assert free.wait(30)
        return compute(plan)

    monkeypatch.setattr(engine.runner, "forward", forward)
    running = submit(engine, [5, 6, 7], request_id="running", max_tokens=100)
    engine.start()
    assert stuck.wait(30)
    waiting = submit(engine, [5, 6, 8], request_id="waiting", max_tokens=100)

    def report(*command: Any) -> dict[str, Any]:
        reports: list[dict[str, Any]] = []
        engine.command(Command(*command), reports.append)
        # At once: the step is still blocked.
        return reports[0]

    assert report(PING)["running"] == 1
    time.sleep(0.05)
    assert report(PING)["still_seconds"] > 0, "a blocked step makes no progress"
    assert report(KNOWN, "", ("running", "waiting", "gone"))["known"] == ["running", "waiting"]
    (entry,) = report(FIND, "waiting")["requests"]
    assert entry["state"] == "waiting"
    assert [report(CANCEL, name)["cancelled"] for name in ("running", "waiting", "gone")] == [1, 1, 0]
    assert report(CANCEL, "running")["cancelled"] == 0, "the request is cancelled already"
    free.set()
    wait_for(lambda: any(running.ends) and any(waiting.ends))
    assert running.final.finish_reason == waiting.final.finish_reason == "cancelled"
    assert len(running.token_ids) <= 1, "its slot is free after one step"
    assert report(PING)["still_seconds"] == 0.0
    engine.close()


def test_a_step_advances_the_progress(engine: Engine) -> None:
    compute = engine.runner.forward
    submit(engine, [5, 6, 7])
    engine.process_inbox()
    before = engine.reports.status()["progress"]
    compute(engine.scheduler.plan())
    assert engine.reports.status()["progress"] - before >= 2, "each layer advances it"
    engine.cancel("")
    run(engine)


def test_a_time_limit_ends_a_running_request(engine: Engine) -> None:
    output = submit(engine, [5, 6, 7], max_tokens=100)
    step(engine)
    (request,) = engine.scheduler.running
    request.deadline = 0.0
    run(engine)
    assert output.final.finish_reason == "timeout"


@pytest.mark.parametrize("limit", ["queue_deadline", "deadline"])
def test_the_queue_timeout_does_not_apply_to_a_request_with_a_slot(folder: Path, limit: str) -> None:
    engine = make_engine(
        folder, max_sequences=2, decode_step_milliseconds=0, prefill_step_milliseconds=0, prefill_tokens=4
    )
    # The prompt of the first request takes the next steps. The second request has a slot, the third has none.
    outputs = [submit(engine, [n, *range(5, 85)], max_tokens=5) for n in range(3)]
    engine.process_inbox()
    first, second, third = engine.scheduler.waiting
    step(engine)
    assert (first.started, second.started) == (True, False)
    for request in (second, third):
        setattr(request, limit, 0.0)
    third.queue_deadline = 0.0
    run(engine)
    assert outputs[0].final.finish_reason == "length"
    assert "timeout expired" in outputs[2].error.message
    if limit == "deadline":
        assert "timeout expired" in outputs[1].error.message
    else:
        assert outputs[1].final.finish_reason == "length"


@pytest.mark.parametrize(("model_type", "fields"), [("t5", {"d_model": 16}), ("mamba", {"hidden_size": 16})])
def test_an_unsupported_architecture_is_refused_in_one_line(
    folder: Path, tmp_path: Path, model_type: str, fields: dict[str, Any]
) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, max_position_embeddings=64, **fields)
    config.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError) as refusal:
        make_engine(tmp_path)
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("pool", [{}, {"kv_cache_tokens": 96, "max_context_tokens": 96}])
def test_an_embedding_is_the_normalized_mean_of_the_last_hidden_states(folder: Path, pool: dict[str, int]) -> None:
    engine = make_engine(folder, enable_embeddings=True, prefill_tokens=8, **pool)
    prompts = [[5], list(range(3, 40)), [7] * 21]
    beside = submit(engine, [5, 6, 7], max_tokens=30)
    params = SamplingParameters.from_mapping({"max_tokens": 0, "echo": True, "seed": 0})
    collected = [Collected() for _ in prompts]
    for prompt, request in zip(prompts, collected, strict=True):
        engine.submit(Request("", prompt, GenerationRequest(params, embed=True), request.deliver))
    run(engine)
    assert beside.final.usage.completion == 30
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, request in zip(prompts, collected, strict=True):
        (item,) = request.items
        assert isinstance(item, Embedding)
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(hidden, dim=0).tolist()
        assert item.vector == pytest.approx(expected, abs=1e-5)
        assert item.usage.prompt == len(prompt)


def test_embeddings_are_refused_where_they_are_off(engine: Engine) -> None:
    params = SamplingParameters.from_mapping({"max_tokens": 0, "echo": True, "seed": 0})
    with pytest.raises(NotOffered, match="TRITONLM_ENABLE_EMBEDDINGS"):
        engine.submit(Request("", [5], GenerationRequest(params, embed=True), Collected().deliver))
