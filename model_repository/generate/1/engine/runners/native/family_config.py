"""config.json as a family reads it: each value with its type and the family's default.

A value that cannot be used makes the checkpoint unsupported, and Hugging Face's code reports it. This module knows no
family.
"""

from __future__ import annotations

from typing import Any

from tritonlm.contract import Checkpoint

from .rope import Rope, rope_of
from .structures import Activation
from .unsupported import Unsupported

# The values of layer_types.
FULL, SLIDING = "full_attention", "sliding_attention"
# As transformers names them.
_ACTIVATIONS = {
    "silu": Activation.SILU, "swish": Activation.SILU, "gelu": Activation.GELU_ERF, "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH, "gelu_pytorch_tanh": Activation.GELU_TANH, "relu": Activation.RELU,
    "relu2": Activation.RELU_SQUARED,
}  # fmt: skip


class FamilyConfig:
    def __init__(self, checkpoint: Checkpoint, max_context_tokens: int = 0) -> None:
        """`max_context_tokens` limits the context; 0: that of the checkpoint."""
        self.values: dict[str, Any] = checkpoint.config
        self.context = min(checkpoint.context_length, max_context_tokens or checkpoint.context_length)
        self.vocab_size = checkpoint.vocab_size
        self.model_type: str = self.values["model_type"]

    def _typed(self, name: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise Unsupported(f"its config.json has no {name}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise Unsupported(f"its config.json has a value of the wrong type: {name} is {value!r}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        size: int = self._typed(name, (int,), default)
        if size < 1:
            raise Unsupported(f"its config.json has no {name} above 0")
        return size

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._typed(name, (int, float), default))

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._typed(name, (bool,), default))

    def text(self, name: str, default: str) -> str:
        return str(self._typed(name, (str,), default))

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A number, or None where config.json says null."""
        value = self.values.get(name, default)
        return None if value is None else self.number(name, default)

    def expect(self, name: str, value: Any) -> None:
        """What a family computes only one way: config.json must say this, null or nothing."""
        if self.values.get(name) not in (None, value):
            raise Unsupported(f"its {name} is {self.values[name]!r}")

    def activation(self, name: str, default: str, aliases: dict[str, str] | None = None) -> Activation:
        """`aliases` are names that mean another one in a family's files."""
        activation = self.text(name, default)
        activation = (aliases or {}).get(activation, activation)
        if activation not in _ACTIVATIONS:
            raise Unsupported(f"its activation is {activation}")
        return _ACTIVATIONS[activation]

    def head_dim(self, hidden_size: int, heads: int) -> int:
        return self.size("head_dim", hidden_size // heads)

    def layer_types(self, layers: int, default: list[str]) -> list[str]:
        types = self.values.get("layer_types") or default
        if not isinstance(types, list) or len(types) != layers or not set(types) <= {FULL, SLIDING}:
            raise Unsupported(f"its layer_types are not {layers} of {FULL} and {SLIDING}")
        return types

    def windows(self, layers: int, default: list[str], window: float | None) -> list[int | None]:
        """The sliding window of each layer; None is the whole context."""
        types = self.layer_types(layers, default)
        return [int(window) if window is not None and kind == SLIDING else None for kind in types]

    def rope(self, head_dim: int, **defaults: Any) -> Rope:
        return rope_of(self.values, head_dim, served_context=self.context, **defaults)
