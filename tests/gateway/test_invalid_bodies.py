"""Invalid bodies: few errors for any number of mistakes, and one that names the field and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_transport import LM, FakeTransport
from fastapi.routing import APIRoute
from pydantic import ValidationError
from tritonlm import AsyncClient
from tritonlm.client.request_fields import MAX_MODEL_NAME, Body
from tritonlm.client.responses_api.schemas import ResponseRequest
from tritonlm.gateway.app import create_app
from tritonlm.gateway.history import History
from tritonlm.gateway.http.schemas import CompletionRequest, TokenizeRequest
from tritonlm.gateway.settings import GatewaySettings

from .conftest import Gateway, running_gateway

MANY, FEW = 2000, 40


def bodies() -> dict[str, type[Body]]:
    """The type of each route's body."""
    routes = create_app(AsyncClient(transports=[FakeTransport()]), GatewaySettings()).routes
    fields = [(route.path, route.body_field) for route in routes if isinstance(route, APIRoute)]
    kinds = {path: field.field_info.annotation for path, field in fields if field is not None}
    return {path: kind for path, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Body)}


def lists_of(schema: Any) -> Iterator[dict[str, Any]]:
    """The lists in a schema of pydantic's core."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        schema = list(schema.values())
    if isinstance(schema, (list, tuple)):
        for part in schema:
            yield from lists_of(part)


def test_every_list_of_a_body_is_refused_at_its_first_wrong_item() -> None:
    found = {path: list(lists_of(kind.__pydantic_core_schema__)) for path, kind in bodies().items()}
    assert found["/v1/completions"]
    assert [path for path, lists in found.items() if not all(schema.get("fail_fast") for schema in lists)] == []


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (CompletionRequest, {"prompt": [1.5] * MANY}),
        (CompletionRequest, {"prompt": [[1.5] * MANY] * 2}),
        (CompletionRequest, {"prompt": "a", "stream_options": {f"x{i}": 1 for i in range(MANY)}}),
        (TokenizeRequest, {"prompt": "a", **{f"x{i}": 1 for i in range(MANY)}}),
        (ResponseRequest, {"input": "a", "metadata": {f"x{i}": 1 for i in range(MANY)}}),
    ],
)
def test_any_number_of_mistakes_makes_few_errors(kind: type[Body], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate({"model": LM, **wrong})
    assert raised.value.error_count() < FEW


def test_a_long_invalid_prompt_is_refused_by_name(gateway: Gateway) -> None:
    response = gateway.post("/v1/completions", model=LM, prompt=[1.5] * MANY)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", "/completions", "/tokenize"])
def test_a_models_name_has_a_bounded_length(gateway: Gateway, path: str) -> None:
    response = gateway.post(path, model="x" * (MAX_MODEL_NAME + 1), prompt="a", input="a")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_the_history_keeps_short_names() -> None:
    history = History()
    history.begin("a", "x" * 10_000)
    entry = history.get("a")
    assert entry is not None
    assert len(entry.model) == MAX_MODEL_NAME


# JSON can hold half of a surrogate pair, which is no character and has no UTF-8.
SURROGATE = "\ud800"
WITH_SURROGATES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": SURROGATE}, "prompt"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {SURROGATE: 1}}, "structured_outputs"),
    ("/v1/completions", {"prompt": "a", SURROGATE: 1}, "body"),
    ("/v1/responses", {"input": "a", "stream": True, "tools": [{"type": SURROGATE}]}, "tools"),
    ("/v1/messages", {"messages": [{"role": "user", "content": SURROGATE}], "max_tokens": 1}, "messages"),
    ("/v1/decisions", {"input": "a", "questions": [{"type": "predicate", "name": SURROGATE}]}, "questions"),
    ("/v1/batches", {"input_file_id": SURROGATE}, "input_file_id"),
]


@pytest.mark.parametrize(("path", "body", "param"), WITH_SURROGATES, ids=[row[0] for row in WITH_SURROGATES])
def test_unpaired_surrogates_are_refused_by_name(gateway: Gateway, path: str, body: dict[str, Any], param: str) -> None:
    content = json.dumps(body if path == "/v1/batches" else {"model": LM, **body})
    response = gateway.http.post(path, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert "surrogate" in error["message"]
    assert not gateway.transport.calls


@pytest.mark.parametrize("seconds", ["9" * 5000, "-1", "", "x"])
def test_a_files_life_is_a_number_in_its_range(tmp_path: Path, seconds: str) -> None:
    data = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
    with running_gateway(batch_folder=tmp_path) as gateway:
        response = gateway.http.post("/v1/files", files={"file": ("in.jsonl", b"{}")}, data=data)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "expires_after[seconds]")


CHAT = {"messages": [{"role": "user", "content": "x"}], "stream": True}
NESTED: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/chat/completions", {**CHAT, "stream_options": {"x": 1}}, "stream_options.x", "unknown parameter"),
    (
        "/v1/chat/completions",
        {**CHAT, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "False",
    ),
    ("/v1/responses", {"input": "a", "reasoning": {"effort": "low", "budget": 1}}, "reasoning.budget", "unknown"),
    ("/v1/messages", {**CHAT, "max_tokens": 1, "metadata": {"user_id": "a", "x": 1}}, "metadata.x", "unknown"),
    ("/v1/messages", {**CHAT, "max_tokens": 1, "cache_control": {"ttl": "5m"}}, "cache_control.type", "is required"),
    ("/v1/messages", {**CHAT, "max_tokens": 1, "stop_sequences": ["a", 1]}, "stop_sequences[1]", "valid string"),
    ("/v1/rerank", {"query": "a", "documents": ["a", 5]}, "documents[1]", "valid string"),
    ("/v1/completions", {"prompt": "a", "max-tokens": 1}, "max-tokens", "unknown parameter"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), NESTED, ids=[row[2] for row in NESTED])
def test_an_error_names_the_nested_field(
    gateway: Gateway, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    response = gateway.post(path, model=LM, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert param in error["message"]
    assert message in error["message"]


@pytest.mark.parametrize("sent", [False, None])
def test_declining_obfuscation_is_accepted(gateway: Gateway, sent: bool | None) -> None:
    options = {"include_usage": True, "include_obfuscation": sent}
    response = gateway.post("/v1/chat/completions", model=LM, **CHAT, stream_options=options)
    assert response.status_code == 200
    assert '"total_tokens"' in response.text
