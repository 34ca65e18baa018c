"""The engine's settings: config.pbtxt, environment, and errors that name the place to look at."""

from __future__ import annotations

import pytest
from engine.config import EngineConfig
from tritonlm.contract import CheckpointError


def test_the_models_config_wins_over_the_environment_and_that_over_the_default() -> None:
    config = EngineConfig.from_strings(
        {"max_sequences": "3", "block_tokens": "8", "unknown": "x"},
        {"TRITONLM_MAX_SEQUENCES": "5", "TRITONLM_MAX_SECONDS": "1.5", "TRITONLM_THREADS": ""},
    )
    assert (config.max_sequences, config.block_tokens, config.max_seconds) == (3, 8, 1.5)
    assert config.threads == EngineConfig().threads


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("device", "tpu"), ("dtype", "int8"), ("max_sequences", "0"), ("max_sequences", "1.5"), ("threads", "-1"),
        ("max_seconds", "nan"), ("max_seconds", "inf"), ("queue_seconds", "soon"), ("block_tokens", "0"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.pbtxt parameter {name} must be .*{text!r}"):
        EngineConfig.from_strings({name: text}, {})
    variable = f"TRITONLM_{name.upper()}"
    with pytest.raises(CheckpointError, match=f"{variable} must be"):
        EngineConfig.from_strings({}, {variable: text})
