"""Structured outputs: every text follows its grammar, and is the same however the engine computes it."""

from __future__ import annotations

import datetime
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from engine.constraints.compiler import ConstraintCompiler
from engine.constraints.constraint import Constraint
from engine.engine import Engine
from engine.output import step_output
from engine.runners.native.runner import NativeRunner
from evaluations.realistic_schemas import generate
from fakes.tiny_lm import make_checkpoint
from tokenizers import Tokenizer
from tritonlm.contract import Checkpoint

from .harness import Collected, make_text_engine, run, submit
from .structured_outputs import CONSTRAINTS, PERSON, PROMPT, compiled, constrained

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 20, "top_p": 0.95},
    "penalised": {"temperature": 0.8, "frequency_penalty": 0.6, "repetition_penalty": 1.2, "logit_bias": {"97": 3.0}},
    "scored": {"temperature": 1.0, "logprobs": 3},
    "echoed": {"echo": True, "logprobs": 1, "temperature": 1.0},
    "delayed": {"temperature": 1.0, "min_tokens": 12},
    "endless": {"temperature": 1.0, "ignore_eos": True},
    "stopped": {"temperature": 1.0, "stop": ["a", "1"], "min_tokens": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("structured") / "lm")


@pytest.fixture(scope="module")
def served(folder: Path) -> tuple[Engine, Tokenizer]:
    return make_text_engine(folder)


