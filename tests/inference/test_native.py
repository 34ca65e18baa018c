"""The C++ kernels against transformers, in every ISA variant; and a row has the same bits alone and in any batch."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.config import EngineConfig
from engine.runners.native import build
from engine.runners.native.large_pages import LargePages
from engine.runners.native.runner import NativeRunner, unsupported_reason
from engine.runners.native.weights import pack
from engine.runners.reference import ReferenceRunner
from engine.runners.select import open_runner
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from safetensors.torch import load_file, save_file
from tritonlm.contract import Checkpoint, CheckpointError

from .isa_variants import VARIANTS, library_of

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Not a multiple of 16, and an odd number of blocks of logits.
VOCABULARY = 493
# Heads of one vector and of several.
_LLAMA = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"n_embd": 32, "n_head": 2, "n_layer": 2}, "odd": {"n_embd": 96, "n_head": 2, "n_layer": 3},
    "inner": {"n_embd": 64, "n_head": 1, "n_layer": 1, "n_inner": 96},
    "tiles": {"n_embd": 128, "n_head": 2, "n_layer": 2}, "wide": {"n_embd": 192, "n_head": 2, "n_layer": 1},
    "llama": {"model_type": "llama", **_LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
              "rope_parameters": _LLAMA3_ROPE},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 64, "num_key_value_heads": 2},
}  # fmt: skip
# AMX attends heads of a multiple of 32 in blocks of a multiple of 16 tokens.
BLOCKS = {"tiles": 16, "wide": 32, "llama": 16, "qwen3": 32}


def config_of(dtype: str, **settings: Any) -> EngineConfig:
    return EngineConfig(**{"device": "cpu", "dtype": dtype, "max_sequences": 8, "block_tokens": 4, **settings})


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    context = "max_position_embeddings" if "model_type" in SHAPES[request.param] else "n_positions"
    sizes: dict[str, Any] = {context: 64, "initializer_range": 0.2, "vocab_size": VOCABULARY, **SHAPES[request.param]}
    folder = make_checkpoint(tmp_path_factory.mktemp("native") / request.param, seed=3, **sizes)
    # New biases are 0 and new norm weights 1, which would hide that they are ignored.
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(4)
    for weight in (weight for weight in weights.values() if weight.dim() == 1):
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# "plain" uses the same code as "avx2", in other registers.
@pytest.fixture(scope="module", params=[name for name in VARIANTS if name != "plain"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return library_of(request.param)


def runner_of(folder: Path, dtype: str, library: ctypes.CDLL, threads: int = 2, weights: str = "full") -> NativeRunner:
    block = BLOCKS.get(folder.name, 4)
    config = config_of(dtype, threads=threads, weights=weights, block_tokens=block, kv_cache_tokens=100 * block)
    return NativeRunner(folder, config, CPU, DTYPES[dtype], library)


def sequences(seed: int, *lengths: int) -> list[Sequence]:
    """Random sequences, with enough blocks for any block size."""
    generator, block = random.Random(seed), itertools.count(1)
    return [
        Sequence(
            [generator.randrange(VOCABULARY) for _ in range(length + 8)], [next(block) for _ in range(length // 4 + 3)]
        )
        for length in lengths
    ]


def whole(sequences: list[Sequence], lengths: tuple[int, ...]) -> list[Any]:
    return [Slice(sequence, 0, length) for sequence, length in zip(sequences, lengths, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_equal_those_of_transformers(folder: Path, library: ctypes.CDLL, dtype: str) -> None:
    native = runner_of(folder, dtype, library)
    # With bfloat16 the kernels keep float32 between matmuls, so float32 is the reference for both.
    reference = ReferenceRunner(folder, config_of("float32"))
    lengths = (1, 5, 17, 33)
    plan = whole(sequences(0, *lengths), lengths)
    expected, logits = (every_logits(runner, plan) for runner in (reference, native))
    spread = expected.std()
    error = (logits - expected).abs().max() / spread
    assert error < (1e-4 if dtype == "float32" else 0.25)
    hidden_error = (native.forward(plan).hidden - reference.forward(plan).hidden).abs().max()
    assert hidden_error < (1e-3 if dtype == "float32" else 0.5)
    if dtype == "bfloat16":
        # The error is not larger than that of transformers in bfloat16.
        rounded = every_logits(ReferenceRunner(folder, config_of("bfloat16", runner="reference")), plan).float()
        assert error <= 1.5 * (rounded - expected).abs().max() / spread
    native.close()


@pytest.mark.parametrize(("dtype", "weights"), [("float32", "full"), ("bfloat16", "full"), ("bfloat16", "int8")])
def test_preempted_threads_do_not_change_a_bit(folder: Path, dtype: str, weights: str) -> None:
    # With more threads than cores, threads lose their core, and others repeat their work items.
    many = runner_of(folder, dtype, library_of("all"), threads=4 * (os.cpu_count() or 1) + 1, weights=weights)
    single = runner_of(folder, dtype, library_of("all"), threads=1, weights=weights)
    for seed in range(20):
        lengths = tuple(random.Random(seed).choices(range(1, 40), k=5))
        plan = whole(sequences(seed, *lengths), lengths)
        assert torch.equal(many.forward(plan).hidden, single.forward(plan).hidden)
        assert torch.equal(every_logits(many, plan), every_logits(single, plan))
    for runner in (many, single):
        runner.close()


@pytest.mark.parametrize("weights", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_in_a_batch_and_with_any_prompt_chunks(
    folder: Path, library: ctypes.CDLL, dtype: str, weights: str
) -> None:
    runner = runner_of(folder, dtype, library, weights=weights)
    lengths = tuple(random.Random(1).sample(range(1, 40), 7))
    batch = every_logits(runner, whole(sequences(1, *lengths), lengths)).split(lengths)
    prompts = sequences(1, *lengths)
    order = random.Random(2).sample(range(len(prompts)), len(prompts))
    for number in order:
        sequence, length = prompts[number], lengths[number]
        cuts = sorted({0, length, *random.Random(number).choices(range(length + 1), k=2)})
        chunks = [
            every_logits(runner, [Slice(sequence, start, end - start)])  # type: ignore[arg-type]
            for start, end in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(chunks), batch[number])
    # A decoding step, of all sequences or of one: logits of the step itself.
    for sequence, length in zip(prompts, lengths, strict=True):
        del sequence.ids[length + 1 :]
    decoding = [Slice(sequence, length, 1) for sequence, length in zip(prompts, lengths, strict=True)]  # type: ignore[arg-type]
    computed = runner.forward(decoding)
    logits = computed.logits.clone()
    assert computed.argmax is not None
    for native, expected in zip((computed.argmax.values, computed.argmax.ids), logits.max(dim=-1), strict=True):
        assert torch.equal(native, expected)
    assert len(logits) == len(decoding)
    assert torch.equal(logits, torch.cat([runner.forward([part]).logits.clone() for part in decoding]))
    # Logits that are projected from hidden states have the same bits.
    assert torch.equal(logits, every_logits(runner, decoding))
    runner.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_where_others_have_no_logits(folder: Path, library: ctypes.CDLL, dtype: str) -> None:
    """Rows without logits end in the last layer, when their keys and values are stored."""
    runner, lengths = runner_of(folder, dtype, library), (40, 1, 30, 13)
    expected = [part[-1:] for part in every_logits(runner, whole(sequences(3, *lengths), lengths)).split(lengths)]
    prompts = sequences(3, *lengths)
    for prompt, length in zip(prompts, lengths, strict=True):
        del prompt.ids[length:]
        prompt.needs_every_row = False
    runner.clear(range(100))
    # No row goes on; then two, and in the last step those of an echoed prompt beside one of a long chunk.
    assert len(runner.forward([Slice(prompts[0], 0, 20)]).logits) == 0  # type: ignore[arg-type]
    both = runner.forward([Slice(prompts[2], 0, 30), Slice(prompts[1], 0, 1)]).logits  # type: ignore[arg-type]
    assert torch.equal(both, torch.cat([expected[2], expected[1]]))
    prompts[3].needs_every_row = True
    computed = runner.forward([Slice(prompts[3], 0, 13), Slice(prompts[0], 20, 20)])  # type: ignore[arg-type]
    assert torch.equal(computed.logits, torch.cat([expected[3], expected[0]]))
    assert len(computed.hidden) == 13
    assert torch.equal(next(iter(runner.project(computed, [12]))), expected[3])
    runner.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_with_any_shared_prefix(folder: Path, library: ctypes.CDLL, dtype: str) -> None:
    """Sequences with a common prefix have common blocks, which their last rows attend to as a group."""
    block, runner = BLOCKS.get(folder.name, 4), runner_of(folder, dtype, library)
    generator = random.Random(7)
    prefix = [generator.randrange(VOCABULARY) for _ in range(64)]
    free_blocks = itertools.count(1)
    prefix_blocks = [next(free_blocks) for _ in range(64 // block)]
    prompts, lengths = [], []
    for shared in (0, 16, 32, 32, 32, 48, 48, 17, 32, 32):
        length = generator.randrange(shared + 1, 60)
        ids = prefix[:shared] + [generator.randrange(VOCABULARY) for _ in range(length + 1 - shared)]
        shared_blocks = shared // block
        own_blocks = [next(free_blocks) for _ in range(len(ids) // block + 1 - shared_blocks)]
        prompts.append(Sequence(ids, prefix_blocks[:shared_blocks] + own_blocks, needs_every_row=False))
        lengths.append(length)
    runner.forward([Slice(Sequence(prefix, prefix_blocks), 0, 64)])  # type: ignore[arg-type]
    runner.forward(whole(prompts, tuple(lengths)))
    last = [Slice(sequence, length, 1) for sequence, length in zip(prompts, lengths, strict=True)]  # type: ignore[arg-type]
    alone = torch.cat([runner.forward([part]).logits.clone() for part in last])
    for count in (2, 5, len(last)):
        assert torch.equal(runner.forward(last[:count]).logits, alone[:count])
    generator.shuffle(order := list(range(len(last))))
    assert torch.equal(runner.forward([last[i] for i in order]).logits, alone[order])
    runner.close()


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_the_number_of_threads_does_not_change_a_bit(folder: Path, library: ctypes.CDLL, threads: int) -> None:
    two, several = runner_of(folder, "bfloat16", library), runner_of(folder, "bfloat16", library, threads)
    plan = whole(sequences(5, 30, 3, 9), (30, 3, 9))
    for _ in range(20):
        assert torch.equal(every_logits(two, plan), every_logits(several, plan))
    two.close()
    several.close()


def test_nan_weights_give_nan_logits(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    next(weight for name, weight in weights.items() if ".mlp." in name and weight.dim() == 2).fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    library = build.kernels()
    assert library is not None
    for dtype in DTYPES:
        runner = runner_of(broken, dtype, library)
        (sequence,) = sequences(0, 5)
        del sequence.ids[5:]
        computed = runner.forward(whole([sequence], (5,)))
        assert len(computed.logits) == 1
        assert computed.logits.isnan().all()
        assert computed.argmax is not None
        assert computed.argmax.values.isnan().all()
        runner.close()


def test_unsupported_checkpoints_use_the_reference_runner(tmp_path: Path, folder: Path) -> None:
    assert isinstance(open_runner(folder, config_of("float32"), CPU), NativeRunner)
    assert isinstance(open_runner(folder, config_of("float32", runner="reference"), CPU), ReferenceRunner)
    unsupported = make_checkpoint(tmp_path / "unsupported", n_embd=48, n_head=4, n_layer=1)
    assert isinstance(open_runner(unsupported, config_of("float32"), CPU), ReferenceRunner)
    with pytest.raises(CheckpointError, match=r"runner native cannot serve .*: its width is not a multiple of 32"):
        open_runner(unsupported, config_of("float32", runner="native"), CPU)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "mamba"}, "model_type is none of"), ({"activation_function": "softplus"}, "activation"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"), ({"n_embd": 72}, "not a multiple of 32"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"), ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)  # fmt: skip
def test_gpt2_reports_why_it_is_unsupported(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 9, "n_positions": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert unsupported_reason(Checkpoint(tmp_path), torch.float32) == ""
    assert "neither float32 nor bfloat16" in unsupported_reason(Checkpoint(tmp_path), torch.float16)
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    assert reason in unsupported_reason(Checkpoint(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"hidden_act": "softplus"}, "activation"), ({"hidden_size": 100}, "multiple of 32"),
        ({"head_dim": 300}, "size"), ({"num_key_value_heads": 3}, "KV heads"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"sliding_window": "all"}, "wrong type"), ({"layer_types": ["linear_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "own", "factor": 2.0}}, "RoPE"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "RoPE"),
        ({"num_key_value_heads": "two"}, "wrong type"), ({"rope_scaling": [2.0]}, "wrong type"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "RoPE"),
    ],
)  # fmt: skip
def test_the_llama_family_reports_why_it_is_unsupported(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    config = {
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 9,
        "num_hidden_layers": 1, "max_position_embeddings": 16,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert unsupported_reason(Checkpoint(tmp_path), torch.float32) == ""
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    assert reason in unsupported_reason(Checkpoint(tmp_path), torch.float32)


def test_without_a_compiler_the_reference_runner_computes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build.kernels.cache_clear()
    monkeypatch.setenv(build.CACHE, str(tmp_path / "none"))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        assert isinstance(open_runner(folder, config_of("float32"), CPU), ReferenceRunner)
        with pytest.raises(CheckpointError, match="cannot be compiled here"):
            open_runner(folder, config_of("float32", runner="native"), CPU)
    finally:
        build.kernels.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "isa"), [("avx2", "AVX2"), ("default", "SSE41")])
def test_without_avx512_all_runners_generate_the_same_tokens(tmp_path: Path, capability: str, isa: str) -> None:
    """One setting limits torch and the kernels. Both choose their instructions once per process."""
    make_checkpoint(
        tmp_path / "lm", seed=3, n_embd=64, n_head=2, n_layer=2, initializer_range=0.2, vocab_size=VOCABULARY
    )
    script = Path(__file__).with_name("greedy_by_runner.py")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa}
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "lm")],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    assert results["capability"] == capability.upper()
    assert results["kinds"] == {"native": "NativeRunner", "reference": "ReferenceRunner"}
    assert results["ids"]["native"] == results["ids"]["reference"] == results["ids"]["transformers"]


def test_a_block_interleaves_sixteen_outputs() -> None:
    weight = torch.arange(20 * 4, dtype=torch.float32).view(20, 4)
    float32, bfloat16, int8 = (
        pack(weight, dtype, LargePages().zeros) for dtype in (torch.float32, torch.bfloat16, torch.int8)
    )
    assert float32.shape == (2, 4, 16, 1)
    assert bfloat16.shape == (2, 2, 16, 2)
    # int8 inputs are padded to a multiple of 64.
    assert int8.shape == (2, 16, 16, 4)
    for output, number in itertools.product(range(20), range(4)):
        assert float32[output // 16, number, output % 16, 0] == weight[output, number]
        assert int8[output // 16, number // 4, output % 16, number % 4] == weight[output, number]
        assert bfloat16[output // 16, number // 2, output % 16, number % 2] == weight[output, number]
    assert not int8[:, 1:].any()
    assert not float32[1, :, 4:].any()
