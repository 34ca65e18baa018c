"""tokenizer.json and tokenizer_config.json from a file's vocabulary, in the `tokenizers` library's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .header import printable
from .model_file import ModelFile
from .pre_tokenizers import PRE_TOKENIZERS
from .vocabulary import Kind, Vocabulary, vocabulary_of

Specification = dict[str, Any]
_SPACE = "▁"
# Gemma's 262,144 tokens have ten million. A token of n characters has up to n - 1 pairs, each as long as itself.
_MAX_PAIR_CHARACTERS = 100_000_000
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# The added tokens of Phi 3 after which white space counts.
_PHI3_KEEPS_SPACE = frozenset(("<unk>", "<s>", "<|endoftext|>"))


def write_tokenizer(folder: Path, file: ModelFile, vocab_size: int) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json."""
    vocabulary = vocabulary_of(file)
    if len(vocabulary.tokens) > vocab_size:
        raise vocabulary.error(f"has {len(vocabulary.tokens):,} tokens, its embedding {vocab_size:,} rows")
    model = vocabulary.value("model")
    if not isinstance(model, str) or model not in _MODELS:
        raise vocabulary.error(f"is '{printable(model, 40)}'; supported are {', '.join(_MODELS)}")
    specification, adds_bos = _MODELS[model](vocabulary)
    adds_bos = vocabulary.flag("add_bos_token", adds_bos)
    specification["post_processor"] = _template(vocabulary, adds_bos, vocabulary.flag("add_eos_token", False))
    _write(folder / "tokenizer.json", {"version": "1.0", "truncation": None, "padding": None, **specification})
    _write(folder / "tokenizer_config.json", _config(vocabulary, adds_bos))
    ids = {"bos_token_id": vocabulary.token_id("bos"), "eos_token_id": vocabulary.end_ids() or None}
    _write(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})


def _byte_pairs(vocabulary: Vocabulary) -> tuple[Specification, bool]:
    """Byte-level BPE, whose merges the file lists."""
    name = vocabulary.value("pre")
    name = name if isinstance(name, str) else "default"
    if name not in PRE_TOKENIZERS:
        raise vocabulary.error(
            f"has the pre-tokenizer {name[:40]!r}; supported are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    pre_tokenizer, ids = PRE_TOKENIZERS[name], vocabulary.ids()
    merges = vocabulary.strings("merges")
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise vocabulary.error(f"has the merge {merge[:60]!r} of what are no tokens")
    to_text = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": {"type": "NFC"} if pre_tokenizer.composes else None,
        "pre_tokenizer": pre_tokenizer.specification(),
        "decoder": to_text,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre_tokenizer.ignores_merges, "vocab": ids, "merges": merges,
        },
    }, pre_tokenizer.adds_bos  # fmt: skip


def _sentence_pieces(vocabulary: Vocabulary) -> tuple[Specification, bool]:
    """SentencePiece's BPE: of all pairs that are a token together, the one of the highest score is merged."""
    is_gemma = vocabulary.file.architecture.startswith("gemma")
    if is_gemma:
        vocabulary = _with_space_signs(vocabulary)
    unknown = vocabulary.token_id("unknown")
    if unknown is None:
        unknown = next((number for number, _ in vocabulary.of_kind(Kind.UNKNOWN)), None)
    prefix = vocabulary.flag("add_space_prefix", True)
    to_signs = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    begin = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    to_spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    end = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [to_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *end]
    return {
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": [*begin, to_signs]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": vocabulary.ids().keys() >= _BYTES,
            "ignore_merges": False, "vocab": vocabulary.ids(), "merges": _merges(vocabulary, is_gemma),
        },
    }, True  # fmt: skip


