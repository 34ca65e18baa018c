"""The tensors of GGUF files: every type is dequantized exactly, in bounded memory; wrong descriptions are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from engine.runners.native import gguf_source
from engine.runners.native.gguf_source import GgufSource
from engine.runners.native.tensor_source import open_tensors
from gguf import GGMLQuantizationType
from tritonlm.contract import CheckpointError, gguf_tensors
from tritonlm.contract.gguf_tensors import BLOCKS, StoredTensor


def stored_bytes(kind: str, rows: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random blocks without infinite scales."""
    block, size = BLOCKS[kind]
    generator = np.random.default_rng(7)
    if kind in ("F32", "F16"):
        return generator.standard_normal((rows, width)).astype("f4" if kind == "F32" else "f2").view(np.uint8)
    raw = generator.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    # The high bytes of float16 and bfloat16 numbers: an exponent of all ones is no number.
    raw[(raw & 0x7C) == 0x7C] ^= 0x40
    return raw.reshape(rows, -1)


def source_of(folder: Path, tensor: StoredTensor, content: bytes, dtype: torch.dtype = torch.float32) -> GgufSource:
    folder.mkdir(exist_ok=True)
    (folder / tensor.file).write_bytes(bytes(tensor.offset) + content)
    gguf_tensors.write(folder, {"weight": tensor})
    source = open_tensors(folder, dtype)
    assert isinstance(source, GgufSource)
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BLOCKS)
def test_tensors_are_dequantized_exactly(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "_SLICE", 1024)
    raw = stored_bytes(kind, 37, 512)
    # An odd offset: nothing relies on alignment.
    source = source_of(tmp_path / "folder", StoredTensor("model.gguf", 33, kind, (37, 512)), raw.tobytes(), dtype)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType[kind])).float()
    assert expected.isfinite().all()
    assert source.shape("weight") == (37, 512)
    assert torch.equal(source.get("weight"), expected.to(dtype))
    assert torch.equal(source.get("weight", 5), expected[5].to(dtype))
    source.close()


def test_rows_are_chosen_and_changed_as_described(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    rows = ((0, 4, 2), (1, 4, 2), (4, 6, 1))
    tensor = StoredTensor("model.gguf", 0, "F32", (6, 8), rows, add=-1.0, transposed=True)
    source = source_of(tmp_path / "folder", tensor, values.tobytes())
    assert source.shape("weight") == (8, 6)
    assert torch.equal(source.get("weight"), torch.from_numpy(values[[0, 2, 1, 3, 4, 5]] - 1).T)


def test_vectors_keep_float32(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal(5).astype(np.float32)
    source = source_of(
        tmp_path / "folder", StoredTensor("model.gguf", 0, "F32", (5,)), values.tobytes(), torch.bfloat16
    )
    assert torch.equal(source.get("weight"), torch.from_numpy(values))


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def dequantize(rows: Any, kind: str) -> Any:
        sizes.append(rows.shape[0] * 512)
        return np.zeros((rows.shape[0], 512), np.float32)

    monkeypatch.setattr(gguf_source, "dequantize", dequantize)
    tensor = StoredTensor("model.gguf", 0, "Q8_0", (5000, 512))
    source = source_of(tmp_path / "folder", tensor, bytes(tensor.byte_count), torch.bfloat16)
    assert source.get("weight").shape == (5000, 512)
    assert max(sizes) <= 2**18
    assert sum(sizes) == 5000 * 512


def test_a_file_that_was_cut_since_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.gguf ends before weight"):
        source_of(tmp_path / "folder", StoredTensor("model.gguf", 0, "Q8_0", (2, 64)), bytes(100))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    gguf_tensors.write(tmp_path, {"weight": StoredTensor("model.gguf", 0, "F32", (4,))})
    with pytest.raises(CheckpointError, match=r"model.gguf cannot be read"):
        open_tensors(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf to be loaded: pip install tritonlm\[server\]"):
        source_of(tmp_path / "folder", StoredTensor("model.gguf", 0, "F32", (4,)), bytes(16))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("file", "../model.gguf"), ("file", ""), ("offset", -1), ("type", "IQ1_S"), ("stored_shape", [0, 4]),
        ("stored_shape", [4, 33]), ("stored_shape", [2, 2, 32]), ("rows", [[0, 5, 1]]), ("rows", [[0, 4, 0]]),
        ("rows", 5),
    ],
)  # fmt: skip
def test_a_wrong_description_of_a_tensor_is_refused(tmp_path: Path, entry: str, value: Any) -> None:
    tensor = StoredTensor("model.gguf", 0, "Q8_0", (4, 32))
    gguf_tensors.write(tmp_path, {"weight": tensor})
    file = tmp_path / gguf_tensors.FILE_NAME
    content = json.loads(file.read_text())
    content["tensors"]["weight"][entry] = value
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_tensors(tmp_path)
