"""The engine on a trained model in float32, compared with transformers: tokens, log-probabilities, chats."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.runners.interface import choose_devices
from engine.runners.select import open_runner
from fakes.models import load_module
from inference.harness import RUNNER, Collected, run, submit
from transformers import AutoModelForCausalLM, AutoTokenizer
from tritonlm.contract import Checkpoint, Chunk

from .texts import CHAT, CHATS, PATTERNS, PROMPTS, of_length

# The tolerance of two computations with different summation order.
TOLERANCE = 2e-3
LONG = 4000
# Of 30. A position is the same to all layers, and for 4,000 of them each layer takes more than a second.
FIRST_LAYERS = 10
SLICE = 512


class Reference:
    """Hugging Face's model. Computes logits in slices: those of a long text would take gigabytes."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def scores(self, ids: Sequence[int], begin: int, top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """The log-probabilities of the tokens from `begin` on, and the top tokens at each position."""
        hidden = self._model.model(torch.tensor([list(ids)])).last_hidden_state[0, begin - 1 : -1]
        actual: list[float] = []
        best: list[list[tuple[int, float]]] = []
        for start in range(0, len(hidden), SLICE):
            logprobs = self._model.lm_head(hidden[start : start + SLICE]).log_softmax(-1)
            targets = torch.tensor(ids[begin + start : begin + start + len(logprobs)])
            actual += logprobs.gather(1, targets[:, None])[:, 0].tolist()
            values, indexes = logprobs.topk(top)
            rows = zip(indexes.tolist(), values.tolist(), strict=True)
            best += [list(zip(*row, strict=True)) for row in rows]
        return actual, best


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module")
def hf_tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def encoder(smollm2: Path) -> Any:
    """The core of `tokenize`."""
    return load_module("tokenize", "prompt").PromptEncoder(Checkpoint(smollm2))


@pytest.fixture(scope="module")
def detokenizer(smollm2: Path) -> Any:
    """The core of `detokenize`."""
    return load_module("detokenize", "detokenizer").Detokenizer(Checkpoint(smollm2))


@contextlib.contextmanager
def open_engine(folder: Path, detokenizer: Any) -> Iterator[Engine]:
    config = EngineConfig(
        device="cpu", dtype="float32", runner=RUNNER, max_sequences=16, kv_cache_tokens=8192, chunk_milliseconds=0.0
    )
    runner = open_runner(folder, config, choose_devices(config.device)[0])
    yield Engine(runner, config, detokenizer._decode, Checkpoint(folder).eos_token_ids)
    runner.close()


@pytest.fixture(scope="module")
def shared_engine(smollm2: Path, detokenizer: Any) -> Iterator[Engine]:
    with open_engine(smollm2, detokenizer) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    """The shared engine, without the prefix cache of earlier tests."""
    shared_engine.pool.forget_idle()
    return shared_engine


