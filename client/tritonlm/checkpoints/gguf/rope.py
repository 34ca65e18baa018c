"""RoPE's parameters as config.json has them, from a file's metadata and its tensors of factors."""

from __future__ import annotations

import math
from typing import Any

from .model_file import ModelFile

# Factors of each frequency, as the format stores Llama 3's scaling, and long contexts of Phi 3.
_FREQS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def rope_parameters(file: ModelFile, default_theta: float = 10000.0) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_theta": file.number("rope.freq_base", default_theta), "rope_type": "default"}
    kind = file.text("rope.scaling.type", "")
    factor = file.optional("rope.scaling.factor") or file.optional("rope.scale_linear") or 1.0
    if any(name in file.tensors for name in (_FREQS, _LONG, _SHORT)):
        if kind not in ("", "none", "longrope", "llama3"):
            raise file.error(f"it has factors of RoPE's frequencies, and {kind[:40]!r} scaling too")
        return parameters | _factors(file)
    if kind == "yarn":
        return parameters | _yarn(file, factor)
    if kind not in ("", "none", "linear"):
        raise file.error(f"its RoPE has the unknown scaling {kind[:40]!r}")
    if factor == 1.0 or kind == "none":
        return parameters
    return parameters | {"rope_type": "linear", "factor": factor}


def _factors(file: ModelFile) -> dict[str, Any]:
    """A factor for each frequency divides it: longrope. Llama 3's scaling is one such list, whatever the context."""
    context = file.size("context_length")
    if _FREQS in file.tensors:
        factors = file.floats(file.tensors[_FREQS])
        both, attention, original = (factors, factors), 1.0, context
    else:
        if _LONG not in file.tensors or _SHORT not in file.tensors:
            raise file.error(f"it has only one of {_LONG} and {_SHORT}")
        both = (file.floats(file.tensors[_LONG]), file.floats(file.tensors[_SHORT]))
        original = file.size("rope.scaling.original_context_length", context)
        attention = file.number("rope.scaling.attn_factor", 1.0)
    if not all(math.isfinite(factor) and factor > 0 for factor in (*both[0], *both[1])):
        raise file.error("its factors of RoPE's frequencies are not positive numbers")
    return {
        "rope_type": "longrope", "long_factor": both[0], "short_factor": both[1], "attention_factor": attention,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _yarn(file: ModelFile, factor: float) -> dict[str, Any]:
    parameters = {
        "rope_type": "yarn", "factor": factor,
        "original_max_position_embeddings": file.size(
            "rope.scaling.original_context_length", file.size("context_length")
        ),
        "beta_fast": file.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.number("rope.scaling.yarn_beta_slow", 1.0),
    }  # fmt: skip
    attention = file.optional("rope.scaling.yarn_attn_factor")
    if attention is not None:
        parameters["attention_factor"] = attention
    elif file.value("rope.scaling.attn_factor") is not None:
        # It multiplies the usual one.
        usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        parameters["attention_factor"] = file.number("rope.scaling.attn_factor") * usual
    if file.optional("rope.scaling.yarn_log_multiplier"):
        raise file.error("its RoPE has a yarn_log_multiplier")
    return parameters
