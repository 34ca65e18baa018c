"""The KV cache in int8: close to one in the model's number type, half its size, and the same bits in any batch."""

from __future__ import annotations

import ctypes
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import inspection
from engine.runners.kv_cache import KVCache, LayerShape
from engine.runners.native.runner import NativeRunner
from engine.runners.reference import ReferenceRunner
from engine.runners.select import open_runner
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from safetensors.torch import load_file, save_file
from tritonlm.contract import Checkpoint, CheckpointError

from .family_zoo import VOCABULARY, ZOO
from .harness import make_engine, run, submit
from .isa_variants import EMULATED, VARIANTS, library_of
from .test_native import CPU, DTYPES, config_of, sequences, whole

# Query heads by KV head 1 to 17 and head widths 32 to 256, with windows, soft-caps, sinks, ALiBi, and without RoPE.
_HEADS = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
SHAPES: dict[str, dict[str, Any]] = {
    **{name: ZOO[name] for name in ("gpt2", "bloom", "falcon", "mistral", "gemma2", "gemma wide")},
    # Each token has all experts: which are chosen changes with the smallest difference.
    "gpt_oss": {**ZOO["gpt_oss"], "num_local_experts": 2, "num_experts_per_tok": 2},
    "llama": {**_HEADS, "num_key_value_heads": 2, "head_dim": 64},
    "qwen3": {**_HEADS, "num_key_value_heads": 3, "head_dim": 128},
}
LENGTHS = (1, 5, 17, 33, 60)
# Not a multiple of 16 tokens, too.
BLOCKS = {"llama": 4, "gemma wide": 32}
# Of the spread of logits, on average. The same models' matmuls in bfloat16 cost as much (test_native_families.py).
LARGEST_ERROR = 0.03


