"""Writes a Hugging Face checkpoint as a GGUF file, as the format's own converter does. Names are the `gguf` package's.

It knows the checkpoints of the family zoo, not every one. What it does to tensors is what `tritonlm.checkpoints.gguf`
undoes, written down here a second time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from transformers import AutoConfig

Array = npt.NDArray[Any]
ARCHITECTURES = {
    "arcee": "arcee", "bloom": "bloom", "cohere": "command-r", "cohere2": "cohere2", "ernie4_5": "ernie4_5",
    "exaone4": "exaone4", "falcon": "falcon", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
    "glm4": "glm4", "gpt2": "gpt2", "gpt_bigcode": "starcoder", "gpt_neox": "gptneox", "gpt_oss": "gpt-oss",
    "granite": "granite", "hunyuan_v1_dense": "hunyuan-dense", "llama": "llama", "mistral": "llama",
    "mixtral": "llama", "nemotron": "nemotron",
    "olmo": "olmo", "olmo2": "olmo2", "olmo3": "olmo2", "olmoe": "olmoe", "phi": "phi2", "phi3": "phi3",
    "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "smollm3": "smollm3",
    "stablelm": "stablelm", "starcoder2": "starcoder2",
}  # fmt: skip
_PAIRED = ("llama", "granite", "smollm3", "olmo", "arcee")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_NORM_OF_HEAD = re.compile(r"(.*_layernorm)\.norms\.(\d+)\.weight")


def write_gguf(
    folder: Path, file: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32, *, dequantized: bool = False
) -> Path:
    """Matrices have the type `kind`; `dequantized`: the numbers of that type, in float32."""
    config = AutoConfig.from_pretrained(folder)
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(file, architecture)
    _add_sizes(writer, config)
    _add_rope(writer, config)
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), config.vocab_size)
    for name, array in _tensors(folder, config, architecture):
        if array.ndim > 1 and dequantized:
            stored = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
            add_tensor(writer, name, gguf.quants.dequantize(stored, kind))
        else:
            add_tensor(writer, name, array, kind if array.ndim > 1 else GGMLQuantizationType.F32)
    if (factors := _frequency_factors(config)) is not None:
        for name, values in factors.items():
            add_tensor(writer, name, values)
    finish(writer)
    return file


def add_tensor(
    writer: GGUFWriter, name: str, array: Array, kind: GGMLQuantizationType = GGMLQuantizationType.F32
) -> None:
    values = np.ascontiguousarray(array, np.float32)
    if kind != GGMLQuantizationType.F32:
        values = gguf.quants.quantize(values, kind)
    writer.add_tensor(name, values, raw_dtype=kind)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any], vocab_size: int, pre: str = "gpt-2") -> None:
    """The first `vocab_size` tokens of a byte-level BPE tokenizer."""
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = {**tokenizer["model"]["vocab"], **{content: token["id"] for content, token in added.items()}}
    tokens = sorted(ids, key=lambda token: ids[token])[:vocab_size]
    kept = set(tokens)
    kinds = [1 if token not in added else 3 if added[token]["special"] else 4 for token in tokens]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges if {*merge, "".join(merge)} <= kept])
    writer.add_eos_token_id(0)


def _add_sizes(writer: GGUFWriter, config: Any) -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(width)
    writer.add_context_length(getattr(config, "max_position_embeddings", None) or 96)
    writer.add_head_count(heads)
    inner = [getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_hidden_size")]
    writer.add_feed_forward_length(next((size for size in inner if size), 4 * width))
    if config.model_type in ("gpt_bigcode", "falcon"):
        is_shared = config.multi_query and not getattr(config, "new_decoder_architecture", False)
        writer.add_head_count_kv(1 if is_shared else getattr(config, "num_kv_heads", heads))
    elif (kv_heads := getattr(config, "num_key_value_heads", None)) is not None:
        writer.add_head_count_kv(kv_heads)
    if dim := getattr(config, "head_dim", None):
        writer.add_key_length(dim)
        writer.add_value_length(dim)
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        if (epsilon := getattr(config, name, None)) is not None:
            (writer.add_layer_norm_rms_eps if name == "rms_norm_eps" else writer.add_layer_norm_eps)(epsilon)
    settings: dict[str, Callable[[Any], None]] = {
        "sliding_window": writer.add_sliding_window, "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping, "clip_qkv": writer.add_clamp_kqv,
        "use_parallel_residual": writer.add_parallel_residual, "logit_scale": writer.add_logit_scale,
        "logits_scaling": writer.add_logit_scale,
        "attention_multiplier": writer.add_attention_scale, "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale, "num_experts_per_tok": writer.add_expert_used_count,
        "num_experts": writer.add_expert_count, "num_local_experts": writer.add_expert_count,
    }  # fmt: skip
    seen: set[Any] = set()
    for name, add in settings.items():
        if (value := getattr(config, name, None)) is not None and add not in seen:
            seen.add(add)
            add(value)
    if config.model_type in ("gemma3_text", "olmo3") or (config.model_type == "exaone4" and config.sliding_window):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if config.model_type == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    written = getattr(config, "rope_parameters", None) or {}
    rope = written.get("full_attention") or written
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(dim * rope.get("partial_rotary_factor", 1.0)))
    if "rope_theta" in rope:
        # Hunyuan's converter stretches the base.
        stretched = rope.get("alpha", 1.0) ** (dim / (dim - 2))
        writer.add_rope_freq_base(rope["rope_theta"] * stretched)
    if "sliding_attention" in written:
        writer.add_rope_freq_base_swa(written["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or 1.0)
    if kind == "yarn":
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if "beta_slow" in rope:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def _frequency_factors(config: Any) -> dict[str, Array] | None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32) for name in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return None
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415 (for this one case)

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return {"rope_freqs.weight": (plain / scaled).numpy()}


def _tensors(folder: Path, config: Any, architecture: str) -> Iterator[tuple[str, Array]]:
    index = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(index, config.num_hidden_layers)
    state = {
        name: tensor.float().numpy()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for name, array in _stacked(state, config):
        changed = _changed(name, array, config)
        stem, _, suffix = changed[0].rpartition(".")
        # The converter strips it for BLOOM.
        stem = stem.removeprefix("transformer.") if architecture == "bloom" else stem
        written = names.get_name(stem)
        assert written is not None, f"gguf has no name for {name}"
        yield f"{written}.{suffix}", changed[1]


def _stacked(state: dict[str, Array], config: Any) -> Iterator[tuple[str, Array]]:
    """One tensor for all experts, or for the norms of all heads."""
    stacks: dict[str, list[Array]] = {}
    for name in sorted(
        state, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    ):
        array = state[name]
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[3]}.weight", []).append(array)
        elif match := _NORM_OF_HEAD.fullmatch(name):
            stacks.setdefault(f"{match[1]}.weight", []).append(array)
        elif ".experts." in name:
            yield from _expert_parts(name, array, is_alternating=config.model_type == "gpt_oss")
        else:
            yield name, array
    for name, arrays in stacks.items():
        yield name, np.stack(arrays)


def _expert_parts(name: str, array: Array, is_alternating: bool) -> Iterator[tuple[str, Array]]:
    stem, part = name.rsplit(".", 1)
    suffix = "bias" if part.endswith("_bias") else "weight"
    if is_alternating and suffix == "weight":
        array = array.swapaxes(1, 2)
    if part.startswith("down_proj"):
        yield f"{stem}.down_proj.{suffix}", array
        return
    half = array.shape[1] // 2
    gate, up = (array[:, ::2], array[:, 1::2]) if is_alternating else (array[:, :half], array[:, half:])
    yield f"{stem}.gate_proj.{suffix}", gate
    yield f"{stem}.up_proj.{suffix}", up


def _changed(name: str, array: Array, config: Any) -> tuple[str, Array]:
    architecture = ARCHITECTURES[config.model_type]
    heads = config.num_attention_heads
    if architecture in _PAIRED and re.search(r"\.[qk]_proj\.", name):
        count = config.num_key_value_heads if ".k_proj." in name else heads
        return name, array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if architecture.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        return name, array + 1
    if "query_key_value" in name:
        kv_heads = heads if architecture != "falcon" else _falcon_kv_heads(config)
        parts = array.reshape(kv_heads, heads // kv_heads + 2, -1, *array.shape[1:])
        kinds = (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])
        return name, np.concatenate([kind.reshape(-1, *array.shape[1:]) for kind in kinds])
    if architecture == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight$", name):
        return name, array.T
    if name.endswith("shared_expert_gate.weight"):
        return name, array[0]
    return f"{name}.weight" if name.endswith("sinks") else name, array


def _falcon_kv_heads(config: Any) -> int:
    count: int = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    return count
