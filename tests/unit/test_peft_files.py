"""An adapter's files: what they say is what is computed, and whatever else is in them is refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.adapters.lora import LoraAdapter
from engine.adapters.peft_files import CONFIG, WEIGHTS, read_adapter
from fakes.peft_folders import DOWN, PLAIN, PREFIX, Q, tensors, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tritonlm.contract import CheckpointError


def read(
    folder: Path, config: object = PLAIN, weights: bytes | Mapping[str, torch.Tensor] | None = None
) -> LoraAdapter:
    return read_adapter("a", write(folder, config, tensors() if weights is None else weights), 256)


@pytest.mark.parametrize(
    ("config", "ranks", "scalings"),
    [
        ({}, {}, (2, 2)),
        ({"use_rslora": True}, {}, (4, 4)),
        ({"lora_alpha": 1}, {}, (0.25, 0.25)),
        ({"rank_pattern": {"q_proj": 1}}, {"q": 1}, (8, 2)),
        ({"rank_pattern": {r"^model\.layers\.1\..*": 16}, "use_rslora": True}, {"down": 16}, (4, 2)),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2, "model": 5}}, {}, (0.5, 2)),
        ({"rank_pattern": {"proj": 2, DOWN: 2}, "alpha_pattern": {".*_proj": 6}}, {"down": 2}, (1.5, 3)),
        ({"target_modules": "all-linear", "lora_dropout": 0.1, "peft_version": "0.21.2"}, {}, (2, 2)),
        ({"target_modules": r".*\.(q|down)_proj", "fan_in_fan_out": True, "init_lora_weights": "gaussian"}, {}, (2, 2)),
        ({"target_modules": None, "modules_to_save": [], "use_dora": False, "eva_config": {"rho": 2}}, {}, (2, 2)),
    ],
)
def test_matrices_are_read_with_their_scaling(
    tmp_path: Path, config: dict[str, Any], ranks: dict[str, int], scalings: tuple[float, float]
) -> None:
    stored = tensors(**ranks)
    adapter = read(tmp_path, PLAIN | config, stored)
    assert set(adapter.layers) == {Q, DOWN}
    for layer, scaling in zip((Q, DOWN), scalings, strict=True):
        matrices = adapter.layers[layer]
        assert torch.equal(matrices.a, stored[f"{PREFIX}{layer}.lora_A.weight"])
        assert torch.equal(matrices.b, stored[f"{PREFIX}{layer}.lora_B.weight"] * scaling)
    assert adapter.count == sum(tensor.numel() for tensor in stored.values())


def test_a_folder_that_cannot_be_looked_at_is_refused_by_name(tmp_path: Path) -> None:
    """As one below a folder of another user is; but root, who may run this, reads those."""
    folder = tmp_path / ("x" * 300)
    with pytest.raises(CheckpointError, match=f"{folder}.* cannot be read: File name too long"):
        read_adapter("a", folder, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_floating_point_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    matrices = read(tmp_path, PLAIN, stored).layers[Q]
    assert matrices.a.dtype == dtype
    assert torch.equal(matrices.b, stored[f"{PREFIX}{Q}.lora_B.weight"].float() * 2)


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    first, second = read(tmp_path / "one"), read(tmp_path / "two")
    assert first.identity == second.identity
    others = [
        read(tmp_path / "one", PLAIN | {"lora_alpha": 9}),
        read(tmp_path / "one", PLAIN, {name: tensor + 1 for name, tensor in tensors().items()}),
    ]
    assert len({first.identity, *(other.identity for other in others)}) == 3


REFUSED_SETTINGS: list[tuple[object, str]] = [
    ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"peft_type": None}, "peft_type None"),
    ({"use_dora": True}, "use_dora: DoRA"),
    ({"bias": "all"}, "bias 'all'"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["experts"]}, "target_parameters"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"r": 0}, "r 0"),
    ({"r": 257}, "r 257"),
    ({"r": "4"}, "r '4'"),
    ({"r": True}, "r True"),
    ({"r": 8}, "rank 8"),
    ({"lora_alpha": "8"}, "lora_alpha '8'"),
    ({"lora_alpha": None}, "lora_alpha None"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": {"(": 4}}, "is invalid"),
    ({"rank_pattern": {"(a+)+": 4}}, "too complex"),
    ({"alpha_pattern": {".*.*.*.*x": 4}}, "too complex"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
    ({"target_modules": 5}, "target_modules 5"),
    ({"target_modules": ["q_proj", 5]}, "target_modules"),
    ({"target_modules": ["q_proj"]}, DOWN),
]


@pytest.mark.parametrize(("change", "named"), REFUSED_SETTINGS)
def test_a_setting_that_is_not_computed_is_refused_by_name(tmp_path: Path, change: Any, named: str) -> None:
    refusal = refused(tmp_path, PLAIN | change)
    assert named in refusal
    assert CONFIG in refusal


@pytest.mark.parametrize("config", ["", "{", "[]", "5", "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "x" * (2 << 20)])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, config: str) -> None:
    assert CONFIG in refused(tmp_path, config)


def changed(name: str | None, change: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without `name`, and with those of `change`."""
    kept = {key: tensor for key, tensor in tensors().items() if name is None or not key.endswith(name)}
    return {**kept, **change}


