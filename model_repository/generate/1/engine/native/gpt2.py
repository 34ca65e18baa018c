"""A GPT-2 on a CPU, computed by kernels of our own: one call for a whole step, behind the runner's interface.

It reads the weights itself, packs them as the kernels want them, and hands over pointers. It knows neither requests'
parameters nor text.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.nn import functional
from tritonlm.contract import Checkpoint, CheckpointError

from ..config import INT8, EngineConfig
from ..kv_cache import KVCache, LayerShape, cache_size
from ..memory import MemoryBook
from ..model_runner import Computed, taken_memory, weights_on_disk
from ..sampler import Best
from ..scheduler import Slice

_LANES, _WIDEST_HEAD = 16, 128
_BEYOND = 16
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
# As the kernels count them.
PARTS = ("products", "attention", "logits", "other")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32


class _Weights(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("values", "scales", "bias")]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("first_scale", "first_shift", "second_scale", "second_shift")),
        *((name, _Weights) for name in ("attend", "project", "widen", "narrow")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("layers", "width", "heads", "inner", "vocabulary")), ("epsilon", ctypes.c_float),
        ("tokens", _Weights), *((name, _POINTER) for name in ("positions", "final_scale", "final_shift", "layer")),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("rows", "wanted_rows", "table_width", "block_tokens", "stride")),
        *((name, _POINTER) for name in ("ids", "places", "sequences", "wanted", "tables", "keys", "values")),
        *((name, _POINTER) for name in ("logits", "hidden", "best", "best_ids", "spent")),
    ]  # fmt: skip


def why_not(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """What of this checkpoint the kernels cannot compute; empty where they can."""
    config = checkpoint.config
    width, heads = int(config.get("n_embd", 768)), int(config.get("n_head", 12))
    inner = int(config.get("n_inner") or 4 * width)
    wanted = {
        "its model_type is not gpt2": config.get("model_type") == "gpt2",
        "it computes in another type than float32 or bfloat16": dtype in (torch.float32, torch.bfloat16),
        "its activation is not the tanh form of GELU": config.get("activation_function", "gelu_new") in _TANH_GELU,
        "its widths are not multiples of 32": width % 32 == inner % 32 == 0,
        "its heads are not as wide as a multiple of 16, up to 128": heads > 0
        and width % heads == 0
        and (width // heads) % _LANES == 0
        and width // heads <= _WIDEST_HEAD,
        "its attention is scaled in another way": config.get("scale_attn_weights", True)
        and not config.get("scale_attn_by_inverse_layer_idx", False),
        "it attends to another sequence too": not config.get("add_cross_attention", False),
        "its output layer is not its token embedding": config.get("tie_word_embeddings", True),
    }
    return next((reason for reason, holds in wanted.items() if not holds), "")


class Gpt2Runner:
    """`library` holds the kernels."""

    def __init__(
        self, folder: Path, config: EngineConfig, device: torch.device, dtype: torch.dtype, library: ctypes.CDLL
    ) -> None:
        checkpoint = Checkpoint(folder)
        about = checkpoint.config
        self.device, self.dtype, self.vocab_size = device, dtype, checkpoint.vocab_size
        self._width, heads, layers = (int(about[name]) for name in ("n_embd", "n_head", "n_layer"))
        self._library, self._bytes = library, config.weights == INT8
        self._book = MemoryBook(config.memory_budget)
        self._book.reserve(str(device), taken_memory(device) + self._weights_to_come(checkpoint))
        self.spent: ctypes.Array[ctypes.c_double] | None = None
        # What the kernels point to stays here.
        self._held: list[Any] = []
        self._model = self._read(folder, about, layers, heads)
        head = self._width // heads
        shapes = [LayerShape(heads, head, head)] * layers
        size = cache_size(shapes, config, checkpoint.context_length, dtype, device)
        self.blocks, self.context_length = size.blocks, size.context_length
        self.memory_bytes = taken_memory(device) + size.bytes
        self._book.reserve(str(device), self.memory_bytes)
        # More than is used: the kernels read sixteen keys at a time, beyond the last block's end.
        more = _BEYOND // config.block_tokens + 1
        self._cache = KVCache(shapes, self.blocks + more, config.block_tokens, dtype, device)
        self._keys, self._values = (
            (_POINTER * layers)(*(tensor.data_ptr() for tensor in tensors))
            for tensors in (self._cache.keys, self._cache.values)
        )
        library.gpt2_open.restype = _POINTER
        library.gpt2_open.argtypes = [_POINTER, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        library.gpt2_step.argtypes = [_POINTER, _POINTER]
        library.gpt2_close.argtypes = [_POINTER]
        threads = config.threads or len(os.sched_getaffinity(0))
        # For sampling, which is torch's.
        torch.set_num_threads(threads)
        self._opened = library.gpt2_open(ctypes.byref(self._model), dtype == torch.bfloat16, self._bytes, threads)

    def time_parts(self) -> ctypes.Array[ctypes.c_double]:
        """From now on each step adds its seconds to these, in the order of PARTS."""
        self.spent = (ctypes.c_double * len(PARTS))()
        return self.spent

    def forward(self, plan: Sequence[Slice]) -> Computed:
        ids: list[int] = []
        places: list[int] = []
        sequences: list[int] = []
        wanted: list[int] = []
        for number, piece in enumerate(plan):
            first = len(ids)
            ids += piece.request.ids[piece.start : piece.start + piece.count]
            places += range(piece.start, piece.start + piece.count)
            sequences += [number] * piece.count
            if piece.request.needs_every_row:
                wanted += range(first, len(ids))
            elif piece.samples:
                wanted.append(len(ids) - 1)
        tables = np.zeros((len(plan), max(len(piece.request.table.blocks) for piece in plan)), np.int32)
        for number, piece in enumerate(plan):
            blocks = piece.request.table.blocks
            tables[number, : len(blocks)] = blocks
        # The kernels write whole vectors.
        logits = torch.empty(len(wanted), self.vocab_size + -self.vocab_size % _LANES)
        hidden = torch.empty(len(wanted), self._width)
        best, best_ids = torch.empty(len(wanted)), torch.empty(len(wanted), dtype=torch.int64)
        arrays = [np.asarray(numbers, np.int32) for numbers in (ids, places, sequences, wanted)]
        step = _Step(
            len(ids), len(wanted), tables.shape[1], self._cache.block_tokens, logits.shape[1],
            *(array.ctypes.data for array in (*arrays, tables)),
            ctypes.addressof(self._keys), ctypes.addressof(self._values), logits.data_ptr(), hidden.data_ptr(),
            best.data_ptr(), best_ids.data_ptr(),
            None if self.spent is None else ctypes.addressof(self.spent),
        )  # fmt: skip
        self._library.gpt2_step(self._opened, ctypes.byref(step))
        return Computed(logits[:, : self.vocab_size], hidden, Best(best, best_ids))

    def clear(self, blocks: Sequence[int]) -> None:
        self._cache.clear(blocks)

    def close(self) -> None:
        self._library.gpt2_close(self._opened)
        self._book.leave()

    def _weights_to_come(self, checkpoint: Checkpoint) -> int:
        return weights_on_disk(checkpoint, torch.int8 if self._bytes else self.dtype)

    def _read(self, folder: Path, about: dict[str, Any], layers: int, heads: int) -> _Model:
        weights = _Files(folder)
        inner = int(about.get("n_inner") or 4 * self._width)

        def vector(name: str, *shape: int) -> int:
            return self._hold(weights.get(name, *shape).float().contiguous())

        def product(name: str, inputs: int, outputs: int) -> _Weights:
            bias = vector(f"{name}.bias", outputs)
            return self._pack(weights.get(f"{name}.weight", inputs, outputs).t(), bias)

        width, found = self._width, (_Layer * layers)()
        for number in range(layers):
            at = f"h.{number}."
            found[number] = _Layer(
                *(vector(f"{at}{norm}.{part}", width) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")),
                product(f"{at}attn.c_attn", width, 3 * width),
                product(f"{at}attn.c_proj", width, width),
                product(f"{at}mlp.c_fc", width, inner),
                product(f"{at}mlp.c_proj", inner, width),
            )
        self._held.append(found)
        tokens = self._pack(weights.get("wte.weight", self.vocab_size, width), None)
        return _Model(
            layers, width, heads, inner, self.vocab_size, float(about.get("layer_norm_epsilon", 1e-5)), tokens,
            vector("wpe.weight", int(about["n_positions"]), width), vector("ln_f.weight", width),
            vector("ln_f.bias", width), ctypes.addressof(found),
        )  # fmt: skip

    def _pack(self, weight: torch.Tensor, bias: int | None) -> _Weights:
        """Of (outputs, inputs)."""
        if not self._bytes:
            return _Weights(self._hold(packed(weight, self.dtype)), None, bias)
        values, scales = in_bytes(weight)
        return _Weights(self._hold(packed(values, torch.int8)), self._hold(scales), bias)

    def _hold(self, tensor: torch.Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()


class _Files:
    """A checkpoint's tensors by their names, with or without the model's own in front."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[Any, str]] = {}
        try:
            for file in sorted(folder.glob("*.safetensors")):
                opened = safe_open(file, framework="pt")
                self._files |= {name.removeprefix("transformer."): (opened, name) for name in opened.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
        except Exception as error:  # safetensors has errors of its own
            raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error

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


def packed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(outputs, inputs) → blocks of sixteen outputs, padded with zeros: see gemm.hpp."""
    outputs, inputs = weight.shape
    blocks = functional.pad(weight.to(dtype), (0, 0, 0, -outputs % _LANES)).view(-1, _LANES, inputs)
    if dtype != torch.bfloat16:
        return blocks.transpose(1, 2).contiguous()
    return blocks.view(-1, _LANES, inputs // 2, 2).permute(0, 2, 1, 3).contiguous()


def in_bytes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, inputs) as whole numbers from -127 to 127, and what each output's are multiplied by, padded."""
    scales = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    values = (weight.float() / scales[:, None]).round().to(torch.int8)
    return values, functional.pad(scales, (0, -len(scales) % _LANES)).contiguous()
