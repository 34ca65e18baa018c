"""Checkpoints of quantized weights: the numbers of every format, both runners' logits, and what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.config import EngineConfig
from engine.runners.native.quantized_files import QuantizedSource
from engine.runners.native.runner import NativeRunner
from engine.runners.native.tensor_source import open_tensors
from engine.runners.reference import ReferenceRunner
from engine.runners.select import open_runner
from engine.scheduling.scheduler import Slice
from fakes.quantized_checkpoints import AWQ_ORDER, FORMATS, LINEAR, change_config, pack, quantize_checkpoint
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.contract.quantization import layouts
from tritonlm.contract.safetensors_header import StoredTensor

from .family_zoo import ZOO
from .harness import save_model

CPU = torch.device("cpu")
IDS = [5, 17, 90, 3, 44, 44, 8, 61, 2, 30]
Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
# Every format's numbers are compared in a test of their own.
SERVED = ("awq", "gptq 4 bits act-order", "W4A16", "W8A8", "fp8 blocks")
BY_REFERENCE = ("gptq 4 bits act-order", "W8A8 tensor")


def logits_of(folder: Path, runner: str, weights: str = "full") -> torch.Tensor:
    config = EngineConfig(device="cpu", dtype="float32", max_sequences=2, runner=runner, weights=weights)
    opened = open_runner(folder, config, CPU)
    assert isinstance(opened, NativeRunner if runner == "native" else ReferenceRunner)
    computed = every_logits(opened, [Slice(Sequence(IDS, list(range(1, 9))), 0, len(IDS))])  # type: ignore[arg-type]
    opened.close()
    return computed.float()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama wide", tmp_path_factory.mktemp("plain") / "lm")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    target = tmp_path / "lm"
    target.mkdir()
    for file in plain.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_order_of_integers_is_that_of_the_published_formats() -> None:
    """Constants from outside: AutoAWQ's order, and the example in the documentation of compressed-tensors."""
    ascending = np.arange(8)[None]
    assert pack(ascending, 4, AWQ_ORDER).item() == 0x75316420
    assert pack(ascending, 4).item() == 0x76543210
    assert pack(np.array([[129, 130]]), 8).item() == 33409


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_format(name: str, folder: Path) -> None:
    expected = quantize_checkpoint(folder, name)
    source = open_tensors(folder)
    assert set(source.names()) == set(expected)
    for tensor, values in expected.items():
        assert source.shape(tensor) == values.shape
        assert torch.equal(source.get(tensor).float(), values), tensor
        quantized = source.quantized(tensor)
        if not LINEAR.fullmatch(tensor) or FORMATS[name].groups is None:
            assert quantized is None
            continue
        assert quantized is not None
        bits, group = FORMATS[name].groups or (0, None)
        assert (quantized.bits, quantized.group) == (bits, group or values.shape[1])
        assert (quantized.minima is None) == FORMATS[name].symmetric
        assert quantized.codes.dtype == torch.int8
        assert bits == 8 or (quantized.codes.min().item(), quantized.codes.max().item()) == (-8, 7)
        # The format's own code rounds products to the type of the scales.
        torch.testing.assert_close(quantized.dequantized(), values, rtol=2**-8, atol=1e-5)
    rounded = open_tensors(folder, torch.bfloat16).get(f"{Q_PROJ}.weight")
    assert torch.equal(rounded, expected[f"{Q_PROJ}.weight"].bfloat16())
    source.close()


