"""Tokenizers of GGUF files: the same ids and texts as those of the tokenizer that was converted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from fakes.tiny_lm import TEXT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tritonlm.checkpoints.gguf.model_file import ModelFile
from tritonlm.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from tritonlm.checkpoints.gguf.tokenizer import write_tokenizer
from tritonlm.contract import Checkpoint, CheckpointError

TEXTS = (
    *TEXT, "", " ", "  two spaces", "trailing  ", "\n\n\n", "\t\tif x:\r\n\t\t\treturn [1, 2]  # 100%",
    "12345 1,234.50 ½ ²",
    "I'll say: 'WE'RE here', they'd've", "Größe, naïve, Łódź, Ελληνικά, русский текст, עברית, العربية, हिन्दी, ไทย",
    "你好，世界！これはテストです。한국어 문장", "e\u0301 vs é, ﬁ, Å", "👍🏽 👩‍👩‍👧‍👦 🇩🇪 🎉🎉",
    "a\u00a0b\u2003c\u3000d\u200be", "<|end|> and <tool> and\x00null",
    "<0x0A> is no byte", "▁▁ signs ▁of space", "camelCaseWord SHOUTING x86_64 foo_bar/baz-qux", "…“quotes”—dash",
)  # fmt: skip
_ALPHABET = "abc  \n\t\r▁é你👍ß1234.,;:'\"<>[]{}()ÀÉ\u0301\u200b\u3000"


def texts() -> list[str]:
    generator = random.Random(1)
    return [*TEXTS, *("".join(generator.choices(_ALPHABET, k=generator.randint(1, 60))) for _ in range(300))]


def model_file(metadata: dict[str, Any], architecture: str = "llama") -> ModelFile:
    keys = {f"tokenizer.ggml.{name}": value for name, value in metadata.items() if name != "chat_template"}
    if "chat_template" in metadata:
        keys["tokenizer.chat_template"] = metadata["chat_template"]
    return ModelFile(Path("/models/model.gguf"), {"general.architecture": architecture, **keys}, {})


def written(folder: Path, metadata: dict[str, Any], architecture: str = "llama", vocab_size: int = 10**6) -> Tokenizer:
    write_tokenizer(folder, model_file(metadata, architecture), vocab_size)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def assert_same(ours: Tokenizer, original: Tokenizer, *further: str) -> None:
    for text in (*texts(), *further):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text, add_special_tokens=False).ids, repr(text)
        for skips in (True, False):
            assert ours.decode(ids, skip_special_tokens=skips) == original.decode(ids, skip_special_tokens=skips)


def byte_level(pre_tokenizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|bos|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*TEXTS] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=False)])
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    specification = json.loads(tokenizer.to_str())
    added = {token["id"]: token["special"] for token in specification["added_tokens"]}
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    return {
        "model": "gpt2", "pre": pre, "tokens": tokens, "bos_token_id": 0, "eos_token_id": 1,
        "token_type": [1 if n not in added else 3 if added[n] else 4 for n in range(len(tokens))],
        "merges": [" ".join(merge) for merge in specification["model"]["merges"]],
    }  # fmt: skip


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# As the models' own tokenizers are put together.
ORIGINALS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": pre_tokenizers.Sequence([
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ), "isolated",
        ), _BYTES,
    ]),
}  # fmt: skip


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_tokenizers_give_the_same_ids(pre: str, tmp_path: Path) -> None:
    original = byte_level(ORIGINALS[pre])
    assert_same(written(tmp_path, byte_level_metadata(original, pre)), original)


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    original = byte_level(_split("qwen2"))
    original.normalizer = normalizers.NFC()
    assert_same(written(tmp_path, byte_level_metadata(original, "qwen2")), original)


def _split(pre: str) -> Any:
    (pattern,) = PRE_TOKENIZERS[pre].patterns
    regex = Regex(pattern)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(regex, "isolated"), _BYTES])


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_texts(pre: str, tmp_path: Path) -> None:
    tokenizer = written(tmp_path, byte_level_metadata(byte_level(_GPT2), pre))
    for text in TEXTS:
        composed = normalize("NFC", text) if PRE_TOKENIZERS[pre].composes else text
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == composed


# SentencePiece.


def sentence_pieces() -> tuple[Tokenizer, list[str], list[float]]:
    """A tokenizer as Llama 2's: merges ordered by the scores of their results."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, limit_alphabet=90
    )
    tokenizer.train_from_iterator([word for text in TEXT for word in text.replace(" ", " ▁").split(" ")], trainer)
    specification = json.loads(tokenizer.to_str())
    specification["added_tokens"] = [token for token in specification["added_tokens"] if token["id"] in (1, 2)]
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    return Tokenizer.from_str(json.dumps(specification)), tokens, [-float(number) for number in range(len(tokens))]


