"""`tritonlm inspect`: bundled and tiny checkpoints, on this machine and on a Hub, without their weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import inspection
from engine.config import EngineConfig
from fakes.checkpoints import write_checkpoint
from fakes.hub_server import hub_server
from fakes.quantized_checkpoints import change_config, quantize_checkpoint
from fakes.tiny_lm import make_checkpoint
from tritonlm.checkpoints import report
from tritonlm.checkpoints.tensors import Tensor, plain_tensors, tensors_of
from tritonlm.cli import app
from tritonlm.commands import inspect as inspect_command
from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.serving.paths import model_repository
from typer.testing import CliRunner

from .test_hub import Machine

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 4096,
    "vocab_size": 1000, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def write_weights(folder: Path, **shapes: tuple[int, ...]) -> None:
    """A safetensors file's header and, in place of weights, a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = Tensor(name, "BF16", shape).bytes
        header[name.replace("__", ".")] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def inspect(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["inspect", *words, "--json"])
    assert result.exit_code in (0, 1), result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if facts["problems"] else 0)
    return facts


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine's facts without a process of their own, whose imports take seconds."""

    def ask(folder: Path, remote: Sequence[Tensor]) -> tuple[dict[str, Any] | None, str]:
        assert not remote
        try:
            return inspection.inspect(Checkpoint(folder), EngineConfig.from_strings({})), ""
        except CheckpointError as error:
            return None, error.message

    monkeypatch.setattr(inspect_command, "_ask_engine", ask)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "parameters", "template"), [("abacus", 816_000, False), ("fable", 2_887_000, True)])
def test_the_bundled_models(name: str, parameters: int, template: bool) -> None:
    facts = inspect(str(model_repository() / name / "1"), "--slots", "3", "--context", "100")
    assert (facts["architecture"], facts["chat_template"], facts["problems"]) == ("gpt2", template, [])
    assert facts["parameters"] == pytest.approx(parameters, rel=0.01)
    assert (facts["engine"]["runner"], facts["engine"]["dtype"], facts["engine"]["reason"]) == ("native", "float32", "")
    assert facts["engine"]["read_bytes_per_second"] > 1e8
    memory, layers, width = facts["memory"], facts["layers"], facts["width"]
    assert (memory["slots"], memory["context"]) == (3, 100)
    assert memory["kv_cache_bytes"] == 3 * 100 * 2 * layers * width * 4
    assert memory["weight_bytes"] == 4 * facts["parameters"]
    # They fit into the processor's cache: memory does not limit them.
    assert facts["speed"] is None


