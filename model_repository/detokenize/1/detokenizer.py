"""A chunk's text and log-probabilities: pure functions of that one chunk, without memory of others.

It knows the checkpoint's tokenizer and the chunk; it does not know Triton, nor why a window was cut where it was.
"""

from __future__ import annotations

import json
from typing import Any

from tritonlm.checkpoints.tokenizer import load_decoder
from tritonlm.contract import Checkpoint, Chunk, TokenLogprob

from .offsets import TokenPlaces
from .pieces import Pieces


class Detokenizer:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = load_decoder(checkpoint)
        self._pieces = Pieces(self._tokenizer)

    def text(self, chunk: Chunk) -> str:
        text = self._decode(chunk.window_ids, chunk.skip_special_tokens)
        return text[chunk.cut_start : max(chunk.cut_start, len(text) - chunk.cut_end)]

    def logprobs(self, chunk: Chunk, text: str) -> str:
        """The chunk's log-probabilities by token text, as JSON; empty when none were asked for."""
        if chunk.logprobs is None:
            return ""
        offsets = self._offsets(chunk, len(text))
        rows = [
            self._named(entry) | {"offset": offsets[index] if index < len(offsets) else len(text)}
            for index, entry in enumerate(chunk.logprobs)
        ]
        return json.dumps(rows, separators=(",", ":"))

    def _named(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return {**self._token(entry.token_id, entry.logprob), "top": top}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        name, data = self._pieces.name_and_bytes(token_id)
        return {"id": token_id, "token": name, "logprob": logprob, "bytes": list(data)}

    def _offsets(self, chunk: Chunk, text_length: int) -> list[int]:
        """Where the text of each new token begins, counted from the beginning of the chunk's text.

        Below zero: its first characters left earlier. Beyond the text: it is held back and comes with a later chunk;
        after the last chunk nothing comes any more, so there the text's end is the limit.
        """
        ids = chunk.window_ids
        first = len(ids) - min(max(chunk.window_new, 0), len(ids))
        final = bool(chunk.finish_reason)
        places = TokenPlaces(ids, lambda part: self._decode(part, chunk.skip_special_tokens), final)
        offsets = (places.start(index) - chunk.cut_start for index in range(first, len(ids)))
        return [min(offset, text_length) if final else offset for offset in offsets]

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text
