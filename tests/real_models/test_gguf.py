"""The published GGUF files of two trained models, next to transformers on the same weights, dequantized.

Of SmolLM2-135M most matrices are Q4_1; of Gemma 3 270M they are Q4_K, Q5_0, Q6_K and Q8_0.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.runners.interface import choose_devices
from engine.runners.native.runner import NativeRunner
from engine.runners.select import open_runner
from fakes.models import load_module
from inference.harness import run, submit
from real_checkpoints import CACHE, GEMMA3, SMOLLM2, RealModel, Unavailable, checkpoint
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM
from tritonlm.checkpoints.gguf import prepare
from tritonlm.checkpoints.gguf.header import read_header
from tritonlm.contract import Checkpoint

from .gguf_files import gguf_file
from .texts import CHATS, PATTERNS, PROMPTS

# Of two computations of a log-probability in float32.
_TOLERANCE = 2e-3
_MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}
_ALPHABET = "abc  \n\t\ré你👍ß1234.,;:'\"<>[]{}()ÀÉ\u0301\u200b\u3000½"


class Published:
    def __init__(self, model: RealModel) -> None:
        if model is GEMMA3 and not (CACHE / model.name).exists():
            pytest.skip("takes minutes, so it runs where scripts/real_checkpoints.py gemma3-270m has run before")
        try:
            self.file, self.converted = gguf_file(model), checkpoint(model)
        except Unavailable as error:
            pytest.skip(str(error))
        self.model, self.name, self.folder = model, model.name, prepare(self.file)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=_MODELS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Published(_MODELS[request.param])


@pytest.fixture(scope="module")
def reference(published: Published) -> Any:
    """transformers has dequantized the file's weights to float32."""
    folder = checkpoint(published.model, dtype="float32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def engine_of(published: Published, dtype: str, **settings: Any) -> Engine:
    config = EngineConfig(
        device="cpu", dtype=dtype, runner="native", kv_cache_tokens=4096, max_sequences=16, **settings
    )
    runner = open_runner(published.folder, config, choose_devices("cpu")[0])
    return Engine(runner, config, published.tokenizer.decode, Checkpoint(published.folder).eos_token_ids)


@torch.inference_mode()
def expected_logprobs(model: Any, ids: list[int], begin: int) -> torch.Tensor:
    logprobs = model(torch.tensor([ids])).logits[0, begin - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[begin:])[:, None])[:, 0]


def test_the_header_is_what_the_gguf_package_reads(published: Published) -> None:
    ours, theirs = read_header(published.file), gguf.GGUFReader(published.file)
    assert [(t.name, t.type, t.offset, t.byte_count) for t in ours.tensors.values()] == [
        (t.name, t.tensor_type.name, int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors
    ]
    for name, value in ours.metadata.items():
        assert theirs.fields[name].contents() == pytest.approx(value) if isinstance(value, float) else True
        if isinstance(value, (str, int)):
            assert theirs.fields[name].contents() == value
        if isinstance(value, list):
            assert len(theirs.fields[name].data) == len(value)


def test_tokens_are_those_of_transformers(published: Published) -> None:
    specification = json.loads((published.converted / "tokenizer.json").read_text(encoding="utf-8"))
    expected = Tokenizer.from_str(json.dumps(specification))
    if published.name == SMOLLM2.name:
        # transformers forgets that this model splits digits.
        expected.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    generator = random.Random(5)
    texts = [*PROMPTS, *PATTERNS.values(), *(message["content"] for chat in CHATS for message in chat)]
    texts += [
        Path(__file__).read_text(encoding="utf-8"),
        "",
        " ",
        "  a",
        "a  ",
        "\n\n \n\t\tx",
        "<start_of_turn>user\nhi",
    ]
    texts += ["".join(generator.choices(_ALPHABET, k=generator.randint(1, 60))) for _ in range(1000)]
    for text in texts:
        for special in (True, False):
            ids = published.tokenizer.encode(text, add_special_tokens=special).ids
            assert ids == expected.encode(text, add_special_tokens=special).ids, repr(text)
            assert published.tokenizer.decode(ids) == expected.decode(ids)


def test_texts_and_log_probabilities_are_those_of_transformers(published: Published, reference: Any) -> None:
    engine = engine_of(published, "float32", weights="full")
    prompts = [published.tokenizer.encode(text).ids for text in PROMPTS]
    outputs = [submit(engine, prompt, logprobs=1, max_tokens=24) for prompt in prompts]
    run(engine)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = expected_logprobs(reference, [*prompt, *output.token_ids], len(prompt))
        logprobs = [entry.logprob for entry in output.logprobs]
        assert logprobs == pytest.approx(expected.tolist(), abs=_TOLERANCE)
        # Greedy: no other token is more likely, but for the tolerance.
        assert all(entry.top[0][1] <= entry.logprob + _TOLERANCE for entry in output.logprobs)
    engine.runner.close()


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(published: Published, reference: Any) -> None:
    ids = published.tokenizer.encode("".join(PROMPTS)).ids
    expected = expected_logprobs(reference, ids, 1)
    rounded = AutoModelForCausalLM.from_pretrained(published.converted, dtype=torch.bfloat16).eval()
    limit = (expected_logprobs(rounded, ids, 1) - expected).abs().mean()
    engine = engine_of(published, "bfloat16", weights="full")
    output = submit(engine, ids, logprobs=1, echo=True, max_tokens=1)
    run(engine)
    logprobs = torch.tensor([entry.logprob for entry in output.logprobs[1 : len(ids)]])
    assert (logprobs - expected).abs().mean() < limit
    engine.runner.close()


def test_the_files_own_form_is_near_to_float32_and_takes_no_more_memory(published: Published, reference: Any) -> None:
    """The products are in the file's types, with activations in int8."""
    ids = published.tokenizer.encode("".join(PROMPTS)).ids
    engine = engine_of(published, "bfloat16")
    output = submit(engine, ids, logprobs=1, echo=True, max_tokens=1)
    run(engine)
    logprobs = torch.tensor([entry.logprob for entry in output.logprobs[1 : len(ids)]])
    assert (logprobs - expected_logprobs(reference, ids, 1)).abs().mean() < 0.06
    assert weight_bytes(engine) <= 1.1 * published.file.stat().st_size
    engine.runner.close()


def weight_bytes(engine: Engine) -> int:
    assert isinstance(engine.runner, NativeRunner)
    return engine.runner.weight_bytes


def test_in_the_files_own_form_texts_are_the_same_alone_and_in_a_batch(published: Published) -> None:
    prompts = [published.tokenizer.encode(text).ids for text in PROMPTS]
    engine = engine_of(published, "bfloat16")
    together = [submit(engine, prompt, max_tokens=16) for prompt in prompts]
    run(engine)
    for prompt, output in zip(prompts, together, strict=True):
        alone = submit(engine, prompt, max_tokens=16)
        run(engine)
        assert alone.token_ids == output.token_ids
    engine.runner.close()


def test_chats_are_rendered_by_the_files_template(published: Published) -> None:
    if published.name != SMOLLM2.name:
        pytest.skip("a base model has no chat template")
    encoders = [
        load_module("tokenize", "prompt").PromptEncoder(Checkpoint(f)) for f in (published.folder, published.converted)
    ]
    for chat in CHATS:
        ours, theirs = (encoder.from_messages(json.dumps(chat)) for encoder in encoders)
        assert published.tokenizer.decode(ours, skip_special_tokens=False) == published.tokenizer.decode(
            theirs, skip_special_tokens=False
        )
