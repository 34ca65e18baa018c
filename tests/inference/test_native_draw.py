"""Tokens drawn by the kernels: those that torch draws, in every form the kernels are compiled to."""

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
from engine.sampling.logit_filters import DrawSettings
from fakes.tiny_lm import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from .forms import library_of

Drawer = Callable[[torch.Tensor, list[DrawSettings], Any], torch.Tensor]


@pytest.fixture(scope="module", params=["all", "avx2", "plain"])
def draw(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("draw") / "lm")
    config = EngineConfig(device="cpu", dtype="float32", max_sequences=4, threads=2)
    runner = NativeRunner(folder, config, torch.device("cpu"), torch.float32, library_of(request.param))
    yield runner.draw
    runner.close()


ways = st.builds(
    DrawSettings,
    st.sampled_from((0.05, 0.3, 0.7, 1.0, 1.7, 40.0)),
    st.sampled_from((-1, 0, 1, 2, 5, 40, 1000)),
    st.sampled_from((0.001, 0.1, 0.5, 0.9, 0.99, 1.0)),
    st.sampled_from((0.0, 0.0, 0.01, 0.5, 1.0)),
)


@settings(max_examples=150)
@given(
    wanted=st.lists(ways, min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    vocabulary=st.sampled_from((1, 2, 17, 255, 256, 257, 3000)),
    spread=st.sampled_from((0.0, 0.5, 3.0, 30.0)),
    rounded=st.booleans(),
    banned=st.booleans(),
)
def test_the_kernels_draw_what_torch_draws(
    draw: Drawer,
    wanted: list[DrawSettings],
    seed: int,
    vocabulary: int,
    spread: float,
    rounded: bool,
    banned: bool,
) -> None:
    source = np.random.default_rng(seed)
    numbers = source.normal(0, spread, (len(wanted), vocabulary)).astype(np.float32)
    # Equals are where the rules are finest.
    logits = torch.from_numpy(numbers.round() if rounded else numbers)
    if banned:
        logits[:, vocabulary // 2 + 1 :] = -torch.inf
    uniforms = source.random(len(wanted))
    assert torch.equal(draw(logits, wanted, uniforms), logit_filters.draw(logits, wanted, uniforms))


def test_every_share_of_a_row_is_drawn_as_often_as_it_weighs(draw: Drawer) -> None:
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    uniforms = (np.arange(1000) + 0.5) / 1000
    found = draw(logits.expand(1000, 4).contiguous(), [DrawSettings(1.0, 0, 1.0, 0.0)] * 1000, uniforms)
    assert torch.bincount(found).tolist() == [100, 200, 300, 400]


def test_rows_that_lie_apart_and_rows_without_numbers_disturb_nobody(draw: Drawer) -> None:
    wide = torch.full((3, 32), 50.0)
    logits = wide[:, :20]
    logits[0] = torch.arange(20.0)
    logits[1] = torch.nan
    logits[2] = -torch.arange(20.0)
    plain = [DrawSettings(1e-3, 0, 1.0, 0.0)] * 3
    assert draw(logits, plain, np.full(3, 0.5))[[0, 2]].tolist() == [19, 0]


def test_a_row_is_drawn_alike_alone_and_among_others(draw: Drawer, tmp_path: Path) -> None:
    source = np.random.default_rng(5)
    logits = torch.from_numpy(source.normal(0, 4, (9, 700)).astype(np.float32))
    wanted = [DrawSettings(0.8, 50 * (n % 2), 0.9 if n % 3 else 1.0, 0.0) for n in range(9)]
    uniforms = source.random(9)
    together = draw(logits, wanted, uniforms)
    alone = [draw(logits[n : n + 1], wanted[n : n + 1], uniforms[n : n + 1]) for n in range(9)]
    assert torch.equal(together, torch.cat(alone))
