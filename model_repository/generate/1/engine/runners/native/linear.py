"""How linear layers lie in a checkpoint, and their weights as (outputs, inputs).

    Rows("mlp.up_proj")                 a matrix (outputs, inputs); Columns is its transpose, as GPT-2 stores it
    Rows("mlp.gate_up_proj", part=1)    the second of several equal parts of the outputs
    Qkv.separate(q, k, v), Qkv.stacked(source), Qkv.grouped(source)
                                        queries, keys and values: three matrices; one below the other; by KV head
    Experts("mlp.experts", 8)           gate, up and down of each expert of a mixture

This module knows layouts of files, not those of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from .padding import take
from .quantized import Quantized, Stack, interleave_blocks
from .rope import PADDING
from .weights import WeightPacker


@dataclass(frozen=True)
class Linear:
    """The tensors NAME.weight and, if there is one, NAME.bias: the outputs of one of `parts` equal parts."""

    name: str
    part: int = 0
    parts: int = 1
    transposed: bool = False


def Rows(name: str, part: int = 0, parts: int = 1) -> Linear:  # noqa: N802 (named like the layouts that they stand for)
    return Linear(name, part, parts)


def Columns(name: str, part: int = 0, parts: int = 1) -> Linear:  # noqa: N802
    return Linear(name, part, parts, transposed=True)


@dataclass(frozen=True)
class Qkv:
    sources: tuple[Linear, ...]
    by_kv_head: bool = False

    @classmethod
    def separate(cls, query: str, key: str, value: str) -> Qkv:
        return cls((Linear(query), Linear(key), Linear(value)))

    @classmethod
    def stacked(cls, source: Linear) -> Qkv:
        return cls((source,))

    @classmethod
    def grouped(cls, source: Linear) -> Qkv:
        """For each KV head its queries, its key and its value."""
        return cls((source,), by_kv_head=True)


@dataclass(frozen=True)
class Experts:
    """Each expert's matrices, in either of two layouts: the tensors NAME.0.PART.weight and so on, for the `parts` gate,
    up and down; or NAME.STACK for the `stacks` of gate above up, and of down, (experts, outputs, inputs), and biases
    with _bias. With `alternating`, as in gpt-oss, these are (experts, inputs, outputs), and gate and up alternate.
    """

    name: str
    count: int
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacks: tuple[str, str] = ("gate_up_proj", "down_proj")
    alternating: bool = False


class Matrix(NamedTuple):
    weight: torch.Tensor | Quantized
    bias: torch.Tensor | None

    def part(self, outputs: slice) -> Matrix:
        weight = self.weight.part(outputs) if isinstance(self.weight, Quantized) else self.weight[outputs]
        return Matrix(weight, None if self.bias is None else self.bias[outputs])

    def padded(self, outputs: int, inputs: int) -> Matrix:
        """With zeros up to these sizes."""
        rows, columns = outputs - self.weight.shape[0], inputs - self.weight.shape[1]
        if not rows and not columns:
            return self
        bias = None if self.bias is None else functional.pad(self.bias, (0, rows))
        if isinstance(self.weight, Quantized) and (padded := self.weight.padded(outputs, inputs)) is not None:
            return Matrix(padded, bias)
        return Matrix(functional.pad(numbers(self.weight), (0, columns, 0, rows)), bias)


def numbers(weight: torch.Tensor | Quantized | Stack) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.dequantized()


class Reader:
    def __init__(self, weights: WeightPacker, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self._weights = weights
        self._heads, self._kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim

    def linear(self, source: Linear, prefix: str, outputs: int, inputs: int) -> Matrix:
        all_outputs = outputs * source.parts
        shape = (inputs, all_outputs) if source.transposed else (all_outputs, inputs)
        weight = self._weights.matrix(f"{prefix}{source.name}.weight", *shape, transposed=source.transposed)
        name = f"{prefix}{source.name}.bias"
        bias = self._weights.get(name, all_outputs) if self._weights.has(name) else None
        return Matrix(weight, bias).part(slice(source.part * outputs, (source.part + 1) * outputs))

    def qkv(self, source: Qkv, prefix: str, inputs: int) -> tuple[torch.Tensor | Stack, torch.Tensor | None]:
        """Queries, keys and values, one below the other."""
        outputs = self.qkv_outputs(source)
        parts = [self.linear(one, prefix, count, inputs) for one, count in zip(source.sources, outputs, strict=True)]
        weight = _stacked([part.weight for part in parts])
        bias = _all_biases(parts)
        if not source.by_kv_head:
            return weight, bias
        order = self._by_kind(torch.arange(sum(outputs)))
        return take_rows(weight, order.tolist()), None if bias is None else bias[order]

    def qkv_outputs(self, source: Qkv) -> list[int]:
        """How many outputs each of the layers has."""
        widths = [heads * self._head_dim for heads in (self._heads, self._kv_heads, self._kv_heads)]
        return widths if len(source.sources) > 1 else [sum(widths)]

    def qkv_order(self, source: Qkv, rows: Sequence[int]) -> list[list[int]]:
        """Each layer's outputs, in the order that `rows` give to queries, keys and values one below the other."""
        widths = self.qkv_outputs(source)
        order = torch.arange(sum(widths))
        if source.by_kv_head:
            order = self._by_kind(order)
        lasts = [sum(widths[: n + 1]) * len(rows) // sum(widths) for n in range(len(widths))]
        firsts = [0, *lasts]
        return [
            [row if row == PADDING else int(order[row]) - sum(widths[:n]) for row in rows[firsts[n] : last]]
            for n, last in enumerate(lasts)
        ]

    def expert(
        self, source: Experts, number: int, prefix: str, inner: int, hidden: int
    ) -> tuple[Matrix, Matrix, Matrix]:
        """Gate, up and down of this expert."""
        gate_and_up, last = source.stacks
        if not self._weights.has(f"{prefix}{source.name}.{gate_and_up}"):
            gate, up, down = (Linear(f"{source.name}.{number}.{part}") for part in source.parts)
            pair = [self.linear(part, prefix, inner, hidden) for part in (gate, up)]
            return pair[0], pair[1], self.linear(down, prefix, hidden, inner)
        both = self._of_stack(source, gate_and_up, number, prefix, 2 * inner, hidden)
        alternate, halves = (slice(0, None, 2), slice(1, None, 2)), (slice(inner), slice(inner, None))
        gate_part, up_part = alternate if source.alternating else halves
        down_matrix = self._of_stack(source, last, number, prefix, hidden, inner)
        return both.part(gate_part), both.part(up_part), down_matrix

    def _of_stack(self, source: Experts, part: str, number: int, prefix: str, outputs: int, inputs: int) -> Matrix:
        name, transposed = f"{prefix}{source.name}.{part}", source.alternating
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        weight = self._weights.matrix(name, source.count, *shape, index=number, transposed=transposed)
        bias = f"{name}_bias"
        values = self._weights.get(bias, source.count, outputs, index=number) if self._weights.has(bias) else None
        return Matrix(weight, values)

    def _by_kind(self, tensor: torch.Tensor) -> torch.Tensor:
        """By KV head → queries, keys, values."""
        per_head = tensor.view(self._kv_heads, -1, self._head_dim, *tensor.shape[1:])
        queries, keys, values = per_head[:, :-2], per_head[:, -2], per_head[:, -1]
        return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in (queries, keys, values)])


