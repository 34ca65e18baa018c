"""Broken, absurd or malicious checkpoints: one clear error, no code is run, no memory is allocated."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.config import EngineConfig
from engine.memory import resident_memory
from engine.runners.interface import Runner
from engine.runners.reference import ReferenceRunner
from engine.runners.select import open_runner
from tritonlm.contract import CheckpointError

from .harness import save_model

CONFIG = EngineConfig(device="cpu", dtype="float32", max_sequences=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model("gpt2", tmp_path / "lm")


def open_native(folder: Path, config: EngineConfig) -> Runner:
    return open_runner(folder, replace(config, runner="native"), torch.device("cpu"))


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


class MaliciousPickle:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_pickled_weights_are_not_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(MaliciousPickle(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match=r"no \*.safetensors weights; pickled weights are not loaded: save it"):
        ReferenceRunner(folder, CONFIG)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("model_type", ["gpt2", "evil"])
def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path, model_type: str) -> None:
    trace = tmp_path / "trace"
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Config: ...\n")
    change(
        folder,
        model_type=model_type,
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config", "AutoTokenizer": "evil.Config"},
    )
    if model_type == "evil":
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            ReferenceRunner(folder, CONFIG)
    else:
        # For this type transformers uses its own class.
        assert ReferenceRunner(folder, CONFIG).vocab_size == 96
    assert not trace.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layer": 10**7}, "above the limit of"),
        ({"n_embd": 10**9}, "above the limit of"),
        ({"vocab_size": 10**12}, "above the limit of"),
        ({"vocab_size": 10**6}, "cannot be loaded"),
        ({"n_embd": 4096, "n_head": 4}, "cannot be loaded"),
        ({"n_positions": -1}, "must be a positive integer"),
    ],
)
@pytest.mark.slow
def test_absurd_sizes_are_refused_before_they_cost_anything(folder: Path, values: dict[str, int], message: str) -> None:
    change(folder, **values)
    before = resident_memory()
    with pytest.raises(CheckpointError, match=message):
        ReferenceRunner(folder, CONFIG)
    assert resident_memory() - before < 500 * 2**20


@pytest.mark.parametrize("values", [{"intermediate_size": 10**10}, {"num_attention_heads": 10**10, "head_dim": 64}])
def test_kernels_build_no_list_of_an_absurd_size(tmp_path: Path, values: dict[str, int]) -> None:
    folder = save_model("llama", tmp_path / "lm")
    change(folder, **values)
    before = resident_memory()
    with pytest.raises(CheckpointError, match=r"is [\d,]+, above the limit of 1,000,000; is the file damaged\?"):
        open_native(folder, CONFIG)
    assert resident_memory() - before < 500 * 2**20


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        ReferenceRunner(folder, CONFIG)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_kernels_do_not_read_behind_a_table_of_positions(tmp_path: Path, family: str) -> None:
    folder = save_model(family, tmp_path / "lm")
    field = "n_positions" if family == "gpt2" else "max_position_embeddings"
    change(folder, **{field: 10_000})
    with pytest.raises(CheckpointError, match=r"has the shape \(\d+, \d+\), config.json says \(100"):
        open_native(folder, CONFIG)
    # What the file holds can be served.
    limited = open_native(folder, replace(CONFIG, max_context_tokens=64))
    assert limited.context_length == 64


def test_a_context_beyond_the_memory_is_refused_and_can_be_limited(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "lm")
    change(folder, max_position_embeddings=10**9)
    with pytest.raises(CheckpointError, match="not enough memory for the KV cache: 1000000000 tokens need"):
        ReferenceRunner(folder, CONFIG)
    assert ReferenceRunner(folder, replace(CONFIG, max_context_tokens=128)).context_length == 128
