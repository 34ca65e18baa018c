"""adapter_config.json as PEFT writes it: what it says about ranks and scalings, and what of it is not computed here.

Settings that only training reads are ignored. It knows no tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritonlm.contract import CheckpointError
from tritonlm.contract.errors import shown

CONFIG = "adapter_config.json"
_MOST_BYTES = 1 << 20
# Settings that change the computation in a way that is not done here. They are refused unless false, null or empty.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole layers beside the low-rank matrices (modules_to_save)",
    "lora_bias": "biases of low-rank matrices (lora_bias)",
    "trainable_token_indices": "changed embeddings (trainable_token_indices)",
    "target_parameters": "low-rank matrices of parameters such as experts (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activation by tokens (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
}
# Initializations that change the base's weights, so that the adapter alone does not say what was trained.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Keys of rank_pattern and alpha_pattern are regular expressions. Few quantifiers, and none after a group, bound the
# time of a search: a long one would hold up the engine's thread.
_MOST_QUANTIFIERS, _MOST_PATTERN = 3, 200
_QUANTIFIER, _REPEATED_GROUP = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]")


class PeftSettings:
    def __init__(self, folder: Path, content: bytes, max_rank: int) -> None:
        """Raises CheckpointError, in one sentence that names the setting."""
        self._file, self._max_rank = folder / CONFIG, max_rank
        if len(content) > _MOST_BYTES:
            raise self._error(f"is longer than {_MOST_BYTES} bytes")
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._error(f"is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise self._error("must be a JSON object")
        self._check(fields)
        self._rank = self._read_rank("r", fields.get("r", 8))
        self._alpha = self._read_alpha("lora_alpha", fields.get("lora_alpha", 8))
        self._ranks = self._read_pattern("rank_pattern", fields, self._read_rank)
        self._alphas = self._read_pattern("alpha_pattern", fields, self._read_alpha)
        self._by_root = fields.get("use_rslora") is True
        self._targets = fields.get("target_modules")

    def rank(self, layer: str) -> int:
        return self._ranks[key] if (key := _match(self._ranks, layer)) else self._rank

    def scaling(self, layer: str) -> float:
        alpha = self._alphas[key] if (key := _match(self._alphas, layer)) else self._alpha
        rank = self.rank(layer)
        return alpha / (math.sqrt(rank) if self._by_root else rank)

    def check_target(self, layer: str) -> None:
        """Refuse a layer that a list of target_modules leaves out: PEFT would ignore its matrices."""
        targets = self._targets
        if isinstance(targets, list) and not any(layer == name or layer.endswith(f".{name}") for name in targets):
            raise self._error(f"does not name {layer} in target_modules, which the weights hold")

    def _check(self, fields: Mapping[str, Any]) -> None:
        if fields.get("peft_type") != "LORA":
            raise self._error(f"has the peft_type {shown(fields.get('peft_type'))}; only LORA is served")
        if fields.get("bias", "none") != "none":
            raise self._error(f"has bias {shown(fields['bias'])}; train the adapter with bias none")
        if name := next((name for name in _REFUSED if fields.get(name)), None):
            raise self._error(f"has {name}: {_REFUSED[name]} is not supported; merge this adapter into its base")
        init = str(fields.get("init_lora_weights")).lower()
        if init.startswith(_CHANGING_BASE):
            raise self._error(f"has init_lora_weights {init}, which changes the base; convert it to a plain LoRA first")
        targets = fields.get("target_modules")
        if not isinstance(targets, str | None) and not _is_list_of_text(targets):
            raise self._error(f"has target_modules {shown(targets)}; it must be a list of names, or a text")

    def _read_rank(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= self._max_rank:
            raise self._error(f"has {name} {shown(value)}; a rank must be an integer from 1 to {self._max_rank}")
        return value

    def _read_alpha(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise self._error(f"has {name} {shown(value)}; it must be a number between -1e6 and 1e6")
        return float(value)

    def _read_pattern(self, name: str, fields: Mapping[str, Any], read: Any) -> dict[str, Any]:
        pattern = fields.get(name) or {}
        if not isinstance(pattern, dict):
            raise self._error(f"has {name} {shown(pattern)}; it must be an object of layers")
        for key in pattern:
            quantifiers = len(_QUANTIFIER.findall(key))
            if len(key) > _MOST_PATTERN or quantifiers > _MOST_QUANTIFIERS or _REPEATED_GROUP.search(key):
                raise self._error(f"has {name} with the pattern {shown(key)}, which is too complex; name the layers")
            try:
                re.compile(key)
            except (re.error, RecursionError, OverflowError) as error:
                raise self._error(f"has {name} with the pattern {shown(key)}, which is invalid: {error}") from None
        return {key: read(f"{name}[{key!r:.60}]", value) for key, value in pattern.items()}

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._file} {problem}")


def _match(patterns: Mapping[str, Any], layer: str) -> str | None:
    """The first key that matches the layer's name or its end, as PEFT chooses it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
