"""How a file's tensors become those of Hugging Face's code: each rule undoes what the format's converter did.

A rule yields names with tensors. This module knows layouts, no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from tritonlm.contract.gguf_tensors import Rows, StoredTensor, byte_count

from ..header import TensorInfo, printable
from ..model_file import ModelFile

Piece = tuple[str, StoredTensor]


@dataclass(frozen=True)
class Source:
    """A tensor of the file; `name` is Hugging Face's, without `suffix` (".weight" or ".bias")."""

    model: ModelFile
    tensor: TensorInfo
    # The file's name in the checkpoint's folder.
    file_name: str
    name: str
    suffix: str

    @property
    def heads(self) -> int:
        return self.model.size("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self.model.size("attention.head_count_kv", self.heads)

    def stored(self, first: int = 0, count: int | None = None) -> StoredTensor:
        """`count` rows from row `first`, of a vector or a matrix."""
        tensor = self.tensor
        if len(tensor.shape) > 2:
            raise self.error(f"has {len(tensor.shape)} dimensions")
        if count is None:
            return StoredTensor(self.file_name, tensor.offset, tensor.type, tensor.shape)
        if first + count > tensor.shape[0] or (len(tensor.shape) == 1 and tensor.type != "F32"):
            raise self.error(f"has no rows {first} to {first + count}")
        width = tensor.shape[-1] if len(tensor.shape) == 2 else 1
        offset = tensor.offset + byte_count(tensor.type, first * width)
        return StoredTensor(self.file_name, offset, tensor.type, (count, *tensor.shape[1:]))

    def error(self, text: str) -> Exception:
        return self.model.error(f"its tensor {printable(self.tensor.name)} {text}")


Rule = Callable[[Source], Iterator[Piece]]


def plain(source: Source) -> Iterator[Piece]:
    yield source.name + source.suffix, source.stored()


def without_suffix(source: Source) -> Iterator[Piece]:
    yield source.name, source.stored()


def transposed(source: Source) -> Iterator[Piece]:
    is_matrix = len(source.tensor.shape) == 2
    yield source.name + source.suffix, replace(source.stored(), transposed=is_matrix)


def minus_one(source: Source) -> Iterator[Piece]:
    """The file has 1 + weight; a bias is as it is."""
    add = -1.0 if source.suffix == ".weight" else 0.0
    yield source.name + source.suffix, replace(source.stored(), add=add)


def as_row(source: Source) -> Iterator[Piece]:
    """A vector that is a matrix of one row."""
    stored = source.stored()
    yield source.name + source.suffix, replace(stored, stored_shape=(1, stored.stored_shape[-1]))


def query_pairs(source: Source) -> Iterator[Piece]:
    """In the file the two halves of each query's head alternate."""
    yield source.name + source.suffix, _unpaired(source, source.stored(), source.heads)


def key_pairs(source: Source) -> Iterator[Piece]:
    yield source.name + source.suffix, _unpaired(source, source.stored(), source.kv_heads)


def split_qkv(query: str, key: str, value: str, *, pairs: bool = False) -> Rule:
    """One matrix in the file, three in Hugging Face's code."""

    def rule(source: Source) -> Iterator[Piece]:
        dim, left = divmod(source.tensor.shape[0], source.heads + 2 * source.kv_heads)
        if left:
            raise source.error(f"has {source.tensor.shape[0]} rows")
        counts = [heads * dim for heads in (source.heads, source.kv_heads, source.kv_heads)]
        firsts = [0, *accumulate(counts)]
        for name, first, count in zip((query, key, value), firsts, counts, strict=False):
            stored = source.stored(first, count)
            if pairs and name != value:
                stored = _unpaired(source, stored, count // dim)
            yield source.name + name + source.suffix, stored

    return rule


def heads_of_qkv(source: Source) -> Iterator[Piece]:
    """The file has queries, keys and values one below the other; Hugging Face's code has them by head."""
    yield from _by_kv_head(source, source.heads)


def kv_heads_of_qkv(source: Source) -> Iterator[Piece]:
    """The same by KV head: its queries, its key, its value."""
    yield from _by_kv_head(source, source.kv_heads)


def experts(part: str) -> Rule:
    """A stack of matrices, or of their biases: NAME.N.part."""

    def rule(source: Source) -> Iterator[Piece]:
        for number, stored in enumerate(_stack(source)):
            yield f"{source.name}.{number}.{part}{source.suffix}", stored

    return rule


def gate_and_up_experts(gate: str, up: str) -> Rule:
    """The same with gate above up."""

    def rule(source: Source) -> Iterator[Piece]:
        for number, stored in enumerate(_stack(source)):
            inner, left = divmod(stored.stored_shape[0], 2)
            if left or len(stored.stored_shape) != 2:
                raise source.error("is not one of pairs")
            half = byte_count(stored.type, inner * stored.stored_shape[1])
            for place, part in enumerate((gate, up)):
                shape = (inner, stored.stored_shape[1])
                piece = replace(stored, stored_shape=shape, offset=stored.offset + place * half)
                yield f"{source.name}.{number}.{part}{source.suffix}", piece

    return rule


def head_norms(source: Source) -> Iterator[Piece]:
    """A row for each head: NAME.N."""
    for number in range(source.tensor.shape[0]):
        row = source.stored(number, 1)
        yield f"{source.name}.{number}{source.suffix}", replace(row, stored_shape=row.stored_shape[1:])


def _unpaired(source: Source, stored: StoredTensor, heads: int) -> StoredTensor:
    dim, left = divmod(stored.stored_shape[0], heads)
    if left or dim % 2:
        raise source.error(f"has {stored.stored_shape[0]} rows for {heads} heads")
    rows: list[Rows] = []
    for first in range(0, heads * dim, dim):
        rows += [(first, first + dim, 2), (first + 1, first + dim, 2)]
    return replace(stored, rows=tuple(rows))


def _by_kv_head(source: Source, kv_heads: int) -> Iterator[Piece]:
    stored = source.stored()
    heads = source.heads
    dim, left = divmod(stored.stored_shape[0], heads + 2 * kv_heads)
    group, rest = divmod(heads, kv_heads)
    if left or rest:
        raise source.error(f"has {stored.stored_shape[0]} rows for {heads} heads")
    rows: list[Rows] = []
    for number in range(kv_heads):
        queries, keys, values = number * group, heads + number, heads + kv_heads + number
        rows += [(queries * dim, (queries + group) * dim, 1)]
        rows += [(head * dim, (head + 1) * dim, 1) for head in (keys, values)]
    yield source.name + source.suffix, replace(stored, rows=tuple(rows))


def _stack(source: Source) -> Iterator[StoredTensor]:
    """tensor[0], tensor[1] …"""
    tensor = source.tensor
    if len(tensor.shape) not in (2, 3):
        raise source.error(f"has {len(tensor.shape)} dimensions")
    size = tensor.byte_count // tensor.shape[0]
    for number in range(tensor.shape[0]):
        yield StoredTensor(source.file_name, tensor.offset + number * size, tensor.type, tensor.shape[1:])
