"""The model `tokenize` with a fake of Triton's module and a real tokenizer: all kinds of prompts and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints import CONTEXT, END, TEXT, byte_level_tokenizer, write_checkpoint
from fakes.fake_pb_utils import InferenceRequest, Logger
from fakes.models import REPOSITORY, load_module, start_model
from fakes.tokenize_calls import SPECS, accepted, call, ids_of, refused, request_of
from tokenizers import Tokenizer, processors
from tritonlm.contract import (
    Checkpoint,
    CheckpointError,
    ContextLengthExceeded,
    InvalidRequest,
    TritonLMError,
)
from tritonlm.contract.tensors import Array

VOCABULARY = byte_level_tokenizer().get_vocab_size()

# Starts the model with this tokenizer, these settings and this tokenizer config.
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("repository") / "lm"
    return start_model("tokenize", write_checkpoint(folder))


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def started(tokenizer: Tokenizer | None = None, settings: dict[str, str] | None = None, **config: Any) -> Any:
        return start_model("tokenize", write_checkpoint(tmp_path / "lm", tokenizer, **config), **(settings or {}))

    return started


class TestPrompts:
    def test_text(self, model: Any) -> None:
        text = "the fox message_part naïve 猫 👍🏽"
        ids, _ = accepted(model, text_input=text)
        assert byte_level_tokenizer().decode(ids) == text

    def test_ids_are_unchanged(self, model: Any) -> None:
        assert accepted(model, input_ids=[5, 0, VOCABULARY - 1])[0] == [5, 0, VOCABULARY - 1]

    def test_text_gets_the_tokenizers_special_tokens_and_a_chat_does_not(self, start: Start) -> None:
        tokenizer = byte_level_tokenizer()
        end = tokenizer.token_to_id(END)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, end)])
        model = start(tokenizer, chat_template="{{ messages[0].content }}")
        plain = tokenizer.encode("the fox", add_special_tokens=False).ids
        assert accepted(model, text_input="the fox")[0] == [end, *plain]
        assert accepted(model, messages='[{"role": "user", "content": "the fox"}]')[0] == plain
        assert accepted(model, input_ids=plain)[0] == plain

    def test_an_empty_text_becomes_the_bos_token(self, model: Any) -> None:
        assert accepted(model, text_input="")[0] == [byte_level_tokenizer().token_to_id(END)]

    def test_an_empty_text_is_refused_without_a_bos_token(self, start: Start) -> None:
        error = refused(start(bos_token=None), text_input="")
        assert (type(error), error.param) == (InvalidRequest, "text_input")

    def test_truncation_and_padding_of_the_tokenizer_are_ignored(self, start: Start) -> None:
        tokenizer = byte_level_tokenizer()
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=30)
        ids, _ = accepted(start(tokenizer), text_input="the quick brown fox message_part")
        assert byte_level_tokenizer().decode(ids) == "the quick brown fox message_part"

    @pytest.mark.parametrize(
        ("inputs", "message_part"),
        [
            ({}, "got none"),
            ({"text_input": "a", "input_ids": [1]}, "got text_input and input_ids"),
            ({"text_input": "a", "messages": "[]"}, "got text_input and messages"),
            ({"text_input": "a", "input_ids": [1], "messages": "[]"}, "text_input and input_ids and messages"),
        ],
    )
    def test_exactly_one_prompt_is_needed(self, model: Any, inputs: dict[str, Any], message_part: str) -> None:
        error = refused(model, **inputs)
        assert isinstance(error, InvalidRequest)
        assert message_part in error.message
        assert all(name in error.message for name in ("text_input", "input_ids", "messages"))

    @pytest.mark.parametrize(
        ("inputs", "param", "message_part"),
        [
            ({"input_ids": []}, "input_ids", "empty"),
            ({"input_ids": [1, VOCABULARY]}, "input_ids", f"{VOCABULARY}, which is outside"),
            ({"input_ids": [-1]}, "input_ids", "-1, which is outside"),
            ({"input_ids": np.zeros((2, 3), np.int32)}, "input_ids", "batch size"),
            ({"text_input": np.array([[b"a\xff"]], dtype=object)}, "text_input", "UTF-8"),
            ({"messages": np.array([[b"[\xff]"]], dtype=object)}, "messages", "UTF-8"),
            ({"text_input": "a", "sampling_parameters": "{"}, "sampling_parameters", "not valid JSON"),
            ({"text_input": "a", "sampling_parameters": '{"top_p": 7}'}, "top_p", "above 0 to 1"),
        ],
    )
    def test_invalid_prompts_are_refused_by_name(
        self, model: Any, inputs: dict[str, Any], param: str, message_part: str
    ) -> None:
        error = refused(model, **inputs)
        assert (type(error), error.param) == (InvalidRequest, param)
        assert message_part in error.message

    def test_an_invalid_request_fails_alone(self, model: Any) -> None:
        good = request_of(text_input="the fox")
        bad = request_of({"temperature": "hot"}, text_input="the fox")
        first, middle, last = call(model, good, bad, good)
        assert isinstance(middle, InvalidRequest)
        assert isinstance(first, tuple)
        assert isinstance(last, tuple)
        assert first[0] == last[0]

    def test_an_internal_error_fails_one_request_only(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(inputs: dict[str, Array], flat: dict[str, object]) -> object:
            if "seed" in flat:
                raise ZeroDivisionError("secret")
            return real(inputs, flat)

        real = model._reader.read
        monkeypatch.setattr(model._reader, "read", read)
        Logger.errors.clear()
        failed, fine = call(model, request_of({"seed": 1}, text_input="a"), request_of(text_input="a"))
        assert isinstance(failed, TritonLMError)
        assert "secret" not in failed.message
        assert "secret" in Logger.errors[0]
        assert isinstance(fine, tuple)

    def test_only_requested_outputs_are_made(self, model: Any) -> None:
        request = InferenceRequest({"text_input": SPECS["text_input"].pack("a")}, ["request"])
        (response,) = model.execute([request])
        assert [tensor.name() for tensor in response.output_tensors()] == ["request"]

    def test_a_request_for_ids_only_has_no_length_limit(self, model: Any, start: Start) -> None:
        assert ids_of(model, text_input="fox " * CONTEXT) == byte_level_tokenizer().encode("fox " * CONTEXT).ids
        assert ids_of(start(bos_token=None), {"max_tokens": 9 * CONTEXT}, input_ids=[1]) == [1]

    def test_special_tokens_can_be_turned_off_for_a_text(self, start: Start) -> None:
        tokenizer = byte_level_tokenizer()
        end = tokenizer.token_to_id(END)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, end)])
        model = start(tokenizer)
        plain = tokenizer.encode("the fox", add_special_tokens=False).ids
        assert accepted(model, {"add_special_tokens": False}, text_input="the fox")[0] == plain
        assert refused(model, {"add_special_tokens": False}, text_input="").param == "text_input"
        assert refused(model, {"add_special_tokens": False}, input_ids=plain).param == "add_special_tokens"


class TestLimits:
    def test_max_tokens_defaults_to_16_or_what_fits(self, model: Any) -> None:
        assert accepted(model, input_ids=[1] * 4)[1].parameters.max_tokens == 16
        assert accepted(model, input_ids=[1] * (CONTEXT - 3))[1].parameters.max_tokens == 3

    @pytest.mark.parametrize(
        ("prompt", "max_tokens", "named"),
        [(4, CONTEXT - 3, CONTEXT - 3), (CONTEXT, None, 1), (CONTEXT + 9, None, 1), (CONTEXT, 1, 1)],
    )
    def test_a_request_beyond_the_context_is_refused(
        self, model: Any, prompt: int, max_tokens: int | None, named: int
    ) -> None:
        flat: dict[str, object] = {} if max_tokens is None else {"max_tokens": max_tokens}
        error = refused(model, flat, input_ids=[1] * prompt)
        assert isinstance(error, ContextLengthExceeded)
        assert error.message == ContextLengthExceeded.for_lengths(CONTEXT, prompt, named).message

    def test_an_echoed_prompt_may_fill_the_context(self, model: Any) -> None:
        flat: dict[str, object] = {"max_tokens": 0, "echo": True}
        assert accepted(model, flat, input_ids=[1] * CONTEXT)[1].parameters.max_tokens == 0
        assert isinstance(refused(model, flat, input_ids=[1] * (CONTEXT + 1)), ContextLengthExceeded)

    def test_truncation_keeps_the_last_tokens(self, model: Any) -> None:
        long = [n % VOCABULARY for n in range(CONTEXT * 2)]
        ids, request = accepted(model, {"truncate_prompt_tokens": 10, "max_tokens": CONTEXT - 10}, input_ids=long)
        assert ids == long[-10:]
        assert request.parameters.max_tokens == CONTEXT - 10
        assert accepted(model, {"truncate_prompt_tokens": 10}, input_ids=[1, 2])[0] == [1, 2]

    @pytest.mark.parametrize(
        ("parameters", "param", "message_part"),
        [
            ({"logit_bias": {VOCABULARY: 1}}, "logit_bias", f"id {VOCABULARY},"),
            ({"stop_token_ids": [1, VOCABULARY + 5]}, "stop_token_ids", f"0 to {VOCABULARY - 1}"),
            ({"resume_token_ids": [VOCABULARY], "seed": 1}, "resume_token_ids", "vocabulary"),
            ({"resume_token_ids": [1, 2], "max_tokens": 2, "seed": 1}, "resume_token_ids", "nothing is left"),
            ({"min_tokens": 17}, "min_tokens", "max_tokens"),
        ],
    )
    def test_parameters_beyond_the_models_limits_are_refused(
        self, model: Any, parameters: dict[str, object], param: str, message_part: str
    ) -> None:
        error = refused(model, text_input="a", sampling_parameters=json.dumps(parameters))
        assert (type(error), error.param) == (InvalidRequest, param)
        assert message_part in error.message

    def test_all_tokens_but_one_may_be_resumed(self, model: Any) -> None:
        parameters = json.dumps({"resume_token_ids": [1, 2], "max_tokens": 3, "seed": 1})
        assert accepted(model, text_input="a", sampling_parameters=parameters)[1].parameters.resume_token_ids == (1, 2)

    def test_the_config_limits_the_context(self, start: Start) -> None:
        error = refused(start(settings={"max_context_tokens": "10"}), {"max_tokens": 1}, input_ids=[1] * 10)
        assert "maximum context length is 10 tokens" in error.message

    def test_a_small_kv_cache_limits_the_default_of_a_chat(self, start: Start) -> None:
        model = start(settings={"kv_cache_tokens": "40"}, chat_template="{{ messages[0].content }}")
        ids, request = accepted(model, messages='[{"role": "user", "content": "the fox"}]')
        assert request.parameters.max_tokens == 40 - len(ids)

    @pytest.mark.parametrize("setting", ["max_context_tokens", "kv_cache_tokens"])
    def test_settings_never_raise_the_context_and_the_config_wins(self, setting: str) -> None:
        limits = load_module("tokenize", "limits")
        checkpoint = Checkpoint(Path("nowhere"))
        checkpoint.__dict__.update(vocab_size=10, context_length=64)

        def limit(config: str, environment: dict[str, str]) -> int:
            settings = {setting: config} if config else {}
            result: int = limits.Limits.of(checkpoint, settings, environment).context
            return result

        variable = f"TRITONLM_{setting.upper()}"
        assert limit("0", {}) == 64
        assert limit("1000", {}) == 64
        assert limit("20", {variable: "30"}) == 20
        assert limit("", {variable: "30"}) == 30
        assert limit("20", {variable: ""}) == 20
        for bad in ("-1", "many", "1.5", "²"):
            with pytest.raises(CheckpointError, match=setting):
                limit(bad, {})
            with pytest.raises(CheckpointError, match=variable):
                limit("", {variable: bad})


class TestCanonicalRequest:
    def test_a_missing_seed_is_chosen_and_a_given_one_is_kept(self, model: Any) -> None:
        seeds = {accepted(model, text_input="a")[1].parameters.seed for _ in range(20)}
        assert len(seeds) == 20
        assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
        assert accepted(model, {"seed": -5}, text_input="a")[1].parameters.seed == -5

    def test_flat_and_json_parameters_are_merged(self, model: Any) -> None:
        flat: dict[str, object] = {"id": "r1", "temperature": 0, "stop": "x"}
        _, request = accepted(model, flat, text_input="a", sampling_parameters='{"top_k": 3}')
        parameters = request.parameters
        assert (parameters.temperature, parameters.stop, parameters.top_k) == (0.0, ("x",), 3)

    @pytest.mark.parametrize("stream", [None, False, True])
    @pytest.mark.parametrize("exclude", [None, False, True])
    @pytest.mark.parametrize("echo", [False, True])
    def test_include_prompt_follows_stream_echo_and_exclude(
        self, model: Any, stream: bool | None, exclude: bool | None, echo: bool
    ) -> None:
        inputs: dict[str, Any] = {"stream": stream, "exclude_input_in_output": exclude}
        sent = {name: value for name, value in inputs.items() if value is not None}
        _, request = accepted(model, {"echo": True} if echo else None, text_input="a", **sent)
        expected = echo or (not exclude if exclude is not None else not stream)
        assert (request.stream, request.include_prompt) == (bool(stream), expected)


class TestStart:
    def test_an_invalid_checkpoint_is_refused_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            start_model("tokenize", tmp_path / "nowhere")
        folder = write_checkpoint(tmp_path / "lm")
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
            start_model("tokenize", folder)

    @pytest.mark.parametrize("model", ["tokenize", "detokenize"])
    def test_the_process_imports_neither_torch_nor_transformers(self, model: str) -> None:
        program = (
            f"import sys, json; from fakes.models import load_module; load_module({model!r}, 'model'); "
            "print(json.dumps(sorted(sys.modules)))"
        )
        path = os.pathsep.join([str(REPOSITORY.parent / "client"), str(REPOSITORY.parent / "tests")])
        ran = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        loaded = set(json.loads(ran.stdout))
        assert "tokenizers" in loaded
        assert not loaded & {"torch", "transformers", "tritonclient", "fastapi"}


def test_the_whole_training_text_round_trips(model: Any) -> None:
    ids, _ = accepted(model, {"truncate_prompt_tokens": 5}, text_input=TEXT)
    assert ids == byte_level_tokenizer().encode(TEXT).ids[-5:]
