"""Computes the bytes and the display text of a single token from its spelling in the vocabulary.

A single token need not be valid text: it may hold a part of a character. This module knows the spellings of byte-level
and SentencePiece vocabularies. For any other it uses the tokenizer's own decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"


class TokenBytes:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Only the decoder as JSON: the whole tokenizer would include the vocabulary.
        decoder = tokenizer.decoder
        decoders = list(_flatten(json.loads(decoder.__getstate__()) if decoder is not None else None))
        kinds = {decoder["type"] for decoder in decoders}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._metaspace = "Metaspace" in kinds or any(
            decoder["type"] == "Replace" and decoder["pattern"] == {"String": _METASPACE} for decoder in decoders
        )
        # Added tokens are spelled as plain text.
        added = tokenizer.get_added_tokens_decoder()
        self._added: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        # A cache, bounded by the vocabulary.
        self._cache: dict[int, tuple[str, bytes]] = {}

    def name_and_bytes(self, token_id: int) -> tuple[str, bytes]:
        """The token's text, or its bytes spelled as OpenAI does (`bytes:\\xf0\\x9f`), and the bytes themselves."""
        entry = self._cache.get(token_id)
        if entry is None:
            data = self._bytes(token_id)
            entry = self._cache[token_id] = (_name(data), data)
        return entry

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            # The vocabulary of a model is often larger than that of its tokenizer.
            return b""
        if self._byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._metaspace:
            return token.replace(_METASPACE, " ").encode()
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _flatten(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    yield decoder
    for inner in decoder.get("decoders", []):
        yield from _flatten(inner)


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in byte-level vocabularies: printable bytes as they are, the others from 256 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
