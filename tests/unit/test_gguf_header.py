"""The header of GGUF files: what the format's own reader finds is found, and each kind of damage has its sentence."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from fakes.gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    STRING,
    UINT32,
    array,
    gguf_bytes,
    key,
    number_key,
    string,
    tensor,
    text_key,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonlm.checkpoints.gguf.header import TENSOR_TYPES, read_header
from tritonlm.checkpoints.gguf.model_file import open_model
from tritonlm.contract import CheckpointError
from tritonlm.contract.gguf_tensors import BLOCKS

HUGE = 2**62
KEYS = (
    text_key("general.architecture", "llama"), number_key("llama.block_count", 2),
    key("llama.rope.freq_base", FLOAT32, struct.pack("<f", 1e-6)), key("flag", BOOL, b"\1"),
    key("tokens", ARRAY, array(STRING, 3, string("a") + string("é") + string(""))),
    key("scores", ARRAY, array(FLOAT32, 2, struct.pack("<2f", 0.5, -1))),
)  # fmt: skip
TENSORS = (tensor("token_embd.weight", (64, 3)), tensor("output_norm.weight", (8,), offset=768))
VALID = gguf_bytes(KEYS, TENSORS, bytes(800))


def written(folder: Path, content: bytes) -> Path:
    file = folder / "model.gguf"
    file.write_bytes(content)
    return file


def test_a_header_is_read(tmp_path: Path) -> None:
    header = read_header(written(tmp_path, VALID))
    assert header.metadata == {
        "general.architecture": "llama", "llama.block_count": 2, "llama.rope.freq_base": 1e-6, "flag": True,
        "tokens": ["a", "é", ""], "scores": [0.5, -1.0],
    }  # fmt: skip
    embedding, norm = header.tensors.values()
    assert (embedding.shape, norm.shape) == ((3, 64), (8,))
    assert norm.offset - embedding.offset == 768


def test_types_and_sizes_are_those_of_the_gguf_package() -> None:
    assert {
        number: kind.name for number, kind in ((int(kind), kind) for kind in gguf.GGMLQuantizationType)
    } == TENSOR_TYPES
    for name, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == block


def test_files_of_the_gguf_package_are_read_as_it_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "b"])
    generator = np.random.default_rng(0)
    for kind in (gguf.GGMLQuantizationType(number) for number in (0, 1, 8)):
        values = generator.standard_normal((3, 256)).astype(np.float32)
        writer.add_tensor(f"tensor{kind}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    raw = generator.integers(0, 99, (3, 210), dtype=np.uint8)
    writer.add_tensor("tensor14", raw, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_header(file), gguf.GGUFReader(file)
    found = [(t.name, t.type, t.shape, t.offset, t.byte_count) for t in ours.tensors.values()]
    assert found == [
        (t.name, t.tensor_type.name, tuple(map(int, t.shape[::-1])), int(t.data_offset), int(t.n_bytes))
        for t in theirs.tensors
    ]
    assert ours.metadata["tokenizer.ggml.tokens"] == ["a", "b"]


DAMAGED = {
    "an empty file": (b"", "is not a GGUF file"),
    "another format": (b"PK\3\4" + bytes(100), "is not a GGUF file"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "version 9": (gguf_bytes(version=9), "version 9"),
    "the other byte order": (gguf_bytes(version=3 << 24), "byte order"),
    "more tensors than fit": (gguf_bytes(counts=(5000, 0)), "5,000 tensors"),
    "a huge count of tensors": (gguf_bytes(counts=(HUGE, 0)), "tensors, more than the limit"),
    "a huge count of keys": (gguf_bytes(counts=(0, HUGE)), "keys, more than the limit"),
    "fewer keys than it says": (gguf_bytes(KEYS[:1], counts=(0, 2), alignment=1), "middle of its header"),
    "a huge key": (gguf_bytes([struct.pack("<Q", HUGE)]), "for a key, above the limit"),
    "a huge string": (gguf_bytes([string("k") + struct.pack("<IQ", STRING, HUGE)]), "value of k, above the limit"),
    "a long string": (gguf_bytes([string("k") + struct.pack("<IQ", STRING, 1000)]), "middle of its header"),
    "a string that is not UTF-8": (gguf_bytes([key("k", STRING, string(b"\xff"))]), "not UTF-8"),
    "an unknown type of value": (gguf_bytes([key("k", 77, b"")]), "unknown type 77"),
    "an array of an unknown type": (gguf_bytes([key("k", ARRAY, array(77, 1, b"\0"))]), "unknown type 77"),
    "nested arrays": (
        gguf_bytes([key("k", ARRAY, array(ARRAY, 1, array(ARRAY, 1, array(UINT32, 0, b""))))]), "nests arrays",
    ),
    "deeply nested arrays": (gguf_bytes([key("k", ARRAY, array(ARRAY, 1, b"") * 100_000)]), "nests arrays"),
    "a huge array": (gguf_bytes([key("k", ARRAY, array(UINT32, HUGE, b""))]), "above the limit"),
    "a long array of strings": (gguf_bytes([key("k", ARRAY, array(STRING, 10_000_000, b""))]), "middle of its header"),
    "a long array of numbers": (gguf_bytes([key("k", ARRAY, array(UINT32, 10_000_000, b""))]), "middle of its header"),
    "a key twice": (gguf_bytes([KEYS[0], KEYS[0]]), "'general.architecture' twice"),
    "a long key twice": (gguf_bytes([number_key("k" * 9000, 1)] * 2), f"the key '{'k' * 60}' twice"),
    "a long key": (gguf_bytes([key("k" * 9000, 77, b"")]), f"unknown type 77 in the value of {'k' * 60}"),
    "a key with control characters": (gguf_bytes([key("a\n\x1b[31m", 77, b"")]), r"in the value of a\n\x1b[31m"),
    "alignment 0": (gguf_bytes([number_key("general.alignment", 0)]), "alignment 0"),
    "alignment 24": (gguf_bytes([number_key("general.alignment", 24)]), "alignment 24"),
    "a huge alignment": (gguf_bytes([number_key("general.alignment", 2**31)]), "alignment 2147483648"),
    "an alignment that is a text": (gguf_bytes([text_key("general.alignment", "x")]), "alignment x"),
    "a tensor without dimensions": (gguf_bytes((), [tensor("t", ())], bytes(64)), "0 dimensions"),
    "a tensor of many dimensions": (gguf_bytes((), [tensor("t", (1,) * 9)], bytes(64)), "9 dimensions"),
    "a huge count of dimensions": (
        gguf_bytes((), [string("t") + struct.pack("<I", 2**32 - 1)], bytes(64)), "4294967295 dimensions",
    ),
    "a tensor of size 0": (gguf_bytes((), [tensor("t", (0, 4))], bytes(64)), "impossible shape"),
    "a huge tensor": (gguf_bytes((), [tensor("t", (HUGE, HUGE, HUGE))], bytes(64)), "is incomplete"),
    "sizes whose product overflows": (gguf_bytes((), [tensor("t", (2**32, 2**32))], bytes(64)), "is incomplete"),
    "a tensor at a huge offset": (gguf_bytes((), [tensor("t", (4,), offset=HUGE)], bytes(64)), "is incomplete"),
    "a tensor at an odd offset": (gguf_bytes((), [tensor("t", (4,), offset=7)], bytes(64)), "no multiple"),
    "half a block": (gguf_bytes((), [tensor("t", (48,), 8)], bytes(64)), "impossible shape"),
    "an unsupported type": (gguf_bytes((), [tensor("t", (256,), 16)], bytes(99)), "type IQ2_XXS; supported are"),
    "an unknown type": (gguf_bytes((), [tensor("t", (256,), 99)], bytes(99)), "type number 99"),
    "a tensor twice": (
        gguf_bytes((), [tensor("t", (4,)), tensor("t", (4,), offset=32)], bytes(64)), "'t' twice",
    ),
    "tensors that overlap": (
        gguf_bytes((), [tensor("a", (16,), offset=0), tensor("b", (4,), offset=32)], bytes(64)), "overlap: 'a' and 'b'",
    ),
    "tensors at one place": (gguf_bytes((), [tensor("a", (4,)), tensor("b", (4,))], bytes(64)), "overlap"),
    "missing data": (gguf_bytes((), [tensor("t", (64,))], bytes(64)), "is incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_each_kind_of_damage_has_its_sentence(tmp_path: Path, name: str) -> None:
    content, expected = DAMAGED[name]
    file = written(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert expected in message
    assert message.isprintable()
    assert len(message) < len(str(file)) + 300


@pytest.mark.parametrize("length", range(0, len(VALID), 7))
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=r"middle of its header|is incomplete|is not a GGUF|fit into it"):
        read_header(written(tmp_path, VALID[:length]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(VALID) - 801), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
    ),
    cut=st.integers(0, len(VALID)),
)
def test_changed_bytes_give_a_header_or_a_sentence(tmp_path: Path, changes: list[tuple[int, bytes]], cut: int) -> None:
    content = bytearray(VALID)
    for place, replacement in changes:
        content[place : place + len(replacement)] = replacement
    file = written(tmp_path, bytes(content[: cut or None]))
    tracemalloc.start()
    begin = time.monotonic()
    with contextlib.suppress(CheckpointError):
        open_model(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The file has a kilobyte.
    assert peak < 2_000_000
    assert time.monotonic() - begin < 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "missing.gguf")


def part(number: int, count: int, tensors: int, name: str) -> bytes:
    keys = [
        text_key("general.architecture", "llama"), number_key("split.no", number), number_key("split.count", count),
        number_key("split.tensors.count", tensors),
    ]  # fmt: skip
    return gguf_bytes(keys, [tensor(name, (4,))], bytes(16))


def test_parts_of_a_split_file_are_read_together(tmp_path: Path) -> None:
    files = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    files[0].write_bytes(part(0, 2, 2, "a"))
    files[1].write_bytes(part(1, 2, 2, "b"))
    for file in files:
        model = open_model(file)
        assert {name: tensor.file for name, tensor in model.tensors.items()} == {"a": files[0], "b": files[1]}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (None, "m-00002-of-00002.gguf is missing"), (part(0, 2, 2, "b"), "is not part 2 of 2"),
        (part(1, 2, 2, "a"), "'a', as another part has"), (part(1, 2, 2, "b")[:-1], "is incomplete"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, second: bytes | None, expected: str) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(part(0, 2, 2, "a"))
    if second is not None:
        (tmp_path / "m-00002-of-00002.gguf").write_bytes(second)
    with pytest.raises(CheckpointError, match=expected):
        open_model(first)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m-00001-of-00002.gguf", part(0, 2, 3, "a"), "have 2 tensors, not 3"),
        ("model.gguf", part(0, 2, 2, "a"), "one of 2 parts, and its name does not say which"),
        ("m-00001-of-99999.gguf", part(0, 2, 2, "a"), "99,999 parts"),
    ],
)  # fmt: skip
def test_wrong_counts_of_parts_are_refused(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(part(1, 2, 3, "b"))
    with pytest.raises(CheckpointError, match=expected):
        open_model(tmp_path / name)