def sentence_piece_metadata(tokens: list[str], scores: list[float]) -> dict[str, Any]:
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    return {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds, "unknown_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def test_sentence_piece_tokenizers_give_the_same_ids(tmp_path: Path) -> None:
    original, tokens, scores = sentence_pieces()
    tokenizer = written(tmp_path, sentence_piece_metadata(tokens, scores))
    assert_same(tokenizer, original)
    assert tokenizer.encode("a house").ids[0] == 1


def test_without_scores_tokens_are_in_the_order_of_merges(tmp_path: Path) -> None:
    original, tokens, _ = sentence_pieces()
    assert_same(written(tmp_path, sentence_piece_metadata(tokens, [-1000.0] * len(tokens))), original)


def test_the_space_before_a_text_is_the_files_choice(tmp_path: Path) -> None:
    _, tokens, scores = sentence_pieces()
    metadata = {**sentence_piece_metadata(tokens, scores), "add_space_prefix": False, "add_bos_token": False}
    tokenizer = written(tmp_path, metadata)
    for text in ("house", " house", "  a  b"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("house").tokens[0] != "▁"


def test_gemmas_runs_of_spaces_are_tokens(tmp_path: Path) -> None:
    _, tokens, scores = sentence_pieces()
    metadata = sentence_piece_metadata([*tokens, "   "], [*scores, -1000.0])
    metadata["token_type"][-1] = 4
    tokenizer = written(tmp_path, {**metadata, "add_space_prefix": False}, "gemma3")
    assert tokenizer.encode("   ", add_special_tokens=False).ids == [len(tokens)]
    assert tokenizer.decode([len(tokens)]) == "   "


def test_phi3_drops_white_space_after_the_tokens_of_a_chat(tmp_path: Path) -> None:
    original, tokens, scores = sentence_pieces()
    added = ["<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>"]
    metadata = sentence_piece_metadata([*tokens, *added], [*scores, *[-1000.0] * len(added)])
    metadata["token_type"][-len(added) :] = [3] * len(added)
    chat = "<s><|user|>\nhi<|end|>\n<|assistant|>\n"
    assert_same(written(tmp_path, metadata), with_special(original, added, rstrip=False), chat)
    # As in the model's own tokenizer.json.
    own = with_special(original, added[:1], rstrip=False)
    own = with_special(own, [*added[1:], "</s>"], rstrip=True)
    tokenizer = written(tmp_path, metadata, "phi3")
    assert_same(tokenizer, own, chat, "</s> \n a", "<|endoftext|>\n a", "<s> a")
    ids = [tokenizer.token_to_id(token) for token in added]
    assert tokenizer.encode(chat, add_special_tokens=False).ids[-2:] == ids[-2:]


def with_special(tokenizer: Tokenizer, tokens: list[str], *, rstrip: bool) -> Tokenizer:
    specification = json.loads(tokenizer.to_str())
    old = [token for token in specification["added_tokens"] if token["content"] not in tokens]
    copy = Tokenizer.from_str(json.dumps({**specification, "added_tokens": old}))
    copy.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in tokens])
    return copy


# Special tokens and configuration.


def test_the_configuration_names_special_tokens_and_the_chat_template(tmp_path: Path) -> None:
    metadata = {
        **byte_level_metadata(byte_level(_GPT2), "llama-bpe"), "padding_token_id": 1, "chat_template": "{{ messages }}",
        "unknown_token_id": 0xFFFFFFFF,
    }  # fmt: skip
    tokenizer = written(tmp_path, metadata)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.tokenizer_config["add_bos_token"] is True
    # Llama 3's pre-tokenizer means that texts begin with it.
    assert tokenizer.encode("a").ids[0] == 0
    assert 0 not in tokenizer.encode("a", add_special_tokens=False).ids


def test_the_chat_template_for_tools_is_kept(tmp_path: Path) -> None:
    file = model_file({**_TINY, "chat_template": "{{ messages }}"})
    file.metadata["tokenizer.chat_template.tool_use"] = "{{ tools }}"
    write_tokenizer(tmp_path, file, 3)
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.chat_template, checkpoint.tool_use_template) == ("{{ messages }}", "{{ tools }}")


