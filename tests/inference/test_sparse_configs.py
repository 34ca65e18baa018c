"""Checkpoints whose config.json leaves out what equals transformers' defaults, as some are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiny_lm import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from tritonlm.contract import Checkpoint

from .harness import VOCABULARY, make_engine, run, submit

_GEMMA3 = {
    "model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 8, "vocab_size": VOCABULARY,
}  # fmt: skip
_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_hidden_layers": 1, "image_size": 32, "patch_size": 16,
}  # fmt: skip
# Each with the runner that computes it; tensors of the multimodal one have the language model's prefix.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3_text": (_GEMMA3, "native"),
    "gemma3": ({"model_type": "gemma3", "text_config": _GEMMA3, "vision_config": _VISION}, "reference"),
    "falcon": (
        {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": VOCABULARY}, "native",
    ),
}  # fmt: skip


def save(folder: Path, config: dict[str, Any]) -> Any:
    """A model of random weights; its config.json has these values only."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            # Wide enough that logits differ.
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    config, runner = CONFIGS[name]
    model, prompt = save(tmp_path, dict(config)), list(range(5, 25))
    Checkpoint(tmp_path).check()
    engine = make_engine(tmp_path, runner=runner, dtype="float32", max_context_tokens=64, kv_cache_tokens=256)
    output = submit(engine, prompt, max_tokens=16, logprobs=1, echo=True)
    run(engine)
    ids = [*prompt, *output.token_ids]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    assert output.token_ids == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
    for position, entry in enumerate(output.logprobs[1:]):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
