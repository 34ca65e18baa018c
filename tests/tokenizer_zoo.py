"""Small real tokenizers of every decoder family for tests, made at run time, and functions to encode text with them.

It uses the `tokenizers` library and no code of this repository.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "the quick brown fox said hello, naïve café; résumé. "
    "猫は静かに眠る。世界你好吗 한국어 텍스트 👩‍👩‍👧‍👦 family 👍🏽 ok e\u0301 o\u0302 done.\n  END of it ### stop\n"
)
PIECES = (
    *("the ", "STOP", " fox", "hello", "猫", "世界", "é", "e\u0301", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪", "\n", "  "),
    *(" ", "a", "b", "#", "ß", "€"),
)
WORDS = (
    *("▁the", "▁fox", "▁", "▁▁", "hello", "猫", "ST", "OP", "a", "b", "ab", "▁a", "#", "##"),
    *("e", "é", "👍", "▁#"),
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = AddedToken("<s>", special=True)


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[SPECIAL]
    )
    tokenizer.train_from_iterator([TEXT + " hello" * 9] * 3, trainer)
    return tokenizer


def sentencepiece_vocabulary() -> list[tuple[str, float]]:
    return [("<unk>", 0.0), ("<s>", 0.0), *((byte, -20.0) for byte in BYTES), *((word, -5.0) for word in WORDS)]


@cache
def llama_like() -> Tokenizer:
    """A Unigram model with byte fallback and the decoder of Llama's tokenizers."""
    tokenizer = Tokenizer(models.Unigram(sentencepiece_vocabulary(), unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """BPE with the plain Metaspace decoder, which strips every space of the first token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted(set(TEXT) | set("".join(PIECES)))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", SPECIAL], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


@cache
def characters() -> Tokenizer:
    alphabet = sorted(set(TEXT) | set("".join(PIECES)) | {"\u0301"})
    vocabulary = {character: index for index, character in enumerate(["<unk>", "<s>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


@cache
def suffixed() -> Tokenizer:
    """Words that carry their following space as a suffix, as in the first GPT."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "a", "b</w>", "fox</w>", "ab", "é</w>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "llama-like": llama_like,
    "metaspace": metaspace,
    "characters": characters,
    "suffixed": suffixed,
}


def decode(name: str, ids: Sequence[int]) -> str:
    return TOKENIZERS[name]().decode(list(ids))


def token_id(name: str, token: str) -> int:
    index = TOKENIZERS[name]().token_to_id(token)
    assert index is not None, f"{name} has no token {token!r}"
    return index


def byte_ids(text: str) -> list[int]:
    """The text as the byte tokens of the Llama-like tokenizer."""
    return [token_id("llama-like", BYTES[byte]) for byte in text.encode()]


def split(name: str, text: str, seed: int) -> list[int]:
    """The text as ids, split at random into smaller tokens than the tokenizer's own: bytes where it has bytes."""
    tokenizer = TOKENIZERS[name]()
    rng = random.Random(seed)
    ids: list[int] = []
    for whole in tokenizer.encode(text, add_special_tokens=False).ids:
        token = tokenizer.id_to_token(whole)
        assert token is not None
        if rng.random() < 0.5 or token.startswith("<"):
            ids.append(whole)
        elif name == "llama-like":
            ids += byte_ids(token.replace("▁", " "))
        else:
            smaller = [tokenizer.token_to_id(character) for character in token]
            ids += [whole] if None in smaller else [i for i in smaller if i is not None]
    return ids
