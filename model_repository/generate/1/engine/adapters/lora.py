"""An adapter as its files hold it: two low-rank matrices for each linear layer that it changes.

y = W x + bias + B (A x), where B holds the scaling already. This module knows neither files nor runners.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """The matrices of one linear layer, in any floating-point type."""

    # (rank, inputs).
    a: torch.Tensor
    # (outputs, rank), multiplied by the scaling.
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def inputs(self) -> int:
        return self.a.shape[1]

    @property
    def outputs(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True)
class LoraAdapter:
    name: str
    # The sha-256 of the files' content, as hexadecimal digits.
    identity: str
    # By the name of the layer in the checkpoint, such as model.layers.0.self_attn.q_proj.
    layers: Mapping[str, LowRank]

    @property
    def count(self) -> int:
        """The numbers of all matrices."""
        return sum(matrix.numel() for layer in self.layers.values() for matrix in (layer.a, layer.b))