# Every shape by this machine's kernels; a few shapes, of all instructions, in every variant.
IN_ALL_VARIANTS = ("llama", "gemma wide", "gpt_oss")
CASES = [(name, variant) for name in SHAPES for variant in VARIANTS if variant == "all" or name in IN_ALL_VARIANTS]
EMULATED_CASES = [("llama", variant) for variant in EMULATED if variant != "avx_vnni_emulated"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    def make(name: str) -> Path:
        sizes: dict[str, Any] = {"initializer_range": 0.2, "vocab_size": VOCABULARY, **SHAPES[name]}
        sizes.setdefault("n_positions" if "n_embd" in sizes else "max_position_embeddings", 96)
        return make_checkpoint(root / name, seed=3, model_type=name.split(maxsplit=1)[0], **sizes)

    root = tmp_path_factory.mktemp("int8-kv")
    return {name: make(name) for name in SHAPES}


def runner_of(folder: Path, dtype: str, library: ctypes.CDLL, **settings: Any) -> NativeRunner:
    block = BLOCKS.get(folder.name, 16)
    defaults = {"kv_dtype": "int8", "block_tokens": block, "kv_cache_tokens": 100 * block, "threads": 2}
    return NativeRunner(folder, config_of(dtype, **{**defaults, **settings}), CPU, DTYPES[dtype], library)


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).abs().mean() / expected.std())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "variant"), CASES + EMULATED_CASES)
def test_logprobs_are_close_and_a_row_is_the_same_in_any_batch_and_chunk(
    folders: dict[str, Path], name: str, variant: str, dtype: str
) -> None:
    folder, library = folders[name], library_of(variant)
    full, runner = runner_of(folder, dtype, library, kv_dtype="auto"), runner_of(folder, dtype, library)
    plan = whole(prompts := sequences(0, *LENGTHS), LENGTHS)
    batch = every_logits(runner, plan)
    expected = every_logits(full, plan)
    assert 0 < error(batch, expected) < LARGEST_ERROR
    assert error(batch.log_softmax(-1), expected.log_softmax(-1)) < LARGEST_ERROR
    for number, (sequence, rows) in enumerate(zip(prompts, batch.split(LENGTHS), strict=True)):
        cuts = sorted({0, len(rows), *random.Random(number).choices(range(len(rows) + 1), k=2)})
        chunks = [every_logits(runner, [Slice(sequence, a, b - a)]) for a, b in itertools.pairwise(cuts)]  # type: ignore[arg-type]
        assert torch.equal(torch.cat(chunks), rows)
    last = [Slice(sequence, length - 1, 1) for sequence, length in zip(prompts, LENGTHS, strict=True)]  # type: ignore[arg-type]
    assert torch.equal(every_logits(runner, last), torch.cat([rows[-1:] for rows in batch.split(LENGTHS)]))
    for each in (full, runner):
        each.close()


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_row_is_the_same_with_any_shared_prefix_and_number_of_threads(
    folders: dict[str, Path], name: str, variant: str
) -> None:
    folder, library, weights = folders[name], library_of(variant), "int8" if variant == "all" else "full"
    runner, block = runner_of(folder, "bfloat16", library, weights=weights), BLOCKS.get(folder.name, 16)
    generator, free_blocks = random.Random(7), itertools.count(1)
    prefix = [generator.randrange(VOCABULARY) for _ in range(64)]
    prefix_blocks = [next(free_blocks) for _ in range(64 // block)]
    prompts = []
    for shared in (0, 32, 32, 32, 64, 17):
        ids = prefix[:shared] + [generator.randrange(VOCABULARY) for _ in range(generator.randrange(2, 20))]
        own = [next(free_blocks) for _ in range(len(ids) // block + 1 - shared // block)]
        prompts.append(Sequence(ids, prefix_blocks[: shared // block] + own, needs_every_row=False))
    runner.forward([Slice(Sequence(prefix, prefix_blocks), 0, 64)])  # type: ignore[arg-type]
    runner.forward([Slice(prompt, 0, len(prompt.ids)) for prompt in prompts])  # type: ignore[arg-type]
    last = [Slice(prompt, len(prompt.ids) - 1, 1) for prompt in prompts]  # type: ignore[arg-type]
    together = runner.forward(last).logits.clone()
    assert torch.equal(together, torch.cat([runner.forward([part]).logits.clone() for part in last]))
    single = runner_of(folder, "bfloat16", library, weights=weights, threads=1)
    single._cache.memory.copy_(runner._cache.memory)
    assert torch.equal(single.forward(last).logits, together)
    for each in (runner, single):
        each.close()


@pytest.fixture
def llama(folders: dict[str, Path]) -> Path:
    return folders["llama"]


@pytest.mark.parametrize("runner", ["native", "reference", "graphs"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_memory_is_about_half(llama: Path, runner: str, dtype: str) -> None:
    config = config_of(dtype, runner=runner, kv_cache_tokens=400, kv_dtype="int8")
    engine_runner = open_runner(llama, config, CPU)
    # 2 layers of keys and values, 2 KV heads of 64 numbers and a scale; 100 blocks and the padding block.
    assert engine_runner.memory.pool_bytes == 2 * 2 * 2 * (64 + 4) * 404
    assert engine_runner.memory.pool_bytes / (2 * 2 * 2 * 64 * 404 * DTYPES[dtype].itemsize) < 0.54
    engine_runner.close()


def test_inspection_counts_numbers_and_scales(llama: Path) -> None:
    facts = inspection.inspect(Checkpoint(llama), config_of("float32", kv_dtype="int8"))
    assert (facts["kv_dtype"], facts["kv_bytes_per_token"]) == ("int8", 2 * 2 * 2 * (64 + 4))


def test_the_reference_and_the_kernels_quantize_alike(llama: Path) -> None:
    lengths = (3, 20, 41)
    plan = whole(sequences(1, *lengths), lengths)
    full, native, reference = (
        every_logits(open_runner(llama, config_of("float32", runner=runner, kv_dtype=kind), CPU), plan)
        for runner, kind in (("native", "auto"), ("native", "int8"), ("reference", "int8"))
    )
    assert error(reference, native) < 0.1 * error(native, full)


def test_a_row_that_is_read_is_what_was_written_but_for_half_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(6, 3, 10, generator=generator), torch.randn(6, 3, 24, generator=generator)
    keys[1, 2], values[4, 1, 5], values[3, 0, 0] = 0, torch.nan, torch.inf
    cache = KVCache([LayerShape(3, 10, 24)], 4, 4, torch.float32, CPU, torch.int8)
    slots = torch.tensor([0, 3, 4, 5, 9, 15])
    cache.write(0, slots, keys, values)
    for rows, written in zip(cache.read(0, slots.unsqueeze(0)), (keys, values), strict=True):
        read = rows[0].transpose(0, 1)
        finite = written.isfinite().all(-1, keepdim=True).expand_as(written)
        steps = written.abs().amax(-1, keepdim=True).expand_as(written) / 127
        assert ((read - written).abs() <= 0.5001 * steps)[finite].all()
        assert not read[~finite].isfinite().any()
    cache.clear([0, 1, 2, 3])
    assert not any(rows.any() for rows in cache.read(0, slots.unsqueeze(0)))


def test_nan_weights_give_nan_logits_and_leave_nothing_behind(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    for name in ("k_proj", "v_proj"):
        broken = tmp_path / name
        broken.mkdir()
        for file in llama.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        changed = {key: weight.clone() for key, weight in weights.items()}
        next(weight for key, weight in changed.items() if name in key)[0, 0] = torch.nan
        save_file(changed, broken / "model.safetensors", metadata={"format": "pt"})
        runner = runner_of(broken, "float32", library_of("all"))
        (sequence,) = sequences(0, 5)
        sequence.ids[:] = [3, 4, 5, 6, 7]
        assert runner.forward(whole([sequence], (5,))).logits.isnan().all()
        runner.clear(sequence.blocks)
        assert not runner._cache.memory.any()
        runner.close()


def test_odd_blocks_are_for_the_reference_runner(llama: Path) -> None:
    odd = {"kv_dtype": "int8", "block_tokens": 5}
    assert isinstance(open_runner(llama, config_of("float32", **odd), CPU), ReferenceRunner)
    with pytest.raises(CheckpointError, match=r"kv_dtype int8 needs an even block_tokens \(got 5\)"):
        open_runner(llama, config_of("float32", runner="native", **odd), CPU)


def test_texts_do_not_depend_on_preemption_the_prefix_cache_or_speculation(llama: Path) -> None:
    settings = {"kv_dtype": "int8", "runner": "native", "dtype": "bfloat16"}
    prompts = [[n, *range(10), *range(10)] for n in range(3, 7)]

    def texts(**more: Any) -> list[list[int]]:
        engine = make_engine(llama, **settings, **more)
        outputs = [submit(engine, prompt, max_tokens=60, ignore_eos=True) for prompt in prompts]
        run(engine)
        again = submit(engine, prompts[0], max_tokens=60, ignore_eos=True)
        run(engine)
        assert again.token_ids == outputs[0].token_ids
        assert (engine.scheduler.preemptions > 0) == ("kv_cache_tokens" in more)
        return [output.token_ids for output in outputs]

    expected = texts()
    assert texts(kv_cache_tokens=120, max_context_tokens=100) == expected
    assert texts(speculative_tokens=8) == expected
