"""Log-probabilities of prompts are the same by kernels and torch, for all row groups, and in bounded memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.config import EngineConfig
from engine.runners import reference
from engine.runners.lm_head import LMHead
from engine.runners.native import runner as native_runner
from engine.runners.native.runner import NativeRunner
from engine.runners.reference import ReferenceRunner
from engine.sampling import logprobs as logprobs_module
from fakes.tiny_lm import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from tritonlm.contract import TokenLogprob

from .harness import _GROUPED, FAMILIES, VOCABULARY, make_engine, run, save_model, submit
from .isa_variants import existing, library_of

MIB = 1 << 20
# Memory of a step beside the scratch: small arrays, rounding of the allocator, Python objects of the results.
SLACK = 24 * MIB
# Families whose forward continues after the output layer.
TAILS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.25},
}  # fmt: skip


@pytest.fixture(scope="module", params=existing("all", "avx2", "plain"))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeRunner]:
    folder = make_checkpoint(tmp_path_factory.mktemp("score") / "lm")
    config = EngineConfig(device="cpu", dtype="float32", max_sequences=4, threads=2)
    runner = NativeRunner(folder, config, torch.device("cpu"), torch.float32, library_of(request.param))
    yield runner
    runner.close()


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    vocabulary=st.sampled_from((1, 2, 7, 17, 255, 256, 257, 3000)),
    alternatives=st.sampled_from((0, 1, 5, 20)),
    spread=st.sampled_from((0.0, 0.5, 3.0, 30.0)),
    rounded=st.booleans(),
    banned=st.booleans(),
)
def test_the_kernels_compute_the_logprobs_of_torch(
    kernels: NativeRunner,
    seed: int,
    rows: int,
    vocabulary: int,
    alternatives: int,
    spread: float,
    rounded: bool,
    banned: bool,
) -> None:
    source = np.random.default_rng(seed)
    numbers = source.normal(0, spread, (rows, vocabulary)).astype(np.float32)
    # Rounding makes ties: the lower id comes first, and -0.0 equals 0.0.
    logits = torch.from_numpy(numbers.round() if rounded else numbers)
    if banned:
        logits[:, vocabulary // 2 + 1 :] = -torch.inf
    ids = source.integers(0, vocabulary, rows).tolist()
    expected = logprobs_module.score(logits, range(rows), ids, alternatives)
    actual = kernels.score(logits, range(rows), ids, alternatives)
    assert actual.usable.tolist() == expected.usable.tolist() == [True] * rows
    assert torch.equal(actual.best_ids, expected.best_ids)
    for mine, theirs in ((actual.own, expected.own), (actual.best, expected.best)):
        torch.testing.assert_close(mine, theirs, rtol=2e-7, atol=1e-7)
    for row, token_id in enumerate(ids):
        entries = dict(zip(actual.best_ids[row].tolist(), actual.best[row].tolist(), strict=True))
        assert entries.get(token_id, float(actual.own[row])) == float(actual.own[row])


def test_the_logprobs_of_a_row_do_not_depend_on_other_rows(kernels: NativeRunner) -> None:
    wide = torch.full((40, 720), 60.0)
    logits = wide[:, :701]
    logits.copy_(4 * torch.randn(40, 701, generator=torch.Generator().manual_seed(1)))
    ids = [7 * row for row in range(40)]
    together = kernels.score(logits, range(40), ids, 9).entries(ids, [9] * 40)
    alone = [kernels.score(logits, [row], [ids[row]], 9).entries([ids[row]], [9])[0] for row in range(40)]
    assert together == alone
    some = [3, 8, 31]
    assert kernels.score(logits, some, [ids[n] for n in some], 9).entries(some, [9] * 3)[1].top == alone[8].top  # type: ignore[union-attr]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_unusable_row_is_none_and_does_not_affect_others(kernels: NativeRunner, poison: float) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(2))
    expected = kernels.score(logits, range(3), [1, 2, 3], 4).entries([1, 2, 3], [4] * 3)
    logits[1] = poison
    actual = kernels.score(logits, range(3), [1, 2, 3], 4).entries([1, 2, 3], [4] * 3)
    assert actual == [expected[0], None, expected[2]]
    assert logprobs_module.score(logits, range(3), [1, 2, 3], 4).usable.tolist() == [True, False, True]


def echoed(engine: Any, prompt: list[int], **parameters: Any) -> list[TokenLogprob]:
    output = submit(engine, prompt, echo=True, **{"logprobs": 3, **parameters})
    run(engine)
    return output.logprobs


def few_rows_at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(logprobs_module, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(logprobs_module, "_LEAST_WIDTH", 13)
    for module in (reference, native_runner):
        monkeypatch.setattr(module, "rows_at_once", lambda *_: rows)


@pytest.mark.parametrize("family", ["gpt2", "llama wide", "gemma2", "gpt_neox"])
def test_the_logprobs_of_a_prompt_do_not_depend_on_row_groups(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(family, tmp_path)
    prompt = [(7 * n) % (VOCABULARY - 3) + 3 for n in range(90)]
    expected = echoed(make_engine(folder, prefill_tokens=64), prompt)
    few_rows_at_once(monkeypatch, 5)
    engine = make_engine(folder, prefill_tokens=64)
    together = [submit(engine, prompt[n:], echo=True, logprobs=n) for n in range(3)]
    run(engine)
    actual = together[0].logprobs
    assert [entry.token_id for entry in actual] == [entry.token_id for entry in expected]
    assert [len(entry.top) for entry in together[2].logprobs[1:]] == [2] * (len(together[2].logprobs) - 1)
    alone = echoed(make_engine(folder, prefill_tokens=64), prompt, logprobs=0)
    # The same bits for all row groups, by the kernels and by torch with packed weights. Soft-capping alone depends on
    # the alignment of the rows, because it is elementwise.
    for one, other, third in zip(actual[1:90], alone[1:90], expected[1:90], strict=True):
        if family == "gemma2":
            assert one.logprob == pytest.approx(third.logprob, abs=1e-5)
        else:
            assert one.logprob == other.logprob == third.logprob
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([[entry.token_id for entry in actual]])).logits[0].log_softmax(-1)
    for position, entry in enumerate(actual[1:]):
        assert entry.logprob == pytest.approx(float(logprobs[position, entry.token_id]), abs=1e-4)


def test_a_token_has_the_same_logprob_in_prompt_and_output(tmp_path: Path) -> None:
    """The greedy test of lm_eval compares the two."""
    folder = save_model("llama wide", tmp_path)
    output = submit(make := make_engine(folder), [5, 6, 7, 8], logprobs=4, max_tokens=9)
    run(make)
    entries = echoed(make_engine(folder), [5, 6, 7, 8, *output.token_ids], logprobs=4, max_tokens=1)
    assert entries[4:13] == output.logprobs
    for entry in output.logprobs:
        assert entry.logprob == max(value for _, value in entry.top)


def test_the_beginning_of_scored_prompts_is_computed_once_and_the_bits_are_the_same(tmp_path: Path) -> None:
    folder = save_model("llama wide", tmp_path)
    prefix = [(7 * n) % (VOCABULARY - 3) + 3 for n in range(90)]
    prompts = [[*prefix, *option] for option in ([5], [6, 7], [8, 9, 10], [5, 6])]
    expected = [echoed(make_engine(folder), prompt, logprobs=0, max_tokens=0) for prompt in prompts]
    engine = make_engine(folder, prefill_tokens=64)
    outputs = [
        submit(engine, prompt, echo=True, logprobs=0, logprobs_start=len(prefix), max_tokens=0) for prompt in prompts
    ]
    run(engine)
    for output, alone, prompt in zip(outputs, expected, prompts, strict=True):
        assert [entry.token_id for entry in output.logprobs] == prompt
        assert [entry.logprob for entry in output.logprobs[:90]] == [None] * 90
        assert output.logprobs[90:] == alone[90:]
    # Blocks of four tokens: of 89 tokens before the first row that is needed, 88.
    assert [output.final.usage.cached for output in outputs] == [0, 88, 88, 88]


def test_one_token_and_preempted_prompts_are_scored_once(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path)
    engine = make_engine(folder, prefill_tokens=16, kv_cache_tokens=96, max_context_tokens=96)
    prompts = [[5], *([n + 3] * 30 for n in range(5))]
    outputs = [submit(engine, prompt, echo=True, logprobs=1, max_tokens=40) for prompt in prompts]
    run(engine)
    assert engine.scheduler.preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert [entry.token_id for entry in output.logprobs] == [*prompt, *output.token_ids]


@pytest.mark.parametrize("family", [*FAMILIES, *(f"{name} tail" for name in TAILS)])
def test_the_lm_head_replays_the_logits_in_every_family(family: str, tmp_path: Path) -> None:
    if family in FAMILIES:
        folder = save_model(family, tmp_path)
    else:
        name = family.removesuffix(" tail")
        config = AutoConfig.for_model(name, **{**_GROUPED, **TAILS[name]})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        (folder := tmp_path).joinpath("tokenizer.json").write_text("{}")
    runner = ReferenceRunner(folder, EngineConfig(device="cpu", dtype="float32", max_sequences=2))
    assert runner._head.replays


@pytest.mark.parametrize("runner", ["reference", "graphs"])
def test_a_family_without_a_replayable_head_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    folder = save_model("gemma2", tmp_path)
    prompt = [(7 * n) % (VOCABULARY - 3) + 3 for n in range(50)]
    expected = echoed(make_engine(folder, runner=runner, prefill_tokens=32), prompt)
    monkeypatch.setattr(LMHead, "check", lambda *_: None)
    few_rows_at_once(monkeypatch, 6)
    engine = make_engine(folder, runner=runner, prefill_tokens=32)
    actual = echoed(engine, prompt)
    assert [entry.token_id for entry in actual] == [entry.token_id for entry in expected]
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


# In a separate process, because the peak memory is that of the whole process.
_PEAK = """
import json, sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from engine.sampling.sampler import Argmax, SamplingState, sample
from inference.harness import make_engine, run, submit
from tritonlm.contract import SamplingParameters

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")
    before, began = status("VmRSS"), time.perf_counter()
    work()
    return status("VmHWM") - before, time.perf_counter() - began
