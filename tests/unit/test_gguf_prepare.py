"""The checkpoint folder of a GGUF file: what is in it, when it is written anew, and which files are refused."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes.gguf_bytes import ARRAY, FLOAT32, STRING, array, gguf_bytes, key, number_key, string, tensor, text_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonlm.checkpoints.gguf import prepare
from tritonlm.checkpoints.gguf.architectures import ARCHITECTURES
from tritonlm.contract import Checkpoint, CheckpointError, gguf_tensors

_LAYER = {
    "attn_norm": (32,), "attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), "attn_output": (32, 32),
    "ffn_norm": (32,), "ffn_gate": (32, 64), "ffn_up": (32, 64), "ffn_down": (64, 32),
}  # fmt: skip
SIZES: dict[str, Sequence[int]] = {
    "token_embd": (32, 3), "output_norm": (32,), **{f"blk.0.{name}": sizes for name, sizes in _LAYER.items()},
}  # fmt: skip
KEYS = {
    "llama.block_count": 1, "llama.embedding_length": 32, "llama.feed_forward_length": 64, "llama.context_length": 128,
    "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tritonlm" / "gguf"


def model(
    architecture: str = "llama", keys: dict[str, int | None] | None = None,
    sizes: dict[str, Sequence[int]] | None = None, further: Sequence[bytes] = (),
) -> bytes:  # fmt: skip
    numbers = {name: value for name, value in {**KEYS, **(keys or {})}.items() if value is not None}
    content = [text_key("general.architecture", architecture), *(number_key(name, n) for name, n in numbers.items())]
    content += [
        key("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", 1e-5)),
        text_key("tokenizer.ggml.model", "gpt2"), text_key("tokenizer.ggml.pre", "gpt-2"),
        key("tokenizer.ggml.tokens", ARRAY, array(STRING, 3, b"".join(map(string, ("a", "b", "ab"))))),
        key("tokenizer.ggml.merges", ARRAY, array(STRING, 1, string("a b"))), *further,
    ]  # fmt: skip
    tensors, offset = [], 0
    for name, shape in (SIZES | (sizes or {})).items():
        tensors.append(tensor(f"{name}.weight", shape, offset=offset))
        count = 1
        for size in shape:
            count *= size
        offset += -(-4 * count // 32) * 32
    return gguf_bytes(content, tensors, bytes(offset))


def written(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def test_a_folder_is_a_checkpoint_whose_weights_stay_in_the_file(tmp_path: Path, cache: Path) -> None:
    file = written(tmp_path, model())
    folder = prepare(file)
    assert folder.parent == cache
    assert (folder / "model.gguf").readlink() == file
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    assert (checkpoint.vocab_size, checkpoint.context_length, checkpoint.about["architecture"]) == (3, 128, "llama")
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert checkpoint.config["tie_word_embeddings"] is True
    tensors = gguf_tensors.read(folder)
    assert tensors["model.embed_tokens.weight"].shape == (3, 32)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].rows == ((0, 16, 2), (1, 16, 2), (16, 32, 2), (17, 32, 2))
    assert checkpoint.weight_bytes() == 2 * gguf_tensors.parameter_count(tensors.values())


def test_it_is_written_once_and_anew_when_the_file_changes(tmp_path: Path, cache: Path) -> None:
    file = written(tmp_path, model())
    first = prepare(file)
    before = (first / "config.json").stat().st_mtime_ns
    assert prepare(file) == first
    assert (first / "config.json").stat().st_mtime_ns == before
    other = prepare(written(tmp_path, model(), "other.gguf"))
    os.utime(file, ns=(1, 1))
    second = prepare(file)
    assert second != first
    # That of the earlier content is removed.
    assert set(cache.iterdir()) == {second, other}


def test_it_is_written_by_several_at_once(tmp_path: Path, cache: Path) -> None:
    file = written(tmp_path, model())
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(prepare, [file] * 8))
    assert len(folders) == 1
    assert list(cache.iterdir()) == list(folders)


def test_an_earlier_folder_that_another_process_removes_fails_no_load(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, model())
    earlier, readlink = prepare(file), Path.readlink

    def removed_before(link: Path) -> Path:
        shutil.rmtree(earlier)
        return readlink(link)

    monkeypatch.setattr(Path, "readlink", removed_before)
    os.utime(file, ns=(1, 1))
    folder = prepare(file)
    assert list(cache.iterdir()) == [folder]


def test_what_a_process_left_that_died_is_removed_after_an_hour(tmp_path: Path, cache: Path) -> None:
    for name in ("old", "new"):
        (cache / f".work-{name}").mkdir(parents=True)
    os.utime(cache / ".work-old", (time.time() - 3601,) * 2)
    folder = prepare(written(tmp_path, model()))
    assert set(cache.iterdir()) == {folder, cache / ".work-new"}


def test_a_relative_path_and_a_link_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, model())
    (tmp_path / "link.gguf").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "link.gguf"):
        Checkpoint(prepare(Path(name))).check()


def test_a_folder_with_a_gguf_file_beside_other_files_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    file = written(folder, model())
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"has its weights in a GGUF file: give {file} itself"):
        Checkpoint(folder).check()


def test_nothing_is_left_of_a_file_that_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError):
        prepare(written(tmp_path, model(keys={"llama.block_count": None})))
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        prepare(written(tmp_path, model()))


REFUSED: dict[str, tuple[bytes, str]] = {
    "no architecture": (gguf_bytes(), "names no general.architecture"),
    "an unknown architecture": (model("mamba"), "architecture is 'mamba', none of the 31 supported ones"),
    "a long architecture": (model("m" * 9000), f"architecture is '{'m' * 40}', none of the "),
    "no layers": (model(keys={"llama.block_count": None}), "llama.block_count is None, not a positive integer"),
    "many layers": (model(keys={"llama.block_count": 10**6}), "1000000, not a positive integer up to 1,000"),
    "no heads": (model(keys={"llama.attention.head_count": 0}), "head_count is 0, not a positive integer"),
    "an unknown tensor": (model(sizes={"blk.0.attn_gate": (32,)}), "blk.0.attn_gate.weight is none of the"),
    "a tensor of a later layer": (model(sizes={"blk.1.attn_norm": (32,)}), "is in none of its 1 layers"),
    "many heads": (model(keys={"llama.attention.head_count": 50_000_000}), "not a positive integer up to 1,000,000"),
    "a wide MLP": (model(keys={"llama.feed_forward_length": 10**8}), "not a positive integer up to 1,000,000"),
    "heads that do not fit": (model(keys={"llama.attention.head_count": 3}), "attn_q.weight has 32 rows for 3 heads"),
    "a stack where a matrix is expected": (model(sizes={"blk.0.attn_v": (4, 4, 2)}), "attn_v.weight has 3 dimensions"),
    "no embedding": (model(sizes={"token_embd": (32,)}), "no tensor token_embd.weight of two dimensions"),
    "a partial rotation": (model(keys={"llama.rope.dimension_count": 8}), "rotates a part of each head"),
    "an unknown scaling": (model(further=[text_key("llama.rope.scaling.type", "new")]), "unknown scaling 'new'"),
    "too many tokens": (model(sizes={"token_embd": (32, 2)}), "has 3 tokens, its embedding 2 rows"),
    "layers that differ": (
        model(keys={"llama.feed_forward_length": None}, further=[
            key("llama.feed_forward_length", ARRAY, array(4, 2, struct.pack("<2I", 64, 32)))
        ]), "feed_forward_length is [64, 32]",
    ),
    "a long scaling": (
        model(further=[text_key("llama.rope.scaling.type", "n" * 9000)]), f"unknown scaling '{'n' * 40}'",
    ),
    "a text with control characters": (
        model(keys={"llama.context_length": None}, further=[text_key("llama.context_length", "a\n\x1b[31m")]),
        r"context_length is a\n\x1b[31m, not a positive integer",
    ),
    "a tensor whose name has control characters": (model(sizes={"a\nb": (32,)}), r"its tensor a\nb.weight is none of"),
    "a text for a number": (
        model(keys={"llama.context_length": None}, further=[text_key("llama.context_length", "long")]),
        "context_length is long",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_said_in_a_sentence(tmp_path: Path, name: str) -> None:
    content, expected = REFUSED[name]
    file = written(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        prepare(file)
    assert str(caught.value).startswith(f"{file} cannot be used: ")
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(file)) + 300


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        prepare(tmp_path / "missing.gguf")


_VALID = model()
_PLACES = st.integers(0, len(_VALID) - 1)
_SETTINGS = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def prepared_or_refused(file: Path) -> None:
    try:
        folder = prepare(file)
    except CheckpointError:
        return
    # What is written can be read.
    gguf_tensors.read(folder)
    assert Checkpoint(folder).config["model_type"]


@_SETTINGS
@given(changes=st.lists(st.tuples(_PLACES, st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_changed_bytes_give_a_folder_or_a_sentence(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(_VALID)
    for place, replacement in changes:
        content[place : place + len(replacement)] = replacement
    prepared_or_refused(written(tmp_path, bytes(content)))


_NUMBERS = st.integers(0, 2**32 - 1) | st.integers(0, 300)
_VALUES = st.one_of(
    _NUMBERS.map(lambda value: (4, struct.pack("<I", value))),
    st.integers(-(2**63), 2**63 - 1).map(lambda value: (11, struct.pack("<q", value))),
    st.floats(width=32).map(lambda value: (FLOAT32, struct.pack("<f", value))),
    st.booleans().map(lambda value: (7, bytes([value]))),
    st.text(max_size=9).map(lambda value: (STRING, string(value))),
    st.lists(_NUMBERS, max_size=4).map(lambda v: (ARRAY, array(4, len(v), struct.pack(f"<{len(v)}I", *v)))),
    st.lists(st.text(max_size=3), max_size=4).map(lambda v: (ARRAY, array(STRING, len(v), b"".join(map(string, v))))),
)
_FURTHER = (
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "attention.key_length",
    "attention.value_length", "attention.sliding_window", "expert_count", "expert_used_count", "vocab_size",
    "attention.sliding_window_pattern", "rope.scaling.original_context_length", "attention.layer_norm_epsilon",
)  # fmt: skip
_TOKENIZER = (
    "model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id", "unknown_token_id",
    "add_bos_token", "add_space_prefix",
)  # fmt: skip


@_SETTINGS
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    values=st.dictionaries(
        st.sampled_from([*KEYS, *(f"llama.{name}" for name in _FURTHER), *(f"tokenizer.ggml.{n}" for n in _TOKENIZER)]),
        _VALUES, max_size=5,
    ),
)  # fmt: skip
def test_any_values_give_a_folder_or_a_sentence(
    tmp_path: Path, architecture: str, values: dict[str, tuple[int, bytes]]
) -> None:
    numbers: dict[str, tuple[int, bytes]] = {name: (4, struct.pack("<I", value)) for name, value in KEYS.items()}
    epsilon = {f"llama.attention.layer_norm{rms}_epsilon": (FLOAT32, struct.pack("<f", 1e-5)) for rms in ("", "_rms")}
    tokenizer = {
        "tokenizer.ggml.model": (STRING, string("gpt2")), "tokenizer.ggml.merges": (ARRAY, array(STRING, 0, b"")),
        "tokenizer.ggml.tokens": (ARRAY, array(STRING, 1, string("a"))),
    }  # fmt: skip
    content = [text_key("general.architecture", architecture)]
    for name, (kind, value) in {**numbers, **epsilon, **tokenizer, **values}.items():
        content.append(key(name.replace("llama.", f"{architecture}.", 1), kind, value))
    tensors = [tensor("token_embd.weight", (32, 3)), tensor("blk.0.attn_qkv.weight", (32, 64), offset=384)]
    prepared_or_refused(written(tmp_path, gguf_bytes(content, tensors, bytes(384 + 4 * 32 * 64))))
