"""MODEL: how a folder, a GGUF file and a model of the Hub are told apart; which files are chosen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tritonlm.checkpoints.hub_files import choose_files
from tritonlm.checkpoints.reference import HubModel, default_name, parse, source_of, split_name
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.contract import CheckpointError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "step_2920").mkdir(parents=True)
    (tmp_path / "org" / "local").mkdir(parents=True)
    (tmp_path / "smollm2-q4.gguf").write_bytes(b"GGUF")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("org/name", HubModel("org/name")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", HubModel("HuggingFaceTB/SmolLM2-135M-Instruct")),
        ("org/name@v1.0", HubModel("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubModel("org/name", "refs/pr/3")),
        ("org/name:Q4_K_M", HubModel("org/name", file="Q4_K_M")),
        ("org/name:sub/model.Q8_0.gguf", HubModel("org/name", file="sub/model.Q8_0.gguf")),
        ("org/name@main:Q4_K_M", HubModel("org/name", "main", "Q4_K_M")),
        ("hf://org/local", HubModel("org/local")),
        ("hf://gpt2@main", HubModel("gpt2", "main")),
    ],
)
def test_a_model_of_the_hub(folder: Path, text: str, source: HubModel) -> None:
    assert parse(text) == source
    assert parse(source.reference) == source


def test_an_existing_path_comes_first(folder: Path) -> None:
    assert parse("runs/step_2920") == folder / "runs" / "step_2920"
    assert parse("org/local") == folder / "org" / "local"
    assert parse("smollm2-q4.gguf") == folder / "smollm2-q4.gguf"
    assert parse("../runs/step_2920", base=folder / "org") == folder / "runs" / "step_2920"


def test_a_link_to_a_file_keeps_its_name(folder: Path) -> None:
    """In the Hub's cache a file is a link to a blob whose name is a hash."""
    os.symlink(folder / "smollm2-q4.gguf", folder / "runs" / "named.gguf")
    assert parse("runs/named.gguf") == folder / "runs" / "named.gguf"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "there is no folder or GGUF file nowhere; a model of the Hugging Face Hub is named ORG/NAME"),
        ("nowhere.gguf", "there is no folder or GGUF file nowhere.gguf"),
        ("runs/nowhere.gguf", "there is no folder or GGUF file runs/nowhere.gguf"),
        ("/nowhere/at/all", "there is no folder or GGUF file /nowhere/at/all"),
        ("./org/name", "there is no folder or GGUF file ./org/name"),
        ("org/name/more", "there is no folder or GGUF file org/name/more"),
        ("~nobody-of-this-name/lm", "there is no folder or GGUF file ~nobody-of-this-name/lm"),
        ("hf://", " is not a model of the Hugging Face Hub: ORG/NAME"),
        ("hf://../../etc", "../../etc is not a model of the Hugging Face Hub"),
    ],
)
def test_what_names_no_model_is_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        parse(text)
    assert message in str(error.value)