def _all_biases(parts: Sequence[Matrix]) -> torch.Tensor | None:
    biases = [part.bias for part in parts]
    dtype = next((bias.dtype for bias in biases if bias is not None), None)
    if dtype is None:
        return None
    zeros = (torch.zeros(part.weight.shape[0], dtype=dtype) for part in parts)
    return torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])


def _stacked(weights: Sequence[torch.Tensor | Quantized]) -> torch.Tensor | Stack:
    if parts := as_quantized(weights):
        return Stack(parts)
    return torch.cat([numbers(weight) for weight in weights])


def as_quantized(weights: Sequence[torch.Tensor | Quantized]) -> tuple[Quantized, ...]:
    """The matrices, if all are quantized; else none."""
    parts = tuple(weight for weight in weights if isinstance(weight, Quantized))
    return parts if len(parts) == len(weights) else ()


def take_rows(weight: torch.Tensor | Stack, index: Sequence[int]) -> torch.Tensor | Stack:
    """These outputs, with zeros where the index is PADDING."""
    if isinstance(weight, Stack) and (taken := weight.rows(index)) is not None:
        return taken
    return take(numbers(weight), index)


def gate_and_up(matrices: Sequence[Matrix]) -> tuple[torch.Tensor | Quantized | Stack, torch.Tensor | None]:
    if len(matrices) == 1:
        return matrices[0]
    biases = [matrix.bias for matrix in matrices]
    parts = as_quantized([matrix.weight for matrix in matrices])
    weight = (
        Stack(parts, interleaved=True) if parts else interleave_blocks([numbers(matrix.weight) for matrix in matrices])
    )
    dtype = next((bias.dtype for bias in biases if bias is not None), None)
    if dtype is None:
        return weight, None
    zeros = (torch.zeros(matrix.weight.shape[0], dtype=dtype) for matrix in matrices)
    return weight, interleave_blocks([zero if b is None else b for b, zero in zip(biases, zeros, strict=True)])
