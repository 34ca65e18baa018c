"""Structured outputs at their edges: wrong grammars, missing and special tokens, resumed and cancelled texts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine.constraints import grammars
from engine.constraints.compiler import ConstraintCompiler
from engine.constraints.constraint import Constraint
from engine.constraints.mask_worker import MaskWorker
from engine.engine import Engine
from engine.monitoring.metrics import DRAFT_TOKENS
from fakes.tiny_lm import make_checkpoint
from llguidance import LLParserLimits
from tokenizers import Tokenizer
from tritonlm.contract import Checkpoint, InvalidRequest, NotOffered

from .harness import make_engine, make_text_engine, run, save_model, step, submit
from .structured_outputs import PROMPT, compiled, constrained

ROOT = Path(__file__).resolve().parents[2]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"json": {"properties": {"not": {"not": {}}}}}, "not is not supported (at /properties/not/not)"),
    ({"json": {"items": {"format": "isbn"}}}, "the format isbn is not supported (at /items/format)"),
    ({"json": {"type": "strin"}}, "Invalid type: strin"),
    ({"json": {"$ref": "#/$defs/none"}}, "/$defs/none"),
    ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, "x-guidance"),
    (
        {"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
        "oneOf needs alternatives that exclude",
    ),
    ({"json": {"pattern": "a{9999999}", "type": "string"}}, "repeats more than"),
    ({"json": False}, "allows no text"),
    ({"json": {"$ref": "#"}}, "structured_outputs.json allows no text at all"),
    ({"json": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}, "refers to itself without an end"),
    ({"regex": "(a{1000}){1000}"}, "structured_outputs.regex is too large"),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-ahead"),
    ({"regex": "a{20000}"}, "{20000} repeats more than"),
    ({"grammar": 'start: "a" missing'}, "1(8): unknown name"),
    ({"grammar": 'root ::= "a" missing'}, "missing"),
    ({"grammar": "start: <|nothing|>"}, "<|nothing|>"),
    ({"grammar": "root ::= " + "(" * 4000 + '"a"' + ")" * 4000}, "cannot be read"),
    ({"grammar": "root ::= " + '"a" | ' * 4000 + '"b"'}, "GBNF must have at most"),
    ({"json": {"allOf": [{"anyOf": [{"required": [f"{n}{k}"]} for n in range(4)]} for k in range(8)]}}, "too large"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("structured") / "lm")


@pytest.fixture(scope="module")
def served(folder: Path) -> tuple[Engine, Tokenizer]:
    return make_text_engine(folder)


@pytest.mark.parametrize(("sent", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_wrong_grammar_is_refused_before_it_runs(
    served: tuple[Engine, Tokenizer], sent: dict[str, Any], message: str
) -> None:
    engine, _ = served
    output = submit(engine, PROMPT, structured_outputs=sent)
    beside = submit(engine, PROMPT, max_tokens=3)
    run(engine)
    assert isinstance(output.error, InvalidRequest)
    assert message in output.error.message
    assert output.error.param == f"structured_outputs.{next(iter(sent))}"
    assert beside.final.finish_reason == "length"


def test_a_grammar_that_grows_too_complex_fails_its_request_alone(
    served: tuple[Engine, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = served
    monkeypatch.setattr(grammars, "_LIMITS", LLParserLimits(max_lexer_states=300))
    outputs = [
        submit(engine, PROMPT, structured_outputs={"regex": "(.*a.{100}|.*b.{100})x"}, max_tokens=300, temperature=1.0),
        submit(engine, PROMPT, max_tokens=30, temperature=1.0),
    ]
    run(engine)
    assert "too complex" in outputs[0].error.message
    assert len(outputs[1].token_ids) == 30


def test_a_resumed_text_must_follow_the_grammar(served: tuple[Engine, Tokenizer]) -> None:
    engine, tokenizer = served
    wrong = tokenizer.encode("abzz").ids
    output = constrained(engine, "regex", resume_token_ids=wrong)
    finished = constrained(engine, "choice", resume_token_ids=tokenizer.encode("right").ids)
    run(engine)
    assert output.error.param == "resume_token_ids"
    assert (finished.final.finish_reason, finished.token_ids) == ("stop", [])


def test_a_request_cancelled_while_it_is_constrained_frees_its_blocks(served: tuple[Engine, Tokenizer]) -> None:
    engine, _ = served
    output = submit(engine, PROMPT, structured_outputs={"regex": "a*"}, request_id="left", max_tokens=300, stream=True)
    for _ in range(4):
        step(engine)
    assert engine.cancel("left") == 1
    run(engine)
    assert output.final.finish_reason == "cancelled"


def test_special_tokens_are_named_in_a_grammar(served: tuple[Engine, Tokenizer]) -> None:
    engine, tokenizer = served
    output = submit(
        engine, PROMPT, structured_outputs={"grammar": 'start: "a" <|endoftext|> "b"'}, max_tokens=9, ignore_eos=True
    )
    run(engine)
    assert tokenizer.decode(output.token_ids, skip_special_tokens=False) == "a<|endoftext|>b"


@pytest.mark.parametrize(
    "sent", [{"grammar": 'start: /[ab]/ <[498]> "b"'}, {"choice": ["a[PAD]b"]}], ids=["id", "text"]
)
@pytest.mark.parametrize("runner", ["auto", "reference"])
def test_a_forced_token_beyond_the_embedding_fails_its_request_alone(
    folder: Path, tmp_path: Path, sent: dict[str, Any], runner: str
) -> None:
    """Such as a token that was added to the tokenizer, while the model's embedding kept its size."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(["[PAD]"])
    assert tokenizer.token_to_id("[PAD]") == Checkpoint(tmp_path).vocab_size == 498
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    engine, _ = make_text_engine(tmp_path, runner=runner)
    output = submit(engine, PROMPT, structured_outputs=sent)
    beside = submit(engine, PROMPT, max_tokens=9, ignore_eos=True)
    run(engine)
    assert isinstance(output.error, InvalidRequest)
    assert "no token of this model's vocabulary continues the grammar" in output.error.message
    assert len(beside.token_ids) == 9


