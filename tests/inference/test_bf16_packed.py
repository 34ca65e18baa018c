"""Lossless 12-bit bfloat16: unpacked weights have the same bits, and so do logits computed with packed weights."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine.config import EngineConfig
from engine.inspection import inspect
from engine.runners.native import weights
from engine.runners.native.large_pages import LargePages
from engine.runners.native.runner import NativeRunner
from engine.runners.native.weights import BLOCK_OUTPUTS, PackedBf16, WeightPacker, pack, pack_bf16
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tritonlm.contract import Checkpoint
from tritonlm.contract.load_progress import LoadProgress

from .isa_variants import FLOAT_VARIANTS, library_of

INPUTS, TILE_WEIGHTS, PART_WEIGHTS, PAIR_CODES, ZERO_FLAG = 64, 512, 128, 8, 128
OUTLIER = np.dtype([("index", np.uint32), ("bits", np.uint16), ("padding", np.uint16)])


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.uint16]:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def in_order(parts: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Of 16 bytes the first 8 belong to one line of 32 weights, and the others to the next line."""
    return parts.reshape(-1, 8, 4, 2, 8).swapaxes(2, 3).reshape(-1, TILE_WEIGHTS)


def unpacked(packed: PackedBf16, blocks: int) -> npt.NDArray[np.uint16]:
    """The layout of bf16_packed.hpp, in numpy."""
    # Parts of 64 bytes of codes, and 128 of lower bytes.
    parts = packed.tiles.numpy().reshape(-1, TILE_WEIGHTS // PART_WEIGHTS, 192).astype(np.uint16)
    code_bytes, lower = parts[..., :64], in_order(parts[..., 64:])
    codes = in_order(np.concatenate([code_bytes & 15, code_bytes >> 4], 2))
    sign, pair_codes = codes // PAIR_CODES, codes % PAIR_CODES
    is_zero = (pair_codes == PAIR_CODES - 1) & bool(packed.exponent_pairs & ZERO_FLAG)
    pairs = np.where(is_zero, 0, packed.exponent_pairs % ZERO_FLAG - pair_codes)
    bits = sign << 15 | pairs << 8 | lower
    result = bits.astype(np.uint16).reshape(blocks, -1)
    outliers, offsets = packed.outliers.numpy().view(OUTLIER), packed.outlier_offsets.tolist()
    for block in range(blocks):
        of_block = outliers[offsets[block] : offsets[block + 1]]
        result[block, of_block["index"]] = of_block["bits"]
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(-120, 120),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**16 - 1)), max_size=12),
)  # fmt: skip
@example(16, 0, 0, [(0, 0), (1, 0x8000), (2, 1), (3, 0x807F), (4, 0x7F80), (5, 0xFF80), (6, 0x7FC0), (1023, 0x7F7F)])
@example(40, 0, 0, [(5, 0x7F80), (1029, 0x7F80), (2053, 0xFF80), (3071, 1)])  # outliers in each of three blocks
def test_packing_is_lossless(outputs: int, seed: int, exponent: int, outliers: list[tuple[int, int]]) -> None:
    """Weights of one magnitude, and among them any bits: signed zeros, subnormals, infinities, NaNs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(outputs, INPUTS).uniform_(1, 7.9, generator=generator) * 2.0**exponent
    weight *= torch.empty(outputs, INPUTS).bernoulli_(0.5, generator=generator) * 2 - 1
    blocks = pack(weight, torch.bfloat16, LargePages().zeros)
    flat = blocks.view(torch.int16).view(-1)
    for index, bits in outliers:
        flat[index % len(flat)] = bits - 2**16 if bits >= 2**15 else bits
    if packed := pack_bf16(blocks, library_of("all"), LargePages()):
        assert packed.tiles.numel() * 4 == blocks.numel() * 2 * 3
        assert np.array_equal(unpacked(packed, len(blocks)).ravel(), bits_of(flat))
    else:
        # Only with more outliers than are allowed.
        assert len(outliers) > blocks.numel() // 256


def test_weights_of_all_magnitudes_are_not_packed() -> None:
    bits = torch.randint(-(2**15), 2**15, (4 * BLOCK_OUTPUTS, INPUTS), dtype=torch.int16)
    pages = LargePages()
    blocks = pack(bits.view(torch.bfloat16), torch.bfloat16, pages.zeros)
    assert pack_bf16(blocks, library_of("all"), pages) is None


@pytest.mark.slow
def test_a_processor_without_byte_lookup_does_not_pack() -> None:
    pages = LargePages()
    blocks = pack(torch.randn(BLOCK_OUTPUTS, INPUTS), torch.bfloat16, pages.zeros)
    assert pack_bf16(blocks, library_of("plain"), pages) is None


def packer_of(folder: Path, dtype: torch.dtype, variant: str) -> WeightPacker:
    return WeightPacker(folder, "", dtype, False, library_of(variant), LoadProgress())


@pytest.mark.parametrize(("bits", "packed"), [("12", True), ("16", False)])
def test_the_environment_decides_the_form(
    bits: str, packed: bool, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv(weights.BF16_BITS, bits)
    packer = packer_of(folder, torch.bfloat16, "all")
    assert bool(packer.linear(torch.randn(BLOCK_OUTPUTS, INPUTS)).outlier_offsets) == packed


@pytest.mark.parametrize(
    ("bits", "dtype", "read"), [("12", "bfloat16", 12), ("16", "bfloat16", 16), ("12", "float32", 32)]
)
def test_the_inspection_counts_what_a_step_reads(
    bits: str, dtype: str, read: int, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv(weights.BF16_BITS, bits)
    facts = inspect(Checkpoint(folder), EngineConfig(dtype=dtype, device="cpu"))
    assert (facts["runner"], facts["read_bits_per_weight"]) == ("native", read)


def test_the_faster_form_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(weights.BF16_BITS, raising=False)
    kernels = library_of("all")
    measurements: list[int] = []

    class Library:
        def bf16_packed_pays(self, threads: int) -> int:
            measurements.append(threads)
            return int(kernels.bf16_packed_pays(threads))

    library: Any = Library()
    first = weights.bf16_packing_pays(library)
    assert weights.bf16_packing_pays(library) == first
    assert len(measurements) == 1


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with zeros and outliers, a matrix with too many outliers to be packed, an odd number of logit blocks."""
    sizes: dict[str, Any] = {
        "gpt2": {"n_embd": 416, "n_head": 13, "n_layer": 2, "n_positions": 64},
        "llama": {"model_type": "llama", "hidden_size": 96, "intermediate_size": 416, "num_hidden_layers": 2,
                  "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64},
    }[request.param]  # fmt: skip
    folder = make_checkpoint(tmp_path_factory.mktemp("packed"), seed=5, initializer_range=0.2, vocab_size=490, **sizes)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(6)
    for name, tensor in ((name, tensor) for name, tensor in tensors.items() if tensor.dim() == 2):
        outlier_rate = 0.3 if "1.mlp" in name else 0.001
        tensor.mul_(2.0 ** (-40.0 * (torch.rand(tensor.shape, generator=generator) < outlier_rate)))
        tensor.mul_(torch.rand(tensor.shape, generator=generator) > 0.01)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("variant", [name for name in FLOAT_VARIANTS if name != "plain"])
def test_packed_weights_give_the_same_logits_bit_for_bit(
    folder: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, results = library_of(variant), list[PackedBf16 | None]()

    def recorded(values: torch.Tensor, library: ctypes.CDLL, pages: LargePages) -> PackedBf16 | None:
        results.append(pack_bf16(values, library, pages))
        return results[-1]

    def logits() -> list[torch.Tensor]:
        config = EngineConfig(device="cpu", dtype="bfloat16", max_sequences=8, threads=2, block_tokens=16)
        runner = NativeRunner(folder, config, torch.device("cpu"), torch.bfloat16, library)
        outputs = []
        for count in (1, 2, 3, 8, 13, 16, 17, 45, 61):
            sequence = Sequence([7 * n % 490 for n in range(count)], [1, 2, 3, 4])
            outputs.append(every_logits(runner, [Slice(sequence, 0, count)]))  # type: ignore[arg-type]
        runner.close()
        return outputs

    monkeypatch.setattr(weights, "pack_bf16", recorded)
    monkeypatch.setenv(weights.BF16_BITS, "12")
    packed_logits = logits()
    # Some matrices are packed and some are not, and there are outliers.
    assert {packed is None for packed in results} == {True, False}
    assert any(packed is not None and len(packed.outliers) for packed in results)
    monkeypatch.setattr(weights, "pack_bf16", lambda *_: None)
    for packed, plain in zip(packed_logits, logits(), strict=True):
        assert torch.equal(packed, plain)


def test_float32_weights_are_not_packed(folder: Path) -> None:
    packer = packer_of(folder, torch.float32, "all")
    assert not packer.linear(torch.randn(BLOCK_OUTPUTS, INPUTS)).outlier_offsets
