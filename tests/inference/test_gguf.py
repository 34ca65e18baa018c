"""GGUF files on the kernels: every architecture against transformers, quantized weights, and what is refused."""

from __future__ import annotations

import ctypes
import mmap
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from engine.config import EngineConfig
from engine.runners.native import build
from engine.runners.native.large_pages import LargePages
from engine.runners.native.runner import NativeRunner, unsupported_reason
from engine.runners.select import open_runner
from engine.scheduling.scheduler import Slice
from fakes.gguf_writer import ARCHITECTURES, write_gguf
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tritonlm.checkpoints.gguf import prepare
from tritonlm.checkpoints.gguf.architectures import ARCHITECTURES as READ
from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.contract.load_progress import LoadProgress

from .family_zoo import CONTEXT, ZOO
from .harness import make_engine, run, submit
from .test_native import CPU, DTYPES, config_of

VOCABULARY = 512
LENGTHS = (1, 17, 40)
_BLOCKS = 16
# The zoo's families that the format knows, without what it cannot say.
_NO_WINDOW = {"sliding_window": None}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
CASES: dict[str, dict[str, Any]] = {
    "arcee": {}, "bloom": {}, "cohere": {}, "cohere one key": {},
    "cohere2": {"attention_bias": False, "num_hidden_layers": 4, "sliding_window_pattern": 4}, "ernie4_5": {},
    "exaone4": {}, "exaone4 windows": {}, "glm4": {}, "hunyuan_v1_dense": {}, "nemotron": {}, "nemotron biases": {},
    "olmo3": {},
    "falcon": {"rope_theta": 10000.0}, "falcon two norms": {}, "gemma": {}, "gemma2": {"query_pre_attn_scalar": 24},
    "gpt2": {}, "gpt_bigcode": {}, "gpt_bigcode all heads": {"scale_attn_weights": True}, "gpt_neox": {},
    "gpt_neox sequential": {"hidden_act": "gelu", "rotary_emb_base": 10000}, "gpt_oss": {}, "granite": {}, "llama": {},
    "llama biases": {}, "llama linear": {}, "llama llama3": {}, "llama yarn": {}, "llama longrope long": {},
    "gemma3_text": {"query_pre_attn_scalar": 24, **_ALTERNATING}, "mistral": _NO_WINDOW, "mixtral": _NO_WINDOW,
    "olmo": {"attention_bias": False}, "olmo2": {}, "olmoe": {}, "phi": {}, "phi3": {}, "phi3 long": {}, "qwen2": {},
    "qwen2_moe": {}, "qwen3": {}, "qwen3_moe": {"mlp_only_layers": []}, "smollm3": {}, "stablelm": {},
    "stablelm parallel": {}, "starcoder2": _NO_WINDOW,
}  # fmt: skip
# Those that transformers quantizes with the same result: rows of whole blocks.
_LLAMA = {**ZOO["llama"], "intermediate_size": 96, "head_dim": 32}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = build.kernels()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def checkpoint_of(name: str, folder: Path, **changes: Any) -> Path:
    """Random weights; also in vectors, where new ones are all 0 or 1."""
    sizes: dict[str, Any] = {"initializer_range": 0.2, "vocab_size": VOCABULARY, **ZOO[name], **changes}
    sizes.setdefault("n_positions" if "n_embd" in sizes else "max_position_embeddings", CONTEXT)
    make_checkpoint(folder, seed=3, model_type=name.split(maxsplit=1)[0], **sizes)
    for file in folder.glob("*.safetensors"):
        weights, generator = load_file(file), torch.Generator().manual_seed(4)
        for weight in (weight for name, weight in weights.items() if weight.dim() == 1 or "norm" in name):
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def plan() -> list[Slice]:
    sequences = [
        Sequence(
            random.Random(n).choices(range(3, VOCABULARY), k=length),
            list(range(1 + n * _BLOCKS, 1 + (n + 1) * _BLOCKS)),
        )
        for n, length in enumerate(LENGTHS)
    ]
    return [Slice(sequence, 0, len(sequence.ids)) for sequence in sequences]  # type: ignore[arg-type]