@pytest.mark.parametrize(
    ("name", "runner"), [*((name, "native") for name in SERVED), *((name, "reference") for name in BY_REFERENCE)]
)
def test_logits_are_those_of_transformers_on_the_dequantized_weights(
    name: str, runner: str, plain: Path, folder: Path
) -> None:
    expected = quantize_checkpoint(folder, name)
    model = AutoModelForCausalLM.from_pretrained(plain)
    missing, unexpected = model.load_state_dict(expected, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0]
    computed = logits_of(folder, runner)
    torch.testing.assert_close(computed, logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(computed.argmax(-1), logits.argmax(-1))


def test_experts_may_differ_in_form(tmp_path: Path) -> None:
    """A file may leave experts as they were, the first one too: the rows of the others become int8 all the same."""
    sizes = {**ZOO["olmoe renormalized"], "intermediate_size": 96, "vocab_size": 96, "max_position_embeddings": 64}
    folder = make_checkpoint(tmp_path / "lm", model_type="olmoe", **sizes)
    quantize_checkpoint(folder, "W4A16", ignore=r".*\.experts\.0\..*")
    exact, kept = logits_of(folder, "native"), logits_of(folder, "native", "auto")
    assert not torch.equal(kept, exact)
    assert (kept - exact).square().mean().sqrt() < 0.06 * exact.std()


@pytest.mark.parametrize("name", ["awq", "W4A16", "gptq 8 bits"])
def test_integers_are_multiplied_as_they_are(name: str, folder: Path) -> None:
    """With weights auto the kernels multiply by codes, and rows become int8: an error of some hundredths in this model,
    whose weights are wide. Numbers in a wrong order or of wrong scales would have one of about 1.
    """
    quantize_checkpoint(folder, name)
    exact, kept = logits_of(folder, "native"), logits_of(folder, "native", "auto")
    assert not torch.equal(kept, exact)
    assert (kept - exact).square().mean().sqrt() < 0.06 * exact.std()


def test_transformers_reads_the_same_numbers_of_fp8(folder: Path) -> None:
    """Its own code for FP8 dequantizes where there is no GPU; the other formats need packages that are not here."""
    quantize_checkpoint(folder, "fp8 blocks")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_tensors(folder)
    values = dict(model.named_parameters())
    for name in filter(LINEAR.fullmatch, source.names()):
        assert torch.equal(source.get(name), values[name]), name


def test_an_older_tool_s_settings_lie_in_a_file_of_their_own(folder: Path) -> None:
    expected = quantize_checkpoint(folder, "gptq 4 bits")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps({**settings, "quant_method": None}))
    name = f"{Q_PROJ}.weight"
    assert torch.equal(open_tensors(folder).get(name), expected[name])


