"""Gemma, Gemma 2 and Gemma 3. The files have 1 + weight of every norm."""

from __future__ import annotations

from typing import Any

from ..model_file import ModelFile
from ..rope import rope_parameters
from . import rules
from .architecture import (
    HEAD_NORMS,
    LAYER_NAMES,
    NAMES,
    Architecture,
    Config,
    Names,
    head_dim,
    layer_types,
    rms_decoder,
)

# The layers of the 27B models, whose queries are scaled otherwise; the format does not say so.
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


def _gemma(file: ModelFile) -> Config:
    return rms_decoder(file, "gemma", hidden_act="gelu_pytorch_tanh")


def _gemma2(file: ModelFile) -> Config:
    return rms_decoder(
        file, "gemma2", query_pre_attn_scalar=_query_scalar(file, _GEMMA2_27B_LAYERS),
        sliding_window=file.size("attention.sliding_window", 4096),
        attn_logit_softcapping=file.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=file.number("final_logit_softcapping", 30.0), **_ACTIVATION,
    )  # fmt: skip


def _gemma3(file: ModelFile) -> Config:
    rope = {
        "full_attention": rope_parameters(file, 1000000.0),
        "sliding_attention": {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", 10000.0)},
    }
    window = file.window()
    return rms_decoder(
        file, "gemma3_text", query_pre_attn_scalar=_query_scalar(file, _GEMMA3_27B_LAYERS), rope_parameters=rope,
        sliding_window=window, layer_types=layer_types(file, 6) if window else None,
        sliding_window_pattern=6 if window else 1, attn_logit_softcapping=None,
        final_logit_softcapping=file.optional("final_logit_softcapping") or None, **_ACTIVATION,
    )  # fmt: skip


def _query_scalar(file: ModelFile, layers_of_27b: int) -> int:
    whole = file.size("embedding_length") // file.size("attention.head_count")
    return whole if file.size("block_count") == layers_of_27b else head_dim(file)


_ACTIVATION: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _norms_minus_one(names: Names) -> Names:
    return {
        key: (name, rules.minus_one) if isinstance(name, str) and name.endswith("norm") else name
        for key, name in names.items()
    }


_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_NAMES = _norms_minus_one(NAMES)

ARCHITECTURES = {
    "gemma": Architecture(_gemma, _NAMES, _norms_minus_one(LAYER_NAMES)),
    "gemma2": Architecture(_gemma2, _NAMES, _norms_minus_one({**LAYER_NAMES, **_FOUR_NORMS})),
    "gemma3": Architecture(_gemma3, _NAMES, _norms_minus_one({**LAYER_NAMES, **_FOUR_NORMS, **HEAD_NORMS})),
}
