"""Launches the attention kernels: sizes of tiles and splits, buffers, and whether this device can run them.

It knows tensors, tiles and devices, and neither models nor requests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

from .query_tiles import QueryTiles

# The interpreter of triton-lang runs kernels on a CPU: slow, for tests.
INTERPRETED = "TRITON_INTERPRET"
# The least rows of a product on tensor cores.
_LEAST_ROWS = 16
_MOST_SPLITS = 64
# Numbers of a tile that four warps hold in registers; larger tiles get eight.
_WARP_NUMBERS = 64 * 128
# Programs for each multiprocessor, so that all of them are busy.
_PROGRAMS = 2


def is_possible(device: torch.device) -> bool:
    """Whether the kernels can run on this device."""
    interpreted = device.type == "cpu" and os.environ.get(INTERPRETED) == "1"
    return (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None


def write(
    keys: torch.Tensor, values: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write one row per token, (tokens, KV heads, width), to its slot."""
    width, value_width = keys.shape[-1], values.shape[-1]
    keys, values = dense(keys), dense(values)
    with on_device(keys.device):
        _kernels().write[keys.shape[0], keys.shape[1]](
            keys, values, key_cache, value_cache, slots, keys.stride(0), keys.stride(1), values.stride(0),
            values.stride(1), key_cache.stride(0), value_cache.stride(0), width, value_width,
            power_of_two(max(width, value_width)),
        )  # fmt: skip


def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tiles: Sequence[QueryTiles],
    block_tokens: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """(heads, rows, width) → (rows, heads, value width), over the keys and values of each tile's sequence."""
    heads, rows, _ = query.shape
    output = torch.empty(rows, heads, value_cache.shape[-1], dtype=value_cache.dtype, device=query.device)
    query = dense(query)
    with on_device(query.device):
        for group in tiles:
            _attend(query, key_cache, value_cache, group, output, block_tokens, scale, window, softcap, splits)
    return output


def _attend(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, tiles: QueryTiles, output: torch.Tensor,
    block_tokens: int, scale: float, window: int | None, softcap: float | None, splits: int | None,
) -> None:  # fmt: skip
    kernels = _kernels()
    heads, rows, width = query.shape
    kv_heads, value_width = value_cache.shape[1:]
    repeats, count = heads // kv_heads, len(tiles.rows)
    # Only tiles of one row are split: a prompt has enough of them. Then each row of `parts` belongs to a tile.
    splits = splits or (_splits(count * kv_heads, query.device) if tiles.height == 1 else 1)
    parts, bests, totals = (
        torch.empty((splits, rows, heads, *rest) if splits > 1 else 0, dtype=torch.float32, device=query.device)
        for rest in ((value_width,), (), ())
    )
    padded, padded_value = power_of_two(width), power_of_two(value_width)
    block_m = power_of_two(tiles.height * repeats)
    block_n, warps = launch_sizes(block_m, max(padded, padded_value))
    kernels.attend[count, kv_heads, splits](
        query, key_cache, value_cache, output, parts, bests, totals, tiles.tables, tiles.rows, tiles.counts,
        tiles.starts, tiles.sequences, rows, heads, query.stride(1), query.stride(0), key_cache.stride(0),
        value_cache.stride(0), tiles.tables.stride(0), scale, softcap or 0.0, window or 0, block_tokens, repeats, width,
        value_width, padded, padded_value, block_m, block_n, splits, window is not None, softcap is not None,
        num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        _combine(output, parts, bests, totals, tiles, padded_value, splits)


def launch_sizes(block_m: int, padded: int) -> tuple[int, int]:
    """Keys of a run, and warps, so that registers and shared memory suffice; `scripts/gpu_check` shows what is used."""
    return 64 if padded <= 128 else 32, 4 if block_m * padded <= _WARP_NUMBERS else 8


def _combine(
    output: torch.Tensor, parts: torch.Tensor, bests: torch.Tensor, totals: torch.Tensor, tiles: QueryTiles,
    padded_value: int, splits: int,
) -> None:  # fmt: skip
    rows, heads, value_width = output.shape
    _kernels().combine[len(tiles.rows) * tiles.height, heads](
        output, parts, bests, totals, tiles.rows, tiles.counts, rows, heads, value_width, padded_value, splits,
        tiles.height,
    )  # fmt: skip


def dense(numbers: torch.Tensor) -> torch.Tensor:
    """The kernels expect the numbers of a head side by side."""
    return numbers if numbers.stride(-1) == 1 else numbers.contiguous()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device, which is another one where a process serves several."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _splits(programs: int, device: torch.device) -> int:
    """Into how many parts a context is split, so that every multiprocessor has work."""
    wanted = _PROGRAMS * _multiprocessors(device) // programs
    return 1 << min(max(wanted, 1).bit_length() - 1, _MOST_SPLITS.bit_length() - 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power_of_two(size: int) -> int:
    return 1 << (max(size, _LEAST_ROWS) - 1).bit_length()


@functools.cache
def _kernels() -> Any:
    from .kernels import attention  # noqa: PLC0415 (triton-lang is slow to import, and missing on most CPUs)

    return attention
