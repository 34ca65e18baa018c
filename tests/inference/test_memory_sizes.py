"""The size of a KV cache, and two engines that share a memory budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import memory
from engine.config import EngineConfig
from engine.memory import resident_memory
from engine.runners import graph_runner, interface, kv_cache
from engine.runners.graph_runner import GraphRunner
from engine.runners.kv_cache import LIKELY_TOKENS, KVCache, LayerShape, cache_size
from engine.runners.native.kv_blocks import KVBlocks
from engine.runners.native.large_pages import LARGE_PAGE
from tritonlm.contract import CheckpointError

from .harness import Collected, make_engine, run, save_model, submit

CPU, GIB = torch.device("cpu"), 1 << 30
# A Llama of 1.07 billion parameters: 32 KiB for each token.
LLAMA_1B = [LayerShape(8, 64, 64)] * 16
# SmolLM2 with 135 million: 22.5 KiB.
SMOLLM2 = [LayerShape(3, 64, 64)] * 30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    memory_free = {"bytes": 20 * GIB}
    monkeypatch.setattr(kv_cache, "free_memory", lambda _: memory_free["bytes"])
    return memory_free


def size(layers: list[LayerShape], context: int, left: int | None = None, **settings: Any) -> dict[str, int]:
    pool = cache_size(layers, EngineConfig(**settings), context, torch.bfloat16, CPU, left)
    assert pool.block_bytes == pool.bytes // pool.blocks
    return {
        "tokens": (pool.blocks - 1) * 16, "MiB": pool.bytes >> 20, "context": pool.context_length,
        "least": (pool.least_blocks - 1) * 16,
    }  # fmt: skip


def wants_large_pages(tensor: torch.Tensor) -> bool:
    """Whether the system was asked for large pages in the mapping that holds the tensor's first byte."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and ":" not in name:
            first, last = (int(address, 16) for address in name.split("-"))
            inside = first <= tensor.data_ptr() < last
        elif inside and name == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this system has no large pages"
)
def test_only_a_large_cache_lies_in_large_pages_and_none_of_it_is_resident_before_it_is_written() -> None:
    before = resident_memory()
    large = KVCache([LayerShape(8, 64, 64)] * 2, 2048, 16, torch.bfloat16, CPU)
    small = KVCache([LayerShape(8, 64, 64)] * 2, 1024, 16, torch.bfloat16, CPU)
    for cache, wanted in ((large, True), (small, False)):
        for tensor in (*cache.keys, *cache.values):
            assert wants_large_pages(tensor) is wanted
    # Of 128 and 64 MiB. A block costs at most one large page in each of the four tensors.
    large.clear([1])
    small.clear([1])
    assert resident_memory() - before < (4 * 2 + 16) << 20


@pytest.mark.parametrize("layers", [LLAMA_1B, SMOLLM2])
def test_of_the_kernels_cache_only_the_blocks_that_are_written_are_resident(layers: list[LayerShape]) -> None:
    before = resident_memory()
    cache = KVBlocks(layers, 1024, 16, torch.bfloat16)
    cache.clear([3])
    # Before: one large page for each layer's keys, and for its values, which is 64 and 120 MiB.
    assert resident_memory() - before < 3 * LARGE_PAGE
    cache.clear(range(4, 64))
    assert resident_memory() - before < 61 * cache.block_bytes + 3 * LARGE_PAGE


@pytest.mark.parametrize("block_tokens", [1, 2, 16, 32])
@pytest.mark.parametrize("layers", [LLAMA_1B, SMOLLM2, [LayerShape(1, 8, 8)]])
def test_the_kernels_blocks_spread_over_the_sets_of_a_cache(layers: list[LayerShape], block_tokens: int) -> None:
    content = block_tokens * sum(layer.bytes_per_token(torch.bfloat16) for layer in layers)
    size = KVBlocks(layers, 8, block_tokens, torch.bfloat16).block_bytes
    assert content <= size <= content + 66 * 64
    assert size % 64 == 0
    assert size % 4096


