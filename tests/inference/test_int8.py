"""int8 quantization: the kernels compute what the quantized numbers give, refuse unsupported checkpoints, and keep the
quality of the bundled models.
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
from engine.runners.native.weights import quantize_int8
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

from .isa_variants import existing, library_of

CPU = torch.device("cpu")
INT8_VARIANTS = (
    "all", "no_amx", "no_bf16", "amx_emulated", "avx_vnni", "avx2", "avx512_emulated", "avx512_no_bf16_emulated",
    "avx_vnni_emulated",
)  # fmt: skip
BUNDLED = model_repository()


def config_of(dtype: str, weights: str, **settings: Any) -> EngineConfig:
    return EngineConfig(device="cpu", dtype=dtype, weights=weights, max_sequences=8, **settings)


def logits_of(runner: Runner, texts: list[list[int]]) -> list[torch.Tensor]:
    """The logits of every position, one text at a time."""
    blocks = list(range(1, 40))
    return [
        every_logits(runner, [Slice(Sequence(ids, blocks), 0, len(ids))]).float()  # type: ignore[arg-type]
        for ids in texts
    ]


@given(arrays.arrays(np.float32, (3, 32), elements=st.floats(-1e3, 1e3, width=32)))
def test_a_quantized_weight_is_at_most_half_a_step_off(numbers: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    weight = torch.from_numpy(numbers)
    values, scales = quantize_int8(weight)
    steps = scales[:3, None]
    assert values.dtype == torch.int8
    assert ((values * steps - weight).abs() <= steps * 0.5001).all()
    # Scales are padded like outputs, with zeros.
    assert scales.shape == (16,)
    assert not scales[3:].any()


def quantize_inputs(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """As the kernels quantize the input of a matmul: a scale for each group of 256 numbers of a row."""
    groups = []
    for group in inputs[0].split(256, dim=-1):
        scale = group.abs().amax(dim=-1, keepdim=True) / 127
        groups.append((group / scale.clamp(min=1e-30)).round() * scale)
    return (torch.cat(groups, dim=-1), *inputs[1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", existing(*INT8_VARIANTS))
def test_logits_are_those_of_the_quantized_numbers(tmp_path: Path, dtype: str, variant: str) -> None:
    sizes = {"seed": 5, "n_embd": 96, "n_head": 3, "n_layer": 2, "initializer_range": 0.2}
    folder, rounded = make_checkpoint(tmp_path / "lm", **sizes), make_checkpoint(tmp_path / "rounded", **sizes)
    weights = load_file(rounded / "model.safetensors")
    for name, weight in weights.items():
        # GPT-2 stores its layers' weights as (inputs, outputs).
        transposed = "c_" in name and name.endswith(".weight")
        if transposed or name.endswith("wte.weight"):
            values, scales = quantize_int8(weight.t() if transposed else weight)
            dequantized = values * scales[: values.shape[0], None]
            weights[name] = (dequantized.t() if transposed else dequantized).contiguous()
    save_file(weights, rounded / "model.safetensors", metadata={"format": "pt"})
    config = config_of(dtype, "int8")
    native = NativeRunner(folder, config, CPU, getattr(torch, dtype), library_of(variant))
    reference = ReferenceRunner(rounded, config_of("float32", "full", runner="reference"))
    for name, module in reference._model.named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc", "lm_head")):
            module.register_forward_pre_hook(quantize_inputs)
    texts = [[1, 2, 3], list(range(20))]
    for logits, expected in zip(logits_of(native, texts), logits_of(reference, texts), strict=True):
        error = (logits - expected).abs() / expected.std()
        # A number halfway between two integers may round differently: most logits agree, a few are a step off.
        assert error.median() < (1e-3 if dtype == "float32" else 0.03)
        assert error.max() < (0.05 if dtype == "float32" else 0.2)
    native.close()


def test_an_unsupported_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    narrow = make_checkpoint(tmp_path / "narrow", n_embd=48, n_head=4, n_layer=1)
    with pytest.raises(CheckpointError, match=r"weights int8 cannot serve .*: its width is not a multiple of 32"):
        open_runner(narrow, config_of("float32", "int8"), CPU)
    with pytest.raises(
        CheckpointError, match=r"weights int8 cannot serve .*runner reference does not support int8 weights"
    ):
        open_runner(narrow, config_of("float32", "int8", runner="reference"), CPU)


def test_fp8_weights_are_for_gpus(tmp_path: Path) -> None:
    for runner in ("auto", "graphs", "native"):
        with pytest.raises(
            CheckpointError, match=r"fp8 need a GPU of compute capability 8\.9.*use weights int8 on a CPU"
        ):
            open_runner(tmp_path, config_of("float32", "fp8", runner=runner), CPU)


def open_bundled(name: str, weights: str) -> tuple[Runner, Tokenizer]:
    folder = BUNDLED / name / "1"
    return open_runner(folder, config_of("bfloat16", weights), CPU), Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_perplexity_of_fable_is_within_one_percent() -> None:
    perplexity = {}
    for weights in ("full", "int8"):
        runner, tokenizer = open_bundled("fable", weights)
        texts = [tokenizer.encode(story.text).ids for story in fable.stories(40, 7, held_out=True)]
        losses = [
            torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
            for logits, ids in zip(logits_of(runner, texts), texts, strict=True)
        ]
        perplexity[weights] = math.exp(torch.cat(losses).mean())
        runner.close()
    print(f"fable's perplexity: bfloat16 {perplexity['full']:.4f}, int8 weights {perplexity['int8']:.4f}")
    assert perplexity["int8"] <= 1.01 * perplexity["full"]


def test_the_accuracy_of_abacus_is_within_two_tenths_of_a_point() -> None:
    (first, second), _ = abacus.split()
    sums = [(int(one), int(other)) for one, other in zip(first[:1000], second[:1000], strict=True)]
    accuracy = {}
    for weights in ("full", "int8"):
        runner, tokenizer = open_bundled("abacus", weights)
        texts = [tokenizer.encode(f"{one}+{other}={one + other}").ids for one, other in sums]
        answer_lengths = [len(tokenizer.encode(str(one + other)).ids) for one, other in sums]
        # Greedy decoding gives the sum if each of its tokens is the likeliest after those before it.
        accuracy[weights] = sum(
            logits[-count - 1 : -1].argmax(dim=-1).tolist() == ids[-count:]
            for logits, ids, count in zip(logits_of(runner, texts), texts, answer_lengths, strict=True)
        ) / len(sums)
        runner.close()
    print(f"abacus: bfloat16 {accuracy['full']:.2%}, int8 weights {accuracy['int8']:.2%}")
    assert accuracy["full"] > 0.99
    assert accuracy["int8"] >= accuracy["full"] - 0.002
