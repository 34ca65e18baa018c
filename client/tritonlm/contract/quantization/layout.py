"""How the numbers of a tensor lie in a checkpoint's files, under which names. This module knows no settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ..safetensors_header import StoredTensor

SCALE_TYPES = ("F16", "BF16", "F32")
# Scales of activations and of the KV cache: neither is quantized here.
_UNUSED = (
    "input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale", "input_zero_point",
    "output_zero_point", "k_zero_point", "v_zero_point",
)  # fmt: skip


class QuantizationError(Exception):
    """Why quantized weights cannot be read: a clause that names the field or the tensor."""


class Encoding(str, Enum):
    """How numbers are stored, with the parts: names of stored tensors by their role."""

    # `values`: as they are, but maybe in a smaller type.
    PLAIN = "plain"
    # `codes`, `zeros` int32 (inputs, outputs / 8) and (groups, outputs / 8), `scales` (groups, outputs).
    AWQ = "awq"
    # `codes` int32 (inputs * bits / 32, outputs), `zeros` (groups, outputs * bits / 32), `scales` (groups, outputs),
    # and maybe `index`, the group of each input.
    GPTQ = "gptq"
    # `codes` int32 (outputs, inputs * bits / 32), `scales` (outputs, groups), maybe `zeros` (outputs * bits / 32,
    # groups), `index`, and the matrix's `shape`.
    PACKED = "packed"
    # `values` int8 or float8 (…, outputs, inputs), `scales` for blocks of (block_outputs, group), maybe `zeros`.
    SCALED = "scaled"
    # `blocks` (experts, outputs, inputs / 32, 16) of two numbers each, `scales`, which are exponents.
    MXFP4 = "mxfp4"


@dataclass(frozen=True)
class Layout:
    encoding: Encoding
    # Of the tensor that the parts become.
    shape: tuple[int, ...]
    parts: Mapping[str, str] = field(default_factory=dict)
    # Of a stored number, and for how many inputs there is a scale.
    bits: int = 0
    group: int = 0
    block_outputs: int = 1
    # Added to stored zero points.
    zero_offset: int = 0
    # The shape is (inputs, outputs), as GPT-2 stores its matrices.
    transposed: bool = False
    is_float: bool = False
    # The inputs of a group are not consecutive.
    reordered: bool = False
    # Products are rounded to the type of the scales, as the format's own code does.
    rounded: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def kept_bits(self) -> int:
        """Of a number in memory, where integers in groups are kept as they are, and others become 16 bits."""
        is_kept = self.encoding != Encoding.PLAIN and not self.reordered
        return self.bits if is_kept and (self.encoding == Encoding.MXFP4 or not self.is_float) else 16

    @property
    def type_name(self) -> str:
        """The type of its numbers as a person calls it; only of quantized tensors."""
        if self.encoding == Encoding.MXFP4:
            return "MXFP4"
        return "FP8" if self.is_float else f"{self.bits}-bit"

    @property
    def scale_name(self) -> str:
        """For what there is a scale."""
        outputs, inputs = self.shape[-2:]
        if self.encoding == Encoding.SCALED and self.block_outputs > 1:
            whole = (self.block_outputs, self.group) == (outputs, inputs)
            return "a scale for each matrix" if whole else f"blocks of {self.block_outputs} x {self.group}"
        whole = self.group == (outputs if self.transposed else inputs)
        return "a scale for each row" if whole else f"groups of {self.group}"


class Stored:
    """The tensors of the files, by name; it remembers which ones belong to a quantized tensor."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors, self._used = dict(sorted(tensors.items())), set[str]()

    def ending(self, suffix: str) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors NAME + suffix, by NAME."""
        for name, tensor in self._tensors.items():
            if name.endswith(suffix):
                yield name.removesuffix(suffix), tensor

    def of_types(self, dtypes: Iterable[str]) -> Iterator[tuple[str, StoredTensor]]:
        return ((name, tensor) for name, tensor in self._tensors.items() if tensor.dtype in dtypes)

    def find(self, *names: str) -> str | None:
        return next((name for name in names if name in self._tensors), None)

    def take(self, name: str, dtypes: Sequence[str], *shapes: tuple[int, ...], dimensions: int = 0) -> StoredTensor:
        """The tensor, which must have one of these types and shapes, or so many dimensions."""
        if name not in self._tensors:
            raise QuantizationError(f"the weights have no {name}, which quantization_config requires")
        tensor = self._tensors[name]
        if tensor.dtype not in dtypes:
            raise QuantizationError(f"{name} is of the type {tensor.dtype}, not {' or '.join(dtypes)}")
        if shapes and tensor.shape not in shapes:
            raise QuantizationError(
                f"{name} has the shape {tensor.shape}, not {' or '.join(map(str, shapes))} as quantization_config says"
            )
        if dimensions and len(tensor.shape) != dimensions:
            raise QuantizationError(f"{name} has the shape {tensor.shape}, not {dimensions} dimensions")
        if 0 in tensor.shape:
            raise QuantizationError(f"{name} is empty: its shape is {tensor.shape}")
        self._used.add(name)
        return tensor

    def skip(self, name: str) -> None:
        """Nothing has to be read of it."""
        self._used.add(name)

    def plain(self) -> dict[str, Layout]:
        """What no quantized tensor uses."""
        rest = {name: tensor for name, tensor in self._tensors.items() if name not in self._used}
        for name, tensor in rest.items():
            if name.endswith("weight") and tensor.dtype not in {*SCALE_TYPES, "F64"}:
                raise QuantizationError(
                    f"{name} is of the type {tensor.dtype}, which quantization_config does not explain"
                )
        kept = {name: tensor for name, tensor in rest.items() if name.rpartition(".")[2] not in _UNUSED}
        return {name: Layout(Encoding.PLAIN, tensor.shape, {"values": name}) for name, tensor in kept.items()}


def groups_of(inputs: int, group: int, name: str) -> int:
    """How many groups of inputs; -1 is one of all."""
    if group == -1:
        return 1
    if inputs % group:
        raise QuantizationError(
            f"quantization_config.group_size is {group}, which does not divide the {inputs} inputs of {name}"
        )
    return inputs // group
