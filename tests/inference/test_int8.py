"""Weights and rows of eight bits: computed as their rounded values are, refused where the kernels cannot, and good
enough.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from engine.config import EngineConfig
from engine.runners.interface import Runner
from engine.runners.native.runner import NativeRunner
from engine.runners.native.weights import in_bytes
from engine.runners.reference import ReferenceRunner
from engine.runners.select import open_runner
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tritonlm.contract import CheckpointError
from tritonlm.serving.paths import model_repository
from tritonlm.training.data import abacus, fable

from .forms import FORMS, library_of

CPU = torch.device("cpu")
BUNDLED = model_repository()


def config_of(dtype: str, weights: str, **settings: Any) -> EngineConfig:
    return EngineConfig(device="cpu", dtype=dtype, weights=weights, max_sequences=8, **settings)


def logits_of(runner: Runner, texts: list[list[int]]) -> list[torch.Tensor]:
    """Of every position, each text by itself."""
    blocks = list(range(1, 40))
    return [
        every_logits(runner, [Slice(Sequence(ids, blocks), 0, len(ids))]).float()  # type: ignore[arg-type]
        for ids in texts
    ]


@given(arrays.arrays(np.float32, (3, 32), elements=st.floats(-1e3, 1e3, width=32)))
def test_a_weight_is_at_most_half_a_step_away(numbers: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    weight = torch.from_numpy(numbers)
    values, scales = in_bytes(weight)
    steps = scales[:3, None]
    assert values.dtype == torch.int8
    assert ((values * steps - weight).abs() <= steps * 0.5001).all()
    # Padded as outputs are, with what multiplies nothing.
    assert scales.shape == (16,)
    assert not scales[3:].any()


def rounded_rows(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """As the kernels round what goes into a product: a scale for every 256 numbers of a row."""
    parts = []
    for part in inputs[0].split(256, dim=-1):
        scale = part.abs().amax(dim=-1, keepdim=True) / 127
        parts.append((part / scale.clamp(min=1e-30)).round() * scale)
    return (torch.cat(parts, dim=-1), *inputs[1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [form for form in ("all", "no_amx", "avx2") if form in FORMS])
def test_it_computes_what_the_rounded_numbers_give(tmp_path: Path, dtype: str, form: str) -> None:
    sizes = {"seed": 5, "n_embd": 96, "n_head": 3, "n_layer": 2, "initializer_range": 0.2}
    folder, rounded = make_checkpoint(tmp_path / "lm", **sizes), make_checkpoint(tmp_path / "rounded", **sizes)
    weights = load_file(rounded / "model.safetensors")
    for name, weight in weights.items():
        # A GPT-2 keeps its layers' weights as (inputs, outputs).
        turned = "c_" in name and name.endswith(".weight")
        if turned or name.endswith("wte.weight"):
            values, scales = in_bytes(weight.t() if turned else weight)
            found = values * scales[: values.shape[0], None]
            weights[name] = (found.t() if turned else found).contiguous()
    save_file(weights, rounded / "model.safetensors", metadata={"format": "pt"})
    config = config_of(dtype, "int8")
    ours = NativeRunner(folder, config, CPU, getattr(torch, dtype), library_of(form))
    theirs = ReferenceRunner(rounded, config_of("float32", "full", runner="reference"))
    for name, module in theirs._model.named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc", "lm_head")):
            module.register_forward_pre_hook(rounded_rows)
    texts = [[1, 2, 3], list(range(20))]
    for found, expected in zip(logits_of(ours, texts), logits_of(theirs, texts), strict=True):
        apart = (found - expected).abs() / expected.std()
        # A number between two whole ones goes up here and down there: most are equal, a few a step away.
        assert apart.median() < (1e-3 if dtype == "float32" else 0.03)
        assert apart.max() < (0.05 if dtype == "float32" else 0.2)
    ours.close()


def test_it_is_refused_with_the_reason_where_the_kernels_cannot(tmp_path: Path) -> None:
    narrow = make_checkpoint(tmp_path / "narrow", n_embd=48, n_head=4, n_layer=1)
    with pytest.raises(CheckpointError, match=r"weights int8 cannot serve .*: its widths are not multiples of 32"):
        open_runner(narrow, config_of("float32", "int8"), CPU)
    with pytest.raises(CheckpointError, match=r"weights int8 cannot serve .*runner reference has no such weights"):
        open_runner(narrow, config_of("float32", "int8", runner="reference"), CPU)


def opened(name: str, weights: str) -> tuple[Runner, Tokenizer]:
    folder = BUNDLED / name / "1"
    return open_runner(folder, config_of("bfloat16", weights), CPU), Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_fables_perplexity_is_within_one_percent() -> None:
    found = {}
    for weights in ("full", "int8"):
        runner, tokenizer = opened("fable", weights)
        texts = [tokenizer.encode(story.text).ids for story in fable.stories(40, 7, held_out=True)]
        losses = [
            torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
            for logits, ids in zip(logits_of(runner, texts), texts, strict=True)
        ]
        found[weights] = math.exp(torch.cat(losses).mean())
        runner.close()
    print(f"fable's perplexity: bfloat16 {found['full']:.4f}, int8 weights {found['int8']:.4f}")
    assert found["int8"] <= 1.01 * found["full"]


def test_abacus_is_within_two_tenths_of_a_point() -> None:
    (first, second), _ = abacus.split()
    sums = [(int(one), int(other)) for one, other in zip(first[:1000], second[:1000], strict=True)]
    found = {}
    for weights in ("full", "int8"):
        runner, tokenizer = opened("abacus", weights)
        texts = [tokenizer.encode(f"{one}+{other}={one + other}").ids for one, other in sums]
        answers = [len(tokenizer.encode(str(one + other)).ids) for one, other in sums]
        # Greedy decoding tells the sum when each of its tokens is the likeliest after those before.
        found[weights] = sum(
            logits[-count - 1 : -1].argmax(dim=-1).tolist() == ids[-count:]
            for logits, ids, count in zip(logits_of(runner, texts), texts, answers, strict=True)
        ) / len(sums)
        runner.close()
    print(f"abacus: bfloat16 {found['full']:.2%}, int8 weights {found['int8']:.2%}")
    assert found["full"] > 0.99
    assert found["int8"] >= found["full"] - 0.002
