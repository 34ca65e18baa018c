"""OpenAI's embeddings: from the arguments of a call to prompts, and from vectors to its objects. No input or output."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

from tritonlm.client.sequences import MAX_SEQUENCES, check_text, read_prompts
from tritonlm.client.transport import Embedded, Prompt
from tritonlm.client.types import EmbeddingItem, Embeddings, EmbeddingUsage
from tritonlm.contract import InvalidRequest

FLOAT, BASE64 = "float", "base64"


def read_inputs(values: Any, encoding_format: Any, dimensions: Any, user: Any) -> tuple[list[Prompt], str]:
    """The prompts to embed, and how to write the vectors."""
    prompts = read_prompts(values, "input")
    if len(prompts) > MAX_SEQUENCES:
        raise InvalidRequest(f"input must hold at most {MAX_SEQUENCES} texts (got {len(prompts)})", "input")
    if encoding_format not in (None, FLOAT, BASE64):
        raise InvalidRequest("encoding_format must be float or base64", "encoding_format")
    if dimensions is not None:
        raise InvalidRequest(
            "dimensions is not possible: this model's vectors have one size; leave it out", "dimensions"
        )
    check_text("user", user)
    return prompts, encoding_format or FLOAT


def embeddings_of(model: str, found: Sequence[Embedded], encoding_format: str) -> Embeddings:
    tokens = sum(embedded.tokens for embedded in found)
    items = [
        EmbeddingItem(index=index, embedding=_written(embedded.vector, encoding_format))
        for index, embedded in enumerate(found)
    ]
    return Embeddings(data=items, model=model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))


def _written(vector: Sequence[float], encoding_format: str) -> list[float] | str:
    if encoding_format == FLOAT:
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
