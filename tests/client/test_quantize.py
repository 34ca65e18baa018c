"""`tritonlm quantize`: a checkpoint that can be served, what it says of the loss, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes.tiny_lm import TEXT, make_checkpoint
from safetensors.torch import load_file, save_file
from tritonlm.checkpoints.tokenizer import load_tokenizer
from tritonlm.cli import app
from tritonlm.contract import Checkpoint
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lm") / "lm")


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["quantize", *words])
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith("…")]
    assert len(lines) == 1
    return lines[0]


def test_a_checkpoint_is_written_that_can_be_served(folder: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "new" / "lm-int4"
    text.write_text("".join(TEXT), encoding="utf-8")
    words = ["quantize", str(folder), "--weights", "int4", "--out", str(out), "--text", str(text)]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["tokens"] == len(load_tokenizer(Checkpoint(folder)).encode("".join(TEXT)).ids)
    # Random weights: about as many as there are tokens in the vocabulary.
    assert 100 < facts["perplexity_before"] < 5000
    assert facts["perplexity_after"] == pytest.approx(facts["perplexity_before"], rel=0.1)
    assert facts["quantized_bytes"] < facts["file_bytes"]
    Checkpoint(out).check()
    assert Checkpoint(out).quantized_count() > 0
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    # Nothing else is left there.
    assert [path.name for path in out.parent.iterdir()] == ["lm-int4"]
    assert refused(str(folder), "--weights", "int4", "--out", str(out)) == (
        f"error: {out} exists; give a folder that does not exist yet to --out"
    )


def test_what_cannot_be_quantized_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken", tmp_path / "new" / "lm"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["transformer.h.0.attn.c_attn.weight"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    message = refused(str(broken), "--weights", "int8", "--out", str(out))
    assert message.startswith("error: transformer.h.0.attn.c_attn.weight: the weights have numbers that are not finite")
    assert list(out.parent.iterdir()) == []


def test_a_text_that_measures_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = (str(folder), "--weights", "int4", "--out", str(tmp_path / "new"), "--text", str(text))
    assert f"--text {text} cannot be read" in refused(*words)
    text.write_bytes(b"\xff\xfe")
    assert f"--text {text} cannot be read" in refused(*words)
    text.write_text("a")
    assert f"--text {text} has 1 tokens; a perplexity needs two" in refused(*words)
    assert not (tmp_path / "new").exists()
