"""A tiny random-weight GPT-2, or one of another family, with a byte-level BPE tokenizer, in Hugging Face format.

It generates nonsense. The same seed gives the same weights.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 512
TEXT = (
    "Once upon a time there was a small house at the edge of the wood, and in the house lived an old clockmaker. ",
    "Every morning she opened the window, counted the birds on the fence and wrote the number into a thin blue book. ",
    "One day there were no birds. She waited until noon, then took her coat, her stick and some bread, and went out.",
    "The sum of 12 and 30 is 42; half of it is 21, and a third of that is 7. What is left when you take away 5? ",
    'def add(first, second):\n    return first + second\n\nprint("the answer is", add(40, 2))\n',
    "Who are you? I am a very small model, and I have read very little. Please do not ask me for advice.\n",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def make_checkpoint(folder: Path, seed: int = 0, model_type: str = "gpt2", **overrides: Any) -> Path:
    """Write the checkpoint atomically: the folder appears complete or not at all."""
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    if model_type == "gpt2":
        sizes |= {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = AutoConfig.for_model(model_type, **{**sizes, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # A wider initialization than usual, so that greedy text is not a single repeated token.
        config.initializer_range = overrides.get("initializer_range", 0.2)
        model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