@pytest.fixture
def first_layers(smollm2: Path, hf_tokenizer: Any, tmp_path: Path) -> Path:
    """The trained model without its last layers."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16, num_hidden_layers=FIRST_LAYERS)
    model.save_pretrained(tmp_path / "first-layers")
    hf_tokenizer.save_pretrained(tmp_path / "first-layers")
    return tmp_path / "first-layers"


def text_of(detokenizer: Any, answer: Collected) -> str:
    return "".join(detokenizer.text(chunk) for chunk in answer.chunks)


def check_scores(reference: Reference, prompt: Sequence[int], answer: Collected, echoed: bool = False) -> None:
    """Every log-probability equals that of transformers, and every token is the most likely one."""
    new = answer.token_ids[-answer.final.usage.completion :] if answer.final.usage.completion else []
    begin = 1 if echoed else len(prompt)
    entries = answer.logprobs[1:] if echoed else answer.logprobs
    top = len(entries[0].top)
    ids = [*prompt, *new]
    expected, best = reference.scores(ids, begin, top)
    assert [entry.token_id for entry in entries] == ids[begin:]
    assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=TOLERANCE)
    for entry, row in zip(entries, best, strict=True):
        assert [value for _, value in entry.top] == pytest.approx([value for _, value in row], abs=TOLERANCE)
        # Tokens with almost equal values may be in any order.
        assert {i for i, _ in entry.top} >= {i for i, value in row if value > row[-1][1] + TOLERANCE}
    for entry, row in zip(entries[len(ids) - len(new) - begin :], best[len(ids) - len(new) - begin :], strict=True):
        assert entry.token_id in {i for i, value in row if value > row[0][1] - TOLERANCE}


def test_greedy_tokens_and_log_probabilities(engine: Engine, encoder: Any, reference: Reference) -> None:
    prompts = [encoder.from_text(text) for text in PROMPTS]
    answers = [submit(engine, prompt, logprobs=5, max_tokens=24) for prompt in prompts]
    run(engine)
    for prompt, answer in zip(prompts, answers, strict=True):
        check_scores(reference, prompt, answer)


def test_16_concurrent_requests_equal_sequential_ones(engine: Engine, encoder: Any) -> None:
    prompts = [encoder.from_text(f"{text} {number}") for number in range(2) for text in PROMPTS]
    assert len(prompts) == 16
    parameters: dict[str, Any] = {"max_tokens": 10, "logprobs": 0, "ignore_eos": True}
    concurrent = [submit(engine, prompt, **parameters) for prompt in prompts]
    run(engine)
    for prompt, output in zip(prompts, concurrent, strict=True):
        engine.pool.forget_idle()
        alone = submit(engine, prompt, **parameters)
        run(engine)
        assert (alone.token_ids, alone.logprobs) == (output.token_ids, output.logprobs)


# Two forwards of 4,000 tokens, beside other tests on cores that may be slow.
@pytest.mark.timeout(1200)
def test_a_prompt_of_4000_tokens_with_echo_and_log_probabilities(
    first_layers: Path, encoder: Any, detokenizer: Any
) -> None:
    prompt = of_length(encoder.from_text, LONG)
    with open_engine(first_layers, detokenizer) as engine:
        answer = submit(engine, prompt, max_tokens=8, echo=True, logprobs=1)
        # This request uses the prefix cache.
        again = submit(engine, prompt, max_tokens=8, logprobs=1)
        run(engine)
    assert answer.final.usage.prompt == LONG
    assert answer.logprobs[0].logprob is None
    check_scores(Reference(first_layers), prompt, answer, echoed=True)
    assert again.token_ids == answer.token_ids[-8:]


def test_the_chat_template_equals_transformers(encoder: Any, hf_tokenizer: Any) -> None:
    for chat in CHATS:
        expected = hf_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert encoder.from_messages(json.dumps(chat)) == expected


def test_a_chat_reply_ends_with_eos(engine: Engine, encoder: Any, detokenizer: Any, reference: Reference) -> None:
    prompt = encoder.from_messages(json.dumps(CHAT))
    answer = submit(engine, prompt, max_tokens=40, logprobs=1)
    run(engine)
    assert answer.final.finish_reason == "stop"
    text = text_of(detokenizer, answer)
    assert "Paris" in text
    assert "<|" not in text
    check_scores(reference, prompt, answer)


def test_added_tokens_are_one_id_each_and_can_be_skipped(encoder: Any, detokenizer: Any, hf_tokenizer: Any) -> None:
    added = hf_tokenizer.added_tokens_decoder
    assert len(added) == 17
    for index, token in added.items():
        assert encoder.from_text(token.content) == [index]
        text = f"a{token.content} b\n{token.content}{token.content}c"
        ids = encoder.from_text(text)
        assert ids == hf_tokenizer.encode(text, add_special_tokens=False)
        assert ids.count(index) == 3
        whole, clean = (Chunk(0, ids, len(ids), 0, 0, skip_special_tokens=skip) for skip in (False, True))
        assert detokenizer.text(whole) == text
        assert detokenizer.text(clean) == "a b\nc"
    for text in (*PROMPTS, *PATTERNS.values()):
        ids = encoder.from_text(text)
        assert ids == hf_tokenizer.encode(text, add_special_tokens=False)
        assert detokenizer.text(Chunk(0, ids, len(ids), 0, 0)) == hf_tokenizer.decode(ids) == text
