"""Checkpoints of four and eight bits: which tensors their files hold, and how their numbers lie there.

`layouts` goes by quantization_config in config.json and by the names, types and shapes of the stored tensors; what
cannot be read is refused there. This package reads no numbers and knows no family but that of transposed matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..safetensors_header import StoredTensor
from .compressed import read_compressed
from .fields import Fields
from .int32 import read_awq, read_gptq
from .layout import Encoding, Layout, QuantizationError, Stored
from .scaled import read_fp8, read_mxfp4

__all__ = ["Encoding", "Layout", "QuantizationError", "description", "is_transposed", "layouts", "method_of"]

_READERS = {"awq": read_awq, "fp8": read_fp8, "fbgemm_fp8": read_fp8, "mxfp4": read_mxfp4}
_TRANSPOSING_READERS = {"gptq": read_gptq, "compressed-tensors": read_compressed}
_METHODS = (*_READERS, *_TRANSPOSING_READERS)
# Their matrices are stored as (inputs, outputs).
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt")


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quant_method of a config.json; None if its weights are not quantized."""
    quantization = _quantization(config)
    if not quantization:
        return None
    return str(quantization.get("quant_method", "unknown")) if isinstance(quantization, Mapping) else "unknown"


def layouts(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Layout]:
    """Each tensor of the model by its plain name. Raises QuantizationError."""
    tensors = Stored(stored)
    fields = Fields(_quantization(config))
    method = fields.text("quant_method", default="unknown")
    if method not in _METHODS:
        raise QuantizationError(
            f"quantization_config.quant_method is {method}, which is not read ({', '.join(sorted(_METHODS))} are); "
            "take the original, or a GGUF file"
        )
    if method in _TRANSPOSING_READERS:
        found = dict(_TRANSPOSING_READERS[method](fields, tensors, is_transposed(config)))
    else:
        found = dict(_READERS[method](fields, tensors))
    plain = tensors.plain()
    if both := sorted(found.keys() & plain.keys()):
        raise QuantizationError(f"the weights have {both[0]} twice: quantized, and as plain numbers")
    return {**plain, **found}


def is_transposed(config: Mapping[str, Any]) -> bool:
    """Whether the family's code has its matrices as (inputs, outputs)."""
    return config.get("model_type") in _TRANSPOSED


def description(config: Mapping[str, Any], found: Mapping[str, Layout]) -> str | None:
    """The method, and the most frequent kind of scales: "awq, groups of 128"."""
    quantized = [layout.scale_name for layout in found.values() if layout.encoding != Encoding.PLAIN]
    return ", ".join([str(method_of(config)), *(name for name, _ in Counter(quantized).most_common(1))])


def _quantization(config: Mapping[str, Any]) -> Any:
    # The second is the name of older releases of compressed-tensors.
    return config.get("quantization_config") or config.get("compression_config")
