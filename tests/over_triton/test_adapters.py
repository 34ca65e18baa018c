"""Adapters over a real Triton: added, called, replaced under load, removed, and resumed after a killed engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from inference.adapters import write_adapter
from tritonlm import Client
from tritonlm.cli import app
from tritonlm.client.types import Completion
from tritonlm.contract import AdapterNotFound
from typer.testing import CliRunner, Result

from .servers import LM, WAIT_SECONDS, copy_repository
from .test_serve import Serve, serving
from .test_survival import collected, find_process, stream_events

pytestmark = pytest.mark.triton

SHORT: dict[str, Any] = {"prompt": "Once", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": 150, "logprobs": None}
ADAPTERS = ("one", "two", "three")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A repository, and adapters of its LM."""
    root = tmp_path_factory.mktemp("adapters")
    repository = copy_repository(root, slow="native")
    adapters = {
        name: write_adapter(repository / LM / "1", root / name, seed=seed) for seed, name in enumerate(ADAPTERS)
    }
    return {"root": root, "repository": repository, **adapters}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[Serve]:
    options = ("--adapters-folder", str(folders["root"] / "files"), "--adapter", f"{LM}:one={folders['one']}")
    with serving(folders["repository"], folders["root"], *options) as serve:
        yield serve


@pytest.fixture
def http(served: Serve) -> Iterator[httpx.Client]:
    url = f"http://127.0.0.1:{served.ports['port']}"
    with httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False) as client:
        yield client


def load(http: httpx.Client, name: str, folder: Path) -> None:
    body = {"lora_name": name, "lora_path": str(folder), "base_model": LM, "load_inplace": True}
    answer = http.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 200, answer.text


def text(http: httpx.Client, model: str) -> str:
    answer = http.post("/v1/completions", json={"model": model, **SHORT})
    assert answer.status_code == 200, answer.text
    result: str = answer.json()["choices"][0]["text"]
    return result


def stream(served: Serve, model: str, on_third_event: Callable[[], None] = lambda: None) -> str:
    url = f"http://127.0.0.1:{served.ports['port']}"
    return collected(stream_events(url, on_third_event, model=model, **LONG))[0]


def test_an_adapter_is_the_same_by_every_name_and_protocol(served: Serve, http: httpx.Client) -> None:
    expected = text(http, "one")
    assert expected == text(http, f"{LM}:one") != text(http, LM)
    (listed,) = [model for model in http.get("/v1/models").json()["data"] if model["parent"]]
    assert (listed["id"], listed["parent"], listed["state"]) == ("one", LM, "ready")
    with Client(served.grpc) as client:
        for model, arguments in ((LM, {"adapter": "one"}), (f"{LM}:one", {})):
            completion = client.completions.create(model, **SHORT, **arguments)
            assert isinstance(completion, Completion)
            assert completion.choices[0].text == expected
        with pytest.raises(AdapterNotFound, match="it has one"):
            client.completions.create(f"{LM}:ghost", "Once")
    fields = {"text_input": SHORT["prompt"], "adapter": "one", "exclude_input_in_output": True}
    flat = {name: value for name, value in SHORT.items() if name != "prompt"}
    url = f"http://127.0.0.1:{served.ports['http_port']}/v2/models/{LM}/generate"
    answer = httpx.post(url, json={**fields, **flat}, timeout=WAIT_SECONDS, trust_env=False)
    assert answer.json()["text_output"] == expected


def test_compare_prints_what_a_base_and_its_adapter_answer_with_one_seed(
    served: Serve, folders: dict[str, Path]
) -> None:
    def compare(*models: str, as_json: bool = True) -> Result:
        words = ["compare", "Once", *models, "--max-tokens", "12", "--triton", served.grpc]
        environment = {"TRITONLM_ADAPTERS_FOLDER": str(folders["root"] / "files")}
        return CliRunner().invoke(app, [*words, *(["--json"] if as_json else [])], env=environment)

    compared = json.loads(compare(LM, "--models", "one", f"{LM}:one", LM).stdout)
    texts = [result["choices"][0]["text"] for result in compared["results"]]
    # --models come first. Without a seed all get the same one.
    assert texts[0] == texts[2] != texts[1] == texts[3]
    printed = compare(LM, "one", "--seed", str(compared["seed"]), as_json=False)
    assert printed.exit_code == 0
    assert f"seed {compared['seed']}" in printed.stdout
    assert compare("one").exit_code == 2


def test_an_adapter_is_replaced_under_load_without_a_failed_request(
    http: httpx.Client, folders: dict[str, Path]
) -> None:
    load(http, "swapped", folders["two"])
    second = text(http, "swapped")
    load(http, "swapped", folders["three"])
    third = text(http, "swapped")
    assert second != third
    stopped = threading.Event()

    def keep_asking() -> set[str]:
        texts = set()
        while not stopped.is_set():
            texts.add(text(http, "swapped"))
        return texts

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(keep_asking) for _ in range(4)]
        for name in ("two", "three", "two"):
            load(http, "swapped", folders[name])
        stopped.set()
        assert set().union(*(caller.result() for caller in callers)) <= {second, third}
    assert text(http, "swapped") == second


def test_an_adapter_that_does_not_fit_is_refused_and_the_old_one_goes_on(
    http: httpx.Client, folders: dict[str, Path], tmp_path: Path
) -> None:
    load(http, "kept", folders["two"])
    before = text(http, "kept")
    (tmp_path / "adapter_config.json").write_bytes((folders["two"] / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    body = {"lora_name": "kept", "lora_path": str(tmp_path), "base_model": LM, "load_inplace": True}
    answer = http.post("/v1/load_lora_adapter", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")
    assert text(http, "kept") == before


def test_a_removed_adapter_ends_its_requests_and_takes_no_more(
    served: Serve, http: httpx.Client, folders: dict[str, Path]
) -> None:
    load(http, "brief", folders["two"])
    expected = stream(served, "brief")

    def remove() -> None:
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "brief"}).status_code == 200

    assert stream(served, "brief", remove) == expected
    for name, code in (("brief", "model_not_found"), (f"{LM}:brief", "adapter_not_found")):
        answer = http.post("/v1/completions", json={"model": name, **SHORT})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)


def test_streams_of_adapters_are_resumed_with_their_texts_after_a_killed_engine(
    served: Serve, http: httpx.Client, folders: dict[str, Path]
) -> None:
    load(http, "two", folders["two"])
    models = (LM, "one", "two")
    expected = [stream(served, model) for model in models]
    assert len(set(expected)) == len(models)
    begun = threading.Barrier(len(models))

    def kill() -> None:
        # All three have generated text with different weights.
        if begun.wait(WAIT_SECONDS) == 0:
            find_process(served, "generate").kill()

    with ThreadPoolExecutor(len(models)) as pool:
        assert list(pool.map(lambda model: stream(served, model, kill), models)) == expected
