"""Answers of stated types by `instructor`: by a tool, by a schema, in parts, and several of them.

python instructor_models.py URL MODEL
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    kind: Literal["sailor", "baker"]


def main(url: str, model: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=120)
    request: dict[str, Any] = {
        "model": model, "max_tokens": 120, "temperature": 0, "max_retries": 0,
        "messages": [{"role": "user", "content": "Anna is a baker of 31 years."}],
    }  # fmt: skip
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        patched = instructor.from_openai(client, mode=mode)
        person = patched.chat.completions.create(response_model=Person, **request)
        assert isinstance(person, Person)
        *_, last = patched.chat.completions.create_partial(response_model=Person, **request)
        assert last.model_dump() == person.model_dump(), mode
    responses = instructor.from_openai(client, mode=instructor.Mode.RESPONSES_TOOLS)
    person = responses.responses.create(
        response_model=Person, model=model, max_output_tokens=120, temperature=0, max_retries=0,
        input=request["messages"],
    )  # fmt: skip
    assert isinstance(person, Person)


if __name__ == "__main__":
    main(*sys.argv[1:])
