"""ALiBi: a slope for each query head. A score grows by the slope times the key's position."""

from __future__ import annotations

import torch


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """2^-(8 n / count), n = 1..count; where the number of heads is no power of two, those of the power below it, and
    of the power above it every second one."""
    count = 1 << (num_heads.bit_length() - 1)
    slopes = torch.cat([_powers(count), _powers(2 * count)[::2]])
    return slopes[:num_heads]


def _powers(count: int) -> torch.Tensor:
    return 2.0 ** (-8.0 * torch.arange(1, count + 1) / count)