"""
_SCORED = """
engine = make_engine(Path(sys.argv[1]), runner=sys.argv[2], dtype=sys.argv[3], max_sequences=8, block_tokens=16)
tokens = int(sys.argv[4])
def prompt(**parameters):
    output = submit(engine, [n % 1000 for n in range(tokens)], max_tokens=1, **parameters)
    run(engine)
    assert len(output.token_ids) == 1 and len(output.logprobs) == (tokens + 1 if parameters else 0)
# Warm up: one-time work, and the memory of the KV cache.
for parameters in ({}, {"echo": True, "logprobs": 1}):
    submit(engine, list(range(5, 60)), max_tokens=1, **parameters)
    run(engine)
prompt()
engine.pool.forget_idle()
plain = peak(prompt)
scored = peak(lambda: prompt(echo=True, logprobs=5))
print(json.dumps({"plain": plain, "scored": scored}))
"""
_SAMPLED = """
torch.set_num_threads(2)
logits = torch.randn(64, 262144, generator=torch.Generator().manual_seed(0))
def states(penalised):
    def parameters(n):
        more = {"frequency_penalty": 0.5} if n in penalised else {}
        return SamplingParameters(**{"temperature": 0 if n % 2 else 0.8, **more})
    return [SamplingState(parameters(n), n, 262144, (1, 2)) for n in range(64)]