def result(output: Collected, engine: Engine) -> tuple[Any, ...]:
    """Log-probabilities are exact for the native kernels. Other matmuls may round a batch of rows differently."""
    exact = isinstance(engine.runner, NativeRunner)

    def value(logprob: float | None) -> Any:
        return logprob if exact or logprob is None else pytest.approx(logprob, abs=1e-4)

    logprobs = [(e.token_id, value(e.logprob), [(i, value(p)) for i, p in e.top]) for e in output.logprobs]
    return output.token_ids, output.final.finish_reason, output.final.usage.completion, logprobs


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_text_is_the_same_however_it_is_computed(
    folder: Path, served: tuple[Engine, Tokenizer], parameters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one without forced tokens; streamed; in a batch; preempted; resumed; with draft tokens."""
    params = PARAMETERS[parameters]

    def results(engine: Engine, **more: Any) -> list[Any]:
        outputs = [constrained(engine, name, seed, **{**params, **more}) for name in CONSTRAINTS for seed in (1, 2)]
        run(engine)
        return [result(output, engine) for output in outputs]

    engine, _ = served
    expected = results(engine)
    assert results(engine, stream=True) == expected
    with monkeypatch.context() as patch:
        patch.setattr(step_output, "_FORCED_SECONDS", 0.0)
        before = engine.metric_values()["forced_tokens"]
        assert results(engine) == expected
        assert engine.metric_values()["forced_tokens"] == before
    small, _ = make_text_engine(folder, kv_cache_tokens=100, max_context_tokens=80, prefill_tokens=8)
    assert results(small) == expected
    assert small.scheduler.preemptions > 0 or "stop" in params, "stopped texts are too short"
    drafting, _ = make_text_engine(folder, speculative_tokens=6)
    drafting._speculation_gate = None
    assert results(drafting) == expected
    for index, (token_ids, reason, count, logprobs) in enumerate(expected):
        name, seed = list(CONSTRAINTS)[index // 2], 1 + index % 2
        cut = len(token_ids) // 2
        if not 0 < cut < len(token_ids):
            continue
        output = constrained(engine, name, seed, **params, resume_token_ids=token_ids[:cut])
        run(engine)
        kept = len(PROMPT) * params.get("echo", False)
        assert result(output, engine) == (token_ids[cut:], reason, count, logprobs and logprobs[kept + cut :])


def test_constrained_rows_leave_the_others_as_they_are(served: tuple[Engine, Tokenizer]) -> None:
    engine, _ = served

    def free(seed: int) -> Collected:
        return submit(engine, PROMPT, temperature=1.0, seed=seed, max_tokens=40, logprobs=2)

    alone = [free(seed) for seed in range(4)]
    run(engine)
    among = []
    for seed in range(4):
        among.append(free(seed))
        constrained(engine, "json", seed, temperature=1.0)
    run(engine)
    assert [result(output, engine) for output in among] == [result(output, engine) for output in alone]


def test_realistic_schemas_are_followed_or_refused_by_name(folder: Path) -> None:
    """scripts/evaluate schemas does the same with hundreds of them."""
    engine, tokenizer = make_text_engine(folder, max_sequences=64)
    cases = []
    for number, (schema, refused) in enumerate(generate(40, seed=1)):
        sent = [
            submit(engine, PROMPT, structured_outputs={"json": schema}, temperature=1.0, seed=seed, max_tokens=300)
            for seed in (number, -number)
        ]
        cases += [(schema, refused, output) for output in sent]
    run(engine)
    valid = 0
    for schema, refused, output in cases:
        if refused:
            assert refused in output.error.message
            assert "/properties/unsupported" in output.error.message
        elif output.final.finish_reason == "stop":
            validator = jsonschema.Draft202012Validator
            answer = json.loads(tokenizer.decode(output.token_ids))
            validator(schema, format_checker=validator.FORMAT_CHECKER).validate(answer)
            valid += 1
        else:
            assert output.final.finish_reason == "length"
    assert valid > len(cases) / 2


@pytest.mark.parametrize("pattern", ["[ä-ü]{4}", ".{3}", "(a|é|€|😀)+!", "[^a-z]{2}x", "[α-ω]{1,3}", "(é|è)(e|\u0301)"])
def test_characters_of_several_bytes_are_whole(served: tuple[Engine, Tokenizer], pattern: str) -> None:
    """Tokens are parts of characters, and several characters begin with the same bytes."""
    engine, tokenizer = served
    outputs = [
        submit(engine, PROMPT, structured_outputs={"regex": pattern}, temperature=2.0, seed=seed, max_tokens=80)
        for seed in range(12)
    ]
    run(engine)
    for output in outputs:
        text = tokenizer.decode(output.token_ids)
        assert "\ufffd" not in text or output.final.finish_reason == "length"
        if output.final.finish_reason == "stop":
            assert re.fullmatch(pattern, text)
    assert any(output.final.finish_reason == "stop" for output in outputs)


def test_dates_exist(folder: Path) -> None:
    compiler = ConstraintCompiler(folder / "tokenizer.json", Checkpoint(folder).vocab_size, {0})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    constraint = compiled(compiler, {"json": {"format": "date", "type": "string"}})
    assert isinstance(constraint, Constraint)
    compiler.close()
    for year, month, day in itertools.product(
        (0, 4, 1900, 2000, 2023, 2024), (0, 2, 4, 12, 13), (0, 1, 28, 29, 30, 31)
    ):
        text = f"{year:04}-{month:02}-{day:02}"
        ids = tokenizer.encode(json.dumps(text)).ids
        assert (constraint.accepted(ids) == len(ids)) == is_date(text), text


def test_numbers_are_beyond_exclusive_bounds_when_they_are_read(folder: Path) -> None:
    compiler = ConstraintCompiler(folder / "tokenizer.json", Checkpoint(folder).vocab_size, {0})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = ("70", "70.0", "70.0000000000000000167", "70.000003", "70.5", "71", "69.99999999999999999", "69.99",
             "69.9", "69.999999", "0", "0.0", "0.5", "-0.5", "1e-400", "94", "94.0", "999", "1000000")  # fmt: skip
    for bound in (70, 70.0, 0, 0.5, 94, 999, 1_000_000, 69.9):
        for keyword, holds in (("exclusiveMinimum", float.__gt__), ("exclusiveMaximum", float.__lt__)):
            number = {"type": "number", keyword: bound}
            constraint = compiled(compiler, {"json": {"type": "array", "items": number, "minItems": 1, "maxItems": 1}})
            assert isinstance(constraint, Constraint)
            for text in texts:
                ids = tokenizer.encode(f"[{text}]").ids
                # No exponent and no more than nine decimals are written beside a bound.
                few = "e" not in text and len(text.partition(".")[2]) <= 9
                allowed = holds(float(text), float(bound)) and few
                assert (constraint.accepted(ids) == len(ids)) == allowed, (keyword, bound, text)
    compiler.close()


def is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def test_forced_tokens_need_no_steps_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine the time of a step is over before all are found.
    monkeypatch.setattr(step_output, "_FORCED_SECONDS", 60)
    engine, tokenizer = make_text_engine(folder)
    output = submit(
        engine, PROMPT, structured_outputs={"choice": ["a long text of which all is forced"]}, max_tokens=60
    )
    run(engine)
    assert tokenizer.decode(output.token_ids) == "a long text of which all is forced"
    assert output.final.finish_reason == "stop"
    values = engine.metric_values()
    assert values["forced_tokens"] == len(output.token_ids) - 1 > 10
    assert values["steps"] < 4


def test_forced_tokens_are_those_of_the_masks(folder: Path) -> None:
    """At each forced token the mask has that token alone."""
    compiler = ConstraintCompiler(folder / "tokenizer.json", Checkpoint(folder).vocab_size, {0})
    source, forced = random.Random(3), 0
    for schema, refused in generate(12, seed=5):
        constraint = compiled(compiler, {"json": schema})
        if not isinstance(constraint, Constraint):
            assert refused
            continue
        for _ in range(60):
            if constraint.complete:
                break
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(constraint._matcher.compute_bitmask(), np.uint8),
                                                   bitorder="little"))  # fmt: skip
            if (token_id := constraint.forced_token()) is not None:
                assert allowed.tolist() == [token_id]
                forced += 1
            constraint.advance(int(source.choice(allowed)) if token_id is None else token_id)
    compiler.close()
    assert forced > 50


def test_the_end_of_a_grammar_ends_the_text(served: tuple[Engine, Tokenizer]) -> None:
    engine, tokenizer = served
    whole = constrained(engine, "json", temperature=1.0, min_tokens=60, ignore_eos=True)
    cut = constrained(engine, "json", temperature=1.0, max_tokens=5)
    exact = submit(engine, PROMPT, structured_outputs={"choice": ["q"]}, max_tokens=1)
    empty = submit(engine, PROMPT, structured_outputs={"regex": "(q{5})?"}, logit_bias={"81": -100}, max_tokens=9)
    run(engine)
    jsonschema.validate(json.loads(tokenizer.decode(whole.token_ids)), PERSON)
    assert whole.final.finish_reason == "stop"
    assert (cut.final.finish_reason, len(cut.token_ids)) == ("length", 5)
    assert (exact.final.finish_reason, tokenizer.decode(exact.token_ids)) == ("stop", "q")
    assert (empty.final.finish_reason, tokenizer.decode(empty.token_ids)) == ("stop", "")


def test_log_probabilities_are_those_of_the_constrained_distribution(served: tuple[Engine, Tokenizer]) -> None:
    engine, _ = served
    output = submit(engine, PROMPT, structured_outputs={"regex": "[ab]{6}"}, temperature=1.0, logprobs=20, max_tokens=9)
    run(engine)
    for entry in output.logprobs:
        total = sum(np.exp(logprob) for _, logprob in entry.top)
        assert total == pytest.approx(1.0, abs=1e-5), "no more than a few tokens are allowed"
        assert dict(entry.top)[entry.token_id] == entry.logprob
