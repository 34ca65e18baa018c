"""The KV cache: the keys and values of all running sequences in blocks, one pair of tensors per layer. Also its size.

In int8 a row, a token's key or value of one head, holds its numbers and then its scale in float32: number * scale.

It knows shapes and memory. The block pool decides which block belongs to which sequence.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tritonlm.contract import CheckpointError

from ..config import INT8, EngineConfig
from ..memory import PoolSize, full_context_slots
from .native.large_pages import untouched_memory

_log = logging.getLogger("tritonlm.engine")

# The likely length of a sequence, prompt and generated tokens together. Few sequences fill the whole context. If many
# do, the pool runs out of blocks and some of them are preempted.
LIKELY_TOKENS = 2048
_SCALE_BYTES, _INT8_MAX = 4, 127


@dataclass(frozen=True)
class LayerShape:
    """The shape of the keys and values of one token in one layer."""

    heads: int
    key_width: int
    value_width: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        widths = _row_width(self.key_width, dtype) + _row_width(self.value_width, dtype)
        return self.heads * widths * dtype.itemsize


def _row_width(width: int, dtype: torch.dtype) -> int:
    """Numbers in the row of a token and head, whose key or value has this width."""
    return width + _SCALE_BYTES if dtype == torch.int8 else width


def stored_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """The number type of the KV cache of a model that computes in `dtype`."""
    return torch.int8 if config.kv_dtype == INT8 else dtype


class KVCache:
    """`keys[layer]` and `values[layer]` have the shape (slots, heads, width); a block is a run of slots.

    On a CPU the memory is untouched zero pages at first: it becomes resident as blocks are written, in large pages if
    the cache is large.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        stored: torch.dtype | None = None,
    ) -> None:
        """`dtype` is that of keys and values when they are written and read; `stored` that of the memory."""
        self.block_tokens = block_tokens
        self._dtype, stored = dtype, stored or dtype
        self._is_int8 = stored == torch.int8
        slots = blocks * block_tokens
        self.keys = [_zeros((slots, s.heads, _row_width(s.key_width, stored)), stored, device) for s in layers]
        self.values = [_zeros((slots, s.heads, _row_width(s.value_width, stored)), stored, device) for s in layers]
        self._gathered_keys = torch.empty(0, dtype=stored, device=device)
        self._gathered_values = torch.empty(0, dtype=stored, device=device)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one row per token, (tokens, heads, width), to its slot."""
        if self._is_int8:
            keys, values = _quantized(keys), _quantized(values)
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of (sequences, length) slots, as (sequences, heads, length, width); valid until the next read."""
        # Into a permanent buffer: allocating pages for each layer and step would cost more than the copy.
        self._gathered_keys, keys = _gather(self.keys[layer], slots, self._gathered_keys)
        self._gathered_values, values = _gather(self.values[layer], slots, self._gathered_values)
        if self._is_int8:
            return _dequantized(keys, self._dtype), _dequantized(values, self._dtype)
        return keys, values

    @property
    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers that `read` gathers into."""
        return self._gathered_keys, self._gathered_values

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero these blocks, so that NaN or infinity does not reach a later sequence through masked slots."""
        for block in blocks:
            run = slice(block * self.block_tokens, (block + 1) * self.block_tokens)
            for tensor in (*self.keys, *self.values):
                tensor[run].zero_()


def _quantized(numbers: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, width) → int8 rows (tokens, heads, width + the bytes of the scale). A NaN makes the scale NaN."""
    scales = numbers.abs().amax(-1, keepdim=True).float() / _INT8_MAX
    rounded = (numbers.float() / scales.where(scales != 0, 1)).round().to(torch.int8)
    return torch.cat((rounded, scales.view(torch.int8)), -1)


def _dequantized(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    numbers, scales = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return torch.mul(numbers, scales, out=torch.empty_like(numbers, dtype=dtype))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU they are lazily mapped zero pages; torch.zeros would write all of them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return untouched_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _gather(rows: torch.Tensor, slots: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the slots' rows into the buffer, or into a larger one. Return the buffer and its view for attention."""
    size = slots.numel() * rows[0].numel()
    if buffer.numel() < size:
        buffer = buffer.new_empty(size + size // 4)
    gathered = buffer[:size].view(-1, *rows.shape[1:])
    torch.index_select(rows, 0, slots.reshape(-1), out=gathered)
    return buffer, gathered.view(*slots.shape, *rows.shape[1:]).transpose(1, 2)


def free_memory(device: torch.device) -> int:
    """The bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as current,
        ):
            free = min(free, int(limit.read()) - int(current.read()))
    except (OSError, ValueError, StopIteration):
        pass  # not Linux, or no limit on this container: keep the value so far
    return free


def cache_size(
    layers: Sequence[LayerShape],
    config: EngineConfig,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_left: int | None = None,
    beside: int = 0,
) -> PoolSize:
    """Size the KV cache by settings, likely use, free memory and memory budget. `context` is the checkpoint's.

    `beside` is what steps will take of the free memory and the budget for themselves.
    """
    context = min(context, config.max_context_tokens or context)
    token_bytes = max(sum(layer.bytes_per_token(stored_dtype(config, dtype)) for layer in layers), 1)
    explicit, free = config.kv_cache_tokens, max(free_memory(device) - beside, 0)
    if explicit:
        tokens, limit, hint = explicit, free, "lower kv_cache_tokens or free memory"
    else:
        tokens, limit = likely_tokens(config.max_sequences, context), int(free * config.kv_memory_share)
        hint = "lower max_context_tokens, raise kv_memory_share or free memory"
    needed = explicit or context
    if needed * token_bytes > limit:
        raise CheckpointError(
            f"not enough memory for the KV cache: {needed} tokens need {needed * token_bytes >> 20} MiB, "
            f"{limit >> 20} MiB may be used; {hint}"
        )
    block_bytes = config.block_tokens * token_bytes
    # Plus the padding block.
    blocks = -(-min(tokens, limit // token_bytes) // config.block_tokens) + 1
    # Not rounded up to blocks: `tokenize` reads the same number, and knows no blocks.
    context = min(context, explicit or context)
    least = -(-context // config.block_tokens) + 1
    if budget_left is not None and not explicit:
        # At least one full context. If the budget is too small for that, the memory ledger raises the error.
        blocks = min(blocks, max(max(budget_left - beside, 0) // block_bytes, least))
    _log.info(
        "KV cache: up to %d tokens in %d MiB, of %d MiB that are free beside weights and steps (%s); "
        "%d of %d slots can have the full context of %d tokens at once",
        (blocks - 1) * config.block_tokens, blocks * block_bytes >> 20, free >> 20,
        "kv_cache_tokens" if explicit else f"kv_memory_share {config.kv_memory_share:g}",
        full_context_slots(blocks - 1, least - 1, config.max_sequences), config.max_sequences, context,
    )  # fmt: skip
    return PoolSize(blocks, least, block_bytes, context, bool(explicit))


def likely_tokens(slots: int, context: int) -> int:
    """The likely number of tokens in all slots, at least one full context."""
    return max(context, slots * min(context, LIKELY_TOKENS))