A_KEY, B_KEY = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
REFUSED_TENSORS: list[tuple[Mapping[str, torch.Tensor], str]] = [
    ({}, "no matrices"),
    (changed("q_proj.lora_B.weight", {}), "lacks lora_B"),
    (changed(None, {A_KEY: torch.ones(5, 6)}), "shape (5, 6)"),
    (changed(None, {A_KEY: torch.ones(4, 6, 1)}), "shape (4, 6, 1)"),
    (changed(None, {A_KEY: torch.ones(4, 0)}), "shape (4, 0)"),
    (changed(None, {B_KEY: torch.ones(10, 3)}), "shape (10, 3)"),
    (changed(None, {B_KEY: torch.ones(10, 4, dtype=torch.int8)}), "torch.int8"),
    (changed(None, {B_KEY: torch.ones(10, 4, dtype=torch.float64)}), "torch.float64"),
    (changed(None, {B_KEY: torch.full((10, 4), math.nan)}), "not finite"),
    (changed(None, {A_KEY: torch.full((4, 6), math.inf)}), "not finite"),
    (changed(None, {f"{Q}.lora_A.weight": torch.ones(4, 6)}), "two matrices"),
    (changed(None, {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(10)}), "DoRA"),
    (changed(None, {f"{PREFIX}{Q}.lora_B.bias": torch.ones(10)}), "biases"),
    (changed(None, {f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 10)}), "embedding"),
    (changed(None, {f"{PREFIX}lm_head.modules_to_save.weight": torch.ones(4, 10)}), "a whole layer"),
    (changed(None, {"weight": torch.ones(4, 10)}), "no matrix of LoRA"),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "named"), REFUSED_TENSORS)
def test_tensors_that_are_not_computed_are_refused_by_name(
    tmp_path: Path, stored: Mapping[str, torch.Tensor], named: str
) -> None:
    assert named in refused(tmp_path, PLAIN, stored)


def test_missing_and_pickled_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_adapter("a", tmp_path / "none", 256)
    folder = write(tmp_path / "a", PLAIN, tensors())
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not loaded"):
        read_adapter("a", folder, 256)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=f"has no {CONFIG}"):
        read_adapter("a", folder, 256)


def test_a_rank_beyond_the_setting_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, PLAIN, tensors())
    assert read_adapter("a", folder, 4).layers
    with pytest.raises(CheckpointError, match="from 1 to 3"):
        read_adapter("a", folder, 3)


_CONTENT = save(tensors())
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_JSON = _LEAVES | st.lists(_LEAVES, max_size=3) | st.dictionaries(st.text(max_size=8), _LEAVES, max_size=3)
_NAMES = st.sampled_from(
    ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "bias",
     "peft_type", "modules_to_save", "init_lora_weights")
)  # fmt: skip
anywhere = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anywhere
@given(st.integers(0, len(_CONTENT) - 1), st.binary(min_size=1, max_size=12))
def test_damaged_weights_are_read_or_refused_in_one_sentence(tmp_path: Path, place: int, damage: bytes) -> None:
    read_or_refused(tmp_path, PLAIN, _CONTENT[:place] + damage + _CONTENT[place + len(damage) :])


@anywhere
@given(st.integers(0, len(_CONTENT) - 1))
def test_truncated_weights_are_refused(tmp_path: Path, length: int) -> None:
    refused(tmp_path, PLAIN, _CONTENT[:length])


@anywhere
@given(st.dictionaries(_NAMES, _JSON, min_size=1, max_size=3))
def test_any_settings_are_read_or_refused_in_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    read_or_refused(tmp_path, PLAIN | change, _CONTENT)


def read_or_refused(folder: Path, config: object, weights: bytes | Mapping[str, torch.Tensor] | None = None) -> str:
    """The refusal; empty if the files are read."""
    message = ""
    try:
        read(folder, config, weights)
    except CheckpointError as error:
        message = error.message
    assert "\n" not in message
    assert len(message) < 700
    return message


def refused(folder: Path, config: object, weights: bytes | Mapping[str, torch.Tensor] | None = None) -> str:
    message = read_or_refused(folder, config, weights)
    assert message, "it is read"
    return message
