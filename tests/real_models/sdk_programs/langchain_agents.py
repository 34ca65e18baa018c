"""Agents of langchain: the model must call a tool, gets its result, and answers; and an answer of a stated type.

python langchain_agents.py URL MODEL
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

called: list[str] = []
QUESTION = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}]}


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    called.append(city)
    return f"In {city} the sun shines."


class Place(BaseModel):
    """A place."""

    # Otherwise the schema allows further properties, and a small model finds ever more of them.
    model_config = ConfigDict(extra="forbid")

    kind: Literal["city", "river"]
    has_tower: bool


@wrap_model_call
def one_call(request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
    """A small model would not call by itself, or again and again."""
    has_result = any(isinstance(message, ToolMessage) for message in request.messages)
    choice, settings = ("none", {}) if has_result else ("required", {"parallel_tool_calls": False})
    return handler(request.override(tool_choice=choice, model_settings=settings))


def main(url: str, model: str) -> None:
    for responses in (False, True):
        chat = ChatOpenAI(
            base_url=url, api_key="unused", model=model, max_retries=0, timeout=120, temperature=0, max_tokens=60,
            use_responses_api=responses,
        )  # fmt: skip
        check(chat)


def check(chat: Any) -> None:
    called.clear()
    agent = create_agent(chat, tools=[weather], middleware=[one_call])
    messages = agent.invoke(QUESTION)["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"], messages
    assert messages[1].tool_calls[0]["args"] == {"city": called[0]}
    assert messages[2].content == f"In {called[0]} the sun shines."
    assert messages[3].text
    streamed = list(agent.stream(QUESTION, stream_mode="messages"))
    assert "".join(chunk.text for chunk, where in streamed if where["langgraph_node"] == "model") == messages[3].text
    for strategy in (ProviderStrategy(Place), ToolStrategy(Place)):
        answer = create_agent(chat, tools=[], response_format=strategy).invoke(QUESTION)
        assert isinstance(answer["structured_response"], Place)


if __name__ == "__main__":
    main(*sys.argv[1:])
