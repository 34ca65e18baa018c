"""Every config.pbtxt matches the contract: names, types and shapes of the tensors, and the ensemble's wiring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contract_tables import README, TABLES, parameter_table, tensor_table, with_tables
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonlm.contract import SamplingParameters, tensors
from tritonlm.contract.tensors import TensorSpec
from tritonlm.serving.entries import model_names, write_entry
from tritonlm.serving.registry import make_entry

REPOSITORY = README.parent
# Further bundled LMs. Each has its own three parts, which link the code of the first LM's.
MORE = ["fable"]
# The inputs and outputs of the three parts.
PARTS: dict[str, tuple[Sequence[TensorSpec], Sequence[TensorSpec]]] = {
    "tokenize": (tensors.TOKENIZE_INPUTS, (*tensors.TOKENIZE_OUTPUTS, tensors.RENDERED_PROMPT)),
    "generate": (tensors.GENERATE_INPUTS, tensors.GENERATE_OUTPUTS),
    "detokenize": (tensors.DETOKENIZE_INPUTS, tensors.DETOKENIZE_OUTPUTS),
}
BASES = tuple(PARTS)
PARTS |= {f"{name}-{part}": PARTS[part] for name in MORE for part in BASES}


def read(model: str) -> Any:
    return text_format.Parse(
        (REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig()
    )


def models() -> list[str]:
    return sorted(path.parent.name for path in REPOSITORY.glob("*/config.pbtxt"))


def parts_of(name: str) -> list[str]:
    return [f"{name}-{part}" if name in MORE else part for part in BASES]


ENSEMBLES = [name for name in models() if read(name).platform == "ensemble"]


def inputs_of(config: Any) -> list[tuple[object, ...]]:
    return [
        (item.name, item.data_type, tuple(item.dims), item.optional, item.allow_ragged_batch) for item in config.input
    ]


def expected_inputs(specs: Sequence[TensorSpec]) -> list[tuple[object, ...]]:
    return [(spec.name, data_type(spec), spec.dims, spec.optional, spec.ragged) for spec in specs]


def outputs_of(config: Any) -> list[tuple[object, ...]]:
    return [(item.name, item.data_type, tuple(item.dims)) for item in config.output]


def expected_outputs(specs: Sequence[TensorSpec]) -> list[tuple[object, ...]]:
    return [(spec.name, data_type(spec), spec.dims) for spec in specs]


def data_type(spec: TensorSpec) -> int:
    number: int = model_config_pb2.DataType.Value(f"TYPE_{spec.dtype}")
    return number


def test_every_model_is_tested() -> None:
    assert ["abacus", *MORE] == ENSEMBLES
    assert set(models()) == {*PARTS, *ENSEMBLES}


@pytest.mark.parametrize("model", PARTS)
def test_the_parts_have_the_contracts_tensors(model: str) -> None:
    config = read(model)
    inputs, outputs = PARTS[model]
    assert config.backend == "python"
    assert inputs_of(config) == expected_inputs(inputs)
    assert outputs_of(config) == expected_outputs(outputs)


@pytest.mark.parametrize("model", PARTS)
def test_the_parts_have_one_cpu_instance(model: str) -> None:
    (group,) = read(model).instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)


@pytest.mark.parametrize("model", PARTS)
def test_every_variable_length_input_is_ragged(model: str) -> None:
    # Otherwise Triton batches only requests of equal length.
    for item in read(model).input:
        assert item.allow_ragged_batch == (-1 in item.dims), item.name


@pytest.mark.parametrize("name", ENSEMBLES)
def test_all_parts_use_one_checkpoint(name: str) -> None:
    checkpoints = {read(model).parameters["checkpoint"].string_value for model in parts_of(name)}
    assert checkpoints == {f"../{name}/1"}


@pytest.mark.parametrize("name", MORE)
def test_a_further_lm_equals_the_generated_entry_and_links_the_code(name: str, tmp_path: Path) -> None:
    entry = make_entry(name=name, path=REPOSITORY / name / "1")
    write_entry(entry, tmp_path / "written", REPOSITORY)
    for model in model_names(entry):
        assert (REPOSITORY / model / "config.pbtxt").read_text() == (
            tmp_path / "written" / model / "config.pbtxt"
        ).read_text()
    for model, part in zip(parts_of(name), BASES, strict=True):
        assert (REPOSITORY / model / "1").readlink() == Path("..", part, "1")


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_has_the_contracts_tensors(name: str) -> None:
    config = read(name)
    # An ensemble does not batch, so its inputs are not ragged.
    assert inputs_of(config) == expected_inputs([replace(spec, ragged=False) for spec in tensors.LM_INPUTS])
    assert outputs_of(config) == expected_outputs(tensors.LM_OUTPUTS)
    assert config.max_batch_size == 1


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_connects_every_input_under_one_name(name: str) -> None:
    steps = read(name).ensemble_scheduling.step
    assert [step.model_name for step in steps] == parts_of(name)
    tokenize, generate, detokenize = steps
    for step in steps:
        assert all(value == key for mapped in (step.input_map, step.output_map) for key, value in mapped.items())
    assert set(tokenize.input_map) == {spec.name for spec in tensors.LM_INPUTS}
    assert set(tokenize.output_map) == set(generate.input_map) == {spec.name for spec in tensors.TOKENIZE_OUTPUTS}
    assert set(generate.output_map) == set(detokenize.input_map) == {tensors.CHUNK.name}
    # All outputs come from one step: Triton would pair outputs of different steps by arrival.
    assert set(detokenize.output_map) == {spec.name for spec in tensors.LM_OUTPUTS}


def test_generate_is_decoupled_and_its_queue_is_limited() -> None:
    config = read("generate")
    assert config.model_transaction_policy.decoupled
    batching = config.dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, SamplingParameters().priority)
    policy = batching.default_queue_policy
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    assert policy.default_timeout_microseconds > 0, "without a default Triton ignores the request's timeout"
    assert policy.max_queue_size > 0, "0 means no limit"


def test_detokenize_preserves_order_and_has_no_queue_limit() -> None:
    batching = read("detokenize").dynamic_batching
    assert batching.preserve_ordering
    assert not batching.HasField("default_queue_policy")


@pytest.mark.parametrize("model", models())
def test_fields_unknown_to_the_oldest_triton_are_not_used(model: str) -> None:
    assert "max_inflight_requests" not in (REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.name)
def test_the_tables_in_the_documents_are_up_to_date(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == with_tables(file), "run: python tests/contract_tables.py"


def test_the_tables_are_complete() -> None:
    specs = {*tensors.LM_INPUTS, *tensors.LM_OUTPUTS, *tensors.GENERATE_INPUTS, *tensors.GENERATE_OUTPUTS}
    assert all(f"`{spec.name}`" in tensor_table() for spec in specs)
    assert "| `max_tokens` | 0 … | – |" in parameter_table()
    assert "| `temperature` | 0 … 2 | 1 |" in parameter_table()


def test_the_repository_holds_models_only() -> None:
    # Triton treats every folder as a model.
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    assert folders == set(models())
    assert not [path for path in REPOSITORY.iterdir() if Path(path).is_symlink() and not path.exists()]
