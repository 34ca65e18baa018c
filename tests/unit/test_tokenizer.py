"""Loading a checkpoint's tokenizer: the same ids and texts as the library, in bounded memory."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.checkpoints import write_checkpoint
from tokenizer_zoo import PIECES, TOKENIZERS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tritonlm.checkpoints.tokenizer import load_decoder, load_tokenizer, with_merges_as_lines, without_merges
from tritonlm.contract import Checkpoint, CheckpointError

ROOT = Path(__file__).resolve().parents[2]
# The limit for a process that holds a tokenizer of 262,144 tokens.
MAX_MEGABYTES = 150
# Tokens that look like the syntax around merges in the file.
AWKWARD = (*'"\\[],é猫\x00\t', '"]', "]}", '\\"', '",\n        "', "\n    ]", '"merges":[')


def awkward(*more: str) -> Tokenizer:
    """A tokenizer with merges of all pairs of these tokens."""
    parts = (*AWKWARD, *more)
    pairs = list(itertools.product(parts, parts))
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*parts, *(a + b for a, b in pairs)]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens([AddedToken('["merges": [', normalized=False)])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    **TOKENIZERS,
    "awkward": awkward,
    "awkward with spaces": lambda: awkward(" ", "a b"),
    "awkward with comments": lambda: awkward("#version"),
}


def specification_of(tokenizer: Tokenizer, layout: str) -> bytes:
    text = tokenizer.to_str(pretty=layout == "indented")
    if layout == "lines":
        complete = json.loads(text)
        if "merges" in complete["model"]:
            complete["model"]["merges"] = [" ".join(pair) for pair in complete["model"]["merges"]]
        text = json.dumps(complete)
    return text.encode()


@pytest.mark.parametrize("layout", ["indented", "compact"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_decoder_decodes_like_the_complete_tokenizer(tmp_path: Path, name: str, layout: str) -> None:
    complete = KINDS[name]()
    checkpoint = Checkpoint(write_checkpoint(tmp_path, complete))
    checkpoint.tokenizer_file.write_bytes(specification_of(complete, layout))
    decoder, loaded = load_decoder(checkpoint), load_tokenizer(checkpoint)
    assert loaded.to_str() == complete.to_str()
    size = complete.get_vocab_size()
    assert decoder.get_vocab() == complete.get_vocab()
    assert decoder.get_added_tokens_decoder().keys() == complete.get_added_tokens_decoder().keys()
    rng = random.Random(0)
    for length in (0, 1, 2, 5, 30) * 20:
        # Some ids are out of range.
        ids = [rng.randrange(size + 3) for _ in range(length)]
        for skip in (True, False):
            assert decoder.decode(ids, skip_special_tokens=skip) == complete.decode(ids, skip_special_tokens=skip)
    for index in range(size + 3):
        assert decoder.id_to_token(index) == complete.id_to_token(index)
        assert decoder.decode([index], skip_special_tokens=False) == complete.decode([index], skip_special_tokens=False)
    text = "".join(PIECES)
    assert loaded.encode(text).ids == complete.encode(text).ids


@pytest.mark.parametrize("layout", ["indented", "compact", "lines"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_merges_are_removed_in_every_layout(name: str, layout: str) -> None:
    if layout == "lines" and "awkward with" in name:
        pytest.skip("merges with spaces cannot be written in this layout")
    complete = KINDS[name]()
    expected = json.loads(complete.to_str())
    if "merges" in expected["model"]:
        expected["model"]["merges"] = []
    assert json.loads(without_merges(specification_of(complete, layout))) == expected


@pytest.mark.parametrize(
    "text", ['{"model": {"merges": [1, 2]}}', '{"merges": [["a"]]}', '{"merges": [["a", "b"]', "", '{"merges": {}}']
)
def test_unknown_layouts_stay_unchanged(text: str) -> None:
    assert without_merges(text.encode()) == with_merges_as_lines(text.encode()) == text.encode()


def test_merges_without_spaces_become_strings() -> None:
    plain, spaced = (specification_of(KINDS[name](), "indented") for name in ("byte-level", "awkward with spaces"))
    assert all(isinstance(merge, str) for merge in json.loads(with_merges_as_lines(plain))["model"]["merges"])
    assert with_merges_as_lines(spaced) == spaced


@pytest.mark.parametrize("load", [load_decoder, load_tokenizer])
def test_an_invalid_tokenizer_file_is_reported(tmp_path: Path, load: Callable[[Checkpoint], Tokenizer]) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path))
    checkpoint.tokenizer_file.write_text('{"merges": [')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: "):
        load(checkpoint)
    checkpoint.tokenizer_file.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: "):
        load(checkpoint)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary as large as Gemma's: 262,144 tokens, half a million merges, 6,400 added tokens."""
    letters = [chr(0x4E00 + index) for index in range(64)]
    pairs = [a + b for a, b in itertools.product(letters, letters)]
    triples = [pair + c for pair, c in itertools.product(pairs, letters)]
    added = [f"<unused{index}>" for index in range(6400)]
    tokens = [*added, *letters, *pairs, *triples][: 2**18]
    used = {token for token in tokens if len(token) == 3}
    merges = [[pair[0], pair[1]] for pair in pairs]
    merges += [split for token in triples if token in used for split in ([token[:2], token[2]], [token[0], token[1:]])]
    folder = tmp_path_factory.mktemp("large") / "lm"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    write_checkpoint(folder, tokenizer, {"vocab_size": len(tokens)})
    complete = json.loads(tokenizer.to_str())
    complete["model"] |= {"vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges}
    complete["added_tokens"] = [
        {"id": index, "content": token, "special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip"), False)}
        | {"normalized": False}
        for index, token in enumerate(added)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(complete, ensure_ascii=False), encoding="utf-8")
    Tokenizer.from_file(str(folder / "tokenizer.json")).save(str(folder / "tokenizer.json"))
    return folder


MEASURE = """
import sys
from pathlib import Path
import psutil
from fakes.models import start_model
model = start_model(sys.argv[1], Path(sys.argv[2]))
exec(sys.argv[3])
print(psutil.Process().memory_info().rss / 1e6)
"""
USE = {
    "tokenize": "assert len(model._reader._encoder.from_text('一丁丂' * 5000)) > 1000",
    "detokenize": """
from tritonlm.contract import Chunk, TokenLogprob
chunk = Chunk(0, [7000, 8000] * 500, 1000, 0, 0, logprobs=[TokenLogprob(i, -1.0) for i in range(6000, 7000)])
text = model._detokenizer.text(chunk)
assert len(text) > 1000 and len(model._detokenizer.logprobs(chunk, text)) > 1000
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(USE))
def test_a_process_with_a_large_vocabulary_needs_little_memory(large: Path, model: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("tests", "client"))}
    command = [sys.executable, "-c", MEASURE, model, str(large), USE[model]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < MAX_MEGABYTES
