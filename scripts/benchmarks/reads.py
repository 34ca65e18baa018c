"""What a step of a model reads and computes, from the shapes of its checkpoint's tensors. It does not know speeds.

A decoding step reads every weight matrix once: those of the layers, and the LM head; of the embedding it reads single
rows. Of routed experts it reads those that a row of the batch chooses, as many as uniform routing makes distinct.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from tritonlm.contract import gguf_tensors

# Names of tables of which a step reads single rows, of the LM head, and of routed experts.
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|embed_tokens|word_embeddings|embed_in|embed_positions)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions)\.weight$")
_EXPERT = re.compile(r"\.experts\.")
_HEADER = struct.Struct("<Q")


@dataclass(frozen=True)
class Cost:
    """Numbers of weights: all layers without routed experts, the LM head, and all routed experts together."""

    layers: int
    head: int
    experts: int
    num_experts: int
    experts_per_token: int
    # Keys and values of one token.
    cached: int

    @classmethod
    def of(cls, folder: Path) -> Cost:
        return cls.of_shapes(_shapes(folder), AutoConfig.from_pretrained(folder).get_text_config())

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, Sequence[int]], config: Any) -> Cost:
        """From the tensors' shapes by name, and the configuration of the language model."""
        layers = head = experts = embedding = 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            if _HEAD.search(name):
                head += count
            elif _EMBEDDING.search(name):
                embedding += 0 if _POSITIONS.search(name) else count
            elif _EXPERT.search(name):
                experts += count
            elif len(shape) > 1:
                layers += count
        routed = [getattr(config, name, None) or 0 for name in ("num_experts_per_tok", "num_experts")]
        num_experts = routed[1] or getattr(config, "num_local_experts", None) or 0
        # A tied LM head is the embedding.
        return cls(layers, head or embedding, experts, num_experts, routed[0], _cached(config))

    def step_weights(self, rows: int) -> float:
        """Weights that a step with this many rows reads."""
        share = 1 - (1 - self.experts_per_token / self.num_experts) ** rows if self.num_experts else 0.0
        return self.layers + self.head + share * self.experts

    def step_bytes(self, rows: int, context: float, weight_bytes: float, cached_bytes: int) -> float:
        """Bytes that a decoding step of as many sequences reads; `context` is their mean length."""
        return self.step_weights(rows) * weight_bytes + rows * context * self.cached * cached_bytes

    def operations(self, tokens: int, logit_rows: int) -> float:
        """Additions and multiplications of the matmuls for these tokens."""
        active = self.experts * self.experts_per_token / self.num_experts if self.num_experts else 0.0
        return 2 * ((self.layers + active) * tokens + self.head * logit_rows)


def _cached(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(head_dim)


def _shapes(folder: Path) -> dict[str, list[int]]:
    """From the headers of the safetensors files, or of a GGUF file."""
    if (folder / gguf_tensors.FILE_NAME).exists():
        return {name: list(tensor.shape) for name, tensor in gguf_tensors.read(folder).items()}
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(_HEADER.unpack(stream.read(_HEADER.size))[0]))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes
