"""A checkpoint folder in Hugging Face format: validation and configuration, with the standard library only.

This module knows file names and JSON fields. It does not load weights or tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import gguf_tensors, quantization, tool_formats, weight_files
from .errors import CheckpointError
from .safetensors_header import read_header

_CONTEXT_FIELDS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length", "max_seq_len",
)  # fmt: skip
# transformers' defaults, by model_type: published files leave them out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "falcon": {"max_position_embeddings": 2048},
    "gemma3_text": {
        "vocab_size": 262_208, "max_position_embeddings": 131_072, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256,
    },
}  # fmt: skip
# The folder of further chat templates, NAME.jinja.
TEMPLATE_FOLDER = "additional_chat_templates"
# The prefix of a Hugging Face Hub reference, which may be given instead of a folder.
HUB = "hf://"
# Larger sizes are treated as a damaged file: building such a model would take hours and all memory.
_MAX_SIZES = {"layers": 1000, "width": 1_000_000, "vocab_size": 100_000_000}
_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*')
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Where older tools write the settings of quantized weights, which newer ones write into config.json.
_QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    folder: Path

    def check(self, weights: bool = True) -> None:
        """Raise CheckpointError, in one line with the remedy, unless this folder can be served."""
        if not self.folder.is_dir():
            problem = "is a file, not a folder" if self.folder.exists() else "does not exist"
            raise CheckpointError(f"checkpoint folder {self.folder} {problem}")
        for name in ("config.json", "tokenizer.json"):
            if not (self.folder / name).is_file():
                raise CheckpointError(f"checkpoint {self.folder} has no {name}; save it with save_pretrained()")
        if weights and not self.weight_files():
            pickled = any(file for pattern in _PICKLED for file in self.folder.glob(pattern))
            raise CheckpointError(
                f"checkpoint {self.folder} has no *.safetensors weights"
                + ("; pickled weights are not loaded" if pickled else "")
                + ": save it with save_pretrained(safe_serialization=True)"
            )
        if weights and self.weight_files()[0].suffix == ".gguf" and not self._has_gguf_tensors():
            raise CheckpointError(
                f"checkpoint {self.folder} has its weights in a GGUF file: give {self.weight_files()[0]} itself"
            )
        if weights and (missing := self._missing_shards()):
            raise CheckpointError(
                f"checkpoint {self.folder} has no {missing[0]}, which {weight_files.INDEX} lists; "
                "copy or download it again"
            )
        _ = self.config, self.vocab_size, self.context_length
        if weights:
            _ = self.quantized
        about = self.about
        for name, limit in _MAX_SIZES.items():
            if isinstance(size := about[name], int) and size > limit:
                raise CheckpointError(
                    f"{self.folder}/config.json: {name} is {size:,}, above the limit of {limit:,}; is the file damaged?"
                )

    def _has_gguf_tensors(self) -> bool:
        return (self.folder / gguf_tensors.FILE_NAME).is_file()

    def weight_files(self) -> list[Path]:
        """Its safetensors; without any its GGUF files, of which a folder of `checkpoints.gguf` has one."""
        try:
            names = [file.name for file in self.folder.iterdir()]
        except OSError:
            return []
        chosen = [self.folder / name for name in weight_files.weight_names(names, self._shards())]
        return chosen or sorted(self.folder.glob("*.gguf"))

    def _shards(self) -> set[str]:
        """The files that the index lists."""
        shards = self._json(weight_files.INDEX).get("weight_map")
        return set(map(str, shards.values())) if isinstance(shards, dict) else set()

    def _missing_shards(self) -> list[str]:
        return sorted(name for name in self._shards() if not (self.folder / name).is_file())

    @cached_property
    def quantized(self) -> dict[str, quantization.Layout]:
        """How its files hold each tensor, if quantization_config says that weights are quantized; else empty."""
        if quantization.method_of(self.config) is None or self._has_gguf_tensors():
            return {}
        stored = {name: tensor for file in self.weight_files() for name, tensor in read_header(file).items()}
        try:
            return quantization.layouts(self.config, stored)
        except quantization.QuantizationError as error:
            raise CheckpointError(f"checkpoint {self.folder} cannot be loaded: {error}") from None

    def weight_bytes(self) -> int:
        """The size of the weights' files; of quantized weights that of their numbers in 16 bits, which they become."""
        return 2 * self.quantized_count() or self.file_bytes()

    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files())

    def quantized_count(self) -> int:
        """The numbers in a checkpoint whose weights are quantized, in GGUF files too; 0 for others."""
        if self._has_gguf_tensors():
            return gguf_tensors.parameter_count(gguf_tensors.read(self.folder).values())
        return sum(layout.count for layout in self.quantized.values())

    def quantized_bytes(self) -> int:
        """The bytes of the same where integers in groups are kept as they are; 0 for others."""
        if self._has_gguf_tensors():
            return sum(tensor.byte_count for tensor in gguf_tensors.read(self.folder).values())
        return sum(layout.count * layout.kept_bits // 8 for layout in self.quantized.values())

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and times; it changes when a file changes, and reads no content."""
        try:
            files = [(entry.name, entry.stat()) for entry in os.scandir(self.folder) if entry.is_file()]
        except OSError:
            files = []
        text = repr(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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

    @property
    def model_type(self) -> Any:
        """The architecture of the whole model, not of its text part."""
        return self._json("config.json").get("model_type")

    @cached_property
    def config(self) -> dict[str, Any]:
        config = self._json("config.json")
        for name, method in _QUANTIZATION_FILES.items():
            if quantization.method_of(config) is None and (settings := self._json(name)):
                config = {**config, "quantization_config": {**settings, "quant_method": method}}
        # Multimodal checkpoints nest the language model's settings in text_config.
        if isinstance(config.get("text_config"), dict):
            config = {**config, **config["text_config"]}
        return {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}

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
        raise CheckpointError(
            f"{self.folder}/config.json names no context length ({', '.join(_CONTEXT_FIELDS)}); write one into it, "
            "unless its layers keep a state, as Mamba's do: such models are not served"
        )

    def _number(self, name: str) -> int:
        value = self.config.get(name)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.folder}/config.json: {name} must be a positive integer (got {value!r})")
        return value

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a text: those of the generation config, else those of the model config."""
        ids = self._json("generation_config.json").get("eos_token_id")
        if ids is None:
            ids = self.config.get("eos_token_id")
        if ids is None:
            return frozenset()
        return frozenset(ids if isinstance(ids, list) else [ids])

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token … as text, for chat templates."""
        tokens = {}
        for name in _SPECIAL_TOKENS:
            token = self.tokenizer_config.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                tokens[name] = token
        return tokens

    @cached_property
    def _chat_templates(self) -> dict[Any, Any]:
        """The sources of its chat templates by their names, from files of their own or the tokenizer's config."""
        files = {file.stem: file for file in sorted((self.folder / TEMPLATE_FOLDER).glob("*.jinja"))}
        if (path := self.folder / "chat_template.jinja").is_file():
            files["default"] = path
        if files:
            return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):
            return {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        return {"default": template}

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template."""
        template = self._chat_templates.get("default")
        return template if isinstance(template, str) else None

    @property
    def tool_use_template(self) -> str | None:
        """The source of a further template, for chats with tools."""
        template = self._chat_templates.get("tool_use")
        return template if isinstance(template, str) else None

    @cached_property
    def tool_format(self) -> str | None:
        """The format of its tool calls, if its tokenizer's config names one."""
        name = self.tokenizer_config.get(tool_formats.SETTING)
        return name if isinstance(name, str) else None

    @cached_property
    def added_tokens(self) -> dict[str, tuple[int, bool]]:
        """The tokens beside the vocabulary: their ids, and whether they are special."""
        try:
            text = self.tokenizer_file.read_text(encoding="utf-8")
            # They stand at the file's beginning. Reading all of it would take long for a large vocabulary.
            rows, _ = json.JSONDecoder().raw_decode(text, _ADDED_TOKENS.search(text).end())  # type: ignore[union-attr]
            return {row["content"]: (int(row["id"]), bool(row.get("special"))) for row in rows}
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            # None, or the file is damaged, which whoever loads the tokenizer reports.
            return {}

    @property
    def about(self) -> dict[str, Any]:
        """The checkpoint's description, ready for JSON."""
        return {
            "architecture": self.config.get("model_type"),
            "layers": self._first_of("num_hidden_layers", "n_layer", "num_layers"),
            "width": self._first_of("hidden_size", "n_embd", "d_model"),
            "vocab_size": self.vocab_size,
            "special_tokens": self.special_tokens,
            "chat_template": self.chat_template,
            "tool_use_template": self.tool_use_template,
            "chat_tokens": tool_formats.chat_tokens(
                self.added_tokens, f"{self.chat_template or ''}{self.tool_use_template or ''}", self.special_tokens
            ),
            "tool_format": self.tool_format,
            "response_template": self.tokenizer_config.get("response_template"),
            "training": self._json("training.json"),
        }

    def _first_of(self, *names: str) -> Any:
        return next((self.config[name] for name in names if name in self.config), None)
