"""The settings of `tritonlm serve`: precedence of options, variables and defaults, and error messages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings
from tritonlm import cli
from tritonlm.gateway.settings import GatewaySettings
from tritonlm.serving import ServingError, Settings, read_settings
from tritonlm.serving.settings import env_name, option_name


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(env_name(name), raising=False)


def test_options_override_variables_and_variables_override_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_HTTP_PORT", "9000")
    monkeypatch.setenv("TRITONLM_GRPC_PORT", "9001")
    monkeypatch.setenv("TRITONLM_DTYPE", "")
    settings = read_settings({"http_port": "9100", "grpc_port": None})
    assert (settings.http_port, settings.grpc_port, settings.metrics_port, settings.dtype) == (9100, 9001, 8002, "auto")


def test_lists_are_repeated_as_options_and_separated_by_commas_as_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_LOAD", "abacus, fable")
    assert read_settings({}).load == ["abacus", "fable"]
    settings = read_settings({"load": ["a", "b"], "model_repository": [Path("x"), Path("y")]})
    assert (settings.load, settings.model_repository) == (["a", "b"], [Path("x"), Path("y")])


@pytest.mark.parametrize(("command", "settings"), [(cli.serve, Settings), (cli.run_gateway, GatewaySettings)])
def test_each_setting_is_an_option_of_its_command(command: Callable[..., None], settings: type[BaseSettings]) -> None:
    assert set(settings.model_fields) <= set(inspect.signature(command).parameters)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("http_port", "http"), ("grpc_port", "70000"), ("device", "tpu"), ("dtype", "int4"),
        ("kv_dtype", "int4"), ("max_sequences", "0"),
        ("kv_cache_tokens", "many"), ("drain_seconds", "-1"), ("load_seconds", "0"), ("log_level", "loud"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_a_one_line_error_with_option_and_variable(
    field: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env_name(field), value)
    for options in ({field: value}, {}):
        with pytest.raises(ServingError) as error:
            read_settings(dict(options))
        message = str(error.value)
        assert "\n" not in message
        for part in (option_name(field), env_name(field), repr(value)):
            assert part in message


def test_equal_ports_are_refused() -> None:
    with pytest.raises(ServingError, match="different ports"):
        read_settings({"http_port": "9000", "grpc_port": "9000"})


def test_the_engine_environment_holds_only_explicit_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({}).engine_environment() == {}
    monkeypatch.setenv("TRITONLM_KV_CACHE_TOKENS", "4096")
    assert read_settings({"device": "cpu", "kv_dtype": "int8"}).engine_environment() == {
        "TRITONLM_DEVICE": "cpu",
        "TRITONLM_KV_DTYPE": "int8",
        "TRITONLM_KV_CACHE_TOKENS": "4096",
    }
