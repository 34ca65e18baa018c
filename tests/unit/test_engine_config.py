"""The settings of the engine: config.pbtxt, environment, and errors that name the source of a value."""

from __future__ import annotations

import pytest
from engine.config import EngineConfig
from engine.runners.interface import choose_devices
from tritonlm.contract import CheckpointError


def test_the_models_config_wins_over_the_environment_and_that_over_the_default() -> None:
    config = EngineConfig.from_strings(
        {"max_sequences": "3", "block_tokens": "8", "unknown": "x"},
        {"TRITONLM_MAX_SEQUENCES": "5", "TRITONLM_MAX_SECONDS": "1.5", "TRITONLM_THREADS": ""},
    )
    assert (config.max_sequences, config.block_tokens, config.max_seconds) == (3, 8, 1.5)
    assert config.threads == EngineConfig().threads


def test_the_time_between_chunks_grows_with_the_batch_up_to_a_limit() -> None:
    config, running = EngineConfig(chunk_milliseconds=10), (1, 3, 6, 18, 126, 189, 1000)
    assert [config.chunk_seconds(n, 2) for n in running] == pytest.approx([0.01, 0.01, 0.02, 0.06, 0.06, 0.09, 0.12])
    assert [config.chunk_seconds(8 * n, 16) for n in running] == [config.chunk_seconds(n, 2) for n in running]
    assert EngineConfig(chunk_milliseconds=0).chunk_seconds(50, 2) == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("device", "tpu"), ("device", "cuda:0,"), ("device", "auto,cpu"), ("memory_budget", "8 parsecs"),
        ("memory_budget", "-1GB"), ("dtype", "int8"), ("kv_dtype", "float32"),
        ("max_sequences", "0"), ("max_sequences", "1.5"), ("threads", "-1"),
        ("max_seconds", "nan"), ("max_seconds", "inf"), ("queue_seconds", "soon"), ("block_tokens", "0"),
        ("kv_memory_share", "0"), ("kv_memory_share", "1.5"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_refused_with_its_name(name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.pbtxt parameter {name} must be .*{text!r}"):
        EngineConfig.from_strings({name: text}, {})
    variable = f"TRITONLM_{name.upper()}"
    with pytest.raises(CheckpointError, match=f"{variable} must be"):
        EngineConfig.from_strings({}, {variable: text})


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1024", 1024), ("8GiB", 8 << 30), ("1.5 GB", 1_500_000_000), ("2KiB", 2048), ("7B", 7)],
)
def test_a_size_has_a_unit(text: str, size: int) -> None:
    assert EngineConfig.from_strings({}, {"TRITONLM_MEMORY_BUDGET": text}).memory_budget == size


def test_devices_are_a_list_or_all_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(setting: str) -> list[str]:
        return [str(device) for device in choose_devices(setting)]

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert names("auto") == names("cpu") == ["cpu"]
    for missing in ("cuda", "cuda:0", "cpu,cuda:1"):
        with pytest.raises(CheckpointError, match="torch finds 0 CUDA devices"):
            choose_devices(missing)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert names("auto") == names("cuda") == names("cuda:0,cuda:1") == ["cuda:0", "cuda:1"]
    assert names("cuda:1") == ["cuda:1"]
    with pytest.raises(CheckpointError, match="device cuda:2 is configured"):
        choose_devices("cuda:2")