def _merges(vocabulary: Vocabulary, is_gemma: bool) -> list[str]:
    """The pairs of tokens that are a token together, the highest score first. Files that were converted from Hugging
    Face's format, and Gemma's, have the tokens in the order of the merges instead, and one score for all."""
    characters = sum(len(token) ** 2 for token in vocabulary.tokens)
    if characters > _MAX_PAIR_CHARACTERS:
        raise vocabulary.error(
            f"has tokens too long for their number: the squares of their lengths are {characters:,} together, "
            f"more than {_MAX_PAIR_CHARACTERS:,}"
        )
    ids, scores = vocabulary.ids(), vocabulary.numbers("scores")
    # Gemma's user-defined tokens are also the results of merges.
    kinds = (Kind.NORMAL, Kind.USER_DEFINED) if is_gemma else (Kind.NORMAL,)
    merged = {token: number for number, token in vocabulary.of_kind(*kinds) if ids[token] == number}
    if is_gemma or len({scores[number] for number in merged.values()}) == 1:
        scores = [-float(number) for number in range(len(scores))]
    merges = [
        (-scores[number], -left_size, number, token)
        for token, number in merged.items()
        for left_size in range(1, len(token))
        if token[:left_size] in merged and token[left_size:] in merged
    ]
    merges.sort()
    return [f"{token[:-left_size]} {token[-left_size:]}" for _, left_size, _, token in merges]


def _with_space_signs(vocabulary: Vocabulary) -> Vocabulary:
    """Gemma's files write runs of spaces as they are, its own vocabulary as the signs that stand for spaces."""
    tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in vocabulary.tokens]
    return Vocabulary(vocabulary.file, tokens, vocabulary.kinds)


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The tokens that are found in text before it is split."""
    ids = vocabulary.ids()
    # Phi 3's own tokenizer drops white space after most, which files do not say. Phi 4's, of another model, does not.
    strips = vocabulary.file.architecture == "phi3" and vocabulary.value("model") == "llama"
    return [
        {"id": number, "content": token, "single_word": False, "lstrip": False,
         "rstrip": strips and token not in _PHI3_KEEPS_SPACE, "normalized": False,
         "special": vocabulary.kinds[number] == Kind.CONTROL}
        for number, token in vocabulary.of_kind(Kind.CONTROL, Kind.USER_DEFINED)
        if token and ids[token] == number
    ]  # fmt: skip


def _template(vocabulary: Vocabulary, adds_bos: bool, adds_eos: bool) -> dict[str, Any] | None:
    """What is added around a text."""
    bos, eos = (vocabulary.token_id(name) if adds else None for name, adds in (("bos", adds_bos), ("eos", adds_eos)))
    if bos is None and eos is None:
        return None

    def special(number: int | None, sequence: int) -> list[dict[str, Any]]:
        return [] if number is None else [{"SpecialToken": {"id": vocabulary.tokens[number], "type_id": sequence}}]

    def text(name: str, sequence: int) -> list[dict[str, Any]]:
        return [*special(bos, sequence), {"Sequence": {"id": name, "type_id": sequence}}, *special(eos, sequence)]

    tokens = {vocabulary.tokens[number]: number for number in (bos, eos) if number is not None}
    entries = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in tokens.items()}
    return {
        "type": "TemplateProcessing", "single": text("A", 0), "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": entries,
    }  # fmt: skip


def _config(vocabulary: Vocabulary, adds_bos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {"add_bos_token": adds_bos, "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = vocabulary.token_id(key)
        if number is not None:
            config[f"{name}_token"] = vocabulary.tokens[number]
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    templates = {name: vocabulary.file.metadata.get(key) for name, key in keys.items()}
    if written := [{"name": n, "template": text} for n, text in templates.items() if isinstance(text, str) and text]:
        config["chat_template"] = written
    return config


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# tokenizer.ggml.model → the specification, and whether the beginning-of-text token is added unless the file says so.
_MODELS: dict[str, Callable[[Vocabulary], tuple[Specification, bool]]] = {
    "gpt2": _byte_pairs,
    "llama": _sentence_pieces,
}
