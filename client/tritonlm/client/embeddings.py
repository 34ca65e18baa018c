"""OpenAI's embeddings: parses a call's arguments into prompts and builds the result from vectors. No I/O here."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

from tritonlm.client.sequences import check_text, read_prompts
from tritonlm.client.transport import Prompt, PromptEmbedding
from tritonlm.client.types import EmbeddingItem, Embeddings, EmbeddingUsage
from tritonlm.contract import InvalidRequest

# As with OpenAI.
_MAX_INPUTS = 2048
FLOAT, BASE64 = "float", "base64"


def read_inputs(values: Any, encoding_format: Any, dimensions: Any, user: Any) -> tuple[list[Prompt], str]:
    """The prompts to embed, and the encoding of the vectors."""
    prompts = read_prompts(values, "input")
    if len(prompts) > _MAX_INPUTS:
        raise InvalidRequest(
            f"input must hold at most {_MAX_INPUTS} texts (got {len(prompts)}); send fewer at once", "input"
        )
    if encoding_format not in (None, FLOAT, BASE64):
        raise InvalidRequest("encoding_format must be float or base64", "encoding_format")
    if dimensions is not None:
        raise InvalidRequest(
            "dimensions is not supported: this model's vectors have a fixed size; leave it out", "dimensions"
        )
    check_text("user", user)
    return prompts, encoding_format or FLOAT


def build_embeddings(model: str, embeddings: Sequence[PromptEmbedding], encoding_format: str) -> Embeddings:
    tokens = sum(embedding.tokens for embedding in embeddings)
    items = [
        EmbeddingItem(index=index, embedding=_encode(embedding.vector, encoding_format))
        for index, embedding in enumerate(embeddings)
    ]
    return Embeddings(data=items, model=model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))


def _encode(vector: Sequence[float], encoding_format: str) -> list[float] | str:
    if encoding_format == FLOAT:
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
