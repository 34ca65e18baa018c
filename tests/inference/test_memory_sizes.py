"""How large a KV cache is by default, and what two engines do that share one memory budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import memory
from engine.config import EngineConfig
from engine.memory import resident_memory
from engine.runners import interface, kv_cache
from engine.runners.kv_cache import LIKELY_TOKENS, LayerShape, cache_size
from tritonlm.contract import CheckpointError

from .harness import Collected, make_engine, run, save_model, submit

CPU, GIB = torch.device("cpu"), 1 << 30
# A Llama of 1.07 billion parameters: 32 KiB for each token.
LLAMA_1B = [LayerShape(8, 64, 64)] * 16
# SmolLM2 with 135 million: 22.5 KiB.
SMOLLM2 = [LayerShape(3, 64, 64)] * 30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found = {"bytes": 20 * GIB}
    monkeypatch.setattr(kv_cache, "free_memory", lambda _: found["bytes"])
    return found


def size(layers: list[LayerShape], context: int, left: int | None = None, **settings: Any) -> dict[str, int]:
    found = cache_size(layers, EngineConfig(**settings), context, torch.bfloat16, CPU, left)
    assert found.block_bytes == found.bytes // found.blocks
    return {
        "tokens": (found.blocks - 1) * 16, "MiB": found.bytes >> 20, "context": found.context_length,
        "least": (found.least_blocks - 1) * 16,
    }  # fmt: skip


@pytest.mark.usefixtures("free")
def test_the_default_is_what_64_slots_are_likely_to_use_and_one_whole_context_at_least() -> None:
    assert size(SMOLLM2, 8192) == {"tokens": 64 * LIKELY_TOKENS, "MiB": 2880, "context": 8192, "least": 8192}
    assert size(LLAMA_1B, 32768) == {"tokens": 64 * LIKELY_TOKENS, "MiB": 4096, "context": 32768, "least": 32768}
    assert size(LLAMA_1B, 32768, max_sequences=4)["tokens"] == 32768
    assert size(LLAMA_1B, 512) == {"tokens": 64 * 512, "MiB": 1024, "context": 512, "least": 512}
    assert size(LLAMA_1B, 32768, max_context_tokens=1000)["tokens"] == 64 * 1000


def test_it_is_capped_by_a_share_of_the_free_memory(free: dict[str, int]) -> None:
    free["bytes"] = 4 * GIB
    assert size(LLAMA_1B, 32768)["MiB"] == 2048
    assert size(LLAMA_1B, 32768, kv_memory_share=0.25) == {
        "tokens": 32768, "MiB": 1024, "context": 32768, "least": 32768,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"32768 tokens need 1024 MiB, 819 MiB may be used; lower max_context"):
        size(LLAMA_1B, 32768, kv_memory_share=0.2)


def test_what_is_named_is_had_or_refused(free: dict[str, int]) -> None:
    # Beyond the share that bounds the default.
    assert size(LLAMA_1B, 32768, kv_cache_tokens=500_000)["tokens"] == 500_000
    # Less than one whole context lowers what is served.
    assert size(LLAMA_1B, 32768, kv_cache_tokens=1000) == {"tokens": 1008, "MiB": 32, "context": 1008, "least": 1008}
    free["bytes"] = GIB
    with pytest.raises(CheckpointError, match=r"40000 tokens need 1250 MiB, 1024 MiB may be used; lower kv_cache"):
        size(LLAMA_1B, 32768, kv_cache_tokens=40_000)


@pytest.mark.usefixtures("free")
def test_no_more_is_had_than_a_budget_can_ever_leave() -> None:
    assert size(LLAMA_1B, 32768, left=3 * GIB)["MiB"] == 3072
    # Too little for one whole context is for the budget to refuse.
    assert size(LLAMA_1B, 32768, left=100)["tokens"] == 32768
    assert size(LLAMA_1B, 32768, left=100, kv_cache_tokens=64_000)["tokens"] == 64_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama wide", tmp_path_factory.mktemp("llama"))


def test_memory_is_reported_as_it_is_now_and_at_most(folder: Path) -> None:
    engine = make_engine(folder, max_sequences=4)
    status, token_bytes = engine.reports.status(), 2 * 2 * 64 * 4
    assert status["memory_bytes"] == pytest.approx(resident_memory(), rel=0.05)
    assert status["memory_reserved_bytes"] >= status["memory_bytes"]
    assert engine.runner.memory.reserved - engine.runner.memory._base == (4 * 256 + 4) * token_bytes
    assert (status["kv_cache_tokens"], status["full_context_slots"], status["memory_claimed_bytes"]) == (1024, 4, 0)
    assert make_engine(folder, max_sequences=4, kv_cache_tokens=600).reports.status()["full_context_slots"] == 2
    measures = engine.measures()
    assert measures["memory_bytes"] <= measures["memory_reserved_bytes"]


def texts(engine: Any) -> list[Collected]:
    return [submit(engine, [i, *range(30)], temperature=1, seed=i, max_tokens=200, ignore_eos=True) for i in range(8)]


def test_two_engines_share_a_budget_that_two_whole_pools_would_exceed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both start; one grows by what is left, the other is refused, and its requests wait or are preempted; all end."""
    # As if the process took so much and no more: here both engines are in one, beside whatever else the tests hold.
    process, block = 2 << 20, 4 * 2 * 2 * 64 * 4
    monkeypatch.setattr(interface, "resident_memory", lambda: process)
    monkeypatch.setattr(memory, "_EXTENT_BYTES", 8 * block)
    monkeypatch.setattr(memory.tempfile, "tempdir", str(tmp_path))
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
    for found in results:
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert alone.scheduler.preemptions == 0
    # Eight sequences of 231 tokens want 464 blocks.
    assert (first.pool.usable, second.pool.usable) == (64 + 298, 64), "300 without each one's padding block"
    assert second.scheduler.preemptions > 0
    first.runner.close()
    second.runner.close()


def test_a_pool_without_a_budget_is_usable_whole(folder: Path) -> None:
    engine = make_engine(folder, max_sequences=2)
    assert engine.pool.usable == engine.pool.total == 128
    assert replace(engine.config, kv_memory_share=1.0).kv_memory_share == 1.0
