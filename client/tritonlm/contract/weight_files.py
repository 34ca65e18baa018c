"""Which safetensors files of a checkpoint hold its weights. Plain names in, names out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

INDEX = "model.safetensors.index.json"
_WHOLE, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
# Another copy of the same weights, in the layout of the model's authors.
_SECOND_COPY = re.compile(r"consolidated[.-]")


def weight_names(names: Iterable[str], shards: Collection[str] = ()) -> list[str]:
    """The shards that the index lists, if it can be read; else one whole file; else all but second copies.

    Where there is an index and `shards` are not known, the whole file may be one of them."""
    names = set(names)
    tensors = sorted(name for name in names if name.endswith(".safetensors") and name != _ADAPTER)
    listed = [name for name in tensors if name in shards]
    whole = [_WHOLE] if _WHOLE in names and INDEX not in names else []
    return listed or whole or [name for name in tensors if not _SECOND_COPY.match(name)] or tensors
