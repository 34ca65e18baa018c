"""Checkpoints that `tritonlm quantize` writes are read back bit for bit, and perplexities are those of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from engine.config import EngineConfig
from engine.perplexity import perplexity
from engine.runners.loading import tensor_bytes
from engine.runners.native.quantize import quantize_groups
from engine.runners.native.quantized_files import writer
from engine.runners.native.tensor_source import open_tensors
from engine.runners.select import open_runner
from fakes.quantized_checkpoints import LINEAR, quantize_checkpoint
from fakes.tiny_lm import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tritonlm.contract import Checkpoint, CheckpointError

from .harness import save_model


def written(source: Path, folder: Path, bits: int, dtype: torch.dtype) -> writer.Written:
    folder.mkdir()
    calls: list[tuple[int, int]] = []
    result = writer.write_quantized(Checkpoint(source), folder, bits, dtype, lambda *call: calls.append(call))
    assert calls == [(n, len(calls)) for n in range(len(calls))]
    assert not list(folder.glob("*.part"))
    return result


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (4, torch.float16), (8, torch.float32)])
def test_codes_and_scales_are_read_back_bit_for_bit(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    source, folder = save_model("llama wide", tmp_path / "lm"), tmp_path / "quantized"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = written(source, folder, bits, dtype)
    opened = open_tensors(folder, dtype)
    assert set(opened.names()) == set(tensors)
    assert set(result.quantized) == set(filter(LINEAR.fullmatch, tensors))
    for name, tensor in tensors.items():
        quantized = opened.quantized(name)
        if not LINEAR.fullmatch(name):
            assert quantized is None
            assert torch.equal(opened.get(name), tensor)
            continue
        expected = quantize_groups(tensor, bits, 32, dtype)
        assert quantized is not None
        assert torch.equal(quantized.codes, expected.codes)
        assert torch.equal(quantized.scales, expected.scales)
        assert quantized.minima is None
        # float32 scales of 11 bits have exact products; the others' are rounded once.
        assert torch.equal(opened.get(name), expected.dequantized().to(dtype))
    assert result.bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["lm_head", "model.embed_tokens"]


def test_several_files_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_SHARD_BYTES", 20_000)
    source, folder = save_model("llama wide", tmp_path / "lm"), tmp_path / "quantized"
    result = written(source, folder, 4, torch.float32)
    content = json.loads((folder / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2
    assert names[1] == f"model-00002-of-{len(names):05}.safetensors"
    assert {file: set(load_file(folder / file)) for file in names} == {
        file: {name for name, its in content["weight_map"].items() if its == file} for file in names
    }
    assert content["metadata"]["total_size"] == result.bytes
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    Checkpoint(folder).check()


def test_the_transposed_matrices_of_gpt2(tmp_path: Path) -> None:
    source, folder = save_model("gpt2", tmp_path / "lm"), tmp_path / "quantized"
    result = written(source, folder, 4, torch.float32)
    assert len(result.quantized) == 2 * 4
    tensors, opened = load_file(source / "model.safetensors"), open_tensors(folder)
    for name in result.quantized:
        expected = quantize_groups(tensors[name].t(), 4)
        assert opened.shape(name) == tensors[name].shape
        assert torch.equal(opened.get(name), expected.dequantized().t())
        quantized = opened.quantized(name)
        assert quantized is not None
        assert torch.equal(quantized.codes, expected.codes)


def test_routers_and_widths_that_are_no_groups_stay_as_they_are(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = make_checkpoint(tmp_path / "lm", model_type="mixtral", num_key_value_heads=2, num_local_experts=2, **sizes)
    result = written(source, tmp_path / "quantized", 4, torch.float32)
    plain = {name.removeprefix("model.layers.0.") for name in result.plain if ".layers." in name}
    experts = {f"block_sparse_moe.experts.{n}.w2.weight" for n in range(2)}
    assert plain == {"block_sparse_moe.gate.weight", *experts}


def test_a_quantized_checkpoint_is_quantized_again(tmp_path: Path) -> None:
    """Its own format, of other bits, from the numbers that it stands for."""
    source = save_model("llama wide", tmp_path / "lm")
    expected = quantize_checkpoint(source, "gptq 4 bits act-order")
    result = written(source, tmp_path / "quantized", 8, torch.float32)
    opened = open_tensors(tmp_path / "quantized")
    for name in result.quantized:
        assert torch.equal(opened.get(name), quantize_groups(expected[name], 8).dequantized())


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    source = save_model("llama wide", tmp_path / "lm")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight: .* not finite"):
        written(source, tmp_path / "quantized", 4, torch.float32)


def test_the_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    source = save_model("llama wide", tmp_path / "lm")
    ids = torch.randint(3, 96, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    config = EngineConfig(device="cpu", dtype="float32", max_sequences=1, max_context_tokens=256)
    runner = open_runner(source, config, torch.device("cpu"))
    seen: list[tuple[int, int]] = []
    computed = perplexity(runner, ids, lambda *call: seen.append(call))
    runner.close()
    model, total, count = AutoModelForCausalLM.from_pretrained(source), 0.0, 0
    for start in range(0, 700 - 1, 255):
        window = torch.tensor(ids[start : start + 256])
        with torch.inference_mode():
            rows = model(window[None, :-1]).logits[0].log_softmax(-1)
        total += float(rows.gather(1, window[1:, None]).double().sum())
        count += len(window) - 1
    assert count == 699
    assert computed == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert seen == [(0, 700), (255, 700), (510, 700)]


def test_a_second_copy_of_the_weights_is_not_read(tmp_path: Path) -> None:
    source = save_model("llama wide", tmp_path / "lm")
    tensors = load_file(source / "model.safetensors")
    save_file({f"layers.{name}": tensor for name, tensor in tensors.items()}, source / "consolidated.safetensors")
    assert set(open_tensors(source).names()) == set(tensors)
    assert set(tensor_bytes(source)) == set(tensors)
    written(source, tmp_path / "quantized", 8, torch.float32)
    assert set(open_tensors(tmp_path / "quantized").names()) == set(tensors)