def test_the_end_that_stands_in_for_a_missing_one_is_never_sampled(folder: Path) -> None:
    """A checkpoint without an end of text gets one for the library, beyond its embedding. A grammar may name it."""
    vocab_size = Checkpoint(folder).vocab_size
    compiler, worker = ConstraintCompiler(folder / "tokenizer.json", vocab_size, ()), MaskWorker(vocab_size)
    constraint = compiled(compiler, {"grammar": f'start: "a" <[{vocab_size}]> "b"'})
    assert isinstance(constraint, Constraint)
    constraint.advance(65)
    masks = worker.begin([(constraint, ())]).result()
    compiler.close()
    worker.close()
    assert constraint.forced_token() is None
    assert not masks.words.any()
    assert isinstance(masks.errors[0], InvalidRequest)


def test_a_text_is_resumed_after_an_end_that_its_grammar_names(served: tuple[Engine, Tokenizer]) -> None:
    engine, tokenizer = served
    sent = {"grammar": 'start: "a" <|endoftext|> "b"'}
    resumed = tokenizer.encode("a<|endoftext|>").ids
    goes_on = submit(engine, PROMPT, structured_outputs=sent, max_tokens=9, ignore_eos=True, resume_token_ids=resumed)
    ended = submit(engine, PROMPT, structured_outputs=sent, max_tokens=9, resume_token_ids=resumed)
    run(engine)
    assert tokenizer.decode(goes_on.token_ids, skip_special_tokens=False) == "b"
    assert (ended.final.finish_reason, ended.token_ids) == ("stop", [])


@pytest.mark.parametrize("sampled", ["1", "2"])
def test_a_draft_token_without_a_continuation_changes_nothing(sampled: str) -> None:
    """The prompt proposes a 1, after which the vocabulary has no token for the grammar."""
    results = []
    for drafts in (0, 4):
        engine, tokenizer = make_text_engine(ROOT / "model_repository" / "abacus" / "1", speculative_tokens=drafts)
        engine._speculation_gate = None
        biases = {str(tokenizer.token_to_id(sampled)): 100.0}
        output = submit(
            engine, tokenizer.encode("731+7").ids, structured_outputs={"regex": "3(1fox|2)"}, logit_bias=biases
        )
        run(engine)
        assert bool(engine.metric_values().get(DRAFT_TOKENS)) == bool(drafts)
        last = output.items[-1]
        results.append(str(last) if isinstance(last, InvalidRequest) else tokenizer.decode(output.token_ids))
    assert results[0] == results[1]
    assert results[0] == "32" if sampled == "2" else "no token of this model's vocabulary" in results[0]


def test_a_vocabulary_without_the_needed_tokens_is_an_error() -> None:
    """The bundled calculator has characters as tokens, and knows few of them."""
    engine, tokenizer = make_text_engine(ROOT / "model_repository" / "abacus" / "1")
    prompt = tokenizer.encode("7+8=").ids
    sent = ({"regex": "[0-9]{3}-[A-C]"}, {"choice": ["fox"]}, {"regex": "1fox|2é"}, {"json": {"type": "integer"}})
    outputs = [submit(engine, prompt, structured_outputs=one, max_tokens=9) for one in sent]
    run(engine)
    assert re.fullmatch("[0-9]{3}-[A-C]", tokenizer.decode(outputs[0].token_ids))
    assert isinstance(outputs[1].error, InvalidRequest)
    assert isinstance(outputs[2].error, InvalidRequest)
    assert outputs[3].final.finish_reason == "stop"
    assert tokenizer.decode(outputs[3].token_ids) == "15"


def test_a_tokenizer_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path)
    engine, _ = make_text_engine(tmp_path)
    output = submit(engine, PROMPT, structured_outputs={"regex": "1"})
    run(engine)
    assert isinstance(output.error, NotOffered)
    assert "tokenizer is not supported" in output.error.message
    with pytest.raises(NotOffered, match="structured_outputs"):
        submit(make_engine(tmp_path), PROMPT, structured_outputs={"regex": "1"})
