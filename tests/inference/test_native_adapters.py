"""Adapters in the C++ kernels, in every ISA variant: PEFT's logits, and a row's bits are the same in any batch."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.adapters.loaded import LoadedAdapter
from engine.adapters.lora import LoraAdapter, LowRank
from engine.adapters.peft_files import read_adapter
from engine.runners.native.runner import NativeRunner
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from tritonlm.contract import CheckpointError

from .adapters import PeftReference, write_adapter
from .family_zoo import CONTEXT, VOCABULARY, ZOO
from .isa_variants import FLOAT_VARIANTS, existing, library_of
from .test_native import CPU, DTYPES, config_of

# A matrix of queries, keys and values; heads that are padded or whose dimensions change places; gate and up in one
# matrix or two; layers that an adapter does not change; rows that a shared expert's gate scales.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"fan_in_fan_out": True}, "gpt_neox": {}, "falcon": {"r": 8}, "bloom": {"r": 3},
    "llama": {"target_modules": ["q_proj", "v_proj", "up_proj"]}, "gemma3_text": {"r": 1}, "phi3": {"r": 16},
    "qwen3": {"rank_pattern": {"q_proj": 1, "down_proj": 9}}, "cohere": {"use_rslora": True, "lora_alpha": 3},
    "qwen2_moe": {"target_modules": ["q_proj", "o_proj", "shared_expert.down_proj", "shared_expert.gate_proj"]},
}  # fmt: skip
# Of the adapters of one base, with those of one block of 8 ranks, of a part of it, and of several.
RANKS = (1, 8, 16, 20, 64, 256)
LENGTHS = (1, 5, 17, 33, 60, 2, 1, 1)
_BLOCKS = 16
_LLAMA = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
_GREATEST_RANK = 256


def make_base(folder: Path, name: str, **sizes: Any) -> Path:
    sizes = {"initializer_range": 0.2, "vocab_size": VOCABULARY, "model_type": name.split(maxsplit=1)[0], **sizes}
    sizes.setdefault("n_positions" if "n_embd" in sizes else "max_position_embeddings", CONTEXT)
    return make_checkpoint(folder, seed=3, **sizes)


def runner_of(folder: Path, dtype: str, library: ctypes.CDLL, **settings: Any) -> NativeRunner:
    defaults = {"block_tokens": 16, "kv_cache_tokens": (1 + len(LENGTHS) * _BLOCKS) * 16, "threads": 2}
    return NativeRunner(folder, config_of(dtype, **{**defaults, **settings}), CPU, DTYPES[dtype], library)


def sequences() -> list[Sequence]:
    generator = random.Random(0)
    return [
        Sequence(
            [generator.randrange(3, VOCABULARY) for _ in range(length)],
            list(range(1 + n * _BLOCKS, 1 + (n + 1) * _BLOCKS)),
        )
        for n, length in enumerate(LENGTHS)
    ]


def load(runner: NativeRunner, adapter: LoraAdapter) -> LoadedAdapter:
    return LoadedAdapter(adapter.name, adapter.identity, runner.load_adapter(adapter))


def whole(prompts: list[Sequence]) -> list[Slice]:
    return [Slice(prompt, 0, len(prompt.ids)) for prompt in prompts]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", name, **ZOO[name])
    folder = write_adapter(base, tmp_path / "adapter", **FAMILIES[name])
    runner, prompts = runner_of(base, "float32", library_of("all")), sequences()
    adapter = load(runner, read_adapter("one", folder, _GREATEST_RANK))
    references = PeftReference(base, None), PeftReference(base, folder)
    plain, expected = ([reference.logprobs(prompt.ids) for prompt in prompts] for reference in references)
    for number, prompt in enumerate(prompts):
        prompt.adapter = adapter if number % 2 else None
    rows = every_logits(runner, whole(prompts)).double().log_softmax(-1).split(LENGTHS)
    for number, found in enumerate(rows):
        assert torch.allclose(found, (expected if number % 2 else plain)[number], atol=1e-4, rtol=0)
        assert (expected[number] - plain[number]).abs().max() > 0.1, "the adapter changes nothing"
    runner.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("adapters") / "base", "llama", **_LLAMA)


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[int, Path]:
    """An adapter of each rank."""
    return {rank: write_adapter(base, base.parent / str(rank), seed=rank, r=rank) for rank in RANKS}


@pytest.fixture(scope="module")
def adapters(folders: dict[int, Path]) -> list[LoraAdapter]:
    return [read_adapter(f"rank-{rank}", folder, _GREATEST_RANK) for rank, folder in folders.items()]


@pytest.fixture(scope="module")
def expected(base: Path, folders: dict[int, Path]) -> list[torch.Tensor]:
    """Of the sequence `number` with the adapter `number`."""
    references = [PeftReference(base, folder) for folder in folders.values()]
    return [
        reference.logprobs(prompt.ids) for reference, prompt in zip(references, sequences()[: len(RANKS)], strict=True)
    ]


# The base alone has 0.03, 0.10 and 0.75 in bfloat16: its weights are random numbers, which int4 rounds coarsely.
# Adapters add nothing to that. A row that lacks its adapter is 0.6 to 2.2 away.
LARGEST_MEAN_ERROR = {"full": 0.06, "int8": 0.15, "int4": 0.9}
CASES = [
    *(("full", dtype, variant) for dtype in DTYPES for variant in FLOAT_VARIANTS),
    *((weights, "bfloat16", variant) for weights in ("int8", "int4") for variant in existing("all", "avx2")),
    ("int4", "float32", "all"),
]


def in_chunks(runner: NativeRunner, prompt: Sequence, cuts: list[int]) -> torch.Tensor:
    """The logits of a sequence alone, in several steps."""
    chunks = [Slice(prompt, start, end - start) for start, end in itertools.pairwise(cuts)]  # type: ignore[arg-type]
    return torch.cat([every_logits(runner, [chunk]) for chunk in chunks])


@pytest.mark.parametrize(("weights", "dtype", "variant"), CASES)
def test_a_row_is_the_same_alone_in_a_batch_and_with_any_prompt_chunks(
    base: Path, adapters: list[LoraAdapter], weights: str, dtype: str, variant: str
) -> None:
    runner, prompts = runner_of(base, dtype, library_of(variant), weights=weights), sequences()
    loaded = [None, None, *(load(runner, adapter) for adapter in adapters)]
    alone: dict[tuple[int, int], torch.Tensor] = {}
    # Each adapter once and two sequences without; one for all; some.
    choices = [[*range(2, len(loaded)), 0, 1], [4] * len(prompts)]
    choices += [random.Random(seed).choices(range(len(loaded)), k=len(prompts)) for seed in range(4)]
    for seed, chosen in enumerate(choices):
        for prompt, number in zip(prompts, chosen, strict=True):
            prompt.adapter = loaded[number]
        batch = every_logits(runner, whole(prompts)).split(LENGTHS)
        for key in enumerate(chosen):
            n, length = key[0], LENGTHS[key[0]]
            if key not in alone:
                cuts = sorted({0, length, *random.Random(seed).choices(range(length + 1), k=2)})
                alone[key] = in_chunks(runner, prompts[n], cuts)
            assert torch.equal(batch[n], alone[key])
    runner.close()


@pytest.mark.parametrize(("weights", "dtype", "variant"), CASES)
def test_logits_with_any_rank_and_weights_are_those_of_peft(
    base: Path, adapters: list[LoraAdapter], expected: list[torch.Tensor], weights: str, dtype: str, variant: str
) -> None:
    runner, prompts = runner_of(base, dtype, library_of(variant), weights=weights), sequences()[: len(RANKS)]
    for prompt, adapter in zip(prompts, adapters, strict=True):
        prompt.adapter = load(runner, adapter)
    errors = (every_logits(runner, whole(prompts)).double().log_softmax(-1) - torch.cat(expected)).abs()
    if (weights, dtype) == ("full", "float32"):
        assert errors.max() < 1e-4
    assert errors.mean() < LARGEST_MEAN_ERROR[weights]
    runner.close()


def test_rows_without_an_adapter_keep_their_bits(base: Path, adapters: list[LoraAdapter]) -> None:
    runner, prompts = runner_of(base, "bfloat16", library_of("all")), sequences()
    plain = every_logits(runner, whole(prompts)).split(LENGTHS)
    for prompt in prompts[::2]:
        prompt.adapter = load(runner, adapters[2])
    mixed = every_logits(runner, whole(prompts)).split(LENGTHS)
    assert [torch.equal(one, other) for one, other in zip(plain, mixed, strict=True)] == [False, True] * 4
    # Outputs have the plan's order, also those that tokens are sampled from.
    last = [Slice(prompt, len(prompt.ids) - 1, 1) for prompt in prompts]  # type: ignore[arg-type]
    for prompt in prompts:
        prompt.needs_every_row = False
    sampled = runner.forward(last)
    assert torch.equal(sampled.logits, torch.cat([rows[-1:] for rows in mixed]))
    runner.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_preempted_threads_do_not_change_a_bit(base: Path, adapters: list[LoraAdapter], dtype: str) -> None:
    results = []
    for threads in (1, 4 * (os.cpu_count() or 1) + 1):
        runner, prompts = runner_of(base, dtype, library_of("all"), threads=threads), sequences()
        loaded = [None, *(load(runner, adapter) for adapter in adapters)]
        for seed in range(10):
            generator = random.Random(seed)
            for prompt in prompts:
                prompt.adapter = generator.choice(loaded)
            results.append(every_logits(runner, whole(prompts)))
        runner.close()
    assert all(torch.equal(one, other) for one, other in zip(results[:10], results[10:], strict=True))


def of_dtype(adapter: LoraAdapter, dtype: torch.dtype) -> LoraAdapter:
    layers = {name: LowRank(layer.a.to(dtype), layer.b.to(dtype)) for name, layer in adapter.layers.items()}
    return LoraAdapter(adapter.name, adapter.identity, layers)


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_takes_no_more_memory_than_its_file(
    tmp_path: Path, adapters: list[LoraAdapter], base: Path, dtype: str, file_dtype: torch.dtype
) -> None:
    wide = {**_LLAMA, "hidden_size": 256, "intermediate_size": 512}
    wide_base = make_base(tmp_path / "wide", "llama", **wide)
    for rank in (1, 8, 16):
        folder = write_adapter(wide_base, tmp_path / str(rank), r=rank)
        adapter = of_dtype(read_adapter("wide", folder, _GREATEST_RANK), file_dtype)
        runner = runner_of(wide_base, dtype, library_of("all"))
        file_bytes = sum(matrix.nbytes for layer in adapter.layers.values() for matrix in (layer.a, layer.b))
        share = runner.load_adapter(adapter).nbytes / file_bytes
        # Structures are 100 bytes for each matrix.
        assert share < (0.55 if dtype == "bfloat16" and file_dtype == torch.float32 else 1.05) + 0.3 / rank
        runner.close()


def test_an_adapter_in_bfloat16_loses_nothing_in_float32(base: Path, adapters: list[LoraAdapter]) -> None:
    """It keeps its numbers' type, which halves its memory, and yields what the same numbers in float32 do."""
    runner, prompts = runner_of(base, "float32", library_of("all")), sequences()
    rounded = of_dtype(adapters[3], torch.bfloat16)
    full = of_dtype(rounded, torch.float32)
    barely = {name: LowRank(layer.a * (1 + 2**-12), layer.b) for name, layer in full.layers.items()}
    sizes, results = [], []
    for adapter in (rounded, full, LoraAdapter("other", "other", barely)):
        loaded = load(runner, adapter)
        sizes.append(loaded.weights.nbytes)
        for prompt in prompts:
            prompt.adapter = loaded
        results.append(every_logits(runner, whole(prompts)))
    assert sizes[0] == sizes[1] < 0.6 * sizes[2]
    assert torch.equal(results[0], results[1])
    assert 0 < (results[2] - results[0]).abs().max() < 0.05 * results[0].std()
    runner.close()


