"""Loads a checkpoint of quantized weights into Hugging Face's model, as plain numbers.

Hugging Face's own readers of such files need further packages, and most of them a GPU; here each tensor is dequantized
when the model takes it in. This module knows neither formats nor families.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tritonlm.contract import Checkpoint
from tritonlm.contract.load_progress import LoadProgress

from .loading import reported_loading
from .native.tensor_source import TensorSource, open_tensors


class _Tensor:
    """A tensor that is read when transformers indexes it, as the slices of safetensors are."""

    def __init__(self, source: TensorSource, name: str) -> None:
        self._source, self._name = source, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._source.get(self._name)[index]


def load(folder: Path, config: Any, dtype: torch.dtype, progress: LoadProgress) -> Any:
    """The model of this configuration of transformers'; parts of it may lie in the mapped files."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: PLC0415

    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    sizes = {name: layout.count * dtype.itemsize for name, layout in Checkpoint(folder).quantized.items()}
    with _opened(folder, dtype) as tensors, reported_loading(sizes, progress):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype
        )


@contextmanager
def _opened(folder: Path, dtype: torch.dtype) -> Iterator[dict[str, _Tensor]]:
    source = open_tensors(folder, dtype)
    try:
        yield {name: _Tensor(source, name) for name in source.names()}
    finally:
        source.close()