def grown(penalised):
    some = states(penalised)
    return peak(lambda: sample(logits, some))[0]
sample(logits[:2], states([0])[:2])
print(json.dumps({"plain": grown([]), "one": grown([3]), "all": grown(range(64))}))
"""


def measured(script: str, *arguments: Any, **environment: str) -> dict[str, Any]:
    tests = Path(__file__).resolve().parents[1]
    engine = tests.parent / "model_repository" / "generate" / "1"
    text = _PEAK.format(paths=[str(engine), str(tests)]) + script
    # One arena, so that memory kept by threads is not measured.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    memory: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return memory


@pytest.fixture(scope="module")
def wide_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("wide") / "lm", model_type="llama", vocab_size=262_144, hidden_size=64,
        intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("runner", "tokens"), [("native", 1024), ("reference", 384), ("graphs", 384)])
def test_the_memory_for_scoring_a_prompt_is_bounded(wide_vocabulary: Path, runner: str, tokens: int) -> None:
    memory = measured(_SCORED, wide_vocabulary, runner, "float32", tokens)
    (plain, _), (scored, _) = memory["plain"], memory["scored"]
    assert scored - plain < 64 * MIB + SLACK, {name: grown / MIB for name, (grown, _) in memory.items()}


def test_a_penalty_on_one_row_copies_that_row_alone() -> None:
    # Freed memory is returned at once, so that the peak is the memory held at the same time.
    memory = measured(_SAMPLED, MALLOC_MMAP_THRESHOLD_="65536")
    # 64 rows are 64 MiB. Sampling of the unchanged rows is bounded by half of the scratch.
    assert memory["one"] < memory["plain"] + 8 * MIB, memory
    assert max(memory.values()) < 64 * MIB + SLACK, memory