@pytest.mark.usefixtures("in_this_process")
def test_a_table_for_persons() -> None:
    result = CliRunner().invoke(app, ["inspect", str(model_repository() / "fable" / "1")], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for part in ("gpt2: 3 layers of 256", "512 tokens", "native (C++ kernels), cpu", "8 slots of 512 tokens"):
        assert part in result.stdout


def test_a_large_model_is_limited_by_memory(tmp_path: Path) -> None:
    """What a token reads: of two matrices of the vocabulary one; of 8 experts 2."""
    experts = {f"model__layers__0__mlp__experts__{n}__up_proj__weight": (64, 100_000) for n in range(8)}
    folder = write_checkpoint(tmp_path / "lm", config={**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2})
    write_weights(
        folder,
        model__embed_tokens__weight=(1000, 64),
        lm_head__weight=(1000, 64),
        model__layers__0__mlp__gate__weight=(1000, 100_000),
        **experts,
    )
    checkpoint = Checkpoint(folder)
    tensors = tensors_of(checkpoint)
    assert report.numbers_read(checkpoint, tensors) == 64_000 + 10**8 + 2 * 6_400_000
    engine = {"runner": "native", "read_bits_per_weight": 16, "read_bytes_per_second": 30e9}
    speed = report.speed(engine, checkpoint, tensors)
    assert speed is not None
    assert speed["tokens_per_second"] == pytest.approx(30e9 / (2 * 112_864_000))
    assert speed["tokens_per_second_int8"] == pytest.approx(2 * speed["tokens_per_second"])
    assert list(report.speed({**engine, "runner": "reference"}, checkpoint, tensors) or {}) == ["tokens_per_second"]


@pytest.mark.parametrize(
    ("config", "runner", "reason", "problem"),
    [
        ({}, "native", "", ""),
        ({"hidden_size": 72}, "reference", "its width is not a multiple of 32", ""),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "reference", "its model_type is none of",
         "it does not generate text: its architecture is BertForMaskedLM"),
        ({"model_type": "newest", "architectures": ["NewestForCausalLM"]}, "reference", "its model_type is none of",
         "transformers has no causal language model newest"),
        ({"model_type": "newest", "auto_map": {"AutoModel": "x.y"}}, "reference", "its model_type is none of",
         "transformers has no causal language model newest, and the code that it brings is never run"),
        ({"architectures": 5}, "native", "", ""),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("in_this_process")
def test_what_computes_it_and_what_is_in_the_way(
    tmp_path: Path, config: dict[str, Any], runner: str, reason: str, problem: str
) -> None:
    folder = write_checkpoint(tmp_path / "lm", config={**LLAMA, **config})
    write_weights(folder, model__embed_tokens__weight=(1000, 64))
    facts = inspect(str(folder))
    assert facts["engine"]["runner"] == runner
    assert facts["engine"]["reason"].startswith(reason)
    assert [text[: len(problem)] for text in facts["problems"]] == ([problem] if problem else [])
    assert facts["memory"]["kv_cache_bytes"] == 8 * 2048 * facts["engine"]["kv_bytes_per_token"]


@pytest.mark.parametrize(
    ("name", "quantization", "numbers"),
    [("awq", "awq, groups of 32", "4-bit"), ("W8A8", "compressed-tensors, a scale for each row", "8-bit"),
     ("fp8 blocks", "fp8, blocks of 32 x 32", "FP8"), ("fp8 tensor", "fp8, a scale for each matrix", "FP8")],
)  # fmt: skip
def test_quantized_weights_count_as_the_numbers_that_they_stand_for(
    tmp_path: Path, name: str, quantization: str, numbers: str
) -> None:
    folder = make_checkpoint(tmp_path / "lm", **{**LLAMA, "vocab_size": 300})
    expected = report.describe(Checkpoint(folder), *[tensors_of(Checkpoint(folder))] * 2, None)
    quantize_checkpoint(folder, name)
    stored = tensors_of(Checkpoint(folder))
    facts = report.describe(Checkpoint(folder), stored, *plain_tensors(Checkpoint(folder).config, stored))
    assert (facts["parameters"], facts["quantization"]) == (expected["parameters"], quantization)
    assert facts["number_types"][numbers] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert facts["file_bytes"] < expected["file_bytes"]
    assert report.problems(Checkpoint(folder)) == []


def test_a_quantized_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "lm", **{**LLAMA, "vocab_size": 300})
    quantize_checkpoint(folder, "awq")
    result = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "native (C++ kernels), cpu" in result.stdout
    assert "quantized: awq, groups of 32" in result.stdout


def test_quantized_weights_that_are_not_read_are_a_problem(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "lm", **{**LLAMA, "vocab_size": 300})
    quantize_checkpoint(folder, "awq")
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 3})
    (problem,) = report.problems(Checkpoint(folder))
    assert problem.endswith("lm cannot be loaded: quantization_config.bits is 3; what is read is 4")


