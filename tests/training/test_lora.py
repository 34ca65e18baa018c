"""LoRA adapters: their files, resuming a killed training to identical weights, layers by name, merged checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fakes.checkpoints import TEXT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from tritonlm.cli import app
from tritonlm.contract import Checkpoint
from tritonlm.contract.adapters_file import AdapterEntry, adapters_file, add_adapter
from tritonlm.training import lora, merge
from tritonlm.training.errors import TrainingError
from tritonlm.training.plan import LoraOptions, TrainingPlan, make_plan
from tritonlm.training.run import train
from tritonlm.training.tokenizer import train_bpe
from typer.testing import CliRunner

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
WEIGHTS = "adapter_model.safetensors"
WAIT_SECONDS = 200.0
OPTIONS = {"rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A training sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small_model(family: str) -> Any:
    torch.manual_seed(1)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
        )
    )  # fmt: skip


def save_base(folder: Path, family: str, dtype: torch.dtype) -> Path:
    tokenizer = train_bpe([TEXT], 320, ("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    small_model(family).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "llama", "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(40):
            messages = [{"role": "user", "content": "fox " * (number % 5 + 1)}, {"role": "assistant", "content": "old"}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


def plan_of(base: Path, data: Path, out: Path) -> TrainingPlan:
    options = {"steps": 12, "eval_steps": 4, "batch_size": 4, "warmup_steps": 2, "learning_rate": 0.01, "threads": 1}
    return make_plan(data=str(data), out=out, model=str(base), lora=OPTIONS, packing=True, **options)


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(plan_of(base, data, tmp_path_factory.mktemp("runs") / "lesson"))


def test_a_training_writes_an_adapter_and_a_record(trained: Path, base: Path) -> None:
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 4, 8, "none")
    assert config["base_model_name_or_path"] == str(base)
    tensors = load_file(trained / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # Seven linear layers in each of two layers of the model, and two matrices for each.
    assert len(tensors) == 28
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    record = json.loads((trained / "training.json").read_text())
    assert record["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert record["lora"] == {"targets": "all", **OPTIONS}
    assert record["accuracy"] is not None
    assert "LoRA adapter" in (trained / "README.md").read_text()
    # The base has the tokenizer.
    assert {file.suffix for file in trained.iterdir()} == {".json", ".safetensors", ".md", ".png"}
    assert not (trained / "tokenizer.json").exists()


def test_a_killed_training_resumes_to_identical_weights(trained: Path, base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "lesson"
    words = [sys.executable, "-m", "tritonlm.cli", "train", str(data), "--out", str(out), "--model", str(base)]
    words += ["--lora", "rank=4", "alpha=8", "dropout=0.1", "--packing", "--steps", "12", "--eval-steps", "4"]
    words += ["--batch-size", "4", "--warmup-steps", "2", "--learning-rate", "0.01", "--threads", "1"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not list(out.glob("checkpoint-*/training.json")):
            assert process.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    assert not (out / "final").exists()
    saved = TrainingPlan.model_validate_json((out / "plan.json").read_text())
    assert saved == plan_of(base, data, out)
    resumed, expected = load_file(train(saved, resume=True) / WEIGHTS), load_file(trained / WEIGHTS)
    assert resumed.keys() == expected.keys()
    for name, weight in resumed.items():
        assert torch.equal(weight, expected[name]), name


class TestTargets:
    def test_all_are_the_linear_layers_without_the_output_matrix(self) -> None:
        names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert targets_of("llama", "all") == names
        assert targets_of("gpt2", "all") == ["c_attn", "c_fc", "c_proj"]

    def test_attention_tells_layers_of_one_name_apart(self) -> None:
        assert targets_of("gpt2", "attention") == ["attn.c_attn", "attn.c_proj"]
        adapted = lora.add_adapter(small_model("gpt2"), LoraOptions(targets="attention"))
        layers = {name.rpartition(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
        assert {layer.split(".h.")[1] for layer in layers} == {
            f"{layer}.attn.{name}" for layer in (0, 1) for name in ("c_attn", "c_proj")
        }

    def test_names_are_layers_of_the_model(self) -> None:
        assert targets_of("llama", ("v_proj", "self_attn.q_proj")) == ["self_attn.q_proj", "v_proj"]
        for name in ("c_attn", "embed_tokens", "lm_head"):
            with pytest.raises(TrainingError, match=f"lora.targets: {name} is no linear layer .* are down_proj, gate"):
                targets_of("llama", (name,))


def targets_of(family: str, targets: Any) -> list[str]:
    return lora.target_modules(list(lora.linear_layers(small_model(family))), targets)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rank=4",), "lora: rank=… is an option of --lora"),
        (("--lora",), "lora: an adapter needs a base; name it with model"),
        (("--lora", "--model", "x", "rank=0"), "lora.rank: Input should be greater than or equal to 1"),
        (("--lora", "--model", "x", "rank=257"), "lora.rank: Input should be less than or equal to 256"),
        (("--lora", "--model", "x", "size=4"), "lora.size: Extra inputs are not permitted"),
        (("--lora", "--model", "x", "targets="), "lora.targets"),
        (("--lora", "--model", "x", "dropout=1"), "lora.dropout: Input should be less than 1"),
        (("--lora", "--model", "x", "--tokenizer", "bpe"), "tokenizer: an adapter keeps its base's tokenizer"),
        (("--lora", "--model", "x", "more.txt"), "data: name one thing to train on, not 2"),
    ],
)
def test_an_invalid_option_is_one_error_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "text.txt", "--out", str(tmp_path / "out"), *words])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in result.output


def test_built_in_data_have_their_own_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"lora: .* and fable has its own; use other data"):
        make_plan(data="fable", out=tmp_path, model="x", lora={})


class TestMerge:
    def test_the_checkpoint_answers_as_the_base_with_its_adapter(
        self, base: Path, trained: Path, tmp_path: Path
    ) -> None:
        merged = merge.merge(trained, base, tmp_path / "merged")
        Checkpoint(merged).check()
        weights, before = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
        assert weights.keys() == before.keys()
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        adapter = load_file(trained / WEIGHTS)
        for name, weight in weights.items():
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            expected = before[name].float()
            if f"{layer}.lora_A.weight" in adapter:
                expected = expected + 8 / 4 * adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
            assert torch.equal(weight, expected.to(torch.bfloat16)), name
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (merged / name).read_bytes() == (base / name).read_bytes()
        assert json.loads((merged / "training.json").read_text())["lora"]["rank"] == 4

    def test_the_command_takes_a_name_or_a_folder(self, base: Path, trained: Path, tmp_path: Path) -> None:
        add_adapter(adapters_file(tmp_path / "adapters", "mine"), "lesson", AdapterEntry(str(trained)))
        for adapter, out in (("lesson", tmp_path / "by_name"), (str(trained), tmp_path / "by_folder")):
            words = ["adapters", "merge", adapter, "--base", str(base), "--out", str(out)]
            words += ["--adapters-folder", str(tmp_path / "adapters")]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, result.output
            Checkpoint(out).check()
            again = CliRunner().invoke(app, words)
            assert (again.exit_code, again.stderr.count("error: out: ")) == (1, 1)
        by_name, by_folder = (load_file(tmp_path / name / "model.safetensors") for name in ("by_name", "by_folder"))
        assert all(torch.equal(weight, by_folder[name]) for name, weight in by_name.items())

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_it_equals_what_peft_merges(self, family: str, tmp_path: Path) -> None:
        base, adapter = save_base(tmp_path / "base", family, torch.float32), tmp_path / "adapter"
        adapted = lora.add_adapter(AutoModelForCausalLM.from_pretrained(base), LoraOptions(rank=4, targets="attention"))
        torch.manual_seed(2)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        adapted.save_pretrained(adapter)
        ids = torch.arange(1, 17)[None]
        merged = AutoModelForCausalLM.from_pretrained(merge.merge(adapter, base, tmp_path / "merged"))
        with torch.inference_mode():
            logits, expected = merged(ids).logits, adapted.eval()(ids).logits
            assert not torch.allclose(logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-3)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
        for name, weight in by_peft.state_dict().items():
            assert torch.equal(merged.state_dict()[name], weight), name
        assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML

    @pytest.mark.parametrize(
        "damage", ["no weights", "shape", "unknown layer", "not finite", "truncated", "out exists"]
    )
    def test_what_cannot_be_merged_is_refused_in_one_line(
        self, damage: str, base: Path, trained: Path, tmp_path: Path
    ) -> None:
        adapter, out = tmp_path / "adapter", tmp_path / "merged"
        shutil.copytree(trained, adapter)
        tensors = load_file(adapter / WEIGHTS)
        name = min(tensors)
        messages = {
            "no weights": f"has no {WEIGHTS}", "shape": "size mismatch", "unknown layer": "which no layer of this base",
            "not finite": "NaN", "truncated": "is not a valid safetensors file", "out exists": "out: .* exists",
        }  # fmt: skip
        if damage == "no weights":
            (adapter / WEIGHTS).unlink()
        elif damage == "truncated":
            (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:100])
        elif damage == "out exists":
            out.mkdir()
        else:
            changed = {
                "shape": {name: torch.zeros(4, 7)}, "not finite": {name: torch.full_like(tensors[name], torch.nan)},
                "unknown layer": {name.replace("layers.0", "layers.7"): tensors[name].clone()},
            }[damage]  # fmt: skip
            save_file({**tensors, **changed}, adapter / WEIGHTS)
        with pytest.raises(Exception, match=messages[damage]) as error:
            merge.merge(adapter, base, out)
        assert type(error.value).__name__ in ("TrainingError", "CheckpointError")
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir() if path not in (adapter, out)] == []
