"""A checkpoint's tensors as the kernels want them: packed, and held for as long as they are pointed to.

Weights of bfloat16 are tightened to twelve bits each, without loss, where the kernels say that it pays.

It knows files and the order of numbers in memory, not which family a tensor belongs to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch.nn import functional
from tritonlm.contract import CheckpointError

from .structures import INT, POINTER, Weights

LANES = 16
# So many inputs of one output lie side by side; those of eight bits come in steps.
_SIDE_BY_SIDE = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
_STEP = 64
# Of so many weights one may be a stray, which costs eight bytes and a moment.
_STRAYS = 256


class Packing:
    """Reads tensors by their names, with or without `prefix` in front, and gives pointers to what it has packed."""

    def __init__(self, folder: Path, prefix: str, dtype: torch.dtype, in_bytes: bool, library: ctypes.CDLL) -> None:
        self._folder, self._dtype, self._in_bytes, self._library = folder, dtype, in_bytes, library
        self._held: list[Any] = []
        self._files: dict[str, tuple[Any, str]] = {}
        try:
            for file in sorted(folder.glob("*.safetensors")):
                opened = safe_open(file, framework="pt")
                self._files |= {name.removeprefix(prefix): (opened, name) for name in opened.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
        except Exception as error:  # safetensors has errors of its own
            raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error

    def has(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """A copy of it: a newer file, written over the one that this was read from, must not change it."""
        if name not in self._files:
            raise CheckpointError(f"{self._folder} cannot be loaded: its weights have no {name}")
        opened, full_name = self._files[name]
        tensor: torch.Tensor = opened.get_tensor(full_name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._folder} cannot be loaded: {name} has the shape {tuple(tensor.shape)}, config.json says {shape}"
            )
        return tensor.clone()

    def close_files(self) -> None:
        """They lie in memory as long as they are open."""
        self._files.clear()

    def vector(self, name: str, *shape: int) -> int:
        return self.hold(self.get(name, *shape).float())

    def product(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Weights:
        """Of (outputs, inputs)."""
        held = None if bias is None else self.hold(bias.float())
        if self._in_bytes:
            values, scales = in_bytes(weight)
            return Weights(self.hold(packed(values, torch.int8)), self.hold(scales), held)
        values = packed(weight, self._dtype)
        pays = self._dtype == torch.bfloat16 and tightening_pays(self._library)
        if pays and (tight := tightened(values, self._library)):
            return Weights(
                self.hold(tight.tiles), None, held, self.hold(tight.strays), self.hold(tight.begins), tight.highest
            )
        return Weights(self.hold(values), None, held)

    def hold(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def keep(self, structure: Any) -> None:
        self._held.append(structure)


def packed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(outputs, inputs) → blocks of sixteen outputs, padded with zeros: see gemm.hpp and octets.hpp."""
    outputs, inputs = weight.shape
    side_by_side, more = _SIDE_BY_SIDE[dtype], -inputs % _STEP if dtype == torch.int8 else 0
    blocks = functional.pad(weight.to(dtype), (0, more, 0, -outputs % LANES))
    return blocks.view(-1, LANES, (inputs + more) // side_by_side, side_by_side).permute(0, 2, 1, 3).contiguous()


class Tight(NamedTuple):
    """See tight.hpp."""

    tiles: torch.Tensor
    strays: torch.Tensor
    # Where each block's strays begin, and at last where they end.
    begins: torch.Tensor
    # Of the exponents that have a code.
    highest: int


def tightening_pays(library: ctypes.CDLL) -> bool:
    return bool(library.tight_weights_pay())


def tightened(values: torch.Tensor, library: ctypes.CDLL) -> Tight | None:
    """What `packed` gave of bfloat16, in three quarters of the bytes; None where that is no gain."""
    blocks, most, highest = len(values), values.numel() // _STRAYS, ctypes.c_int32()
    tiles, strays = torch.empty(values.numel() // 2 * 3, dtype=torch.uint8), torch.empty(most, dtype=torch.int64)
    begins = torch.empty(blocks + 1, dtype=torch.int64)
    library.tighten_weights.restype = ctypes.c_int64
    library.tighten_weights.argtypes = [
        POINTER, INT, INT, POINTER, POINTER, POINTER, ctypes.c_int64, ctypes.POINTER(ctypes.c_int32),
    ]  # fmt: skip
    count = library.tighten_weights(
        values.data_ptr(), blocks, values.numel() // blocks // LANES, tiles.data_ptr(), strays.data_ptr(),
        begins.data_ptr(), most, ctypes.byref(highest),
    )  # fmt: skip
    return None if count < 0 else Tight(tiles, strays[:count].clone(), begins, highest.value)


def in_bytes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, inputs) as whole numbers from -127 to 127, and what each output's are multiplied by, padded."""
    scales = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    values = (weight.float() / scales[:, None]).round().to(torch.int8)
    return values, functional.pad(scales, (0, -len(scales) % LANES)).contiguous()


def by_turns(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sixteen rows of the one, sixteen of the next, and so on."""
    return torch.stack([part.view(-1, LANES, *part.shape[1:]) for part in parts], 1).flatten(0, 2)
