"""The settings of `tritonlm serve`: where a value comes from, and errors that name it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tritonlm.serving import ServingError, Settings, read_settings
from tritonlm.serving.settings import env_name, option_name


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(env_name(name), raising=False)


def test_an_option_wins_over_its_variable_and_a_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_HTTP_PORT", "9000")
    monkeypatch.setenv("TRITONLM_GRPC_PORT", "9001")
    monkeypatch.setenv("TRITONLM_DTYPE", "")
    read = read_settings({"http_port": "9100", "grpc_port": None})
    assert (read.http_port, read.grpc_port, read.metrics_port, read.dtype) == (9100, 9001, 8002, "auto")


def test_lists_are_repeated_as_options_and_separated_by_commas_as_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_LOAD", "abacus, fable")
    assert read_settings({}).load == ["abacus", "fable"]
    read = read_settings({"load": ["a", "b"], "model_repository": [Path("x"), Path("y")]})
    assert (read.load, read.model_repository) == (["a", "b"], [Path("x"), Path("y")])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("http_port", "http"), ("grpc_port", "70000"), ("device", "tpu"), ("dtype", "int4"), ("max_sequences", "0"),
        ("kv_cache_tokens", "many"), ("drain_seconds", "-1"), ("load_seconds", "0"), ("log_level", "loud"),
    ],
)  # fmt: skip
def test_a_bad_value_is_told_in_one_line_with_its_option_and_variable(
    field: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env_name(field), value)
    for given in ({field: value}, {}):
        with pytest.raises(ServingError) as refusal:
            read_settings(dict(given))
        message = str(refusal.value)
        assert "\n" not in message
        for part in (option_name(field), env_name(field), repr(value)):
            assert part in message


def test_one_port_for_two_doors_is_refused() -> None:
    with pytest.raises(ServingError, match="different ports"):
        read_settings({"http_port": "9000", "grpc_port": "9000"})


def test_the_engine_is_told_only_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({}).engine_environment() == {}
    monkeypatch.setenv("TRITONLM_KV_CACHE_TOKENS", "4096")
    assert read_settings({"device": "cpu"}).engine_environment() == {
        "TRITONLM_DEVICE": "cpu",
        "TRITONLM_KV_CACHE_TOKENS": "4096",
    }
