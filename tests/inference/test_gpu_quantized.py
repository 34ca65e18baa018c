"""Linear layers of 4 and 8 bits on a GPU: their kernel, interpreted on the CPU, equals a plain matmul."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.config import EngineConfig
from engine.runners import packed_linear
from engine.runners.gpu import quantized_linear
from engine.runners.gpu.quantized_linear import QuantizedLinear
from engine.runners.graph_runner import GraphRunner
from torch import nn
from tritonlm.contract import CheckpointError

from .harness import save_model
from .triton_interpreter import interpreter, needs_triton  # noqa: F401 (a fixture)

pytestmark = needs_triton
CPU = torch.device("cpu")


@pytest.mark.parametrize(("bits", "floats"), [(4, False), (8, False), (8, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 96), (32, 256)])
def test_a_layer_computes_its_dequantized_matrix(
    bits: int, floats: bool, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    quantized = quantized_linear._quantized(weight, bits, floats=floats)
    layer = QuantizedLinear(quantized, bias, dtype, CPU)
    for rows in (torch.randn(2, 3, inputs), torch.randn(70, 2 * inputs)[:, ::2], torch.randn(1, inputs)):
        numbers = rows.to(dtype)
        expected = numbers.float() @ quantized.dequantized().t() + bias.float()
        result = layer(numbers)
        assert result.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=1e-3)
    # Rounding to 4 bits with a scale for each 32 numbers loses about a tenth of their deviation, to e4m3 a thirtieth.
    lost = (quantized.dequantized() - weight.float()).std() / weight.float().std()
    assert lost < (0.12 if bits == 4 else 0.03 if floats else 0.012)


@pytest.mark.parametrize("floats", [False, True])
def test_the_weight_of_a_conv1d_is_transposed(floats: bool) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(128, 40).t(), torch.randn(2, 128)
    quantized = quantized_linear._quantized(weight, 8, floats=floats)
    layer = QuantizedLinear(quantized, None, torch.float32, CPU)
    torch.testing.assert_close(layer(rows), rows @ quantized.dequantized().t(), atol=1e-4, rtol=1e-3)


def test_floating_point_codes_keep_small_weights_beside_an_outlier() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 64) * 0.01
    weight[:, 7] = 10.0
    lost = {}
    for floats in (False, True):
        difference = quantized_linear._quantized(weight, 8, floats=floats).dequantized() - weight
        lost[floats] = float((difference / weight).abs().median())
    # int8 rounds most of them to zero.
    assert lost[False] > 0.5
    assert lost[True] < 0.05


def test_weights_in_fp8_are_refused_where_the_device_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert not quantized_linear.has_floats(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert quantized_linear.has_floats(torch.device("cuda:0"))
    monkeypatch.setattr(quantized_linear, "has_floats", lambda _: False)
    with pytest.raises(CheckpointError, match=r"capability 8\.9 .* cpu has less; use weights int8"):
        GraphRunner(tmp_path, _config(weights="fp8"), CPU)


@pytest.mark.parametrize(
    ("family", "weights", "head_bits"), [("llama wide", "int4", 8), ("gpt2", "int4", 4), ("gpt2", "fp8", 8)]
)
def test_a_model_is_quantized_and_keeps_its_logits_nearly(
    family: str, weights: str, head_bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU no layer is packed for the CPU. Attention has tests of its own.
    monkeypatch.setattr(GraphRunner, "_check_kernels", lambda *_: 0)
    monkeypatch.setattr(packed_linear, "is_possible", lambda *_: False)
    folder = save_model(family, tmp_path / family)
    full, quantized = (
        GraphRunner(folder, _config(weights=name, vocabulary_bits=str(head_bits)), CPU) for name in ("full", weights)
    )
    kinds = [type(module) for module in quantized._model.modules()]
    assert nn.Linear not in kinds
    # Llama: four of attention, gate with up, and down. GPT-2: two of attention, two of the MLP.
    assert kinds.count(QuantizedLinear) == 1 + 2 * (6 if family == "llama wide" else 4)
    assert quantized._model.get_output_embeddings()._bits == head_bits
    ids = torch.tensor([[5, 6, 7, 90]])
    rows = torch.arange(4)
    with torch.inference_mode():
        expected, actual = (runner._head(runner._model.get_input_embeddings()(ids)[0]) for runner in (full, quantized))
    assert len(rows) == len(actual)
    assert (expected - actual).std() < 0.15 * expected.std()
    assert not torch.equal(expected, actual)


def test_a_wrong_kernel_and_weights_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 16)

        def get_output_embeddings(self) -> None:
            return None

    forward = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, numbers: forward(self, numbers) + 0.1)
    with pytest.raises(CheckpointError, match=r"off by 0\.1 on this device; use weights full"):
        quantized_linear.quantize(Model(), 8, 8)
    model = Model()
    model.layer.weight.data[3, 4] = torch.inf
    for bits in (4, 8):
        with pytest.raises(CheckpointError, match="not finite"):
            quantized_linear.quantize(model, bits, bits)


def test_without_triton_lang_quantized_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(CheckpointError, match="weights int8 on a GPU need triton-lang"):
        GraphRunner(save_model("llama", tmp_path / "llama"), _config(weights="int8"), CPU)


def _config(**settings: str) -> EngineConfig:
    return EngineConfig(device="cpu", dtype="float32", runner="graphs", max_sequences=2, **settings)  # type: ignore[arg-type]
