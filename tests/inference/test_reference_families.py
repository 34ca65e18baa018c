"""Families that run by Hugging Face's code alone: what is served equals transformers, and what is not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiny_lm import make_checkpoint
from transformers import AutoModelForCausalLM
from tritonlm.contract import CheckpointError

from .harness import make_engine, run, submit

_SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0]}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 24, **_FACTORS}
SERVED: dict[str, dict[str, Any]] = {
    # Granite 4 without Mamba's layers, and mixtures of experts: their attention gets output_router_logits.
    "granitemoehybrid": {**_SMALL, "layer_types": ["attention"] * 2, "num_local_experts": 0, "num_experts_per_tok": 0,
                         "shared_intermediate_size": 48, "position_embedding_type": "rope", "mamba_n_heads": 8},
    "granitemoe": {**_SMALL, **_EXPERTS},
    "phimoe": {**_SMALL, **_EXPERTS, "sliding_window": 256},
    # Their attention's result is viewed in another shape.
    "afmoe": {**_SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
              "num_dense_layers": 1, "sliding_window": 12},
    # Texts within the original context and beyond it: cached keys keep their rotation.
    "phi3": {**_SMALL, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 24},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    # Mamba beside attention in each layer: sequences of a batch would share its state.
    "falcon_h1": {**_SMALL, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                  "mamba_n_groups": 1},
    # Its layers do not pass the batch on to their attention.
    "nemotron": {**_SMALL, "head_dim": 8},
    # Its window is in its mask, which attention over the KV cache does not get.
    "phimoe": {**_SMALL, **_EXPERTS, "sliding_window": 12},
    # Its attention gets a mask of its own.
    "doge": {**_SMALL, "head_dim": 8, "sliding_window": 24},
    # Two attentions in each layer.
    "diffllama": {**_SMALL, "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("model_type", SERVED)
def test_texts_equal_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    folder, prompt = make_checkpoint(tmp_path / "model", model_type=model_type, **SERVED[model_type]), range(5, 45)
    engine = make_engine(folder, runner="reference", dtype="float32", prefill_tokens=16, kv_cache_tokens=512)
    # Another sequence in the same steps.
    outputs = [submit(engine, list(ids), max_tokens=8, ignore_eos=True) for ids in (prompt, prompt[::-1])]
    run(engine)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for ids, output in zip((prompt, prompt[::-1]), outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *output.token_ids]]), use_cache=False).logits[0]
        assert output.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_would_give_other_texts_is_refused_at_load(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model_type=model_type, **REFUSED[model_type])
    with pytest.raises(CheckpointError, match=r"For\w+ is not supported[:;] \w+"):
        make_engine(folder, runner="reference", dtype="float32")
