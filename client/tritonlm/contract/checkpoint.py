"""What a checkpoint folder (Hugging Face format) must hold, read with the standard library alone.

It knows file names and JSON fields. It does not load weights or tokenizers: each room does that with its library.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import CheckpointError

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
# What stands before an id on the Hugging Face Hub where a folder could be named.
HUB = "hf://"
# Beyond this a model would not even be begun: building it takes hours and all memory.
_MOST = {"layers": 1000, "width": 1_000_000, "vocab_size": 100_000_000}
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Checkpoint:
    folder: Path

    def check(self, weights: bool = True) -> None:
        """Raise CheckpointError, in one line with the remedy, unless this folder can be served."""
        if not self.folder.is_dir():
            raise CheckpointError(f"checkpoint folder {self.folder} does not exist")
        for name in ("config.json", "tokenizer.json"):
            if not (self.folder / name).is_file():
                raise CheckpointError(f"checkpoint {self.folder} has no {name}; save it with save_pretrained()")
        if weights and not any(self.folder.glob("*.safetensors")):
            raise CheckpointError(
                f"checkpoint {self.folder} has no *.safetensors weights; pickled weights are not loaded: "
                "save it with save_pretrained(safe_serialization=True)"
            )
        _ = self.config, self.vocab_size, self.context_length
        for what, most in _MOST.items():
            if isinstance(size := self.about[what], int) and size > most:
                raise CheckpointError(
                    f"{self.folder}/config.json: {what} of {size:,} are more than any model has; is the file damaged?"
                )

    def fingerprint(self) -> str:
        """Changes when a file of the checkpoint does; it reads no file's content."""
        try:
            found = [(entry.name, entry.stat()) for entry in os.scandir(self.folder) if entry.is_file()]
        except OSError:
            found = []
        seen = repr(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found))
        return hashlib.sha256(seen.encode()).hexdigest()[:16]

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
        return content

    @cached_property
    def config(self) -> dict[str, Any]:
        config = self._json("config.json")
        # Multimodal checkpoints keep the language model's numbers one level deeper.
        return {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        return self._json("tokenizer_config.json")

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    @cached_property
    def vocab_size(self) -> int:
        return self._number("vocab_size")

    @cached_property
    def context_length(self) -> int:
        for name in _CONTEXT_FIELDS:
            if isinstance(self.config.get(name), int):
                return self._number(name)
        raise CheckpointError(f"{self.folder}/config.json names no context length ({', '.join(_CONTEXT_FIELDS)})")

    def _number(self, name: str) -> int:
        value = self.config.get(name)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.folder}/config.json: {name} must be a positive integer (got {value!r})")
        return value

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a text: the generation config's, else the model config's."""
        found = self._json("generation_config.json").get("eos_token_id")
        if found is None:
            found = self.config.get("eos_token_id")
        if found is None:
            return frozenset()
        return frozenset(found if isinstance(found, list) else [found])

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token … as text, for chat templates."""
        found = {}
        for name in _SPECIAL_TOKENS:
            token = self.tokenizer_config.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                found[name] = token
        return found

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template's source, from its own file or the tokenizer's config."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    @property
    def about(self) -> dict[str, Any]:
        """What people ask about a checkpoint, ready for JSON."""
        return {
            "architecture": self.config.get("model_type"),
            "layers": self._first_of("num_hidden_layers", "n_layer", "num_layers"),
            "width": self._first_of("hidden_size", "n_embd", "d_model"),
            "vocab_size": self.vocab_size,
            "special_tokens": self.special_tokens,
            "chat_template": self.chat_template,
            "training": self._json("training.json"),
        }

    def _first_of(self, *names: str) -> Any:
        return next((self.config[name] for name in names if name in self.config), None)
