"""Mixtures of experts beyond test_native_families.py: both layouts of their files, many rows, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.runners.native.runner import NativeRunner, unsupported_reason
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from tritonlm.contract import Checkpoint

from .family_zoo import CONTEXT, VOCABULARY, ZOO
from .isa_variants import library_of
from .test_native import CPU, DTYPES, config_of

_BLOCK_TOKENS = 16
# More than a work item has at most, in int8 (kMaxInt8Rows), and so more than in other types.
_MANY_ROWS = 700


def _checkpoint(folder: Path, name: str, **changes: Any) -> Path:
    sizes = {"initializer_range": 0.2, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, **ZOO[name]}
    return make_checkpoint(folder / name, model_type=name, **{**sizes, **changes})


def _logits(folder: Path, cuts: list[int], dtype: str = "float32", weights: str = "full") -> torch.Tensor:
    config = config_of(dtype, block_tokens=_BLOCK_TOKENS, kv_cache_tokens=2 * _MANY_ROWS, weights=weights)
    runner = NativeRunner(folder, config, CPU, DTYPES[dtype], library_of("all"))
    ids = random.Random(0).choices(range(3, VOCABULARY), k=cuts[-1])
    sequence: Any = Sequence(ids, list(range(1, 2 + len(ids) // _BLOCK_TOKENS)))
    rows = [every_logits(runner, [Slice(sequence, start, end - start)]) for start, end in itertools.pairwise(cuts)]
    runner.close()
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_experts_in_one_tensor_and_in_a_tensor_each_are_equal(name: str, tmp_path: Path) -> None:
    separate, stacked = _checkpoint(tmp_path, name), tmp_path / "stacked"
    AutoModelForCausalLM.from_pretrained(separate).save_pretrained(stacked, save_original_format=False)
    with safe_open(stacked / "model.safetensors", framework="pt") as file:  # type: ignore[no-untyped-call]
        assert any(tensor.endswith("mlp.experts.gate_up_proj") for tensor in file.keys())  # noqa: SIM118
    assert torch.equal(_logits(stacked, [0, 40]), _logits(separate, [0, 40]))


@pytest.mark.parametrize(
    ("dtype", "weights"), [("float32", "full"), ("bfloat16", "full"), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_many_rows_of_an_expert_are_the_same_in_small_chunks(dtype: str, weights: str, tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, "mixtral", num_local_experts=2, max_position_embeddings=1024)
    whole = _logits(folder, [0, _MANY_ROWS], dtype, weights)
    assert torch.equal(_logits(folder, [*range(0, _MANY_ROWS, 50), _MANY_ROWS], dtype, weights), whole)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt_oss", {"swiglu_limit": 9.0}, "its swiglu_limit is 9.0"),
        ("gpt_oss", {"rope_parameters": None}, "its config.json has no rope_scaling"),
        ("olmoe", {"clip_qkv": 8.0}, "its clip_qkv is 8.0"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        ("mixtral", {"num_experts_per_tok": 6}, "it chooses 6 of 5 experts"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = _checkpoint(tmp_path, name)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert reason in unsupported_reason(Checkpoint(folder), torch.float32)