def test_texts_begin_and_end_as_the_file_says(tmp_path: Path) -> None:
    metadata = {**byte_level_metadata(byte_level(_GPT2), "gpt-2"), "add_bos_token": True, "add_eos_token": True}
    ids = written(tmp_path, metadata).encode("a").ids
    assert (ids[0], ids[-1]) == (0, 1)
    assert written(tmp_path, {**metadata, "add_bos_token": False, "add_eos_token": False}).encode("a").ids == ids[1:-1]


def test_the_ends_of_texts(tmp_path: Path) -> None:
    tokens = ["<eos>", "a", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|eom_id|>"]
    metadata = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [3, 1, 3, 5, 3, 6], "merges": [],
        "eos_token_id": 0, "eot_token_id": 1,
    }  # fmt: skip
    written(tmp_path, metadata)
    # An unused token is none, nor is a byte, whatever its text.
    assert Checkpoint(tmp_path).eos_token_ids == {0, 1, 2, 4}
    harmony = {**metadata, "tokens": ["<|return|>", "a", "<|call|>", "b", "<|end|>", "c"], "eot_token_id": 0}
    written(tmp_path, harmony)
    assert Checkpoint(tmp_path).eos_token_ids == {0, 2}


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_an_end_of_turn_is_special_whatever_kind_the_file_gives_it(tmp_path: Path, kind: int) -> None:
    metadata = {
        "model": "gpt2", "pre": "gpt-2", "tokens": ["<eos>", "a", "<end_of_turn>"], "token_type": [3, 1, kind],
        "merges": [], "eos_token_id": 0,
    }  # fmt: skip
    tokenizer = written(tmp_path, metadata)
    assert Checkpoint(tmp_path).eos_token_ids == {0, 2}
    assert tokenizer.encode("a<end_of_turn>a").ids == [1, 2, 1]
    assert tokenizer.decode([1, 2, 1]) == "aa"


def test_of_equal_tokens_the_first_is_used(tmp_path: Path) -> None:
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "a", "b"], "merges": []}
    tokenizer = written(tmp_path, metadata)
    assert tokenizer.encode("ab").ids == [0, 2]


_TINY: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "bert"}, "is 'bert'; supported are gpt2, llama"), ({"model": None}, "is 'None'"),
        ({"pre": "new-model"}, "pre-tokenizer 'new-model'; supported are"), ({"tokens": None}, "no list of strings"),
        ({"tokens": [1, 2, 3]}, "no list of strings"), ({"tokens": []}, "has no tokens"),
        ({"tokens": ["a", "b", "ab" * 3000]}, "has a token of 6,000 characters, more than 4,096"),
        ({"merges": ["a c"]}, "merge 'a c' of what are no tokens"), ({"merges": ["ab"]}, "merge 'ab'"),
        ({"merges": None}, "no list of strings tokenizer.ggml.merges"),
        ({"token_type": [1]}, "for each of its 3 tokens"),
        ({"token_type": ["1"] * 3}, "for each of its 3 tokens"), ({"token_type": [1.5] * 3}, "no kinds in"),
        ({"model": ["gpt2"]}, "supported are gpt2, llama"), ({"bos_token_id": 3}, "no token 3"),
        ({"eos_token_id": -1}, "no token -1"), ({"eos_token_id": "a"}, "no token a"),
        ({"bos_token_id": True}, "no token True"),
        ({"model": "llama", "scores": [0.0]}, "for each of its 3 tokens"),
        ({"tokens": ["a", "b", "ab", "c"]}, "embedding 3 rows"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_tokenizer_is_said(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    metadata = {name: value for name, value in {**_TINY, **changes}.items() if value is not None}
    with pytest.raises(CheckpointError, match=expected) as caught:
        written(tmp_path, metadata, vocab_size=3)
    assert str(caught.value).startswith("/models/model.gguf cannot be used: its tokenizer ")


def test_tokens_of_many_pairs_are_refused_before_the_pairs_are_listed(tmp_path: Path) -> None:
    """Of such tokens each splits everywhere: a file of one megabyte would give gigabytes of merges."""
    tokens = ["a" * length for length in range(1, 1000)]
    metadata = {"model": "llama", "tokens": tokens, "scores": [-float(number) for number in range(len(tokens))]}
    with pytest.raises(CheckpointError, match="squares of their lengths are 332,833,500 together"):
        written(tmp_path, metadata)
