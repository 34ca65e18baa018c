"""What rules make of a file's tensors: layouts that few files have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tritonlm.checkpoints.gguf.architectures import rules
from tritonlm.checkpoints.gguf.architectures.rules import Rule, Source
from tritonlm.checkpoints.gguf.header import TensorInfo
from tritonlm.checkpoints.gguf.model_file import ModelFile
from tritonlm.contract import CheckpointError
from tritonlm.contract.gguf_tensors import StoredTensor

Array = npt.NDArray[Any]
HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 6, 5
_BEGIN = 40


def source_of(shape: tuple[int, ...], kind: str = "F32", suffix: str = ".weight") -> Source:
    keys = {
        "general.architecture": "llama", "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
    }  # fmt: skip
    model = ModelFile(Path("model.gguf"), keys, {})
    tensor = TensorInfo(model.file, "blk.0.t.weight", kind, shape, _BEGIN)
    return Source(model, tensor, "model.gguf", "layer.", suffix)


def applied(rule: Rule, stored: Array) -> dict[str, Array]:
    """What the engine reads, of a float32 tensor."""
    content = np.concatenate([np.zeros(_BEGIN // 4, np.float32), stored.ravel()])

    def read(piece: StoredTensor) -> Array:
        count = int(np.prod(piece.stored_shape))
        values = content[piece.offset // 4 : piece.offset // 4 + count].reshape(piece.stored_shape)
        if piece.rows:
            values = np.concatenate([values[slice(*rows)] for rows in piece.rows])
        values = (values + piece.add).T if piece.transposed else values + piece.add
        assert values.shape == piece.shape
        return values

    return {name: read(piece) for name, piece in rule(source_of(stored.shape))}


def numbers(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def paired(heads: int, matrix: Array) -> Array:
    """As the format's converter orders rows: the halves of each head alternate."""
    return matrix.reshape(heads, 2, -1, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)


@pytest.mark.parametrize("pairs", [False, True])
def test_one_matrix_of_queries_keys_and_values_is_split(pairs: bool) -> None:
    parts = {
        "q": numbers(HEADS * DIM, WIDTH),
        "k": -numbers(KV_HEADS * DIM, WIDTH),
        "v": numbers(KV_HEADS * DIM, WIDTH) + 0.5,
    }
    stored = [paired(n, parts[p]) if pairs else parts[p] for p, n in (("q", HEADS), ("k", KV_HEADS))]
    found = applied(rules.split_qkv("q", "k", "v", pairs=pairs), np.concatenate([*stored, parts["v"]]))
    assert {name: values.tolist() for name, values in found.items()} == {
        f"layer.{part}.weight": values.tolist() for part, values in parts.items()
    }


def test_a_bias_of_queries_keys_and_values_is_split() -> None:
    found = applied(rules.split_qkv("q", "k", "v"), numbers((HEADS + 2 * KV_HEADS) * DIM))
    assert [values.shape for values in found.values()] == [(HEADS * DIM,), (KV_HEADS * DIM,), (KV_HEADS * DIM,)]
    assert np.concatenate(list(found.values())).tolist() == numbers((HEADS + 2 * KV_HEADS) * DIM).tolist()


@pytest.mark.parametrize(("rule", "groups"), [(rules.kv_heads_of_qkv, KV_HEADS)])
def test_rows_are_put_into_the_order_of_kv_heads(rule: Rule, groups: int) -> None:
    original = numbers(groups, HEADS // groups + 2, DIM, WIDTH)
    kinds = (original[:, :-2], original[:, -2:-1], original[:, -1:])
    stored = np.concatenate([kind.reshape(-1, WIDTH) for kind in kinds])
    (found,) = applied(rule, stored).values()
    assert found.tolist() == original.reshape(-1, WIDTH).tolist()


def test_gate_and_up_of_experts_are_separated() -> None:
    stored = numbers(3, 8, WIDTH)
    found = applied(rules.gate_and_up_experts("gate", "up"), stored)
    assert found.keys() == {f"layer..{number}.{part}.weight" for number in range(3) for part in ("gate", "up")}
    for number in range(3):
        assert found[f"layer..{number}.gate.weight"].tolist() == stored[number, :4].tolist()
        assert found[f"layer..{number}.up.weight"].tolist() == stored[number, 4:].tolist()


def test_a_vector_is_a_row_and_rows_are_norms_of_heads() -> None:
    assert applied(rules.as_row, numbers(4))["layer..weight"].tolist() == [numbers(4).tolist()]
    found = applied(rules.head_norms, numbers(3, 4))
    assert [values.tolist() for values in found.values()] == numbers(3, 4).tolist()
    assert list(found) == [f"layer..{number}.weight" for number in range(3)]


@pytest.mark.parametrize(
    ("rule", "shape", "kind"),
    [
        (rules.split_qkv("q", "k", "v"), (9, 5), "F32"), (rules.split_qkv("q", "k", "v"), (256,), "Q8_0"),
        (rules.query_pairs, (10, 5), "F32"), (rules.query_pairs, (4, 5), "F32"), (rules.heads_of_qkv, (10, 5), "F32"),
        (rules.kv_heads_of_qkv, (9, 5), "F32"), (rules.gate_and_up_experts("g", "u"), (2, 3, 5), "F32"),
        (rules.gate_and_up_experts("g", "u"), (2, 4), "F32"), (rules.experts("up"), (4,), "F32"),
        (rules.plain, (2, 3, 4), "F32"), (rules.head_norms, (4,), "Q8_0"),
    ],
)  # fmt: skip
def test_tensors_of_other_shapes_are_refused(rule: Rule, shape: tuple[int, ...], kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"model.gguf cannot be used: its tensor blk.0.t.weight (has|is) "):
        list(rule(source_of(shape, kind)))
