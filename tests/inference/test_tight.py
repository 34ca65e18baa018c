"""Weights of bfloat16 in twelve bits: not one bit of them is lost, and none of what is computed with them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine.config import EngineConfig
from engine.runners.native import weights
from engine.runners.native.runner import NativeRunner
from engine.runners.native.weights import LANES, Packing, Tight, packed, tightened
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from .forms import FORMS, library_of

INPUTS, TILE, ZERO = 64, 512, 15
STRAY = np.dtype([("place", np.uint32), ("bits", np.uint16), ("unused", np.uint16)])


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.uint16]:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def widened(tight: Tight, blocks: int) -> npt.NDArray[np.uint16]:
    """As tight.hpp describes them, number by number."""
    tiles = tight.tiles.numpy().reshape(-1, TILE // 2 * 3).astype(np.uint16)
    # Of sixteen bytes the first eight belong to a line of thirty-two numbers, and the others to the next line.
    rest = tiles[:, :TILE].reshape(-1, 8, 4, 2, 8).swapaxes(2, 3).reshape(-1, TILE)
    words = tiles[:, TILE:].reshape(-1, 4, 1, 64)
    codes = np.concatenate([words & 15, words >> 4], 2).reshape(-1, 8, 4, 2, 8).swapaxes(2, 3).reshape(-1, TILE)
    exponents = np.where(codes == ZERO, 0, tight.highest - codes)
    found = ((rest & 128) << 8 | exponents << 7 | rest & 127).astype(np.uint16).reshape(blocks, -1)
    strays, begins = tight.strays.numpy().view(STRAY), tight.begins.tolist()
    for block in range(blocks):
        mine = strays[begins[block] : begins[block + 1]]
        found[block, mine["place"]] = mine["bits"]
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(-120, 120),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**16 - 1)), max_size=12),
)  # fmt: skip
@example(16, 0, 0, [(0, 0), (1, 0x8000), (2, 1), (3, 0x807F), (4, 0x7F80), (5, 0xFF80), (6, 0x7FC0), (1023, 0x7F7F)])
def test_no_bit_is_lost(outputs: int, seed: int, size: int, odd: list[tuple[int, int]]) -> None:
    """Numbers of one size, and among them anything: zeros of both signs, the smallest, the infinite, what is none."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.empty(outputs, INPUTS).uniform_(1, 7.9, generator=draw) * 2.0**size
    weight *= torch.empty(outputs, INPUTS).bernoulli_(0.5, generator=draw) * 2 - 1
    blocks = packed(weight, torch.bfloat16)
    flat = blocks.view(torch.int16).view(-1)
    for place, bits in odd:
        flat[place % len(flat)] = bits - 2**16 if bits >= 2**15 else bits
    if tight := tightened(blocks, library_of("all")):
        assert tight.tiles.numel() * 4 == blocks.numel() * 2 * 3
        assert np.array_equal(widened(tight, len(blocks)).ravel(), bits_of(flat))
    else:
        # Only where there are more strays than are allowed.
        assert len(odd) > blocks.numel() // 256


def test_weights_of_all_sizes_are_left_as_they_are() -> None:
    bits = torch.randint(-(2**15), 2**15, (4 * LANES, INPUTS), dtype=torch.int16)
    assert tightened(packed(bits.view(torch.bfloat16), torch.bfloat16), library_of("all")) is None


def test_a_processor_that_cannot_look_up_bytes_is_spared() -> None:
    assert tightened(packed(torch.randn(LANES, INPUTS), torch.bfloat16), library_of("plain")) is None


def test_without_avx512_weights_keep_sixteen_bits(folder: Path) -> None:
    packing = Packing(folder, "", torch.bfloat16, False, library_of("avx2"))
    assert not packing.product(torch.randn(LANES, INPUTS)).begins


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with zeros and strays, a matrix with so many that it stays as it is, a lone block of logits."""
    sizes: dict[str, Any] = {
        "gpt2": {"n_embd": 416, "n_head": 13, "n_layer": 2, "n_positions": 64},
        "llama": {"model_type": "llama", "hidden_size": 96, "intermediate_size": 416, "num_hidden_layers": 2,
                  "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64},
    }[request.param]  # fmt: skip
    folder = make_checkpoint(tmp_path_factory.mktemp("tight"), seed=5, initializer_range=0.2, vocab_size=490, **sizes)
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(6)
    for name, tensor in ((name, tensor) for name, tensor in tensors.items() if tensor.dim() == 2):
        often = 0.3 if "1.mlp" in name else 0.001
        tensor.mul_(2.0 ** (-40.0 * (torch.rand(tensor.shape, generator=draw) < often)))
        tensor.mul_(torch.rand(tensor.shape, generator=draw) > 0.01)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("form", [form for form in FORMS if form != "plain"])
def test_what_is_computed_is_the_same_bit_for_bit(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, made = library_of(form), list[Tight | None]()

    def watched(values: torch.Tensor, library: ctypes.CDLL) -> Tight | None:
        made.append(tightened(values, library))
        return made[-1]

    def logits() -> list[torch.Tensor]:
        config = EngineConfig(device="cpu", dtype="bfloat16", max_sequences=8, threads=2, block_tokens=16)
        runner = NativeRunner(folder, config, torch.device("cpu"), torch.bfloat16, library)
        found = []
        for count in (1, 2, 3, 8, 13, 16, 17, 45):
            sequence = Sequence([7 * n % 490 for n in range(count)], [1, 2, 3])
            found.append(every_logits(runner, [Slice(sequence, 0, count)]))  # type: ignore[arg-type]
        runner.close()
        return found

    monkeypatch.setattr(weights, "tightened", watched)
    monkeypatch.setattr(weights, "tightening_pays", lambda _: True)
    tight = logits()
    # Both kinds were there, and strays were met.
    assert {one is None for one in made} == {True, False}
    assert any(one is not None and len(one.strays) for one in made)
    monkeypatch.setattr(weights, "tightened", lambda *_: None)
    for ours, plain in zip(tight, logits(), strict=True):
        assert torch.equal(ours, plain)


def test_float32_stays_float32(folder: Path) -> None:
    packing = Packing(folder, "", torch.float32, False, library_of("all"))
    assert not packing.product(torch.randn(LANES, INPUTS)).begins
