"""Samples one token per row of logits: temperature, top-k, top-p, min-p. Also the random numbers for it.

A row's result depends on that row alone, bit for bit, whichever rows share the batch. Floating-point sums would break
that, because their order changes with the shape of the batch. So probabilities are integers here: integer sums are
exact in any order. This module does not know requests, penalties or log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from .scratch import GPU_SCRATCH_BYTES, SCRATCH_BYTES, rows_at_once, take_rows
from .token_masks import TokenMasks
from .transfer import row_index, to_device

# The integer weight of the most likely token. The sum over a vocabulary of a million such weights fits into 64 bits,
# and a token of weight 0 has less than 2 ** -42 of the most likely token's probability.
FULL_WEIGHT = 2**42
# top-p searches this many of the most likely tokens first, then 16 times as many, and so on.
TOP_P_CANDIDATES = 256
# Bytes of temporaries per logit when all filters are used: most of them are 64 bits wide.
_NUMBER_BYTES = 64

_WORD = 2**64 - 1
_SEED_SALT, _CHOICE_SALT, _POSITION_SALT = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7


@dataclass(frozen=True)
class SamplingSettings:
    """The sampling settings of one row. With temperature 0 its likeliest token is chosen."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


def sample_tokens(
    logits: torch.Tensor,
    settings: Sequence[SamplingSettings],
    uniforms: npt.NDArray[np.float64],
    rows: Sequence[int] | None = None,
    masks: TokenMasks | None = None,
) -> torch.Tensor:
    """One token id for each of these rows, or for all; `masks` has one entry for each of them.

    The id of an unusable row is arbitrary, or negative if it has a mask.
    """
    rows = range(len(settings)) if rows is None else rows
    on_gpu = logits.device.type != "cpu"
    step = rows_at_once(_NUMBER_BYTES * logits.shape[-1], GPU_SCRATCH_BYTES if on_gpu else SCRATCH_BYTES // 2)
    parts = []
    for n in range(0, len(rows), step):
        part, part_settings = take_rows(logits, rows[n : n + step]).float(), settings[n : n + step]
        if masks:
            part = masks.take(range(n, n + len(part))).apply(part)
        ids = _sample_rows(part, part_settings, uniforms[n : n + step])
        if masks:
            best = part.max(dim=-1)
            greedy = to_device([row.temperature == 0 for row in part_settings], torch.bool, logits.device)
            ids = torch.where(greedy, best.indices, ids).masked_fill_(~best.values.isfinite(), -1)
        parts.append(ids)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sample_rows(
    logits: torch.Tensor, settings: Sequence[SamplingSettings], uniforms: npt.NDArray[np.float64]
) -> torch.Tensor:
    """One token id per row: the first id at which the cumulative weight exceeds the row's uniform number."""
    device = logits.device
    best = logits.amax(dim=-1, keepdim=True)
    # The caller rejects an unusable row; until then it must not disturb the arithmetic. On a GPU the check whether
    # there is one would wait for the device, so the rows are always masked there.
    unusable = ~best.isfinite()
    if device.type != "cpu" or bool(unusable.any()):
        logits, best = logits.masked_fill(unusable, 0.0), best.masked_fill(unusable, 0.0)
    best = best.double()
    # Any number does for a greedy row, whose sample is not used.
    temperatures = _column([row.temperature or 1.0 for row in settings], torch.float64, device)
    # In place where possible: with a large vocabulary, allocating memory costs more than the operation itself.
    ratios = logits.double().sub_(best).div_(temperatures).exp_()  # probability relative to the most likely token
    too_unlikely = None
    if any(row.min_p > 0 for row in settings):
        too_unlikely = ratios < _column([row.min_p for row in settings], torch.float64, device)
    weights = ratios.mul_(FULL_WEIGHT).to(torch.int64)
    vocab_size = logits.shape[-1]
    _keep_top_k(weights, logits, [row.top_k if 0 < row.top_k < vocab_size else 0 for row in settings])
    _keep_top_p(weights, logits, [row.top_p for row in settings])
    if too_unlikely is not None:
        weights.masked_fill_(too_unlikely, 0)
    sums = weights.cumsum_(dim=-1)
    total = sums[:, -1:]
    targets = (to_device(uniforms, torch.float64, device)[:, None] * total.double()).to(torch.int64)
    return torch.searchsorted(sums, torch.minimum(targets, total - 1), right=True)[:, 0]


def softmax_weights(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Probabilities as integers; the largest logit has the weight FULL_WEIGHT."""
    return logits.double().sub_(best.double()).exp_().mul_(FULL_WEIGHT).to(torch.int64)


def uniform(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for each (seed, choice, position): a hash, so there is no generator state."""
    words = [
        _mix(_stream(seed, choice) ^ _mix(position + _POSITION_SALT))
        for seed, choice, position in zip(seeds, choices, positions, strict=True)
    ]
    # 52 bits plus one half: the result is never 0 and never rounds to 1.
    return np.array([((word >> 12) + 0.5) * 2.0**-52 for word in words])


@lru_cache(maxsize=4096)
def _stream(seed: int, choice: int) -> int:
    """What the numbers of one sequence have in common."""
    return _mix(_mix(seed + _SEED_SALT) ^ _mix(choice + _CHOICE_SALT))


def _mix(word: int) -> int:
    """The finaliser of SplitMix64: a permutation of 64-bit words in which each bit depends on all others.

    In Python's integers: a step has few rows, and a call into numpy for each operation takes longer than they.
    """
    word &= _WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return to_device(values, dtype, device)[:, None]


def _keep_top_k(weights: torch.Tensor, logits: torch.Tensor, counts: Sequence[int]) -> None:
    """Drop tokens less likely than the k-th most likely one; ties stay. Rows with k = 0 keep all."""
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return
    index = row_index(rows, logits.device)
    best = logits[index].topk(max(counts)).values
    last = best.gather(1, _column([counts[row] - 1 for row in rows], torch.int64, logits.device))
    weights[index] = weights[index].masked_fill(logits[index] < last, 0)


def _keep_top_p(weights: torch.Tensor, logits: torch.Tensor, shares: Sequence[float]) -> None:
    """Keep the most likely tokens up to each row's share of the total weight. Rows with a share of 1 keep all.

    A token is dropped when it and all less likely ones together weigh no more than (1 - share) of the total. The most
    likely token always stays. Among ties the lower ids are dropped first.
    """
    rows = [row for row, share in enumerate(shares) if share < 1]
    if not rows:
        return
    index = row_index(rows, logits.device)
    row_weights, row_logits = weights[index], logits[index]
    total = row_weights.sum(dim=-1, keepdim=True)
    # In float32, as transformers compares: otherwise a share of 0.9 would keep all of ten tied tokens.
    lost = _column([1 - shares[row] for row in rows], torch.float32, logits.device)
    losable = (lost.double() * total).to(torch.int64)
    # On a GPU the check whether the candidates suffice would wait for the device, so all tokens are sorted there.
    count = min(TOP_P_CANDIDATES, logits.shape[-1]) if logits.device.type == "cpu" else logits.shape[-1]
    while True:
        best, ids = row_logits.topk(count)
        candidates = row_weights.gather(1, ids)
        kept = total - (candidates.cumsum(dim=-1) - candidates) > losable
        if count == logits.shape[-1] or not bool(kept[:, -1].any()):
            break
        count = min(16 * count, logits.shape[-1])
    kept[:, 0] = True
    border = best.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
    ties = row_logits == border
    ties_kept = (kept & (best == border)).sum(dim=-1, keepdim=True)
    ties_above = ties.sum(dim=-1, keepdim=True) - ties.cumsum(dim=-1)  # ties with a higher id
    weights[index] = row_weights.masked_fill((row_logits < border) | (ties & (ties_above >= ties_kept)), 0)
