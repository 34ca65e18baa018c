"""Adapters in the engine: PEFT's own outputs, however the requests are batched, and a store that follows its files."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.adapters.store import AdapterStore
from engine.engine import Engine
from tritonlm.contract import CheckpointError, NotOffered
from tritonlm.contract.adapters_file import remove_adapter
from tritonlm.contract.errors import AdapterNotFound

from .adapters import PeftReference, add, write_adapter
from .harness import FAMILIES, Collected, make_engine, run, save_model, step, submit

PROMPT = [5, 17, 30, 2, 44, 61, 8]
LONG = [(7 * i) % 90 + 3 for i in range(50)]
# Names of the settings of FAMILIES, with the settings of their adapters.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "llama": {},
    "llama wide": {"use_rslora": True, "r": 16},
    "qwen3": {"rank_pattern": {"q_proj": 1, r"^model\.layers\.1\.mlp\.down_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    "gemma3_text": {"r": 1, "target_modules": r".*\.(q|v|down)_proj"},
    "phi": {"r": 64, "lora_alpha": 16},
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
    "gpt_neox": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family: base, two adapters, and their file."""
    return tmp_path_factory.mktemp("adapters")


def made(folders: Path, family: str) -> tuple[Path, Path]:
    """The base, and the file of its adapters `one` and `two`."""
    folder = folders / family.replace(" ", "-")
    base, file = folder / "base", folder / "adapters.json"
    if not file.exists():
        save_model(family, base)
        for seed, name in enumerate(("one", "two"), start=1):
            add(file, **{name: write_adapter(base, folder / name, seed, **CASES[family])})
    return base, file


def engine_of(base: Path, file: Path, **settings: Any) -> Engine:
    return make_engine(base, **{"adapters_file": str(file), "dtype": "float32", **settings})


@pytest.fixture(scope="module")
def llama(folders: Path) -> tuple[Path, Path]:
    return made(folders, "llama")


@pytest.fixture
def engine(llama: tuple[Path, Path]) -> Iterator[Engine]:
    engine = engine_of(*llama, enable_embeddings=True)
    yield engine
    assert not any(entry.references for entry in store(engine)._entries.values()), "a reference is left"
    store(engine).close()


def store(engine: Engine) -> AdapterStore:
    assert engine._adapters
    return engine._adapters


def text(engine: Engine, prompt: list[int] = PROMPT, **parameters: Any) -> list[int]:
    collected = submit(engine, prompt, **parameters)
    run(engine)
    return collected.token_ids


@pytest.mark.parametrize("family", sorted(CASES))
def test_texts_and_log_probabilities_are_those_of_peft(folders: Path, family: str) -> None:
    base, file = made(folders, family)
    engine = engine_of(base, file)
    texts = {}
    for name in ("", "one", "two"):
        collected = submit(engine, PROMPT, adapter=name, logprobs=5, echo=True)
        run(engine)
        reference = PeftReference(base, file.parent / name if name else None)
        texts[name] = collected.token_ids
        assert collected.token_ids == reference.greedy(PROMPT, 12)
        expected = reference.logprobs([*PROMPT, *collected.token_ids])
        entries = collected.logprobs
        ids = [*PROMPT, *collected.token_ids]
        assert len(entries) == len(ids)
        for position, entry in enumerate(entries[1:]):
            assert entry.logprob == pytest.approx(float(expected[position, ids[position + 1]]), abs=1e-4)
    assert len({tuple(ids) for ids in texts.values()}) == 3, "the adapters change nothing"
