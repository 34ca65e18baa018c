"""Adapters over HTTP: added and removed while the gateway serves, listed, and called by name on every route."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.adapter_folders import adapter_folder
from fakes.fake_transport import LM
from tritonlm.access.keys import KeyFile, Limits
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter, read_adapters

from .conftest import Gateway, running_gateway

CHAT = [{"role": "user", "content": "x"}]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with running_gateway(adapters_folder=tmp_path / "adapters") as running:
        running.transport.adapters_file = tmp_path / "adapters" / f"{LM}.json"
        yield running


@pytest.fixture
def pirate(gateway: Gateway, tmp_path: Path) -> Path:
    folder = adapter_folder(tmp_path / "pirate")
    answer = gateway.post("/v1/load_lora_adapter", lora_name="pirate", lora_path=str(folder))
    assert answer.status_code == 200, answer.text
    gateway.transport.calls.clear()
    return folder


def error_of(answer: Any) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def test_an_adapter_is_added_tried_listed_and_removed(gateway: Gateway, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "pirate")
    answer = gateway.post("/v1/load_lora_adapter", lora_name="pirate", lora_path=str(folder), base_model=LM)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'pirate' added successfully.")
    (trial,) = gateway.transport.calls
    assert (trial.model, trial.parameters["max_tokens"]) == (LM, 1)
    assert trial.parameters["adapter"].startswith("trial-")
    listed = {model["id"]: model for model in gateway.http.get("/v1/models").json()["data"]}
    assert (listed["pirate"]["parent"], listed["pirate"]["root"]) == (LM, str(folder))
    assert (listed[LM]["parent"], listed[LM]["root"]) == (None, None)
    assert gateway.http.get("/v1/models/pirate").json() == listed["pirate"]
    answer = gateway.post("/v1/unload_lora_adapter", lora_name="pirate")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'pirate' removed successfully.")
    assert [model["id"] for model in gateway.http.get("/v1/models").json()["data"]] == [LM]
    assert gateway.http.get("/v1/models/pirate").status_code == 404
    assert folder.is_dir()


ROUTES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/chat/completions", {"messages": CHAT}),
    ("/v1/responses", {"input": "x"}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 8}),
    ("/v1/embeddings", {"input": "x"}),
    ("/v1/score", {"text_1": "x", "text_2": "y"}),
    ("/v1/rerank", {"query": "x", "documents": ["y"]}),
    ("/v1/decisions", {"input": "x", "questions": [{"type": "predicate", "instructions": "y"}]}),
)


@pytest.mark.usefixtures("pirate")
def test_every_route_that_computes_takes_an_adapter_as_its_model(gateway: Gateway) -> None:
    for route, body in ROUTES:
        for name in ("pirate", f"{LM}:pirate"):
            answer = gateway.post(route, model=name, **body)
            assert answer.status_code == 200, (route, answer.text)
            assert answer.json()["model"] == name
            calls = [(call.model, call.parameters["adapter"]) for call in gateway.transport.calls]
            assert set(calls) == {(LM, "pirate")}, route
            gateway.transport.calls.clear()


@pytest.mark.usefixtures("pirate")
def test_the_routes_that_generate_pass_the_cache_salt_on(gateway: Gateway) -> None:
    for route, body in ROUTES[:4]:
        assert gateway.post(route, model="pirate", cache_salt=route, **body).status_code == 200
    assert [call.parameters["cache_salt"] for call in gateway.transport.calls] == [route for route, _ in ROUTES[:4]]


@pytest.mark.usefixtures("pirate")
def test_metrics_have_the_adapter_by_its_name_however_it_was_called(gateway: Gateway) -> None:
    def count(name: str) -> float:
        lines = gateway.http.get("/metrics").text.splitlines()
        label = f'tritonlm_requests_total{{model="{name}",route="/v1/completions",status="200"}}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(label))

    before = count("pirate")
    for name in ("pirate", f"{LM}:pirate"):
        assert gateway.post("/v1/completions", model=name, prompt="x").status_code == 200
    assert count("pirate") == before + 2
    assert count(f"{LM}:pirate") == 0


def test_an_unknown_adapter_gets_a_404_at_once(gateway: Gateway) -> None:
    answer = gateway.post("/v1/completions", model=f"{LM}:ghost", prompt="x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
    assert gateway.post("/v1/completions", model="ghost", prompt="x").json()["error"]["code"] == "model_not_found"
    assert gateway.transport.loads == 0


@pytest.mark.usefixtures("pirate")
def test_an_adapter_of_a_model_that_is_not_loaded_loads_its_model(gateway: Gateway) -> None:
    gateway.transport.loaded = False
    assert gateway.http.get("/v1/models/pirate").json()["state"] == "unavailable"
    assert gateway.post("/v1/completions", model="pirate", prompt="x").status_code == 200
    assert gateway.transport.loads == 1


def test_without_a_loaded_model_an_adapter_is_added_untried(gateway: Gateway, tmp_path: Path) -> None:
    gateway.transport.loaded = False
    folder = adapter_folder(tmp_path / "pirate")
    body = {"lora_name": "pirate", "lora_path": str(folder), "base_model": LM}
    assert gateway.post("/v1/load_lora_adapter", **body).status_code == 200
    assert gateway.transport.calls == []
    assert list(read_adapters(tmp_path / "adapters" / f"{LM}.json")) == ["pirate"]


def test_a_second_adapter_of_the_name_is_refused_or_replaces_it(gateway: Gateway, pirate: Path, tmp_path: Path) -> None:
    other = adapter_folder(tmp_path / "other")
    body = {"lora_name": "pirate", "lora_path": str(other)}
    status, param, message = error_of(gateway.post("/v1/load_lora_adapter", **body))
    assert (status, param) == (400, "lora_name")
    assert "load_inplace: true" in message
    assert gateway.http.get("/v1/models/pirate").json()["root"] == str(pirate)
    assert gateway.post("/v1/load_lora_adapter", **body, load_inplace=True).status_code == 200
    assert gateway.http.get("/v1/models/pirate").json()["root"] == str(other)


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_what_was_there(
    gateway: Gateway, pirate: Path, tmp_path: Path
) -> None:
    wrong = adapter_folder(tmp_path / "wrong")
    (wrong / "broken").touch()
    for name in ("pirate", "sonnet"):
        answer = gateway.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(wrong), load_inplace=True)
        problem = f"lora_path: adapter '{name}': lora_A of x has 3 inputs, not 4"
        assert error_of(answer) == (400, "lora_path", problem)
    assert read_adapters(tmp_path / "adapters" / f"{LM}.json") == {"pirate": AdapterEntry(str(pirate))}


REFUSED: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({}, "lora_name", "lora_name is required"),
    ({"lora_name": "a/b", "lora_path": "/x"}, "lora_name", "lora_name must be 1 to 64 letters"),
    ({"lora_name": "a", "lora_path": "/x", "base_model": "ghost"}, "base_model", "'ghost' does not exist"),
    ({"lora_name": "a", "lora_path": "/none/x"}, "lora_path", "there is no folder"),
    ({"lora_name": "a", "lora_path": "/"}, "lora_path", "has no adapter_config.json"),
    ({"lora_name": LM, "lora_path": "/x"}, "lora_name", "is a language model already"),
    ({"lora_name": "a", "lora_path": "/x", "weight": 2}, "weight", "unknown parameter 'weight'"),
)


@pytest.mark.usefixtures("pirate")
def test_what_cannot_be_added_is_named(gateway: Gateway) -> None:
    for body, field, problem in REFUSED:
        status, param, message = error_of(gateway.post("/v1/load_lora_adapter", **body))
        assert (status, param) == (404 if field == "base_model" else 400, field)
        assert problem in message


def test_an_engine_that_does_not_follow_the_folder_is_named_with_the_remedy(gateway: Gateway, tmp_path: Path) -> None:
    gateway.transport.adapters_file = None
    folder = adapter_folder(tmp_path / "pirate")
    answer = gateway.post("/v1/load_lora_adapter", lora_name="pirate", lora_path=str(folder))
    assert answer.status_code == 501
    assert "start its Triton with TRITONLM_ADAPTERS_FILE set to this folder" in error_of(answer)[2]
    assert read_adapters(tmp_path / "adapters" / f"{LM}.json") == {}


def test_a_name_of_another_models_adapter_is_refused(gateway: Gateway, tmp_path: Path) -> None:
    add_adapter(tmp_path / "adapters" / "other.json", "poet", AdapterEntry("/poet"))
    answer = gateway.post("/v1/load_lora_adapter", lora_name="poet", lora_path=str(adapter_folder(tmp_path / "poet")))
    assert error_of(answer) == (
        400,
        "lora_name",
        "lora_name: 'poet' is an adapter of other already; choose another name",
    )


@pytest.mark.usefixtures("pirate")
def test_removing_what_is_not_there_names_what_is(gateway: Gateway, tmp_path: Path) -> None:
    answer = gateway.post("/v1/unload_lora_adapter", lora_name="ghost")
    assert answer.status_code == 404
    assert "it has pirate" in error_of(answer)[2]
    add_adapter(tmp_path / "adapters" / "other.json", "pirate", AdapterEntry("/pirate"))
    assert error_of(gateway.post("/v1/unload_lora_adapter", lora_name="pirate"))[1] == "base_model"
    assert gateway.post("/v1/unload_lora_adapter", lora_name="pirate", base_model="other").status_code == 200
    assert read_adapters(tmp_path / "adapters" / "other.json") == {}


def test_only_admin_keys_change_adapters(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    infer, admin = keys.create("i", ["infer"], Limits()), keys.create("a", ["infer", "admin"], Limits())
    body = {"lora_name": "pirate", "lora_path": str(adapter_folder(tmp_path / "pirate"))}
    with running_gateway(adapters_folder=tmp_path / "adapters", keys=keys.path) as gateway:
        gateway.transport.adapters_file = tmp_path / "adapters" / f"{LM}.json"

        def status(route: str, key: str) -> int:
            return gateway.http.post(route, json=body, headers={"Authorization": f"Bearer {key}"}).status_code

        assert status("/v1/load_lora_adapter", infer) == 403
        assert status("/v1/load_lora_adapter", admin) == 200
        body.pop("lora_path")
        assert status("/v1/unload_lora_adapter", infer) == 403
        assert status("/v1/unload_lora_adapter", admin) == 200


def test_a_gateway_without_the_folder_offers_no_change_and_still_passes_full_names_on(tmp_path: Path) -> None:
    with running_gateway() as gateway:
        gateway.transport.adapters_file = tmp_path / f"{LM}.json"
        add_adapter(gateway.transport.adapters_file, "pirate", AdapterEntry("/pirate"))
        body = {"lora_name": "pirate", "lora_path": "/x", "base_model": LM}
        assert gateway.post("/v1/load_lora_adapter", **body).status_code == 501
        assert gateway.post("/v1/completions", model=f"{LM}:pirate", prompt="x").status_code == 200


@pytest.mark.usefixtures("pirate")
def test_a_stream_names_the_adapter_in_every_chunk(gateway: Gateway) -> None:
    with gateway.http.stream(
        "POST", "/v1/completions", json={"model": "pirate", "prompt": "x", "stream": True}
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    assert {json.loads(line)["model"] for line in lines} == {"pirate"}
