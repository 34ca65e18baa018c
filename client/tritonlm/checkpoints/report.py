"""What a checkpoint is and what it takes to serve it, from its JSON files and the names and shapes of its tensors.

The engine's part (runner, number type, KV cache, read bandwidth) comes in as plain numbers. No weights, no torch.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tritonlm.contract import Checkpoint, CheckpointError

from .tensors import Tensor

_EMBEDDING = re.compile(r"embed|wte|word_embeddings")
_OTHER_HEAD = re.compile(r"For(MaskedLM|\w*Classification|QuestionAnswering|MultipleChoice|PreTraining|\w*Prediction)$")
_EXPERT = re.compile(r"\bexperts\b")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Layers that keep a state in place of keys and values: as layer_types names them, and the architectures with such
# layers that have no layer_types.
_STATE_LAYERS = frozenset(("mamba", "mamba2", "linear_attention", "conv", "recurrent"))
_STATE_MODELS = frozenset((
    "bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h", "qwen3_next", "recurrent_gemma",
    "rwkv", "xlstm", "zamba", "zamba2",
))  # fmt: skip
_INT8_BITS = 8
# More than the last-level cache of most processors holds.
_CACHE_BYTES = 64 << 20


def describe(
    checkpoint: Checkpoint, stored: Sequence[Tensor], tensors: Sequence[Tensor], quantization: str | None
) -> dict[str, Any]:
    """The checkpoint itself: the tensors of its files, those of the model, and how they are quantized."""
    about = checkpoint.about
    return {
        "architecture": about["architecture"],
        "layers": about["layers"],
        "width": about["width"],
        "vocab_size": about["vocab_size"],
        "parameters": sum(tensor.count for tensor in tensors),
        "context_length": checkpoint.context_length,
        "chat_template": checkpoint.chat_template is not None,
        "file_bytes": sum(tensor.bytes for tensor in stored),
        "number_types": dict(Counter[str](_numbers_by_type(tensors)).most_common()),
        "quantization": quantization,
    }


def memory(engine: Mapping[str, Any], parameters: int, slots: int, context: int) -> dict[str, int]:
    """Bytes that an engine takes with so many requests of this length at once."""
    parts = {
        "weight_bytes": round(parameters * engine["bits_per_weight"] / 8),
        "kv_cache_bytes": slots * context * engine["kv_bytes_per_token"],
        "process_bytes": engine["process_bytes"],
    }
    return {**parts, "total_bytes": sum(parts.values())}


def speed(engine: Mapping[str, Any], checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> dict[str, float] | None:
    """The most tokens per second of one request that memory allows: each token reads all weights that it uses.

    None on a GPU, and for weights that fit into a processor's cache.
    """
    bandwidth, read = engine["read_bytes_per_second"], numbers_read(checkpoint, tensors)
    if not bandwidth or read * _INT8_BITS // 8 < _CACHE_BYTES:
        return None
    by_format = {"": engine["read_bits_per_weight"], "_int8": _INT8_BITS}
    limits = {f"tokens_per_second{suffix}": bandwidth / (read * bits / 8) for suffix, bits in by_format.items()}
    # Only the kernels compute with int8 weights.
    return limits if engine["runner"] == "native" else {"tokens_per_second": limits["tokens_per_second"]}


def numbers_read(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> int:
    """How many weights a token reads: not the embedding, of which it needs a row, and not the experts left out."""
    vocabulary = [tensor for tensor in tensors if len(tensor.shape) == 2 and tensor.shape[0] == checkpoint.vocab_size]
    # With one matrix for both, the output layer reads it whole.
    unread = sum(t.count for t in vocabulary if _EMBEDDING.search(t.name)) if len(vocabulary) > 1 else 0
    experts = sum(tensor.count for tensor in tensors if _EXPERT.search(tensor.name))
    share = _active_share(checkpoint.config)
    return sum(tensor.count for tensor in tensors) - unread - int(experts * (1 - share))


def problems(checkpoint: Checkpoint, weights: bool = True) -> list[str]:
    """Why it cannot be served; empty if nothing is known that is in the way."""
    try:
        checkpoint.check(weights)
    except CheckpointError as error:
        return [error.message]
    config, found = checkpoint.config, []
    # Of a multimodal model that of the whole, which transformers looks for.
    model_type, known = checkpoint.model_type, _causal_models()
    if config.get("is_encoder_decoder"):
        found.append("it is an encoder and a decoder; only decoders are served")
    elif model_type is not None and known and model_type not in known:
        own_code = " and the code that it brings is never run" if config.get("auto_map") else ""
        found.append(f"transformers has no causal language model {model_type}" + ("," * bool(own_code) + own_code))
    if _keeps_state(config, model_type):
        found.append("some of its layers keep a state, as Mamba's do; only models of attention are served")
    names = config.get("architectures")
    heads = [str(name) for name in names] if isinstance(names, list) else []
    if heads and all(_OTHER_HEAD.search(name) for name in heads):
        found.append(f"it does not generate text: its architecture is {', '.join(heads)}")
    return found


def _keeps_state(config: Mapping[str, Any], model_type: Any) -> bool:
    types = config.get("layer_types")
    return model_type in _STATE_MODELS or (isinstance(types, list) and not _STATE_LAYERS.isdisjoint(map(str, types)))


def _numbers_by_type(tensors: Sequence[Tensor]) -> dict[str, int]:
    numbers: Counter[str] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += tensor.count
    return numbers


def _active_share(config: Mapping[str, Any]) -> float:
    experts = next((config[name] for name in _EXPERTS if isinstance(config.get(name), int)), 0)
    chosen = config.get("num_experts_per_tok")
    return min(chosen / experts, 1.0) if experts > 0 and isinstance(chosen, int) else 1.0


@functools.cache
def _causal_models() -> frozenset[str]:
    """The architectures that transformers has causal language models for, from its source; empty if that is unclear.

    Importing transformers would take seconds.
    """
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return frozenset()
    file = Path(found.origin).parent / "models" / "auto" / "modeling_auto.py"
    source = file.read_text(encoding="utf-8") if file.is_file() else ""
    block = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = .*?^\)", source, re.MULTILINE | re.DOTALL)
    return frozenset(re.findall(r'\("([\w-]+)",', block[0])) if block else frozenset()
