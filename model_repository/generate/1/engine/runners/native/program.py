"""Builds the program that the kernels run (kernels/program.hpp): a family calls a method for each operation, in order.

Without `weights` nothing is read: then a family only finds out whether the kernels support the checkpoint. This module
knows operations, not families.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import structures
from .linear import Experts, Linear, Qkv, Reader, gate_and_up, numbers, take_rows
from .padding import HEAD_DIMS, INPUTS, HeadLayout, is_identity, padded, padded_range, take
from .placement import Placements
from .quantized import Quantized
from .rope import PADDING, Rope
from .structures import OPERATIONS, Activation, Buffer, NormKind, Weights
from .unsupported import Unsupported
from .weights import WeightPacker

# More than any model has.
_MAX_SIZE = 1_000_000


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.hidden_size % INPUTS:
            raise Unsupported(f"its width is not a multiple of {INPUTS}")
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise Unsupported("its query heads are not a multiple of its KV heads")
        if not 0 < self.head_dim <= HEAD_DIMS[-1]:
            raise Unsupported(f"its head size is not 1 to {HEAD_DIMS[-1]}")
        check_size("the width of its heads", self.num_heads * self.head_dim)


def check_size(name: str, size: int) -> None:
    """Refuse a damaged file's size before lists of that length are built."""
    if size > _MAX_SIZE:
        raise Unsupported(f"{name} is {size:,}, above the limit of {_MAX_SIZE:,}; is the file damaged?")


@dataclass(frozen=True)
class NormStyle:
    """How a family normalizes: `offset` is added to weights (1 + weight)."""

    kind: NormKind
    epsilon: float
    offset: float = 0.0


NO_NORM = NormStyle(NormKind.NONE, 0.0)


@dataclass(frozen=True)
class Projection:
    """Between embeddings of this width and the model: it is multiplied into their matrix."""

    source: Linear
    width: int


