"""Checkpoints with random bfloat16 weights in the shapes of known language models; the tokenizer is SmolLM2's.

    PYTHONPATH=scripts .venv/bin/python scripts/random_checkpoints.py llama-1b     # prints the checkpoint's folder

Each is made once, in .cache/real_models, for soak tests and benchmarks.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_checkpoints import CACHE, SMOLLM2, Unavailable, checkpoint

CONTEXT = 8192
_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
_COMMON = {"max_position_embeddings": CONTEXT, "rope_parameters": _ROPE, "tie_word_embeddings": True}
# Without vocab_size the vocabulary is the tokenizer's.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b": ("llama", {**_COMMON, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}),
    "qwen3-0.6b": ("qwen3", {**_COMMON, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
                             "vocab_size": 151_936}),
    "qwen3-1b": ("qwen3", {**_COMMON, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 20,
                           "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}),
    # The small models of Granite 4, ERNIE 4.5 and EXAONE 4.
    "granite4-350m": ("granitemoehybrid", {
        **_COMMON, "hidden_size": 1024, "intermediate_size": 2048, "shared_intermediate_size": 2048,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 0,
        "num_experts_per_tok": 0, "layer_types": ["attention"] * 28, "position_embedding_type": "rope",
        "vocab_size": 100_352, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.246, "logits_scaling": 4.0, "mamba_n_heads": 64,
    }),
    "ernie4.5-0.3b": ("ernie4_5", {**_COMMON, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
                                   "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
                                   "vocab_size": 103_424}),
    "exaone4-1.2b": ("exaone4", {**_COMMON, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 30,
                                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                                 "sliding_window": None, "layer_types": ["full_attention"] * 30,
                                 "vocab_size": 102_400}),
    # OLMoE's experts (64, of which 8 for each token), with half its width and half its layers.
    "olmoe-tiny": ("olmoe", {**_COMMON, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 8,
                             "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
                             "num_experts_per_tok": 8, "tie_word_embeddings": False}),
    "llama-3b": ("llama", {**_COMMON, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                           "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}),
    "qwen3-3b": ("qwen3", {**_COMMON, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 28,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}),
}  # fmt: skip


def random_checkpoint(name: str, cache: Path = CACHE) -> Path:
    """The checkpoint's folder; made first if it is not in the cache."""
    folder = cache / name
    if not (folder / "config.json").exists():
        print(f"{name}: making the checkpoint", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            _make(name, Path(work), cache)
            Path(work).rename(folder)
            # TemporaryDirectory removes this folder at exit.
            Path(work).mkdir()
    return folder


def _make(name: str, folder: Path, cache: Path) -> None:
    # Slow to import, and most runs find the checkpoint in the cache.
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    family, shape = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(SMOLLM2, cache))
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(tokenizer), **shape}
    config = AutoConfig.for_model(family, **vocabulary, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _fill_vocabulary(folder / "tokenizer.json", int(vocabulary["vocab_size"]))
    del model
    gc.collect()


def _fill_vocabulary(file: Path, size: int) -> None:
    """Give each id up to `size` a text: the model generates it, and no prompt contains it."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    used = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    if missing := [number for number in range(size) if number not in used]:
        vocabulary |= {f"Ġfiller{number}": number for number in missing}
        file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES), nargs="+")
    for name in parser.parse_args().model:
        try:
            print(random_checkpoint(name))
        except Unavailable as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
