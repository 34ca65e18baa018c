"""Chunks survive the conversion to tensors, checkpoint errors fit in one line, and the contract has no imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonlm.contract import Checkpoint, CheckpointError, Chunk, InvalidRequest, TokenLogprob, Usage
from tritonlm.contract.chunk import LOWEST_LOGPROB
from tritonlm.contract.tensors import CHUNK

CLIENT = Path(__file__).resolve().parents[2] / "client"

int32 = st.integers(0, 2**31 - 1)
values = st.floats(LOWEST_LOGPROB, 0)
logprob = st.builds(TokenLogprob, int32, st.none() | values, st.lists(st.tuples(int32, values), max_size=3).map(tuple))
chunks = st.builds(
    Chunk,
    index=int32,
    window_ids=st.lists(int32, max_size=6),
    window_new=int32,
    cut_start=int32,
    cut_end=int32,
    skip_special_tokens=st.booleans(),
    finish_reason=st.sampled_from(["", "stop", "length", "timeout", "cancelled"]),
    usage=st.builds(Usage, int32, int32, int32),
    token_ids=st.lists(int32, max_size=6),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.lists(logprob, max_size=4),
    as_piece=st.booleans(),
    stop=st.text(max_size=4),
)


@given(chunks)
def test_chunks_survive_the_conversion_to_tensors(chunk: Chunk) -> None:
    ((spec, array),) = chunk.to_arrays().items()
    assert spec == CHUNK
    assert array.shape == (1, *spec.dims), "the batch dimension comes first"
    assert Chunk.from_json(spec.text(array)) == chunk


def test_infinite_log_probabilities_become_a_finite_number() -> None:
    chunk = Chunk(0, [5], 1, 0, 0, logprobs=[TokenLogprob(5, float("-inf"), ((6, float("-inf")),))])
    received = Chunk.from_json(chunk.to_json())
    assert received.logprobs == [TokenLogprob(5, LOWEST_LOGPROB, ((6, LOWEST_LOGPROB),))]


@pytest.mark.parametrize(
    "change",
    [
        {"index": 2**31},
        {"index": True},
        {"window_ids": [1.0]},
        {"window_ids": 1},
        {"window_cut": [1, 2]},
        {"finish_reason": 1},
        {"usage": "123"},
        {"token_ids": [-(2**31) - 1]},
        {"seed": 2**63},
        {"logprobs": [5]},
        {"logprobs": "[]"},
    ],
)
def test_invalid_fields_are_refused(change: dict[str, object]) -> None:
    good = Chunk(0, [5], 1, 0, 0)
    with pytest.raises(InvalidRequest, match="chunk must be a JSON object"):
        Chunk.from_json(json.dumps(json.loads(good.to_json()) | change))


@pytest.mark.parametrize("text", ["", "{", "5", "[]", "{}", "[" * 5000])
def test_text_that_is_not_an_object_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="chunk must be a JSON object"):
        Chunk.from_json(text)


def test_importing_the_contract_imports_no_heavy_library_and_no_other_package() -> None:
    modules = "sys, json, tritonlm.contract, tritonlm.contract.triton_requests"
    program = f"import {modules}; print(json.dumps(sorted(sys.modules)))"
    # In a separate process, without the modules of this test run.
    ran = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(CLIENT)}, capture_output=True, text=True, check=True
    )
    loaded = json.loads(ran.stdout)
    tritonlm_modules = {name for name in loaded if name.startswith("tritonlm")}
    assert "tritonlm.contract" in tritonlm_modules
    assert all(
        name in ("tritonlm", "tritonlm.contract") or name.startswith("tritonlm.contract.") for name in tritonlm_modules
    )
    heavy = {"torch", "transformers", "tokenizers", "jinja2", "tritonclient", "fastapi", "httpx", "pydantic"}
    assert not heavy & {name.split(".")[0] for name in loaded}


class TestCheckpoint:
    def write(self, folder: Path, **files: object) -> Checkpoint:
        complete: dict[str, object] = {
            "config.json": {"vocab_size": 10, "n_positions": 20},
            "tokenizer.json": {},
            "model.safetensors": {},
        }
        for name, content in {**complete, **{name.replace("__", "."): value for name, value in files.items()}}.items():
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (folder / name).write_text(text, encoding="utf-8")
        return Checkpoint(folder)

    def test_a_complete_folder_passes(self, tmp_path: Path) -> None:
        checkpoint = self.write(tmp_path)
        checkpoint.check()
        assert (checkpoint.vocab_size, checkpoint.context_length) == (10, 20)
        assert checkpoint.eos_token_ids == frozenset()
        assert checkpoint.chat_template is None

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("config__json", None, "has no config.json"),
            ("config__json", "{", "not valid JSON"),
            ("config__json", "[]", "must hold a JSON object"),
            ("config__json", {"vocab_size": 0, "n_positions": 20}, "vocab_size must be a positive integer"),
            ("config__json", {"vocab_size": 10}, "no context length"),
            ("tokenizer__json", None, "has no tokenizer.json"),
            ("model__safetensors", None, "no *.safetensors"),
        ],
    )
    def test_a_problem_is_named_in_one_line(self, tmp_path: Path, file: str, content: object, message: str) -> None:
        checkpoint = self.write(tmp_path, **{file: content})
        with pytest.raises(CheckpointError) as error:
            checkpoint.check()
        assert message in error.value.message
        assert "\n" not in error.value.message

    def test_a_missing_folder_is_reported(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            Checkpoint(tmp_path / "nowhere").check()

    def test_weights_are_optional_for_tokenize_and_detokenize(self, tmp_path: Path) -> None:
        self.write(tmp_path, model__safetensors=None).check(weights=False)

    @pytest.mark.parametrize(
        ("shards", "others", "expected"),
        [
            ([], ["consolidated.safetensors", "adapter_model.safetensors", "fp32.safetensors"], ["model.safetensors"]),
            (["model-1.safetensors", "model-2.safetensors"], ["consolidated-1.safetensors"],
             ["model-1.safetensors", "model-2.safetensors"]),
            (["model.safetensors", "model-2.safetensors"], [], ["model-2.safetensors", "model.safetensors"]),
        ],
    )  # fmt: skip
    def test_further_copies_of_the_weights_are_left_out(
        self, tmp_path: Path, shards: list[str], others: list[str], expected: list[str]
    ) -> None:
        index = {"weight_map": dict(enumerate(shards))} if shards else None
        files: dict[str, object] = dict.fromkeys([*shards, *others], "weights")
        checkpoint = self.write(tmp_path, **files, **{"model.safetensors.index.json": index})
        checkpoint.check()
        assert [file.name for file in checkpoint.weight_files()] == expected
        assert checkpoint.file_bytes() == sum((tmp_path / name).stat().st_size for name in expected)

    def test_files_of_other_names_are_the_weights_where_no_file_has_the_usual_one(self, tmp_path: Path) -> None:
        checkpoint = self.write(
            tmp_path, model__safetensors=None, **dict.fromkeys(["consolidated.safetensors", "gptq.safetensors"], "x")
        )
        assert [file.name for file in checkpoint.weight_files()] == ["gptq.safetensors"]
        (tmp_path / "gptq.safetensors").unlink()
        assert [file.name for file in checkpoint.weight_files()] == ["consolidated.safetensors"]

    def test_multimodal_checkpoints_use_text_config(self, tmp_path: Path) -> None:
        nested = {"text_config": {"vocab_size": 7, "max_position_embeddings": 8}}
        checkpoint = self.write(tmp_path, config__json=nested)
        assert (checkpoint.vocab_size, checkpoint.context_length) == (7, 8)

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            # As Gemma 3 4B, Falcon 7B and MPT 7B are published.
            ({"model_type": "gemma3", "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            }}, (262_208, 131_072)),
            ({"model_type": "falcon", "hidden_size": 4544, "vocab_size": 65024}, (65024, 2048)),
            ({"model_type": "mpt", "d_model": 4096, "vocab_size": 50432, "max_seq_len": 4096}, (50432, 4096)),
        ],
    )  # fmt: skip
    def test_what_published_files_leave_out_is_the_default_of_transformers(
        self, tmp_path: Path, config: dict[str, Any], expected: tuple[int, int]
    ) -> None:
        checkpoint = self.write(tmp_path, config__json=config)
        checkpoint.check()
        assert (checkpoint.vocab_size, checkpoint.context_length) == expected

    @pytest.mark.parametrize(
        ("config", "generation", "expected"), [(5, None, {5}), (5, 6, {6}), ([5, 6], None, {5, 6}), (None, [7], {7})]
    )
    def test_end_tokens_come_from_the_generation_config_first(
        self, tmp_path: Path, config: object, generation: object, expected: set[int]
    ) -> None:
        checkpoint = self.write(
            tmp_path,
            config__json={"vocab_size": 10, "n_positions": 20, "eos_token_id": config},
            generation_config__json={"eos_token_id": generation},
        )
        assert checkpoint.eos_token_ids == expected

    def test_special_tokens_may_be_strings_or_objects(self, tmp_path: Path) -> None:
        tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
        checkpoint = self.write(tmp_path, tokenizer_config__json=tokens)
        assert checkpoint.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}

    @pytest.mark.parametrize(
        "template",
        ["from config", [{"name": "tools", "template": "x"}, {"name": "default", "template": "from config"}]],
    )
    def test_a_template_file_takes_precedence(self, tmp_path: Path, template: object) -> None:
        checkpoint = self.write(tmp_path, tokenizer_config__json={"chat_template": template})
        assert checkpoint.chat_template == "from config"
        (tmp_path / "chat_template.jinja").write_text("from file", encoding="utf-8")
        assert Checkpoint(tmp_path).chat_template == "from file"
