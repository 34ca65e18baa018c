"""An embedding: a prompt as one vector, sent from `generate` directly to the caller. It knows tensors, not models."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import tensors
from .chunk import Usage
from .tensors import Array, TensorSpec


@dataclass(frozen=True)
class Embedding:
    vector: list[float]
    usage: Usage = field(default_factory=Usage)

    def to_arrays(self) -> dict[TensorSpec, Array]:
        usage = (self.usage.prompt, self.usage.completion, self.usage.cached)
        values = {tensors.EMBEDDING: self.vector, tensors.USAGE: usage}
        return {spec: spec.pack(value) for spec, value in values.items()}
