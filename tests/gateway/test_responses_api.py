"""The Responses API with OpenAI's SDK: texts, streams, stored responses, and what is refused or left out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes.fake_transport import CONTEXT, LM, FakeTransport
from tritonlm.contract import EngineFailure, ModelNotFound
from tritonlm.gateway.response_store import ResponseStore

from .conftest import Gateway, running_gateway

A_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "Hello"}, {"type": "input_text", "text": "there"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "opaque"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi", "annotations": []}]},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def storing(tmp_path: Path) -> Iterator[Gateway]:
    with running_gateway(response_store=tmp_path / "responses.sqlite") as running:
        yield running


def sdk_of(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0)


def sent_messages(gateway: Gateway) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = json.loads(gateway.transport.calls[-1].prompt.messages or "")
    return messages


def test_a_text_is_one_message(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(
        model=LM, input="Once upon", instructions="Tell a story.", max_output_tokens=9, temperature=0.5,
        metadata={"run": "7"}, extra_body={"seed": 1},
    )  # fmt: skip
    (message,) = response.output
    assert (message.type, message.status) == ("message", "incomplete")
    assert response.output_text == message.content[0].text != ""  # type: ignore[union-attr]
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 9
    assert (response.temperature, response.metadata, response.instructions) == (0.5, {"run": "7"}, "Tell a story.")
    assert response.id.startswith("resp_")


def test_items_become_the_messages_of_a_chat(gateway: Gateway, sdk: openai.OpenAI) -> None:
    sdk.responses.create(model=LM, input=MESSAGES, instructions="You are a fox.", extra_body={"top_k": 5})  # type: ignore[arg-type]
    assert sent_messages(gateway) == [
        {"role": "system", "content": "You are a fox.\n\nBe brief."},
        {"role": "user", "content": "Hello\nthere"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    assert gateway.transport.calls[-1].parameters["top_k"] == 5


def test_a_stream_has_the_events_of_the_sdk_in_order(sdk: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": LM, "input": "Once", "max_output_tokens": 12, "extra_body": {"seed": 3}}
    whole = sdk.responses.create(**arguments)
    events: list[Any] = list(sdk.responses.create(**arguments, stream=True))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas), "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len(deltas) > 1
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1


def test_the_stream_helper_builds_the_same_response(sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(model=LM, input="Once", extra_body={"seed": 3, "stop": "."}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert (final.status, final.output_text) == ("completed", text)
    assert final.output[0].content[0].parsed is None  # type: ignore[union-attr]


def test_log_probabilities_are_included_on_request(sdk: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": LM, "input": "Once", "max_output_tokens": 5, "include": ["message.output_text.logprobs"],
        "top_logprobs": 2, "extra_body": {"seed": 1},
    }  # fmt: skip
    part: Any = sdk.responses.create(**arguments).output[0]
    logprobs = part.content[0].logprobs
    assert len(logprobs) == 5
    assert len(logprobs[0].top_logprobs) == 2
    done = [e for e in sdk.responses.create(**arguments, stream=True) if e.type == "response.output_text.done"]
    assert [entry.token for entry in done[0].logprobs] == [entry.token for entry in logprobs]


def test_a_failure_in_a_stream_is_a_failed_response(gateway: Gateway, sdk: openai.OpenAI) -> None:
    gateway.transport.breaks_after = (1, EngineFailure("a step failed"))
    events: list[Any] = list(sdk.responses.create(model=LM, input="Once", stream=True))
    assert events[-1].type == "response.failed"
    assert (events[-1].response.status, events[-1].response.error.message) == ("failed", "a step failed")
    assert events[-1].response.error.code == "server_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "half"}, "truncation"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"input": [{**A_CALL, "arguments": "[]"}]}, "input[0].arguments"),
        ({"input": [{"role": "user", "content": "x"}, {**A_CALL, "arguments": "{"}]}, "input[1].arguments"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"frequency_penalty": 5}, "frequency_penalty"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_change_the_answer_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    answer = gateway.post("/v1/responses", **{"model": LM, "input": "a", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert gateway.transport.calls == []


def test_fields_without_an_effect_are_accepted(gateway: Gateway) -> None:
    answer = gateway.post(
        "/v1/responses", model=LM, input="a", store=False, parallel_tool_calls=True, truncation="disabled",
        include=["reasoning.encrypted_content"], prompt_cache_key="k", service_tier="flex", background=False,
        prompt_cache_options={"mode": "implicit"}, max_tool_calls=3, user="u", safety_identifier="s",
        text={"verbosity": "low", "format": {"type": "text", "name": None}}, tool_choice="auto",
        reasoning={"effort": "low", "summary": "auto"},
        tools=[{"type": "web_search", "search_context_size": "low"}, {"type": "mcp", "server_label": "x"}],
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [warning.split()[0] for warning in body["warnings"]] == [
        "tools[0]:", "tools[1]:", "text.verbosity", "reasoning.effort", "reasoning.summary",
    ]  # fmt: skip
    assert "hosted tool web_search" in answer.headers["x-tritonlm-ignored"]
    assert gateway.transport.calls[-1].parameters["priority"] == 3
    assert "tools" not in gateway.transport.calls[-1].parameters


def test_errors_of_the_model_have_the_names_of_this_api(gateway: Gateway, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.responses.create(model=LM, input="a", max_output_tokens=CONTEXT + 1)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(model="nope", input="a")
    gateway.transport.has_chats = False
    with pytest.raises(openai.InternalServerError, match="no chat template"):
        sdk.responses.create(model=LM, input="a")
    with pytest.raises(openai.InternalServerError, match="response-store"):
        sdk.responses.retrieve("resp_1")


def test_a_prompt_is_counted(sdk: openai.OpenAI) -> None:
    assert sdk.responses.input_tokens.count(model=LM, input="four").input_tokens == len("four\nassistant:")


def test_a_stored_response_is_continued_read_and_deleted(storing: Gateway) -> None:
    with sdk_of(storing) as sdk:
        first = sdk.responses.create(model=LM, input="One", instructions="Count.", extra_body={"seed": 1})
        second: Any = list(sdk.responses.create(model=LM, input="Two", previous_response_id=first.id, stream=True))
        second_id = second[0].response.id
        sdk.responses.create(model=LM, input="Three", previous_response_id=second_id, store=False)
        messages = sent_messages(storing)
        # Instructions are not carried over.
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
        assert [m["content"] for m in messages[::2]] == ["One", "Two", "Three"]
        assert messages[1]["content"] == first.output_text
        assert sdk.responses.retrieve(first.id).output_text == first.output_text
        with pytest.raises(openai.BadRequestError, match="stream"):
            sdk.responses.retrieve(first.id, stream=True)
        assert [item.content for item in sdk.responses.input_items.list(second_id)] == ["Two"]  # type: ignore[union-attr]
        sdk.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            sdk.responses.create(model=LM, input="Four", previous_response_id=second_id)


def test_input_items_are_read_page_by_page_also_if_their_ids_are_null(storing: Gateway) -> None:
    sent = [{"role": "user", "content": str(number), "id": None} for number in range(5)]
    response = storing.post("/v1/responses", model=LM, input=sent, max_output_tokens=1).json()
    with sdk_of(storing) as sdk:
        pages = sdk.responses.input_items.list(response["id"], order="asc", limit=2)
        read: list[Any] = list(pages)
    assert [(item.id, item.content) for item in read] == [(f"item_{number}", str(number)) for number in range(5)]


def test_a_failed_or_abandoned_response_is_not_stored(tmp_path: Path) -> None:
    transport = FakeTransport()
    with running_gateway(transport, response_store=tmp_path / "r.sqlite") as gateway, sdk_of(gateway) as sdk:
        transport.breaks_after = (1, EngineFailure("a step failed"))
        events: list[Any] = list(sdk.responses.create(model=LM, input="Once", stream=True))
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(events[0].response.id)


def test_the_store_keeps_owners_apart_and_expires(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "r.sqlite", days=1, max_bytes=2**20)
    response = {"id": "a", "previous_response_id": None, "output": []}
    store.put("alice", [], response)
    assert store.get("alice", "a").response == response
    for owner, name in (("bob", "a"), ("alice", "b")):
        with pytest.raises(ModelNotFound, match="no stored response"):
            store.get(owner, name)
    expiring = ResponseStore(tmp_path / "r.sqlite", days=1e-9, max_bytes=2**20)
    time.sleep(0.001)
    with pytest.raises(ModelNotFound, match="no stored response"):
        expiring.get("alice", "a")


def test_the_oldest_responses_make_room(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "r.sqlite", days=1, max_bytes=10_000)
    for number in range(30):
        store.put("", [{"text": "x" * 1000}], {"id": str(number), "previous_response_id": None, "output": []})
    assert store.get("", "29").items
    with pytest.raises(ModelNotFound, match="no stored response"):
        store.get("", "0")


def turns(*texts: str) -> list[dict[str, Any]]:
    """Messages of the user, each with an answer but the last."""
    items = [{"role": role, "content": text} for text in texts for role in ("user", "assistant")]
    return items[:-1]


def kept(gateway: Gateway, items: list[dict[str, Any]], **fields: Any) -> tuple[list[str], list[str]]:
    """The contents of the messages that the model got, and the warnings."""
    answer = gateway.post("/v1/responses", model=LM, input=items, truncation="auto", **fields).json()
    assert answer.get("truncation") == "auto", answer
    return [message["content"] for message in sent_messages(gateway)], answer["warnings"]


LONG = "x" * 200


def test_truncation_leaves_out_the_oldest_items_until_the_prompt_fits(gateway: Gateway) -> None:
    # The fake counts a token for each byte of the messages and of the prompt's end.
    items = [{"role": "developer", "content": "Be brief."}, *turns(f"a{LONG}", f"b{LONG}", "c")]
    contents, warnings = kept(gateway, items, instructions="Rule.", max_output_tokens=10)
    assert contents == ["Rule.\n\nBe brief.", f"b{LONG}", f"b{LONG}", "c"]
    assert warnings == ["truncation: 2 of 6 items are left out, the oldest ones"]
    # As few as needed: with less room for the answer all but the last message fits no more.
    assert kept(gateway, items, max_output_tokens=400)[0] == ["Be brief.", "c"]
    whole = [{"role": "user", "content": "short"}]
    assert kept(gateway, whole) == (["short"], [])


def test_truncation_keeps_calls_and_their_outputs_together(gateway: Gateway) -> None:
    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"}

    def output(name: str) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": name, "output": f"{name}{LONG}"}

    items = [*turns("old", "task"), call("1"), call("2"), output("1"), output("2"), call("3"), output("3")]
    contents, warnings = kept(gateway, items)
    assert contents == ["task", "", f"3{LONG}"]
    assert warnings == ["truncation: 6 of 9 items are left out, the oldest ones"]
    # A message between a call and its output is no place to cut.
    between = [*turns(LONG, "task"), call("1"), {"role": "user", "content": "Hurry"}, output("1")]
    assert kept(gateway, between)[0] == ["task", "", "Hurry", f"1{LONG}"]
    # What cannot be shortened any further is refused as without truncation, and nothing is dropped silently.
    counted = gateway.post("/v1/responses/input_tokens", model=LM, input=items, truncation="auto").json()
    assert 200 < counted["input_tokens"] <= CONTEXT


def test_truncation_is_off_by_default_and_refuses_what_never_fits(gateway: Gateway, sdk: openai.OpenAI) -> None:
    items: Any = turns(f"a{LONG}", f"b{LONG}", "c")
    assert sdk.responses.create(model=LM, input=items).truncation == "disabled"
    assert len(sent_messages(gateway)) == 5
    gateway.post("/v1/responses", model=LM, input=items, truncation="auto", max_output_tokens=CONTEXT)
    assert [message["content"] for message in sent_messages(gateway)] == ["c"]
    assert (
        gateway.post("/v1/responses", model=LM, input="a", truncation="half").json()["error"]["param"] == "truncation"
    )


def test_truncation_reaches_into_stored_responses(storing: Gateway) -> None:
    sdk = sdk_of(storing)
    first = sdk.responses.create(model=LM, input=LONG * 2, max_output_tokens=5)
    second = sdk.responses.create(
        model=LM, input=LONG, previous_response_id=first.id, truncation="auto", max_output_tokens=5
    )
    assert [message["content"] for message in sent_messages(storing)] == [LONG]
    # The request's own items are stored, whole.
    assert len(sdk.responses.input_items.list(second.id).data) == 1
