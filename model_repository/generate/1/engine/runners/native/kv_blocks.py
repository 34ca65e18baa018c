"""The kernels' KV cache: blocks of tokens, each with the keys and values of all layers (kernels/kv_layout.hpp).

It knows sizes and memory. The block pool decides which block belongs to which sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kv_cache import LayerShape
from .large_pages import untouched_memory

# Attention reads 16 keys at a time: up to 15 tokens beyond the last block's end.
_READ_BEYOND = 16
_LINE_BYTES = 64
# Blocks whose distance is a multiple of a small page would share few of a cache's sets: they get as many lines more.
_SPREAD_LINES = 65


class KVBlocks:
    """The memory is untouched zero pages at first: a sequence makes resident what its blocks need, and no more."""

    def __init__(self, layers: Sequence[LayerShape], blocks: int, block_tokens: int, stored: torch.dtype) -> None:
        self.block_tokens = block_tokens
        self.block_bytes = _spread(block_tokens * sum(layer.bytes_per_token(stored) for layer in layers))
        beyond = _READ_BEYOND // block_tokens + 1
        # (blocks, bytes of a block).
        self.memory = untouched_memory((blocks + beyond) * self.block_bytes).view(-1, self.block_bytes)

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero these blocks, so that NaN or infinity does not reach a later sequence through masked slots."""
        for block in blocks:
            self.memory[block].zero_()


def _spread(size: int) -> int:
    lines = -(-size // _LINE_BYTES)
    return (lines if lines % _LINE_BYTES else lines + _SPREAD_LINES) * _LINE_BYTES
