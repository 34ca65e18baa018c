"""Routes that answer by likelihoods and generate no text: scores, rankings, decisions."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tritonlm.client.async_client import AsyncClient
from tritonlm.client.likelihood import Continuation, Likelihoods, log_likelihoods
from tritonlm.client.sequences import in_parts
from tritonlm.contract import InvalidRequest

from ..http.errors import RESPONSES
from ..http.middleware import RequestContext
from ..http_responses import ResponseFormat, respond
from ..scoring.decisions import Question, messages_of, plain_prompt, read_questions
from ..scoring.schemas import (
    DecisionAnswers,
    DecisionRequest,
    DecisionUsage,
    RankedDocument,
    Ranking,
    RerankDocument,
    RerankRequest,
    Score,
    ScoreRequest,
    Scores,
    ScoreUsage,
)
from ..services import Services, ServicesParameter
from .openai import common_arguments

router = APIRouter(prefix="/v1", tags=["scoring"], responses=RESPONSES)
# A document is relevant as far as it makes the query likely.
_PASSAGE, _QUERY = "Passage: {}\nQuestion:", " {}"


@router.post("/score", responses={200: {"model": Scores}})
async def score(body: ScoreRequest, request: Request, services: ServicesParameter) -> Response:
    """How likely text_2 is after text_1: exp((1/n) Σ log p(token i of text_2 | text_1, tokens before it))."""
    first, second = _as_list(body.text_1), _as_list(body.text_2)
    if len(first) not in (1, len(second)):
        raise InvalidRequest("text_1 must be one text, or as many as text_2", "text_1")
    first = first * len(second) if len(first) == 1 else first

    def complete(result: Likelihoods, context: RequestContext) -> str:
        data = [
            Score(index=index, score=math.exp(mean), log_likelihood=total, tokens=len(result.logprobs[index]))
            for index, (mean, total) in enumerate(zip(result.means, result.sums, strict=True))
        ]
        scores = Scores(
            id=f"score-{context.request_id}",
            created=int(time.time()),
            model=body.model,
            data=data,
            usage=_usage(result),
        )
        return scores.model_dump_json()

    return await _respond(request, services, body, list(zip(first, second, strict=True)), complete)


@router.post("/rerank", responses={200: {"model": Ranking}})
async def rerank(body: RerankRequest, request: Request, services: ServicesParameter) -> Response:
    """Documents by relevance, the best first. The relevance is the score of the query after the document."""
    documents = [document if isinstance(document, str) else document.text for document in body.documents]

    def complete(result: Likelihoods, context: RequestContext) -> str:
        ranked = sorted(enumerate(result.means), key=lambda pair: -pair[1])[: body.top_n]
        shown = body.return_documents is not False
        results = [
            RankedDocument(
                index=index,
                relevance_score=math.exp(mean),
                document=RerankDocument(text=documents[index]) if shown else None,
            )
            for index, mean in ranked
        ]
        ranking = Ranking(id=f"rerank-{context.request_id}", model=body.model, results=results, usage=_usage(result))
        return ranking.model_dump_json()

    pairs = [(_PASSAGE.format(document), _QUERY.format(body.query)) for document in documents]
    return await _respond(request, services, body, pairs, complete)


@router.post("/decisions", responses={200: {"model": DecisionAnswers}})
async def decide(body: DecisionRequest, request: Request, services: ServicesParameter) -> Response:
    """A probability for each option of each question about an input."""
    questions = read_questions(body.questions)
    chats = [messages_of(body.input, question) for question in questions]

    def complete(result: Likelihoods, _: RequestContext) -> str:
        sums = iter(result.sums)
        answers = [question.answer([next(sums) for _ in question.options]) for question in questions]
        cached, tokens = result.usage.prompt_tokens_details.cached_tokens, result.usage.prompt_tokens
        usage = DecisionUsage.model_validate(
            {
                "input_tokens": tokens,
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": tokens - cached},
                "total_tokens": tokens,
            }
        )
        return DecisionAnswers(model=body.model, answers=answers, usage=usage).model_dump_json()

    async def call() -> Likelihoods:
        return await _decide(services, body, questions, chats, _arguments(request, services, body))

    return await respond(request, body.model, _call_id(request, services), call, ResponseFormat(complete=complete))


async def _decide(
    services: Services, body: DecisionRequest, questions: Sequence[Question], chats: Sequence[Any], arguments: Any
) -> Likelihoods:
    client, model = services.client, body.model
    has_template = (await client.about(model))["chat_template"] is not None

    async def prompt_of(messages: Any) -> str:
        return await client.chat.completions.apply_template(model, messages) if has_template else plain_prompt(messages)

    try:
        prompts = [await prompt_of(chat) for chat in chats]
    except InvalidRequest as error:
        raise InvalidRequest(error.message.replace("messages", "input"), "input") from None
    # A template writes the special tokens itself.
    prefixes = await _tokenize(client, model, prompts, add_special_tokens=not has_template)
    options = await _tokenize(client, model, [text for question in questions for text in question.continuations])
    continuations = [
        Continuation(prefixes[prompt], options[text])
        for prompt, question in zip(prompts, questions, strict=True)
        for text in question.continuations
    ]
    return await log_likelihoods(client, model, continuations, **arguments)


async def _respond(
    request: Request, services: Services, body: Any, pairs: Sequence[tuple[str, str]], complete: Any
) -> Response:
    """Compute the likelihood of the second text of each pair after the first."""
    client, model = services.client, body.model

    async def call() -> Likelihoods:
        prefixes = await _tokenize(client, model, [first for first, _ in pairs], add_special_tokens=True)
        tokens = await _tokenize(client, model, [second for _, second in pairs])
        continuations = [Continuation(prefixes[first], tokens[second]) for first, second in pairs]
        return await log_likelihoods(client, model, continuations, **_arguments(request, services, body))

    return await respond(request, model, _call_id(request, services), call, ResponseFormat(complete=complete))


async def _tokenize(
    client: AsyncClient, model: str, texts: Sequence[str], add_special_tokens: bool = False
) -> dict[str, list[int]]:
    """The token ids of each text, some of them at once."""
    unique, ids = list(dict.fromkeys(texts)), []
    for part in in_parts(unique):
        calls = (client.tokenize(model, text, add_special_tokens=add_special_tokens) for text in part)
        ids += await asyncio.gather(*calls)
    return dict(zip(unique, ids, strict=True))


def _arguments(request: Request, services: Services, body: Any) -> dict[str, Any]:
    sent = {name: getattr(body, name, None) for name in ("priority", "user")}
    return common_arguments(request, services) | {name: value for name, value in sent.items() if value is not None}


def _call_id(request: Request, services: Services) -> str:
    return f"cmpl-{common_arguments(request, services)['request_id']}"


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _usage(result: Likelihoods) -> ScoreUsage:
    return ScoreUsage(prompt_tokens=result.usage.prompt_tokens, total_tokens=result.usage.total_tokens)
