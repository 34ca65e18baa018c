"""Errors keep their class, message and parameter through Triton, which carries text only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonlm.contract import (
    Broken,
    CheckpointError,
    ContextLengthExceeded,
    Draining,
    InsufficientScope,
    InvalidRequest,
    NotLoaded,
    QueueFull,
    QueueTimeout,
    TimedOut,
    TritonLMError,
    Unavailable,
)
from tritonlm.contract.errors import ERRORS, from_wire

PREFIXES = ("", "in ensemble 'tiny', ", "[request id: r2] ", "in ensemble 'my-lm', [request id: <id_unknown>] ")
# Lone surrogates are replaced before they leave the process.
printable = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.sampled_from([TritonLMError, *ERRORS]), printable, st.none() | printable.filter(bool), st.sampled_from(PREFIXES)
)
def test_errors_survive_the_wire(kind: type[TritonLMError], message: str, param: str | None, prefix: str) -> None:
    sentence = "Sorry: " + message
    received = from_wire(prefix + kind(sentence, param).to_wire())
    assert (type(received), received.message, received.param) == (kind, sentence, param)


def test_each_error_has_a_unique_code() -> None:
    assert len({error.code for error in ERRORS}) == len(ERRORS)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Exceeds maximum queue size", QueueFull),
        ("Request timeout expired", QueueTimeout),
        ("", TritonLMError),
    ],
)
def test_tritons_own_errors_are_classified(prefix: str, text: str, kind: type[TritonLMError]) -> None:
    received = from_wire(prefix + text)
    assert type(received) is kind
    assert received.message == text


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("process", "name"), [("generate_0_0", "generate"), ("my_lm-tokenize_0_1", "my_lm-tokenize")])
def test_a_dead_process_is_named_by_its_model(prefix: str, process: str, name: str) -> None:
    received = from_wire(f"{prefix}Stub process '{process}' is not healthy.")
    assert type(received) is Broken
    assert f"the process of '{name}' has died" in received.message
    assert type(from_wire(f"{prefix}Internal error from Core")) is Broken


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", Draining),
        ("Server is stopping to serve requests.", Draining),
        ("Server not ready", Unavailable),
        ("requested model version is not available for model 'my-lm'", NotLoaded),
        ("requested model 'my-lm' is not available", NotLoaded),
    ],
)
def test_errors_of_a_stopping_triton_can_be_retried(prefix: str, text: str, kind: type[TritonLMError]) -> None:
    """Nothing was computed, so the call can be retried on another Triton."""
    assert type(from_wire(prefix + text)) is kind


def test_restricted_calls_raise_insufficient_scope() -> None:
    text = "This protocol is restricted, expecting header 'triton-grpc-protocol-tritonlm-control'"
    assert type(from_wire(text)) is InsufficientScope


def test_a_request_that_reached_its_time_limit_in_the_engine_is_not_to_be_sent_again() -> None:
    assert from_wire(TimedOut.of_request().to_wire()).headers == {"x-should-retry": "false"}


def test_an_unknown_code_is_an_internal_error() -> None:
    received = from_wire("Something new. [code=from_the_future param=x]")
    assert (type(received), received.message, received.param) == (TritonLMError, "Something new.", "x")


def test_a_lone_surrogate_in_a_name_is_replaced() -> None:
    assert from_wire(InvalidRequest("Sorry", "\ud800").to_wire()).param == "?"


def test_the_context_length_message_is_openais() -> None:
    error = ContextLengthExceeded.for_lengths(512, 500, 20)
    assert error.message == (
        "This model's maximum context length is 512 tokens, however you requested 520 tokens (500 in your prompt; "
        "20 for the completion). Please reduce your prompt; or completion length."
    )
    assert (error.http_status, error.code) == (400, "context_length_exceeded")


def test_a_load_error_is_reported_without_its_traceback() -> None:
    text = (
        "load failed for model 'lm': ensemble 'lm' depends on 'lm-generate' which has no loaded version. Model "
        "'lm-generate' loading failed with error: version 1 is at UNAVAILABLE state: Internal: CheckpointError: "
        "checkpoint /x has no config.json\n\nAt:\n  /a/secret/path.py(3): f\n;\n"
    )
    error = from_wire(text)
    assert (type(error), error.message) == (CheckpointError, "checkpoint /x has no config.json")
