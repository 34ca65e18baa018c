"""A stream with echo, whose prompt takes several steps: the prompt's text leaves once, with the first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.engine import Engine
from engine.request import Request
from tritonlm.contract import Chunk, GenerationRequest, SamplingParameters

from .harness import Collected, make_engine, run, save_model, step

PROMPT = [3 + n for n in range(30)]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(save_model("gpt2", tmp_path), prefill_tokens=8)


def submit_echo(engine: Engine, stream: bool = True, **parameters: Any) -> Collected:
    params = SamplingParameters.from_mapping(
        {"max_tokens": 6, "temperature": 0, "seed": 7, "return_token_ids": True, "echo": True, **parameters}
    )
    collected = Collected()
    engine.submit(Request("", PROMPT, GenerationRequest(params, stream, True), collected.deliver))
    return collected


def text_of(chunks: list[Chunk]) -> str:
    texts = ["".join(f" {i}" for i in chunk.window_ids) for chunk in chunks]
    return "".join(text[chunk.cut_start : len(text) - chunk.cut_end] for text, chunk in zip(texts, chunks, strict=True))


def test_each_chunk_has_the_logprobs_of_its_new_tokens(engine: Engine) -> None:
    streamed, whole = submit_echo(engine, logprobs=1), submit_echo(engine, stream=False, logprobs=1)
    run(engine)
    assert [chunk.window_new for chunk in streamed.chunks] == [len(chunk.logprobs or []) for chunk in streamed.chunks]
    assert streamed.chunks[0].window_new == len(PROMPT) + 1
    assert [entry.token_id for entry in streamed.logprobs] == [entry.token_id for entry in whole.logprobs]
    assert text_of(streamed.chunks) == text_of(whole.chunks)


def test_the_first_chunk_has_tokens_to_resume_with(engine: Engine) -> None:
    interrupted, whole = submit_echo(engine), submit_echo(engine, stream=False)
    while not interrupted.items:
        step(engine)
    first = interrupted.items[0]
    assert isinstance(first, Chunk)
    assert len(first.token_ids) == 1
    rest = submit_echo(engine, resume_token_ids=first.token_ids)
    run(engine)
    assert text_of([first, *rest.chunks]) == text_of(whole.chunks)
    assert text_of(whole.chunks).startswith("".join(f" {i}" for i in PROMPT))
