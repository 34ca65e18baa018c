"""Multi-step decoding: several tokens of each sequence in one call of the kernels are those of single steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.engine import Engine
from engine.interrupt import Interrupt
from engine.runners.multi_step import DecodedTokens, TokenChoice
from engine.runners.native.runner import NativeRunner
from engine.scheduling.scheduler import Slice
from safetensors.torch import load_file, save_file
from tritonlm.contract import EngineFailure

from .harness import Collected, make_engine, run, save_model, step, submit

PROMPTS = [[5, 6, 7, 8, 9] * 5, [3, 4] * 9, [40, 41, 42], [9]]
CASES: dict[str, dict[str, Any]] = {
    "greedy": {}, "sampled": {"temperature": 0.7}, "filtered": {"temperature": 0.9, "top_k": 9, "top_p": 0.9},
    "min-p": {"temperature": 1.3, "min_p": 0.05}, "ended by a token": {"temperature": 1.0, "stop_token_ids": [30, 31]},
    "stopped by a text": {"temperature": 1.0, "stop": [" 30", " 7 "]}, "resumed": {"resume_token_ids": [9, 5, 6, 7]},
    "banned at first": {"temperature": 1.0, "stop_token_ids": [30, 31, 32], "min_tokens": 9},
    "one token": {"max_tokens": 1},
}  # fmt: skip
# What needs Python after each token.
SINGLE: dict[str, dict[str, Any]] = {
    "penalised": {"frequency_penalty": 0.3}, "biased": {"logit_bias": {"8": 4.0}}, "scored": {"logprobs": 2},
}  # fmt: skip
# A chunk is due when the longest call is long over.
SEVERAL = {"chunk_milliseconds": 1e7}


@pytest.fixture(scope="module", params=["gpt2", "llama wide"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("multi_step"))


def engine_of(folder: Path, **settings: Any) -> Engine:
    engine = make_engine(folder, **{**SEVERAL, **settings})
    if not isinstance(engine.runner, NativeRunner):
        pytest.skip("only the kernels decode several tokens in a call")
    return engine


class Calls:
    """Counts the steps of an engine's calls of `decode`."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[int] = []
        runner = engine.runner
        assert isinstance(runner, NativeRunner)
        self._decode = runner.decode
        runner.decode = self._count  # type: ignore[method-assign]

    def _count(self, plan: Sequence[Slice], choice: TokenChoice, interrupt: Interrupt, seconds: float) -> DecodedTokens:
        tokens = self._decode(plan, choice, interrupt, seconds)
        self.steps.append(len(tokens.ids))
        return tokens


def results(engine: Engine, prompts: list[list[int]], **parameters: Any) -> list[Any]:
    outputs = [submit(engine, p, choice=n, **{"max_tokens": 60, **parameters}) for n, p in enumerate(prompts)]
    run(engine)
    return [(o.token_ids, o.final.finish_reason, o.final.usage, o.final.stop, o.logprobs) for o in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES | SINGLE)
def test_tokens_are_those_of_single_steps(folder: Path, case: str, dtype: str) -> None:
    parameters = (CASES | SINGLE)[case]
    single, several = engine_of(folder, dtype=dtype, multi_step_tokens=1), engine_of(folder, dtype=dtype)
    calls = Calls(several)
    assert results(several, PROMPTS, **parameters) == results(single, PROMPTS, **parameters)
    expects_calls = case in CASES and case != "one token"
    assert bool(calls.steps) == expects_calls
    assert not expects_calls or max(calls.steps) > 1
    counted = (several.metric_values(), single.metric_values())
    assert counted[0]["generated_tokens"] == counted[1]["generated_tokens"]
    assert counted[0]["speculative_draft_tokens"] == counted[0]["speculative_accepted_tokens"] == 0


@pytest.mark.parametrize("settings", [{"kv_dtype": "int8"}, {"weights": "int8"}, {"threads": 1}])
def test_it_is_the_same_with_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    single, several = engine_of(folder, multi_step_tokens=1, **settings), engine_of(folder, **settings)
    assert results(several, PROMPTS, temperature=0.8) == results(single, PROMPTS, temperature=0.8)


def test_a_call_has_at_most_so_many_steps_and_no_more_than_tokens_are_left(folder: Path) -> None:
    engine = engine_of(folder, multi_step_tokens=7)
    calls = Calls(engine)
    (result,) = results(engine, [[5, 6]], max_tokens=20)
    assert len(result[0]) == 20
    # The first token is the prompt's, and the second one is measured.
    assert calls.steps == [7, 7, 4]
    assert engine.metric_values()["steps"] == 20


def test_a_small_pool_and_other_requests_change_nothing(folder: Path) -> None:
    settings = {"prefill_tokens": 8, "kv_cache_tokens": 120, "max_context_tokens": 100, "max_sequences": 3}
    prompts = [[n, *PROMPTS[0]] for n in range(20, 26)]
    single, several = engine_of(folder, multi_step_tokens=1, **settings), engine_of(folder, **settings)
    assert results(several, prompts, max_tokens=50) == results(single, prompts, max_tokens=50)
    assert several.scheduler.preemptions > 0


