"""A matrix in groups of integers, as files and the kernels hold it. This module knows no file format and no kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quantized:
    """A matrix (outputs, inputs) in groups of consecutive inputs: weight = scale * code + minimum."""

    codes: torch.Tensor  # int8 (outputs, inputs); bits == 4: -8 … 7
    scales: torch.Tensor  # float32 (outputs, inputs / group)
    minima: torch.Tensor | None  # float32 (outputs, inputs / group); None: symmetric
    bits: int  # 4 | 8

    @property
    def group(self) -> int:
        """Inputs per scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def part(self, outputs: slice) -> Quantized:
        minima = None if self.minima is None else self.minima[outputs]
        return Quantized(self.codes[outputs], self.scales[outputs], minima, self.bits)

    def dequantized(self) -> torch.Tensor:
        """float32 (outputs, inputs)."""
        groups = self.codes.float().view(len(self.codes), -1, self.group) * self.scales[..., None]
        return (groups if self.minima is None else groups + self.minima[..., None]).flatten(1)