@pytest.mark.usefixtures("free")
def test_the_default_is_the_likely_use_and_at_least_one_context() -> None:
    assert size(SMOLLM2, 8192) == {"tokens": 64 * LIKELY_TOKENS, "MiB": 2880, "context": 8192, "least": 8192}
    assert size(LLAMA_1B, 32768) == {"tokens": 64 * LIKELY_TOKENS, "MiB": 4096, "context": 32768, "least": 32768}
    assert size(LLAMA_1B, 32768, max_sequences=4)["tokens"] == 32768
    assert size(LLAMA_1B, 512) == {"tokens": 64 * 512, "MiB": 1024, "context": 512, "least": 512}
    assert size(LLAMA_1B, 32768, max_context_tokens=1000)["tokens"] == 64 * 1000


def test_the_default_is_limited_by_a_share_of_the_free_memory(free: dict[str, int]) -> None:
    free["bytes"] = 4 * GIB
    assert size(LLAMA_1B, 32768)["MiB"] == 2048
    assert size(LLAMA_1B, 32768, kv_memory_share=0.25) == {
        "tokens": 32768, "MiB": 1024, "context": 32768, "least": 32768,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"32768 tokens need 1024 MiB, 819 MiB may be used; lower max_context"):
        size(LLAMA_1B, 32768, kv_memory_share=0.2)


def test_an_explicit_size_is_allocated_or_refused(free: dict[str, int]) -> None:
    # Beyond the share that limits the default.
    assert size(LLAMA_1B, 32768, kv_cache_tokens=500_000)["tokens"] == 500_000
    # A size below one context limits the context length, to the number that `tokenize` reads, too.
    assert size(LLAMA_1B, 32768, kv_cache_tokens=1000) == {"tokens": 1008, "MiB": 32, "context": 1000, "least": 1008}
    free["bytes"] = GIB
    with pytest.raises(CheckpointError, match=r"40000 tokens need 1250 MiB, 1024 MiB may be used; lower kv_cache"):
        size(LLAMA_1B, 32768, kv_cache_tokens=40_000)


@pytest.mark.usefixtures("free")
def test_the_size_is_limited_by_the_memory_budget() -> None:
    assert size(LLAMA_1B, 32768, left=3 * GIB)["MiB"] == 3072
    # If the budget is too small for one context, the memory ledger refuses it.
    assert size(LLAMA_1B, 32768, left=100)["tokens"] == 32768
    assert size(LLAMA_1B, 32768, left=100, kv_cache_tokens=64_000)["tokens"] == 64_000


