"""Small configurations of every family that the kernels compute: for each variant of a family what distinguishes it.

A name is a model_type, and words that tell its entries apart.
"""

from __future__ import annotations

from typing import Any

from . import classic, gated, mixtures

VOCABULARY = 493
CONTEXT = 96
ZOO: dict[str, dict[str, Any]] = {**classic.CONFIGS, **gated.CONFIGS, **mixtures.CONFIGS}
