"""Converts a chunk to text and named log-probabilities, as pure functions of that one chunk.

It knows the checkpoint's tokenizer and the chunk. It knows neither Triton nor why a window is cut where it is.
"""

from __future__ import annotations

import json
from typing import Any

from tritonlm.checkpoints.tokenizer import load_decoder
from tritonlm.contract import Checkpoint, Chunk, TokenLogprob

from .offsets import TokenOffsets
from .token_bytes import TokenBytes


class Detokenizer:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = load_decoder(checkpoint)
        self._token_bytes = TokenBytes(self._tokenizer)

    def text(self, chunk: Chunk) -> str:
        text = self._decode(chunk.window_ids, chunk.skip_special_tokens)
        return text[chunk.cut_start : max(chunk.cut_start, len(text) - chunk.cut_end)]

    def logprobs(self, chunk: Chunk, text: str) -> str:
        """The chunk's log-probabilities with token texts, as JSON; empty if none are requested."""
        if chunk.logprobs is None:
            return ""
        offsets = self._offsets(chunk, len(text))
        rows = [
            self._entry(entry) | {"offset": offsets[index] if index < len(offsets) else len(text)}
            for index, entry in enumerate(chunk.logprobs)
        ]
        return json.dumps(rows, separators=(",", ":"))

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return {**self._token(entry.token_id, entry.logprob), "top": top}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        name, data = self._token_bytes.name_and_bytes(token_id)
        return {"id": token_id, "token": name, "logprob": logprob, "bytes": list(data)}

    def _offsets(self, chunk: Chunk, text_length: int) -> list[int]:
        """The offset of each new token in the chunk's text.

        A negative offset: an earlier chunk holds the token's first characters. An offset beyond the text: a later chunk
        holds the token. In the last chunk the end of the text is the largest offset.
        """
        ids = chunk.window_ids
        first = len(ids) - min(max(chunk.window_new, 0), len(ids))
        final = bool(chunk.finish_reason)
        token_offsets = TokenOffsets(ids, lambda part: self._decode(part, chunk.skip_special_tokens), final)
        offsets = (token_offsets.start(index) - chunk.cut_start for index in range(first, len(ids)))
        return [min(offset, text_length) if final else offset for offset in offsets]

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text