def change_tensors(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        tensors[f"{Q_PROJ}.{name}"] = change(tensors.get(f"{Q_PROJ}.{name}"))
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder).check()
    assert "\n" not in error.value.message
    prefix = f"checkpoint {folder} cannot be loaded: "
    assert error.value.message.startswith(prefix)
    return error.value.message.removeprefix(prefix)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gptq 4 bits", {"bits": 3}, "quantization_config.bits is 3; what is read is 4 or 8"),
        ("gptq 4 bits", {"bits": "4"}, "quantization_config.bits is '4', not a whole number"),
        ("gptq 4 bits", {"bits": None}, "quantization_config.bits is missing"),
        ("gptq 4 bits", {"bits": 8}, "group_size is 32, which does not divide the 48 inputs of"),
        ("gptq 4 bits", {"group_size": 40}, f"group_size is 40, which does not divide the 96 inputs of {DOWN_PROJ}"),
        ("gptq 4 bits", {"group_size": 0}, "group_size is 0, neither the size of a group nor -1"),
        ("gptq 4 bits", {"group_size": 16}, f"{DOWN_PROJ}.qzeros has the shape (3, 8), not (6, 8) as quant"),
        ("gptq 4 bits", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; what is read is gptq or"),
        ("gptq 4 bits", {"is_marlin_format": True}, "is_marlin_format is True: the layout of one kernel (Marlin)"),
        ("gptq 4 bits", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic has other settings for '+:.*down.*'"),
        ("gptq 4 bits", {"quant_method": "bitsandbytes"}, "quant_method is bitsandbytes, which is not read (awq,"),
        ("gptq 4 bits", {"quant_method": None}, "quantization_config.quant_method is unknown, which is not read"),
        ("awq", {"bits": 8}, "quantization_config.bits is 8; what is read is 4"),
        ("awq", {"version": "gemv"}, "quantization_config.version is 'gemv'; what is read is gemm"),
        ("awq", {"zero_point": False}, "zero_point is false; AWQ is read with zero points only"),
        ("awq", {"modules_to_not_convert": ["q_proj"]}, f"names q_proj, but {Q_PROJ} is quantized in the files"),
        ("awq", {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head', not a list of names"),
        ("awq", {"modules_to_not_convert": ["("]}, "has '(', which is no regular expression"),
        ("W4A16", {"format": "nvfp4-pack-quantized"}, "quantization_config.format is 'nvfp4-pack-quantized'; what is"),
        ("W4A16", {"ignore": ["re:.*q_proj"]}, f"ignore names re:.*q_proj, but {Q_PROJ} is quantized in the files"),
        ("W4A16", {"config_groups": {}}, "is quantized, but no targets of quantization_config.config_groups name it"),
        ("W4A16", {"config_groups": []}, "quantization_config.config_groups is [], not an object"),
        ("W4A16", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3}}}},
         "config_groups.g.weights.num_bits is 3; what is read is 4 or 8"),
        ("W4A16", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}}},
         "weight_packed is packed, but quantization_config.config_groups.g.weights are not integers with scales for"),
        ("W4A16", {"transform_config": {"config_groups": {"R1": {}}}}, "rotations of activations are not computed"),
        ("W4A16", {"sparsity_config": {"format": "marlin-24"}}, "sparsity_config.format is 'marlin-24'"),
        ("fp8 blocks", {"weight_block_size": [64, 32]}, f"{DOWN_PROJ}.weight_scale_inv has the shape (2, 3), not"),
        ("fp8 blocks", {"weight_block_size": [32]}, "weight_block_size is [32], not two sizes such as [128, 128]"),
        ("fp8 blocks", {"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'; what is read is e4m3"),
    ],
)  # fmt: skip
def test_settings_that_are_not_read_are_named(name: str, settings: dict[str, Any], message: str, folder: Path) -> None:
    quantize_checkpoint(folder, name)
    change_config(folder, quantization_config={**FORMATS[name].config, **settings})
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("awq", "qzeros", lambda _: None, f"the weights have no {Q_PROJ}.qzeros, which quantization_config requires"),
        ("awq", "scales", lambda scales: scales.int(), f"{Q_PROJ}.scales is of the type I32, not F16 or BF16 or F32"),
        ("awq", "scales", lambda scales: scales[:1], f"{Q_PROJ}.scales has the shape (1, 128), not (2, 128)"),
        ("awq", "qweight", lambda codes: codes.long(), f"{Q_PROJ}.qweight is of the type I64, not I32"),
        ("awq", "qweight", lambda codes: codes[None], f"{Q_PROJ}.qweight has the shape (1, 64, 16), not 2 dimensions"),
        ("awq", "qweight", lambda codes: codes[:0], f"{Q_PROJ}.qweight is empty"),
        ("awq", "weight", lambda _: torch.zeros(2), f"the weights have {Q_PROJ}.weight twice"),
        ("gptq 4 bits act-order", "g_idx", lambda _: None, f"the weights have no {Q_PROJ}.g_idx"),
        ("gptq 4 bits", "qweight", lambda codes: codes[:, :-4], "has 124 outputs, which are not whole int32 of 4 bits"),
        ("W4A16 zero points", "weight_zero_point", lambda _: None, "the weights have no"),
        ("W8A8", "weight_scale", lambda _: None, f"{Q_PROJ}.weight is of the type I8, which quantization_config does"),
        ("fp8 blocks", "weight_scale_inv", lambda _: None, "is of the type F8_E4M3, but the weights have no"),
    ],
)  # fmt: skip
def test_broken_tensors_are_named(name: str, part: str, change: Any, message: str, folder: Path) -> None:
    quantize_checkpoint(folder, name)
    change_tensors(folder, **{part: change})
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        (
            "gptq 4 bits act-order",
            "g_idx",
            lambda index: index + 1,
            "names groups of which there are none: there",
        ),
        ("W4A16", "weight_shape", lambda shape: shape - 8, "weight_shape says [120, 56], but the packed numbers are"),
    ],
)
def test_broken_numbers_are_named_when_they_are_read(
    name: str, part: str, change: Any, message: str, folder: Path
) -> None:
    quantize_checkpoint(folder, name)
    change_tensors(folder, **{part: change})
    with pytest.raises(CheckpointError) as error:
        open_tensors(folder).get(f"{Q_PROJ}.weight")
    assert message in error.value.message


