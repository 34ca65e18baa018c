"""RoPE as the native kernels read it from config.json, with newer and older keys, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.runners.native.rope import rope_of
from engine.runners.native.unsupported import Unsupported
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_HEAD_DIM = 24
_LLAMA = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 96}
_PHI3 = {**_LLAMA, "model_type": "phi3"}
_GEMMA3 = {**_LLAMA, "model_type": "gemma3_text", "head_dim": _HEAD_DIM, "num_hidden_layers": 6}
_FULL, _SLIDING = {"layer_type": "full_attention", "theta": 1e6}, {
    "layer_type": "sliding_attention", "theta": 1e4, "theta_name": "rope_local_base_freq", "scaled": False,
}  # fmt: skip
_FACTORS = {"short_factor": [1.0 + n / 8 for n in range(12)], "long_factor": [2.0 + n / 2 for n in range(12)]}
_LINEAR, _YARN = {"type": "linear", "factor": 8.0}, {"rope_type": "yarn", "factor": 4.0}
_ONE_DIMENSION = {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_PHI3_CHOICES = {"partial": 1.0, "original": 4096, "aliases": {"su": "longrope", "yarn": "longrope"}}
_NESTED = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "sliding_attention": {}}
# config.json, and the family's choices.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": (_LLAMA, {}),
    "older theta": ({**_LLAMA, "rope_theta": 500.0}, {}),
    "newer theta": ({**_LLAMA, "rope_theta": 500.0, "rope_parameters": {"rope_theta": 70.0}}, {}),
    "family's theta": ({**_LLAMA, "model_type": "cohere"}, {"theta": 500000.0}),
    "older linear": ({**_LLAMA, "rope_theta": 500.0, "rope_scaling": _LINEAR}, {}),
    "both": ({**_LLAMA, "rope_parameters": {"rope_theta": 70.0}, "rope_scaling": _LINEAR}, {}),
    "dynamic": ({**_LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}),
    "llama3": ({**_LLAMA, "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 32}}, {}),
    "llama3, no original context": ({**_LLAMA, "rope_scaling": _LLAMA3}, {}),
    "yarn": ({**_LLAMA, "rope_theta": 500.0, "rope_scaling": {**_YARN, "original_max_position_embeddings": 24}}, {}),
    "yarn, no original context": ({**_LLAMA, "rope_scaling": _YARN}, {}),
    "yarn, its own factor": ({**_LLAMA, "rope_scaling": {**_YARN, "attention_factor": 0.7}}, {}),
    "yarn, two factors": ({**_LLAMA, "rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}, {}),
    "yarn, one dimension": ({**_LLAMA, "rope_scaling": {**_YARN, **_ONE_DIMENSION}}, {}),
    "longrope": ({**_LLAMA, "rope_scaling": {"type": "longrope", "factor": 4.0, **_FACTORS}}, {}),
    "phi3 su": ({**_PHI3, "rope_scaling": {"type": "su", "original_max_position_embeddings": 9, **_FACTORS}},
                _PHI3_CHOICES),
    "phi3 yarn": ({**_PHI3, "rope_scaling": {"type": "yarn", **_FACTORS}, "original_max_position_embeddings": 96},
                  {**_PHI3_CHOICES, "original": 96}),
    "phi3 part": ({**_PHI3, "partial_rotary_factor": 0.75}, _PHI3_CHOICES),
    "gemma3 nothing": (_GEMMA3, _FULL), "gemma3 nothing, sliding": (_GEMMA3, _SLIDING),
    "gemma3 older": ({**_GEMMA3, "rope_theta": 300.0, "rope_local_base_freq": 50.0, "rope_scaling": _LINEAR}, _FULL),
    "gemma3 older, sliding": (
        {**_GEMMA3, "rope_theta": 300.0, "rope_local_base_freq": 50.0, "rope_scaling": _LINEAR}, _SLIDING),
    "gemma3 newer": ({**_GEMMA3, "rope_parameters": _NESTED}, _FULL),
    "gemma3 newer, sliding": ({**_GEMMA3, "rope_parameters": _NESTED}, _SLIDING),
}  # fmt: skip


def _expected(values: dict[str, Any], layer_type: str | None) -> tuple[torch.Tensor, float]:
    config = AutoConfig.for_model(**values)
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    if parameters["rope_type"] == "default":
        rotary_dim = int(_HEAD_DIM * parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / parameters["rope_theta"] ** (torch.arange(0, rotary_dim, 2) / rotary_dim), 1.0
    inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, layer_type=layer_type)
    return inv_freq, factor


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_those_of_transformers(name: str) -> None:
    values, choices = CASES[name]
    inv_freq, factor = _expected(dict(values), choices.get("layer_type"))
    rope = rope_of(values, _HEAD_DIM, **choices)
    torch.testing.assert_close(rope.inv_freq, inv_freq, rtol=1e-5, atol=0)
    assert rope.factor == pytest.approx(factor)


@pytest.mark.parametrize(("served", "length"), [(None, 96), (97, 97), (96, 96), (24, 24), (9, 9)])
def test_longrope_follows_the_longest_text_that_is_served(served: int | None, length: int) -> None:
    values = {
        **_PHI3, "rope_scaling": {"type": "longrope", **_FACTORS}, "original_max_position_embeddings": 24,
    }  # fmt: skip
    # As transformers computes a text of that length.
    inv_freq, factor = ROPE_INIT_FUNCTIONS["longrope"](AutoConfig.for_model(**values), seq_len=length)
    rope = rope_of(values, _HEAD_DIM, served_context=served, **{**_PHI3_CHOICES, "original": 24})
    torch.testing.assert_close(rope.inv_freq, inv_freq, rtol=1e-5, atol=0)
    assert rope.factor == pytest.approx(factor)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"rope_type": "unknown"}}, {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, {"rope_scaling": []} | {"rope_parameters": [1]},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, {"rope_theta": "much"},
        {"partial_rotary_factor": 0.5}, {"rope_scaling": {**_YARN, "original_max_position_embeddings": 0}},
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        rope_of({**_LLAMA, **values}, _HEAD_DIM)
