"""The tokens of a checkpoint's tokenizer as llguidance needs them: the bytes of each, and how text becomes tokens.

It knows the tokenizer's file, and neither grammars nor threads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tritonlm.contract import NotOffered

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Stands for the end of text where a checkpoint has none: llguidance needs one. It is never sampled.
_NO_END = "<|tritonlm: no end of text|>"


@dataclass(frozen=True)
class TokenTable:
    tokenizer: LLTokenizer
    end_ids: list[int]

    @property
    def mask_words(self) -> int:
        return -(-self.tokenizer.vocab_size // 32)


def load_token_table(file: Path, vocab_size: int, end_ids: Sequence[int]) -> TokenTable | NotOffered:
    """The table, or why structured outputs are not offered. `vocab_size` is that of the logits.

    Raises OSError or MemoryError, which may pass.
    """
    # Read here: the library's errors do not tell a file that cannot be opened from one that it does not support.
    content = file.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(content)
        # Settings from the tokenizer's training: they would change forced texts.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if not end_ids:
            tokenizer.add_special_tokens([_NO_END])
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocab_size, 1 + max(vocabulary.values()))
        ends = list(end_ids) or [vocabulary[_NO_END]]
        return TokenTable(_table(tokenizer, size, ends), ends)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the libraries raise nothing narrower
        return NotOffered(f"structured_outputs is not offered: this model's tokenizer is not supported ({error})")


def _table(tokenizer: Tokenizer, size: int, end_ids: list[int]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper  # noqa: PLC0415

    decoder = tokenizer.decoder and json.loads(tokenizer.decoder.__getstate__())
    if decoder and decoder["type"] == "Fuse":
        return LLTokenizer(TokenizerWrapper(_SpelledTokenizer(tokenizer, size, end_ids)), eos_token=end_ids)
    return LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=end_ids)


class _SpelledTokenizer:
    """A tokenizer whose tokens are spelled as they read, which llguidance does not know; with the names it asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_ids[0]
        self.tokens = [(tokenizer.id_to_token(token_id) or "").encode() for token_id in range(size)]
        self.special_token_ids = [
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        ]

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text.decode(), add_special_tokens=False).ids
        return ids
