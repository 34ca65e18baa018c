"""The pre-tokenizers that files name: the regular expressions at which text is split before pairs of bytes are merged.

Each expression is applied to the parts that the one before left. This module knows their names, no vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _words(digits: str) -> str:
    return (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip


def _cased(contractions: str, digits: str) -> str:
    lower = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    upper = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return f"{lower}{contractions}|{upper}{contractions}|{digits}{rest}"


_LLAMA3, _QWEN2 = _words(r"\p{N}{1,3}"), _words(r"\p{N}")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK, _ASIAN = (
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+",
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of the model's own tokenizer: ranges of letters that have a case.
_CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 "
    "1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE "
    "1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 "
    "2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A "
    "10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943 "
)


def _one_of(ranges: str) -> str:
    ends = (part.partition("-") for part in ranges.split())
    return "[" + "".join(rf"\x{{{first}}}-\x{{{last or first}}}" for first, _, last in ends) + "]+"


@dataclass(frozen=True)
class PreTokenizer:
    patterns: tuple[str, ...]
    # A part that is a token is taken whole, whatever the merges.
    ignores_merges: bool = False
    adds_bos: bool = False
    # Unicode's composition, as the models' own tokenizers do it.
    composes: bool = False

    def specification(self) -> dict[str, Any]:
        """As tokenizer.json has it."""
        splits: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*splits, to_bytes]}


def _named(names: str, pre_tokenizer: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre_tokenizer)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True),
    ),
    **_named("dbrx smaug-bpe", PreTokenizer((_LLAMA3,))),
    **_named("glm4 chatglm-bpe", PreTokenizer((_LLAMA3,), ignores_merges=True)),
    **_named("qwen2", PreTokenizer((_QWEN2,), composes=True)),
    **_named("deepseek-r1-qwen stablelm2 hunyuan megrez", PreTokenizer((_QWEN2,))),
    **_named(
        "gpt-2 gpt2 mpt phi-2 jais trillion granite-docling gigachat a.x-4.0 mellum exaone4", PreTokenizer((_GPT2,))
    ),
    **_named("olmo", PreTokenizer((_GPT2,), composes=True)),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b", PreTokenizer((r"\p{N}", _GPT2))),
    **_named("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    **_named("bloom poro-chat gpt3-finnish", PreTokenizer((_BLOOM,))),
    **_named("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    **_named("tekken", PreTokenizer((_cased("", r"\p{N}"),), ignores_merges=True, adds_bos=True)),
    **_named(
        "gpt-4o llama4 kanana2 minimax-m2", PreTokenizer((_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),))
    ),
    **_named(
        "deepseek-llm",
        PreTokenizer((
            r"[\r\n]", r"\s?" + _one_of(_CASED_LETTERS),
            r"\s?" + _one_of("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"), r"\s+$", _ASIAN, r"\p{N}+",
        )),
    ),
    **_named(
        "deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"))
    ),
    **_named("deepseek-v3 hunyuan-dense", PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))),
}  # fmt: skip
