"""The text and the bytes of a single token, worked out from the way its vocabulary spells it.

A token by itself need not be text: it may hold half a character. It knows the spellings of byte-level vocabularies,
of SentencePiece's, and asks the tokenizer's own decoder about any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"


class Pieces:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The whole tokenizer as JSON would be as large as its vocabulary.
        decoder = tokenizer.decoder
        decoders = list(_flatten(json.loads(decoder.__getstate__()) if decoder is not None else None))
        kinds = {decoder["type"] for decoder in decoders}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._metaspace = "Metaspace" in kinds or any(
            decoder["type"] == "Replace" and decoder["pattern"] == {"String": _METASPACE} for decoder in decoders
        )
        # Added tokens are spelled as they are.
        added = tokenizer.get_added_tokens_decoder()
        self._added: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        # Bounded by the vocabulary.
        self._known: dict[int, tuple[str, bytes]] = {}

    def name_and_bytes(self, token_id: int) -> tuple[str, bytes]:
        """The token's text, or its bytes spelled as OpenAI does (`bytes:\\xf0\\x9f`), and the bytes themselves."""
        known = self._known.get(token_id)
        if known is None:
            data = self._bytes(token_id)
            known = self._known[token_id] = (_name(data), data)
        return known

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            # Models often have more places in their vocabulary than their tokenizer has tokens.
            return b""
        if self._byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if self._byte_fallback and (found := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        if self._metaspace:
            return piece.replace(_METASPACE, " ").encode()
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
    """The character that byte-level vocabularies write for each byte: itself where it prints, else one from 256 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
