"""Checkpoints without weights: a small byte-level tokenizer, trained at run time, and its JSON files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
TEXT = "the quick brown fox said hello to the other fox; naïve café, 猫 and 👍🏽. The house was old, the fox was not. "
CONTEXT = 64


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(END, special=True)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    text: str = tokenizer.to_str()
    return text


def byte_level_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(_trained())


def write_checkpoint(
    folder: Path, tokenizer: Tokenizer | None = None, config: dict[str, Any] | None = None, **tokenizer_config: Any
) -> Path:
    tokenizer = tokenizer or byte_level_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "n_positions": CONTEXT}
    (folder / "config.json").write_text(json.dumps(sizes | (config or {})), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": END} | tokenizer_config), encoding="utf-8")
    return folder
