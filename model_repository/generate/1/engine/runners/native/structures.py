"""The kernels' structures, field by field as in program.hpp, step.hpp, decoding.hpp, sample.hpp and score.hpp."""

from __future__ import annotations

import ctypes
from array import array
from enum import IntEnum
from typing import Any

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
# The same and doubles as type codes of `array`. The few numbers of a step go to the kernels as arrays of these: numpy
# takes longer to make a small array and to name its address.
POINTER_CODE, INT_CODE, LONG_CODE, FLOAT_CODE, DOUBLE_CODE = "Q", "i", "q", "f", "d"


def address_of(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


class Buffer(IntEnum):
    RESIDUAL, BRANCH, QUERIES, KEYS, NORMED, SECOND_NORMED, ATTENDED, INNER = range(8)


class NormKind(IntEnum):
    NONE, RMS, LAYER = range(3)


class Activation(IntEnum):
    NONE, SILU, GELU_TANH, GELU_ERF, RELU, RELU_SQUARED, CLAMPED_SILU = range(7)


class WeightForm(IntEnum):
    FULL, INT8, GROUPED = range(3)


class Weights(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("values", "scales", "bias", "outliers", "outlier_offsets")),
        *((name, INT) for name in ("exponent_pairs", "inputs", "outputs", "form")),
    ]


class GroupedForm(ctypes.Structure):
    """As in grouped_form.hpp."""

    _fields_ = [
        *((name, INT) for name in ("bits", "group", "two_level", "has_minima", "pairs")),
        ("zero", INT), ("has_table", INT), ("table", ctypes.c_int8 * 16),
        *((name, INT) for name in ("record_bytes", "minima_offset", "codes_offset", "minima_zero", "adds_minima")),
    ]  # fmt: skip


class GroupedNumbers(ctypes.Structure):
    """As in grouped_pack.hpp, like the next one."""

    _fields_ = [("data", POINTER), ("output_bytes", ctypes.c_int64), ("group_bytes", ctypes.c_int64)]


class GroupedSource(ctypes.Structure):
    _fields_ = [
        ("codes", POINTER),
        ("row_bytes", ctypes.c_int64),
        *((name, GroupedNumbers) for name in ("scales", "minima", "scale_factors", "minimum_factors")),
        *((name, INT) for name in ("outputs", "inputs", "type")),
    ]


class GroupedBlock(ctypes.Structure):
    _fields_ = [("data", POINTER), ("form", POINTER)]


class Norm(ctypes.Structure):
    _fields_ = [("kind", INT), ("epsilon", FLOAT), ("weight", POINTER), ("bias", POINTER)]


class EmbedOp(ctypes.Structure):
    _fields_ = [("tokens", Weights), ("positions", POINTER), ("scale", FLOAT)]


class NormOp(ctypes.Structure):
    _fields_ = [*((name, INT) for name in ("source", "to", "add")), ("scale", FLOAT), ("norm", Norm)]


class QkvOp(ctypes.Structure):
    _fields_ = [("layer", INT), ("keys_follow", INT), ("clip", FLOAT), ("weights", Weights)]


class RopeOp(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("layer", "table", "norm_stride")),
        *((name, Norm) for name in ("query_norm", "key_norm")),
    ]


class AttendOp(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("layer", "window")),
        *((name, FLOAT) for name in ("scale", "softcap")),
        *((name, POINTER) for name in ("sinks", "slopes")),
    ]


class MatmulOp(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("source", "to", "activation", "gated", "add", "row_scaled")),
        ("scale", FLOAT), ("weights", Weights),
    ]  # fmt: skip


class ExpertsOp(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("experts", "top_k", "softmax_after", "renormalize", "to", "add", "activation")),
        ("scale", FLOAT),
        *((name, POINTER) for name in ("router", "router_bias", "shared_gate", "up", "down")),
    ]


# In the order of OpKind.
OPERATIONS = (EmbedOp, NormOp, QkvOp, RopeOp, AttendOp, MatmulOp, ExpertsOp)


class Op(ctypes.Structure):
    _fields_ = [("kind", INT), ("arguments", POINTER)]


class RopeTable(ctypes.Structure):
    _fields_ = [("inv_freq", POINTER), ("half", INT), ("factor", FLOAT)]


class Program(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("hidden_size", "num_layers", "num_heads", "heads_per_kv", "head_dim", "vocab_size")),
        *((name, INT) for name in ("op_count", "table_count")),
        *((name, POINTER) for name in ("ops", "tables")),
        ("final_norm", Norm), ("lm_head", Weights), ("logits_scale", FLOAT), ("logits_softcap", FLOAT),
    ]  # fmt: skip


class LowRankPart(ctypes.Structure):
    """As in step_adapters.hpp, like the next two."""

    _fields_ = [("b", POINTER), *((name, INT) for name in ("blocks", "first_rank", "rank", "stride"))]


class LowRank(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("a", "parts")), ("a_bytes", ctypes.c_int64),
        *((name, INT) for name in ("rank", "part_count", "interleaved")),
    ]  # fmt: skip


class Adapter(ctypes.Structure):
    _fields_ = [("operations", POINTER), ("max_rank", INT), ("is_bf16", INT)]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "logit_count", "hidden_count")),
        *((name, INT) for name in ("table_width", "block_tokens", "logit_stride", "adapter_count")),
        *((name, POINTER) for name in ("ids", "positions", "sequences", "logit_rows", "hidden_rows", "block_tables")),
        ("kv_cache", POINTER),
        ("block_bytes", ctypes.c_int64),
        *((name, POINTER) for name in ("adapters", "adapter_rows")),
        *((name, POINTER) for name in ("logits", "hidden", "max_logits", "argmax_ids")),
        *((name, POINTER) for name in ("stage_seconds", "progress")),
    ]


class Project(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "logit_stride")),
        *((name, POINTER) for name in ("hidden", "hidden_rows", "logits", "stage_seconds", "progress")),
    ]


class Sample(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "vocab_size", "logit_stride", "mask_words")),
        *((name, POINTER) for name in ("logits", "row_indices", "masks", "mask_indices")),
        *((name, POINTER) for name in ("temperatures", "top_k", "top_p_tail", "min_p", "uniforms", "ids")),
    ]


class Decoding(ctypes.Structure):
    _fields_ = [
        ("steps", INT),
        ("seconds", ctypes.c_double),
        *((name, POINTER) for name in ("interrupt", "ids", "positions", "end_ids", "end_starts", "sample")),
        *((name, POINTER) for name in ("tokens", "max_logits")),
    ]


class Score(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "vocab_size", "logit_stride", "alternatives")),
        *((name, POINTER) for name in ("logits", "row_indices", "ids", "finite", "token_logprobs")),
        *((name, POINTER) for name in ("top_ids", "top_logprobs")),
    ]
