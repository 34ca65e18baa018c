"""What a model's name stands for, and how calls, results and lists treat adapters."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm import AsyncClient
from tritonlm.client.load_balancer import _prefix
from tritonlm.client.model_names import ModelNames, ServedModel
from tritonlm.client.observer import Observer
from tritonlm.client.transport import Call, Prompt
from tritonlm.client.types import Completion
from tritonlm.contract import AdapterNotFound, InvalidRequest, ModelNotFound
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter, remove_adapter

T = TypeVar("T")


class Labels(Observer):
    def __init__(self) -> None:
        self.ended_models: list[str] = []

    def ended(self, model: str, reason: str) -> None:
        self.ended_models.append(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add_adapter(tmp_path / f"{LM}.json", "pirate", AdapterEntry("/pirate", "org/pirate"))
    return tmp_path


def run(
    work: Callable[[AsyncClient], Awaitable[T]], folder: Path | None = None, observer: Observer | None = None
) -> tuple[T, FakeTransport]:
    async def inside() -> tuple[T, FakeTransport]:
        transport = FakeTransport()
        transport.adapters_file = folder / f"{LM}.json" if folder else None
        async with AsyncClient(transports=[transport], adapters_folder=folder, observer=observer) as client:
            return await work(client), transport

    return asyncio.run(inside())


def test_a_name_with_a_colon_names_an_adapter_without_any_file() -> None:
    assert ModelNames().resolve("lm:pirate") == ServedModel("lm:pirate", "lm", "pirate")
    assert ModelNames().resolve("pirate") == ServedModel("pirate", "pirate")


def test_a_name_alone_is_followed_as_the_files_change(folder: Path) -> None:
    names = ModelNames(folder)
    assert names.resolve("pirate") == ServedModel("pirate", LM, "pirate")
    add_adapter(folder / "other.json", "poet", AdapterEntry("/poet"))
    assert names.resolve("poet") == ServedModel("poet", "other", "poet")
    remove_adapter(folder / f"{LM}.json", "pirate")
    assert names.resolve("pirate") == ServedModel("pirate", "pirate")
    (folder / "other.json").unlink()
    assert names.resolve("poet") == ServedModel("poet", "poet")


def test_a_name_that_two_models_have_must_name_the_model(folder: Path) -> None:
    add_adapter(folder / "other.json", "pirate", AdapterEntry("/pirate"))
    with pytest.raises(InvalidRequest, match="name it as fake:pirate or other:pirate"):
        ModelNames(folder).resolve("pirate")
    assert ModelNames(folder).resolve("other:pirate").lm == "other"


def test_a_language_model_is_not_hidden_by_an_adapter_of_its_name(folder: Path) -> None:
    add_adapter(folder / "other.json", LM, AdapterEntry("/fake"))
    assert ModelNames(folder).resolve(LM) == ServedModel(LM, LM)


def test_a_file_that_breaks_keeps_its_adapters(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ModelNames(folder)
    names.adapters()
    (folder / f"{LM}.json").write_text("{")
    assert names.resolve("pirate").adapter == "pirate"
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("name", ["", None, 5])
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(InvalidRequest, match="model must name a language model"):
        ModelNames().resolve(name)


@pytest.mark.parametrize("name", ["lm:", "lm:a/b", "lm:a:b"])
def test_what_is_no_name_of_an_adapter_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="the adapter in model must be 1 to 64 letters"):
        ModelNames().resolve(name)


@pytest.mark.parametrize("name", ["pirate", f"{LM}:pirate"])
def test_a_completion_goes_to_the_base_with_the_adapter_and_is_named_as_it_was_asked_for(
    folder: Path, name: str
) -> None:
    labels = Labels()
    completion, transport = run(
        lambda client: client.completions.create(name, "x", temperature=0, cache_salt="s"), folder, labels
    )
    assert isinstance(completion, Completion)
    assert completion.model == name
    (call,) = transport.calls
    assert (call.model, call.parameters["adapter"], call.parameters["cache_salt"]) == (LM, "pirate", "s")
    assert labels.ended_models == ["pirate"]


def test_the_argument_adapter_is_the_same_and_gives_another_text_than_the_base(folder: Path) -> None:
    async def texts(client: AsyncClient) -> list[str]:
        calls = [
            await client.completions.create(model, "x", temperature=0, **arguments)
            for model, arguments in ((LM, {"adapter": "pirate"}), ("pirate", {}), (LM, {}))
        ]
        return [call.choices[0].text for call in calls if isinstance(call, Completion)]

    (by_argument, by_name, base), _ = run(texts, folder)
    assert by_argument == by_name != base


def test_two_adapters_in_one_request_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="model names the adapter pirate, and adapter names 'poet'") as error:
        run(lambda client: client.completions.create("pirate", "x", adapter="poet"), folder)
    assert error.value.param == "adapter"


def test_chats_embeddings_tokens_and_reports_are_those_of_the_base(folder: Path) -> None:
    async def work(client: AsyncClient) -> None:
        await client.chat.completions.create("pirate", [{"role": "user", "content": "x"}])
        await client.embeddings.create("pirate", "x")
        assert await client.tokenize("pirate", "x") == await client.tokenize(LM, "x")
        assert await client.detokenize(f"{LM}:pirate", [65]) == "A"
        assert await client.about("pirate") == await client.about(LM)
        assert await client.status("pirate") == await client.status(LM)
        assert await client.chat.completions.apply_template("pirate", [{"role": "user", "content": "x"}])

    _, transport = run(work, folder)
    assert [(call.model, call.parameters["adapter"]) for call in transport.calls] == [(LM, "pirate")] * 2


def test_an_unknown_adapter_is_not_retried_as_a_missing_model_would_be(folder: Path) -> None:
    with pytest.raises(AdapterNotFound, match="fake has no adapter 'poet'; it has pirate"):
        run(lambda client: client.completions.create(f"{LM}:poet", "x"), folder)


def test_the_list_has_each_adapter_with_its_base(folder: Path) -> None:
    add_adapter(folder / "gone.json", "ghost", AdapterEntry("/ghost"))
    add_adapter(folder / f"{LM}.json", LM, AdapterEntry("/same"))
    models, _ = run(lambda client: client.models.with_adapters(), folder)
    assert [(model.id, model.parent, model.root, model.state) for model in models.data] == [
        (LM, None, None, "ready"),
        ("pirate", LM, "org/pirate", "ready"),
        (f"{LM}:{LM}", LM, "/same", "ready"),
    ]


def test_an_adapter_is_retrieved_by_both_names(folder: Path) -> None:
    async def work(client: AsyncClient) -> None:
        for name in ("pirate", f"{LM}:pirate"):
            model = await client.models.retrieve(name)
            assert (model.id, model.parent) == (name, LM)
            assert model.max_model_len == (await client.models.retrieve(LM)).max_model_len
        with pytest.raises(AdapterNotFound):
            await client.models.retrieve(f"{LM}:poet")
        with pytest.raises(ModelNotFound):
            await client.models.retrieve("other:pirate")

    run(work, folder)


def test_prompts_of_different_adapters_and_salts_may_be_spread() -> None:
    prompt = Prompt(text="x" * 1000)
    calls = [Call(LM, "id", prompt, parameters) for parameters in ({}, {"adapter": "a"}, {"cache_salt": "a"})]
    assert len({_prefix(call) for call in calls}) == len(calls)


def test_other_files_in_the_folder_are_no_adapters(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.json").write_text("x")
    assert list(ModelNames(folder).adapters()) == [LM]
    assert ModelNames(folder / os.fsdecode(b"none")).adapters() == {}
