"""The share of chats whose last answer a model of a running server gives exactly, greedy. It trains nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

AT_ONCE = 8


@dataclass(frozen=True)
class Question:
    messages: list[dict[str, Any]]
    answer: str


def questions_of(file: Path) -> list[Question]:
    """From a file of chats, as for `tritonlm train`: the last message of each is the expected answer."""
    questions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            *messages, answer = json.loads(line)["messages"]
            questions.append(Question(messages, answer["content"]))
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f'{file}, line {number} must be {{"messages": […, the expected answer]}}') from None
    return questions


def exact_answers(http: httpx.Client, model: str, questions: list[Question]) -> float:
    def is_exact(question: Question) -> bool:
        body = {"model": model, "messages": question.messages, "temperature": 0, "max_tokens": 512}
        response = http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        return bool(response.json()["choices"][0]["message"]["content"] == question.answer)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(is_exact, questions)) / len(questions)
