"""The benchmarks' tables in docs/performance.md, the kinds of processors, and what a step of a model reads."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"
# Behind the other folders: a benchmark has the name of the engine's package.
sys.path.append(str(BENCHMARKS))

import checkpoints  # noqa: E402
import processor  # noqa: E402
import reads  # noqa: E402
import rivals  # noqa: E402
import serving_report  # noqa: E402

AMX = {"amx_bf16", "avx512_bf16", "avx512f", "avx2"}


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("PAGE", "RESULTS", "PLOT"):
        monkeypatch.setattr(serving_report, name, tmp_path / getattr(serving_report, name).name)
    page = "# Page\n\n<!-- serving -->\nold\n<!-- end of serving -->\n\nafter\n"
    serving_report.PAGE.write_text(page, encoding="utf-8")
    return serving_report


def figures(speed: float, workload: str = "W2") -> dict[str, Any]:
    row = {"tokens/s": speed, "first text, ms": 12.0, "of limit, %": 61.0, "read, GB/s": 30.0, "matmul, GFLOP/s": 900.0}
    return {"start, s": 3.0, "resident, MB": 900.0, "waiting, %": 0.4, workload: row}


def result(speed: float, rival: str = "vllm", kind: str = "avx2", model: str = "gpt2", dtype: str = "bfloat16") -> Any:
    both = {"tritonlm": figures(speed), rival: figures(200.0)}
    return serving_report.Result.of(kind, checkpoints.MODELS[model], rival, dtype, both)


def test_a_table_shows_both_servers_their_ratio_and_their_share_of_the_limits(report: Any) -> None:
    text = report.table([result(300.0), result(150.0, dtype="int8")])
    assert "| vllm | W2 | 300 | 200 | 1.50 | 12 | 12 | 61 % | 61 % |" in text
    assert "| vllm int8 | W2 | 150 | 200 | **0.75** |" in text
    assert "0.4, vllm 0.4 % of all cores' time." in text
    assert "Read bandwidth in the run: 30 to 30 GB/s. Matmul peak in the run: 900 to 900 GFLOP/s." in text
    assert text.count("int8 weights (q8_0 there)") == 1


def test_old_figures_without_limits_have_empty_cells(report: Any) -> None:
    rows: dict[str, Any] = {"W2": {"tokens/s": 3.0}}
    old = report.Result("avx2", "gpt2", "GPT-2", "vllm", "bfloat16", 2, "2026-11-23", "", rows, rows)
    assert "| vllm | W2 | 3.0 | 3.0 | 1.00 |  |  |  |  |" in report.table([old])
    assert "- vllm: bfloat16, 2 cores, 2026-11-23." in report.table([old])


def test_a_run_replaces_its_rivals_rows_in_its_table_alone(report: Any) -> None:
    for one in (result(300.0), result(220.0, "llama.cpp"), result(240.0, kind="amx_bf16"), result(500.0)):
        report.write(one)
    page = report.PAGE.read_text(encoding="utf-8")
    assert page.startswith("# Page\n\n<!-- serving -->\n\n| model | amx_bf16 | avx512_bf16 | avx512 | avx2 |\n")
    assert page.endswith("\n\n<!-- end of serving -->\n\nafter\n")
    # The overview's cells in the order of the kinds.
    overview = "| vllm 1.20 (W2) | not seen | not seen | llama.cpp 1.10 (W2), vllm 2.50 (W2) |"
    assert f"| GPT-2 124M, random weights {overview}" in page
    assert page.index("#### GPT-2 124M, random weights: amx_bf16") < page.index("#### GPT-2 124M, random weights: avx2")
    assert "| vllm | W2 | 300 |" not in page
    stored = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert sorted(stored) == ["gpt2, amx_bf16, vllm", "gpt2, avx2, llama.cpp", "gpt2, avx2, vllm"]
    assert stored["gpt2, avx2, vllm"]["theirs"] == figures(200.0)
    assert report.PLOT.read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(SystemExit, match="has no mark <!-- another -->"):
        report.replace_part("another", "text")


def test_a_kind_and_a_model_of_ones_own_get_columns_and_rows(report: Any) -> None:
    report.write(result(300.0, kind="avx512_bf16 (AMX off)", model="olmoe-tiny"))
    page = report.PAGE.read_text(encoding="utf-8")
    assert "| avx2 | avx512_bf16 (AMX off) |\n" in page
    assert "random weights: avx512_bf16 (AMX off)\n" in page


def test_the_page_holds_the_stored_figures() -> None:
    page = serving_report.PAGE.read_text(encoding="utf-8")
    assert serving_report.page_part(serving_report.load()) in page
    for name in ("serving", "growth"):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end of {name} -->") == 1


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "amx_bf16"),
        ({"TRITONLM_NATIVE_FLAGS": "-mno-amx-bf16"}, "avx512_bf16 (AMX off)"),
        ({"TRITONLM_NATIVE_FLAGS": "-mno-avx512bf16 -mno-amx-bf16"}, "avx512 (AVX512-BF16 off)"),
        ({"TRITONLM_NATIVE_FLAGS": "-mno-avx512f -mno-amx-bf16"}, "avx2 (AVX-512 off)"),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2 (AVX-512 off)"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "plain (AVX2 off)"),
    ],
)
def test_a_restriction_is_part_of_the_kinds_name(environment: dict[str, str], name: str) -> None:
    assert processor.kind(AMX, environment).name == name


@pytest.mark.parametrize(
    ("flags", "vendor", "name", "multiplies"),
    [
        (AMX, processor.INTEL, "amx_bf16", True),
        (AMX - {"amx_bf16"}, processor.INTEL, "avx512_bf16 (Intel)", False),
        (AMX - {"amx_bf16"}, processor.AMD, "avx512_bf16", True),
        ({"avx2"}, processor.INTEL, "avx2", False),
    ],
)
def test_intels_products_of_bfloat16_are_a_kind_of_their_own(
    flags: set[str], vendor: str, name: str, multiplies: bool
) -> None:
    kind = processor.kind(flags, {}, vendor)
    assert (kind.name, kind.multiplies_bfloat16) == (name, multiplies)


def test_the_rivals_get_the_same_restriction() -> None:
    restricted = processor.kind(AMX - {"amx_bf16"}, {"TRITONLM_NATIVE_FLAGS": "-mno-avx512f"})
    assert restricted.rival_environment == {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    assert "-mno-avx512f" in restricted.rival_compiler_flags
    whole = processor.kind({"avx2"}, {})
    assert (whole.name, whole.rival_environment, whole.rival_compiler_flags) == ("avx2", {}, ())


def test_flags_that_leave_amx_on_are_refused() -> None:
    with pytest.raises(SystemExit, match="add -mno-amx-bf16"):
        processor.kind(AMX, {"TRITONLM_NATIVE_FLAGS": "-mno-avx512f"})


def write_checkpoint(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header = json.dumps({name: {"shape": shape} for name, shape in shapes.items()} | {"__metadata__": {}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


LLAMA = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 2}


def test_a_step_reads_all_matrices_and_of_tied_embeddings_the_head(tmp_path: Path) -> None:
    shapes = {
        "model.embed_tokens.weight": [10, 8],
        "model.layers.0.mlp.up_proj.weight": [6, 8],
        "model.norm.weight": [8],
    }
    cost = reads.Cost.of(write_checkpoint(tmp_path / "tied", {**LLAMA, "num_key_value_heads": 2}, shapes))
    assert (cost.layers, cost.head, cost.cached) == (48, 80, 2 * 2 * 2 * 2)
    assert cost.step_bytes(3, 10, 1.5, 2) == 128 * 1.5 + 3 * 10 * 16 * 2
    assert cost.operations(512, 1) == 2 * (48 * 512 + 80)


def test_a_step_reads_the_experts_that_its_rows_choose(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 1}
    shapes = {
        "lm_head.weight": [10, 8], "model.embed_tokens.weight": [10, 8], "model.layers.0.mlp.gate.weight": [4, 8],
        **{f"model.layers.0.mlp.experts.{number}.up_proj.weight": [6, 8] for number in range(4)},
    }  # fmt: skip
    cost = reads.Cost.of(write_checkpoint(tmp_path / "routed", config, shapes))
    assert (cost.layers, cost.head, cost.experts) == (32, 80, 192)
    assert cost.step_weights(1) == 112 + 48
    assert cost.step_weights(2) == 112 + 192 * (1 - 0.75**2)
    assert cost.operations(2, 1) == 2 * (2 * (32 + 48) + 80)


def test_an_endless_copy_has_no_end_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path / "copies")
    folder = write_checkpoint(tmp_path / "model", {**LLAMA, "eos_token_id": 2}, {"lm_head.weight": [2, 8]})
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "bos_token_id": 1}', encoding="utf-8")
    for _ in range(2):
        copy = checkpoints.of_path(folder).checkpoint("bfloat16")
        assert json.loads((copy / "config.json").read_text()) == {**LLAMA, "eos_token_id": None}
        assert json.loads((copy / "generation_config.json").read_text()) == {"eos_token_id": None, "bos_token_id": 1}
        assert (copy / "model.safetensors").samefile(folder / "model.safetensors")
    with pytest.raises(SystemExit, match="has no config"):
        checkpoints.of_path(tmp_path / "nothing")
    with pytest.raises(SystemExit, match=r"has the name of another model, gpt2.*rename it"):
        checkpoints.of_path(tmp_path / "gpt2.gguf")


def test_large_models_get_fewer_requests() -> None:
    names = ["W1-8", "prefill"]
    assert [work.requests for work in checkpoints.MODELS["gpt2"].workloads(names)] == [48, 8]
    assert [work.requests for work in checkpoints.MODELS["llama-1b"].workloads(names)] == [8, 4]
    assert [work.requests for work in checkpoints.MODELS["gpt2"].workloads(names, 2)] == [2, 2]
    assert checkpoints.WORKLOADS["prefill"].counted_tokens == 512
    assert checkpoints.WORKLOADS["W3"].counted_tokens == 32


def test_servers_have_room_for_the_requests_of_long_workloads() -> None:
    assert rivals.options_for("llama.cpp", 1024, 32) == []
    assert rivals.options_for("llama.cpp", 4064, 4) == ["-c", "16384", "-np", "4"]
    assert rivals.options_for("vllm", 4064, 4) == ["--max-model-len", "4096"]
    assert rivals.options_for("tritonlm", 4064, 4) == []
    model = checkpoints.MODELS["llama-1b"]
    assert [(work.name, work.requests) for work in model.workloads(["long-1", "long-4"])] == [
        ("long-1", 2),
        ("long-4", 4),
    ]
    assert "long-1" not in [work.name for work in model.workloads()]