def test_what_a_list_leaves_out_is_read_as_plain_numbers(folder: Path) -> None:
    expected = quantize_checkpoint(folder, "fp8 blocks")
    original = load_file(folder / "model.safetensors")
    change_tensors(folder, weight=lambda codes: codes.bfloat16(), weight_scale_inv=lambda _: None)
    change_config(folder, quantization_config={**FORMATS["fp8 blocks"].config, "modules_to_not_convert": [Q_PROJ]})
    source = open_tensors(folder)
    assert torch.equal(source.get(f"{Q_PROJ}.weight"), original[f"{Q_PROJ}.weight"].bfloat16())
    other = Q_PROJ.replace("q_proj", "k_proj") + ".weight"
    assert torch.equal(source.get(other), expected[other])


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """The same numbers as transformers' own code, and its logits."""
    # Takes seconds, which every worker that collects this file would spend.
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: PLC0415

    sizes = {**ZOO["gpt_oss"], "intermediate_size": 96, "vocab_size": 96, "max_position_embeddings": 64}
    folder = make_checkpoint(tmp_path / "lm", model_type="gpt_oss", **sizes)
    tensors = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(120, 126, blocks.shape[:3], generator=random, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})

    source = open_tensors(folder)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    expected = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    assert source.shape(name) == expected.shape == (5, 64, 192)
    assert torch.equal(source.get(name), expected)
    assert torch.equal(source.get(name, 3), expected[3])
    quantized = source.quantized(name, 3)
    assert quantized is not None
    assert (quantized.bits, quantized.group) == (4, 32)
    assert torch.equal(quantized.dequantized(), expected[3].t())
    source.close()

    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits_of(folder, "native"), logits, rtol=1e-3, atol=1e-3)


def test_the_transposed_matrices_of_gpt2(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path / "lm")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc"
    stored = FORMATS["gptq 4 bits"].store(tensors.pop(f"{name}.weight").t(), np.random.default_rng(0))
    tensors |= {name + suffix: part.contiguous() for suffix, part in stored.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=FORMATS["gptq 4 bits"].config)
    source = open_tensors(folder)
    assert source.shape(f"{name}.weight") == (64, 256)
    assert torch.equal(source.get(f"{name}.weight"), stored.weight.t().float())
    quantized = source.quantized(f"{name}.weight")
    assert quantized is not None
    assert quantized.codes.shape == (256, 64)
    source.close()


@pytest.mark.parametrize("exponents", [False, True])
def test_fp8_in_stacks_of_experts(exponents: bool) -> None:
    """Three dimensions, with blocks that the matrices do not fill, and scales as numbers or as exponents."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(3, 40, 80, generator=random).to(torch.float8_e4m3fn)
    scales = torch.randint(120, 130, (3, 2, 3), generator=random, dtype=torch.uint8)
    factors = 2.0 ** (scales.float() - 127)
    stored = {"experts.up": values, "experts.up_scale_inv": scales if exponents else factors}
    config = {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0" if exponents else None}
    types = {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.float32: "F32"}
    headers = {name: StoredTensor(types[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()}
    source = QuantizedSource(Memory(stored), layouts({"quantization_config": config}, headers), torch.float32)
    expected = torch.empty(3, 40, 80)
    for expert, output, number in itertools.product(range(3), range(40), range(80)):
        factor = factors[expert, output // 32, number // 32]
        expected[expert, output, number] = values[expert, output, number].float() * factor
    assert torch.equal(source.get("experts.up"), expected)
    assert torch.equal(source.get("experts.up", 2), expected[2])
    assert source.quantized("experts.up", 2) is None


@dataclass(frozen=True)
class Memory:
    """Files that are tensors in memory."""

    tensors: dict[str, torch.Tensor]

    def get(self, name: str, index: int | None = None) -> torch.Tensor:
        return self.tensors[name] if index is None else self.tensors[name][index]

    def close(self) -> None:
        self.tensors.clear()