def test_what_is_decoded_can_be_reused_as_a_prefix(folder: Path) -> None:
    engine = engine_of(folder)
    ((tokens, *_),) = results(engine, [PROMPTS[0]], max_tokens=40)
    again = submit(engine, [*PROMPTS[0], *tokens], max_tokens=8, logprobs=1)
    run(engine)
    assert again.final.usage.cached > len(PROMPTS[0])
    fresh = engine_of(folder, multi_step_tokens=1)
    other = submit(fresh, [*PROMPTS[0], *tokens], max_tokens=8, logprobs=1)
    run(fresh)
    assert (again.token_ids, again.logprobs) == (other.token_ids, other.logprobs)


def decoding(engine: Engine, output: Collected) -> Collected:
    """Run until the next step may be one of several."""
    for _ in range(3):
        step(engine)
    assert engine.scheduler.budget.decode_seconds > 0
    return output


def steps_of_calls(engine: Engine, interrupt: Interrupt) -> Callable[[float], int]:
    """Calls of nine steps for one sequence: from their time to the steps that they computed."""
    decoding(engine, submit(engine, [5, 6], max_tokens=100))
    (request,), runner = engine.scheduler.running, engine.runner
    assert isinstance(runner, NativeRunner)
    plan, choice = [Slice(request, request.computed, 1)], TokenChoice.of([request], 9)
    assert engine.scheduler.reserve(plan, 9)
    return lambda seconds: len(runner.decode(plan, choice, interrupt, seconds).ids)


def test_an_interrupt_ends_a_call_after_its_step(folder: Path) -> None:
    interrupt = Interrupt()
    steps = steps_of_calls(engine_of(folder), interrupt)
    assert steps(60.0) == 9
    interrupt.set()
    assert steps(60.0) == 1
    interrupt.clear()
    assert steps(60.0) == 9


def test_a_call_ends_when_its_time_is_over(folder: Path) -> None:
    """The steps of a larger batch take longer than those that were measured before."""
    assert steps_of_calls(engine_of(folder), Interrupt())(0.0) == 1


def test_requests_and_cancels_set_the_interrupt_and_the_engine_clears_it(folder: Path) -> None:
    engine = engine_of(folder)

    def is_set() -> bool:
        return bool(engine._interrupt._flag.value)

    first = decoding(engine, submit(engine, [5, 6], request_id="first", max_tokens=100))
    assert not is_set()
    submit(engine, [7, 8], max_tokens=3)
    engine._intake.wait_for_prepared(60)
    assert is_set()
    engine.process_inbox()
    assert not is_set()
    assert engine.cancel("first") == 1
    assert is_set()
    run(engine)
    assert first.final.finish_reason == "cancelled"


def test_an_end_token_ends_a_call_so_that_nobody_waits_for_its_end(folder: Path) -> None:
    single = engine_of(folder, multi_step_tokens=1)
    ((tokens, *_),) = results(single, [PROMPTS[0]], max_tokens=30, temperature=1.0)
    position = next(n for n, token in itertools.islice(enumerate(tokens), 6, None) if token not in tokens[:n])
    engine = engine_of(folder, multi_step_tokens=100)
    calls = Calls(engine)
    ((ended, reason, *_),) = results(
        engine, [PROMPTS[0]], max_tokens=30, temperature=1.0, stop_token_ids=[tokens[position]]
    )
    assert (ended, reason) == (tokens[: position + 1], "stop")
    assert calls.steps == [position - 1]


def test_a_row_that_is_not_finite_ends_the_call_and_fails_its_request_alone(tmp_path: Path) -> None:
    folder = save_model("llama wide", tmp_path)
    prompts = [PROMPTS[0], [50]]
    (tokens, *_), (others, *_) = results(engine_of(folder, multi_step_tokens=1), prompts, max_tokens=30)
    candidates = itertools.islice(enumerate(tokens), 5, None)
    position = next(n for n, token in candidates if token not in [*tokens[:n], *others])
    weights = load_file(folder / "model.safetensors")
    embedding = next(name for name in weights if "embed" in name)
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights[embedding].clone()
    weights[embedding][tokens[position]] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    engine = engine_of(folder)
    calls = Calls(engine)
    broken, good = (submit(engine, prompt, max_tokens=30) for prompt in prompts)
    run(engine)
    assert max(calls.steps) > 1
    assert isinstance(broken.error, EngineFailure)
    assert "not finite" in broken.error.message
    assert good.token_ids == others


def test_a_stream_with_a_chunk_for_each_token_has_single_steps(folder: Path) -> None:
    engine = engine_of(folder, chunk_milliseconds=0.0)
    calls = Calls(engine)
    output = submit(engine, [5, 6], stream=True, max_tokens=20)
    run(engine)
    assert calls.steps == []
    assert [len(chunk.token_ids) for chunk in output.chunks] == [1] * 20
