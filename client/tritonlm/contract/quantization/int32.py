"""AWQ and GPTQ: integers of 4 or 8 bits in int32, with scales and zero points for groups of inputs."""

from __future__ import annotations

from collections.abc import Iterator

from .fields import Fields
from .layout import SCALE_TYPES, Encoding, Layout, QuantizationError, Stored, groups_of

_CODES = ".qweight"
_MARLIN = "the layout of one kernel (Marlin) is not read; take the checkpoint in the format gptq"


def read_awq(fields: Fields, stored: Stored) -> Iterator[tuple[str, Layout]]:
    bits = fields.integer("bits", "w_bit", default=4, allowed=[4])
    group = fields.group("group_size", "q_group_size", default=128)
    fields.text("version", "checkpoint_format", "format", default="gemm", allowed=["gemm"])
    if not fields.flag("zero_point", True):
        raise QuantizationError("quantization_config.zero_point is false; AWQ is read with zero points only")
    modules = [module for module, _ in stored.ending(_CODES)]
    fields.refuse_quantized(modules, "modules_to_not_convert")
    for module in modules:
        inputs, columns = stored.take(module + _CODES, ["I32"], dimensions=2).shape
        groups, outputs = groups_of(inputs, group, module), columns * 32 // bits
        stored.take(f"{module}.qzeros", ["I32"], (groups, columns))
        stored.take(f"{module}.scales", SCALE_TYPES, (groups, outputs))
        yield f"{module}.weight", Layout(Encoding.AWQ, (outputs, inputs), _parts(module), bits, inputs // groups)


def read_gptq(fields: Fields, stored: Stored, transposed: bool) -> Iterator[tuple[str, Layout]]:
    """With `transposed` the matrices of the model are (inputs, outputs)."""
    bits = fields.integer("bits", allowed=[4, 8])
    group = fields.group("group_size", default=128)
    fields.refuse("is_marlin_format", _MARLIN)
    file_format = fields.text("checkpoint_format", "format", default="gptq", allowed=["gptq", "gptq_v2"])
    fields.text("pack_dtype", default="int32", allowed=["int32"])
    _refuse_overrides(fields)
    # The first version stores zero points less 1.
    offset = 1 if file_format == "gptq" else 0
    per_int = 32 // bits
    for module, _ in list(stored.ending(_CODES)):
        rows, outputs = stored.take(module + _CODES, ["I32"], dimensions=2).shape
        inputs = rows * per_int
        groups = groups_of(inputs, group, module)
        if outputs % per_int:
            raise QuantizationError(f"{module}{_CODES} has {outputs} outputs, which are not whole int32 of {bits} bits")
        stored.take(f"{module}.qzeros", ["I32"], (groups, outputs // per_int))
        stored.take(f"{module}.scales", SCALE_TYPES, (groups, outputs))
        parts, index = _parts(module), f"{module}.g_idx"
        reordered = fields.flag("desc_act", False)
        if stored.find(index) or reordered:
            stored.take(index, ["I32", "I64"], (inputs,))
            parts["index"] = index
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        layout = Layout(Encoding.GPTQ, shape, parts, bits, inputs // groups, 1, offset, transposed, reordered=reordered)
        yield f"{module}.weight", layout


def _refuse_overrides(fields: Fields) -> None:
    """`dynamic` maps patterns of modules to settings: "-:" modules are not quantized, others have their own."""
    part = fields.part("dynamic")
    if part is not None and (own := [pattern for pattern in part if not pattern.startswith("-:")]):
        raise QuantizationError(f"quantization_config.dynamic has other settings for {own[0]!r}, which are not read")


def _parts(module: str) -> dict[str, str]:
    return {"codes": module + _CODES, "zeros": f"{module}.qzeros", "scales": f"{module}.scales"}