def test_a_reference_may_name_a_path_that_does_not_exist(folder: Path) -> None:
    assert source_of("../tiny/1", base=folder / "runs") == folder / "tiny" / "1"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mine=org/name", ("mine", "org/name")),
        ("mine=runs/lr=0.1", ("mine", "runs/lr=0.1")),
        ("runs/lr=0.1", ("", "runs/lr=0.1")),
        ("org/name", ("", "org/name")),
        ("lr=0.1", ("", "lr=0.1")),
        ("mine=lr=0.1", ("mine", "lr=0.1")),
        ("lr=0.2", ("lr", "0.2")),
    ],
)
def test_a_name_before_a_model_that_is_no_part_of_a_path(folder: Path, text: str, parts: tuple[str, str]) -> None:
    (folder / "lr=0.1").mkdir()
    assert split_name(text) == parts


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (Path("/runs/step_2920"), "step_2920"),
        (Path("/models/smollm2-q4.gguf"), "smollm2-q4"),
        (Path("/models/big-00001-of-00003.gguf"), "big"),
        (Path("/models/v1.5"), "v1.5"),
        (HubModel("org/name", "v1"), "name"),
        (HubModel("org/name-GGUF", file="Q4_K_M"), "name-Q4_K_M"),
        (HubModel("org/name-GGUF", file="sub/name.Q8_0.gguf"), "name.Q8_0"),
        # As browsers name a second download.
        (Path("/models/my model (1).gguf"), "my-model-1"),
        (Path("/runs/_lr=3e-4"), "lr-3e-4"),
        (Path("/runs/step_"), "step_"),
        (Path("/models/模型"), ""),
        (Path(f"/models/{'long' * 40}"), "long" * 25),
    ],
)
def test_the_default_name(source: Path | HubModel, name: str) -> None:
    assert default_name(source) == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"notes.txt": b"hello"}, "is neither a folder in Hugging Face format nor a GGUF file"),
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, r"holds several GGUF files \(a.gguf, b.gguf\); name one"),
    ],
)
def test_a_path_that_is_no_model(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        folder_of(tmp_path / "notes.txt" if "notes.txt" in content else tmp_path)


TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
GGUFS = ["lm-Q4_0.gguf", "lm-Q4_K_M.gguf", "lm-Q8_0.gguf", "lm-UD-Q4_K_XL.gguf", "mmproj-F16.gguf"]
IMATRICES = ["imatrix.gguf", "lm.imatrix.gguf", "lm-imatrix.gguf", "imatrix_unsloth.gguf"]
SPLIT = [f"Q8_0/lm-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]


@pytest.mark.parametrize(
    ("model", "names", "chosen"),
    [
        ("org/lm", [*TEXTS, "model.safetensors", "README.md"], [*TEXTS, "model.safetensors"]),
        ("org/lm", [*TEXTS, "model.safetensors", "pytorch_model.bin"], [*TEXTS, "model.safetensors"]),
        ("org/lm", [*TEXTS, "model.safetensors", "consolidated.safetensors"], [*TEXTS, "model.safetensors"]),
        ("org/lm", [*TEXTS, "a.safetensors", "adapter_model.safetensors"], [*TEXTS, "a.safetensors"]),
        ("org/lm", [*TEXTS, "model.safetensors", "onnx/model.json", *GGUFS], [*TEXTS, "model.safetensors"]),
        ("org/lm", [*TEXTS, "additional_chat_templates/tool_use.jinja", "model.safetensors"],
         ["additional_chat_templates/tool_use.jinja", *TEXTS, "model.safetensors"]),
        ("org/lm", [*TEXTS, "chat_template.jinja", "model.safetensors"],
         ["chat_template.jinja", *TEXTS, "model.safetensors"]),
        ("org/lm:Q4_K_M", GGUFS, ["lm-Q4_K_M.gguf"]),
        ("org/lm:q4_0", GGUFS, ["lm-Q4_0.gguf"]),
        ("org/lm:Q4_K_XL", GGUFS, ["lm-UD-Q4_K_XL.gguf"]),
        ("org/lm:lm-Q8_0.gguf", GGUFS, ["lm-Q8_0.gguf"]),
        ("org/lm:Q8_0", SPLIT, SPLIT),
        (f"org/lm:{SPLIT[0]}", SPLIT, SPLIT),
        ("org/lm", ["README.md", "lm-Q8_0.gguf", "mmproj-F16.gguf"], ["lm-Q8_0.gguf"]),
        ("org/lm", ["lm-Q8_0.gguf", *IMATRICES], ["lm-Q8_0.gguf"]),
        ("org/lm:Q4_K_M", ["lm-imatrix-Q4_K_M.gguf", *IMATRICES], ["lm-imatrix-Q4_K_M.gguf"]),
        ("org/lm:Q4_K_M", ["imatrix/lm-Q4_K_M.gguf", *IMATRICES], ["imatrix/lm-Q4_K_M.gguf"]),
        ("org/lm:lm-Q4_K_M-imatrix.gguf", ["lm-Q4_K_M-imatrix.gguf", *GGUFS], ["lm-Q4_K_M-imatrix.gguf"]),
    ],
)  # fmt: skip
def test_the_files_of_a_model(model: str, names: list[str], chosen: list[str]) -> None:
    assert sorted(choose_files(_hub(model), names)) == sorted(chosen)


def test_the_tokenizer_needs_only_texts() -> None:
    assert choose_files(HubModel("org/lm"), [*TEXTS, "model.safetensors"], weights=False) == TEXTS


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        ("org/lm", [*TEXTS, "pytorch_model.bin"],
         "org/lm has no safetensors weights, only pickled ones, which can run code and are not loaded"),
        ("org/lm", TEXTS, "org/lm has no safetensors weights"),
        ("org/lm", ["README.md"], "org/lm has no config.json: it is not a checkpoint in Hugging Face format"),
        ("org/lm", ["adapter_config.json", "adapter_model.safetensors"], "org/lm is an adapter (LoRA)"),
        ("org/lm", ["config.json", "model.safetensors", "tokenizer.model"], "org/lm has no tokenizer.json"),
        ("org/lm", GGUFS,
         "org/lm has several GGUF files; name one as org/lm:NAME, of Q4_0, Q4_K_M, Q8_0, UD-Q4_K_XL"),
        ("org/lm:Q5_K_M", GGUFS, "org/lm has no Q5_K_M; its GGUF files are Q4_0, Q4_K_M, Q8_0, UD-Q4_K_XL"),
        ("org/lm:Q4_K", GGUFS, "org/lm has no Q4_K;"),
        ("org/lm:Q8_0", ["a/lm-Q8_0.gguf", "b/lm-Q8_0.gguf"],
         "org/lm has several files for Q8_0; its GGUF files are a/lm-Q8_0.gguf, b/lm-Q8_0.gguf"),
        ("org/lm:Q8_0", SPLIT[:1], "org/lm has 1 of the 2 parts of Q8_0/lm-Q8_0.gguf"),
        ("org/lm:Q8_0", [*TEXTS, "model.safetensors"], "org/lm has no GGUF files"),
    ],
)  # fmt: skip
def test_what_a_repository_lacks_is_said_before_any_download(model: str, names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        choose_files(_hub(model), names)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def _hub(text: str) -> HubModel:
    model = parse(f"hf://{text}")
    assert isinstance(model, HubModel)
    return model