class Program:
    def __init__(self, shape: Shape, vocab_size: int, ropes: Sequence[Rope] = (), weights: WeightPacker | None = None):
        self.shape, self.vocab_size, self.ropes, self._weights = shape, vocab_size, ropes, weights
        self._heads = HeadLayout(shape.head_dim, shape.num_heads, ropes)
        self.head_dim = self._heads.padded
        self._ops: list[ctypes.Structure] = []
        self._layer, self._prefix = 0, ""
        self._reader = None if weights is None else Reader(weights, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._final: dict[str, Any] = {}
        self.placements = Placements()
        # The outputs of attention, with padded heads.
        self._attended = self._heads.rows(0, shape.num_heads)

    @property
    def reads(self) -> bool:
        """Whether weights are read, or only the support is checked."""
        return self._weights is not None

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor of the current layer; without weights it has none."""
        return self._weights is not None and self._weights.has(self._prefix + name)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of the current layer; only where `reads`."""
        assert self._weights is not None
        return self._weights.get(self._prefix + name, *shape)

    def layers(self, name: str) -> Iterator[int]:
        """The layers; within one, names of tensors follow `name.N.`."""
        for layer in range(self.shape.num_layers):
            self._layer, self._prefix = layer, f"{name}.{layer}."
            yield layer
        self._prefix = ""

    # Operations, in the order of OpKind.

    def embed(
        self, name: str, scale: float = 1.0, positions: str = "", context: int = 0, first_position: int = 0,
        projection: Projection | None = None,
    ) -> None:  # fmt: skip
        """The table of positions has `context` rows, behind `first_position` unused ones."""
        table = None
        if self._weights is not None and positions:
            rows = self._weights.get_rows(positions, first_position + context, self.shape.hidden_size)
            table = self._hold(rows[first_position:].float())
        self._ops.append(structures.EmbedOp(self._matrix(name, projection=projection), table, scale))

    def norm(
        self, name: str, style: NormStyle, source: Buffer = Buffer.RESIDUAL, to: Buffer = Buffer.NORMED, *,
        add: bool = False, scale: float = 1.0,
    ) -> None:  # fmt: skip
        """With `add` the result is added, `scale` times."""
        width = self._heads_of(source) * self.head_dim or self.shape.hidden_size
        self._ops.append(structures.NormOp(source, to, add, scale, self._norm(name, style, width, source)))

    def qkv(self, source: Qkv, *, rope_follows: bool = True, clip: float = 0.0) -> None:
        """Queries, keys and values, clipped to +-clip unless that is 0."""
        shape = self.shape
        heads, inputs = shape.num_heads + 2 * shape.num_kv_heads, shape.hidden_size
        weights = Weights(inputs=inputs, outputs=heads * self.head_dim)
        if self._weights is not None and self._reader is not None:
            weight, bias = self._reader.qkv(source, self._prefix, inputs)
            rows = self._heads.rows(shape.num_heads + shape.num_kv_heads, shape.num_kv_heads)
            weights = self._weights.linear(take_rows(weight, rows), None if bias is None else take(bias, rows))
            self.placements.place_qkv(len(self._ops), source, self._prefix, self._reader, inputs, rows)
        self._ops.append(structures.QkvOp(self._layer, rope_follows, clip, weights))

    def rope(
        self, table: int | None, query_norm: str = "", key_norm: str = "", style: NormStyle = NO_NORM, *,
        own_weights: bool = False,
    ) -> None:  # fmt: skip
        """Norms of each head's query and key, with `own_weights` for each head, then rotation."""
        if style.kind == NormKind.LAYER and self.head_dim != self.shape.head_dim:
            raise Unsupported(f"it normalizes heads of {self.shape.head_dim} by LayerNorm")
        shape = self.shape
        norms = [
            self._head_norm(name, style, heads if own_weights else 0)
            for name, heads in ((query_norm, shape.num_heads), (key_norm, shape.num_kv_heads))
        ]
        number, stride = -1 if table is None else table, self.head_dim if own_weights else 0
        self._ops.append(structures.RopeOp(self._layer, number, stride, *norms))

    def attend(
        self, scale: float | None = None, *, window: int | None = None, softcap: float | None = None, sinks: str = "",
        slopes: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        scale = self.shape.head_dim**-0.5 if scale is None else scale
        sink_values = self._hold(self.tensor(sinks, self.shape.num_heads).float()) if sinks and self.reads else None
        held_slopes = None if slopes is None else self._hold(slopes.float())
        self._ops.append(structures.AttendOp(self._layer, window or 0, scale, softcap or 0.0, sink_values, held_slopes))

    def project(self, source: Linear, to: Buffer = Buffer.RESIDUAL, *, scale: float = 1.0) -> None:
        """Attention's output matrix; it is added to the residual stream, or stored in a branch."""
        width = self.shape.num_heads * self.shape.head_dim
        weights = self._linear(source, self.shape.hidden_size, width, self._attended)
        self._append_matmul(Buffer.ATTENDED, to, weights, scale=scale)

    def up(
        self, source: Linear | tuple[Linear, Linear], inner: int, activation: Activation, *,
        normed: Buffer = Buffer.NORMED,
    ) -> None:  # fmt: skip
        """The first matrix of an MLP, or a pair of gate and up."""
        gated, hidden = isinstance(source, tuple), self.shape.hidden_size
        weights = Weights(inputs=hidden, outputs=padded(inner) * (1 + gated))
        if self._weights is not None and self._reader is not None:
            sources = source if isinstance(source, tuple) else (source,)
            matrices = [self._reader.linear(part, self._prefix, inner, hidden) for part in sources]
            weights = self._weights.linear(*gate_and_up([part.padded(padded(inner), hidden) for part in matrices]))
            self.placements.place_linear(len(self._ops), sources, self._prefix, inner, range(hidden), hidden)
        op = structures.MatmulOp(normed, Buffer.INNER, activation, gated, False, False, 1.0, weights)
        self._ops.append(op)

    def down(
        self, source: Linear, inner: int, to: Buffer = Buffer.RESIDUAL, *, scale: float = 1.0, row_scaled: bool = False
    ) -> None:
        """The last matrix of an MLP; it is added to the residual stream, or stored in a branch."""
        check_size("its MLP's width", inner)
        weights = self._linear(source, self.shape.hidden_size, inner, padded_range(inner))
        self._append_matmul(Buffer.INNER, to, weights, scale=scale, row_scaled=row_scaled)

    def experts(
        self, router: str, source: Experts, inner: int, top_k: int, activation: Activation, *,
        softmax_after: bool = False, renormalize: bool = False, shared_gate: str = "", scale: float = 1.0,
        to: Buffer = Buffer.RESIDUAL,
    ) -> None:  # fmt: skip
        """A mixture of experts."""
        count, hidden = source.count, self.shape.hidden_size
        check_size("its number of experts", count)
        if not 0 < top_k <= count:
            raise Unsupported(f"it chooses {top_k} of {count} experts")
        pointers: list[int | None] = [None] * 5
        if self._weights is not None and self._reader is not None:
            ups, downs = (Weights * count)(), (Weights * count)()
            for number in range(count):
                *pair, last = self._reader.expert(source, number, self._prefix, inner, hidden)
                ups[number] = self._weights.linear(*gate_and_up([part.padded(padded(inner), hidden) for part in pair]))
                downs[number] = self._weights.linear(*last.padded(hidden, padded(inner)))
            bias, gate = f"{router}.bias", self.tensor(shared_gate, 1, hidden).float() if shared_gate else None
            pointers = [
                self._hold(self.tensor(f"{router}.weight", count, hidden).float()),
                self._hold(self.tensor(bias, count).float()) if self.has(bias) else None,
                None if gate is None else self._hold(gate), self._hold_array(ups), self._hold_array(downs),
            ]  # fmt: skip
        adds = to == Buffer.RESIDUAL
        settings = (softmax_after, renormalize, to, adds, activation)
        self._ops.append(structures.ExpertsOp(count, top_k, *settings, scale, *pointers))

    def output(
        self, norm: str, style: NormStyle, lm_head: str, *, scale: float = 1.0, softcap: float | None = None,
        projection: Projection | None = None,
    ) -> None:  # fmt: skip
        """The final norm, and the matrix of the logits: the embedding's, if `lm_head` is empty."""
        embedding = next(op for op in self._ops if isinstance(op, structures.EmbedOp))
        bias = f"{lm_head}.bias"
        self._final = {
            "final_norm": self._norm(norm, style, self.shape.hidden_size),
            "lm_head": self._matrix(f"{lm_head}.weight", bias, projection) if lm_head else embedding.tokens,
            "logits_scale": scale, "logits_softcap": softcap or 0.0,
        }  # fmt: skip

    def finish(self) -> structures.Program:
        assert self._weights is not None
        tables = (structures.RopeTable * len(self.ropes))(
            *(structures.RopeTable(self._hold(rope.padded_inv_freq()), rope.half, rope.factor) for rope in self.ropes)
        )
        kinds = (structures.Op(OPERATIONS.index(type(op)), ctypes.addressof(op)) for op in self._ops)
        ops = (structures.Op * len(self._ops))(*kinds)
        self._weights.hold_structure(self._ops)
        shape = self.shape
        return structures.Program(
            hidden_size=shape.hidden_size, num_layers=shape.num_layers, num_heads=shape.num_heads,
            heads_per_kv=shape.num_heads // shape.num_kv_heads, head_dim=self.head_dim, vocab_size=self.vocab_size,
            op_count=len(ops), table_count=len(tables), ops=self._hold_array(ops), tables=self._hold_array(tables),
            **self._final,
        )  # fmt: skip

    # What the operations share.

    def _append_matmul(
        self, source: Buffer, to: Buffer, weights: Weights, scale: float = 1.0, row_scaled: bool = False
    ) -> None:
        adds = to == Buffer.RESIDUAL
        settings = (Activation.NONE, False, adds, row_scaled, scale)
        self._ops.append(structures.MatmulOp(source, to, *settings, weights))

    def _linear(self, source: Linear, outputs: int, inputs: int, columns: Sequence[int]) -> Weights:
        if self._weights is None or self._reader is None:
            return Weights(inputs=len(columns), outputs=outputs)
        self.placements.place_linear(len(self._ops), (source,), self._prefix, outputs, columns, inputs)
        matrix = self._reader.linear(source, self._prefix, outputs, inputs)
        if isinstance(matrix.weight, Quantized) and is_identity(columns, inputs):
            return self._weights.linear(*matrix)
        return self._weights.linear(take(numbers(matrix.weight).t(), columns).t(), matrix.bias)

    def _matrix(self, name: str, bias: str = "", projection: Projection | None = None) -> Weights:
        """The matrix of the embedding, or of the logits."""
        vocab_size, width = self.vocab_size, self.shape.hidden_size
        if self._weights is None:
            return Weights(inputs=width, outputs=vocab_size)
        values = self._weights.get(bias, vocab_size) if bias and self._weights.has(bias) else None
        if projection is None or self._reader is None:
            matrix = self._weights.matrix(name, vocab_size, width)
            return self._weights.linear(matrix, values, self._weights.vocabulary_bits)
        projector = numbers(self._reader.linear(projection.source, "", width, projection.width).weight)
        weight = self._weights.get(name, vocab_size, projection.width)
        return self._weights.linear(weight.float() @ projector.float().t(), values, self._weights.vocabulary_bits)

    def _norm(self, name: str, style: NormStyle, width: int, buffer: Buffer = Buffer.RESIDUAL) -> structures.Norm:
        """`width` is the padded one: then the sum of squares is divided by too much, which weights and epsilon undo."""
        heads = self._heads_of(buffer)
        order = self._heads.rows(heads) if heads else list(range(width))
        return self._read_norm(name, style, order)

    def _head_norm(self, name: str, style: NormStyle, heads: int) -> structures.Norm:
        """`heads` norms, or with 0 one for all heads."""
        if style.kind == NormKind.NONE:
            return structures.Norm()
        return self._read_norm(name, style, self._heads.rows(max(heads, 1)), repeats=heads)

    def _read_norm(self, name: str, style: NormStyle, order: Sequence[int], repeats: int = 0) -> structures.Norm:
        count = sum(index != PADDING for index in order)
        share = count / len(order)
        if style.kind == NormKind.LAYER and share != 1:
            raise Unsupported(f"it normalizes heads of {self.shape.head_dim} by LayerNorm")
        norm = structures.Norm(style.kind, style.epsilon * share)
        if not self.reads or style.kind == NormKind.NONE:
            return norm
        weight, bias = (self._norm_tensor(name, part, count, repeats) for part in ("weight", "bias"))
        if weight is not None:
            norm.weight = self._hold(take(weight + style.offset, order) * math.sqrt(share))
        elif name:
            self.tensor(f"{name}.weight", count)
        if bias is not None:
            norm.bias = self._hold(take(bias, order))
        return norm

    def _norm_tensor(self, name: str, part: str, count: int, repeats: int) -> torch.Tensor | None:
        """name.part, or of `repeats` norms name.N.part; None if the checkpoint has none."""
        if repeats and self.has(f"{name}.0.{part}"):
            return torch.cat([self.tensor(f"{name}.{n}.{part}", count // repeats) for n in range(repeats)]).float()
        if not self.has(f"{name}.{part}"):
            return None
        shape = (repeats, count // repeats) if repeats else (count,)
        return self.tensor(f"{name}.{part}", *shape).float().flatten()

    def _heads_of(self, buffer: Buffer) -> int:
        return {Buffer.QUERIES: self.shape.num_heads, Buffer.KEYS: self.shape.num_kv_heads}.get(buffer, 0)

    def _hold(self, tensor: torch.Tensor) -> int | None:
        return None if self._weights is None else self._weights.hold(tensor)

    def _hold_array(self, array: Any) -> int:
        assert self._weights is not None
        self._weights.hold_structure(array)
        return ctypes.addressof(array)
