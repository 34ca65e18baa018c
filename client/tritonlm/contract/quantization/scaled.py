"""FP8: numbers of eight bits with a scale for each matrix, row or block; MXFP4: blocks of 32 numbers of four bits."""

from __future__ import annotations

from collections.abc import Iterator

from .fields import Fields, matches
from .layout import SCALE_TYPES, Encoding, Layout, QuantizationError, Stored

FLOAT8 = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")
_EXPONENTS = ("F8_E8M0", "U8")
_NOT_QUANTIZED = ("modules_to_not_convert", "ignored_layers")
_MXFP4_GROUP, _MXFP4_BYTES = 32, 16


def read_fp8(fields: Fields, stored: Stored) -> Iterator[tuple[str, Layout]]:
    """A scale, stored as NAME_scale_inv or NAME_scale, is a factor in both cases."""
    fields.text("fmt", default="e4m3", allowed=["e4m3", "float8_e4m3fn"])
    exponents = fields.text("scale_fmt", default="float", allowed=["float", "ue8m0"]) == "ue8m0"
    block = fields.pair("weight_block_size")
    path = "quantization_config.modules_to_not_convert"
    names = fields.names(*_NOT_QUANTIZED)
    scaled = []
    for name, tensor in list(stored.of_types([FLOAT8])):
        scale = stored.find(*(name + suffix for suffix in _SCALES))
        module = name.removesuffix(".weight")
        if scale is None:
            if not any(matches(module, pattern, path) for pattern in names):
                raise QuantizationError(f"{name} is of the type {FLOAT8}, but the weights have no {name}{_SCALES[0]}")
            stored.take(name, [FLOAT8])
            yield name, Layout(Encoding.PLAIN, tensor.shape, {"values": name})
            continue
        scaled.append(module)
        if len(tensor.shape) not in (2, 3):
            raise QuantizationError(f"{name} has the shape {tensor.shape}, which is no matrix")
        yield name, scaled_layout(stored, name, scale, block, (*SCALE_TYPES, *_EXPONENTS) if exponents else SCALE_TYPES)
    fields.refuse_quantized(scaled, *_NOT_QUANTIZED)


def scaled_layout(
    stored: Stored,
    name: str,
    scale: str,
    block: tuple[int, int] | None,
    scale_types: tuple[str, ...],
    value_type: str = FLOAT8,
) -> Layout:
    """Of a matrix, or a stack of some: the shape of its scales says what each is for."""
    *stack, outputs, inputs = stored.take(name, [value_type]).shape
    whole: list[tuple[int, ...]] = [(*stack, 1, 1), (1,), ()] if not stack else [(*stack, 1, 1), (*stack,)]
    rows: list[tuple[int, ...]] = [(*stack, outputs, 1), (*stack, outputs)]
    blocks = [(*stack, -(-outputs // block[0]), -(-inputs // block[1]))] if block else []
    shape = stored.take(scale, scale_types, *whole, *rows, *blocks).shape
    if shape in whole:
        block_outputs, group = outputs, inputs
    elif shape in rows:
        block_outputs, group = 1, inputs
    else:
        assert block is not None
        block_outputs, group = block
    parts = {"values": name, "scales": scale}
    shape = (*stack, outputs, inputs)
    return Layout(Encoding.SCALED, shape, parts, 8, group, block_outputs, is_float=value_type == FLOAT8)


def read_mxfp4(fields: Fields, stored: Stored) -> Iterator[tuple[str, Layout]]:
    """gpt-oss: NAME_blocks and NAME_scales are the experts' matrices, NAME is (experts, inputs, outputs)."""
    names = [name for name, _ in stored.ending("_blocks")]
    fields.refuse_quantized(names, "modules_to_not_convert")
    for name in names:
        experts, outputs, blocks, _ = stored.take(f"{name}_blocks", ["U8"], dimensions=4).shape
        stored.take(f"{name}_blocks", ["U8"], (experts, outputs, blocks, _MXFP4_BYTES))
        stored.take(f"{name}_scales", ["U8"], (experts, outputs, blocks))
        parts = {"blocks": f"{name}_blocks", "scales": f"{name}_scales"}
        shape = (experts, blocks * _MXFP4_GROUP, outputs)
        yield name, Layout(Encoding.MXFP4, shape, parts, 4, _MXFP4_GROUP, transposed=True, is_float=True)
