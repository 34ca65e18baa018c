"""What `scripts/evaluate perplexity` reads: windows as llama.cpp's tool has them."""

from __future__ import annotations

import pytest
from evaluations.perplexities import first_id_of, windows_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

BEGIN, LETTER = 0, 1


@pytest.mark.parametrize("begins", [True, False])
def test_a_window_begins_with_the_token_that_the_tokenizer_puts_before_a_text(begins: bool) -> None:
    tokenizer = Tokenizer(WordLevel({"<s>": BEGIN, "a": LETTER}))
    if begins:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    first = first_id_of(tokenizer)
    assert first == (BEGIN if begins else None)
    assert list(windows_of([5, 6, 7, 8, 9], 2, first)) == ([[BEGIN, 6], [BEGIN, 8]] if begins else [[5, 6], [7, 8]])
