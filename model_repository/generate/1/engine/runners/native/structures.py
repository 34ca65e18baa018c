"""The kernels' structures, field by field: see model.hpp, step.hpp, draw.hpp and score.hpp."""

from __future__ import annotations

import ctypes

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class Weights(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("values", "scales", "bias", "strays", "begins")), ("highest", INT)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("first_scale", "first_shift", "second_scale", "second_shift")),
        *((name, POINTER) for name in ("query_scale", "key_scale")),
        *((name, Weights) for name in ("attend", "project", "widen", "narrow")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("layers", "width", "heads", "shared", "head_width", "inner", "gated", "vocabulary")),
        ("epsilon", FLOAT),
        *((name, Weights) for name in ("tokens", "output")),
        *((name, POINTER) for name in ("positions", "turns", "final_scale", "final_shift", "layer")),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "logit_count", "hidden_count", "table_width", "block_tokens", "stride")),
        *((name, POINTER) for name in ("ids", "places", "sequences", "logit_rows", "hidden_rows", "tables")),
        *((name, POINTER) for name in ("keys", "values")),
        *((name, POINTER) for name in ("logits", "hidden", "best", "best_ids", "spent", "progress")),
    ]


class Draw(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "vocabulary", "stride")),
        *((name, POINTER) for name in ("logits", "numbers")),
        *((name, POINTER) for name in ("temperatures", "top_k", "lost", "min_p", "uniforms", "ids")),
    ]


class Project(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "stride")),
        *((name, POINTER) for name in ("hidden", "numbers", "logits", "spent", "progress")),
    ]


class Score(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "vocabulary", "stride", "alternatives")),
        *((name, POINTER) for name in ("logits", "numbers", "ids", "usable", "own", "best_ids", "best")),
    ]