def logits_of(
    folder: Path, library: ctypes.CDLL, dtype: str = "float32", weights: str = "full", **settings: Any
) -> torch.Tensor:
    config = config_of(dtype, weights=weights, kv_cache_tokens=len(LENGTHS) * _BLOCKS * 16, block_tokens=16, **settings)
    runner = NativeRunner(folder, config, CPU, DTYPES[dtype], library)
    logits = every_logits(runner, plan())
    runner.close()
    return logits


def transformers_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        rows = [model(torch.tensor([part.request.ids]), use_cache=False).logits[0] for part in plan()]  # type: ignore[attr-defined]
    return torch.cat(rows)


# Where activations are in int8.
_INT8_DIFFERENCE = 0.08


def typical_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The root of the mean square, in standard deviations of the logits."""
    return float((logits - expected).square().mean().sqrt() / expected.std())


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).abs().max() / expected.std())


def test_every_architecture_is_tested() -> None:
    assert {ARCHITECTURES[name.split(maxsplit=1)[0]] for name in CASES} == set(READ)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_checkpoint_that_was_converted(name: str, tmp_path: Path, library: ctypes.CDLL) -> None:
    original = checkpoint_of(name, tmp_path / "original", **CASES[name])
    folder = prepare(write_gguf(original, tmp_path / "model.gguf"))
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    assert unsupported_reason(checkpoint, torch.float32) == ""
    expected = transformers_logits(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval())
    assert difference(logits_of(folder, library), expected) < 1e-4


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16"])
def test_quantized_logits_are_those_of_the_dequantized_weights(kind: str, tmp_path: Path, library: ctypes.CDLL) -> None:
    original, number = checkpoint_of("llama", tmp_path / "original", **_LLAMA), GGMLQuantizationType[kind]
    folder = prepare(write_gguf(original, tmp_path / "model.gguf", number))
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.dim() > 1):
            stored = gguf.quants.quantize(weight.numpy(), number)
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(stored, number)))
    expected = transformers_logits(model)
    assert difference(logits_of(folder, library), expected) < 1e-4
    # With activations in int8.
    assert typical_difference(logits_of(folder, library, weights="auto"), expected) < _INT8_DIFFERENCE


def before_a_gap(_: LargePages, count: int) -> torch.Tensor:
    """Zero bytes, behind which no memory can be read."""
    size = count + -count % mmap.PAGESIZE
    pages = torch.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), dtype=torch.uint8)
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(pages.data_ptr() + size), mmap.PAGESIZE, 0)
    return pages[size - count : size]


def test_no_weights_are_read_behind_a_matrix(
    tmp_path: Path, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pass of four rows the last one is missing: what another matmul, of more inputs, left there is not used."""
    monkeypatch.setattr(LargePages, "zeros", before_a_gap)
    sizes = {**_LLAMA, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 3}
    original = checkpoint_of("llama", tmp_path / "original", **sizes)
    (file,) = original.glob("*.safetensors")
    weights = load_file(file)
    for name, weight in weights.items():
        if "up_proj" in name or "gate_proj" in name:
            weight[256 + 5 * 32 :: 256] *= 100
    save_file(weights, file, metadata={"format": "pt"})
    folder = prepare(write_gguf(original, tmp_path / "model.gguf", GGMLQuantizationType.Q4_0))
    runner = NativeRunner(
        folder, config_of("float32", kv_cache_tokens=256, block_tokens=16), CPU, torch.float32, library
    )
    sequence: Any = Sequence([3, 4, 5], [1])
    assert every_logits(runner, [Slice(sequence, 0, 3)]).isfinite().all()
    runner.close()


