"""Scores, rankings and decisions: the stated formulas, OpenAI's SDK, and refusals."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from fakes.fake_transport import ABOUT_LM, LM, FakeTransport
from tritonlm.client import sequences
from tritonlm.client.transport import Call
from tritonlm.client.types import Piece
from tritonlm.contract import InvalidRequest
from tritonlm.gateway.scoring.decisions import read_questions

from .conftest import Gateway, running_gateway

RED_OR_BLUE: Any = {
    "type": "choice", "name": "color", "instructions": "Which color?",
    "choices": [{"value": "red", "description": "like fire"}, {"value": "blue"}, {"value": True}],
}  # fmt: skip
TRUE: Any = {"type": "predicate", "instructions": [{"type": "input_text", "text": "It is red."}]}
RATING: Any = {
    "type": "score",
    "instructions": "How red?",
    "levels": [{"label": "not"}, {"label": "so"}, {"label": "very"}],
}


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def log_likelihood(gateway: Gateway, first: str, second: str, special: bool = True) -> list[float]:
    """The log-probabilities of the second text's tokens, from a completion."""
    tokens = [
        gateway.post("/tokenize", model=LM, prompt=text, add_special_tokens=add).json()["tokens"]
        for text, add in ((first, special), (second, False))
    ]
    completion = gateway.post(
        "/v1/completions", model=LM, prompt=tokens[0] + tokens[1], echo=True, logprobs=0, max_tokens=0
    ).json()
    values: list[float] = completion["choices"][0]["logprobs"]["token_logprobs"][len(tokens[0]) :]
    return values


def test_a_score_is_the_mean_probability_of_a_token(gateway: Gateway) -> None:
    answer = gateway.post("/v1/score", model=LM, text_1="The sky is", text_2=[" blue", " red and green"]).json()
    for text, data in zip((" blue", " red and green"), answer["data"], strict=True):
        logprobs = log_likelihood(gateway, "The sky is", text)
        assert data["tokens"] == len(text)
        assert data["log_likelihood"] == pytest.approx(math.fsum(logprobs), rel=1e-12)
        assert data["score"] == pytest.approx(math.exp(math.fsum(logprobs) / len(logprobs)), rel=1e-12)
    pairs = gateway.post("/v1/score", model=LM, text_1=["The sky is", "a"], text_2=[" blue", "b"]).json()
    assert pairs["data"][0] == answer["data"][0]
    assert pairs["usage"]["total_tokens"] > 0


def test_documents_are_ranked_by_the_likelihood_of_the_query(gateway: Gateway) -> None:
    documents = ["cats", {"text": "dogs"}, "a long document about foxes"]
    answer = gateway.post("/v1/rerank", model=LM, query="fox", documents=documents).json()
    texts = ["cats", "dogs", "a long document about foxes"]
    means = [
        math.fsum(v) / len(v) for v in (log_likelihood(gateway, f"Passage: {t}\nQuestion:", " fox") for t in texts)
    ]
    expected = sorted(range(3), key=lambda index: -means[index])
    assert [result["index"] for result in answer["results"]] == expected
    assert [result["document"]["text"] for result in answer["results"]] == [texts[index] for index in expected]
    assert answer["results"][0]["relevance_score"] == pytest.approx(math.exp(max(means)))
    best = gateway.post("/v1/rerank", model=LM, query="fox", documents=documents, top_n=1, return_documents=False)
    assert best.json()["results"] == [{**answer["results"][0], "document": None}]


def test_the_time_limit_is_that_of_the_whole_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeTransport):
        """Each text takes a second of the clock."""

        seconds = 0.0

        async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
            self.seconds += 1
            async for piece in super().generate(call):
                yield piece

    transport = Slow()
    clock = SimpleNamespace(monotonic=lambda: transport.seconds, time=lambda: 0.0)
    monkeypatch.setattr(sequences, "time", clock)
    with running_gateway(transport, request_seconds=50) as gateway:
        answer = gateway.post("/v1/rerank", model=LM, query="fox", documents=[f"d{n}" for n in range(100)])
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert answer.headers["x-should-retry"] == "false"
    # Parts of 32, each with what the earlier ones have left.
    assert [call.timeout for call in transport.calls[::32]] == pytest.approx([50, 18], abs=1)


def test_decisions_have_a_probability_for_each_option(sdk: openai.OpenAI) -> None:
    decision = sdk.decisions.create(model=LM, input="A red fox.", questions=[RED_OR_BLUE, TRUE, RATING])
    color, predicate, rating = decision.answers
    assert color.type == "choice"
    assert [entry.value for entry in color.probabilities] == ["red", "blue", True]
    assert math.fsum(entry.probability for entry in color.probabilities) == pytest.approx(1)
    assert color.confidence == max(entry.probability for entry in color.probabilities)
    assert color.choice in ("red", "blue", True)
    assert (color.name, predicate.name) == ("color", None)
    assert predicate.type == "predicate"
    assert 0 < predicate.probability < 1
    assert rating.type == "score"
    assert [(entry.label, entry.value) for entry in rating.probabilities] == [("not", 0), ("so", 1), ("very", 2)]
    assert rating.score == pytest.approx(sum(entry.value * entry.probability for entry in rating.probabilities))
    assert decision.usage.output_tokens == 0
    assert decision.usage.input_tokens > 0


