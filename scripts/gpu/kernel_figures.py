"""The attention kernels: compared with plain attention, and timed at the bandwidth that they reach.

Beside them is torch's attention over gathered blocks, which serves where the kernels cannot. The rotation of queries
and keys as they are written is compared and timed beside Hugging Face's rotation with a write.

Without a GPU the kernels are compiled for one, if triton-lang is installed: registers, shared memory and stack (spilled
registers) are reported. With TRITON_INTERPRET=1 and --tiny this stage runs on a CPU as it does on a GPU, in small
sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from engine.runners import attention
from engine.runners.flat_batch import AttentionGroup
from engine.runners.gpu import block_attention, rotary, self_check
from engine.runners.gpu.query_tiles import QueryTiles
from engine.runners.kv_cache import KVCache, LayerShape
from machine_limits import Limits
from stage import Options, Report
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

_BLOCK_TOKENS = 16
# Query heads, KV heads and width: GPT-2 124M, GPT-2 1.5B, Llama 8B, Gemma 2 9B.
_HEADS = ((12, 12, 64), (25, 25, 64), (32, 8, 128), (16, 8, 256))
# Sequences and the context length of each.
_LOADS = ((1, 8192), (64, 2048), (256, 512))
_TINY_HEADS, _TINY_LOADS = ((4, 2, 16),), ((1, 80), (2, 48))
_REPEATS = 20


def run(options: Options, report: Report) -> None:
    device = torch.device(options.device)
    if not block_attention.is_possible(device):
        from compile_kernels import report_compiled  # noqa: PLC0415 (it imports triton-lang)

        report_compiled(report)
        return
    sizes, loads = (_TINY_HEADS, _TINY_LOADS) if options.tiny else (_HEADS, _LOADS)
    # The interpreter multiplies no bfloat16.
    dtype = torch.bfloat16 if options.on_gpu else torch.float16
    _check(sizes, (dtype,) if options.tiny else (dtype, torch.float16, torch.float32), device, report)
    limits = Limits.measured(torch.bfloat16, options.device)
    for heads, kv_heads, width in sizes:
        for sequences, length in loads:
            if options.left() > 5:
                shape = LayerShape(kv_heads, width, width)
                _time(heads, shape, sequences, length, dtype, device, limits.read, report)
        _time_rotation(heads, LayerShape(kv_heads, width, width), loads[-1][0], dtype, device, report)


def _check(
    sizes: Sequence[tuple[int, int, int]], dtypes: Sequence[torch.dtype], device: torch.device, report: Report
) -> None:
    for dtype in dtypes:
        for heads, kv_heads, width in sizes:
            config = SimpleNamespace(num_attention_heads=heads, sliding_window=40, attn_logit_softcapping=30.0)
            began = time.perf_counter()
            shape = LayerShape(kv_heads, width, width)
            self_check.check([shape], config, _BLOCK_TOKENS, dtype, device)
            report(check=f"{dtype} {heads}/{kv_heads} heads of {width}", seconds=round(time.perf_counter() - began, 1))


def _time(
    heads: int, shape: LayerShape, sequences: int, length: int, dtype: torch.dtype, device: torch.device,
    bandwidth: float, report: Report,
) -> None:  # fmt: skip
    """One decoding step of one layer, with the blocks of each sequence scattered over the cache."""
    per_sequence = length // _BLOCK_TOKENS
    blocks = sequences * per_sequence
    cache = KVCache([shape], blocks, _BLOCK_TOKENS, dtype, device)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.normal_()
    tables = torch.randperm(blocks, device=device, dtype=torch.int32).view(sequences, per_sequence)
    numbers = torch.arange(sequences, device=device, dtype=torch.int32)
    starts = torch.full_like(numbers, length - 1)
    tiles = [QueryTiles(tables, numbers, torch.ones_like(numbers), starts, numbers, height=1)]
    query = torch.randn(heads, sequences, shape.key_width, device=device).to(dtype)
    scale = shape.key_width**-0.5
    slots = (tables.long().unsqueeze(-1) * _BLOCK_TOKENS + torch.arange(_BLOCK_TOKENS, device=device)).flatten(1)
    group = AttentionGroup(numbers.long(), 1, slots, starts.long().unsqueeze(-1), dtype)

    def in_place() -> torch.Tensor:
        return block_attention.attend(query, cache.keys[0], cache.values[0], tiles, _BLOCK_TOKENS, scale)

    def gathered() -> torch.Tensor:
        keys, values = cache.read(0, slots)
        return attention._attend(query, keys, values, group, scale, None, None)

    difference = float((in_place().float() - gathered().float()).abs().max())
    read = 2 * sequences * length * shape.heads * shape.key_width * dtype.itemsize
    own, other = (seconds_of(work, device) for work in (in_place, gathered))
    report(
        heads=f"{heads}/{shape.heads} of {shape.key_width}", sequences=sequences, context=length,
        microseconds=round(1e6 * own, 1), gathered_microseconds=round(1e6 * other, 1),
        of_bandwidth=round(read / own / bandwidth, 3), difference=difference,
    )  # fmt: skip


def _time_rotation(
    heads: int, shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, report: Report
) -> None:
    """One decoding step of one layer, with a token for each sequence."""
    width = shape.key_width
    cache = KVCache([shape], -(-tokens // _BLOCK_TOKENS), _BLOCK_TOKENS, dtype, device)
    query, key, value = (
        torch.randn(1, tokens, count, width, device=device).to(dtype).transpose(1, 2)
        for count in (heads, shape.heads, shape.heads)
    )
    angles = torch.rand(1, tokens, width // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(tokens, device=device)
    written = (cache.keys[0], cache.values[0], slots)

    def joined() -> torch.Tensor:
        return rotary.rotate_and_write(query[0], key[0], value[0], (cos, sin), *written)

    def separate() -> torch.Tensor:
        rotated, rotated_key = apply_rotary_pos_emb(query, key, cos, sin)
        block_attention.write(rotated_key[0].transpose(0, 1), value[0].transpose(0, 1), *written)
        return rotated[0]

    difference = float((joined().float() - separate().float()).abs().max())
    own, other = (seconds_of(work, device) for work in (joined, separate))
    report(
        rotation=f"{heads}/{shape.heads} of {width}", tokens=tokens, microseconds=round(1e6 * own, 1),
        separate_microseconds=round(1e6 * other, 1), difference=difference,
    )  # fmt: skip


def seconds_of(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """The mean of several runs, on a GPU in a CUDA graph, without the time of launches."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            work()
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / _REPEATS
