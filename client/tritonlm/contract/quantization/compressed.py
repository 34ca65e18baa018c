"""compressed-tensors: each module's scheme is that of the first config group whose targets name it.

pack-quantized                      W4A16, W8A16: integers in int32
int-quantized, naive-quantized      W8A8: int8
float-quantized                     FP8
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .fields import Fields
from .layout import SCALE_TYPES, Encoding, Layout, QuantizationError, Stored, groups_of
from .scaled import FLOAT8, scaled_layout

_PACKED, _MIXED = "pack-quantized", "mixed-precision"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized", _MIXED, "dense")
_STRATEGIES = ("tensor", "channel", "group", "block")
_LINEAR = "Linear"


@dataclass(frozen=True)
class _Scheme:
    path: str
    targets: list[str]
    bits: int
    is_float: bool
    strategy: str
    # -1: all inputs.
    group: int
    symmetric: bool
    block: tuple[int, int] | None

    def names(self, module: str) -> bool:
        return any(_is_named(module, target) for target in self.targets)


def read_compressed(fields: Fields, stored: Stored, transposed: bool = False) -> Iterator[tuple[str, Layout]]:
    """With `transposed` the matrices of the model are (inputs, outputs), and packed ones (outputs, inputs)."""
    fields.text("format", default="dense", allowed=_FORMATS)
    sparsity = fields.part("sparsity_config")
    if sparsity is not None:
        sparsity.text("format", default="dense", allowed=["dense"])
    transform = fields.part("transform_config")
    if transform is not None:
        transform.refuse("config_groups", "rotations of activations are not computed")
    schemes = [scheme for group in fields.parts("config_groups") if (scheme := _scheme(group)) is not None]
    ignored = fields.names("ignore")
    packed = [(module, True) for module, _ in stored.ending(".weight_packed")]
    scaled = [(module, False) for module, _ in stored.ending(".weight_scale") if stored.find(f"{module}.weight")]
    for module, is_packed in [*packed, *scaled]:
        for name in ignored:
            if _is_named(module, name):
                raise QuantizationError(
                    f"quantization_config.ignore names {name}, but {module} is quantized in the files"
                )
        scheme = _scheme_of(module, schemes)
        layout = _packed(stored, module, scheme) if is_packed else _scaled(stored, module, scheme)
        if is_packed and transposed:
            layout = replace(layout, shape=layout.shape[::-1], transposed=True)
        yield f"{module}.weight", layout


def _scheme(group: Fields) -> _Scheme | None:
    """None for a group that quantizes only activations."""
    group.text("format", default=_MIXED, allowed=_FORMATS)
    weights = group.part("weights")
    if weights is None:
        return None
    is_float = weights.text("type", default="int", allowed=["int", "float"]) == "float"
    bits = weights.integer("num_bits", default=8, allowed=[8] if is_float else [4, 8])
    size = weights.integer("group_size", default=-1)
    guess = "group" if size > 0 else "channel" if weights.has("group_size") else "tensor"
    strategy = weights.text("strategy", default=guess, allowed=_STRATEGIES)
    if weights.flag("dynamic", False):
        raise QuantizationError(f"{weights.path}.dynamic is true, which weights cannot be")
    return _Scheme(
        path=group.path,
        targets=group.names("targets"),
        bits=bits,
        is_float=is_float,
        strategy=strategy,
        group=weights.group("group_size") if strategy == "group" else -1,
        symmetric=weights.flag("symmetric", True),
        block=weights.pair("block_structure") if strategy == "block" else None,
    )


def _scheme_of(module: str, schemes: list[_Scheme]) -> _Scheme:
    """A name or an expression goes before the class of all linear layers."""
    named = (scheme for scheme in schemes if scheme.names(module))
    of_class = (scheme for scheme in schemes if _LINEAR in scheme.targets)
    scheme = next(named, None) or next(of_class, None)
    if scheme is None:
        raise QuantizationError(f"{module} is quantized, but no targets of quantization_config.config_groups name it")
    return scheme


def _packed(stored: Stored, module: str, scheme: _Scheme) -> Layout:
    name = f"{module}.weight_packed"
    if scheme.is_float or scheme.strategy not in ("group", "channel"):
        raise QuantizationError(f"{name} is packed, but {scheme.path}.weights are not integers with scales for groups")
    outputs, columns = stored.take(name, ["I32"], dimensions=2).shape
    per_int = 32 // scheme.bits
    inputs = columns * per_int
    groups = groups_of(inputs, scheme.group, module)
    stored.take(f"{module}.weight_scale", SCALE_TYPES, (outputs, groups))
    parts = {"codes": name, "scales": f"{module}.weight_scale"}
    zeros = f"{module}.weight_zero_point"
    if not scheme.symmetric:
        stored.take(zeros, ["I32"], (-(-outputs // per_int), groups))
        parts["zeros"] = zeros
    elif stored.find(zeros):
        # Zeros, in any type.
        stored.skip(zeros)
    for role, suffix, shape in (("index", "weight_g_idx", (inputs,)), ("shape", "weight_shape", (2,))):
        if stored.find(f"{module}.{suffix}"):
            stored.take(f"{module}.{suffix}", ["I32", "I64"], shape)
            parts[role] = f"{module}.{suffix}"
    reordered = "index" in parts
    return Layout(Encoding.PACKED, (outputs, inputs), parts, scheme.bits, inputs // groups, reordered=reordered)


def _scaled(stored: Stored, module: str, scheme: _Scheme) -> Layout:
    name, scale, zeros = f"{module}.weight", f"{module}.weight_scale", f"{module}.weight_zero_point"
    value_type = FLOAT8 if scheme.is_float else "I8"
    _, inputs = stored.take(name, [value_type], dimensions=2).shape
    group = inputs // groups_of(inputs, scheme.group, module)
    block = (1, group) if scheme.strategy == "group" else scheme.block
    layout = replace(scaled_layout(stored, name, scale, block, SCALE_TYPES, value_type), rounded=True)
    if scheme.symmetric or scheme.is_float:
        if stored.find(zeros):
            stored.skip(zeros)
        return layout
    stored.take(zeros, ["I8"], stored.take(scale, SCALE_TYPES).shape)
    return replace(layout, parts={**layout.parts, "zeros": zeros})


def _is_named(module: str, target: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise QuantizationError(
            f"quantization_config has {target!r}, which is no regular expression: {error}"
        ) from None