@pytest.fixture
def runner(base: Path) -> Iterator[NativeRunner]:
    runner = runner_of(base, "float32", library_of("all"))
    yield runner
    runner.close()


def test_an_adapter_of_other_layers_or_shapes_is_refused(runner: NativeRunner) -> None:
    def adapter(**layers: LowRank) -> LoraAdapter:
        return LoraAdapter("mine", "0", {name.replace("__", "."): layer for name, layer in layers.items()})

    matrices = LowRank(torch.ones(2, 96), torch.ones(128, 2))
    runner.load_adapter(adapter(model__layers__0__self_attn__q_proj=matrices))
    for layer in ("lm_head", "model__layers__2__self_attn__q_proj", "model__embed_tokens"):
        name = layer.replace("__", "[.]")
        with pytest.raises(CheckpointError, match=rf"'mine'.* changes {name}, .*set the runner to reference"):
            runner.load_adapter(adapter(**{layer: matrices}))
    for wrong in (LowRank(torch.ones(2, 64), matrices.b), LowRank(matrices.a, torch.ones(96, 2))):
        with pytest.raises(CheckpointError, match=r"'mine'.*self_attn\.q_proj .*the LM's has 96 and 128"):
            runner.load_adapter(adapter(model__layers__0__self_attn__q_proj=wrong))
    with pytest.raises(CheckpointError, match=r"'mine' .*changes no layer"):
        runner.load_adapter(adapter())


def test_an_adapter_of_experts_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mixtral", **ZOO["mixtral"])
    runner = runner_of(base, "float32", library_of("all"))
    layers = {"model.layers.0.mlp.experts.0.gate_proj": LowRank(torch.ones(1, 64), torch.ones(64, 1))}
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.0\.gate_proj, .*MLPs without experts"):
        runner.load_adapter(LoraAdapter("mine", "0", layers))
    runner.close()