def test_a_decision_is_the_same_alone_and_with_others(sdk: openai.OpenAI) -> None:
    together = sdk.decisions.create(model=LM, input="A red fox.", questions=[RED_OR_BLUE, TRUE, RATING]).answers
    alone = [sdk.decisions.create(model=LM, input="A red fox.", questions=[q]).answers[0] for q in (RED_OR_BLUE, TRUE)]
    assert alone == together[:2]


def test_the_options_of_a_decision_share_the_computed_input(gateway: Gateway) -> None:
    """Log-probabilities are asked for after the shortest prompt only: what comes before is computed once."""
    gateway.post("/v1/decisions", model=LM, input="A red fox.", questions=[RED_OR_BLUE, TRUE])
    prompts = [call.prompt.input_ids or () for call in gateway.transport.calls]
    options = [len(text) for text in ('"red"', '"blue"', "true", "true", "false")]
    shortest = min(len(prompt) - length for prompt, length in zip(prompts, options, strict=True))
    assert {call.parameters["logprobs_start"] for call in gateway.transport.calls} == {shortest}


def test_the_probability_is_that_of_the_formula(gateway: Gateway) -> None:
    answer = gateway.post("/v1/decisions", model=LM, input="A red fox.", questions=[TRUE]).json()["answers"][0]
    prompt = "A red fox.\n\nIt is red.\n\nIs this true? Answer true or false.\n\nAnswer: "
    sums = [math.fsum(log_likelihood(gateway, prompt, option)) for option in ("true", "false")]
    assert answer["probability"] == pytest.approx(1 / (1 + math.exp(sums[1] - sums[0])))


def test_questions_about_a_chat_use_the_chat_template(gateway: Gateway, sdk: openai.OpenAI) -> None:
    gateway.transport.about = {**ABOUT_LM, "chat_template": "{{ messages }}"}
    chat: Any = [
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": [{"type": "input_json", "data": {"a": 1}}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "red"},
    ]
    answer: Any = sdk.decisions.create(model=LM, input=chat, questions=[TRUE]).answers[0]
    rendered = 'Judge.{"a": 1}red' + "It is red.\n\nIs this true? Answer true or false.\nassistant:"
    sums = [math.fsum(log_likelihood(gateway, rendered, option, special=False)) for option in ("true", "false")]
    assert answer.probability == pytest.approx(1 / (1 + math.exp(sums[1] - sums[0])))


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1"),
        ("score", {"text_1": "", "text_2": "c"}, "text_1"),
        ("score", {"text_1": "a", "text_2": []}, "text_2"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("decisions", {"input": "a", "questions": []}, "questions"),
        ("decisions", {"input": "a", "questions": [{"type": "predicate", "instructions": "a"}] * 401}, "questions"),
        ("decisions", {"input": "a", "questions": [{**RED_OR_BLUE, "choices": [{"value": str(i)} for i in range(256)]}]
          }, "questions[0].choices"),
        ("decisions", {"input": "a", "questions": [{**TRUE, "type": "guess"}]}, "questions[0].type"),
        ("decisions", {"input": "a", "questions": [{"type": "predicate"}]}, "questions[0].instructions"),
        ("decisions", {"input": "a", "questions": [TRUE, {**RATING, "levels": [1]}]}, "questions[1].levels"),
        ("decisions", {"input": "a", "questions": [{**RED_OR_BLUE, "choices": [{"value": "a"}] * 2}]},
         "questions[0].choices"),
        ("decisions", {"input": "a", "questions": [{**RED_OR_BLUE, "choices": [{"value": 1}] * 2}]},
         "questions[0].choices[0].value"),
        ("decisions", {"input": "a", "questions": [{**TRUE, "instructions": [{"type": "input_image"}]}]},
         "questions[0].instructions"),
        ("decisions", {"input": [{"role": "user", "content": [{"type": "input_image"}]}], "questions": [TRUE]},
         "input[0].content[0]"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_mistakes_are_named(gateway: Gateway, path: str, fields: dict[str, Any], param: str) -> None:
    answer = gateway.post(f"/v1/{path}", model=LM, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert gateway.transport.calls == []


def test_the_options_of_a_request_are_limited() -> None:
    choices = [{"value": str(number)} for number in range(255)]
    with pytest.raises(InvalidRequest, match="2040"):
        read_questions([{**RED_OR_BLUE, "choices": choices}] * 8)


@pytest.mark.parametrize(
    ("question", "place"),
    [
        ({**TRUE, "levels": []}, "questions[0].levels"),
        ({**TRUE, "type": ["predicate"]}, "questions[0].type"),
        ({**RED_OR_BLUE, "explain": True}, "questions[0].explain"),
        ({**RATING, "levels": [{"label": "a"}, {"label": "b", "value": 7}]}, "questions[0].levels[1].value"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_fields_of_questions_are_refused_by_their_place(
    gateway: Gateway, question: dict[str, Any], place: str
) -> None:
    answer = gateway.post("/v1/decisions", model=LM, input="A fox.", questions=[question])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, place)


def test_null_in_a_question_means_not_sent(gateway: Gateway) -> None:
    question = {**TRUE, "name": None, "levels": None}
    assert gateway.post("/v1/decisions", model=LM, input="A fox.", questions=[question]).status_code == 200