# Whole blocks in every row.
_BLOCKED = {"intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt_oss", "MXFP4"), ("qwen3_moe", "Q8_0"), ("qwen2_moe", "Q4_0"), ("bloom", "Q5_0"), ("gpt2", "Q4_1"),
        ("phi3", "Q8_0"), ("stablelm", "Q5_1"), ("falcon two norms", "Q8_0"), ("gpt_neox", "Q8_0"), ("gemma2", "BF16"),
    ],
)  # fmt: skip
def test_rows_and_experts_of_blocks_are_those_of_full_precision(
    name: str, kind: str, tmp_path: Path, library: ctypes.CDLL
) -> None:
    changes = {key: value for key, value in _BLOCKED.items() if key in ZOO[name]}
    original = checkpoint_of(name, tmp_path / "original", **{**CASES[name], **changes})
    files = [
        write_gguf(original, tmp_path / f"{dequantized}.gguf", GGMLQuantizationType[kind], dequantized=dequantized)
        for dequantized in (False, True)
    ]
    folders = [prepare(file) for file in files]
    logits = [logits_of(folder, library) for folder in folders]
    assert torch.equal(*logits)
    assert typical_difference(logits_of(folders[0], library, weights="auto"), logits[0]) < _INT8_DIFFERENCE


@pytest.mark.parametrize(("dtype", "weights"), [("float32", "full"), ("bfloat16", "full"), ("bfloat16", "int8")])
def test_full_precision_gives_the_same_bits_as_safetensors(
    dtype: str, weights: str, tmp_path: Path, library: ctypes.CDLL
) -> None:
    original = checkpoint_of("qwen3", tmp_path / "original")
    folder = prepare(write_gguf(original, tmp_path / "model.gguf"))
    logits = [logits_of(source, library, dtype, weights=weights) for source in (original, folder)]
    assert torch.equal(*logits)


def test_an_engine_continues_texts_of_a_split_file(tmp_path: Path) -> None:
    original = checkpoint_of("llama", tmp_path / "original")
    whole = write_gguf(original, tmp_path / "model.gguf")
    parts = split(whole)
    texts = []
    for folder in (original, prepare(parts[0]), prepare(parts[1])):
        engine = make_engine(folder, runner="native", dtype="float32", block_tokens=16, kv_cache_tokens=256)
        output = submit(engine, [5, 6, 7], max_tokens=16)
        run(engine)
        texts.append(output.token_ids)
    assert len(parts) == 2
    assert len(texts[0]) > 0
    assert texts[0] == texts[1] == texts[2]


def split(whole: Path) -> list[Path]:
    """Two parts: all metadata and half of the tensors; the other half."""
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(whole.with_name("split.gguf"), "llama", split_max_tensors=(len(reader.tensors) + 1) // 2)
    for field in list(reader.fields.values())[3:]:
        if field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole.unlink()
    return sorted(whole.parent.glob("split-*.gguf"))


# What is refused.


@pytest.mark.parametrize("runner", ["graphs", "reference"])
def test_other_runners_refuse_a_gguf_file(tmp_path: Path, runner: str) -> None:
    folder = prepare(write_gguf(checkpoint_of("llama", tmp_path / "original"), tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match=f"runner {runner} does not read it; set runner to auto"):
        open_runner(folder, EngineConfig(device="cpu", runner=runner), CPU)


def test_a_gpu_refuses_a_gguf_file(tmp_path: Path) -> None:
    folder = prepare(write_gguf(checkpoint_of("llama", tmp_path / "original"), tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match="only the kernels read it, and it computes on a GPU"):
        open_runner(folder, EngineConfig(), torch.device("cuda:0"))


def test_the_progress_counts_the_bytes_of_the_weights(tmp_path: Path, library: ctypes.CDLL) -> None:
    folder = prepare(write_gguf(checkpoint_of("llama", tmp_path / "original"), tmp_path / "model.gguf"))
    total = Checkpoint(folder).weight_bytes()
    assert total == 2 * sum(
        weight.numel() for weight in load_file(tmp_path / "original" / "model.safetensors").values()
    )
    progress = LoadProgress(total)
    NativeRunner(folder, config_of("bfloat16"), CPU, torch.bfloat16, library, progress).close()
    assert 0.9 * total < progress.done <= total