def test_what_steps_take_is_not_for_the_cache(free: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    free["bytes"] = 4 * GIB
    caplog.set_level("INFO")
    config = EngineConfig(kv_memory_share=0.75)
    pool = cache_size(LLAMA_1B, config, 8192, torch.bfloat16, CPU, beside=2 * GIB)
    assert pool.bytes >> 20 == 1536
    assert "in 1536 MiB, of 2048 MiB that are free beside weights and steps (kv_memory_share 0.75)" in caplog.text
    # Neither of the free memory nor of the budget.
    pool = cache_size(LLAMA_1B, config, 8192, torch.bfloat16, CPU, 2 * GIB, GIB)
    assert pool.bytes >> 20 == 1024
    with pytest.raises(CheckpointError, match="8192 tokens need 256 MiB, 0 MiB may be used"):
        cache_size(LLAMA_1B, config, 8192, torch.bfloat16, CPU, beside=5 * GIB)


def test_a_gpu_sizes_its_cache_after_its_recordings(
    tmp_path: Path, free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recordings are simulated: the largest takes 64 MiB, each further one 1 MiB."""
    folder = save_model("gpt2", tmp_path / "gpt2")
    free["bytes"] = 69 << 20
    reported = iter([300 << 20, 236 << 20, 235 << 20])
    monkeypatch.setattr(graph_runner, "free_memory", lambda _: next(reported))
    beside: list[int] = []

    def as_on_a_gpu(runner: GraphRunner, config: EngineConfig, context: int) -> int:
        runner._tile_rows = runner._check_kernels(config)
        beside.append(runner._measure_recordings(config, context))
        return beside[0]

    monkeypatch.setattr(GraphRunner, "_prepare_steps", as_on_a_gpu)
    engine = make_engine(folder, runner="graphs", max_sequences=8)
    # Of 1, 2, 4 and 8 rows. Half of the rest is for the cache.
    assert beside == [(64 + 3) << 20]
    block = engine.runner.memory.pool_bytes // engine.runner.blocks
    assert abs(engine.runner.memory.pool_bytes - (1 << 20)) <= block
    output = submit(engine, [5, 6], max_tokens=5, ignore_eos=True)
    run(engine)
    assert len(output.token_ids) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama wide", tmp_path_factory.mktemp("llama"))


def test_current_and_maximum_memory_are_reported(folder: Path) -> None:
    engine = make_engine(folder, max_sequences=4)
    status, token_bytes = engine.reports.status(), 2 * 2 * 64 * 4
    assert status["memory_bytes"] == pytest.approx(resident_memory(), rel=0.05)
    assert status["memory_reserved_bytes"] >= status["memory_bytes"]
    assert engine.runner.memory.pool_bytes == (4 * 256 + 4) * token_bytes
    assert (status["kv_cache_tokens"], status["full_context_slots"], status["memory_claimed_bytes"]) == (1024, 4, 0)
    assert make_engine(folder, max_sequences=4, kv_cache_tokens=600).reports.status()["full_context_slots"] == 2
    values = engine.metric_values()
    assert values["memory_bytes"] <= values["memory_reserved_bytes"]


def texts(engine: Any) -> list[Collected]:
    return [submit(engine, [i, *range(30)], temperature=1, seed=i, max_tokens=200, ignore_eos=True) for i in range(8)]


def test_two_engines_share_a_budget_below_two_whole_pools(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine grows by the rest of the budget. The other cannot grow and preempts. All requests end correctly."""
    # A fixed process size, because both engines share this process with the tests.
    process, block = 2 << 20, 4 * 2 * 2 * 64 * 4
    monkeypatch.setattr(interface, "resident_memory", lambda: process)
    monkeypatch.setattr(memory, "_EXTENT_BYTES", 8 * block)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    whole, least = 8 * 64 * block, 64 * block
    budget = 2 * process + 2 * least + 300 * block
    assert 2 * (process + whole) > budget, "whole pools would not fit"
    settings = {"max_sequences": 8, "memory_budget": budget}
    first, second = make_engine(folder, **settings), make_engine(folder, **settings)
    assert [e.reports.status()["memory_claimed_bytes"] for e in (first, second)] == [process + least + block] * 2
    assert [e.pool.usable for e in (first, second)] == [64, 64]
    assert [e.reports.status()["full_context_slots"] for e in (first, second)] == [8, 8]
    expected = texts(alone := make_engine(folder, max_sequences=8))
    run(alone)
    results = []
    for engine in (first, second):
        results.append(texts(engine))
        run(engine)
    for outputs in results:
        assert [each.token_ids for each in outputs] == [each.token_ids for each in expected]
    assert alone.scheduler.preemptions == 0
    # Eight sequences of 231 tokens need 464 blocks.
    assert (first.pool.usable, second.pool.usable) == (64 + 298, 64), "300 less the padding block of each engine"
    assert second.scheduler.preemptions > 0
    first.runner.close()
    second.runner.close()


def test_without_a_budget_the_whole_pool_is_usable(folder: Path) -> None:
    engine = make_engine(folder, max_sequences=2)
    assert engine.pool.usable == engine.pool.total == 128
    assert replace(engine.config, kv_memory_share=1.0).kv_memory_share == 1.0