@pytest.mark.parametrize(
    ("fields", "is_served"),
    [({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, False),
     ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, False), ({"model_type": "falcon_h1"}, False),
     ({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2}, True)],
)  # fmt: skip
def test_layers_with_a_state_are_a_problem(tmp_path: Path, fields: dict[str, Any], is_served: bool) -> None:
    folder = write_checkpoint(tmp_path / "lm", config={**LLAMA, "architectures": None, **fields})
    write_weights(folder, lm_head__weight=(64, 64))
    problems = report.problems(Checkpoint(folder))
    assert problems == [] if is_served else "some of its layers keep a state" in problems[0]


def test_a_checkpoint_without_a_context_says_what_to_do(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lm", config={"model_type": "mamba", "n_positions": None})
    write_weights(folder, lm_head__weight=(64, 64))
    (problem,) = report.problems(Checkpoint(folder))
    assert problem.endswith(
        "write one into it, unless its layers keep a state, as Mamba's do: such models are not served"
    )


@pytest.mark.usefixtures("in_this_process")
def test_an_incomplete_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lm", config=LLAMA)
    assert "has no *.safetensors weights" in inspect(str(folder))["problems"][0]
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "is not a valid safetensors file: its header is longer than the file" in result.stderr


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a": {"dtype": "F32"}}', b'{"a": 1}', b'{"a": {"shape": "x"}}', b'{"a":' * 100_000],
    ids=["list", "cut", "no shape", "number", "shape of text", "nested"],
)
def test_a_broken_header_is_one_line(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="is not a valid safetensors file") as error:
        tensors_of(Checkpoint(tmp_path))
    assert "\n" not in str(error.value)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "lm-Q4_0.gguf").write_bytes(os.urandom(1000))
    awq = make_checkpoint(tmp_path / "awq", **{**LLAMA, "vocab_size": 300})
    quantize_checkpoint(awq, "awq")
    with hub_server(lm=make_checkpoint(tmp_path / "lm"), gguf=tmp_path / "gguf", awq=awq) as hub:
        yield Machine(hub, tmp_path / "hf")


def test_a_model_of_the_hub_is_described_without_its_weights(machine: Machine) -> None:
    local = inspect(str(machine.hub.repositories["org/lm"]))
    result = machine.run("inspect", "org/lm", "--json")
    assert result.returncode == 0, result.stderr
    remote = json.loads(result.stdout)
    for name in ("architecture", "parameters", "context_length", "number_types", "file_bytes", "problems"):
        assert remote[name] == local[name], name
    # Only the header.
    assert all(given for given in machine.hub.downloads("model.safetensors"))
    assert list(machine.home.rglob("model.safetensors")) == []
    machine.pull("org/lm")
    assert json.loads(machine.run("inspect", "org/lm", "--json").stdout)["parameters"] == local["parameters"]


def test_quantized_weights_on_the_hub_count_as_those_on_this_machine(machine: Machine) -> None:
    local = inspect(str(machine.hub.repositories["org/awq"]))
    result = machine.run("inspect", "org/awq", "--json")
    assert result.returncode == 0, result.stderr
    remote = json.loads(result.stdout)
    assert remote["engine"]["bits_per_weight"] == local["engine"]["bits_per_weight"] < 16
    assert remote["memory"]["weight_bytes"] == local["memory"]["weight_bytes"]
    assert list(machine.home.rglob("model.safetensors")) == []


def test_quantized_weights_on_the_hub_that_are_not_read_are_a_problem(machine: Machine) -> None:
    change_config(machine.hub.repositories["org/awq"], quantization_config={"quant_method": "awq", "bits": 3})
    remote = json.loads(machine.run("inspect", "org/awq", "--json").stdout)
    assert remote["problems"] == ["quantization_config.bits is 3; what is read is 4"]


def test_a_gguf_file_of_the_hub_must_be_downloaded_first(machine: Machine) -> None:
    message = machine.refusal("inspect", "org/gguf:Q4_0")
    assert message == "org/gguf:Q4_0 is not on this machine, and a GGUF file is read whole; run tritonlm pull first"
    assert machine.hub.downloads("lm-Q4_0.gguf") == []
