"""The vocabulary in a file's metadata: tokens, their kinds and scores, and the ids of special ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tritonlm.contract.errors import CheckpointError

from .header import printable
from .model_file import ModelFile

_PREFIX = "tokenizer.ggml."
# More than any token has. What a tokenizer does with its tokens grows with the square of their lengths.
_MAX_TOKEN_LENGTH = 4096
# Tokens that end a text or a turn, whatever eos_token_id says.
_ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>",
))  # fmt: skip


class Kind(IntEnum):
    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    file: ModelFile
    tokens: list[str]
    kinds: list[int]

    def error(self, text: str) -> CheckpointError:
        return self.file.error(f"its tokenizer {text}")

    def value(self, name: str) -> Any:
        return self.file.metadata.get(_PREFIX + name)

    def strings(self, name: str) -> list[str]:
        values = self.value(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.error(f"has no list of strings {_PREFIX}{name}")
        return values

    def numbers(self, name: str) -> list[float]:
        """A number for each token."""
        values = self.value(name)
        if not isinstance(values, list) or len(values) != len(self.tokens) or (values and isinstance(values[0], str)):
            raise self.error(f"has no {_PREFIX}{name} for each of its {len(self.tokens):,} tokens")
        return values

    def token_id(self, name: str) -> int | None:
        """bos, eos, unknown, padding, eot or eom."""
        number = self.value(f"{name}_token_id")
        # 0xFFFFFFFF is none.
        if number is None or number == 0xFFFFFFFF:
            return None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise self.error(f"has no token {printable(number, 40)}, which is its {name}_token_id")
        return number

    def flag(self, name: str, default: bool) -> bool:
        value = self.value(name)
        return value if isinstance(value, bool) else default

    def of_kind(self, *kinds: Kind) -> Iterator[tuple[int, str]]:
        return (
            (n, token) for n, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)) if kind in kinds
        )

    def ids(self) -> dict[str, int]:
        """The id of each token; of equal ones the first."""
        ids: dict[str, int] = {}
        for number, token in enumerate(self.tokens):
            ids.setdefault(token, number)
        return ids

    def end_ids(self) -> list[int]:
        """The ids that end a text, eos first."""
        named = [number for name in ("eos", "eot", "eom") if (number := self.token_id(name)) is not None]
        ends = {token: number for number, token in self.of_kind(Kind.CONTROL) if token in _ENDS}
        if {"<|return|>", "<|call|>"} <= ends.keys():
            # There it ends a message of several.
            ends.pop("<|end|>", None)
        return list(dict.fromkeys([*named, *ends.values()]))


def vocabulary_of(file: ModelFile) -> Vocabulary:
    vocabulary = Vocabulary(file, [], [])
    tokens = vocabulary.strings("tokens")
    if not tokens:
        raise vocabulary.error("has no tokens")
    longest = max(map(len, tokens))
    if longest > _MAX_TOKEN_LENGTH:
        raise vocabulary.error(f"has a token of {longest:,} characters, more than {_MAX_TOKEN_LENGTH:,}")
    vocabulary = Vocabulary(file, tokens, [Kind.NORMAL] * len(tokens))
    kinds: list[float] = list(vocabulary.kinds)
    if vocabulary.value("token_type") is not None:
        kinds = vocabulary.numbers("token_type")
    if not isinstance(kinds[0], int):
        raise vocabulary.error(f"has no kinds in {_PREFIX}token_type")
    return Vocabulary(file, tokens, [_kind(token, int(kind)) for token, kind in zip(tokens, kinds, strict=True)])


def _kind(token: str, kind: int) -> int:
    """Some files, as Gemma 1's, give the end of a turn another kind, and llama.cpp takes it as a control token too."""
    return Kind.CONTROL if token in _ENDS and kind not in (Kind.UNUSED, Kind.BYTE) else kind
