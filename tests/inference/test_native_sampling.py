"""Tokens sampled by the kernels equal those sampled by torch, in every ISA variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.config import EngineConfig
from engine.runners.native.runner import NativeRunner
from engine.sampling import logit_filters
from engine.sampling.logit_filters import SamplingSettings
from fakes.tiny_lm import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from .isa_variants import existing, library_of

SampleTokens = Callable[[torch.Tensor, list[SamplingSettings], Any], torch.Tensor]


@pytest.fixture(scope="module", params=existing("all", "avx2", "plain"))
def sample_tokens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SampleTokens]:
    folder = make_checkpoint(tmp_path_factory.mktemp("sampling") / "lm")
    config = EngineConfig(device="cpu", dtype="float32", max_sequences=4, threads=2)
    runner = NativeRunner(folder, config, torch.device("cpu"), torch.float32, library_of(request.param))
    yield runner.sample_tokens
    runner.close()


row_settings = st.builds(
    SamplingSettings,
    st.sampled_from((0.05, 0.3, 0.7, 1.0, 1.7, 40.0)),
    st.sampled_from((-1, 0, 1, 2, 5, 40, 1000)),
    st.sampled_from((1e-9, 0.001, 0.1, 0.5, 0.9, 0.99, 1.0)),
    st.sampled_from((0.0, 0.0, 0.01, 0.5, 1.0)),
)


@settings(max_examples=150)
@given(
    rows=st.lists(row_settings, min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from((1, 2, 17, 255, 256, 257, 3000)),
    spread=st.sampled_from((0.0, 0.5, 3.0, 30.0)),
    rounded=st.booleans(),
    banned=st.booleans(),
)
def test_kernels_sample_the_same_tokens_as_torch(
    sample_tokens: SampleTokens,
    rows: list[SamplingSettings],
    seed: int,
    vocab_size: int,
    spread: float,
    rounded: bool,
    banned: bool,
) -> None:
    generator = np.random.default_rng(seed)
    numbers = generator.normal(0, spread, (len(rows), vocab_size)).astype(np.float32)
    # Rounded logits have many equals, which the filters have to order.
    logits = torch.from_numpy(numbers.round() if rounded else numbers)
    if banned:
        logits[:, vocab_size // 2 + 1 :] = -torch.inf
    uniforms = generator.random(len(rows))
    assert torch.equal(sample_tokens(logits, rows, uniforms), logit_filters.sample_tokens(logits, rows, uniforms))


def test_tokens_are_sampled_in_proportion_to_their_weights(sample_tokens: SampleTokens) -> None:
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    uniforms = (np.arange(1000) + 0.5) / 1000
    ids = sample_tokens(logits.expand(1000, 4).contiguous(), [SamplingSettings(1.0, 0, 1.0, 0.0)] * 1000, uniforms)
    assert torch.bincount(ids).tolist() == [100, 200, 300, 400]


def test_a_row_of_nans_does_not_affect_strided_neighbours(sample_tokens: SampleTokens) -> None:
    wide = torch.full((3, 32), 50.0)
    logits = wide[:, :20]
    logits[0] = torch.arange(20.0)
    logits[1] = torch.nan
    logits[2] = -torch.arange(20.0)
    rows = [SamplingSettings(1e-3, 0, 1.0, 0.0)] * 3
    assert sample_tokens(logits, rows, np.full(3, 0.5))[[0, 2]].tolist() == [19, 0]


def test_a_row_samples_the_same_token_alone_and_in_a_batch(sample_tokens: SampleTokens, tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    logits = torch.from_numpy(generator.normal(0, 4, (9, 700)).astype(np.float32))
    rows = [SamplingSettings(0.8, 50 * (n % 2), 0.9 if n % 3 else 1.0, 0.0) for n in range(9)]
    uniforms = generator.random(9)
    batch = sample_tokens(logits, rows, uniforms)
    alone = [sample_tokens(logits[n : n + 1], rows[n : n + 1], uniforms[n : n + 1]) for n in range(9)]
    assert torch.equal(batch, torch.cat(alone))
